"""Resolve the names that a user gives to folders and to repositories on the Hub."""

from __future__ import annotations

import filecmp
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from hf_radin.checkpoints.files import ADAPTER, ADAPTER_CONFIG, CONFIG, WEIGHTS
from hf_radin.runtime.files import BrokenFileError, is_dir, read_text, read_yaml
from hf_radin.runtime.hub_errors import asking_the_hub
from hf_radin.runtime.schema import read_record
from hf_radin.runtime.text import refuse_bytes

logger = logging.getLogger(__name__)

# A listing that ends with so many entries, or with twice as many, may be a page of a longer one.
PAGE = 50

# How the names of files end that list checkpoints.
LISTS = (".txt", ".yaml", ".yml")

# Letters of a name, as of a path on Linux, and parts of a pattern that stand for any number of folders: with each, all
# folders are looked through once more.
LONGEST_NAME, MOST_DEEP = 4096, 3

# Entries of a list: what has more was made for something else.
MOST_LISTED = 10_000

# What to do about a list that can't be read.
_A_LIST = "A list of checkpoints has one name a line, or is a list of names in YAML."


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is.

    Args:
        name: what the user calls it.
        folder: on disk; None for a checkpoint on the Hub.
        repo_id, revision, subfolder: on the Hub; the revision is None if the user named none.
    """

    name: str
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        return self.name


def find_places(
    names: Sequence[str | Place], *, revision: str | None = None, token: str | bool | None = None
) -> list[Place]:
    """The places that names stand for, in order and without duplicates.

    Args:
        names: folders, patterns, Hub ids `org/name@revision:subfolder`, addresses of models or collections on the
            Hub, or files that list such names. What is on disk takes precedence over the Hub. A place that was found
            before stands for itself.
        revision: for the Hub ids that name none.
        token: for the Hub.

    Raises:
        ValueError: if a name stands for nothing, or is no text.
    """
    places: dict[Place, None] = {}
    for name in names:
        for place in [name] if isinstance(name, Place) else _places_of(name, token):
            refuse_bytes(place.name)
            places.setdefault(place if place.folder or place.revision else replace(place, revision=revision))
    return list(places)


def _places_of(name: str, token: str | bool | None) -> Iterator[Place]:
    if "\0" in name or len(name) > LONGEST_NAME or name.count("**") > MOST_DEEP:
        raise ValueError(f"{name[:100]!r} is no name, and no pattern that can be looked for.")
    refuse_bytes(name)
    name = name if is_dir(Path(name)) else os.path.expanduser(name)
    path = Path(name)
    if name and is_dir(path):
        yield _run_or_checkpoint(path)
    elif name and _is_file(path):
        if path.suffix not in LISTS:
            raise ValueError(
                f"{name} is a file; a checkpoint is a folder with {CONFIG} and weights, and a list of "
                f"checkpoints ends in {', '.join(LISTS)}."
            )
        for entry in _read_list(path):
            if _is_file(Path(entry)):
                raise ValueError(f"{name} lists {entry!r}, which is a file; it takes folders, patterns and Hub ids.")
            yield from _places_of(entry, token)
    elif glob.has_magic(name) and (folders := _matching_folders(name)):
        yield from (_run_or_checkpoint(folder) for folder in folders)
    elif path.suffix in LISTS:
        raise ValueError(f"There is no file {name!r} that could list checkpoints.")
    else:
        yield from _places_on_hub(name, token)


def _matching_folders(pattern: str) -> list[Path]:
    """The folders that a pattern matches as in a shell, where `**` stands for any number of nested folders.

    A pattern that ends in `**` would match every folder below: only those with a checkpoint are taken.
    """
    folders = [Path(name) for name in glob.glob(pattern, recursive=True) if is_dir(Path(name))]
    if PurePosixPath(pattern).name == "**":
        folders = [folder for folder in folders if _holds_checkpoint(folder)]
    return sorted(dict.fromkeys(folders), key=lambda folder: _natural_key(str(folder)))


def _holds_checkpoint(folder: Path) -> bool:
    return any(_is_file(folder / name) for name in (CONFIG, ADAPTER_CONFIG))


def _natural_key(name: str) -> list[Any]:
    """A key for sorting that puts checkpoint-94 before checkpoint-141."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _read_list(path: Path) -> list[str]:
    """The names in a text file, one a line, or in a YAML file, as a list or as one under `models`."""
    if path.suffix == ".txt":
        entries: Any = read_text(path, way_out=_A_LIST).splitlines()
    else:
        content = read_yaml(path, way_out=_A_LIST)
        entries = content.get("models") if isinstance(content, dict) else content
    if isinstance(entries, list) and len(entries) > MOST_LISTED:
        raise ValueError(f"{path} has {len(entries):,} entries, more than {MOST_LISTED:,}: is it a list of models?")
    if path.suffix == ".txt":
        entries = [entry for line in entries if (entry := _entry(line))]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{path} lists no checkpoints: it takes one name a line, or in YAML a list of names.")
    return entries


