"""A head refitted to a teacher: where it is known what comes out, and that no image judges itself."""

from dataclasses import replace

import numpy as np
import pytest
from shared.features import CLASSES, drawn, noisy_teacher
from sklearn.linear_model import LogisticRegression

from hf_radin.weights.head import LinearLayer
from hf_radin.weights.refit import FOLDS, SHARES, Lesson, draw_folds, least_entropies, least_entropy, refit
from hf_radin.weights.ridge import fit


def drawn_layer(generator: np.random.Generator, features: int = 12, has_bias: bool = True) -> LinearLayer:
    bias = generator.normal(size=CLASSES) if has_bias else None
    return LinearLayer(generator.normal(size=(CLASSES, features)), bias)


def probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


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
    result = refit(Lesson(features, layer(features) + offsets, layer), np.arange(images), penalty=penalty)
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
    result = refit(Lesson(features, ensemble, heads[0]), np.arange(200), penalty=penalty)
    assert_same_predictions(result.layer, average, drawn(seed=1)[0])
    assert (result.predictions == ensemble.argmax(1)).all()
    assert result.penalty <= 1e-6


def test_no_image_has_a_part_in_its_own_prediction():
    features, generator = drawn(300)
    logits = 0.3 * noisy_teacher(features, generator)
    layer, contents = drawn_layer(generator), np.arange(300)
    folds = draw_folds(contents)
    before = refit(Lesson(features, logits, layer), contents).predictions
    for fold in range(FOLDS):
        others = logits + np.where((folds == fold)[:, None], generator.normal(size=logits.shape), 0)
        after = refit(Lesson(features, others, layer), contents).predictions
        assert (after[folds == fold] == before[folds == fold]).all()
        assert (after[folds != fold] != before[folds != fold]).any()


def test_the_order_of_the_images_changes_no_bit():
    features, generator = drawn()
    logits, layer = 0.3 * noisy_teacher(features, generator), drawn_layer(generator)
    contents = np.array([f"{number:032x}".encode() for number in generator.permutation(200)])
    result = refit(Lesson(features, logits, layer), contents)
    order = generator.permutation(200)
    other = refit(Lesson(features[order], logits[order], layer), contents[order])
    assert (other.layer.weight == result.layer.weight).all() and (other.layer.bias == result.layer.bias).all()
    assert (other.predictions == result.predictions[order]).all() and other.penalty == result.penalty
    seeded = refit(Lesson(features, logits, layer), contents, seed=1)
    np.testing.assert_allclose(seeded.layer.weight, result.layer.weight, rtol=1e-3)  # the folds judge alone
    assert (draw_folds(contents, seed=1) != draw_folds(contents)).any()


def test_copies_of_an_image_are_in_one_fold_and_folds_are_of_one_size():
    contents = np.array([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"i", b"j"] * 3)
    folds = draw_folds(contents)
    assert all(len({*folds[contents == content]}) == 1 for content in contents)
    assert np.bincount(folds).tolist() == [6] * FOLDS


def test_too_few_images_are_refused():
    features, generator = drawn(10)
    layer = drawn_layer(generator)
    with pytest.raises(ValueError, match="refitted in 5 folds, and there are 4 different images"):
        refit(Lesson(features, layer(features), layer), np.arange(10) % 4)


def test_features_that_are_no_numbers_are_refused():
    features, generator = drawn(10)
    layer = drawn_layer(generator)
    logits = layer(features)
    features[3, 2] = np.inf
    with pytest.raises(ValueError, match="features are not all finite numbers"):
        refit(Lesson(features, logits, layer), np.arange(10))


def test_features_that_are_all_alike_teach_the_bias_alone():
    features, generator = np.ones((50, 12), np.float32), np.random.default_rng(0)
    layer, logits = drawn_layer(generator), generator.normal(size=(50, CLASSES))
    result = refit(Lesson(features, logits, layer), np.arange(50))
    mean = probabilities(logits).mean(0)  # no other is nearer to all of them
    np.testing.assert_allclose(probabilities(result.layer(features)), np.tile(mean, (50, 1)), atol=1e-3)


def test_it_has_the_least_cross_entropy_as_that_of_scikit_learn():
    """Logistic regression with each image once for each class, weighted by the teacher's probability of it."""
    features, generator = drawn(300)
    logits = noisy_teacher(features, generator)
    lesson, rows = (
        Lesson(features, logits, LinearLayer(np.zeros((CLASSES, 12)), np.zeros(CLASSES))),
        np.arange(300),
    )
    ridge = fit(lesson.moments(rows), penalty=1e-2)
    layer = least_entropy(lesson, ridge, rows, start=ridge.layer)
    start = lesson.errors(ridge.layer, rows)
    pull = float(lesson.errors(lesson.layer, rows).squares) / CLASSES / 300 * ridge.strength
    weights = probabilities(logits)
    reference = LogisticRegression(C=1 / pull, tol=1e-10, max_iter=10_000).fit(
        np.repeat(features.astype(float), CLASSES, axis=0), np.tile(np.arange(CLASSES), 300), weights.ravel()
    )
    np.testing.assert_allclose(
        probabilities(layer(features)), reference.predict_proba(features.astype(float)), atol=1e-2
    )
    assert lesson.errors(layer, rows).entropy < start.entropy - 1


