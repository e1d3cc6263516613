"""The metrics that are reported are those of scikit-learn; where classes lack samples, by the rule that is stated."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from shared.scores import averaged_scores
from sklearn import metrics as reference

from hf_radin.metrics.named import (
    NAMES,
    OF_PREDICTIONS,
    Answers,
    Metric,
    compute_metrics,
    load_metrics,
    only_score,
)
from hf_radin.recipes import ensemble


def answers(samples: int, classes: int, present: int, *, seed: int = 0) -> Answers:
    """Of a model that learnt something, on samples of `present` of the classes."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(generator.permutation(classes)[:present], samples)
    logits = 2 * generator.standard_normal((samples, classes)).astype(np.float32)
    logits[np.arange(samples), labels] += 1
    return Answers(logits.argmax(axis=1), labels, classes, logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    if probabilities.shape[1] == 2:
        return reference.brier_score_loss(labels, probabilities[:, 1], pos_label=1)
    return float(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1).mean())


def expected(given: Answers) -> dict[str, float]:
    """What scikit-learn gives."""
    labels, predictions = given.labels, given.predictions
    scores = {
        "accuracy": reference.accuracy_score(labels, predictions),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, predictions),
        "worst_recall": min(
            reference.recall_score(labels, predictions, labels=np.unique(labels), average=None, zero_division=0)
        ),
        "mcc": reference.matthews_corrcoef(labels, predictions),
        "matthews_correlation": reference.matthews_corrcoef(labels, predictions),
    }
    scores |= averaged_scores(labels, predictions)
    probabilities = softmax(given.logits)
    classes = np.arange(given.classes)
    is_of_class = labels[:, None] == np.unique(labels)
    columns = probabilities[:, np.unique(labels)]
    return scores | {
        "log_loss": reference.log_loss(labels, probabilities, labels=classes),
        "top5_accuracy": reference.top_k_accuracy_score(labels, probabilities, k=5, labels=classes)
        if given.classes > 5
        else 1.0,
        "brier_score": brier_score(probabilities, labels),
        "roc_auc": reference.roc_auc_score(is_of_class, columns, average="macro"),
        "average_precision": reference.average_precision_score(is_of_class, columns, average="macro"),
        # scikit-learn has none
        "calibration_error": ensemble.calibration_error([given.logits], labels, np.ones((1, 1)))[0],
    }


@pytest.mark.filterwarnings("ignore:.*not in y_true|Precision|y_pred contains")
@pytest.mark.parametrize(
    ("samples", "classes", "present"),
    [(400, 12, 12), (60, 12, 9), (7, 12, 3), (40, 4, 4), (30, 5, 2), (50, 2, 2)],
    ids=["all classes", "some without samples", "few samples", "four classes", "two of five", "two classes"],
)
def test_metrics_are_those_of_scikit_learn(samples, classes, present):
    given = answers(samples, classes, present)
    scores = compute_metrics(load_metrics(NAMES), given)
    assert scores.keys() == {*NAMES} and len(NAMES) == 23
    assert scores == pytest.approx(expected(given), abs=2e-6)


def test_of_two_classes_the_areas_are_those_of_either():
    given = answers(200, 2, 2)
    second = softmax(given.logits)[:, 1]
    areas = [reference.average_precision_score(given.labels == 1, second)]
    areas.append(reference.average_precision_score(given.labels == 0, 1 - second))
    scores = compute_metrics(load_metrics(["roc_auc", "average_precision"]), given)
    assert scores["roc_auc"] == pytest.approx(reference.roc_auc_score(given.labels, second), abs=1e-6)
    assert scores["average_precision"] == pytest.approx(np.mean(areas), abs=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_where_all_samples_have_one_class_no_score_is_made_up(classes):
    given = answers(9, classes, 1)
    scores = compute_metrics(load_metrics(NAMES), given)
    without = {name for name, value in scores.items() if np.isnan(value)}
    assert without == {"roc_auc", "average_precision"}
    assert scores["mcc"] == 0
    assert [scores["recall_weighted"], scores["f1_micro"]] == pytest.approx(2 * [scores["accuracy"]])
    for name in without:
        with pytest.raises(ValueError, match=f"The metric '{name}' is undefined here: all images are of one class"):
            only_score(load_metrics(name)[0], given)


def test_a_prediction_of_no_class_is_wrong_and_no_class_of_its_own():
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, -1, 1, 1])
    scores = compute_metrics(load_metrics(OF_PREDICTIONS), Answers(predictions, labels, 2))
    assert scores["accuracy"] == scores["recall_micro"] == 0.75
    assert scores["f1"] == pytest.approx((2 / 3 + 1) / 2) and scores["precision"] == 1.0


