"""Files and folders that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
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

# What a card is, where a recipe says that it is ours.
_OF_A_CARD = ("README.md", "estimates.png", "passes.png", "classes.png")

# What decides about the model that a folder loads as, whatever wrote it there.
_OF_A_CHECKPOINT = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|adapter_config|recipe)\.json"
    r"|(model|adapter_model)(\.\w+)?(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


def is_of_a_checkpoint(name: str) -> bool:
    """Whether a file decides about the model that its folder or repository loads as."""
    return _OF_A_CHECKPOINT.fullmatch(name) is not None


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
            if not _is_partial(path) or time.time() - path.stat().st_mtime < 86_400:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_partial(path: Path) -> bool:
    if path.name.startswith(PARTIAL):
        return path.is_dir()
    return re.match(r"\.[0-9a-f]{12}\.", path.name) is not None and path.is_file()


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
    try:
        folder.resolve()
    except RuntimeError as error:  # before Python 3.13 no OSError
        raise ValueError(f"The output {folder} can't be made: {error}.") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {folder} is a file.")
    if folder.is_dir() and not overwrite and any(not one.name.startswith(PARTIAL) for one in folder.iterdir()):
        raise ValueError(f"The output folder {folder} is not empty. Choose another, or pass overwrite (--overwrite).")
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"The output folder {folder} can't be made: {place} can't be written to.")


def write_folder(folder: Path, fill: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Let `fill` fill a temporary folder beside `folder`, then give it its name.

    Where the folder holds something (which `overwrite` must allow) its files are replaced one by one, and what was
    left there by another checkpoint is removed: weights, adapters, what says how images are prepared, a recipe and its
    card. Other files stay. Its configuration goes first and comes last: without one, nothing loads half of the old
    and half of the new.

    Raises:
        ValueError: as `check_output` does.
    """
    check_output(folder, overwrite=overwrite)
    folder = folder.resolve()  # a link to a folder stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(folder, folder.parent)
    place = folder if folder.exists() else folder.parent  # of a mounted folder, the parent may not be ours
    with tempfile.TemporaryDirectory(dir=place, prefix=PARTIAL) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        with _naming(folder):
            fill(new)
        _as_others(new)
        check_output(folder, overwrite=overwrite)  # another run may have been faster
        if not folder.exists():
            new.replace(folder)
            return
        files = sorted(new.iterdir(), key=lambda one: one.name == "config.json")
        blocked = [one.name for one in files if (folder / one.name).is_dir()]
        if blocked:
            raise ValueError(f"The output folder {folder} has a folder {blocked[0]!r} where a file goes: remove it.")
        old = {path for path in folder.iterdir() if is_of_a_checkpoint(path.name) and not path.is_dir()}
        if (folder / "recipe.json").exists():
            old |= {folder / name for name in _OF_A_CARD}
        with _naming(folder):
            _swap(folder, Path(temporary) / "old", old, files)


def _swap(folder: Path, aside: Path, old: set[Path], files: list[Path]) -> None:
    """Put files in place of old ones; where that fails or is interrupted, the old ones are put back."""
    aside.mkdir()
    placed: list[Path] = []
    try:
        for path in sorted({*old, *(folder / one.name for one in files)}, key=lambda one: one.name != "config.json"):
            if path.exists() or path.is_symlink():
                path.replace(aside / path.name)
        for path in files:
            placed.append(folder / path.name)
            path.replace(folder / path.name)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        for path in aside.iterdir():
            path.replace(folder / path.name)
        raise


def _as_others(folder: Path) -> None:
    """Give files the mode that files have here: some writers make theirs for the owner alone."""
    with (folder / ".mode").open("w") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    (folder / ".mode").unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)


def digest(*parts: Any) -> str:
    """A short name for what JSON says of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def is_dir(path: Path) -> bool:
    """Whether a path is a folder; a link that runs in a circle is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long a name, or one with a zero in it
        return False
