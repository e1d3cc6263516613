"""Check each checkpoint before the first image is read: it loads and runs, with finite weights of a common start."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints.forward import forward
from hf_radin.checkpoints.model import class_axes
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.ingredients.kinship import (
    ENTRIES,
    KIN,
    Cosines,
    Relation,
    Weights,
    inner_products,
    least_cosines,
    relate,
    sample,
)
from hf_radin.runtime.files import digest
from hf_radin.runtime.processes import Processes, is_main_process
from hf_radin.runtime.schema import known_arrays, read_arrays, write_arrays
from hf_radin.runtime.text import one_line
from hf_radin.sharing.digests import TensorDigests, differing
from hf_radin.weights.head import differ_in_heads

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The id of a checkpoint, or nothing if the remark is about all of them, and the remark.
Remark = tuple[str, str]


def check_models(
    ingredients: Ingredients,
    to_run: Collection[str],
    home: Path,
    *,
    example: Mapping[str, torch.Tensor] | None,
    dtype: torch.dtype,
    processes: Processes,
) -> None:
    """Load the ingredients, each in one process and one at a time; write a sample of its weights to disk.

    Args:
        to_run: ids of those that are run later, and therefore shown an image now.
        home: where the samples are.
        example: an image of the split, prepared; None if there is none to show.

    Raises:
        ValueError: if a weight is missing, or the processor makes of an image what the model does not take.
    """
    paths = {ingredient.id: _sample_path(home, ingredient, dtype) for ingredient in ingredients}
    unchecked = processes.decide(
        lambda: [name for name, path in paths.items() if known_arrays(path, path.stem) is None or name in to_run]
    )
    heads: dict[str, int] | None = None  # the same of all: they are of one architecture, with the same classes
    for ingredient in ingredients.select(unchecked[processes.index :: processes.count]):
        model = ingredient.load_model(dtype)
        heads = heads or class_axes(ingredient.config, trust_remote_code=ingredient.trust_remote_code)
        weights = sample(model, heads)
        path = paths[ingredient.id]
        arrays = {name: np.asarray(value) for name, value in vars(weights).items()}
        write_arrays(path, arrays, path.stem)
        if example is not None and ingredient.id in to_run and not weights.broken:
            _show(example, ingredient.id, model.to(processes.device), processes.accelerator)
    processes.wait()
    processes.sync_files(home / "weights", *(path.name for path in paths.values()))


def usable_ingredients(
    ingredients: Ingredients, home: Path, strangers: str, dtype: torch.dtype, processes: Processes
) -> tuple[Ingredients, list[Remark]]:
    """The ingredients whose weights are finite numbers, and remarks about the others.

    Args:
        home: where the samples of their weights are.
        strangers: `drop` leaves out those with a different start, `warn` names them, `keep` does neither.
        dtype: of the weights while running.

    Raises:
        ValueError: if fewer than two are left.
    """
    usable, remarks = processes.decide(lambda: _choose(ingredients, home, strangers, dtype))
    lines = [f"{name} {text}".strip() for name, text in remarks]
    if len(usable) < 2:
        count = (
            f"A soup needs at least two ingredients that share a start; {len(usable)} of {len(ingredients)} are left."
        )
        raise ValueError(" ".join([*lines, count]))
    if is_main_process():
        for line in lines:
            logger.warning("%s", line)
        if strangers == "warn" and len(usable) == len(ingredients) and any(name for name, _ in remarks):
            logger.warning("strangers='drop' (--strangers drop) leaves out those that are named.")
    return ingredients.select(usable), remarks


def load_inner_products(ingredients: Ingredients, home: Path, dtype: torch.dtype, processes: Processes) -> np.ndarray:
    """Inner products of all pairs of ingredients, as differences from their mean, from samples of their weights.

    A checkpoint without a sample is loaded.

    Returns:
        `(models, models)`.
    """
    check_models(ingredients, [], home, example=None, dtype=dtype, processes=processes)
    return processes.decide(
        lambda: inner_products([_read_sample(_sample_path(home, ingredient, dtype)) for ingredient in ingredients])
    )


def load_cosines(ingredients: Ingredients, home: Path, dtype: torch.dtype, processes: Processes) -> Cosines:
    """How alike the ingredients are that are least alike, from samples of their weights, as above."""
    check_models(ingredients, [], home, example=None, dtype=dtype, processes=processes)
    return processes.decide(
        lambda: least_cosines([_read_sample(_sample_path(home, ingredient, dtype)) for ingredient in ingredients])
    )


def load_digests(
    ingredients: Ingredients, home: Path, dtype: torch.dtype, processes: Processes
) -> list[TensorDigests]:
    """The hashes of all tensors of each ingredient, as they are when it runs."""
    check_models(ingredients, [], home, example=None, dtype=dtype, processes=processes)

    def load() -> list[TensorDigests]:
        samples = [_read_sample(_sample_path(home, ingredient, dtype)) for ingredient in ingredients]
        pairs = [zip(weights.names.tolist(), weights.digests.tolist(), strict=True) for weights in samples]
        return [TensorDigests({name.decode(): sha256.decode() for name, sha256 in of_model}) for of_model in pairs]

    return processes.decide(load)


def differ_in_heads_alone(ingredients: Ingredients, home: Path, dtype: torch.dtype, processes: Processes) -> bool:
    """Whether all tensors of the ingredients are the same but those of the head, buffers included.

    Then they give it the same features of an image, and as it is linear, the average of the heads makes of these what
    the ensemble is: soup and ensemble are one function, up to rounding.
    """
    names = differing(load_digests(ingredients, home, dtype, processes))
    return processes.decide(lambda: differ_in_heads(ingredients, names))


def share_statistics(ingredients: Ingredients, home: Path, dtype: torch.dtype, processes: Processes) -> bool:
    """Whether ingredients that were checked have the very same BatchNorm statistics, as where these were frozen."""

    def share() -> bool:
        samples = [_read_sample(_sample_path(home, ingredient, dtype)) for ingredient in ingredients]
        return len({weights.statistics for weights in samples}) == 1

    return processes.decide(share)


def _show(example: Mapping[str, torch.Tensor], name: str, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Run a model on one image."""
    try:
        inputs = {field: value[None] for field, value in example.items()}
        forward([model], inputs, batch_size=1, accelerator=accelerator, context=accelerator.autocast)
    except Exception as error:  # each architecture fails in its own way
        raise ValueError(
            f"{name}: its model can't be run on what its image processor makes of an image of the split: "
            f"{one_line(error)}"
        ) from error


