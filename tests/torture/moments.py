"""Something happens at a chosen moment of a run: before its n-th change of a file, or after a time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Python's audit events of changes, each with a path as its first argument; `open` is one if it may write.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def before_change(number: int, places: Sequence[Path], action: Callable[[], object]) -> Callable[[], int]:
    """Let `action` happen in this process before its n-th change, from 1, of a path that begins like one of these.

    Returns:
        how many changes there have been.
    """
    changes, beginnings = 0, tuple(map(str, places))

    def hear(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event != "open" and event not in _CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(beginnings):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        changes += 1
        if changes == number:
            action()

    sys.addaudithook(hear)
    return lambda: changes


def killed_by(signal_number: int) -> Callable[[], None]:
    """A signal to this process, as an action."""
    return lambda: os.kill(os.getpid(), signal_number)


def after(seconds: float, action: Callable[[], object]) -> None:
    """Let `action` happen in this process after a time, between two steps of Python."""
    signal.signal(signal.SIGALRM, lambda number, frame: action())
    signal.setitimer(signal.ITIMER_REAL, seconds)
