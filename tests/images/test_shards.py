"""Blocks are shared among processes: each belongs to one, and all are there."""

import datasets
import numpy as np
import pytest

from hf_radin.images.shards import BlockRows, count_shards, grouped, raw_blocks, reader, reads
from hf_radin.images.split import OBJECT


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 7, 8, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_work_is_shared_evenly(shards, world):
    work = [0] * world
    for shard in range(shards):
        owners = {reader((shard, number), shards, world) for number in range(24)}
        assert owners <= reads(shard, shards, world)
        for number in range(24):
            work[reader((shard, number), shards, world)] += 1
    assert sum(work) == 24 * shards and min(work) > 0
    assert max(work) <= 24 * -(-shards // world)  # nobody has more than if shards were never shared
    if not shards % world or not world % shards:
        assert max(work) == min(work)


def test_many_shards_are_each_read_by_one_process():
    assert all(len(reads(shard, 64, 8)) == 1 for shard in range(64))


def stream(shards: int) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"label": list(range(30))}).to_iterable_dataset(shards)


def test_shards_in_order_are_the_stream():
    rows = stream(4).cast_column("label", datasets.Value("int32"))
    assert count_shards(rows) == 4
    blocks = [raw_blocks(rows, shard, 4, 3, "d") for shard in range(4)]
    assert [row["label"] for shard in blocks for _, block in shard for row in block] == list(range(30))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.take(10),
        lambda rows: rows.skip(10),
        lambda rows: rows.shuffle(seed=0),
        lambda rows: rows.map(lambda row, index: {"label": index}, with_indices=True),
        lambda rows: datasets.interleave_datasets([rows, rows]),
        lambda rows: datasets.concatenate_datasets([rows, rows]),
    ],
)
def test_what_counts_rows_over_the_whole_stream_is_not_cut(change):
    rows = change(stream(4))
    assert count_shards(rows) == 1
    read = [row["label"] for _, block in raw_blocks(rows, 0, 1, 7, "d") for row in block]
    assert read == [row["label"] for row in rows]


def test_a_dataset_is_read_at_any_place():
    rows = datasets.Dataset.from_dict({"label": list(range(10))})
    assert count_shards(rows) == 1
    assert [(number, block["label"][:]) for number, block in raw_blocks(rows, 0, 1, 4, "d")] == [
        (0, [0, 1, 2, 3]),
        (1, [4, 5, 6, 7]),
        (2, [8, 9]),
    ]


@pytest.mark.parametrize(("name", "error"), [("d", ValueError), (OBJECT, ZeroDivisionError)])
def test_a_stream_that_fails_says_where_and_a_users_own_error_is_theirs(name, error):
    rows = stream(3).map(lambda row: {"label": 1 // (row["label"] - 16)})
    blocks = raw_blocks(rows, 1, 3, 4, name)
    assert len(next(blocks)[1]) == 4
    with pytest.raises(error, match="division" if name == OBJECT else "d can't be read on from row 4 of shard 1"):
        next(blocks)


@pytest.mark.parametrize(
    ("counts", "groups"),
    [([3, 4, 2, 1, 5], [4, 1]), ([20, 1, 1], [1, 2]), ([4, 20, 4], [1, 1, 1]), ([10, 10], [1, 1]), ([], [])],
)
def test_parts_of_blocks_come_together_up_to_so_many_images(counts, groups):
    parts = [BlockRows((0, number), np.arange(count)) for number, count in enumerate(counts)]
    together = list(grouped(iter(parts), 10))
    assert [len(group) for group in together] == groups
    assert [part.block for group in together for part in group] == [part.block for part in parts]


def test_a_group_may_have_to_begin_with_a_block():
    parts = [BlockRows((0, number), np.arange(2)) for number in range(5)]
    groups = grouped(parts, 10, begin={(0, 0), (0, 3)})
    assert [[part.block for part in group] for group in groups] == [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4)]]
