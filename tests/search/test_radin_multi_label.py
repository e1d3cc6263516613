"""Multi-label checkpoints go the whole road: what a soup decides is what transformers' sigmoid says of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.label_sets import NAMES, PROPERTIES, dataset, save_runs, write_images
from shared.launching import launch
from shared.training import PARTS, digit_images, save
from sklearn.metrics import f1_score
from transformers import AutoModelForImageClassification, pipeline

import hf_radin
from hf_radin.cli.main import main
from hf_radin.metrics.named import only_score
from hf_radin.recipes.recipe import Recipe


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs-of-properties")
    save_runs(start, folder)
    return folder


@pytest.fixture(scope="module")
def bank(runs, tmp_path_factory) -> hf_radin.LogitBank:
    ingredients = hf_radin.gather(f"{runs}/ft-*")
    return hf_radin.compute_logits(ingredients, dataset(), cache_dir=tmp_path_factory.mktemp("cache-of-properties"))


def decided(model, images) -> np.ndarray:
    """What a model says by transformers' pipeline: probabilities above one half, `(images, classes)`."""
    answers = pipeline("image-classification", model=str(model))(images, top_k=len(NAMES))
    scores = [{answer["label"]: answer["score"] for answer in of_image} for of_image in answers]
    return np.array([[of_image[name] > 0.5 for name in NAMES] for of_image in scores])


def test_a_bank_knows_which_classes_images_have_and_what_models_decide(bank, runs):
    truth = np.array([[number in row for number in range(4)] for row in dataset()["label"]])
    assert bank.is_multi_label and (bank.labels == truth).all() and not truth.any(axis=1).all()
    decisions = bank.predict(bank.row(Recipe.uniform([f"{runs}/ft-0"])))
    assert (decisions == (bank.logits(f"{runs}/ft-0") > 0)).all()
    images, _ = digit_images(PARTS["validation"])
    assert (decided(runs / "ft-0", images[:50]) == decisions[:50]).all()
    assert hf_radin.LogitBank.open(bank.folder).is_multi_label


def test_pruned_scores_are_dense_scores(bank):
    recipes = np.random.default_rng(0).dirichlet(np.ones(4), size=30)
    for name in ("accuracy", "f1", "f1_micro", "subset_accuracy", "map", "log_loss"):
        (metric,) = bank.load_metrics(name)
        dense = [only_score(metric, bank.answers(row, with_logits=True)) for row in recipes]
        assert bank.score(recipes, name) == pytest.approx(dense, abs=1e-6)
    little = replace(bank, most_pruned=100)  # where not all logits can be held
    assert not little.is_prunable(0)
    assert little.score(recipes[:3], "map") == pytest.approx(bank.score(recipes[:3], "map"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "map", "keep": "accuracy >= best single - 0.01"},
        {"metric": "accuracy", "keep": "recall[prime] >= 0.5", "hold_out": 0.3},
        {"metric": "subset_accuracy", "measure": "full", "metrics": ["log_loss", "f1_micro"]},
        {"metric": "subset_accuracy", "keep": "f1 >= 0.1"},
        {"metric": "f1", "keep": "subset_accuracy >= 0.01"},
    ],
    ids=[
        "f1",
        "map with a floor",
        "accuracy, held out",
        "all right, in full",
        "all right, raced",
        "all right, a floor",
    ],
)
def test_the_soup_that_is_returned_has_what_its_report_says(bank, options, tmp_path):
    soup = hf_radin.radin(bank, budget=3, head="average", **options)
    report = soup.report
    assert report.metric == {"accuracy": "label_accuracy", "map": "average_precision"}.get(
        options.get("metric"), options.get("metric", "f1")
    )
    soup.save_pretrained(tmp_path / "soup")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert model.config.problem_type == "multi_label_classification"
    images, _ = digit_images(PARTS["validation"])
    yes = decided(tmp_path / "soup", images)
    rows = {(result.name, result.split): result for result in report.results}
    result = rows["soup", bank.split]
    if "hold_out" not in options:
        assert result.metrics["label_accuracy" if "metrics" not in options else "f1_micro"] == pytest.approx(
            np.mean(yes == bank.labels) if "metrics" not in options else f1_score(bank.labels, yes, average="micro")
        )
    assert {name for name, _ in rows} >= {"soup", "best single", "ensemble"}
    assert max(entry.measured for entry in report.measurements if entry.images == report.images) == pytest.approx(
        result.metrics[report.metric]
    )
    assert report.head is None and (tmp_path / "soup" / "README.md").is_file()


