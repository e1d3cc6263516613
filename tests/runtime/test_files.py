"""A file or a folder is whole or not there."""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hf_radin.runtime import files
from hf_radin.runtime.files import check_output, put_back, remove_partials, write_atomically, write_folder


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


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


def overwrite_with_shards(folder):
    write_folder(folder, lambda new: checkpoint(new, "index.json", others=SHARDS), overwrite=True)


def soup_with_notes(folder):
    """A soup, with a file beside it that stays: not the folder but each file of its own is replaced."""
    checkpoint(folder, "model.safetensors", others=("recipe.json", "notes.txt"))
    return contents(folder)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_is_interrupted_while_it_overwrites_leaves_the_old(tmp_path, monkeypatch, at, error):
    def stop():
        raise error

    before = soup_with_notes(tmp_path / "soup")
    monkeypatch.setattr(Path, "replace", stopping(at, stop))
    with pytest.raises(error):
        overwrite_with_shards(tmp_path / "soup")
    assert contents(tmp_path / "soup") == before


def stopped_child(at, work):
    """What a process does that is killed when it is about to move one file more than these: its exit status."""
    child = os.fork()
    if not child:
        Path.replace = stopping(at, lambda: os._exit(9))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("at", range(8))
def test_a_run_that_is_killed_while_it_replaces_files_leaves_the_old_when_the_next_one_starts(tmp_path, at):
    """Until then the old is whole, or there is no configuration to make a model of. The next may be killed, too."""
    folder = tmp_path / "soup"
    before = soup_with_notes(folder)
    assert stopped_child(at, lambda: overwrite_with_shards(folder)) == 9
    assert contents(folder) == before or "config.json" not in contents(folder)
    for _ in range(9):
        if not stopped_child(0, lambda: check_output(folder, overwrite=True)):
            break
        stopped_child(1, lambda: check_output(folder, overwrite=True))
    assert contents(folder) == before
    overwrite_with_shards(folder)
    assert contents(folder) == dict.fromkeys(("config.json", "index.json", *SHARDS), "index.json") | {
        "notes.txt": before["notes.txt"]
    }


@pytest.mark.skipif(sys.platform != "linux", reason="no other system exchanges folders")
def test_where_nothing_stays_the_old_or_the_new_is_under_the_name_at_any_moment(tmp_path, monkeypatch):
    folder = tmp_path / "soup"
    checkpoint(folder, "model.safetensors", others=("recipe.json",))
    folder.chmod(0o750)

    def move(self, target):
        raise AssertionError(f"{self} was moved alone")

    monkeypatch.setattr(Path, "replace", move)
    overwrite_with_shards(folder)
    assert contents(folder) == dict.fromkeys(("config.json", "index.json", *SHARDS), "index.json")
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]
    assert folder.stat().st_mode & 0o777 == 0o750


def test_files_of_a_killed_run_wait_for_the_next_however_old_they_are(tmp_path):
    before = soup_with_notes(tmp_path / "soup")
    assert stopped_child(4, lambda: overwrite_with_shards(tmp_path / "soup")) == 9
    (left,) = (tmp_path / "soup").glob(".hf_radin.*")
    os.utime(left, (time.time() - 2 * 86_400,) * 2)
    remove_partials(tmp_path / "soup")
    check_output(tmp_path / "soup", overwrite=True)
    assert contents(tmp_path / "soup") == before
    assert not left.exists()


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


def test_the_folder_that_a_process_works_in_is_not_replaced_but_its_files_are(tmp_path, monkeypatch):
    """The shell that started it would stand in a folder that is gone."""
    folder = tmp_path / "soup"
    folder.mkdir()
    place = folder.stat().st_ino
    monkeypatch.chdir(folder)
    for name in ("first", "second"):
        write_folder(Path(), lambda new, name=name: checkpoint(new, name, others=("recipe.json",)), overwrite=True)
        assert contents(Path()).get("config.json") == name and Path().stat().st_ino == folder.stat().st_ino == place
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root of Linux mounts folders")
def test_a_folder_of_the_same_disk_may_be_mounted_over_the_output(tmp_path):
    """Neither its device nor its place tells that it is, and no file can be renamed into it."""
    for name in ("soup", "mounted"):
        (tmp_path / name).mkdir()
    checkpoint(tmp_path / "mounted", "model.safetensors", others=("recipe.json",))
    libc = ctypes.CDLL(None, use_errno=True)
    soup, mounted = (os.fsencode(tmp_path / name) for name in ("soup", "mounted"))
    if libc.mount(mounted, soup, None, 0x1000, None):  # MS_BIND
        pytest.skip("this container may not mount")
    try:
        overwrite_with_shards(tmp_path / "soup")
    finally:
        libc.umount(soup)
    assert contents(tmp_path / "mounted") == dict.fromkeys(("config.json", "index.json", *SHARDS), "index.json")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("names", [["../other.txt"], ["/etc/other.txt"], [".."], [1], {"config.json": 1}])
def test_a_record_of_a_killed_run_leads_out_of_no_folder(tmp_path, names):
    """A folder from elsewhere may hold such a record."""
    temporary = tmp_path / "soup" / ".hf_radin.x"
    for name in ("old", "new"):
        (temporary / name).mkdir(parents=True)
    (tmp_path / "other.txt").write_text("mine")
    (temporary / "swap.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"swap\.json can't be read: it does not list names of files"):
        check_output(tmp_path / "soup", overwrite=True)
    assert (tmp_path / "other.txt").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork holds the place where it is")
def test_a_run_that_replaces_files_and_is_alive_is_waited_for(tmp_path, monkeypatch):
    """Whoever takes it for killed would put old files beside its new ones."""
    folder = tmp_path / "soup"
    soup_with_notes(folder)
    (begun, say_begun), (go_on, say_go_on) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:

        def wait():
            os.write(say_begun, b"x")
            os.read(go_on, 1)

        Path.replace = stopping(2, wait)
        overwrite_with_shards(folder)
        os._exit(0)
    os.read(begun, 1)
    monkeypatch.setattr(files, "SWAP_TIME", 0)
    with pytest.raises(ValueError, match="soup, and has not come to an end"):
        put_back(folder)
    monkeypatch.undo()
    os.write(say_go_on, b"x")
    put_back(folder)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(folder)["config.json"] == "index.json"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
def test_what_another_user_left_in_a_common_folder_hinders_nobody(tmp_path):
    """As in /tmp, where everybody writes and nobody removes the files of others."""
    left = tmp_path / "common" / ".0123456789ab.recipe.json"
    left.parent.mkdir()
    left.parent.chmod(0o1777)
    left.touch()
    os.utime(left, (time.time() - 2 * 86_400,) * 2)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o055)
    child = os.fork()
    if not child:
        os.setuid(4001)
        try:
            write_folder(left.parent / "soup", lambda new: checkpoint(new, "model.safetensors"))
        finally:
            os._exit(not (left.parent / "soup" / "config.json").exists())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert left.exists()
