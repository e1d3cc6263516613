"""Make the models' inputs from rows: decode and prepare images, match labels."""

from __future__ import annotations

import contextlib
import io
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from PIL.ExifTags import Base

from hf_radin.images.digests import image_digest, with_bytes
from hf_radin.images.pixels import Inputs, Prepare, find_tables, join, pack
from hf_radin.images.shards import Block, raw_blocks
from hf_radin.images.split import Split
from hf_radin.runtime.text import one_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Rows = list[dict[str, Any]]

# How many rows at the beginning of a split example images are taken from.
EXAMPLE_ROWS = 32

# How many files are fetched at a time, as datasets does it: most of the time of each is waiting.
FETCHES = 32

# Images as narrow as this are left to Pillow: processors might take a side of their pixels for the channels.
_STRIP = 4

# What to do about an image of more pixels than Pillow reads of a file that nobody vouches for.
_MORE_PIXELS = "PIL.Image.MAX_IMAGE_PIXELS (--max-image-pixels) allows more"

# How many bytes of images are prepared and packed together: enough that small images don't cost a call each.
PACKED_BYTES = 8_000_000

# How many images are prepared together at most: few more would save next to nothing.
TOGETHER = 64

# How many images of each size are prepared both alone and together, before others of that size are only together.
COMPARED = 4


