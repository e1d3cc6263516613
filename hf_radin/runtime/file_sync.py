"""Machines of one run that don't see each other's disks: what one of them computed, all get, file by file."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from hf_radin.runtime.files import write_atomically
from hf_radin.runtime.processes import local_processes, on_main_process, smallest, the_accelerator

# Bytes that go from machine to machine at a time: a whole file may be more than should be in memory.
CHUNK = 1 << 25


@cache
def is_apart(folder: Path) -> bool:
    """Whether the machines of this run have different folders of this name. All processes ask at the same point."""
    accelerator = the_accelerator()
    if accelerator.num_processes == local_processes():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    name = on_main_process(lambda: f".{uuid.uuid4().hex}")
    if accelerator.is_main_process:
        (folder / name).touch()
    accelerator.wait_for_everyone()
    apart = not smallest((folder / name).exists())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / name).unlink()
    return apart


def on_each_disk(folder: Path, do: Callable[[], object]) -> None:
    """Let one process of each disk do what changes a folder: the main one where all machines share it."""
    accelerator = the_accelerator()
    apart = is_apart(folder)
    if accelerator.is_main_process or (apart and accelerator.is_local_main_process):
        do()


def share(folder: Path, *patterns: str) -> None:
    """Give each machine those files of a folder that match a pattern and that another machine has.

    Nothing happens where all machines see the same folder. All processes call this at the same point. What says that
    other files are whole (JSON) comes after these, so that a run that is killed here is none the worse.
    """
    from accelerate.utils import gather_object

    if not is_apart(folder):
        return
    accelerator = the_accelerator()
    speaks = accelerator.is_local_main_process
    there = [path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith(".")]
    mine = {str(path.relative_to(folder)) for path in there} if speaks else None
    listed: list[set[str] | None] = gather_object([mine])
    owners: dict[str, int] = {}
    for process, names in enumerate(listed):
        for name in names or ():
            owners.setdefault(name, process)
    lacking = [name for name in owners if any(names is not None and name not in names for names in listed)]
    for name in sorted(lacking, key=lambda name: (name.endswith(".json"), name)):
        chunks = _chunks(folder / name, owners[name])
        if mine is not None and name not in mine:
            write_atomically(folder / name, partial(_write, chunks=chunks))
        else:
            for _ in chunks:
                pass


def _chunks(path: Path, owner: int) -> Iterator[bytes]:
    """A file's content in every process, read by its owner."""
    from accelerate.utils import broadcast_object_list

    file = path.open("rb") if the_accelerator().process_index == owner else None
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
