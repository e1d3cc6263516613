"""Metrics of multi-label classifiers, which say of each class by itself whether an image has it.

Their answers are *decisions*, one for each pair of an image and a class: yes if the logit is above 0, which is a
probability above one half. Accuracy is ambiguous there, so it is called by what it counts: `label_accuracy` is the
share of right decisions, `subset_accuracy` that of images of which all decisions are right. Log loss and Brier score
are means over all pairs. F1, precision and recall of a class are those of its decisions; a mean over classes (macro)
is one over those that some image has or, for F1, precision and recall, is said to have. ROC AUC and average precision
(mAP) rank the images by each class: means over the classes that some images have and, for ROC AUC, others have not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.recipes.scoring import Counts, Losses, of_each_class

if TYPE_CHECKING:
    from hf_radin.metrics.named import Answers

# What a logit is more than where a class is there.
THRESHOLD = 0.0


def decisions_of(logits: np.ndarray) -> np.ndarray:
    """Which classes are there by logits `(samples, classes)`: int8, 1 or 0, and -1 for an image with one that is no
    finite number."""
    return np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits > THRESHOLD, -1).astype(np.int8)


def weighted_counts(answers: Answers, weights: np.ndarray) -> Counts:
    """The counts of decisions, each image with a weight: `(rows, classes)` of weights `(rows, samples)`."""
    labels, yes = answers.labels, answers.predictions == 1
    parts = (weights @ values.astype(np.float64) for values in (yes & labels, yes, labels))
    return Counts(*parts)


def macro(name: str, counts: Counts) -> np.ndarray:
    """The mean of F1, precision or recall over the classes that are true or predicted: `(recipes,)`."""
    scores = of_each_class(name, counts)
    return scores.sum(axis=1) / np.maximum((counts.predicted + counts.true > 0).sum(axis=1), 1)


def micro(name: str, counts: Counts) -> np.ndarray:
    """F1, precision or recall of all decisions alike: `(recipes,)`."""
    sums = [np.sum(values, axis=-1, keepdims=True) for values in (counts.hits, counts.predicted, counts.true)]
    return of_each_class(name, Counts(*sums))[:, 0]


def weighted(name: str, counts: Counts) -> np.ndarray:
    """The mean of F1, precision or recall over classes, weighted by how many images have them: `(recipes,)`."""
    scores = of_each_class(name, counts)
    return (scores * counts.true).sum(axis=1) / np.maximum(np.sum(counts.true, axis=-1), 1)


def worst_recall(counts: Counts) -> np.ndarray:
    """The least share that is found of a class that some image has; 0 if there is none: `(recipes,)`."""
    recalls = np.where(counts.true > 0, of_each_class("recall", counts), np.inf).min(axis=1)
    return np.where(np.isfinite(recalls), recalls, 0.0)


def right_decisions(answers: Answers) -> np.ndarray:
    """Of each image the share of classes that are decided right: `(samples,)`."""
    return np.asarray(answers.hits.mean(axis=1))


def all_right(answers: Answers) -> np.ndarray:
    """Whether all classes of an image are decided right: bool `(samples,)`."""
    return np.asarray(answers.hits.all(axis=1))


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean over classes of minus the logarithm of the probability of what is right, as `Losses` has it."""
    wrong = np.where(labels.T, -logits, logits)
    return (np.maximum(wrong, 0) + np.log1p(np.exp(-np.abs(wrong)))).mean(axis=1)


def squared_errors(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean over classes of the squared error of the probability, as `Losses` has it."""
    wrong = np.where(labels.T, -logits, logits)
    small = np.exp(-np.abs(wrong))  # the probability of what is wrong is a sigmoid: no large number is raised
    return ((np.where(wrong > 0, 1, small) / (1 + small)) ** 2).mean(axis=1)


# What follows from counts of decisions.
OF_COUNTS: Mapping[str, Callable[[Counts], np.ndarray]] = {
    "worst_recall": worst_recall,
    **{
        f"{name}{ending}": partial(average, name)
        for name in ("f1", "precision", "recall")
        for ending, average in (("", macro), ("_macro", macro), ("_micro", micro), ("_weighted", weighted))
    },
}

# What is a mean over images, of probabilities.
OF_PROBABILITIES: Mapping[str, Losses] = {"log_loss": losses, "brier_score": squared_errors}

# Ranks the images of each class.
RANKING = ("roc_auc", "average_precision")

NAMES = ("label_accuracy", "subset_accuracy", *OF_COUNTS, *OF_PROBABILITIES, *RANKING)

# Other names of these.
ALIASES = {"accuracy": "label_accuracy", "map": "average_precision", "cross_entropy": "log_loss"}
