"""Trackers of accelerate's hear how a run goes, and are refused before it starts if they are not there."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from hf_radin import cli


@pytest.fixture
def scalars(runs, digits, tmp_path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard was told by a run of its own process: the accelerator of this one has no trackers."""
    options = {"--models": f"{runs}/ft-[012]", "--dataset": digits, "--budget": 2, "--log-with": "tensorboard"}
    options |= {"--output": tmp_path / "soup", "--cache-dir": tmp_path / "cache", "--log-dir": tmp_path / "logs"}
    command = [sys.executable, "-W", "ignore", "-m", "hf_radin.cli", "soup"]
    run = subprocess.run(
        [*command, *(str(part) for pair in options.items() for part in pair)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in {path.parent for path in (tmp_path / "logs").rglob("events.*")}:
        events = EventAccumulator(str(folder)).Reload()
        for name in events.Tags()["scalars"]:
            found[name] = [(one.step, one.value) for one in events.Scalars(name)]
    return found


def test_tensorboard_hears_the_rate_each_soup_and_the_results(scalars):
    rates = scalars["logits/images per second"]
    assert [step for step, _ in rates] == [3 * min(64 * block, 600) for block in range(1, 11)]
    assert all(rate > 0 for _, rate in rates)
    assert len(scalars["soup/measured"]) == len(scalars["soup/estimate"]) >= 2
    steps = [3 * 600, *(step for step, _ in scalars["soup/measured"])]
    assert all(0 < later - step <= 600 for step, later in pairwise(steps))
    assert all(0.5 < value <= 1 for _, value in scalars["soup/measured"])
    assert 0.5 < scalars["validation/soup accuracy"][0][1] <= 1


def test_a_tracker_that_is_not_installed_is_refused_first(runs, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: False)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    command = ["soup", "--models", f"{runs}/ft-*", "--dataset", str(digits), "--log-with", "wandb"]
    assert cli.main([*command, "--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "soup")]) == 2
    assert "--log-with wandb: it is not installed. pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