@dataclass(frozen=True)
class Source:
    """A split, and how the models' inputs are made from its images.

    Args:
        split: an opened split.
        prepare: from an image to the models' inputs, without the batch dimension. If it also takes a list of images
            of one size, to inputs with that dimension, small images take less time: see `Batches`.
        to_class: from a label (`Split.label`) to the models' class, as `match_labels` gives it; raises a KeyError if
            there is none.
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
        """The inputs that have 256 values in each channel, and which: see `find_tables`."""
        return find_tables(self.prepare)

    @cached_property
    def jpegs(self) -> Jpegs:
        """What reads JPEG files where that takes less time."""
        return Jpegs(self.prepare, torchvision_decoder())

    @cached_property
    def batches(self) -> Batches:
        """What prepares images together where that takes less time."""
        return Batches(self.prepare)


@dataclass(frozen=True)
class Decoded:
    """A block of samples.

    Args:
        labels: the class of each sample that can be used.
        digests: of their images.
        skipped: the places in the block of samples that were left out.
        inputs: the models' inputs.
    """

    labels: list[int]
    digests: list[str]
    skipped: list[int]
    inputs: Inputs


class Jpegs:
    """Decodes JPEG files with torchvision, if it is installed, and hands on the pixels as the processor needs them.

    Pillow and an image for `prepare` take longer; nothing else may differ. So the first file, and made-up ones, are
    read in both ways: unless all pixels and all inputs are the same to the last bit, Pillow reads every file. It also
    decides what can be read: it gets each file that torchvision refuses.

    Args:
        prepare: as of `Source`.
        decoder: from the bytes of a JPEG file, uint8 `(bytes,)`, to RGB pixels `(3, height, width)`; None if there is
            none, so that Pillow reads every file.
    """

    def __init__(self, prepare: Prepare, decoder: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        self.prepare, self.decoder = prepare, decoder
        self.is_same: bool | None = None  # not known before the first file

    def pixels(self, image: Any) -> torch.Tensor | None:
        """What `prepare` takes for an image, as `with_bytes` gives it; None if Pillow has to read it."""
        content = image["bytes"] if isinstance(image, dict) else None
        if self.is_same is False or not content or not content.startswith(b"\xff\xd8\xff"):
            return None
        try:
            pixels = self._pixels(content)
            if pixels is None:
                return None
            if self.is_same is None:
                self.is_same = all(map(self._is_read_alike, [content, *_made_up_files()]))
            return pixels if self.is_same else None
        except Exception:  # if it is the file's fault, Pillow says so
            return None

    def _is_read_alike(self, content: bytes) -> bool:
        """Whether a JPEG file comes out the same as by Pillow."""
        try:
            pixels, image = self._pixels(content), open_image({"bytes": content, "path": None})
            expected, inputs = self.prepare(image), self.prepare(pixels)
        except Exception:  # the processor takes no pixels, or Pillow can't read what torchvision can
            return False
        same_pixels = pixels is not None and np.array_equal(np.asarray(image.convert("RGB")), pixels.permute(1, 2, 0))
        return same_pixels and _are_same_bits(expected, inputs)

    def _pixels(self, content: bytes) -> torch.Tensor | None:
        """The pixels of an upright JPEG file in RGB or grey, as uint8 `(3, height, width)`; None of any other file.

        Raises:
            Exception: whatever Pillow says of the file's beginning, and torchvision of the rest.
        """
        import torch

        if self.decoder is None:
            return None
        with _bounded(), PIL.Image.open(io.BytesIO(content)) as opened:
            plain = opened.format == "JPEG" and opened.mode in ("RGB", "L") and min(opened.size) > _STRIP
            if not plain or opened.getexif().get(Base.Orientation, 1) != 1:
                return None
            warnings.simplefilter("ignore", DeprecationWarning)  # torchvision points to torchcodec
            pixels = self.decoder(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        if pixels.shape != (3, opened.height, opened.width):
            return None
        return torch.from_numpy(pixels.numpy().copy(order="C"))  # by channels, in half the time that torch takes


@dataclass(frozen=True)
class _Opened:
    """An image that was decoded, or what is wrong with it.

    Args:
        image: as `with_bytes` gives it; as it is in its row if its file can't be read.
        digest: of the image; empty if there is an error.
        decoded: what the image processor is given, or an error.
    """

    image: Any
    digest: str
    decoded: Image | torch.Tensor | Exception

    @cached_property
    def size(self) -> tuple[str, int, int] | None:
        """Width and height, and whether it is an image or its pixels; None if it can only be prepared alone."""
        import torch

        if isinstance(self.decoded, PIL.Image.Image):
            return ("image", *self.decoded.size)
        if isinstance(self.decoded, torch.Tensor) and self.decoded.ndim == 3:
            return ("pixels", self.decoded.shape[2], self.decoded.shape[1])
        return None

    def inputs(self, prepare: Prepare) -> dict[str, torch.Tensor]:
        """The models' inputs for the image, prepared alone.

        Raises:
            Exception: whatever is wrong with the image.
        """
        if isinstance(self.decoded, Exception):
            raise self.decoded
        if isinstance(self.decoded, PIL.Image.Image):
            return prepare(self.decoded)
        with contextlib.suppress(Exception):  # if it is the file's fault, Pillow says so
            return prepare(self.decoded)
        return prepare(open_image(self.image))


class Batches:
    """Prepares images of one size in one call of the image processor: a call costs more than a small image does.

    What is made of an image may not depend on the others. So the first images of each size, and a made-up one that is
    unlike them, are prepared both alone and together: unless all inputs are the same to the last bit, each image is
    prepared alone from then on.

    Args:
        prepare: as of `Source`.
    """

    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare
        self.is_same: bool | None = None  # not known before the first comparison
        self.compared: set[tuple[str, int, int] | None] = set()  # sizes
        self.nbytes: int | None = None  # of a prepared image; not known before the first

    def inputs(self, images: Iterable[_Opened]) -> Iterator[tuple[_Opened, dict[str, torch.Tensor] | Exception]]:
        """Images, in order, each with the models' inputs for it, or with what is wrong with it."""
        run: list[_Opened] = []
        for image in images:
            if run and image.size != run[0].size:
                yield from zip(run, self._of_run(run), strict=True)
                run = []
            run.append(image)
            if len(run) >= self._limit(image):
                yield from zip(run, self._of_run(run), strict=True)
                run = []
        if run:
            yield from zip(run, self._of_run(run), strict=True)

    def _limit(self, image: _Opened) -> int:
        """How many images of the size of this one are prepared together."""
        if image.size is None or self.is_same is False or self.nbytes is None:
            return 1
        _, width, height = image.size
        most = TOGETHER if image.size in self.compared else COMPARED
        return min(most, PACKED_BYTES // max(self.nbytes, 4 * width * height))  # Pillow takes four bytes a pixel

    def _of_run(self, run: list[_Opened]) -> list[dict[str, torch.Tensor] | Exception]:
        """The models' inputs for images of one size, or what is wrong with them."""
        size, images = run[0].size, [image.decoded for image in run]
        if len(run) > 1 and size in self.compared:
            with contextlib.suppress(Exception):  # of which image it is shows as each is prepared alone
                return [*self._together(images)]
        inputs = [self._alone(image) for image in run]
        prepared = [each for each in inputs if not isinstance(each, Exception)]
        if len(prepared) == COMPARED and size not in self.compared:
            self.is_same = self._is_same(images, prepared)
            self.compared.add(size)
        return inputs

    def _alone(self, image: _Opened) -> dict[str, torch.Tensor] | Exception:
        try:
            inputs = image.inputs(self.prepare)
        except Exception as error:  # Pillow and processors raise nearly anything
            return error
        self.nbytes = sum(value.nbytes for value in inputs.values())
        return inputs

    def _together(self, images: list[Any]) -> list[dict[str, torch.Tensor]]:
        """The models' inputs for images of one size, by one call.

        Raises:
            Exception: whatever `prepare` raises, for one of the images or since it takes no lists.
        """
        inputs = self.prepare(images)
        if any(len(value) != len(images) for value in inputs.values()):
            raise ValueError("the image processor makes no inputs of one image each")
        return [{name: value[place] for name, value in inputs.items()} for place in range(len(images))]

    def _is_same(self, images: list[Any], alone: list[dict[str, torch.Tensor]]) -> bool:
        """Whether images come out together as they did alone."""
        try:
            made_up = _made_up_like(images[0])
            together = self._together([*images, made_up])
            return all(map(_are_same_bits, together, [*alone, self.prepare(made_up)]))
        except Exception:  # the processor takes no lists
            return False


def torchvision_decoder() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes RGB pixels of the bytes of a JPEG file; None without a torchvision that does."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except Exception:  # it isn't there, or is one for another torch
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB)


