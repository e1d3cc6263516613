"""The labelled images: stream a split, prepare each image once, keep the result in blocks on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset, IterableDataset
    from PIL.Image import Image

logger = logging.getLogger(__name__)

# Samples in a block: the unit that one process works on, and that a killed run loses at most.
BLOCK = 256

# The name of a dataset that has none: it came as an object.
OBJECT = "Dataset"

Prepare = Callable[["Image"], "dict[str, torch.Tensor]"]


@dataclass(frozen=True)
class Split:
    """A labelled split, opened, with its columns known and nothing decoded.

    Args:
        rows: its rows; the image column holds undecoded files.
        name: Hub id or folder; OBJECT if it came as an object.
        split: its name; of an object the one that it gives itself, if any.
        key: identifies the content: commit, file listing or fingerprint.
        class_names: of the label column, if it has any.
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

    def describe(self) -> dict[str, Any]:
        """What a reader needs to find the same images again."""
        fields = ("name", "config_name", "split", "revision", "key", "image_column", "label_column")
        return {field: getattr(self, field) for field in fields}


def open_split(
    dataset: Any,
    *,
    split: str,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    token: str | bool | None = None,
) -> Split:
    """Open a split of a Hub dataset, a folder, or a `Dataset`, `IterableDataset` or a dictionary of these.

    Raises:
        ValueError: if there is no such dataset or split, or no column of images or labels; what there is, is named.
    """
    import datasets

    name, key, sha = OBJECT, None, None
    if isinstance(dataset, (str, Path)):
        name = str(dataset)
        if Path(dataset).is_dir():
            dataset, key = _load_folder(Path(dataset), config_name), _listing_hash(Path(dataset))
        else:
            dataset, sha = _load_hub(name, config_name, revision, token)
            key = f"{name}@{sha}"
    elif isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) and dataset.split is not None:
        split = str(dataset.split)
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise ValueError(f"The dataset {name} has no split {split!r}; it has {', '.join(map(repr, dataset))}.")
        dataset = dataset[split]
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(f"A dataset is a Hub id, a folder, a Dataset or an IterableDataset, not {type(dataset)}.")
    if key is None:
        key = getattr(dataset, "_fingerprint", None)
    if key is None:
        key = uuid.uuid4().hex
        logger.warning("An IterableDataset has no fingerprint: a later run can't reuse what is computed from it.")
    features = dataset.features
    if features is None:  # a generator that nobody gave features: its first row has to say
        features = datasets.Dataset.from_list(list(dataset.take(1))).features
    image_column = _image_column(name, features, image_column)
    label_column = _label_column(name, features, label_column)
    label = features[label_column]
    return Split(
        rows=dataset.cast_column(image_column, datasets.Image(decode=False)) if dataset.features else dataset,
        name=name,
        config_name=config_name,
        split=split,
        revision=sha,
        key=key,
        image_column=image_column,
        label_column=label_column,
        class_names=tuple(label.names) if isinstance(label, datasets.ClassLabel) else None,
    )


def _load_folder(folder: Path, config_name: str | None) -> Any:
    import datasets

    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(folder))
    try:
        return datasets.load_dataset(str(folder), name=config_name, streaming=True)
    except (ValueError, OSError) as error:  # an empty folder, several configurations, files of no known kind
        raise ValueError(f"{folder} can't be read as a dataset: {error}") from error


def _load_hub(name: str, config_name: str | None, revision: str | None, token: str | bool | None) -> tuple[Any, str]:
    """The splits of a dataset on the Hub, streamed, and the commit that they are read at."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        sha = str(HfApi().dataset_info(name, revision=revision, token=token).sha)
    except GatedRepoError as error:
        raise ValueError(f"The dataset {name} is gated: ask for access on its page, then pass a token.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"The dataset {name} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"There is no folder {name!r} and no such dataset on the Hub (or it is private: pass a token)."
        ) from error
    try:
        return datasets.load_dataset(name, name=config_name, revision=sha, token=token, streaming=True), sha
    except ValueError as error:
        raise ValueError(f"The dataset {name} can't be read: {error}") from error


def _listing_hash(folder: Path) -> str:
    """Names, sizes and times of a folder's files: reading them all to hash them would cost a pass of its own."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return f"files:{digest.hexdigest()}"


