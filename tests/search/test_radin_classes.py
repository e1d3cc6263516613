"""Fine-tunes whose heads and classes are of their own: found, refitted, saved and cooked on what all have."""

from pathlib import Path

import pytest
from shared.classes import digits_of, with_classes
from shared.heads import own_heads
from shared.launching import launch
from shared.training import NAMES
from transformers import AutoModelForImageClassification

from hf_radin.cli.main import main
from hf_radin.soup.report import SearchReport

__all__ = ["own_heads"]  # a fixture

COMMON = NAMES[2:8]


@pytest.fixture
def own_classes(own_heads, tmp_path) -> Path:
    for number, names in enumerate((NAMES[:8], NAMES[:1:-1], [*NAMES[2:8], "ten"])):
        with_classes(own_heads / f"ft-{number}", tmp_path / "models" / f"ft-{number}", names)
    return tmp_path / "models"


def test_refitted_heads_know_what_all_know_on_any_number_of_processes(own_classes, tmp_path):
    """A head is refitted to the ensemble on the common classes, and made again bit for bit from the recipe."""
    data = digits_of(tmp_path / "data", COMMON)
    results = []
    for processes in (1, 2):
        folder = tmp_path / f"of-{processes}"
        folder.mkdir()
        options = ["--models", f"{own_classes}/ft-*", "--classes", "common", "--dataset", data, "--budget", "1"]
        run = launch(folder, processes, *options, "--head", "refit")
        assert run.returncode == 0, run.stderr
        report = SearchReport.read(folder / "soup" / "recipe.json", is_saved=True)
        weights = (folder / "soup" / "model.safetensors").read_bytes()
        results.append((report.measurements, report.results, report.head, weights))
    assert results[0] == results[1]
    assert report.classes == tuple(COMMON) and report.head is not None
    assert {entry.left_out for entry in report.ingredients} <= {1, 2}
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "of-1" / "soup")
    assert tuple(saved.config.id2label.values()) == tuple(COMMON)
    recipe = tmp_path / "of-1" / "soup" / "recipe.json"
    assert main(["average", "--recipe", str(recipe), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == results[0][3]
