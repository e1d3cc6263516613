"""What a module in the middle of a model is given of images, in files beside their prepared pixels.

A file has some images of a block, as they came, and its name has the hash of what is in it: so runs that are killed,
and runs at the same time, leave nothing that would be taken for something else.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.images.cache import SPARED
from hf_radin.images.shards import Block
from hf_radin.runtime.files import BrokenFileError, Checks, make_folder, open_regular, take_away, write_to_cache
from hf_radin.runtime.schema import MADE_ANEW

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Characters of a SHA-256 in a name.
LENGTH = 32

ROWS, GIVEN = "rows", "given"


@dataclass(frozen=True)
class Activations:
    """What a module of models is given of images, where all models give it the same.

    Args:
        folder: of these files alone; its name says of which module, models and images.
        checks: the files that this run knows to be whole.
    """

    folder: Path
    checks: Checks

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of any image."""
        return next(self.folder.glob("block-*.safetensors"), None) is None

    def read(self, block: Block, rows: np.ndarray) -> torch.Tensor | None:
        """What the module is given of some images of a block, `(rows, ...)`; None if that is not known of all.

        Args:
            rows: their places in the block, `(rows,)`.
        """
        import torch

        missing, parts = np.ones(len(rows), dtype=bool), []
        for path in sorted(self.folder.glob(f"{_name(block)}-*.safetensors")):
            part = self._read_part(path)
            if part is None:
                continue
            places = part[ROWS].numpy()
            known = missing & np.isin(rows, places)
            if known.any():
                parts.append((known, part[GIVEN][torch.from_numpy(np.searchsorted(places, rows[known]))]))
                missing &= ~known
        if missing.any() or not parts:
            return None
        _, first = parts[0]
        given = first.new_empty((len(rows), *first.shape[1:]))
        for known, values in parts:
            given[torch.from_numpy(known)] = values
        return given

    def write(self, block: Block, rows: np.ndarray, given: torch.Tensor, room: int) -> int:
        """Write what the module is given of some images of a block, if it fits; returns how many bytes that takes.

        Args:
            rows: their places in the block, ascending `(rows,)`.
            given: on the CPU, `(rows, ...)`.
            room: bytes that may be taken.

        Raises:
            OSError: if it can't be written.
            ValueError: if a file stands in the place of the folder.
        """
        import torch
        from safetensors.torch import save

        if given.nbytes > room:
            return 0
        make_folder(self.folder)
        if shutil.disk_usage(self.folder).free < given.nbytes + SPARED:
            return 0
        content = save({ROWS: torch.from_numpy(rows), GIVEN: given})
        if len(content) > room:
            return 0
        seal = self._seal(_name(block), content)
        path = self.folder / f"{_name(block)}-{seal}.safetensors"
        write_to_cache(path, partial(Path.write_bytes, data=content), forced=False)
        self.checks.note(path, seal)
        return len(content)

    def _read_part(self, path: Path) -> dict[str, torch.Tensor] | None:
        """The tensors in a file: read and hashed once in a run, memory-mapped after that. A broken file goes."""
        from safetensors.torch import load, load_file

        name, _, seal = path.stem.rpartition("-")
        try:
            if self.checks.knows(path, seal):
                return load_file(path)
            with open_regular(path, way_out=MADE_ANEW) as file:
                content = file.read()
            if self._seal(name, content) != seal:
                raise BrokenFileError(path, "it is not what was written, by its SHA-256", MADE_ANEW)
        except FileNotFoundError:  # another run has taken it away
            return None
        except BrokenFileError as error:
            logger.warning("%s", error)
            take_away(path)
            return None
        self.checks.note(path, seal)
        return load(content)

    def _seal(self, name: str, content: bytes) -> str:
        """The hash of what is in a file, and of what it is about: its folder and its block, by how its name begins."""
        sha256 = hashlib.sha256(f"{self.folder.name} {name} ".encode())
        sha256.update(content)
        return sha256.hexdigest()[:LENGTH]


def _name(block: Block) -> str:
    """How the names of a block's files begin."""
    return f"block-{block[0]:05d}-{block[1]:06d}"
