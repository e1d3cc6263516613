"""What the names that a user gives stand for: folders, and repositories on the Hub."""

from __future__ import annotations

import filecmp
import glob
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from hf_radin.checkpoints.files import ADAPTER, ADAPTER_CONFIG, CONFIG, WEIGHTS
from hf_radin.runtime.files import is_dir
from hf_radin.runtime.hub_errors import asking_the_hub

logger = logging.getLogger(__name__)

LISTS = (".txt", ".yaml", ".yml")


@dataclass(frozen=True)
class Place:
    """Where one checkpoint is.

    Args:
        name: what the user calls it.
        folder: on disk; None on the Hub.
        repo_id, revision, subfolder: on the Hub; the revision None where the user named none.
    """

    name: str
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str = ""


def find_places(names: list[str], *, revision: str | None = None, token: str | bool | None = None) -> list[Place]:
    """The places that names stand for, in order; each place once.

    Args:
        names: folders, patterns, Hub ids `org/name@revision:subfolder`, addresses of models or collections on the
            Hub, or files that list such names. What is on disk goes before what is on the Hub.
        revision: for the Hub ids that name none.

    Raises:
        ValueError: if a name stands for nothing.
    """
    found: dict[Place, None] = {}
    for name in names:
        for place in _places(name, token):
            found.setdefault(place if place.folder or place.revision else replace(place, revision=revision))
    return list(found)


def _places(name: str, token: str | bool | None) -> Iterator[Place]:
    if "\0" in name:
        raise ValueError(f"{name!r} is no name.")
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
            yield from _places(entry, token)
    elif glob.has_magic(name) and (folders := _matching_folders(name)):
        yield from (_run_or_checkpoint(folder) for folder in folders)
    elif path.suffix in LISTS:
        raise ValueError(f"There is no file {name!r} that could list checkpoints.")
    else:
        yield from _on_the_hub(name, token)


def _matching_folders(pattern: str) -> list[Path]:
    """The folders that a pattern matches, as a shell has it: `**` stands for any number of folders, one in the other.

    Where it ends in `**`, which a shell takes for every folder below, those that hold a checkpoint are meant.
    """
    folders = [Path(name) for name in glob.glob(pattern, recursive=True) if is_dir(Path(name))]
    if PurePosixPath(pattern).name == "**":
        folders = [folder for folder in folders if _holds_checkpoint(folder)]
    return sorted(dict.fromkeys(folders), key=lambda folder: _by_number(str(folder)))


def _holds_checkpoint(folder: Path) -> bool:
    return any(_is_file(folder / name) for name in (CONFIG, ADAPTER_CONFIG))


def _by_number(name: str) -> list[Any]:
    """So that checkpoint-94 comes before checkpoint-141."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _read_list(path: Path) -> list[str]:
    """The names in a text file, one a line, or in a YAML file, as a list or as one under `models`."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            entries: Any = [entry for line in text.splitlines() if (entry := _entry(line))]
        else:
            read = yaml.safe_load(text)
            entries = read.get("models") if isinstance(read, dict) else read
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read as a list of checkpoints: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(one, str) for one in entries):
        raise ValueError(f"{path} lists no checkpoints: it takes one name a line, or in YAML a list of names.")
    return entries


def _entry(line: str) -> str:
    """The name in a line of a list; a comment begins with `#`, at the start or after a blank.

    A name that stands for a folder here is taken whole, whatever is in it.
    """
    whole = line.strip()
    return whole if whole and is_dir(Path(whole)) else re.split(r"(?:^|\s)#", whole, maxsplit=1)[0].strip()


