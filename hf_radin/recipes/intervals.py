"""How sure a figure is: intervals for accuracies and their differences, the exact paired test, stratified samples.

A soup and its ensemble seldom differ where all ingredients agree so far that no recipe changes the prediction (the
*decided* images, see `pruning`), and often on the others (the *contested* ones). So a stratified sample that has all
contested images and a few of the decided ones knows a soup's accuracy almost as well as the whole split does. Within
a stratum all images have the same chance, and each stands for as many as were not drawn: nothing is taken on trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of intervals; and how often images are drawn anew for one.
LEVEL, RESAMPLES = 0.95, 10_000


def accuracy_interval(hits: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Between which accuracies the bootstrap puts 95%: images drawn anew with replacement, as many as there are.

    Args:
        hits: bool `(samples,)`.
    """
    samples = len(hits)
    counts = np.random.default_rng(seed).binomial(samples, np.mean(hits), size=RESAMPLES)
    return _middle(counts / samples)


def difference_interval(hits: np.ndarray, others: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
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


@dataclass(frozen=True, eq=False)
class Strata:
    """A split's images in groups, each in the random order in which they are drawn.

    Args:
        groups: positions of images; each image is in one of them.
    """

    groups: tuple[np.ndarray, ...]

    @classmethod
    def shuffled(cls, groups: Sequence[np.ndarray], seed: int) -> Strata:
        """Groups in random orders."""
        generator = np.random.default_rng(seed)
        return cls(tuple(generator.permutation(group) for group in groups))

    def __len__(self) -> int:
        """How many images there are."""
        return sum(map(len, self.groups))

    def first(self, counts: Sequence[int]) -> np.ndarray:
        """The first so many images of each group: bool `(samples,)`."""
        drawn = np.zeros(len(self), dtype=bool)
        for group, count in zip(self.groups, counts, strict=True):
            drawn[group[:count]] = True
        return drawn

    def mean(self, values: np.ndarray, known: np.ndarray) -> tuple[float, float]:
        """The mean over all images of what is known of some, and its standard error; infinite where nothing is known.

        In each group, an image that was drawn stands for as many as there are. The error is that of drawing without
        replacement; values are -1, 0 or 1. To those that were drawn, one is added that is none of them for sure: half
        a 0, and a quarter of a 1 and of a -1, so that a few equal ones do not pass for certainty.

        Args:
            values: `(samples,)`; those of images that are not known are not looked at.
            known: bool `(samples,)`, of each group its first ones.
        """
        total = variance = 0.0
        for group in filter(len, self.groups):
            there = group[known[group]]
            drawn, share = len(there), len(group) / len(self)
            if not drawn:
                return 0.0, np.inf
            found = int(values[there].sum())
            total += len(group) * found / drawn  # of a whole group the very sum: a tie must not become a difference
            if drawn < len(group):  # of all, nothing is left to chance
                spread = (np.count_nonzero(values[there]) + 0.5) / (drawn + 1) - (found / (drawn + 1)) ** 2
                variance += share**2 * spread / drawn * (1 - drawn / len(group))
        return total / len(self), float(np.sqrt(variance))
