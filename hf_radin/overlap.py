"""Images that the split which proves a soup shares with the one that chose it: counted, refused, or allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from hf_radin.bank import LogitBank
from hf_radin.data import Split
from hf_radin.digests import split_digests, stand_in

WAY_OUT = (
    "Images that chose a soup can't prove it. Leave them out of one of the two splits, name another, or allow it with "
    "allow_overlap=True (--allow-overlap): recipe and card then say it."
)


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


def count_shared(held_out: np.ndarray, chosen: np.ndarray) -> int:
    """How many of the held-out images are among those that chose; of both digests `(images,)`."""
    return int(stand_in(held_out, chosen).sum())


def refuse_shared(held_out: np.ndarray, chosen: np.ndarray, names: tuple[str, str]) -> None:
    """Raises a ValueError if splits share images.

    Args:
        names: of the two splits.
    """
    if shared := count_shared(held_out, chosen):
        refuse_counted(shared, len(held_out), names)


def refuse_counted(shared: int, images: int, names: tuple[str, str]) -> NoReturn:
    raise ValueError(
        f"{shared} of the {images} images of the split {names[0]!r} are in the split {names[1]!r} too, byte for byte. "
        f"{WAY_OUT}"
    )


def refuse_shared_splits(held_out: Split, chosen: Split, home: Path) -> None:
    """Raises a ValueError if splits share images, where both are here and can be read before anything is computed."""
    if held_out.is_here and chosen.is_here:
        names = held_out.split, chosen.split
        refuse_shared(split_digests(held_out, home), split_digests(chosen, home), names)


def refuse_met(bank: LogitBank | None, held_out: Split) -> Callable[[list[str]], None] | None:
    """Hears of the images of a split as they go by, and raises a ValueError at the first that is in a bank.

    What was computed up to there is kept. None if there is nothing to compare with.
    """
    chosen = None if bank is None else replace(bank, part=None).digests
    return (
        None if bank is None or chosen is None else partial(_refuse_met, np.sort(chosen), held_out.split, bank.split)
    )


def _refuse_met(chosen: np.ndarray, held_out: str, chooser: str, digests: list[str]) -> None:
    met = np.asarray(digests if digests else [], dtype=chosen.dtype)
    places = np.searchsorted(chosen, met).clip(max=len(chosen) - 1)  # of a million images, a block takes no time
    if shared := int((chosen[places] == met).sum()):
        raise ValueError(
            f"{shared} of {len(met)} images of the split {held_out!r} that have just gone by are in the split "
            f"{chooser!r} too, byte for byte, and perhaps others. {WAY_OUT}"
        )


def overlap_of(bank: LogitBank, held_out: LogitBank) -> Overlap:
    """What the bank that proves a soup shares with the one that chose it."""
    chosen, proving = bank.digests, held_out.digests
    shared = None if chosen is None or proving is None else count_shared(proving, chosen)
    sampled = bank.statistics.digests if bank.statistics else None
    batchnorm = None if sampled is None or proving is None else count_shared(proving, sampled)
    return Overlap(len(held_out), shared, batchnorm)
