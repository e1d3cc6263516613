"""Average checkpoints as files: no model is built, and torch is not needed for it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial, reduce
from pathlib import Path
from typing import Any

from hf_radin import card, checkpoint, tensors
from hf_radin.checkpoint import DTYPES, FLOATS, INTEGERS, SHARD, Header
from hf_radin.fields import shared_fields
from hf_radin.files import write_folder
from hf_radin.ingredients import Ingredient, Ingredients
from hf_radin.processes import progress_bar
from hf_radin.recipe import Recipe
from hf_radin.recipe_file import RECIPE, as_kept, read_recipe_file
from hf_radin.tensors import Tensor

logger = logging.getLogger(__name__)

Files = Sequence[Mapping[str, Tensor]]

# Fields of a configuration that a soup does not take over: what a model returns beside its logits
# (`modeling.OUTPUT_FIELDS`), and the older name of its dtype.
UNSAVED = ("output_attentions", "output_hidden_states", "return_dict", "torch_dtype")


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
        return max(one, other, key=lambda kind: checkpoint.BYTES[kind])

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
    needed = sum(checkpoint.BYTES[kind] * math.prod(shape) for kind, shape in header.values())
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


def cook_files(
    path: Path,
    output: Path,
    *,
    overwrite: bool = False,
    dtype: str | None = None,
    max_shard_size: int | str = SHARD,
) -> bool:
    """Cook the soup of a `recipe.json` from files alone, where these are all that it takes.

    Its ingredients were vetted and run when the recipe was made, and are at the very revisions that it names; what is
    written has their tensors, each of them, with the recipe and a card.

    Returns:
        whether it was cooked: adapters, classes in other orders, statistics of BatchNorm and tensors under different
        names take models, for which see `cook` and `average`.

    Raises:
        ValueError: if an ingredient is not there or not what it was, or the output is one of them.
    """
    path = path / RECIPE if path.is_dir() else path
    fields = read_recipe_file(path)
    recipe = Recipe.from_json(json.dumps(fields["recipe"]))
    listed = {one["id"]: one for one in fields["ingredients"] if one["id"] in recipe.used}
    used = Ingredients([_ingredient(listed[name], fields) for name in recipe.used if name in listed])
    odd = any(one.is_away for one in used) or any(
        listed[one.id].get("base") or listed[one.id].get("order") for one in used
    )
    if odd or len(used) < len(recipe.used) or fields.get("batchnorm") or fields.get("image_processor"):
        return False
    if not (fields.get("measurements") and fields.get("classes") and fields.get("versions")):  # made by hand
        return False
    with ThreadPoolExecutor(tensors.THREADS) as pool:
        folders = list(pool.map(Ingredient.download, used))
    refuse_ingredients(output, (_ingredient(one, fields) for one in fields["ingredients"] if not one["repo_id"]))
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(tensors.open_files(folder)) for folder in folders]
        except ValueError:  # pickles, or adapters
            return False
        configs = [json.loads((folder / checkpoint.CONFIG).read_text(encoding="utf-8")) for folder in folders]
        if not all(isinstance(config, dict) for config in configs):
            return False
        config = {name: value for name, value in shared_fields(configs).items() if name not in UNSAVED}
        names = config.get("id2label")
        if not isinstance(names, dict) or not any(one.dtype in FLOATS for one in files[0].values()):
            return False
        if not are_alike(used, files) or [names.get(str(one)) for one in range(len(names))] != fields["classes"]:
            return False
        numbers = {name: int(number) for number, name in names.items()}
        if config.get("label2id") != numbers:  # some scripts write texts into it
            config["label2id"] = numbers
        config.setdefault("architectures", [fields["architecture"]] if fields.get("architecture") else None)
        kind = DTYPES[dtype] if dtype else widest(files)
        header = header_of(files, kind)
        saved_dtype = next(name for name, spelling in DTYPES.items() if spelling == kind)
        contents = card.contents(as_kept(fields, saved_dtype), path, license=card.license_beside(path))

        def fill(new: Path) -> None:
            write_weights(new, files, recipe, header, max_shard_size)
            config["dtype"] = saved_dtype
            (new / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in checkpoint.PROCESSOR_FILES:
                if (folders[0] / name).is_file():
                    shutil.copyfile(folders[0] / name, new / name)
            for name, content in contents.items():
                (new / name).write_bytes(content)

        write_folder(output, fill, overwrite=overwrite)
    return True


def _ingredient(one: dict[str, Any], fields: dict[str, Any]) -> Ingredient:
    """As a recipe lists it."""
    return Ingredient(
        id=one["id"],
        revision=one["revision"],
        folder=Path(one["id"]),
        labels=tuple(fields.get("classes") or ()),
        architecture="",
        repo_id=one["repo_id"],
        stamp=one.get("stamp"),
        subfolder=one.get("subfolder") or "",
    )
