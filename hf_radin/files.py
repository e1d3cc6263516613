"""Files and folders that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# How the name of a folder begins that is being filled; a killed run may leave one.
PARTIAL = ".hf_radin."


def write_atomically(path: Path, write: Callable[[Path], object], *, forced: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then give it its name: nobody ever sees half a file.

    Args:
        forced: to the disk. Else a power cut may leave the name with other bytes behind it, and who reads the file has
            to tell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name that no process of any machine gives; it keeps the ending, which some writers look at
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        with _naming(path):
            write(partial)
            if forced:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(*folders: Path) -> None:
    """Remove what killed runs left half written; what is younger than a day may belong to a run that lives."""
    for folder in folders:
        for path in folder.glob(".*"):
            if path.is_file() and _is_partial(path) and time.time() - path.stat().st_mtime > 86_400:
                path.unlink(missing_ok=True)


def _is_partial(path: Path) -> bool:
    return re.match(r"\.[0-9a-f]{12}\.", path.name) is not None


def write_json(path: Path, content: Any) -> None:
    """Atomically, as all is written."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content)))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name what can't be written: of a full disk, each writer has its own error, and none says where."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} can't be written: {error}. All that was finished is kept: make room, or name another place, and "
            "run the same again."
        ) from error


def check_output(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something already, or can't be made.

    Raises:
        ValueError: if it does and may not be overwritten, or is a file, or its place can't be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {folder} is a file.")
    if folder.is_dir() and not overwrite and any(not one.name.startswith(PARTIAL) for one in folder.iterdir()):
        raise ValueError(f"The output folder {folder} is not empty. Choose another, or pass overwrite (--overwrite).")
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"The output folder {folder} can't be made: {place} can't be written to.")


def write_folder(folder: Path, fill: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Let `fill` fill a temporary folder beside `folder`, then give it its name.

    Where the folder holds something (which `overwrite` must allow) its files are replaced one by one, the card last,
    and what was left there by another checkpoint is removed: shards, a recipe and its card. Other files stay.

    Raises:
        ValueError: as `check_output` does.
    """
    folder = folder.resolve()  # a link to a folder stays one
    check_output(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder if folder.exists() else folder.parent  # of a mounted folder, the parent may not be ours
    with tempfile.TemporaryDirectory(dir=place, prefix=PARTIAL) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        with _naming(folder):
            fill(new)
        if not folder.exists():
            new.replace(folder)
            return
        old = {*folder.glob("model*.safetensors*"), folder / "recipe.json"}
        if (folder / "recipe.json").exists():
            old.add(folder / "README.md")
        for path in sorted(new.iterdir(), key=lambda one: one.name == "README.md"):
            path.replace(folder / path.name)
            old.discard(folder / path.name)
        for path in old:
            path.unlink(missing_ok=True)


def digest(*parts: Any) -> str:
    """A short name for what JSON says of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]
