"""The best mixture of two recipes, found exactly (the idea of minimum error rate training, Och 2003).

From one recipe to another each image's mixed logits are linear in the step t. Its label wins where its line is above
those of all other classes, and where it is above one of them is a half-line: so each image is right between two steps,
or nowhere, and the accuracy changes at finitely many steps. They are sorted, and the best is read off.
"""

from __future__ import annotations

import numpy as np

from hf_radin.pruning import Pruned
from hf_radin.scoring import MIXED_AT_ONCE


def best_step(pruned: Pruned, labels: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[float, int]:
    """The step in [0, 1] from one recipe to another at which most images are right, and how many these are.

    Of the steps at which as many are, the middle of the longest run is taken: there no tie decides.

    Args:
        pruned: the classes that can win, with `top` 1.
        labels: of the split `(samples,)`.
        start, end: recipes `(models,)`.
    """
    lows, highs, always = [], [], 0
    for bucket in pruned.buckets():
        right = bucket.classes == labels[bucket.images]  # (k, images)
        there = right.any(axis=0)  # of the others the label never wins
        if not len(bucket.logits):
            always += int(there.sum())
            continue
        images, step = np.flatnonzero(there), max(1, MIXED_AT_ONCE // bucket.logits[:, :, 0].size)
        for first in range(0, len(images), step):
            some = images[first : first + step]
            flat = bucket.logits[:, :, some].reshape(pruned.models, -1).astype(np.float64)
            from_start, to_end = (np.stack([start, end]) @ flat).reshape(2, len(right), -1)  # (k, images) each
            low, high = _between(from_start, to_end - from_start, right[:, some].argmax(axis=0))
            lows.append(low)
            highs.append(high)
    low, high = (np.concatenate(found) if found else np.zeros(0) for found in (lows, highs))
    runs = low < high
    low, high = low[runs], high[runs]
    steps = np.unique(np.concatenate([[0.0, 1.0], low, high]))
    middles = (steps[1:] + steps[:-1]) / 2
    counts = np.searchsorted(np.sort(low), middles) - np.searchsorted(np.sort(high), middles)  # of each run
    best = counts == counts.max()
    at = int(np.argmax(np.where(best, steps[1:] - steps[:-1], -1)))
    return float(middles[at]), always + int(counts[at])


def _between(at: np.ndarray, slope: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From which step to which the class at `place` `(images,)` is ahead of all others; the same twice if nowhere.

    Args:
        at, slope: of each class's line `(k, images)`.
    """
    each = np.arange(len(place))
    ahead, rise = at[place, each] - at, slope[place, each] - slope
    others = np.arange(len(at))[:, None] != place
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -ahead / rise
    low = np.where(others & (rise > 0), crossing, 0.0).max(axis=0)
    high = np.where(others & (rise < 0), crossing, 1.0).min(axis=0)
    behind = (others & (rise == 0) & (ahead < 0)).any(axis=0)
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    return low, np.where(behind, low, np.maximum(low, high))
