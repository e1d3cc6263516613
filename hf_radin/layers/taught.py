"""The last layers of a soup, taught by an ensemble; of these, its head, refitted: now or again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from hf_radin.images.cache import SPARED
from hf_radin.layers.record import HeadRecord
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import Target
from hf_radin.logits.passes import compute_soup
from hf_radin.metrics.cross_entropy import calibrated_losses, log_losses
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.runtime.files import digest
from hf_radin.runtime.processes import progress_bar
from hf_radin.tail.teach import TaughtTail
from hf_radin.weights.average import average_model
from hf_radin.weights.head import FeatureRunning, Head, Inputs, RefittedHead, find_head
from hf_radin.weights.refit import FOLDS, Lesson, Refit, logits_of, refit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        predictions: the class of each image `(images,)`, multi-label all decisions `(images, classes)`.
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
    bank, processes = teaching_bank(bank, recipe, teacher), bank.processes
    place = processes.decide(lambda: find_head(bank.ingredients[0], bank.images.example()))
    features = shown_features(bank, bank.with_body_of(recipe), place, "features", place)

    def compared() -> tuple[Refit, np.ndarray, np.ndarray, np.ndarray | None]:
        teaching, labels = bank.mixed(bank.row(teacher.ensemble), np.arange(len(bank))), np.asarray(bank.labels)
        averaged = bank.soup_features(recipe).layer() or place.layer_of(averaged_soup(bank, recipe))
        taught, device = labels if teacher.labels else None, processes.float64_device
        lesson = Lesson(features, teaching, averaged, taught, device=device, multi_label=bank.is_multi_label)
        with progress_bar(total=FOLDS + 1, desc="Refitting the head", unit="fit", delay=DELAY) as bar:
            result = refit(lesson, bank.contents, seed=seed, on_fit=bar.update)
        logits = result.unseen_logits(features)
        averaged_losses = calibrated_losses(logits_of(averaged, features, np.arange(len(features))), labels)
        return result, log_losses(logits, labels), averaged_losses, logits if with_logits else None

    result, losses, averaged_losses, logits = processes.decide(compared)
    record = replace(
        first_record(bank, teacher, hold_out, seed),
        folds=FOLDS,
        penalty=result.penalty,
        labels=result.labels,
        sha256=result.layer.sha256,
    )
    head = RefittedHead(place, result.layer)
    return CookedLayers(head, record, features, result.predictions, losses, averaged_losses, logits)


def teaching_bank(bank: LogitBank, recipe: Recipe, teacher: Teacher) -> LogitBank:
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


def first_record(bank: LogitBank, teacher: Teacher, hold_out: tuple[float, int] | None, seed: int) -> HeadRecord:
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
        source=None if bank.manifest.data.is_labelled else replace(bank.manifest.data, key=""),
    )


def shown_features(bank: LogitBank, recipe: Recipe, inputs: Inputs, name: str, head: Head | None = None) -> np.ndarray:
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
        model = averaged_soup(bank, recipe)
        if head is not None and processes.is_main:
            cached.write_layer(head.layer_of(model))
        return model

    processes.decide(refuse)
    target = Target("Features of the soup", path, inputs.features, f"{cached.subject} {path.name}")
    running = FeatureRunning.of(passes.running, inputs)
    whole = replace(passes, running=running, logits_dtype="float32")
    features, _ = compute_soup(target, bank.images, make_model, whole, bank.samples)
    return features[bank.places]


def averaged_soup(bank: LogitBank, recipe: Recipe) -> PreTrainedModel:
    """A soup with its averaged head."""
    return average_model(bank.ingredients, recipe, statistics=bank.statistics)
