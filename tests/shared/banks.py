"""Banks: made with options that users don't have, of other kinds, and read as a user of plain transformers would."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

import hf_radin
from hf_radin.images.sample import Pilot
from hf_radin.images.split import DataSource
from hf_radin.logits import compute
from hf_radin.logits.manifest import RunOptions
from hf_radin.runtime.processes import Processes

Kind = TypeVar("Kind", bound=hf_radin.LogitBank)


def plain_inputs(bank: hf_radin.LogitBank) -> list[dict[str, torch.Tensor]]:
    """Of each block of images what a model takes, as the image processor made it."""
    blocks = [bank.images.read(block) for block in bank.images.blocks]
    return [{name: value.to("cpu").clone() for name, value in inputs.items()} for inputs in blocks]


def make_bank(models: Any, data: Any, folder: Path, **options: Any) -> hf_radin.LogitBank:
    """The bank of some checkpoints on the split `validation`.

    Args:
        models, data: what `gather` and `compute_logits` take.
        folder: of the cache.
        options: of `RunOptions`, those that `compute_logits` does not have included, and `pilot`.
    """
    pilot = Pilot.of(options.pop("pilot", None))
    columns = {name: options.pop(name) for name in ("image_column", "label_column") if name in options}
    ingredients = models if isinstance(models, hf_radin.Ingredients) else hf_radin.gather(models)
    source = DataSource(data, **columns)
    return compute.make_bank(ingredients, source, RunOptions(cache_dir=folder, **options), Processes(), pilot=pilot)


def as_kind(bank: hf_radin.LogitBank, kind: type[Kind]) -> Kind:
    """The same bank as one of a subclass."""
    return kind(**{field.name: getattr(bank, field.name) for field in fields(bank) if field.init})
