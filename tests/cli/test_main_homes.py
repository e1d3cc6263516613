"""What is local needs no HF_HOME: one that is read-only, or lies below a file, refuses only downloads."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from loopback_hub.loopback import LoopbackHub


def hf_radin(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "hf_radin", *map(str, arguments)]
    return subprocess.run(start, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def home(tmp_path) -> str:
    """A place that nobody can make, whoever runs this."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "home")


def as_images(digits: Path, folder: Path) -> None:
    """Write a few images as files, in folders of their classes."""
    rows = datasets.load_dataset("parquet", data_files=str(digits / "data" / "validation-*"), split="train[:40]")
    for number, row in enumerate(rows):
        path = folder / "validation" / rows.features["label"].int2str(row["label"]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)


def as_saved(digits: Path, folder: Path) -> None:
    """Write a few images as save_to_disk does."""
    rows = datasets.load_dataset("parquet", data_files=str(digits / "data" / "validation-*"), split="train[:40]")
    datasets.DatasetDict({"validation": rows}).save_to_disk(folder)


@pytest.mark.parametrize("write", [as_images, as_saved])
def test_local_images_of_any_kind_are_read(two, digits, tmp_path, home, write):
    write(digits, tmp_path / "images")
    options = ["--models", f"{two}/*", "--dataset", tmp_path / "images", "--cache-dir", tmp_path / "cache"]
    run = hf_radin("logits", *options, HF_HOME=home)
    assert run.returncode == 0, run.stderr


def test_the_road_to_a_soup_works_with_a_cache_dir(two, digits, tmp_path, home):
    cache, soup = ["--cache-dir", tmp_path / "cache"], tmp_path / "soup"
    data = ["--models", f"{two}/*", "--dataset", digits]
    for command in (
        ["soup", *data, *cache, "--method", "uniform", "--test-split", "test", "--output", soup],
        ["estimate", *data, *cache],
        ["average", "--recipe", soup / "recipe.json", *cache, "--output", tmp_path / "again"],
        ["card", soup],
    ):
        run = hf_radin(*command, HF_HOME=home)
        assert run.returncode == 0, run.stderr
    bank = next(path for path in (tmp_path / "cache" / "banks").iterdir() if (path / "bank.json").is_file())
    assert hf_radin("search", bank, *cache, "--budget", "0", "--output", tmp_path / "s", HF_HOME=home).returncode == 0
    without = hf_radin("soup", *data, "--output", tmp_path / "other", HF_HOME=home)
    assert without.returncode == 2 and f"can't be kept in {home}" in without.stderr and "--cache-dir" in without.stderr


def test_a_download_names_the_place_and_the_way_out(two, tmp_path, home):
    with LoopbackHub() as hub:
        for path in two.iterdir():
            hub.add_repo(f"org/{path.name}", {file.name: file.read_bytes() for file in path.iterdir()})
        run = hf_radin("inspect", "--models", "org/ft-0", "org/ft-1", **hub.environ(tmp_path) | {"HF_HOME": home})
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"org/ft-0: {tmp_path / 'file'}" in run.stdout and "name another place with HF_HOME" in run.stdout


def test_a_home_that_is_missing_is_made(two, digits, tmp_path):
    home = tmp_path / "a" / "b"
    assert hf_radin("logits", "--models", f"{two}/*", "--dataset", digits, HF_HOME=str(home)).returncode == 0
    assert list(home.glob("hf_radin/banks/*/bank.json"))