def _entry(line: str) -> str:
    """The name in a line of a list, without a comment, which begins with `#` at the start or after a blank.

    A line that is the name of a folder here is taken whole, even with a `#` in it.
    """
    whole = line.strip()
    return whole if whole and is_dir(Path(whole)) else re.split(r"(?:^|\s)#", whole, maxsplit=1)[0].strip()


def _run_or_checkpoint(folder: Path) -> Place:
    """The place of a checkpoint or, for a Trainer's run that only has `checkpoint-*` folders, of the best of them."""
    checkpoints = {
        int(inner.name.removeprefix("checkpoint-")): inner
        for inner in folder.glob("checkpoint-*")
        if inner.is_dir() and inner.name.removeprefix("checkpoint-").isdecimal()
    }
    last = checkpoints[max(checkpoints)] if checkpoints else folder
    holds_checkpoint = _holds_checkpoint(folder)
    best = _best_checkpoint(last / "trainer_state.json", is_needed=not holds_checkpoint) if checkpoints else None
    if holds_checkpoint:
        if best and not any(_same_weights(folder, checkpoint) for checkpoint in checkpoints.values()):
            logger.warning(
                "%s has a model of its own that is none of its checkpoints, though %s is its best: where the Trainer "
                "loaded that at the end, names that differ on disk can have left parts of the last one in it. "
                "%s/checkpoint-* names the checkpoints themselves.",
                folder,
                best,
                folder,
            )
        return Place(folder.as_posix(), folder)
    if not checkpoints:
        return Place(folder.as_posix(), folder)  # what it lacks is reported when it is read
    chosen = next((checkpoint for checkpoint in checkpoints.values() if checkpoint.name == best), last)
    if chosen.name == best:
        logger.info("%s: %s is the best of %d checkpoints by trainer_state.json.", folder, best, len(checkpoints))
    else:
        reason = f"names {best}, which is not there" if best else "names no best one"
        logger.warning("%s: trainer_state.json %s: its last checkpoint, %s, is used.", folder, reason, last.name)
    return Place(chosen.as_posix(), chosen)


def _same_weights(folder: Path, checkpoint: Path) -> bool:
    """Whether two folders have the same file of weights. True if the first one has shards, which are not compared."""
    for name in (WEIGHTS, ADAPTER):
        if (folder / name).is_file():
            return (checkpoint / name).is_file() and filecmp.cmp(folder / name, checkpoint / name, shallow=False)
    return True


@dataclass(frozen=True)
class TrainerState:
    """What is read of a Trainer's `trainer_state.json`: the path of the best checkpoint on the machine of the run."""

    best_model_checkpoint: str | None = None


def _best_checkpoint(path: Path, *, is_needed: bool) -> str | None:
    """The name of a run's best checkpoint; None if the Trainer's state does not say it, or is not there.

    Raises:
        BrokenFileError: if the state can't be read, and the name is needed.
    """
    try:
        best = read_record(TrainerState, path, way_out="Name one of the run's checkpoints.").best_model_checkpoint
    except FileNotFoundError:
        return None
    except BrokenFileError:
        if is_needed:
            raise
        return None
    return PurePosixPath(best.replace("\\", "/")).name if best else None


