"""What the ingredients' own model cards say: the data they were evaluated on, their licence, their base model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_radin.ingredients import Ingredient, Ingredients

logger = logging.getLogger(__name__)

# Builders of `load_dataset` that the Trainer writes into a card in place of a dataset: they name no data.
_GENERIC = {"imagefolder", "parquet", "webdataset", "arrow", "json", "csv", "generator"}


@dataclass(frozen=True)
class Origin:
    """A dataset as a card names it; None where the card says nothing, or several things."""

    dataset: str | None = None
    config_name: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {value!r}" if value else f"no {name}"
            for name, value in (("dataset", self.dataset), ("configuration", self.config_name), ("split", self.split))
        )


def read_card(ingredient: Ingredient) -> dict[str, Any]:
    """The metadata of an ingredient's `README.md`; of a Trainer's `checkpoint-*` folder, that of its run."""
    from huggingface_hub import metadata_load

    places = [ingredient.folder]
    if ingredient.repo_id and ingredient.subfolder:  # the repository has one card, at its top
        places.append(ingredient.folder.parents[ingredient.subfolder.count("/")])
    if ingredient.repo_id is None and ingredient.folder.name.startswith("checkpoint-"):
        places.append(ingredient.folder.parent)
    for place in places:
        try:
            return metadata_load(place / "README.md") or {}
        except FileNotFoundError:
            continue
        except Exception as error:  # a card is somebody's prose: a broken one is as good as none, but say so
            logger.warning("%s: the card's metadata can't be read: %s", ingredient.id, error)
    return {}


def card_origin(card: dict[str, Any]) -> Origin:
    """The dataset, configuration and evaluation split that a card's metadata names."""
    results = [
        result.get("dataset") or {}
        for entry in _list(card.get("model-index"))
        if isinstance(entry, dict)
        for result in _list(entry.get("results"))
        if isinstance(result, dict)
    ]
    names = [data.get("type") for data in results if isinstance(data, dict)]
    names = [name for name in names if isinstance(name, str) and name and name not in _GENERIC]
    names = names or [name for name in _list(card.get("datasets")) if isinstance(name, str)]
    of_name = [data for data in results if isinstance(data, dict)]
    return Origin(
        _only(names),
        _only([data.get("config") for data in of_name]),
        _only([data.get("split") for data in of_name]),
    )


def agreed_origin(ingredients: Ingredients) -> Origin:
    """The dataset that all ingredients' cards agree on, and the configuration and split if they name them.

    Raises:
        ValueError: if they disagree or say nothing; what each says is named, and the option that settles it.
    """
    said = {one.id: card_origin(read_card(one)) for one in ingredients}
    elsewhere = [origin.dataset for one, origin in zip(ingredients, said.values(), strict=True) if one.repo_id]
    paths = [name for name in elsewhere if name and Path(name).is_absolute()]
    if paths:
        raise ValueError(
            f"The models' cards name {paths[0]!r}, a folder of somebody else's. Name the dataset (--dataset)."
        )
    if len(set(said.values())) == 1 and (agreed := next(iter(said.values()))).dataset:
        return agreed
    lines = "\n".join(f"  {name}: {origin}" for name, origin in said.items())
    raise ValueError(
        "The ingredients' cards don't agree on the data to choose with:\n"
        f"{lines}\nSay it: --dataset (a Hub id or a folder), --dataset-config and --split."
    )


def describe(ingredient: Ingredient) -> dict[str, Any]:
    """What a recipe keeps of an ingredient."""
    card = read_card(ingredient)
    return {
        "id": ingredient.id,
        "repo_id": ingredient.repo_id,
        "subfolder": ingredient.subfolder,
        "revision": ingredient.revision,
        "stamp": ingredient.stamp,  # of a folder: while it stays the same, the files need not be hashed again
        "base": ingredient.base and {name: getattr(ingredient.base, name) for name in ("id", "repo_id", "revision")},
        "order": ingredient.order,
        "license": _only(_list(card.get("license"))),
        "dataset": card_origin(card).dataset,
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _only(values: list[Any]) -> str | None:
    """The value that stands there alone, or as often as anything does."""
    distinct = {value for value in values if isinstance(value, str) and value}
    return distinct.pop() if len(distinct) == 1 else None
