"""Where only some ingredients have logits of all images: what is known of the others, and what it says of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from hf_radin.compare import LEVEL
from hf_radin.pruning import Pruned


@dataclass(frozen=True, eq=False)
class Partly:
    """What is known of a split where only some ingredients have logits of all images (see `telling`).

    Args:
        rest: positions of the images of which the others have none, ascending.
        whole: ids of the ingredients whose predictions are known of all images.
        pruned: the classes that can win; of the rest, what the leading ingredients agree on.
        clear: positions of a random sample of such images of which all have logits, `(clear,)`.
        right: whether what the leading agree on is right there, bool `(clear,)`.
        singles: of those in `whole` that have no logits there, the classes that they predict, `(samples,)` each.
    """

    rest: np.ndarray
    whole: tuple[str, ...]
    pruned: Pruned
    clear: np.ndarray
    right: np.ndarray
    singles: dict[str, np.ndarray] = field(default_factory=dict)

    def estimate(self, hits: np.ndarray) -> tuple[float, tuple[float, float]]:
        """The accuracy on all images, and between which 95% lie.

        Where there are no logits, what the leading get right is known, and by how much that is too good (or not good
        enough) the sample says.

        Args:
            hits: what is right `(samples,)`; of the rest, what the leading agree on.
        """
        drawn, share = len(self.clear), len(self.rest) / len(hits)
        gains = hits[self.clear].astype(int) - self.right
        value = min(1.0, max(0.0, float(hits.mean()) + share * float(gains.mean() if drawn else 0.0)))
        # a few that are equal are no certainty, as in `Strata.mean`
        uncertain = ((np.count_nonzero(gains) + 0.5) / (drawn + 1) - (gains.sum() / (drawn + 1)) ** 2) / max(1, drawn)
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(
            value * (1 - value) / len(hits) + share**2 * uncertain
        )
        return value, (max(0.0, value - half), min(1.0, value + half))
