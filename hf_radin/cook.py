"""Cook a soup again from its `recipe.json`: find what it was made of, at the very revisions that it names."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_radin import origin
from hf_radin.batchnorm import Statistics, collect_statistics
from hf_radin.data import OBJECT, open_split
from hf_radin.ingredients import Ingredients
from hf_radin.prepared import find_home
from hf_radin.processes import the_accelerator
from hf_radin.processors import check_processor
from hf_radin.recipe import Recipe
from hf_radin.recipe_file import RECIPE, read_recipe_file
from hf_radin.vetting import locate

logger = logging.getLogger(__name__)


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
    there = {_version(origin.describe(one)): one for one in locate(places, **options)}
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
    split = open_split(dataset or data["name"], split=about["split"], labelled=False, revision=revision, **source)
    if split.key != about["data"]:
        logger.warning(
            "It can't be told whether the images of %s are those that the soup had its BatchNorm statistics from.",
            split.name,
        )
    return collect_statistics(
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
