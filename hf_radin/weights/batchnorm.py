"""BatchNorm: averaged weights see other activations than their ingredients did, so statistics are estimated anew.

The average of the ingredients' statistics is not the statistics of their average; ResNets fall far without this
(arXiv 2301.10092; swa#7).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.forward import forward
from hf_radin.checkpoints.model import empty_model
from hf_radin.checkpoints.processor import describe_processor, prepare_image
from hf_radin.images.cache import ALL, Images
from hf_radin.images.decode import Source
from hf_radin.images.shards import Block
from hf_radin.images.split import OBJECT, DataSource, Split, open_split, sample_split
from hf_radin.ingredients.ingredient import Ingredient
from hf_radin.runtime.file_sync import share
from hf_radin.runtime.files import digest
from hf_radin.runtime.processes import on_main_process, the_accelerator

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

# Images that statistics are estimated from, and how many of them a model sees at once: the statistics of a batch are
# what is averaged, so that it is part of the outcome and not the user's batch size.
IMAGES = 1024
BATCH = 64


@dataclass(frozen=True)
class Statistics:
    """The images that statistics are estimated from.

    Args:
        images: prepared, a block a batch.
        about: the dataset's `data` key, the `split`, how many `images`, the `seed`, and a `key` of all that decides.
    """

    images: Images
    about: dict[str, Any]

    @property
    def digests(self) -> np.ndarray | None:
        """Of those images that are used `(images,)`; None if that is not known."""
        return self.images.digests(_batches(self.images))


def check_images(count: int) -> None:
    """Refuse a number of images that statistics can't be estimated from."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"batchnorm_images={count!r}: it is a number of images, at least 2.")


def find_sampled(ingredient: Ingredient, opened: Split, source: dict[str, Any], split: str | None) -> Split | None:
    """The split to draw images from: the one that the user names, else `train`, else the one that is measured.

    Args:
        opened: the split that is measured.
        source: of the dataset, as `DataSource` takes it.

    Returns:
        None if the models have no BatchNorm.

    Raises:
        ValueError: if the split is not there, or is named for models that have no BatchNorm.
    """
    if not has_batchnorm(empty_model(ingredient.config, trust_remote_code=ingredient.trust_remote_code)):
        if split is not None:
            raise ValueError(f"batchnorm_split={split!r}: {ingredient.architecture} has no BatchNorm. Leave it out.")
        return None
    one_split = opened.name == OBJECT and not isinstance(source["dataset"], Mapping)
    if split is None and not one_split:
        try:
            found = open_split(DataSource(**source, split="train"), labelled=False)
            return opened if found.key == opened.key else found  # a folder of one split that has no name
        except ValueError as error:
            logger.warning("%s BatchNorm statistics come from images of %r.", error, opened.split)
    if split is None or split == opened.split:
        return opened
    if one_split:
        raise ValueError(f"batchnorm_split={split!r}: a Dataset has one split; pass a DatasetDict of both.")
    return open_split(DataSource(**source, split=split), labelled=False)


def refuse_statistics_of(held_out: str, ingredient: Ingredient, split: str | None) -> None:
    """Refuse a held-out split that BatchNorm would have its statistics from.

    Raises:
        ValueError: if it is the one that is named, or the `train` of the default.
    """
    if held_out != (split or "train"):
        return
    if has_batchnorm(empty_model(ingredient.config, trust_remote_code=ingredient.trust_remote_code)):
        raise ValueError(
            f"--test-split {held_out}: it gives the soup its BatchNorm statistics (--batchnorm-split); another one "
            "has to prove it."
        )


def collect_statistics(
    split: Split,
    count: int,
    home: Path,
    *,
    processor: BaseImageProcessor,
    on_error: str,
    accelerator: Accelerator,
    seed: int = 0,
) -> Statistics:
    """Draw images from a split and prepare them, a batch a block."""
    key = digest(split.key, count, seed, BATCH, describe_processor(processor), on_error)
    folder = home / "pixels" / key
    sampled = {"images": count, "seed": seed, "on_error": on_error}
    images = Images(folder, BATCH, cache(partial(sample_source, split, processor, sampled)))
    share(folder, "*.json", "*.safetensors")
    if not on_main_process(images.is_cached):
        for _ in images.stream(accelerator.process_index, accelerator.num_processes, room=ALL):
            pass
        accelerator.wait_for_everyone()
        share(folder, "*.json", "*.safetensors")
    sizes = images.index().counts
    used = sum(size for size in sizes if size == max([1, *sizes]))
    if used < 2:
        raise ValueError(
            f"The split {split.split!r} of {split.name} gives {used} images to estimate BatchNorm statistics from; at "
            "least 2 are needed. Name another with batchnorm_split (--batchnorm-split)."
        )
    return Statistics(images, {"data": split.key, "split": split.split, **sampled, "used": used, "key": key})


def sample_source(split: Split, processor: BaseImageProcessor, about: dict[str, Any]) -> Source:
    """Some images of a split, as many and drawn with the seed that `about` says."""
    sample = sample_split(split, about["images"], seed=about["seed"])
    prepare = partial(prepare_image, processor)
    return Source(sample, prepare, lambda label: 0, about["on_error"], BATCH)  # no label is looked at


def has_batchnorm(model: PreTrainedModel) -> bool:
    """Whether a model keeps statistics of the images that it was trained on."""
    return any(_keeps_statistics(module) for module in model.modules())


def estimate_statistics(model: PreTrainedModel, statistics: Statistics) -> None:
    """Replace the BatchNorm statistics of a model on the CPU by the mean of those of each batch.

    Only BatchNorm is in training mode; dropout and all else stay as they are in use. Every process does the same.
    """
    import torch

    accelerator, dtype = the_accelerator(), model.dtype
    modules = [module for module in model.modules() if _keeps_statistics(module)]
    momenta = [module.momentum for module in modules]
    # in half precision means would be too coarse, and under autocast they would depend on how a run was launched
    model.to(accelerator.device, torch.promote_types(dtype, torch.float32))
    for module in modules:
        module.reset_running_stats()
        module.momentum = None  # the mean over batches, each with the same weight
        module.train()
    if not statistics.images.is_cached():  # of somebody else's bank they never were; each process does it for itself
        for _ in statistics.images.stream(0, 1, room=ALL):
            pass
    for block in _batches(statistics.images):
        inputs = statistics.images.read(block)
        forward([model], inputs, batch_size=BATCH, accelerator=accelerator, autocast=False)
    for module, momentum in zip(modules, momenta, strict=True):
        module.momentum = momentum
    model.train()  # LeViT forgets what it remembered of the weights only in this mode
    model.to("cpu", dtype).eval()


def _batches(images: Images) -> list[Block]:
    """The blocks that are used: those of full size, so that all have the same weight, or else the largest."""
    sizes = images.index().counts
    largest = max([1, *sizes])
    return [block for block, size in zip(images.blocks, sizes, strict=True) if size == largest]


def _keeps_statistics(module: Any) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm) and module.track_running_stats
