"""Soups that are chosen by other metrics than accuracy, and with floors."""

import json
import logging

import numpy as np
import pytest
from shared.heads import own_heads, own_heads_bank
from shared.launching import launch
from shared.zoo import zoo, zoo_pilot

import hf_radin
from hf_radin.cli.tables import soup_table
from hf_radin.metrics.named import Answers, load_metrics
from hf_radin.metrics.objective import Objective
from hf_radin.search.measure import measured_soup
from hf_radin.search.reporter import predict, single_measurements
from hf_radin.soup import card
from hf_radin.soup.report import SearchReport

__all__ = ["own_heads", "own_heads_bank", "zoo", "zoo_pilot"]  # fixtures

METRICS = ("f1", "worst_recall", "recall[three]", "mcc", "log_loss", "brier_score", "roc_auc", "top2_accuracy")


def right(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def cost(logits: np.ndarray, labels: np.ndarray) -> float:
    return 1 - right(logits, labels)


cost.greater_is_better = False


def shown(bank, recipe) -> Answers:
    """What a soup says of all images, measured apart from any search."""
    if recipe.is_single:
        return bank.answers(bank.row(recipe), with_logits=True)
    logits, _ = measured_soup(bank, recipe).logits()
    return Answers(logits.argmax(axis=1), np.asarray(bank.labels), len(bank.classes), np.asarray(logits))


@pytest.mark.parametrize("name", METRICS)
def test_what_is_said_of_a_soup_is_its_metric(bank, name):
    soup = hf_radin.radin(bank, metric=name, budget=3, head="average", test_split="test")
    (metric,) = load_metrics(name, bank.classes)
    for entry in soup.measurements:
        value = metric.compute(shown(bank, entry.recipe))[metric.name]
        if entry.images == len(bank):
            assert entry.measured == pytest.approx(value, abs=1e-5)
        assert entry.estimate == pytest.approx(bank.score(entry.recipe, name)[0], abs=1e-5)
    reached = {row.name: row.metrics[metric.name] for row in soup.results if row.split == "validation"}
    better = min if metric.is_loss else max
    assert reached["soup"] == better(reached["soup"], reached["best single"])
    singles = [entry.known for entry in soup.measurements if entry.proposal == "single"]
    assert reached["best single"] == pytest.approx(better(singles), abs=1e-6)
    assert soup.report.metric == metric.name and {entry.metric for entry in soup.report.against_best_single} <= {name}


def test_by_a_function_that_is_the_accuracy_the_same_is_chosen_as_by_accuracy(bank):
    options = {"budget": 3, "head": "average", "measure": "full", "proposals": "monte-carlo"}
    by_name, by_function, by_loss = (
        hf_radin.radin(bank, metric=metric, **options) for metric in ("accuracy", right, cost)
    )
    assert by_name.recipe == by_function.recipe == by_loss.recipe
    known = {entry.recipe: entry.known for entry in by_name.measurements}
    assert {entry.recipe: entry.known for entry in by_function.measurements} == pytest.approx(known)
    assert {entry.recipe: 1 - entry.known for entry in by_loss.measurements} == pytest.approx(known)
    assert by_loss.report.less_is_better and by_loss.report.metric == "cost"


@pytest.mark.parametrize("method", [hf_radin.greedy, hf_radin.uniform, hf_radin.best_single])
@pytest.mark.parametrize("name", ["f1", "log_loss"])
def test_the_baselines_go_by_the_metric_too(bank, method, name):
    soup = method(bank, metric=name)
    (metric,) = load_metrics(name)
    value = metric.compute(shown(bank, soup.recipe))[name]
    (reached,) = (row.metrics[name] for row in soup.results if row.name == "soup")
    assert reached == pytest.approx(value, abs=1e-5)
    singles = [metric.rank(entry.known) for entry in single_measurements(bank, Objective.of(name))]
    if method is not hf_radin.uniform:
        assert metric.rank(reached) >= max(singles) - 1e-6


@pytest.mark.parametrize("name", METRICS)
def test_for_a_linear_model_the_soup_is_the_ensemble_by_every_metric(heads, digits, cache, name):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{heads}/ft-*"), digits, cache_dir=cache)
    soup = hf_radin.radin(bank, metric=name, budget=2, head="average")
    soups = [entry for entry in soup.report.soups if entry.images == len(bank)]
    assert soups and all(entry.measured == pytest.approx(entry.estimate, abs=2e-5) for entry in soups)


def test_a_floor_keeps_out_what_breaks_it(bank):
    free = hf_radin.radin(bank, metric="recall[three]", budget=3, head="average")
    floored = hf_radin.radin(
        bank, metric="recall[three]", keep="accuracy >= best single + 0.01", budget=3, head="average"
    )
    (best,) = hf_radin.best_single(bank, metric="recall[three]").recipe.used
    floor = float(bank.score(hf_radin.Recipe.uniform([best]))[0]) + 0.01
    assert floor > min(float(bank.score(entry.recipe)[0]) for entry in free.report.singles)  # it leaves something out
    winners = [entry for entry in floored.measurements if entry.keeps]
    assert winners and floored.recipe in [entry.recipe for entry in winners]
    assert float((predict(bank, floored.recipe) == bank.labels).mean()) >= floor - 1e-12
    assert all(entry.keeps is None for entry in free.measurements)


def test_where_nothing_keeps_the_floor_it_is_said(bank, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_radin"):
        soup = hf_radin.radin(bank, keep="accuracy >= 0.999", budget=2, head="average")
    assert "Nothing that was measured keeps accuracy >= 0.999" in caplog.text
    text, rendered = soup_table(soup), card.render(soup.report)
    assert "accuracy >= 0.999, which it does not" in text and "**which it does not**" in rendered
    assert not any(entry.keeps for entry in soup.measurements)


def test_the_record_says_what_chose_and_is_read_back(bank, tmp_path):
    soup = hf_radin.radin(bank, metric="log_loss", keep="accuracy >= best single - 0.5", budget=2, head="average")
    soup.save_pretrained(tmp_path / "soup")
    report = SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True)
    assert (report.metric, report.less_is_better, report.keep) == (
        "log_loss",
        True,
        ("accuracy >= best single - 0.5",),
    )
    assert report.measurements == soup.report.measurements and report.verdict == soup.report.verdict
    contents = json.loads((tmp_path / "soup" / "recipe.json").read_text())
    assert {entry["metric"] for entry in contents["against_best_single"]} <= {"log_loss"}
    text = (tmp_path / "soup" / "README.md").read_text()
    assert "the soup's log\\_loss is" in text or "its log\\_loss is" in text
    assert "accuracy >= best single - 0.5" in text.replace("\\", "")


def test_the_hub_is_told_of_metrics_by_their_kind(bank):
    soup = hf_radin.uniform(bank, metric=lambda logits, labels: right(logits, labels), metrics=("recall[three]",))
    metadata = card.render(soup.report).split("---")[1]
    assert "- function\n" not in metadata and "- lambda\n" in metadata and "- recall\n" in metadata
    assert "name: recall[three]" in metadata and "type: recall" in metadata and "name: <lambda>" in metadata


def test_a_function_that_is_undefined_for_a_soup_does_not_choose_it(bank):
    def picky(logits: np.ndarray, labels: np.ndarray) -> float:
        value = right(logits, labels)
        return value if any(abs(value - known) < 1e-9 for known in alone) else float("nan")

    alone = [entry.known for entry in single_measurements(bank)]
    soup = hf_radin.radin(bank, metric=picky, budget=2, head="average")
    assert soup.report.verdict.kind == "single" and max(alone) == soup.results[0].metrics["picky"]


def test_a_pilot_knows_accuracy_only(zoo_pilot):
    for options in ({"metric": "f1"}, {"keep": "f1 >= 0.5"}):
        with pytest.raises(ValueError, match="soups are chosen by accuracy then, and not by"):
            hf_radin.radin(zoo_pilot, budget=2, **options)


def test_losses_are_measured_without_a_pass_more(bank):
    """Soups that are chosen by probabilities have been shown all images with their logits."""
    soup = hf_radin.radin(bank, metric="log_loss", metrics=("brier_score",), budget=2, head="average")
    assert soup.report.passes.probabilities == 0 and "brier_score" in soup.results[0].metrics


@pytest.mark.parametrize("name", ["f1", "log_loss"])
def test_refitted_heads_race_by_any_metric(own_heads_bank, name):
    soup = hf_radin.radin(own_heads_bank, metric=name, budget=3)
    (metric,) = load_metrics(name)
    best = [metric.rank(entry.known) for entry in soup.measurements if entry.proposal == "single"]
    (chosen,) = (row.metrics[name] for row in soup.results if row.name == "soup")
    assert metric.rank(chosen) >= max(best) and any(entry.teacher for entry in soup.measurements)


def test_two_processes_choose_what_one_does(runs, digits, tmp_path):
    options = ["--models", f"{runs}/ft-[012]", "--dataset", digits, "--budget", "2", "--test-split", "test"]
    options += ["--metric", "f1", "--keep", "log_loss <= best single + 0.5", "--metrics", "brier_score"]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run = launch(tmp_path / str(processes), processes, *options)
        assert run.returncode == 0, run.stderr
    first, second = (SearchReport.read(tmp_path / str(processes) / "soup" / "recipe.json") for processes in (1, 2))
    assert first.recipe == second.recipe and first.results == second.results and first.keep
    assert first.measurements == second.measurements and first.verdict == second.verdict


def test_functions_are_tried_before_anything_is_spent(bank, predictions):
    def broken(logits: np.ndarray, labels: np.ndarray) -> list[float]:
        return [0.5]

    def right_too(logits: np.ndarray, labels: np.ndarray) -> float:
        return right(logits, labels) + 1

    right_too.__name__ = "right"
    for options in ({"metric": broken}, {"metrics": ("accuracy", broken)}):
        for method in (hf_radin.radin, hf_radin.greedy, hf_radin.uniform, hf_radin.best_single):
            with pytest.raises(ValueError, match="'broken' is a function that gives one number"):
                method(bank, **options, test_split="test")
    with pytest.raises(ValueError, match="Two functions are called 'right'"):
        hf_radin.uniform(bank, metric=right, metrics=(right_too,))
    assert not predictions


def test_an_estimate_that_breaks_a_floor_does_not_win_from_a_model_that_keeps_it():
    labels = np.arange(200) % 2
    careful = np.tile([0.0, 0.1], (200, 1))  # finds all of class 1, and none of the other
    better = 4 * np.eye(2)[labels]
    better[1:20:2] = [4.0, 0.0]  # a tenth of class 1
    bank = hf_radin.LogitBank.from_arrays({"careful": careful, "better": better, "twin": better}, labels)
    options = {"budget": 0, "unmeasured": True, "proposals": "dirichlet", "candidates": 1}
    soup = hf_radin.radin(bank, keep="recall[1] >= 0.99", **options)
    assert soup.recipe.used == {"careful": 1.0}
    assert [entry.keeps for entry in soup.measurements if entry.measured is None] == [False]
    loose = hf_radin.radin(bank, keep="recall[1] >= 0.8", metric="recall[0]", **options)
    assert [entry.keeps for entry in loose.measurements if entry.measured is None] == [True]
