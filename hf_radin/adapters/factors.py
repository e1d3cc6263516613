"""Sums of products of two matrices, and the nearest such sum of a lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_radin.checkpoints.lora import Factors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Reduced:
    """Factors of a lower rank, and what that lost.

    Args:
        lost: the square of the Frobenius norm of what the product has no more.
        whole: the square of the norm of the product that there was.
    """

    factors: Factors
    lost: float
    whole: float


def added(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """A weighted sum of products, as one product: ranks add up."""
    import torch

    down = torch.cat([factors.down for _, factors in parts])
    up = torch.cat([weight * factors.up for weight, factors in parts], dim=1)
    return replace(parts[0][1], down=down, up=up)


def largest_rank(factors: Factors) -> int:
    """The rank beyond which no matrix of this shape needs more."""
    return min(factors.up.shape[0], factors.down.shape[1])


def reduced(factors: Factors, rank: int) -> Reduced:
    """The nearest product of a rank, by the Frobenius norm; the same factors where theirs is not above it.

    It is computed from the factors alone: the product itself, which may be large, is not formed.

    Raises:
        ValueError: if a number of the factors is NaN or infinite.
    """
    import torch

    whole = float(((factors.up.T @ factors.up) * (factors.down @ factors.down.T)).sum())
    if factors.rank <= rank:
        return Reduced(factors, 0.0, max(whole, 0.0))
    (left, upper), (right, lower) = torch.linalg.qr(factors.up), torch.linalg.qr(factors.down.T)
    core = upper @ lower.T
    if not torch.isfinite(core).all():
        raise ValueError("it has numbers that are NaN or infinite, and no rank")
    rotation, values, other = torch.linalg.svd(core, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = left @ (rotation[:, :rank] * root), (root[:, None] * other[:rank]) @ right.T
    return Reduced(replace(factors, down=down, up=up), _squares(values[rank:]), _squares(values))


def bound(factors: Factors) -> float:
    """What no entry of the product is larger than, nor any number that comes up while it is added up."""
    return float((factors.up.abs().amax(0) * factors.down.abs().amax(1)).sum())


def _squares(values: torch.Tensor) -> float:
    return float((values**2).sum())
