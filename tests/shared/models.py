"""Models as torch lets anybody watch them: a hook sees each call, and may stop it. Nothing is replaced."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class LinearClassifier(torch.nn.Module):
    """A linear classifier that is called as those of transformers are.

    Args:
        weight: `(classes, values)`.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.weight.dtype

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Of images `(images, values)`."""
        return ImageClassifierOutput(logits=torch.nn.functional.linear(pixel_values, self.weight))


@contextmanager
def watched(on_call: Callable[[int], None]) -> Iterator[None]:
    """Hear of each call of an image classifier in this process, whoever makes it.

    Args:
        on_call: is told, after each call, how many images the model was shown; what it raises ends the call.
    """

    def hear(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, PreTrainedModel) and hasattr(output, "logits"):
            on_call(len(output.logits))

    handle = register_module_forward_hook(hear)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def calls_of(is_counted: Callable[[torch.nn.Module], bool]) -> Iterator[list[int]]:
    """How many images each call of such modules is shown in this process, whoever makes it.

    Args:
        is_counted: says of a module whether its calls are heard.
    """
    sizes: list[int] = []

    def hear(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if is_counted(module):
            sizes.append(len(inputs[0]))

    handle = register_module_forward_hook(hear)
    try:
        yield sizes
    finally:
        handle.remove()


def is_convolution(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Conv2d)


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


@contextmanager
def interrupted(calls: int, *, least: int = 2) -> Iterator[None]:
    """Ctrl-C while a model runs, after so many calls.

    Args:
        least: calls with fewer images don't count: each model is tried with one image before the first pass.
    """
    made = 0

    def count(images: int) -> None:
        nonlocal made
        made += images >= least
        if made > calls:
            raise KeyboardInterrupt

    with watched(count):
        yield


@contextmanager
def little_memory(images: int) -> Iterator[None]:
    """A device that lacks memory for convolutions of more images, and says so as CUDA does."""

    def refuse(module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, torch.nn.Conv2d) and len(inputs[0]) > images:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
