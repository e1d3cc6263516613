"""How sure a figure is: intervals for accuracies and their differences, and the exact paired test of two models."""

from __future__ import annotations

import numpy as np

# Of intervals; and how often images are drawn anew for one.
LEVEL, RESAMPLES = 0.95, 10_000


def interval(hits: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Between which accuracies the bootstrap puts 95%: images drawn anew with replacement, as many as there are.

    Args:
        hits: bool `(samples,)`.
    """
    samples = len(hits)
    counts = np.random.default_rng(seed).binomial(samples, np.mean(hits), size=RESAMPLES)
    return _middle(counts / samples)


def difference(hits: np.ndarray, others: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The same for the difference of the accuracies of two models on the same images, which are drawn together.

    Args:
        hits, others: bool `(samples,)`.
    """
    samples = len(hits)
    won, lost = np.sum(hits & ~others), np.sum(others & ~hits)
    parts = [won / samples, lost / samples, 1 - (won + lost) / samples]
    drawn = np.random.default_rng(seed).multinomial(samples, parts, size=RESAMPLES)
    return _middle((drawn[:, 0] - drawn[:, 1]) / samples)


def mcnemar(hits: np.ndarray, others: np.ndarray) -> float:
    """The exact two-sided p-value that two models are equally good, by the images that only one gets (McNemar 1947).

    Args:
        hits, others: bool `(samples,)`, on the same images.
    """
    won, lost = int(np.sum(hits & ~others)), int(np.sum(others & ~hits))
    count = won + lost
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    fewer = np.arange(min(won, lost) + 1)
    chances = factorials[count] - factorials[fewer] - factorials[count - fewer] - count * np.log(2)
    return float(min(1.0, 2 * np.exp(chances).sum()))


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
