"""Scores of many recipes at once, from the classes that can win: the same as those of the dense computation.

A matrix product in float32 mixes the logits of all classes that are left. How it is rounded depends on the order of
its sums. If two mixed logits are closer than rounding could move them (`ensemble.rounding_margin`), they are mixed
again by `ensemble.mix_in_order`, which defines the dense computation. So every prediction is the same, image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np

from hf_radin.recipes.ensemble import (
    OnBlock,
    calibration_error,
    check_recipes,
    cross_entropy,
    mix_close_pairs,
    rounding_margin,
)
from hf_radin.recipes.pruning import Bucket, Pruned

# How many logits are converted, and how many mixed ones are held, at a time: 4 MiB in float32, which a cache holds.
MIXED_AT_ONCE = 1 << 20

# The same where each mixed logit is looked at again and again: 1 MiB.
CACHED = 1 << 18

# How many counts of predicted classes are held at a time: 2^23 integers are 64 MiB.
COUNTED_AT_ONCE = 1 << 23

# From logits `(recipes, classes, images)` and the images' labels, what each image adds to a metric that is a mean:
# `(recipes, images)`. Labels are the true classes `(images,)`, or which classes there are, bool `(images, classes)`.
Losses = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Counts:
    """How often each recipe predicted each class, from which metrics of predictions are computed.

    Args:
        hits: correct predictions of the class, `(recipes, classes)`.
        predicted: all predictions of the class, `(recipes, classes)`.
        true: how many samples are of each class, `(classes,)`.
    """

    hits: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    def __add__(self, other: Counts) -> Counts:
        """The counts of two disjoint sets of samples together."""
        return Counts(self.hits + other.hits, self.predicted + other.predicted, self.true + other.true)

    @classmethod
    def of(cls, predictions: np.ndarray, labels: np.ndarray, classes: int) -> Counts:
        """The counts of predicted classes `(recipes, samples)`."""
        return cls(
            _count(predictions, classes, predictions == labels),
            _count(predictions, classes),
            np.bincount(labels, minlength=classes),
        )


def balanced_accuracy(counts: Counts) -> np.ndarray:
    """The mean over classes with samples of the share that is predicted right: `(recipes,)`."""
    return _recalls(counts).mean(axis=1)


def worst_recall(counts: Counts) -> np.ndarray:
    """The least share that is predicted right of a class with samples: `(recipes,)`."""
    return _recalls(counts).min(axis=1)


def mcc(counts: Counts) -> np.ndarray:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where it is undefined: `(recipes,)`."""
    predicted, true = counts.predicted.astype(np.float64), counts.true.astype(np.float64)
    samples = true.sum()
    covariance = counts.hits.sum(axis=1) * samples - predicted @ true
    of_none = samples - predicted.sum(axis=1)  # predictions of no class count as those of one more
    variances = (samples**2 - (predicted**2).sum(axis=1) - of_none**2) * (samples**2 - (true**2).sum())
    return np.where(variances > 0, covariance / np.sqrt(np.maximum(variances, 1)), 0.0)


def of_each_class(name: str, counts: Counts) -> np.ndarray:
    """F1, precision or recall of each class, 0 where it is undefined: `(recipes, classes)`.

    Args:
        name: `f1` is 2 hits / (predicted + true), `precision` hits / predicted, `recall` hits / true.
    """
    true = np.broadcast_to(counts.true, counts.hits.shape)
    hits = 2 * counts.hits if name == "f1" else counts.hits
    of = {"f1": counts.predicted + true, "precision": counts.predicted, "recall": true}[name]
    return np.divide(hits, of, out=np.zeros(hits.shape), where=of > 0)


def averaged(name: str, average: str, counts: Counts) -> np.ndarray:
    """F1, precision or recall of all classes: `(recipes,)`.

    Args:
        average: `macro` is the mean over the classes that are true or predicted, `weighted` weighs classes by their
            samples, `micro` counts samples of all classes alike: the accuracy.
    """
    if average == "micro":
        return counts.hits.sum(axis=1) / counts.true.sum()
    scores = of_each_class(name, counts)
    if average == "weighted":
        return scores @ counts.true / counts.true.sum()
    return scores.sum(axis=1) / np.maximum((counts.predicted + counts.true > 0).sum(axis=1), 1)


