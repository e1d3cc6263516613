"""Intervals and paired tests of any metric."""

import numpy as np
import pytest

from hf_radin.metrics.bootstrap import Difference, exchanged, metric_interval, resampled
from hf_radin.metrics.intervals import accuracy_interval, difference_interval, mcnemar
from hf_radin.metrics.named import NAMES, Answers, load_metrics, score_or_nan

CLASSES = 7


def model(seed: int, samples: int = 300, noise: float = 0.5) -> Answers:
    generator = np.random.default_rng(0)
    labels = generator.choice(CLASSES, samples, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    logits = generator.standard_normal((samples, CLASSES))
    logits[np.arange(samples), labels] += 1.5
    logits += noise * np.random.default_rng(seed).standard_normal(logits.shape)
    return Answers(logits.argmax(axis=1), labels, CLASSES, logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_as_good_as_itself(name):
    (metric,) = load_metrics(name)
    difference = Difference.of(metric, model(1), model(1))
    assert (difference.gain, difference.interval, difference.p_value) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_is_around_the_metric_and_narrower_with_more_images(name):
    (metric,) = load_metrics(name)
    (low, high), (closer, further) = metric_interval(metric, model(1)), metric_interval(metric, model(1, 3000))
    assert low < high and further - closer < 0.6 * (high - low)
    if name not in ("worst_recall", "calibration_error"):  # of a least class, and of gaps, samples are worse
        assert low < score_or_nan(metric, model(1)) < high


@pytest.mark.parametrize("name", ["f1", "log_loss", "roc_auc", "mcc", "average_precision"])
def test_a_much_better_model_is_better_beyond_chance(name):
    (metric,) = load_metrics(name)
    difference = Difference.of(metric, model(1, noise=0.1), model(2, noise=3.0))
    low, high = difference.interval
    assert metric.rank(difference.gain) > 0 and not low <= 0 <= high and difference.p_value < 0.02


def test_of_accuracies_all_is_as_it_was():
    (metric,) = load_metrics("accuracy")
    first, second = model(1), model(2)
    hits, others = first.predictions == first.labels, second.predictions == first.labels
    difference = Difference.of(metric, first, second)
    assert difference.gain == hits.mean() - others.mean()
    assert (difference.interval, difference.p_value) == (difference_interval(hits, others), mcnemar(hits, others))
    assert metric_interval(metric, first) == accuracy_interval(hits)


def test_images_that_are_drawn_together_are_those_drawn_one_by_one():
    """Counts are drawn by their cells: their metric has the distribution of that of single images."""
    (f1,) = load_metrics("f1")
    answers = [model(1), model(2)]
    by_cells = resampled(f1, answers)
    one_by_one = resampled(
        type(f1)("f1", False, f1.compute),
        answers,  # the same metric, without its counts
    )
    assert by_cells.shape[0] == one_by_one.shape[0] == 2 and by_cells.shape[1] > one_by_one.shape[1]
    np.testing.assert_allclose(by_cells.mean(axis=1), one_by_one.mean(axis=1), atol=0.01)
    np.testing.assert_allclose(np.std(by_cells[0] - by_cells[1]), np.std(one_by_one[0] - one_by_one[1]), rtol=0.25)


def test_no_class_gets_lost():
    rare = Answers(np.array([0] * 50 + [1, 1]), np.array([0] * 50 + [1, 1]), 2)
    (metric,) = load_metrics("balanced_accuracy")
    assert (resampled(metric, [rare]) == 1).all()


def test_of_an_undefined_metric_nothing_is_said():
    (metric,) = load_metrics("roc_auc")
    answers = Answers(np.zeros(9, int), np.zeros(9, int), 2, np.ones((9, 2)))
    assert metric_interval(metric, answers) is None and Difference.of(metric, answers, answers) is None


@pytest.mark.parametrize("name", ["f1", "log_loss", "roc_auc", "mcc", "worst_recall", "recall[3]"])
@pytest.mark.parametrize("images", [1, 2])
def test_of_one_image_or_two_all_is_chance(name, images):
    (metric,) = load_metrics(name, [str(label) for label in range(images, images + CLASSES)])
    right = np.eye(CLASSES)[np.arange(images)] * 9
    labels, wrong = np.arange(images), np.roll(right, 1, axis=1)
    pair = (Answers(logits.argmax(axis=1), labels, CLASSES, logits) for logits in (right, wrong))
    difference = Difference.of(metric, *pair)
    assert difference is None or difference.p_value > 0.2


@pytest.mark.parametrize("name", ["f1", "log_loss", "balanced_accuracy"])
def test_models_that_are_alike_seldom_differ_beyond_chance_with_an_image_a_class(name):
    """Where the images of each class were drawn again these were the same, and any difference was no chance."""
    (metric,), labels, chances = load_metrics(name), np.arange(40), []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        logits = generator.standard_normal((40, 40)) + 2 * np.eye(40)
        noisy = (logits + 0.7 * generator.standard_normal(logits.shape) for _ in range(2))
        difference = Difference.of(metric, *(Answers(each.argmax(axis=1), labels, 40, each) for each in noisy))
        chances.append(difference.p_value)
    assert (
        np.count_nonzero(np.array(chances) < 0.05) <= 4
    )  # of 20 one is to be expected, and more than four in one of 400 such tests


def test_for_accuracies_exchanged_answers_tell_what_mcnemars_test_tells():
    (metric,), first, second = load_metrics("accuracy"), model(1), model(4, noise=1.5)
    gain = Difference.of(metric, first, second).gain
    as_large = np.abs(exchanged(metric, first, second)) >= abs(gain) - 1e-9
    assert as_large.mean() == pytest.approx(mcnemar(first.hits, second.hits), abs=0.02)


@pytest.mark.parametrize("name", ["f1", "worst_recall", "mcc"])
def test_counts_are_exchanged_as_images_are(name):
    (metric,), first, second = load_metrics(name), model(1), model(4, noise=1.5)
    by_images = exchanged(type(metric)(name, False, metric.compute), first, second)  # without its counts
    by_counts = exchanged(metric, first, second)
    assert len(by_counts) > len(by_images) and abs(by_counts.mean()) < 0.2 * by_counts.std()
    np.testing.assert_allclose(by_counts.std(), by_images.std(), rtol=0.2)
