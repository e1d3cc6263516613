"""Scores of many recipes at once, from the classes that can win: the same as those of the dense computation.

A matrix product in float32 mixes the logits of all classes that are left. How it is rounded depends on the order of
its sums; where two mixed logits are closer than that could move them (`ensemble.too_close`), they are mixed again by
`ensemble.in_order`, which is what the dense computation goes by. So every prediction is the same, image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from hf_radin.recipes.ensemble import calibration_error, check_recipes, cross_entropy, settle, too_close
from hf_radin.recipes.pruning import Bucket, Pruned

# How many logits are converted, and how many mixed ones are held, at a time: 4 MiB in float32, near the processor.
MIXED_AT_ONCE = 1 << 20

# How many counts of predicted classes are held at a time: 2^23 integers are 64 MiB.
COUNTED_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Counts:
    """How often each recipe predicted each class; what metrics of predictions are made of.

    Args:
        hits: rightly, `(recipes, classes)`.
        predicted: at all, `(recipes, classes)`.
        true: how many samples are of each class, `(classes,)`.
    """

    hits: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    def __add__(self, other: Counts) -> Counts:
        """Those of both of two sets of samples."""
        return Counts(self.hits + other.hits, self.predicted + other.predicted, self.true + other.true)

    @classmethod
    def of(cls, predictions: np.ndarray, labels: np.ndarray, classes: int) -> Counts:
        """Those of predicted classes `(recipes, samples)`."""
        return cls(
            _count(predictions, classes, predictions == labels),
            _count(predictions, classes),
            np.bincount(labels, minlength=classes),
        )


def balanced_accuracy(counts: Counts) -> np.ndarray:
    """The mean over classes with samples of the part that is predicted right: `(recipes,)`."""
    there = counts.true > 0
    return (counts.hits[:, there] / counts.true[there]).mean(axis=1)


def f1(counts: Counts) -> np.ndarray:
    """The mean over classes of 2 hits / (predicted + true); classes with neither don't count: `(recipes,)`."""
    both = counts.predicted + counts.true  # (recipes, classes)
    return (2 * counts.hits / np.maximum(both, 1)).sum(axis=1) / (both > 0).sum(axis=1)


