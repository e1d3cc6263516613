"""Images of one byte a value are those of the image processor, to the last bit."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_radin.checkpoints import processor
from hf_radin.images import pixels

# Not by 256 values a channel: patches in rows, colours by their clusters. These are kept in full.
IN_FULL = {"Siglip2ImageProcessor", "Siglip2ImageProcessorPil", "ImageGPTImageProcessor", "ImageGPTImageProcessorPil"}

CLASSES = sorted(
    {
        name
        for architecture in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        for name in (IMAGE_PROCESSOR_MAPPING_NAMES.get(architecture) or {}).values()
        if name
    }
)

# What a processor can't do without, or that would make the test slow without telling more.
OPTIONS = {
    "ImageGPTImageProcessor": {"clusters": np.random.default_rng(0).uniform(-1, 1, (16, 3)).tolist()},
    "ImageGPTImageProcessorPil": {"clusters": np.random.default_rng(0).uniform(-1, 1, (16, 3)).tolist()},
    "DonutImageProcessor": {"size": {"height": 96, "width": 80}},
    "DonutImageProcessorPil": {"size": {"height": 96, "width": 80}},
    "TimmWrapperImageProcessor": {"pretrained_cfg": {"input_size": (3, 64, 64), "mean": (0.4, 0.5, 0.6)}},
}


def pictures() -> list[Image.Image]:
    """Noise, and a photograph's smoothness, in sizes to be shrunk, stretched and cropped."""
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((300, 260), (41, 57), (224, 224))]
    rows, columns = np.mgrid[0:200, 0:310]
    smooth = np.stack([rows + 20, columns * 0.8, (rows + columns) / 2], axis=-1).astype(np.uint8)
    return [Image.fromarray(values) for values in [*noise, smooth]]


@pytest.mark.parametrize("name", CLASSES)
def test_every_processor_keeps_its_own_output(name):
    prepare = partial(processor.prepare_image, getattr(transformers, name)(**OPTIONS.get(name, {})))
    tables = pixels.find_tables(prepare)
    assert bool(tables) == (name not in IN_FULL)
    for image in pictures():
        exact = prepare(image)
        packed = pixels.pack([exact], tables)
        for key, value in exact.items():
            assert isinstance(packed[key], pixels.Pixels) == (key in tables)
            again = packed[key].to(torch.device("cpu"))[0]
            assert again.dtype == value.dtype and torch.equal(again, value)


def table() -> torch.Tensor:
    return torch.arange(256).float().div(255).sub(0.5).div(0.25).repeat(3, 1)


def test_a_value_that_is_none_of_the_256_is_kept_in_full():
    values = table()[:, :64].view(3, 8, 8)
    other = values.clone()
    other[1, 2, 3] += 1e-6
    parts = [pixels.pack([{"pixel_values": image}], {"pixel_values": table()}) for image in (values, other)]
    assert [isinstance(part["pixel_values"], pixels.Pixels) for part in parts] == [True, False]
    assert torch.equal(pixels.join(parts)["pixel_values"], torch.stack([values, other]))
    joined = pixels.join([parts[0]] * 3)["pixel_values"]
    assert isinstance(joined, pixels.Pixels) and torch.equal(joined.to(values.device), torch.stack([values] * 3))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_kept(broken):
    values = table()[:, :64].view(1, 3, 8, 8).repeat(2, 1, 1, 1)
    assert pixels.encode(values, table()) is not None
    values[1, 2, 3, 4] = broken
    assert pixels.encode(values, table()) is None


def test_a_slice_goes_to_the_device_in_the_dtype_that_is_asked_for():
    codes = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8)
    images = pixels.Pixels(codes, table())
    exact = images.to(torch.device("cpu"))
    assert exact.shape == codes.shape and exact.is_contiguous() and len(images[1:3]) == 2
    assert torch.equal(images[1:3].to(torch.device("cpu"), torch.bfloat16), exact[1:3].bfloat16())
