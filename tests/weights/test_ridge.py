"""A head refitted to a teacher's logits: where it is known what comes out, and that no image judges itself."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from hf_radin.weights import ridge
from hf_radin.weights.head import LinearLayer
from hf_radin.weights.ridge import FOLDS, PENALTIES, Moments, draw_folds, fit, refit

CLASSES = 6


def drawn(images: int = 200, features: int = 12, seed: int = 0) -> tuple[np.ndarray, np.random.Generator]:
    """Features as a network has them: not centred, and some stronger than others."""
    generator = np.random.default_rng(seed)
    values = generator.normal(1, 1, (images, features)) * generator.gamma(2, 1, features)
    return values.astype(np.float32), generator


def drawn_layer(generator: np.random.Generator, features: int = 12, has_bias: bool = True) -> LinearLayer:
    bias = generator.normal(size=CLASSES) if has_bias else None
    return LinearLayer(generator.normal(size=(CLASSES, features)), bias)


def teacher_of(logits: np.ndarray) -> ridge.Teacher:
    return lambda rows: logits[rows]


def assert_same_predictions(layer: LinearLayer, other: LinearLayer, features: np.ndarray) -> None:
    """Equal but for a number that all logits of an image have in common."""
    logits, others = layer(features), other(features)
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), others - others.mean(1, keepdims=True), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("images", [8, 200])  # fewer than features, and many
@pytest.mark.parametrize("penalty", [None, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_teacher_that_says_what_the_model_says_changes_nothing(images, penalty, has_bias):
    features, generator = drawn(images)
    layer = drawn_layer(generator, has_bias=has_bias)
    offsets = generator.normal(size=(images, 1))  # which change no probability
    result = refit(features, teacher_of(layer(features) + offsets), layer, np.arange(images), penalty=penalty)
    assert_same_predictions(result.layer, layer, drawn(seed=1)[0])
    assert (result.predictions == layer(features).argmax(1)).all()
    assert (result.layer.bias is None) == (not has_bias)


@pytest.mark.parametrize("penalty", [None, 1e-12])
def test_a_teacher_that_is_linear_in_the_features_is_found(penalty):
    """As the ensemble is of ingredients that differ in a linear head alone; whichever head it starts from."""
    features, generator = drawn()
    heads = [drawn_layer(generator) for _ in range(3)]
    ensemble = np.mean([head(features) for head in heads], axis=0)
    average = LinearLayer(np.mean([head.weight for head in heads], 0), np.mean([head.bias for head in heads], 0))
    result = refit(features, teacher_of(ensemble), heads[0], np.arange(200), penalty=penalty)
    assert_same_predictions(result.layer, average, drawn(seed=1)[0])
    assert (result.predictions == ensemble.argmax(1)).all()
    assert result.penalty <= 1e-6


def noisy_teacher(features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.maximum(0, features) @ generator.normal(size=(features.shape[1], CLASSES)) + generator.normal(
        size=(len(features), CLASSES)
    )


def test_it_is_the_ridge_regression_of_scikit_learn():
    features, generator = drawn()
    targets = noisy_teacher(features, generator)
    for has_bias in (True, False):
        layer, penalty = fit(Moments.of(features, targets), has_bias=has_bias, penalty=0.1)
        assert penalty == 0.1
        wide = features.astype(float)
        spread = ((wide - wide.mean(0) * has_bias) ** 2).sum() / 12
        reference = Ridge(alpha=0.1 * spread, fit_intercept=has_bias).fit(wide, targets)
        np.testing.assert_allclose(layer(features), reference.predict(wide), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("images", [9, 40, 200])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_penalty_is_that_of_generalised_cross_validation(images, has_bias):
    features, generator = drawn(images)
    targets = noisy_teacher(features, generator)
    _, penalty = fit(Moments.of(features, targets), has_bias=has_bias)
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


def test_no_image_has_a_part_in_its_own_prediction():
    features, generator = drawn(60)
    logits = noisy_teacher(features, generator)
    layer, contents = drawn_layer(generator), np.arange(60)
    folds = draw_folds(contents)
    before = refit(features, teacher_of(logits), layer, contents).predictions
    for fold in range(FOLDS):
        others = np.where((folds == fold)[:, None], 100 * generator.normal(size=logits.shape), logits)
        after = refit(features, teacher_of(others), layer, contents).predictions
        assert (after[folds == fold] == before[folds == fold]).all()
        assert (after[folds != fold] != before[folds != fold]).any()


def test_the_order_of_the_images_changes_no_bit():
    features, generator = drawn()
    logits, layer = noisy_teacher(features, generator), drawn_layer(generator)
    contents = np.array([f"{number:032x}".encode() for number in generator.permutation(200)])
    result = refit(features, teacher_of(logits), layer, contents)
    order = generator.permutation(200)
    other = refit(features[order], teacher_of(logits[order]), layer, contents[order])
    assert (other.layer.weight == result.layer.weight).all() and (other.layer.bias == result.layer.bias).all()
    assert (other.predictions == result.predictions[order]).all() and other.penalty == result.penalty
    seeded = refit(features, teacher_of(logits), layer, contents, seed=1)
    np.testing.assert_allclose(seeded.layer.weight, result.layer.weight, rtol=1e-6)  # the folds judge alone
    assert (draw_folds(contents, seed=1) != draw_folds(contents)).any()


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


def test_copies_of_an_image_are_in_one_fold_and_folds_are_of_one_size():
    contents = np.array([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"i", b"j"] * 3)
    folds = draw_folds(contents)
    assert all(len({*folds[contents == content]}) == 1 for content in contents)
    assert np.bincount(folds).tolist() == [6] * FOLDS


def test_too_few_images_are_refused():
    features, generator = drawn(10)
    layer = drawn_layer(generator)
    with pytest.raises(ValueError, match="refitted in 5 folds, and there are 4 different images"):
        refit(features, teacher_of(layer(features)), layer, np.arange(10) % 4)


def test_features_that_are_no_numbers_are_refused():
    features, generator = drawn(10)
    layer = drawn_layer(generator)
    logits = layer(features)
    features[3, 2] = np.inf
    with pytest.raises(ValueError, match="features are not all finite numbers"):
        refit(features, teacher_of(logits), layer, np.arange(10))


def test_features_that_are_all_alike_teach_the_bias_alone():
    features, generator = np.ones((50, 12), np.float32), np.random.default_rng(0)
    layer, logits = drawn_layer(generator), generator.normal(size=(50, CLASSES))
    result = refit(features, teacher_of(logits), layer, np.arange(50))
    assert_same_predictions(result.layer, LinearLayer(0 * layer.weight, logits.mean(0)), features)
