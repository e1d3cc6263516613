"""A `recipe.json`: what is in one, and whether it is whole."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECIPE = "recipe.json"
FORMAT = 1


def read_recipe_file(path: Path) -> dict[str, Any]:
    """What is in a `recipe.json`.

    Raises:
        ValueError: if it is not there, or not one.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        said = (
            f"{path.parent} holds no soup: there is no {path.name}" if path.name == RECIPE else f"There is no {path}"
        )
        raise ValueError(f"{said}.") from error
    except (ValueError, OSError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{path} is not a recipe: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{path} is not a recipe of format {FORMAT}, the one that this version reads.")
    listed = fields.get("ingredients")
    if not isinstance(fields.get("recipe"), dict) or not isinstance(listed, list) or not all(map(_is_listed, listed)):
        raise ValueError(f"{path} is not a whole recipe: it must list weights, and ingredients with their revisions.")
    ids = [one["id"] for one in listed]
    if len({*ids}) < len(ids):
        raise ValueError(f"{path} is not a whole recipe: it lists {max(ids, key=ids.count)!r} twice.")
    odd = [name for name, fits in _FIELDS.items() if not fits(fields.get(name))]
    if fields.get("data", ...) is None and not fields.get("results"):  # of an average that nobody measured
        odd = [name for name in odd if name != "data"]
    if odd:
        raise ValueError(f"{path} is not a whole recipe: its {odd[0]!r} is {str(fields.get(odd[0]))[:100]!r}.")
    return fields


def is_measured(fields: dict[str, Any]) -> bool:
    """Whether a `recipe.json` says how good its very recipe is, or seems; one whose weights were changed does not."""
    known = ("method", "data", "results", "measurements", "versions")
    if not all(fields.get(name) for name in known):
        return False
    try:
        return _weights(fields["recipe"]) in [_weights(measurement) for measurement in fields["measurements"]]
    except (KeyError, TypeError, ValueError):
        return False


def as_kept(fields: dict[str, Any], saved_dtype: str) -> dict[str, Any]:
    """The contents of a `recipe.json` for weights that were averaged anew from it, and are kept in this dtype.

    What was measured before is said to have been of other weights, if the dtype is another; of a recipe that was not
    measured, nothing is said.
    """
    if not is_measured(fields):
        listed = [ingredient for ingredient in fields["ingredients"] if ingredient["id"] in _weights(fields["recipe"])]
        about = {name: fields.get(name) for name in _MODEL}
        return unmeasured(fields["recipe"], listed, about, saved_dtype)
    measured = fields.get("measured_dtype") or fields.get("saved_dtype")
    changed = {"measured_dtype": measured} if measured not in (None, saved_dtype) else {}
    return {name: value for name, value in fields.items() if name != "measured_dtype"} | {
        "saved_dtype": saved_dtype,
        **changed,
    }


# What a recipe says of the model that it makes, whether it was measured or not.
_MODEL = ("processor", "classes", "architecture", "image_processor", "batchnorm", "data")


def unmeasured(
    recipe: dict[str, Any], ingredients: list[dict[str, Any]], about: dict[str, Any], saved_dtype: str
) -> dict[str, Any]:
    """The contents of a `recipe.json` for an average that nothing was measured of.

    Args:
        recipe: as `Recipe.to_json` writes it.
        ingredients: the used ones, as `origin.describe` describes them.
        about: the model's `processor`, `classes`, `architecture`, `image_processor`, `batchnorm` and `data`.
    """
    return {
        "format": FORMAT,
        "recipe": recipe,
        "method": "average",
        "measured": False,
        **{name: about.get(name) for name in _MODEL},
        "ingredients": ingredients,
        "versions": versions(),
        "saved_dtype": saved_dtype,
        "results": [],
        "measurements": [],
    }


def versions() -> dict[str, str]:
    """Versions of all that decides about the bits of a soup."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "safetensors", "numpy")
    import hf_radin

    return {
        "hf_radin": hf_radin.__version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def _weights(recipe: dict[str, Any]) -> dict[str, float]:
    pairs = zip(recipe["ingredients"], recipe["weights"], strict=True)
    return {name: weight for name, weight in pairs if weight}


def _is_listed(one: Any) -> bool:
    """Whether an entry of the list of ingredients says enough to find one again."""
    return (
        _is_version(one)
        and all(isinstance(one.get(name), (str, type(None))) for name in ("subfolder", "stamp"))
        and ".." not in Path(one.get("subfolder") or "").parts
        and not Path(one.get("subfolder") or "").is_absolute()
        and (one.get("base") is None or _is_version(one["base"]))
        and (one.get("order") is None or _is_list_of(int, one["order"]))
    )


def _is_version(one: Any) -> bool:
    """Whether this names a checkpoint and its revision."""
    if not isinstance(one, dict) or not all(isinstance(one.get(name), str) for name in ("id", "revision")):
        return False
    return "repo_id" in one and isinstance(one["repo_id"], (str, type(None)))


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _is_data(value: Any) -> bool:
    names = ("config_name", "revision", "image_column", "label_column")
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("name", "split"))
        and all(isinstance(value.get(name, 0), (str, type(None))) for name in names)
    )


def _is_batchnorm(value: Any) -> bool:
    return isinstance(value, dict) and (
        all(isinstance(value.get(name), str) for name in ("data", "split"))
        and all(type(value.get(name)) is int and value[name] >= least for name, least in (("images", 2), ("seed", 0)))
        and value.get("on_error") in ("raise", "skip")
    )


# What else of a recipe cooking rests on, and whether it is of its kind.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "data": _is_data,
    "processor": lambda value: isinstance(value, dict),
    "classes": lambda value: value is None or _is_list_of(str, value),
    "image_processor": lambda value: value is None or isinstance(value, str),
    "batchnorm": lambda value: value is None or _is_batchnorm(value),
}
