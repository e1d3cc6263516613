"""A split's images as the models take them: each decoded once, by one process, and kept in blocks on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.data import Split, label_of
from hf_radin.files import write_atomically
from hf_radin.processes import on_main_process, progress_bar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from datasets import Dataset, IterableDataset
    from PIL.Image import Image

# Samples in a block of prepared images and logits: the unit of work of a process, and what a killed run loses at most.
BLOCK = 256

Prepare = Callable[["Image"], "dict[str, torch.Tensor]"]


def find_home(cache_dir: str | Path | None) -> Path:
    """Where banks and prepared images are kept: by default `hf_radin` in HF_HOME.

    Raises:
        ValueError: if nothing can be written there.
    """
    from huggingface_hub.constants import HF_HOME

    home = (Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "hf_radin").resolve()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The cache can't be kept in {home}: {error}. Name another place with cache_dir.") from error
    return home


def prepare_split(
    split: Split,
    folder: Path,
    *,
    prepare: Prepare,
    to_class: Callable[[Any], int],
    size: int,
    on_error: str = "raise",
    rank: int = 0,
    world: int = 1,
    on_block: Callable[[int], object] = lambda samples: None,
) -> tuple[int, str]:
    """Decode and prepare this process's blocks of the split, and write each to a file of its own in `folder`.

    Block `b` belongs to process `b % world`. Every process goes through the whole stream, so that sample ids, which
    are positions in it, are the same for any number of processes; but each image is decoded by one process only, once.
    A block that is there already is not made again.

    Args:
        prepare: from an image to what the models take.
        to_class: from a value of the label column to the models' class; a KeyError if there is none.
        size: samples in a block: the unit that one process works on, and that a killed run loses at most.
        on_error: what to do with an image that can't be read: `raise`, or `skip` and count it.
        on_block: hears how many samples went by, for a progress bar.

    Returns:
        The number of blocks in the split, and a hash of the labels of a stream in the order in which they came.

    Raises:
        ValueError: for an unreadable image (unless skipped) or an unknown label, with the sample's id.
    """
    count, order = 0, hashlib.sha256()
    for number, rows in _blocks(split.rows, size):
        count += 1
        if isinstance(rows, list):
            order.update(repr([row.get(split.label_column) for row in rows]).encode())
        path = block_path(folder, number)
        if number % world == rank and not path.exists():
            samples, skipped = [], []
            for sample, row in enumerate(rows, start=number * size):
                label = label_of(row.get(split.label_column), sample, split, to_class)
                try:
                    samples.append((sample, label, prepare(_decode(row[split.image_column]))))
                except Exception as error:  # Pillow raises nearly anything for a broken file
                    if not _blames_the_image(error, row[split.image_column]):
                        raise
                    if on_error != "skip":
                        raise ValueError(
                            f"Sample {sample} of {split.name}, split {split.split!r}"
                            f"{_file_name(row[split.image_column])}: the image can't be read: {error}. Repair it, or "
                            "pass on_error='skip' (--on-error skip) to leave such images out."
                        ) from error
                    skipped.append(sample)
            _write_block(path, samples, skipped)
        on_block(len(rows))
    return count, order.hexdigest()


def prepare_once(
    split: Split,
    folder: Path,
    prepare: Prepare,
    to_class: Callable[[Any], int],
    on_error: str,
    accelerator: Accelerator,
    *,
    size: int = BLOCK,
) -> Prepared:
    """Decode and prepare the split with all processes, unless it is there. Arguments as in `prepare_split`."""
    done = folder / "split.json"
    if not on_main_process(lambda: is_prepared(folder)):
        length = len(split.rows) if hasattr(split.rows, "__len__") else None
        with progress_bar(total=length, desc="Preparing images", unit="image") as bar:
            blocks, order = prepare_split(
                split,
                folder,
                prepare=prepare,
                to_class=to_class,
                size=size,
                on_error=on_error,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                on_block=bar.update,
            )
        if order != on_main_process(lambda: order):
            raise ValueError(
                f"Two processes were given {split.name}, split {split.split!r}, in different orders. Shuffle it "
                "with a seed, or not at all."
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_atomically(done, lambda path: path.write_text(json.dumps({"blocks": blocks, "size": size})))
        accelerator.wait_for_everyone()
    return Prepared(folder, **json.loads(done.read_text()))


def is_prepared(folder: Path) -> bool:
    """Whether all blocks are there; they may have been removed to save space."""
    try:
        blocks = json.loads((folder / "split.json").read_text())["blocks"]
    except (OSError, ValueError, KeyError):
        return False
    return all(block_path(folder, number).exists() for number in range(blocks))


def _blocks(rows: Dataset | IterableDataset, size: int) -> Iterator[tuple[int, Any]]:
    """The numbers of the blocks in order, and their rows; a `Dataset` reads none that are not looked at."""
    if hasattr(rows, "select"):
        for number, start in enumerate(range(0, len(rows), size)):
            yield number, rows.select(range(start, min(start + size, len(rows))))
        return
    stream = iter(rows)
    for number in itertools.count():
        block = list(itertools.islice(stream, size))
        if not block:
            return
        yield number, block


def _decode(value: Any) -> Image:
    import datasets
    import numpy as np
    import PIL.Image

    if isinstance(value, np.ndarray):
        return PIL.Image.fromarray(value)
    return datasets.Image().decode_example(value)


def _blames_the_image(error: Exception, value: Any) -> bool:
    """Not a lack of memory, nor an error of the network where the file has to be fetched first."""
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
    fetched = bool(path) and "://" in str(path)
    return not isinstance(error, MemoryError) and not (fetched and isinstance(error, OSError))


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

        tensors = load_file(self._block(number))
        inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
        return tensors["ids"].numpy(), tensors["labels"].numpy(), inputs

    def _block(self, number: int) -> Path:
        path = block_path(self.folder, number)
        if not path.is_file():
            raise ValueError(f"{path} is gone; run compute_logits again to prepare the images anew.")
        return path

    def index(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Of the whole split: sample ids `(samples,)`, labels `(samples,)`, and the ids of those left out."""
        import numpy as np
        from safetensors import safe_open

        ids, labels, skipped = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
        for number in range(self.blocks):
            with safe_open(self._block(number), framework="np") as file:
                ids.append(file.get_tensor("ids"))
                labels.append(file.get_tensor("labels"))
                skipped += json.loads(file.metadata()["skipped"])
        return np.concatenate(ids), np.concatenate(labels), skipped
