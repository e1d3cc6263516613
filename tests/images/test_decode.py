"""Images are decoded alike wherever that is done, and what is wrong is the image's fault, or is passed on."""

import io
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from shared.training import image_dataset
from transformers import ViTImageProcessor

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.images.decode import (
    PACKED_BYTES,
    Source,
    decode,
    decode_all,
    example_images,
    prepared_example,
)
from hf_radin.images.pixels import find_tables
from hf_radin.images.split import DataSource, open_split


def noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def cut(image: Image.Image) -> dict:
    """The file of an image that ends early: its size is known, and it can't be decoded."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue()[:-200], "path": "cut.png"}


prepare = partial(prepare_image, ViTImageProcessor(do_resize=False))


def split_of(images: list):
    return open_split(DataSource(image_dataset(images, [0] * len(images)), "train"))


def source_of(images: list, prepare=prepare, on_error: str = "raise") -> Source:
    return Source(split_of(images), prepare, int, on_error, 100)


def blocks(source: Source):
    return iter([((0, 0), source.split.rows)])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_the_same_whichever_process_decodes(workers):
    source = source_of([noise(30), cut(noise(30))])
    with pytest.raises(ValueError, match=r"^Sample 1 of .*\(cut\.png\): the image can't be read: .*on_error='skip'"):
        list(decode_all(blocks(source), lambda: source, workers))


def test_a_lack_of_memory_is_no_fault_of_an_image():
    def fail(image):
        raise MemoryError

    source = source_of([noise(30)], fail, "skip")
    with pytest.raises(MemoryError):
        decode(source, (0, 0), source.split.rows)


def test_images_that_are_packed_in_parts_come_out_as_they_were():
    """Large ones: all of a block in full precision would take too much memory."""
    images = [noise(500, seed) for seed in range(6)]
    assert 2 < PACKED_BYTES / prepare(images[0])["pixel_values"].nbytes < len(images) - 1
    source = source_of(images)
    (pixels,) = decode(source, (0, 0), source.split.rows).inputs.values()
    assert pixels.nbytes == 6 * 3 * 500 * 500  # one byte a value
    exact = torch.stack([prepare(image)["pixel_values"] for image in images])
    assert torch.equal(pixels.to(torch.device("cpu")), exact)


def test_an_image_that_can_not_be_decoded_is_no_example():
    """Its header tells a size that no other has, and no more can be read of it."""
    assert [*example_images(split_of([noise(20), cut(noise(90)), noise(40)]))] == [0]


def test_an_image_that_can_not_be_prepared_is_named_with_its_size():
    def fail(image):
        if image.width < 30:
            raise KeyError("too small")
        return prepare(image)

    split = split_of([noise(40), noise(20)])
    with pytest.raises(ValueError, match=r"^Sample 1 of .* can't prepare an image of 20 x 20 pixels: .*too small"):
        prepared_example(split, fail, example_images(split))


def test_a_stream_of_the_bytes_of_files_is_one_of_images():
    images = [noise(8, seed) for seed in range(3)]
    buffers = [io.BytesIO() for _ in images]
    for image, buffer in zip(images, buffers, strict=True):
        image.save(buffer, "PNG")
    rows = datasets.IterableDataset.from_generator(
        lambda: ({"image": file.getvalue(), "label": 0} for file in buffers)
    )
    split = open_split(DataSource(rows, "train", image_column="image", label_column="label"))
    decoded = decode(Source(split, prepare, int, "raise", 100), (0, 0), list(split.rows))
    exact = torch.stack([prepare(image)["pixel_values"] for image in images])
    assert torch.equal(decoded.inputs["pixel_values"].to(torch.device("cpu")), exact)


def test_a_processor_of_few_values_has_no_table_of_256():
    """Not even one shade after the other shows them all."""
    shades = []

    def coarse(image):
        shades.append(image)
        return {"pixel_values": prepare(image)["pixel_values"].mul(8).round()}

    assert find_tables(coarse) == {} and len(shades) == 257


def test_a_processor_that_refuses_made_up_images_has_no_tables():
    def refuses(image):
        raise ValueError("it takes 8 x 8 pixels")

    assert find_tables(refuses) == {}
