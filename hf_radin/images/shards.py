"""A split's undecoded rows in blocks, from shards that processes read independently of each other."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.images.split import OBJECT
from hf_radin.runtime.hub_errors import is_of_network
from hf_radin.runtime.text import one_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# A block: its shard, and its number in that shard.
Block = tuple[int, int]


@dataclass(frozen=True, eq=False)
class BlockRows:
    """Some images of a block.

    Args:
        block: of which these are.
        rows: their places in it, ascending `(rows,)`.
    """

    block: Block
    rows: np.ndarray


# Steps of a stream that treat each row alike wherever it is, so that shards can be read independently. A `take` counts
# rows over the whole stream, an interleaving ends with one of its sources: such a stream is one shard.
_ROW_BY_ROW = {
    "ExamplesIterable",
    "ArrowExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
    "FormattedExamplesIterable",
}


def count_shards(rows: Dataset | IterableDataset) -> int:
    """How many parts of a split can be read independently; a `Dataset` has random access and counts as one."""
    if hasattr(rows, "select"):
        return 1
    step = getattr(rows, "_ex_iterable", None)
    while step is not None:
        if type(step).__name__ not in _ROW_BY_ROW:
            return 1
        last, step = step, getattr(step, "ex_iterable", None)
    return int(rows.num_shards) if getattr(rows, "_ex_iterable", None) is not None and last is not None else 1


def grouped(parts: Iterable[BlockRows], images: int, *, begin: Collection[Block] = ()) -> Iterator[list[BlockRows]]:
    """Consecutive parts of blocks that have at most so many images together; a part that has more is alone.

    Args:
        begin: blocks that begin a group, however few images there are before.
    """
    group: list[BlockRows] = []
    waiting = 0
    for part in parts:
        if group and (part.block in begin or waiting + len(part.rows) > images):
            yield group
            group, waiting = [], 0
        group.append(part)
        waiting += len(part.rows)
    if group:
        yield group


def reader(block: Block, shards: int, world: int) -> int:
    """The process that a block belongs to.

    Shards are dealt to the processes in rounds. Those that do not fill a round are shared, block by block in turn, so
    that no process waits for another that has one shard more.
    """
    shard, number = block
    whole = shards - shards % world
    if shard < whole:
        return shard % world
    sharing = range(shard - whole, world, shards - whole)
    return sharing[number % len(sharing)]


def reads(shard: int, shards: int, world: int) -> set[int]:
    """The processes that a shard's blocks belong to."""
    return {reader((shard, number), shards, world) for number in range(world)}


def raw_blocks(
    rows: Dataset | IterableDataset, shard: int, shards: int, size: int, name: str
) -> Iterator[tuple[int, Any]]:
    """The numbers of a shard's blocks in order, and their rows; the rows of a `Dataset` are read on access.

    Args:
        size: rows in a block.
        name: of the dataset, for errors.

    Raises:
        OSError: if a stream breaks off and can't be resumed.
        ValueError: if datasets can't read it.
    """
    if hasattr(rows, "select"):
        for number, start in enumerate(range(0, len(rows), size)):
            yield number, rows.select(range(start, min(start + size, len(rows))))
        return
    stream = iter(rows.shard(num_shards=shards, index=shard) if shards > 1 else rows)
    for number in itertools.count():
        try:
            block = list(itertools.islice(stream, size))
        except Exception as error:  # the Hub's client has tried several times, and its errors are not OSErrors
            if isinstance(error, OSError) or is_of_network(error):
                raise OSError(
                    f"The stream of {name} broke off: {one_line(error)}. All that was finished is kept; run the "
                    "same again to go on from there."
                ) from error
            if name == OBJECT or isinstance(error, MemoryError):  # users should see the errors of their own generators
                raise
            raise ValueError(
                f"The dataset {name} can't be read on from row {number * size} of shard {shard}: {one_line(error)}. "
                "Check that datasets reads it, or write it again, as parquet files."
            ) from error
        if not block:
            return
        yield number, block
