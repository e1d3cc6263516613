"""Labelled images: open a split of a dataset and find its columns."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.images.split_files import SplitFiles, find_archives, find_splits
from hf_radin.runtime.files import is_dir
from hf_radin.runtime.hub_errors import asking_the_hub, is_of_network
from hf_radin.runtime.text import one_line, refuse_bytes

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

# How many times the size of a sample is read of a stream from the Hub.
POOL = 16

# The name of a dataset that was passed as an object.
OBJECT = "Dataset"


@dataclass(frozen=True)
class DataSource:
    """Which images: all that is needed to open a split.

    Args:
        dataset: a Hub id, a folder, or a `Dataset`, `IterableDataset` or a dictionary of these.
        split: the split's name.
        config_name, revision: of the dataset, as in `load_dataset`.
        image_column, label_column: needed where the dataset has several candidates. Of a multi-label dataset the
            latter may name several columns, with commas between: one a class, with 0 or 1 for each image.
        token: of the Hub.
        labelled: whether its labels are needed; else none are looked for.
        classes: of multi-label checkpoints: if the dataset has no label column, those that are called so are taken.
    """

    dataset: Any
    split: str = "validation"
    config_name: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    labelled: bool = True
    classes: tuple[str, ...] = ()

    def at(self, split: str) -> DataSource:
        """Another split of the same dataset."""
        return replace(self, split=split)


@dataclass(frozen=True)
class Split:
    """An opened split, with its columns known and nothing decoded.

    Args:
        rows: its rows; the image column holds undecoded files.
        name: of the dataset: Hub id or folder; OBJECT if it was passed as an object.
        config_name: of the dataset.
        split: the split's name; an object may have its own.
        revision: the commit of a dataset on the Hub.
        key: identifies the content: commit, file listing or fingerprint.
        image_column, label_column: of its columns; without labels, the latter is empty.
        label_columns: where there is a column for each class, that holds 0 or 1, all of them; else none.
        has_label_lists: whether the label column holds a list of classes for each image.
        class_names: of the label column, if it has any.
        image_mode: that the dataset wants its images in, as in `L` for grey ones; None for that of the file.
        label_dtype: of the label column, or of what is in its lists, as datasets calls it; None if that has no simple
            type.
        token: of the Hub, for files that are fetched one by one.
    """

    rows: Dataset | IterableDataset
    name: str
    config_name: str | None
    split: str
    revision: str | None
    key: str
    image_column: str
    label_column: str
    class_names: tuple[str, ...] | None
    image_mode: str | None = None
    label_dtype: str | None = None
    label_columns: tuple[str, ...] = ()
    has_label_lists: bool = False
    token: str | bool | None = field(default=None, repr=False)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.has_label_lists or bool(self.label_columns)

    def label(self, row: Mapping[str, Any]) -> Any:
        """What a row says of its classes: a value, a list, or the values of several columns in their order."""
        if self.label_columns:
            return [row.get(column) for column in self.label_columns]
        return row.get(self.label_column)

    @property
    def is_here(self) -> bool:
        """Whether its rows are on this machine and can be read again and again: not streamed from the Hub."""
        return hasattr(self.rows, "select") or (self.name != OBJECT and self.revision is None)


def open_split(source: DataSource) -> Split:
    """Open a split and find its columns; nothing is decoded.

    Args:
        source: which split of which dataset.

    Raises:
        ValueError: if there is no such dataset or split, or no column of images or labels. The message lists what
            there is.
    """
    import datasets

    loaded = _load(source)
    rows, split = _pick_split(loaded, source.split)
    rows = rows.with_format(None)  # the user's format or transform is not for the models
    key = loaded.split_key(split) or getattr(rows, "_fingerprint", None)
    if key is None:
        key = uuid.uuid4().hex
        logger.warning("An IterableDataset has no fingerprint: a later run can't reuse what is computed from it.")
    features = rows.features
    if features is None:  # of a generator without declared features: the first row shows them
        features = datasets.Dataset.from_list(list(rows.take(1))).features
    try:
        image_column = _image_column(loaded.name, features, source.image_column)
        label_column = _label_column(loaded.name, features, source) if source.labelled else ""
    except ValueError as error:
        if loaded.folder and find_archives(loaded.folder):  # of a .tar, datasets sees no folders
            raise ValueError(f"{error} Or, if folders in them are the classes: {_advice(loaded.folder)}") from error
        raise
    label = features.get(label_column)
    has_label_lists = (inner := _inner(label)) is not None
    is_flag = source.classes == (label_column,) and not has_label_lists  # the only class has a column called so
    label_columns = tuple(_columns_in(label_column)) if label is None or is_flag else ()
    label = inner or label
    class_names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    if class_names is not None and loaded.files and {*class_names} <= loaded.files.folders:
        raise ValueError(
            f"The images of {loaded.name} lie in the folders of its splits, and in none of a class. Move them into "
            "folders of classes, as in validation/cat/1.png, or write a metadata.csv with file_name and label beside "
            "them."
        )
    dtype = getattr(label, "dtype", None)
    mode = getattr(features[image_column], "mode", None)
    if rows.features:
        rows = rows.cast_column(image_column, datasets.Image(mode=mode, decode=False))
    outside = _outside_hash(rows, image_column, loaded.folder) if loaded.folder else ""
    return Split(
        rows=rows,
        name=loaded.name,
        config_name=source.config_name,
        split=split,
        revision=loaded.revision,
        key=key + _paths_hash(rows, image_column) + outside + (f"+{mode}" if mode else ""),
        image_column=image_column,
        label_column=label_column,
        image_mode=mode,
        label_dtype=dtype if isinstance(dtype, str) else None,
        label_columns=label_columns,
        has_label_lists=has_label_lists,
        class_names=class_names,
        token=source.token,
    )


def count_rows(split: Split) -> int | None:
    """How many rows a split has; None if that is not known without reading them.

    It is known from the footers of local parquet files, from the names of the files in a folder of images, and often
    from the card of a dataset on the Hub. It is not known of an `IterableDataset` object: a `take` or a `filter` of
    the user's changes the number.
    """
    import datasets
    import pyarrow.parquet

    if hasattr(split.rows, "select"):
        return len(split.rows)
    if split.name == OBJECT:
        return None
    if split.revision is None and split.rows.info.builder_name == "parquet":
        files = find_splits(Path(split.name).resolve())
        patterns = files and files.patterns
        with _unused_cache() as cache:
            builder = datasets.load_dataset_builder(
                split.name, name=split.config_name, data_files=patterns, cache_dir=cache
            )
        paths = builder.config.data_files[split.split]
        return sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
    if split.revision is None and split.rows.info.builder_name == "imagefolder":
        return sum(1 for _ in split.rows)  # nothing is decoded, and so no file is opened
    info = (split.rows.info.splits or {}).get(split.split)
    return info.num_examples if info else None


def sample_split(split: Split, count: int, *, seed: int = 0) -> Split:
    """A random sample of a split's rows: the same in every process and every run.

    All rows of a `Dataset` or of local files have the same chance. Of a stream from the Hub only the first rows are
    read, `POOL` times as many as the sample has, from shards in random order: the whole of it may be too much to
    download.
    """
    import datasets
    import numpy as np

    generator = np.random.default_rng(seed)
    if hasattr(split.rows, "select"):
        chosen = np.sort(generator.permutation(len(split.rows))[:count])
        rows = split.rows.select(chosen)
    else:
        stream = split.rows
        if split.revision is not None:
            stream = stream.shuffle(seed=seed, buffer_size=1).take(POOL * count)
        sample: list[tuple[int, dict[str, Any]]] = []
        for number, row in enumerate(stream):  # reservoir sampling: nothing is held but the sample
            place = number if number < count else int(generator.integers(number + 1))
            if place < count:
                sample[place : place + 1] = [(number, row)]
        sample.sort(key=lambda pair: pair[0])
        rows = datasets.Dataset.from_list([row for _, row in sample], features=stream.features)
    # errors name a sample by its position, which is not the one in the split: hence another name
    return replace(split, rows=rows, name=f"{split.name} (a sample of {count})", key=f"{split.key}~{count}~{seed}")


@dataclass(frozen=True)
class _Loaded:
    """A dataset as datasets gives it.

    Args:
        data: the rows of one split, or a mapping of these by the names of the splits.
        name: Hub id or folder; OBJECT if it was passed as an object.
        key: identifies the content; None of an object.
        revision: the commit of a dataset on the Hub.
        folder: that it was read from.
        files: of the folder's splits, if they were not left to datasets to find.
    """

    data: Any
    name: str
    key: str | None = None
    revision: str | None = None
    folder: Path | None = None
    files: SplitFiles | None = None

    def split_key(self, split: str) -> str | None:
        """What identifies the content of a split."""
        return f"{self.key}#{split}" if self.key and isinstance(self.data, Mapping) else self.key


def _load(source: DataSource) -> _Loaded:
    """The dataset of a source, from the Hub, a folder or as it is."""
    if not isinstance(source.dataset, (str, Path)):
        return _Loaded(source.dataset, OBJECT)
    if not str(source.dataset):
        raise ValueError("The name of the dataset is empty; it is a Hub id or a folder.")
    name = f"./{source.dataset}" if str(source.dataset) == OBJECT else str(source.dataset)
    if not is_dir(Path(source.dataset)):
        splits, commit = _load_hub(name, source.config_name, source.revision, source.token)
        return _Loaded(splits, name, f"{name}@{commit}", revision=commit)
    if source.revision is not None:
        raise ValueError(f"The dataset {name} is a folder here, which has no revision {source.revision!r}.")
    folder = Path(source.dataset).resolve()
    listing = listing_hash(folder)
    splits, files = _load_folder(folder, source.config_name, listing)
    key = f"{listing}{files and hashlib.sha256(repr(files.patterns).encode()).hexdigest()[:16]}"
    return _Loaded(splits, name, key, folder=folder, files=files)


def _pick_split(loaded: _Loaded, split: str) -> tuple[Dataset | IterableDataset, str]:
    """The rows of a split, and its name: an object that is one split keeps the name that it gives itself."""
    import datasets

    rows = loaded.data
    if isinstance(rows, Mapping):
        if split not in rows:
            raise ValueError(f"The dataset {loaded.name} has no split {split!r}; it has {', '.join(map(repr, rows))}.")
        rows = rows[split]
    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(f"A dataset is a Hub id, a folder, a Dataset or an IterableDataset, not {type(rows)}.")
    if isinstance(loaded.data, Mapping) or rows.split is None:
        return rows, split
    if loaded.name != OBJECT and split != str(rows.split):
        raise ValueError(f"The dataset {loaded.name} has no split {split!r}; it has {str(rows.split)!r}.")
    return rows, str(rows.split)


@lru_cache(maxsize=2)
def _load_folder(folder: Path, config_name: str | None, listing: str) -> tuple[Any, SplitFiles | None]:
    """All splits of a folder, and their files unless these were left to datasets to find.

    It is cached by the folder's listing: looking through a folder of images takes a second for 1,500 of them.
    """
    import datasets

    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(folder)), None
        files = find_splits(folder)
        patterns = files and files.patterns
        with _unused_cache() as cache:
            splits = datasets.load_dataset(
                str(folder), name=config_name, data_files=patterns, cache_dir=cache, streaming=True
            )
        for split in splits.values():
            if split.info.builder_name != "parquet":  # whose first row may be a gigabyte away from its schema
                next(iter(split.take(1)), None)  # only here does datasets notice archives that it can't read
    except Exception as error:  # an empty folder, several configurations, broken files or files of no known kind
        reason = one_line(error).rstrip(".")
        advice = "Name one with config_name (--dataset-config)." if "Config name" in reason else _advice(folder)
        raise ValueError(f"{folder} can't be read as a dataset: {reason}. {advice}") from error
    for remark in files.remarks if files else ():
        logger.warning("%s: %s", folder, remark)
    return splits, files


def _advice(folder: Path) -> str:
    """What to do about a folder that datasets can't read."""
    if archives := find_archives(folder):
        names = ", ".join(archives[:3]) + (", ..." if len(archives) > 3 else "")
        return f"Unpack its archives ({names}) into folders, as in validation/cat/1.png."
    return (
        "A dataset is a folder of images (as in validation/cat/1.png), of parquet files (as in validation.parquet), "
        "or what save_to_disk wrote."
    )