def _recalls(counts: Counts) -> np.ndarray:
    """Of each class with samples the share that is predicted right: `(recipes, classes with samples)`."""
    present = counts.true > 0
    return counts.hits[:, present] / counts.true[present]


# Metrics of counts, from which they follow for many recipes at once.
OF_COUNTS: Mapping[str, Callable[[Counts], np.ndarray]] = {
    "balanced_accuracy": balanced_accuracy,
    "worst_recall": worst_recall,
    "mcc": mcc,
    **{
        f"{name}{ending}": partial(averaged, name, average)
        for name in ("f1", "precision", "recall")
        for ending, average in (("", "macro"), ("_micro", "micro"), ("_weighted", "weighted"))
    },
}
# Metrics of probabilities, which need every logit; less is better.
DENSE = {"cross_entropy": cross_entropy, "calibration_error": calibration_error}
# Their names in `metrics`.
ALIASES = {
    "log_loss": "cross_entropy",
    "matthews_correlation": "mcc",
    **{f"{name}_macro": name for name in ("f1", "precision", "recall")},
}
METRICS = ("accuracy", *OF_COUNTS, "top5_accuracy", *DENSE)


def count_hits(
    pruned: Pruned,
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    top: int | None = None,
    device: str = "cpu",
    on_block: OnBlock = lambda predictions: None,
    mixed_at_once: int = MIXED_AT_ONCE,
) -> np.ndarray:
    """For how many samples the label is among the best `top` classes of each recipe: `(recipes,)`, integers.

    Args:
        rows: recipes, or other linear combinations of the logits, `(recipes, models)`.
        top: by default that of the pruned logits.
        device: where the logits are mixed: `cpu`, or another that torch knows.
        on_block: is told how many predictions were made, for a progress bar.
        mixed_at_once: how many logits are held at a time.
    """
    hits, top = np.zeros(len(rows), dtype=np.int64), pruned.top if top is None else top
    for bucket in pruned.buckets():
        on_block(len(rows) * len(bucket.images))
        can_win = (bucket.classes == labels[bucket.images]).any(axis=0)  # elsewhere the label never wins
        if not len(bucket.logits):
            hits += can_win.sum()
            continue
        for part in _parts(bucket, np.flatnonzero(can_win), mixed_at_once):
            # the label's class goes first, to be compared with the others
            place = (part.classes == labels[part.images]).argmax(axis=0)
            each = np.arange(len(place))
            logits = part.logits.astype(np.float32)
            logits[:, 0], logits[:, place, each] = part.logits[:, place, each], part.logits[:, 0]
            by_image = part.logits.transpose(0, 2, 1)  # (models, images, k)
            for block, mixed, margin in _mixed(rows, logits, device, mixed_at_once):
                label, others = mixed[:, 0], mixed[:, 1:]
                hit = _to_numpy(_count_true(others < (label - margin)[:, None]) > others.shape[1] - top)
                close = _to_numpy(_count_true(others > (label + margin)[:, None]) < top) & ~hit
                hits[block] += hit.sum(axis=1)
                for recipes, images, sums in mix_close_pairs(rows[block], by_image, close, mixed_at_once):
                    of_label = sums[np.arange(len(images)), place[images]][:, None]  # (pairs, 1)
                    lower = np.arange(sums.shape[1]) < place[images][:, None]  # classes that win ties
                    ahead = ((sums > of_label) | ((sums == of_label) & lower)).sum(axis=1)
                    hits[block] += np.bincount(recipes[ahead < top], minlength=len(close))
    return hits


def predict(
    pruned: Pruned, rows: np.ndarray, *, device: str = "cpu", mixed_at_once: int = MIXED_AT_ONCE
) -> np.ndarray:
    """The classes that each recipe predicts, for one or a few: `(recipes, samples)`.

    Args:
        rows: as in `count_hits`.
    """
    predictions = np.empty((len(rows), len(pruned.images)), dtype=np.int64)
    for block, images, classes in _predictions(pruned, rows, device, mixed_at_once):
        predictions[block, images] = classes
    return predictions


def count(pruned: Pruned, labels: np.ndarray, classes: int, rows: np.ndarray, *, device: str = "cpu") -> Counts:
    """How often each recipe predicts each class, and how often that is correct; no prediction is stored.

    Args:
        rows: as in `count_hits`.
    """
    hits, predicted = (np.zeros((len(rows), classes), dtype=np.int64) for _ in range(2))
    for block, images, predictions in _predictions(pruned, rows, device, MIXED_AT_ONCE):
        hits[block] += _count(predictions, classes, predictions == labels[images])
        predicted[block] += _count(predictions, classes)
    return Counts(hits, predicted, np.bincount(labels, minlength=classes))


