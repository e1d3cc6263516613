"""Rows become what the models take: images are decoded and prepared, labels matched."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.data import Split, label_of
from hf_radin.pixels import Inputs, Pixels, Prepare, find_tables, pack, stack
from hf_radin.stream import Block

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A split, and how its images are made into what the models take.

    Args:
        prepare: from an image to the models' inputs, without the batch dimension.
        to_class: from a value of the label column to the models' class; a KeyError if there is none.
        on_error: what to do with an image that can't be read: `raise`, or `skip` and count it.
        size: samples in a block, to name them by their ids.
    """

    split: Split
    prepare: Prepare
    to_class: Callable[[Any], int]
    on_error: str
    size: int

    @cached_property
    def tables(self) -> dict[str, torch.Tensor]:
        """Those of the inputs that have 256 values, and which."""
        return find_tables(self.prepare)


@dataclass(frozen=True)
class Decoded:
    """A block's labels, the places in it of samples that were left out, and the models' inputs of the others."""

    labels: list[int]
    skipped: list[int]
    inputs: Inputs


def decode_all(
    blocks: Iterator[tuple[Block, Rows | None]], source: Callable[[], Source], workers: int
) -> Iterator[tuple[Block, Decoded | None]]:
    """Decode blocks one after another, by `workers` processes if there are any; nothing of those without rows."""
    if not workers:
        for block, rows in blocks:
            yield block, None if rows is None else decode(source(), block, rows)
        return
    from torch.utils.data import DataLoader

    decoder = _Decoder(source())
    loader = DataLoader(decoder, batch_size=None, sampler=blocks, num_workers=workers, collate_fn=_as_it_is)
    for block, found in loader:
        if isinstance(found, Exception):
            raise found
        yield block, pickle.loads(found)


def _as_it_is(item: Any) -> Any:
    return item


class _Decoder:
    """What a worker does with the rows of a block.

    Its answer is pickled here: tensors would go through shared memory, of which containers have little. An error
    comes back as it is, not as text in another.
    """

    def __init__(self, source: Source) -> None:
        self.source = replace(source, split=replace(source.split, rows=None))  # rows are read by one process
        _ = self.source.tables  # before the workers part

    def __getitem__(self, item: tuple[Block, Rows | None]) -> tuple[Block, Any]:
        block, rows = item
        try:
            return block, pickle.dumps(None if rows is None else decode(self.source, block, rows))
        except Exception as error:
            return block, error


def decode(source: Source, block: Block, rows: Rows) -> Decoded:
    """Decode and prepare the images of some rows.

    Raises:
        ValueError: for an unreadable image (unless skipped) or an unknown label, with the sample's id.
    """
    split, (shard, number) = source.split, block
    labels: list[int] = []
    skipped: list[int] = []
    samples: dict[str, dict[str, torch.Tensor]] = {}
    for place, row in enumerate(rows):
        sample = number * source.size + place
        where = f"{sample} of shard {shard}" if shard else str(sample)
        label = label_of(row.get(split.label_column), where, split, source.to_class)
        try:
            samples[where] = pack(source.prepare(_open(row[split.image_column])), source.tables)
            labels.append(label)
        except Exception as error:  # Pillow raises nearly anything for a broken file
            if not _blames_the_image(error, row[split.image_column]):
                raise
            if source.on_error != "skip":
                raise ValueError(
                    f"Sample {where} of {split.name}, split {split.split!r}"
                    f"{_file_name(row[split.image_column])}: the image can't be read: {error}. Repair it, or "
                    "pass on_error='skip' (--on-error skip) to leave such images out."
                ) from error
            skipped.append(place)
    names = next(iter(samples.values()), ())
    return Decoded(labels, skipped, {name: _stack(name, samples, source) for name in names})


def _stack(name: str, samples: dict[str, dict[str, torch.Tensor]], source: Source) -> torch.Tensor | Pixels:
    """One input of all samples."""
    import torch

    shapes = {tuple(inputs[name].shape): sample for sample, inputs in samples.items()}
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise ValueError(
            f"The image processor makes {name} of different shapes: {one} of sample {first}, {other} of sample "
            f"{second}. Images are read in batches, so it must resize or crop to one size."
        )
    table = source.tables.get(name)
    value = stack([inputs[name] for inputs in samples.values()], table)
    return Pixels(value, table) if table is not None and value.dtype == torch.uint8 else value


def _open(value: Any) -> Image:
    import datasets
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
