"""Score recipes from logits: the ensemble mixes the outputs where the soup would mix the weights.

Around a shared start both losses have the same first-order expansion for any mixing ratios (arXiv 2401.17790), so the
accuracy of the ensemble, which costs no forward pass, estimates that of the soup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# How many mixed logits are held at a time: 2^23 float64 numbers are 64 MiB.
MIXED_AT_ONCE = 1 << 23


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

    def __getitem__(self, some: slice) -> np.ndarray:
        start, stop, _ = some.indices(self.shape[0])
        classes = self.shape[1]
        offset = self.offset + start * classes * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, (stop - start) * classes, offset=offset).reshape(-1, classes)


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


def mixed_predictions(
    logits: Sequence[np.ndarray | Stored], recipes: np.ndarray
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Predicted classes of each recipe's ensemble, a block of recipes and samples at a time.

    Args:
        logits: for each model an array `(samples, classes)`, read in blocks of samples.
        recipes: `(recipes, models)`, rows on the simplex.

    Yields:
        the recipes and samples of the block, and their classes `(recipes, samples)`. Ties go to the lower class, as in
        `argmax`. Mixed in float64, so that what is equal in real numbers differs by no more than 1e-15 of the logits.
    """
    rows = check_recipes(recipes, len(logits))
    samples, classes = logits[0].shape
    read = max(1, min(samples, MIXED_AT_ONCE // (len(logits) * classes)))
    for start in range(0, samples, read):
        some = slice(start, min(start + read, samples))
        block = np.stack([np.asarray(one[some], dtype=np.float64) for one in logits])  # (models, samples, classes)
        flat = block.reshape(len(logits), -1)  # (models, samples * classes)
        step = max(1, MIXED_AT_ONCE // flat.shape[1])
        for first in range(0, len(rows), step):
            which = slice(first, min(first + step, len(rows)))
            mixed = (rows[which] @ flat).reshape(-1, *block.shape[1:])  # (recipes, samples, classes)
            yield which, some, mixed.argmax(axis=-1)


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
