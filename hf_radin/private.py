"""Names that not everybody may see: of private repositories that a soup was made of, and how to leave them out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hf_radin.access import asking_the_hub, patiently

# What a repository on the Hub is called; a commit and a subfolder may follow.
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_BEHIND = r"(@[\w./-]+)?(:[\w./-]+)?"


def private_names(fields: Mapping[str, Any]) -> list[str]:
    """The repositories in a `recipe.json` that somebody who is not logged in does not find.

    Raises:
        ValueError: if the Hub can't be asked, or this is no recipe.
    """
    try:
        asked = sorted({*_named(fields)})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"The recipe.json is not a whole recipe ({error!r}).") from error
    return list(dict.fromkeys(name for name, kind in asked if patiently(partial(_is_hidden, name, kind))))


def _is_hidden(name: str, repo_type: str) -> bool:
    """Whether nobody who is not logged in finds a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking_the_hub(name):
        try:
            HfApi(token=False).repo_info(name, repo_type=repo_type, expand=["private"])
        except RepositoryNotFoundError:
            return True
    return False


def _named(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All repositories that a recipe names, with their types."""
    models = [name for one in _checkpoints(fields) for name in (one.get("repo_id"), one.get("base_model"))]
    if any(one["repo_id"] for one in fields["ingredients"]):  # those that were left out may be on the Hub, too
        models += [str(name).partition("@")[0].partition(":")[0] for name, _ in fields.get("remarks", ())]
    models.append(str(fields.get("image_processor") or "").partition("@")[0])
    data = [one.get("dataset") for one in fields["ingredients"]]
    data.append(fields["data"]["name"] if fields["data"]["revision"] else None)
    data.append(str(fields.get("bank") or "").partition("@")[0])
    named = [(name, "model") for name in models] + [(name, "dataset") for name in data]
    return [(name, kind) for name, kind in named if name and _ID.fullmatch(name) and not Path(name).exists()]


def without(fields: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The contents of a `recipe.json` with others in place of these names: nobody can cook it, all can read it."""
    taken = {one["id"] for one in fields["ingredients"]}
    free = (alias for number in range(1, 10**6) if (alias := f"private-{number}") not in taken)
    aliases = dict(zip(names, free, strict=False))
    pattern = _pattern(names)

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: aliases[found[1]], value)
        if isinstance(value, list):
            return [hidden(one) for one in value]
        if isinstance(value, dict):
            return {hidden(name): hidden(one) for name, one in value.items()}
        return value

    found: dict[str, Any] = hidden(dict(fields))
    for one, real in zip(_checkpoints(found), _checkpoints(fields), strict=True):
        if real["repo_id"] in aliases:
            one |= {"repo_id": None, "revision": "hidden", "subfolder": None, "stamp": None}
        for name in ("dataset", "base_model"):
            if real.get(name) in aliases:
                one[name] = None
    if fields["data"]["name"] in aliases:
        found["data"] |= {"revision": None}
    if str(fields.get("bank") or "").split("@")[0] in aliases:
        found["bank"] = None
    return found


def still_named(files: Mapping[str, Path | bytes], names: list[str]) -> tuple[str, str] | None:
    """A file that still holds one of these names, and which: by hand, or because a configuration has it."""
    pattern = _pattern(names)
    for file, content in files.items():
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        if found := pattern.search(text):
            return file, found[1]
    return None


def _pattern(names: list[str]) -> re.Pattern[str]:
    """Finds these repositories in a text, with what may stand behind them, and none whose name only begins so."""
    return re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, names))})(?![\w-]|\.\w|/){_BEHIND}")


def _checkpoints(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of ingredients, and of the bases of adapters."""
    listed = fields["ingredients"]
    return [*listed, *(one["base"] for one in listed if one.get("base"))]
