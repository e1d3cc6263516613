"""How certain a figure is: intervals for accuracies and their differences, a paired test, and stratified samples.

Intervals come from the bootstrap, the paired test is McNemar's exact one. `Strata` samples images in groups: a soup
and its ensemble seldom differ where all ingredients agree so far that no recipe changes the prediction (the *decided*
images, see `pruning`), and often on the others (the *contested* ones). A stratified sample that has all contested
images and a few of the decided ones therefore knows a soup's accuracy almost as well as the whole split does. Within
a stratum all images have the same chance, and each stands for as many as were not drawn: nothing is taken on trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# The confidence level of intervals, and how often images are resampled for one.
LEVEL, RESAMPLES = 0.95, 10_000


@dataclass(frozen=True, eq=False)
class Strata:
    """A split's images in groups, each in the random order in which its images are drawn.

    Args:
        groups: positions of images; each image is in exactly one of them.
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
        """The first images of each group, as many as `counts` says: bool `(samples,)`."""
        drawn = np.zeros(len(self), dtype=bool)
        for group, count in zip(self.groups, counts, strict=True):
            drawn[group[:count]] = True
        return drawn

    def weights(self, known: np.ndarray) -> np.ndarray | None:
        """How many images of its group each drawn image stands for, 0 for the others; None if nothing is known of one.

        Args:
            known: bool `(samples,)`.
        """
        weights = np.zeros(len(self))
        for group in filter(len, self.groups):
            sample = group[known[group]]
            if not len(sample):
                return None
            weights[sample] = len(group) / len(sample)
        return weights

    def expanded(self, known: np.ndarray) -> np.ndarray | None:
        """As many positions as there are images, the drawn ones of each group over and over; None as in `weights`."""
        if known.all():
            return np.arange(len(self))
        samples = [(group[known[group]], len(group)) for group in self.groups if len(group)]
        if not all(len(sample) for sample, _ in samples):
            return None
        return np.concatenate([np.resize(sample, count) for sample, count in samples])

    def mean(self, values: np.ndarray, known: np.ndarray, steps: np.ndarray | float = 1.0) -> tuple[float, float]:
        """The estimated mean over all images, and its standard error; infinite if nothing is known of a group.

        In each group, the drawn images stand for all. The error is that of drawing without replacement. To the drawn
        values, one is added that is none of them for certain: half a 0, and a quarter of a step up and of one down, so
        that a few equal values do not pass for certainty.

        Args:
            values: `(samples,)`; ignored where they are not known.
            known: bool `(samples,)`: the first images of each group.
            steps: by how much a prediction that is another one changes the value of its image, `(samples,)`: 1 where
                values are -1, 0 or 1.
        """
        total = variance = 0.0
        steps = np.broadcast_to(steps, values.shape)
        for group in filter(len, self.groups):
            sample = group[known[group]]
            drawn, share = len(sample), len(group) / len(self)
            if not drawn:
                return 0.0, np.inf
            sample_sum = float(values[sample].sum())
            # of a whole group this is the very sum: a tie must not become a difference
            total += len(group) * sample_sum / drawn
            if drawn < len(group):  # a group that is known in full has no error
                squares = float(np.square(values[sample], dtype=np.float64).sum())
                added = 0.5 * float(np.square(steps[group]).mean())
                spread = (squares + added) / (drawn + 1) - (sample_sum / (drawn + 1)) ** 2
                variance += share**2 * spread / drawn * (1 - drawn / len(group))
        return total / len(self), float(np.sqrt(variance))


def accuracy_interval(hits: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of an accuracy.

    Args:
        hits: bool `(samples,)`.
    """
    samples = len(hits)
    counts = np.random.default_rng(seed).binomial(samples, np.mean(hits), size=RESAMPLES)
    return middle(counts / samples)


def difference_interval(hits: np.ndarray, others: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the difference of two models' accuracies on the same images, resampled in pairs.

    Args:
        hits, others: bool `(samples,)`.
    """
    samples = len(hits)
    won, lost = np.sum(hits & ~others), np.sum(others & ~hits)
    parts = [won / samples, lost / samples, 1 - (won + lost) / samples]
    drawn = np.random.default_rng(seed).multinomial(samples, parts, size=RESAMPLES)
    return middle((drawn[:, 0] - drawn[:, 1]) / samples)


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


def is_above_zero(gains: np.ndarray) -> bool:
    """Whether the mean of many gains is above zero by more than chance: by the normal 95% interval.

    Args:
        gains: of each image, `(samples,)`.
    """
    if len(gains) < 2:
        return False
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return bool(gains.mean() > NormalDist().inv_cdf((1 + LEVEL) / 2) * error)


def middle(resampled: np.ndarray) -> tuple[float, float]:
    """The interval that holds the middle 95% of the values."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
