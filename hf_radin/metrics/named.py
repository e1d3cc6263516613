"""The metrics that people report, by their usual names, and evaluate's.

To judge soups by a metric, and to say how certain it is, it is computed a thousand times: so those of the usual names
are computed here, as arrays, and tests compare them with scikit-learn's.

In a mean over classes (macro) a class counts if a sample has it or, for F1, precision and recall, if it is predicted;
weighted means weight classes by their samples. Balanced accuracy, ROC AUC and average precision are means over the
classes that have samples. The latter two rank the samples of one class against all others (one-vs-rest), even if there
are only two classes, and are undefined if all samples have one class. A prediction of no class is never right.
The Brier score is the sum over classes of the squared error of the probability, for two classes half of it.

A name may also be that of one class, as in `recall[melanoma]`, or have any number, as in `top3_accuracy`.

Of multi-label classifiers the metrics are those of `multi_label`: see there.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.metrics import multi_label
from hf_radin.recipes import scoring
from hf_radin.recipes.ensemble import BINS
from hf_radin.recipes.scoring import Counts, Losses
from hf_radin.runtime.text import one_line

if TYPE_CHECKING:
    import torch


# Who has evaluate's own metrics on the Hub.
_OWN = "evaluate-metric"


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers on labelled images.

    Args:
        predictions: classes `(samples,)`, -1 for none; of a multi-label model its decisions `(samples, classes)`, as
            `multi_label.decisions_of` gives them.
        labels: the true classes `(samples,)`; multi-label, which classes the images have, bool `(samples, classes)`.
        classes: how many there are; some may have no sample.
        logits: `(samples, classes)`, if they are known.
    """

    predictions: np.ndarray
    labels: np.ndarray
    classes: int
    logits: np.ndarray | None = None

    def take(self, samples: np.ndarray) -> Answers:
        """Those on some samples, by their positions, as often as these are named."""
        logits = None if self.logits is None else self.logits[samples]
        return Answers(self.predictions[samples], self.labels[samples], self.classes, logits)

    @property
    def are_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.labels.ndim == 2

    @cached_property
    def hits(self) -> np.ndarray:
        """What is predicted right: bool `(samples,)`, or `(samples, classes)` as the predictions."""
        return np.asarray(self.predictions == self.labels)

    @cached_property
    def counts(self) -> Counts:
        """How often each class is predicted, and how often that is right: of one model, `(1, classes)`."""
        return weighted_counts(self, np.ones(len(self.labels)))

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
    """A metric, ready to be computed.

    Args:
        name: of the metric; for a script of evaluate as the user wrote it.
        needs_logits: whether it takes more than predicted classes.
        compute: from answers to scores by name; a script of evaluate may give several.
        is_loss: whether less is better.
        of_counts: where it follows from counts of predicted classes, how.
        of_images: where it is a mean over images, what each adds to it: `(samples,)`.
        of_logits: where that follows from logits by arithmetic, the same for many recipes at once.
        top: where it is the share of labels among the best `top` classes, how many these are; 1 for that of right
            decisions, too.
        of_class: where it is that of one class, which.
        function: where it is a user's, that.
    """

    name: str
    needs_logits: bool
    compute: Callable[[Answers], dict[str, float]]
    is_loss: bool = False
    of_counts: Callable[[Counts], np.ndarray] | None = None
    of_images: Callable[[Answers], np.ndarray] | None = None
    of_logits: Losses | None = None
    top: int | None = None
    of_class: int | None = None
    function: Callable[..., Any] | None = None

    def rank(self, value: float) -> float:
        """A value such that more is better."""
        return -value if self.is_loss else value

    @property
    def why_undefined(self) -> str:
        """What it comes of if the metric is undefined."""
        if self.function is not None:
            return "the function gives no finite number"
        return "all images are of one class, or logits are no finite numbers"


def load_metrics(
    metrics: Any, classes: Sequence[str] | None = None, *, of_label_sets: bool | None = None
) -> tuple[Metric, ...]:
    """The metrics of these names, each once: those of `NAMES`, or else of the evaluate library.

    Args:
        metrics: a name or several; also a function `(logits, labels) -> float`, of logits `(samples, classes)` and
            labels `(samples,)`, multi-label bool `(samples, classes)`, which it may change. More of it is better
            unless it has an attribute `greater_is_better` that is False.
        classes: names of the classes, for a metric of one of them; None if they are not known yet.
        of_label_sets: whether an image may have any number of classes; None if that is not known yet.

    Raises:
        ValueError: if there is no name, or evaluate can't load or compute a metric that is not in `NAMES`, or a class
            is not there, or a metric is not of such classifiers, or a function has the name of another metric.
    """
    is_single = isinstance(metrics, (str, Metric)) or callable(metrics) or not isinstance(metrics, Iterable)
    distinct = dict.fromkeys([metrics] if is_single else metrics)
    if not distinct:
        raise ValueError(f"No metric is named. There are {', '.join(NAMES)}.")
    if of_label_sets:
        return by_name(_load_multi_label(metric, classes) for metric in distinct)
    return by_name(_load(metric, classes, may_be_other=of_label_sets is None) for metric in distinct)


