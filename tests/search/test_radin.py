"""The search finds what the paper's procedure finds, spends what it says, and is never worse than the baselines."""

import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.banks import plain_inputs
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin import Measurement, Recipe
from hf_radin.recipes.propose import propose
from hf_radin.search.measure import MeasuredSoup
from hf_radin.search.reporter import choose
from hf_radin.soup.report import PassCounts
from hf_radin.weights.average import average_model


def names(recipe) -> set[str]:
    return {Path(name).name for name in recipe.used}


@pytest.fixture(scope="module")
def soup(bank):
    return hf_radin.radin(bank, budget=4, head="average", test_split="test")


def accuracy_of(model, bank) -> float:
    """What a user would measure, one forward pass over all prepared images."""
    pixels = torch.cat([inputs["pixel_values"] for inputs in plain_inputs(bank)])
    with torch.inference_mode():
        return float((model(pixel_values=pixels).logits.argmax(-1).numpy() == bank.labels).mean())


def test_the_result_is_never_worse_than_the_baselines(bank):
    for budget in (1, 3):
        soup = hf_radin.radin(bank, budget=budget)
        reached = soup.accuracy("soup", "validation")
        assert reached >= soup.accuracy("best single", "validation") == bank.score(np.eye(5)).max()
        assert reached >= soup.accuracy("uniform", "validation")


def test_what_is_reported_is_what_the_model_does(soup, bank):
    assert soup.accuracy("soup", "validation") == accuracy_of(soup.model, bank)


def test_the_candidates_with_the_best_estimates_are_measured(bank):
    drawn = propose(5, proposals="monte-carlo")
    soup = hf_radin.radin(bank, budget=4, measure="full", proposals="monte-carlo")
    soups = [entry for entry in soup.measurements if entry.proposal not in ("single", "uniform")]
    ranked = np.sort(bank.score(drawn.weights)[6:])[::-1]
    assert [entry.estimate for entry in soups] == ranked[:4].tolist()
    for entry in soups:
        assert entry.images == 600 and entry.measured == accuracy_of(
            average_model(bank.ingredients, entry.recipe), bank
        )


def test_the_budget_is_kept(bank):
    for budget in (1, 2, 5):
        soup = hf_radin.radin(bank, budget=budget, measure="full")
        proposals = [entry.proposal for entry in soup.measurements]
        assert proposals.count("single") == 5 and proposals.count("uniform") == 1
        assert len(proposals) - 5 == budget + 1  # the uniform soup is beside them
        assert soup.report.passes == PassCounts(5, budget + 1)


def test_a_budget_larger_than_the_candidates_measures_them_all(bank):
    soup = hf_radin.radin(bank, budget=1000, measure="full", proposals="monte-carlo")
    assert len(soup.measurements) == 2**5 - 1


def test_monte_carlo_is_the_papers_procedure_and_a_seed_decides_it(bank):
    def run(seed):
        soup = hf_radin.radin(bank, budget=2, proposals="monte-carlo", candidates=5, seed=seed)
        return [entry for entry in soup.measurements if entry.proposal == "monte-carlo"]

    assert run(0) == run(0) and all(2 <= len(entry.recipe.used) <= 4 for entry in run(0))
    assert len({str(run(seed)) for seed in range(5)}) > 1


def test_in_time_enough_all_candidates_are_measured(bank):
    soup = hf_radin.radin(bank, budget="10h", measure="full", proposals="monte-carlo", candidates=3)
    assert len([entry for entry in soup.measurements if entry.proposal == "monte-carlo"]) == 3
    assert all(entry.images == 600 for entry in soup.measurements)


def test_singles_cost_nothing_to_measure(bank, predictions):
    single = hf_radin.best_single(bank)
    assert not predictions and single.accuracy("soup", "validation") == bank.score(np.eye(5)).max()
    assert single.report.passes == PassCounts(5, 0)
    assert len(single.recipe.used) == 1


