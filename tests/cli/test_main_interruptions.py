"""A full disk and a batch system's SIGTERM end a run in one line, and lose nothing that was finished."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_radin

# Files can't grow beyond so many bytes: what a full disk does to a writer, for this process alone.
LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from hf_radin.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def command(runs: Path, digits: Path, folder: Path) -> list[str]:
    options = {"--models": f"{runs}/ft-*", "--dataset": digits, "--cache-dir": folder / "cache"}
    return ["soup", *(str(part) for pair in options.items() for part in pair), "--output", str(folder / "soup")]


@pytest.mark.parametrize(("limit", "place"), [(10_000, "cache/weights/"), (72_000, "soup")])
def test_a_full_disk_is_named_and_what_was_finished_stays(runs, digits, tmp_path, limit, place):
    start = [sys.executable, "-W", "ignore", "-c", LIMITED, str(limit), *command(runs, digits, tmp_path)]
    run = subprocess.run(start, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith(f"hf-radin: {tmp_path}/{place}") and "can't be written" in line and "is kept" in line
    assert not (tmp_path / "soup").exists()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # no half of a file is left
    ingredients = hf_radin.gather(f"{runs}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")  # and goes on from there
    assert len(bank) == 600


def test_a_run_that_is_told_to_end_says_how_to_go_on(runs, digits, tmp_path):
    start = [sys.executable, "-W", "ignore", "-m", "hf_radin", *command(runs, digits, tmp_path)]
    run = subprocess.Popen(start, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "cache").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate()
    assert run.returncode == 143 and "Traceback" not in errors
    assert "hf-radin: terminated; run the same command again to continue." in errors
    again = subprocess.run(start, capture_output=True, text=True)
    assert again.returncode == 0 and (tmp_path / "soup" / "recipe.json").is_file()
