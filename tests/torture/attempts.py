"""What an attempt to break a promise came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

# The promise held; every other outcome is a failure.
HELD = "held"
# A wrong result, and no word of it.
SILENT = "silent"
# Another result, of which something was said.
DIFFERS = "differs"
# Python's own traceback, or a death by a signal that nobody sent.
TRACEBACK = "traceback"
CRASH = "crash"
# It did not end in time, or took too much memory.
HANG = "hang"
MEMORY = "memory"
# A refusal in other than one line, or with a character that steers a terminal.
LINES = "lines"
CONTROL = "control"
# A folder under its final name that is neither the old one nor the new one.
TORN = "torn"
# A refusal that came after images were read.
LATE = "late"
# Something that was to go on was refused, or something that was to be refused ran.
REFUSED = "refused"
RAN = "ran"
# The attempt itself failed, which is a fault of the campaign.
BROKEN = "broken"


@dataclass(frozen=True)
class Attempt:
    """An attempt, and what came of it.

    Args:
        name: what was done, in a few words.
        outcome: a word of those above.
        detail: of a failure, the first line that tells it.
    """

    name: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Ended:
    """A command that ended.

    Args:
        status: its exit status; the negative number of the signal that killed it.
        output: its standard output.
        errors: its standard error.
        seconds: that it took.
        memory: bytes at its peak.
        in_time: whether it ended by itself, before its time was up.
    """

    status: int
    output: str
    errors: str
    seconds: float
    memory: int
    in_time: bool

    @property
    def lines(self) -> list[str]:
        """Of its standard error, those with something in them."""
        return [line for line in self.errors.split("\n") if line.strip()]


@dataclass(frozen=True)
class Task:
    """What an attempt is given: its folder, which is removed afterwards, and its own random numbers."""

    folder: Path
    random: Random
    number: int


# How a line begins with which the command says that it stopped.
PREFIX = "hf-radin: "

# The largest growth of a command that refuses bad input, in bytes.
MOST_MEMORY = 1 << 30


def flaw(ended: Ended, *, allowed: Sequence[int] = (0, 2)) -> tuple[str, str] | None:
    """How a command ended otherwise than it may, as an outcome and a line; None if it ended well.

    Args:
        allowed: exit statuses that are no fault here.
    """
    last = ended.lines[-1][:300] if ended.lines else ""
    if not ended.in_time:
        return HANG, f"not ended after {ended.seconds:.0f} s; {last}"
    if "Traceback (most recent call last)" in ended.errors:
        return TRACEBACK, _raised(ended)
    if ended.memory > MOST_MEMORY:
        return MEMORY, f"{ended.memory >> 20} MB; {last}"
    if ended.status not in allowed:
        return CRASH, f"ended with {ended.status}; {last}"
    steering = [character for character in ended.output + ended.errors if _steers(character)]
    if steering:
        return CONTROL, f"{steering[0]!r} was printed; {last!r}"
    if ended.status > 0:
        stops = [line for line in ended.lines if line.startswith(PREFIX)]
        if len(stops) != 1 or ended.lines[-1] != stops[0]:
            return LINES, f"{len(stops)} lines say that it stopped; the last is {last!r}"
    return None


def _raised(ended: Ended) -> str:
    """The line of a traceback that says what was raised."""
    after = ended.errors.rpartition("Traceback (most recent call last)")[2].split("\n")[1:]
    frames = [line.strip() for line in after if line.startswith("  File") and "hf_radin" in line]
    raised = next((line for line in after if line and not line.startswith(" ")), "")
    return f"{raised[:300]} ({frames[-1] if frames else ''})"


def _steers(character: str) -> bool:
    """Whether a terminal obeys a character in place of showing it."""
    return (ord(character) < 32 and character not in "\n\r\t") or 127 <= ord(character) < 160
