"""Files and folders that are written whole or not at all, and files from anywhere that are read with care."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError

from hf_radin.runtime.text import one_line

T = TypeVar("T")

# Prefix of folders that are being filled; a killed run may leave one behind.
PARTIAL = ".hf_radin."

# Bytes of a small file: configurations, records, cards and lists have kilobytes; what has more is something else.
SMALL = 16 << 20

# Levels of lists and objects in JSON or YAML: records have a handful, and whatever goes through them recursively takes
# a hundred.
LEVELS = 100

# Letters of YAML, which is read at some 100 kB a second, and repetitions by a name (`*name`) in it: each may double
# all that was read before.
YAML_SIZE, YAML_ALIASES = 256 << 10, 16

# The metadata of a card, as the Hub finds it.
_METADATA = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")

# The record, in the temporary folder of a file by file replacement, that this was begun: the names of the new files.
_SWAP = "swap.json"

# Seconds that a run may take to replace files, which is to rename them.
SWAP_TIME = 60

# What to do about a broken file where whoever reads it knows nothing better.
WAY_OUT = "Write it anew, or take it away."

# Bytes that are hashed at a time.
HASHED_BLOCK = 1 << 20

# The card and its pictures, which are ours where there is a recipe beside them.
_CARD_FILES = ("README.md", "estimates.png", "passes.png", "classes.png")

# The folder inside that of a soup for the same soup as an adapter.
ADAPTER_FOLDER = "adapter"

# The files that decide which model a folder loads as, whatever wrote them.
_CHECKPOINT_FILES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|adapter_config|recipe)\.json"
    r"|(model|adapter_model)(\.\w+)?(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


class BrokenFileError(ValueError):
    """A file that is not what it should be.

    Args:
        path: of the file.
        reason: what is wrong with it.
        way_out: a sentence that says what to do.
    """

    def __init__(self, path: Path | str, reason: object, way_out: str = WAY_OUT) -> None:
        super().__init__(f"{path} can't be read: {str(reason).rstrip('.')}. {way_out}")


def read_small(path: Path, *, limit: int = SMALL, way_out: str = WAY_OUT) -> bytes:
    """The bytes of a small file.

    Args:
        limit: how many it may have.

    Raises:
        FileNotFoundError: if there is none.
        BrokenFileError: if it is no regular file (a pipe or a device may be read for ever), is too large, or can't be
            read.
    """
    with open_regular(path, way_out=way_out) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise BrokenFileError(path, f"it has more than {limit >> 20} MB", way_out)
    return content


@contextmanager
def open_regular(path: Path, *, way_out: str = WAY_OUT) -> Iterator[BufferedReader]:
    """A file of any size to read from.

    Raises:
        FileNotFoundError: if there is none.
        BrokenFileError: if it is no regular file (a pipe or a device may be read for ever), or can't be read, by
            whatever reads from it here.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BrokenFileError(path, "it is no regular file", way_out)
            yield file
    except (FileNotFoundError, BrokenFileError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        raise BrokenFileError(path, getattr(error, "strerror", None) or error, way_out) from error


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting, as one would for a pipe that nobody writes to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: Path, *, way_out: str = WAY_OUT) -> str:
    """The text of a small file, which is UTF-8 whatever the locale. Errors as of `read_small`, and for other bytes."""
    try:
        return read_small(path, way_out=way_out).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenFileError(path, f"it is no UTF-8 text ({error.reason} at byte {error.start})", way_out) from error


def read_json(path: Path, *, way_out: str = WAY_OUT) -> Any:
    """What a small file of JSON holds. Errors as of `read_text`, and for what is no JSON."""
    text = read_text(path, way_out=way_out)
    with _as_broken(path, way_out):
        return _of_few_levels(json.loads(text))


