"""A file or a folder is whole or not there."""

import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hf_radin.runtime.files import write_atomically, write_folder


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


def checkpoint(folder, weights, *, others=()):
    folder.mkdir(exist_ok=True)
    for name in ("config.json", *others):
        (folder / name).write_text(weights)
    (folder / weights).write_text(weights)


def test_what_another_checkpoint_left_is_removed_and_what_is_the_users_stays(tmp_path):
    old = ("processor_config.json", "adapter_config.json", "adapter_model.safetensors", "recipe.json", "README.md")
    mine = ("notes.txt", "model_ema.safetensors", "model.safetensors.bak", "pytorch_model.bin")
    checkpoint(tmp_path / "soup", "model-00001-of-00002.safetensors", others=(*old, *mine))
    write_folder(tmp_path / "soup", lambda new: checkpoint(new, "model.safetensors"), overwrite=True)
    files = {path.name: path.read_text() for path in (tmp_path / "soup").iterdir()}
    expected = dict.fromkeys(mine, "model-00001-of-00002.safetensors")
    assert files == expected | dict.fromkeys(("config.json", "model.safetensors"), "model.safetensors")


SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def stopping(at, stop):
    """`Path.replace`, which after so many files stops."""
    replace, done = Path.replace, []

    def stopped(self, target):
        if len(done) == at:
            done.append(self)
            stop()
        done.append(self)
        return replace(self, target)

    return stopped


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_is_interrupted_while_it_overwrites_leaves_the_old(tmp_path, monkeypatch, at, error):
    def stop():
        raise error

    checkpoint(tmp_path / "soup", "model.safetensors", others=("recipe.json",))
    before = {path.name: path.read_text() for path in (tmp_path / "soup").iterdir()}
    monkeypatch.setattr(Path, "replace", stopping(at, stop))
    with pytest.raises(error):
        write_folder(tmp_path / "soup", lambda new: checkpoint(new, "index.json", others=SHARDS), overwrite=True)
    assert {path.name: path.read_text() for path in (tmp_path / "soup").iterdir()} == before


@pytest.mark.parametrize("at", range(8))
def test_a_run_that_is_killed_while_it_overwrites_leaves_nothing_that_loads(tmp_path, at):
    """Whichever file it was about to move: the old is whole, or there is no configuration to make a model of."""
    checkpoint(tmp_path / "soup", "model.safetensors", others=("recipe.json",))
    child = os.fork()
    if not child:
        Path.replace = stopping(at, lambda: os._exit(9))
        write_folder(tmp_path / "soup", lambda new: checkpoint(new, "index.json", others=SHARDS), overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    names = {path.name for path in (tmp_path / "soup").iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "model.safetensors", "recipe.json"} or "config.json" not in names


def test_of_two_runs_that_write_one_folder_the_second_is_refused(tmp_path):
    def meanwhile(new):
        checkpoint(new, "model.safetensors")
        write_folder(tmp_path / "soup", lambda other: checkpoint(other, "first.safetensors"))

    with pytest.raises(ValueError, match="soup is not empty"):
        write_folder(tmp_path / "soup", meanwhile)
    assert (tmp_path / "soup" / "first.safetensors").exists()


def test_what_a_killed_run_left_is_removed_when_it_is_old(tmp_path):
    (tmp_path / "soup").mkdir()
    for name, age in ((".hf_radin.old", 2 * 86_400), (".hf_radin.young", 60)):
        (tmp_path / "soup" / name / "new").mkdir(parents=True)
        os.utime(tmp_path / "soup" / name, (time.time() - age,) * 2)
    write_folder(tmp_path / "soup", lambda new: checkpoint(new, "model.safetensors"))
    assert sorted(path.name for path in (tmp_path / "soup").iterdir()) == [
        ".hf_radin.young",
        "config.json",
        "model.safetensors",
    ]


def test_places_that_can_not_be_are_refused(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    with pytest.raises((ValueError, OSError), match="one"):
        write_folder(tmp_path / "one", lambda new: pytest.fail("it was filled"))
    (tmp_path / "soup" / "config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has a folder 'config\.json' where a file goes"):
        write_folder(tmp_path / "soup", lambda new: checkpoint(new, "model.safetensors"), overwrite=True)
