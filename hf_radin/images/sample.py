"""Parts of a split: a pilot, which is drawn at random, and images that are chosen one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# A pilot of fewer images says too little about cases of one in a thousand.
ENOUGH = 500

# How many leading models decide which images tell recipes apart, and the share of such images in the zoos we measured.
LEADING, TELLING = 3, 0.2


@dataclass(frozen=True)
class Pilot:
    """A random sample of a split, drawn in each block separately: the same for any number of processes.

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
        """A pilot of a share; None stands for the whole split."""
        return value if value is None or isinstance(value, Pilot) else cls(value)

    @property
    def key(self) -> list[float]:
        """What identifies the sample."""
        return [self.share, self.seed]

    @staticmethod
    def whole(models: int) -> int:
        """For how many models the logits of all images are computed in the end; if there are few, for all."""
        return LEADING if models >= 2 * LEADING else models

    def passes(self, models: int) -> float:
        """About how many passes over the split all logits take: of the pilot, of the leading models on all images,
        and of the others on the images that tell recipes apart.
        """
        whole = self.whole(models)
        return self.share * models + whole + (models - whole) * (1 - self.share) * TELLING

    def rows(self, block: tuple[int, int], count: int) -> np.ndarray:
        """Positions in a block of the drawn images, ascending; their number has the right mean.

        Args:
            block: its shard and number.
            count: how many images it has.
        """
        generator = np.random.default_rng([self.seed, *block])
        drawn = int(count * self.share + generator.random())
        return np.sort(generator.permutation(count)[:drawn])


@dataclass(frozen=True, eq=False)
class Chosen:
    """Images of a split that are chosen one by one.

    Args:
        places: positions in the split, ascending.
        blocks: of the split, in order: for each its shard, its number there, and how many images it has.
    """

    places: np.ndarray
    blocks: tuple[tuple[int, int, int], ...]

    @property
    def share(self) -> float:
        """Of the split's images."""
        return len(self.places) / sum(count for *_, count in self.blocks)

    @property
    def key(self) -> list[int]:
        """What identifies the choice."""
        return list(map(int, self.places))

    def rows(self, block: tuple[int, int], count: int) -> np.ndarray:
        """Positions in a block of the chosen images, ascending."""
        start = self._starts[block]
        first, last = np.searchsorted(self.places, (start, start + count))
        return self.places[first:last] - start

    @cached_property
    def _starts(self) -> dict[tuple[int, int], int]:
        ends = np.cumsum([count for *_, count in self.blocks]).tolist()
        return {(shard, number): end - count for (shard, number, count), end in zip(self.blocks, ends, strict=True)}


def drawn_places(blocks: Sequence[Sequence[int]], pilot: Pilot | Chosen | None) -> np.ndarray | None:
    """Positions in the split of a pilot's images; None without a pilot.

    Args:
        blocks: for each its shard, its number there, and how many images it has.
    """
    if pilot is None:
        return None
    starts = np.cumsum([0, *(count for *_, count in blocks)])
    drawn = [pilot.rows((shard, number), count) for shard, number, count in blocks]
    return np.concatenate([start + rows for start, rows in zip(starts, drawn, strict=False)])
