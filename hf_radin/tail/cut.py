"""Where a model can be cut in two, so that what lies behind the cut, its tail, runs without what lies in front of it.

Nothing is known of an architecture by its name. The model's own code runs, with stand-ins for the modules in front of
the cut, which give at once what they gave for other images. Where the logits depend on nothing but what the first
module behind the cut is given, they are those of the whole model: a cut is a place where that has been seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# How near the logits of a tail come to those of the model, relative to how far those of two images are apart: they are
# the same sums. And how far apart these are at least, relative to the largest, or rounding errors would be all.
NEAR, APART = 1e-2, 1e-3


class CutError(ValueError):
    """A model that can't be cut in two."""


@dataclass(frozen=True)
class Cut:
    """A place in the forward pass, behind which logits depend on nothing but what a module there is given.

    Args:
        module: the name of this module, the first behind the cut.
        front: names of the modules in front of it that have stand-ins.
        shape: of what the module is given of an image.
        tensors: names of the parameters behind the cut.
        parameters: how many numbers these are.
        share: of the model's multiplications, that which is behind the cut, in [0, 1].
    """

    module: str
    front: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    parameters: int
    share: float

    @property
    def width(self) -> int:
        """How many numbers the module is given of an image."""
        return prod(self.shape)


def find_cuts(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], *, behind: Collection[str] = ()
) -> Iterator[Cut]:
    """The places where a model can be cut, from the last one on, each with more parameters behind it than before.

    Args:
        model: in evaluation mode; none of its parameters takes a gradient meanwhile.
        batch: two images that the model tells apart, by name `(images, ...)` each, on the model's device.
        behind: names of parameters and buffers; where a module in front has one of them nobody needs to look.

    Raises:
        CutError: if the model gives both the same logits.
    """
    import torch

    with _frozen(model):
        turned = _turned(batch)
        trace, others = _Trace.of(model, batch), _Trace.of(model, turned)
        apart = float((trace.logits - others.logits).abs().max())
        if not apart > APART * float(trace.logits.abs().max()):
            raise CutError(f"{type(model).__name__} gives all images the same logits: there is nothing to teach.")
        total, times = multiplications(lambda: model(**batch)), Counter(call.name for call in trace.calls)
        known: set[str] = set()
        places = (name.split(".") for name in behind)
        modules = {".".join(parts[:depth]) for parts in places for depth in range(1, len(parts))}
        for place, call in reversed([*enumerate(trace.calls)]):
            is_of_images = isinstance(call.input, torch.Tensor) and len(call.input) == len(trace.logits)
            if times[call.name] > 1 or not is_of_images:
                continue
            front = trace.front(place)
            if modules & front.keys():
                continue
            run = partial(run_tail, model, call.name, others.outputs(front), turned, call.input)
            if not _gives(run, trace.logits, NEAR * apart):
                continue
            tensors = _parameters_of(model, run)
            if tensors.keys() <= known or _is_tied(model, tensors, front):
                continue
            known |= tensors.keys()
            count = sum(parameter.numel() for parameter in tensors.values())
            share = multiplications(run) / max(1, total)
            yield Cut(call.name, (*front,), (*call.input.shape[1:],), (*tensors,), count, share)