def by_name(metrics: Iterable[Metric]) -> tuple[Metric, ...]:
    """Metrics, each name once: scores are known by it.

    Raises:
        ValueError: if two functions have the same name.
    """
    named: dict[str, Metric] = {}
    for metric in metrics:
        if named.setdefault(metric.name, metric).function != metric.function:
            raise ValueError(
                f"Two functions are called {metric.name!r}, and scores are known by the name: set `__name__` of one."
            )
    return tuple(named.values())


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
    score = score_or_nan(metric, answers)
    if np.isnan(score):
        raise ValueError(f"The metric {metric.name!r} is undefined here: {metric.why_undefined}.")
    return score


def score_or_nan(metric: Metric, answers: Answers) -> float:
    """The score of a metric that gives one; NaN if it is undefined.

    Raises:
        ValueError: if it gives several scores, or none.
    """
    scores = metric.compute(answers)
    if len(scores) != 1:
        names = ", ".join(scores) or "no number"
        raise ValueError(f"The metric {metric.name!r} gives {names}: it takes one score to rank recipes.")
    (score,) = scores.values()
    return score


def weighted_counts(answers: Answers, weights: np.ndarray) -> Counts:
    """The counts of answers, each with a weight `(samples,)`; predictions of no class add to none: `(1, classes)`."""
    if answers.are_multi_label:
        return multi_label.weighted_counts(answers, weights[None])

    def count(classes: np.ndarray, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        return np.bincount(classes[which], weights[which], minlength=answers.classes)

    predictions = answers.predictions
    return Counts(
        count(predictions, answers.hits)[None], count(predictions, predictions >= 0)[None], count(answers.labels)
    )


def _load(metric: Any, classes: Sequence[str] | None, *, may_be_other: bool) -> Metric:
    """The metric of a name, in any spelling, or of a function.

    Args:
        may_be_other: whether one of multi-label classifiers alone is taken, too.
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return _of_function(metric)
    if not isinstance(metric, str):
        raise ValueError(f"A metric is a name or a function of logits and labels, not {metric!r}.")
    if of_class := _OF_CLASS.fullmatch(metric.strip()):
        return _of_class(of_class[1].lower(), of_class[2], classes)
    plain = metric.strip().lower().replace("-", "_")
    plain = plain if plain in NAMES else multi_label.ALIASES.get(plain, plain)
    if plain in NAMES or _TOP.fullmatch(plain):
        return _named(plain)
    if plain in (*multi_label.NAMES, *multi_label.ALIASES):
        if may_be_other:
            return _load_multi_label(metric, classes)
        raise ValueError(
            f"The metric {metric!r} is one of multi-label classifiers, and these give each image one class: there are "
            f"{', '.join(NAMES)}."
        )
    if not _is_path(metric) and (similar := _similar_name(plain)):
        raise ValueError(f"The metric {metric!r} is none of {', '.join(NAMES)}. Did you mean {similar!r}?")
    try:
        compute = _load_script(metric)
    except ValueError as error:
        raise ValueError(f"The metric {metric!r} is none of {', '.join(NAMES)}. {error}") from error
    return Metric(metric, False, lambda answers: compute(answers.predictions, answers.labels))


def _similar_name(name: str) -> str | None:
    """The metric that a name may stand for: one with its words turned round, cut short, or misspelt."""
    turned = "_".join(reversed(name.split("_")))
    begun = [other for other in NAMES if len(name) >= SHORTEST and other.startswith(name)]
    near = [turned] if turned in NAMES else begun or get_close_matches(name, NAMES, n=1, cutoff=0.85)
    return near[0] if near else None


def _load_multi_label(metric: Any, classes: Sequence[str] | None) -> Metric:
    """The metric of a name, in any spelling, or of a function, for multi-label classifiers.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return _of_function(metric)
    if isinstance(metric, str) and (of_class := _OF_CLASS.fullmatch(metric.strip())):
        return _of_class(of_class[1].lower(), of_class[2], classes)
    plain = str(metric).strip().lower().replace("-", "_")
    name = multi_label.ALIASES.get(plain, plain)
    if name == "label_accuracy":
        of_images = multi_label.right_decisions
        return Metric(name, False, lambda answers: {name: _mean(_hits)(answers)}, of_images=of_images, top=1)
    if name == "subset_accuracy":
        of_images = multi_label.all_right
        return Metric(name, False, lambda answers: {name: _mean(of_images)(answers)}, of_images=of_images)
    if (of_counts := multi_label.OF_COUNTS.get(name)) is not None:
        return Metric(name, False, lambda answers: {name: float(of_counts(answers.counts)[0])}, of_counts=of_counts)
    if (losses := multi_label.OF_PROBABILITIES.get(name)) is not None:
        return _of_losses(name, losses)
    if name in multi_label.RANKING:
        return Metric(name, True, partial(_compute_of_logits, name, partial(_one_vs_rest, _RANKING[name])))
    names = ", ".join(multi_label.NAMES)
    if name in NAMES or _TOP.fullmatch(name):
        raise ValueError(
            f"The metric {metric!r} is one of classifiers that give each image one class, and these are multi-label: "
            f"there are {names}."
        )
    raise ValueError(
        f"The metric {metric!r} is none of those of multi-label classifiers: {names}. A function (logits, labels) -> "
        "float can be passed in Python."
    )


def _named(name: str) -> Metric:
    """One of `NAMES`, or the share of labels among any number of best classes."""
    if top := _TOP.fullmatch(name):
        hits = partial(_top_hits, int(top[1]))
        return Metric(name, True, partial(_compute_of_logits, name, _mean(hits)), of_images=hits, top=int(top[1]))
    if name == "accuracy":
        return Metric(name, False, lambda answers: {name: _mean(_hits)(answers)}, of_images=_hits, top=1)
    if name in OF_PREDICTIONS:
        of_counts = _of_counts(name)
        return Metric(name, False, lambda answers: {name: float(of_counts(answers.counts)[0])}, of_counts=of_counts)
    if name in _OF_PROBABILITIES:
        return _of_losses(name, _OF_PROBABILITIES[name])
    compute = partial(_compute_of_logits, name, OF_LOGITS[name])
    return Metric(name, True, compute, is_loss=name == "calibration_error")


def _of_losses(name: str, losses: Losses) -> Metric:
    """A metric that is the mean of what each image adds by its logits, of which less is better."""
    of_images = partial(_of_each_image, losses)
    compute = partial(_compute_of_logits, name, _mean(of_images))
    return Metric(name, True, compute, is_loss=True, of_images=of_images, of_logits=losses)


def _compute_of_logits(name: str, score: Callable[[Answers], float], answers: Answers) -> dict[str, float]:
    """A score by its name; NaN if logits are not finite."""
    is_finite = answers.logits is not None and np.isfinite(answers.logits).all()
    return {name: score(answers) if is_finite else float("nan")}


def _of_class(name: str, of: str, classes: Sequence[str] | None) -> Metric:
    """F1, precision or recall of one class.

    Raises:
        ValueError: if there is no such class.
    """
    if classes is not None and of not in classes:
        near = get_close_matches(of, classes, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(classes[:20])}."
        raise ValueError(f"The metric '{name}[{of}]' is of a class that is not there. {hint}")
    position = -1 if classes is None else classes.index(of)

    def of_counts(counts: Counts) -> np.ndarray:
        return scoring.of_each_class(name, counts)[:, position]

    full = f"{name}[{of}]"

    def compute(answers: Answers) -> dict[str, float]:
        return {full: float(of_counts(answers.counts)[0])}

    return Metric(full, False, compute, of_counts=of_counts, of_class=position)


def _of_function(function: Callable[[np.ndarray, np.ndarray], float]) -> Metric:
    """A user's function of logits and labels.

    Raises:
        ValueError: if it has the name of a metric that is computed here: one would pass for the other.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if name in (*NAMES, *multi_label.NAMES, *multi_label.ALIASES) or _TOP.fullmatch(name):
        raise ValueError(
            f"A function is called {name!r}, as a metric that is computed here: call it otherwise, as in "
            f"my_{name}, or set its `__name__`."
        )

    def score(answers: Answers) -> float:
        value = function(np.array(answers.logits), np.array(answers.labels))  # its own, whatever it does with them
        try:
            number = float(value) if np.ndim(value) == 0 and not isinstance(value, (str, bytes)) else None
        except TypeError:
            number = None
        if number is None:
            raise ValueError(f"The metric {name!r} is a function that gives one number; it gave {value!r}.")
        return number if math.isfinite(number) else math.nan

    is_loss = getattr(function, "greater_is_better", True) is False
    return Metric(name, True, partial(_compute_of_logits, name, score), is_loss=is_loss, function=function)


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


def _mean(of_images: Callable[[Answers], np.ndarray]) -> Callable[[Answers], float]:
    """A metric that is the mean of what each image adds."""
    return lambda answers: float(np.mean(of_images(answers)))


def _hits(answers: Answers) -> np.ndarray:
    """What is predicted right: bool `(samples,)`."""
    return answers.hits


def _top_hits(top: int, answers: Answers) -> np.ndarray:
    """Whether the label is among the best classes, the lower of equals first: bool `(samples,)`."""
    scores = np.asarray(answers.logits)
    of_label = np.take_along_axis(scores, answers.labels[:, None], axis=1)
    lower = np.arange(scores.shape[1]) < answers.labels[:, None]
    return np.asarray(((scores > of_label) | ((scores == of_label) & lower)).sum(axis=1) < top)


def _of_each_image(losses: Losses, answers: Answers) -> np.ndarray:
    """What each image adds by its logits, in float64: `(samples,)`."""
    by_class = np.array(np.asarray(answers.logits).T, dtype=np.float64, order="C")
    return losses(by_class[None], answers.labels)[0]


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minus the logarithm of the label's probability, as `Losses` has it."""
    ahead = logits - logits.max(axis=1, keepdims=True)
    of_label = ahead[:, labels, np.arange(len(labels))]
    return np.asarray(np.log(np.exp(ahead, out=ahead).sum(axis=1)) - of_label)


def _squared_errors(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The sum over classes of the squared errors of probabilities, for two classes half of it, as `Losses` has it."""
    errors = logits - logits.max(axis=1, keepdims=True)
    np.exp(errors, out=errors)
    errors /= errors.sum(axis=1, keepdims=True)
    errors[:, labels, np.arange(len(labels))] -= 1
    return np.asarray((errors**2).sum(axis=1)) / (2 if logits.shape[1] == 2 else 1)


def _calibration_error(answers: Answers) -> float:
    """The expected calibration error (Guo et al. 2017): `BINS` bins of confidence, each by its share of samples."""
    confidence = answers.probabilities.numpy().max(axis=1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, (answers.scores.numpy().argmax(axis=1) == answers.labels) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(answers.labels))


def _one_vs_rest(of_class: Callable[[np.ndarray, np.ndarray], float], answers: Answers) -> float:
    """The mean over the classes that have samples; NaN if there is only one such class.

    Args:
        of_class: the score of one class, from probabilities and whether a sample is of it: `(samples,)` each.
    """
    if answers.are_multi_label:  # ranked by logits: a sigmoid changes no order, but may make equals
        pairs = list(zip(answers.scores.numpy().T, answers.labels.T, strict=True))
        scores = [of_class(*pair) for pair in pairs if pair[1].any()]
        return float(np.mean([score for score in scores if not np.isnan(score)] or [np.nan]))
    counted, probabilities = np.unique(answers.labels), answers.probabilities.numpy()
    if len(counted) < 2:
        return float("nan")
    return float(np.mean([of_class(probabilities[:, label], answers.labels == label) for label in counted]))


def _roc_auc(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """How often a positive sample has a higher score than a negative one, of equals half; NaN if none is negative."""
    positive, negative = np.sort(scores[is_positive]), np.sort(scores[~is_positive])
    if not len(negative):
        return float("nan")
    lower = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(lower.sum() / (2 * len(positive) * len(negative)))


def _average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The mean over the positive samples of the share of positive ones among all with at least their score."""
    above, all_scores, positive = len(scores), np.sort(scores), np.sort(scores[is_positive])
    among = above - np.searchsorted(all_scores, positive, "left")
    right = len(positive) - np.searchsorted(positive, positive, "left")
    return float((right / among).mean())


def _of_counts(name: str) -> Callable[[Counts], np.ndarray]:
    """How a metric of predictions follows from counts."""
    return scoring.OF_COUNTS[scoring.ALIASES.get(name, name)]


# Metrics of predictions by name; F1, precision and recall are means over classes unless the name says otherwise.
OF_PREDICTIONS = (
    "accuracy",
    "balanced_accuracy",
    *(f"{name}{ending}" for name in ("f1", "precision", "recall") for ending in ("", "_macro", "_micro", "_weighted")),
    *("worst_recall", "mcc", "matthews_correlation"),
)

# What ranks the samples of a class.
_RANKING = {"roc_auc": _roc_auc, "average_precision": _average_precision}

# Other metrics of logits by name.
OF_LOGITS: Mapping[str, Callable[[Answers], float]] = {
    **{name: partial(_one_vs_rest, of_class) for name, of_class in _RANKING.items()},
    "calibration_error": _calibration_error,
}

# Of those that are means over images, what each image adds; less is better.
_OF_PROBABILITIES: Mapping[str, Losses] = {"log_loss": _losses, "brier_score": _squared_errors}

NAMES = (*OF_PREDICTIONS, "top5_accuracy", *_OF_PROBABILITIES, *OF_LOGITS)

# How many letters of a name are enough to ask whether it is meant.
SHORTEST = 3

_TOP = re.compile(r"top_?([1-9]\d*)_accuracy")
_OF_CLASS = re.compile(r"(recall|precision|f1)\[(.+)\]", re.IGNORECASE)
