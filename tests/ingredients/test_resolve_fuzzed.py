"""Whatever lists of checkpoints, the state of a Trainer and cards hold, they are read or refused in a line."""

import os

import pytest
from hypothesis import given, settings
from shared.fuzzing import SETTINGS, files, outcome

import hf_radin
from hf_radin.ingredients.card_metadata import describe_ingredient
from hf_radin.ingredients.resolve import find_places


@pytest.fixture
def run(go_offline, tmp_path, monkeypatch):
    """A working directory with the folders `a` and `b` and a Trainer's run of two checkpoints."""
    for name in ("a", "b", "run/checkpoint-1", "run/checkpoint-2"):
        (tmp_path / name).mkdir(parents=True)
    for step in (1, 2):
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "run" / f"checkpoint-{step}" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@settings(SETTINGS, max_examples=150)
@given(content=files("list"))
def test_lists(run, content):
    (run / "list.txt").write_bytes(content)
    outcome(lambda: find_places(["list.txt"]))


@settings(SETTINGS, max_examples=150)
@given(content=files("yaml list"))
def test_lists_in_yaml(run, content):
    (run / "list.yaml").write_bytes(content)
    outcome(lambda: find_places(["list.yaml"]))


@settings(SETTINGS, max_examples=150)
@given(content=files("state"))
def test_states_of_a_trainer(run, content):
    (run / "run" / "checkpoint-2" / "trainer_state.json").write_bytes(content)
    outcome(lambda: find_places(["run"]))


@pytest.fixture
def ingredient(two):
    return hf_radin.gather(f"{two}/*")[0]


@settings(SETTINGS, max_examples=150)
@given(content=files("card"))
def test_a_card_is_read_or_as_good_as_none(two, ingredient, content):
    (two / "ft-0" / "README.md").write_bytes(content)
    assert describe_ingredient(ingredient).id == ingredient.id


@pytest.mark.parametrize("best", ["checkpoint-1", "checkpoint-2"])
def test_the_best_checkpoint_is_the_best_in_any_locale(run, best):
    text = f'{{"best_model_checkpoint": "/home/rené/{best}"}}'
    (run / "run" / "checkpoint-2" / "trainer_state.json").write_text(text, encoding="utf-8")
    (place,) = find_places(["run"])
    assert place.name == f"run/{best}"


@pytest.mark.parametrize("kind", ["pipe", "device", "cut"])
def test_a_state_that_can_not_be_read_chooses_no_checkpoint(run, kind):
    path = run / "run" / "checkpoint-2" / "trainer_state.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text('{"best_model_checkpoint": "checkpoint-1')
    with pytest.raises(ValueError, match=r"trainer_state.json can't be read: .* Name one of the run's checkpoints"):
        find_places(["run"])
    (run / "run" / "config.json").touch()  # where the run has a model of its own, nobody asks
    assert find_places(["run"])[0].name == "run"


@pytest.mark.parametrize("name", ["[" * 100_000, "**/" * 20 + "x", "x" * 5000, "a\0b"])
def test_a_name_that_nothing_can_have_is_not_looked_for(run, name):
    with pytest.raises(ValueError, match="is no name, and no pattern"):
        find_places([name])


def test_a_folder_whose_name_is_no_text_is_named(run):
    (run / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(ValueError, match=r"The name caf\\udce9 is no UTF-8 text"):
        find_places(["c*"])
