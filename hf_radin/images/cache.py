"""A split's images as the models take them: each decoded once, by one process, and kept in blocks on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.images.decode import Decoded, Source, decode_all
from hf_radin.images.digests import as_digests
from hf_radin.images.pixels import Inputs, Pixels
from hf_radin.images.shards import Block, count_shards, raw_blocks, reader, reads
from hf_radin.images.split import Split
from hf_radin.runtime.files import write_atomically, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger(__name__)

# Samples in a block of prepared images and logits: the unit of work of a process, and what a killed run loses at most.
BLOCK = 256

# Of a split with fewer samples, blocks are a quarter of that: a thousand images are work for a dozen processes too.
SMALL = 32 * BLOCK

# Of the disk, what the pixel cache takes at most if it may choose: this share of what is free, and no more than this.
SHARE, MOST = 0.5, 100_000_000_000

# Room for images that must be kept, whatever the disk has left.
ALL = sys.maxsize

# Where less than this is left on the disk, pixels are not kept: others need it more.
SPARED = 1_000_000_000


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


def block_size(samples: int | None) -> int:
    """Samples in a block, by the split alone: with any number of processes its bank is the same.

    Args:
        samples: in the split; None if that is not known before it is read.
    """
    return BLOCK // 4 if samples is not None and samples < SMALL else BLOCK


def parse_size(size: str | int) -> int | None:
    """Bytes that the pixel cache of a split may take: `off` is none, `auto` is None, else as in `20GB`.

    Raises:
        ValueError: if it is none of these.
    """
    from accelerate.utils import convert_file_size_to_int

    if size == "auto":
        return None
    if size == "off":
        return 0
    try:
        found = int(convert_file_size_to_int(size))
    except (ValueError, OverflowError, TypeError, AttributeError):
        found = -1
    if found < 0 or isinstance(size, bool):
        raise ValueError(f"pixel_cache={size!r}: it is 'auto', 'off' or a size as in '20GB'.")
    return found


@dataclass(frozen=True)
class Images:
    """A split's images, in blocks of up to `size` samples; blocks that are not kept are decoded anew.

    Args:
        folder: has for each shard a file that says how many blocks there are, and for each block an index (labels,
            and which samples were left out) and, while there is room, the models' inputs.
        size: samples in a block.
        source: where the images come from; it is only asked if some are not kept.
        on_digests: hears those of each block that goes by, once it is indexed, and may refuse to go on.
    """

    folder: Path
    size: int
    source: Callable[[], Source] = field(compare=False, repr=False)
    on_digests: Callable[[list[str]], None] | None = field(default=None, compare=False, repr=False)

    def is_indexed(self) -> bool:
        """Whether all blocks were decoded once."""
        return self._shards() is not None and all(self._is_indexed(block) for block in self.blocks)

    def is_kept(self) -> bool:
        """Whether all blocks are on disk; they may have been removed to save space."""
        return self.is_indexed() and all(self.path(block).exists() for block in self.blocks)

    def is_kept_by_all(self) -> bool:
        """Whether each block is on the disk of some process. All of them ask at the same point."""
        from accelerate.utils import gather_object

        kept = [block for block in self.blocks if self.path(block).exists()]
        return {block for one in gather_object([kept]) for block in one} >= {*self.blocks}

    def example(self) -> dict[str, torch.Tensor] | None:
        """What the models take for one of the images, without the batch dimension; None if no block is kept yet."""
        import torch

        for path in sorted(self.folder.glob("block-*.safetensors")):
            _, shard, number = path.stem.split("-")
            inputs = self.read((int(shard), int(number)))
            if inputs and len(next(iter(inputs.values()))):
                return {name: value[:1].to(torch.device("cpu"))[0] for name, value in inputs.items()}
        return None

    @property
    def blocks(self) -> list[Block]:
        """All blocks in order, once each shard was read to its end."""
        counts = [one["blocks"] for one in self._shards() or []]
        return [(shard, number) for shard, count in enumerate(counts) for number in range(count)]

    def counts(self) -> dict[Block, int]:
        """How many samples each block has, of those that were decoded once, whether all were or not."""
        places = [tuple(map(int, path.stem.split("-")[1:])) for path in self.folder.glob("block-*.json")]
        blocks = [(shard, number) for shard, number in places if self._is_indexed((shard, number))]
        return {block: len(json.loads(self._index_path(block).read_text())["labels"]) for block in sorted(blocks)}

    def index(self) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
        """Of the whole split: sample ids and labels `(samples,)`, ids left out, and the size of each block."""
        import numpy as np

        ids: list[int] = []
        labels: list[int] = []
        skipped: list[int] = []
        counts: list[int] = []
        for block in self.blocks:
            index = json.loads(self._index_path(block).read_text())
            start = len(ids) + len(skipped)
            left_out = set(index["skipped"])
            ids += [start + place for place in range(len(index["labels"]) + len(left_out)) if place not in left_out]
            skipped += [start + place for place in sorted(left_out)]
            labels += index["labels"]
            counts.append(len(index["labels"]))
        return np.array(ids, np.int64), np.array(labels, np.int64), skipped, counts

    def digests(self, blocks: Sequence[Block] | None = None) -> np.ndarray | None:
        """Of the image of each sample `(samples,)`; None if that is not known, or an earlier version indexed some.

        Args:
            blocks: whose samples; by default those of the whole split.
        """
        indices = [self._index(block) for block in (self.blocks if blocks is None else blocks)]
        if not indices or not all(
            len(index.get("digests", ())) == len(index.get("labels", [None])) for index in indices
        ):
            return None
        return as_digests([digest for index in indices for digest in index["digests"]])

    def stream(
        self,
        rank: int,
        world: int,
        *,
        wanted: Callable[[Block], bool] = lambda block: True,
        room: int = 0,
        workers: int = 0,
    ) -> Iterator[tuple[Block, Inputs]]:
        """This process's blocks, in order: read if they are kept, else decoded, and kept if there is room.

        Blocks that are not `wanted` are decoded only if that was never done.

        Args:
            room: bytes that this process may add to the pixel cache.
            workers: further processes that decode.

        Raises:
            ValueError: for an unreadable image (unless skipped) or an unknown label, with the sample's id.
        """
        for block, decoded in decode_all(self._raw(rank, world, wanted), self.source, workers):
            if decoded is not None:
                room -= self._keep(block, decoded, room)
            if self.on_digests:
                self.on_digests(self._index(block).get("digests", []))
            if decoded is None:
                yield block, self.read(block)
                continue
            if wanted(block):
                yield block, decoded.inputs

    def read(self, block: Block) -> Inputs:
        """The models' inputs of a block that is kept: `(samples, ...)` by name, memory-mapped."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.path(block))
        except SafetensorError as error:
            self.path(block).unlink(missing_ok=True)
            raise OSError(
                f"{self.path(block)} was broken ({error}) and is removed; run the same again to prepare it anew."
            ) from error
        names = [name.removeprefix("inputs.") for name in tensors if name.startswith("inputs.")]
        inputs: Inputs = {name: tensors[f"inputs.{name}"] for name in names}
        for name in names:
            if f"tables.{name}" in tensors:
                inputs[name] = Pixels(tensors[f"inputs.{name}"], tensors[f"tables.{name}"])
        return inputs

    def room(self, limit: int | None) -> int:
        """Bytes that may be added to what is kept, of so many in all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = sum(path.stat().st_size for path in self.folder.glob("block-*.safetensors"))
        if limit is None:
            limit = min(MOST, int(SHARE * (shutil.disk_usage(self.folder).free + kept)))
        return max(0, limit - kept)

    def path(self, block: Block) -> Path:
        return self.folder / f"block-{block[0]:05d}-{block[1]:06d}.safetensors"

    def check_order(self) -> None:
        """Hold all processes and all passes to one order of the rows.

        Raises:
            ValueError: if a shard was read in two; what was made of it is removed.
        """
        found = [path.name[: len("shard-00000")] for path in self.folder.glob("shard-*.json")]
        if len(found) == len(set(found)):
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
        """The blocks that this process has to see, with their rows or, where they are kept, without."""
        shards = len(self._shards() or []) or count_shards(self.source().split.rows)
        for shard in range(shards):
            if rank not in reads(shard, shards, world):
                continue
            known = self._shard(shard)
            if known is not None:
                mine = [(shard, number) for number in range(known["blocks"])]
                mine = [block for block in mine if reader(block, shards, world) == rank]
                todo = [block for block in mine if wanted(block) or not self._is_indexed(block)]
                if all(self._is_kept(block) for block in todo):
                    yield from ((block, None) for block in todo)
                    continue
            count, order = 0, hashlib.sha256()
            split = self.source().split
            for number, rows in raw_blocks(split.rows, shard, shards, self.size, split.name):
                block, count = (shard, number), number + 1
                if isinstance(rows, list):
                    order.update(repr([_mark(row, split) for row in rows]).encode())
                if reader(block, shards, world) != rank:
                    continue
                if self._is_kept(block):
                    if wanted(block):
                        yield block, None
                elif wanted(block) or not self._is_indexed(block):
                    yield block, list(rows)
            path = self.folder / f"shard-{shard:05d}-{order.hexdigest()[:16]}.json"
            write_json(path, {"shards": shards, "blocks": count})

    def _shards(self) -> list[dict[str, int]] | None:
        """What is known of each shard, if all were read to their ends."""
        first = self._shard(0)
        found = [self._shard(shard) for shard in range(first["shards"])] if first else [None]
        known = [one for one in found if one is not None]
        return known if len(known) == len(found) else None

    def _shard(self, shard: int) -> dict[str, int] | None:
        for path in self.folder.glob(f"shard-{shard:05d}-*.json"):
            found = _read_json(path)
            if found and all(type(found.get(name)) is int and found[name] >= 0 for name in ("shards", "blocks")):
                return found
        return None

    def _is_kept(self, block: Block) -> bool:
        return self.path(block).exists() and self._is_indexed(block)

    def _is_indexed(self, block: Block) -> bool:
        """Whether a block's labels are known; an index that can't be read is made anew."""
        found = self._index(block)
        return all(isinstance(found.get(name), list) for name in ("labels", "skipped"))

    def _index(self, block: Block) -> dict[str, Any]:
        return _read_json(self._index_path(block)) or {}

    def _index_path(self, block: Block) -> Path:
        return self.folder / f"block-{block[0]:05d}-{block[1]:06d}.json"

    def _keep(self, block: Block, decoded: Decoded, room: int) -> int:
        """Write a block's index, and its inputs if they fit; how many bytes these took."""
        from safetensors.torch import save_file

        index = {name: getattr(decoded, name) for name in ("labels", "digests", "skipped")}
        write_json(self._index_path(block), index)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in decoded.inputs.items():
            if isinstance(value, Pixels):
                tensors |= {f"inputs.{name}": value.codes, f"tables.{name}": value.table}
            else:
                tensors[f"inputs.{name}"] = value
        size = sum(value.nbytes for value in tensors.values())
        if size > room or (room < ALL and shutil.disk_usage(self.folder).free < size + SPARED):
            return 0
        write_atomically(self.path(block), partial(save_file, tensors))
        return size


def _mark(row: dict[str, Any], split: Split) -> tuple[Any, ...]:
    """What tells a row from others: two passes over a stream must not meet different images."""
    image = row.get(split.image_column)
    if isinstance(image, dict):
        content = image.get("bytes")
        return row.get(split.label_column), image.get("path"), content and zlib.crc32(content)
    as_bytes = getattr(image, "tobytes", None)
    return row.get(split.label_column), zlib.crc32(as_bytes() if as_bytes else repr(image).encode())


def _read_json(path: Path) -> dict[str, Any] | None:
    """What a file of the cache says; None if it is not there, or broken."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
