"""A bank's scores come from the classes that can win, are those of the dense computation, and are kept beside it."""

import os
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

import hf_radin
from hf_radin.recipes import ensemble, pruning, scoring
from hf_radin.recipes.metrics import NAMES, load_metrics, only_score


def some_recipes(models: int, count: int = 2000) -> np.ndarray:
    """Vertices, edges, sparse and dense ones."""
    generator = np.random.default_rng(0)
    edges = np.zeros((count // 4, models))
    for row in edges:
        row[generator.choice(models, 2, replace=False)] = [0.5, 0.5]
    dirichlet = [generator.dirichlet(np.full(models, share), size=count // 2) for share in (0.1, 1.0)]
    return np.concatenate([np.eye(models), edges, *dirichlet])[:count]


@pytest.fixture
def alone(runs, digits, tmp_path):
    """A bank that no other test looks at."""
    return hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)


@pytest.fixture(scope="module", params=["float32", "float16"])
def either(request, bank, digits, cache):
    if request.param == "float32":
        return bank
    return hf_radin.compute_logits(bank.ingredients, digits, logits_dtype="float16", cache_dir=cache)


def files(bank) -> list:
    return sorted((bank.folder / "pruned").glob("*"))


def test_predictions_of_2000_recipes_equal_the_dense_ones_image_by_image(either):
    logits = np.stack([either.logits(index) for index in range(5)])
    recipes = some_recipes(5)
    found = scoring.predict(either.pruned(), recipes)
    mixed = np.zeros((len(recipes), *logits.shape[1:]))
    for weights, one in zip(recipes.T, logits, strict=True):
        mixed += weights[:, None, None] * one.astype(np.float64)
    assert (found == mixed.argmax(axis=-1)).all()
    assert (either.score(recipes) == (found == either.labels).mean(axis=1)).all()
    assert (either.predict(recipes[7]) == found[7]).all()
    assert 0.3 < len(either.pruned().decided) / len(either) < 1


def test_metrics_are_those_of_scikit_learn_on_the_predictions(bank):
    recipes = some_recipes(5, 40)
    found = {name: bank.score(recipes, metric=name) for name in scoring.METRICS}
    for row, recipe in enumerate(recipes):
        one = bank.predict(recipe)
        assert found["accuracy"][row] == metrics.accuracy_score(bank.labels, one)
        assert found["balanced_accuracy"][row] == pytest.approx(metrics.balanced_accuracy_score(bank.labels, one))
        assert found["f1"][row] == pytest.approx(metrics.f1_score(bank.labels, one, average="macro"))
        assert found["mcc"][row] == pytest.approx(metrics.matthews_corrcoef(bank.labels, one))
    mixed = np.einsum("rm,msc->rsc", recipes, np.stack([bank.logits(index) for index in range(5)]).astype(float))
    expected = [metrics.top_k_accuracy_score(bank.labels, one, k=5) for one in mixed]
    assert found["top5_accuracy"] == pytest.approx(np.array(expected), abs=1 / 600)
    expected = [metrics.log_loss(bank.labels, np.exp(one) / np.exp(one).sum(axis=1, keepdims=True)) for one in mixed]
    assert found["cross_entropy"] == pytest.approx(np.array(expected))


def test_the_pruned_logits_are_kept_and_read_once(alone, monkeypatch):
    scores = alone.score(np.eye(3))
    (path,) = files(alone)
    monkeypatch.setattr(pruning, "prune", lambda *_, **__: pytest.fail("the logits were read again"))
    opened = hf_radin.LogitBank.open(alone.folder)
    assert (opened.score(np.eye(3)) == scores).all()
    path.unlink()
    assert (opened.score(np.eye(3)) == scores).all()


def test_other_ingredients_and_another_order_get_another_file(alone):
    alone.score(np.eye(3))
    for chosen in ([0, 1], [2, 1, 0]):
        ids = [alone.ingredients.ids[index] for index in chosen]
        other = replace(alone, ingredients=alone.ingredients.select(ids))
        assert (other.score(np.eye(len(ids))) == alone.score(np.eye(3))[chosen]).all()
        expected = ensemble.predict([alone.logits(index) for index in chosen], np.ones(len(ids)) / len(ids))
        assert (other.predict(np.ones(len(ids)) / len(ids)) == expected).all()
    assert len(files(alone)) == 3


def test_a_broken_file_and_one_of_other_logits_are_made_anew(alone):
    scores = alone.score(np.eye(3))
    (path,) = files(alone)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert (hf_radin.LogitBank.open(alone.folder).score(np.eye(3)) == scores).all()
    assert len(path.read_bytes()) == len(whole)
    first = alone.folder / "logits" / f"{alone.ingredients.keys[0]}.npy"
    np.save(first, -np.load(first))
    os.utime(first, ns=(0, path.stat().st_mtime_ns + 1))
    again = hf_radin.LogitBank.open(alone.folder)
    assert again.score(np.eye(3))[0] < scores[0] and (again.score(np.eye(3))[1:] == scores[1:]).all()


@pytest.mark.parametrize("most", [1000, 20_000])
def test_where_too_much_is_left_the_scores_are_the_same_and_nothing_is_kept(alone, monkeypatch, most):
    recipes = some_recipes(3, 50)
    expected = {name: replace(alone).score(recipes, metric=name) for name in scoring.METRICS}
    predicted = replace(alone).predict(recipes[-1])
    for path in files(alone):
        path.unlink()
    monkeypatch.setattr(pruning, "MOST", most)
    for name in scoring.METRICS:
        assert (replace(alone).score(recipes, metric=name) == expected[name]).all()
    assert (replace(alone).predict(recipes[-1]) == predicted).all()
    assert most > 1000 or not files(alone)


ERRORS = """
import datasets
import evaluate
class Errors(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo("", "", datasets.Features(kinds))
    def _compute(self, predictions, references):
        wrong = sum(a != b for a, b in zip(predictions, references))
        return {"errors": wrong} if NAMES == 1 else {"errors": wrong, "more errors": wrong}
"""


def test_any_metric_of_the_evaluate_library_scores_recipes(bank, tmp_path):
    for folder, count in (("errors", "1"), ("several", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.py").write_text(ERRORS.replace("NAMES", count))
    recipes = np.random.default_rng(0).dirichlet(np.ones(5), size=4)
    assert (bank.score(recipes, metric=str(tmp_path / "errors")) == 600 - np.rint(600 * bank.score(recipes))).all()
    with pytest.raises(ValueError, match="gives errors, more errors: it takes one score to rank recipes"):
        bank.score(recipes, metric=str(tmp_path / "several"))
    with pytest.raises(ValueError, match=r"The metric 'nosuch' is none of accuracy, .* can't be loaded"):
        bank.score(recipes, metric="nosuch")


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_that_is_reported_scores_recipes(bank, name):
    """By the way that is fast where there is one; the values are those of the library."""
    recipes = np.concatenate([np.eye(5)[:1], np.random.default_rng(0).dirichlet(np.ones(5), size=2)])
    (metric,) = load_metrics(name)
    expected = [only_score(metric, bank.answers(recipe, with_logits=True)) for recipe in recipes]
    assert bank.score(recipes, metric=name) == pytest.approx(expected, abs=2e-6)


def test_the_ensemble_that_is_mixed_predicts_what_the_bank_does(bank):
    recipe = np.array([0.2, 0.0, 0.5, 0.3, 0.0])
    answers = bank.answers(recipe, with_logits=True)
    assert answers.logits.shape == (600, 10) and (answers.logits.argmax(axis=1) == answers.predictions).all()
    mixed = sum(weight * bank.logits(at).astype(float) for at, weight in enumerate(recipe))
    np.testing.assert_allclose(answers.logits, mixed, atol=1e-12)
