"""How good a soup is by a metric, as far as the images tell that it was shown.

A soup that was shown a sample is compared with a model that is known there too: its own ensemble, which is known of
all images and seldom far off, or another soup. The difference of the metric is estimated, and its standard error, by
what kind of metric it is:

- a mean over images (accuracy, log loss, Brier score, top-k): from the differences, image by image, each standing for
  as many as were not drawn (`Strata.mean`). Nothing is approximated;
- a function of how often each class is predicted, and how often that is right (F1, balanced accuracy, MCC, the worst
  recall): from these counts, estimated in the same way. To first order each image changes it by a number, the
  *influence* of its prediction, which gives the error as above (the infinitesimal jackknife, Efron 1982);
- anything else (ROC AUC, average precision, calibration error, a user's function): the drawn images are taken again
  and again until there are as many as in the split. The error is that of the jackknife over `GROUPS` parts of them.

Where a class has few images, a metric that does not count all images alike hangs on these few: so they are in every
sample (`sample_groups`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hf_radin.metrics.intervals import Strata
from hf_radin.metrics.named import Answers, Metric, score_or_nan, weighted_counts
from hf_radin.recipes.scoring import Counts

# Parts of a sample that the jackknife leaves out, one at a time.
GROUPS = 20

# A class with fewer images than this, and less than half of what a class has on average, has few.
FEW = 64

# How many counts of predicted classes are held at a time: 2^22 numbers are 32 MiB.
HELD = 1 << 22


@dataclass(frozen=True)
class Judge:
    """Judges soups by a metric, from a stratified sample of a split.

    Args:
        metric: of one score.
        strata: the images in groups, in the order in which they are drawn.
    """

    metric: Metric
    strata: Strata

    def value(self, answers: Answers) -> float:
        """The metric of answers on all images; NaN if it is undefined."""
        if self.metric.name == "accuracy":
            return float(answers.hits.mean())
        return score_or_nan(self.metric, answers)

    def difference(self, first: Answers, second: Answers, known: np.ndarray) -> tuple[float, float]:
        """The metric of the first less that of the second on all images, and its standard error.

        Args:
            known: of which images both are known, bool `(samples,)`. Elsewhere the second's are what they are taken
                to be, and the first's are ignored.

        Returns:
            0 and infinity, if nothing is known of a group of images.
        """
        metric, strata = self.metric, self.strata
        if metric.of_images is not None:
            values, others = (metric.of_images(answers) for answers in (first, second))
            if values.dtype == bool:
                return strata.mean(values.astype(int) - others, known)
            # of a mean over decisions another one is a step of one class; probabilities have no steps
            steps = 0.0 if metric.needs_logits else 1 / first.classes
            return strata.mean(np.where(known, values - others, 0.0), known, steps=steps)
        if metric.of_counts is not None:
            return self._of_counts(first, second, known)
        return self._of_all(first, second, known)

    def deviation(self, value: float, answers: Answers) -> float:
        """The standard error of the metric that comes of how few images the split has.

        For accuracy that of a share; else the images of each class are what varies, by the influence of each.

        Args:
            value: what the metric is estimated to be.
            answers: on all images; where a soup's are not known, those of its ensemble do.
        """
        metric, labels = self.metric, answers.labels
        if metric.of_images is not None:
            values = metric.of_images(answers)
            if values.dtype == bool:
                return math.sqrt(max(0.0, value * (1 - value)) / len(labels))
            return float(values.std() / math.sqrt(len(labels)))
        if metric.of_counts is not None:
            influence = Influence.of(metric, answers.counts)
            if answers.are_multi_label:  # images are not of one class each: all are what varies
                of_true = _slope(metric, answers.counts, "true")
                values = influence.of_predictions(answers) + answers.labels @ of_true
                return math.sqrt(len(labels) * float(values.var()))
            return math.sqrt(_variance_within(influence.of_predictions(answers), labels))
        return math.sqrt(self._jackknife(answers, None, np.ones(len(labels), dtype=bool), np.ones(len(labels), bool)))

    def _of_counts(self, first: Answers, second: Answers, known: np.ndarray) -> tuple[float, float]:
        metric, weights = self.metric, self.strata.weights(known)
        if metric.of_counts is None or weights is None:
            return 0.0, math.inf
        before = second.counts
        gained, lost = (weighted_counts(answers, weights) for answers in (first, second))
        # equal predictions change nothing, to the last bit
        after = Counts(
            before.hits + (gained.hits - lost.hits),
            before.predicted + (gained.predicted - lost.predicted),
            before.true,
        )
        gain = float((metric.of_counts(after) - metric.of_counts(before))[0])
        if known.all():
            return gain, 0.0
        influence, samples = Influence.of(metric, after), len(known)
        changes = samples * (influence.of_predictions(first) - influence.of_predictions(second))
        steps = samples * influence.of_another(first.labels)
        _, error = self.strata.mean(np.where(known, changes, 0.0), known, steps)
        return gain, error

    def _of_all(self, first: Answers, second: Answers, known: np.ndarray) -> tuple[float, float]:
        drawn = self.strata.expanded(known)
        if drawn is None:
            return 0.0, math.inf
        gain = self._gain(first, second, drawn)
        # groups that are known in full have no error
        partly = np.zeros(len(known), dtype=bool)
        for group in self.strata.groups:
            partly[group] = not known[group].all()
        if not partly.any():
            return gain, 0.0
        if not math.isfinite(gain):
            return 0.0, math.inf
        left = 1 - np.count_nonzero(known & partly) / np.count_nonzero(partly)
        return gain, math.sqrt(left * self._jackknife(first, second, known, partly))

    def _jackknife(self, first: Answers, second: Answers | None, known: np.ndarray, partly: np.ndarray) -> float:
        """The variance of a difference by what it is without each part of the sample.

        Args:
            partly: the images of which some are left out.
        """
        places = np.concatenate([group[known[group] & partly[group]] for group in self.strata.groups])
        gains = []
        for part in range(min(GROUPS, len(places))):
            remaining = known.copy()
            remaining[places[part::GROUPS]] = False
            drawn = self.strata.expanded(remaining)
            gains.append(math.nan if drawn is None else self._gain(first, second, drawn))
        defined = [gain for gain in gains if math.isfinite(gain)]
        if len(defined) < 2:
            return math.inf
        return (len(defined) - 1) * float(np.var(defined))

    def _gain(self, first: Answers, second: Answers | None, drawn: np.ndarray) -> float:
        value = score_or_nan(self.metric, first.take(drawn))
        return value if second is None else value - score_or_nan(self.metric, second.take(drawn))


@dataclass(frozen=True, eq=False)
class Influence:
    """By how much a metric changes if a class is predicted once more, to first order.

    Args:
        of_hits: if that is right, beside `of_predicted`: `(classes,)`.
        of_predicted: whether or not it is, `(classes,)`.
    """

    of_hits: np.ndarray
    of_predicted: np.ndarray

    @classmethod
    def of(cls, metric: Metric, counts: Counts) -> Influence:
        """That around some counts `(1, classes)`, by adding one to each."""
        return cls(_slope(metric, counts, "hits"), _slope(metric, counts, "predicted"))

    def of_predictions(self, answers: Answers) -> np.ndarray:
        """What each prediction adds to the metric, or all decisions on an image: `(samples,)`."""
        predictions = answers.predictions
        if answers.are_multi_label:
            return np.asarray((predictions == 1) @ self.of_predicted + (answers.hits & answers.labels) @ self.of_hits)
        added = np.where(predictions >= 0, self.of_predicted[np.maximum(predictions, 0)], 0.0)
        return np.asarray(added + np.where(answers.hits, self.of_hits[answers.labels], 0.0))

    def of_another(self, labels: np.ndarray) -> np.ndarray:
        """By how much a prediction that is another one changes the metric; of one decision, on average: `(samples,)`.

        Args:
            labels: as in `Answers`.
        """
        if labels.ndim == 2:
            return np.sqrt(
                np.where(labels, (self.of_hits + self.of_predicted) ** 2, self.of_predicted**2).mean(axis=1)
            )
        return np.asarray(self.of_hits[labels])


def _slope(metric: Metric, counts: Counts, name: str) -> np.ndarray:
    """By how much a metric changes if one is added to counts, class by class, to first order: `(classes,)`.

    Args:
        counts: `(1, classes)`.
        name: of the field of `Counts` that one is added to.
    """
    assert metric.of_counts is not None
    classes, here = counts.hits.shape[1], metric.of_counts(counts)[0]
    step = max(1, HELD // classes)
    slope = np.zeros(classes)
    for start in range(0, classes, step):
        one_more = np.eye(min(step, classes - start), classes, start)  # (rows, classes)
        same = replace(counts, hits=counts.hits + 0 * one_more, predicted=counts.predicted + 0 * one_more)
        changed = replace(same, **{name: getattr(counts, name) + one_more})
        slope[start : start + step] = metric.of_counts(changed) - here
    return slope


def sample_groups(
    metrics: tuple[Metric, ...], labels: np.ndarray, contested: np.ndarray, decided: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of images that every sample has, of contested ones and of decided ones.

    Of a metric that counts all images alike, samples need none; of others they have all images of the classes that
    have few (see `FEW`).

    Args:
        labels: as in `Answers`.
    """
    if all(metric.of_images is not None for metric in metrics):
        return np.zeros(0, dtype=int), contested, decided
    counts = np.asarray(labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels))
    rare = np.flatnonzero((counts < FEW) & (counts < counts[counts > 0].mean() / 2)) if counts.any() else counts[:0]
    is_rare = np.asarray(labels[:, rare].any(axis=1) if labels.ndim == 2 else np.isin(labels, rare))
    return np.flatnonzero(is_rare), contested[~is_rare[contested]], decided[~is_rare[decided]]


def _variance_within(values: np.ndarray, labels: np.ndarray) -> float:
    """The variance of the sum of values, if those of each class are drawn anew: `(samples,)` each."""
    counts = np.bincount(labels)
    present = counts > 0
    sums, squares = (np.bincount(labels, values**power)[present] for power in (1, 2))
    return float(np.maximum(squares - sums**2 / counts[present], 0.0).sum())
