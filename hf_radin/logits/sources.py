"""Where a bank's images come from, opened again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_radin.checkpoints.processor import check_processor, prepare_image
from hf_radin.images.decode import Source
from hf_radin.images.split import OBJECT, Split, open_split
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.ingredients.labels import match_labels
from hf_radin.logits.bank_files import read_about
from hf_radin.weights.batchnorm import StatisticsRecord, statistics_source

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor


def source_of(folder: Path, ingredients: Ingredients, request: dict[str, Any]) -> Source:
    """Where a bank's images come from, opened again.

    Raises:
        ValueError: if they are no longer there or no longer the same.
    """
    about = read_about(folder)
    if request["dataset"] == OBJECT:
        _gone(folder / about["pixels"], about)
    split = _opened(request, about["data"]["split"], about["data"]["key"], folder)
    to_class = match_labels(split, ingredients.labels)
    prepare = partial(prepare_image, _processor(ingredients, about))
    return Source(split, prepare, to_class, about["on_error"], about["block_size"])


def sampled_source_of(
    folder: Path, ingredients: Ingredients, request: dict[str, Any], sampled: StatisticsRecord
) -> Source:
    """Where the images come from that BatchNorm has its statistics from, opened again. Raises as `source_of` does."""
    about = read_about(folder)
    if request["dataset"] == OBJECT:
        _gone(folder, about)
    split = _opened(request, sampled.split, sampled.data, folder, labelled=False)
    processor = _processor(ingredients, about)
    return statistics_source(split, processor, count=sampled.images, seed=sampled.seed, on_error=sampled.on_error)


def _opened(request: dict[str, Any], split: str, key: str, folder: Path, *, labelled: bool = True) -> Split:
    names = ("dataset", "config_name", "revision", "image_column", "label_column", "token")
    found = open_split(split=split, labelled=labelled, **{name: request[name] for name in names})
    if found.key != key:
        raise ValueError(f"{found.name} has changed since the logits in {folder} were computed; compute them again.")
    return found


def _processor(ingredients: Ingredients, about: dict[str, Any]) -> BaseImageProcessor:
    ingredients[0].download()
    processor = ingredients[0].processor
    check_processor(processor, about["processor"])
    return processor


def _gone(folder: Path, about: dict[str, Any]) -> NoReturn:
    if about.get("origin"):
        raise ValueError(
            f"The images of the bank {about['origin']} are not on the Hub, so that no soup can be measured on them. "
            "Search with budget=0 (--budget 0): recipes are then estimated only."
        )
    raise ValueError(f"{folder} is gone, or parts of it; run compute_logits again to prepare the images anew.")
