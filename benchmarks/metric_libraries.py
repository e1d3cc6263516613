"""Two libraries that the reported metrics could come from, torchmetrics and scikit-learn: size, import and time.

10 000 images x 1 000 classes, one thread. Both give the same values.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distribution

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn import metrics as scikit_learn

from hf_radin.metrics.named import OF_LOGITS, OF_PREDICTIONS, Answers

# What each installs beside what this package has anyway (torch, numpy).
DISTRIBUTIONS = {
    "torchmetrics": ("torchmetrics", "lightning-utilities"),
    "scikit-learn": ("scikit-learn", "scipy", "joblib", "threadpoolctl"),
}
IMPORTS = {"torchmetrics": "torchmetrics.functional.classification", "scikit-learn": "sklearn.metrics"}


def megabytes(names: tuple[str, ...]) -> float:
    """What their files take on the disk."""
    files = [file.locate() for name in names for file in distribution(name).files or ()]
    return sum(os.path.getsize(file) for file in files if os.path.exists(file)) / 1e6


def import_seconds(module: str) -> float:
    """In a process that has torch and transformers already, as one that computed logits has: the median of five."""
    code = (
        "import time, torch, transformers; from transformers import ViTForImageClassification;"
        f"begun = time.perf_counter(); import {module}; print(time.perf_counter() - begun)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    return statistics.median(float(subprocess.check_output(command, encoding="utf-8")) for _ in range(5))


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
    answers = Answers(predictions, labels, settings.classes, logits)
    probabilities = answers.probabilities.numpy()
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
        "log_loss": lambda: scikit_learn.log_loss(labels, probabilities, labels=classes),
        "roc_auc": lambda: scikit_learn.roc_auc_score(is_class, probabilities, average="macro"),
        "average_precision": lambda: scikit_learn.average_precision_score(is_class, probabilities, average="macro"),
        "calibration_error": None,
    }
    print("| | torchmetrics | scikit-learn |\n|---|---:|---:|")
    sizes, imports = (
        [measure(names[library]) for library in ("torchmetrics", "scikit-learn")]
        for measure, names in ((megabytes, DISTRIBUTIONS), (import_seconds, IMPORTS))
    )
    print(f"| size on disk, with dependencies beside torch and numpy | {sizes[0]:.0f} MB | {sizes[1]:.0f} MB |")
    print(f"| import, after torch and transformers | {imports[0]:.1f} s | {imports[1]:.1f} s |")
    for name, reference in pairs.items():
        compute = OF_PREDICTIONS.get(name) or OF_LOGITS[name]
        ours, value = seconds(lambda compute=compute: compute(answers), settings.times)
        if reference is None:
            print(f"| {name} | {ours:.3f} s | has none |")
            continue
        theirs, expected = seconds(reference, settings.times)
        assert abs(value - expected) < 1e-5, (name, value, expected)
        print(f"| {name} | {ours:.3f} s | {theirs:.3f} s |", flush=True)


if __name__ == "__main__":
    main()
