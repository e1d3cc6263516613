"""Images that are prepared together come out as each does alone, and so does what is wrong with them."""

import io
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from shared.training import image_dataset
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    Siglip2ImageProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
    YolosImageProcessor,
)

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.images.decode import COMPARED, PACKED_BYTES, TOGETHER, Source, decode_all
from hf_radin.images.split import DataSource, open_split

PROCESSORS = {
    "ViT": ViTImageProcessor(size={"height": 24, "width": 20}),
    "ViT by Pillow": ViTImageProcessorPil(size={"height": 24, "width": 20}),
    "images grouped by size": ViTImageProcessor(size={"height": 24, "width": 20}, disable_grouping=False),
    "ConvNeXt": ConvNextImageProcessor(size={"shortest_edge": 24}),
    "keeps the shape, and crops": CLIPImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    ),
    "pads to the largest": YolosImageProcessor(size={"shortest_edge": 16, "longest_edge": 24}),
    "patches in rows, padded": Siglip2ImageProcessor(patch_size=4, max_num_patches=16),
}


class InFull(Source):
    """Its images are not kept as codes: to look for their tables would take longer than all else here."""

    tables: ClassVar = {}


class Recording:
    """Prepares images, and keeps how many each call was given."""

    def __init__(self, prepare):
        self.prepare, self.calls = prepare, []

    def __call__(self, image):
        self.calls.append(len(image) if isinstance(image, list) else 1)
        return self.prepare(image)


