"""A `recipe.json`: what is in one, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    if odd:
        raise ValueError(f"{path} is not a whole recipe: its {odd[0]!r} is {str(fields.get(odd[0]))[:100]!r}.")
    return fields


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
