"""What a run says after it was stopped is so: it goes on where it was, whatever the size of the group and blocks."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from shared.making import make_bank
from shared.models import interrupted
from shared.timeless import contents
from shared.training import digit_images, image_dataset
from transformers import ViTForImageClassification

import hf_radin

MODELS = 60


@pytest.fixture(scope="session")
def sweep(start, tmp_path_factory) -> Path:
    """Sixty models of one start."""
    folder = tmp_path_factory.mktemp("sweep")
    model = ViTForImageClassification.from_pretrained(start)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(MODELS):
        generator = torch.Generator().manual_seed(number)
        noisy = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
        model.load_state_dict(noisy)
        model.save_pretrained(folder / f"ft-{number:02d}")
        shutil.copy(start / "preprocessor_config.json", folder / f"ft-{number:02d}")
    return folder


def rows(count: int) -> datasets.Dataset:
    return image_dataset(*digit_images(slice(700, 700 + count)))


@pytest.mark.parametrize(
    ("data", "share", "options"),
    [
        (rows(30), 1, {}),  # less than a block
        (rows(90), 1, {"pixel_cache": "off"}),
        (rows(300), 1, {"models_in_memory": 4}),
        (rows(300), 1 / 3, {"pilot": 1 / 3}),
        (1, 1, {}),
        (3, 1, {"models_in_memory": 5, "pixel_cache": "off"}),
    ],
    ids=["a part of a block", "two blocks", "groups", "pilot", "stream", "shards"],
)
def test_what_was_computed_is_never_computed_again(sweep, tmp_path, predictions, caplog, data, share, options):
    caplog.set_level(logging.INFO, logger="hf_radin")
    options = {"models_in_memory": 100, **options}  # else a model is run to see what that takes
    ingredients = hf_radin.gather(f"{sweep}/ft-0*")
    samples = 300 if isinstance(data, int) else len(data)
    if isinstance(data, int):  # files, which are read as streams
        for shard in range(data):
            rows(300).shard(data, shard, contiguous=True).to_parquet(tmp_path / "data" / f"validation-{shard}.parquet")
        data = tmp_path / "data"
    whole = hf_radin.compute_logits(ingredients, data, cache_dir=tmp_path / "whole", **options)
    wanted = len(ingredients) * len(whole)
    assert sum(predictions) == wanted == len(ingredients) * round(samples * share)

    options["write_every"] = 0  # as where each model takes long for a block: it is written model by model
    earlier = 0
    for calls in (5, 3):
        predictions.clear()
        with pytest.raises(KeyboardInterrupt), interrupted(calls):
            make_bank(ingredients, data, tmp_path / "stopped", **options)
        earlier += sum(predictions)
        assert 0 < earlier < wanted
    predictions.clear()
    caplog.clear()
    resumed = make_bank(ingredients, data, tmp_path / "stopped", **options)
    assert sum(predictions) == wanted - earlier
    total = re.findall(r"Continuing after ([\d,]+)(?: of .*)? predictions of an earlier run\.", caplog.text)
    assert total == [f"{earlier:,}"]
    assert len(resumed.ingredients) == len(whole.ingredients) == 10
    assert all((resumed.logits(name) == whole.logits(name)).all() for name in ingredients.ids)
    assert contents(resumed.folder) == contents(whole.folder)


def test_where_all_models_take_a_block_in_no_time_they_see_it_together(sweep, tmp_path, predictions):
    """To write more often costs: a block goes to the device once for each model."""
    ingredients = hf_radin.gather(f"{sweep}/ft-0*")
    hf_radin.compute_logits(ingredients, rows(300), cache_dir=tmp_path, models_in_memory=100)
    assert len(predictions) == 1 + 5  # of the first block, one model says how long it takes


# The command, where each call of the models takes a while and writes down how many predictions it made, and what is
# computed is written ten times a second.
SLOW = """
import os, sys, time
from dataclasses import replace
from hf_radin.checkpoints.forward import Running
from hf_radin.cli import commands
from hf_radin.cli.main import main
logits, run_options = Running.logits, commands.run_options

def count(self, models, inputs, *shared):
    time.sleep(0.005 * len(models))
    answers = logits(self, models, inputs, *shared)
    with open("predictions", "a") as file:
        file.write(f"{sum(map(len, answers))}\\n")
    return answers

Running.logits = count
commands.run_options = lambda args: replace(run_options(args), write_every=0.1)
open(f"process-{os.getpid()}", "w").close()
sys.exit(main(["logits", "--models-in-memory", "100", *sys.argv[1:]]))
"""


def begin(folder: Path, processes: int, options: list[str]) -> subprocess.Popen[str]:
    (folder / "slow.py").write_text(SLOW)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    launcher += ["--multi_gpu", "--main_process_port", "0"]
    command = [sys.executable, "-W", "ignore", *(launcher if processes > 1 else []), "slow.py", *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def uninterrupted(sweep, digits, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = begin(folder, 1, ["--models", f"{sweep}/ft-*", "--dataset", str(digits), "--cache-dir", "cache"])
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert made(folder) == MODELS * 600
    return contents(folder / "cache" / "banks")


def made(folder: Path) -> int:
    return sum(map(int, (folder / "predictions").read_text().split()))


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)],
)
def test_a_run_that_was_stopped_begins_where_it_was(sweep, digits, tmp_path, uninterrupted, number, processes):
    options = ["--models", f"{sweep}/ft-*", "--dataset", str(digits), "--cache-dir", "cache"]
    run = begin(tmp_path, processes, options)
    while not (tmp_path / "predictions").exists() or made(tmp_path) < 0.4 * MODELS * 600:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.02)
    os.killpg(run.pid, number)
    if number == signal.SIGKILL and processes > 1:  # of which the launcher can't tell its processes
        for path in tmp_path.glob("process-*"):
            os.kill(int(path.name.split("-")[1]), number)
    _, errors = run.communicate()
    assert run.returncode != 0
    if number != signal.SIGKILL:
        assert "run the same command again to continue" in errors
    written = sum(len(np.load(part)["logits"]) for part in tmp_path.glob("cache/banks/*/logits/*.parts/block-*.npz"))
    # a call of each process was cut off, or its logits not yet written: that is all that is lost. A model takes
    # 0.005 s or more for a block of 64 images, so that there are at most twenty models in a call of 0.1 s
    assert made(tmp_path) - written <= processes * 20 * 64 and written >= 0.3 * MODELS * 600

    (tmp_path / "predictions").unlink()
    again = begin(tmp_path, processes, options)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    line = f"after {written:,} of {MODELS * 600:,} ({written / (MODELS * 600):.0%}) predictions of an earlier run"
    assert line in errors
    assert made(tmp_path) == MODELS * 600 - written
    files = contents(tmp_path / "cache" / "banks")
    assert {name: files[name] for name in uninterrupted} == uninterrupted
