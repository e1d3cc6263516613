"""Two runs at the same time on one cache both end as if they were alone."""

from __future__ import annotations

import time

from torture.attempts import DIFFERS, HELD, Attempt, Task, flaw
from torture.children import command, start
from torture.world import World, copied, difference

KINDS = ("radin", "radin", "full", "greedy", "uniform", "wider")


def attempt(world: World, task: Task) -> Attempt:
    """Start two runs on one cache, the second up to a second later; each has an output of its own."""
    random, folder = task.random, task.folder
    kinds = [random.choice(KINDS) for _ in range(2)]
    pause = random.choice((0.0, 0.0, random.uniform(0, 1)))
    is_filled = random.random() < 0.25
    if is_filled:
        copied(world.cache, folder / "cache")
    children = []
    for number, kind in enumerate(kinds):
        options = [*world.options(folder, kind), "--output", folder / f"soup-{number}"]
        children.append(start(folder, command(*options)))
        time.sleep(pause if number == 0 else 0)
    name = f"{kinds[0]} and, {pause:.2f} s later, {kinds[1]} on {'a filled' if is_filled else 'an empty'} cache"
    for number, (kind, child) in enumerate(zip(kinds, children, strict=True)):
        ended = child.wait()
        if problem := flaw(ended, allowed=(0,)):
            return Attempt(name, problem[0], f"run {number}: {problem[1]}")
        if differing := difference(folder / f"soup-{number}", world.files(kind)):
            return Attempt(name, DIFFERS, f"run {number}: {differing} differs")
    return Attempt(name, HELD)