def decode_all(
    blocks: Iterator[tuple[Block, Rows | None]], source: Callable[[], Source], workers: int
) -> Iterator[tuple[Block, Decoded | None]]:
    """Decode blocks in order, in `workers` processes if there are any; None for a block without rows."""
    if not workers:
        for block, rows in blocks:
            yield block, None if rows is None else decode(source(), block, rows)
        return
    from torch.utils.data import DataLoader

    decoder = _Decoder(source())
    loader = DataLoader(decoder, batch_size=None, sampler=blocks, num_workers=workers, collate_fn=_unchanged)
    for block, result in loader:
        if isinstance(result, Exception):
            raise result
        yield block, pickle.loads(result)


def label_of(value: Any, sample: int | str, split: Split, to_class: Callable[[Any], int]) -> int:
    """The index of the models' class that a sample's label stands for; of a multi-label split, those of all its
    classes, as `match_labels` gives them.

    Raises:
        ValueError: if there is none, naming the sample.
    """
    try:
        return to_class(value)
    except (KeyError, TypeError):
        raise ValueError(
            f"Sample {sample} of {split.name}, split {split.split!r}, has the label {repr(value)[:100]}, which the "
            f"models don't know. Is the split labelled, and {split.label_column!r} the right column?"
        ) from None


def decode(source: Source, block: Block, rows: Rows) -> Decoded:
    """Decode and prepare the images of a block's rows.

    Raises:
        ValueError: for an unreadable image (unless skipped) or an unknown label, with the sample's id.
    """
    split, (shard, number) = source.split, block
    labels: list[int] = []
    digests: list[str] = []
    skipped: list[int] = []
    packed: list[Inputs] = []
    waiting: list[dict[str, torch.Tensor]] = []  # prepared, until there are enough to be packed together
    first: _Prepared | None = None
    images = source.batches.inputs(_open_all(rows, source))
    for place, (row, (image, inputs)) in enumerate(zip(rows, images, strict=True)):
        position = number * source.size + place
        sample = f"{position} of shard {shard}" if shard else str(position)
        label = label_of(split.label(row), sample, split, source.to_class)
        if isinstance(inputs, Exception):
            if not _is_about_the_image(inputs, image.image):
                raise inputs
            if source.on_error != "skip":
                raise _unreadable(row[split.image_column], sample, split, inputs) from inputs
            skipped.append(place)
            continue
        digests.append(image.digest)
        labels.append(label)
        waiting.append(inputs)
        first = first or _Prepared(sample, inputs)
        _check_shapes(first, _Prepared(sample, inputs))
        if len(waiting) * sum(value.nbytes for value in inputs.values()) > PACKED_BYTES:
            packed.append(pack(waiting, source.tables))
            waiting = []
    if waiting:
        packed.append(pack(waiting, source.tables))
    return Decoded(labels, digests, skipped, join(packed))


def time_decoding(source: Source, images: int) -> tuple[float, Inputs]:
    """Seconds to decode and prepare an image of a split, and its first `images` prepared; none if none can be read."""
    rows = list(source.split.rows.take(images))
    # The first call finds the tables, loads what reads such files, and compares images alone and together.
    decode(source, (0, 0), rows[: 1 + COMPARED])
    begun = time.perf_counter()
    inputs = decode(source, (0, 0), rows).inputs
    return (time.perf_counter() - begun) / max(1, len(rows)), inputs


