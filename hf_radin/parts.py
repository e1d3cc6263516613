"""One model's logits block by block, which is what a stopped run leaves; when all are there they become one file."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_radin.files import write_atomically
from hf_radin.ingredients import Ingredient
from hf_radin.kept import logits_path
from hf_radin.stream import Block

logger = logging.getLogger(__name__)


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


def remove_broken(targets: Iterable[Target]) -> None:
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


def join(target: Target, blocks: list[Block], samples: int, dtype: str) -> tuple[bool, float]:
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
