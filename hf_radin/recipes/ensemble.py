"""Score recipes from logits: the ensemble mixes the outputs where the soup would mix the weights.

Around a shared start both losses have the same first-order expansion for any mixing ratios (arXiv 2401.17790), so the
accuracy of the ensemble, which costs no forward pass, estimates that of the soup.

Here is the dense computation: it looks at every class of every image, and defines what a recipe predicts. `pruning`
and `scoring` find the same predictions in a hundredth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

# How many mixed logits are held at a time: 2^23 float64 numbers are 64 MiB.
MIXED_AT_ONCE = 1 << 23

# Of confidences, in the calibration error.
BINS = 15


@dataclass(frozen=True)
class Stored:
    """An array `(samples, classes)` in a file, read where it is looked at.

    Of a memory map all that was ever looked at stays in memory, as far as there is room; of this nothing does.
    """

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.memmap) -> Stored:
        """What a memory map shows."""
        return cls(str(array.filename), array.offset, array.dtype, array.shape)

    def part(self, some: slice) -> Stored:
        """Some of the samples."""
        start, stop, _ = some.indices(self.shape[0])
        offset = self.offset + start * self.shape[1] * self.dtype.itemsize
        return replace(self, offset=offset, shape=(stop - start, self.shape[1]))

    def __getitem__(self, some: slice) -> np.ndarray:
        start, stop, _ = some.indices(self.shape[0])
        return self.read(start, np.empty((max(0, stop - start), self.shape[1]), self.dtype))

    def read(self, start: int, kept: np.ndarray) -> np.ndarray:
        """The samples from `start` on that fit into `kept`, in it: memory that is used again costs no page faults."""
        rows = kept[: self.shape[0] - start]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * self.shape[1] * self.dtype.itemsize)
            done, whole = 0, rows.reshape(-1).view(np.uint8).data
            while done < len(whole):  # one call may read less, of 2 GiB always
                got = file.readinto(whole[done:])
                if not got:
                    raise OSError(f"{self.path} ends before sample {start + len(rows) - 1} of {self.shape[0]}.")
                done += got
        return rows


def check_recipes(recipes: np.ndarray, models: int) -> np.ndarray:
    """`recipes` as float64 `(recipes, models)`.

    Raises:
        ValueError: if the shape does not fit or a row is not on the simplex.
    """
    rows = np.atleast_2d(np.asarray(recipes, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[1] != models:
        raise ValueError(f"Recipes have the shape (recipes, {models}), one weight a model; got {np.shape(recipes)}.")
    wrong = np.flatnonzero(~(np.isfinite(rows).all(1) & (rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) < 1e-6)))
    if len(wrong):
        raise ValueError(f"Row {wrong[0]} is no recipe: weights are at least 0 and add up to 1; got {rows[wrong[0]]}.")
    return rows


def in_order(rows: np.ndarray, logits: Iterable[np.ndarray]) -> np.ndarray:
    """Mixed logits `(pairs, classes)` of pairs of a recipe and a sample; their argmax is *the* prediction.

    Products and sums are rounded one by one in float64, model after model, so that every machine and any block size
    gives the same bits, and a class that is behind in every model is never ahead of the mix (see `pruning`).

    Args:
        rows: `(pairs, models)`.
        logits: for each model the samples' logits, `(pairs, classes)`.
    """
    total: np.ndarray | float = 0.0
    for weights, one in zip(rows.T, logits, strict=True):
        total = total + weights[:, None] * one.astype(np.float64)
    return np.asarray(total)


def too_close(models: int, largest: np.ndarray, unit: float) -> np.ndarray:
    """How far apart two sums of a matrix product must be to stand in the order of `in_order`: `(samples,)`.

    Whatever is summed first, a sum of n products is off by at most n units of sum_i w_i |x_i|, which is no more than
    `largest`; one more unit for weights that were rounded, another for the comparison, a hundredth for what is of
    second order. Two sums are compared, and each is computed in two ways.

    Args:
        largest: of each sample the largest logit without its sign.
        unit: of rounding in the matrix product, 2^-24 for float32.
    """
    margin = 2.02 * (models + 2) * (unit + 2.0**-53) * largest.astype(np.float64)
    # what is lost of numbers too small for the type is less than 1e-25; such large ones might get too large for it
    return np.where(largest < 1e6, margin + 1e-25, np.inf)


def settle(rows: np.ndarray, logits: np.ndarray, close: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Mix in order where a matrix product can't tell.

    Args:
        rows: recipes `(recipes, models)`.
        logits: `(models, samples, classes)`.
        close: for which `(recipes, samples)`.

    Yields:
        recipes `(pairs,)`, samples `(pairs,)` and their mixed logits `(pairs, classes)`.
    """
    which, some = np.nonzero(close)
    step = max(1, MIXED_AT_ONCE // (8 * logits.shape[2]))
    for start in range(0, len(which), step):
        recipes, samples = which[start : start + step], some[start : start + step]
        yield recipes, samples, in_order(rows[recipes], (one[samples] for one in logits))


def mixed_predictions(
    logits: Sequence[np.ndarray | Stored], recipes: np.ndarray
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Predicted classes of each recipe's ensemble, a block of recipes and samples at a time.

    Args:
        logits: for each model an array `(samples, classes)`, read in blocks of samples.
        recipes: `(recipes, models)`, rows on the simplex.

    Yields:
        the recipes and samples of the block, and their classes `(recipes, samples)`: the argmax of `in_order`, which
        gives ties to the lower class.
    """
    rows = check_recipes(recipes, len(logits))
    for which, some, block, mixed in _mixed(logits, rows):
        best = mixed.argmax(axis=-1)
        highest = np.take_along_axis(mixed, best[..., None], axis=-1)  # (recipes, samples, 1)
        margin = too_close(len(logits), np.abs(block).max(axis=(0, 2)), 2.0**-53)[:, None]
        close = (mixed >= highest - margin).sum(axis=-1) != 1
        for pairs, images, sums in settle(rows[which], block, close):
            best[pairs, images] = sums.argmax(axis=-1)
        yield which, some, best


def mix(logits: Sequence[np.ndarray | Stored], recipe: np.ndarray) -> np.ndarray:
    """The ensemble's logits under one recipe `(models,)`, float64 `(samples, classes)`: those of `in_order`."""
    row = check_recipes(recipe, len(logits))
    samples, classes = logits[0].shape
    step = max(1, MIXED_AT_ONCE // classes)
    mixed = np.empty((samples, classes))
    for start in range(0, samples, step):
        block = slice(start, min(start + step, samples))
        mixed[block] = in_order(row, (np.asarray(one[block]) for one in logits))
    return mixed


def cross_entropy(
    logits: Sequence[np.ndarray | Stored],
    labels: np.ndarray,
    recipes: np.ndarray,
    *,
    on_block: Callable[[int], object] = lambda predictions: None,
) -> np.ndarray:
    """The mean of -log softmax of the mixed logits at the true class: `(recipes,)`, less is better.

    A class that can't win has its part in it, so all logits are looked at. `on_block` as in `count_hits`.
    """
    rows = check_recipes(recipes, len(logits))
    total = np.zeros(len(rows))
    for which, some, _, mixed in _mixed(logits, rows):
        mixed -= mixed.max(axis=-1, keepdims=True)
        own = np.take_along_axis(mixed, labels[None, some, None], axis=-1)[..., 0]  # (recipes, samples)
        total[which] += (np.log(np.exp(mixed).sum(axis=-1)) - own).sum(axis=-1)
        on_block(own.size)
    return total / len(labels)


def calibration_error(
    logits: Sequence[np.ndarray | Stored],
    labels: np.ndarray,
    recipes: np.ndarray,
    *,
    on_block: Callable[[int], object] = lambda predictions: None,
) -> np.ndarray:
    """The expected calibration error of the mixed logits (Guo et al. 2017), with 15 bins of confidence: `(recipes,)`.

    The confidence is the largest probability of the softmax. All logits are looked at; `on_block` as in `count_hits`.
    """
    rows = check_recipes(recipes, len(logits))
    gaps = np.zeros((len(rows), BINS))
    for which, some, _, mixed in _mixed(logits, rows):
        hits = mixed.argmax(axis=-1) == labels[some]
        confidence = 1 / np.exp(mixed - mixed.max(axis=-1, keepdims=True)).sum(axis=-1)  # (recipes, samples)
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        for gap, row, gained in zip(gaps[which], bins, hits - confidence, strict=True):
            gap += np.bincount(row, gained, minlength=BINS)
        on_block(hits.size)
    return np.abs(gaps).sum(axis=1) / len(labels)


def _mixed(
    logits: Sequence[np.ndarray | Stored], rows: np.ndarray
) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """Blocks: recipes, samples, logits `(models, samples, classes)` and mixed ones `(recipes, samples, classes)`."""
    samples, classes = logits[0].shape
    read = max(1, min(samples, MIXED_AT_ONCE // (len(logits) * classes)))
    for start in range(0, samples, read):
        some = slice(start, min(start + read, samples))
        block = np.stack([np.asarray(one[some], dtype=np.float64) for one in logits])
        flat = block.reshape(len(logits), -1)  # (models, samples * classes)
        step = max(1, MIXED_AT_ONCE // flat.shape[1])
        for first in range(0, len(rows), step):
            which = slice(first, min(first + step, len(rows)))
            yield which, some, block, (rows[which] @ flat).reshape(-1, *block.shape[1:])


def count_hits(
    logits: Sequence[np.ndarray | Stored],
    labels: np.ndarray,
    recipes: np.ndarray,
    *,
    on_block: Callable[[int], object] = lambda predictions: None,
) -> np.ndarray:
    """How many samples the ensemble of each recipe predicts right: `(recipes,)`, integers.

    `on_block` hears after each block how many predictions were made, for a progress bar.
    """
    hits = np.zeros(len(np.atleast_2d(recipes)), dtype=np.int64)
    for which, some, predictions in mixed_predictions(logits, recipes):
        hits[which] += (predictions == labels[some]).sum(axis=1)
        on_block(predictions.size)
    return hits


def predict(logits: Sequence[np.ndarray | Stored], recipe: np.ndarray) -> np.ndarray:
    """The classes that the ensemble of one recipe `(models,)` predicts: `(samples,)`."""
    return np.concatenate([classes[0] for _, _, classes in mixed_predictions(logits, recipe)])