def _load_hub(name: str, config_name: str | None, revision: str | None, token: str | bool | None) -> tuple[Any, str]:
    """The splits of a dataset on the Hub, streamed, and the commit that they are read from."""
    import datasets
    from huggingface_hub import HfApi

    missing = f"There is no folder {name!r} here and no such dataset on the Hub"
    with asking_the_hub(f"The dataset {name}", revision=revision, missing=missing):
        sha = HfApi().dataset_info(name, revision=revision, token=token).sha
        if not isinstance(sha, str):
            raise ValueError(f"The dataset {name}: the Hub does not say at which commit it is; is HF_ENDPOINT a Hub?")
        try:
            options = {"name": config_name, "revision": sha, "token": token}
            with _unused_cache() as cache:
                splits = datasets.load_dataset(name, **options, cache_dir=cache, streaming=True)
            # else datasets decodes images that lie one by one, and one that is broken ends the stream
            return {split: rows.decode(False) if rows.features else rows for split, rows in splits.items()}, sha
        except Exception as error:  # files of no known kind, several configurations, a script
            if is_of_network(error):
                raise
            raise ValueError(f"The dataset {name} can't be read: {one_line(error)}") from error


@contextmanager
def _unused_cache() -> Iterator[str]:
    """A place for datasets' cache, which holds only a lock where rows are streamed: HF_HOME may be read-only."""
    with tempfile.TemporaryDirectory(prefix="hf_radin-") as folder:
        yield folder


