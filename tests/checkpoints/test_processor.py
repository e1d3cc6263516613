"""Image processors are compared by what they make of images, whatever their fields are called."""

import pytest
from transformers import ViTImageProcessor

from hf_radin.checkpoints.processor import check_processor, describe_processor, find_processor_differences


def make(**fields) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 8, "width": 8}, **fields)


def test_each_that_differs_from_most_is_told_with_what_it_makes():
    others = {"c": make(image_mean=[0.4] * 3), "d": make(image_mean=[0.4] * 3), "e": make(crop_pct=0.9)}
    differences = find_processor_differences({"a": make(), "b": make(), **others, "f": make()})
    assert {name: difference.is_same for name, difference in differences.items()} == {
        "c": False,
        "d": False,
        "e": True,
    }
    assert all(difference.text.startswith(f"{name} differs from a in ") for name, difference in differences.items())


def test_a_processor_described_otherwise_is_the_same_if_it_makes_the_same_pixels():
    check_processor(make(), describe_processor(make()) | {"note": "ours"})


@pytest.mark.parametrize(
    "fields",
    [{"image_mean": [0.4] * 3}, {"size": {"depth": 8}}, {"image_processor_type": "Nobodys"}],
    ids=["other pixels", "fields that it does not take", "a class that is not there"],
)
def test_a_processor_that_is_not_the_one_described_is_refused(fields):
    with pytest.raises(ValueError, match="is not the one that the logits were computed with"):
        check_processor(make(), describe_processor(make()) | {"note": "ours", **fields})
