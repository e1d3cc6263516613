"""Killed or interrupted at any moment, the same command started again ends with the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from hf_radin.runtime.files import check_output
from torture.attempts import DIFFERS, HELD, TORN, Attempt, Ended, Task, flaw
from torture.children import command, prepared, run, start
from torture.moments import after, before_change, killed_by
from torture.world import NOTES, Pace, World, copied, difference, first_difference, output_places, soup_files

STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


def attempt(world: World, task: Task) -> Attempt:
    """Stop `soup` once or twice, and start it again; every third time one that overwrites an older soup.

    Beside half of these is a file of the user's: not the folder is replaced then, but each file.
    """
    overwrites = task.number % 3 == 2
    notes = task.folder / "soup" / NOTES
    if overwrites:
        copied(world.soup, task.folder / "soup")
        copied(world.cache, task.folder / "cache")
        if task.number % 2:
            notes.write_text("mine")
    has_notes = notes.exists()
    kind = "uniform" if overwrites else "radin"
    options = world.options(task.folder, kind)
    pace = world.overwriting if overwrites else world.searching
    places = output_places(task.folder) if overwrites else [task.folder]
    name = f"overwriting{' beside notes' * has_notes}" if overwrites else "searching"
    for _ in range(task.random.choice((1, 1, 2))):
        number = task.random.choice([*STATUS])
        moment, prepare = draw_moment(task.random, pace, places, killed_by(number))
        name += f", {number.name} {moment}"
        ended = start(task.folder, prepared(prepare, command(*options))).wait()
        if _has_ended(ended):  # the one before, which an interrupt made write the best so far
            break
        if problem := flaw(ended, allowed=(0, STATUS[number])):
            return Attempt(name, *problem)
        check_output(task.folder / "soup", overwrite=True)  # as the next one starts
        if overwrites and (torn := _torn(task.folder / "soup", world)):
            return Attempt(name, TORN, torn)
    ended = run(task.folder, *options)
    if _has_ended(ended):
        ended = run(task.folder, *options, "--overwrite")
    if has_notes and not notes.exists():
        return Attempt(name, TORN, f"{NOTES} is gone")
    return rerun(name, ended, task.folder / "soup", world.files(kind))


def _has_ended(ended: Ended) -> bool:
    """Whether a command was refused because there is a soup already."""
    return ended.status == 2 and "is not empty" in ended.errors


def rerun(name: str, ended: Ended, folder: Path, files: dict[str, bytes]) -> Attempt:
    """What came of a command that was started again, and was to save a soup of these files."""
    if problem := flaw(ended, allowed=(0,)):
        return Attempt(name, problem[0], f"the run after it: {problem[1]}")
    differing = difference(folder, files)
    return Attempt(name, DIFFERS, f"after all, {differing} differs") if differing else Attempt(name, HELD)


def draw_moment(
    random: Random, pace: Pace, places: Sequence[Path], action: Callable[[], object]
) -> tuple[str, Callable[[], object]]:
    """A moment of a run for an action, in words and as what has to be called at the run's start."""
    if random.random() < 0.6:
        change = random.randint(1, max(1, pace.changes))
        return f"before change {change}", lambda: before_change(change, places, action)
    seconds = random.uniform(0.001, pace.seconds)
    return f"after {seconds:.3f} s", lambda: after(seconds, action)


def _torn(folder: Path, world: World) -> str | None:
    """In what a folder differs from the old soup and from the new one; None if it is one of them."""
    if not folder.is_dir():
        return "there is no soup under its name"
    files = soup_files(folder)
    from_old, from_new = (first_difference(files, world.files(kind)) for kind in ("radin", "uniform"))
    return f"{from_old} is not the old one's, {from_new} not the new one's" if from_old and from_new else None
