"""Metrics are scikit-learn's on the same predictions, whether these are at hand or never leave the pruned logits."""

import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics

from hf_radin.recipes import ensemble, scoring
from hf_radin.recipes.pruning import prune

REFERENCES = {
    "accuracy": metrics.accuracy_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "f1": lambda labels, predictions: metrics.f1_score(labels, predictions, average="macro", zero_division=0),
    "mcc": metrics.matthews_corrcoef,
}


@pytest.fixture(params=["all classes", "some never true", "one true class"])
def labels(request):
    high = {"all classes": 12, "some never true": 5, "one true class": 1}[request.param]
    return np.random.default_rng(1).integers(0, high, size=400)


@pytest.fixture
def logits(labels):
    generator = np.random.default_rng(0)
    signal = 2 * np.eye(12)[labels] + generator.normal(size=(400, 12))
    return (signal + 0.4 * generator.normal(size=(5, 400, 12))).astype(np.float16)


@pytest.fixture
def recipes():
    return np.concatenate([np.eye(5), np.random.default_rng(2).dirichlet(np.ones(5), size=25)])


@pytest.mark.parametrize("metric", REFERENCES)
def test_metrics_are_those_of_scikit_learn(logits, labels, recipes, metric):
    pruned = prune(logits)
    scores = scoring.score(pruned, labels, 12, recipes, metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that are never true
        expected = [REFERENCES[metric](labels, row) for row in scoring.predict(pruned, recipes)]
    assert scores == pytest.approx(np.array(expected), abs=1e-12)


def test_top5_is_that_of_scikit_learn(logits, labels, recipes):
    scores = scoring.score(prune(logits, top=5), labels, 12, recipes, "top5_accuracy")
    mixed = np.einsum("rm,msc->rsc", recipes, logits.astype(np.float64))
    mixed -= 1e-9 * np.arange(12)  # it doesn't say which of equal classes goes first: the lower
    expected = [metrics.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(12)) for logits in mixed]
    assert scores == pytest.approx(np.array(expected), abs=1e-12)


def test_cross_entropy_is_that_of_torch(logits, labels, recipes):
    mixed = torch.from_numpy(np.einsum("rm,msc->rsc", recipes, logits.astype(np.float64)))
    expected = [float(torch.nn.functional.cross_entropy(outputs, torch.from_numpy(labels))) for outputs in mixed]
    for at_once in (1 << 23, 1000):
        losses = ensemble.cross_entropy(logits, labels, recipes, mixed_at_once=at_once)
        assert losses == pytest.approx(np.array(expected), abs=1e-12)


def by_hand(logits: np.ndarray, labels: np.ndarray) -> float:
    """The calibration error of one model, bin by bin."""
    chances = torch.softmax(torch.from_numpy(logits), dim=-1).numpy()
    confidence, hits = chances.max(axis=1), chances.argmax(axis=1) == labels
    error = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
        if inside.any():
            error += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    return error


def test_the_calibration_error_is_that_of_its_bins(logits, labels, recipes):
    mixed = np.einsum("rm,msc->rsc", recipes, logits.astype(np.float64))
    expected = np.array([by_hand(outputs, labels) for outputs in mixed])
    assert expected.max() > 0.01
    for at_once in (1 << 23, 1000):
        errors = ensemble.calibration_error(logits, labels, recipes, mixed_at_once=at_once)
        assert errors == pytest.approx(expected, abs=1e-9)


def test_counts_are_the_same_from_predictions_and_from_what_is_pruned(logits, labels, recipes):
    pruned = prune(logits)
    counted = scoring.count(pruned, labels, 12, recipes)
    expected = scoring.Counts.of(scoring.predict(pruned, recipes), labels, 12)
    for name in ("hits", "predicted", "true"):
        assert (getattr(counted, name) == getattr(expected, name)).all()


@pytest.mark.parametrize("at_once", [1, 100])
@pytest.mark.parametrize("metric", ["f1", "accuracy"])
def test_memory_bounds_change_nothing(logits, labels, recipes, at_once, metric):
    pruned = prune(logits)
    expected = scoring.score(pruned, labels, 12, recipes, metric)
    seen = []
    scores = scoring.score(pruned, labels, 12, recipes, metric, on_block=seen.append, counted_at_once=at_once)
    assert (scores == expected).all() and sum(seen) == len(recipes) * len(labels)


def test_another_device_gives_the_same(logits, labels, recipes):
    """Torch's own CPU device by a name that is not `cpu`: the same code as for a GPU."""
    pruned, fives = prune(logits), prune(logits, top=5)
    assert (scoring.predict(pruned, recipes, device="cpu:0") == scoring.predict(pruned, recipes)).all()
    for candidates in (pruned, fives):
        hits = scoring.count_hits(candidates, labels, recipes, device="cpu:0")
        assert (hits == scoring.count_hits(candidates, labels, recipes)).all()


def test_the_best_five_are_no_prediction(logits, recipes):
    with pytest.raises(ValueError, match="the best 5; a prediction is the best one"):
        scoring.predict(prune(logits, top=5), recipes)


@pytest.mark.parametrize("recipes", [[[0.5, 0.5]], [[2.0, -1.0, 0.0, 0.0, 0.0]], [[np.nan, 1.0, 0.0, 0.0, 0.0]]])
def test_what_is_no_recipe_is_refused(logits, labels, recipes):
    for metric in ("accuracy", "f1"):
        with pytest.raises(ValueError):
            scoring.score(prune(logits), labels, 12, np.array(recipes), metric)