def read_yaml(path: Path, *, way_out: str = WAY_OUT) -> Any:
    """What a small file of YAML holds. Errors as of `read_text`, and for what `parse_yaml` refuses."""
    text = read_text(path, way_out=way_out)
    with _as_broken(path, way_out):
        return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """What a short text of plain YAML says.

    Raises:
        ValueError: if it is no YAML, is too long, is nested too deeply, or repeats parts of itself by name too often.
    """
    if len(text) > YAML_SIZE:
        raise ValueError(f"it has more than {YAML_SIZE >> 10} kB of YAML")
    try:
        return _of_few_levels(yaml.load(text, _PlainLoader))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ValueError(f"it is no YAML: {error.problem}{place}") from error
    except Exception as error:  # constructors of numbers and dates have their own errors
        raise ValueError(one_line(error)) from error


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata at the beginning of a card, between two lines of `---`; none if there is none.

    Raises:
        ValueError: if it can't be read, or is no mapping.
    """
    block = _METADATA.match(text)
    content = parse_yaml(block[1]) if block else None
    if not isinstance(content, (dict, type(None))):
        raise ValueError("its metadata is no mapping")
    return content or {}


class _PlainLoader(yaml.SafeLoader):
    """YAML of strings, numbers, lists and mappings, with few repetitions by name."""

    _aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._aliases += self.check_event(yaml.AliasEvent)
        if self._aliases > YAML_ALIASES:
            raise ValueError(f"it has more than {YAML_ALIASES} aliases")
        return super().compose_node(parent, index)


def _of_few_levels(content: Any) -> Any:
    """What JSON or YAML holds, if whatever goes through it recursively can. Raises a ValueError else."""
    level = [content]
    for _ in range(LEVELS):
        # each once: YAML may hold itself
        parts = {id(value): value for value in level if isinstance(value, (dict, list))}
        if not parts:
            return content
        level = [value for part in parts.values() for value in (part.values() if isinstance(part, dict) else part)]
    raise ValueError("it is nested too deeply")


@contextmanager
def _as_broken(path: Path, way_out: str) -> Iterator[None]:
    """Turn what a parser raises into the error of a broken file."""
    try:
        yield
    except RecursionError as error:
        raise BrokenFileError(path, "it is nested too deeply", way_out) from error
    except ValueError as error:
        raise BrokenFileError(path, error, way_out) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal. Errors as of `open_regular`."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASHED_BLOCK))
    with open_regular(path) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def sha256_of_each(paths: Iterable[Path]) -> list[str | None]:
    """The SHA-256 of files, several at a time; None of one that can't be read."""

    def hash_or_none(path: Path) -> str | None:
        try:
            return sha256_of(path)
        except (OSError, BrokenFileError):
            return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(hash_or_none, paths))


class Checks:
    """The files that a run knows to be whole, since it has written or hashed them.

    A file is hashed again only if its size, its times or its place on the disk are others than when that was done.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[str, tuple[int, ...]]] = {}
        self._read: dict[Path, tuple[tuple[int, ...], Any]] = {}

    def note(self, path: Path, sha256: str) -> None:
        """Say what a file's SHA-256 is, which was just written or read."""
        self._known[path] = sha256, _stamp(path)

    def knows(self, path: Path, sha256: str | None) -> bool:
        """Whether a file had this SHA-256 when this run hashed it, and has not changed since."""
        return self._known.get(path) == (sha256, _stamp(path))

    def as_read(self, path: Path, read: Callable[[], T]) -> T:
        """What is read from a file; read again only where the file is not the one that it was read from."""
        stamp = _stamp(path)  # before it is read: what changes meanwhile is not known
        if stamp and (known := self._read.get(path)) is not None and known[0] == stamp:
            result: T = known[1]
            return result
        result = read()
        self._read[path] = stamp, result
        return result

    def broken(self, files: Mapping[Path, str | None]) -> list[Path]:
        """The files that have not the SHA-256 which their record says, or whose record says none.

        Several are hashed at a time, and each once in a run.
        """
        unknown = [path for path, sha256 in files.items() if not self.knows(path, sha256)]
        stamps = [_stamp(path) for path in unknown]  # before they are read: what changes meanwhile is not known
        for path, stamp, sha256 in zip(unknown, stamps, sha256_of_each(unknown), strict=True):
            self._known[path] = sha256 or "", stamp
        return [path for path, sha256 in files.items() if not self.knows(path, sha256)]


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells a file that nobody has touched from others; of no file, nothing."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_of_a_checkpoint(name: str) -> bool:
    """Whether a file decides which model its folder or repository loads as."""
    return _CHECKPOINT_FILES.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether something can be the name of a file in a folder, and does not lead out of it."""
    return name not in ("", ".", "..") and PurePath(name).name == name


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, where there are none. Raises as `refuse_files` does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        refuse_files(folder)
        raise


def refuse_files(*folders: Path) -> None:
    """Refuse what stands in the place of folders that are written to later, or of those that they are in.

    Raises:
        ValueError: for the first that is no folder.
    """
    for folder in folders:
        place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not place.is_dir():
            raise ValueError(f"{place} is a file where a folder goes. Remove it, or move it away; then run it again.")


def write_atomically(path: Path, write: Callable[[Path], object], *, forced: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: nobody ever sees half a file.

    Args:
        forced: whether the bytes are forced to the disk first. Otherwise a power cut may leave the name with other
            bytes behind it, which whoever reads the file has to notice.
    """
    make_folder(path.parent)
    # a name that no other process gives, on any machine; it keeps the ending, which some writers look at
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        with _naming_place(path):
            write(partial)
            if forced:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_to_cache(path: Path, write: Callable[[Path], object], *, forced: bool = True) -> None:
    """Write a file of the cache as `write_atomically` does; a folder in its place, which nobody of us made, goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    write_atomically(path, write, forced=forced)


def take_away(path: Path) -> None:
    """Remove what is broken of the cache, whatever it is, so that it is made anew. What can't be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_partials(*folders: Path) -> None:
    """Remove what killed runs left half written, once it is a day old; a running one may still need it before.

    What another run removes meanwhile is gone, and what belongs to somebody else, as in /tmp, stays.
    """
    for folder in folders:
        for path in folder.glob(".*"):
            with suppress(OSError):
                if _is_partial(path) and time.time() - path.stat().st_mtime >= 86_400:
                    take_away(path)


