"""Metrics of the evaluate library by name or by the folder of a script, of predicted classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


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