def mcc(counts: Counts) -> np.ndarray:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where it has no meaning: `(recipes,)`."""
    predicted, true = counts.predicted.astype(np.float64), counts.true.astype(np.float64)
    samples = true.sum()
    covariance = counts.hits.sum(axis=1) * samples - predicted @ true
    variances = (samples**2 - (predicted**2).sum(axis=1)) * (samples**2 - (true**2).sum())
    return np.where(variances > 0, covariance / np.sqrt(np.maximum(variances, 1)), 0.0)


# By name, what is made of counts; `accuracy` and `top5_accuracy` of hits alone; those in `DENSE` need every logit.
OF_COUNTS: dict[str, Callable[[Counts], np.ndarray]] = {"balanced_accuracy": balanced_accuracy, "f1": f1, "mcc": mcc}
# Of the probabilities, which take every logit; less is better.
DENSE = {"cross_entropy": cross_entropy, "calibration_error": calibration_error}
# Other names of these, as `metrics` has them.
ALIASES = {"log_loss": "cross_entropy", "f1_macro": "f1", "matthews_correlation": "mcc"}
METRICS = ("accuracy", *OF_COUNTS, "top5_accuracy", *DENSE)


def count_hits(
    pruned: Pruned,
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    device: str = "cpu",
    on_block: Callable[[int], object] = lambda predictions: None,
) -> np.ndarray:
    """For how many samples the label is among the best `pruned.top` classes of each recipe: `(recipes,)`, integers.

    Args:
        rows: recipes, or any other sums of the logits, `(recipes, models)`; of the classes that are there.
        device: where the logits are mixed: `cpu`, or one that torch knows.
        on_block: hears how many predictions were made, for a progress bar.
    """
    hits = np.zeros(len(rows), dtype=np.int64)
    for bucket in pruned.buckets():
        on_block(len(rows) * len(bucket.images))
        wanted = labels[bucket.images]
        there = (bucket.classes == wanted).any(axis=0)  # of the others the label never wins
        if not len(bucket.logits):
            hits += there.sum()
            continue
        for part in _parts(bucket, there):
            # the label's class goes first, to be compared with the rest
            place = (part.classes == labels[part.images]).argmax(axis=0)
            each = np.arange(len(place))
            logits = part.logits.astype(np.float32)
            logits[:, 0], logits[:, place, each] = part.logits[:, place, each], part.logits[:, 0]
            for which, mixed, margin in _mixed(rows, logits, device):
                own, rest = mixed[:, 0], mixed[:, 1:]
                hit = _here(_number(rest < (own - margin)[:, None]) > rest.shape[1] - pruned.top)
                close = _here(_number(rest > (own + margin)[:, None]) < pruned.top) & ~hit
                hits[which] += hit.sum(axis=1)
                for ones, images, sums in settle(rows[which], part.logits.transpose(0, 2, 1), close):
                    label = sums[np.arange(len(images)), place[images]][:, None]  # (pairs, 1)
                    lower = np.arange(sums.shape[1]) < place[images][:, None]  # classes that an equal sum goes to
                    ahead = ((sums > label) | ((sums == label) & lower)).sum(axis=1)
                    hits[which] += np.bincount(ones[ahead < pruned.top], minlength=len(close))
    return hits


def predict(pruned: Pruned, recipes: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """The classes that each recipe predicts, for one or a few: `(recipes, samples)`."""
    found = np.empty((len(np.atleast_2d(recipes)), len(pruned.images)), dtype=np.int64)
    for which, images, predictions in _predictions(pruned, recipes, device):
        found[which, images] = predictions
    return found


def count(pruned: Pruned, labels: np.ndarray, classes: int, recipes: np.ndarray, *, device: str = "cpu") -> Counts:
    """How often each recipe predicts each class, and rightly; no prediction is kept."""
    shape = (len(np.atleast_2d(recipes)), classes)
    hits, predicted = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for which, images, predictions in _predictions(pruned, recipes, device):
        hits[which] += _count(predictions, classes, predictions == labels[images])
        predicted[which] += _count(predictions, classes)
    return Counts(hits, predicted, np.bincount(labels, minlength=classes))


def score(
    pruned: Pruned,
    labels: np.ndarray,
    classes: int,
    recipes: np.ndarray,
    metric: str,
    *,
    device: str = "cpu",
    on_block: Callable[[int], object] = lambda predictions: None,
) -> np.ndarray:
    """A metric of each recipe's predictions: `(recipes,)`. For `top5_accuracy`, what is pruned for the best 5."""
    rows = check_recipes(recipes, pruned.models)
    if metric in ("accuracy", "top5_accuracy"):
        return count_hits(pruned, labels, rows, device=device, on_block=on_block) / len(labels)
    step = max(1, COUNTED_AT_ONCE // classes)
    scores = np.zeros(len(rows))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        scores[some] = OF_COUNTS[metric](count(pruned, labels, classes, rows[some], device=device))
        on_block(len(rows[some]) * len(labels))
    return scores


def count_for(
    metric: str, pruned: Pruned, labels: np.ndarray, classes: int, recipes: np.ndarray, *, device: str = "cpu"
) -> Any:
    """Of some of the samples what `made_of` makes a metric of: hits, or counts."""
    if metric in OF_COUNTS:
        return count(pruned, labels, classes, recipes, device=device)
    return count_hits(pruned, labels, recipes, device=device)


def made_of(metric: str, parts: Sequence[Any], samples: int) -> np.ndarray:
    """A metric `(recipes,)` of what `count_for` found in all parts of the samples."""
    whole = reduce(add, parts)
    return OF_COUNTS[metric](whole) if metric in OF_COUNTS else whole / samples


def _predictions(pruned: Pruned, recipes: np.ndarray, device: str) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Blocks of recipes and images `(images,)`, and the classes predicted `(recipes, images)`."""
    if pruned.top != 1:
        raise ValueError(f"These classes are the best {pruned.top}; a prediction is the best one.")
    rows = check_recipes(recipes, pruned.models)
    for bucket in pruned.buckets():
        if not len(bucket.logits):
            yield slice(None), bucket.images, np.broadcast_to(bucket.classes, (len(rows), len(bucket.images)))
            continue
        for part in _parts(bucket):
            for which, mixed, margin in _mixed(rows, part.logits.astype(np.float32), device):
                best = mixed.max(axis=1) if device == "cpu" else mixed.amax(dim=1)
                near = _here(mixed >= (best - margin)[:, None])  # (recipes, k, images)
                # the one that is near the best is it; where there are more, that is settled below
                classes = np.where(near, part.classes, np.int32(0)).sum(axis=1, dtype=np.int32)
                close = _number(near) != 1
                for ones, images, sums in settle(rows[which], part.logits.transpose(0, 2, 1), close):
                    classes[ones, images] = part.classes[sums.argmax(axis=1), images]
                yield which, part.images, classes


def _parts(bucket: Bucket, some: np.ndarray | None = None) -> Iterator[Bucket]:
    """The bucket in parts that take a bounded memory, of `some` of its images `(images,)`."""
    there = np.arange(len(bucket.images)) if some is None else np.flatnonzero(some)
    models, k, _ = bucket.logits.shape
    step = max(1, MIXED_AT_ONCE // (models * k))
    for start in range(0, len(there), step):
        these = there[start : start + step]
        yield Bucket(bucket.images[these], bucket.classes[:, these], bucket.logits[:, :, these])


def _mixed(rows: np.ndarray, logits: np.ndarray, device: str) -> Iterator[tuple[slice, Any, Any]]:
    """Blocks of recipes, their mixed logits `(recipes, k, images)`, and which differences tell nothing `(images,)`.

    On a GPU in float64: its float32 products may be less than that, by a setting of torch.
    """
    models, k, images = logits.shape
    lengths = np.abs(rows).sum(axis=1)  # of recipes 1
    largest = np.abs(logits).max(axis=(0, 1)) * max(1.0, lengths.max(initial=0.0))
    margin: Any = too_close(models, largest, 2.0**-24).astype(np.float32)
    weights: Any = rows.astype(np.float32)
    flat: Any = logits.reshape(models, -1)
    if device != "cpu":
        import torch

        weights, flat, margin = (torch.from_numpy(one).to(device).double() for one in (rows, flat, margin))
    step = max(1, MIXED_AT_ONCE // (k * images))
    for start in range(0, len(rows), step):
        which = slice(start, min(start + step, len(rows)))
        yield which, (weights[which] @ flat).reshape(-1, k, images), margin


def _number(mask: Any) -> Any:
    """How many of the classes: `(recipes, k, images)` to `(recipes, images)`."""
    if isinstance(mask, np.ndarray):
        return mask.sum(axis=1, dtype=np.min_scalar_type(-mask.shape[1] - 1))  # a byte a count is six times as fast
    return mask.sum(dim=1)


def _here(found: Any) -> np.ndarray:
    return found if isinstance(found, np.ndarray) else found.cpu().numpy()


def _count(predictions: np.ndarray, classes: int, some: np.ndarray | None = None) -> np.ndarray:
    """How often each class is in each row of `(recipes, samples)`: `(recipes, classes)`."""
    recipes = len(predictions)
    places = predictions + classes * np.arange(recipes)[:, None]
    counts = np.bincount(places.ravel() if some is None else places[some], minlength=recipes * classes)
    return counts.reshape(recipes, classes)
