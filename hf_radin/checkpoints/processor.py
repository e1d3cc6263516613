"""Image processors: two are the same if they make the same pixels, whatever their files say."""

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
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

# Of what a processor makes of an image, a difference that is rounding: a pixel that is one brighter gives a hundred
# times as much and more.
TOLERANCE = 1e-5

# Widths and heights of the images that two processors are tried with where there are no real ones: both shapes, one
# smaller and one larger than what most models take.
_SIZES = ((300, 420), (97, 61), (640, 480))


@dataclass(frozen=True)
class ProcessorDifference:
    """What sets the image processor of an ingredient apart from that of most.

    Args:
        text: the fields that differ, in words, with both ingredients.
        is_same: whether it makes the same pixels all the same; None if neither takes the images they were tried with.
        only_resizes: whether it does so of an image that has the size already that the other makes.
    """

    text: str
    is_same: bool | None
    only_resizes: bool


def prepare_image(processor: BaseImageProcessor, image: Image.Image) -> dict[str, torch.Tensor]:
    """What a model takes for one image of any mode and orientation, without the batch dimension.

    The image becomes upright RGB by the same function as in `pipeline("image-classification")`, and goes through the
    processor alone, as there: what comes out does not depend on its neighbours.
    """
    from transformers.image_utils import load_image

    return {name: value[0] for name, value in processor(images=load_image(image), return_tensors="pt").items()}


def describe_processor(processor: BaseImageProcessor) -> dict[str, Any]:
    """All that decides about the pixels: configuration, backend and version (transformers#28180, #43017)."""
    import transformers

    said = {name: value for name, value in processor.to_dict().items() if name.strip("_") != "name_or_path"}
    return {
        **said,
        "backend": getattr(processor, "backend", None) or type(processor).__name__,
        "transformers": transformers.__version__,
    }


def find_processor_differences(processors: Mapping[str, BaseImageProcessor]) -> dict[str, ProcessorDifference]:
    """The image processors that read differently from most, by the id of their checkpoint, and what trying them gave.

    Args:
        processors: by the id of the checkpoint.
    """
    readings = {name: _reading(processor) for name, processor in processors.items()}
    if len(set(readings.values())) < 2:
        return {}
    common = Counter(readings.values()).most_common(1)[0][0]
    reference = next(name for name, reading in readings.items() if reading == common)
    tried: dict[str, tuple[bool | None, bool]] = {common: (True, True)}
    for name, reading in readings.items():
        if reading not in tried:
            two, images = (processors[name], processors[reference]), _made_up_images()
            of_its_size = _of_size_made(processors[reference], images)
            tried[reading] = (make_same_pixels(*two, images), bool(make_same_pixels(*two, of_its_size)))
    return {
        name: ProcessorDifference(
            f"{name} differs from {reference} in {describe_difference(processors[name], processors[reference])}",
            *tried[reading],
        )
        for name, reading in readings.items()
        if reading != common
    }


def read_alike(processors: Iterable[BaseImageProcessor]) -> bool:
    """Whether all image processors say the same of themselves."""
    return len(set(map(_reading, processors))) == 1


def check_same_pixels(processors: Mapping[str, BaseImageProcessor], images: Sequence[Image.Image]) -> None:
    """Hold image processors to the first of them, which prepares the images for all checkpoints.

    Args:
        processors: by the id of the checkpoint.
        images: of the split, of different sizes and shapes.

    Raises:
        ValueError: if one makes other pixels of them.
    """
    (first, reference), *others = processors.items()
    tried = {_reading(reference)}
    for name, processor in others:
        reading = _reading(processor)
        if reading in tried:
            continue
        tried.add(reading)
        if make_same_pixels(processor, reference, images) is False:
            raise ValueError(
                f"The image processor of {name} makes other pixels of images of the split than that of {first}. They "
                f"differ in {describe_difference(processor, reference)}. Leave it out, or name one for all with "
                "image_processor=... (--image-processor ID)."
            )


