"""Metrics of decisions are those of scikit-learn; two classes of which each image has one are binary decisions."""

import numpy as np
import pytest
from shared.scores import averaged_scores
from sklearn import metrics as reference

from hf_radin.metrics import bootstrap
from hf_radin.metrics.intervals import Strata
from hf_radin.metrics.judge import Judge, sample_groups
from hf_radin.metrics.multi_label import NAMES, decisions_of
from hf_radin.metrics.named import Answers, compute_metrics, load_metrics, only_score


def answers(samples: int = 300, classes: int = 6, *, seed: int = 0, like: np.ndarray | None = None) -> Answers:
    """Of a model that learnt something; classes are seldom there, and some images have none."""
    generator = np.random.default_rng(seed)
    labels = generator.random((samples, classes)) < np.linspace(0.05, 0.4, classes) if like is None else like
    logits = (2 * labels - 1 + 1.5 * generator.standard_normal((samples, classes))).astype(np.float32)
    return Answers(decisions_of(logits), labels, classes, logits)


def expected(given: Answers) -> dict[str, float]:
    """What scikit-learn gives."""
    labels, yes, logits = given.labels, given.predictions == 1, given.logits.astype(np.float64)
    probabilities = 1 / (1 + np.exp(-logits))
    scores = {
        "label_accuracy": 1 - reference.hamming_loss(labels, yes),
        "subset_accuracy": reference.accuracy_score(labels, yes),
        "worst_recall": min(reference.recall_score(labels, yes, average=None)),
        "log_loss": np.mean([reference.log_loss(*pair) for pair in zip(labels.T, probabilities.T, strict=True)]),
        "brier_score": np.mean(
            [reference.brier_score_loss(*pair) for pair in zip(labels.T, probabilities.T, strict=True)]
        ),
        "roc_auc": reference.roc_auc_score(labels, logits),
        "average_precision": reference.average_precision_score(labels, logits),
    }
    return scores | averaged_scores(labels, yes)


@pytest.mark.parametrize("classes", [2, 6])
def test_metrics_are_those_of_scikit_learn(classes):
    given, metrics = answers(classes=classes), load_metrics(NAMES, of_label_sets=True)
    assert compute_metrics(metrics, given) == pytest.approx(expected(given), abs=1e-6)


def test_a_class_that_no_image_has_or_all_have_counts_where_it_means_something():
    labels = answers().labels.copy()
    labels[:, 0], labels[:, 1] = False, True
    given = answers(like=labels)
    part = Answers(given.predictions[:, 2:], labels[:, 2:], 4, given.logits[:, 2:])
    (auc, precision) = load_metrics(["roc_auc", "map"], of_label_sets=True)
    assert only_score(auc, given) == pytest.approx(only_score(auc, part))
    assert only_score(precision, given) == pytest.approx((4 * only_score(precision, part) + 1) / 5)


def test_one_of_two_classes_for_each_image_equals_binary_decisions():
    """The logits of the two are x and -x: both say the same, and it is the class of the larger one."""
    generator = np.random.default_rng(1)
    truth, logit = generator.integers(0, 2, 200), generator.standard_normal(200)
    pair = np.stack([-logit, logit], axis=1)
    sets = Answers(decisions_of(pair), truth[:, None] == [0, 1], 2, pair)
    single = Answers(pair.argmax(axis=1), truth, 2, pair / 2)  # whose softmax is the sigmoid
    for name, other in (("accuracy", "accuracy"), ("subset_accuracy", "accuracy"), ("f1", "f1"), ("log_loss",) * 2):
        (first,), (second,) = load_metrics(name, of_label_sets=True), load_metrics(other)
        assert only_score(first, sets) == pytest.approx(only_score(second, single))


def test_names_mean_the_task_and_those_of_the_other_are_refused():
    assert [metric.name for metric in load_metrics(["accuracy", "label-accuracy"], of_label_sets=True)] == [
        "label_accuracy"
    ]
    for name in ("top5_accuracy", "mcc", "balanced_accuracy", "calibration_error"):
        with pytest.raises(
            ValueError, match=f"{name}.*one class, and these are multi-label: there are label_accuracy"
        ):
            load_metrics(name, of_label_sets=True)
    with pytest.raises(ValueError, match="'subset_accuracy' is one of multi-label classifiers"):
        load_metrics("subset_accuracy", of_label_sets=False)
    with pytest.raises(ValueError, match="'exact_match' is none of those of multi-label classifiers"):
        load_metrics("exact_match", of_label_sets=True)
    assert load_metrics("subset_accuracy")[0].name == "subset_accuracy"  # before it is known which it is
    (recall,) = load_metrics("recall[b]", ("a", "b", "c", "d", "e", "f"), of_label_sets=True)
    given = answers()
    assert only_score(recall, given) == pytest.approx(
        reference.recall_score(given.labels[:, 1], given.predictions[:, 1])
    )


def test_an_image_with_a_logit_that_is_no_number_is_never_right():
    logits = np.array([[-1.0, np.nan], [-1.0, -1.0]])
    given = Answers(decisions_of(logits), np.zeros((2, 2), bool), 2)
    assert given.predictions.tolist() == [[-1, -1], [0, 0]]
    assert only_score(load_metrics("accuracy", of_label_sets=True)[0], given) == 0.5


@pytest.mark.parametrize("name", ["label_accuracy", "f1", "f1_micro", "precision_weighted", "log_loss", "map"])
def test_an_error_is_what_images_drawn_anew_vary_by(name):
    (metric,) = load_metrics(name, of_label_sets=True)
    many = answers(20_000, seed=2)
    judge = Judge(metric, Strata((np.arange(300),)))
    parts = [many.take(np.arange(start, start + 300)) for start in range(0, 20_000 - 300, 300)]
    spread = np.std([only_score(metric, part) for part in parts])
    assert np.mean([judge.deviation(0.9, part) for part in parts[:10]]) == pytest.approx(spread, rel=0.35)
    low, high = np.mean([bootstrap.metric_interval(metric, part) for part in parts[:5]], axis=0)
    assert (high - low) / 3.92 == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("name", ["label_accuracy", "f1", "f1_micro", "subset_accuracy", "log_loss", "map"])
def test_a_difference_by_a_sample_is_about_that_of_all_and_known_in_full_it_is_it(name):
    (metric,) = load_metrics(name, of_label_sets=True)
    first = answers(2000, seed=3)
    second = answers(2000, seed=4, like=first.labels)
    judge = Judge(metric, Strata.shuffled([np.arange(2000)], seed=0))
    truth = only_score(metric, first) - only_score(metric, second)
    gain, error = judge.difference(first, second, np.ones(2000, bool))
    assert (gain, error) == (pytest.approx(truth, abs=1e-9), 0.0)
    gain, error = judge.difference(first, second, judge.strata.first([500]))
    assert 0 < error < 0.1 and abs(gain - truth) < 4 * error
    difference = bootstrap.Difference.of(metric, first, second)
    assert difference.gain == pytest.approx(truth) and difference.interval[0] < truth < difference.interval[1]


def test_of_few_classes_all_images_are_in_every_sample():
    labels = np.zeros((2000, 3), bool)
    labels[:900, 0], labels[500:1500, 1], labels[[7, 1999], 2] = True, True, True
    places = np.arange(2000)
    always, contested, decided = sample_groups(
        load_metrics("f1", of_label_sets=True), labels, places[:50], places[50:]
    )
    assert always.tolist() == [7, 1999] and len(contested) == 49 and len(decided) == 1949
