"""The logit bank: what every ingredient says about every image of a split, on disk and memory-mapped."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hf_radin import adapter, ensemble
from hf_radin.batchnorm import Statistics
from hf_radin.data import OBJECT, match_labels, open_split
from hf_radin.decoding import Source
from hf_radin.files import write_atomically
from hf_radin.ingredients import Ingredient, Ingredients
from hf_radin.prepared import Images
from hf_radin.processes import progress_bar
from hf_radin.stream import Block

logger = logging.getLogger(__name__)

LATEST = "latest.json"


@dataclass(frozen=True, eq=False)
class LogitBank:
    """Logits of ingredients on one split, and where they came from. Made by `compute_logits`, read by `open`.

    Args:
        folder: holds `bank.json`, `labels.npy`, `ids.npy` and for each ingredient `logits/*.npy` and `logits/*.json`.
        ingredients: those whose logits this bank gives; the folder may hold more.
        about: the contents of `bank.json`.
        images: what the logits were computed from.
        request: the arguments of `compute_logits`, to do the same for another split.
        statistics: images that soups estimate BatchNorm statistics from, where the models have any.
        remarks: which checkpoints were left out or seem to be strangers: id (or nothing) and text.
    """

    folder: Path
    ingredients: Ingredients
    about: dict[str, Any]
    images: Images = field(repr=False)
    request: dict[str, Any] = field(default_factory=dict, repr=False)
    statistics: Statistics | None = None
    remarks: tuple[tuple[str, str], ...] = ()

    @classmethod
    def open(cls, path: str | Path) -> LogitBank:
        """What was last computed into a folder, but for checkpoints that are no longer where and what they were.

        Raises:
            ValueError: if the folder is no bank.
        """
        folder = Path(path).resolve()
        about = read_about(folder)
        try:
            latest = _read_latest(folder)
            records = [json.loads(file.read_text()) for file in sorted((folder / "logits").glob("*.json"))]
            there = {one.key: one for one in map(_from_record, (one for one in records if one["finite"]))}
            found = [there[key] for key in latest["keys"]]
            data, statistics = about["data"], latest["statistics"]
            remarks = tuple((str(name), str(text)) for name, text in latest["remarks"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder} is no whole logit bank ({error}); compute it again: what is there and whole is used."
            ) from error
        request = {name: data[name] for name in ("config_name", "revision", "image_column", "label_column")}
        request |= {name: about[name] for name in ("batch_size", "dtype", "on_error", "channels_last", "compiled")}
        request |= {"dataset": about["dataset"] or data["name"], "cache_dir": folder.parent.parent}
        if statistics:
            request |= {f"batchnorm_{name}": statistics.about[name] for name in ("split", "images")}
        ingredients = Ingredients(_told_apart([one for one in found if _is_there(one)]))
        images = Images(folder / about["pixels"], about["block_size"], partial(_source, folder, ingredients, request))
        return cls(folder, ingredients, about, images, {**request, "strangers": "keep"}, statistics, remarks)

    def __repr__(self) -> str:
        data = self.about["data"]
        where = f"{data['name']}, split {data['split']!r}"
        return f"LogitBank({len(self.ingredients)} ingredients, {len(self)} images of {where}, in {self.folder})"

    def logits(self, ingredient: int | str) -> np.ndarray:
        """One ingredient's logits by position or id: float32 `(samples, classes)`, memory-mapped."""
        one = self.ingredients.select([ingredient])[0] if isinstance(ingredient, str) else self.ingredients[ingredient]
        return np.load(logits_path(self.folder, one), mmap_mode="r")

    @property
    def labels(self) -> np.ndarray:
        """The true class of each sample, as an index into `classes`: `(samples,)`."""
        return np.load(self.folder / "labels.npy", mmap_mode="r")

    @property
    def ids(self) -> np.ndarray:
        """The position of each sample in its split: `(samples,)`; skipped samples leave gaps."""
        return np.load(self.folder / "ids.npy", mmap_mode="r")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.about["classes"])

    @property
    def split(self) -> str:
        return str(self.about["data"]["split"])

    @property
    def blocks(self) -> dict[Block, slice]:
        """Where each block of images has its samples."""
        ends = np.cumsum([count for *_, count in self.about["blocks"]]).tolist()
        return {
            (shard, number): slice(end - count, end)
            for (shard, number, count), end in zip(self.about["blocks"], ends, strict=True)
        }

    def __len__(self) -> int:
        return int(self.about["samples"])

    def score(self, recipes: np.ndarray | Sequence[Sequence[float]], metric: str = "accuracy") -> np.ndarray:
        """Exact scores of the ensembles of some recipes, `(recipes,)`; no model runs.

        Args:
            recipes: `(recipes, models)` in the order of `ingredients`, rows on the simplex.
            metric: `accuracy`.
        """
        if metric != "accuracy":
            raise ValueError(f"metric={metric!r}: recipes are scored by 'accuracy'.")
        rows = ensemble.check_recipes(np.asarray(recipes), len(self.ingredients))
        with progress_bar(total=len(rows) * len(self), desc="Scoring recipes", unit="prediction") as bar:
            hits = ensemble.count_hits(self._all_logits(), self.labels, rows, on_block=bar.update)
        return hits / len(self)

    def predict(self, recipe: np.ndarray | Sequence[float]) -> np.ndarray:
        """Classes predicted by the ensemble of one recipe `(models,)`: `(samples,)`."""
        return ensemble.predict(self._all_logits(), np.asarray(recipe))

    def _all_logits(self) -> list[np.ndarray]:
        return [self.logits(index) for index in range(len(self.ingredients))]


