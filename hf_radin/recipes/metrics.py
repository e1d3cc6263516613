"""The metrics that people report, by their usual names: torchmetrics' for any number of classes, and evaluate's.

In a mean over classes (macro) a class counts if a sample has it or, for F1, precision and recall, if it is predicted;
weighted means weight classes by their samples. Balanced accuracy, ROC AUC and average precision are means over the
classes that have samples. The latter two rank the samples of one class against all others (one-vs-rest), even if there
are only two classes, and are undefined if all samples have one class. A prediction of no class is never right.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.recipes.ensemble import BINS
from hf_radin.runtime.files import write_atomically
from hf_radin.runtime.text import one_line

if TYPE_CHECKING:
    import torch


# Who has evaluate's own metrics on the Hub.
_OWN = "evaluate-metric"


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers on labelled images.

    Args:
        predictions: classes `(samples,)`, -1 for none.
        labels: the true classes `(samples,)`.
        classes: how many there are; some may have no sample.
        logits: `(samples, classes)`, if they are known.
    """

    predictions: np.ndarray
    labels: np.ndarray
    classes: int
    logits: np.ndarray | None = None

    @cached_property
    def predicted(self) -> torch.Tensor:
        """The predictions `(samples,)`; -1 becomes an additional class, which no sample has."""
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


@dataclass(frozen=True, eq=False)
class Changes:
    """The images for which two models, a and b, predict different classes: a row for each.

    Args:
        ids: positions of the images in their split, `(images,)`.
        labels: the true classes `(images,)`.
        predictions: classes of a and of b, `(images, 2)`; -1 for none.
        margins: by how much the logit of the predicted class is ahead of that of the best other class, of a and of b,
            float32 `(images, 2)`; NaN where logits are not known, or a class is not predicted.
        classes: the names of all classes.
    """

    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    margins: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def won(self) -> int:
        """How many images b gets right, and a wrong."""
        return int((self.predictions[:, 1] == self.labels).sum())

    @property
    def lost(self) -> int:
        """How many images a gets right, and b wrong."""
        return int((self.predictions[:, 0] == self.labels).sum())

    def to_parquet(self, path: str | Path) -> None:
        """Write a row for each image: `id`, `label`, `label_name`, `prediction_a`, `prediction_b` (names of classes,
        null for none), `margin_a`, `margin_b`. The file appears when it is whole, and takes the place of another.

        Raises:
            OSError: if it can't be written.
        """
        import pyarrow
        from pyarrow import parquet

        names = [*self.classes, None]  # of class -1
        columns = {
            "id": pyarrow.array(self.ids, pyarrow.int64()),
            "label": pyarrow.array(self.labels, pyarrow.int64()),
            "label_name": pyarrow.array([names[label] for label in self.labels], pyarrow.string()),
        }
        for column, model in enumerate("ab"):
            predicted = [names[label] for label in self.predictions[:, column]]
            columns[f"prediction_{model}"] = pyarrow.array(predicted, pyarrow.string())
        for column, model in enumerate("ab"):
            columns[f"margin_{model}"] = pyarrow.array(self.margins[:, column], pyarrow.float32())
        table = pyarrow.table(columns)
        write_atomically(Path(path), lambda new: parquet.write_table(table, new))