@pytest.mark.parametrize("takes_part", [True, False])
def test_images_that_are_held_teach_what_those_teach_that_are_read_anew(takes_part):
    """To the last bit: a head does not depend on how much memory there is."""
    features, generator = drawn(300)
    logits = noisy_teacher(features, generator)
    lesson = Lesson(features, logits, drawn_layer(generator), logits.argmax(1) if takes_part else None)
    assert lesson.is_held(np.arange(300))
    held = refit(lesson, np.arange(300)).layer
    lesson = replace(lesson, memory=0)
    assert not lesson.is_held(np.arange(300))
    anew = refit(lesson, np.arange(300)).layer
    assert (held.weight == anew.weight).all() and (held.bias == anew.bias).all()


@pytest.mark.parametrize(("images", "is_enough"), [(30, False), (300, True)])
def test_the_second_step_is_taken_where_it_helps_on_images_that_it_did_not_see(images, is_enough):
    """A teacher that no head can follow, and that is sure of what it says: of few images too much would be learnt."""
    features, generator = drawn(5000)
    logits = 2 * noisy_teacher(features, generator)
    layer = drawn_layer(generator)
    lesson, rows, others = Lesson(features, logits, layer), np.arange(images), np.arange(images, 5000)
    ridge = fit(lesson.moments(rows))
    first = layer + ridge.layer
    second = least_entropy(lesson, ridge, rows, start=first)
    assert (lesson.errors(second, others).entropy < lesson.errors(first, others).entropy) == is_enough
    result = refit(Lesson(features[rows], logits, layer), rows)
    np.testing.assert_allclose(result.layer.weight, (second if is_enough else first).weight, rtol=1e-2, atol=1e-2)


def test_a_teacher_without_doubt_leaves_finite_weights():
    """Also where it can't be followed by a head, and where it is followed already."""
    features, generator = drawn(40)
    layer = drawn_layer(generator)
    for logits in (1e4 * noisy_teacher(features, generator), 1e4 * layer(features)):
        result = refit(Lesson(features, logits, layer), np.arange(40))
        assert np.isfinite(result.layer.weight).all() and np.isfinite(result.layer.bias).all()
        assert (result.layer(features).argmax(1) == logits.argmax(1)).mean() > 0.9


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_labels_have_their_share_of_what_is_taught(share):
    features, generator = drawn(20)
    logits, labels = noisy_teacher(features, generator), generator.integers(CLASSES, size=20)
    lesson = Lesson(features, logits, drawn_layer(generator), labels, share)
    rows = np.array([3, 19, 0])
    expected = (1 - share) * probabilities(logits[rows]) + share * np.eye(CLASSES)[labels[rows]]
    np.testing.assert_allclose(lesson.wanted(rows), expected, atol=1e-12)
    without = Lesson(features, logits, lesson.layer).wanted(rows)
    np.testing.assert_allclose(without, probabilities(logits[rows]), atol=1e-12)


def test_where_the_head_begins_changes_nothing_of_what_it_learns():
    features, generator = drawn(300)
    logits = noisy_teacher(features, generator)
    lesson, rows = Lesson(features, logits, drawn_layer(generator)), np.arange(300)
    ridge = fit(lesson.moments(rows), penalty=1e-2)
    starts = lesson.layer, lesson.layer + ridge.layer, drawn_layer(generator)
    first, *others = (least_entropy(lesson, ridge, rows, start=start) for start in starts)
    for other in others:
        np.testing.assert_allclose(probabilities(other(features)), probabilities(first(features)), atol=1e-2)


def test_heads_of_several_shares_are_those_of_each_share_alone():
    """Though each begins where the one before came to."""
    features, generator = drawn(300)
    labels, logits = classed(features, generator)
    lesson, rows = Lesson(features, logits, drawn_layer(generator), labels), np.arange(300)
    ridge = fit(lesson.moments(rows), penalty=1e-2)
    together = least_entropies(lesson, ridge, rows, SHARES, start=lesson.layer)
    for share, layer in zip(SHARES, together, strict=True):
        alone = least_entropy(lesson.at(share), ridge, rows, start=lesson.layer)
        np.testing.assert_allclose(probabilities(layer(features)), probabilities(alone(features)), atol=1e-2)


