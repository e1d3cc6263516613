"""The last layers of a soup, taught by an ensemble: its head refitted, or its tail distilled; now or again."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from hf_radin.images.cache import SPARED
from hf_radin.layers.record import DISTILLED, HALVES, HeadRecord, TailRecord
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import Target
from hf_radin.logits.passes import compute_soup, repeated
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.runtime.files import digest
from hf_radin.runtime.processes import progress_bar
from hf_radin.tail.choose import choose_cut
from hf_radin.tail.cut import Cut, open_tail
from hf_radin.tail.teach import Course, TailLesson, TaughtTail, tail_logits, teach
from hf_radin.weights.average import average_model
from hf_radin.weights.head import FeatureRunning, Head, Inputs, RefittedHead, find_head
from hf_radin.weights.refit import (
    FOLDS,
    Lesson,
    Refit,
    calibrated_losses,
    draw_folds,
    log_losses,
    logits_of,
    refit,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Seconds after which it is shown how far the refit of a head is: most take less.
DELAY = 5

L = TypeVar("L", RefittedHead, TaughtTail)


@dataclass(frozen=True, eq=False)
class CookedLayers(Generic[L]):
    """The last layers of a soup that were taught, how to make them again, and how they compare with the averaged ones.

    What is said of images is said of layers that did not see the image: those that other folds taught.

    Args:
        head: taught by all images of a bank.
        record: how it was made.
        features: what they are given of images, `(images, features)`; may be memory-mapped.
        predictions: the class of each image, `(images,)`.
        losses: minus the logarithm of the probability that an image is given for its label, in nats: `(images,)`.
        averaged_losses: the same of the averaged layers, at the temperature that is best for them.
        logits: `(images, classes)`; None unless they were wanted.
    """

    head: L
    record: HeadRecord
    features: np.ndarray
    predictions: np.ndarray
    losses: np.ndarray
    averaged_losses: np.ndarray
    logits: np.ndarray | None = None


def refit_head(
    bank: LogitBank,
    recipe: Recipe,
    teacher: Teacher,
    *,
    hold_out: tuple[float, int] | None = None,
    seed: int = 0,
    with_logits: bool = False,
) -> CookedLayers[RefittedHead]:
    """The head of a soup, refitted to an ensemble's logits of the images of a bank.

    The soup is shown the whole split once more, in whole blocks, whatever parts of it a search has shown it before:
    so the same head comes again to the last bit. Its features are cached beside the bank. All processes call this.

    Args:
        bank: of the images that teach; its ingredients hold those of the soup and of the teacher.
        recipe: of the soup.
        teacher: what the head is fitted to.
        hold_out: the share of the split, and the seed, that a part of it was held out with (`LogitBank.divided`).
        seed: of the folds.
        with_logits: whether the logits of heads that did not see the image are wanted.

    Raises:
        ValueError: if the architecture has no head that can be refitted, the split is too small, or after a pilot.
    """
    bank, processes = _teaching(bank, recipe, teacher), bank.processes
    place = processes.decide(lambda: find_head(bank.ingredients[0], bank.images.example()))
    features = _shown(bank, recipe, place, "features", place)

    def compared() -> tuple[Refit, np.ndarray, np.ndarray, np.ndarray | None]:
        teaching, labels = bank.mixed(bank.row(teacher.ensemble), np.arange(len(bank))), np.asarray(bank.labels)
        averaged = bank.soup_features(recipe).layer() or place.layer_of(_averaged(bank, recipe))
        taught, device = labels if teacher.labels else None, processes.float64_device
        lesson = Lesson(features, teaching, averaged, taught, device=device)
        with progress_bar(total=FOLDS + 1, desc="Refitting the head", unit="fit", delay=DELAY) as bar:
            result = refit(lesson, bank.contents, seed=seed, on_fit=bar.update)
        logits = result.unseen_logits(features)
        averaged_losses = calibrated_losses(logits_of(averaged, features, np.arange(len(features))), labels)
        return result, log_losses(logits, labels), averaged_losses, logits if with_logits else None

    result, losses, averaged_losses, logits = processes.decide(compared)
    record = replace(
        _record(bank, teacher, hold_out, seed),
        folds=FOLDS,
        penalty=result.penalty,
        labels=result.labels,
        sha256=result.layer.sha256,
    )
    head = RefittedHead(place, result.layer)
    return CookedLayers(head, record, features, result.predictions, losses, averaged_losses, logits)


def distill_tail(
    bank: LogitBank,
    recipe: Recipe,
    teacher: Teacher,
    course: Course,
    *,
    tail: str | Cut = "block",
    judge: LogitBank | None = None,
    hold_out: tuple[float, int] | None = None,
    with_logits: bool = False,
) -> CookedLayers[TaughtTail]:
    """The last layers of a soup, taught the probabilities of an ensemble on the images of a bank.

    The soup is shown the whole split once more; what its tail is given is cached beside the bank. Each half of the
    images then judges the tail that the other half taught, and all teach the final one. All processes call this, and
    the main one teaches.

    Args:
        bank, recipe, hold_out, with_logits: as for `refit_head`.
        teacher: whose probabilities are taught; with labels, `course.share` of them.
        tail: which layers, as in `choose.choose_cut`; or where they begin, if that was found (`find_cut`).
        judge: the bank of another split, whose images judge the final layers; by default the halves do.

    Raises:
        ValueError: if the model can't be cut there, there are too few images, the disk is too small for what the tail
            is given, or after a pilot.
    """
    bank, processes = _teaching(bank, recipe, teacher), bank.processes
    cut = tail if isinstance(tail, Cut) else find_cut(bank, recipe, tail)
    course = replace(course, batch_size=min(course.batch_size, _fewest(bank, course.seed)))
    logger.info(
        "From %s on the soup has %s parameters and %.3g%% of its multiplications: to teach them takes as many as %.3g "
        "passes over %r.",
        cut.module,
        f"{cut.parameters:,}",
        100 * cut.share,
        (6 if judge is None else 3) * course.epochs * cut.share,  # forth and twice as much back, with halves once more
        bank.split,
    )
    teaching, judging = _lesson(bank, recipe, cut, teacher), None
    if judge is not None:
        judge = judge.by_content
        judging = _lesson(judge, recipe, cut, teacher)
    final, averaged, logits = processes.decide(
        lambda: _teach(bank, _averaged(bank, recipe), cut, teaching, course, judging)
    )
    labels = np.asarray((judge or bank).labels)
    record = replace(
        _record(bank, teacher, hold_out, course.seed),
        kind=DISTILLED,
        folds=HALVES,
        labels=course.share if teacher.labels else 0.0,
        sha256=final.sha256,
        tail=TailRecord(cut.module, cut.parameters, cut.share, course.epochs, course.rate, course.batch_size),
    )
    losses, before = log_losses(logits, labels), calibrated_losses(averaged, labels)
    shown = logits if with_logits else None
    return CookedLayers(final, record, teaching.given, logits.argmax(1), losses, before, shown)


def _lesson(bank: LogitBank, recipe: Recipe, cut: Cut, teacher: Teacher) -> TailLesson:
    """What the images of a bank teach a tail."""
    given = _shown(bank, recipe, Inputs((cut.module,), (cut.width,)), f"tail-{digest(cut.module)}")
    labels = np.asarray(bank.labels) if teacher.labels else None
    return TailLesson(given, bank.mixed(bank.row(teacher.ensemble), np.arange(len(bank))), labels)


def _teach(
    bank: LogitBank,
    model: PreTrainedModel,
    cut: Cut,
    lesson: TailLesson,
    course: Course,
    judging: TailLesson | None,
) -> tuple[TaughtTail, np.ndarray, np.ndarray]:
    """The tail that all images teach, and the logits of images of the averaged one and of those that did not see the
    image, `(images, classes)` each: of the images that judge, or else of these, by the tails that other halves taught.

    Images are taken in the order of their contents, so that the order of the split changes nothing.
    """
    running = bank.passes().running
    model, device = replace(running, compiled=False).ready(model).float(), running.accelerator.device
    order, judged = np.argsort(bank.contents, kind="stable"), judging or lesson
    start, everything = TaughtTail.of(model, cut), np.arange(len(judged.teacher))
    folds = draw_folds(bank.contents, seed=course.seed, folds=HALVES)[order]
    halves = [] if judging else [order[folds == half] for half in range(HALVES)]
    total = course.steps(len(order)) + sum(course.steps(len(half)) for half in halves)
    batch = {name: value.to(device) for name, value in repeated(_example(bank), course.batch_size).items()}
    with (
        open_tail(model, cut, batch) as run,
        progress_bar(total=total, desc="Teaching the last layers", unit="step", delay=DELAY) as bar,
    ):
        answer = partial(tail_logits, run, cut, judged, batch_size=course.batch_size, device=device)
        averaged = answer(everything)
        logits = averaged.copy()
        if judging is None and lesson.is_known(averaged, course.share):
            return start, averaged, averaged
        for teaching, half in zip(halves, halves[::-1], strict=True):
            teach(model, run, cut, lesson, teaching, course, on_step=bar.update)
            logits[half] = answer(half)
            start.put_into(model)
        teach(model, run, cut, lesson, order, course, on_step=bar.update)
        if judging:
            logits = answer(everything)
    return TaughtTail.of(model, cut), averaged, logits


def find_cut(bank: LogitBank, recipe: Recipe, tail: str) -> Cut:
    """Where the tail of a soup begins, as `choose.choose_cut` finds it. All processes call this."""
    return bank.processes.decide(lambda: choose_cut(_averaged(bank, recipe).float(), _example(bank), tail))


def _example(bank: LogitBank) -> dict[str, torch.Tensor]:
    """An image, prepared: one that is cached, or else the first."""
    import torch

    example, blocks = bank.images.example(), bank.images.stream(0, 1)
    while example is None:  # a bank has images
        _, inputs = next(blocks)
        if inputs and len(next(iter(inputs.values()))):
            example = {name: value[:1].to(torch.device("cpu"))[0] for name, value in inputs.items()}
    return example


def _fewest(bank: LogitBank, seed: int) -> int:
    """How many images the smaller half has."""
    return int(np.bincount(draw_folds(bank.contents, seed=seed, folds=HALVES)).min())


def _teaching(bank: LogitBank, recipe: Recipe, teacher: Teacher) -> LogitBank:
    """A bank that can teach, its ingredients by content.

    Raises:
        ValueError: if it has not all the ingredients, or not the logits of all images.
    """
    bank = bank.by_content
    bank.ingredients.select([*recipe.used, *teacher.used])  # refuses others
    if not bank.knows(bank.row(teacher.ensemble)) or bank.is_pilot:
        raise ValueError(
            f"The logits of the split {bank.split!r} are not all known after a pilot, and last layers are taught by "
            "all of them: compute them without pilot."
        )
    return bank


def _record(bank: LogitBank, teacher: Teacher, hold_out: tuple[float, int] | None, seed: int) -> HeadRecord:
    """Who taught, and on which images; what was taught is still to be added."""
    return HeadRecord(
        teacher=Recipe(tuple(teacher.used), tuple(teacher.used.values())),
        data=bank.manifest.data.key,
        split=bank.whole.manifest.data.split,
        hold_out=hold_out and hold_out[0],
        hold_out_seed=hold_out[1] if hold_out else 0,
        images=len(bank),
        places=digest(bank.ids.tolist()),
        run=bank.manifest.run,
        batch_size=bank.manifest.batch_size,
        seed=seed,
        folds=0,
        penalty=0.0,
        sha256="",
    )


def _shown(bank: LogitBank, recipe: Recipe, inputs: Inputs, name: str, head: Head | None = None) -> np.ndarray:
    """What modules of a soup are given of the images of a bank, `(images, features)`; it is shown the whole split.

    Args:
        name: of the file.
        head: of the soup, to be written beside its features.

    Raises:
        ValueError: if the disk is too small.
    """
    cached, passes, processes = bank.soup_features(recipe), bank.passes(), bank.processes
    path = bank.soup_path(recipe).with_name(f"{cached.folder.name}-{name}.npy")
    needed = 4 * bank.samples * inputs.features

    def refuse() -> None:
        free = shutil.disk_usage(bank.folder).free
        if not path.exists() and free < needed + SPARED:
            raise ValueError(
                f"What {inputs.modules[0]} of the soup is given of {bank.samples:,} images takes {needed:,} bytes, "
                f"and there are {free:,} free in {bank.folder}: make room, name another place (--cache-dir), or teach "
                "fewer layers."
            )

    def make_model() -> PreTrainedModel:
        model = _averaged(bank, recipe)
        if head is not None and processes.is_main:
            cached.write_layer(head.layer_of(model))
        return model

    processes.decide(refuse)
    target = Target("Features of the soup", path, inputs.features, f"{cached.subject} {path.name}")
    running = FeatureRunning.of(passes.running, inputs)
    whole = replace(passes, running=running, logits_dtype="float32")
    features, _ = compute_soup(target, bank.images, make_model, whole, bank.samples)
    return features[bank.places]


def _averaged(bank: LogitBank, recipe: Recipe) -> PreTrainedModel:
    """A soup with its averaged head."""
    return average_model(bank.ingredients, recipe, statistics=bank.statistics)
