"""What a bank says of its ingredients, and whether these are still to be had."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_radin.ingredients import Ingredient

logger = logging.getLogger(__name__)

_FIELDS = ("id", "revision", "architecture", "repo_id", "subfolder", "stamp", "image_processor")


def to_record(ingredient: Ingredient) -> dict[str, Any]:
    return {
        **{name: getattr(ingredient, name) for name in _FIELDS},
        "folder": str(ingredient.folder),
        "processor_folder": ingredient.processor_folder and str(ingredient.processor_folder),
        "labels": ingredient.labels,
        "order": ingredient.order,
        "base": ingredient.base and to_record(ingredient.base),
    }


def from_record(record: dict[str, Any]) -> Ingredient:
    """What a bank says of itself never allows pickles or remote code: only the user does."""
    return Ingredient(
        **{name: record[name] for name in _FIELDS},
        folder=Path(record["folder"]),
        processor_folder=record["processor_folder"] and Path(record["processor_folder"]),
        labels=tuple(record["labels"]),
        order=record["order"] and tuple(record["order"]),
        base=record["base"] and from_record(record["base"]),
    )


def is_there(ingredient: Ingredient) -> bool:
    """Whether the checkpoint can still be used; those of the Hub are kept there under their commits."""
    if ingredient.repo_id is not None:
        return True
    try:
        ingredient.download()
    except (ValueError, OSError) as error:
        logger.warning("%s is left out of the bank: %s", ingredient.id, error)
        return False
    return True


def on_the_hub(ingredient: Ingredient, token: str | bool | None) -> Ingredient:
    """An ingredient of a bank from the Hub: what is there too will, once downloaded, lie in the cache of this user."""
    if ingredient.repo_id is None:
        return ingredient
    folder = _snapshots(ingredient.repo_id) / ingredient.revision / ingredient.subfolder
    base = ingredient.base and on_the_hub(ingredient.base, token)
    return replace(ingredient, folder=folder, base=base, token=token)


def is_cached(repo_id: str) -> bool:
    """Whether a model of this name was once loaded from the Hub to this machine."""
    snapshots = _snapshots(repo_id)
    return snapshots.is_dir() and any(snapshots.iterdir())


def _snapshots(repo_id: str) -> Path:
    """Where versions of a model on the Hub are kept by huggingface_hub."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots"


def told_apart(ingredients: list[Ingredient]) -> list[Ingredient]:
    """Several revisions of one id get different ones."""
    count = Counter(one.id for one in ingredients)
    return [replace(one, id=f"{one.id}@{one.revision[:19]}") if count[one.id] > 1 else one for one in ingredients]