def _run_or_checkpoint(folder: Path) -> Place:
    """The folder itself, or of a Trainer's run that holds only `checkpoint-*` folders the best of them."""
    steps = {
        int(one.name.removeprefix("checkpoint-")): one
        for one in folder.glob("checkpoint-*")
        if one.is_dir() and one.name.removeprefix("checkpoint-").isdecimal()
    }
    last = steps[max(steps)] if steps else folder
    best = _best(last / "trainer_state.json") if steps else None
    if _holds_checkpoint(folder):
        if best and not any(_same_weights(folder, one) for one in steps.values()):
            logger.warning(
                "%s has a model of its own that is none of its checkpoints, though %s is its best: where the Trainer "
                "loaded that at the end, names that differ on disk can have left parts of the last one in it. "
                "%s/checkpoint-* names the checkpoints themselves.",
                folder,
                best,
                folder,
            )
        return Place(folder.as_posix(), folder)
    if not steps:
        return Place(folder.as_posix(), folder)  # what it lacks is said with all else that is wrong
    chosen = next((one for one in steps.values() if one.name == best), last)
    if chosen.name == best:
        logger.info("%s: %s is the best of %d checkpoints by trainer_state.json.", folder, best, len(steps))
    else:
        why = f"names {best}, which is not there" if best else "names no best one"
        logger.warning("%s: trainer_state.json %s: its last checkpoint, %s, is used.", folder, why, last.name)
    return Place(chosen.as_posix(), chosen)


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two folders have the same file of weights, as far as single files tell."""
    for name in (WEIGHTS, ADAPTER):
        if (one / name).is_file():
            return (other / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False)
    return True


def _best(state: Path) -> str | None:
    """The name of a run's best checkpoint; the path that the Trainer wrote holds where the run was made."""
    try:
        best = json.loads(state.read_text())["best_model_checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return PurePosixPath(best.replace("\\", "/")).name if isinstance(best, str) else None


def _on_the_hub(name: str, token: str | bool | None) -> Iterator[Place]:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT

    short = name.removeprefix("https://huggingface.co/").removeprefix(ENDPOINT + "/")
    if short.startswith("collections/"):
        with asking_the_hub(f"The collection {name}", missing=f"There is no collection {name!r} on the Hub"):
            items = HfApi().get_collection(short.removeprefix("collections/"), token=token).items
        models = [item.item_id for item in items if item.item_type == "model"]
        if not models:
            raise ValueError(f"The collection {name} holds no models.")
        yield from (Place(model, repo_id=model) for model in models)
        return
    front, _, subfolder = short.partition(":")
    repo_id, _, revision = front.partition("@")
    if repo_id.count("/") > 1 or short.startswith((".", "/", "~")) or not repo_id.strip("/"):
        is_pattern = "The pattern {!r} matches no folder" if glob.has_magic(name) else "There is no folder {!r}"
        raise ValueError(
            f"{is_pattern.format(name)} here, and it is no name on the Hub either (these look like 'org/name', "
            "'org/name@revision:subfolder' or, as a pattern, 'org/ft-*')."
        )
    if subfolder and any(part in ("", ".", "..") for part in subfolder.split("/")):
        raise ValueError(f"{name}: {subfolder!r} is no folder inside a repository.")
    for model in _matching(repo_id, name, token) if glob.has_magic(repo_id) else [repo_id]:
        base = Place(f"{model}{short[len(repo_id) :]}", None, model, revision or None, subfolder)
        if subfolder and glob.has_magic(subfolder):
            yield from _subfolders(base, token)
        else:
            yield base


def _matching(pattern: str, name: str, token: str | bool | None) -> list[str]:
    from huggingface_hub import HfApi

    author = pattern.partition("/")[0]
    if "/" not in pattern or glob.has_magic(author):
        raise ValueError(
            f"The pattern {name!r} matches no folder, and it is no pattern for the Hub either (these name the author: "
            "'org/ft-*')."
        )
    with asking_the_hub(f"The pattern {name!r}", missing=f"The pattern {name!r} matches no folder here"):
        listed = [model.id for model in HfApi().list_models(author=author, token=token)]
    matches = sorted((model for model in listed if _matches(model, pattern)), key=_by_number)
    if not matches:
        raise ValueError(
            f"The pattern {name!r} matches no folder here and none of the {len(listed)} models of {author!r} on the "
            "Hub that you can see. If they are private, pass a token."
        )
    return matches


def _matches(path: str, pattern: str) -> bool:
    """Whether a path on the Hub matches a pattern, as in a shell: only `**` goes from folder to folder."""
    return _parts_match(path.split("/"), pattern.split("/"))


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts_match(parts[skipped:], patterns[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])


def _subfolders(place: Place, token: str | bool | None) -> Iterator[Place]:
    """The folders of one repository that match a pattern and hold a checkpoint."""
    from huggingface_hub import HfApi

    with asking_the_hub(place.repo_id or "", revision=place.revision):
        files = HfApi().list_repo_files(place.repo_id or "", revision=place.revision, token=token)
    kinds = (CONFIG, ADAPTER_CONFIG)
    folders = {file.rpartition("/")[0] for file in files if PurePosixPath(file).name in kinds} - {""}
    if place.subfolder in folders:  # its name looks like a pattern
        yield place
        return
    found = sorted((one for one in folders if _matches(one, place.subfolder)), key=_by_number)
    if not found:
        raise ValueError(f"{place.name}: no folder of {place.repo_id} with a checkpoint matches {place.subfolder!r}.")
    for one in found:
        yield replace(place, name=place.name.replace(f":{place.subfolder}", f":{one}"), subfolder=one)
