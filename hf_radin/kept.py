"""The files of a bank on disk: where each is, what it says, and what to do with one that is broken."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hf_radin.batchnorm import Statistics
from hf_radin.files import remove_partials, write_atomically, write_json
from hf_radin.ingredients import Ingredient, Ingredients
from hf_radin.records import to_record

logger = logging.getLogger(__name__)

T = TypeVar("T")

LATEST = "latest.json"
DIGESTS = "digests.npy"
BATCH_SIZE_FILE = "batch_size.json"


def logits_path(folder: Path, ingredient: Ingredient) -> Path:
    return folder / "logits" / f"{ingredient.key}.npy"


def open_array(path: Path) -> np.memmap:
    """The array in a file.

    Raises:
        ValueError: if there is none.
    """
    try:
        found: np.memmap = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is broken ({error}); compute the logits again: what is whole is used.") from error
    return found


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


@dataclass(frozen=True)
class Told:
    """What is known of an ingredient's logits.

    Args:
        finite: whether all are finite numbers.
        seconds: that a device took to compute them, those of several together; None if nobody looked.
        device: what it was.
    """

    finite: bool
    seconds: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class Spent:
    """Seconds that devices took, those of several together, and which; None if that is not known of all."""

    seconds: float | None
    devices: frozenset[str] = frozenset()

    def __add__(self, other: Spent) -> Spent:
        known = None if self.seconds is None or other.seconds is None else self.seconds + other.seconds
        return Spent(known, self.devices | other.devices)


def write_record(folder: Path, ingredient: Ingredient, told: Told) -> None:
    """Say that an ingredient's logits are complete, and whose they are."""
    record = {**to_record(ingredient), **asdict(told)}
    write_atomically(record_path(folder, ingredient), lambda path: path.write_text(json.dumps(record, indent=2)))


def read_told(folder: Path, ingredient: Ingredient) -> Told:
    """What is known of an ingredient's logits."""
    record = json.loads(record_path(folder, ingredient).read_text())
    return Told(bool(record["finite"]), record.get("seconds"), record.get("device"))


def spent(folder: Path, ingredients: Ingredients) -> Spent:
    """What a device took to compute these logits."""
    told = [read_told(folder, one) for one in ingredients]
    known = [one.seconds for one in told if one.seconds is not None]
    return Spent(sum(known) if len(known) == len(told) else None, frozenset(one.device for one in told if one.device))


def write_latest(
    folder: Path, ingredients: Ingredients, remarks: list[tuple[str, str]], statistics: Statistics | None
) -> None:
    """Say what the last computation was for: several sets of checkpoints may share a folder."""
    write_json(folder / LATEST, latest_of(folder, ingredients, remarks, statistics))


def latest_of(
    folder: Path, ingredients: Ingredients, remarks: Sequence[tuple[str, str]], statistics: Statistics | None
) -> dict[str, Any]:
    latest: dict[str, Any] = {"keys": ingredients.keys, "remarks": remarks, "statistics": None}
    if statistics is not None:
        images = statistics.images
        where = {"pixels": os.path.relpath(images.folder, folder), "size": images.size}
        latest["statistics"] = {**where, "about": statistics.about}
    return latest


def read_latest(folder: Path) -> dict[str, Any]:
    """What the last computation was for.

    Raises:
        ValueError: if none was finished: what lies there may belong to several sets that don't fit each other.
    """
    try:
        return dict(json.loads((folder / LATEST).read_text()))
    except FileNotFoundError as error:
        raise ValueError("no computation of it was finished by this version") from error


def discard_broken(folder: Path, ingredients: Ingredients) -> None:
    """Remove what of a bank can't be read, or is not what the bank says: it is computed anew as if it had never been.

    What was killed, or a full disk or a power cut, leaves whole files; this is for all else that happens to files.
    """
    remove_partials(folder, *(folder / name for name in ("logits", "soups")), *folder.glob("*/*.parts"))
    size = folder / BATCH_SIZE_FILE
    if size.exists() and not _reads(lambda: int(json.loads(size.read_text())) >= 1):
        size.unlink()
    classes, about = -1, {}
    if (folder / "bank.json").exists():
        names = ["ids", "labels", *(["digests"] if (folder / DIGESTS).exists() else [])]  # not of earlier versions
        shapes = {_reads(partial(_shape, folder / f"{name}.npy")) for name in names}
        about = _reads(lambda: read_about(folder)) or {}
        classes = len(about.get("classes", ()))
        if shapes != {(about.get("samples", -1),)}:
            logger.warning("%s is broken; what is in it is computed anew.", folder)
            (folder / "bank.json").unlink()
    for one in ingredients:
        logits, record = logits_path(folder, one), record_path(folder, one)
        told, shape = _reads(partial(read_told, folder, one)), _reads(partial(_shape, logits))
        whole = told is not None and shape == (about.get("rows"), classes) and (folder / "bank.json").exists()
        if record.exists() and whole:  # a run that was killed between the two left them
            shutil.rmtree(logits.with_suffix(".parts"), ignore_errors=True)
        if record.exists() and not whole:
            logger.warning("The logits of %s in %s are broken; they are computed anew.", one.id, folder)
            record.unlink()


def _shape(path: Path) -> tuple[int, ...]:
    return tuple(np.load(path, mmap_mode="r").shape)


def _reads(read: Callable[[], T]) -> T | None:
    """What a file says; None if it can't be read."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