def count_pairs(pruned: Pruned, labels: np.ndarray, rows: np.ndarray, *, device: str = "cpu") -> Counts:
    """How often each recipe says that a class is there, and how often it is: of pairs (`Pruned.pairs`).

    Args:
        labels: which classes the images have, bool `(samples, classes)`.
        rows: as in `count_hits`.
    """
    classes, is_there = labels.shape[1], labels.ravel()
    hits, predicted = (np.zeros((len(rows), classes), dtype=np.int64) for _ in range(2))
    for block, pairs, predictions in _predictions(pruned, rows, device, MIXED_AT_ONCE):
        if block == slice(None):  # decided: the same for all
            predictions = predictions[:1]
        of_class, yes = np.broadcast_to(pairs % classes, predictions.shape), predictions == 1
        hits[block] += _count(of_class, classes, yes & is_there[pairs])
        predicted[block] += _count(of_class, classes, yes)
    return Counts(hits, predicted, labels.sum(axis=0))


def score(
    pruned: Pruned,
    labels: np.ndarray,
    classes: int,
    recipes: np.ndarray,
    metric: str,
    *,
    device: str = "cpu",
    on_block: OnBlock = lambda predictions: None,
    counted_at_once: int = COUNTED_AT_ONCE,
) -> np.ndarray:
    """A metric of each recipe's predictions: `(recipes,)`.

    Args:
        pruned: for `top5_accuracy` with `top` 5, else with `top` 1.
        classes: how many there are.
        metric: one of `METRICS` that is not `DENSE`.
        counted_at_once: how many counts of predicted classes are held at a time.
    """
    rows = check_recipes(recipes, pruned.models)
    if metric in ("accuracy", "top5_accuracy"):
        return count_hits(pruned, labels, rows, device=device, on_block=on_block) / len(labels)
    step = max(1, counted_at_once // classes)
    scores = np.zeros(len(rows))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        scores[block] = OF_COUNTS[metric](count(pruned, labels, classes, rows[block], device=device))
        on_block(len(rows[block]) * len(labels))
    return scores


def count_for(
    metric: str, pruned: Pruned, labels: np.ndarray, classes: int, recipes: np.ndarray, *, device: str = "cpu"
) -> Any:
    """What `made_of` needs of a part of the samples to compute a metric: hits, or counts."""
    if metric in OF_COUNTS:
        return count(pruned, labels, classes, recipes, device=device)
    return count_hits(pruned, labels, recipes, device=device)


def made_of(metric: str, parts: Sequence[Any], samples: int) -> np.ndarray:
    """A metric `(recipes,)` made of what `count_for` gave for all parts of the samples."""
    whole = reduce(add, parts)
    return OF_COUNTS[metric](whole) if metric in OF_COUNTS else whole / samples


def _predictions(
    pruned: Pruned, rows: np.ndarray, device: str, mixed_at_once: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Blocks of recipes and images `(images,)`, and the classes predicted `(recipes, images)`."""
    if pruned.top > 1:
        raise ValueError(f"These classes are the best {pruned.top}; a prediction is the best one.")
    for bucket in pruned.buckets():
        if not len(bucket.logits):
            yield slice(None), bucket.images, np.broadcast_to(bucket.classes, (len(rows), len(bucket.images)))
            continue
        for part in _parts(bucket, np.arange(len(bucket.images)), mixed_at_once):
            by_image = part.logits.transpose(0, 2, 1)  # (models, images, k)
            for block, mixed, margin in _mixed(rows, part.logits.astype(np.float32), device, mixed_at_once):
                best = mixed.max(axis=1) if device == "cpu" else mixed.amax(dim=1)
                near = _to_numpy(mixed >= (best - margin)[:, None])  # (recipes, k, images)
                # a single class near the best is the best; where there are several, they are mixed again below
                classes = np.where(near, part.classes, np.int32(0)).sum(axis=1, dtype=np.int32)
                close = _count_true(near) != 1
                for pairs, images, sums in mix_close_pairs(rows[block], by_image, close, mixed_at_once):
                    classes[pairs, images] = part.classes[sums.argmax(axis=1), images]
                yield block, part.images, classes


def mean_losses(
    pruned: Pruned,
    labels: np.ndarray,
    rows: np.ndarray,
    losses: Losses,
    *,
    on_block: OnBlock = lambda predictions: None,
    mixed_at_once: int = CACHED,
) -> np.ndarray:
    """The mean over images of what each adds by all the logits that a recipe mixes of it: `(recipes,)`.

    Args:
        pruned: that kept all classes (`pruning.keep_all`).
        labels, losses: see `Losses`.
        rows, on_block, mixed_at_once: as in `count_hits`.
    """
    (bucket,) = pruned.buckets()
    models, k, images = bucket.logits.shape
    weights, total = rows.astype(np.float32), np.zeros(len(rows))
    step = max(1, mixed_at_once // (models * k))
    for start in range(0, images, step):
        part = slice(start, start + step)
        of_part = labels[bucket.images[part]]
        flat = bucket.logits[:, :, part].astype(np.float32).reshape(models, -1)
        for first in range(0, len(rows), models):  # as many recipes as models: what is mixed is as large as they are
            block = slice(first, first + models)
            mixed = (weights[block] @ flat).reshape(-1, k, len(of_part))
            total[block] += losses(mixed, of_part).sum(axis=1, dtype=np.float64)
        on_block(len(rows) * len(of_part))
    return total / images


def mixed_logits(pruned: Pruned, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Of each row all logits that it mixes, float32 `(samples, classes)`; of a few rows at a time they are held.

    Args:
        pruned: that kept all classes (`pruning.keep_all`).
        rows: as in `count_hits`.
    """
    (bucket,) = pruned.buckets()
    logits = bucket.logits.astype(np.float32)
    for _, mixed, _ in _mixed(rows, logits, "cpu", max(MIXED_AT_ONCE, logits[0].size)):
        yield from mixed.transpose(0, 2, 1)


def _parts(bucket: Bucket, places: np.ndarray, mixed_at_once: int) -> Iterator[Bucket]:
    """Images of a bucket, by their places in it, in parts that take a bounded memory."""
    models, k, _ = bucket.logits.shape
    step = max(1, mixed_at_once // (models * k))
    for start in range(0, len(places), step):
        part = places[start : start + step]
        yield Bucket(bucket.images[part], bucket.classes[:, part], bucket.logits[:, :, part])


def _mixed(rows: np.ndarray, logits: np.ndarray, device: str, mixed_at_once: int) -> Iterator[tuple[slice, Any, Any]]:
    """Blocks of recipes, their mixed logits `(recipes, k, images)`, and the margin of rounding `(images,)`.

    On a GPU in float64: a setting of torch may make its float32 products less precise than float32.
    """
    models, k, images = logits.shape
    lengths = np.abs(rows).sum(axis=1)  # of recipes 1
    largest = np.abs(logits).max(axis=(0, 1)) * max(1.0, lengths.max(initial=0.0))
    margin: Any = rounding_margin(models, largest, 2.0**-24).astype(np.float32)
    weights: Any = rows.astype(np.float32)
    flat: Any = logits.reshape(models, -1)
    if device != "cpu":
        import torch

        weights, flat, margin = (torch.from_numpy(array).to(device).double() for array in (rows, flat, margin))
    step = max(1, mixed_at_once // (k * images))
    for start in range(0, len(rows), step):
        block = slice(start, min(start + step, len(rows)))
        yield block, (weights[block] @ flat).reshape(-1, k, images), margin


def _count_true(mask: Any) -> Any:
    """For how many classes a mask is true: `(recipes, k, images)` to `(recipes, images)`."""
    if isinstance(mask, np.ndarray):
        return mask.sum(axis=1, dtype=np.min_scalar_type(-mask.shape[1] - 1))  # a byte a count is six times as fast
    return mask.sum(dim=1)


def _to_numpy(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _count(predictions: np.ndarray, classes: int, mask: np.ndarray | None = None) -> np.ndarray:
    """How often each class is in each row of `(recipes, samples)`, where a mask is true: `(recipes, classes)`."""
    recipes = len(predictions)
    places = predictions + classes * np.arange(recipes)[:, None]
    counts = np.bincount(places.ravel() if mask is None else places[mask], minlength=recipes * classes)
    return counts.reshape(recipes, classes)
