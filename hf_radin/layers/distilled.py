"""The last layers of a soup, a tail, distilled from an ensemble: now or again."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.layers.record import DISTILLED, HALVES, TailRecord
from hf_radin.layers.taught import DELAY, CookedLayers, averaged_soup, first_record, shown_features, teaching_bank
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.passes import repeated
from hf_radin.metrics.cross_entropy import best_scale, calibrated_losses, log_losses
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.runtime.files import digest
from hf_radin.runtime.processes import progress_bar
from hf_radin.tail.choose import choose_cut
from hf_radin.tail.cut import Cut, open_tail
from hf_radin.tail.teach import Course, TailLesson, TaughtTail, seconds_of_a_step, tail_logits, teach
from hf_radin.weights.head import Head, HeadError, Inputs, find_head
from hf_radin.weights.refit import draw_folds

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What logits are multiplied by at most, before a course: a teacher that has no doubt wants any number.
MOST = 10


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

    The soup is shown the whole split once more; what its tail is given is cached beside the bank. All processes call
    this, and the main one teaches.

    Args:
        bank, recipe, hold_out, with_logits: as for `refit_head`.
        teacher: whose probabilities are taught; with labels, `course.share` of them.
        tail: which layers, as in `choose.choose_cut`; or where they begin, if that was found (`find_cut`).
        judge: the bank whose images judge the layers. Of the bank that teaches, each half judges the tail that the
            other half taught. By default nothing is said of them: there are no losses then.

    Raises:
        ValueError: if the model can't be cut there, there are too few images, the disk is too small for what the tail
            is given, or after a pilot.
    """
    has_halves = judge is bank
    bank, processes = teaching_bank(bank, recipe, teacher), bank.processes
    cut = tail if isinstance(tail, Cut) else find_cut(bank, recipe, tail)
    course = replace(course, batch_size=min(course.batch_size, _fewest(bank, course.seed)))
    logger.info(
        "From %s on the soup has %s parameters and %.3g%% of its multiplications: to teach them takes as many as %.3g "
        "passes over %r.",
        cut.module,
        f"{cut.parameters:,}",
        100 * cut.share,
        course.passes(cut, halves=has_halves),
        bank.split,
    )
    lesson, others = _lesson(bank, recipe, cut, teacher), None
    if judge is not None and not has_halves:
        judge = judge.by_content
        others = _lesson(judge, recipe, cut, teacher)
    head = processes.decide(lambda: _head(bank))
    training = _Training(bank, recipe, cut, head, lesson, others, has_halves=has_halves)
    trained = processes.decide(lambda: training.trained(course))
    course = trained.course
    record = replace(
        first_record(bank, teacher, hold_out, course.seed),
        kind=DISTILLED,
        folds=HALVES,
        labels=course.share if teacher.labels else 0.0,
        sha256=trained.tail.sha256,
        tail=TailRecord(cut.module, cut.parameters, cut.share, course.epochs, course.rate, course.batch_size),
    )
    logits, losses, before = trained.logits, np.zeros(0), np.zeros(0)
    if judge is not None:
        labels = np.asarray((bank if has_halves else judge).labels)
        losses, before = log_losses(logits, labels), calibrated_losses(trained.averaged, labels)
    shown = logits if with_logits else None
    return CookedLayers(trained.tail, record, lesson.given, bank.predictions_of(logits), losses, before, shown)


def find_cut(bank: LogitBank, recipe: Recipe, tail: str) -> Cut:
    """Where the tail of a soup begins, as `choose.choose_cut` finds it. All processes call this."""
    return bank.processes.decide(lambda: choose_cut(averaged_soup(bank, recipe).float(), _example(bank), tail))


@dataclass(frozen=True, eq=False)
class _Trained:
    """What came of the training of a tail.

    Args:
        tail: that all images taught.
        averaged: logits of the averaged one, of the images that judge: `(images, classes)`.
        logits: of tails that did not see the image, of the same images.
        course: that they took.
    """

    tail: TaughtTail
    averaged: np.ndarray
    logits: np.ndarray
    course: Course


@dataclass(frozen=True, eq=False)
class _Training:
    """The training of a soup's tail.

    Args:
        bank: of the images that teach.
        recipe, cut: of the soup.
        head: of the soup; None if it has none that can be told from the rest.
        lesson: what the images teach.
        judged: what the images that judge would teach; None if no others do than those that teach.
        has_halves: whether each half of the images judges the tail that the other half taught.
    """

    bank: LogitBank
    recipe: Recipe
    cut: Cut
    head: Head | None
    lesson: TailLesson
    judged: TailLesson | None
    has_halves: bool

    def trained(self, course: Course) -> _Trained:
        """What comes of a course. Images are taken in the order of their contents, so that the order of the split
        changes nothing."""
        running, cut, lesson = self.bank.passes().running, self.cut, self.lesson
        model = replace(running, compiled=False).ready(averaged_soup(self.bank, self.recipe)).float()
        device, judged = running.accelerator.device, self.judged or lesson
        order = np.argsort(self.bank.contents, kind="stable")
        folds = draw_folds(self.bank.contents, seed=course.seed, folds=HALVES)[order]
        halves = [order[folds == half] for half in range(HALVES)] if self.has_halves else []
        start = TaughtTail.of(model, cut)
        batch = {name: value.to(device) for name, value in repeated(_example(self.bank), course.batch_size).items()}
        with open_tail(model, cut, batch) as run:
            answer = partial(tail_logits, run, cut, batch_size=course.batch_size, device=device)
            averaged = answer(judged, np.arange(len(judged.teacher)))
            logits, before = averaged.copy(), answer(lesson, np.arange(len(order))) if self.judged else averaged
            if lesson.is_known(before, course.share):
                return _Trained(start, averaged, averaged, course)
            steps = course.steps_in_an_epoch(len(order)) + sum(course.steps_in_an_epoch(len(half)) for half in halves)
            if course.seconds < float("inf"):
                course = course.within(steps * seconds_of_a_step(model, run, cut, lesson, order, course))
                start.put_into(model)
            total = course.epochs * steps
            with progress_bar(total=total, desc="Teaching the last layers", unit="step", delay=DELAY) as bar:
                for half, other in zip(halves, halves[::-1], strict=True):
                    self._calibrate(model, before, half, course)
                    teach(model, run, cut, lesson, half, course, on_step=bar.update)
                    logits[other] = answer(lesson, other)
                    start.put_into(model)
                self._calibrate(model, before, order, course)
                teach(model, run, cut, lesson, order, course, on_step=bar.update)
            if not self.has_halves:
                logits = answer(judged, np.arange(len(judged.teacher)))
        return _Trained(TaughtTail.of(model, cut), averaged, logits, course)

    def _calibrate(self, model: PreTrainedModel, logits: np.ndarray, rows: np.ndarray, course: Course) -> None:
        """Multiply the head of a model by the number that brings its logits nearest to what some images teach.

        Fine-tunes are often much surer of themselves than their ensemble is. To unlearn that takes most of the steps
        of a course, and one number does it.
        """
        if self.head is not None:
            wanted = self.lesson.wanted(rows, course.share).numpy()
            scale = best_scale(logits[rows], wanted, multi_label=self.lesson.multi_label)
            scale = min(max(scale, 1 / MOST), MOST)
            self.head.put(model, self.head.layer_of(model).scaled(scale))


def _head(bank: LogitBank) -> Head | None:
    """The head of the ingredients; None if it can't be told from the rest."""
    try:
        return find_head(bank.ingredients[0], bank.images.example())
    except HeadError:
        return None


def _lesson(bank: LogitBank, recipe: Recipe, cut: Cut, teacher: Teacher) -> TailLesson:
    """What the images of a bank teach a tail."""
    given = shown_features(bank, recipe, Inputs((cut.module,), (cut.width,)), f"tail-{digest(cut.module)}")
    labels = np.asarray(bank.labels) if teacher.labels else None
    logits = bank.mixed(bank.row(teacher.ensemble), np.arange(len(bank)))
    return TailLesson(given, logits, labels, bank.is_multi_label)


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