def listing_hash(folder: Path) -> str:
    """A hash of the names, sizes and times of a folder's files: hashing the contents would take as long as a pass.

    Raises:
        ValueError: if a name is no text.
    """
    refuse_bytes(str(folder))
    digest = hashlib.sha256(str(folder).encode())
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen)
        seen.update(os.path.realpath(os.path.join(place, name)) for name in folders)  # links may run in circles
        for name in sorted(files):
            path = os.path.join(place, name)
            refuse_bytes(path)
            digest.update(f"{os.path.relpath(path, folder)}\0{_file_stamp(path)}\0".encode())
    return f"files:{digest.hexdigest()}"


def _file_stamp(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:  # a broken link, or a name that is not a file here
        return "none"
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _paths_hash(rows: Dataset | IterableDataset, image_column: str) -> str:
    """A hash of the sizes and times of image files that a `Dataset` only names: its fingerprint covers just names."""
    if not hasattr(rows, "select"):
        return ""
    stamps: list[str] = []
    for chunk in rows.data.column(image_column).chunks:  # of (bytes, path)
        paths = chunk.filter(chunk.field("bytes").is_null()).field("path")
        stamps += [_file_stamp(str(path)) for path in paths.to_pylist() if path is not None]
    return "+" + hashlib.sha256("\0".join(stamps).encode()).hexdigest() if stamps else ""


def _outside_hash(rows: Dataset | IterableDataset, image_column: str, folder: Path) -> str:
    """A hash of the sizes and times of images that a folder's files name elsewhere, which its listing does not cover.

    If the first row holds its image, or names one in the folder, all rows are taken to do so.
    """

    def outside(row: dict[str, Any]) -> str | None:
        image = row[image_column]
        path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else None
        return path if path and "://" not in path and folder not in Path(path).resolve().parents else None

    if hasattr(rows, "select") or rows.info.builder_name in ("imagefolder", "webdataset"):
        return ""
    if not any(outside(row) for row in rows.take(1)):
        return ""
    stamps = [_file_stamp(path) for row in rows if (path := outside(row))]
    return "+" + hashlib.sha256("\0".join(stamps).encode()).hexdigest()


@lru_cache
def _say_bytes(name: str, column: str) -> None:
    """Say, once of a dataset however often it is opened, that its images are in a column of no type for images."""
    logger.warning("The images of %s are taken from the bytes in its column %r.", name, column)


def _image_column(name: str, features: Mapping[str, Any], named: str | None) -> str:
    """The column of images: the one that is named, else the only one of the type Image.

    If there is none of that type, it is the only struct with image bytes: parquet files written by pandas or polars
    lack the types of datasets (datasets#7765, #4692).
    """
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    structs = [column for column, feature in features.items() if _holds_bytes(feature)]
    if named is None and not images and len(structs) == 1:
        _say_bytes(name, structs[0])
        return structs[0]
    column = images[0] if named is None and len(images) == 1 else named
    if column is not None and column in features and _may_be_images(features[column]):
        return column
    have = f"{len(images)} image columns" if named is None else f"no image column {named!r}"
    raise ValueError(
        f"The dataset {name} has {have}; {_describe(features)}. Name one with image_column (--image-column); it is of "
        "datasets' type Image, of image files' bytes (binary, or a struct of bytes and path) or of their paths "
        "(string); write what else holds images as one of these."
    )


def _may_be_images(feature: Any) -> bool:
    """Whether a column can hold images: of the type Image, or of one that datasets casts to it without guessing."""
    import datasets

    files = ("binary", "large_binary", "string", "large_string")
    is_file = isinstance(feature, datasets.Value) and feature.dtype in files
    return isinstance(feature, datasets.Image) or is_file or _holds_bytes(feature)


def _holds_bytes(feature: Any) -> bool:
    """Whether a column is a struct of files' bytes and perhaps their paths."""
    if not isinstance(feature, dict) or not {"bytes"} <= feature.keys() <= {"bytes", "path"}:
        return False
    return "binary" in str(getattr(feature["bytes"], "dtype", ""))


def _label_column(name: str, features: Mapping[str, Any], source: DataSource) -> str:
    """The column of labels: the one that is named, else the only one called `label` or `labels` or of class labels.

    If there is none, it is the only one of lists of class labels, or those that are called as the classes of
    multi-label checkpoints: several columns have commas between their names.
    """
    import datasets

    named = source.label_column
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    lists = [column for column, feature in features.items() if isinstance(_inner(feature), datasets.ClassLabel)]
    usual = [column for column in ("label", "labels") if column in features]
    candidates = list(dict.fromkeys([*usual, *classes])) or lists
    column = candidates[0] if named is None and len(candidates) == 1 else named
    if column in features:
        return str(column)
    parts = list(source.classes) if named is None and not candidates else _columns_in(named or "")
    if parts and {*parts} <= {*features} and not any("," in part for part in parts):
        return ",".join(parts)
    have = f"no label column {named!r}" if named is not None else "0 columns of class labels"
    if candidates and named is None:  # transformers#28408: the one beside `label` may be about something else
        have = f"{len(candidates)} columns that could be the labels, {' and '.join(map(repr, candidates))}"
    raise ValueError(
        f"The dataset {name} has {have}; {_describe(features)}. Name one with label_column (--label-column)."
    )


def _columns_in(text: str) -> list[str]:
    """The names of columns with commas between; empty for an empty text."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _inner(feature: Any) -> Any:
    """The type of what is in a column's lists; None if it holds no lists."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)


def _describe(features: Mapping[str, Any]) -> str:
    """The columns and their types, for errors."""
    import datasets

    kinds = {
        column: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        for column, feature in features.items()
    }
    return f"its columns are {', '.join(f'{column} ({kind})' for column, kind in kinds.items())}"
