"""Whatever is changed, cut, swapped or emptied on disk is noticed before it is used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from loopback_hub.loopback import LoopbackHub

import hf_radin
from torture.attempts import DIFFERS, HELD, PREFIX, SILENT, Attempt, Ended, Task, flaw
from torture.children import command, run, start
from torture.world import World, copied, difference

PAGE = 4096


def flip(path: Path, random: Random) -> None:
    """Another byte at one place."""
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def zero(path: Path, random: Random) -> None:
    """A page of zeros, as a disk leaves them; of a small file its second half."""
    content = bytearray(path.read_bytes())
    first = random.randrange(len(content) // PAGE) * PAGE if len(content) >= 2 * PAGE else len(content) // 2
    last = min(first + PAGE, len(content))
    content[first:last] = bytes(last - first)
    path.write_bytes(content)


def cut(path: Path, random: Random) -> None:
    """The beginning alone."""
    os.truncate(path, random.randrange(1, path.stat().st_size))


def empty(path: Path, random: Random) -> None:
    """No bytes."""
    os.truncate(path, 0)


def swap(path: Path, random: Random) -> None:
    """The content of another file of the kind, and the other way round."""
    kind = (path.suffix, path.parent.name if path.parent.parent.name != "banks" else "")
    others = [
        other
        for other in sorted(path.parent.parent.parent.rglob(f"*{path.suffix}"))
        if other != path and other.is_file() and (kind[1] == "" or other.parent.parent == path.parent.parent)
        if other.name == path.name or other.parent == path.parent
    ]
    if not others:
        return empty(path, random)
    other = random.choice(others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def remove(path: Path, random: Random) -> None:
    """No file."""
    path.unlink()


def make_folder(path: Path, random: Random) -> None:
    """A folder of its name."""
    path.unlink()
    path.mkdir()


def make_pipe(path: Path, random: Random) -> None:
    """A pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def make_endless(path: Path, random: Random) -> None:
    """A link to zeros without end."""
    path.unlink()
    path.symlink_to("/dev/zero")


CHANGES: tuple[Callable[[Path, Random], None], ...] = (
    *(flip, flip, zero, cut, empty, swap, swap),  # these look like a file
    *(remove, make_folder, make_pipe, make_endless),
)

# What a user may write to a saved soup: its card, and records that hold no hash of themselves. Only what is no longer
# such a file has to be noticed there.
FREE = ("README.md", "recipe.json")


def attempt(world: World, task: Task) -> Attempt:
    """Change one file of a cache or of a saved soup, and go on with it."""
    if task.number % 5 == 4:
        return _of_a_soup(world, task)
    if task.number % 5 == 3:
        return _of_a_cache(world, task, world.folder / "stopped" / "cache", "radin")
    return _of_a_cache(world, task, world.cache, task.random.choice(("radin", "uniform", "wider", "full")))


def _of_a_cache(world: World, task: Task, source: Path, kind: str) -> Attempt:
    """Change a file of a cache, then run over it."""
    cache = copied(source, task.folder / "cache")
    path = task.random.choice([path for path in sorted(cache.rglob("*")) if path.is_file()])
    change = task.random.choice(CHANGES if path.stat().st_size else CHANGES[-4:])
    change(path, task.random)
    name = f"{change.__name__} {path.relative_to(cache)} of a {source.parent.name} run, then {kind}"
    ended = run(task.folder, *world.options(task.folder, kind))
    if problem := flaw(ended):
        return Attempt(name, *problem)
    differing = difference(task.folder / "soup", world.files(kind)) if ended.status == 0 else None
    if differing is None:
        return Attempt(name, HELD)
    is_noticed = any("can't be read" in line for line in ended.lines)
    is_time = path.parent.name == "soups" and path.suffix == ".json" and differing == "README.md"
    if is_time and (is_noticed or not path.exists()):  # what it took to measure a soup can't be known again
        return Attempt(name, HELD)
    return Attempt(name, DIFFERS if is_noticed else SILENT, f"{differing} differs")


def _of_a_soup(world: World, task: Task) -> Attempt:
    """Change a file of a saved soup, then load, push or describe it."""
    soup = copied(world.soup, task.folder / "soup")
    names = [path.name for path in sorted(soup.iterdir()) if path.suffix != ".png"]
    path = soup / task.random.choice(names)
    change = task.random.choice(CHANGES[3:5] + CHANGES[-4:] if path.name in FREE else CHANGES)
    how = change.__name__
    if change is swap:
        change = partial(_of_another, source=world.folder / "uniform" / "soup")
    change(path, task.random)
    use = task.random.choice((_load, _push, _describe))
    name = f"{how} {path.name} of a saved soup, then {use.__name__[1:]}"
    before = path.read_bytes() if path.is_file() and path.name not in FREE else None
    ended = use(task.folder)
    if problem := flaw(ended):
        return Attempt(name, *problem)
    if path.name == "README.md":  # the user's own; without one there is no card
        return Attempt(name, HELD)
    if ended.status == 0 and path.name in FREE and path.is_file() and path.stat().st_size:
        return Attempt(name, HELD)
    if ended.status == 0 and before != (world.soup / path.name).read_bytes():
        return Attempt(name, SILENT, "nothing was said of it")
    return Attempt(name, HELD)


def _of_another(path: Path, random: Random, *, source: Path) -> None:
    shutil.copy(source / path.name, path)


def _load(folder: Path) -> Ended:
    """`Soup.from_pretrained`, as a command."""

    def work() -> int:
        import sys

        try:
            hf_radin.Soup.from_pretrained(folder / "soup").model.eval()
        except (ValueError, OSError) as error:
            print(f"{PREFIX}{error}", file=sys.stderr)
            return 2
        return 0

    return start(folder, work).wait()


def _push(folder: Path) -> Ended:
    with LoopbackHub() as hub:
        return start(folder, command("push", folder / "soup", "org/soup"), environment=hub.environ(folder)).wait()


def _describe(folder: Path) -> Ended:
    return run(folder, "card", folder / "soup")
