"""The metrics that people report, by the names that they write: torchmetrics' for any number of classes.

In a mean over classes (macro) a class counts if a sample has it or, of F1, precision and recall, if it is predicted;
weighted means count classes by their samples. Balanced accuracy, ROC AUC and average precision are means over the
classes that have samples; the latter two rank the samples of one class before all others (one-vs-rest), also where
there are two classes, and mean nothing where all samples have one class. A prediction of no class is never right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.recipes.ensemble import BINS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of labelled images.

    Args:
        predictions: classes `(samples,)`, -1 for none.
        labels: the true classes `(samples,)`.
        classes: how many there are; some may have no sample.
        logits: `(samples, classes)`, where they are known.
    """

    predictions: np.ndarray
    labels: np.ndarray
    classes: int
    logits: np.ndarray | None = None

    @cached_property
    def guesses(self) -> torch.Tensor:
        """The predictions `(samples,)`; no class is one more, which no sample has."""
        import torch

        return torch.from_numpy(np.where(self.predictions < 0, self.classes, self.predictions).astype(np.int64))

    @cached_property
    def targets(self) -> torch.Tensor:
        """The true classes `(samples,)`."""
        import torch

        return torch.from_numpy(np.array(self.labels, dtype=np.int64))

    @cached_property
    def scores(self) -> torch.Tensor:
        """The logits, float64 `(samples, classes)`."""
        import torch

        return torch.from_numpy(np.array(self.logits, dtype=np.float64))

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """The softmax of the logits, float64 `(samples, classes)`."""
        return self.scores.softmax(dim=1)


@dataclass(frozen=True)
class Metric:
    """A metric that was asked for.

    Args:
        name: as it was written.
        needs_logits: whether predicted classes alone don't do.
        compute: of the answers, its score by name; of a script of evaluate there may be several.
    """

    name: str
    needs_logits: bool
    compute: Callable[[Answers], dict[str, float]]


def _of_classes(name: str, answers: Answers, average: str | None) -> torch.Tensor:
    """A metric of predictions by its name in torchmetrics: a score or, where there is no average, one a class."""
    from torchmetrics.functional import classification

    options = {"num_classes": answers.classes + 1, "average": average}
    score: torch.Tensor = getattr(classification, f"multiclass_{name}")(answers.guesses, answers.targets, **options)
    return score


def _averaged(name: str, average: str, answers: Answers) -> float:
    if average != "macro":
        return float(_of_classes(name, answers, average).double())
    counted = np.union1d(answers.labels, answers.predictions[answers.predictions >= 0])
    return float(_of_classes(name, answers, None)[counted].double().mean())


def _balanced_accuracy(answers: Answers) -> float:
    return float(_of_classes("recall", answers, None)[np.unique(answers.labels)].double().mean())


def _mcc(answers: Answers) -> float:
    """Matthews' correlation for any number of classes; 0 where all labels, or all predictions, are of one class."""
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    if len(np.unique(answers.labels)) < 2:
        return 0.0
    return float(multiclass_matthews_corrcoef(answers.guesses, answers.targets, num_classes=answers.classes + 1))


def _top5_accuracy(answers: Answers) -> float:
    """With five classes or fewer, the label is always among the best five."""
    from torchmetrics.functional.classification import multiclass_accuracy

    if answers.classes <= 5:
        return 1.0
    options = {"num_classes": answers.classes, "average": "micro", "top_k": 5}
    return float(multiclass_accuracy(answers.scores, answers.targets, **options))


def _log_loss(answers: Answers) -> float:
    from torch.nn.functional import cross_entropy

    return float(cross_entropy(answers.scores, answers.targets))


def _calibration_error(answers: Answers) -> float:
    from torchmetrics.functional.classification import multiclass_calibration_error

    if answers.classes < 2:
        return 0.0  # of the one class the probability is 1
    options = {"num_classes": answers.classes, "n_bins": BINS, "norm": "l1"}
    return float(multiclass_calibration_error(answers.probabilities, answers.targets, **options))


def _one_against_rest(name: str, answers: Answers) -> float:
    """The mean over the classes that have samples; NaN if there is only one, which has no rest."""
    from torchmetrics.functional import classification

    counted = np.unique(answers.labels)
    if len(counted) < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the classes without samples, which are left out below
        scores = getattr(classification, f"multiclass_{name}")(
            answers.probabilities, answers.targets, num_classes=answers.classes, average=None
        )
    return float(scores[counted].double().mean())


