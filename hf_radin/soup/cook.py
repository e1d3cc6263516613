"""Cook a soup: average its ingredients into a checkpoint with a recipe and a card, now or again from `recipe.json`."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.fields import shared_fields
from hf_radin.checkpoints.files import CONFIG, DTYPES, FLOATS, PROCESSOR_FILES, SHARD, as_dtype, shard_size
from hf_radin.checkpoints.processor import check_processor, describe_processor
from hf_radin.images.cache import find_home
from hf_radin.images.split import OBJECT, DataSource, open_split
from hf_radin.ingredients.card_metadata import describe_ingredient
from hf_radin.ingredients.gather import locate
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import check_output, write_folder
from hf_radin.runtime.processes import on_main_process, the_accelerator
from hf_radin.soup import card
from hf_radin.soup.recipe_file import RECIPE, as_kept, read_recipe_file, unmeasured
from hf_radin.weights import tensors
from hf_radin.weights.average import average_model, saved_dtype, write_average
from hf_radin.weights.average_files import are_alike, header_of, refuse_ingredients, widest, write_weights
from hf_radin.weights.batchnorm import Statistics, prepare_statistics

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Fields of a configuration that a soup does not take over: what a model returns beside its logits
# (`modeling.OUTPUT_FIELDS`), and the older name of its dtype.
UNSAVED = ("output_attentions", "output_hidden_states", "return_dict", "torch_dtype")


def average(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = SHARD,
    statistics: Statistics | None = None,
    about: dict[str, Any] | None = None,
    license: str | None = None,
) -> dict[str, torch.Tensor] | None:
    """The weighted average of checkpoints, `sum_k p_k w_k`.

    Sums are taken in float64, of 16-bit weights in float32, and rounded once. Where files name their tensors alike,
    a written average takes one pass over them, and memory for a few chunks; elsewhere the loaded models are averaged,
    two of them in memory.

    Args:
        ingredients: must hold all that the recipe uses; of a weight of zero nothing is read.
        output: a folder to write the soup to, as an ordinary checkpoint with `recipe.json` and a card, under the names
            that the first ingredient's files use; none by default. With several processes the main one writes.
        overwrite: allow an output folder that holds something.
        dtype: of the result; by default that of the ingredients, float32 if they differ.
        max_shard_size: of a file of weights, as in `5GB`; as in transformers.
        statistics: images to estimate BatchNorm statistics from (`LogitBank.statistics`); without them the statistics
            of the ingredients are averaged like all else.
        about: what a `recipe.json` says of this recipe, to be written beside the weights; by default that nothing was
            measured of it.
        license: for the card beside them; by default that of the ingredients, if they agree.

    Returns:
        The tensors of the averaged model's `state_dict()`; None if they were written.

    Raises:
        ValueError: if the recipe names an ingredient that is not there, or one of them can't be loaded; if the output
            folder is not empty, or an ingredient's; if the disk is too small, or `max_shard_size` is no size.
    """
    max_shard_size = shard_size(max_shard_size)
    if dtype is not None:
        as_dtype(dtype)
    if output is None:
        return average_model(ingredients, recipe, dtype=dtype, statistics=statistics).state_dict()
    folder = Path(output)
    check_output(folder, overwrite=overwrite)
    refuse_ingredients(folder, ingredients)
    options: dict[str, Any] = {"dtype": dtype, "statistics": statistics, "max_shard_size": max_shard_size}

    def fill(new: Path) -> None:
        saved = str(as_dtype(dtype)).removeprefix("torch.") if dtype else saved_dtype(ingredients, recipe)
        fields = as_kept(about, saved) if about else _unmeasured(ingredients, recipe, statistics, saved)
        contents = card.contents(fields, folder / RECIPE, license=license)  # refused before anything is averaged
        write_average(ingredients, recipe, new, **options)
        for name, content in contents.items():
            (new / name).write_bytes(content)

    on_main_process(lambda: write_folder(folder, fill, overwrite=overwrite))
    return None


def _unmeasured(ingredients: Ingredients, recipe: Recipe, statistics: Statistics | None, dtype: str) -> dict[str, Any]:
    """What a `recipe.json` says of an average that nobody measured."""
    used = ingredients.select(recipe.used)
    about = {
        "processor": describe_processor(used[0].processor),
        "classes": list(used.labels),
        "architecture": used[0].architecture,
        "image_processor": used[0].image_processor,
        "batchnorm": statistics and asdict(statistics.record),
    }
    weights = {"ingredients": list(recipe.used), "weights": list(recipe.used.values())}
    return unmeasured(weights, [asdict(describe_ingredient(ingredient)) for ingredient in used], about, dtype)


def cook_recipe(
    path: Path,
    output: Path,
    *,
    models: list[str] | None = None,
    dataset: str | Path | None = None,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    dtype: str | None = None,
    max_shard_size: int | str = SHARD,
    **options: Any,
) -> None:
    """Cook the soup of a `recipe.json` into a folder, bit for bit: from files where these are all that it takes.

    Args:
        path: the file, or the soup's folder.
        models: where the checkpoints are now; by default where the recipe says.
        dataset: where the images for BatchNorm statistics are now; by default where the recipe says.
        options: as `gather` takes them.

    Raises:
        ValueError: if an ingredient is not there or not what it was, or the output is one of them, or the recipe's
            own folder.
    """
    check_output(output, overwrite=overwrite)
    if output.resolve() in (path.resolve(), path.resolve().parent):
        raise ValueError(f"The output {output} is the folder of the recipe, which would be lost. Choose another.")
    written: dict[str, Any] = {
        "overwrite": overwrite,
        "dtype": dtype,
        "max_shard_size": shard_size(max_shard_size),
    }
    if not models and not any(options.values()) and cook_files(path, output, **written):
        return
    path = path / RECIPE if path.is_dir() else path
    ingredients, recipe = cook(path, models=models, **{name: value for name, value in options.items() if value})
    statistics = cook_statistics(path, ingredients, dataset=dataset, cache_dir=cache_dir)
    about, license = read_recipe_file(path), card.license_beside(path)
    average(ingredients, recipe, output=output, statistics=statistics, about=about, license=license, **written)


def cook(path: Path, *, models: list[str] | None = None, **options: Any) -> tuple[Ingredients, Recipe]:
    """The ingredients and the recipe of a `recipe.json`, each ingredient at the very revision that it names.

    Args:
        path: the file, or the soup's folder.
        models: where the checkpoints are now; by default where the recipe says.
        options: as `gather` takes them.

    Raises:
        ValueError: if an ingredient is not there, or is not what it was.
    """
    path = path / RECIPE if path.is_dir() else path
    fields = read_recipe_file(path)
    recipe = Recipe.from_json(json.dumps(fields["recipe"]))
    listed = {one["id"]: one for one in fields["ingredients"]}
    # in the order of the recipe: that in which numbers are added decides about their last bits
    wanted = {name: listed[name] for name in recipe.used if name in listed}
    lost = [name for name in recipe.used if name not in wanted]
    if lost:
        raise ValueError(f"{path} gives {lost[0]!r} a weight, but does not say which checkpoint that is.")
    gone = [one["id"] for one in wanted.values() if not one["repo_id"] and not Path(one["id"]).is_dir()]
    if gone and not models:
        raise ValueError(
            f"There is no folder {gone[0]!r} here, where {path} has an ingredient; say where the checkpoints are now "
            "with models=... (--models)."
        )
    places = models or [_place(one) for one in wanted.values()]
    bases = [one["base"] for one in wanted.values() if one.get("base")]
    pinned = {base["id"]: base["revision"] for base in bases if base["repo_id"]}
    options = {"image_processor": fields.get("image_processor"), "base_revisions": pinned, **options}
    there = {_version(asdict(describe_ingredient(one))): one for one in locate(places, **options)}
    for name, one in wanted.items():
        if _version(one) not in there:
            raise ValueError(
                f"{name} is not the checkpoint that the recipe was made with: none of {', '.join(places)} has the "
                f"revision {one['revision']}{_on_base(one)}."
            )
    found = Ingredients([there[_version(one)] for one in wanted.values()])
    if fields.get("classes"):  # whichever ingredient came first then, the soup has its classes in this order
        found = Ingredients(
            [
                replace(one, labels=tuple(fields["classes"]), order=said.get("order") and tuple(said["order"]))
                for one, said in zip(found, wanted.values(), strict=True)
            ]
        )
    check_processor(found[0].processor, fields["processor"])
    return found, Recipe(found.ids, tuple(recipe.used[name] for name in wanted))


def cook_statistics(
    path: Path, ingredients: Ingredients, *, dataset: str | Path | None = None, cache_dir: str | Path | None = None
) -> Statistics | None:
    """The images that the soup of a `recipe.json` has its BatchNorm statistics from; None if it has none.

    Args:
        dataset: where the images are now; by default where the recipe says.

    Raises:
        ValueError: if the images are not there.
    """
    path = path / RECIPE if path.is_dir() else path
    fields = read_recipe_file(path)
    about = fields.get("batchnorm")
    if not about:
        return None
    data = fields["data"] or {}
    if dataset is None and data.get("name", OBJECT) == OBJECT:
        raise ValueError(
            f"{path}: BatchNorm statistics came from a dataset that it does not name; say where its images are "
            "(--dataset)."
        )
    source = {name: data.get(name) for name in ("config_name", "image_column", "label_column")}
    revision = data.get("revision") if dataset is None else None
    place = DataSource(dataset or data["name"], about["split"], revision=revision, **source)
    split = open_split(place, labelled=False)
    if split.key != about["data"]:
        logger.warning(
            "It can't be told whether the images of %s are those that the soup had its BatchNorm statistics from.",
            split.name,
        )
    return prepare_statistics(
        split,
        about["images"],
        find_home(cache_dir),
        processor=ingredients[0].processor,
        on_error=about["on_error"],
        accelerator=the_accelerator(),
        seed=about["seed"],
    )


def _place(one: dict[str, Any]) -> str:
    """What finds an ingredient of a recipe again."""
    inside = f":{one['subfolder']}" if one.get("subfolder") else ""
    return f"{one['repo_id']}@{one['revision']}{inside}" if one["repo_id"] else str(one["id"])


def _version(one: dict[str, Any]) -> tuple[str | None, ...]:
    """What makes two ingredients the same: their files, and those of the base that an adapter is merged into."""
    return one.get("subfolder") or None, one["revision"], (one.get("base") or {}).get("revision")


def _on_base(one: dict[str, Any]) -> str:
    base = one.get("base")
    return f" on the base {base['id']} of the revision {base['revision']}" if base else ""


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
        configs = [json.loads((folder / CONFIG).read_text(encoding="utf-8")) for folder in folders]
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
            (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in PROCESSOR_FILES:
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
