"""The arrays of a bank on disk: logits block by block until all are there, then in one file beside a record."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from hf_radin.images.shards import Block
from hf_radin.ingredients.ingredient import Ingredient, IngredientRecord, Ingredients
from hf_radin.logits.manifest import BANK, BankManifest
from hf_radin.runtime.files import remove_partials, write_atomically
from hf_radin.runtime.schema import from_json, to_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

DIGESTS = "digests.npy"
BATCH_SIZE_FILE = "batch_size.json"


@dataclass(frozen=True)
class Spent:
    """Seconds that devices took, added up, and which devices; None if that is not known of all work."""

    seconds: float | None = 0.0
    devices: frozenset[str] = frozenset()

    @classmethod
    def on(cls, seconds: float | None, device: str | None) -> Spent:
        """The seconds of one device."""
        return cls(seconds, frozenset(filter(None, [device])))

    def __add__(self, other: Spent) -> Spent:
        seconds = None if self.seconds is None or other.seconds is None else self.seconds + other.seconds
        return Spent(seconds, self.devices | other.devices)


@dataclass(frozen=True)
class LogitsRecord:
    """What is known of an ingredient's logits, in the file beside them: it says that they are complete.

    Args:
        ingredient: whose logits they are.
        finite: whether all are finite numbers.
        seconds: that devices took to compute them, added up; None if they were not timed.
        device: what they were computed on.
    """

    ingredient: IngredientRecord
    finite: bool
    seconds: float | None = None
    device: str | None = None

    @classmethod
    def read(cls, folder: Path, key: str) -> LogitsRecord:
        """The record of an ingredient's logits, by its key.

        Raises:
            ValueError: if the file is broken.
            OSError: if there is none: then its logits are not complete.
        """
        return from_json(cls, json.loads(record_path(folder, key).read_text()))

    def write(self, folder: Path, key: str) -> None:
        """Say that the logits of the ingredient with this key are complete."""
        text = json.dumps(to_json(self), indent=2)
        write_atomically(record_path(folder, key), lambda path: path.write_text(text))


@dataclass(frozen=True)
class Target:
    """A model whose logits are computed.

    Args:
        name: to be named in an error.
        path: of the file that they go to.
        classes: how many there are.
    """

    name: str
    path: Path
    classes: int

    @property
    def parts(self) -> Path:
        """The folder of the blocks that are finished before all are."""
        return self.path.with_suffix(".parts")

    def part(self, block: Block) -> Path:
        """Where one block's logits are."""
        return self.parts / f"block-{block[0]:05d}-{block[1]:06d}.npz"


def target_of(folder: Path, ingredient: Ingredient) -> Target:
    """An ingredient's logits in the folder of a bank."""
    return Target(ingredient.id, logits_path(folder, ingredient.key), len(ingredient.labels))


def logits_path(folder: Path, key: str) -> Path:
    """Where the logits of the ingredient with this key are."""
    return folder / "logits" / f"{key}.npy"


def record_path(folder: Path, key: str) -> Path:
    """Where the record of these logits is."""
    return folder / "logits" / f"{key}.json"


def open_array(path: Path) -> np.memmap:
    """The array in a file, memory-mapped.

    Raises:
        ValueError: if there is none.
    """
    try:
        array: np.memmap = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is broken ({error}); compute the logits again; intact files are reused.") from error
    return array


def time_spent(folder: Path, ingredients: Ingredients) -> Spent:
    """What devices took to compute the logits of these ingredients."""
    records = [LogitsRecord.read(folder, key) for key in ingredients.keys]
    return sum((Spent.on(record.seconds, record.device) for record in records), Spent())


def discard_broken(folder: Path, ingredients: Ingredients) -> None:
    """Remove the files of a bank that can't be read or do not fit its manifest, so that they are computed anew.

    Killed runs, full disks and power cuts leave whole files; this is for everything else that happens to files.
    """
    remove_partials(folder, *(folder / name for name in ("logits", "soups")), *folder.glob("*/*.parts"))
    batch_size = folder / BATCH_SIZE_FILE
    if batch_size.exists() and not _or_none(lambda: int(json.loads(batch_size.read_text())) >= 1):
        batch_size.unlink()
    manifest = _whole_manifest(folder)
    for ingredient in ingredients:
        logits, record = logits_path(folder, ingredient.key), record_path(folder, ingredient.key)
        if not record.exists():
            continue
        is_whole = (
            manifest is not None
            and _or_none(partial(LogitsRecord.read, folder, ingredient.key)) is not None
            and _or_none(partial(_shape, logits)) == (manifest.rows, len(manifest.classes))
        )
        if is_whole:  # a run that was killed between the two left them
            shutil.rmtree(logits.with_suffix(".parts"), ignore_errors=True)
        else:
            logger.warning("The logits of %s in %s are broken and are computed again.", ingredient.id, folder)
            record.unlink()


