"""Commands in forked children: what takes seconds to load was loaded before."""

from __future__ import annotations

import importlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loopback_hub.fixtures import reread_environment

from hf_radin.cli.main import main
from torture.attempts import Ended

# Seconds that a command may take before it counts as hanging; alone on a core none here takes a tenth of it.
PATIENCE = 30.0

# Seconds that the first of them may take, which loads torch and all else, on a machine that does other things too.
LOADING = 300.0

# Bytes of memory that a child may ask for: the machine has to survive what a child tries.
MEMORY = 6 << 30

# The user whom permissions bind, where the campaign runs as root.
NOBODY = 65534


@dataclass(frozen=True)
class Child:
    """A child that runs.

    Args:
        process: its number, which is also that of its group.
        began: when, by the monotonic clock.
        output, errors: the files that it writes to.
        memory: bytes that it had at its start, which are its parent's.
    """

    process: int
    began: float
    output: Path
    errors: Path
    memory: int

    def send(self, number: int) -> None:
        """Send it a signal, unless it is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.process, number)

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Wait for its end, or end it with all that it started."""
        in_time, ended, status, usage = True, 0, 0, None
        pause = 0.002
        while not ended:
            ended, status, usage = os.wait4(self.process, os.WNOHANG)
            if not ended and time.monotonic() - self.began > seconds:
                in_time = False
                os.killpg(self.process, signal.SIGKILL)
                ended, status, usage = os.wait4(self.process, 0)
            if not ended:
                time.sleep(pause)
                pause = min(pause * 1.5, 0.05)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process, signal.SIGKILL)  # what it left behind
        return Ended(
            os.waitstatus_to_exitcode(status),
            self.output.read_bytes().decode(errors="backslashreplace"),
            self.errors.read_bytes().decode(errors="backslashreplace"),
            time.monotonic() - self.began,
            max(0, usage.ru_maxrss * 1024 - self.memory) if usage else 0,
            in_time,
        )


def start(
    folder: Path,
    work: Callable[[], int | None],
    *,
    environment: dict[str, str] | None = None,
    as_nobody: bool = False,
) -> Child:
    """Run a function in a child that behaves as a program of its own, in a folder.

    Args:
        work: returns the exit status.
        environment: all variables, where they are others: those of a Hub of its own.
        as_nobody: as a user without rights, where this is root.
    """
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=folder.parent))
    child = Child(0, time.monotonic(), logs / "output", logs / "errors", _memory_now())
    child.output.touch()
    child.errors.touch()
    process = os.fork()
    if process:
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(process, process)
        return Child(process, child.began, child.output, child.errors, child.memory)
    status = 70
    try:
        os.setpgid(0, 0)
        _become_program(folder, child, environment, as_nobody)
        status = _status_of(work)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def command(*arguments: object) -> Callable[[], int]:
    """The command line with these arguments, as work for a child."""

    return lambda: main([str(argument) for argument in arguments])


def prepared(prepare: Callable[[], object], work: Callable[[], int]) -> Callable[[], int]:
    """Work that begins with something else."""

    def both() -> int:
        prepare()
        return work()

    return both


def run(folder: Path, *arguments: object, seconds: float = PATIENCE, **options: dict[str, str] | bool) -> Ended:
    """Run a command in a child and wait for it; `options` are those of `start`."""
    return start(folder, command(*arguments), **options).wait(seconds)


def _stream(number: int, errors: str) -> io.TextIOWrapper:
    """A stream of text to a file that is open, and stays open for as long as the process."""
    raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return io.TextIOWrapper(raw, "utf-8", errors, line_buffering=True)


def _become_program(folder: Path, child: Child, environment: dict[str, str] | None, as_nobody: bool) -> None:
    """What differs between a forked child and a program that a shell starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for path, number in ((child.output, 1), (child.errors, 2)):
        stream = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(stream, number)
        os.close(stream)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    sys.stdout = sys.__stdout__ = _stream(1, "strict")
    sys.stderr = sys.__stderr__ = _stream(2, "backslashreplace")
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        reread_environment()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, resource.RLIM_INFINITY))
    if as_nobody and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _status_of(work: Callable[[], int | None]) -> int:
    """The exit status that Python would end with."""
    try:
        return work() or 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _memory_now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def give_away(*folders: Path) -> None:
    """Let a child that runs as nobody write to folders, with all that is in them."""
    if os.getuid() == 0:
        for folder in folders:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def warm(folder: Path, works: Sequence[Callable[[], int | None]]) -> None:
    """Load whatever commands load, by asking a child that runs them: the children to come find it there."""
    names = folder / "modules"

    def work() -> int:
        status = max(work() or 0 for work in works)
        names.write_text("\n".join(sys.modules))
        return status

    ended = start(folder, work).wait(LOADING)
    if ended.status:
        raise RuntimeError(f"The first command ended with {ended.status} after {ended.seconds:.0f} s: {ended.errors}")
    for name in names.read_text().split("\n"):
        if name not in sys.modules and not name.startswith(("__", "torch._dynamo", "torch._inductor")):
            with suppress(Exception):
                importlib.import_module(name)