def test_uniform_is_the_uniform_soup(bank):
    soup = hf_radin.uniform(bank)
    assert soup.recipe == Recipe.uniform(bank.ingredients.ids)
    assert soup.accuracy("soup", "validation") == accuracy_of(soup.model, bank)


def greedy_by_hand(bank, accept) -> set[str]:
    scores = bank.score(np.eye(5))
    order = sorted(range(5), key=lambda index: -scores[index])
    chosen, best = [order[0]], scores[order[0]]
    for index in order[1:]:
        ids = [bank.ingredients.ids[position] for position in [*chosen, index]]
        accuracy = accuracy_of(average_model(bank.ingredients, Recipe.uniform(ids)), bank)
        if accept(accuracy, best):
            chosen, best = [*chosen, index], accuracy
    return {bank.ingredients.ids[position] for position in chosen}


@pytest.mark.parametrize(("rule", "accept"), [(">=", lambda new, old: new >= old), (">", lambda new, old: new > old)])
def test_greedy_is_the_official_algorithm(bank, rule, accept):
    soup = hf_radin.greedy(bank, accept=rule)
    assert set(soup.recipe.used) == greedy_by_hand(bank, accept)
    assert soup.report.passes == PassCounts(5, 4) and soup.report.accept == rule
    assert soup.accuracy("soup", "validation") >= bank.score(np.eye(5)).max()


def measured(value, *, single=False, estimate=0.9):
    return Measurement(
        Recipe.uniform(["a"] if single else ["a", "b"]), "single" if single else "subset", estimate, value, 9
    )


def test_of_equals_the_single_model_is_chosen_then_the_better_estimate():
    soup, single = measured(0.8, estimate=0.95), measured(0.8, single=True, estimate=0.8)
    assert choose([soup, single]) is single
    assert choose([soup, single, better := measured(0.81)]) is better
    assert choose([soup, better := measured(0.8, estimate=0.96)]) is better