def logits_path(folder: Path, ingredient: Ingredient) -> Path:
    return folder / "logits" / f"{ingredient.key}.npy"


def record_path(folder: Path, ingredient: Ingredient) -> Path:
    return folder / "logits" / f"{ingredient.key}.json"


def read_about(folder: Path) -> dict[str, Any]:
    """What `bank.json` says of a bank.

    Raises:
        ValueError: if there is none.
    """
    try:
        return dict(json.loads((folder / "bank.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no logit bank, or one that was never finished ({error}).") from error


def _is_there(ingredient: Ingredient) -> bool:
    """Whether the checkpoint can still be used; those of the Hub are kept there under their commits."""
    if ingredient.repo_id is not None:
        return True
    try:
        ingredient.download()
    except (ValueError, OSError) as error:
        logger.warning("%s is left out of the bank: %s", ingredient.id, error)
        return False
    return True


def _told_apart(ingredients: list[Ingredient]) -> list[Ingredient]:
    """Several revisions of one id get different ones."""
    count = Counter(one.id for one in ingredients)
    return [replace(one, id=f"{one.id}@{one.revision[:19]}") if count[one.id] > 1 else one for one in ingredients]


def write_record(folder: Path, ingredient: Ingredient, *, finite: bool) -> None:
    """Say that an ingredient's logits are complete, and whose they are."""
    record = {**_to_record(ingredient), "finite": finite}
    write_atomically(record_path(folder, ingredient), lambda path: path.write_text(json.dumps(record, indent=2)))


def is_finite(folder: Path, ingredient: Ingredient) -> bool:
    """Whether all of an ingredient's logits are finite numbers."""
    return bool(json.loads(record_path(folder, ingredient).read_text())["finite"])


def write_latest(
    folder: Path, ingredients: Ingredients, remarks: list[tuple[str, str]], statistics: Statistics | None
) -> None:
    """Say what the last computation was for: several sets of checkpoints may share a folder."""
    latest: dict[str, Any] = {"keys": ingredients.keys, "remarks": remarks, "statistics": None}
    if statistics is not None:
        images = statistics.images
        where = {"pixels": os.path.relpath(images.folder, folder), "size": images.size}
        latest["statistics"] = {**where, "about": statistics.about}
    write_atomically(folder / LATEST, lambda path: path.write_text(json.dumps(latest, indent=2)))


def _read_latest(folder: Path) -> dict[str, Any]:
    """What the last computation was for.

    Raises:
        ValueError: if none was finished: what lies there may belong to several sets that don't fit each other.
    """
    try:
        latest = dict(json.loads((folder / LATEST).read_text()))
    except FileNotFoundError as error:
        raise ValueError("no computation of it was finished by this version") from error
    if latest["statistics"]:
        read = latest["statistics"]
        place = (folder / read["pixels"]).resolve()
        images = Images(place, read["size"], partial(_gone, place))
        latest["statistics"] = Statistics(images, read["about"])
    return latest


def _source(folder: Path, ingredients: Ingredients, request: dict[str, Any]) -> Source:
    """Where a bank's images come from, opened again.

    Raises:
        ValueError: if they are no longer there or no longer the same.
    """
    about = read_about(folder)
    if about["data"]["name"] == OBJECT:
        _gone(folder / about["pixels"])
    names = ("dataset", "config_name", "revision", "image_column", "label_column")
    split = open_split(split=about["data"]["split"], **{name: request[name] for name in names})
    if split.key != about["data"]["key"]:
        raise ValueError(f"{split.name} has changed since the logits in {folder} were computed; compute them again.")
    processor = ingredients[0].processor
    adapter.check_processor(processor, about["processor"])
    to_class = match_labels(split, ingredients.labels)
    return Source(split, partial(adapter.prepare, processor), to_class, about["on_error"], about["block_size"])


def _gone(folder: Path) -> NoReturn:
    raise ValueError(f"{folder} is gone, or parts of it; run compute_logits again to prepare the images anew.")


_FIELDS = ("id", "revision", "architecture", "repo_id", "subfolder", "stamp", "image_processor")


def _to_record(ingredient: Ingredient) -> dict[str, Any]:
    return {
        **{name: getattr(ingredient, name) for name in _FIELDS},
        "folder": str(ingredient.folder),
        "processor_folder": ingredient.processor_folder and str(ingredient.processor_folder),
        "labels": ingredient.labels,
        "order": ingredient.order,
        "base": ingredient.base and _to_record(ingredient.base),
    }


def _from_record(record: dict[str, Any]) -> Ingredient:
    """What a bank says of itself never allows pickles or remote code: only the user does."""
    return Ingredient(
        **{name: record[name] for name in _FIELDS},
        folder=Path(record["folder"]),
        processor_folder=record["processor_folder"] and Path(record["processor_folder"]),
        labels=tuple(record["labels"]),
        order=record["order"] and tuple(record["order"]),
        base=record["base"] and _from_record(record["base"]),
    )
