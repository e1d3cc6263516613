"""Names that not everybody may see: places on a machine, and private repositories, and how to leave them out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from hf_radin.runtime.hub_commit import hidden_repositories, is_repo_id

# A commit, a subfolder or the rest of an address that may follow the name of a repository.
_BEHIND = r"(/[\w./-]*)?(@[\w./-]+)?(:[\w./-]+)?"


def without_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a `recipe.json` where of each absolute path there are the last two folders.

    More says something of a machine and of who works there, nothing of a model; where two would be the same it stays.
    Of what an ingredient's card says it was made of, a path says nothing to others.
    """
    found: dict[str, Any] = json.loads(json.dumps(fields))
    for one in _checkpoints(found):
        one |= {name: None for name in ("base_model", "dataset") if _is_path(one.get(name))}
    if _is_path(found.get("image_processor")):
        found["image_processor"] = PurePath(found["image_processor"]).name
    named = [one["id"] for one in _checkpoints(found)] + ([found["data"]["name"]] if found["data"] else [])
    named += [name for name, _ in found.get("remarks", ())]
    named += [value for one in found["ingredients"] for value in (one.get("hyperparameters") or {}).values()]
    folders = {name: PurePath(name).parts[1:] for name in named if _is_path(name)}
    others = {name for name in named if name not in folders}
    short = {path: parts[-2:] for path, parts in folders.items() if parts}
    for depth in range(3, max(map(len, folders.values()), default=0) + 1):
        same = Counter(short.values())
        alike = [path for path, parts in short.items() if same[parts] > 1 or "/".join(parts) in others]
        short |= {path: folders[path][-depth:] for path in alike}
    if not short:
        return found
    texts = {path: "/".join(parts) for path, parts in short.items()}
    texts |= {path: f"./{text}" for path, text in texts.items() if text in others}
    paths = "|".join(map(re.escape, sorted(short, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.-])({paths})(?![\w-])")
    found = _replaced(found, lambda text: pattern.sub(lambda one: texts[one[0]], text))
    return found


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and PurePath(name).is_absolute()


def private_names(fields: Mapping[str, Any]) -> list[str]:
    """The repositories in a `recipe.json` that somebody who is not logged in does not find.

    Raises:
        ValueError: if the Hub can't be asked, or this is no recipe.
    """
    try:
        asked = sorted({*_named(fields)})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"The recipe.json is not a whole recipe ({error!r}).") from error
    return hidden_repositories(asked)


def _named(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All repositories that a recipe names, with their types."""
    known = [(one.get("repo_id"), "model") for one in _checkpoints(fields)]
    data = fields["data"] or {}
    known.append((data["name"] if data.get("revision") else None, "dataset"))
    known.append((str(fields.get("bank") or "").partition("@")[0], "dataset"))
    known += [(one.get("base_model_repo_id"), "model") for one in _checkpoints(fields)]
    told = [(one.get("base_model"), "model") for one in _checkpoints(fields)]
    if any(one["repo_id"] for one in fields["ingredients"]):  # those that were left out may be on the Hub, too
        told += [(str(name).partition("@")[0].partition(":")[0], "model") for name, _ in fields.get("remarks", ())]
    processor, at, _ = str(fields.get("image_processor") or "").partition("@")
    told.append((processor if at else None, "model"))  # of a folder there is no commit
    told += [(one.get("dataset"), "dataset") for one in fields["ingredients"]]
    known += [(name, kind) for name, kind in told if name and not Path(name).exists()]  # else it is a folder here
    return [(name, kind) for name, kind in known if name and is_repo_id(name)]


def without(fields: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The contents of a `recipe.json` with others in place of these names: nobody can cook it, all can read it."""
    taken = {one["id"] for one in fields["ingredients"]}
    free = (alias for number in range(1, 10**6) if (alias := f"private-{number}") not in taken)
    aliases = dict(zip(names, free, strict=False))
    pattern = _pattern(names)

    lower = {name.lower(): alias for name, alias in aliases.items()}
    found: dict[str, Any] = _replaced(dict(fields), lambda text: pattern.sub(lambda one: lower[one[1].lower()], text))
    for one, real in zip(_checkpoints(found), _checkpoints(fields), strict=True):
        if real["repo_id"] in aliases:
            one |= {"repo_id": None, "revision": "hidden", "subfolder": None, "stamp": None}
        for name in ("dataset", "base_model", "base_model_repo_id"):
            if real.get(name) in aliases:
                one[name] = None
    if fields["data"] and fields["data"]["name"] in aliases:
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
    """Finds these repositories in a text, with what may stand behind them, and none whose name only begins so.

    In addresses and paths too; the Hub takes large letters for small ones.
    """
    longest = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, longest))})(?![\w-]|\.\w){_BEHIND}", re.IGNORECASE)


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with all its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_replaced(one, change) for one in value]
    if isinstance(value, dict):
        return {change(name): _replaced(one, change) for name, one in value.items()}
    return value


def _checkpoints(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of ingredients, and of the bases of adapters."""
    listed = fields["ingredients"]
    return [*listed, *(one["base"] for one in listed if one.get("base"))]
