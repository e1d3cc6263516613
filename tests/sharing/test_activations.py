"""What a module is given of images comes back as it was written, or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared.logs import warned

from hf_radin.images.cache import ACTIVATIONS, ALL, Images
from hf_radin.runtime.files import Checks
from hf_radin.sharing.activations import Activations

BLOCK = (0, 3)


@pytest.fixture(autouse=True)
def room_on_disk(free_bytes):
    free_bytes(10**12)


@pytest.fixture
def activations(tmp_path) -> Activations:
    return Activations(tmp_path / "activations-abc", Checks())


def given(rows: list[int]) -> torch.Tensor:
    """Of each image its number, in a tensor of two axes."""
    return torch.tensor(rows, dtype=torch.bfloat16)[:, None, None].expand(-1, 2, 3).contiguous()


def write(activations: Activations, *rows: int, block=BLOCK, room: int = ALL) -> int:
    return activations.write(block, np.array(rows), given([*rows]), room)


def read(activations: Activations, *rows: int, block=BLOCK) -> torch.Tensor | None:
    return activations.read(block, np.array(rows))


def test_rows_come_together_from_several_files(activations):
    assert activations.is_empty and read(activations, 1) is None
    write(activations, 1, 4, 9)
    write(activations, 2, 4, 7)
    for rows in ([1, 2, 7, 9], [4], [9, 1]):
        assert torch.equal(read(activations, *rows), given(rows))
    assert read(activations, 1, 3) is None
    assert read(activations, 1, block=(0, 4)) is None and read(activations, 1, block=(1, 3)) is None
    again = Activations(activations.folder, Checks())  # another run
    assert torch.equal(read(again, 2, 9), given([2, 9])) and not again.is_empty


def test_what_two_runs_write_at_once_is_there_once(activations):
    write(activations, 1, 2)
    write(Activations(activations.folder, Checks()), 1, 2)
    assert len([*activations.folder.iterdir()]) == 1


def test_of_images_that_were_computed_twice_the_same_file_is_read_each_time(activations):
    activations.write(BLOCK, np.array([1, 2]), given([1, 2]), ALL)
    activations.write(BLOCK, np.array([2, 3]), given([5, 3]), ALL)
    first = read(activations, 2)
    assert all(torch.equal(read(Activations(activations.folder, Checks()), 2), first) for _ in range(3))


def test_a_file_that_has_the_name_of_another_block_is_none_of_that(activations, caplog):
    write(activations, 1, 2)
    (path,) = activations.folder.iterdir()
    other = path.replace(path.with_name(path.name.replace("000003", "000004")))
    assert read(activations, 1, block=(0, 4)) is None and not other.exists()
    assert other.name in warned(caplog)[-1]


@pytest.mark.parametrize("spoil", ["bit", "short", "empty", "other", "folder"])
def test_a_broken_file_is_named_and_goes(activations, caplog, spoil):
    write(activations, 1, 2)
    write(activations, 5)
    path = next(path for path in activations.folder.iterdir() if read(activations, 1) is not None and _has(path, 1))
    content = bytearray(path.read_bytes())
    if spoil == "folder":
        path.unlink()
        path.mkdir()
    elif spoil == "other":  # whole, but of another folder
        other = Activations(activations.folder.with_name("activations-def"), Checks())
        write(other, 1, 2)
        path.write_bytes(content)
        path = path.replace(other.folder / path.name)
        activations = other
        next(each for each in other.folder.iterdir() if each != path).unlink()
    else:
        content[-1] ^= 1
        path.write_bytes({"bit": content, "short": content[:9], "empty": b""}[spoil])
    assert read(activations, 1) is None and not path.exists()
    assert path.name in warned(caplog)[-1]


def _has(path: Path, row: int) -> bool:
    return row in load_file(path)["rows"].tolist()


def test_what_does_not_fit_is_not_written(activations, free_bytes):
    size = write(activations, 1, 2)
    for path in activations.folder.iterdir():
        path.unlink()
    assert write(activations, 1, 2, room=size - 1) == 0 == write(activations, 1, 2, room=1)
    free_bytes(size)  # others need the last gigabyte more
    assert write(activations, 1, 2, room=ALL) == 0 and activations.is_empty
    free_bytes(10**12)
    assert write(activations, 1, 2, room=size) == size


def test_the_images_know_what_room_it_takes(tmp_path):
    images = Images(tmp_path, 4, lambda: None)
    beside = Activations(tmp_path / f"{ACTIVATIONS}abc", Checks())
    assert images.room(10_000) == 10_000
    taken = write(beside, 1, 2) + write(beside, 3)
    assert images.room(10_000) == 10_000 - taken