def test_of_logits_that_are_no_numbers_nothing_is_said():
    given = answers(20, 6, 6)
    given.logits[3, 2] = np.inf
    of_logits = [name for name in NAMES if name not in OF_PREDICTIONS]
    assert len(of_logits) == 6
    assert all(np.isnan(value) for value in compute_metrics(load_metrics(of_logits), given).values())


def test_large_logits_have_no_infinite_loss():
    logits = np.array([[1e4, -1e4], [1e4, -1e4]], dtype=np.float32)
    given = Answers(np.array([0, 0]), np.array([0, 1]), 2, logits)
    scores = compute_metrics(load_metrics(["log_loss", "calibration_error"]), given)
    assert scores["log_loss"] == pytest.approx(1e4) and scores["calibration_error"] == pytest.approx(0.5)


def test_a_misspelt_name_is_answered_with_the_names(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"The metric 'acuracy' is none of accuracy, balanced_accuracy, f1, .*roc_auc"
    ):
        load_metrics(["accuracy", "acuracy"])
    with pytest.raises(ValueError, match=r"No metric is named. There are accuracy"):
        load_metrics([])


def test_a_scripts_score_never_stands_for_another():
    def constant(given: Answers) -> dict[str, float]:
        return {"accuracy": 0.123, "own": 0.5}

    script = Metric("/folder/of/lenient", False, constant)
    (accuracy,) = load_metrics("accuracy")
    given = answers(100, 3, 3)
    for metrics in ((accuracy, script), (script, accuracy)):
        scores = compute_metrics(metrics, given)
        assert scores["accuracy"] == float(np.mean(given.predictions == given.labels))
        assert (scores["lenient/accuracy"], scores["own"]) == (0.123, 0.5)


