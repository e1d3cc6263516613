"""A split's images prepared for the models: each is decoded once, by one process, and cached in blocks on disk."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.images.decode import Decoded, Source, decode, decode_all
from hf_radin.images.digests import as_digests
from hf_radin.images.pixels import Inputs, Pixels, count_images
from hf_radin.images.shards import Block, count_shards, raw_blocks, reader, reads
from hf_radin.images.split import Split
from hf_radin.runtime.files import BrokenFileError, Checks, make_folder, open_regular, take_away, write_to_cache
from hf_radin.runtime.schema import MADE_ANEW, known_record, write_sealed

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger(__name__)

# Samples in a block of prepared images and logits: the unit of work of a process, and all that a killed run can lose.
BLOCK = 256

# Splits with fewer samples have blocks of a quarter of that: a thousand images are work for a dozen processes too.
SMALL = 32 * BLOCK

# How much of the disk the pixel cache takes by default: this share of the free space, and no more than this.
SHARE, MOST = 0.5, 100_000_000_000

# How the names of folders beside the pixels begin that hold what models make of them halfway.
ACTIVATIONS = "activations-"

# Room for images that must be cached, however little space is left.
ALL = sys.maxsize

# Pixels are not cached if less than this would be left on the disk: others need it more.
SPARED = 1_000_000_000


@dataclass(frozen=True)
class ShardRecord:
    """What the cache knows of a shard once it was read to its end.

    Args:
        shards: how many the split has.
        blocks: how many this one has.
    """

    shards: int
    blocks: int


@dataclass(frozen=True)
class BlockRecord:
    """What the cache knows of a block once its images were decoded, whether their pixels are cached or not.

    Args:
        labels: the class of each sample that can be used, or its classes, as `match_labels` gives them.
        digests: of their images.
        skipped: the places in the block of samples that were left out.
        sha256: of the file with their pixels; None if there was no room for it.
    """

    labels: tuple[int, ...]
    digests: tuple[str, ...]
    skipped: tuple[int, ...]
    sha256: str | None


@dataclass(frozen=True, eq=False)
class SplitIndex:
    """The samples of a whole split.

    Args:
        ids: positions of the samples in the split, `(samples,)`.
        labels: the class of each, or its classes, as `match_labels` gives them.
        digests: of their images, `(samples,)`.
        skipped: positions of those that were left out.
        counts: how many samples each block has.
    """

    ids: np.ndarray
    labels: list[int]
    digests: np.ndarray
    skipped: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Images:
    """A split's images, in blocks of up to `size` samples; blocks that are not cached are decoded again.

    Args:
        folder: has for each shard a file with its number of blocks, and for each block a record (labels, and which
            samples were left out) and, if there is room, the models' inputs.
        size: samples in a block.
        source: gives the place where the images come from; it is only called if some are not cached.
        on_digests: is given the digests of each block, once it is decoded or read, and may refuse to go on.
        checks: the files that this run knows to be whole.
    """

    folder: Path
    size: int
    source: Callable[[], Source] = field(compare=False, repr=False)
    on_digests: Callable[[Sequence[str]], None] | None = field(default=None, compare=False, repr=False)
    checks: Checks = field(default_factory=Checks, compare=False, repr=False)

    @property
    def blocks(self) -> list[Block]:
        """All blocks in order, once each shard was read to its end."""
        shards = enumerate(self._shards() or [])
        return [(shard, number) for shard, record in shards for number in range(record.blocks)]

    def blocks_of(self, rank: int, world: int) -> list[Block]:
        """The blocks of one of so many processes, in order, once each shard was read to its end."""
        shards = len(self._shards() or [])
        return [block for block in self.blocks if reader(block, shards, world) == rank]

    def is_cached(self) -> bool:
        """Whether all blocks are on disk; they may have been removed to save space."""
        return self._shards() is not None and all(self._is_cached(block) for block in self.blocks)

    def is_cached_by_all(self) -> bool:
        """Whether each block is on the disk of some process. All processes must call this at the same point."""
        from accelerate.utils import gather_object

        cached = [block for block in self.blocks if self.path(block).exists()]
        return {block for blocks in gather_object([cached]) for block in blocks} >= {*self.blocks}

    def example(self) -> dict[str, torch.Tensor] | None:
        """The models' inputs for one image, without the batch dimension; None if no block is cached yet."""
        import torch

        for path in sorted(self.folder.glob("block-*.safetensors")):
            inputs = self.read(_block_of(path))
            if inputs and count_images(inputs):
                return {name: value[:1].to(torch.device("cpu"))[0] for name, value in inputs.items()}
        return None

    def counts(self) -> dict[Block, int]:
        """How many samples each block has, for the blocks that were decoded so far."""
        blocks = sorted(_block_of(path) for path in self.folder.glob("block-*.json"))
        return {block: len(record.labels) for block in blocks if (record := self._record(block))}

    def index(self) -> SplitIndex:
        """The samples of the whole split, once all blocks were decoded.

        Raises:
            FileNotFoundError: if what is known of a block is gone since.
        """
        import numpy as np

        ids: list[int] = []
        labels: list[int] = []
        digests: list[str] = []
        skipped: list[int] = []
        counts: list[int] = []
        for block in self.blocks:
            record = self._record(block)
            if record is None:
                raise FileNotFoundError(f"{self._record_path(block)} is gone, or broken.")
            start, left_out = len(ids) + len(skipped), set(record.skipped)
            places = range(len(record.labels) + len(left_out))
            ids += [start + place for place in places if place not in left_out]
            skipped += [start + place for place in sorted(left_out)]
            labels += record.labels
            digests += record.digests
            counts.append(len(record.labels))
        return SplitIndex(np.array(ids, np.int64), labels, as_digests(digests), skipped, counts)

    def stream(
        self,
        rank: int,
        world: int,
        *,
        wanted: Callable[[Block], bool] = lambda block: True,
        room: int = 0,
        workers: int = 0,
    ) -> Iterator[tuple[Block, Inputs]]:
        """This process's blocks, in order: read if they are cached, else decoded, and cached if there is room.

        Blocks that are not `wanted` are decoded only if that was never done.

        Args:
            rank, world: which of how many processes this is.
            wanted: which blocks to yield.
            room: bytes that this process may add to the pixel cache.
            workers: further processes that decode.

        Raises:
            ValueError: for an unreadable image (unless skipped) or an unknown label, with the sample's id.
        """
        for block, decoded in decode_all(self._raw(rank, world, wanted), self.source, workers):
            if decoded is not None:
                room -= self._write(block, decoded, room)
            if self.on_digests:
                record = self._record(block)
                self.on_digests(record.digests if record else ())
            if decoded is None:
                yield block, self.read(block)
            elif wanted(block):
                yield block, decoded.inputs

    def read(self, block: Block) -> Inputs:
        """The models' inputs of a cached block: `(samples, ...)` by name. A block that is broken is decoded again.

        Raises:
            ValueError: if the split does not have these images any longer.
        """
        try:
            tensors = self._read_pixels(block)
        except (FileNotFoundError, BrokenFileError) as error:
            logger.warning("%s", error)
            tensors = None
        if tensors is None:
            return self._decode_again(block).inputs
        names = [name.removeprefix("inputs.") for name in tensors if name.startswith("inputs.")]
        inputs: Inputs = {name: tensors[f"inputs.{name}"] for name in names}
        for name in names:
            if f"tables.{name}" in tensors:
                inputs[name] = Pixels(tensors[f"inputs.{name}"], tensors[f"tables.{name}"])
        return inputs

    def _read_pixels(self, block: Block) -> dict[str, torch.Tensor] | None:
        """The tensors in a block's file: read and hashed once in a run, memory-mapped after that.

        None without a record that says what was written: if it is broken, that was said.

        Raises:
            FileNotFoundError: if there is none.
            BrokenFileError: if it is not the one that was written.
        """
        from safetensors.torch import load, load_file

        path, sha256 = self.path(block), self._pixels_sha256(block)
        if sha256 is None and self._record(block) is None:
            return None
        if self.checks.knows(path, sha256):
            return load_file(path)
        with open_regular(path, way_out=MADE_ANEW) as file:
            content = file.read()
        if sha256 is None or hashlib.sha256(content).hexdigest() != sha256:
            raise BrokenFileError(path, "it is not what was written, by its SHA-256", MADE_ANEW)
        self.checks.note(path, sha256)
        return load(content)

    def _decode_again(self, block: Block) -> Decoded:
        """Decode a block whose pixels were broken, and write it anew."""
        record, source = self._record(block), self.source()
        split, shards = source.split, len(self._shards() or []) or count_shards(source.split.rows)
        numbered = raw_blocks(split.rows, block[0], shards, self.size, split.name)
        decoded = next((decode(source, block, list(rows)) for number, rows in numbered if number == block[1]), None)
        if decoded is None or (record is not None and record.digests != tuple(decoded.digests)):
            raise ValueError(
                f"{split.name}, split {split.split!r}, has not the images of {self.path(block)} any longer: they have "
                "changed, or come in another order. Remove the folder, and compute the logits again."
            )
        self._write(block, decoded, ALL)
        return decoded

    def room(self, limit: int | None) -> int:
        """Bytes that may be added to the cache, of pixels and of what models make of them (`sharing/activations`).

        Args:
            limit: of the whole cache; None for a share of the disk.
        """
        make_folder(self.folder)
        patterns = ("block-*.safetensors", f"{ACTIVATIONS}*/block-*.safetensors")
        cached = sum(_size(path) for pattern in patterns for path in self.folder.glob(pattern))
        if limit is None:
            limit = min(MOST, int(SHARE * (shutil.disk_usage(self.folder).free + cached)))
        return max(0, limit - cached)

    def path(self, block: Block) -> Path:
        """The file with a block's inputs."""
        return self.folder / f"block-{block[0]:05d}-{block[1]:06d}.safetensors"

    def check_order(self) -> None:
        """Check that all processes and all passes read the rows in the same order.

        Raises:
            ValueError: if a shard was read in two orders; all that was made of the split is removed.
        """
        shards = [path.name[: len("shard-00000")] for path in self.folder.glob("shard-*.json")]
        if len(shards) == len(set(shards)):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        split = self.source().split
        raise ValueError(
            f"Two processes, or two passes, were given {split.name}, split {split.split!r}, in different orders. "
            "Shuffle it with a seed, or not at all."
        )

    def _raw(
        self, rank: int, world: int, wanted: Callable[[Block], bool]
    ) -> Iterator[tuple[Block, list[dict[str, object]] | None]]:
        """The blocks that this process has to see, with their rows or, if they are cached, without."""
        shards = len(self._shards() or []) or count_shards(self.source().split.rows)
        for shard in range(shards):
            if rank not in reads(shard, shards, world):
                continue
            record = self._shard(shard)
            if record is not None:
                blocks = [(shard, number) for number in range(record.blocks)]
                blocks = [block for block in blocks if reader(block, shards, world) == rank]
                needed = [block for block in blocks if wanted(block) or not self._is_known(block)]
                if all(self._is_cached(block) for block in needed):
                    yield from ((block, None) for block in needed)
                    continue
            count, order = 0, hashlib.sha256()
            split = self.source().split
            for number, rows in raw_blocks(split.rows, shard, shards, self.size, split.name):
                block, count = (shard, number), number + 1
                if isinstance(rows, list):
                    order.update(repr([_row_checksum(row, split) for row in rows]).encode())
                if reader(block, shards, world) != rank:
                    continue
                if self._is_cached(block):
                    if wanted(block):
                        yield block, None
                elif wanted(block) or not self._is_known(block):
                    yield block, list(rows)
            path = self.folder / f"shard-{shard:05d}-{order.hexdigest()[:16]}.json"
            write_sealed(path, ShardRecord(shards, count), self._subject(path))

    def _shards(self) -> list[ShardRecord] | None:
        """The records of all shards, if all were read to their ends."""
        first = self._shard(0)
        if first is None:
            return None
        records = [self._shard(shard) for shard in range(first.shards)]
        known = [record for record in records if record is not None]
        return known if len(known) == len(records) else None

    def _shard(self, shard: int) -> ShardRecord | None:
        paths = self.folder.glob(f"shard-{shard:05d}-*.json")
        records = (known_record(ShardRecord, path, self._subject(path)) for path in paths)
        return next((record for record in records if record is not None), None)

    def _is_cached(self, block: Block) -> bool:
        return self._pixels_sha256(block) is not None and self.path(block).exists()

    def _is_known(self, block: Block) -> bool:
        """Whether a block was decoded, be its pixels cached or not."""
        return self._pixels_sha256(block) is not None or self._record(block) is not None

    def _pixels_sha256(self, block: Block) -> str | None:
        """The hash of a block's pixels by its record; None without pixels, or without a record.

        A record is read once in a run: a search looks at each block hundreds of times.
        """

        def recorded() -> str | None:
            record = self._record(block)
            return None if record is None else record.sha256

        return self.checks.as_read(self._record_path(block), recorded)

    def _record(self, block: Block) -> BlockRecord | None:
        """What is known of a block; a record that can't be read is written again."""
        path = self._record_path(block)
        return known_record(BlockRecord, path, self._subject(path))

    def _subject(self, path: Path) -> str:
        """What a record of the split is about: the folder is called by all that decides about its images."""
        return f"{self.folder.name} {path.name}"

    def _record_path(self, block: Block) -> Path:
        return self.path(block).with_suffix(".json")

    def _write(self, block: Block, decoded: Decoded, room: int) -> int:
        """Write a block's record, and its inputs if they fit; returns how many bytes they take that were not taken.

        Inputs that don't fit leave no earlier file behind: no record would speak of it.
        """
        from safetensors.torch import save

        path, record_path = self.path(block), self._record_path(block)
        record = BlockRecord(tuple(decoded.labels), tuple(decoded.digests), tuple(decoded.skipped), None)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in decoded.inputs.items():
            if isinstance(value, Pixels):
                tensors |= {f"inputs.{name}": value.codes, f"tables.{name}": value.table}
            else:
                tensors[f"inputs.{name}"] = value
        size = sum(value.nbytes for value in tensors.values()) - _size(path)
        if size > room or (size > 0 and room < ALL and shutil.disk_usage(self.folder).free < size + SPARED):
            write_sealed(record_path, record, self._subject(record_path))
            take_away(path)
            return 0
        content = save(tensors)
        sha256 = hashlib.sha256(content).hexdigest()
        write_sealed(record_path, replace(record, sha256=sha256), self._subject(record_path))
        write_to_cache(path, partial(Path.write_bytes, data=content))
        self.checks.note(path, sha256)
        return size


