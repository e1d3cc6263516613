"""JPEG files come out as Pillow decodes them, whatever decodes them."""

import io
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from shared.training import image_dataset
from transformers import ViTImageProcessor, ViTImageProcessorPil

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.images.decode import Jpegs, Source, decode, torchvision_decoder
from hf_radin.images.split import DataSource, open_split


def exif(orientation: int) -> bytes:
    fields = Image.Exif()
    fields[Base.Orientation] = orientation
    return fields.tobytes()


FAST = {
    **{f"quality {quality}": ("RGB", {"quality": quality}) for quality in (5, 30, 75, 95, 100)},
    **{f"subsampling {number}": ("RGB", {"subsampling": number}) for number in (0, 1, 2)},
    "progressive": ("RGB", {"progressive": True, "quality": 90}),
    "restarts": ("RGB", {"restart_marker_blocks": 2}),
    "stored as RGB": ("RGB", {"keep_rgb": True}),
    "a colour profile": ("RGB", {"icc_profile": b"profile" * 30}),
    "upright by its EXIF": ("RGB", {"exif": exif(1)}),
    "grey": ("L", {}),
}
BY_PILLOW = {"CMYK": ("CMYK", {}), "on its side": ("RGB", {"exif": exif(6)})}


def make(cls=ViTImageProcessor):
    return partial(prepare_image, cls(size={"height": 24, "width": 24}))


def written(name: str = "quality 75", size: tuple[int, int] = (45, 61), seed: int = 0) -> dict:
    mode, options = {**FAST, **BY_PILLOW}[name]
    rough = np.random.default_rng(seed).integers(0, 256, (11, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize(size).convert(mode).save(file, "JPEG", **options)
    return {"bytes": file.getvalue(), "path": None}


def source_of(images: list, prepare=None, on_error: str = "raise") -> Source:
    split = open_split(DataSource(image_dataset(images, [0] * len(images)), "train"))
    return Source(split, prepare or make(), int, on_error, 100)


def outcome(source: Source) -> tuple:
    """The inputs of a split, its digests, and what was skipped."""
    decoded = decode(source, (0, 0), list(source.split.rows))
    inputs = decoded.inputs.get("pixel_values", torch.zeros(0))
    return inputs.to(torch.device("cpu")).numpy().tobytes(), decoded.digests, decoded.skipped


def by_pillow(source: Source) -> tuple:
    source.jpegs.is_same = False
    return outcome(source)


@pytest.mark.parametrize("size", [(45, 61), (64, 64), (301, 223), (7, 5)])
def test_every_kind_comes_out_to_the_same_bits(size):
    names = [*FAST, *BY_PILLOW]
    images = [written(name, size) for name in names]
    source = source_of(images)
    assert outcome(source) == by_pillow(source_of(images))
    assert {name for name in names if source.jpegs.pixels(written(name, size)) is not None} == set(FAST)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 1), (4, 9)])
def test_strips_are_left_to_pillow(size):
    source = source_of([written(size=size), written()])
    assert outcome(source) == by_pillow(source_of([written(size=size), written()]))
    assert source.jpegs.is_same and source.jpegs.pixels(written(size=size)) is None


def test_a_column_of_another_mode_is_left_to_pillow():
    source = source_of([written()])
    in_grey = replace(source, split=replace(source.split, image_mode="L"))
    assert outcome(in_grey) != outcome(source) and in_grey.jpegs.is_same is None


def mutants() -> list[dict]:
    """Files that are cut off, have other bytes, or some too many or too few."""
    random, files = np.random.default_rng(0), []
    for number in range(120):
        content = bytearray(written(list(FAST)[number % len(FAST)], seed=number)["bytes"])
        place = int(random.integers(2, len(content)))
        if number % 4 == 0:
            del content[place:]
        elif number % 4 == 1:
            content[place] = random.integers(256)
        elif number % 4 == 2:
            content[place:place] = random.bytes(5)
        else:
            del content[place : place + 9]
        files.append({"bytes": bytes(content), "path": None})
    return files


def test_pillow_decides_what_can_be_read():
    images = [written(), *mutants()]
    source = source_of(images, on_error="skip")
    expected = by_pillow(source_of(images, on_error="skip"))
    assert outcome(source) == expected and source.jpegs.is_same
    assert 0 < len(expected[2]) < len(images)


def wrong_decoder(is_wrong):
    """A decoder that is wrong by one in one pixel, of the files for which `is_wrong`."""

    def decode_jpeg(encoded):
        pixels = torchvision_decoder()(encoded)
        if is_wrong(encoded.numpy().tobytes()):
            pixels[0, 0, 0] ^= 1
        return pixels

    return decode_jpeg


@pytest.mark.parametrize(
    "is_wrong",
    [lambda content: content == written()["bytes"], lambda content: b"\xff\xc2" in content],
    ids=["the first file", "progressive files"],
)
def test_a_decoder_that_is_wrong_reads_no_file(is_wrong):
    jpegs = Jpegs(make(), wrong_decoder(is_wrong))
    assert jpegs.pixels(written()) is None and jpegs.is_same is False
    assert jpegs.pixels(written(seed=1)) is None


def test_a_file_that_the_decoder_refuses_is_left_to_pillow():
    def fail(content):
        if content == written(seed=1)["bytes"]:
            raise RuntimeError("no more")

    jpegs = Jpegs(make(), wrong_decoder(fail))
    assert [jpegs.pixels(written(seed=number)) is None for number in range(3)] == [False, True, False]


class Brightens(ViTImageProcessor):
    """A processor with a step of its own for images of Pillow."""

    def process_image(self, image, *args, **kwargs):
        if isinstance(image, Image.Image):
            image = image.point(lambda value: min(value + 1, 255))
        return super().process_image(image, *args, **kwargs)


@pytest.mark.parametrize("cls", [ViTImageProcessorPil, Brightens])
def test_a_processor_that_makes_something_else_of_pixels_is_given_images(cls):
    images = [written(seed=number) for number in range(3)]
    source = source_of(images, make(cls))
    assert outcome(source) == by_pillow(source_of(images, make(cls)))
    assert source.jpegs.is_same is False


def test_without_torchvision_pillow_reads_all():
    jpegs = Jpegs(make(), None)
    assert jpegs.pixels(written()) is None and jpegs.is_same is None


def test_pixels_are_refused_by_a_processor_for_images():
    with pytest.raises(TypeError, match="ViTImageProcessorPil is given pixels"):
        make(ViTImageProcessorPil)(torch.zeros(3, 8, 8, dtype=torch.uint8))