def test_names_that_are_here_load_neither_evaluate_nor_torchmetrics():
    code = (
        "import sys, hf_radin.metrics.named as metrics; metrics.load_metrics(metrics.NAMES);"
        "print(*({'evaluate', 'torchmetrics', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


@pytest.mark.parametrize(("written", "name"), [("F1", "f1"), ("log-loss", "log_loss"), ("ROC_AUC", "roc_auc")])
def test_capitals_and_hyphens_are_forgiven(written, name):
    assert [metric.name for metric in load_metrics(written)] == [name]


@pytest.mark.parametrize(
    ("slip", "name"),
    [("accurcy", "accuracy"), ("acc", "accuracy"), ("macro_f1", "f1_macro"), ("Micro-F1", "f1_micro")],
)
def test_a_slip_is_answered_with_the_name_that_is_meant_before_evaluate_is_asked(slip, name):
    with pytest.raises(ValueError, match=f"'{slip}' is none of .* Did you mean '{name}'") as raised:
        load_metrics(slip)
    assert raised.value.__context__ is None  # no error of evaluate's came first


SCRIPT = """
import datasets
import evaluate
import pathlib

pathlib.Path("it-ran").touch()


class Count(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo("", "", datasets.Features(kinds))

    def _compute(self, predictions, references):
        return {"count": len(predictions)}
"""


@pytest.mark.parametrize("name", ["f1", "my_count", "my_count.py", "accurcy_of_mine"])
def test_a_script_in_the_working_directory_is_not_run_by_a_plain_name(tmp_path, monkeypatch, go_offline, name):
    go_offline()
    monkeypatch.chdir(tmp_path)
    stem = name.removesuffix(".py")
    (tmp_path / stem).mkdir()
    (tmp_path / stem / f"{stem}.py").write_text(SCRIPT)
    (tmp_path / f"{stem}.py").write_text(SCRIPT)
    if name in NAMES:
        assert load_metrics(name)[0].compute(answers(10, 3, 3)).keys() == {name}
    else:
        with pytest.raises(ValueError, match=r"write its path with a slash, as in \./my_metric"):
            load_metrics(name)
    assert not (tmp_path / "it-ran").exists()


def test_a_script_is_run_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_count").mkdir()
    (tmp_path / "my_count" / "my_count.py").write_text(SCRIPT)
    (metric,) = load_metrics("./my_count")
    assert metric.compute(answers(10, 3, 3)) == {"count": 10.0} and (tmp_path / "it-ran").exists()


def test_a_folder_of_the_name_of_evaluates_own_stands_for_nothing(tmp_path, monkeypatch, go_offline):
    go_offline()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate-metric" / "my_count").mkdir(parents=True)
    (tmp_path / "evaluate-metric" / "my_count" / "my_count.py").write_text(SCRIPT)
    with pytest.raises(ValueError, match="There is a folder evaluate-metric here"):
        load_metrics("my_count")
    assert not (tmp_path / "it-ran").exists()


def test_what_a_function_does_with_its_arrays_changes_nothing():
    def spoiling(logits: np.ndarray, labels: np.ndarray) -> float:
        value = float((logits.argmax(axis=1) == labels).mean())
        logits[:], labels[:] = 0, 0
        return value

    given = answers(50, 4, 4)
    before = compute_metrics(load_metrics(["accuracy", "log_loss"]), given)
    after = compute_metrics(load_metrics([spoiling, "accuracy", "log_loss"]), answers(50, 4, 4))
    assert after == {"spoiling": before["accuracy"], **before}


@pytest.mark.parametrize("value", [torch.tensor(0.5), np.float32(0.5), np.array(0.5), True])
def test_a_function_may_give_any_number(value):
    def half(logits: np.ndarray, labels: np.ndarray) -> object:
        return value

    assert only_score(load_metrics(half)[0], answers(9, 4, 4)) == float(value)


@pytest.mark.parametrize("value", [None, "0.5", 1j, [0.5], np.ones(1), {"half": 0.5}])
def test_what_is_no_number_is_refused(value):
    def odd(logits: np.ndarray, labels: np.ndarray) -> object:
        return value

    with pytest.raises(ValueError, match="'odd' is a function that gives one number; it gave"):
        only_score(load_metrics(odd)[0], answers(9, 4, 4))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_of_what_is_not_finite_nothing_is_said(value):
    def endless(logits: np.ndarray, labels: np.ndarray) -> float:
        return value

    assert np.isnan(compute_metrics(load_metrics(endless), answers(9, 4, 4))["endless"])
    with pytest.raises(ValueError, match="'endless' is undefined here: the function gives no finite number"):
        only_score(load_metrics(endless)[0], answers(9, 4, 4))


@pytest.mark.parametrize("name", ["accuracy", "f1", "log_loss", "cross_entropy", "top3_accuracy", "subset_accuracy"])
@pytest.mark.parametrize("of_label_sets", [False, True])
def test_a_function_never_stands_for_a_metric_that_is_computed_here(name, of_label_sets):
    def mine(logits: np.ndarray, labels: np.ndarray) -> float:
        return 0.0

    mine.__name__ = name
    with pytest.raises(ValueError, match=f"A function is called '{name}', as a metric that is computed here"):
        load_metrics(mine, of_label_sets=of_label_sets)


def test_two_functions_of_one_name_are_refused():
    def make(value: float):
        return lambda logits, labels: value

    first = make(1.0)
    assert len(load_metrics([first, first, "f1", "F1"])) == 2
    with pytest.raises(ValueError, match="Two functions are called '<lambda>'"):
        load_metrics([first, make(2.0)])


def test_other_names_of_the_same_metric():
    assert [metric.name for metric in load_metrics(["mAP", "cross_entropy"])] == ["average_precision", "log_loss"]
