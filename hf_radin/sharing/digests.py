"""Which tensors several models have in common, to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Characters of a tensor's SHA-256 that are kept: 128 bits, so that no two tensors ever have the same by chance.
LENGTH = 32


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers of a model by name; a tensor that has two names is there twice."""
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


@dataclass(frozen=True)
class TensorDigests:
    """A hash of each parameter and buffer of a model: of its dtype, its shape and its bits.

    Args:
        by_name: the hashes.
    """

    by_name: Mapping[str, str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> TensorDigests:
        """Of a model on the CPU."""
        import torch

        digests: dict[str, str] = {}
        for name, tensor in named_tensors(model):
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            sha256 = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            sha256.update(content)
            digests[name] = sha256.hexdigest()[:LENGTH]
        return cls(digests)

    @property
    def order(self) -> tuple[str, ...]:
        """What models are sorted by: those that share their first layers are next to each other."""
        return tuple(self.by_name.values())


def differing(models: Sequence[TensorDigests]) -> frozenset[str]:
    """The names of tensors that not all models have alike."""
    first, *others = (model.by_name for model in models)
    names = {name for model in models for name in model.by_name}
    return frozenset(name for name in names if any(model.get(name) != first.get(name) for model in others))
