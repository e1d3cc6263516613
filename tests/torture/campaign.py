"""The promises, and a runner that makes attempts at them side by side, each in a worker of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torture import bad_input, changed, hostile, killed, order, scarce, stopped, together
from torture.attempts import BROKEN, HELD, Attempt, Task
from torture.world import World

# Seconds after which a worker is ended: its children have their own time-outs, which are shorter.
PATIENCE = 400.0


@dataclass(frozen=True)
class Promise:
    """What the package promises, and how one tries to break it.

    Args:
        name: on the command line.
        text: what is promised.
        least: attempts of the whole campaign.
        few: attempts of the short one.
        attempt: makes one attempt.
    """

    name: str
    text: str
    least: int
    few: int
    attempt: Callable[[World, Task], Attempt]


PROMISES = [
    Promise("killed", "killed or interrupted at any moment, the rerun ends byte-equal", 200, 8, killed.attempt),
    Promise("changed", "every changed, cut, swapped, emptied file noticed before use", 500, 14, changed.attempt),
    Promise("bad-input", "bad input: one line, under 10 s and 1 GB, before an image", 2000, 60, bad_input.attempt),
    Promise("hostile", "hostile checkpoints, lists, images", len(hostile.CASES), 8, hostile.attempt),
    Promise("order", "same soup for any order, batch, files, process number, hash seed", 300, 10, order.attempt),
    Promise("together", "two runs at the same time on one cache", 50, 3, together.attempt),
    Promise("full-disk", "disk full in the middle", 10, 2, scarce.full_disk),
    Promise("output", "nobody reads what is printed", 10, 2, scarce.lost_output),
    Promise("read-only", "read-only from the middle on", 10, 2, scarce.read_only),
    Promise("memory", "no memory from the middle on", 10, 2, scarce.little_memory),
    Promise("network", "lost network in the middle", 10, 2, scarce.lost_network),
    Promise("stopped", "a stopped or killed process among 2 and 3", 20, 1, stopped.attempt),
]


@dataclass(frozen=True)
class Try:
    """An attempt at a promise, and how long it took in all."""

    promise: str
    number: int
    attempt: Attempt
    seconds: float

    @property
    def is_held(self) -> bool:
        """Whether the promise held."""
        return self.attempt.outcome == HELD


@dataclass(frozen=True)
class Campaign:
    """Attempts at promises, some at a time.

    Args:
        seed: attempt number n of a promise depends on it and on n alone.
        jobs: attempts at a time.
        end: by the monotonic clock, after which no attempt is begun.
    """

    world: World
    promises: Sequence[Promise]
    seed: int
    jobs: int
    end: float

    def run(self, wanted: dict[str, int], number: int | None = None) -> list[Try]:
        """Make as many attempts at each promise as are wanted, in turn, such that time is short for none of them.

        Args:
            number: of the one attempt to make, if only one is to be made.
        """
        names = {promise.name: promise for promise in self.promises}
        numbers = {name: range(count) if number is None else [number] for name, count in wanted.items()}
        queue = sorted(
            ((at + 0.5) / len(numbers[name]), name, each) for name in names for at, each in enumerate(numbers[name])
        )
        running: dict[int, tuple[str, int, float]] = {}
        tries: list[Try] = []
        while queue or running:
            while queue and len(running) < self.jobs and time.monotonic() < self.end:
                _, name, each = queue.pop(0)
                running[self._begin(names[name], each)] = (name, each, time.monotonic())
            if not running:
                break
            process = self._next(running)
            name, each, began = running.pop(process)
            tries.append(self._result(process, name, each, time.monotonic() - began))
            if not tries[-1].is_held:
                print(self._line(tries[-1]), flush=True)
        return tries

    def _next(self, running: dict[int, tuple[str, int, float]]) -> int:
        """Which worker has ended; one that takes too long is made to."""
        while True:
            process, _ = os.waitpid(-1, os.WNOHANG)
            if process in running:
                return process
            for late, (_, _, began) in running.items():
                if time.monotonic() - began > PATIENCE:
                    os.kill(late, signal.SIGKILL)
            time.sleep(0.005)

    def _begin(self, promise: Promise, number: int) -> int:
        """Make an attempt in a worker."""
        process = os.fork()
        if process:
            return process
        try:
            folder = self._folder(os.getpid())
            (folder / "work").mkdir(parents=True)
            folder.chmod(0o755)
            task = Task(folder / "work", Random(f"{self.seed} {promise.name} {number}"), number)
            try:
                attempt = promise.attempt(self.world, task)
            except BaseException:
                attempt = Attempt("", BROKEN, " ".join(traceback.format_exc().split()[-40:]))
            fields = (attempt.name, attempt.outcome, attempt.detail)
            (folder / "attempt.json").write_text(json.dumps(fields))
        finally:
            os._exit(0)

    def _result(self, process: int, name: str, number: int, seconds: float) -> Try:
        folder = self._folder(process)
        try:
            attempt = Attempt(*json.loads((folder / "attempt.json").read_text()))
        except FileNotFoundError:
            attempt = Attempt("", BROKEN, "the worker was killed")
        shutil.rmtree(folder, ignore_errors=True)
        return Try(name, number, attempt, seconds)

    def _folder(self, process: int) -> Path:
        return self.world.folder / "attempts" / str(process)

    def _line(self, failed: Try) -> str:
        """A failure and how to see it again."""
        again = f"python -m torture --promise {failed.promise} --number {failed.number} --seed {self.seed}"
        attempt = failed.attempt
        return f"{failed.promise} {failed.number}: {attempt.outcome}: {attempt.name}: {attempt.detail} [{again}]"


def table(promises: Sequence[Promise], tries: Sequence[Try], seconds: float) -> str:
    """A row for each promise: attempts, how they ended, and seconds of work."""
    width = max(len(promise.text) for promise in promises)
    lines = ["", f"{'promise':{width}}  attempts    held  seconds  otherwise"]
    for promise in promises:
        mine = [each for each in tries if each.promise == promise.name]
        outcomes = [each.attempt.outcome for each in mine if not each.is_held]
        counts = ", ".join(f"{outcomes.count(word)} {word}" for word in sorted({*outcomes}))
        held, spent = sum(each.is_held for each in mine), sum(each.seconds for each in mine)
        lines.append(f"{promise.text:{width}}  {len(mine):8}  {held:6}  {spent:7.0f}  {counts}".rstrip())
    held = sum(each.is_held for each in tries)
    lines.append(f"{'in all':{width}}  {len(tries):8}  {held:6}  {seconds:7.0f}  (by the clock)")
    return "\n".join(lines)
