"""How much several models have in common: of their tensors, and of the work of a forward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from hf_radin.sharing.digests import TensorDigests, differing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Common:
    """What several models have in common.

    Args:
        models: their positions.
        tensors: how many tensors are the same in all of them.
        of: how many tensors a model has.
        share: of the numbers in all tensors of a model, those in the ones that are the same, in [0, 1].
        differing: the names of the other tensors.
    """

    models: tuple[int, ...]
    tensors: int
    of: int
    share: float
    differing: frozenset[str]

    @classmethod
    def to(cls, models: Sequence[TensorDigests], places: Sequence[int], sizes: Mapping[str, int]) -> Common:
        """What the models at some places have in common.

        Args:
            sizes: numbers in each tensor.
        """
        names = differing([models[place] for place in places])
        changed = sum(sizes[name] for name in names)
        share = 1 - changed / max(1, sum(sizes.values()))
        return cls((*places,), len(sizes) - len(names), len(sizes), share, names)


def groups(models: Sequence[TensorDigests], sizes: Mapping[str, int]) -> list[Common]:
    """What all of some models have in common, and then each group that has more, the deepest common part first.

    Two models are in a group if a chain of pairs links them that have as much in common each. Of a tree, whose
    branches go on with what they share, these are the branches.

    Args:
        models: two or more, of one architecture.
        sizes: numbers in each of their tensors, by name.
    """
    everything = Common.to(models, range(len(models)), sizes)
    pairs = [Common.to(models, pair, sizes) for pair in combinations(range(len(models)), 2)]
    pairs = sorted((pair for pair in pairs if pair.share > everything.share), key=lambda pair: -pair.share)
    group_of = {place: frozenset([place]) for place in range(len(models))}
    by_members: dict[frozenset[int], Common] = {}
    for place, pair in enumerate(pairs):
        merged = group_of[pair.models[0]] | group_of[pair.models[1]]
        group_of |= dict.fromkeys(merged, merged)
        is_last = place + 1 == len(pairs) or pairs[place + 1].share < pair.share
        for members in {*group_of.values()} if is_last else ():
            if len(members) > 1 and members not in by_members:
                by_members[members] = Common.to(models, sorted(members), sizes)
    return [everything, *(common for common in by_members.values() if common.share > everything.share)]


def any_in_common(models: Sequence[TensorDigests]) -> bool:
    """Whether two models that are next to each other, sorted by `TensorDigests.order`, have a tensor in common."""
    return any(len(differing(pair)) < len(pair[0].by_name) for pair in pairwise(models))


@dataclass(frozen=True)
class PassOrder:
    """How far a forward pass is when each module begins.

    Args:
        begun: shares of the pass, in [0, 1], by the name of the module, by multiplications in products of matrices
            and convolutions, as torch counts them.
    """

    begun: Mapping[str, float]

    @classmethod
    def of(cls, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> PassOrder:
        """Of a model.

        Args:
            model: in evaluation mode.
            batch: its inputs by name, `(images, ...)` each.
        """
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        begun = {"": 0}

        def begin(name: str, module: torch.nn.Module, inputs: tuple[object, ...]) -> None:
            begun.setdefault(name, counter.get_total_flops())

        with ExitStack() as stack:
            for name, module in model.named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(partial(begin, name)).remove)
            stack.enter_context(torch.no_grad())
            counter = stack.enter_context(FlopCounterMode(display=False))
            model(**batch)
        total = max(1, counter.get_total_flops())
        return cls({name: flops / total for name, flops in begun.items()})

    def before(self, names: Collection[str]) -> float:
        """The share of a pass that is over before the first module begins that has a tensor of one of these names."""
        return min((self.begun[_running(name, self.begun)] for name in names), default=1.0)

    def work(self, models: Sequence[TensorDigests]) -> float:
        """What a pass through several models takes at most, in passes of one, if what they have in common runs once.

        Args:
            models: each after the one that it has most in common with, as they are sorted by `TensorDigests.order`.
        """
        return len(models) - sum(self.before(differing(pair)) for pair in pairwise(models))


def _running(name: str, begun: Mapping[str, float]) -> str:
    """The innermost module that was called and has the tensor of this name, its own or that of a part."""
    while name:
        name = name.rpartition(".")[0]
        if name in begun:
            break
    return name