@pytest.mark.parametrize("method", ["greedy", "uniform", "best_single"])
def test_baselines_choose_by_f1(bank, method):
    report = getattr(hf_radin, method)(bank).report
    assert report.metric == "f1"
    (single,) = (result for result in report.results if result.name == "best single")
    truth = np.array(bank.labels)
    best = max(f1_score(truth, bank.logits(place) > 0, average="macro") for place in range(4))
    assert single.metrics["f1"] == pytest.approx(best)


def test_of_equal_models_the_soup_is_that_model(runs, tmp_path):
    """Files differ in their metadata, so that they are two checkpoints, and weights do not."""
    for name in ("a", "b"):
        shutil.copytree(runs / "ft-0", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt", "name": name})
    ingredients = hf_radin.gather([str(tmp_path / name) for name in "ab"])
    bank = hf_radin.compute_logits(ingredients, dataset(), cache_dir=tmp_path / "cache", strangers="keep")
    report = hf_radin.uniform(bank).report
    measured = {entry.proposal: entry.measured for entry in report.measurements}
    assert measured["uniform"] == measured["single"] and len(bank.pruned().decided) == len(bank)


def test_decided_images_are_those_that_no_soup_of_the_ensemble_changes(bank):
    decided = bank.pruned().decided
    recipes = np.random.default_rng(1).dirichlet(np.ones(4), size=20)
    decisions = np.stack([bank.predict(row) for row in recipes])
    assert 0 < len(decided) < len(bank)
    assert (decisions[:, decided] == decisions[:1, decided]).all()


def test_a_folder_of_images_goes_the_whole_road(runs, tmp_path):
    write_images(tmp_path / "images")
    command = ["soup", "--models", f"{runs}/ft-*", "--dataset", str(tmp_path / "images"), "--split", "validation"]
    command += ["--test-split", "test", "--budget", "2", "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, "--output", str(tmp_path / "soup")]) == 0
    images, _ = digit_images(PARTS["test"])
    yes = decided(tmp_path / "soup", images[:40])
    report = hf_radin.Soup.from_pretrained(tmp_path / "soup").report
    (result,) = (entry for entry in report.results if (entry.name, entry.split) == ("soup", "test"))
    truth = np.array([[number in row for number in range(4)] for row in dataset("test")["label"][:40]])
    assert result.metrics["f1"] == pytest.approx(f1_score(truth, yes, average="macro"))
    assert result.metrics["label_accuracy"] == pytest.approx(np.mean(yes == truth))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--metric", "mcc"], "The metric 'mcc' is one of classifiers that give each image one class"),
        (["--keep", "recall[cat] >= 0.5"], "is of a class that is not there"),
        (["--pilot", "0.5"], "pilot=0.5: it goes by which class of an image is the best"),
        (["--eval-task", "org/bench:default", "--test-split", "test"], "a leaderboard takes an accuracy"),
    ],
)
def test_options_of_other_checkpoints_are_refused_before_anything_is_computed(
    options, reason, runs, tmp_path, capsys, monkeypatch, model_calls
):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", count=10)
    command = ["soup", "--models", f"{runs}/ft-*", "--dataset", str(tmp_path / "images"), "--split", "validation"]
    assert main([*command, "--cache-dir", str(tmp_path / "cache"), "--output", "soup", *options]) == 2
    assert reason in capsys.readouterr().err and not model_calls and not (tmp_path / "cache" / "banks").exists()