def _choose(
    ingredients: Ingredients, home: Path, strangers: str, dtype: torch.dtype
) -> tuple[list[str], list[Remark]]:
    """The ids of the usable ingredients, and the remarks."""
    samples = {ingredient.id: _read_sample(_sample_path(home, ingredient, dtype)) for ingredient in ingredients}
    remarks = [
        (name, f"has NaN or infinite weights in {weights.broken}: left out of the soup.")
        for name, weights in samples.items()
        if weights.broken
    ]
    samples = {name: weights for name, weights in samples.items() if not weights.broken}
    if len(samples) < 2 or strangers == "keep":
        return list(samples), remarks
    relations = relate(samples)
    family = [relation.id for relation in relations if relation.is_kin]
    if len(family) == len(samples):
        return family, remarks
    if len(family) == 1:  # where no two share a start, none of them is the odd one out
        return [] if strangers == "drop" else list(samples), [*remarks, ("", _no_family(relations))]
    differences = _different_starts(relations)
    if strangers == "drop":
        return family, remarks + [(name, f"{text} It is left out of the soup.") for name, text in differences]
    warning = "Averages of weights with different starts are most often worth nothing."
    return list(samples), remarks + [(name, f"{text} {warning}") for name, text in differences]


def _no_family(relations: list[Relation]) -> str:
    largest = max(relation.nearest for relation in relations)
    return (
        f"No two of these {len(relations)} checkpoints seem to share a start: the cosines between their weights are "
        f"at most {largest:.2f}, and of fine-tunes of one start above {KIN}. Their average is most likely worth "
        "nothing."
    )


def _different_starts(relations: list[Relation]) -> list[Remark]:
    """A remark for each checkpoint that is not of the family."""
    family = [relation for relation in relations if relation.is_kin]
    farthest = max(relation.distance for relation in family)
    least = min(relation.cosine for relation in family)
    return [
        (
            relation.id,
            f"does not seem to share its start with {len(family)} others: its weights lie {relation.distance:.2f} "
            f"from the mean of these (in lengths of it) with a cosine of {relation.cosine:.2f}, and theirs at most "
            f"{farthest:.2f} with at least {least:.2f}.",
        )
        for relation in relations
        if not relation.is_kin
    ]


def _sample_path(home: Path, ingredient: Ingredient, dtype: torch.dtype) -> Path:
    """By dtype too: what is a number in float32 may not be a number in float16."""
    names = [field.name for field in fields(Weights)]  # a sample of an earlier version has others
    return home / "weights" / f"{digest(ingredient.key, ingredient.order, str(dtype), ENTRIES, names)}.npz"


def _read_sample(path: Path) -> Weights:
    arrays = read_arrays(path, path.stem, way_out="Remove it and run the same again.")
    values: dict[str, Any] = {name: array if array.ndim else array.item() for name, array in arrays.items()}
    return Weights(**values)
