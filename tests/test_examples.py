"""The examples run as the README says, and make what it says."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared.training import NAMES
from transformers import AutoConfig, AutoModelForImageClassification, TimmWrapperConfig

import hf_radin
from hf_radin.ingredients.card_metadata import agreed_origin
from hf_radin.soup.report import SearchReport

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def finetune_sweep():
    sys.path.insert(0, str(EXAMPLES))
    import finetune_sweep

    yield finetune_sweep
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def settings(finetune_sweep, start, digits, tmp_path):
    return finetune_sweep.Settings(
        str(start), str(digits), str(tmp_path / "runs"), count=2, epochs=1, learning_rates=[1e-3, 2e-3], fraction=0.2
    )


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def run_example(folder: Path, script: str, *options: str) -> str:
    """What a script prints that is run in a folder, without the Hub."""
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_sweep_makes_ingredients_that_say_where_they_are_from(finetune_sweep, settings, digits):
    folders = finetune_sweep.sweep(settings)
    assert [folder.name for folder in folders] == ["ft-00", "ft-01"]
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "trainer_state.json",
    ]
    origin = agreed_origin(hf_radin.gather(f"{settings.output}/ft-*"))
    assert (origin.dataset, origin.split) == (str(digits), "validation")
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
    rates = [state["trial_params"]["learning_rate"] for state in states]
    assert rates[0] != rates[1] and all(1e-3 <= rate <= 2e-3 for rate in rates)


def test_a_sweep_goes_on_where_it_was_cut_off_and_a_seed_decides_it(finetune_sweep, settings):
    first = [digest(folder) for folder in finetune_sweep.sweep(settings)]
    assert first[0] != first[1]
    shutil.rmtree(Path(settings.output) / "ft-00")
    (Path(settings.output) / ".ft-00.part").mkdir()
    made = (Path(settings.output) / "ft-01" / "model.safetensors").stat().st_mtime
    assert [digest(folder) for folder in finetune_sweep.sweep(settings)] == first
    assert (Path(settings.output) / "ft-01" / "model.safetensors").stat().st_mtime == made
    with pytest.raises(ValueError, match=r"holds another sweep \(epochs 1 -> 2\)"):
        finetune_sweep.sweep(replace(settings, epochs=2))


def test_a_start_without_a_head_is_given_one_for_all(finetune_sweep, settings, start, tmp_path):
    other = AutoModelForImageClassification.from_pretrained(start, num_labels=3, ignore_mismatched_sizes=True)
    shutil.copytree(start, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    folders = finetune_sweep.sweep(replace(settings, model=str(tmp_path / "other")))
    given = AutoModelForImageClassification.from_pretrained(Path(settings.output) / "start")
    assert list(given.config.id2label.values()) == NAMES
    for folder in folders:
        tuned = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.dist(tuned.classifier.weight, given.classifier.weight) < given.classifier.weight.norm()


def test_a_start_of_timms_that_names_its_classes_is_given_those_of_the_images(finetune_sweep, settings, tmp_path):
    preparation = {"input_size": [3, 32, 32], "num_classes": 3}
    config = TimmWrapperConfig(architecture="test_efficientnet", pretrained_cfg=preparation, num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "other")
    settings = replace(settings, model=str(tmp_path / "other"), count=1)
    (folder,) = finetune_sweep.sweep(settings)
    assert list(AutoConfig.from_pretrained(folder).id2label.values()) == NAMES
    shutil.rmtree(folder)
    assert finetune_sweep.sweep(settings) == [folder] and folder.exists()  # its start needs no head once more


def test_the_demo_cooks_a_soup_of_real_checkpoints(tmp_path):
    printed = run_example(tmp_path, "demo.py", "--output", "demo", "--count", "3")
    for row in ("best single model", "uniform soup", "greedy soup", "RADIN, budget 8", "ensemble of all 3"):
        assert sum(line.startswith(row) for line in printed.splitlines()) == 1
    report = SearchReport.read(tmp_path / "demo" / "soup" / "recipe.json")
    assert {"soup", "best single", "uniform", "ensemble"} <= {result.name for result in report.results}
    for result in report.results:
        assert result.metrics["accuracy"] > 0.85  # ten classes: the models were really trained
        assert f"{100 * result.metrics['accuracy']:.2f}%" in printed


def test_the_python_api_of_the_readme(runs, digits, tmp_path):
    run_example(tmp_path, "python_api.py", f"{runs}/ft-*", str(digits))
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "soup")


def test_a_training_that_ends_with_a_soup(tmp_path):
    printed = run_example(tmp_path, "train_and_soup.py", "--epochs", "3", "--cache-dir", "cache")
    rows = [line.split() for line in printed.splitlines() if line.startswith(("validation", "test"))]
    assert {row[0] for row in rows} == {"validation", "test"} and len(rows) == 8
    report = SearchReport.read(tmp_path / "run" / "soup" / "recipe.json", is_saved=True)
    assert {entry.id for entry in report.ingredients} <= {
        f"run/_soup_ingredients/checkpoint-{step}" for step in (13, 26, 39)
    }


def test_a_soup_of_plain_torch_modules(tmp_path):
    command = [sys.executable, str(EXAMPLES / "any_model.py")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *rows, recipe = run.stdout.splitlines()
    accuracies = {(row[:12].strip(), row[12:26].strip()): float(row[26:]) for row in rows}
    for split in ("validation", "test"):
        names = {"soup", "best single", "uniform", "ensemble"}
        assert {name for place, name in accuracies if place == split} == names
    assert min(accuracies.values()) > 0.85  # ten classes: the models were really trained, and averaged
    assert {*hf_radin.Recipe.from_json(recipe).used} <= {f"mlp-{seed}" for seed in range(1, 6)}
    assert not any(tmp_path.iterdir())


def test_the_benchmark_of_gpus_runs_in_a_tiny_form_on_a_cpu(tmp_path):
    """What it compiles has tests of its own: a compiler takes longer than all the others."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--device", "cpu", "--output", "gpu.json"]
    command += ["--parts", "passes", "devices", "scoring"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["device"].startswith("CPU") and all(f"| {name} |" in run.stdout for name in rows)
    for name in ("ViT-B/16", "ConvNeXt-T"):
        assert rows[f"{name}: images at a time after a batch that did not fit"]["value"] == 8
        assert rows[f"{name}: logits in float32 against a CPU's in float32"]["value"] < 1e-4
        assert 0 < rows[f"{name}: logits in bfloat16 against a CPU's in float32"]["value"] < 0.05
        assert rows[f"{name}: ours over bare"]["holds"] is None  # a CPU says nothing of a GPU's speed
    assert rows["scores of the device are those of a CPU"]["holds"]
