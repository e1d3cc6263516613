"""Metrics by their names in the evaluate library, of predicted classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# evaluate's own defaults are for two classes; averaged over classes these mean something for any number of them.
_OPTIONS = {name: {"average": "macro"} for name in ("f1", "precision", "recall")}


def load_metrics(names: Iterable[str]) -> dict[str, Any]:
    """Metric modules of the evaluate library by name; `accuracy` comes with this package and needs no network.

    Raises:
        ValueError: if one can't be loaded.
    """
    import evaluate

    loaded = {}
    if not names:
        raise ValueError("No metric is named; `accuracy` is one.")
    for name in [names] if isinstance(names, str) else names:
        path = str(Path(__file__).parent / "metrics" / "accuracy") if name == "accuracy" else name
        try:
            loaded[name] = evaluate.load(path, keep_in_memory=True)
        except Exception as error:  # a script from outside may fail in any way
            said = str(error).rstrip(".")
            raise ValueError(
                f"The metric {name!r} can't be loaded by evaluate: {said}. Its script comes from the Hub; offline, "
                "give the path of a folder that holds one. 'accuracy' needs none."
            ) from error
        try:
            compute_metrics({name: loaded[name]}, np.array([0, 1, 2]), np.array([0, 1, 1]))
        except Exception as error:
            raise ValueError(f"The metric {name!r} can't be computed from predicted classes alone: {error}") from error
    return loaded


def compute_metrics(metrics: dict[str, Any], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of predicted classes `(samples,)` against the true ones."""
    scores: dict[str, float] = {}
    for name, metric in metrics.items():
        options = _OPTIONS.get(Path(name).name, {})
        found = metric.compute(predictions=predictions, references=np.asarray(labels), **options)
        scores.update({key: float(value) for key, value in found.items() if np.ndim(value) == 0})
    return scores


def only_score(metrics: dict[str, Any], predictions: np.ndarray, labels: np.ndarray) -> float:
    """What a metric gives for predicted classes `(samples,)`.

    Raises:
        ValueError: if it gives several scores, or none.
    """
    scores = compute_metrics(metrics, predictions, labels)
    if len(scores) != 1:
        found = ", ".join(scores) or "no number"
        raise ValueError(f"The metric {next(iter(metrics))!r} gives {found}: it takes one score to rank recipes.")
    return next(iter(scores.values()))