def _image_column(name: str, features: Mapping[str, Any], wanted: str | None) -> str:
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    found = images[0] if wanted is None and len(images) == 1 else wanted
    if found in images:
        return str(found)
    have = f"{len(images)} image columns" if wanted is None else f"no image column {wanted!r}"
    raise ValueError(f"The dataset {name} has {have}; {_listed(features)}. Name one with image_column.")


def _label_column(name: str, features: Mapping[str, Any], wanted: str | None) -> str:
    import datasets

    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [column for column in ("label", "labels") if column in features]
    found = wanted if wanted is not None else classes[0] if len(classes) == 1 else usual[0] if usual else None
    if found in features:
        return str(found)
    have = f"{len(classes)} columns of class labels" if wanted is None else f"no label column {wanted!r}"
    raise ValueError(f"The dataset {name} has {have}; {_listed(features)}. Name one with label_column.")


def _listed(features: Mapping[str, Any]) -> str:
    return f"its columns are {', '.join(f'{column} ({type(kind).__name__})' for column, kind in features.items())}"


def match_labels(split: Split, classes: tuple[str, ...]) -> Callable[[Any], int]:
    """A function from a value of the label column to the index of the models' class, matched by name.

    It raises a KeyError for a value that the models don't know.

    Raises:
        ValueError: if the dataset names classes that the models don't know.
    """
    index = {name: number for number, name in enumerate(classes)}
    placeholders = all(name == f"LABEL_{number}" for name, number in index.items())
    names = split.class_names
    if names is None:
        known: dict[Any, int] = {number: number for number in range(len(classes))}
        return (known | index).__getitem__
    if placeholders and len(names) == len(classes):
        logger.warning("The models call their classes LABEL_0, LABEL_1, ...: matched to the dataset's by position.")
        return {number: number for number in range(len(names))}.__getitem__
    unknown = [name for name in names if name not in index]
    if unknown:
        raise ValueError(
            f"The dataset {split.name} has classes that the models don't know: {', '.join(unknown[:5])}"
            f"{' and more' if len(unknown) > 5 else ''}. The models know {', '.join(classes[:10])}"
            f"{' and more' if len(classes) > 10 else ''}. Rename either, so that equal names mean equal classes."
        )
    return {number: index[name] for number, name in enumerate(names)}.__getitem__


def prepare_split(
    split: Split,
    folder: Path,
    *,
    prepare: Prepare,
    to_class: Callable[[Any], int],
    on_error: str = "raise",
    rank: int = 0,
    world: int = 1,
    on_block: Callable[[int], object] = lambda samples: None,
) -> int:
    """Decode and prepare this process's blocks of the split, and write each to a file of its own in `folder`.

    Block `b` belongs to process `b % world`. Every process goes through the whole stream, so that sample ids, which
    are positions in it, are the same for any number of processes; but each image is decoded by one process only, once.
    A block that is there already is not made again.

    Args:
        prepare: from an image to what the models take.
        to_class: from a value of the label column to the models' class; a KeyError if there is none.
        on_error: what to do with an image that can't be read: `raise`, or `skip` and count it.
        on_block: hears how many samples went by, for a progress bar.

    Returns:
        The number of blocks in the split.

    Raises:
        ValueError: for an unreadable image (unless skipped) or an unknown label, with the sample's id.
    """
    count = 0
    for number, rows in _blocks(split.rows):
        count += 1
        path = block_path(folder, number)
        if number % world == rank and not path.exists():
            samples, skipped = [], []
            for sample, row in enumerate(rows, start=number * BLOCK):
                label = _label(row[split.label_column], sample, split, to_class)
                try:
                    samples.append((sample, label, prepare(_decode(row[split.image_column]))))
                except Exception as error:  # Pillow raises nearly anything for a broken file
                    if on_error != "skip":
                        raise ValueError(
                            f"Sample {sample} of {split.name}, split {split.split!r}"
                            f"{_file_name(row[split.image_column])}: the image can't be read: {error}. Repair it, or "
                            "pass on_error='skip' (--on-error skip) to leave such images out."
                        ) from error
                    skipped.append(sample)
            _write_block(path, samples, skipped)
        on_block(len(rows))
    return count


