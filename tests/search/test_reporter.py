"""What is reported beside accuracy, of the soup, the best single model, the uniform soup and the ensemble."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.launching import launch
from shared.logs import warned
from shared.stopping import Stopping
from shared.timeless import contents
from shared.training import digit_images, image_dataset
from shared.zoo import zoo, zoo_pilot
from sklearn import metrics as reference
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_radin
from hf_radin.cli import tables
from hf_radin.metrics.named import NAMES
from hf_radin.runtime.processes import Processes
from hf_radin.search.reporter import Reporter, ReportOptions, predict
from hf_radin.soup import card
from hf_radin.soup.report import Comparison, PassCounts

__all__ = ["zoo", "zoo_pilot"]  # fixtures

ROWS = ("soup", "best single", "uniform", "ensemble")


def logits_of(folder, part: slice) -> np.ndarray:
    """What transformers says of a checkpoint, without this package."""
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    images, _ = digit_images(part)
    with torch.inference_mode():
        return model.eval()(
            **processor([image.convert("RGB") for image in images], return_tensors="pt")
        ).logits.numpy()


@pytest.fixture(scope="module")
def soup(runs, digits, tmp_path_factory):
    """Found by a race, in which the uniform soup is shown some of the images only."""
    cache = tmp_path_factory.mktemp("reported")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), digits, cache_dir=cache)
    return hf_radin.radin(bank, budget=2, head="average", metrics=NAMES, test_split="test")


def test_every_metric_is_given_of_each_on_each_split(soup):
    rows = {(row.name, row.split): row.metrics for row in soup.results}
    assert rows.keys() == {(name, split) for name in ROWS for split in ("validation", "test")}
    assert all(scores.keys() == {*NAMES} for scores in rows.values())
    assert {row.images for row in soup.results} == {600, 497}


@pytest.mark.parametrize(("split", "part"), [("validation", slice(700, 1300)), ("test", slice(1300, 1797))])
@pytest.mark.parametrize("name", ["soup", "uniform"])
def test_a_soups_figures_are_those_of_the_model_that_is_saved(soup, bank, tmp_path, name, split, part):
    if name == "soup":
        soup.save_pretrained(tmp_path / name)
    else:
        hf_radin.average(bank.ingredients, hf_radin.Recipe.uniform(bank.ingredients.ids), output=tmp_path / name)
    logits, (_, labels) = logits_of(tmp_path / name, part), digit_images(part)
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    (scores,) = (row.metrics for row in soup.results if (row.name, row.split) == (name, split))
    assert scores["log_loss"] == pytest.approx(reference.log_loss(labels, probabilities), abs=1e-4)
    expected = reference.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert scores["roc_auc"] == pytest.approx(expected, abs=1e-4)
    assert scores["top5_accuracy"] == pytest.approx(
        reference.top_k_accuracy_score(labels, probabilities, k=5), abs=4e-3
    )
    assert scores["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels), abs=4e-3)


def test_the_figures_of_models_and_the_ensemble_are_those_of_their_logits(soup, bank):
    scores = {row.name: row.metrics for row in soup.results if row.split == "validation"}
    best = max(range(5), key=lambda at: (bank.score(np.eye(5)[at : at + 1])[0], -at))
    rows = {"best single": np.eye(5)[best], "ensemble": np.full(5, 0.2)}
    for name, row in rows.items():
        for metric in ("log_loss", "calibration_error", "top5_accuracy", "mcc", "roc_auc"):
            assert scores[name][metric] == pytest.approx(bank.score(row[None], metric=metric)[0], abs=2e-6)


def test_what_it_takes_to_know_the_probabilities_of_soups_is_told(soup, tmp_path):
    """On the split that chose, a pass more of each soup; that which proves is seen once, for classes or for logits."""
    soups = len({soup.recipe, hf_radin.Recipe.uniform([entry.id for entry in soup.report.ingredients])})
    assert soup.report.passes.probabilities == soups and soup.report.time.probabilities > 0
    assert f"{soups} to run soups once more for metrics of probabilities" in tables.soup_table(soup)
    text = card.render(soup.report)
    assert f"| running soups once more, for metrics of probabilities | {soups} | " in text


def test_shares_are_percent_and_losses_are_numbers(soup):
    (scores,) = (row.metrics for row in soup.results if (row.name, row.split) == ("soup", "test"))
    shown = {name: f"{100 * value:.2f}%" for name, value in scores.items()}
    shown |= {name: f"{scores[name]:.4f}" for name in ("log_loss", "brier_score", "mcc", "matthews_correlation")}
    (line,) = (line for line in card.render(soup.report).splitlines() if line.startswith("| soup | test |"))
    (head,) = (line for line in card.render(soup.report).splitlines() if line.startswith("| | split | images |"))
    names = [name.strip().replace("\\", "") for name in head.split("|")]
    cells = dict(zip(names, (cell.strip() for cell in line.split("|")), strict=True))
    assert {name: cells[name] for name in shown} == shown
    assert all(value in tables.soup_table(soup) for value in shown.values())


def test_a_table_of_many_metrics_fits_into_a_terminal(soup):
    lines = tables.soup_table(soup).split("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= 120 and len([line for line in lines if line.startswith("soup ")]) > 2
    assert all(any(f"{split} {name}" in line for line in lines) for split in ("validation", "test") for name in NAMES)


def test_without_such_a_metric_no_soup_is_run_once_more(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    report = hf_radin.radin(bank, budget=2, metrics=("accuracy", "f1", "mcc")).report
    assert report.passes.probabilities == 0 and report.time.probabilities is None
    assert not list(bank.folder.glob("soups/*-logits*"))
    hf_radin.uniform(bank, metrics=("accuracy", "log_loss"))
    assert list(bank.folder.glob("soups/*-logits*"))  # so that the test can fail


def test_the_split_that_proves_is_seen_once(runs, digits, tmp_path, predictions):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    test = hf_radin.compute_logits(bank.ingredients, digits, split="test", cache_dir=tmp_path)
    predictions.clear()
    first = hf_radin.uniform(bank, metrics=("accuracy", "log_loss"), test_split=test)
    assert sum(predictions) == 600 + 600 + 497  # measured, its probabilities there, and the proof
    assert first.report.passes == PassCounts(3, 1, probabilities=1)
    predictions.clear()
    again = hf_radin.uniform(bank, metrics=("log_loss", "roc_auc"), test_split=test)
    assert not predictions  # all is cached
    losses = [[row.metrics["log_loss"] for row in soup.results] for soup in (first, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_run_that_is_stopped_goes_on_with_a_soups_logits(runs, digits, tmp_path, predictions):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    hf_radin.uniform(bank)
    whole = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path / "whole")
    expected = hf_radin.uniform(whole, metrics="log_loss").results
    predictions.clear()
    stopping = replace(bank, processes=Processes(Stopping("log", 1 + 5)))  # the soup's accuracy, and five blocks
    with pytest.raises(KeyboardInterrupt):
        hf_radin.uniform(stopping, metrics="log_loss")
    assert sum(predictions) == 5 * 64
    results = hf_radin.uniform(bank, metrics="log_loss").results
    assert sum(predictions) == 600 and results == expected
    assert not list(tmp_path.glob("banks/*/soups/*.parts"))


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_bytes(b"x"), lambda path: path.write_bytes(path.read_bytes()[:99])]
)
def test_logits_of_a_soup_that_are_broken_are_made_anew(runs, digits, tmp_path, spoil):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    first = hf_radin.uniform(bank, metrics="log_loss").results
    (path,) = bank.folder.glob("soups/*-logits.npy")
    before = path.read_bytes()
    spoil(path)
    assert hf_radin.uniform(bank, metrics="log_loss").results == first and path.read_bytes() == before


def test_of_images_that_were_held_out_the_figures_are_theirs(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    soup = hf_radin.radin(bank, budget=2, hold_out=0.3, metrics=("accuracy", "log_loss"))
    rows = {(row.name, row.split): row for row in soup.results}
    assert {row.images for (_, split), row in rows.items() if "held out" in split} == {180}
    whole = hf_radin.uniform(bank, metrics="log_loss").results[0].metrics["log_loss"]
    both = [rows["uniform", split] for split in ("validation", "validation (held out)")]
    assert sum(row.images * row.metrics["log_loss"] for row in both) / 600 == pytest.approx(whole, abs=1e-9)


def test_of_images_that_were_held_out_none_chooses_the_model_that_is_named_instead(bank, caplog):
    def best(part: hf_radin.LogitBank) -> str:
        part = part.by_content  # of equals the first
        return part.ingredients.ids[part.score(np.eye(len(part.ingredients))).argmax()]

    seed = next(seed for seed in range(99) if best(bank.by_content.divided(0.4, seed)[0]) != best(bank))
    report = hf_radin.radin(bank, budget=0, unmeasured=True, hold_out=0.4, seed=seed).report
    worse = Comparison(report.held_out, -0.1, (-0.2, -0.05), 1e-3)
    reporter = Reporter.of(bank, ReportOptions(hold_out=0.4, seed=seed))
    caplog.clear()
    reporter.warn_if_worse(replace(report, against_best_single=(worse,)))
    (line,) = warned(caplog)
    assert line.endswith(f"Take that model instead: {best(reporter.bank)}")


def test_what_a_single_model_predicts_is_known(bank, model_calls):
    for name in bank.ingredients.ids:
        recipe = hf_radin.Recipe.uniform([name])
        assert (predict(bank, recipe) == np.asarray(bank.logits(name)).argmax(axis=1)).all()
    assert not model_calls


def test_after_a_pilot_what_is_not_known_is_left_out_and_said(zoo_pilot, caplog):
    soup = hf_radin.radin(zoo_pilot, budget=2, metrics=("accuracy", "f1", "log_loss"))
    assert soup.report.pilot.shown < 600
    scores = {row.name: row.metrics for row in soup.results}
    assert scores["soup"].keys() == {"accuracy", "f1", "log_loss"}
    assert scores["ensemble"].keys() == {"accuracy"}
    assert "f1, log_loss of the ensemble on validation: left out, because after a pilot its logits" in caplog.text
    assert np.isfinite([value for metrics in scores.values() for value in metrics.values()]).all()
    soup = hf_radin.radin(zoo_pilot, budget=2, metrics=("f1",))
    scores = {row.name: row.metrics.keys() for row in soup.results}
    assert scores["soup"] == scores["best single"] == {"accuracy", "f1"} and scores["ensemble"] == {"accuracy"}


def test_a_split_of_one_class_gives_no_area_and_says_so(runs, tmp_path, caplog):
    images, labels = digit_images(slice(700, 1300))
    alike = [place for place, label in enumerate(labels) if label == 1]
    data = image_dataset(images, labels)
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), data.select(alike), cache_dir=tmp_path)
    caplog.clear()
    soup = hf_radin.uniform(bank, metrics=NAMES)
    assert all({*NAMES} - row.metrics.keys() == {"roc_auc", "average_precision"} for row in soup.results)
    lines = [line for line in warned(caplog) if "roc_auc of the soup on validation is undefined" in line]
    assert len(lines) == 1
    assert "| soup | validation |" in card.render(soup.report)
    nothing = hf_radin.uniform(bank, metrics=("roc_auc",))
    nothing.save_pretrained(tmp_path / "soup")  # what was computed is not lost
    assert all(row.metrics.keys() == {"accuracy"} for row in nothing.results)  # what chooses is reported, too
    with pytest.raises(ValueError, match="The metric 'roc_auc' is undefined here: all images are of one class"):
        hf_radin.uniform(bank, metric="roc_auc")


def test_a_split_without_some_classes_gives_all_figures(runs, tmp_path):
    images, labels = digit_images(slice(700, 1300))
    places = [place for place, label in enumerate(labels) if label in (1, 4, 7)]
    data = image_dataset(images, labels).select(places)
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), data, cache_dir=tmp_path)
    soup = hf_radin.uniform(bank, metrics=NAMES)
    rows = [row.metrics for row in soup.results]
    assert len(rows) == 4 and all(metrics.keys() == {*NAMES} for metrics in rows)
    assert all(np.isfinite([*metrics.values()]).all() for metrics in rows)


def test_two_processes_report_what_one_does(runs, digits, tmp_path):
    options = ["--models", f"{runs}/ft-[012]", "--dataset", digits, "--budget", "1", "--test-split", "test"]
    options += ["--metrics", "accuracy,f1_weighted,log_loss,roc_auc"]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run = launch(tmp_path / str(processes), processes, *options)
        assert run.returncode == 0, run.stderr
    alone, together = (contents(tmp_path / str(processes) / "cache") for processes in (1, 2))
    assert alone == together and sum(name.endswith("-logits.npy") for name in alone) >= 2
    assert contents(tmp_path / "1" / "soup") == contents(tmp_path / "2" / "soup")


def test_a_misspelt_metric_is_told_before_anything_is_computed(runs, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--models", f"{runs}/ft-*", "--dataset", str(digits), "--cache-dir", str(tmp_path / "cache")]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "hf_radin",
        "soup",
        *options,
        "--metrics",
        "accuracy,rocauc",
    ]
    run = subprocess.run([*command, "--output", str(tmp_path / "soup")], capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "The metric 'rocauc' is none of accuracy, balanced_accuracy" in run.stderr and "roc_auc" in run.stderr
    assert not (tmp_path / "cache").exists()


def test_evaluate_is_not_imported_for_names_that_are_here(bank):
    code = (
        "import sys, hf_radin; bank = hf_radin.LogitBank.open(sys.argv[1]);"
        "hf_radin.best_single(bank, metrics=('accuracy', 'f1', 'log_loss')); print('evaluate' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(bank.folder)], text=True).strip() == "False"
