"""How certain a metric is, and the difference of two models, by drawing images again and by exchanging answers.

Of accuracies the exact distribution is known: `intervals` has their intervals and the paired test. Of other metrics
the images of each class are drawn again, as many as there are, so that no class gets lost; of two models the same.
Where an image may have any number of classes, all images are drawn again, each with all that is decided on it.

Of a class with one image the same is drawn over and over: intervals are too narrow where classes have few. So what is
chance is told by the paired permutation test, which McNemar's is for accuracies. If two models are alike, chance says
whose an answer to an image is: they are exchanged, image by image, and how often that gives as much as the gain is p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hf_radin.metrics import multi_label
from hf_radin.metrics.intervals import accuracy_interval, difference_interval, mcnemar, middle
from hf_radin.metrics.named import Answers, Metric, score_or_nan
from hf_radin.recipes.scoring import Counts

# How often images are drawn again: for metrics that follow from counts or sums, and for others.
RESAMPLES, FEWER = 2_000, 200

# How many numbers are held at a time: 2^22 are 32 MiB.
HELD = 1 << 22


@dataclass(frozen=True)
class Difference:
    """By how much a model's metric differs from another's on the same images.

    Args:
        gain: of the first less that of the second.
        interval: of the gain, 95%.
        p_value: two-sided, that there is no difference: McNemar's exact test for accuracies, else how often it is as
            large where answers are exchanged.
    """

    gain: float
    interval: tuple[float, float]
    p_value: float

    @classmethod
    def of(cls, metric: Metric, first: Answers, second: Answers, *, seed: int = 0) -> Difference | None:
        """The difference of two models' answers; None if the metric is undefined for one."""
        if metric.name == "accuracy":
            hits, others = first.hits, second.hits
            gain = float(hits.mean() - others.mean())
            return cls(gain, difference_interval(hits, others, seed=seed), mcnemar(hits, others))
        gain = score_or_nan(metric, first) - score_or_nan(metric, second)
        scores = resampled(metric, [first, second], seed=seed)
        gains = scores[0] - scores[1]
        gains = gains[np.isfinite(gains)]
        if not np.isfinite(gain) or not len(gains):
            return None
        others = exchanged(metric, first, second, seed=seed)
        # sums in another order are others in their last bits
        as_large = np.count_nonzero(np.abs(others) >= abs(gain) - 1e-9)
        return cls(float(gain), middle(gains), float((as_large + 1) / (len(others) + 1)))


def metric_interval(metric: Metric, answers: Answers, *, seed: int = 0) -> tuple[float, float] | None:
    """The 95% interval of a metric; None if it is undefined."""
    if metric.name == "accuracy":
        return accuracy_interval(answers.hits, seed=seed)
    (scores,) = resampled(metric, [answers], seed=seed)
    scores = scores[np.isfinite(scores)]
    return middle(scores) if len(scores) else None


def resampled(metric: Metric, models: Sequence[Answers], *, seed: int = 0) -> np.ndarray:
    """A metric of models on images that are drawn again within each class, the same for all: `(models, draws)`."""
    generator, labels = np.random.default_rng(seed), models[0].labels
    if models[0].are_multi_label:
        if metric.of_counts is not None:
            return _of_decisions(metric, models, generator)
        labels = np.zeros(len(labels), dtype=int)  # as if all were of one class
    if metric.of_images is not None:
        return _of_sums(np.stack([metric.of_images(answers) for answers in models]), labels, generator)
    if metric.of_counts is not None:
        return _of_counts(metric, models, generator)
    order = np.argsort(labels, kind="stable")
    draws = [order[places] for places in _drawn(labels, generator, FEWER)]
    return np.array([[score_or_nan(metric, answers.take(drawn)) for drawn in draws] for answers in models])


def exchanged(metric: Metric, first: Answers, second: Answers, *, seed: int = 0) -> np.ndarray:
    """Gains of a metric where chance says, image by image, which of two answers is the first model's: `(draws,)`.

    Those that are undefined are left out.
    """
    generator = np.random.default_rng(seed)
    if metric.of_images is not None:
        gains = metric.of_images(first).astype(np.float64) - metric.of_images(second)
        different = gains[gains != 0]
        signs = (generator.integers(2, size=len(different)) * 2 - 1 for _ in range(RESAMPLES))
        return np.array([different @ sign for sign in signs]) / len(gains)
    if metric.of_counts is not None and not first.are_multi_label:
        scores = _of_exchanged_counts(metric, first, second, generator)
    else:
        is_large = metric.of_counts is None or first.labels.size > HELD
        swaps = (generator.integers(2, size=len(first.labels)) > 0 for _ in range(FEWER if is_large else RESAMPLES))
        pairs = ((_either(swap, second, first), _either(swap, first, second)) for swap in swaps)
        scores = np.array([[score_or_nan(metric, answers) for answers in pair] for pair in pairs]).T
    gains = scores[0] - scores[1]
    return gains[np.isfinite(gains)]


