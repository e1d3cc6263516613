"""BatchNorm statistics of averaged weights, estimated anew from images.

Averaged weights produce other activations than their ingredients did, and the average of the ingredients' statistics
is not the statistics of the average. Without new ones the accuracy of ResNets collapses (arXiv 2301.10092; swa#7).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints.forward import forward
from hf_radin.checkpoints.model import empty_model
from hf_radin.checkpoints.processor import describe_processor, prepare_image
from hf_radin.images.cache import ALL, Images
from hf_radin.images.decode import Source
from hf_radin.images.shards import Block
from hf_radin.images.split import OBJECT, DataSource, Split, open_split, sample_split
from hf_radin.ingredients.ingredient import Ingredient
from hf_radin.runtime.files import digest
from hf_radin.runtime.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

# Images that statistics are estimated from, and how many of them a model sees at once. The statistics of batches are
# averaged, so the batch size changes the result: it is fixed, and independent of the user's batch size.
IMAGES = 1024
BATCH = 64


@dataclass(frozen=True)
class StatisticsRecord:
    """What banks and recipes say of the images that statistics are estimated from.

    Args:
        data: key of the split's data.
        split: its name.
        images: how many were asked for.
        seed: that they were drawn with.
        on_error: what happens with images that can't be read: `raise` or `skip`.
        used: how many images lie in batches that are used.
        key: of all that decides about the statistics.
    """

    data: str
    split: str
    images: int
    seed: int
    on_error: str
    used: int = 0
    key: str = ""


@dataclass(frozen=True)
class Statistics:
    """The images that statistics are estimated from.

    Args:
        images: prepared, a block a batch.
        record: where they come from.
        processes: each of which estimates the same statistics.
    """

    images: Images
    record: StatisticsRecord
    processes: Processes = field(compare=False, repr=False)

    @property
    def digests(self) -> np.ndarray | None:
        """Digests of the images that are used `(images,)`; None if they are not known."""
        index = self.images.index()
        if not index.counts:
            return None
        return index.digests[np.repeat(_are_full(index.counts), index.counts)]


def check_images(count: int) -> None:
    """Raise a ValueError for a number of images that statistics can't be estimated from."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"batchnorm_images={count!r}: it is a number of images, at least 2.")


def statistics_split(ingredient: Ingredient, opened: Split, source: DataSource, split: str | None) -> Split | None:
    """The split to draw images from: the one that the user names, else `train`, else the split that is measured.

    Args:
        opened: the split that is measured.
        source: of that split.

    Returns:
        None if the models have no BatchNorm.

    Raises:
        ValueError: if there is no such split, or one is named for models that have no BatchNorm.
    """
    if not has_batchnorm(empty_model(ingredient.config, trust_remote_code=ingredient.trust_remote_code)):
        if split is not None:
            raise ValueError(f"batchnorm_split={split!r}: {ingredient.architecture} has no BatchNorm. Leave it out.")
        return None
    has_single_split = opened.name == OBJECT and not isinstance(source.dataset, Mapping)
    if split is None and not has_single_split:
        try:
            training = open_split(replace(source.at("train"), labelled=False))
            return opened if training.key == opened.key else training  # a folder of one split that has no name
        except ValueError as error:
            logger.warning("%s BatchNorm statistics come from images of %r.", error, opened.split)
    if split is None or split == opened.split:
        return opened
    if has_single_split:
        raise ValueError(f"batchnorm_split={split!r}: a Dataset has one split; pass a DatasetDict of both.")
    return open_split(replace(source.at(split), labelled=False))


def refuse_statistics_of(held_out: str, ingredient: Ingredient, split: str | None) -> None:
    """Refuse a held-out split that BatchNorm statistics are estimated from.

    Args:
        held_out: its name.
        split: the split that the user named for the statistics; None for the default, `train`.

    Raises:
        ValueError: if the two are the same and the models have BatchNorm.
    """
    if held_out != (split or "train"):
        return
    if has_batchnorm(empty_model(ingredient.config, trust_remote_code=ingredient.trust_remote_code)):
        raise ValueError(
            f"--test-split {held_out}: it gives the soup its BatchNorm statistics (--batchnorm-split); another one "
            "has to prove it."
        )