def _is_partial(path: Path) -> bool:
    if path.name.startswith(PARTIAL):
        return path.is_dir() and not (path / _SWAP).exists()
    return re.match(r"\.[0-9a-f]{12}\.", path.name) is not None and path.is_file()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content), encoding="utf-8"))


@contextmanager
def _naming_place(path: Path) -> Iterator[None]:
    """Say what can't be written: each writer has its own error for a full disk, and none of them names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} can't be written: {one_line(error)}. Finished work is kept: free some space or name another "
            "place, and run the same again."
        ) from error


def check_output(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that can't be written, after what a killed run was replacing there is put back.

    Raises:
        ValueError: if it is not empty and may not be overwritten, or is a file, or its place can't be written to.
    """
    try:
        folder.resolve()
    except RuntimeError as error:  # before Python 3.13 no OSError
        raise ValueError(f"The output {folder} can't be made: {error}.") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {folder} is a file. Name a folder.")
    put_back(folder)
    if folder.is_dir() and not overwrite and any(not path.name.startswith(PARTIAL) for path in folder.iterdir()):
        raise ValueError(f"The output folder {folder} is not empty. Choose another, or pass overwrite (--overwrite).")
    _check_place(folder, f"The output folder {folder} can't be made")


def check_file(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that can't be written.

    Raises:
        ValueError: if it is there and may not be overwritten, or is a folder, or its place can't be written to.
    """
    if is_dir(path):
        raise ValueError(f"{path} is a folder. Name a file.")
    if path.exists() and not overwrite:
        raise ValueError(f"The file {path} is there already. Choose another, or pass overwrite (--overwrite).")
    _check_place(path.parent, f"The file {path} can't be written")


def _check_place(folder: Path, problem: str) -> None:
    """Refuse a folder that can't be written to, or made.

    Args:
        problem: what can't be done then.

    Raises:
        ValueError: if it can't.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=PARTIAL):
            pass
    except OSError as error:
        raise ValueError(f"{problem}: {existing} can't be written to ({error.strerror}).") from error


def write_folder(folder: Path, fill: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Let `fill` fill a temporary folder, then put it in the place of `folder`.

    If that is not empty (which `overwrite` must allow), its files are replaced, and those of another checkpoint are
    removed: weights, adapters (that of a soup in its folder, too), the configuration of its image processor, a recipe
    and its card. Other files stay.
    Whoever is killed leaves the old files or the new ones, at the latest when `check_output` is called again.

    Raises:
        ValueError: as `check_output` does.
    """
    check_output(folder, overwrite=overwrite)
    folder = folder.resolve()  # a link to a folder stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(folder, folder.parent)
    place = folder.parent if not folder.exists() or _is_replaceable(folder) else folder
    with tempfile.TemporaryDirectory(dir=place, prefix=PARTIAL) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        with _naming_place(folder):
            fill(new)
        _set_usual_mode(new)
        check_output(folder, overwrite=overwrite)  # another run may have been faster
        if not folder.exists():
            new.replace(folder)
            return
        names = [path.name for path in new.iterdir()]
        old = _old_files(folder, names)
        blocked = [name for name in names if (folder / name).is_dir() and name not in old]
        if blocked:
            what = "an adapter" if blocked[0] == ADAPTER_FOLDER else "a file"
            raise ValueError(f"The output folder {folder} has a folder {blocked[0]!r} where {what} goes: remove it.")
        with _naming_place(folder):
            is_all = old == {path.name for path in folder.iterdir()}
            if not (is_all and _is_replaceable(folder) and _exchange(new, folder)):
                _swap(new, folder, names, old)


def _old_files(folder: Path, names: Sequence[str]) -> set[str]:
    """The names of the files of a folder that those of a new checkpoint replace, or that go with the old one.

    The adapter of an old soup is among them, as a whole.

    Raises:
        ValueError: if there are other files in the folder of that adapter, which would be lost.
    """
    files = {path.name for path in folder.iterdir() if not path.is_dir()}
    old = {name for name in files if name in names or is_of_a_checkpoint(name)}
    if "recipe.json" not in files:
        return old
    adapter = folder / ADAPTER_FOLDER
    if (adapter / "adapter_config.json").is_file():
        others = sorted(path.name for path in adapter.iterdir() if not is_of_a_checkpoint(path.name))
        if others:
            raise ValueError(f"The adapter in {adapter} goes with the old soup, and so would {others[0]!r}: move it.")
        old.add(ADAPTER_FOLDER)
    return old | files.intersection(_CARD_FILES)


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder of ours may come in the place of this one.

    Not in that of a mounted one, of somebody else's, or of the one that this process, and likely the shell that
    started it, works in: they would stand in a folder that is gone.
    """
    status, above = folder.stat(), folder.parent.stat()
    is_worked_in = os.path.samestat(status, os.stat(os.curdir))
    is_ours = not hasattr(os, "geteuid") or (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
    is_mounted = status.st_dev != above.st_dev or os.path.ismount(folder)
    return is_ours and not is_worked_in and not is_mounted and os.access(folder.parent, os.W_OK)


def _exchange(new: Path, folder: Path) -> bool:
    """Let two folders of one disk change places in a single step, which only Linux can: whether they did."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of its headers
    shutil.copymode(folder, new)
    return rename is not None and rename(here, os.fsencode(new), here, os.fsencode(folder), exchange) == 0


def _swap(new: Path, folder: Path, names: Sequence[str], old: set[str]) -> None:
    """Put the files of `new` in the place of the old ones, one by one.

    If that fails or is interrupted, the old ones are put back; of a killed run the next `put_back` does it. The
    configuration goes first and comes last: until then, nothing loads half of the one and half of the other.
    """
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=PARTIAL))
    try:
        with _swapping(temporary):
            aside = temporary / "old"
            aside.mkdir()
            # of a folder that is mounted from the same disk, its name does not tell: files are copied into that
            new = Path(shutil.move(new, temporary / "new"))
            write_json(temporary / _SWAP, names)
            try:
                for name in sorted(old, key=lambda name: name != "config.json"):
                    (folder / name).replace(aside / name)
                for name in sorted(names, key=lambda name: name == "config.json"):
                    (new / name).replace(folder / name)
            except BaseException:
                _move_back(temporary, folder)
                raise
            (temporary / _SWAP).unlink()  # from here on it is done
    finally:
        if not (temporary / _SWAP).exists():  # else some are not back yet
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _swapping(temporary: Path) -> Iterator[None]:
    """Be the only process that moves files in and out of a temporary folder; a killed one is none."""
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(temporary / "lock", timeout=SWAP_TIME)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another run is replacing the files of {temporary.parent}, and has not come to an end for "
            f"{SWAP_TIME} s. Let it go on, or end it; then run the same again."
        ) from error
    try:
        yield
    finally:
        lock.release()


def put_back(folder: Path) -> None:
    """Undo what a killed run was replacing in a folder; one that is alive is waited for.

    If that is interrupted, it can be done again.

    Raises:
        ValueError: if a run does not come to an end.
    """
    for record in folder.glob(f"{PARTIAL}*/{_SWAP}"):
        with suppress(FileNotFoundError), _swapping(record.parent):  # it has come to an end
            _move_back(record.parent, folder)
            shutil.rmtree(record.parent, ignore_errors=True)


def _move_back(temporary: Path, folder: Path) -> None:
    """Undo a swap of files. The record may be of somebody else's: it can't lead out of the folder."""
    names = read_json(temporary / _SWAP)
    if not isinstance(names, list) or not all(isinstance(name, str) and is_file_name(name) for name in names):
        raise BrokenFileError(temporary / _SWAP, "it does not list names of files", f"Remove {temporary}.")
    for name in names:
        if (folder / name).exists() and not (temporary / "new" / name).exists():
            (folder / name).replace(temporary / "new" / name)
    for path in (temporary / "old").iterdir():
        path.replace(folder / path.name)
    (temporary / _SWAP).unlink()


def _set_usual_mode(folder: Path) -> None:
    """Give files the mode that new files have here: some writers make theirs for the owner alone."""
    with (folder / ".mode").open("w") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    (folder / ".mode").unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def digest(*parts: Any) -> str:
    """A short hash of the parts, by their JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def is_dir(path: Path) -> bool:
    """Whether a path is a folder, which a link in a circle is not."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # the name is too long, or has a zero in it
        return False
