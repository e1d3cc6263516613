"""Images that would fill the memory are refused by what their headers say, and Pillow's limit is an option."""

import io
import warnings

import PIL.Image
import pytest
import torch
from PIL import Image
from shared.training import image_dataset
from transformers import CLIPImageProcessor, ViTImageProcessor

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.cli.main import main
from hf_radin.images.decode import Source, decode, example_images, open_image
from hf_radin.images.split import DataSource, open_split


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def large() -> bytes:
    """Of more pixels than Pillow's limit, and fewer than twice as many, which Pillow itself only warns of."""
    return png(13_000, 13_000)


@pytest.fixture
def pixels(monkeypatch):
    """Call it with a limit for images: Pillow's stands again afterwards."""
    return lambda count: monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", count)


def test_its_size_and_the_limit_are_said_before_it_is_decoded(large):
    with pytest.raises(ValueError, match=r"169000000 pixels\) exceeds limit of 89478485 pixels.*--max"):
        open_image({"bytes": large, "path": None})
    with pytest.raises(ValueError, match=r"Image size \(400000000 pixels\) exceeds .*--max-image-pixels"):
        open_image({"bytes": png(20_000, 20_000), "path": None})


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_split_names_the_image(large, tmp_path, kind):
    if kind == "parquet":
        column = [{"bytes": content, "path": "a.png"} for content in (png(8, 8), large)]
        image_dataset(column, [0, 1]).to_parquet(tmp_path / "validation.parquet")
    else:
        for number, content in enumerate((png(8, 8), large)):
            (tmp_path / "validation" / f"class {number}").mkdir(parents=True)
            (tmp_path / "validation" / f"class {number}" / "a.png").write_bytes(content)
    split = open_split(DataSource(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [image.size for image in example_images(split).values()] == [(8, 8)]
    rows = list(split.rows)
    source = Source(split, lambda image: {"size": torch.tensor(image.size)}, lambda label: 0, "raise", 10)
    with pytest.raises(ValueError, match=r"Sample 1 of .*169000000 pixels\) exceeds limit"):
        decode(source, (0, 0), rows)


def test_the_limit_may_be_another(pixels):
    image = {"bytes": png(20, 30), "path": None}
    pixels(599)
    with pytest.raises(ValueError, match=r"600 pixels\) exceeds limit of 599 pixels"):
        open_image(image)
    pixels(600)
    assert open_image(image).size == (20, 30)
    pixels(None)
    assert open_image(image).size == (20, 30)


def test_the_limit_is_an_option(runs, digits, tmp_path, capsys, pixels):
    pixels(PIL.Image.MAX_IMAGE_PIXELS)
    start = ["logits", "--models", f"{runs}/ft-[01]", "--dataset", str(digits), "--cache-dir", str(tmp_path)]
    assert main([*start, "--max-image-pixels", "63"]) == 2
    error = capsys.readouterr().err
    assert "(64 pixels) exceeds limit of 63 pixels" in error and len(error.splitlines()) == 1
    assert main([*start, "--max-image-pixels", "64", "--workers", "2"]) == 0


@pytest.mark.parametrize("processor", [CLIPImageProcessor, ViTImageProcessor])
@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1)])
def test_a_strip_is_not_made_a_large_image(processor, size):
    image = Image.new("RGB", size)
    if processor is ViTImageProcessor:  # makes all images of one size
        assert prepare_image(processor(), image)["pixel_values"].shape == (3, 224, 224)
        return
    with pytest.raises(ValueError, match=r"would be resized to 224 x 11,200,000, more than Pillow's limit"):
        prepare_image(processor(), image)
    assert prepare_image(processor(), image.resize((100, 200)))["pixel_values"].shape == (3, 224, 224)
