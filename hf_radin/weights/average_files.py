"""Average checkpoints as files: no model is built, and torch is not needed for it."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path

from hf_radin.checkpoints.files import BYTES, FLOATS, INTEGERS, Header
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.processes import progress_bar
from hf_radin.weights import tensors
from hf_radin.weights.tensors import Tensor

logger = logging.getLogger(__name__)

Files = Sequence[Mapping[str, Tensor]]


def refuse_ingredients(output: Path, ingredients: Iterable[Ingredient]) -> None:
    """Never write over what a soup is made of.

    Raises:
        ValueError: if the output folder is that of an ingredient.
    """
    every = [*ingredients]
    for one in [*every, *(one.base for one in every if one.base)]:
        folder = one.folder.resolve()
        if output.resolve() == folder:
            raise ValueError(f"The output {output} is the ingredient {one.id}, which would be lost. Choose another.")
        if output.resolve() == folder.parent and folder.name.startswith("checkpoint-"):
            raise ValueError(f"The output {output} is the run of the ingredient {one.id}. Choose another.")


def are_alike(used: Ingredients, files: Files) -> bool:
    """Whether checkpoints can be averaged as files: plain weights, under the same names.

    Raises:
        ValueError: if a tensor has another shape in one of them.
    """
    if any(one.base or one.order or one.trust_remote_code for one in used):
        return False
    if any(one.dtype not in FLOATS + INTEGERS for file in files for one in file.values()):
        return False
    if any(file.keys() != files[0].keys() for file in files):
        return False
    if any((one.dtype in FLOATS) != (files[0][name].dtype in FLOATS) for file in files for name, one in file.items()):
        return False
    for one, file in zip(used, files, strict=True):
        for name, tensor in file.items():
            if tensor.shape != files[0][name].shape:
                raise ValueError(
                    f"{name} has the shape {files[0][name].shape} in {used[0].id} and {tensor.shape} in {one.id}: "
                    "leave one of them out."
                )
    return True


def widest(files: Files) -> str:
    """The dtype of the ingredients, as safetensors spells it; float32 if they hold both float16 and bfloat16."""

    def both(one: str, other: str) -> str:
        if {one, other} == {"F16", "BF16"}:
            return "F32"
        return max(one, other, key=lambda kind: BYTES[kind])

    return reduce(both, (one.dtype for file in files for one in file.values() if one.dtype in FLOATS))


def header_of(files: Files, kind: str) -> Header:
    """Of each tensor of an average its dtype and shape; integers stay as they are."""
    return {name: (kind if one.dtype in FLOATS else one.dtype, one.shape) for name, one in files[0].items()}


def stream(files: Files, recipe: Recipe, header: Header, sink: tensors.Sink) -> None:
    """Average all tensors, with a bar where that takes long."""
    total = sum(math.prod(shape) for _, shape in header.values())
    with progress_bar(total=total, desc="Averaging weights", unit="weight", delay=2) as bar:
        dtypes = {name: kind for name, (kind, _) in header.items()}
        tensors.average(files, list(recipe.used.values()), dtypes, sink, on_chunk=bar.update, ids=list(recipe.used))


def write_weights(folder: Path, files: Files, recipe: Recipe, header: Header, max_shard_size: int | str) -> None:
    """Average into files, and see that all is there that went in.

    Raises:
        ValueError: if the disk is too small for them.
    """
    needed = sum(BYTES[kind] * math.prod(shape) for kind, shape in header.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"The soup takes {needed:,} bytes, and there are {free:,} free where it is written: make room, or name "
            "another place (--output)."
        )
    tensors.write(folder, header, partial(stream, files, recipe, header), max_shard_size=max_shard_size)
    with tensors.open_files(folder) as written:
        if {name: (one.dtype, one.shape) for name, one in written.items()} != header:
            raise RuntimeError(f"{len(written)} tensors were written where {len(header)} were meant; this is a bug.")