# By name, of predicted classes; the shares of what a class has are means over classes unless they say otherwise.
OF_PREDICTIONS: Mapping[str, Callable[[Answers], float]] = {
    "accuracy": lambda answers: float(np.mean(answers.predictions == answers.labels)),
    "balanced_accuracy": _balanced_accuracy,
    **{
        f"{name}{ending}": partial(_averaged, function, average)
        for name, function in (("f1", "f1_score"), ("precision", "precision"), ("recall", "recall"))
        for ending, average in (("", "macro"), ("_macro", "macro"), ("_micro", "micro"), ("_weighted", "weighted"))
    },
    "mcc": _mcc,
    "matthews_correlation": _mcc,
}

# By name, of logits.
OF_LOGITS: Mapping[str, Callable[[Answers], float]] = {
    "top5_accuracy": _top5_accuracy,
    "log_loss": _log_loss,
    "roc_auc": partial(_one_against_rest, "auroc"),
    "average_precision": partial(_one_against_rest, "average_precision"),
    "calibration_error": _calibration_error,
}

NAMES = (*OF_PREDICTIONS, *OF_LOGITS)


def load_metrics(names: str | Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names, each once: those of `NAMES`, which are here, or of the evaluate library.

    Raises:
        ValueError: if none is named, or one is none of these and evaluate can't load it, or not compute it.
    """
    wanted = dict.fromkeys([names] if isinstance(names, str) else names)
    if not wanted:
        raise ValueError(f"No metric is named. There are {', '.join(NAMES)}.")
    return tuple(_load(name) for name in wanted)


def _load(name: str) -> Metric:
    plain = name.strip().lower().replace("-", "_")
    if plain in NAMES:
        return Metric(plain, plain in OF_LOGITS, partial(_known, plain))
    if not Path(name).exists() and (similar := get_close_matches(plain, NAMES, n=1, cutoff=0.85)):
        raise ValueError(f"The metric {name!r} is none of {', '.join(NAMES)}. Is {similar[0]!r} meant?")
    try:
        score = load_metric(name)
    except ValueError as error:
        raise ValueError(f"The metric {name!r} is none of {', '.join(NAMES)}. {error}") from error
    return Metric(name, False, lambda answers: score(answers.predictions, answers.labels))


def _known(name: str, answers: Answers) -> dict[str, float]:
    if name in OF_PREDICTIONS:
        return {name: OF_PREDICTIONS[name](answers)}
    is_finite = answers.logits is not None and np.isfinite(answers.logits).all()
    return {name: OF_LOGITS[name](answers) if is_finite else float("nan")}


def compute_metrics(metrics: Iterable[Metric], answers: Answers) -> dict[str, float]:
    """Scores by name; NaN where a metric has no meaning: of logits that are no finite numbers, or of one class.

    What a script calls as another metric is called has the script's name before its own.
    """
    scores: dict[str, float] = {}
    for metric in metrics:
        for name, score in metric.compute(answers).items():
            is_taken = name in scores or (name in NAMES and name != metric.name)
            scores[f"{Path(metric.name).name}/{name}" if is_taken else name] = score
    return scores


def only_score(metric: Metric, answers: Answers) -> float:
    """What a metric gives.

    Raises:
        ValueError: if it gives several scores, none, or one that has no meaning.
    """
    scores = metric.compute(answers)
    if len(scores) != 1:
        found = ", ".join(scores) or "no number"
        raise ValueError(f"The metric {metric.name!r} gives {found}: it takes one score to rank recipes.")
    (score,) = scores.values()
    if np.isnan(score):
        raise ValueError(
            f"The metric {metric.name!r} has no meaning here: the samples have one class only, or logits are no "
            "finite numbers."
        )
    return score


def load_metric(name: str) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """What gives the scores, by name, of predicted classes `(samples,)` against the true ones.

    The library is imported only here: that takes seconds.

    Raises:
        ValueError: if it can't be loaded, or can't be computed.
    """
    import evaluate

    try:
        module = evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # a script from outside may fail in any way
        said = str(error).rstrip(".")
        raise ValueError(
            f"It can't be loaded by evaluate either: {said}. Its scripts come from the Hub; offline, give the path of "
            "a folder that holds one."
        ) from error

    def scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found = module.compute(predictions=predictions, references=np.asarray(labels))
        return {key: float(value) for key, value in found.items() if np.ndim(value) == 0}

    try:
        scores(np.array([0, 1, 2]), np.array([0, 1, 1]))
    except Exception as error:
        raise ValueError(f"{name!r} can't be computed from predicted classes alone: {error}") from error
    return scores
