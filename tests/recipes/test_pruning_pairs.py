"""Of multi-label logits, what is pruned and scored fast decides what the dense computation does, pair by pair."""

import numpy as np
import pytest

from hf_radin.metrics.named import Answers, load_metrics, only_score
from hf_radin.metrics.objective import score_recipes
from hf_radin.recipes import ensemble, pruning, scoring
from hf_radin.recipes.gaps import Gaps
from hf_radin.recipes.pruning import NONE, prune_pairs
from recipes.test_pruning import normal, recipes_of_all_kinds

SAMPLES, CLASSES = 120, 7


def agreeing(models: int, samples: int, noise: float) -> np.ndarray:
    return normal(0, samples, CLASSES) - 0.5 + noise * normal(1, models, samples, CLASSES)


BANKS = {
    "related": agreeing(5, SAMPLES, 0.3),
    "unrelated": normal(2, 4, SAMPLES, CLASSES),  # hardly any pair is decided
    "alike": agreeing(5, SAMPLES, 0.0),  # all are
    "integers": np.random.default_rng(3).integers(-2, 3, size=(4, SAMPLES, CLASSES)),
    "signed zeros": np.random.default_rng(4).choice([0.0, -0.0, 1.0, -1.0], size=(4, SAMPLES, CLASSES)),
    "cancelling": np.concatenate([agreeing(1, SAMPLES, 0), -agreeing(1, SAMPLES, 0)]),
    "smallest": np.float32(2.0**-149) * np.random.default_rng(5).integers(-1, 2, size=(4, SAMPLES, CLASSES)),
    "one class": normal(6, 4, SAMPLES, 1),
}


@pytest.fixture(params=BANKS)
def logits(request) -> list[np.ndarray]:
    return list(BANKS[request.param].astype(np.float32))


def labels_of(logits: list[np.ndarray]) -> np.ndarray:
    return np.random.default_rng(7).random(logits[0].shape) < 0.3


def test_decisions_equal_the_dense_ones_pair_by_pair(logits):
    recipes = recipes_of_all_kinds(len(logits), 80)
    decided = scoring.predict(prune_pairs(logits, read_at_once=500), recipes).reshape(len(recipes), *logits[0].shape)
    for recipe, decisions in zip(recipes, decided, strict=True):
        assert (decisions == ensemble.decide(logits, recipe)).all()
        assert (decisions == (ensemble.mix(logits, recipe) > 0)).all()


def test_a_pair_is_decided_if_all_models_agree_in_sign(logits):
    pruned, yes = prune_pairs(logits), np.stack(logits) > 0
    alike = yes.all(axis=0) | ~yes.any(axis=0)
    assert (pruned.decided == np.flatnonzero(alike.all(axis=1))).all()
    images, classes = pruned.entries
    places = np.stack([images, classes])[:, classes != NONE]
    assert {*map(tuple, places.T)} == {*map(tuple, np.argwhere(~alike))}
    for row, values in zip(pruned.logits, logits, strict=True):
        assert (row == np.where(classes == NONE, 0, values[images, classes])).all()


def test_counts_and_metrics_are_those_of_dense_decisions(logits):
    labels, pruned, recipes = labels_of(logits), prune_pairs(logits), recipes_of_all_kinds(len(logits), 24)
    names = ["label_accuracy", "f1", "f1_micro", "recall", "precision_weighted", "worst_recall", "subset_accuracy"]
    answers = [Answers(ensemble.decide(logits, recipe), labels, labels.shape[1]) for recipe in recipes]
    counts = scoring.count_pairs(pruned, labels, recipes)
    for row, given in enumerate(answers):
        assert (counts.hits[row] == given.counts.hits[0]).all()
        assert (counts.predicted[row] == given.counts.predicted[0]).all()
    for metric in load_metrics(names, of_label_sets=True):
        scores = score_recipes(metric, pruned, labels, labels.shape[1], recipes)
        assert scores == pytest.approx([only_score(metric, given) for given in answers], abs=1e-12), metric.name


def test_a_part_of_the_images_is_pruned_as_by_itself(logits):
    positions = np.arange(0, len(logits[0]), 3)
    part, alone = prune_pairs(logits).select(positions), prune_pairs([values[positions] for values in logits])
    recipes = recipes_of_all_kinds(len(logits), 12)
    assert (scoring.predict(part, recipes) == scoring.predict(alone, recipes)).all()
    assert (part.decided == alone.decided).all()


def test_what_a_measured_soup_teaches_counts_for_pairs():
    """A soup whose logits are all above 0 where it is known: the next soup of the same recipe is predicted so."""
    logits = list(BANKS["related"].astype(np.float32))
    pruned, row = prune_pairs(logits), np.full(5, 0.2)
    _, classes = pruned.entries
    gaps = Gaps.none(np.eye(5), pruned, noise=0.0).learn(row, np.where(classes == NONE, 0.0, 5.0))
    (predicted,) = ensemble.mix_in_order(gaps.sums(row[None]), gaps.pruned.logits[:, None])
    assert predicted == pytest.approx(np.where(classes == NONE, 0.0, 5.0), abs=1e-4)
    labels = np.ones((SAMPLES, CLASSES), dtype=bool)
    (metric,) = load_metrics("accuracy", of_label_sets=True)
    (score,) = score_recipes(metric, gaps.pruned, labels, CLASSES, gaps.sums(row[None]))
    yes = np.stack(logits) > 0
    assert score == pytest.approx(yes.any(axis=0).mean())


def test_logits_that_are_no_numbers_are_named_and_too_many_refused():
    broken = np.zeros((4, CLASSES), np.float32)
    broken[2, 3] = np.nan
    with pytest.raises(ValueError, match="Model 1 has the logit nan for class 3"):
        prune_pairs([np.zeros_like(broken), broken])
    with pytest.raises(pruning.TooMuchLeftError):
        prune_pairs(list(BANKS["related"].astype(np.float32)), most=1000)
