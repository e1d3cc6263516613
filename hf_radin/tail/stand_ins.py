"""The tail of a model for any number of images at a time, which gives what the whole model gives to the last bit.

What stands in for the modules in front of the cut has the right shape and nothing else: the logits don't depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.forward import Running
from hf_radin.tail.choose import made_batch
from hf_radin.tail.cut import Cut, CutError, run_tail

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# The argument of a tail, in the place of the model's own.
GIVEN = "given"

# Images that show how what modules give depends on the number of images; and as many more as show that it is so.
PAIR, TRIPLE = 2, 3


@dataclass(frozen=True, eq=False)
class StandIns:
    """What a forward pass consists of in front of a cut.

    Args:
        batch: what the model is given, by name.
        given: what the first module behind the cut is given.
        outputs: what each module in front gives, call by call.
    """

    batch: Mapping[str, torch.Tensor]
    given: torch.Tensor
    outputs: Mapping[str, list[Any]]


@dataclass(frozen=True, eq=False)
class Tail:
    """What is behind a cut, to be called like the model, with what the first module there is given: `given=...`.

    Args:
        model: whose tail it is.
        cut: where it begins.
        pair, triple: what was in front of it for so many images.
    """

    model: PreTrainedModel
    cut: Cut
    pair: StandIns
    triple: StandIns

    @classmethod
    def of(cls, model: PreTrainedModel, cut: Cut, running: Running, example: Mapping[str, torch.Tensor]) -> Tail:
        """The tail of a model that is ready to run.

        Args:
            example: an image, prepared, without the batch dimension.

        Raises:
            CutError: if its logits are not those of the whole model to the last bit.
        """
        import numpy as np

        running = replace(running, batch_size=PAIR + TRIPLE)
        images = made_batch(example, model.main_input_name, PAIR + TRIPLE)
        parts = [
            {name: value[part] for name, value in images.items()}
            for part in (slice(PAIR), slice(PAIR, None), slice(None))
        ]
        seen: list[StandIns] = []
        with _noted(model, cut, seen):
            expected = [running.logits([model], part)[0] for part in parts]
        try:
            tail = cls(model, cut, seen[0], seen[1])
            as_model: Any = tail
            answers = [running.logits([as_model], {GIVEN: part.given.cpu()})[0] for part in seen]
        except Exception as error:  # each architecture fails in its own way where stand-ins don't fit together
            raise CutError(f"{type(model).__name__}: its tail from {cut.module} on does not run alone.") from error
        if not all(map(np.array_equal, answers, expected)):
            raise CutError(f"{type(model).__name__}: its tail from {cut.module} on gives other logits than all of it.")
        return tail

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as a model says it."""
        return self.model.dtype

    def __call__(self, given: torch.Tensor) -> Any:
        """What the model gives for these images.

        Args:
            given: `(images, ...)`, on the model's device.
        """
        from transformers.utils import ModelOutput

        images = len(given)
        outputs = _for_images(self.pair.outputs, self.triple.outputs, images)
        batch = _for_images(self.pair.batch, self.triple.batch, images)
        laid_out = _laid_out(given.to(self.pair.given.dtype), self.pair.given)
        return ModelOutput(logits=run_tail(self.model, self.cut.module, outputs, batch, laid_out))


@contextmanager
def recorded(model: PreTrainedModel, module: str) -> Iterator[list[torch.Tensor]]:
    """What a module of a model is given meanwhile, batch by batch, on the CPU; it is called once for each.

    A batch that failed, as for want of memory, does not count.
    """
    import torch

    batches: list[torch.Tensor] = []
    waiting: list[torch.Tensor] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:  # what comes later may change it in place
        waiting[:] = [inputs[0].detach().cpu().clone(memory_format=torch.contiguous_format)]

    with ExitStack() as stack:
        stack.callback(model.get_submodule(module).register_forward_pre_hook(note).remove)
        stack.callback(model.register_forward_hook(lambda *call: batches.append(waiting.pop())).remove)
        yield batches


@contextmanager
def _noted(model: PreTrainedModel, cut: Cut, seen: list[StandIns]) -> Iterator[None]:
    """Add what was in front of a cut to a list meanwhile, for each call of a model."""
    outputs: dict[str, list[Any]] = {}
    batches: list[Mapping[str, torch.Tensor]] = []
    given: list[torch.Tensor] = []

    def begin(module: torch.nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        outputs.clear()
        outputs.update({name: [] for name in cut.front})
        batches.append(options)

    def enter(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(inputs[0].detach().clone())
        seen.append(StandIns(batches[-1], given[-1], {name: [*answers] for name, answers in outputs.items()}))

    def end(name: str, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs[name].append(output)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(model.get_submodule(cut.module).register_forward_pre_hook(enter).remove)
        for name in cut.front:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(end, name)).remove)
        yield


def _for_images(pair: Any, triple: Any, images: int) -> Any:
    """What is like two things for any number of images.

    Args:
        pair, triple: for so many images: tensors, and tuples, lists and mappings of them.

    Raises:
        CutError: if it can't be said how they depend on the number of images.
    """
    import torch

    if isinstance(pair, torch.Tensor):
        for axis, (size, larger) in enumerate(zip(pair.shape, triple.shape, strict=True)):
            if each := larger - size:
                first = pair.narrow(axis, 0, each)
                if each == 1:  # nothing is copied
                    return first.expand([images if at == axis else -1 for at in range(pair.ndim)])
                return first.repeat([images if at == axis else 1 for at in range(pair.ndim)])
        return pair
    if isinstance(pair, Mapping):
        kind: Any = type(pair)
        return kind(**{name: _for_images(value, triple[name], images) for name, value in pair.items()})
    if isinstance(pair, (tuple, list)):
        return type(pair)(_for_images(value, other, images) for value, other in zip(pair, triple, strict=True))
    if pair != triple:
        raise CutError(f"{pair!r} for {PAIR} images, and {triple!r} for {TRIPLE}.")
    return pair


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor whose axes lie in memory as another's do, on which the last bits of what is made of it may depend."""
    order = sorted(range(like.ndim), key=lambda axis: -like.stride(axis))
    return tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(like.ndim)])
