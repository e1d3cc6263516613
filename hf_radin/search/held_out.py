"""The split that proves a soup: refused if it can't, as early as that can be known; its logits; shared images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_radin.images.digests import count_shared, refuse_counted, refuse_shared, split_digests
from hf_radin.images.split import OBJECT, DataSource, Split, open_split
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.compute import extend_bank, make_bank
from hf_radin.logits.manifest import is_object
from hf_radin.soup.report import Overlap, SearchReport

logger = logging.getLogger(__name__)

# What two banks must have been computed with alike.
_SAME_RUN = ("processor", "dtype", "mixed_precision")


def open_held_out(bank: LogitBank, test_split: str | LogitBank, *, allow_overlap: bool) -> LogitBank:
    """The bank of the split that proves, computed if it is not there yet.

    Args:
        bank: of the split that chooses.
        test_split: a split of the same dataset, or its bank.
        allow_overlap: whether the two splits may share images.

    Raises:
        ValueError: if it is the split that chooses, or lacks an ingredient.
    """
    proved = bank
    if isinstance(test_split, LogitBank):
        held_out = test_split
    else:
        if bank.partial:  # to prove it takes the best single model, and soups
            proved = replace(bank, ingredients=bank.ingredients.select(bank.partial.complete))
        held_out = bank_of_split(proved, str(test_split), allow_overlap=allow_overlap)
    check_held_out(proved, held_out)
    return replace(held_out, ingredients=proved.ingredients, statistics=bank.statistics, exact=bank.exact)


def bank_of_split(bank: LogitBank, split: str, *, allow_overlap: bool = True) -> LogitBank:
    """The bank of the same ingredients on another split of the same dataset, computed if it is not there yet.

    Args:
        allow_overlap: whether the two splits may share images.

    Raises:
        ValueError: if the bank was computed from an object that is one split.
    """
    find_split(bank, split)
    return bank_of_images(bank, bank.source.at(split), allow_overlap=allow_overlap)


def bank_of_images(bank: LogitBank, source: DataSource, *, allow_overlap: bool) -> LogitBank:
    """The bank of the same ingredients on other images, computed as this one was, if it is not there yet.

    Args:
        allow_overlap: whether they may be images of the split that this bank is about.

    Raises:
        ValueError: if a checkpoint is not here, or images are in both, and may not be.
    """
    for ingredient in bank.ingredients:  # of somebody else's bank nothing is here yet
        ingredient.download()
    make, options = extend_bank if bank.partial else make_bank, bank.options
    if bank.statistics and not source.labelled:  # another dataset may have no split of that name
        options = replace(options, batchnorm_split=source.split)
    apart_from = None if allow_overlap else bank
    return make(bank.ingredients, source, options, bank.processes, apart_from=apart_from)


def proving_bank(bank: LogitBank, report: SearchReport) -> LogitBank:
    """The bank of the images that prove a soup; if none do, that of those that chose it.

    Args:
        bank: that the soup was searched with.
        report: of the soup.
    """
    if report.hold_out is not None:
        return bank.divided(report.hold_out, report.seed or 0)[1]
    if report.held_out is None:
        return bank
    if report.pilot is not None and report.pilot.is_completed:  # it takes the logits of these only
        bank = replace(bank, ingredients=bank.ingredients.select(report.pilot.whole))
    return open_held_out(bank, report.held_out, allow_overlap=True)


def check_test_split(bank: LogitBank, split: str) -> Split | None:
    """The split of a bank's data that is to prove a soup; None if that can't be told without reading it.

    Raises:
        ValueError: if there is none, or it had a part in the choice.
    """
    if split == bank.split:
        raise ValueError(f"The split {split!r} chooses the soup; another one has to prove it.")
    if bank.statistics and split == bank.statistics.record.split:
        raise ValueError(f"The split {split!r} gives the soup its BatchNorm statistics; another one has to prove it.")
    proving = find_split(bank, split)
    if proving is not None and proving.key == bank.manifest.data.key:  # of a split without a name
        raise ValueError(f"The split {split!r} chooses the soup; another one has to prove it.")
    return proving


def check_head_split(bank: LogitBank, split: str, proving: Split | LogitBank | None, *, allow_overlap: bool) -> None:
    """Refuse a split that can't teach the head of a soup which another one proves, as far as that is known here.

    Args:
        bank: of the split that chooses.
        split: that is to teach.
        proving: the split that proves the soup; None if none does.
        allow_overlap: whether it may share images with the others.

    Raises:
        ValueError: if it chooses the soup, proves it, or shares images with one that does.
    """
    if split == bank.split:
        raise ValueError(
            f"The split {split!r} chooses the soup, and teaches its head if no other one is named: leave head_split "
            "(--head-split) out."
        )
    teaching = find_split(bank, split)
    if proving is not None and (split == proving.split or (teaching and teaching.key == _key(proving))):
        raise ValueError(f"The split {split!r} proves the soup; another one has to teach its head (--head-split).")
    if teaching is not None and not allow_overlap:
        refuse_taught(bank, teaching, [bank.whole, *([proving] if proving else [])])


def refuse_taught(bank: LogitBank, teaching: Split, judging: Sequence[LogitBank | Split]) -> None:
    """Refuse images that are to teach last layers if they are among those that judge them, where that is known before
    anything is computed.

    Args:
        bank: of the split that chooses.
        teaching: the images that teach.
        judging: the splits that choose and prove.

    Raises:
        ValueError: if images are in both.
    """

    def refuse() -> None:
        for judge in judging:
            if isinstance(judge, LogitBank):
                digests = judge.digests
            else:
                digests = split_digests(judge, bank.home) if judge.is_here else None
            if digests is not None:
                refuse_shared(digests, split_digests(teaching, bank.home), (judge.split, teaching.split))

    if teaching.is_here:
        bank.processes.decide(refuse)


def _key(data: Split | LogitBank) -> str:
    """What the images of a split are known by."""
    return data.key if isinstance(data, Split) else data.manifest.data.key


def find_split(bank: LogitBank, split: str) -> Split | None:
    """The split of a bank's data with this name; None of streams that came as objects, which are opened once.

    Raises:
        ValueError: if there is none, as far as that is known without reading it.
    """
    dataset = bank.source.dataset
    if bank.given is not None:
        raise ValueError(
            f"A bank of arrays has no split {split!r}, only {bank.split!r}: give the logits of that with "
            f"LogitBank.from_arrays(..., split={split!r}), and pass the bank (test_split=...)."
        )
    if bank.manifest.origin is not None and is_object(bank.source):
        raise ValueError(
            f"The images of the bank {bank.manifest.origin} are not on the Hub, and its split {split!r} is not "
            "either. Name no held-out split (test_split, --test-split)."
        )
    if bank.manifest.data.name == OBJECT and not isinstance(dataset, Mapping):
        raise ValueError(
            f"The bank in {bank.folder} was computed from a Dataset object, which has no other splits. Compute the "
            f"bank of the split {split!r} with compute_logits and pass that."
        )
    if isinstance(dataset, Mapping) and not hasattr(dataset.get(split), "select"):
        return None
    return open_split(bank.source.at(split))


def check_held_out(bank: LogitBank, held_out: LogitBank) -> None:
    """Refuse a bank that can't prove what another bank chose.

    Raises:
        ValueError: if it is of the same images, was computed otherwise, or lacks an ingredient.
    """
    if held_out.is_pilot:
        raise ValueError(
            f"The held-out bank in {held_out.folder} is of a part of its split: compute it without pilot."
        )
    chosen, proving = bank.manifest, held_out.manifest
    if chosen.data.key == proving.data.key:  # whatever the two are called
        raise ValueError(f"The split {bank.split!r} chooses the soup; another one has to prove it.")
    if bank.given is not None and bank.split == held_out.split:
        raise ValueError(
            f"The split that chooses and the one that proves are both called {bank.split!r}: name the latter in "
            "LogitBank.from_arrays(..., split=...)."
        )
    pairs = {"classes": (chosen.classes, proving.classes)}
    pairs |= {name: (getattr(chosen.run, name), getattr(proving.run, name)) for name in _SAME_RUN}
    for name, (wanted, value) in pairs.items():
        if wanted != value:
            raise ValueError(
                f"The held-out bank in {held_out.folder} was computed with another {name} than that in {bank.folder}: "
                f"{value} against {wanted}."
            )
    absent = [ingredient.id for ingredient in bank.ingredients if ingredient.key not in held_out.ingredients.keys]
    if absent:
        raise ValueError(
            f"The held-out bank in {held_out.folder} has no logits of {absent[0]} as it is in {bank.folder}."
        )
    if bank.statistics and proving.data.key == bank.statistics.record.data:
        raise ValueError(
            f"The split {held_out.split!r} gives the soup its BatchNorm statistics; another one has to prove it."
        )


def refuse_overlap(bank: LogitBank, held_out: Split | LogitBank) -> None:
    """Refuse a split that shares images with the split that chooses, where that is known before anything is computed.

    Files that are here are read, and no image is decoded; a stream is checked while it goes by.

    Raises:
        ValueError: if images are in both.
    """
    chosen = bank.whole.digests
    if chosen is None or (isinstance(held_out, Split) and not held_out.is_here):
        return

    def refuse() -> None:
        proving = held_out.digests if isinstance(held_out, LogitBank) else split_digests(held_out, bank.home)
        if proving is not None:
            refuse_shared(proving, chosen, (held_out.split, bank.split), alike=_alike(bank))

    bank.processes.decide(refuse)


def count_overlap(bank: LogitBank, held_out: LogitBank, *, allow: bool) -> Overlap:
    """The images that the split which proves shares with others; warnings say how many.

    Raises:
        ValueError: if it shares images with the split that chooses, and may not.
    """
    overlap = bank.processes.decide(lambda: overlap_of(bank, held_out))
    names = held_out.split, bank.split
    if overlap.images is None:
        reason = "a bank has no digests of its images"
        if bank.given is not None:
            reason = "give each image an id that is the same in both (LogitBank.from_arrays(..., ids=...))"
        logger.warning("Whether the splits %r and %r share images is not known: %s.", *names, reason)
    if overlap.images:
        if not allow:
            refuse_counted(overlap.images, overlap.of, names, alike=_alike(bank))
        logger.warning("%d of %d images of the split %r are in %r too.", overlap.images, overlap.of, *names)
    if overlap.batchnorm:
        logger.warning(
            "%d of %d images of the split %r are among those that give BatchNorm its statistics.",
            overlap.batchnorm,
            overlap.of,
            held_out.split,
        )
    return overlap


def _alike(bank: LogitBank) -> str:
    """In what sense images are the same."""
    return "byte for byte" if bank.given is None else "by their ids"


def overlap_of(bank: LogitBank, held_out: LogitBank) -> Overlap:
    """The images that the bank which proves a soup shares with the bank that chose it."""
    chosen, proving = bank.digests, held_out.digests
    shared = None if chosen is None or proving is None else count_shared(proving, chosen)
    sampled = bank.statistics.digests if bank.statistics else None
    batchnorm = None if sampled is None or proving is None else count_shared(proving, sampled)
    return Overlap(len(held_out), shared, batchnorm)
