"""Average weights: many checkpoints in, one out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_radin import adapter, checkpoint, modeling
from hf_radin.batchnorm import Statistics, estimate_statistics
from hf_radin.files import check_output, write_folder
from hf_radin.ingredients import Ingredients
from hf_radin.processes import on_main_process
from hf_radin.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


def average(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    statistics: Statistics | None = None,
) -> dict[str, torch.Tensor]:
    """The weighted average of checkpoints, `sum_k p_k w_k`.

    Args:
        ingredients: must hold all that the recipe uses.
        output: a folder to write the soup to, as an ordinary checkpoint; none by default. With several processes the
            main one writes.
        overwrite: allow an output folder that holds something.
        dtype: of the result; by default that of the ingredients, float32 if they differ.
        statistics: images to estimate BatchNorm statistics from (`LogitBank.statistics`); without them the statistics
            of the ingredients are averaged like all else.

    Returns:
        The tensors of the averaged model's `state_dict()`.

    Raises:
        ValueError: if the recipe names an ingredient that is not there, or one of them can't be loaded; if the output
            folder is not empty, or an ingredient's.
    """
    if output is not None:
        refuse_ingredients(Path(output), ingredients)
        check_output(Path(output), overwrite=overwrite)
    model = average_model(ingredients, recipe, dtype=dtype, statistics=statistics)
    if output is not None:
        processor = ingredients.select(recipe.used)[0].processor
        on_main_process(
            lambda: write_folder(Path(output), lambda new: save_checkpoint(model, processor, new), overwrite=overwrite)
        )
    return model.state_dict()


def save_checkpoint(model: PreTrainedModel, processor: BaseImageProcessor, folder: Path) -> None:
    """Model and image processor, as `from_pretrained` reads them."""
    with modeling.quiet_transformers():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def refuse_ingredients(output: Path, ingredients: Ingredients) -> None:
    """Never write over what a soup is made of.

    Raises:
        ValueError: if the output folder is that of an ingredient.
    """
    for one in [*ingredients, *(one.base for one in ingredients if one.base)]:
        folder = one.folder.resolve()
        if output.resolve() == folder:
            raise ValueError(f"The output {output} is the ingredient {one.id}, which would be lost. Choose another.")
        if output.resolve() == folder.parent and folder.name.startswith("checkpoint-"):
            raise ValueError(f"The output {output} is the run of the ingredient {one.id}. Choose another.")


def average_model(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    dtype: str | torch.dtype | None = None,
    statistics: Statistics | None = None,
) -> PreTrainedModel:
    """The averaged model, in evaluation mode on the CPU. See `average`."""
    model = _averaged(ingredients, recipe, dtype)
    if statistics is not None and len(recipe.used) > 1:
        estimate_statistics(model, statistics)
    return model


def _averaged(ingredients: Ingredients, recipe: Recipe, dtype: str | torch.dtype | None) -> PreTrainedModel:
    """The average of all tensors.

    Files are averaged tensor by tensor where all of them name their tensors alike. Different versions of transformers
    name them differently on disk (transformers#41693), but not in the modules: there the loaded models are averaged,
    and so are adapters, and classes that stand in different orders.
    """
    used = ingredients.select(recipe.used)
    for one in used:
        one.download()
    with ExitStack() as stack:
        files = [
            stack.enter_context(checkpoint.open_tensors(one.folder, allow_pickle=one.allow_pickle))
            for one in [*used, *dict.fromkeys(one.base for one in used if one.base)]
        ]
        target = checkpoint.as_dtype(dtype) if dtype else _widest_dtype(files)
        plain = not any(one.base or one.order for one in used)
        if plain and all(file.keys() == files[0].keys() for file in files):
            sums: dict[str, torch.Tensor] = {}
            for name in files[0]:
                for file, weight in zip(files, recipe.used.values(), strict=True):
                    _add(sums, name, file[name](), weight)
                sums[name] = _rounded(sums[name], target)
            return modeling.load_model(
                used[0].folder,
                dtype=target,
                config=used[0].config,
                tensors=sums,
                trust_remote_code=used[0].trust_remote_code,
            )
    sums = {}
    for one, weight in zip(used, recipe.used.values(), strict=True):
        model = adapter.load(one, torch.float64)
        for name, tensor in model.state_dict().items():
            _add(sums, name, tensor, weight)
    model = model.to(target)
    model.load_state_dict({name: _rounded(tensor, target) for name, tensor in sums.items()})
    return model


def _add(sums: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, weight: float) -> None:
    """Add a tensor's share to the sum of its name, in float64; of integers, which count or index, the first stays.

    In float64 the average of equal float32 tensors is that tensor again once it is rounded, for any weights. Product
    and sum are rounded one after the other, not fused as some processors would: all machines give the same bits.
    """
    if not tensor.is_floating_point():
        sums.setdefault(name, tensor)
    elif name not in sums:
        sums[name] = tensor.to(torch.float64) * weight
    elif sums[name].shape != tensor.shape:
        raise ValueError(
            f"{name} has the shapes {tuple(sums[name].shape)} and {tuple(tensor.shape)} in two ingredients."
        )
    else:
        sums[name] += tensor.to(torch.float64) * weight


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _widest_dtype(files: list[dict[str, Callable[[], torch.Tensor]]]) -> torch.dtype:
    """The ingredients' dtype; float32 if they hold both float16 and bfloat16."""
    dtypes = {tensor.dtype for file in files for read in file.values() if (tensor := read()).is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes)
