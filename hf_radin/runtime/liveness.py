"""Other processes may be stopped: who holds a lock, and whether it is alive."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_radin.runtime.files import write_json
from hf_radin.runtime.schema import read_record, to_json
from hf_radin.runtime.text import printable

logger = logging.getLogger(__name__)

# Seconds without a sign of life after which a process counts as stopped. Whatever blocks Python for so long (a network
# disk, a debugger) is worth a look.
SILENCE = 300.0

# Seconds between two signs of life, and between two attempts to get a lock.
BEAT = 1.0

# A holder that left no word, as in earlier versions.
UNNAMED = "a process that does not say who it is"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        process: its number on its host.
        host: name of the machine.
        since: when it got the lock, as text in UTC.
        work: what it does.
    """

    process: int
    host: str
    since: str
    work: str

    @classmethod
    def this(cls, work: str) -> Holder:
        """This process, from now on."""
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(os.getpid(), platform.node(), now, work)

    def __str__(self) -> str:
        return printable(f"process {self.process} on {self.host}, since {self.since} ({self.work})")


@contextmanager
def lock(path: Path, work: str) -> Iterator[None]:
    """Be the only run that does some work. Another waits, and is told who is at it.

    A killed process leaves no lock. One that is stopped keeps it: while it gives no sign of life, the time runs.

    Args:
        path: of the lock; who holds it is written beside it.
        work: what this process does, for others who wait.

    Raises:
        ValueError: if the holder gives no sign of life for `SILENCE` seconds.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    file_lock, holder_path = FileLock(path), path.with_suffix(f"{path.suffix}.json")
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        _wait_for(file_lock, holder_path)
    released = threading.Event()
    try:
        write_json(holder_path, to_json(Holder.this(work)))
        threading.Thread(target=_beat, args=(holder_path, released), daemon=True).start()
        yield
    finally:
        released.set()
        holder_path.unlink(missing_ok=True)
        file_lock.release()


def _beat(path: Path, released: threading.Event) -> None:
    """Touch a file now and then: that is the sign of life."""
    while not released.wait(BEAT):
        with suppress(OSError):  # it was taken away: whoever waits then knows nothing of the holder
            os.utime(path)


def _wait_for(file_lock: Any, holder_path: Path) -> None:
    """Wait for a lock as long as its holder is alive, and say who that is."""
    from filelock import Timeout

    holder, sign, alive = _holder(holder_path), _sign(holder_path), time.monotonic()
    _say(holder)
    while True:
        if (latest := _holder(holder_path)) != holder:
            holder = latest
            _say(holder)
        if (latest_sign := _sign(holder_path)) != sign:
            sign, alive = latest_sign, time.monotonic()
        if time.monotonic() - alive > SILENCE:
            end = f"end it (`kill {holder.process}` on {holder.host})" if holder else "end it"
            raise ValueError(
                f"{holder or UNNAMED} holds {holder_path.with_suffix('')} and has given no sign of life for "
                f"{SILENCE:.0f} s. Let it go on, or {end}; then run the same again: what it computed is used."
            )
        try:
            file_lock.acquire(timeout=BEAT)
            return
        except Timeout:
            pass


def _say(holder: Holder | None) -> None:
    logger.warning("Another run does the same work: %s. Waiting for it.", holder or UNNAMED)


def _sign(path: Path) -> int | None:
    """The latest sign of life of a lock's holder; None if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _holder(path: Path) -> Holder | None:
    """Who holds a lock; None if that can't be told."""
    try:
        return read_record(Holder, path)
    except (OSError, ValueError):
        return None
