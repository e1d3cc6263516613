"""Forward passes of models that share their images: prepared images in, logits out.

How a model is run decides about the last bits of its logits: dtype, batch size, memory format and compilation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_radin.images.pixels import Pixels
from hf_radin.sharing.replay import SharedModules

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

# The dtypes of mixed precision that torch alone can give, by accelerate's names.
AUTOCAST = {"no": None, "bf16": "bfloat16", "fp16": "float16"}

# Images that show which modules several models need to run only once; another one shows that it is so.
LEARNT = 2


@dataclass(frozen=True)
class Running:
    """How models run.

    Args:
        accelerator: has the device, and the mixed precision.
        dtype: of the weights.
        batch_size: images in a forward pass.
        channels_last: whether images are in memory pixel by pixel, which is faster for convolutions on GPUs.
        compiled: whether `torch.compile` is used. What is compiled for a model runs all models like it.
        mixed_precision: by accelerate's name of it; by default the accelerator's.
    """

    accelerator: Accelerator
    dtype: torch.dtype
    batch_size: int
    channels_last: bool = False
    compiled: bool = False
    mixed_precision: str | None = None

    def ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model on the device, to be run so."""
        import torch

        model.to(self.accelerator.device, self.dtype)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compiled:
            model.compile()  # in place: the module keeps its names
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """In which models run with this mixed precision.

        Raises:
            ValueError: if only the accelerator could give it, and has another.
        """
        import torch

        usual = str(self.accelerator.mixed_precision)
        wanted = usual if self.mixed_precision is None else self.mixed_precision
        if wanted == usual:
            return self.accelerator.autocast()
        if wanted not in AUTOCAST:
            raise ValueError(
                f"The mixed precision {wanted!r} takes an accelerator that has it, and this one has {usual!r}: "
                f"accelerate launch --mixed_precision {wanted}."
            )
        name = AUTOCAST[wanted]
        dtype = None if name is None else getattr(torch, name)
        return torch.autocast(self.accelerator.device.type, dtype, enabled=name is not None)

    def logits(
        self,
        models: Sequence[PreTrainedModel],
        inputs: Mapping[str, torch.Tensor | Pixels],
        shared: SharedModules | None = None,
    ) -> list[np.ndarray]:
        """The logits of each model for prepared images, float32 `(samples, classes)`; `shared` as in `forward`."""
        logits = forward(
            models,
            inputs,
            batch_size=self.batch_size,
            accelerator=self.accelerator,
            context=self.autocast,
            channels_last=self.channels_last,
            shared=shared,
        )
        return [tensor.numpy() for tensor in logits]

    def learn(self, shared: SharedModules, inputs: Mapping[str, torch.Tensor | Pixels]) -> bool:
        """Let models that share learn what that saves, on prepared images; returns whether it saves anything.

        Args:
            inputs: as of `logits`, of `LEARNT` images and one more.
        """
        import torch

        device, layout = self.accelerator.device, self.channels_last

        def run(images: slice) -> Callable[[PreTrainedModel], torch.Tensor]:
            batch = {name: _to_device(value[images], device, self.dtype, layout) for name, value in inputs.items()}
            return lambda model: batch_logits(model, batch, self.accelerator.autocast())

        with torch.no_grad():
            return shared.learn(run(slice(LEARNT)), run(slice(LEARNT, None)))


def forward(
    models: Sequence[PreTrainedModel],
    inputs: Mapping[str, torch.Tensor | Pixels],
    *,
    batch_size: int,
    accelerator: Accelerator,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
    shared: SharedModules | None = None,
) -> list[torch.Tensor]:
    """The logits of each model for prepared images, float32 `(samples, classes)` on the CPU.

    Args:
        models: in evaluation mode, on the accelerator's device, of one dtype.
        inputs: by name, `(samples, ...)` on the CPU; each batch goes to the device once for all models.
        batch_size: images in a forward pass; halved if that many don't fit into memory.
        context: in which a model is called, as with mixed precision.
        channels_last: whether images are given to the models in this memory format.
        shared: what these models have in common, which is run once.
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    samples = len(next(iter(inputs.values())))
    logits: list[list[torch.Tensor]] = [[] for _ in models]
    start = 0
    # of shared modules it has to be known whether their outputs are changed in place, which inference mode forgets
    with torch.inference_mode() if shared is None else torch.no_grad():
        while start < samples:
            batch = {
                name: _to_device(value[start : start + batch_size], accelerator.device, models[0].dtype, channels_last)
                for name, value in inputs.items()
            }

            def run(model: PreTrainedModel, batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
                return batch_logits(model, batch, context())

            try:
                of_models = [run(model) for model in models] if shared is None else shared.run(models, run)
            except Exception as error:
                if batch_size == 1 or not should_reduce_batch_size(error):
                    raise
                batch_size //= 2
                _warn_of_batch_size(batch_size)
                continue
            for batches, of_batch in zip(logits, of_models, strict=True):
                batches.append(of_batch)
            start += batch_size
    return [torch.cat(batches) for batches in logits]


def batch_logits(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], context: AbstractContextManager[Any]
) -> torch.Tensor:
    """The logits of one batch, float32 `(batch, classes)` on the CPU."""
    with context:
        output = model(**batch)
    return (output.logits if "logits" in output else output[0]).float().cpu()  # pp_lcnet has another name for them


@cache
def _warn_of_batch_size(batch_size: int) -> None:
    """Warn of each size once, not again for each block of images."""
    logger.warning("Out of memory: going on with %d images in a forward pass.", batch_size)


def _to_device(
    value: torch.Tensor | Pixels, device: torch.device, dtype: torch.dtype, channels_last: bool
) -> torch.Tensor:
    """A copy of a batch on the device: on a CPU its alignment in memory may decide the last bit of a product."""
    import torch

    if device.type == "cuda":
        value = value.pin_memory()
    tensor = value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
    if tensor.device.type == "cpu" and not isinstance(value, Pixels):
        tensor = tensor.clone()
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor
