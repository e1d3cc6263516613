"""Where a bank's images come from, opened again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hf_radin.checkpoints.processor import check_processor, prepare_image
from hf_radin.images.decode import Source
from hf_radin.images.split import OBJECT, DataSource, Split, open_split
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.ingredients.labels import match_labels
from hf_radin.logits.manifest import BankManifest
from hf_radin.weights.batchnorm import StatisticsRecord, statistics_source

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor


def reopen_images(folder: Path, ingredients: Ingredients, source: DataSource) -> Source:
    """The images of the bank in a folder.

    Args:
        source: where they are.

    Raises:
        ValueError: if they are no longer there or no longer the same.
    """
    manifest = BankManifest.read(folder)
    if is_object(source):
        _refuse_object(folder / manifest.pixels, manifest)
    split = _reopen(replace(source, split=manifest.data.split), manifest.data.key, folder)
    to_class = match_labels(split, ingredients.labels)
    prepare = partial(prepare_image, _same_processor(ingredients, manifest))
    return Source(split, prepare, to_class, manifest.run.on_error, manifest.block_size)


def reopen_sample(folder: Path, ingredients: Ingredients, source: DataSource, record: StatisticsRecord) -> Source:
    """The images that BatchNorm statistics are estimated from. Arguments and errors as of `reopen_images`."""
    manifest = BankManifest.read(folder)
    if is_object(source):
        _refuse_object(folder, manifest)
    split = _reopen(replace(source, split=record.split), record.data, folder, labelled=False)
    processor = _same_processor(ingredients, manifest)
    return statistics_source(split, processor, images=record.images, seed=record.seed, on_error=record.on_error)


def is_object(source: DataSource) -> bool:
    """Whether the images came as an object, which can't be opened again."""
    return isinstance(source.dataset, str) and source.dataset == OBJECT


def _reopen(source: DataSource, key: str, folder: Path, *, labelled: bool = True) -> Split:
    split = open_split(source, labelled=labelled)
    if split.key != key:
        raise ValueError(f"{split.name} has changed since the logits in {folder} were computed; compute them again.")
    return split


def _same_processor(ingredients: Ingredients, manifest: BankManifest) -> BaseImageProcessor:
    ingredients[0].download()
    processor = ingredients[0].processor
    check_processor(processor, manifest.run.processor)
    return processor


def _refuse_object(folder: Path, manifest: BankManifest) -> NoReturn:
    if manifest.origin:
        raise ValueError(
            f"The images of the bank {manifest.origin} are not on the Hub, so that no soup can be measured on them. "
            "Search with budget=0 (--budget 0): recipes are then estimated only."
        )
    raise ValueError(f"{folder} is gone, or parts of it; run compute_logits again to prepare the images anew.")
