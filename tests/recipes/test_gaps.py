"""What measured soups say of others: all there is to say where models are quadratic, and nothing where none was."""

from dataclasses import replace

import numpy as np
import pytest

from hf_radin.ingredients.kinship import Weights, inner_products
from hf_radin.recipes import scoring
from hf_radin.recipes.gaps import NOISE, Gaps, covariance, logit_products, spread_products
from hf_radin.recipes.pruning import prune

MODELS, SAMPLES, CLASSES = 6, 80, 4
RECIPES = np.random.default_rng(1).dirichlet(np.ones(MODELS), size=40)
LABELS = np.random.default_rng(2).integers(0, CLASSES, SAMPLES)


class Quadratic:
    """Models whose logits are a quadratic function of their weights, in a plane."""

    def __init__(self, curved: float = 1.0, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.weights = generator.normal(size=(MODELS, 2))
        self.level = 3 * generator.normal(size=(SAMPLES, CLASSES))
        self.slope = generator.normal(size=(SAMPLES, CLASSES, 2))
        curvature = curved * generator.normal(size=(SAMPLES, CLASSES, 2, 2))
        self.curvature = curvature + curvature.swapaxes(-1, -2)
        self.singles = [self(row) for row in np.eye(MODELS)]
        self.products = inner_products([Weights(row.astype(np.float32)) for row in self.weights])
        self.pruned = prune([logits.astype(np.float32) for logits in self.singles])

    def __call__(self, recipe: np.ndarray) -> np.ndarray:
        """The logits of a soup `(samples, classes)`."""
        at = recipe @ self.weights
        return self.level + self.slope @ at + np.einsum("scij,i,j->sc", self.curvature, at, at) / 2

    def values(self, recipe: np.ndarray) -> np.ndarray:
        """Those of the classes that can win."""
        images, classes = self.pruned.entries
        return self(recipe)[images, classes].astype(np.float32)

    def predicted(self, gaps: Gaps, recipes: np.ndarray) -> np.ndarray:
        return gaps.sums(recipes) @ gaps.pruned.logits

    def learned(self, *recipes: np.ndarray, noise: float = NOISE) -> Gaps:
        gaps = Gaps.none(self.products, self.pruned, noise=noise)
        for recipe in recipes:
            gaps = gaps.learn(recipe, self.values(recipe))
        return gaps


def test_before_a_soup_was_measured_the_prediction_is_the_ensemble():
    models = Quadratic()
    gaps = models.learned()
    assert (gaps.score(LABELS, RECIPES) == scoring.score(models.pruned, LABELS, CLASSES, RECIPES, "accuracy")).all()


@pytest.mark.parametrize("seed", range(3))
def test_in_a_plane_three_soups_tell_all_others(seed):
    """A spread in the plane is three numbers."""
    models = Quadratic(seed=seed)
    truth = np.array([models.values(recipe) for recipe in RECIPES])
    learned = [models.learned(*RECIPES[:count], noise=0.0) for count in range(4)]
    errors = [np.abs(models.predicted(gaps, RECIPES) - truth).max() for gaps in learned]
    assert errors[3] < 1e-3 < 0.1 < errors[0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_soups_bring_predictions_nearer(count):
    models = Quadratic()
    truth = np.array([models.values(recipe) for recipe in RECIPES])
    learned = [models.learned(), models.learned(*RECIPES[:count])]
    errors = [((models.predicted(gaps, RECIPES) - truth) ** 2).mean() for gaps in learned]
    assert errors[1] < 0.5 * errors[0]


def test_a_measured_soup_is_predicted_as_it_is_and_a_single_model_always():
    models = Quadratic()
    gaps = models.learned(*RECIPES[:2], noise=1e-9)
    for recipe in RECIPES[:2]:
        np.testing.assert_allclose(models.predicted(gaps, recipe[None])[0], models.values(recipe), atol=1e-3)
    assert np.abs(gaps.sums(np.eye(MODELS))[:, MODELS:]).max() < 1e-6


def test_linear_models_have_no_gap():
    models = Quadratic(curved=0.0)
    gaps = models.learned(*RECIPES[:5])
    assert np.abs(gaps.pruned.logits[MODELS:]).max() < 1e-4
    assert (gaps.score(LABELS, RECIPES) == models.learned().score(LABELS, RECIPES)).all()


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_images_that_a_soup_was_not_shown_teach_nothing(unknown):
    models = Quadratic()
    gaps = models.learned(*RECIPES[:2])
    values = models.values(RECIPES[2])
    hidden = models.pruned.entries[0] % 2 == 0
    partly = gaps.learn(RECIPES[2], np.where(hidden, unknown, values).astype(np.float32))
    before, after = models.predicted(gaps, RECIPES), models.predicted(partly, RECIPES)
    np.testing.assert_allclose(after[:, hidden], before[:, hidden], atol=1e-4)
    whole = models.predicted(gaps.learn(RECIPES[2], values), RECIPES)
    np.testing.assert_allclose(after[:, ~hidden], whole[:, ~hidden], atol=1e-4)
    assert np.abs(after - before)[:, ~hidden].max() > 0.01
    first = models.learned().learn(RECIPES[0], np.full_like(values, unknown))
    np.testing.assert_allclose(
        models.predicted(first, RECIPES), models.predicted(models.learned(), RECIPES), atol=1e-5
    )


def test_models_that_are_all_alike_have_no_gap_to_predict():
    models = Quadratic()
    gaps = replace(models.learned(*RECIPES[:2]), products=np.zeros((MODELS, MODELS)))
    assert np.isfinite(gaps.sums(RECIPES)).all() and np.abs(gaps.sums(RECIPES)[:, MODELS:]).max() == 0


def test_one_recipe_twice_is_no_trouble():
    models = Quadratic()
    once, twice = models.learned(RECIPES[0]), models.learned(RECIPES[0], RECIPES[0])
    np.testing.assert_allclose(models.predicted(twice, RECIPES), models.predicted(once, RECIPES), atol=0.3)


def test_the_covariance_is_one_and_zero_for_single_models():
    models = Quadratic()
    matrix = covariance(models.products, RECIPES, RECIPES)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9
    np.testing.assert_allclose(covariance(models.products, np.eye(MODELS), RECIPES), 0, atol=1e-12)


def test_the_covariance_is_that_of_gaps_under_random_curvature():
    """Of the part that differs between directions: by drawing many curvatures."""
    models = Quadratic()
    centred = models.weights - models.weights.mean(axis=0)
    centred /= np.sqrt((centred**2).sum() / MODELS)
    draws = np.random.default_rng(3).normal(size=(100_000, 2, 2))

    def gaps(recipe: np.ndarray) -> np.ndarray:
        apart = centred - recipe @ centred
        return -0.5 * np.einsum("i,nab,ia,ib->n", recipe, draws, apart, apart)

    both = [4 * float((gaps(RECIPES[0]) * gaps(other)).mean()) for other in RECIPES[:5]]
    np.testing.assert_allclose(spread_products(models.products, RECIPES[:1], RECIPES[:5])[0], both, rtol=0.05)


@pytest.mark.parametrize("at_once", [1, 7, SAMPLES])
def test_of_linear_models_logits_have_the_products_of_weights(at_once):
    """Where each direction of the features is as frequent; what is added to all classes makes no difference."""
    generator = np.random.default_rng(0)
    features, _ = np.linalg.qr(generator.normal(size=(SAMPLES, 5)))
    weights = generator.normal(size=(MODELS, 5, CLASSES))
    weights -= weights.mean(axis=2, keepdims=True)
    logits = [features @ part + generator.normal(size=(SAMPLES, 1)) for part in weights]
    expected = inner_products([Weights(part.ravel().astype(np.float32)) for part in weights])
    np.testing.assert_allclose(logit_products(logits, at_once=at_once), expected, atol=1e-6)
