"""Resolve the names that a user gives to folders and to repositories on the Hub."""

from __future__ import annotations

import filecmp
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from hf_radin.checkpoints.files import ADAPTER, ADAPTER_CONFIG, CONFIG, WEIGHTS, choose_weights
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

# What may be taken of a run, which is a folder in that a Trainer saved checkpoints.
OF_A_RUN = ("best", "last", "root", "all")

# What the Trainer says of a run, in each of its checkpoints.
STATE = "trainer_state.json"

# What a line says of the models that runs stand for where the user does not say which.
_CHOICES = {
    "root": "the model at the top is used of {}",
    "best": f"the best checkpoint by {STATE} of {{}}",
    "last": "the last checkpoint of {}",
}

# How the name of a checkpoint ends that is taken from a run: its step.
_CHECKPOINT = re.compile(r"checkpoint-(\d+)", re.ASCII)

# What to do about a list that can't be read.
_A_LIST = "A list of checkpoints has one name a line, or is a list of names in YAML."


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is.

    Args:
        name: what the user calls it.
        folder: on disk; None for a checkpoint on the Hub.
        repo_id, revision, subfolder: on the Hub; the revision is None if the user named none.
        of_run: which of a run's models it is (`OF_A_RUN`); empty if the user named no run.
    """

    name: str
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str = ""
    of_run: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name


def find_places(
    names: Sequence[str | Place],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    checkpoint: str | None = None,
) -> list[Place]:
    """The places that names stand for, in order and without duplicates.

    Args:
        names: folders, patterns, Hub ids `org/name@revision:subfolder`, addresses of models or collections on the
            Hub, or files that list such names. What is on disk takes precedence over the Hub. A place that was found
            before stands for itself.
        revision: for the Hub ids that name none.
        token: for the Hub.
        checkpoint: what is taken of each run, a folder in that a Trainer saved checkpoints: the `best` by its
            `trainer_state.json`, the `last`, `root`, which is the model at the top, or `all` checkpoints. By default
            the model at the top if there is one, else the best, else the last, as a line says. What is no run stands
            for itself.

    Raises:
        ValueError: if a name stands for nothing, or is no text; if a run has not what is to be taken of it, or is
            still being written, or none of the names is a run.
    """
    if checkpoint not in (None, *OF_A_RUN):
        raise ValueError(f"checkpoint={checkpoint!r}: of a run it takes {', '.join(OF_A_RUN)} (--checkpoint).")
    places = _found(names, revision, token, checkpoint)
    of_runs = [place for place in places if place.of_run]
    if checkpoint not in (None, "root") and places and not of_runs:
        first = places[0]
        hint = f" On the Hub, folders are named: {first.repo_id}:checkpoint-*." if first.repo_id else ""
        raise ValueError(
            f"checkpoint={checkpoint!r} (--checkpoint) is taken of runs, which are folders with checkpoint-* in them, "
            f"and there is none: {first.name} stands for itself.{hint}"
        )
    if checkpoint is None and (chosen := [place for place in of_runs if place not in names]):
        logger.info("%s", _of_runs(chosen))
    return places


def all_checkpoints(names: Sequence[str], *, revision: str | None = None) -> list[Place]:
    """As `find_places`, where all checkpoints are taken of each run, if any of the names is one."""
    return _found(names, revision, None, "all")


def _found(
    names: Sequence[str | Place], revision: str | None, token: str | bool | None, checkpoint: str | None
) -> list[Place]:
    """The places that names stand for, whether there are runs among them or not."""
    places: dict[Place, None] = {}
    for name in names:
        for place in [name] if isinstance(name, Place) else _places_of(name, token, checkpoint):
            refuse_bytes(place.name)
            places.setdefault(place if place.folder or place.revision else replace(place, revision=revision))
    return list(places)


def _of_runs(places: list[Place]) -> str:
    """What is used of runs where the user did not say it, in one line."""
    parts = []
    for kind, text in _CHOICES.items():
        if ids := [place.name for place in places if place.of_run == kind]:
            parts.append(text.format(f"{ids[0]}{f' and {len(ids) - 1} more' if ids[1:] else ''}"))
    runs = "1 run" if len(places) == 1 else f"{len(places)} runs"
    return f"Of {runs} {'; '.join(parts)}. checkpoint=... (--checkpoint) takes {', '.join(OF_A_RUN)}."


def _places_of(name: str, token: str | bool | None, checkpoint: str | None) -> Iterator[Place]:
    if "\0" in name or len(name) > LONGEST_NAME or name.count("**") > MOST_DEEP:
        raise ValueError(f"{name[:100]!r} is no name, and no pattern that can be looked for.")
    refuse_bytes(name)
    name = name if is_dir(Path(name)) else os.path.expanduser(name)
    path = Path(name)
    if name and is_dir(path):
        yield from _run_or_checkpoint(path, checkpoint)
    elif name and _is_file(path):
        if path.suffix not in LISTS:
            raise ValueError(
                f"{name} is a file; a checkpoint is a folder with {CONFIG} and weights, and a list of "
                f"checkpoints ends in {', '.join(LISTS)}."
            )
        for entry in _read_list(path):
            if _is_file(Path(entry)):
                raise ValueError(f"{name} lists {entry!r}, which is a file; it takes folders, patterns and Hub ids.")
            yield from _places_of(entry, token, checkpoint)
    elif glob.has_magic(name) and (folders := _matching_folders(name)):
        for folder in folders:
            yield from _run_or_checkpoint(folder, checkpoint)
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


@dataclass(frozen=True)
class _Run:
    """A folder in that a Trainer saved checkpoints.

    Args:
        folder: of the run.
        checkpoints: in it, the earliest first.
    """

    folder: Path
    checkpoints: tuple[Path, ...]

    @property
    def last(self) -> Path:
        """The last checkpoint."""
        return self.checkpoints[-1]

    def place(self, checkpoint: Path, kind: str) -> Place:
        """The place of one of its models, which is taken as this kind."""
        return Place(checkpoint.as_posix(), checkpoint, of_run=kind)

    def places(self, wanted: str) -> list[Place]:
        """The places of what the user takes of it.

        Raises:
            ValueError: if it has that not, or is still being written.
        """
        if wanted == "root":
            if not _holds_checkpoint(self.folder):
                raise ValueError(
                    f"{self.folder} has no model at its top (root); it has {_listed(self.checkpoints)}. Take best, "
                    "last or all with checkpoint=... (--checkpoint)."
                )
            return [self.place(self.folder, wanted)]
        self.check_saves()
        if wanted == "all":
            return [self.place(checkpoint, wanted) for checkpoint in self.checkpoints]
        return [self.place(self.last if wanted == "last" else self.best(), wanted)]

    def best(self) -> Path:
        """The best checkpoint.

        Raises:
            ValueError: if it is not known, or not there.
        """
        name = _best_checkpoint(self.last / STATE, is_needed=True)
        if name is None:
            raise ValueError(
                f"{self.folder}: no {STATE} names its best checkpoint, which the Trainer does with "
                "metric_for_best_model. Take last, root or all with checkpoint=... (--checkpoint)."
            )
        checkpoint = self.named(name)
        if checkpoint is None:
            raise ValueError(
                f"{self.folder}: {STATE} names {name[:100]!r} as the best, which is not there; it has "
                f"{_listed(self.checkpoints)}. Take last, root or all with checkpoint=... (--checkpoint), or put it "
                "back."
            )
        return checkpoint

    def named(self, name: str | None) -> Path | None:
        """The checkpoint of that name; None if it is not there."""
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.name == name), None)

    def usual(self) -> Place:
        """The place of the model that a run stands for where the user does not say it."""
        has_root = _holds_checkpoint(self.folder)
        name = _best_checkpoint(self.last / STATE, is_needed=not has_root)
        best = self.named(name)
        if has_root:
            if best and not any(_same_weights(self.folder, checkpoint) for checkpoint in self.checkpoints):
                logger.warning(
                    "%s has a model at its top that is none of its checkpoints, though %s is its best: where the "
                    "Trainer loaded that at the end, names that differ on disk can have left parts of the last one in "
                    "it. %s is used; checkpoint='root' (--checkpoint root) takes the model at the top.",
                    self.folder,
                    best.name,
                    best.name,
                )
                return self.place(best, "best")
            return self.place(self.folder, "root")
        self.check_saves()
        if best:
            return self.place(best, "best")
        reason = f"names {name}, which is not there" if name else "names no best one"
        logger.warning("%s: %s %s: its last checkpoint, %s, is used.", self.folder, STATE, reason, self.last.name)
        return self.place(self.last, "last")

    def check_saves(self) -> None:
        """See that the Trainer has saved all checkpoints, and in one training, as far as a warning is due.

        Raises:
            ValueError: as `refuse_unfinished` does.
        """
        self.refuse_unfinished()
        warn_of_trainings(self.checkpoints)

    def refuse_unfinished(self) -> None:
        """Refuse a run whose last checkpoint the Trainer is writing, or was when it was killed.

        Of several versions of transformers, some write into a folder of another name, and all write the state last.

        Raises:
            ValueError: if it is so.
        """
        unfinished, problem = next(iter(sorted(self.folder.glob("tmp-checkpoint-*"))), self.last), ""
        names = {path.name for path in self.last.iterdir()}
        if unfinished != self.last:
            problem = "has a name for the meantime"
        elif not names & {CONFIG, ADAPTER_CONFIG}:
            problem = f"has no {CONFIG}"
        elif choose_weights(names, allow_pickle=True) is None:
            problem = "has no weights"
        elif STATE not in names and any((checkpoint / STATE).is_file() for checkpoint in self.checkpoints):
            problem = f"has no {STATE}, and earlier ones have"
        if problem:
            raise ValueError(
                f"{self.folder}: {unfinished.name} {problem}: it is still being written, or a run was killed there. "
                f"Wait for the Trainer, or remove that folder; or name checkpoints, as in {self.folder}/checkpoint-N."
            )


def warn_of_trainings(checkpoints: Sequence[Path]) -> None:
    """Warn of checkpoints that an earlier training left among those of a later one.

    What a training has logged at a step, it still says at later ones, resumed or not.

    Args:
        checkpoints: of one folder, the earliest first.
    """
    logs = [(checkpoint, log) for checkpoint in checkpoints if (log := _logged(checkpoint))]
    for (earlier, before), (later, after) in pairwise(logs):
        if repr(after[: len(before)]) != repr(before):  # NaN is the same as NaN
            logger.warning(
                "%s: %s and %s are of different trainings, by what their %s say that these have logged. If that is "
                "not meant, name the checkpoints of one, as in %s/checkpoint-N.",
                earlier.parent,
                earlier.name,
                later.name,
                STATE,
                earlier.parent,
            )
            return


def _run_or_checkpoint(folder: Path, wanted: str | None) -> list[Place]:
    """The place of a checkpoint or, for a Trainer's run, of what is taken of it."""
    steps = {
        int(match[1]): inner
        for inner in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(inner.name)) and inner.is_dir()
    }
    if not steps:
        return [Place(folder.as_posix(), folder)]  # what it lacks is reported when it is read
    run = _Run(folder, tuple(steps[step] for step in sorted(steps)))
    return [run.usual()] if wanted is None else run.places(wanted)


def is_of_run(folder: Path) -> bool:
    """Whether a folder is called as the Trainer calls checkpoints."""
    return _CHECKPOINT.fullmatch(folder.name) is not None


def _listed(checkpoints: tuple[Path, ...]) -> str:
    """The names of some checkpoints, for errors."""
    names = [checkpoint.name for checkpoint in checkpoints]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


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


@dataclass(frozen=True)
class TrainerLog:
    """What is read of the same file where trainings are told apart: the values that were logged, in order."""

    log_history: tuple[Any, ...] = ()


def _logged(checkpoint: Path) -> tuple[Any, ...]:
    """What a training had logged when it saved a checkpoint; nothing where that is not known."""
    try:
        return read_record(TrainerLog, checkpoint / STATE).log_history
    except (FileNotFoundError, BrokenFileError):
        return ()


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
