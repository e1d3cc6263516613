"""Scores of recipes are those of a dense computation, whatever the blocks."""

import numpy as np
import pytest

from hf_radin import ensemble


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(4, 57, 6)).astype(np.float32)  # (models, samples, classes)


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(0, 6, size=57)


def simplex(count: int, models: int) -> np.ndarray:
    return np.random.default_rng(2).dirichlet(np.ones(models), size=count)


def dense(logits: np.ndarray, recipes: np.ndarray) -> np.ndarray:
    """Predictions `(recipes, samples)`, all at once."""
    return np.einsum("rm,msc->rsc", recipes, logits.astype(np.float64)).argmax(axis=-1)


@pytest.mark.parametrize("at_once", [1, 100, 1000, 1 << 23])
def test_hits_equal_the_dense_computation(logits, labels, monkeypatch, at_once):
    monkeypatch.setattr(ensemble, "MIXED_AT_ONCE", at_once)
    recipes = np.concatenate([np.eye(4), simplex(40, 4)])
    hits = ensemble.count_hits(list(logits), labels, recipes)
    assert (hits == (dense(logits, recipes) == labels).sum(axis=1)).all()


def test_predictions_equal_the_dense_computation(logits):
    for recipe in simplex(10, 4):
        assert (ensemble.predict(list(logits), recipe) == dense(logits, recipe[None])[0]).all()


def test_a_single_predicts_what_its_model_does(logits):
    for index, row in enumerate(np.eye(4)):
        assert (ensemble.predict(list(logits), row) == logits[index].argmax(axis=-1)).all()


def test_ties_go_to_the_lower_class():
    assert ensemble.predict([np.ones((3, 5), dtype=np.float32)], np.ones(1)).tolist() == [0, 0, 0]


def test_progress_counts_every_prediction(logits, labels):
    seen = []
    ensemble.count_hits(list(logits), labels, simplex(9, 4), on_block=seen.append)
    assert sum(seen) == 9 * len(labels)


@pytest.mark.parametrize(
    "recipes", [[[0.5, 0.5]], [[0.5, 0.5, 0.5, 0.5]], [[2.0, -1.0, 0.0, 0.0]], [[np.nan, 1.0, 0.0, 0.0]]]
)
def test_what_is_no_recipe_is_refused(logits, labels, recipes):
    with pytest.raises(ValueError):
        ensemble.count_hits(list(logits), labels, np.array(recipes))