def prepare_statistics(
    split: Split,
    count: int,
    home: Path,
    *,
    processor: BaseImageProcessor,
    on_error: str,
    processes: Processes,
    seed: int = 0,
) -> Statistics:
    """Draw images from a split and prepare them, a batch a block.

    Args:
        split: to draw from.
        count: of images.
        home: the cache folder.
        processor: that prepares them.
        on_error: what to do with images that can't be read: `raise` or `skip`.
        seed: to draw with.

    Raises:
        ValueError: if fewer than two images are left.
    """
    key = digest(split.key, count, seed, BATCH, describe_processor(processor), on_error)
    folder = home / "pixels" / key
    source = partial(statistics_source, split, processor, count=count, seed=seed, on_error=on_error)
    images = Images(folder, BATCH, cache(source), checks=processes.checks)
    processes.sync_files(folder, "*.json", "*.safetensors")
    if not processes.decide(images.is_cached):
        for _ in images.stream(processes.index, processes.count, room=ALL):
            pass
        processes.wait()
        processes.sync_files(folder, "*.json", "*.safetensors")
    sizes = images.index().counts
    largest = max([1, *sizes])
    used = largest * sizes.count(largest)
    if used < 2:
        raise ValueError(
            f"The split {split.split!r} of {split.name} gives {used} images to estimate BatchNorm statistics from; at "
            "least 2 are needed. Name another with batchnorm_split (--batchnorm-split)."
        )
    record = StatisticsRecord(split.key, split.split, count, seed, on_error, used, key)
    return Statistics(images, record, processes)


def statistics_source(split: Split, processor: BaseImageProcessor, *, count: int, seed: int, on_error: str) -> Source:
    """The source of `count` images that are drawn at random from a split. Their labels are not read."""
    sample = sample_split(split, count, seed=seed)
    return Source(sample, partial(prepare_image, processor), lambda label: 0, on_error, BATCH)


def has_batchnorm(model: PreTrainedModel) -> bool:
    """Whether a model has BatchNorm layers with running statistics."""
    return any(_keeps_statistics(module) for module in model.modules())


def estimate_statistics(model: PreTrainedModel, statistics: Statistics) -> None:
    """Replace the BatchNorm statistics of a model on the CPU by the mean of the statistics of all batches.

    Only BatchNorm layers run in training mode; dropout and all other layers run in evaluation mode. Every process does
    the same.
    """
    import torch

    accelerator, dtype = statistics.processes.accelerator, model.dtype
    modules = [module for module in model.modules() if _keeps_statistics(module)]
    momenta = [module.momentum for module in modules]
    # means in half precision are too coarse, and under autocast they would depend on how a run was launched
    model.to(accelerator.device, torch.promote_types(dtype, torch.float32))
    for module in modules:
        module.reset_running_stats()
        module.momentum = None  # the plain mean over batches
        module.train()
    if not statistics.images.is_cached():  # a bank from the Hub comes without; each process prepares them for itself
        for _ in statistics.images.stream(0, 1, room=ALL):
            pass
    for block in _full_batches(statistics.images):
        inputs = statistics.images.read(block)
        forward([model], inputs, batch_size=BATCH, accelerator=accelerator)
    for module, momentum in zip(modules, momenta, strict=True):
        module.momentum = momentum
    model.train()  # LeViT drops what it cached of its weights only in this mode
    model.to("cpu", dtype).eval()


def _full_batches(images: Images) -> list[Block]:
    """The blocks of the largest size, mostly `BATCH`: the mean over batches weighs all of them the same."""
    return [block for block, is_full in zip(images.blocks, _are_full(images.index().counts), strict=True) if is_full]


def _are_full(counts: Sequence[int]) -> list[bool]:
    """Which of some blocks have the largest size."""
    return [count == max([1, *counts]) for count in counts]


def _keeps_statistics(module: Any) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm) and module.track_running_stats
