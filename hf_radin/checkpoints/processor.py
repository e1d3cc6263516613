"""Image processors, and whether two of them make the same pixels of an image, whatever their files say."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hf_radin.checkpoints.fields import comparable, flattened

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

# Prepared images that differ by less are the same but for rounding. If a pixel is brighter by one, they differ by a
# hundred times as much and more.
TOLERANCE = 1e-5

# Widths and heights of the images that two processors are compared by where there are no real ones: upright and
# across, one smaller and two larger than what most models take.
_SIZES = ((300, 420), (97, 61), (640, 480))


@dataclass(frozen=True)
class ProcessorDifference:
    """How the image processor of a checkpoint differs from that of most.

    Args:
        text: the fields that differ, in words, with both checkpoints.
        is_same: whether it makes the same pixels nevertheless; None if neither takes the images of the comparison.
        only_resizes: whether it makes the same pixels of an image that has the size already that the other makes.
    """

    text: str
    is_same: bool | None
    only_resizes: bool


def prepare_image(
    processor: BaseImageProcessor, image: Image.Image | torch.Tensor | list[Image.Image | torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The inputs of a model for one image, without the batch dimension; for a list of images of one size, with it.

    As in `pipeline("image-classification")`, an image becomes upright RGB by `load_image`. It goes through the
    processor alone, so that the result does not depend on other images. A list goes through it in one call: that this
    makes no difference is for the caller to see.

    Args:
        image: of any mode and orientation; or upright RGB pixels, uint8 `(3, height, width)`, for a processor of
            transformers' torchvision backend, which makes such pixels of every image first; or a list of either.

    Raises:
        TypeError: for pixels and another processor.
        ValueError: if the processor keeps the shape of images, and would make too large a one of this long strip; or
            if the images of a list have different sizes.
    """
    if not isinstance(image, list):
        prepared = processor(images=_upright(processor, image), return_tensors="pt")
        return {name: value[0] for name, value in prepared.items()}
    images = [_upright(processor, each) for each in image]
    if len({each.size if isinstance(each, Image.Image) else each.shape for each in images}) > 1:
        raise ValueError("Images of different sizes are prepared one by one: some are padded to the largest.")
    return dict(processor(images=images, return_tensors="pt"))


