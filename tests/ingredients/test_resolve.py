"""The names that users have for checkpoints: runs, their best checkpoints, lists in files."""

import json
import shutil

import pytest
from transformers import ViTForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.ingredients.resolve import matches_pattern


@pytest.fixture
def sweep(runs, tmp_path, monkeypatch):
    """Two runs of two checkpoints each, as the Trainer leaves them."""
    for run, (first, last) in {"lr-1": (0, 1), "lr-2": (2, 3)}.items():
        for step, number in ((9, first), (100, last)):
            shutil.copytree(runs / f"ft-{number}", tmp_path / "sweep" / run / f"checkpoint-{step}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sweep"


def say_best(run, path: str | None, step: int = 100) -> None:
    (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": path}))


def test_all_checkpoints_of_all_runs(sweep):
    assert hf_radin.gather("sweep/*/checkpoint-*").ids == (
        "sweep/lr-1/checkpoint-9",
        "sweep/lr-1/checkpoint-100",
        "sweep/lr-2/checkpoint-9",
        "sweep/lr-2/checkpoint-100",
    )


def test_a_run_stands_for_its_best_checkpoint(sweep, caplog):
    caplog.set_level("INFO")
    say_best(sweep / "lr-1", "/scratch/me/lr-1/checkpoint-9")  # where the run was made
    say_best(sweep / "lr-2", "./lr-2/checkpoint-100")
    assert hf_radin.gather("sweep/lr-*/").ids == ("sweep/lr-1/checkpoint-9", "sweep/lr-2/checkpoint-100")
    (line,) = caplog.messages
    assert line == (
        "Of 2 runs the best checkpoint by trainer_state.json of sweep/lr-1/checkpoint-9 and 1 more. checkpoint=... "
        "(--checkpoint) takes best, last, root, all."
    )


@pytest.mark.parametrize(
    ("best", "message"),
    [
        ("lr-1/..", "names .., which is not there: its last checkpoint, checkpoint-100"),
        ("a" * 5000, "which is not there: its last checkpoint, checkpoint-100"),
        (None, "trainer_state.json names no best one: its last checkpoint, checkpoint-100, is used"),
        ("lr-1/checkpoint-55", "names checkpoint-55, which is not there: its last checkpoint, checkpoint-100"),
    ],
)
def test_where_the_best_is_not_known_it_is_the_last_and_said(sweep, caplog, best, message):
    say_best(sweep / "lr-1", best)
    assert hf_radin.gather(["sweep/lr-1", "sweep/lr-2"]).ids[0] == "sweep/lr-1/checkpoint-100"
    assert message in caplog.text


def test_a_run_with_a_model_of_its_own_is_that_model(sweep, runs, caplog):
    shutil.copytree(runs / "ft-4", sweep / "lr-1", dirs_exist_ok=True)
    assert hf_radin.gather("sweep/lr-*").ids == ("sweep/lr-1", "sweep/lr-2/checkpoint-100")
    assert "sweep/lr-1 has a model" not in caplog.text


def test_of_a_model_that_is_neither_the_best_nor_the_last_the_best_is_used(sweep, runs, caplog):
    """As transformers 5.23 leaves one where load_best_model_at_end meets names that differ on disk."""
    say_best(sweep / "lr-1", "lr-1/checkpoint-9")
    shutil.copytree(runs / "ft-1", sweep / "lr-1", dirs_exist_ok=True)
    assert hf_radin.gather("sweep/lr-*").ids[0] == "sweep/lr-1"
    assert "sweep/lr-1 has a model" not in caplog.text  # it is the last one
    shutil.copytree(runs / "ft-4", sweep / "lr-1", dirs_exist_ok=True)
    assert hf_radin.gather("sweep/lr-*").ids[0] == "sweep/lr-1/checkpoint-9"
    assert "sweep/lr-1 has a model at its top that is none of its checkpoints, though checkpoint-9 is" in caplog.text
    mixed = hf_radin.gather(["sweep/lr-1", "sweep/lr-2/checkpoint-9"], checkpoint="root")
    assert mixed.ids[0] == "sweep/lr-1"  # whoever asks for it has it
    hf_radin.average(mixed, hf_radin.Recipe.uniform(mixed.ids), output="soup")
    main(["average", "--recipe", "soup", "--output", "again", "--allow-pickle"])  # through the names in the recipe
    again, soup = (sweep.parent / name / "model.safetensors" for name in ("again", "soup"))
    assert again.read_bytes() == soup.read_bytes()


def test_a_model_in_several_files_is_not_compared(sweep, runs, caplog):
    say_best(sweep / "lr-1", "lr-1/checkpoint-9")
    shutil.copytree(runs / "ft-4", sweep / "lr-1", dirs_exist_ok=True)
    (sweep / "lr-1" / "model.safetensors").unlink()
    ViTForImageClassification.from_pretrained(runs / "ft-4").save_pretrained(sweep / "lr-1", max_shard_size="20KB")
    assert hf_radin.gather("sweep/lr-*").ids[0] == "sweep/lr-1"
    assert "sweep/lr-1 has a model" not in caplog.text


def log(run, step: int, *losses: float) -> None:
    """Write what a Trainer had logged at a checkpoint."""
    history = [{"step": number, "loss": loss} for number, loss in enumerate(losses)]
    (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))


@pytest.mark.parametrize("checkpoint", [None, "last", "all"])
def test_checkpoints_that_an_earlier_training_left_in_a_run_are_told(sweep, caplog, checkpoint):
    log(sweep / "lr-1", 9, 2.0, float("nan"))
    log(sweep / "lr-1", 100, 2.0, float("nan"), 1.0)  # which goes on with the same training
    hf_radin.inspect("sweep/lr-1", checkpoint=checkpoint)
    assert "different trainings" not in caplog.text
    log(sweep / "lr-1", 100, 2.5, 2.0, 1.0)
    hf_radin.inspect("sweep/lr-1", checkpoint=checkpoint)
    assert "sweep/lr-1: checkpoint-9 and checkpoint-100 are of different trainings, by what their" in caplog.text


def test_of_each_run_the_user_takes_what_is_wanted(sweep, runs):
    for run in ("lr-1", "lr-2"):
        say_best(sweep / run, f"{run}/checkpoint-9")
        shutil.copytree(runs / "ft-4", sweep / run, dirs_exist_ok=True)

    def taken(checkpoint: str) -> list[str]:
        return [verdict.id.removeprefix("sweep/") for verdict in hf_radin.inspect("sweep/*", checkpoint=checkpoint)]

    assert taken("best") == ["lr-1/checkpoint-9", "lr-2/checkpoint-9"]
    assert taken("last") == ["lr-1/checkpoint-100", "lr-2/checkpoint-100"]
    assert taken("root") == ["lr-1", "lr-2"]
    assert taken("all") == [f"lr-{run}/checkpoint-{step}" for run in (1, 2) for step in (9, 100)]
    with pytest.raises(ValueError, match="checkpoint='first': of a run it takes best, last, root, all"):
        taken("first")


def test_what_is_no_run_stands_for_itself_beside_runs_only(sweep, runs):
    names = [str(runs / "ft-4"), "sweep/lr-1"]
    assert hf_radin.gather(names, checkpoint="last").ids == (names[0], "sweep/lr-1/checkpoint-100")
    with pytest.raises(ValueError, match=r"checkpoint='all' \(--checkpoint\) is taken of runs, .* and there is none"):
        hf_radin.gather("sweep/*/checkpoint-*", checkpoint="all")
    with pytest.raises(ValueError, match=r"On the Hub, folders are named: org/run:checkpoint-\*"):
        hf_radin.gather("org/run", checkpoint="last")


@pytest.mark.parametrize(
    ("best", "checkpoint", "message"),
    [
        (
            "lr-1/checkpoint-55",
            "best",
            "names 'checkpoint-55' as the best, which is not there; it has checkpoint-9, ch",
        ),
        (None, "best", "no trainer_state.json names its best checkpoint, .* Take last, root or all"),
        (None, "root", "sweep/lr-1 has no model at its top .*; it has checkpoint-9, checkpoint-100. Take best, last"),
    ],
)
def test_a_run_that_has_not_what_is_wanted_is_refused(sweep, best, checkpoint, message):
    say_best(sweep / "lr-1", best)
    with pytest.raises(ValueError, match=message):
        hf_radin.gather("sweep/lr-*", checkpoint=checkpoint)


@pytest.mark.parametrize("checkpoint", [None, "best", "last", "all"])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("config.json",), "checkpoint-100 has no config.json"),
        (("model.safetensors",), "checkpoint-100 has no weights"),
        (("trainer_state.json",), "checkpoint-100 has no trainer_state.json, and earlier ones have"),
        ((), "tmp-checkpoint-110 has a name for the meantime"),
    ],
)
def test_a_run_that_is_being_written_is_refused(sweep, checkpoint, missing, message):
    for step in (9, 100):
        say_best(sweep / "lr-1", "lr-1/checkpoint-9", step)
    for name in missing:
        (sweep / "lr-1" / "checkpoint-100" / name).unlink()
    if not missing:
        (sweep / "lr-1" / "tmp-checkpoint-110").mkdir()
    with pytest.raises(
        ValueError, match=rf"sweep/lr-1: {message}: it is still being written, .* Wait for the Trainer"
    ):
        hf_radin.gather("sweep/lr-*", checkpoint=checkpoint)
    names = ["sweep/lr-1/checkpoint-9", "sweep/lr-2/checkpoint-9"]
    assert hf_radin.gather(names).ids == tuple(names)


def test_a_checkpoint_that_is_cut_off_may_be_one_that_is_being_written(sweep):
    weights = sweep / "lr-2" / "checkpoint-100" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"not a whole file of weights .* If a Trainer is still writing it, wait"):
        hf_radin.gather("sweep/*", checkpoint="all")


def test_runs_of_different_architectures_are_refused_by_name(sweep, nets):
    shutil.copytree(nets / "ft-0", sweep / "lr-3" / "checkpoint-100")
    with pytest.raises(ValueError, match=r"sweep/lr-3/checkpoint-100.*ResNetForImageClassification"):
        hf_radin.gather("sweep/*", checkpoint="last")


def test_commands_that_take_models_take_what_is_wanted_of_runs(sweep, capsys):
    assert main(["inspect", "--models", "sweep/*", "--checkpoint", "all"]) == 0
    assert "these 4 ingredients" in capsys.readouterr().out
    assert main(["average", "--recipe", "r", "--output", "o", "--checkpoint", "all"]) == 2
    assert "--checkpoint all: the recipe says which checkpoints it is of" in capsys.readouterr().err


def test_what_holds_checkpoints_is_told_from_a_checkpoint(sweep):
    with pytest.raises(
        ValueError, match=r"^sweep: no config.json; .* Its folders look like checkpoints: sweep/\*/check"
    ):
        hf_radin.gather("sweep")
    with pytest.raises(ValueError, match=r"There is no file 'gone.yaml' that could list checkpoints"):
        hf_radin.gather("gone.yaml")


