"""Which files of a local folder belong to which split.

datasets looks for the names of splits anywhere in a path, so that a class folder called `test` moves images between
splits (datasets#7201, #5650). Here only the first folder level counts, or else a file's own name.
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

from hf_radin.runtime.files import card_metadata, read_text

logger = logging.getLogger(__name__)

# Names of splits, and the split that datasets takes each for.
KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# Files that hold many images each, as datasets reads them; archives; and files with labels of images beside them.
TABLES = {".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".tar", ".zip", ".h5", ".hdf5"}
ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}

# Files that describe a dataset and hold no data.
ABOUT = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5,}\.")

# How many of the files that are left out a warning names.
NAMED = 5


@dataclass(frozen=True)
class SplitFiles:
    """The files of each split of a folder.

    Args:
        patterns: by the name of the split, as `load_dataset` takes `data_files`.
        remarks: what the user should know about them, in sentences.
    """

    patterns: dict[str, list[str]]
    remarks: tuple[str, ...] = ()

    @property
    def folders(self) -> set[str]:
        """The names of folders that belong to a split as a whole."""
        patterns = (pattern for patterns in self.patterns.values() for pattern in patterns)
        return {PurePosixPath(pattern).parent.name for pattern in patterns if pattern.endswith("/**")}


def find_splits(folder: Path) -> SplitFiles | None:
    """The files of each split of a folder.

    Args:
        folder: an absolute path.

    Returns:
        None if it is left to datasets: the folder's README.md lists its files, or there is nothing to be read.
    """
    if _card_lists_files(folder):
        return None
    kinds = {path: _kind(path) for path in _walk(folder) if path.name not in ABOUT}
    counts = Counter(kind for kind in kinds.values() if kind not in (None, "metadata"))
    if not counts:
        return None
    # datasets reads files of one kind only
    main_kind = max(counts, key=lambda kind: (counts[kind], kind == ".parquet"))
    files = [path for path, kind in kinds.items() if kind == main_kind]
    level = _first_level(files)
    folders = _split_folders(_names(files, level))
    if main_kind == "image":
        _refuse_class_or_split(files, level, folders)
    if folders:
        splits = _group_by_split((path, folders.get(path.relative_to(level).parts[0])) for path in files)
    elif main_kind == "image":  # the names of images say nothing of splits, and other files are about these images
        return SplitFiles({"train": [f"{_escaped(folder)}/**"]})
    else:
        splits = _group_by_split((path, _split_of_file(path)) for path in files) or {"train": files}
    used = {path for paths in splits.values() for path in paths}
    split_folders = {level / name for name in folders} if main_kind == "image" else set()
    left_out = [path for path, kind in kinds.items() if kind and path not in used]
    left_out = [path for path in left_out if not split_folders & {*path.parents}]
    patterns = {
        # one pattern for each folder: there may be a hundred thousand images in it
        name: sorted({f"{_escaped(folder / _top(path, level))}/**" for path in paths})
        if main_kind == "image"
        else [_escaped(folder / path) for path in paths]
        for name, paths in splits.items()
    }
    names = sorted({str(_top(path, level)) for path in left_out})
    return SplitFiles(patterns, (*_merged_folders(folders), *_left_out(names)))


def find_archives(folder: Path) -> list[str]:
    """The archives in a folder."""
    return [str(path) for path in _walk(folder) if path.suffix.lower() in ARCHIVES]


def _merged_folders(folders: dict[str, str]) -> list[str]:
    """A remark for each split that several folders make together."""
    names = {split: [name for name in folders if folders[name] == split] for split in folders.values()}
    return [
        f"The folders {' and '.join(sorted(names[split]))} are both taken as the split {split!r}."
        for split in names
        if len(names[split]) > 1
    ]


def _left_out(names: list[str]) -> list[str]:
    """A remark about files and folders that belong to no split, if there are any."""
    if not names:
        return []
    others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    text = f"{', '.join(names[:NAMED])}{others}: in no folder of a split, and without one in the name; left out."
    if notes := METADATA.intersection(names):
        text += f" Of {', '.join(sorted(notes))}, put one into the folder of each split, which it is then read from."
    return [text]


def _card_lists_files(folder: Path) -> bool:
    """Whether a dataset's card lists the files of its splits."""
    if (folder / ".huggingface.yaml").is_file():
        return True
    card = folder / "README.md"
    return card.is_file() and "configs" in card_metadata(read_text(card))


