"""Whether checkpoints are fine-tunes of one start: how their weights lie to each other and to their mean."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Entries that are looked at of each tensor: a cosine over the tens of tensors of a model is then known to about 0.005.
ENTRIES = 4096

# Fine-tunes of one start have weights with a cosine above it, models of different starts below. Measured by
# `benchmarks/kinship.py`, over learning rates a factor of 25 apart: 0.67 at least, 0.013 at most.
KIN = 0.3


@dataclass(frozen=True)
class Weights:
    """A sample of one model's weights.

    Args:
        entries: of all trained matrices and kernels but the head's `(entries,)`, scaled so that their lengths and
            products stand for those of all. Norms and biases start alike in all models (of strangers their cosine is
            0.97 and more), and models of one start with heads of their own still make soup.
        broken: the first tensor with a NaN or infinite number; empty if there is none.
    """

    entries: np.ndarray
    broken: str = ""


@dataclass(frozen=True)
class Relation:
    """How one checkpoint lies to the family: the largest group whose weights are alike.

    Args:
        id: of the ingredient.
        is_kin: whether it belongs to the family.
        distance: of its weights to the mean of the family, in lengths of that mean.
        cosine: between its weights and that mean.
        nearest: the largest cosine between its weights and those of another member of the family, or of any other
            model if it is the whole family.
    """

    id: str
    is_kin: bool
    distance: float
    cosine: float
    nearest: float


def sample(model: PreTrainedModel, heads: Collection[str]) -> Weights:
    """Look at some entries of each tensor, the same ones in every model of an architecture.

    Args:
        heads: names of the tensors with an entry for each class.
    """
    import torch

    found, broken = [np.zeros(0, np.float32)], ""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            broken = broken or name
    for name, parameter in model.named_parameters():
        # fixed tables of positions are alike in all models
        if parameter.ndim > 1 and parameter.requires_grad and name not in heads:
            flat = parameter.detach().flatten()
            count = min(ENTRIES, len(flat))
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            chosen = torch.randint(len(flat), (count,), generator=generator) if count < len(flat) else slice(None)
            scale = (len(flat) / count) ** 0.5
            found.append(flat[chosen].float().numpy() * scale)
    return Weights(np.concatenate(found), broken)


def inner_products(weights: Sequence[Weights]) -> np.ndarray:
    """Of the differences from the mean of all, which are of length 1 on average: `(models, models)`."""
    rows = np.stack([one.entries for one in weights]).astype(np.float64)  # (models, entries)
    rows -= rows.mean(axis=0)
    found = rows @ rows.T
    return found / max(found.trace() / len(found), np.finfo(float).tiny)


def relate(weights: dict[str, Weights]) -> list[Relation]:
    """Find the family among models of one architecture, and how each lies to it.

    Two models are related if the cosine of their weights is above `KIN`, and so are relatives of relatives. The
    family is the largest group; of equal groups that of the first model.
    """
    ids = list(weights)
    rows = np.stack([one.entries for one in weights.values()]).astype(np.float64)  # (models, entries)
    cosines = _cosines(rows)
    family = _largest_group(cosines > KIN)
    mean = rows[family].mean(axis=0)
    length = max(float(np.linalg.norm(mean)), np.finfo(np.float64).tiny)
    relations = []
    for index, name in enumerate(ids):
        others = [one for one in family if one != index] or [one for one in range(len(ids)) if one != index]
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


def _cosines(rows: np.ndarray) -> np.ndarray:
    """Between all pairs of rows `(models, models)`; of a row of zeros, 1 to another such row and 0 to all else."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (models, 1)
    zero = lengths[:, 0] == 0
    unit = rows / np.where(lengths > 0, lengths, 1)
    return np.where(np.outer(zero, zero), 1.0, unit @ unit.T)


def _largest_group(related: np.ndarray) -> list[int]:
    """The largest set of models that are related, directly or through others, in order."""
    groups: list[set[int]] = []
    for index in range(len(related)):
        mine = {index, *np.flatnonzero(related[index]).tolist()}
        for group in [one for one in groups if one & mine]:
            groups.remove(group)
            mine |= group
        groups.append(mine)
    largest = max(groups, key=lambda group: (len(group), -min(group)))
    return sorted(largest)
