"""Average checkpoints as files: no model is built, and torch is not needed for it."""

from __future__ import annotations

import hashlib
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
from hf_radin.weights import average_tensors
from hf_radin.weights.average_tensors import Tensor

logger = logging.getLogger(__name__)

# What the names of BatchNorm's statistics end with.
STATISTICS = ("running_mean", "running_var")

# The tensors of each checkpoint, by name.
Files = Sequence[Mapping[str, Tensor]]


def refuse_ingredients(output: Path, ingredients: Iterable[Ingredient]) -> None:
    """Never write over what a soup is made of.

    Raises:
        ValueError: if the output folder is that of an ingredient or of an adapter's base model, or the run of one.
    """
    ingredients = list(ingredients)
    bases = [ingredient.base for ingredient in ingredients if ingredient.base]
    for ingredient in [*ingredients, *bases]:
        folder = ingredient.folder.resolve()
        if output.resolve() == folder:
            raise ValueError(
                f"The output {output} is the ingredient {ingredient.id}, which would be lost. Choose another."
            )
        if output.resolve() == folder.parent and folder.name.startswith("checkpoint-"):
            raise ValueError(f"The output {output} is the run of the ingredient {ingredient.id}. Choose another.")


def are_alike(used: Ingredients, files: Files) -> bool:
    """Whether checkpoints can be averaged as files: plain weights, with the same names and kinds of tensors.

    Raises:
        ValueError: if a tensor has different shapes in two of them.
    """
    if any(ingredient.base or ingredient.order or ingredient.trust_remote_code for ingredient in used):
        return False
    first = files[0]
    for file in files:
        if file.keys() != first.keys():
            return False
        for name, tensor in file.items():
            if tensor.dtype not in FLOATS + INTEGERS or (tensor.dtype in FLOATS) != (first[name].dtype in FLOATS):
                return False
    for ingredient, file in zip(used, files, strict=True):
        for name, tensor in file.items():
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"{name} has the shape {first[name].shape} in {used[0].id} and {tensor.shape} in {ingredient.id}: "
                    "leave one of them out."
                )
    return True


def differ_in_statistics(files: Files) -> bool:
    """Whether files have BatchNorm statistics, and not all the same ones, as where these were frozen.

    The average of such statistics is not the statistics of the averaged weights (see `weights.batchnorm`).
    """
    digests = set()
    for file in files:
        names = sorted(name for name in file if name.endswith(STATISTICS))
        if names:  # which an adapter has not
            digests.add(_digest([file[name] for name in names]))
    return len(digests) > 1


def _digest(tensors: Sequence[Tensor]) -> str:
    """A hash of the contents of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        content = memoryview(bytearray(BYTES[tensor.dtype] * len(tensor)))
        tensor.read(0, content)
        digest.update(content)
    return digest.hexdigest()


def widest(files: Files) -> str:
    """The widest float dtype in the files, as safetensors spells it; float32 for float16 and bfloat16 together."""
    return widest_of(tensor.dtype for file in files for tensor in file.values())


def widest_of(dtypes: Iterable[str]) -> str:
    """The widest float dtype, as above."""

    def common(first: str, second: str) -> str:
        if {first, second} == {"F16", "BF16"}:
            return "F32"
        return max(first, second, key=lambda dtype: BYTES[dtype])

    return reduce(common, (dtype for dtype in dtypes if dtype in FLOATS))


def header_of(files: Files, dtype: str) -> Header:
    """Dtype and shape of each tensor of an average: floats in `dtype`, integers as they are."""
    return {
        name: (dtype if tensor.dtype in FLOATS else tensor.dtype, tensor.shape) for name, tensor in files[0].items()
    }


def stream(
    files: Files,
    recipe: Recipe,
    header: Header,
    sink: average_tensors.Sink,
    hashes: average_tensors.FileHashes | None = None,
) -> None:
    """Average all tensors into a sink, with a progress bar if that takes long."""
    total = sum(math.prod(shape) for _, shape in header.values())
    with progress_bar(total=total, desc="Averaging weights", unit="weight", delay=2) as bar:
        dtypes = {name: dtype for name, (dtype, _) in header.items()}
        average_tensors.average(
            files,
            list(recipe.used.values()),
            dtypes,
            sink,
            on_chunk=bar.update,
            ids=list(recipe.used),
            hashes=hashes,
        )


def write_weights(
    folder: Path,
    files: Files,
    recipe: Recipe,
    header: Header,
    max_shard_size: int | str,
    hashes: average_tensors.FileHashes | None = None,
) -> None:
    """Write the average of files, and check that every tensor was written.

    Args:
        hashes: of the files, which are taken while they are read.

    Raises:
        ValueError: if there is not enough room on the disk.
    """
    needed = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in header.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"The soup takes {needed:,} bytes, and there are {free:,} free where it is written: make room, or name "
            "another place (--output)."
        )
    average_tensors.write(
        folder, header, partial(stream, files, recipe, header, hashes=hashes), max_shard_size=max_shard_size
    )
    with average_tensors.open_files(folder) as written:
        if {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()} != header:
            raise RuntimeError(f"{len(written)} tensors were written where {len(header)} were meant; this is a bug.")
