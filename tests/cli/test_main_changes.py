"""`--changes` writes what a soup changes image by image; what can't be written is refused before anything is done."""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import hf_radin
from hf_radin.cli.commands import write_changes
from hf_radin.cli.main import main


def run(command: str, *options) -> int:
    return main([command, *map(str, options)])


@pytest.mark.parametrize("further", [["--test-split", "test"], ["--hold-out", "0.3"], []])
def test_the_file_says_what_the_report_says(runs, digits, cache, tmp_path, capsys, further):
    options = ["--models", f"{runs}/ft-*", "--dataset", digits, "--cache-dir", cache, "--output", tmp_path / "soup"]
    method = ["--budget", 1] if "--hold-out" in further else ["--method", "uniform"]
    file = tmp_path / "new" / "changes.parquet"
    assert run("soup", *options, *method, *further, "--changes", file) == 0
    rows = pq.read_table(file).to_pylist()
    won = sum(row["prediction_b"] == row["label_name"] for row in rows)
    lost = sum(row["prediction_a"] == row["label_name"] for row in rows)
    report = hf_radin.Soup.from_pretrained(tmp_path / "soup").report
    images = {result.split: result.images for result in report.results}
    *_, proof = report.against_best_single or [None]
    assert won - lost == (round(proof.gain * images[proof.split]) if proof else 0)
    split = report.held_out or "validation"
    is_said = "so that nothing changes" if report.is_single else f"On {split} the soup gets {won} image"
    assert is_said in capsys.readouterr().out


def test_of_the_best_single_model_nothing_changes(bank, tmp_path, capsys):
    args = argparse.Namespace(changes=tmp_path / "changes.parquet")
    write_changes(bank, hf_radin.best_single(bank), args)
    assert "nothing changes" in capsys.readouterr().out and pq.read_table(args.changes).num_rows == 0


def test_search_writes_it_too(bank, tmp_path):
    options = ["--method", "uniform", "--output", tmp_path / "soup", "--changes", tmp_path / "changes.parquet"]
    assert run("search", bank.folder, *options) == 0
    changes = hf_radin.soup_changes(bank, hf_radin.uniform(bank))
    assert pq.read_table(tmp_path / "changes.parquet")["id"].to_pylist() == changes.ids.tolist()


@pytest.mark.parametrize(
    ("name", "further", "problem"),
    [
        ("changes.csv", [], "name a file that ends with .parquet"),
        ("folder.parquet", [], "is a folder. Name a file"),
        ("there.parquet", [], "is there already"),
        ("there.parquet/changes.parquet", [], "can't be written to"),
        ("changes.parquet", ["--budget", "0"], "takes a soup that was measured"),
        ("changes.parquet", ["--pilot", "0.5"], "name a --test-split"),
    ],
)
def test_what_can_not_be_written_is_refused_first(runs, digits, tmp_path, capsys, name, further, problem):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "there.parquet").touch()
    options = ["--models", f"{runs}/ft-*", "--dataset", digits, "--cache-dir", tmp_path / "cache"]
    output = ["--output", tmp_path / "soup", "--changes", Path(tmp_path / name)]
    assert run("soup", *options, *output, *further) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "soup").exists()