def _size(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.lstat().st_size if path.is_file() else 0


def find_home(cache_dir: str | Path | None) -> Path:
    """The folder of banks and prepared images: by default `hf_radin` in HF_HOME.

    Raises:
        ValueError: if it can't be written to.
    """
    from huggingface_hub.constants import HF_HOME

    home = (Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "hf_radin").resolve()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The cache can't be kept in {home}: {error.strerror}. Name another place with cache_dir (--cache-dir)."
        ) from error
    return home


def block_size(samples: int | None) -> int:
    """Samples in a block. It depends on the split alone, so that any number of processes computes the same bank.

    Args:
        samples: in the split; None if that is not known before it is read.
    """
    return BLOCK // 4 if samples is not None and samples < SMALL else BLOCK


def parse_size(size: str | int) -> int | None:
    """The bytes that the pixel cache of a split may take: None for `auto`, 0 for `off`, else a size as in `20GB`.

    Raises:
        ValueError: if it is none of these.
    """
    from accelerate.utils import convert_file_size_to_int

    if size == "auto":
        return None
    if size == "off":
        return 0
    try:
        limit = int(convert_file_size_to_int(size))
    except (ValueError, OverflowError, TypeError, AttributeError):
        limit = -1
    if limit < 0 or isinstance(size, bool):
        raise ValueError(f"pixel_cache={size!r}: it is 'auto', 'off' or a size as in '20GB'.")
    return limit


def _block_of(path: Path) -> Block:
    """The block that a file is about, by its name."""
    _, shard, number = path.stem.split("-")
    return int(shard), int(number)


def _row_checksum(row: dict[str, Any], split: Split) -> tuple[Any, ...]:
    """What distinguishes a row from others: two passes over a stream must not meet different images."""
    image = row.get(split.image_column)
    if isinstance(image, dict):
        content = image.get("bytes")
        return split.label(row), image.get("path"), content and zlib.crc32(content)
    as_bytes = getattr(image, "tobytes", None)
    return split.label(row), zlib.crc32(as_bytes() if as_bytes else repr(image).encode())