def check_processor(processor: BaseImageProcessor, described: Mapping[str, Any]) -> None:
    """Hold an image processor to what was once described (`describe_processor`).

    Raises:
        ValueError: if it prepares images otherwise. Of another version of transformers, which may describe the same
            processor in other words, there is just a warning.
    """
    own = ("transformers", "backend", "image_processor_type", "processor_class")
    now = describe_processor(processor)
    texts = [
        json.dumps({name: value for name, value in fields.items() if name not in own}, sort_keys=True, default=str)
        for fields in (described, now)
    ]
    if texts[0] == texts[1]:
        return
    if described.get("transformers") != now["transformers"]:
        logger.warning("Another version of transformers describes the image processor in other words; it may differ.")
        return
    before = _rebuilt(described)
    if before is None or not make_same_pixels(processor, before, _made_up_images()):
        raise ValueError("The image processor is not the one that the logits were computed with. Restore it.")


def _rebuilt(described: Mapping[str, Any]) -> BaseImageProcessor | None:
    """The image processor of transformers that was described so; None if it is none, or none of this version."""
    import transformers

    processor_class = getattr(transformers, str(described.get("image_processor_type")), None)
    try:
        fields = {name: value for name, value in described.items() if name not in ("backend", "transformers")}
        return processor_class.from_dict(fields) if processor_class else None
    except Exception:  # fields that it does not take
        return None


def make_same_pixels(
    processor: BaseImageProcessor, reference: BaseImageProcessor, images: Iterable[Image.Image]
) -> bool | None:
    """Whether two processors make the same of these images, but for rounding; None if neither takes any of them."""
    answers = [_is_same(_prepared(processor, image), _prepared(reference, image)) for image in images]
    known = [answer for answer in answers if answer is not None]
    return all(known) if known else None


def describe_difference(processor: BaseImageProcessor, reference: BaseImageProcessor) -> str:
    """The fields in which two processors read differently, with both values, in words."""
    fields, others = _fields(processor), _fields(reference)
    names = [name for name in sorted(fields.keys() | others.keys()) if fields.get(name) != others.get(name)]
    texts = [
        f"image processor's {name}: {fields.get(name, 'none')} against {others.get(name, 'none')}" for name in names
    ]
    return "; ".join(texts[:8]) + (f"; and {len(texts) - 8} more" if texts[8:] else "")


def _reading(processor: BaseImageProcessor) -> str:
    """What a processor says of itself, as text: equal texts are equal processors."""
    return json.dumps(_fields(processor), sort_keys=True)


def _fields(processor: BaseImageProcessor) -> dict[str, str]:
    """What a processor says of itself, comparably: its class without the backend, numbers in one spelling.

    Code of a checkpoint's own is part of it: classes of one name may do different things.
    """
    cls = type(processor)
    own = {"code": cls.__module__} if cls.__module__.startswith("transformers_modules.") else {}
    fields: dict[str, Any] = flattened(processor.to_dict())
    for name in ("image_processor_type", "processor_class", "name_or_path", "_name_or_path"):
        fields.pop(name, None)
    fields |= {"class": re.sub(r"(Fast|Pil)$", "", cls.__name__), **own}
    return {name: comparable(value) for name, value in fields.items() if value is not None}


def _prepared(processor: BaseImageProcessor, image: Image.Image) -> dict[str, np.ndarray] | None:
    """What a processor makes of an image; None if it does not take it."""
    try:
        return {name: np.asarray(value) for name, value in prepare_image(processor, image).items()}
    except Exception:  # a processor refuses what it does not take in its own way
        return None


def _is_same(prepared: dict[str, np.ndarray] | None, reference: dict[str, np.ndarray] | None) -> bool | None:
    if prepared is None or reference is None:
        return None if prepared is reference else False
    if {name: value.shape for name, value in prepared.items()} != {name: one.shape for name, one in reference.items()}:
        return False
    return all(
        np.allclose(value, reference[name], rtol=0, atol=TOLERANCE, equal_nan=True) for name, value in prepared.items()
    )


def _of_size_made(processor: BaseImageProcessor, images: Sequence[Image.Image]) -> list[Image.Image]:
    """An image of the size that a processor makes of others, if that is one."""
    prepared = next(filter(None, (_prepared(processor, image) for image in images)), {})
    shapes = [value.shape for value in prepared.values() if value.ndim == 3]
    return [images[0].resize((shape[2], shape[1])) for shape in shapes[:1]]


def _made_up_images() -> list[Image.Image]:
    """Images of different sizes and shapes, with edges and noise that no two ways to resize treat alike."""
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in _SIZES
    ]