def test_a_run_is_not_written_over(sweep):
    ingredients = hf_radin.gather("sweep/*/checkpoint-*")
    with pytest.raises(ValueError, match="The output sweep/lr-1 is the run of the ingredient sweep/lr-1/checkpoint-9"):
        hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output="sweep/lr-1", overwrite=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("models.txt", "# the good ones\nsweep/lr-1/checkpoint-9\n\nsweep/lr-2/*  # both\n"),
        ("models.yaml", "- sweep/lr-1/checkpoint-9\n- sweep/lr-2/*\n"),
        ("models.yml", "models:\n  - sweep/lr-1/checkpoint-9\n  - sweep/lr-2/*\n"),
    ],
)
def test_a_file_lists_checkpoints(sweep, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")  # as Windows writes it
    assert hf_radin.gather(name).ids == (
        "sweep/lr-1/checkpoint-9",
        "sweep/lr-2/checkpoint-9",
        "sweep/lr-2/checkpoint-100",
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("models.txt", "\n# nothing\n", "models.txt lists no checkpoints"),
        ("models.txt", "models.txt\n", "models.txt lists 'models.txt', which is a file"),
        ("models.txt", "gone\n" * 10_001, "models.txt has 10,001 entries, more than 10,000"),
        ("models.yaml", "- gone\n" * 10_001, "models.yaml has 10,001 entries, more than 10,000"),
        ("models.yaml", "[" * 100_000, "models.yaml can't be read: .*A list of checkpoints has"),
        ("models.yaml", "a: [", "models.yaml can't be read: .*A list of checkpoints has"),
        ("models.yaml", "paths: [a, b]", "models.yaml lists no checkpoints"),
        ("models.yaml", "- 5\n", "models.yaml lists no checkpoints"),
        ("models.yaml", "!!python/object/apply:os.mkdir [harm]", "models.yaml can't be read"),
    ],
)
def test_a_file_that_lists_none_is_refused(sweep, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        hf_radin.gather(name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["org/a:b\nc", "org/a\nb", "o" * 5000, "org/" + "a" * 5000, "a\0b"])
def test_names_that_nothing_can_have_are_refused(sweep, name):
    with pytest.raises(ValueError):
        hf_radin.gather(["sweep/lr-1", name])


def test_two_stars_go_down_any_number_of_folders(sweep):
    shutil.copytree(sweep / "lr-2" / "checkpoint-9", sweep / "more" / "seed-1" / "lr-3" / "checkpoint-9")
    assert hf_radin.gather("sweep/*/checkpoint-9").ids == ("sweep/lr-1/checkpoint-9", "sweep/lr-2/checkpoint-9")
    everything = [f"sweep/{run}/checkpoint-{step}" for run in ("lr-1", "lr-2") for step in (9, 100)]
    deep = "sweep/more/seed-1/lr-3/checkpoint-9"  # a copy of one: said, and kept once
    named = [verdict.id for verdict in hf_radin.inspect("sweep/**/checkpoint-*")]
    assert named == [*everything, deep]
    assert [verdict.id for verdict in hf_radin.inspect("sweep/**")] == named


def test_a_name_in_a_list_is_taken_whole(sweep, runs, tmp_path):
    for name in ("ft #1", "ft[2]"):
        shutil.copytree(runs / f"ft-{name[-1] if name[-1].isdigit() else 2}", sweep / name)
    (tmp_path / "models.txt").write_text("sweep/ft #1\nsweep/ft[2]\nsweep/lr-1/checkpoint-100 # the last\n")
    assert hf_radin.inspect("models.txt")[0].id == "sweep/ft #1"
    assert [verdict.id for verdict in hf_radin.inspect("models.txt")] == [
        "sweep/ft #1",
        "sweep/ft[2]",
        "sweep/lr-1/checkpoint-100",
    ]


def test_a_tilde_is_the_users_home(sweep, monkeypatch):
    monkeypatch.setenv("HOME", str(sweep.parent))
    assert len(hf_radin.gather("~/sweep/*/checkpoint-*")) == 4


@pytest.mark.parametrize(
    ("path", "pattern", "matches"),
    [
        ("a/checkpoint-1", "a/checkpoint-*", True),
        ("a/b/checkpoint-1", "a/*", False),
        ("a/b/checkpoint-1", "a/**/checkpoint-*", True),
        ("a/checkpoint-1", "a/**/checkpoint-*", True),
        ("a/b/c", "**", True),
        ("org/ft-1", "org/ft-?", True),
        ("org/ft-10", "org/ft-?", False),
    ],
)
def test_patterns_on_the_hub_mean_what_they_mean_in_a_shell(path, pattern, matches):
    assert matches_pattern(path, pattern) == matches
