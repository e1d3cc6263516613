"""A process among several that is stopped or killed ends the others in time, and the run can be continued."""

from __future__ import annotations

import signal
import time

from torture.attempts import LINES, PREFIX, Attempt, Task, flaw
from torture.killed import rerun
from torture.ranks import run_together, start_together
from torture.world import World

# Seconds within which the others notice that a process does not answer.
NOTICED = 60.0


def attempt(world: World, task: Task) -> Attempt:
    """Stop or kill one of two or three processes at some moment, wait for the others, and start the run again."""
    random, folder = task.random, task.folder
    processes, number = random.choice((2, 3)), random.choice((signal.SIGKILL, signal.SIGSTOP))
    victim = random.randrange(processes)
    seconds = random.uniform(0.1, 1.5 * world.searching.seconds)
    name = f"{number.name} to process {victim} of {processes} after {seconds:.2f} s"
    options = world.options(folder)
    children = start_together(folder, processes, *options)
    time.sleep(seconds)
    children[victim].send(number)
    others = {rank: child.wait(seconds + NOTICED) for rank, child in enumerate(children) if rank != victim}
    speakers = {rank for rank, ended in others.items() if any(line.startswith(PREFIX) for line in ended.lines)}
    problems = []
    for rank, ended in others.items():
        # a process that seems to be stopped, on a machine that is busy, is woken and told to end
        problem = flaw(ended, allowed=(0, 1, 2, 128 + signal.SIGTERM))
        if problem and not (problem[0] == LINES and speakers and rank not in speakers):  # one of them speaks
            problems.append((problem[0], f"process {rank}: {problem[1]}"))
    children[victim].send(signal.SIGKILL)
    children[victim].wait()
    if problems:
        return Attempt(name, *problems[0])
    again = run_together(folder, processes, *options, "--overwrite")
    return rerun(name, again, folder / "soup", world.files("radin"))
