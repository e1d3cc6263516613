"""Rows become what the models take: images are decoded and prepared, labels matched."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.images.digests import image_digest, with_bytes
from hf_radin.images.pixels import Inputs, Prepare, find_tables, join, pack
from hf_radin.images.shards import Block, raw_blocks
from hf_radin.images.split import Split

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Rows = list[dict[str, Any]]

# Rows at the beginning of a split that images to try things with are looked for in.
LOOKED = 32

# How many bytes of prepared images are packed together: enough that small images don't cost a call each.
TOGETHER = 8_000_000


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
    """A block of samples.

    Args:
        labels, digests: of each sample that can be used its class, and what tells its image from others.
        skipped: the places of those that were left out.
        inputs: what the models take of the others.
    """

    labels: list[int]
    digests: list[str]
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


def label_of(value: Any, sample: int | str, split: Split, to_class: Callable[[Any], int]) -> int:
    """The index of the models' class that a sample's label means.

    Raises:
        ValueError: if there is none; it names the sample.
    """
    try:
        return to_class(value)
    except (KeyError, TypeError):
        raise ValueError(
            f"Sample {sample} of {split.name}, split {split.split!r}, has the label {repr(value)[:100]}, which the "
            f"models don't know. Is the split labelled, and {split.label_column!r} the right column?"
        ) from None


def decode(source: Source, block: Block, rows: Rows) -> Decoded:
    """Decode and prepare the images of some rows.

    Raises:
        ValueError: for an unreadable image (unless skipped) or an unknown label, with the sample's id.
    """
    split, (shard, number) = source.split, block
    labels: list[int] = []
    digests: list[str] = []
    skipped: list[int] = []
    packed: list[Inputs] = []
    waiting: dict[str, dict[str, torch.Tensor]] = {}  # by sample, until there are enough to be packed together
    first: tuple[str, dict[str, torch.Tensor]] | None = None
    for place, row in enumerate(rows):
        sample = number * source.size + place
        where = f"{sample} of shard {shard}" if shard else str(sample)
        label = label_of(row.get(split.label_column), where, split, source.to_class)
        try:
            image = with_bytes(row[split.image_column])
            waiting[where] = source.prepare(_open(image, split.image_mode))
            digests.append(image_digest(image))
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
            continue
        first = first or (where, waiting[where])
        _check_shapes(first, (where, waiting[where]))
        if len(waiting) * sum(value.nbytes for value in waiting[where].values()) > TOGETHER:
            packed.append(pack(list(waiting.values()), source.tables))
            waiting = {}
    if waiting:
        packed.append(pack(list(waiting.values()), source.tables))
    return Decoded(labels, digests, skipped, join(packed))


def example_images(split: Split, *, least: int = 1) -> dict[int, Image]:
    """Of the first rows up to three images that differ most, by position: the smallest, the largest, the longest.

    Args:
        least: how many at least, where there are so many: images of one size are decoded beyond the first only for it.

    None that can't be read is among them: what becomes of it is decided when its turn comes.

    Raises:
        OSError, ValueError: as `raw_blocks` does.
    """
    first: dict[tuple[int, int], tuple[int, Any]] = {}  # by size; the other rows need not be decoded
    readable: dict[int, Any] = {}  # the first few, by position
    _, rows = next(raw_blocks(split.rows, 0, 1, LOOKED, split.name), (0, ()))
    for position, row in enumerate(rows):
        try:
            image = with_bytes(row[split.image_column])
            first.setdefault(_size(image, split.image_mode), (position, image))
            if len(readable) < least:
                readable[position] = image
        except Exception as error:  # Pillow raises nearly anything for a broken file
            if not _blames_the_image(error, row[split.image_column]):
                raise
    if not first:
        return {}
    by_area = sorted(first, key=lambda size: size[0] * size[1])
    longest = max(first, key=lambda size: max(size) / min(size))
    images: dict[int, Image] = {}
    wanted = dict(first[size] for size in (by_area[0], by_area[-1], longest))
    wanted |= dict([item for item in readable.items() if item[0] not in wanted][: max(0, least - len(wanted))])
    for position, image in wanted.items():
        try:
            images[position] = _open(image, split.image_mode)
        except Exception as error:
            if not _blames_the_image(error, image):
                raise
    return dict(sorted(images.items()))


def _size(image: Any, mode: str | None) -> tuple[int, int]:
    """Width and height of an image, as `with_bytes` gives it; of a file, its head tells."""
    import PIL.Image

    if not isinstance(image, dict):
        return _open(image, mode).size
    with PIL.Image.open(io.BytesIO(image["bytes"])) as opened:
        return opened.size


def prepared_example(split: Split, prepare: Prepare, images: dict[int, Image]) -> dict[str, torch.Tensor] | None:
    """What a model takes for one of these images, without the batch dimension; None if there are none.

    Raises:
        ValueError: if an image can't be prepared, or is prepared in another shape than the first.
    """
    first: tuple[str, dict[str, torch.Tensor]] | None = None
    for position, image in images.items():
        try:
            inputs = prepare(image)
        except Exception as error:  # each processor fails in its own way
            raise ValueError(
                f"Sample {position} of {split.name}, split {split.split!r}: the models' image processor does not take "
                f"an image of {image.width} x {image.height} pixels: {error}"
            ) from error
        first = first or (str(position), inputs)
        _check_shapes(first, (str(position), inputs))
    return first and first[1]


def _check_shapes(one: tuple[str, dict[str, torch.Tensor]], other: tuple[str, dict[str, torch.Tensor]]) -> None:
    """Hold the inputs of two samples to the same shapes."""
    for name, value in one[1].items():
        if value.shape != other[1][name].shape:
            raise ValueError(
                f"The image processor makes {name} of different shapes: {tuple(value.shape)} of sample {one[0]}, "
                f"{tuple(other[1][name].shape)} of sample {other[0]}. Images are read in batches, so it must resize "
                "or crop to one size: name one that does with image_processor=... (--image-processor ID)."
            )


def _open(value: Any, mode: str | None = None) -> Image:
    import datasets
    import PIL.Image

    if isinstance(value, np.ndarray):
        return PIL.Image.fromarray(value)
    return datasets.Image(mode=mode).decode_example(value)


def _blames_the_image(error: Exception, value: Any) -> bool:
    """Not a lack of memory, nor an error of the network where the file has to be fetched first."""
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
    fetched = bool(path) and "://" in str(path)
    return not isinstance(error, MemoryError) and not (fetched and isinstance(error, OSError))


def _file_name(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else None
    return f" ({path})" if path else ""
