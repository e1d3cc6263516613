"""Which files of a local folder make which split.

datasets looks for the words of splits anywhere in a path, so that a class folder called `test` moves images between
splits (datasets#7201, #5650). Here the first folder level says it, or else a file's own name.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)

# What splits are called, by what datasets makes of it.
KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# Files that hold many images each, as datasets reads them; and those that say more of images that lie beside them.
TABLES = {".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".tar", ".zip", ".h5", ".hdf5"}
ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}

# Files that are about a dataset and none of its data.
ABOUT = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5,}\.")

# How many of the files that are left out are named.
NAMED = 5


@dataclass(frozen=True)
class SplitFiles:
    """The files of each split of a folder.

    Args:
        patterns: by the name of the split, as `load_dataset` takes `data_files`.
        remarks: what the user should know of it, in sentences.
    """

    patterns: dict[str, list[str]]
    remarks: tuple[str, ...] = ()

    @property
    def folders(self) -> set[str]:
        """The names of folders that are splits as they are."""
        whole = "/**"
        names = (
            path.removesuffix(whole) for paths in self.patterns.values() for path in paths if path.endswith(whole)
        )
        return {PurePosixPath(name).name for name in names}


def find_splits(folder: Path) -> SplitFiles | None:
    """The files of each split of a folder, an absolute path; None if datasets has to say it.

    That is where the folder's README.md or a file of datasets' own names the files, or there is nothing to be read.
    """
    if _says_itself(folder):
        return None
    kinds = {path: _kind(path) for path in _walk(folder) if path.name not in ABOUT}
    counts = Counter(kind for kind in kinds.values() if kind not in (None, "metadata"))
    if not counts:
        return None
    most = max(counts, key=lambda kind: (counts[kind], kind == ".parquet"))  # others can't be read with them
    files = [path for path, kind in kinds.items() if kind == most]
    level = _first_level(files)
    folders = _split_folders(_names(files, level))
    if most == "image":
        _refuse_classes_called_so(files, level, folders)
    if folders:
        splits = _grouped((path, folders.get(path.relative_to(level).parts[0])) for path in files)
    elif most == "image":  # of its own file an image says no split, and all else in the folder is about the images
        return SplitFiles({"train": [f"{_exactly(folder)}/**"]})
    else:
        splits = _grouped((path, _split_of_file(path)) for path in files) or {"train": files}
    inside = {path for paths in splits.values() for path in paths}
    own = {level / name for name in folders} if most == "image" else set()
    outside = [path for path, kind in kinds.items() if kind and path not in inside and not own & {*path.parents}]
    patterns = {
        # of folders one pattern each: there may be a hundred thousand images in them
        name: sorted({f"{_exactly(folder / _top(path, level))}/**" for path in paths})
        if most == "image"
        else [_exactly(folder / path) for path in paths]
        for name, paths in splits.items()
    }
    return SplitFiles(patterns, (*_both(folders), *_outside(sorted({str(_top(path, level)) for path in outside}))))


def find_archives(folder: Path) -> list[str]:
    """Files of a folder that others are packed into."""
    return [str(path) for path in _walk(folder) if path.suffix.lower() in ARCHIVES]


def _both(folders: dict[str, str]) -> list[str]:
    """Which folders make one split together."""
    names = {split: [name for name in folders if folders[name] == split] for split in folders.values()}
    return [
        f"The folders {' and '.join(sorted(names[split]))} are both taken as the split {split!r}."
        for split in names
        if len(names[split]) > 1
    ]


def _outside(names: list[str]) -> list[str]:
    """What belongs to no split."""
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    text = f"{', '.join(names[:NAMED])}{more}: in no folder of a split, and without one in the name; left out."
    if notes := METADATA.intersection(names):
        text += f" Of {', '.join(sorted(notes))}, put one into the folder of each split, which it is then read from."
    return [text]


def _says_itself(folder: Path) -> bool:
    """Whether a dataset's card lists its files."""
    from huggingface_hub import metadata_load

    if (folder / ".huggingface.yaml").is_file():
        return True
    card = folder / "README.md"
    return card.is_file() and "configs" in (metadata_load(card) or {})