def _open_all(rows: Rows, source: Source) -> Iterator[_Opened]:
    """The images of rows, decoded: not all at once, but as they are asked for."""
    split = source.split
    for row, image in zip(rows, _read_all(rows, split), strict=True):
        if isinstance(image, Exception):
            yield _Opened(row[split.image_column], "", image)
            continue
        try:
            pixels = None if split.image_mode else source.jpegs.pixels(image)
            decoded = open_image(image, split.image_mode) if pixels is None else pixels
            opened = _Opened(image, image_digest(image), decoded)
        except Exception as error:  # Pillow raises nearly anything for a broken file
            opened = _Opened(image, "", error)
        yield opened


def _read_all(rows: Rows, split: Split) -> Iterator[Any]:
    """The images of a split's rows, with the bytes of their files; an error in the place of one that can't be read.

    Files that are not on this machine are fetched side by side.
    """

    def read(row: dict[str, Any]) -> Any:
        try:
            return with_bytes(row[split.image_column], split.token)
        except Exception as error:
            return error

    if not any(_is_elsewhere(row[split.image_column]) for row in rows):
        yield from map(read, rows)
        return
    with ThreadPoolExecutor(FETCHES) as pool:
        yield from pool.map(read, rows)


def _is_elsewhere(image: Any) -> bool:
    """Whether the file of an image has to be fetched."""
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
    return isinstance(path, str) and "://" in path


def example_images(split: Split, *, least: int = 1) -> dict[int, Image]:
    """Up to three images of the first rows that differ most, by position: the smallest, the largest, the longest.

    Images that can't be read are not among them: what to do with these is decided when they are reached.

    Args:
        least: return at least so many if there are as many, though they be of one size.

    Raises:
        OSError, ValueError: as `raw_blocks` does.
    """
    by_size: dict[tuple[int, int], tuple[int, Any]] = {}  # the first of each size; no other needs to be decoded
    readable: dict[int, Any] = {}  # the first few, by position
    _, rows = next(raw_blocks(split.rows, 0, 1, EXAMPLE_ROWS, split.name), (0, ()))
    rows = list(rows)
    for position, (row, image) in enumerate(zip(rows, _read_all(rows, split), strict=True)):
        try:
            if isinstance(image, Exception):
                raise image
            by_size.setdefault(_size(image, split.image_mode), (position, image))
            if len(readable) < least:
                readable[position] = image
        except Exception as error:  # Pillow raises nearly anything for a broken file
            if not _is_about_the_image(error, row[split.image_column] if error is image else image):
                raise
    if not by_size:
        return {}
    by_area = sorted(by_size, key=lambda size: size[0] * size[1])
    longest = max(by_size, key=lambda size: max(size) / min(size))
    chosen = dict(by_size[size] for size in (by_area[0], by_area[-1], longest))
    for position, image in readable.items():
        if len(chosen) < least:
            chosen.setdefault(position, image)
    images: dict[int, Image] = {}
    for position, image in chosen.items():
        try:
            images[position] = open_image(image, split.image_mode)
        except Exception as error:
            if not _is_about_the_image(error, image):
                raise
    return dict(sorted(images.items()))


def prepared_example(split: Split, prepare: Prepare, images: dict[int, Image]) -> dict[str, torch.Tensor] | None:
    """The model's inputs for the first of some images, without the batch dimension; None if there are none.

    Args:
        images: by position, as from `example_images`; all are prepared, to see that their shapes agree.

    Raises:
        ValueError: if an image can't be prepared, or is prepared in another shape than the first.
    """
    first: _Prepared | None = None
    for position, image in images.items():
        try:
            inputs = prepare(image)
        except Exception as error:  # processors raise all kinds of errors
            raise ValueError(
                f"Sample {position} of {split.name}, split {split.split!r}: the models' image processor can't prepare "
                f"an image of {image.width} x {image.height} pixels: {one_line(error)}"
            ) from error
        first = first or _Prepared(str(position), inputs)
        _check_shapes(first, _Prepared(str(position), inputs))
    return first.inputs if first else None


