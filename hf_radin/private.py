"""Names that not everybody may see: of private repositories that a soup was made of, and how to leave them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def private_names(fields: Mapping[str, Any]) -> list[str]:
    """The repositories in a `recipe.json` that somebody who is not logged in does not find.

    Raises:
        ValueError: if the Hub can't be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from hf_radin.access import asking_the_hub

    data = fields["data"]
    asked = {one["repo_id"]: "model" for one in _checkpoints(fields) if one["repo_id"]}
    if data["revision"]:
        asked[data["name"]] = "dataset"
    found = []
    for name, repo_type in asked.items():
        with asking_the_hub(name):
            try:
                HfApi(token=False).repo_info(name, repo_type=repo_type, expand=["private"])
            except RepositoryNotFoundError:
                found.append(name)
    return found


def without(fields: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The contents of a `recipe.json` with others in place of these names: nobody can cook it, all can read it."""
    aliases = {name: f"private-{number}" for number, name in enumerate(sorted(names, key=len, reverse=True), start=1)}

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            for name, alias in aliases.items():
                value = value.replace(name, alias)
            return value
        if isinstance(value, list):
            return [hidden(one) for one in value]
        if isinstance(value, dict):
            return {hidden(name): hidden(one) for name, one in value.items()}
        return value

    found: dict[str, Any] = hidden(dict(fields))
    for one in _checkpoints(found):
        if one["repo_id"] in aliases.values():
            one |= {"repo_id": None, "revision": "hidden"}
    for one, real in zip(found["ingredients"], fields["ingredients"], strict=True):
        if real["repo_id"] in aliases:
            one |= {"stamp": None, "dataset": None}
    if fields["data"]["name"] in aliases:
        found["data"] |= {"revision": None}
    return found


def _checkpoints(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of ingredients, and of the bases of adapters."""
    listed = fields["ingredients"]
    return [*listed, *(one["base"] for one in listed if one.get("base"))]