def _walk(folder: Path) -> list[PurePosixPath]:
    """All files below a folder but hidden ones, relative to it; links are followed, and may run in circles."""
    paths: list[PurePosixPath] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        below = PurePosixPath(Path(place).relative_to(folder).as_posix())
        real = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = [name for name in sorted(folders) if not name.startswith((".", "__")) and real[name] not in seen]
        seen.update(real[name] for name in folders)
        paths += [below / name for name in sorted(names) if not name.startswith(".")]
    return paths


def _kind(path: PurePosixPath) -> str | None:
    """What a file holds: `image`, `metadata` of images, a table by its suffix; None if that is no data."""
    if path.name in METADATA:
        return "metadata"
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]  # .tar.gz is a .tar
    if suffixes and suffixes[-1] in _image_suffixes():
        return "image"
    return next((suffix for suffix in reversed(suffixes) if suffix in TABLES), None)


@lru_cache
def _image_suffixes() -> frozenset[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)


def _first_level(files: list[PurePosixPath]) -> PurePosixPath:
    """The folder whose folders may be splits: the deepest that holds all files, but none that is a split itself."""
    level = PurePosixPath()
    while True:
        names = _names(files, level)
        if len(names) != 1 or None in names or any(name and name.lower() in KEYWORDS for name in names):
            return level
        level /= str(*names)


def _names(files: list[PurePosixPath], level: PurePosixPath) -> set[str | None]:
    """The folders below a level that hold files; None stands for a file that lies there itself."""
    parts = [path.relative_to(level).parts for path in files]
    return {names[0] if len(names) > 1 else None for names in parts}


def _split_folders(names: set[str | None]) -> dict[str, str]:
    """Of folders the split that each is: by its name, or where all are called so by a word of it (`val_images`)."""
    exact = {name: KEYWORDS[name.lower()] for name in names if name and name.lower() in KEYWORDS}
    by_word = {name: split for name in names if name is not None and (split := _split_in(name)) is not None}
    return exact or (by_word if len(by_word) == len(names) else {})


def _split_in(name: str) -> str | None:
    """The one split that is a word of a name."""
    splits = {KEYWORDS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in KEYWORDS}
    return splits.pop() if len(splits) == 1 else None


def _refuse_classes_called_so(files: list[PurePosixPath], level: PurePosixPath, folders: dict[str, str]) -> None:
    """Refuse folders of classes of which some are called like splits: which they are can't be told.

    Raises:
        ValueError: if folders hold images, and those that are called like a split hold theirs directly, too.
    """
    others = sorted({name for name in _names(files, level) if name is not None and name not in folders})
    below = [path.relative_to(level).parts for path in files]
    if folders and others and all(len(parts) == 2 for parts in below if parts[0] in folders):
        names = " and ".join(repr(name) for name in sorted(folders))
        raise ValueError(
            f"The folder {names} is called like a split and holds images itself, as {', '.join(others[:3])} do: if it "
            "is a class, put all classes into a folder called as their split is, as in validation/cat/1.png"
        )


def _grouped(files: Iterable[tuple[PurePosixPath, str | None]]) -> dict[str, list[PurePosixPath]]:
    """The files of each split, train, validation and test first; those without one are left out."""
    splits: dict[str, list[PurePosixPath]] = {}
    for path, split in files:
        if split is not None:
            splits.setdefault(split, []).append(path)
    first = [name for name in dict.fromkeys(KEYWORDS.values()) if name in splits]
    return {name: splits[name] for name in [*first, *sorted(splits.keys() - {*first})]}


def _split_of_file(path: PurePosixPath) -> str | None:
    """The split that a file's own name says; in `data`, datasets takes all that stands before a shard's number."""
    shard = _SHARD.match(path.name)
    own = shard["split"] if shard else None
    return own if own and str(path.parent) == "data" else _split_in(path.name) or own


def _top(path: PurePosixPath, level: PurePosixPath) -> PurePosixPath:
    """The file or folder directly below a level that a path is in; outside of it, directly below the root."""
    if level in path.parents:
        return level / path.relative_to(level).parts[0]
    return PurePosixPath(path.parts[0])


def _exactly(path: Path) -> str:
    """A pattern of one path: datasets takes brackets in the folder's own path for patterns too."""
    return glob.escape(path.as_posix())