def open_image(image: Any, mode: str | None = None) -> Image:
    """Decode an image.

    Args:
        image: as `with_bytes` gives it.
        mode: to convert it to, as in `L`; None for that of the file.

    Raises:
        ValueError: if its file says that it has more pixels than Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    import datasets

    with _bounded():
        return datasets.Image(mode=mode).decode_example(image)


@cache
def _made_up_files() -> list[bytes]:
    """JPEG files of many kinds: sizes and shapes, qualities, samplings of the colours, progressive, in grey."""
    generator, kinds = np.random.default_rng(0), [(37, 50), (64, 49), (121, 85), (300, 260)]
    options: list[dict[str, Any]] = [{"quality": quality} for quality in (30, 75, 95)]
    options += [{"subsampling": number} for number in (0, 1, 2)] + [{"progressive": True}, {"optimize": True}]
    files = []
    for number, option in enumerate([*options, {}]):
        rough = PIL.Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        image, file = rough.resize(kinds[number % len(kinds)]), io.BytesIO()
        (image if option else image.convert("L")).save(file, "JPEG", **option)
        files.append(file.getvalue())
    return files


def _made_up_like(image: Any) -> Any:
    """An image of noise of the size of another, or its pixels if that is pixels `(3, height, width)`."""
    import torch

    is_image = isinstance(image, PIL.Image.Image)
    width, height = image.size if is_image else (image.shape[2], image.shape[1])
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise) if is_image else torch.from_numpy(noise).permute(2, 0, 1).contiguous()


def _are_same_bits(inputs: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether the models' inputs for two images are the same to the last bit."""
    import torch

    return inputs.keys() == others.keys() and all(
        value.dtype == others[name].dtype
        and value.shape == others[name].shape
        and torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (value, others[name])))
        for name, value in inputs.items()
    )


@dataclass(frozen=True)
class _Prepared:
    """The models' inputs for a sample, and its name in errors."""

    sample: str
    inputs: dict[str, torch.Tensor]


class _Decoder:
    """Decodes the rows of a block in a worker process.

    The outcome is pickled here: tensors would go through shared memory, of which containers have little. An error is
    returned as it is, where a DataLoader would raise another with its text.
    """

    def __init__(self, source: Source) -> None:
        self.source = replace(source, split=replace(source.split, rows=None))  # rows are read by one process
        self.max_image_pixels = PIL.Image.MAX_IMAGE_PIXELS
        _ = self.source.tables  # computed once, before the workers start

    def __getitem__(self, item: tuple[Block, Rows | None]) -> tuple[Block, Any]:
        block, rows = item
        PIL.Image.MAX_IMAGE_PIXELS = self.max_image_pixels  # a worker that is no fork has Pillow's own
        try:
            return block, pickle.dumps(None if rows is None else decode(self.source, block, rows))
        except Exception as error:
            return block, error


def _unchanged(item: Any) -> Any:
    return item


def _size(image: Any, mode: str | None) -> tuple[int, int]:
    """Width and height of an image, as `with_bytes` gives it; for a file, from its header.

    Raises:
        ValueError: as `open_image` does.
    """
    if not isinstance(image, dict):
        return open_image(image, mode).size
    with _bounded(), PIL.Image.open(io.BytesIO(image["bytes"])) as opened:
        return opened.size


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Refuse, with a ValueError, what Pillow warns of: more pixels than its limit. Pillow refuses twice as many."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            yield
        except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"{error} {_MORE_PIXELS}") from error


def _check_shapes(first: _Prepared, other: _Prepared) -> None:
    """Check that the inputs of two samples have the same shapes."""
    for name, value in first.inputs.items():
        shape = other.inputs[name].shape
        if value.shape != shape:
            raise ValueError(
                f"The image processor makes {name} of different shapes: {tuple(value.shape)} of sample "
                f"{first.sample}, {tuple(shape)} of sample {other.sample}. Images are read in batches, so it must "
                "resize or crop to one size: name one that does with image_processor=... (--image-processor ID)."
            )


def _unreadable(value: Any, sample: str, split: Split, error: Exception) -> ValueError:
    """What is said of an image that can't be read. Its `value` is as it is in its row."""
    return ValueError(
        f"Sample {sample} of {split.name}, split {split.split!r}{_file_name(value)}: the image can't be read: "
        f"{one_line(error)}. Repair it or take it out of the dataset; or leave such images out where logits are "
        "computed, with on_error='skip' (--on-error skip of hf-radin soup and logits)."
    )


def _is_about_the_image(error: Exception, value: Any) -> bool:
    """Not a lack of memory, nor an error of the network if the file has to be fetched first."""
    return not isinstance(error, MemoryError) and not (_is_elsewhere(value) and isinstance(error, OSError))


def _file_name(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else None
    return f" ({path})" if path else ""