def _places_on_hub(name: str, token: str | bool | None) -> Iterator[Place]:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT

    short = name.removeprefix("https://huggingface.co/").removeprefix(ENDPOINT + "/")
    if short.startswith("collections/"):
        with asking_the_hub(f"The collection {name}", missing=f"There is no collection {name!r} on the Hub"):
            items = HfApi().get_collection(short.removeprefix("collections/"), token=token).items
        models = [str(item.item_id) for item in items if item.item_type == "model"]
        if not models:
            raise ValueError(f"The collection {name} holds no models.")
        yield from (Place(model, repo_id=model) for model in models)
        return
    front, _, subfolder = short.partition(":")
    repo_id, _, revision = front.partition("@")
    if repo_id.count("/") > 1 or short.startswith((".", "/", "~")) or not repo_id.strip("/"):
        problem = f"The pattern {name!r} matches no folder" if glob.has_magic(name) else f"There is no folder {name!r}"
        raise ValueError(
            f"{problem} here, and it is no name on the Hub either (these look like 'org/name', "
            "'org/name@revision:subfolder' or, as a pattern, 'org/ft-*')."
        )
    if subfolder and any(part in ("", ".", "..") for part in subfolder.split("/")):
        raise ValueError(f"{name}: {subfolder!r} is no folder inside a repository.")
    for model in _matching_models(repo_id, name, token) if glob.has_magic(repo_id) else [repo_id]:
        base = Place(f"{model}{short[len(repo_id) :]}", None, model, revision or None, subfolder)
        if subfolder and glob.has_magic(subfolder):
            yield from _matching_subfolders(base, token)
        else:
            yield base


def _matching_models(pattern: str, name: str, token: str | bool | None) -> list[str]:
    """The models on the Hub that a pattern matches.

    Args:
        pattern: of ids, without revision and subfolder.
        name: that the user gave, for errors.
    """
    from huggingface_hub import HfApi

    author = pattern.partition("/")[0]
    if "/" not in pattern or glob.has_magic(author):
        raise ValueError(
            f"The pattern {name!r} matches no folder, and it is no pattern for the Hub either (these name the author: "
            "'org/ft-*')."
        )
    with asking_the_hub(f"The pattern {name!r}", missing=f"The pattern {name!r} matches no folder here"):
        listed = [str(model.id) for model in HfApi().list_models(author=author, token=token)]
    if listed and len(listed) % PAGE == 0:
        logger.warning(
            "The Hub lists %d models of %s: there may be more, since some Hubs list no further. Name those that are "
            "missing.",
            len(listed),
            author,
        )
    matches = sorted((model for model in listed if matches_pattern(model, pattern)), key=_natural_key)
    if not matches:
        raise ValueError(
            f"The pattern {name!r} matches no folder here and none of the {len(listed)} models of {author!r} on the "
            "Hub that you can see. If they are private, pass a token."
        )
    return matches


def matches_pattern(path: str, pattern: str) -> bool:
    """Whether a path on the Hub matches a pattern as in a shell, where only `**` matches several folders."""
    return _parts_match(path.split("/"), pattern.split("/"))


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts_match(parts[skipped:], patterns[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])


def _matching_subfolders(place: Place, token: str | bool | None) -> Iterator[Place]:
    """The folders of a repository that have a checkpoint and match the pattern that stands for the subfolder."""
    from huggingface_hub import HfApi

    with asking_the_hub(place.repo_id or "", revision=place.revision):
        files = HfApi().list_repo_files(place.repo_id or "", revision=place.revision, token=token)
    configs = (CONFIG, ADAPTER_CONFIG)
    folders = {file.rpartition("/")[0] for file in files if PurePosixPath(file).name in configs} - {""}
    if place.subfolder in folders:  # a name that looks like a pattern
        yield place
        return
    matches = sorted((folder for folder in folders if matches_pattern(folder, place.subfolder)), key=_natural_key)
    if not matches:
        raise ValueError(f"{place.name}: no folder of {place.repo_id} with a checkpoint matches {place.subfolder!r}.")
    for folder in matches:
        yield replace(place, name=place.name.replace(f":{place.subfolder}", f":{folder}"), subfolder=folder)
