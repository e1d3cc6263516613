"""Images that the split which proves a soup shares with the one that chose it: counted, refused, or allowed."""

from __future__ import annotations

from dataclasses import dataclass

from hf_radin.bank import LogitBank
from hf_radin.digests import count_shared


@dataclass(frozen=True)
class Overlap:
    """How many images of the split that proves a soup are elsewhere too, byte for byte; None if nobody can tell.

    Args:
        of: how many it has.
        images: in the split that chose the soup.
        batchnorm: among those that gave BatchNorm its statistics; None also where there are none.
    """

    of: int
    images: int | None
    batchnorm: int | None = None


def overlap_of(bank: LogitBank, held_out: LogitBank) -> Overlap:
    """What the bank that proves a soup shares with the one that chose it."""
    chosen, proving = bank.digests, held_out.digests
    shared = None if chosen is None or proving is None else count_shared(proving, chosen)
    sampled = bank.statistics.digests if bank.statistics else None
    batchnorm = None if sampled is None or proving is None else count_shared(proving, sampled)
    return Overlap(len(held_out), shared, batchnorm)
