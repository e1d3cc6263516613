"""Machines of one run without a common disk: files that one of them computed are copied to all others."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.runtime.files import make_folder, write_to_cache

if TYPE_CHECKING:
    from hf_radin.runtime.processes import Processes

# Bytes that go from machine to machine at a time: a whole file may be more than should be in memory.
CHUNK = 1 << 25


def is_apart(processes: Processes, folder: Path) -> bool:
    """Whether the machines of this run have different folders of this name. All processes ask at the same point."""
    if folder not in processes.is_apart:
        processes.is_apart[folder] = _look_apart(processes, folder)
    return processes.is_apart[folder]


def on_each_disk(processes: Processes, folder: Path, change: Callable[[], object]) -> None:
    """Let one process of each disk change a folder: the main one where all machines share it."""
    apart = is_apart(processes, folder)
    if processes.is_main or (apart and processes.accelerator.is_local_main_process):
        change()


def sync_files(processes: Processes, folder: Path, *patterns: str) -> None:
    """Copy the files of a folder that match a pattern to each machine that lacks them.

    Nothing happens where all machines see the same folder. All processes call this at the same point. JSON files,
    which say that other files are whole, come after these, so that a run may be killed here without harm.
    """
    from accelerate.utils import gather_object

    if not is_apart(processes, folder):
        return
    paths = [path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith(".")]
    paths = [path for path in paths if path.is_file()]  # nobody waits for a pipe, and a folder is no file
    speaks = processes.accelerator.is_local_main_process  # one process a machine lists its files
    local_names = {str(path.relative_to(folder)) for path in paths} if speaks else None
    listings: list[set[str] | None] = gather_object([local_names])
    owners: dict[str, int] = {}
    for process, names in enumerate(listings):
        for name in names or ():
            owners.setdefault(name, process)
    lacking = [name for name in owners if any(names is not None and name not in names for names in listings)]
    for name in sorted(lacking, key=lambda name: (name.endswith(".json"), name)):
        chunks = _chunks(processes, folder / name, owners[name])
        if local_names is not None and name not in local_names:
            write_to_cache(folder / name, partial(_write, chunks=chunks))
        else:
            for _ in chunks:
                pass


def _look_apart(processes: Processes, folder: Path) -> bool:
    """Let the main process leave a file in the folder, and see who finds it."""
    if processes.count == processes.local_count:
        return False
    make_folder(folder)
    name = processes.decide(lambda: f".{uuid.uuid4().hex}")
    if processes.is_main:
        (folder / name).touch()
    processes.wait()
    apart = not processes.smallest((folder / name).exists())
    processes.wait()
    if processes.is_main:
        (folder / name).unlink()
    return apart


def _chunks(processes: Processes, path: Path, owner: int) -> Iterator[bytes]:
    """A file's content in every process, read by its owner."""
    from accelerate.utils import broadcast_object_list

    file = path.open("rb") if processes.index == owner else None
    try:
        while chunk := broadcast_object_list([file.read(CHUNK) if file else None], from_process=owner)[0]:
            yield chunk
    finally:
        if file:
            file.close()


def _write(path: Path, chunks: Iterator[bytes]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
