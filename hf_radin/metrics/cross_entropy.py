"""Cross-entropies of logits to probabilities that are wanted, and the temperature at which they are least.

Where each image has one class, its probabilities are the softmax of its logits. Multi-label, each class is by itself
there or not, and its probability is the sigmoid of its logit z: the softmax of the two logits (z, 0). So what holds of
the classes of an image holds of the two of each pair of an image and a class, and the pairs of an image add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Images that are looked at together.
CHUNK = 1024

# Newton's steps to the best temperature, at most, and what is no step any more.
NEWTON, SMALL = 30, 1e-3


def probabilities(logits: torch.Tensor, *, multi_label: bool = False) -> torch.Tensor:
    """The probabilities that logits `(images, classes)` give the classes."""
    return logits.sigmoid() if multi_label else logits.softmax(1)


def taught_probabilities(
    teacher: torch.Tensor, labels: np.ndarray | None, share: float, *, multi_label: bool = False
) -> torch.Tensor:
    """Those of a teacher, of which labels have a share: `(images, classes)`.

    Args:
        teacher: logits `(images, classes)`.
        labels: of the images `(images,)`, multi-label bool `(images, classes)`; None if they have no part.
        share: that labels have.
    """
    import torch

    wanted = probabilities(teacher, multi_label=multi_label)
    if labels is not None and share:
        wanted *= 1 - share
        if multi_label:
            wanted += share * torch.from_numpy(labels).to(wanted)
        else:
            wanted[torch.arange(len(labels)), torch.from_numpy(labels)] += share
    return wanted


def compared(
    logits: torch.Tensor, wanted: torch.Tensor, *, multi_label: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies of logits to wanted probabilities, in nats, and the errors of their own ones.

    All are `(images, classes)`. The cross-entropy of an image is the sum over its classes; along its logits, its
    slopes are the errors.
    """
    import torch

    if multi_label:
        logs = torch.nn.functional.logsigmoid(logits)
        return (1 - wanted) * logits - logs, logs.exp() - wanted
    logs = logits.log_softmax(1)
    return -(wanted * logs), logs.exp() - wanted


def normalised(logits: torch.Tensor, *, multi_label: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithms of what probabilities are normalised by, and the probabilities `(images, classes)`.

    A cross-entropy is the logarithm, `(images, 1)` or multi-label `(images, classes)`, less the sum of wanted
    probabilities times logits: over images, that sum needs nothing of each image that changes with a linear head.
    """
    import torch

    if multi_label:
        return -torch.nn.functional.logsigmoid(-logits), logits.sigmoid()
    highest = logits.amax(1, keepdim=True)
    powers = (logits - highest).exp_()  # one exponential for each, where logsumexp and softmax take two
    sums = powers.sum(1, keepdim=True)
    return highest + sums.log(), powers.div_(sums)


def log_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minus the logarithm of the probability that images are given for their labels, in nats: float64 `(images,)`.

    Multi-label, of all that is to be said of an image the mean.

    Args:
        logits: `(images, classes)`.
        labels: `(images,)`, multi-label bool `(images, classes)`.
    """
    return _scaled(logits, labels, 1.0, labels.ndim == 2)[0]


def calibrated_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The same of logits that are multiplied by the number that makes their sum least (temperature scaling)."""
    multi_label = labels.ndim == 2
    return _scaled(logits, labels, best_scale(logits, labels, multi_label=multi_label), multi_label)[0]


def best_scale(logits: np.ndarray, wanted: np.ndarray, *, multi_label: bool = False) -> float:
    """The number by which logits are to be multiplied so that the sum of their cross-entropies is least.

    The sum is convex in that number (Guo et al., arXiv 1706.04599), and Newton's steps find it.

    Args:
        logits: `(images, classes)`.
        wanted: the labels of the images, as in `log_losses`, or the probabilities that they shall have `(images,
            classes)`.
    """
    scale = 1.0
    for _ in range(NEWTON):
        _, slopes, curvatures = _scaled(logits, wanted, scale, multi_label)
        with np.errstate(over="ignore"):  # however long a step is, the scale is at most halved or doubled
            step = slopes.sum() / max(float(curvatures.sum()), np.finfo(float).tiny)
        before, scale = scale, min(max(scale - step, scale / 2), scale * 2)
        if abs(scale - before) <= SMALL * scale:
            break
    return float(scale)


def _scaled(
    logits: np.ndarray, wanted: np.ndarray, scale: float, multi_label: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of logits that are multiplied by a number: cross-entropies to labels or probabilities, and their first and
    second derivatives by it `(images,)`."""
    results, of_chunk = np.zeros((3, len(logits))), _of_pairs if multi_label else _of_classes
    for chunk in _chunks(len(logits)):
        results[:, chunk] = of_chunk(logits[chunk].astype(np.float64), wanted[chunk], scale)
    losses, slopes, curvatures = results
    return losses, slopes, curvatures


def _of_classes(values: np.ndarray, targets: np.ndarray, scale: float) -> tuple[np.ndarray, ...]:
    """The same where each image has one class."""
    values -= values.max(1, keepdims=True)
    powers = np.exp(scale * values)
    right = values[np.arange(len(values)), targets] if targets.ndim == 1 else (targets * values).sum(1)
    sums = powers.sum(1)
    mean = (powers * values).sum(1) / sums
    return np.log(sums) - scale * right, mean - right, (powers * values**2).sum(1) / sums - mean**2


def _of_pairs(values: np.ndarray, targets: np.ndarray, scale: float) -> tuple[np.ndarray, ...]:
    """The same of multi-label images: means over classes."""
    chances = np.exp(-np.logaddexp(0.0, -scale * values))
    losses = np.logaddexp(0.0, scale * values) - targets * scale * values
    slopes, curvatures = (chances - targets) * values, chances * (1 - chances) * values**2
    return losses.mean(1), slopes.mean(1), curvatures.mean(1)


def _chunks(images: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, images, CHUNK))
