"""Scores of scikit-learn, under the names that they have here."""

import numpy as np
from sklearn import metrics


def averaged_scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """F1, precision and recall, as means over classes and otherwise."""
    averages = (("", "macro"), ("_macro", "macro"), ("_micro", "micro"), ("_weighted", "weighted"))
    return {
        name + ending: getattr(metrics, f"{name}_score")(labels, predictions, average=average, zero_division=0)
        for name in ("f1", "precision", "recall")
        for ending, average in averages
    }
