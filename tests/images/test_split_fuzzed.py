"""Whatever the labels beside a folder's images hold, a split is opened and read or refused in a line."""

import os

import pytest
from hypothesis import given, settings
from PIL import Image
from shared.fuzzing import SETTINGS, files, outcome
from shared.training import image_dataset

from hf_radin.images.decode import example_images
from hf_radin.images.digests import split_digests, with_bytes
from hf_radin.images.shards import raw_blocks
from hf_radin.images.split import DataSource, open_split
from hf_radin.ingredients.labels import check_first_label, match_labels


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "validation").mkdir()
    for number in range(3):
        Image.new("L", (8, 8), number).save(tmp_path / "validation" / f"{number}.png")
    return tmp_path


def read(folder) -> None:
    """Open a split, match its labels and read its rows."""
    split = open_split(DataSource(folder))
    to_class = match_labels(split, ("cat", "dog"))
    check_first_label(split, to_class)
    assert sum(len(rows) for _, rows in raw_blocks(split.rows, 0, 1, 2, split.name)) > 0


@settings(SETTINGS, max_examples=40)
@given(content=files("labels"))
def test_labels(folder, content):
    (folder / "validation" / "metadata.csv").write_bytes(content)
    outcome(lambda: read(folder))


@settings(SETTINGS, max_examples=40)
@given(content=files("card"))
def test_the_card_of_a_dataset(folder, content):
    (folder / "validation" / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n2.png,cat\n")
    (folder / "README.md").write_bytes(content)
    outcome(lambda: read(folder))


def test_a_file_whose_name_is_no_text_is_named(folder):
    Image.new("L", (8, 8)).save(folder / "validation" / os.fsdecode(b"caf\xe9.png"), "PNG")
    with pytest.raises(ValueError, match=r"The name .*caf\\udce9.png is no UTF-8 text"):
        open_split(DataSource(folder))


@pytest.mark.parametrize("name", ["README.md", "validation/metadata.csv", "validation/9.png"])
def test_a_pipe_among_the_files_is_not_waited_for(folder, name):
    (folder / "validation" / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n2.png,cat\n")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    outcome(lambda: read(folder))


@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "/proc/self/mem", "."])
def test_an_image_that_is_no_regular_file_is_not_waited_for(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / place)
    with pytest.raises(ValueError, match="can't be read"):
        with_bytes({"bytes": None, "path": path})
    dataset = image_dataset([{"bytes": None, "path": path}], [0])
    split = open_split(DataSource(dataset))
    assert split_digests(split, tmp_path).tolist() == [b""] and not example_images(split)
