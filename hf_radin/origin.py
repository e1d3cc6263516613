"""What the ingredients' own model cards say: the data they were evaluated on, their licence, their base model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_radin.ingredients import Ingredient, Ingredients

logger = logging.getLogger(__name__)

# Builders of `load_dataset` that the Trainer writes into a card in place of a dataset: they name no data.
_GENERIC = {"imagefolder", "parquet", "webdataset", "arrow", "json", "csv", "generator"}


# So many hyperparameters of an ingredient are kept.
MOST = 16


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

    for place in _places(ingredient):
        try:
            return metadata_load(place / "README.md") or {}
        except FileNotFoundError:
            continue
        except Exception as error:  # a card is somebody's prose: a broken one is as good as none, but say so
            logger.warning("%s: the card's metadata can't be read: %s", ingredient.id, error)
    return {}


def read_hyperparameters(ingredient: Ingredient) -> dict[str, str]:
    """What an ingredient was trained with, as far as it says so itself.

    That is the trial in its `trainer_state.json`, or the list in the card that a Trainer writes.
    """
    for place in _places(ingredient):
        try:
            trial = json.loads((place / "trainer_state.json").read_text(encoding="utf-8")).get("trial_params")
            if isinstance(trial, dict) and trial:
                return _plain(trial.items())
        except (OSError, ValueError, AttributeError, RecursionError):
            pass
        try:
            text = (place / "README.md").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        _, _, rest = text.partition("### Training hyperparameters")
        if found := re.findall(r"^- (\w+): (.+)$", rest.partition("\n#")[0], re.MULTILINE):
            return _plain(found)
    return {}


def _plain(pairs: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    """A few short names and values; numbers without digits that nobody chose."""
    found = {
        str(name)[:40]: f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())[:60]
        for name, value in pairs
        if not isinstance(value, (dict, list))
    }
    return dict(list(found.items())[:MOST])


def _places(ingredient: Ingredient) -> list[Path]:
    """Where what is told of an ingredient may lie."""
    places = [ingredient.folder]
    if ingredient.repo_id and ingredient.subfolder:  # the repository has one card, at its top
        places.append(ingredient.folder.parents[ingredient.subfolder.count("/")])
    if ingredient.repo_id is None and ingredient.folder.name.startswith("checkpoint-"):
        places.append(ingredient.folder.parent)
    return places


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
        "base_model": _only(_list(card.get("base_model"))),
        "hyperparameters": read_hyperparameters(ingredient),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _only(values: list[Any]) -> str | None:
    """The value that stands there alone, or as often as anything does."""
    distinct = {value for value in values if isinstance(value, str) and value}
    return distinct.pop() if len(distinct) == 1 else None
