"""Tensors that several models have in common are held in memory once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hf_radin.sharing.digests import TensorDigests, named_tensors

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")


def held_once(models: Iterable[Model], digests: Iterable[TensorDigests]) -> Iterator[Model]:
    """Models, one by one, that use the very same tensor where they have the same: that of the first.

    Args:
        models: on one device; each may be loaded when its turn comes.
        digests: of the tensors of each.
    """
    held: dict[tuple[str, str], torch.Tensor] = {}
    for model, tensors in zip(models, digests, strict=True):
        for name, tensor in [*named_tensors(model)]:
            if name in tensors.by_name:
                shared = held.setdefault((name, tensors.by_name[name]), tensor)
                if shared is not tensor:
                    _put(model, name, shared)
        yield model


def count_together(digests: Sequence[TensorDigests], sizes: Mapping[str, int], *, room: int) -> int:
    """How many models, from the first on, fit into so many bytes, if what they have in common is held once.

    Args:
        digests: of the tensors of each.
        sizes: bytes of each tensor, the same in all models.
        room: bytes.
    """
    held: set[tuple[str, str]] = set()
    for count, tensors in enumerate(digests):
        held |= {*tensors.by_name.items()}
        if count and sum(sizes.get(name, 0) for name, _ in held) > room:
            return count
    return len(digests)


def sizes_of(model: torch.nn.Module) -> dict[str, int]:
    """The bytes of each tensor of a model; one that has two names has 0 by the second."""
    sizes: dict[str, int] = {}
    counted: set[int] = set()
    for name, tensor in named_tensors(model):
        sizes[name] = 0 if id(tensor) in counted else tensor.nbytes
        counted.add(id(tensor))
    return sizes


def _put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a model another tensor in the place of one of its own."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    place: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    place[leaf] = tensor
