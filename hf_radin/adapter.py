"""One model: images in, logits out."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hf_radin import checkpoint, lora, modeling
from hf_radin.ingredients import Ingredient

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from PIL.Image import Image
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


logger = logging.getLogger(__name__)


def load(ingredient: Ingredient, dtype: torch.dtype) -> PreTrainedModel:
    """The ingredient's model on the CPU, its weights in `dtype`, its classes in the order of `labels`.

    Raises:
        ValueError: if a weight is missing or has the wrong shape.
    """
    folder = ingredient.download()
    config = ingredient.config
    options: dict[str, Any] = {
        "dtype": dtype,
        "config": config,
        "allow_pickle": ingredient.allow_pickle,
        "trust_remote_code": ingredient.trust_remote_code,
    }
    if ingredient.base is None:
        model = modeling.load_model(folder, **options)
    else:
        model = lora.load_merged(folder, ingredient.base.folder, header=checkpoint.read_header(folder), **options)
    if ingredient.order is not None:
        _permute(model, ingredient.order, trust_remote_code=ingredient.trust_remote_code)
    return model


def _permute(model: PreTrainedModel, order: tuple[int, ...], *, trust_remote_code: bool) -> None:
    """Bring the classes of a model into another order, in the weights of its heads, and so in its logits."""
    import torch

    tensors = model.state_dict()
    for name, axis in modeling.class_axes(model.config, trust_remote_code=trust_remote_code).items():
        tensors[name].copy_(tensors[name].index_select(axis, torch.tensor(order)))


def prepare(processor: BaseImageProcessor, image: Image) -> dict[str, torch.Tensor]:
    """What a model takes for one image of any mode and orientation, without the batch dimension.

    The image becomes upright RGB by the same function as in `pipeline("image-classification")`, and goes through the
    processor alone, as there: what comes out does not depend on its neighbours.
    """
    from transformers.image_utils import load_image

    return {name: value[0] for name, value in processor(images=load_image(image), return_tensors="pt").items()}


def describe(processor: BaseImageProcessor) -> dict[str, Any]:
    """All that decides about the pixels: configuration, backend and version (transformers#28180, #43017)."""
    import transformers

    return {
        **processor.to_dict(),
        "backend": getattr(processor, "backend", None) or type(processor).__name__,
        "transformers": transformers.__version__,
    }


def check_processor(processor: BaseImageProcessor, described: dict[str, Any]) -> None:
    """Hold an image processor to what was once described.

    Raises:
        ValueError: if it prepares images otherwise. Of another version of transformers, which may describe the same
            processor in other words, there is just a warning.
    """
    own = ("transformers", "backend", "image_processor_type", "processor_class")
    texts = [
        json.dumps({name: value for name, value in one.items() if name not in own}, sort_keys=True, default=str)
        for one in (described, describe(processor))
    ]
    if texts[0] == texts[1]:
        return
    if described.get("transformers") == describe(processor)["transformers"]:
        raise ValueError("The image processor is not the one that the logits were computed with. Restore it.")
    logger.warning("Another version of transformers describes the image processor in other words; it may differ.")


def forward(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    *,
    batch_size: int,
    accelerator: Accelerator,
    autocast: bool = True,
) -> torch.Tensor:
    """Logits of prepared images: float32 `(samples, classes)` on the CPU.

    Args:
        model: in evaluation mode, on the accelerator's device.
        inputs: by name, `(samples, ...)` on the CPU.
        autocast: whether the accelerator's mixed precision applies.
    """
    import torch

    samples = len(next(iter(inputs.values())))
    logits = []
    with torch.inference_mode():
        for start in range(0, samples, batch_size):
            batch = {
                name: value[start : start + batch_size].to(
                    accelerator.device, model.dtype if value.is_floating_point() else None, non_blocking=True
                )
                for name, value in inputs.items()
            }
            with accelerator.autocast() if autocast else nullcontext():
                output = model(**batch)
            found = output.logits if "logits" in output else output[0]  # pp_lcnet calls them otherwise
            logits.append(found.float().cpu())  # (batch, classes)
    return torch.cat(logits)
