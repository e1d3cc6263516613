"""What a soup is chosen by: one metric, and floors that others must keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_radin.metrics.multi_label import decisions_of
from hf_radin.metrics.named import Answers, Metric, load_metrics, only_score, score_or_nan
from hf_radin.recipes import scoring
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.recipe import Measurement
from hf_radin.runtime.text import is_share

# A rank that no metric reaches.
BEHIND = 1e9

# The name of a class may have any character.
_FLOOR = re.compile(r"\s*(?P<metric>[^<>=\[]+?(?:\[.+?\])?)\s*(?P<sign>>=|<=)\s*(?P<bound>.+?)\s*", re.DOTALL)
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_BOUND = re.compile(rf"(?P<single>best[ _]single)?\s*(?P<step>[-+]?\s*{_NUMBER})?", re.IGNORECASE)


@dataclass(frozen=True)
class Floor:
    """What a metric must at least be, or at most if less of it is better.

    Args:
        text: as the user wrote it.
        metric: of which.
        bound: the value; where `is_relative`, what is added to that of the best single model.
    """

    text: str
    metric: Metric
    bound: float
    is_relative: bool = False

    @classmethod
    def of(cls, text: str, classes: Sequence[str] | None = None, *, of_label_sets: bool | None = None) -> Floor:
        """From `"accuracy >= best single - 0.002"`, `"recall[melanoma] >= 0.9"` or `"log_loss <= 0.3"`.

        Raises:
            ValueError: if it can't be read, or names a metric or class that is not there, or bounds a metric on the
                side on which more of it is worse, or a share by more than 1.
        """
        parts = _FLOOR.fullmatch(text) if isinstance(text, str) else None
        bound = _BOUND.fullmatch(parts["bound"]) if parts else None
        if parts is None or bound is None or not (bound["single"] or bound["step"]):
            raise ValueError(
                f"keep={text!r} can't be read: write it as in 'accuracy >= best single - 0.002', "
                "'recall[melanoma] >= 0.9' or 'log_loss <= 0.3'."
                + (" Shares are written as numbers: 0.75 for 75%." if "%" in str(text) else "")
            )
        (metric,) = load_metrics(parts["metric"], classes, of_label_sets=of_label_sets)
        if metric.is_loss != (parts["sign"] == "<="):
            better, sign = ("less", "<=") if metric.is_loss else ("more", ">=")
            raise ValueError(
                f"keep={text!r}: of {metric.name} {better} is better, so that its bound goes with {sign}."
            )
        step, is_relative = float((bound["step"] or "0").replace(" ", "")), bool(bound["single"])
        if is_share(metric.name) and (abs(step) > 1 or (is_relative and abs(step) == 1)):
            raise ValueError(
                f"keep={text!r}: {metric.name} is a share of 1, and {step:g} is more than it can be or change. Points "
                f"are hundredths: write {step / 100:g}."
            )
        return cls(" ".join(text.split()), metric, step, is_relative)

    def shortfall(self, values: Any) -> Any:
        """By how much values break it; 0 where they keep it."""
        return np.maximum(0.0, self.metric.rank(self.bound) - self.metric.rank(values))


@dataclass(frozen=True)
class Objective:
    """What soups are chosen by.

    Args:
        metric: the best of it wins,
        floors: of those that keep all of these.
    """

    metric: Metric
    floors: tuple[Floor, ...] = ()

    @classmethod
    def of(
        cls,
        metric: Any = None,
        keep: str | Sequence[str] = (),
        classes: Sequence[str] | None = None,
        *,
        of_label_sets: bool | None = None,
    ) -> Objective:
        """From a metric as `load_metrics` takes it, and floors as `Floor.of` takes them.

        By default the metric is the accuracy; where an image may have any number of classes, F1 (macro): there most
        decisions are no, so that a model which always says so has a high accuracy.

        Raises:
            ValueError: as these do, and for several metrics.
        """
        metric = ("f1" if of_label_sets else "accuracy") if metric is None else metric
        metrics = load_metrics(metric, classes, of_label_sets=of_label_sets)
        if len(metrics) > 1:
            names = ", ".join(each.name for each in metrics)
            raise ValueError(f"metric={names}: soups are chosen by one metric; others may have a floor (keep).")
        texts = [keep] if isinstance(keep, str) or not isinstance(keep, Iterable) else keep
        return cls(metrics[0], tuple(Floor.of(text, classes, of_label_sets=of_label_sets) for text in texts))

    @property
    def name(self) -> str:
        """The name of the metric."""
        return self.metric.name

    @property
    def text(self) -> str:
        """The metric and the floors."""
        return ", ".join([self.name, *(floor.text for floor in self.floors)])

    @property
    def is_accuracy(self) -> bool:
        """Whether it is the accuracy, multi-label the share of right decisions, and nothing else."""
        return self.metric.name in ("accuracy", "label_accuracy") and not self.floors

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metric and those of the floors, each once."""
        return tuple(dict.fromkeys([self.metric, *(floor.metric for floor in self.floors)]))

    @property
    def needs_logits(self) -> bool:
        """Whether predicted classes are not enough."""
        return any(metric.needs_logits for metric in self.metrics)

    @property
    def top(self) -> int:
        """Of which pruned logits it follows (`LogitBank.pruned`): of those of the class that can win, or of all."""
        return 0 if self.needs_logits else 1

    @property
    def is_fast(self) -> bool:
        """Whether thousands of recipes are scored in seconds."""
        return all(metric.of_images is not None or metric.of_counts is not None for metric in self.metrics)

    def rank(self, measurement: Measurement) -> float:
        """What is known of a candidate, such that more is better; who breaks a floor is behind all who don't."""
        rank = self.metric.rank(measurement.known)
        if np.isnan(rank):  # of a user's function
            return -2 * BEHIND
        return rank - BEHIND if measurement.keeps is False else rank

    def measured_by(self, best: Answers) -> Objective:
        """The same with floors that are relative to the best single model's answers replaced by what they come to."""
        floors = [
            replace(floor, bound=only_score(floor.metric, best) + floor.bound, is_relative=False)
            if floor.is_relative
            else floor
            for floor in self.floors
        ]
        return replace(self, floors=tuple(floors))

    def broken(self, answers: Answers) -> tuple[Floor, ...]:
        """The floors that answers don't keep; a relative one is not looked at."""
        fixed = (floor for floor in self.floors if not floor.is_relative)
        return tuple(floor for floor in fixed if not floor.shortfall(score_or_nan(floor.metric, answers)) <= 0)

    def ranks(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of many recipes, values of which the largest is the best: `(recipes,)`.

        Those that break a floor are behind all others (by `BEHIND`), the further the more they break it, and behind
        these those of which the metric is undefined.

        Args:
            scores: by metric, `(recipes,)`.
        """
        sign = -1.0 if self.metric.is_loss else 1.0
        ranks = sign * np.asarray(scores[self.metric.name], dtype=np.float64)
        ranks = np.where(np.isnan(ranks), -2 * BEHIND, ranks)  # undefined, of a user's function
        fixed = [floor for floor in self.floors if not floor.is_relative]
        if not fixed:
            return ranks
        missing = np.sum([floor.shortfall(scores[floor.metric.name]) for floor in fixed], axis=0)
        missing = np.nan_to_num(missing, nan=1.0)  # what is undefined is not kept
        return np.where(missing > 0, np.minimum(ranks, -BEHIND - missing), ranks)


# What soups are chosen by unless the user says otherwise.
ACCURACY = Objective.of()


def score_recipes(
    metric: Metric,
    pruned: Pruned,
    labels: np.ndarray,
    classes: int,
    rows: np.ndarray,
    on_block: Callable[[int], object] = lambda predictions: None,
) -> np.ndarray:
    """A metric of many recipes, or other linear combinations of logits: `(recipes,)`.

    Args:
        pruned: that kept all classes, where the metric needs logits.
        labels: the true classes `(samples,)`, or which classes images have, bool `(samples, classes)`.
        rows: `(recipes, models)`.
    """
    are_decisions = labels.ndim == 2  # if so, they follow from all classes only one recipe at a time
    if metric.top is not None and (pruned.pairs or not are_decisions):
        targets = labels.ravel().astype(np.int64) if are_decisions else labels
        return scoring.count_hits(pruned, targets, rows, top=metric.top, on_block=on_block) / labels.size
    if metric.of_counts is not None and (pruned.pairs or not are_decisions):
        step = max(1, scoring.COUNTED_AT_ONCE // classes)
        blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
        counts = (
            scoring.count_pairs(pruned, labels, block)
            if pruned.pairs
            else scoring.count(pruned, labels, classes, block)
            for block in blocks
        )
        return np.concatenate([metric.of_counts(block) for block in counts] or [np.zeros(0)])
    if metric.of_logits is not None and pruned.top == 0:
        return scoring.mean_losses(pruned, labels, rows, metric.of_logits, on_block=on_block)
    scores = []
    for answers in _answers(pruned, labels, classes, rows):
        scores.append(score_or_nan(metric, answers))
        on_block(len(labels))
    return np.array(scores)


def _answers(pruned: Pruned, labels: np.ndarray, classes: int, rows: np.ndarray) -> Iterator[Answers]:
    """What each row predicts, with its logits where all classes were kept. Arguments as of `score_recipes`."""
    if pruned.top == 0:
        for logits in scoring.mixed_logits(pruned, rows):
            predictions = decisions_of(logits) if labels.ndim == 2 else logits.argmax(axis=1)
            yield Answers(predictions, labels, classes, logits)
        return
    for row in rows:
        yield Answers(scoring.predict(pruned, row[None])[0].reshape(labels.shape), labels, classes)
