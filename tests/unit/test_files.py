"""A file or a folder is whole or not there."""

import pytest
from safetensors import SafetensorError

from hf_radin.files import write_atomically, write_folder


def test_what_is_written_is_there(tmp_path):
    write_atomically(tmp_path / "new" / "a.txt", lambda path: path.write_text("whole"))
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def fail(path):
        path.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a.txt", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_that_can_not_be_filled_is_named_and_not_there(tmp_path):
    def fill(folder):
        (folder / "config.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"soup can't be written: I/O error: No space left on device .* is kept"):
        write_folder(tmp_path / "soup", fill)
    assert not list(tmp_path.iterdir())