def classed(features: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels that a linear layer gives, and logits of a teacher who knows little of them."""
    truth = drawn_layer(generator)(features)
    return truth.argmax(1), 0.3 * truth + generator.normal(size=truth.shape)


def test_labels_help_where_the_teacher_knows_less_and_the_more_so_with_more_images():
    features, generator = drawn(3000)
    labels, logits = classed(features, generator)
    shares = []
    for images in (40, 2000):
        rows, others = np.arange(images), np.arange(2000, 3000)
        layer = LinearLayer(np.zeros((CLASSES, 12)), np.zeros(CLASSES))
        lesson = Lesson(features[rows], logits, layer)
        without, labelled = (refit(replace(lesson, labels=given), rows) for given in (None, labels[rows]))
        right = [(result.layer(features[others]).argmax(1) == labels[others]).mean() for result in (without, labelled)]
        shares.append(labelled.labels)
    assert right[1] > right[0] and without.labels == 0 and 0 < shares[0] <= shares[1] == max(SHARES)


def test_no_label_has_a_part_in_the_prediction_of_its_image():
    features, generator = drawn(300)
    labels, logits = classed(features, generator)
    folds, layer = draw_folds(np.arange(300)), drawn_layer(generator)
    before = refit(Lesson(features, logits, layer, labels), np.arange(300))
    for image in (0, 17):
        others = labels.copy()
        others[image] = (labels[image] + 1) % CLASSES
        after = refit(Lesson(features, logits, layer, others), np.arange(300))
        same = folds == folds[image]
        assert after.labels == before.labels and (after.predictions[same] == before.predictions[same]).all()
        assert (after.layer.weight != before.layer.weight).any()


def sigmoids(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("images", [8, 200])
@pytest.mark.parametrize("has_bias", [True, False])
def test_multi_label_a_teacher_that_says_what_the_model_says_changes_nothing(images, has_bias):
    features, generator = drawn(images)
    layer = drawn_layer(generator, has_bias=has_bias)
    result = refit(Lesson(features, layer(features), layer, multi_label=True), np.arange(images))
    np.testing.assert_allclose(result.layer.weight, layer.weight, atol=1e-6)
    assert (result.predictions == (layer(features) > 0)).all()


def test_multi_label_a_teacher_that_is_linear_in_the_features_is_found():
    """To the number, and not to one that all logits have in common: that would be another decision."""
    features, generator = drawn()
    heads = [drawn_layer(generator) for _ in range(3)]
    average = LinearLayer(np.mean([head.weight for head in heads], 0), np.mean([head.bias for head in heads], 0))
    result = refit(Lesson(features, average(features), heads[0], multi_label=True), np.arange(200))
    np.testing.assert_allclose(result.layer.weight, average.weight, atol=1e-5)
    np.testing.assert_allclose(result.layer.bias, average.bias, atol=1e-5)
    np.testing.assert_array_equal(result.predictions, average(features) > 0)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_multi_label_each_class_has_the_least_cross_entropy_as_that_of_scikit_learn(share):
    features, generator = drawn(300)
    logits, labels = 0.3 * noisy_teacher(features, generator), generator.random((300, CLASSES)) < 0.3
    nothing = LinearLayer(np.zeros((CLASSES, 12)), np.zeros(CLASSES))
    lesson, rows = Lesson(features, logits, nothing, labels, share, multi_label=True), np.arange(300)
    ridge = fit(lesson.moments(rows), penalty=1e-2)
    layer = least_entropy(lesson, ridge, rows, start=ridge.layer)
    pull = float(lesson.errors(nothing, rows).squares) / CLASSES / 300 * ridge.strength
    wanted, given = (1 - share) * sigmoids(logits) + share * labels, features.astype(float)
    np.testing.assert_allclose(lesson.wanted(rows), wanted, atol=1e-12)
    for number in range(CLASSES):
        weights = np.stack([1 - wanted[:, number], wanted[:, number]], axis=1)
        reference = LogisticRegression(C=1 / pull, tol=1e-10, max_iter=10_000)
        reference.fit(np.repeat(given, 2, axis=0), np.tile([0, 1], 300), weights.ravel())
        expected = reference.predict_proba(given)[:, 1]
        np.testing.assert_allclose(sigmoids(layer(features)[:, number]), expected, atol=1e-2)


def test_multi_label_no_image_has_a_part_in_its_own_decisions():
    features, generator = drawn(300)
    logits, layer = 0.3 * noisy_teacher(features, generator), drawn_layer(generator)
    labels, folds = generator.random((300, CLASSES)) < 0.3, draw_folds(np.arange(300))
    before = refit(Lesson(features, logits, layer, labels, multi_label=True), np.arange(300))
    others = labels.copy()
    others[17] ^= True
    after = refit(Lesson(features, logits, layer, others, multi_label=True), np.arange(300))
    same = folds == folds[17]
    assert before.predictions.shape == labels.shape and before.labels == after.labels
    np.testing.assert_array_equal(after.predictions[same], before.predictions[same])
    assert (after.layer.weight != before.layer.weight).any()