def _walk(folder: Path) -> list[PurePosixPath]:
    """All files below a folder except hidden ones, relative to it; links are followed, and may run in circles."""
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
    """The kind of a file: `image`, `metadata` of images, the suffix of a table, or None if it holds no data."""
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
    """The folder whose subfolders may be splits: the deepest that holds all files and is not in a split itself."""
    level = PurePosixPath()
    while True:
        names = _names(files, level)
        if len(names) != 1 or None in names or any(name and name.lower() in KEYWORDS for name in names):
            return level
        level /= str(*names)


def _names(files: list[PurePosixPath], level: PurePosixPath) -> set[str | None]:
    """The folders directly below a level that hold files; None stands for files directly in it."""
    parts = [path.relative_to(level).parts for path in files]
    return {names[0] if len(names) > 1 else None for names in parts}


def _split_folders(names: set[str | None]) -> dict[str, str]:
    """The split of each folder: by its whole name or, if all have one, by a word in its name (`val_images`)."""
    exact = {name: KEYWORDS[name.lower()] for name in names if name and name.lower() in KEYWORDS}
    by_word = {name: split for name in names if name is not None and (split := _split_in(name)) is not None}
    return exact or (by_word if len(by_word) == len(names) else {})


def _split_in(name: str) -> str | None:
    """The split that a name contains as a word; None if there is none, or several."""
    splits = {KEYWORDS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in KEYWORDS}
    return splits.pop() if len(splits) == 1 else None


def _refuse_class_or_split(files: list[PurePosixPath], level: PurePosixPath, folders: dict[str, str]) -> None:
    """Refuse folders that may be classes or splits: they are named like splits, and lie among folders of classes.

    Args:
        folders: those that are named like splits.

    Raises:
        ValueError: if these hold images directly, as folders with other names do.
    """
    others = sorted({name for name in _names(files, level) if name is not None and name not in folders})
    below = [path.relative_to(level).parts for path in files]
    if folders and others and all(len(parts) == 2 for parts in below if parts[0] in folders):
        names = " and ".join(repr(name) for name in sorted(folders))
        raise ValueError(
            f"The folder {names} is called like a split and holds images itself, as {', '.join(others[:3])} do: if it "
            "is a class, put all classes into a folder called as their split is, as in validation/cat/1.png"
        )


def _group_by_split(files: Iterable[tuple[PurePosixPath, str | None]]) -> dict[str, list[PurePosixPath]]:
    """The files of each split, with train, validation and test first; files without a split are left out."""
    splits: dict[str, list[PurePosixPath]] = {}
    for path, split in files:
        if split is not None:
            splits.setdefault(split, []).append(path)
    first = [name for name in dict.fromkeys(KEYWORDS.values()) if name in splits]
    return {name: splits[name] for name in [*first, *sorted(splits.keys() - {*first})]}


def _split_of_file(path: PurePosixPath) -> str | None:
    """The split in a file's own name. In the folder `data`, datasets takes all that precedes a shard's number."""
    shard = _SHARD.match(path.name)
    prefix = shard["split"] if shard else None
    return prefix if prefix and str(path.parent) == "data" else _split_in(path.name) or prefix


def _top(path: PurePosixPath, level: PurePosixPath) -> PurePosixPath:
    """The file or folder directly below a level that contains a path; outside the level, directly below the root."""
    if level in path.parents:
        return level / path.relative_to(level).parts[0]
    return PurePosixPath(path.parts[0])


def _escaped(path: Path) -> str:
    """A pattern that matches one path: datasets takes brackets in it for patterns otherwise."""
    return glob.escape(path.as_posix())
