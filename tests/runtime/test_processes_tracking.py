"""Trackers of accelerate's hear how a run goes, and are refused before it starts if they are not there."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from shared.launching import launch

from hf_radin.cli.main import main

TENSORBOARD = ["--log-with", "tensorboard", "--log-dir", "logs"]


@pytest.fixture
def scalars(runs, digits, tmp_path) -> dict[str, list[tuple[int, float]]]:
    """What a run in its own process logged to tensorboard: the accelerator of this process has no trackers."""
    options = {"--models": f"{runs}/ft-[012]", "--dataset": digits, "--budget": 2, "--log-with": "tensorboard"}
    options |= {"--output": tmp_path / "soup", "--cache-dir": tmp_path / "cache", "--log-dir": tmp_path / "logs"}
    command = [sys.executable, "-W", "ignore", "-m", "hf_radin", "soup"]
    run = subprocess.run(
        [*command, *(str(part) for pair in options.items() for part in pair)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for folder in {path.parent for path in (tmp_path / "logs").rglob("events.*")}:
        events = EventAccumulator(str(folder)).Reload()
        for name in events.Tags()["scalars"]:
            scalars[name] = [(event.step, event.value) for event in events.Scalars(name)]
    return scalars


def test_tensorboard_hears_the_rate_each_soup_and_the_results(scalars):
    rates = scalars["logits/images per second"]
    assert all(rate > 0 for _, rate in rates)
    steps = [0, *(step for step, _ in rates if step <= 3 * 600)]
    assert steps[-1] == 3 * 600 and all(0 < later - step <= 3 * 64 for step, later in pairwise(steps))  # of a block
    last = scalars["soup/measured"][-1][0]
    steps = [last, *(step for step, _ in rates if step > 3 * 600)]  # of the soup whose head is refitted
    assert steps[-1] == last + 600 and all(0 < later - step <= 64 for step, later in pairwise(steps))
    assert len(scalars["soup/measured"]) == len(scalars["soup/estimate"]) >= 2
    steps = [3 * 600, *(step for step, _ in scalars["soup/measured"])]
    assert all(0 < later - step <= 600 for step, later in pairwise(steps))
    assert all(0.5 < value <= 1 for _, value in scalars["soup/measured"])
    assert 0.5 < scalars["validation/soup accuracy"][0][1] <= 1


# The command on a machine without wandb, whatever is installed here.
WITHOUT_WANDB = """
import sys
sys.modules["wandb"] = None
from hf_radin.cli.main import main
sys.exit(main(["soup", *sys.argv[1:]]))
"""


def test_a_tracker_that_is_not_installed_is_refused_first(runs, digits, tmp_path):
    options = {"--models": f"{runs}/ft-*", "--dataset": digits, "--log-with": "wandb"}
    options |= {"--output": tmp_path / "soup", "--cache-dir": tmp_path / "cache"}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_WANDB]
    command += [str(part) for pair in options.items() for part in pair]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "hf-radin: --log-with wandb: it is not installed. pip install wandb\n"
    assert not (tmp_path / "cache").exists()


def test_a_place_for_trackers_that_can_not_be_written_to_is_named_in_a_line(runs, digits, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["soup", "--models", f"{runs}/ft-*", "--dataset", str(digits), "--log-with", "tensorboard"]
    places = ["--log-dir", str(tmp_path / "file" / "logs"), "--output", str(tmp_path / "soup")]
    assert main([*command, *places]) == 2
    error = capsys.readouterr().err
    assert "--log-with tensorboard: nothing can be written to" in error and "Traceback" not in error


def scalar_names(logs) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in logs.rglob("events.*")}
    return {name for folder in folders for name in EventAccumulator(str(folder)).Reload().Tags()["scalars"]}


def test_two_processes_with_a_tracker_end_well(runs, digits, tmp_path):
    """In accelerate 1.15 `end_training` closes the process group: nobody may be waited for after it."""
    run = launch(tmp_path, 2, "--models", f"{runs}/ft-[01]", "--dataset", digits, "--budget", 1, *TENSORBOARD)
    assert run.returncode == 0, run.stderr
    assert "validation/soup accuracy" in scalar_names(tmp_path / "logs")
    assert (tmp_path / "soup" / "recipe.json").is_file()


def test_two_processes_with_a_tracker_end_in_one_line_after_an_error(runs, digits, tmp_path):
    """The error is of the second half of the run: the rates of the first are not lost."""
    options = ["--models", f"{runs}/ft-[01]", "--dataset", digits, "--budget", 1, *TENSORBOARD]
    run = launch(tmp_path, 2, *options, script=write_failing(tmp_path))
    assert run.returncode != 0 and "hf-radin: the soup is too salty" in run.stderr
    assert "barrier" not in run.stderr and "ProcessGroup" not in run.stderr
    assert scalar_names(tmp_path / "logs") == {"logits/images per second"}


def write_failing(folder) -> Path:
    """The command, with a search that fails in every process."""
    script = folder / "failing.py"
    script.write_text(
        "import sys, hf_radin\nfrom hf_radin.cli.main import main\n\n\n"
        "def radin(bank, **options):\n    raise ValueError('the soup is too salty')\n\n\n"
        "hf_radin.radin = radin\nsys.exit(main(['soup', *sys.argv[1:]]))\n"
    )
    return script
