"""What model cards say of ingredients: the data they were evaluated on, their licence and their base model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from hf_radin.ingredients.ingredient import Ingredient, Ingredients, Version, is_cached
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import BrokenFileError, card_metadata, is_dir, read_text
from hf_radin.runtime.schema import read_record

logger = logging.getLogger(__name__)

# Loaders: `load_dataset` reads files with them, and the Trainer writes their names into cards in place of a dataset.
# These are all of datasets 5.2 and of older versions; a test compares them with those that are installed.
_MEDIA = {
    "audiofolder",
    "folder",
    "imagefolder",
    "meshfolder",
    "niftifolder",
    "pdffolder",
    "videofolder",
    "webdataset",
}
_TABLES = {
    "arrow",
    "csv",
    "hdf5",
    "iceberg",
    "json",
    "jsonl",
    "lance",
    "pandas",
    "parquet",
    "sql",
    "text",
    "vortex",
    "xml",
}
_SCIENCE = {"conll", "fasta", "fastq", "genbank", "mmcif", "pdb", "tsfile"}
LOADERS = _MEDIA | _TABLES | _SCIENCE | {"cache", "eval", "folderbasedbuilder", "generator", "harbor", "spark"}

# What the names of splits begin with that models learn from.
_TRAINING = re.compile(r"train", re.IGNORECASE)

# Hyperparameters of an ingredient that a recipe lists.
MAX_HYPERPARAMETERS = 16


@dataclass(frozen=True)
class Origin:
    """A dataset as a card names it; None where the card names nothing, or several things."""

    dataset: str | None = None
    config_name: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {value!r}" if value else f"no {name}"
            for name, value in (("dataset", self.dataset), ("configuration", self.config_name), ("split", self.split))
        )


@dataclass(frozen=True)
class BaseEntry:
    """What a recipe says of the base model that an adapter is merged into.

    Args:
        id: what the adapter or the user calls it.
        repo_id: the model on the Hub; None for a folder.
        revision: commit sha on the Hub; `sha256:` and the hash of its files on disk.
    """

    id: str
    repo_id: str | None
    revision: str


@dataclass(frozen=True, kw_only=True)
class IngredientEntry:
    """What a recipe says of an ingredient. Recipes of earlier versions lack some of the fields with defaults.

    Args:
        id: what the user called it.
        repo_id: the model on the Hub; None for a folder.
        subfolder: inside the repository; empty for none.
        revision: commit sha on the Hub; `sha256:` and the hash of its files on disk.
        stamp: sizes and times of a folder's files: while they stay the same, the files need not be hashed again.
        content: see `Ingredient`; weights are added up in its order.
        base: of a LoRA adapter the model that it is merged into.
        order: for each class of the soup its number in the checkpoint; None if all are the same.
        left_out: how many classes of the checkpoint the soup has not.
        license: as the card names it.
        dataset: what the card says that it was evaluated on.
        base_model: what it is a fine-tune of.
        base_model_repo_id: the same on the Hub, where it is known to be there.
        hyperparameters: what it was trained with, as far as it says so itself.
    """

    id: str
    repo_id: str | None
    subfolder: str | None = None
    revision: str
    stamp: str | None = None
    content: str = ""
    base: BaseEntry | None = None
    order: tuple[int, ...] | None = None
    left_out: int = 0
    license: str | None = None
    dataset: str | None = None
    base_model: str | None = None
    base_model_repo_id: str | None = None
    hyperparameters: dict[str, str] = field(default_factory=dict)

    @property
    def version(self) -> Version:
        """What makes it the same ingredient, wherever it is: see `Ingredient.version`."""
        return self.subfolder or None, self.revision, self.base.revision if self.base else None


def read_card(ingredient: Ingredient) -> dict[str, Any]:
    """The metadata of an ingredient's `README.md`; for a Trainer's `checkpoint-*` folder, that of the run."""
    for folder in _card_folders(ingredient):
        try:
            return card_metadata(read_text(folder / "README.md"))
        except FileNotFoundError:
            continue
        except ValueError as error:  # people write cards: a broken one is as good as none
            logger.warning("%s: the card's metadata can't be read: %s", ingredient.id, error)
    return {}


@dataclass(frozen=True)
class Trial:
    """What is read of a Trainer's `trainer_state.json` for its hyperparameters."""

    trial_params: dict[str, Any] | None = None


def read_hyperparameters(ingredient: Ingredient) -> dict[str, str]:
    """The hyperparameters of an ingredient's training, where they are known.

    They are those of the trial in its `trainer_state.json`, or those that a Trainer lists in the card.
    """
    for folder in _card_folders(ingredient):
        try:
            if trial := read_record(Trial, folder / "trainer_state.json").trial_params:
                return _shortened(trial.items())
        except (FileNotFoundError, BrokenFileError):
            pass
        try:
            text = read_text(folder / "README.md")
        except (FileNotFoundError, BrokenFileError):
            continue
        _, _, section = text.partition("### Training hyperparameters")
        if pairs := re.findall(r"^- (\w+): (.+)$", section.partition("\n#")[0], re.MULTILINE):
            return _shortened(pairs)
    return {}


