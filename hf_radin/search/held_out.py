"""The split that proves a soup: refused if it can't, as early as that can be known; its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_radin.images.digests import count_shared, refuse_shared, split_digests
from hf_radin.images.sample import Chosen
from hf_radin.images.split import OBJECT, DataSource, Split, open_split
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.compute import compute_logits
from hf_radin.runtime.processes import on_main_process


def of_split(bank: LogitBank, split: str, *, allow_overlap: bool = True) -> LogitBank:
    """The bank of the same ingredients on another split of the same dataset, computed if it is not there yet.

    Args:
        allow_overlap: whether the two splits may share images.

    Raises:
        ValueError: if the bank was computed from an object that is one split.
    """
    check_split(bank, split)
    for one in bank.ingredients:  # of somebody else's bank nothing is here yet
        one.download()
    request = {**bank.request, "pilot": Chosen() if bank.partly else None}
    return compute_logits(bank.ingredients, split=split, apart_from=None if allow_overlap else bank, **request)


def check_split(bank: LogitBank, split: str) -> Split | None:
    """The split of a bank's data with this name; None of streams that came as objects, which are opened once.

    Raises:
        ValueError: if there is none, as far as that is known without reading it.
    """
    if bank.origin is not None and bank.request["dataset"] == OBJECT:
        raise ValueError(
            f"The images of the bank {bank.origin} are not on the Hub, and its split {split!r} is not either. Name no "
            "held-out split (test_split, --test-split)."
        )
    if bank.about["data"]["name"] == OBJECT and not isinstance(bank.request["dataset"], Mapping):
        raise ValueError(
            f"The bank in {bank.folder} was computed from a Dataset object, which has no other splits. Compute the "
            f"bank of the split {split!r} with compute_logits and pass that."
        )
    dataset = bank.request["dataset"]
    if isinstance(dataset, Mapping) and not hasattr(dataset.get(split), "select"):
        return None
    where = ("dataset", "config_name", "revision", "image_column", "label_column", "token")
    return open_split(DataSource(**{name: bank.request[name] for name in where if name in bank.request}, split=split))


def refuse_overlap(bank: LogitBank, held_out: Split | LogitBank) -> None:
    """Refuse what shares images with the split that chooses, where that can be told before anything is computed.

    Files that are here are read, and no image is decoded; a stream is looked at when it goes by.

    Raises:
        ValueError: if images are in both.
    """
    chosen, home = replace(bank, part=None).digests, bank.folder.parent.parent
    if chosen is None or (isinstance(held_out, Split) and not held_out.is_here):
        return

    def refuse() -> None:
        proving = held_out.digests if isinstance(held_out, LogitBank) else split_digests(held_out, home)
        if proving is not None:
            refuse_shared(proving, chosen, (held_out.split, bank.split))

    on_main_process(refuse)


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