def _whole_manifest(folder: Path) -> BankManifest | None:
    """The manifest of a bank if its arrays are as it says; else it is removed."""
    if not (folder / BANK).exists():
        return None
    manifest = _or_none(lambda: BankManifest.read(folder))
    names = ["ids", "labels", *(["digests"] if (folder / DIGESTS).exists() else [])]  # earlier versions have none
    shapes = {_or_none(partial(_shape, folder / f"{name}.npy")) for name in names}
    if manifest is not None and shapes == {(manifest.samples,)}:
        return manifest
    logger.warning("%s is broken and is computed again.", folder)
    (folder / BANK).unlink()
    return None


def write_part(path: Path, logits: np.ndarray, seconds: float) -> None:
    """Write one block's logits, and the seconds that they took.

    Forcing each to the disk would take longer than tiny models do: a zip has checksums.
    """
    write_atomically(path, lambda partial: np.savez(partial, logits=logits, seconds=seconds), forced=False)


def remove_broken_parts(targets: Iterable[Target]) -> None:
    """Remove the blocks that can't be read, as a power cut may leave them: they are computed anew."""
    for target in targets:
        broken = sum(_discard_if_broken(path, target.classes) for path in target.parts.glob("block-*.npz"))
        if broken:
            logger.warning("%s: %d blocks of its logits were broken and are computed again.", target.name, broken)


def join_parts(target: Target, blocks: list[Block], samples: int, dtype: str) -> tuple[bool, float]:
    """Put one model's blocks into one file, in order.

    Returns:
        whether all logits are finite, and the seconds that they took; NaN where some were not timed.
    """
    is_finite, seconds = True, 0.0
    stored = np.dtype(dtype).newbyteorder("<")

    def write(path: Path) -> None:
        nonlocal is_finite, seconds
        rows = 0
        with path.open("wb") as file:  # not through a memory map: a full disk must be an error, not a crash
            shape = (samples, target.classes)
            np.lib.format.write_array_header_1_0(file, {"descr": stored.str, "fortran_order": False, "shape": shape})
            for block in blocks:
                logits, part_seconds = _read_part(target.part(block), target.classes)
                file.write(np.ascontiguousarray(logits, dtype=stored).tobytes())
                is_finite = is_finite and bool(np.isfinite(logits).all())
                rows, seconds = rows + len(logits), seconds + part_seconds
        if rows != samples:
            raise ValueError(f"{target.name}: {rows} rows of logits for {samples} images; remove {target.parts}.")

    write_atomically(target.path, write)
    return is_finite, seconds


def _discard_if_broken(path: Path, classes: int) -> bool:
    """Whether a block can't be read; it is removed then."""
    try:
        _read_part(path, classes)
    except ValueError:
        return True
    return False


def _read_part(path: Path, classes: int) -> tuple[np.ndarray, float]:
    """One block's logits `(samples, classes)`, and the seconds that they took, NaN where they were not timed.

    Raises:
        ValueError: if the file is broken; it is removed.
    """
    try:
        with np.load(path) as file:
            logits = file["logits"]
            seconds = float(file["seconds"]) if "seconds" in file else math.nan  # of an earlier version
        if logits.ndim == 2 and logits.shape[1] == classes:
            return logits, seconds
        problem = f"its shape is {logits.shape}"
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken file may fail in any way
        problem = str(error)
    path.unlink()
    raise ValueError(f"{path} was broken ({problem}) and is removed; run the same again to compute it anew.")


def _shape(path: Path) -> tuple[int, ...]:
    return tuple(np.load(path, mmap_mode="r").shape)


def _or_none(read: Callable[[], T]) -> T | None:
    """What a file holds; None if it can't be read."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