def _upright(processor: BaseImageProcessor, image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
    """What a processor is given for an image. Arguments and errors as of `prepare_image`."""
    from transformers.image_utils import load_image

    sides = getattr(processor, "size", None) or {}
    edge = sides.get("shortest_edge") if isinstance(sides, Mapping) else getattr(sides, "shortest_edge", None)
    is_image = isinstance(image, Image.Image)
    width, height = image.size if is_image else (image.shape[2], image.shape[1])
    limit, ratio = Image.MAX_IMAGE_PIXELS, max(width, height) / max(min(width, height), 1)
    if edge and limit and edge * edge * ratio > limit:
        raise ValueError(
            f"an image of {width:,} x {height:,} pixels would be resized to {edge:,} x "
            f"{round(edge * ratio):,}, more than Pillow's limit of {limit:,} (PIL.Image.MAX_IMAGE_PIXELS, "
            "--max-image-pixels)"
        )
    if not is_image and getattr(processor, "backend", None) != "torchvision":
        raise TypeError(f"{type(processor).__name__} is given pixels, and takes images only.")
    return load_image(image) if is_image else image


def describe_processor(processor: BaseImageProcessor) -> dict[str, Any]:
    """All that decides about the pixels: fields, backend and version of transformers (transformers#28180, #43017)."""
    import transformers

    fields = {name: value for name, value in processor.to_dict().items() if name.strip("_") != "name_or_path"}
    return {
        **fields,
        "backend": getattr(processor, "backend", None) or type(processor).__name__,
        "transformers": transformers.__version__,
    }


def find_processor_differences(processors: Mapping[str, BaseImageProcessor]) -> dict[str, ProcessorDifference]:
    """The image processors whose fields are not those of most, compared by what they make of made-up images.

    Args:
        processors: by the id of the checkpoint.

    Returns:
        By the id of the checkpoint.
    """
    texts = {name: _as_text(processor) for name, processor in processors.items()}
    if len(set(texts.values())) < 2:
        return {}
    common = Counter(texts.values()).most_common(1)[0][0]
    reference_name = next(name for name, text in texts.items() if text == common)
    reference, images = processors[reference_name], made_up_images()
    resized = _resize_as(reference, images)
    compared: dict[str, tuple[bool | None, bool]] = {}
    differences = {}
    for name, text in texts.items():
        if text == common:
            continue
        processor = processors[name]
        if text not in compared:
            is_same = make_same_pixels(processor, reference, images)
            compared[text] = is_same, bool(make_same_pixels(processor, reference, resized))
        words = f"{name} differs from {reference_name} in {describe_difference(processor, reference)}"
        differences[name] = ProcessorDifference(words, *compared[text])
    return differences


def read_alike(processors: Iterable[BaseImageProcessor]) -> bool:
    """Whether all image processors have the same fields."""
    return len(set(map(_as_text, processors))) == 1


def check_same_pixels(processors: Mapping[str, BaseImageProcessor], images: Sequence[Image.Image]) -> None:
    """Check that image processors make the pixels of the first, which prepares the images for all checkpoints.

    Args:
        processors: by the id of the checkpoint.
        images: of the split, of different sizes and shapes.

    Raises:
        ValueError: if a processor makes other pixels of them.
    """
    (first, reference), *others = processors.items()
    compared = {_as_text(reference)}
    for name, processor in others:
        text = _as_text(processor)
        if text in compared:
            continue
        compared.add(text)
        if make_same_pixels(processor, reference, images) is False:
            raise ValueError(
                f"The image processor of {name} makes other pixels of images of the split than that of {first}. They "
                f"differ in {describe_difference(processor, reference)}. Leave it out, or name one for all with "
                "image_processor=... (--image-processor ID)."
            )


def check_processor(processor: BaseImageProcessor, described: Mapping[str, Any]) -> None:
    """Check that an image processor is the one that was described (`describe_processor`).

    Raises:
        ValueError: if it prepares images differently. Another version of transformers may describe the same processor
            differently: then there is just a warning.
    """
    ignored = ("transformers", "backend", "image_processor_type", "processor_class")
    now = describe_processor(processor)
    before_text, now_text = (
        json.dumps({name: value for name, value in fields.items() if name not in ignored}, sort_keys=True, default=str)
        for fields in (described, now)
    )
    if before_text == now_text:
        return
    if described.get("transformers") != now["transformers"]:
        logger.warning("Another version of transformers describes the image processor differently; it may differ.")
        return
    before = _rebuilt(described)
    if before is None or not make_same_pixels(processor, before, made_up_images()):
        raise ValueError("The image processor is not the one that the logits were computed with. Restore it.")


def _rebuilt(described: Mapping[str, Any]) -> BaseImageProcessor | None:
    """The image processor of this version of transformers that fits a description; None if there is none."""
    import transformers

    processor_class = getattr(transformers, str(described.get("image_processor_type")), None)
    try:
        fields = {name: value for name, value in described.items() if name not in ("backend", "transformers")}
        return processor_class.from_dict(fields) if processor_class else None
    except Exception:  # it does not take these fields
        return None


def make_same_pixels(
    processor: BaseImageProcessor, reference: BaseImageProcessor, images: Iterable[Image.Image]
) -> bool | None:
    """Whether two processors make the same of images, but for rounding; None if neither takes any of them."""
    answers = [_is_same(_prepared(processor, image), _prepared(reference, image)) for image in images]
    known = [answer for answer in answers if answer is not None]
    return all(known) if known else None


def describe_difference(processor: BaseImageProcessor, reference: BaseImageProcessor) -> str:
    """The fields in which two processors differ, with both values, in words."""
    fields, others = _fields(processor), _fields(reference)
    names = [name for name in sorted(fields.keys() | others.keys()) if fields.get(name) != others.get(name)]
    texts = [
        f"image processor's {name}: {fields.get(name, 'none')} against {others.get(name, 'none')}" for name in names
    ]
    return "; ".join(texts[:8]) + (f"; and {len(texts) - 8} more" if texts[8:] else "")


def _as_text(processor: BaseImageProcessor) -> str:
    """The fields of a processor as text: equal texts are equal processors."""
    return json.dumps(_fields(processor), sort_keys=True)


def _fields(processor: BaseImageProcessor) -> dict[str, str]:
    """The fields of a processor in comparable form, with its class (without the backend) among them.

    If the class is code of the checkpoint, so is its module: classes of one name may do different things.
    """
    cls = type(processor)
    fields: dict[str, Any] = flattened(processor.to_dict())
    for name in ("image_processor_type", "processor_class", "name_or_path", "_name_or_path"):
        fields.pop(name, None)
    fields["class"] = re.sub(r"(Fast|Pil)$", "", cls.__name__)
    if cls.__module__.startswith("transformers_modules."):
        fields["code"] = cls.__module__
    return {name: comparable(value) for name, value in fields.items() if value is not None}


def _prepared(processor: BaseImageProcessor, image: Image.Image) -> dict[str, np.ndarray] | None:
    """The arrays that a processor makes of an image; None if it does not take it."""
    try:
        return {name: np.asarray(value) for name, value in prepare_image(processor, image).items()}
    except Exception:  # each processor has its own errors
        return None


def _is_same(prepared: dict[str, np.ndarray] | None, reference: dict[str, np.ndarray] | None) -> bool | None:
    if prepared is None or reference is None:
        return None if prepared is reference else False
    shapes, reference_shapes = (
        {name: value.shape for name, value in arrays.items()} for arrays in (prepared, reference)
    )
    if shapes != reference_shapes:
        return False
    return all(
        np.allclose(value, reference[name], rtol=0, atol=TOLERANCE, equal_nan=True) for name, value in prepared.items()
    )


def _resize_as(processor: BaseImageProcessor, images: Sequence[Image.Image]) -> list[Image.Image]:
    """The first image in the size that a processor makes of images; none if it makes no images."""
    prepared = next(filter(None, (_prepared(processor, image) for image in images)), {})
    shapes = [value.shape for value in prepared.values() if value.ndim == 3]
    return [images[0].resize((shape[2], shape[1])) for shape in shapes[:1]]


def made_up_images() -> list[Image.Image]:
    """Images of different sizes and shapes, of noise that any two ways to resize treat differently."""
    generator = np.random.default_rng(0)
    return [_noise(generator, width, height) for width, height in _SIZES]


def made_up_image(config: PretrainedConfig) -> Image.Image:
    """A made-up image of the size that a model takes, since processors of images of one size need not resize them.

    It is a small one of any size if the configuration does not say which.
    """
    sides = getattr(config, "image_size", None)
    if isinstance(sides, int):
        sides = (sides, sides)
    width, height = min(_SIZES)
    if isinstance(sides, list | tuple) and len(sides) == 2:
        height, width = sides
    return _noise(np.random.default_rng(0), width, height)


def _noise(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
