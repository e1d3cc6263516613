"""Soups of models that are no checkpoints, whose weights a function averages: searches find what they always find."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.given import twin

import hf_radin
from hf_radin.cli.main import main
from hf_radin.logits.preflight import load_inner_products
from hf_radin.recipes.ensemble import mix_in_order
from hf_radin.recipes.gaps import Gaps
from hf_radin.search.held_out import bank_of_split
from hf_radin.search.measure import measured_soup
from hf_radin.soup.report import SearchReport

NAMES = ("a", "b", "c", "d")
LABELS = np.arange(300) % 4


class Linear:
    """Linear classifiers of the same images: soups are ensembles, whatever the recipe.

    Args:
        evaluated: the recipes that were evaluated.
    """

    def __init__(self, seed: int = 0):
        draw = np.random.default_rng(seed)
        self.images = draw.normal(size=(300, 8)) + 0.7 * np.eye(4, 8)[LABELS]
        self.weights = {
            name: np.eye(8, 4) + np.random.default_rng(at).normal(size=(8, 4)) for at, name in enumerate(NAMES)
        }
        self.evaluated: list[hf_radin.Recipe] = []

    def evaluate(self, recipe: hf_radin.Recipe) -> np.ndarray:
        self.evaluated.append(recipe)
        return self.images @ sum(weight * self.weights[name] for name, weight in recipe.used.items())

    def bank(self, **options) -> hf_radin.LogitBank:
        logits = {name: self.images @ weights for name, weights in self.weights.items()}
        return hf_radin.LogitBank.from_arrays(logits, LABELS, **{"evaluate": self.evaluate, **options})


ALL = {"measure": "full", "budget": 30, "proposals": "subsets", "head": "average"}
SEARCHES = {
    "greedy": (hf_radin.greedy, {}),
    "greedy by log loss": (hf_radin.greedy, {"metric": "log_loss"}),
    "uniform": (hf_radin.uniform, {"metrics": ("log_loss", "f1")}),
    "best single": (hf_radin.best_single, {}),
    "radin": (hf_radin.radin, {**ALL, "hold_out": 0.3, "metrics": ("log_loss",)}),
    "radin with a floor": (hf_radin.radin, {**ALL, "keep": "recall[three] >= best single"}),
}


@pytest.mark.parametrize(("search", "options"), SEARCHES.values(), ids=SEARCHES)
def test_a_search_finds_what_it_finds_with_checkpoints(bank, search, options):
    bank = replace(bank, ingredients=bank.ingredients[:4])
    soup, expected = search(twin(bank), **options), search(bank, **options)
    assert (soup.recipe, soup.results) == (expected.recipe, expected.results)
    assert soup.report.against_best_single == expected.report.against_best_single
    assert soup.report.verdict == expected.report.verdict
    assert sorted(soup.measurements, key=str) == sorted(expected.measurements, key=str)
    assert soup.report.passes.soups == expected.report.passes.soups


def test_another_bank_proves_what_another_split_proves(bank):
    bank = replace(bank, ingredients=bank.ingredients[:3])
    test = bank_of_split(bank, "test")
    soup = hf_radin.uniform(twin(bank), test_split=twin(test))
    expected = hf_radin.uniform(bank, test_split="test")
    assert soup.results == expected.results and soup.report.held_out == "test"
    assert soup.report.verdict == expected.report.verdict
    for judging, of in ((twin(bank), bank), (twin(test), test)):
        changes, others = hf_radin.soup_changes(judging, soup), hf_radin.soup_changes(of, expected)
        np.testing.assert_array_equal(of.ids[changes.ids], others.ids)
        np.testing.assert_array_equal(changes.predictions, others.predictions)


def test_of_linear_models_each_soup_is_its_ensemble():
    for search, options in ((hf_radin.radin, {"budget": 6}), (hf_radin.greedy, {}), (hf_radin.uniform, {})):
        soup = search(Linear().bank(), **options)
        assert len(soup.measurements) > len(NAMES)
        assert [entry.measured for entry in soup.measurements] == [entry.estimate for entry in soup.measurements]


def test_each_recipe_is_evaluated_once_on_all_images_and_is_a_pass(tmp_path):
    models = Linear()
    bank = models.bank(folder=tmp_path)
    soups = [hf_radin.greedy(bank), hf_radin.radin(bank, budget=4, metrics=("log_loss",)), hf_radin.uniform(bank)]
    shown = [entry for soup in soups for entry in soup.measurements if entry.passes]
    assert {entry.images for entry in shown} == {300} and {entry.passes for entry in shown} == {1.0}
    recipes = {frozenset(recipe.used.items()) for recipe in models.evaluated}
    assert recipes == {frozenset(entry.recipe.used.items()) for entry in shown}
    assert len(models.evaluated) == len(recipes) < len(shown)
    assert soups[1].report.passes.soups == 5 and soups[1].report.passes.probabilities == 0
    again = Linear()
    assert hf_radin.radin(again.bank(folder=tmp_path), budget=4).recipe == soups[1].recipe
    assert not again.evaluated
    hf_radin.uniform(Linear(seed=1).bank(folder=tmp_path, evaluate=again.evaluate))  # of other images
    assert len(again.evaluated) == 1


def test_logits_say_as_well_as_weights_what_soups_are_like(bank):
    """Each measured soup tells something about the others, by the distances of logits as by those of weights."""
    bank, given = bank.by_content, twin(bank)
    rows = np.random.default_rng(0).dirichlet(np.ones(5), 12)
    pruned = bank.pruned()
    soups = [measured_soup(bank, bank.recipe(row), pruned) for row in rows]
    for soup in soups:
        soup.look(np.ones(len(bank), dtype=bool))
    values = np.array([soup.values for soup in soups])
    products = replace(given, ingredients=given.ingredients.select(bank.ingredients.ids)).logit_products()
    weights = load_inner_products(bank.ingredients, bank.home, torch.float32, bank.processes)
    left = {"logits": Gaps.none(products, pruned), "weights": Gaps.none(weights, pruned)}
    errors = {}
    for kind, gaps in left.items():
        first = mix_in_order(gaps.sums(rows[4:]), gaps.pruned.logits[:, None])
        for row, known in zip(rows[:4], values, strict=False):
            gaps = gaps.learn(row, known)
        predicted = mix_in_order(gaps.sums(rows[4:]), gaps.pruned.logits[:, None])
        errors[kind] = np.square(predicted - values[4:]).mean() / np.square(first - values[4:]).mean()
    assert errors["logits"] < 0.5 and errors["logits"] < 1.5 * errors["weights"]


def test_the_next_candidate_is_predicted_as_with_checkpoints():
    soup = hf_radin.radin(Linear().bank(), budget=3)
    soups = [entry for entry in soup.report.soups if entry.proposal != "uniform"]
    assert len(soups) == 3 and all(entry.predicted is not None for entry in soups)


def test_heads_are_averaged_and_nothing_is_said_of_others(caplog):
    caplog.set_level(logging.INFO)
    soup = hf_radin.radin(Linear().bank(), budget=2)
    assert soup.report.head is None and soup.report.heads == "auto"
    assert not [line for line in caplog.messages if "head" in line.lower() or "distill" in line]


WRONG = {
    "shape": (lambda logits: logits[1:], r"for the recipe .*0\.25 \w.* has the shape \(299, 4\); it is .* \(300, 4\)"),
    "nan": (
        lambda logits: np.where(logits > 5, np.nan, logits),
        r"for the recipe .*0\.25 \w.* is not finite: nan in row",
    ),
    "classes": (lambda logits: logits.argmax(axis=1), r"for the recipe .* has the shape \(300,\)"),
    "ints": (lambda logits: logits.astype(int), r"for the recipe .* is int64: logits are floats"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_logits_is_refused_with_the_recipe(change, message):
    models = Linear()
    bank = models.bank(evaluate=lambda recipe: change(models.evaluate(recipe)))
    with pytest.raises(ValueError, match=message):
        hf_radin.uniform(bank)


def test_without_a_function_the_best_single_model_is_returned_or_an_estimate(caplog):
    bank = Linear().bank(evaluate=None)
    soup, insisted = hf_radin.radin(bank), hf_radin.radin(bank, unmeasured=True)
    assert soup.report.is_single and soup.report.budget == "0" and not soup.report.soups
    assert "with LogitBank.from_arrays(..., evaluate=...) soups are measured" in caplog.text
    assert len(insisted.recipe.used) > 1 and not insisted.report.measured
    assert hf_radin.radin(bank, hold_out=0.3).report.is_single
    proving = Linear(seed=1).bank(split="test")
    assert {row.split for row in hf_radin.radin(bank, unmeasured=True, test_split=proving).results} >= {"test"}


UNMEASURABLE = {
    "a budget": lambda bank: hf_radin.radin(bank, budget=2),
    "greedy": hf_radin.greedy,
    "uniform": hf_radin.uniform,
    "hold_out": lambda bank: hf_radin.radin(bank, unmeasured=True, hold_out=0.3),
    "test_split": lambda bank: hf_radin.uniform(Linear().bank(), test_split=bank),
    "test_split of radin": lambda bank: hf_radin.radin(Linear().bank(), budget=1, test_split=bank),
    "changes": lambda bank: hf_radin.soup_changes(bank, hf_radin.uniform(Linear().bank())),
}


@pytest.mark.parametrize("search", UNMEASURABLE.values(), ids=UNMEASURABLE)
def test_without_a_function_what_measures_soups_is_refused(search):
    with pytest.raises(
        ValueError, match=r"nothing measures soups on the split .*evaluate=\.\.\.\), or go by estimates"
    ):
        search(Linear(seed=2).bank(evaluate=None))


LACKING = {
    "head": ({"head": "refit"}, "head='refit' takes checkpoints of transformers, and of 'a' logits are all"),
    "head_split": ({"head_split": "train"}, "head_split='train' takes checkpoints"),
    "start": ({"start": "org/start", "proposals": "wise-ft"}, "start='org/start' takes checkpoints"),
    "model-stock": ({"start": "a", "proposals": "model-stock"}, "proposals='model-stock' takes checkpoints"),
    "test_split": ({"test_split": "test"}, r"A bank of arrays has no split 'test', only 'validation'.*split='test'\)"),
}


@pytest.mark.parametrize(("options", "message"), LACKING.values(), ids=LACKING)
def test_what_takes_images_or_checkpoints_is_refused_before_anything_is_evaluated(options, message):
    models = Linear()
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(models.bank(), budget=3, **options)
    assert not models.evaluated


def test_a_start_among_the_models_is_mixed_in():
    soup = hf_radin.radin(Linear().bank(), budget=2, start="a", proposals="wise-ft")
    assert "wise-ft" in {entry.proposal for entry in soup.measurements}


def test_a_bank_that_can_not_prove_is_refused():
    bank = Linear().bank()
    proving = {
        "The split 'validation' chooses the soup": Linear().bank(split="test"),
        "are both called 'validation'": Linear(seed=1).bank(),
        "has no logits of d": replace(Linear(seed=1).bank(split="test"), ingredients=bank.ingredients[:3]),
    }
    for message, other in proving.items():
        with pytest.raises(ValueError, match=message):
            hf_radin.uniform(bank, test_split=other)


def test_a_soup_is_a_recipe_that_is_written_and_no_model(tmp_path):
    bank = Linear().bank()
    soup = hf_radin.uniform(bank)
    soup.save_recipe(tmp_path / "recipe.json")
    report = SearchReport.read(tmp_path / "recipe.json", is_saved=True)
    assert (report.recipe, report.results) == (soup.recipe, soup.results) and soup.to_dict()["files"] == {}
    models = (
        lambda: soup.model,
        lambda: soup.processor,
        lambda: soup.save_pretrained(tmp_path / "soup"),
        lambda: soup.push_to_hub("org/soup"),
        lambda: hf_radin.average(bank.ingredients, soup.recipe),
        lambda: hf_radin.distill(bank, soup),
    )
    for make in models:
        with pytest.raises(ValueError, match=r"takes checkpoints of transformers, and of 'a' logits are all"):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_the_command_line_writes_the_recipe_alone(tmp_path, capsys):
    folder = str(Linear().bank(folder=tmp_path).folder)
    assert main(["search", folder, "--budget", "0", "--unmeasured", "--output", str(tmp_path / "soup")]) == 0
    assert "is known by its logits alone: average the weights yourself" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "soup").iterdir()] == ["recipe.json"]
    assert main(["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "model")]) == 2
    assert "takes checkpoints of transformers" in capsys.readouterr().err