def written(size: tuple[int, int] = (30, 22), seed: int = 0, kind: str = "PNG", mode: str = "RGB", **options) -> dict:
    values = np.random.default_rng((seed, 1)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": f"{seed}.{kind.lower()}"}


def of_one_size(images: int, **options) -> list[dict]:
    return [written(seed=seed, **options) for seed in range(images)]


def broken() -> dict:
    image = written(seed=77)
    return image | {"bytes": image["bytes"][:-200]}


def mixed() -> list[dict]:
    """Runs of several sizes, modes and kinds of files, in which some can't be read."""
    on_its_side = Image.Exif()
    on_its_side[Base.Orientation] = 6
    jpegs = of_one_size(12, kind="JPEG")
    modes = [written(seed=seed, mode=mode) for seed, mode in enumerate(("L", "RGB", "P", "RGBA", "1", "LA") * 2)]
    return [
        *of_one_size(14),
        broken(),
        *of_one_size(7, size=(22, 30)),
        *jpegs[:7],
        written(kind="JPEG", exif=on_its_side.tobytes()),
        written(kind="JPEG", mode="CMYK"),
        *jpegs[7:],
        *modes,
        broken(),
        broken(),
        written(size=(200, 1)),
        *[written(size=(20 + seed % 2, 20), seed=seed) for seed in range(8)],
        *of_one_size(8),
    ]


def source_of(images: list, prepare, on_error: str = "skip", labels: list[int] | None = None) -> Source:
    split = open_split(
        DataSource(image_dataset(images, labels or [number % 3 for number in range(len(images))]), "train")
    )
    return InFull(split, Recording(prepare), int, on_error, 100)


def outcome(source: Source, workers: int = 0) -> tuple:
    """All that comes of the images of a split: to the last bit, or word for word."""
    try:
        ((_, decoded),) = decode_all(iter([((0, 0), list(source.split.rows))]), lambda: source, workers)
    except Exception as error:
        return type(error), str(error)
    full = {name: value.to(torch.device("cpu")) for name, value in decoded.inputs.items()}
    inputs = {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in full.items()}
    return inputs, decoded.labels, decoded.digests, decoded.skipped


def alone(source: Source) -> tuple:
    source.batches.is_same = False
    result = outcome(source)
    assert set(source.prepare.calls) == {1}
    return result


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_come_out_as_each_does_alone(name):
    prepare = partial(prepare_image, PROCESSORS[name])
    source = source_of(mixed(), prepare)
    assert outcome(source) == alone(source_of(mixed(), prepare))
    assert source.batches.is_same and max(source.prepare.calls) > COMPARED + 1


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_whichever_process_decodes(on_error):
    images, prepare = mixed(), partial(prepare_image, PROCESSORS["ViT"])
    expected = alone(source_of(images, prepare, on_error))
    assert outcome(source_of(images, prepare, on_error), workers=1) == expected


def test_a_column_of_another_mode():
    sources = [source_of(mixed(), partial(prepare_image, PROCESSORS["ViT"])) for _ in range(2)]
    source, other = (replace(each, split=replace(each.split, image_mode="L")) for each in sources)
    assert outcome(source) == alone(other) and source.batches.is_same


def test_most_calls_are_saved():
    images, prepare = of_one_size(2 * TOGETHER), partial(prepare_image, PROCESSORS["ViT"])
    source = source_of(images, prepare)
    expected = alone(source_of(images, prepare))
    assert outcome(source) == expected
    before = len(source.prepare.calls)
    assert outcome(source) == expected
    assert source.prepare.calls[before:] == [TOGETHER, TOGETHER]


def test_no_call_is_given_more_than_is_packed_together():
    prepare = partial(prepare_image, ViTImageProcessor(do_resize=False))
    images = of_one_size(24, size=(300, 300))
    source = source_of(images, prepare)
    assert outcome(source) == alone(source_of(images, prepare))
    nbytes = prepare(Image.new("RGB", (300, 300)))["pixel_values"].nbytes
    assert COMPARED + 1 < max(source.prepare.calls) == PACKED_BYTES // nbytes


def depends_on_the_others(image):
    """The brightest of all images of a call: no difference if these are the same."""
    inputs = prepare_image(PROCESSORS["ViT"], image)
    return {
        name: value.amax(0).expand_as(value) if isinstance(image, list) else value for name, value in inputs.items()
    }


def off_by_a_bit_at_one_size(image):
    inputs = prepare_image(PROCESSORS["ViT"], image)
    if isinstance(image, list) and image[0].width == 22:
        inputs["pixel_values"][0, 0, 0, 0] = torch.nextafter(inputs["pixel_values"][0, 0, 0, 0], torch.tensor(9.0))
    return inputs


def of_another_dtype(image):
    inputs = prepare_image(PROCESSORS["ViT"], image)
    return {name: value.double() if isinstance(image, list) else value for name, value in inputs.items()}


def in_one_row(image):
    inputs = prepare_image(PROCESSORS["ViT"], image)
    return {name: value.flatten(0, 1) if isinstance(image, list) else value for name, value in inputs.items()}


def takes_no_lists(image):
    return prepare_image(PROCESSORS["ViT"], image.convert("RGB"))


def blank() -> list[dict]:
    file = io.BytesIO()
    Image.new("RGB", (30, 22)).save(file, "PNG")
    return [{"bytes": file.getvalue(), "path": None}] * 6 + of_one_size(20)


@pytest.mark.parametrize("images", [mixed, blank])
@pytest.mark.parametrize(
    "prepare", [depends_on_the_others, of_another_dtype, in_one_row, takes_no_lists], ids=lambda each: each.__name__
)
def test_a_processor_that_makes_something_else_of_several_is_given_each_alone(prepare, images):
    source = source_of(images(), prepare)
    assert outcome(source) == alone(source_of(images(), prepare))
    assert source.batches.is_same is False and sorted({*source.prepare.calls}) == [1, COMPARED + 1]


def test_each_size_is_compared():
    images = [*of_one_size(20), *of_one_size(20, size=(22, 30)), *of_one_size(20)]
    source = source_of(images, off_by_a_bit_at_one_size)
    assert outcome(source) == alone(source_of(images, off_by_a_bit_at_one_size))
    assert source.batches.is_same is False and max(source.prepare.calls) > COMPARED + 1


def refuses(*seeds: int):
    """Prepares all but some images, which it takes for broken."""
    refused = {np.asarray(Image.open(io.BytesIO(written(seed=seed)["bytes"]))).tobytes() for seed in seeds}

    def prepare(image):
        images = image if isinstance(image, list) else [image]
        if any(np.asarray(each).tobytes() in refused for each in images):
            raise KeyError("not this one")
        return prepare_image(PROCESSORS["ViT"], image)

    return prepare


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("seeds", [(0,), (2,), (20, 21, 40)], ids=str)
def test_of_images_that_are_prepared_together_the_right_one_is_named(seeds, on_error):
    images = of_one_size(45)
    source = source_of(images, refuses(*seeds), on_error)
    result = outcome(source)
    assert result == alone(source_of(images, refuses(*seeds), on_error))
    if on_error == "raise":
        assert result[1].startswith(f"Sample {seeds[0]} of ") and f"({seeds[0]}.png)" in result[1]
    else:
        assert result[3] == [*seeds] and source.batches.is_same


@pytest.mark.parametrize("label_at", [18, 22])
def test_what_is_wrong_first_is_said_first(label_at):
    """An image can't be prepared, and a label is unknown, among images that are prepared together."""
    labels = [0 if place != label_at else 5 for place in range(40)]
    source = replace(source_of(of_one_size(40), refuses(20), "raise", labels), to_class={0: 0}.__getitem__)
    _, text = outcome(source)
    assert text.startswith(f"Sample {min(20, label_at)} of ") and ("has the label" in text) == (label_at < 20)


def test_shapes_that_differ_are_refused_with_the_same_samples():
    images = [*of_one_size(20), *of_one_size(20, size=(22, 30))]
    prepare = partial(prepare_image, ViTImageProcessor(do_resize=False))
    source = source_of(images, prepare)
    result = outcome(source)
    assert result == alone(source_of(images, prepare))
    assert "(3, 22, 30) of sample 0, (3, 30, 22) of sample 20" in result[1]


def test_images_of_a_list_have_one_size():
    images = [Image.new("RGB", size) for size in ((8, 9), (9, 8))]
    with pytest.raises(ValueError, match="different sizes"):
        prepare_image(PROCESSORS["pads to the largest"], images)
