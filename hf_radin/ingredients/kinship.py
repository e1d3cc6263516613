"""Whether checkpoints are fine-tunes of one start, by the angles between their weights."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.sharing.digests import TensorDigests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Entries that are sampled of each tensor. Over the tens of tensors of a model, cosines are then exact to about 0.005.
ENTRIES = 4096

# The cosine of weights is above this for fine-tunes of one start, and below for models of different starts. By
# `benchmarks/kinship.py`, over learning rates a factor of 25 apart, it is at least 0.67 and at most 0.013.
KIN = 0.3

# How many times the median distance from the mean of all is far off: a run that diverged, or learnt much faster.
FAR = 2.0

# The cosine of heads is above this where they began alike, and below where each was drawn for itself. In four sweeps
# of fine-tunes with heads of their own it is 0.16 to 0.38, as features that are alike teach them alike; in two with a
# shared head it is 0.97 at least.
HEAD_KIN = 0.7


@dataclass(frozen=True)
class Weights:
    """A sample of one model's weights.

    Args:
        entries: sampled from all trained matrices and kernels but the head's `(entries,)`, and scaled so that lengths
            and products estimate those of all entries. Norms and biases are left out because they start alike in all
            models (with different starts their cosine is 0.97 and more), the head because models of one start with
            different heads still make a soup.
        broken: name of the first tensor with a NaN or infinite number; empty if there is none.
        head: sampled in the same way from the matrices with an entry for each class `(entries,)`.
        statistics: SHA-256 of all BatchNorm statistics; empty if there are none.
        names, digests: of all parameters and buffers, and the hash of each (`TensorDigests`), in UTF-8 `(tensors,)`.
    """

    entries: np.ndarray
    broken: str = ""
    head: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    statistics: str = ""
    names: np.ndarray = field(default_factory=lambda: np.zeros(0, bytes))
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, bytes))


@dataclass(frozen=True)
class Cosines:
    """How alike models are that are least alike: the least cosine of any two.

    Args:
        heads: of their heads.
        bodies: of all else.
    """

    heads: float
    bodies: float

    @property
    def is_one_start(self) -> bool:
        """Whether the heads share their start."""
        return self.heads > HEAD_KIN


@dataclass(frozen=True)
class Relation:
    """How a checkpoint is related to the family: the largest group with similar weights.

    Args:
        id: of the ingredient.
        is_kin: whether it belongs to the family.
        distance: of its weights from the mean of the family, relative to the length of that mean.
        cosine: between its weights and that mean.
        nearest: the largest cosine between its weights and those of another member of the family, or of any other
            model if the family has no other member.
    """

    id: str
    is_kin: bool
    distance: float
    cosine: float
    nearest: float


def sample(model: PreTrainedModel, heads: Collection[str]) -> Weights:
    """Sample entries of each tensor, the same ones for every model of an architecture.

    Args:
        heads: names of the tensors with an entry for each class.
    """
    import torch

    head, entries, broken = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)], ""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            broken = broken or name
    for name, parameter in model.named_parameters():
        # fixed position tables don't require gradients: they are the same in all models
        if parameter.ndim > 1 and parameter.requires_grad:
            flat = parameter.detach().flatten()
            count = min(ENTRIES, len(flat))
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            indices = torch.randint(len(flat), (count,), generator=generator) if count < len(flat) else slice(None)
            scale = (len(flat) / count) ** 0.5
            (head if name in heads else entries).append(flat[indices].float().numpy() * scale)
    digests, statistics = TensorDigests.of(model).by_name, _hash_statistics(model)
    names, hashes = (np.array([text.encode() for text in texts]) for texts in (digests, digests.values()))
    return Weights(np.concatenate(entries), broken, np.concatenate(head), statistics, names, hashes)


def least_cosines(weights: Sequence[Weights]) -> Cosines:
    """How alike those of the models are that are least alike."""
    heads = np.stack([model_weights.head for model_weights in weights]).astype(np.float64)
    return Cosines(float(_cosines(heads).min()), float(_cosines(_rows(weights)).min()))


def _hash_statistics(model: PreTrainedModel) -> str:
    """The SHA-256 of what BatchNorm layers have learnt of their inputs; empty if there are none."""
    digest, count = hashlib.sha256(), 0
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            digest.update(name.encode() + buffer.float().cpu().numpy().tobytes())
            count += 1
    return digest.hexdigest() if count else ""


def inner_products(weights: Sequence[Weights]) -> np.ndarray:
    """Inner products `(models, models)` of the models' differences from their mean, scaled to a mean square of 1."""
    rows = _rows(weights)
    rows -= rows.mean(axis=0)
    products = rows @ rows.T
    return products / max(products.trace() / len(products), np.finfo(float).tiny)


def find_far_off(products: np.ndarray) -> dict[int, float]:
    """The models that are at least `FAR` times as far from the mean of all as the median model is, and how far.

    Args:
        products: of all pairs of models, as `inner_products` gives them.
    """
    distances = np.sqrt(np.maximum(products.diagonal(), 0))
    median = max(float(np.median(distances)), np.finfo(float).tiny)
    return {int(place): float(distances[place] / median) for place in np.flatnonzero(distances >= FAR * median)}


def relate(weights: dict[str, Weights]) -> list[Relation]:
    """Find the family among models of one architecture, and how each model is related to it.

    Two models are kin if the cosine of their weights is above `KIN`, or if both are kin to a third. The family is the
    largest group of kin; of several such groups, the one with the first model.

    Args:
        weights: by the ids of the ingredients.
    """
    rows = _rows(weights.values())
    cosines = _cosines(rows)
    family = _largest_group(cosines > KIN)
    mean = rows[family].mean(axis=0)
    length = max(float(np.linalg.norm(mean)), np.finfo(np.float64).tiny)
    relations = []
    for index, name in enumerate(weights):
        others = [member for member in family if member != index] or [*range(index), *range(index + 1, len(rows))]
        relations.append(
            Relation(
                id=name,
                is_kin=index in family,
                distance=float(np.linalg.norm(rows[index] - mean)) / length,
                cosine=float(_cosines(np.stack([rows[index], mean]))[0, 1]),
                nearest=float(cosines[index, others].max()),
            )
        )
    return relations


def _rows(weights: Iterable[Weights]) -> np.ndarray:
    """The entries of each model, float64 `(models, entries)`."""
    return np.stack([model_weights.entries for model_weights in weights]).astype(np.float64)


def _cosines(rows: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of rows `(models, models)`; of rows of zeros, 1 with each other and 0 with all others."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (models, 1)
    zero = lengths[:, 0] == 0
    unit = rows / np.where(lengths > 0, lengths, 1)
    return np.where(np.outer(zero, zero), 1.0, unit @ unit.T)


def _largest_group(related: np.ndarray) -> list[int]:
    """The largest set of models that are related, directly or through others, in order.

    Args:
        related: whether two models are `(models, models)`.
    """
    groups: list[set[int]] = []
    for index in range(len(related)):
        merged = {index, *np.flatnonzero(related[index]).tolist()}
        for group in [group for group in groups if group & merged]:
            groups.remove(group)
            merged |= group
        groups.append(merged)
    largest = max(groups, key=lambda group: (len(group), -min(group)))
    return sorted(largest)
