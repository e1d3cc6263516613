"""How long the reported metrics take, beside scikit-learn's, which give the same values.

10 000 images x 1 000 classes, one thread. scikit-learn is given probabilities, here the softmax is part of the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn import metrics as scikit_learn

from hf_radin.metrics.named import Answers, Metric, load_metrics, only_score


def seconds(run: Callable[[], float], times: int) -> tuple[float, float]:
    """The median of some runs, and the value."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        value = float(run())
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--times", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, settings.classes, settings.images)
    logits = generator.standard_normal((settings.images, settings.classes)).astype(np.float32)
    logits[np.arange(settings.images), labels] += 3
    predictions = logits.argmax(axis=1)
    probabilities = Answers(predictions, labels, settings.classes, logits).probabilities.numpy()
    classes = np.arange(settings.classes)
    is_class = labels[:, None] == classes
    macro = {"average": "macro", "zero_division": 0}
    pairs = {
        "f1": lambda: scikit_learn.f1_score(labels, predictions, **macro),
        "precision": lambda: scikit_learn.precision_score(labels, predictions, **macro),
        "recall": lambda: scikit_learn.recall_score(labels, predictions, **macro),
        "balanced_accuracy": lambda: scikit_learn.balanced_accuracy_score(labels, predictions),
        "mcc": lambda: scikit_learn.matthews_corrcoef(labels, predictions),
        "top5_accuracy": lambda: scikit_learn.top_k_accuracy_score(labels, probabilities, k=5, labels=classes),
        "brier_score": lambda: scikit_learn.brier_score_loss(labels, probabilities, labels=classes),
        "log_loss": lambda: scikit_learn.log_loss(labels, probabilities, labels=classes),
        "roc_auc": lambda: scikit_learn.roc_auc_score(is_class, probabilities, average="macro"),
        "average_precision": lambda: scikit_learn.average_precision_score(is_class, probabilities, average="macro"),
        "calibration_error": None,
    }
    print("| | hf_radin | scikit-learn |\n|---|---:|---:|")
    for name, reference in pairs.items():
        (metric,) = load_metrics(name)

        def score(metric: Metric = metric) -> float:
            # answers anew, so that nothing is known of them from another metric
            return only_score(metric, Answers(predictions, labels, settings.classes, logits))

        ours, value = seconds(score, settings.times)
        if reference is None:
            print(f"| {name} | {1000 * ours:,.1f} ms | has none |")
            continue
        theirs, expected = seconds(reference, settings.times)
        assert abs(value - expected) < 1e-5, (name, value, expected)
        print(f"| {name} | {1000 * ours:,.1f} ms | {1000 * theirs:,.1f} ms |", flush=True)


if __name__ == "__main__":
    main()
