"""Try each checkpoint before the first image is read: it loads, it runs, its weights are numbers, and it is kin."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from hf_radin.checkpoints.forward import forward
from hf_radin.checkpoints.model import class_axes
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.ingredients.kinship import ENTRIES, KIN, Relation, Weights, inner_products, relate, sample
from hf_radin.runtime.file_sync import share
from hf_radin.runtime.files import digest, write_atomically
from hf_radin.runtime.processes import is_main_process, on_main_process

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# The id of a checkpoint, or nothing if it is about all, and what is to be said of it.
Remark = tuple[str, str]


def try_all(
    ingredients: Ingredients,
    missing: list[str],
    home: Path,
    *,
    example: dict[str, torch.Tensor] | None,
    dtype: torch.dtype,
    accelerator: Accelerator,
) -> None:
    """Load the ingredients, each in one process and one at a time; keep a sample of its weights.

    Args:
        missing: ids of those that are to be run, and therefore shown an image.
        home: where the samples are kept.
        example: an image of the split, prepared; none if there is none to show.

    Raises:
        ValueError: if a weight is missing, or the processor makes of an image what the model does not take.
    """
    todo = on_main_process(
        lambda: [one.id for one in ingredients if one.id in missing or not _has_sample(_sample_path(home, one, dtype))]
    )
    heads: dict[str, int] | None = None  # of all the same: they are of one architecture, with the same classes
    for one in ingredients.select(todo[accelerator.process_index :: accelerator.num_processes]):
        model = one.load_model(dtype)
        heads = heads or class_axes(model.config, trust_remote_code=one.trust_remote_code)
        weights = sample(model, heads)
        write_atomically(_sample_path(home, one, dtype), partial(np.savez, **vars(weights)))
        if example is not None and one.id in missing and not weights.broken:
            _show(example, one, model.to(accelerator.device), accelerator)
    accelerator.wait_for_everyone()
    share(home / "weights", *(_sample_path(home, one, dtype).name for one in ingredients))


def _show(example: dict[str, torch.Tensor], ingredient: Ingredient, model: Any, accelerator: Accelerator) -> None:
    try:
        inputs = {name: value[None] for name, value in example.items()}
        forward([model], inputs, batch_size=1, accelerator=accelerator)
    except Exception as error:  # each architecture fails in its own way
        raise ValueError(
            f"{ingredient.id}: its model can't be run on what its image processor makes of an image of the split: "
            f"{error}"
        ) from error


def sound(
    ingredients: Ingredients, home: Path, strangers: str, dtype: torch.dtype
) -> tuple[Ingredients, list[Remark]]:
    """Those whose weights are numbers, and what is to be said of the others.

    Args:
        dtype: of the weights while running.
        strangers: `drop` leaves out those of another start, `warn` says which these are, `keep` does neither.

    Raises:
        ValueError: if fewer than two are left.
    """
    kept, remarks = on_main_process(lambda: _choose(ingredients, home, strangers, dtype))
    said = [f"{name} {text}".strip() for name, text in remarks]
    if len(kept) < 2:
        left = f"A soup needs at least two ingredients that share a start; {len(kept)} of {len(ingredients)} are left."
        raise ValueError(" ".join([*said, left]))
    if is_main_process():
        for line in said:
            logger.warning("%s", line)
        if strangers == "warn" and len(kept) == len(ingredients) and any(name for name, _ in remarks):
            logger.warning("strangers='drop' (--drop-strangers) leaves out those that are named.")
    return ingredients.select(kept), remarks


def _choose(
    ingredients: Ingredients, home: Path, strangers: str, dtype: torch.dtype
) -> tuple[list[str], list[Remark]]:
    """The ids of those that are kept, and the remarks."""
    weights = {one.id: _read_sample(_sample_path(home, one, dtype)) for one in ingredients}
    remarks = [
        (name, f"has NaN or infinite weights in {one.broken}: left out of the soup.")
        for name, one in weights.items()
        if one.broken
    ]
    weights = {name: one for name, one in weights.items() if not one.broken}
    if len(weights) < 2 or strangers == "keep":
        return list(weights), remarks
    relations = relate(weights)
    kin = [one.id for one in relations if one.is_kin]
    if len(kin) == len(weights):
        return kin, remarks
    if len(kin) == 1:  # of models without kin none is more at home than the others
        return [] if strangers == "drop" else list(weights), [*remarks, ("", _without_kin(relations))]
    found = _apart(relations)
    if strangers == "drop":
        return kin, remarks + [(name, f"{text} It is left out of the soup.") for name, text in found]
    warning = "Averages of weights with different starts are most often worth nothing."
    return list(weights), remarks + [(name, f"{text} {warning}") for name, text in found]


def _without_kin(relations: list[Relation]) -> str:
    largest = max(one.nearest for one in relations)
    return (
        f"No two of these {len(relations)} checkpoints seem to share a start: the cosines between their weights are "
        f"at most {largest:.2f}, and of fine-tunes of one start above {KIN}. Their average is most likely worth "
        "nothing."
    )


def load_inner_products(
    ingredients: Ingredients, home: Path, dtype: torch.dtype, accelerator: Accelerator
) -> np.ndarray:
    """Of all pairs of ingredients, as they lie to their mean: `(models, models)`, from samples of their weights.

    Where there is no sample the checkpoint is loaded.
    """
    try_all(ingredients, [], home, example=None, dtype=dtype, accelerator=accelerator)

    return on_main_process(
        lambda: inner_products([_read_sample(_sample_path(home, one, dtype)) for one in ingredients])
    )


def _apart(relations: list[Relation]) -> list[Remark]:
    """A remark for each that is not of the family."""
    kin = [one for one in relations if one.is_kin]
    farthest, least = max(one.distance for one in kin), min(one.cosine for one in kin)
    return [
        (
            one.id,
            f"does not seem to share its start with {len(kin)} others: its weights lie {one.distance:.2f} from the "
            f"mean of these (in lengths of it) with a cosine of {one.cosine:.2f}, and theirs at most {farthest:.2f} "
            f"with at least {least:.2f}.",
        )
        for one in relations
        if not one.is_kin
    ]


def _sample_path(home: Path, ingredient: Ingredient, dtype: torch.dtype) -> Path:
    """By dtype too: what is a number in float32 may not be one in float16."""
    return home / "weights" / f"{digest(ingredient.key, ingredient.order, str(dtype), ENTRIES)}.npz"


def _has_sample(path: Path) -> bool:
    """Whether there is one that can be read; a broken one is taken anew."""
    try:
        _read_sample(path)
    except ValueError:
        return False
    return True


def _read_sample(path: Path) -> Weights:
    try:
        with np.load(path) as arrays:
            found = Weights(arrays["entries"], str(arrays["broken"]))
        if found.entries.ndim != 1 or found.entries.dtype != np.float32:
            raise ValueError(f"entries of {found.entries.dtype}, of the shape {found.entries.shape}")
        if not (found.broken or np.isfinite(found.entries).all()):
            raise ValueError("entries that are no finite numbers")
        return found
    except (ValueError, OSError, KeyError, EOFError, BadZipFile, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error}); remove it and run the same again.") from error
