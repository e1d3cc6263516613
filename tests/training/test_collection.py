"""What is collected of a run, on files alone."""

import os
import shutil
from pathlib import Path

import pytest

from hf_radin.training.collection import Collection


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def save(run: Path, step: int) -> None:
    """What a Trainer would write."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text(f"{name} of step {step}")


def steps(collection: Collection) -> list[int]:
    return [int(place.name.partition("-")[2]) for place in collection.places()]


def trained(collection: Collection, *numbers: int) -> Collection:
    """A run that saved these steps, and removed all checkpoints but the last where there is a limit."""
    collection.begin(overwrite=False)
    for number in numbers:
        save(collection.run, number)
        for older in collection.run.glob("checkpoint-*"):
            if collection.limit and older.name != f"checkpoint-{number}":
                shutil.rmtree(older)
        collection.add(number)
    return collection


def test_without_a_limit_the_checkpoints_stay_where_they_are(run):
    collection = trained(Collection(run), 2, 10, 4)
    assert collection.places() == [run / f"checkpoint-{step}" for step in (2, 4, 10)]
    assert [path.name for path in (run / "_soup_ingredients").iterdir()] == ["run.json"]


def test_what_is_removed_was_kept_without_the_optimizer(run):
    collection = trained(Collection(run, limit=1), 2, 4)
    first, last = collection.places()
    assert {path.name for path in first.iterdir()} == {"config.json", "model.safetensors", "trainer_state.json"}
    assert (first / "model.safetensors").read_text() == "model.safetensors of step 2"
    assert os.path.samefile(last / "model.safetensors", run / "checkpoint-4" / "model.safetensors")


def test_files_are_copied_where_a_disk_has_no_second_names(run, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    last = trained(Collection(run, limit=1), 2, 4).places()[-1]
    assert (last / "model.safetensors").read_text() == "model.safetensors of step 4"
    assert not os.path.samefile(last / "model.safetensors", run / "checkpoint-4" / "model.safetensors")


def test_of_the_last_ones_no_others_are_kept_unless_the_run_may_be_resumed_from_them(run):
    assert steps(trained(Collection(run, limit=1, last=2), 2, 4, 6)) == [4, 6]
    assert {path.name for path in (run / "_soup_ingredients").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    other = run.with_name("other")
    assert steps(trained(Collection(other, last=2), 2, 4, 6)) == [4, 6]
    resumed = Collection(other, last=2)
    resumed.resume(4)
    assert steps(resumed) == [2, 4]


def test_a_run_that_is_resumed_earlier_forgets_what_came_later(run):
    collection = trained(Collection(run, limit=2), 2, 4, 6)
    collection.resume(4)
    assert steps(collection) == [2, 4]
    assert not (run / "_soup_ingredients" / "checkpoint-6").exists()


def test_what_somebody_removed_is_not_in_the_soup_and_said(run, caplog):
    collection = trained(Collection(run), 2, 4, 6)
    shutil.rmtree(run / "checkpoint-4")
    assert steps(collection) == [2, 6]
    assert "checkpoint-4 were removed, and are not in the soup" in caplog.text


def test_a_limit_that_came_with_the_resumed_part_keeps_the_earlier_ones_too(run):
    trained(Collection(run), 2, 4)
    collection = Collection(run, limit=1)
    collection.resume(4)
    shutil.rmtree(run / "checkpoint-2")
    assert steps(collection) == [2, 4]
