"""A full disk, a read-only one, little memory and a lost network end a run in one line, and it can be continued."""

from __future__ import annotations

import ctypes
import os
import resource
from functools import partial
from pathlib import Path

from loopback_hub.loopback import LoopbackHub
from loopback_hub.wire import Fault

from hf_radin.__main__ import run as run_program
from torture.attempts import DIFFERS, HELD, LINES, REFUSED, Attempt, Task, flaw
from torture.children import command, give_away, prepared, run, start
from torture.killed import draw_moment, rerun
from torture.moments import before_change
from torture.world import World, copied, difference

# Bytes that a run writes.
WRITTEN = 900_000

_NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS of Linux


def full_disk(world: World, task: Task) -> Attempt:
    """Let a file system fill up at some point: a small one where this is root, else by a limit on each file."""
    size = task.random.randrange(10_000, WRITTEN)
    options = world.options(task.folder)
    if os.getuid() == 0:
        name = f"a disk of {size:,} bytes"
        prepare = partial(_mount, task.folder, size)
    else:
        size = task.random.randrange(1_000, 40_000)
        name = f"files of at most {size:,} bytes"
        prepare = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    ended = start(task.folder, prepared(prepare, command(*options))).wait()
    if problem := flaw(ended):
        return Attempt(name, *problem)
    return rerun(name, run(task.folder, *options, "--overwrite"), task.folder / "soup", world.files("radin"))


def lost_output(world: World, task: Task) -> Attempt:
    """Let what is printed find no reader, or no room: the soup is saved all the same."""
    streams = task.random.choice(((1,), (2,), (1, 2)))
    is_full = task.random.random() < 0.5
    name = f"{'a full disk' if is_full else 'a closed pipe'} behind {' and '.join(map(str, streams))}"

    def lose() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        writer = os.open("/dev/full", os.O_WRONLY) if is_full else writer
        for stream in streams:
            os.dup2(writer, stream)

    options = list(map(str, world.options(task.folder)))
    ended = start(task.folder, prepared(lose, lambda: run_program(options))).wait()
    expected = 2 if is_full and 1 in streams else 0
    if (problem := flaw(ended, allowed=(expected,))) and (problem[0] != LINES or 2 not in streams):
        return Attempt(name, *problem)
    differing = difference(task.folder / "soup", world.files("radin"))
    return Attempt(name, DIFFERS, f"{differing} differs") if differing else Attempt(name, HELD)


def _mount(folder: Path, size: int) -> None:
    """Make a folder a small disk, in this process alone. What is written there is lost with it.

    A block of that disk has 4 kB, and a file takes whole blocks.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_NEW_NAMESPACE) or library.mount(b"none", b"/", None, 0x44000, None):  # MS_REC, MS_PRIVATE
        raise RuntimeError(f"No namespace of mounts can be made: {os.strerror(ctypes.get_errno())}")
    if library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise RuntimeError(f"No disk can be mounted: {os.strerror(ctypes.get_errno())}")
    os.chdir(folder)


def read_only(world: World, task: Task) -> Attempt:
    """Let all folders of a run refuse writing from some moment on."""
    folder, options = task.folder, world.options(task.folder)
    change = task.random.randint(1, world.searching.changes)
    environment = os.environ | {"HF_HOME": str(folder.parent / "home")}
    (folder.parent / "home").mkdir()
    give_away(folder.parent)

    def forbid() -> None:
        for path in (*folder.rglob("*"), folder):
            if path.is_dir():
                path.chmod(0o555)

    name = f"read-only before change {change}"
    work = prepared(lambda: before_change(change, [folder], forbid), command(*options))
    ended = start(folder, work, environment=environment, as_nobody=True).wait()
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    if problem := flaw(ended):
        return Attempt(name, *problem)
    again = start(folder, command(*options, "--overwrite"), environment=environment, as_nobody=True).wait()
    return rerun(name, again, folder / "soup", world.files("radin"))


def little_memory(world: World, task: Task) -> Attempt:
    """From some moment on, let this process have only some megabytes beyond what it has."""
    folder, options = task.folder, world.options(task.folder)
    megabytes = task.random.choice((0, 1, 4, 16, 64, 128))

    def limit() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

    moment, prepare = draw_moment(task.random, world.searching, [folder], limit)
    name = f"{megabytes} MB {moment}"
    ended = start(folder, prepared(prepare, command(*options))).wait()
    if problem := flaw(ended):
        return Attempt(name, *problem)
    return rerun(name, run(folder, *options, "--overwrite"), folder / "soup", world.files("radin"))


def lost_network(world: World, task: Task) -> Attempt:
    """Drop every connection from some request on, of a push or of a run whose models are on the Hub."""
    random, folder = task.random, task.folder
    pushes = task.number % 2 == 0
    with LoopbackHub() as hub:
        environment = hub.environ(folder / "home")
        if pushes:
            copied(world.soup, folder / "soup")
            options: list[object] = ["push", folder / "soup", "org/soup"]
        else:
            for path in sorted(world.runs.iterdir()):
                hub.add_repo(f"org/{path.name}", {file.name: file.read_bytes() for file in path.iterdir()})
            models = [f"org/{path.name}" for path in sorted(world.runs.iterdir())]
            options = [*world.options(folder), "--models", *models]
        request = random.randrange(14 if pushes else 30)
        answer = hub.answer

        def lose(call):
            if len(hub.requests) >= request:
                return Fault("", "", None).reply()
            return answer(call)

        hub.answer = lose
        name = f"{'push' if pushes else 'soup'}, no network from request {request} on"
        ended = start(folder, command(*options), environment=environment).wait(90)
        hub.answer = answer
        if problem := flaw(ended):
            return Attempt(name, *problem)
        again = start(folder, command(*options), environment=environment).wait()
        if again.status == 2 and "is not empty" in again.errors:
            again = start(folder, command(*options, "--overwrite"), environment=environment).wait()
        if problem := flaw(again, allowed=(0,)):
            return Attempt(name, problem[0], f"the run after it: {problem[1]}")
        weights = (
            hub.files("org/soup")["model.safetensors"]
            if pushes
            else (folder / "soup" / "model.safetensors").read_bytes()
        )
    is_same = weights == (world.soup / "model.safetensors").read_bytes()
    return Attempt(name, HELD) if is_same else Attempt(name, REFUSED, "other weights")