def margins_of(logits: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """By how much the logits of predicted classes are ahead of those of the best other class: float32 `(images,)`.

    Args:
        logits: `(images, classes)`.
        predictions: classes `(images,)`, -1 for none; of these the margin is NaN.
    """
    each = np.arange(len(predictions))
    others = np.array(logits, dtype=np.float64)
    predicted = others[each, predictions]
    others[each, predictions] = -np.inf
    margins = np.full(len(predictions), np.nan)
    is_known = predictions >= 0
    margins[is_known] = (predicted - others.max(axis=1))[is_known]
    return margins.astype(np.float32)


@dataclass(frozen=True)
class Metric:
    """A metric, ready to be computed.

    Args:
        name: of the metric; for a script of evaluate as the user wrote it.
        needs_logits: whether it takes more than predicted classes.
        compute: from answers to scores by name; a script of evaluate may give several.
    """

    name: str
    needs_logits: bool
    compute: Callable[[Answers], dict[str, float]]


def load_metrics(names: str | Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names, each once: those of `NAMES`, or else of the evaluate library.

    Raises:
        ValueError: if there is no name, or evaluate can't load or compute a metric that is not in `NAMES`.
    """
    distinct = dict.fromkeys([names] if isinstance(names, str) else names)
    if not distinct:
        raise ValueError(f"No metric is named. There are {', '.join(NAMES)}.")
    return tuple(_load(name) for name in distinct)


def compute_metrics(metrics: Iterable[Metric], answers: Answers) -> dict[str, float]:
    """Scores by name; NaN if a metric is undefined: because logits are not finite, or all samples have one class.

    If a script of evaluate gives a score the name of another metric, the script's name is put before it.
    """
    scores: dict[str, float] = {}
    for metric in metrics:
        for name, score in metric.compute(answers).items():
            is_taken = name in scores or (name in NAMES and name != metric.name)
            scores[f"{Path(metric.name).name}/{name}" if is_taken else name] = score
    return scores


def only_score(metric: Metric, answers: Answers) -> float:
    """The score of a metric that gives one.

    Raises:
        ValueError: if it gives several scores, none, or one that is undefined.
    """
    scores = metric.compute(answers)
    if len(scores) != 1:
        names = ", ".join(scores) or "no number"
        raise ValueError(f"The metric {metric.name!r} gives {names}: it takes one score to rank recipes.")
    (score,) = scores.values()
    if np.isnan(score):
        raise ValueError(
            f"The metric {metric.name!r} is undefined here: the samples have one class only, or logits are not finite."
        )
    return score


def _load(name: str) -> Metric:
    """The metric of a name, in any spelling."""
    plain = name.strip().lower().replace("-", "_")
    if plain in NAMES:
        return Metric(plain, plain in OF_LOGITS, partial(_compute, plain))
    if not _is_path(name) and (similar := get_close_matches(plain, NAMES, n=1, cutoff=0.85)):
        raise ValueError(f"The metric {name!r} is none of {', '.join(NAMES)}. Did you mean {similar[0]!r}?")
    try:
        compute = _load_script(name)
    except ValueError as error:
        raise ValueError(f"The metric {name!r} is none of {', '.join(NAMES)}. {error}") from error
    return Metric(name, False, lambda answers: compute(answers.predictions, answers.labels))


def _compute(name: str, answers: Answers) -> dict[str, float]:
    """The score of one of `NAMES`."""
    if name in OF_PREDICTIONS:
        return {name: OF_PREDICTIONS[name](answers)}
    is_finite = answers.logits is not None and np.isfinite(answers.logits).all()
    return {name: OF_LOGITS[name](answers) if is_finite else float("nan")}


def _is_path(name: str) -> bool:
    """Whether a name is that of a place: a path, or somebody's id on the Hub."""
    return "/" in name or os.sep in name


def _load_script(name: str) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """A script of evaluate, as a function from predicted and true classes `(samples,)` to scores by name.

    A script is code. A plain name is that of one of evaluate's own metrics on the Hub, whatever lies in the working
    directory; a script from there, or of somebody else on the Hub, is run only if its path or id is written out.

    Raises:
        ValueError: if it can't be loaded, or can't be computed from predicted classes.
    """
    source = name if _is_path(name) else f"{_OWN}/{name}"
    if source != name and Path(source).exists():  # evaluate would look there first
        raise ValueError(f"There is a folder {_OWN} here, in which evaluate would look for it: run this elsewhere.")
    import evaluate  # takes seconds

    try:
        module = evaluate.load(source, keep_in_memory=True)
    except Exception as error:  # a script from outside can fail in any way
        reason = one_line(error).rstrip(".")
        raise ValueError(
            f"It can't be loaded by evaluate either: {reason}. Its scripts come from the Hub; to run one that is "
            "here, write its path with a slash, as in ./my_metric."
        ) from error

    def scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        results = module.compute(predictions=predictions, references=np.asarray(labels))
        return {key: float(value) for key, value in results.items() if np.ndim(value) == 0}

    try:
        scores(np.array([0, 1, 2]), np.array([0, 1, 1]))
    except Exception as error:
        raise ValueError(f"{name!r} can't be computed from predicted classes alone: {one_line(error)}") from error
    return scores


def _torchmetrics(name: str, answers: Answers, average: str | None) -> torch.Tensor:
    """A metric of predictions by its name in torchmetrics: one score or, without an average, one for each class."""
    from torchmetrics.functional import classification

    options = {"num_classes": answers.classes + 1, "average": average}
    score: torch.Tensor = getattr(classification, f"multiclass_{name}")(answers.predicted, answers.targets, **options)
    return score


def _averaged(name: str, average: str, answers: Answers) -> float:
    if average != "macro":
        return float(_torchmetrics(name, answers, average).double())
    counted = np.union1d(answers.labels, answers.predictions[answers.predictions >= 0])
    return float(_torchmetrics(name, answers, None)[counted].double().mean())


def _balanced_accuracy(answers: Answers) -> float:
    return float(_torchmetrics("recall", answers, None)[np.unique(answers.labels)].double().mean())


def _mcc(answers: Answers) -> float:
    """Matthews' correlation for any number of classes; 0 if all labels, or all predictions, are of one class."""
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    if len(np.unique(answers.labels)) < 2:
        return 0.0
    return float(multiclass_matthews_corrcoef(answers.predicted, answers.targets, num_classes=answers.classes + 1))


def _top5_accuracy(answers: Answers) -> float:
    """The share of labels among the best five classes, which is 1 if there are no more classes than five."""
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
        return 0.0  # the probability of the only class is 1
    options = {"num_classes": answers.classes, "n_bins": BINS, "norm": "l1"}
    return float(multiclass_calibration_error(answers.probabilities, answers.targets, **options))


def _one_vs_rest(name: str, answers: Answers) -> float:
    """The mean over the classes that have samples; NaN if there is only one such class."""
    from torchmetrics.functional import classification

    counted = np.unique(answers.labels)
    if len(counted) < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without samples, which are left out below
        scores = getattr(classification, f"multiclass_{name}")(
            answers.probabilities, answers.targets, num_classes=answers.classes, average=None
        )
    return float(scores[counted].double().mean())


# Metrics of predicted classes by name; F1, precision and recall are means over classes unless the name says otherwise.
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

# Metrics of logits by name.
OF_LOGITS: Mapping[str, Callable[[Answers], float]] = {
    "top5_accuracy": _top5_accuracy,
    "log_loss": _log_loss,
    "roc_auc": partial(_one_vs_rest, "auroc"),
    "average_precision": partial(_one_vs_rest, "average_precision"),
    "calibration_error": _calibration_error,
}

NAMES = (*OF_PREDICTIONS, *OF_LOGITS)
