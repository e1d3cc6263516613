"""Prepared images on disk are those of the split, or are made anew, or that is said."""

from functools import partial

import pytest
import torch
from shared.training import digit_images, image_dataset
from transformers import ViTImageProcessor

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.images import cache
from hf_radin.images.cache import ALL, Images
from hf_radin.images.decode import Source
from hf_radin.images.split import DataSource, open_split

BROKEN = {"bytes": b"no image", "path": None}


prepare = partial(prepare_image, ViTImageProcessor(size={"height": 8, "width": 8}))


def cached(folder, images: list, labels: list[int]) -> Images:
    """Blocks of four images."""
    split = open_split(DataSource(image_dataset(images, labels), "train"))
    return Images(folder, 4, lambda: Source(split, prepare, int, "skip", 4))


@pytest.fixture
def images(tmp_path) -> Images:
    return cached(tmp_path, *digit_images(slice(0, 12)))


def test_what_nobody_wants_is_decoded_once_and_never_again(images, decoded):
    assert not list(images.stream(0, 1, wanted=lambda block: False, room=ALL)) and len(decoded) == 12
    assert images.index().labels == digit_images(slice(0, 12))[1]
    assert [block for block, _ in images.stream(0, 1, wanted=lambda block: block[1] == 1)] == [(0, 1)]
    assert len(decoded) == 12


def test_a_record_is_read_once_in_a_run_however_often_its_block_is(images, monkeypatch):
    """A search looks at each block hundreds of times."""
    list(images.stream(0, 1, room=ALL))
    read, known = [], cache.known_record

    def counted(record, path, subject):
        read.append(path.name)
        return known(record, path, subject)

    monkeypatch.setattr(cache, "known_record", counted)
    for _ in range(5):
        assert len(list(images.stream(0, 1))) == 3
    assert sum(name.startswith("block") for name in read) == 3


def test_a_record_that_is_broken_after_it_was_read_is_noticed(images, decoded, caplog):
    for _ in range(2):
        list(images.stream(0, 1, room=ALL))
    assert len(decoded) == 12
    (path,) = images.folder.glob("block-*1.json")
    path.write_text("{}")
    assert len(list(images.stream(0, 1, room=ALL))) == 3
    assert f"{path} can't be read" in caplog.text and len(decoded) == 16


def test_an_example_is_of_the_first_block_that_has_an_image(tmp_path):
    pictures, labels = digit_images(slice(0, 8))
    images = cached(tmp_path, [BROKEN] * 4 + pictures[4:], labels)
    assert images.example() is None
    assert [len(inputs) for _, inputs in images.stream(0, 1, room=ALL)] == [0, 1]
    assert torch.equal(images.example()["pixel_values"], prepare(pictures[4])["pixel_values"])
    assert images.index().skipped == [0, 1, 2, 3]


def test_a_record_that_is_gone_is_named(images):
    list(images.stream(0, 1, room=ALL))
    assert len({*images.index().digests.tolist()}) == 12
    (path,) = images.folder.glob("block-*1.json")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is gone, or broken"):
        images.index()


@pytest.mark.parametrize("free", [0, 10**12])
def test_a_block_whose_record_is_lost_takes_the_room_that_it_has_already(images, free_bytes, free, caplog):
    list(images.stream(0, 1, room=ALL))
    images.path((0, 1)).with_suffix(".json").unlink()
    free_bytes(free)
    room = images.room(None if free else 0)
    assert len(list(images.stream(0, 1, room=room))) == 3
    assert images.is_cached() and images.example() is not None and not caplog.messages


def test_pixels_that_do_not_fit_leave_no_earlier_file_behind(images, caplog):
    """Their record says that they are not cached: a file without a record would be read, and called broken."""
    list(images.stream(0, 1, room=ALL))
    for block in images.blocks:
        images.path(block).with_suffix(".json").unlink()
        images.path(block).write_bytes(b"")
    assert len(list(images.stream(0, 1, room=0))) == 3
    assert not any(images.path(block).exists() for block in images.blocks)
    assert images.example() is None and not caplog.messages


def test_pixels_that_are_broken_are_not_made_anew_of_other_images(images, tmp_path):
    list(images.stream(0, 1, room=ALL))
    images.path((0, 1)).write_bytes(b"broken")
    others = cached(tmp_path, *digit_images(slice(20, 32)))
    with pytest.raises(ValueError, match=r"has not the images of .* any longer: they have changed"):
        others.read((0, 1))
    again = cached(tmp_path, *digit_images(slice(0, 12)))
    assert len(again.read((0, 1))["pixel_values"]) == 4 and images.path((0, 1)).stat().st_size > 100
