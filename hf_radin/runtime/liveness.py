"""Other processes may be stopped: who holds a lock, whether it is alive, and whether the others of a run are."""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

from hf_radin.runtime.files import make_folder, write_json
from hf_radin.runtime.schema import read_record, to_json
from hf_radin.runtime.text import printable

logger = logging.getLogger(__name__)

# Seconds without a sign of life after which a process counts as stopped. Whatever blocks Python for so long (a network
# disk, a debugger) is worth a look.
SILENCE = float(os.environ.get("HF_RADIN_SILENCE", "300"))

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

    make_folder(path.parent)
    file_lock, holder_path = FileLock(path), path.with_suffix(f"{path.suffix}.json")
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        _wait_for(file_lock, holder_path)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror}. Name a place of yours (--cache-dir).") from error
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


class Watch:
    """Ends this process where it would wait for ever, for another one of its run that was stopped or lost its machine.

    In a thread, each process counts up a number once a second where torch.distributed meets, and looks at those of the
    others. Whoever has left says so, and is not missed. What was computed is on disk, and the run can be continued.

    Args:
        index: of this process.
        count: of all. One that never came is missed, too.
    """

    def __init__(self, index: int, count: int) -> None:
        self._index, self._count = index, count
        self._numbers = dict.fromkeys(set(range(count)) - {index}, 0)
        self._heard = dict.fromkeys(self._numbers, time.monotonic())
        self._reached = time.monotonic()  # the store, for the last time
        self._places: dict[int, str] = {}
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        threading.Thread(target=self._listen, daemon=True).start()

    def end(self) -> None:
        """Say that this process leaves, and watch no longer."""
        self._ended.set()
        self._beating.join(10 * BEAT)  # a store that does not answer holds up nobody who leaves

    def _beat(self) -> None:
        """Give signs of life, and note those of the others, until this process leaves or the store is gone."""
        from torch.distributed import TCPStore

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"hf_radin/alive/{attempt}"
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=SILENCE),
                wait_for_workers=False,
            )
            store.set(f"{prefix}/place/{self._index}", f"{os.getpid()} {platform.node()}")
            while not self._ended.wait(BEAT):
                store.add(f"{prefix}/{self._index}", 1)
                for other in list(self._numbers):
                    self._note(other, store, prefix)
                self._reached = time.monotonic()
            store.add(f"{prefix}/left/{self._index}", 1)
            if self._index == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
                time.sleep(2 * BEAT)  # the store ends with this process: the others shall read that it has left
        except RuntimeError:  # the store is gone, or does not answer
            if 0 not in self._numbers:  # since whoever had it has left
                self._ended.set()

    def _note(self, other: int, store: Any, prefix: str) -> None:
        """Note whether another process gave a sign of life, or has left."""
        if store.add(f"{prefix}/left/{other}", 0):
            del self._numbers[other]
            return
        if other not in self._places and store.check([f"{prefix}/place/{other}"]):
            self._places[other] = store.get(f"{prefix}/place/{other}").decode()
        number = store.add(f"{prefix}/{other}", 0)
        if number != self._numbers[other]:
            self._numbers[other], self._heard[other] = number, time.monotonic()

    def _listen(self) -> None:
        """End this process when another one has been silent for too long."""
        while not self._ended.wait(BEAT):
            silent = self._silent(SILENCE)
            if not silent:
                continue
            # without the first process there may be no store, and nothing is known of the rest; and who is stopped
            # together with another can't speak, though its time is not up
            silent, quiet = ([0], [0]) if 0 in silent else (silent, self._silent(SILENCE / 2))
            if self._index == min({*range(self._count)}.difference(quiet)):
                sys.stderr.write(f"hf-radin: {self._lost(silent[0])}\n")
                sys.stderr.flush()
            self._wake(silent)
            os._exit(1)

    def _silent(self, seconds: float) -> list[int]:
        """The others that gave no sign of life for so long."""
        now = time.monotonic()
        if 0 in self._numbers and now - self._reached > seconds:  # it has the store, or started with whoever has
            return [0]
        return [other for other in list(self._numbers) if now - self._heard[other] > seconds]

    def _lost(self, other: int) -> str:
        """What is said of a process that is lost."""
        process, _, host = self._places.get(other, "").partition(" ")
        name = f"process {other} of {self._count}" + (f" ({process} on {host})" if process else "")
        return printable(
            f"{name} has given no sign of life for {SILENCE:.0f} s: it was stopped, or its machine is gone. The "
            "others end; run the same command again to continue."
        )

    def _wake(self, silent: list[int]) -> None:
        """Let stopped processes of this machine go on, and end: a launcher would wait for them."""
        for other in silent:
            process, _, host = self._places.get(other, "").partition(" ")
            if process and host == platform.node():
                with suppress(OSError):
                    os.kill(int(process), signal.SIGTERM)
                    os.kill(int(process), signal.SIGCONT)


@cache
def watch_others() -> Watch | None:
    """The watch of this process, by what a launcher says of its run; None if it is alone."""
    index, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Watch(index, count) if count > 1 and "MASTER_ADDR" in os.environ else None
