"""The files of a bank on disk: where each is, what it says, and what to do with one that is broken."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hf_radin.images.shards import Block
from hf_radin.ingredients.ingredient import Ingredient, Ingredients, to_record
from hf_radin.runtime.files import remove_partials, write_atomically, write_json
from hf_radin.weights.batchnorm import Statistics

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
        latest["statistics"] = {**where, "about": asdict(statistics.record)}
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
        """The folder of those blocks that are there before all are."""
        return self.path.with_suffix(".parts")

    def part(self, block: Block) -> Path:
        """Where one block's logits are."""
        return self.parts / f"block-{block[0]:05d}-{block[1]:06d}.npz"


def target_of(folder: Path, ingredient: Ingredient) -> Target:
    """An ingredient's logits in the folder of a bank."""
    return Target(ingredient.id, logits_path(folder, ingredient), len(ingredient.labels))


def write_part(path: Path, part: np.ndarray, seconds: float) -> None:
    """Keep one block's logits, and what they took.

    Forcing each to the disk would take longer than tiny models do: a zip has checksums.
    """
    write_atomically(path, lambda partial: np.savez(partial, logits=part, seconds=seconds), forced=False)


def remove_broken_parts(targets: Iterable[Target]) -> None:
    """Remove the blocks that can't be read, as a power cut may leave them: they are computed anew."""
    for target in targets:
        broken = sum(_is_broken(path, target.classes) for path in target.parts.glob("block-*.npz"))
        if broken:
            logger.warning("%s: %d blocks of its logits were broken; they are computed anew.", target.name, broken)


def _is_broken(path: Path, classes: int) -> bool:
    """Whether a block can't be read; it is removed then."""
    try:
        _read_part(path, classes)
    except ValueError:
        return True
    return False


def _read_part(path: Path, classes: int) -> tuple[np.ndarray, float]:
    """One block's logits `(samples, classes)`, and the seconds that they took, NaN where nobody looked.

    Raises:
        ValueError: if the file is broken; it is removed.
    """
    try:
        with np.load(path) as file:
            part = file["logits"]
            seconds = float(file["seconds"]) if "seconds" in file else math.nan  # of an earlier version
        if part.ndim == 2 and part.shape[1] == classes:
            return part, seconds
        broken = f"its shape is {part.shape}"
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken file may fail in any way
        broken = str(error)
    path.unlink()
    raise ValueError(f"{path} was broken ({broken}) and is removed; run the same again to compute it anew.")


def join_parts(target: Target, blocks: list[Block], samples: int, dtype: str) -> tuple[bool, float]:
    """Put one model's blocks into one file, in order: whether all are finite, and the seconds that they took."""
    finite, seconds = True, 0.0
    kept = np.dtype(dtype).newbyteorder("<")

    def write(path: Path) -> None:
        nonlocal finite, seconds
        start = 0
        with path.open("wb") as file:  # not through a memory map: a full disk must be an error, not a crash
            shape = (samples, target.classes)
            np.lib.format.write_array_header_1_0(file, {"descr": kept.str, "fortran_order": False, "shape": shape})
            for block in blocks:
                part, spent = _read_part(target.part(block), target.classes)
                file.write(np.ascontiguousarray(part, dtype=kept).tobytes())
                finite = finite and bool(np.isfinite(part).all())
                start, seconds = start + len(part), seconds + spent
        if start != samples:
            raise ValueError(f"{target.name}: {start} rows of logits for {samples} images; remove {target.parts}.")

    write_atomically(target.path, write)
    return finite, seconds
