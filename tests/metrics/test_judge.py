"""What a sample says of a metric: nothing is off where all is known, and errors are as large as is said elsewhere."""

import numpy as np
import pytest

from hf_radin.metrics.intervals import Strata
from hf_radin.metrics.judge import FEW, Influence, Judge, sample_groups
from hf_radin.metrics.named import NAMES, Answers, load_metrics, score_or_nan

CLASSES = tuple("abcdefgh")
# how many images each class has
SIZES = (500, 300, 200, 100, 60, 30, 10, 4)
METRICS = ("accuracy", "f1", "balanced_accuracy", "mcc", "recall[c]", "log_loss", "brier_score", "top3_accuracy")
SLOW = ("roc_auc", "average_precision")


def of_function(logits: np.ndarray, labels: np.ndarray) -> float:
    """Right answers, where a wrong answer on the second class costs three."""
    hits = logits.argmax(axis=1) == labels
    return float(np.mean(np.where(labels == 1, 3.0, 1.0) * hits))


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))


def model(labels: np.ndarray, seed: int) -> Answers:
    """Models that see the same images make like mistakes."""
    logits = 1.2 * np.random.default_rng(0).standard_normal((len(labels), len(SIZES)))
    logits[np.arange(len(labels)), labels] += 1.5
    logits += 0.4 * np.random.default_rng(seed).standard_normal(logits.shape)
    return Answers(logits.argmax(axis=1), labels, len(SIZES), logits)


def metric_of(name):
    return load_metrics(name, CLASSES)[0]


def judge_of(name, labels: np.ndarray, seed: int = 0) -> Judge:
    """Every other image is contested."""
    metric = metric_of(name)
    places = np.arange(len(labels))
    always, contested, decided = sample_groups((metric,), labels, places[::2], places[1::2])
    return Judge(metric, Strata.shuffled((contested, decided, always), seed))


def sample(judge: Judge, share: float) -> np.ndarray:
    contested, decided, always = map(len, judge.strata.groups)
    return judge.strata.first([int(share * contested), int(share * decided / 2), always])


@pytest.mark.parametrize("name", [*NAMES, "recall[c]", of_function])
def test_where_all_is_known_it_is_the_metric(name, labels):
    first, second, judge = model(labels, 1), model(labels, 2), judge_of(name, labels)
    gain, error = judge.difference(first, second, np.ones(len(labels), bool))
    assert error == 0
    expected = score_or_nan(judge.metric, first) - score_or_nan(judge.metric, second)
    assert gain == pytest.approx(expected, abs=1e-12) and judge.value(first) == score_or_nan(judge.metric, first)


@pytest.mark.parametrize("name", [*METRICS, of_function])
def test_samples_are_right_on_average_and_as_far_off_as_is_said(name, labels):
    first, second = model(labels, 1), model(labels, 2)
    truth, _ = judge_of(name, labels).difference(first, second, np.ones(len(labels), bool))
    judged = []
    for seed in range(60):
        judge = judge_of(name, labels, seed)
        judged.append(judge.difference(first, second, sample(judge, 0.5)))
    gains, errors = np.array(judged).T
    assert abs(gains.mean() - truth) < 4 * gains.std() / len(gains) ** 0.5 + 0.1 * gains.std()
    assert 0.65 < errors.mean() / gains.std() < 1.5


@pytest.mark.parametrize("name", SLOW)
def test_so_are_those_of_ranked_samples(name, labels):
    first, second = model(labels, 1), model(labels, 2)
    truth, _ = judge_of(name, labels).difference(first, second, np.ones(len(labels), bool))
    judges = [judge_of(name, labels, seed) for seed in range(24)]
    gains, errors = np.array([judge.difference(first, second, sample(judge, 0.5)) for judge in judges]).T
    assert abs(gains.mean() - truth) < 2 * gains.std() and 0.5 < errors.mean() / gains.std() < 2


@pytest.mark.parametrize("name", [*METRICS, *SLOW, of_function])
def test_a_model_is_no_better_than_itself_whatever_was_shown(name, labels):
    answers, judge = model(labels, 1), judge_of(name, labels)
    gain, _ = judge.difference(answers, answers, sample(judge, 0.25))
    assert gain == 0


@pytest.mark.parametrize("name", [*METRICS, *SLOW, of_function])
def test_nothing_known_of_a_group_is_no_certainty(name, labels):
    judge = judge_of(name, labels)
    known = judge.strata.first([50, 0, len(judge.strata.groups[2])])
    assert judge.difference(model(labels, 1), model(labels, 2), known) == (0.0, np.inf)


@pytest.mark.parametrize("name", ["accuracy", "f1", "balanced_accuracy", "recall[c]", "mcc"])
def test_a_few_images_on_which_two_agree_are_no_certainty(name, labels):
    first, judge = model(labels, 1), judge_of(name, labels)
    known = sample(judge, 0.2)
    alike = Answers(first.predictions.copy(), labels, len(SIZES))
    gain, error = judge.difference(first, alike, known)
    assert gain == 0 and error > 0


@pytest.mark.parametrize("name", [*METRICS, *SLOW, of_function])
def test_what_few_images_leave_open_is_what_drawing_them_again_says(name, labels):
    answers, judge = model(labels, 1), judge_of(name, labels)
    generator = np.random.default_rng(0)
    within = [np.flatnonzero(labels == label) for label in range(len(SIZES))]
    draws = (np.concatenate([generator.choice(places, len(places)) for places in within]) for _ in range(100))
    scores = [score_or_nan(judge.metric, answers.take(drawn)) for drawn in draws]
    assert judge.deviation(judge.value(answers), answers) == pytest.approx(np.std(scores), rel=0.6)


def test_influence_is_what_one_more_prediction_changes(labels):
    answers, metric = model(labels, 1), metric_of("f1")
    influence = Influence.of(metric, answers.counts).of_predictions(answers)
    without = answers.take(np.arange(1, len(labels)))
    here = metric.of_counts(answers.counts)[0]
    # its label stays among the true ones, for these are given
    left = without.counts
    left.true[labels[0]] += 1
    assert influence[0] == pytest.approx(here - metric.of_counts(left)[0], rel=0.05)


def test_images_of_rare_classes_are_in_every_sample(labels):
    places = np.arange(len(labels))
    always, contested, decided = sample_groups((metric_of("f1"),), labels, places[::2], places[1::2])
    assert sorted(set(labels[always])) == [4, 5, 6, 7] and all(SIZES[label] < FEW for label in labels[always])
    assert sorted([*always, *contested, *decided]) == list(places)
    balanced = np.repeat(np.arange(20), 10)
    for name, given in [("accuracy", labels), ("log_loss", labels), ("f1", balanced)]:
        places = np.arange(len(given))
        assert not len(sample_groups((metric_of(name),), given, places, places[:0])[0])
