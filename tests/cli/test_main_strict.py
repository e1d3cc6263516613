"""A soup that is proven worse than the best single model is no success: how that model is saved is said."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from shared.logs import warned

import hf_radin
from hf_radin.cli.commands import WORSE
from hf_radin.cli.main import main


@pytest.fixture(scope="module")
def bad(runs, tmp_path_factory) -> Path:
    """Two fine-tunes, one with the sign of its head turned round: their average is no good."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("ft-0", "ft-1"):
        shutil.copytree(runs / name, folder / name)
    path = folder / "ft-1" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: -t if k.startswith("classifier") else t for k, t in tensors.items()}, path, {"format": "pt"})
    return folder


@pytest.fixture
def command(bad, digits, cache, tmp_path, monkeypatch) -> list[str]:
    """That makes a soup which is worse than the best single model."""
    monkeypatch.chdir(tmp_path)
    places = ["--dataset", str(digits), "--cache-dir", str(cache)]
    return ["soup", "--models", f"{bad}/ft-*", *places, "--method", "uniform"]


def test_a_worse_soup_is_no_success_and_the_command_that_is_named_saves_the_better_model(command, bad, caplog, capsys):
    assert main([*command, "--test-split", "test"]) == 0
    assert "Verdict: This soup is worse than the best single model beyond chance" in capsys.readouterr().out
    (line,) = [line for line in warned(caplog) if "beyond chance" in line]
    assert "On 'test', which proves it, the soup is worse than the best single model beyond chance" in line
    named = re.search(r"hf-radin (search .* --output best-single) \(", line)[1]
    assert main(shlex.split(named)) == 0
    saved, best = (load_file(folder / "model.safetensors") for folder in (Path("best-single"), bad / "ft-0"))
    assert saved.keys() == best.keys() and all((saved[name] == best[name]).all() for name in saved)


def test_strictly_the_status_says_so_and_the_soup_is_there(command, caplog):
    assert main([*command, "--test-split", "test", "--strict"]) == WORSE == 3
    assert any("Nothing is lost: it is in soup." in line for line in warned(caplog))
    report = hf_radin.Soup.from_pretrained("soup").report
    assert report.verdict.is_proven_worse and len(report.recipe.used) == 2


def test_strictly_a_worse_soup_is_not_pushed(command, hub, caplog):
    assert main([*command, "--test-split", "test", "--strict", "--push-to", "org/soup"]) == WORSE
    assert any("and was not pushed to org/soup" in line for line in warned(caplog))
    assert Path("soup", "README.md").exists() and not hub.logged("POST", "/commit/")


def test_the_script_for_launchers_ends_alike(command):
    script = Path(__file__).parents[2] / "examples" / "soup.py"
    run = [sys.executable, str(script), *command[1:], "--test-split", "test", "--strict"]
    assert subprocess.run(run, capture_output=True, check=False).returncode == WORSE


def test_strictly_what_is_no_worse_is_a_success(runs, digits, cache, tmp_path, caplog):
    places = ["--dataset", str(digits), "--cache-dir", str(cache), "--output", str(tmp_path / "soup")]
    options = ["--method", "uniform", "--test-split", "test", "--strict"]
    assert main(["soup", "--models", f"{runs}/ft-*", *places, *options]) == 0
    assert "--strict" not in caplog.text


def test_strict_takes_a_split_that_proves(command, capsys):
    assert main([*command, "--strict"]) == 2
    assert "--strict: nothing proves the soup; name a --test-split, or hold out" in capsys.readouterr().err


def test_where_nothing_proves_it_the_verdict_stands_alone(command, caplog, capsys):
    assert main(command) == 0
    assert "worse than the best single model beyond chance" in capsys.readouterr().out
    assert not any("beyond chance" in line for line in warned(caplog))
