"""Ridge regression from sums: scikit-learn's, with the penalty of generalised cross-validation."""

import numpy as np
import pytest
from shared.features import CLASSES, drawn, noisy_teacher
from sklearn.linear_model import Ridge

from hf_radin.weights.ridge import PENALTIES, Moments, fit


def test_it_is_the_ridge_regression_of_scikit_learn():
    features, generator = drawn()
    targets = noisy_teacher(features, generator)
    for has_bias in (True, False):
        ridge = fit(Moments.of(features, targets), has_bias=has_bias, penalty=0.1)
        assert ridge.penalty == 0.1
        wide = features.astype(float)
        spread = ((wide - wide.mean(0) * has_bias) ** 2).sum() / 12
        reference = Ridge(alpha=0.1 * spread, fit_intercept=has_bias).fit(wide, targets)
        np.testing.assert_allclose(ridge.layer(features), reference.predict(wide), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("images", [9, 40, 200])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_penalty_is_that_of_generalised_cross_validation(images, has_bias):
    features, generator = drawn(images)
    targets = noisy_teacher(features, generator)
    penalty = fit(Moments.of(features, targets), has_bias=has_bias).penalty
    wide = features.astype(float) - features.astype(float).mean(0) * has_bias
    products = wide.T @ wide
    scores = []
    for value in PENALTIES:
        strength = value * np.trace(products) / 12 * np.eye(12)
        hat = wide @ np.linalg.solve(products + strength, wide.T) + has_bias / images
        freedom = images - np.trace(hat)
        left = targets - hat @ targets
        scores.append(images * (left**2).sum() / freedom**2 if freedom >= 1 else np.inf)
    assert penalty == PENALTIES[np.argmin(scores)]


def test_sums_over_parts_add_up():
    """Of whole numbers, sums in float64 are exact: blocks, and who adds them up, change no bit."""
    generator = np.random.default_rng(0)
    features = generator.integers(-50, 50, (70, 5)).astype(np.float32)
    targets = generator.integers(-50, 50, (70, CLASSES)).astype(float)
    whole = Moments.of(features, targets)
    for ends in ([35], [1, 2, 60]):
        parts = zip(np.split(features, ends), np.split(targets, ends), strict=True)
        first, *others = (Moments.of(*part) for part in parts)
        summed = sum(others, first)
        for name in ("images", "features", "targets", "products", "crossed", "squares"):
            assert np.array_equal(getattr(summed, name), getattr(whole, name))