def _shortened(pairs: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    """At most `MAX_HYPERPARAMETERS` short names and values, with floats rounded to what people write."""
    values = {
        str(name)[:40]: f"{value:.6g}" if isinstance(value, float) else shorten(str(value), 60, placeholder="...")
        for name, value in pairs
        if not isinstance(value, (dict, list))
    }
    return dict(list(values.items())[:MAX_HYPERPARAMETERS])


def _card_folders(ingredient: Ingredient) -> list[Path]:
    """Folders that may hold the card and the trainer state of an ingredient, nearest first."""
    folders = [ingredient.folder]
    if ingredient.repo_id and ingredient.subfolder:  # a repository has one card, at its top
        folders.append(ingredient.folder.parents[ingredient.subfolder.count("/")])
    if ingredient.repo_id is None and ingredient.folder.name.startswith("checkpoint-"):
        folders.append(ingredient.folder.parent)
    return folders


def card_origin(card: dict[str, Any]) -> Origin:
    """The dataset, configuration and evaluation split that a card's metadata names."""
    results = [
        result.get("dataset") or {}
        for entry in _as_list(card.get("model-index"))
        if isinstance(entry, dict)
        for result in _as_list(entry.get("results"))
        if isinstance(result, dict)
    ]
    evaluated = [data for data in results if isinstance(data, dict)]
    types, datasets = [data.get("type") for data in evaluated], _as_list(card.get("datasets"))
    return Origin(
        _only(_without_loaders(types) or _without_loaders(datasets)),
        _only([data.get("config") for data in evaluated]),
        _only([data.get("split") for data in evaluated]),
    )


def _without_loaders(names: list[Any]) -> list[str]:
    """The names that may be datasets: those of no loader in any spelling (`ImageFolder`, `image_folder`)."""
    return [
        name for name in names if isinstance(name, str) and re.sub(r"[\W_]", "", name).lower() not in LOADERS | {""}
    ]


def agreed_origin(ingredients: Ingredients, *, config_name: str | None = None, split: str | None = None) -> Origin:
    """The dataset that the cards of all ingredients agree on, with its configuration and split if they name them.

    Args:
        config_name, split: in place of what the cards say.

    Raises:
        ValueError: if they disagree, name nothing, or agree on a split that the models were trained on. The error
            lists what each card says, and the option that settles it.
    """
    origins = {
        ingredient.id: replace(origin, config_name=config_name or origin.config_name, split=split or origin.split)
        for ingredient in ingredients
        for origin in [card_origin(read_card(ingredient))]
    }
    hub_datasets = [origins[ingredient.id].dataset for ingredient in ingredients if ingredient.repo_id]
    paths = [name for name in hub_datasets if name and is_path(name)]
    if paths:
        raise ValueError(
            f"Name the dataset with --dataset: the models' cards name {paths[0]!r}, a folder on another machine."
        )
    agreed, *others = {replace(origin, config_name=origin.config_name or "default") for origin in origins.values()}
    listed = "; ".join(f"{name}: {origin}" for name, origin in origins.items())
    if not any(origin.dataset for origin in origins.values()):
        raise ValueError(
            "Name the dataset with --dataset (a Hub id or a folder), and its split with --split: the models' cards "
            f"name none. (A loader, such as imagefolder, is none.) {listed}."
        )
    if others or not agreed.dataset:
        raise ValueError(
            "Name the data to choose with, by --dataset (a Hub id or a folder), --dataset-config and --split: the "
            f"models' cards don't agree on it. {listed}."
        )
    if split is None and agreed.split and is_training(agreed.split):
        raise ValueError(
            f"Name the split to choose with, by --split: the models' cards agree on {agreed.split!r} of the dataset "
            f"{agreed.dataset}, whose images the models learnt from. If it has no other split, name this one: the "
            "choice will then favour models that memorised its images."
        )
    config_names = {origin.config_name for origin in origins.values()}  # of None alone, if no card names one
    return replace(agreed, config_name=max(filter(None, config_names), default=None))


def is_training(split: str) -> bool:
    """Whether the name is that of a training split, or has a part of one in it: `training`, `train[:10%]+test`."""
    return any(_TRAINING.match(part.strip()) for part in split.split("+"))


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder, and is no id on the Hub."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or Path(name).is_absolute()


def describe_ingredient(ingredient: Ingredient) -> IngredientEntry:
    """What a recipe says of an ingredient, with what the ingredient's own card and trainer state add to it."""
    card = read_card(ingredient)
    base = ingredient.base
    base_model = base.id if base else _only(_as_list(card.get("base_model")))
    return IngredientEntry(
        id=ingredient.id,
        repo_id=ingredient.repo_id,
        subfolder=ingredient.subfolder,
        revision=ingredient.revision,
        stamp=ingredient.stamp,
        content=ingredient.content,
        base=BaseEntry(base.id, base.repo_id, base.revision) if base else None,
        order=ingredient.order,
        left_out=ingredient.left_out,
        license=_only(_as_list(card.get("license"))),
        dataset=card_origin(card).dataset,
        base_model=base_model,
        base_model_repo_id=_base_repo_id(ingredient, base_model),
        hyperparameters=read_hyperparameters(ingredient),
    )


def describe_start(ingredients: Ingredients, recipe: Recipe) -> IngredientEntry | None:
    """What a recipe says of the start that it pulls its soup to; None if it pulls it nowhere.

    Raises:
        ValueError: if the ingredients have no such start.
    """
    start = ingredients.start_of(recipe)
    return None if start is None else describe_ingredient(start)


def _base_repo_id(ingredient: Ingredient, base_model: str | None) -> str | None:
    """The id of the base model on the Hub, where it is known to be there; a name alone may also be that of a folder.

    It is known for the base model of an adapter, for one that a card on the Hub names with its namespace, and for one
    that was downloaded from the Hub to this machine before; not if there is a folder of that name.
    """
    if ingredient.base:
        return ingredient.base.repo_id
    if base_model is None or is_path(base_model) or is_dir(Path(base_model)):
        return None
    is_named_on_hub = ingredient.repo_id is not None and "/" in base_model
    return base_model if is_named_on_hub or is_cached(base_model) else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _only(values: list[Any]) -> str | None:
    """The text that all texts in the list are equal to; None if there are several, or none."""
    distinct = {value for value in values if isinstance(value, str) and value}
    return distinct.pop() if len(distinct) == 1 else None
