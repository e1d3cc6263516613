"""One model: images in, logits out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_radin.images.pixels import Pixels

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """How models run: what decides about the last bits of their logits, and how fast they come.

    Args:
        dtype: of the weights.
        batch_size: images in a forward pass.
        channels_last: whether images lie in memory pixel by pixel, which convolutions on GPUs like.
        compiled: whether `torch.compile` is used.
    """

    accelerator: Accelerator
    dtype: torch.dtype
    batch_size: int
    channels_last: bool = False
    compiled: bool = False

    def ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model, on the device."""
        import torch

        model.to(self.accelerator.device, self.dtype)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compiled:
            model.compile()  # in place: the module keeps its names
        return model

    def logits(
        self, models: Sequence[PreTrainedModel], inputs: Mapping[str, torch.Tensor | Pixels]
    ) -> list[np.ndarray]:
        """Of each model, float32 `(samples, classes)`."""
        options = {"batch_size": self.batch_size, "accelerator": self.accelerator}
        return [one.numpy() for one in forward(models, inputs, channels_last=self.channels_last, **options)]


def forward(
    models: Sequence[PreTrainedModel],
    inputs: Mapping[str, torch.Tensor | Pixels],
    *,
    batch_size: int,
    accelerator: Accelerator,
    autocast: bool = True,
    channels_last: bool = False,
) -> list[torch.Tensor]:
    """Logits of prepared images, of each model: float32 `(samples, classes)` on the CPU.

    Args:
        models: in evaluation mode, on the accelerator's device, of one dtype.
        inputs: by name, `(samples, ...)` on the CPU; each batch goes to the device once for all models.
        batch_size: images in a forward pass; halved where that many don't fit into memory.
        autocast: whether the accelerator's mixed precision applies.
        channels_last: whether images are given to the models in this memory format.
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    samples = len(next(iter(inputs.values())))
    logits: list[list[torch.Tensor]] = [[] for _ in models]
    start = 0
    with torch.inference_mode():
        while start < samples:
            batch = {
                name: _to_device(value[start : start + batch_size], accelerator.device, models[0].dtype, channels_last)
                for name, value in inputs.items()
            }
            try:
                found = [
                    _logits(model, batch, accelerator.autocast() if autocast else nullcontext()) for model in models
                ]
            except Exception as error:
                if batch_size == 1 or not should_reduce_batch_size(error):
                    raise
                batch_size //= 2
                _say_halved(batch_size)
                continue
            for one, more in zip(logits, found, strict=True):
                one.append(more)
            start += batch_size
    return [torch.cat(found) for found in logits]


def _logits(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], context: AbstractContextManager[Any]
) -> torch.Tensor:
    """Of one batch: float32 `(batch, classes)` on the CPU."""
    with context:
        output = model(**batch)
    return (output.logits if "logits" in output else output[0]).float().cpu()  # pp_lcnet calls them otherwise


@cache
def _say_halved(batch_size: int) -> None:
    """Once, not for each block."""
    logger.warning("Out of memory: going on with %d images in a forward pass.", batch_size)


def _to_device(
    value: torch.Tensor | Pixels, device: torch.device, dtype: torch.dtype, channels_last: bool
) -> torch.Tensor:
    """A tensor of its own, wherever it came from: its place in memory may decide the last bit of a product."""
    import torch

    if device.type == "cuda":
        value = value.pin_memory()
    found = value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
    if found.device.type == "cpu" and not isinstance(value, Pixels):
        found = found.clone()
    return found.contiguous(memory_format=torch.channels_last) if channels_last and found.ndim == 4 else found