def test_what_multi_label_checkpoints_can_not_be_asked_is_refused(bank, runs, tmp_path):
    with pytest.raises(ValueError, match="'top5_accuracy' is one of classifiers that give each image one class"):
        hf_radin.radin(bank, metric="top5_accuracy")
    with pytest.raises(ValueError, match="multi-label: compute the logits of all images, without pilot"):
        hf_radin.compute_logits(bank.ingredients, dataset(), pilot=0.5, cache_dir=tmp_path)


def test_changes_are_the_pairs_that_two_recipes_decide_differently(bank):
    first, second = np.eye(4)[0], np.full(4, 0.25)
    changes = bank.compare(first, second)
    decisions, labels = [bank.predict(row) for row in (first, second)], np.array(bank.labels)
    assert len(changes) == (decisions[0] != decisions[1]).sum() > 0
    right = [round(value * labels.size) for value in bank.score([first, second], "accuracy")]
    assert changes.won - changes.lost == right[1] - right[0] and changes.won + changes.lost == len(changes)
    logits = [bank.logits(place).astype(float) for place in range(4)]
    for model, mixed in enumerate((logits[0], sum(0.25 * values for values in logits))):
        rows = np.searchsorted(bank.ids, changes.ids), changes.of_class
        np.testing.assert_array_equal(changes.predictions[:, model], decisions[model][rows])
        np.testing.assert_allclose(changes.margins[:, model], np.abs(mixed[rows]), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(changes.labels, labels[rows])
    opposite, half = bank.compare(second, first), bank.divided(0.3, 1)[1]
    np.testing.assert_array_equal(opposite.margins, changes.margins[:, ::-1])
    assert not len(bank.compare(second, second))
    is_half = np.isin(changes.ids, half.ids)
    np.testing.assert_array_equal(half.compare(first, second).margins, changes.margins[is_half])


def test_what_a_soup_changes_is_written_pair_by_pair(runs, tmp_path, capsys):
    write_images(tmp_path / "images", count=200)
    command = ["soup", "--models", f"{runs}/ft-*", "--dataset", str(tmp_path / "images"), "--split", "validation"]
    command += ["--test-split", "test", "--method", "uniform", "--cache-dir", str(tmp_path / "cache")]
    command += ["--output", str(tmp_path / "soup"), "--changes", str(tmp_path / "changes.parquet")]
    assert main([*command, "--metric", "accuracy"]) == 0
    table = pq.read_table(tmp_path / "changes.parquet").to_pylist()
    won, lost = (sum(row[name] == row["label"] for row in table) for name in ("prediction_b", "prediction_a"))
    report = hf_radin.Soup.from_pretrained(tmp_path / "soup").report
    (proof,) = (entry for entry in report.against_best_single if entry.split == "test")
    assert won - lost == round(proof.gain * 200 * len(NAMES)) and won + lost == len(table)
    assert f"On test the soup gets {won} decision" in capsys.readouterr().out
    images, digits = digit_images(PARTS["test"])
    yes = decided(tmp_path / "soup", images[:200])
    for row in table:
        assert row["class_name"] == NAMES[row["class"]] and row["prediction_a"] != row["prediction_b"]
        assert row["label"] == (digits[row["id"]] in PROPERTIES[row["class_name"]])
        assert row["prediction_b"] == yes[row["id"], row["class"]] or row["margin_b"] < 1e-3  # of other batches
        assert row["margin_a"] >= 0 and row["margin_b"] >= 0


def test_images_without_any_class_count_and_are_told(bank, caplog, tmp_path):
    caplog.set_level("INFO")
    few = hf_radin.compute_logits(bank.ingredients, dataset().select(range(60)), cache_dir=tmp_path)
    without = int((~few.labels.any(axis=1)).sum())
    assert without and f"{without} of 60 images of the split 'validation' have none of the classes" in caplog.text


def test_a_single_sigmoid_is_a_class_that_is_there_or_not(runs, tmp_path):
    """Its decisions are those of the class among the others."""
    for name in ("ft-0", "ft-1"):
        model = AutoModelForImageClassification.from_pretrained(runs / name)
        with torch.no_grad():
            head = torch.nn.Linear(model.classifier.in_features, 1)
            head.weight.copy_(model.classifier.weight[1:2]), head.bias.copy_(model.classifier.bias[1:2])
        model.classifier = head
        model.config.num_labels = 1
        model.config.id2label, model.config.label2id = {0: "even"}, {"even": 0}
        save(model, tmp_path / name)
    rows = dataset()
    flags = [[0] if 1 in row else [] for row in rows["label"]]
    feature = datasets.Sequence(datasets.ClassLabel(names=["even"]))
    data = rows.remove_columns("label").add_column("label", flags, feature=feature)
    single = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/ft-*"), data, cache_dir=tmp_path / "cache")
    soup = hf_radin.radin(single, budget=2, head="average")
    assert single.labels.shape == (600, 1) and soup.report.classes == ("even",)
    soup.save_pretrained(tmp_path / "soup")
    images, digits = digit_images(PARTS["validation"])
    answers = pipeline("image-classification", model=str(tmp_path / "soup"))(images)
    yes = [answer["score"] > 0.5 for (answer,) in answers]
    (result,) = (entry for entry in soup.report.results if entry.name == "soup")
    assert result.metrics["f1"] == pytest.approx(f1_score([digit % 2 == 0 for digit in digits], yes))


def test_a_line_between_two_recipes_is_searched_for_right_decisions(bank):
    start, end = np.eye(4)[0], np.full(4, 0.25)
    step, right = bank.best_step(start, end)
    (at_best,) = bank.score([start + step * (end - start)], "accuracy")
    steps = np.linspace(0, 1, 201)[:, None]
    assert right == round(at_best * bank.labels.size)
    assert at_best >= bank.score(start + steps * (end - start), "accuracy").max()
    assert hf_radin.radin(bank, budget=1, metric="accuracy", proposals="line").report.metric == "label_accuracy"


def test_a_bank_is_pushed_and_searched_elsewhere(hub, runs, bank, tmp_path):
    for name in ("ft-0", "ft-1", "ft-2"):
        hub.add_repo(f"org/{name}", {path.name: path.read_bytes() for path in (runs / name).iterdir()})
    mine = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), dataset(), cache_dir=tmp_path / "mine")
    mine.push_to_hub("org/bank")
    yours = hf_radin.LogitBank.from_hub("org/bank", cache_dir=tmp_path / "yours")
    assert yours.is_multi_label and (yours.labels == bank.labels).all()
    soup = hf_radin.radin(yours, budget=0, unmeasured=True)
    (estimated,) = (entry for entry in soup.measurements if entry.measured is None)
    row = yours.row(estimated.recipe)
    mixed = sum(weight * yours.logits(place).astype(float) for place, weight in enumerate(row))
    assert estimated.estimate == pytest.approx(f1_score(np.array(yours.labels), mixed > 0, average="macro"))


def test_two_processes_find_what_one_does(runs, tmp_path):
    write_images(tmp_path / "images", count=120)
    options = ["--models", f"{runs}/ft-*", "--dataset", str(tmp_path / "images"), "--budget", "2"]
    soups = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run = launch(tmp_path / str(processes), processes, *options, "--test-split", "test")
        assert run.returncode == 0, run.stderr
        soups.append(hf_radin.Soup.from_pretrained(tmp_path / str(processes) / "soup").report)
    alone, together = soups
    assert alone.recipe == together.recipe and alone.results == together.results
    assert alone.multi_label and alone.metric == "f1" and alone.passes == together.passes
