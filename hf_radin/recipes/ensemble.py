"""Score recipes from logits: the ensemble mixes the outputs where the soup would mix the weights.

Around a shared start both losses have the same first-order expansion for any mixing ratios (arXiv 2401.17790), so the
accuracy of the ensemble, which costs no forward pass, estimates that of the soup.

This is the dense computation: it looks at every class of every image, and defines what a recipe predicts. `pruning`
and `scoring` find the same predictions in a hundredth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

# How many mixed logits are held at a time: 2^23 float64 numbers are 64 MiB. Pairs that are mixed again take an eighth.
MIXED_AT_ONCE = 1 << 23

# Bins of confidence in the calibration error.
BINS = 15


# Called after each block with the number of predictions that were made, for a progress bar.
OnBlock = Callable[[int], object]


@dataclass(frozen=True)
class Stored:
    """An array `(samples, classes)` in a file, read on access.

    A memory map keeps all that was ever accessed in memory, as long as there is room; this keeps nothing.
    """

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.memmap) -> Stored:
        """The array of a memory map."""
        return cls(str(array.filename), array.offset, array.dtype, array.shape)

    def part(self, samples: slice) -> Stored:
        """A slice of the samples, not read yet."""
        start, stop, _ = samples.indices(self.shape[0])
        offset = self.offset + start * self.shape[1] * self.dtype.itemsize
        return replace(self, offset=offset, shape=(stop - start, self.shape[1]))

    def __getitem__(self, samples: slice) -> np.ndarray:
        start, stop, _ = samples.indices(self.shape[0])
        return self.read(start, np.empty((max(0, stop - start), self.shape[1]), self.dtype))

    def read(self, start: int, buffer: np.ndarray) -> np.ndarray:
        """Read the samples from `start` on that fit into `buffer`: to reuse memory costs no page faults.

        Returns:
            the part of `buffer` that was filled.
        """
        rows = buffer[: self.shape[0] - start]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * self.shape[1] * self.dtype.itemsize)
            done, content = 0, rows.reshape(-1).view(np.uint8).data
            while done < len(content):  # a call may read less, and never reads more than 2 GiB
                count = file.readinto(content[done:])
                if not count:
                    raise OSError(f"{self.path} ends before sample {start + len(rows) - 1} of {self.shape[0]}.")
                done += count
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
        raise ValueError(
            f"Row {wrong[0]} is not a recipe: weights are at least 0 and add up to 1; got {rows[wrong[0]]}."
        )
    return rows


def mix_in_order(rows: np.ndarray, logits: Iterable[np.ndarray]) -> np.ndarray:
    """Mixed logits `(pairs, classes)` of pairs of a recipe and a sample; their argmax is *the* prediction.

    Products and sums are rounded one by one in float64, model after model, so that every machine and any block size
    gives the same bits, and a class that is behind in every model is never ahead of the mix (see `pruning`).

    Args:
        rows: `(pairs, models)`.
        logits: for each model the samples' logits, `(pairs, classes)`.
    """
    total: np.ndarray | float = 0.0
    for weights, values in zip(rows.T, logits, strict=True):
        total = total + weights[:, None] * values.astype(np.float64)
    return np.asarray(total)


def rounding_margin(models: int, largest: np.ndarray, unit: float) -> np.ndarray:
    """How far apart two sums of a matrix product must be for `mix_in_order` to order them alike: `(samples,)`.

    Whatever is summed first, a sum of n products is off by at most n units of sum_i w_i |x_i|, which is no more than
    `largest`; one more unit for weights that were rounded, another for the comparison, a hundredth for what is of
    second order. Two sums are compared, and each is computed in two ways.

    Args:
        largest: of each sample the largest absolute logit.
        unit: of rounding in the matrix product, 2^-24 for float32.
    """
    margin = 2.02 * (models + 2) * (unit + 2.0**-53) * largest.astype(np.float64)
    # underflow loses less than 1e-25; logits of 1e6 and more might overflow
    return np.where(largest < 1e6, margin + 1e-25, np.inf)


def mix_close_pairs(
    rows: np.ndarray, logits: np.ndarray, close: np.ndarray, mixed_at_once: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Mix in order where the rounding of a matrix product leaves the best class open.

    Args:
        rows: recipes `(recipes, models)`.
        logits: `(models, samples, classes)`.
        close: for which `(recipes, samples)`.
        mixed_at_once: how many mixed logits are held at a time.

    Yields:
        recipes `(pairs,)`, samples `(pairs,)` and their mixed logits `(pairs, classes)`.
    """
    recipes, samples = np.nonzero(close)
    step = max(1, mixed_at_once // logits.shape[2])
    for start in range(0, len(recipes), step):
        pairs = recipes[start : start + step], samples[start : start + step]
        yield *pairs, mix_in_order(rows[pairs[0]], (values[pairs[1]] for values in logits))


def mixed_predictions(
    logits: Sequence[np.ndarray | Stored], recipes: np.ndarray, *, mixed_at_once: int = MIXED_AT_ONCE
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Predicted classes of each recipe's ensemble, a block of recipes and samples at a time.

    Args:
        logits: for each model an array `(samples, classes)`, read in blocks of samples.
        recipes: `(recipes, models)`, rows on the simplex.
        mixed_at_once: how many mixed logits are held at a time.

    Yields:
        the recipes and samples of the block, and their classes `(recipes, samples)`: the argmax of `mix_in_order`,
        which gives ties to the lower class.
    """
    rows = check_recipes(recipes, len(logits))
    for block in _mix_blocks(logits, rows, mixed_at_once):
        best = block.mixed.argmax(axis=-1)
        highest = np.take_along_axis(block.mixed, best[..., None], axis=-1)  # (recipes, samples, 1)
        margin = rounding_margin(len(logits), np.abs(block.logits).max(axis=(0, 2)), 2.0**-53)[:, None]
        close = (block.mixed >= highest - margin).sum(axis=-1) != 1
        for pairs, images, sums in mix_close_pairs(rows[block.recipes], block.logits, close, mixed_at_once // 8):
            best[pairs, images] = sums.argmax(axis=-1)
        yield block.recipes, block.samples, best


def mix(logits: Sequence[np.ndarray | Stored], recipe: np.ndarray) -> np.ndarray:
    """The ensemble's logits under one recipe `(models,)`, float64 `(samples, classes)`: those of `mix_in_order`."""
    row = check_recipes(recipe, len(logits))
    samples, classes = logits[0].shape
    step = max(1, MIXED_AT_ONCE // classes)
    mixed = np.empty((samples, classes))
    for start in range(0, samples, step):
        block = slice(start, min(start + step, samples))
        mixed[block] = mix_in_order(row, (np.asarray(values[block]) for values in logits))
    return mixed


def count_hits(
    logits: Sequence[np.ndarray | Stored],
    labels: np.ndarray,
    recipes: np.ndarray,
    *,
    on_block: OnBlock = lambda predictions: None,
    mixed_at_once: int = MIXED_AT_ONCE,
) -> np.ndarray:
    """How many samples the ensemble of each recipe predicts right: `(recipes,)`, integers."""
    hits = np.zeros(len(np.atleast_2d(recipes)), dtype=np.int64)
    for rows, samples, predictions in mixed_predictions(logits, recipes, mixed_at_once=mixed_at_once):
        hits[rows] += (predictions == labels[samples]).sum(axis=1)
        on_block(predictions.size)
    return hits


def predict(logits: Sequence[np.ndarray | Stored], recipe: np.ndarray) -> np.ndarray:
    """The classes that the ensemble of one recipe `(models,)` predicts: `(samples,)`."""
    return np.concatenate([classes[0] for _, _, classes in mixed_predictions(logits, recipe)])


def decide(logits: Sequence[np.ndarray | Stored], recipe: np.ndarray) -> np.ndarray:
    """Which classes the ensemble of one recipe `(models,)` says are there, of multi-label logits: int8 `(samples,
    classes)`, 1 where the mixed logit is above 0, else 0."""
    row = check_recipes(recipe, len(logits))
    samples, classes = logits[0].shape
    step = max(1, MIXED_AT_ONCE // classes)
    decisions = np.empty((samples, classes), np.int8)
    for start in range(0, samples, step):
        block = slice(start, min(start + step, samples))
        decisions[block] = mix_in_order(row, (np.asarray(values[block]) for values in logits)) > 0
    return decisions


def cross_entropy(
    logits: Sequence[np.ndarray | Stored],
    labels: np.ndarray,
    recipes: np.ndarray,
    *,
    on_block: OnBlock = lambda predictions: None,
    mixed_at_once: int = MIXED_AT_ONCE,
) -> np.ndarray:
    """The mean of -log softmax of the mixed logits at the true class: `(recipes,)`, less is better.

    Classes that can't win count too, so all logits are read.
    """
    rows = check_recipes(recipes, len(logits))
    total = np.zeros(len(rows))
    for block in _mix_blocks(logits, rows, mixed_at_once):
        mixed = block.mixed
        mixed -= mixed.max(axis=-1, keepdims=True)
        of_label = np.take_along_axis(mixed, labels[None, block.samples, None], axis=-1)[..., 0]
        total[block.recipes] += (np.log(np.exp(mixed).sum(axis=-1)) - of_label).sum(axis=-1)
        on_block(of_label.size)
    return total / len(labels)


def calibration_error(
    logits: Sequence[np.ndarray | Stored],
    labels: np.ndarray,
    recipes: np.ndarray,
    *,
    on_block: OnBlock = lambda predictions: None,
    mixed_at_once: int = MIXED_AT_ONCE,
) -> np.ndarray:
    """The expected calibration error of the mixed logits (Guo et al. 2017), with 15 bins of confidence: `(recipes,)`.

    The confidence is the largest probability of the softmax. All logits are read.
    """
    rows = check_recipes(recipes, len(logits))
    gaps = np.zeros((len(rows), BINS))
    for block in _mix_blocks(logits, rows, mixed_at_once):
        hits = block.mixed.argmax(axis=-1) == labels[block.samples]
        highest = block.mixed.max(axis=-1, keepdims=True)
        confidence = 1 / np.exp(block.mixed - highest).sum(axis=-1)  # (recipes, samples)
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        for gap, row, gained in zip(gaps[block.recipes], bins, hits - confidence, strict=True):
            gap += np.bincount(row, gained, minlength=BINS)
        on_block(hits.size)
    return np.abs(gaps).sum(axis=1) / len(labels)


@dataclass(frozen=True, eq=False)
class _Block:
    """Mixed logits of some recipes and samples.

    Args:
        recipes, samples: which.
        logits: of the models, `(models, samples, classes)`.
        mixed: `(recipes, samples, classes)`.
    """

    recipes: slice
    samples: slice
    logits: np.ndarray
    mixed: np.ndarray


def _mix_blocks(logits: Sequence[np.ndarray | Stored], rows: np.ndarray, mixed_at_once: int) -> Iterator[_Block]:
    """The mixed logits of recipes `(recipes, models)`, block by block, as a matrix product rounds them."""
    samples, classes = logits[0].shape
    size = max(1, min(samples, mixed_at_once // (len(logits) * classes)))
    for start in range(0, samples, size):
        block = slice(start, min(start + size, samples))
        stacked = np.stack([np.asarray(values[block], dtype=np.float64) for values in logits])
        flat = stacked.reshape(len(logits), -1)  # (models, samples * classes)
        step = max(1, mixed_at_once // flat.shape[1])
        for first in range(0, len(rows), step):
            recipes = slice(first, min(first + step, len(rows)))
            yield _Block(recipes, block, stacked, (rows[recipes] @ flat).reshape(-1, *stacked.shape[1:]))