def _either(is_first: np.ndarray, first: Answers, second: Answers) -> Answers:
    """Of each image the answer of one of two models: of the first where it says so, bool `(samples,)`."""
    shape = (-1, *[1] * (first.predictions.ndim - 1))
    predictions = np.where(is_first.reshape(shape), first.predictions, second.predictions)
    logits = None
    if first.logits is not None and second.logits is not None:
        logits = np.where(is_first[:, None], first.logits, second.logits)
    return Answers(predictions, first.labels, first.classes, logits)


def _of_exchanged_counts(
    metric: Metric, first: Answers, second: Answers, generator: np.random.Generator
) -> np.ndarray:
    """A metric of counts, of two models whose answers are exchanged: `(2, draws)`."""
    assert metric.of_counts is not None
    images = np.stack([first.labels, first.predictions, second.predictions])
    cells, counts = np.unique(images, axis=1, return_counts=True)
    labels, predictions = np.tile(cells[0], 2), cells[1:].ravel()
    step = max(1, HELD // max(len(labels), first.classes))
    scores = []
    for start in range(0, RESAMPLES, step):
        swapped = generator.binomial(counts, 0.5, size=(min(step, RESAMPLES - start), len(counts)))
        remaining = counts - swapped
        pair = np.hstack([remaining, swapped]), np.hstack([swapped, remaining])
        scores.append([metric.of_counts(_counts(drawn, labels, predictions, first.classes)) for drawn in pair])
    return np.concatenate(scores, axis=1)


def _drawn(labels: np.ndarray, generator: np.random.Generator, draws: int) -> Iterator[np.ndarray]:
    """Places of images in the order of their classes, drawn with replacement within each: `(samples,)`, so often."""
    counts = np.bincount(labels)
    starts, sizes = (np.repeat(values, counts) for values in (np.cumsum(counts) - counts, counts))
    for _ in range(draws):
        yield starts + (generator.random(len(labels)) * sizes).astype(int)


def _of_sums(values: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The means of values `(models, samples)` of images that are drawn again: `(models, draws)`."""
    in_order = values[:, np.argsort(labels, kind="stable")]
    draws = _drawn(labels, generator, RESAMPLES)
    return np.array([[row.take(places).mean() for row in in_order] for places in draws]).T


def _of_counts(metric: Metric, models: Sequence[Answers], generator: np.random.Generator) -> np.ndarray:
    """A metric of counts. Images of one class for which the models predict the same are drawn together."""
    assert metric.of_counts is not None
    labels, classes = models[0].labels, models[0].classes
    cells, counts = np.unique(
        np.stack([labels, *(answers.predictions for answers in models)]), axis=1, return_counts=True
    )
    step = max(1, HELD // max(cells.shape[1], classes))
    scores = []
    for start in range(0, RESAMPLES, step):
        drawn = np.concatenate(
            [
                generator.multinomial(of_class.sum(), of_class / of_class.sum(), size=min(step, RESAMPLES - start))
                for of_class in (counts[cells[0] == label] for label in np.unique(labels))
            ],
            axis=1,
        )  # (draws, cells); cells go by labels first
        scores.append([metric.of_counts(_counts(drawn, cells[0], row, classes)) for row in cells[1:]])
    return np.concatenate(scores, axis=1)


def _of_decisions(metric: Metric, models: Sequence[Answers], generator: np.random.Generator) -> np.ndarray:
    """A metric of counts of decisions."""
    assert metric.of_counts is not None
    samples, classes = models[0].labels.shape
    draws = RESAMPLES if samples * classes <= HELD else FEWER
    step = max(1, HELD // max(samples, classes))
    scores = []
    for start in range(0, draws, step):
        count = min(step, draws - start)
        drawn = generator.integers(samples, size=(count, samples)) + samples * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * samples).reshape(count, samples).astype(np.float64)
        scores.append([metric.of_counts(multi_label.weighted_counts(answers, weights)) for answers in models])
    return np.concatenate(scores, axis=1)


def _counts(drawn: np.ndarray, labels: np.ndarray, predictions: np.ndarray, classes: int) -> Counts:
    """The counts of draws `(draws, cells)` of cells with a label and a prediction."""
    of_class = (predictions[:, None] == np.arange(classes)).astype(np.float64)  # (cells, classes)
    is_hit = (labels == predictions)[:, None]
    return Counts(drawn @ (of_class * is_hit), drawn @ of_class, np.bincount(labels, drawn[0], minlength=classes))
