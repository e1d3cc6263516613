"""Images to measure a soup on, the telling ones first: which are drawn, and what they say of the whole split.

A soup and its ensemble seldom differ where all ingredients agree so far that no recipe changes the prediction (the
*decided* images, see `pruning`), and often on the others (the *contested* ones). So a stratified sample that has all
contested images and a few of the decided ones knows a soup's accuracy almost as well as the whole split does. Within
a stratum all images have the same chance, and each stands for as many as were not drawn: nothing is taken on trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

# Of so many images of a pilot, one case of a thousand is some.
ENOUGH = 500

# How many models say which images tell recipes apart, and the share of images that are such, in zoos of ours.
LEADING, TELLING = 3, 0.2


@dataclass(frozen=True)
class Pilot:
    """A random sample of a split, drawn in each block by itself: the same ones for any number of processes.

    Args:
        share: of the images, in (0, 1).
        seed: of the draw.

    Raises:
        ValueError: for another share.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, (int, float, np.floating)) or not 0 < share < 1:
            raise ValueError(f"pilot={share!r}: it is the share of the split that logits are computed of, as in 0.2.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(f"The seed of a pilot is {self.seed!r}; it is a whole number, at least 0.")
        object.__setattr__(self, "share", float(share))
        object.__setattr__(self, "seed", int(self.seed))

    @classmethod
    def of(cls, value: float | Pilot | None) -> Pilot | None:
        """A share as a sample; None is all of the split."""
        return value if value is None or isinstance(value, Pilot) else cls(value)

    @property
    def key(self) -> list[float]:
        return [self.share, self.seed]

    def describe(self) -> dict[str, Any]:
        return {"share": self.share, "seed": self.seed}

    @staticmethod
    def whole(models: int) -> int:
        """Of how many models the logits of all images are computed in the end; of a few models, of all."""
        return LEADING if models >= 2 * LEADING else models

    def passes(self, models: int) -> float:
        """Over the split, for all logits: its own, those of all images, and about those of the telling ones."""
        whole = self.whole(models)
        return self.share * models + whole + (models - whole) * (1 - self.share) * TELLING

    def rows(self, block: tuple[int, int], count: int) -> np.ndarray:
        """Positions of the drawn images among those of a block, ascending; their number is right on average."""
        generator = np.random.default_rng([self.seed, *block])
        drawn = int(count * self.share + generator.random())
        return np.sort(generator.permutation(count)[:drawn])


@dataclass(frozen=True, eq=False)
class Chosen:
    """Images of a split that were chosen one by one.

    Args:
        places: positions in the split, ascending; None for all of them.
        blocks: of the split in order: of each the shard, its number there and how many images it has.
    """

    places: np.ndarray | None = None
    blocks: tuple[tuple[int, int, int], ...] = ()

    @property
    def share(self) -> float:
        """Of all images."""
        return len(self._places) / sum(count for *_, count in self.blocks)

    @property
    def key(self) -> list[int]:
        return list(map(int, self._places))

    def describe(self) -> dict[str, Any]:
        return {"places": self.key}

    def rows(self, block: tuple[int, int], count: int) -> np.ndarray:
        """Positions of the chosen images among those of a block, ascending."""
        start = self._starts[block]
        first, last = np.searchsorted(self._places, (start, start + count))
        return self._places[first:last] - start

    @property
    def _places(self) -> np.ndarray:
        return np.zeros(0, int) if self.places is None else self.places

    @cached_property
    def _starts(self) -> dict[tuple[int, int], int]:
        ends = np.cumsum([count for *_, count in self.blocks]).tolist()
        return {(shard, number): end - count for (shard, number, count), end in zip(self.blocks, ends, strict=True)}


def drawn_places(blocks: Sequence[Sequence[int]], pilot: Pilot | Chosen | None) -> np.ndarray | None:
    """Positions in the split of a pilot's images; None without one.

    Args:
        blocks: of each the shard, its number there and how many images it has.
    """
    if pilot is None:
        return None
    starts = np.cumsum([0, *(count for *_, count in blocks)])
    drawn = [pilot.rows((shard, number), count) for shard, number, count in blocks]
    return np.concatenate([start + rows for start, rows in zip(starts, drawn, strict=False)])


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