def test_where_no_soup_is_better_the_best_single_is_returned_and_said(runs, start, tmp_path, digits, caplog):
    # half of the ingredients are the others with the sign of the head turned round: no average is any good
    for name in ("ft-0", "ft-1"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
        shutil.copytree(runs / name, tmp_path / "runs" / f"{name}-spoilt")
        path = tmp_path / "runs" / f"{name}-spoilt" / "model.safetensors"
        tensors = load_file(path)
        save_file({k: -t if k.startswith("classifier") else t for k, t in tensors.items()}, path, {"format": "pt"})
    ingredients = hf_radin.gather([f"{tmp_path}/runs/ft-0", f"{tmp_path}/runs/*-spoilt"])
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        soup = hf_radin.radin(bank, budget=2, proposals="monte-carlo", head="average")
    assert names(soup.recipe) == {"ft-0"} and soup.recipe.weights == (1.0,)
    assert "was better than the best single model" in caplog.text
    soup.save_pretrained(tmp_path / "soup")
    assert "No soup that was measured was better than the best single" in (tmp_path / "soup" / "README.md").read_text()


def test_for_a_linear_classifier_the_soup_is_the_ensemble(heads, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{heads}/*"), digits, cache_dir=tmp_path)
    soup = hf_radin.radin(bank, budget=100, measure="full", proposals="monte-carlo")
    soups = [entry for entry in soup.measurements if entry.proposal != "single"]
    assert len(soups) == 4 and len({entry.measured for entry in soup.measurements}) > 2
    for entry in soups:
        assert entry.measured == pytest.approx(entry.estimate, abs=1 / 600)  # an image may lie on the edge of rounding
        weights = [entry.recipe.used.get(name, 0.0) for name in bank.ingredients.ids]
        expected = np.tensordot(weights, np.stack([bank.logits(index) for index in range(3)]), axes=1)
        model = average_model(bank.ingredients, entry.recipe)
        inputs = plain_inputs(bank)[0]
        with torch.inference_mode():
            np.testing.assert_allclose(model(**inputs).logits, expected[: len(inputs["pixel_values"])], atol=1e-4)


def test_the_held_out_split_takes_no_part_in_the_choice(bank, soup):
    without = hf_radin.radin(bank, budget=4, head="average")
    assert without.recipe == soup.recipe and without.measurements == soup.measurements
    assert {row.split for row in without.results} == {"validation"}
    rows = {(row.name, row.split): row.images for row in soup.results}
    assert 0 < rows["uniform", "validation"] < 600  # shown a part, as a candidate is
    rows["uniform", "validation"] = 600
    assert rows == {
        (name, split): images
        for name in ("soup", "best single", "uniform", "ensemble")
        for split, images in (("validation", 600), ("test", 497))
    }


def test_a_held_out_bank_may_be_given(bank, soup, digits, cache):
    held_out = hf_radin.compute_logits(bank.ingredients, digits, split="test", cache_dir=cache)
    assert hf_radin.radin(bank, budget=4, head="average", test_split=held_out).results == soup.results


@pytest.mark.parametrize("given", ["name", "bank"])
def test_the_split_that_chooses_can_not_prove(bank, given):
    with pytest.raises(ValueError, match="The split 'validation' chooses the soup; another one has to prove it"):
        hf_radin.radin(bank, test_split="validation" if given == "name" else bank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -3}, "budget=-3: it is a number of passes over the split"),
        ({"budget": 0.5}, r"budget=0\.5: .* at least the 1 that the best soup is measured on"),
        ({"budget": "15 days"}, "budget='15 days'"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"measure": "half"}, "measure='half': it is 'race' or 'full'"),
        ({"hold_out": 1.5}, r"hold_out=1\.5: it is a share of the 600 images"),
        ({"hold_out": 0.2, "test_split": "test"}, "hold_out=0.2: the split 'test' proves the soup already"),
        ({"budget": True}, "budget=True"),
        ({"metric": "los_loss"}, "The metric 'los_loss' is none of .* Did you mean 'log_loss'"),
        ({"metric": ("f1", "mcc")}, "soups are chosen by one metric"),
        ({"metric": "recall[11]"}, r"'recall\[11\]' is of a class that is not there"),
        ({"keep": "recall[x] >= 0.9"}, r"'recall\[x\]' is of a class that is not there"),
        ({"keep": "accuracy = 0.9"}, "keep='accuracy = 0.9' can't be read"),
        ({"metric": "f1", "proposals": "line"}, "proposals='line' finds where most images are right"),
        ({"proposals": "genetic"}, "proposals='genetic'"),
        ({"candidates": 0}, "candidates=0"),
        ({"candidates": None}, "candidates=None"),
        ({"seed": -1}, "seed=-1: it is a whole number, at least 0"),
        ({"seed": None}, "seed=None"),
        ({"seed": 1.5}, r"seed=1\.5"),
        ({"recipes": hf_radin.Recipe.uniform(["a", "b"])}, r"recipes=Recipe\(.*: it is a list of Recipe"),
        ({"recipes": [{"a": 0.5, "b": 0.5}]}, "recipes=.*: it is a list of Recipe"),
        ({"test_split": "dev"}, "has no split 'dev'"),
        ({"metrics": ["./no-such-metric"]}, "The metric './no-such-metric' is none of accuracy"),
    ],
)
def test_bad_input_is_refused_before_a_soup_is_measured(bank, caplog, options, message):
    caplog.set_level(logging.INFO, logger="hf_radin")
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(bank, **options)
    assert "measured" not in caplog.text


def test_what_is_measured_is_logged(bank, caplog):
    """Otherwise the tests that nothing was measured would say nothing."""
    caplog.set_level(logging.INFO, logger="hf_radin")
    hf_radin.radin(bank, budget=1)
    hf_radin.uniform(bank)
    lines = [record.getMessage() for record in caplog.records]
    assert "Soup of 5 (uniform): " in lines[0] and "Soup of 5: " in lines[-1]
    assert all("measured" in line for line in (lines[0], lines[-1]))


def test_greedy_knows_two_rules(bank):
    with pytest.raises(ValueError, match="accept='>>'"):
        hf_radin.greedy(bank, accept=">>")


def test_an_object_has_no_other_splits_and_says_which_it_is(bank, tmp_path, digits):
    rows = datasets.load_dataset(str(digits), split="test")
    direct = hf_radin.compute_logits(bank.ingredients, rows, cache_dir=tmp_path)
    assert direct.split == "test"  # whatever the argument's default says
    for chosen in (direct, hf_radin.LogitBank.open(direct.folder)):
        with pytest.raises(ValueError, match="computed from a Dataset object, which has no other splits"):
            hf_radin.radin(chosen, test_split="validation")
    plain = datasets.Dataset.from_dict(rows[:], features=rows.features)
    chooses = hf_radin.compute_logits(bank.ingredients, plain, split="validation", cache_dir=tmp_path)
    proves = hf_radin.compute_logits(bank.ingredients, plain, split="test", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="another one has to prove it"):  # the same rows by another name
        hf_radin.radin(chooses, test_split=proves)


def test_a_dictionary_of_objects_has_splits(bank, digits, tmp_path):
    both = datasets.load_dataset(str(digits))
    chooses = hf_radin.compute_logits(bank.ingredients, both, cache_dir=tmp_path)
    assert {row.split for row in hf_radin.uniform(chooses, test_split="test").results} == {"validation", "test"}


def test_an_opened_bank_can_be_searched(bank, soup, digits, tmp_path):
    alone = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path)
    assert hf_radin.radin(hf_radin.LogitBank.open(alone.folder), budget=4).recipe == soup.recipe


def test_metrics_go_through_evaluate(bank, tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "errors.py").write_text(
        "import datasets\n"
        "import evaluate\n"
        "class Errors(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        kinds = {'predictions': datasets.Value('int64'), 'references': datasets.Value('int64')}\n"
        "        return evaluate.MetricInfo('', '', datasets.Features(kinds))\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'errors': sum(a != b for a, b in zip(predictions, references))}\n"
    )
    soup = hf_radin.uniform(bank, metrics=("accuracy", str(tmp_path / "errors")))
    assert soup.results
    for row in soup.results:
        assert row.metrics["errors"] == round((1 - row.metrics["accuracy"]) * 600)


def test_soups_that_give_nan_are_never_right(bank):
    model = AutoModelForImageClassification.from_pretrained(bank.ingredients[0].folder)
    model.classifier.bias.data.fill_(float("nan"))
    recipe = Recipe(bank.ingredients.ids[:2], (0.111, 0.889))
    predictions = MeasuredSoup(bank, recipe, lambda: model).look(np.ones(600, dtype=bool))
    assert (predictions == -1).all()


def test_a_held_out_bank_of_other_models_or_settings_is_refused(bank, runs, two, digits, cache):
    few = bank.ingredients[:2]
    chooses = hf_radin.compute_logits(few, digits, cache_dir=cache)
    low = hf_radin.compute_logits(few, digits, split="test", dtype="bfloat16", cache_dir=cache)
    with pytest.raises(ValueError, match=r"another dtype .*: bfloat16 against float32"):
        hf_radin.uniform(chooses, test_split=low)
    others = hf_radin.compute_logits(bank.ingredients[1:3], digits, split="test", cache_dir=cache)
    with pytest.raises(ValueError, match=r"has no logits of .*ft-0"):
        hf_radin.uniform(chooses, test_split=others)


@pytest.mark.parametrize("returned", ["'text'", "None", "missing_input"])
def test_a_metric_that_can_not_be_computed_is_refused_before_a_soup_is_measured(bank, tmp_path, caplog, returned):
    caplog.set_level(logging.INFO, logger="hf_radin")
    name = f"odd_{returned.strip(chr(39)).lower()}"
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.py").write_text(
        "import datasets\n"
        "import evaluate\n"
        "class Odd(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        kinds = {'predictions': datasets.Value('int64'), 'references': datasets.Value('int64')}\n"
        "        return evaluate.MetricInfo('', '', datasets.Features(kinds))\n"
        "    def _compute(self, predictions, references):\n"
        f"        return {{'odd': {returned}}}\n"
    )
    with pytest.raises(ValueError, match=f"{name}' can't be computed from predicted classes alone"):
        hf_radin.uniform(bank, metrics=(str(tmp_path / name),))
    assert "measured" not in caplog.text


def test_numbers_of_numpy_are_numbers(bank, tmp_path):
    soup = hf_radin.radin(bank, budget=np.int64(2), seed=np.int64(1), metrics="accuracy")
    soup.save_pretrained(tmp_path / "soup")
    assert hf_radin.Soup.from_pretrained(tmp_path / "soup").report.seed == 1


@pytest.mark.parametrize(
    "kinds", ["forward", "monte-carlo,forward", "local", "line", "subsets", "dirichlet,local,line,subsets,forward"]
)
def test_what_is_sought_is_estimated_no_lower_than_what_is_drawn(unsearched, kinds):
    bank = unsearched
    drawn = hf_radin.radin(bank, budget=0, unmeasured=True, proposals="monte-carlo", candidates=3)
    sought = hf_radin.radin(bank, budget=0, unmeasured=True, proposals=f"monte-carlo,{kinds}", candidates=3)
    assert sought.measurements[-1].estimate >= drawn.measurements[-1].estimate
    again = hf_radin.radin(bank, budget=0, unmeasured=True, proposals=f"monte-carlo,{kinds}", candidates=3)
    assert again.measurements == sought.measurements


def test_what_is_sought_is_measured_where_it_differs(bank):
    soup = hf_radin.radin(bank, budget=4, proposals="forward,local,dirichlet", measure="full")
    recipes = [entry.recipe for entry in soup.report.soups if entry.proposal != "uniform"]
    rows = np.array([bank.row(recipe) for recipe in recipes])
    distance = np.abs(rows[:, None] - rows[None]).sum(axis=2) / 2
    assert len(rows) == 4 and (distance[~np.eye(4, dtype=bool)] > 0.1).all()


def test_recipes_of_your_own_are_candidates(bank):
    ids = bank.ingredients.ids
    mine = hf_radin.Recipe((ids[3], ids[0]), (0.75, 0.25))
    soup = hf_radin.radin(bank, budget=1000, proposals="monte-carlo", candidates=3, recipes=[mine], measure="full")
    (candidate,) = [entry for entry in soup.measurements if entry.proposal == "own"]
    assert candidate.recipe.used == {ids[0]: 0.25, ids[3]: 0.75} and candidate.images == 600
    with pytest.raises(ValueError, match="No ingredient 'other'"):
        hf_radin.radin(bank, recipes=[hf_radin.Recipe.uniform(["other"])])


def test_the_start_is_an_ingredient_to_mix_with(start, runs, digits, tmp_path):
    ingredients = hf_radin.gather([str(start), f"{runs}/ft-[012]"])
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path)
    soup = hf_radin.radin(bank, budget=100, proposals="wise-ft,model-stock,local", start=ingredients.ids[0])
    raced = {entry.proposal: entry for entry in soup.measurements}
    assert {"wise-ft", "model-stock"} <= raced.keys() and soup.report.start == ingredients.ids[0]
    assert all(ingredients.ids[0] in raced[kind].recipe.used for kind in ("wise-ft", "model-stock"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"proposals": "auto,wise-ft"},
            "proposals='wise-ft' mixes with the model that all others were fine-tuned from",
        ),
        ({"proposals": "model-stock", "start": "org/other"}, "start='org/other' is none of the ingredients"),
        ({"start": "org/other"}, "start='org/other' is for proposals='wise-ft' or 'model-stock'"),
    ],
)
def test_a_start_and_what_it_is_for_go_together(bank, options, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(bank, budget=1, **options)
