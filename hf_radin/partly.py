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
        clear: positions of a random sample of such images of which all have logits: what is right there says how much
            of the rest is.
        singles: of those in `whole` that have no logits there, the classes that they predict, `(samples,)` each.
    """

    rest: np.ndarray
    whole: tuple[str, ...]
    pruned: Pruned
    clear: np.ndarray
    singles: dict[str, np.ndarray] = field(default_factory=dict)

    def estimate(self, hits: np.ndarray) -> tuple[float, tuple[float, float]]:
        """The accuracy on all images, by what is right `(samples,)` where it is known, and between which 95 % lie."""
        known, left = int(np.delete(hits, self.rest).sum()), len(self.rest)
        rate = float(hits[self.clear].mean()) if left else 0.0
        value = (known + rate * left) / len(hits)
        # of a handful that are all right, nobody knows that all others are
        uncertain = max(rate * (1 - rate), 1 / (len(self.clear) + 1)) / max(1, len(self.clear))
        spread = math.sqrt(value * (1 - value) / len(hits) + (left / len(hits)) ** 2 * uncertain)
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * spread
        return value, (max(0.0, value - half), min(1.0, value + half))