@contextmanager
def open_tail(
    model: PreTrainedModel, cut: Cut, batch: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """What is behind a cut, as a function from what its first module is given to the logits, float32.

    Args:
        batch: as many images as the function will be given at a time, whatever they show; see `find_cuts`.
    """
    import torch

    outputs: dict[str, list[Any]] = {name: [] for name in cut.front}
    is_behind: list[bool] = []

    def note(name: str, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not is_behind:
            outputs[name].append(output)

    with ExitStack() as stack, torch.no_grad():
        first = model.get_submodule(cut.module)
        stack.callback(first.register_forward_pre_hook(lambda module, inputs: is_behind.append(True)).remove)
        for name in cut.front:
            hook = model.get_submodule(name).register_forward_hook(partial(note, name))
            stack.callback(hook.remove)
        model(**batch)
    yield partial(run_tail, model, cut.module, outputs, batch)


def run_tail(
    model: PreTrainedModel,
    name: str,
    outputs: Mapping[str, Sequence[Any]],
    batch: Mapping[str, torch.Tensor],
    given: torch.Tensor,
) -> torch.Tensor:
    """The logits of a model, float32, whose module of this name is given a tensor.

    Args:
        outputs: what each module in front of it gave, call by call.
        batch: that they gave this for.
    """
    is_behind: list[bool] = []

    def enter(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        is_behind.append(True)
        return (given, *inputs[1:])

    def stand_in(forward: Callable[..., Any], answers: Iterator[Any], *args: Any, **options: Any) -> Any:
        return forward(*args, **options) if is_behind else next(answers)

    with ExitStack() as stack:
        first = model.get_submodule(name)
        stack.callback(first.register_forward_pre_hook(enter, prepend=True).remove)  # others see what it is given
        for front, answers in outputs.items():
            module: Any = model.get_submodule(front)
            module.forward = partial(stand_in, module.forward, iter(answers))
            stack.callback(delattr, module, "forward")
        return _logits(model(**batch))


def _gives(run: Callable[[], torch.Tensor], logits: torch.Tensor, tolerance: float) -> bool:
    """Whether a tail gives these logits."""
    import torch

    try:
        with torch.no_grad():
            return bool((run() - logits).abs().max() <= tolerance)
    except Exception:  # each architecture fails in its own way where stand-ins don't fit together
        return False


@dataclass(eq=False)
class _Call:
    """A module that was called.

    Args:
        name: in the model.
        within: names of the modules that were running.
        input: a copy of the first that it was given, as it was then.
        output: that it gave.
    """

    name: str
    within: tuple[str, ...]
    input: Any
    output: Any = None


@dataclass(eq=False)
class _Trace:
    """The calls of a forward pass, in the order in which they began, and its logits."""

    calls: list[_Call] = field(default_factory=list)
    logits: Any = None

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> _Trace:
        """Run a model on a batch."""
        import torch

        trace, running = cls(), list[_Call]()

        def begin(name: str, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            first = inputs[0].clone() if inputs and isinstance(inputs[0], torch.Tensor) else None
            running.append(_Call(name, tuple(call.name for call in running), first))
            trace.calls.append(running[-1])

        def end(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            running.pop().output = output

        with ExitStack() as stack, torch.no_grad():
            for name, module in model.named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(partial(begin, name), prepend=True).remove)
                    stack.callback(module.register_forward_hook(end).remove)
            trace.logits = _logits(model(**batch))
        return trace

    def front(self, place: int) -> dict[str, int]:
        """The outermost modules that ended before a call began, and how often each was called until then."""
        within = {*self.calls[place].within}
        earlier = (call for call in self.calls[:place] if call.name not in within and {*call.within} <= within)
        return Counter(call.name for call in earlier)

    def outputs(self, front: Mapping[str, int]) -> dict[str, list[Any]]:
        """What the first calls of modules gave, of each so many as it says there."""
        return {
            name: [call.output for call in self.calls if call.name == name][:count] for name, count in front.items()
        }


def _turned(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same images, each in the place of another."""
    return {name: value.roll(1, 0) for name, value in batch.items()}


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """None of a model's parameters takes a gradient meanwhile."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


def _logits(output: Any) -> torch.Tensor:
    """The logits of a model's output, as `forward.batch_logits` has them, where they are and with their gradient."""
    logits: torch.Tensor = output.logits if "logits" in output else output[0]
    return logits.float()


def _parameters_of(model: PreTrainedModel, run: Callable[[], torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """The parameters that what a function gives depends on, by name."""
    import torch

    named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    with torch.enable_grad():
        model.requires_grad_(True)
        slopes = torch.autograd.grad(run().sum(), [*named.values()], allow_unused=True)
        model.requires_grad_(False)
    return {
        name: parameter for (name, parameter), slope in zip(named.items(), slopes, strict=True) if slope is not None
    }


def _is_tied(model: PreTrainedModel, tensors: Mapping[str, torch.nn.Parameter], front: Mapping[str, int]) -> bool:
    """Whether a parameter behind a cut is one of a module in front of it, too, which would change with it."""
    behind = {id(parameter) for parameter in tensors.values()}
    return any(id(parameter) in behind for name in front for parameter in model.get_submodule(name).parameters())


def multiplications(run: Callable[[], object]) -> int:
    """How many multiplications and additions products of matrices and convolutions take, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
