"""A bank's scores come from the classes that can win, are those of the dense computation, and are cached beside it."""

from dataclasses import replace

import numpy as np
import pytest
from shared.calls import counted
from sklearn import metrics

import hf_radin
from hf_radin.logits.bank_files import DIGESTS, LogitsRecord, check_bank
from hf_radin.metrics.named import NAMES, load_metrics, only_score
from hf_radin.recipes import ensemble, scoring
from hf_radin.runtime.files import sha256_of


def many_recipes(models: int, count: int = 2000) -> np.ndarray:
    """Vertices, edges, sparse and dense recipes."""
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
    recipes = many_recipes(5)
    predictions = scoring.predict(either.pruned(), recipes)
    mixed = np.zeros((len(recipes), *logits.shape[1:]))
    for weights, model_logits in zip(recipes.T, logits, strict=True):
        mixed += weights[:, None, None] * model_logits.astype(np.float64)
    expected = mixed.argmax(axis=-1)
    assert (predictions == expected).all()
    assert (either.score(recipes) == (expected == either.labels).mean(axis=1)).all()
    assert (either.predict(recipes[7]) == expected[7]).all()
    assert 0.3 < len(either.pruned().decided) / len(either) < 1


def test_metrics_are_those_of_scikit_learn_on_the_predictions(bank):
    recipes = many_recipes(5, 40)
    scores = {name: bank.score(recipes, metric=name) for name in scoring.METRICS}
    for row, recipe in enumerate(recipes):
        classes = bank.predict(recipe)
        assert scores["accuracy"][row] == metrics.accuracy_score(bank.labels, classes)
        assert scores["balanced_accuracy"][row] == pytest.approx(metrics.balanced_accuracy_score(bank.labels, classes))
        assert scores["f1"][row] == pytest.approx(metrics.f1_score(bank.labels, classes, average="macro"))
        assert scores["mcc"][row] == pytest.approx(metrics.matthews_corrcoef(bank.labels, classes))
    mixed = np.einsum("rm,msc->rsc", recipes, np.stack([bank.logits(index) for index in range(5)]).astype(float))
    expected = [metrics.top_k_accuracy_score(bank.labels, logits, k=5) for logits in mixed]
    assert scores["top5_accuracy"] == pytest.approx(np.array(expected), abs=1 / 600)
    odds = np.exp(mixed)
    expected = [metrics.log_loss(bank.labels, row / row.sum(axis=1, keepdims=True)) for row in odds]
    assert scores["cross_entropy"] == pytest.approx(np.array(expected))


def test_the_pruned_logits_are_cached_and_read_once(alone):
    scores = alone.score(np.eye(3))
    (path,) = files(alone)
    opened = hf_radin.LogitBank.open(alone.folder)
    for key in alone.ingredients.keys:  # whoever reads these logits again gets other scores
        logits = alone.folder / "logits" / f"{key}.npy"
        np.save(logits, -np.load(logits))
    assert (opened.score(np.eye(3)) == scores).all()
    path.unlink()
    assert (opened.score(np.eye(3)) == scores).all()
    assert (replace(opened).score(np.eye(3)) < scores).all()


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
    key = alone.ingredients.keys[0]
    first, bank_key = alone.folder / "logits" / f"{key}.npy", alone.manifest.key
    np.save(first, -np.load(first))
    record = LogitsRecord.read(alone.folder, bank_key, key)
    replace(record, sha256=sha256_of(first)).write(alone.folder, bank_key, key)
    again = hf_radin.LogitBank.open(alone.folder)
    assert again.score(np.eye(3))[0] < scores[0] and (again.score(np.eye(3))[1:] == scores[1:]).all()


@pytest.mark.parametrize("most", [1000, 20_000])
def test_where_too_much_is_left_the_scores_are_the_same_and_nothing_is_cached(alone, most):
    recipes = many_recipes(3, 50)
    expected = {name: replace(alone).score(recipes, metric=name) for name in scoring.METRICS}
    predicted = replace(alone).predict(recipes[-1])
    for path in files(alone):
        path.unlink()
    small = replace(alone, most_pruned=most)
    for name in scoring.METRICS:
        assert (replace(small).score(recipes, metric=name) == expected[name]).all()
    assert (replace(small).predict(recipes[-1]) == predicted).all()
    assert small.is_prunable() == bool(files(alone)) == (most > 1000)


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
    mixed = sum(weight * bank.logits(position).astype(float) for position, weight in enumerate(recipe))
    np.testing.assert_allclose(answers.logits, mixed, atol=1e-12)


def test_a_bank_says_what_it_is(bank):
    assert repr(bank) == (
        f"LogitBank(5 ingredients, 600 images of {bank.manifest.data.name}, split 'validation', in {bank.folder})"
    )


def test_a_bank_without_digests_is_divided_all_the_same(bank):
    """As earlier versions made it: which images are copies is not known."""
    arrays = {name: sha256 for name, sha256 in bank.manifest.arrays.items() if name != DIGESTS}
    chooses, proves = replace(bank, manifest=replace(bank.manifest, arrays=arrays)).divided(0.25, seed=0)
    assert chooses.digests is None and len(proves) == 150
    assert sorted([*chooses.ids.tolist(), *proves.ids.tolist()]) == bank.ids.tolist()


def test_files_are_read_by_one_process_of_a_machine(alone, monkeypatch):
    for rank, times in (("1", 0), ("0", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with counted(check_bank) as calls:
            assert hf_radin.LogitBank.open(alone.folder).ingredients == alone.ingredients
        assert calls.total() == times