def _blocks(rows: Dataset | IterableDataset) -> Iterator[tuple[int, Any]]:
    """The numbers of the blocks in order, and their rows; a `Dataset` reads none that are not looked at."""
    if hasattr(rows, "select"):
        for number, start in enumerate(range(0, len(rows), BLOCK)):
            yield number, rows.select(range(start, min(start + BLOCK, len(rows))))
        return
    stream = iter(rows)
    for number in itertools.count():
        block = list(itertools.islice(stream, BLOCK))
        if not block:
            return
        yield number, block


def _label(value: Any, sample: int, split: Split, to_class: Callable[[Any], int]) -> int:
    try:
        return to_class(value)
    except (KeyError, TypeError):
        raise ValueError(
            f"Sample {sample} of {split.name}, split {split.split!r}, has the label {value!r}, which the models don't "
            f"know. Is the split labelled, and {split.label_column!r} the right column?"
        ) from None


def _decode(value: Any) -> Image:
    import datasets
    import numpy as np
    import PIL.Image

    if isinstance(value, np.ndarray):
        return PIL.Image.fromarray(value)
    return datasets.Image().decode_example(value)


def _file_name(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else None
    return f" ({path})" if path else ""


def block_path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:06d}.safetensors"


def _write_block(path: Path, samples: list[tuple[int, int, dict[str, torch.Tensor]]], skipped: list[int]) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "ids": torch.tensor([sample for sample, _, _ in samples], dtype=torch.int64),
        "labels": torch.tensor([label for _, label, _ in samples], dtype=torch.int64),
    }
    for name in samples[0][2] if samples else ():
        shapes = {tuple(inputs[name].shape): sample for sample, _, inputs in samples}
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise ValueError(
                f"The image processor makes {name} of different shapes: {one} of sample {first}, {other} of sample "
                f"{second}. Images are read in batches, so it must resize or crop to one size."
            )
        tensors[f"inputs.{name}"] = torch.stack([inputs[name] for _, _, inputs in samples])
    write_atomically(path, lambda partial: save_file(tensors, partial, {"skipped": json.dumps(skipped)}))


@dataclass(frozen=True)
class Prepared:
    """A split's prepared images, in `blocks` files of one folder, each of up to `size` samples."""

    folder: Path
    blocks: int
    size: int

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor]]:
        """Sample ids `(samples,)`, labels `(samples,)` and the models' inputs `(samples, ...)`, memory-mapped."""
        from safetensors.torch import load_file

        path = block_path(self.folder, number)
        if not path.is_file():
            raise ValueError(f"{path} is gone; run compute_logits again to prepare the images anew.")
        tensors = load_file(path)
        inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
        return tensors["ids"].numpy(), tensors["labels"].numpy(), inputs

    def index(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Of the whole split: sample ids `(samples,)`, labels `(samples,)`, and the ids of those left out."""
        import numpy as np
        from safetensors import safe_open

        ids, labels, skipped = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
        for number in range(self.blocks):
            with safe_open(block_path(self.folder, number), framework="np") as file:
                ids.append(file.get_tensor("ids"))
                labels.append(file.get_tensor("labels"))
                skipped += json.loads(file.metadata()["skipped"])
        return np.concatenate(ids), np.concatenate(labels), skipped
