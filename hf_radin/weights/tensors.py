"""Tensors of many files, averaged chunk by chunk: each byte is read once, and no tensor has to be whole in memory.

Plain numpy: what averages files must not wait for torch. Sums are taken in float64, or in float32 where all that goes
in and comes out has 16 bits; product and sum are rounded one after the other, ingredient after ingredient, and the
result once: all machines, and any number of threads, give the same bits, and the average of equal tensors is that
tensor again, for any weights, but for float64, where a sum has nothing to spare.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from hf_radin.checkpoints.files import (
    BYTES,
    FLOATS,
    NUMPY_NAMES,
    WEIGHTS_INDEX,
    Header,
    open_pickles,
    plain_names,
    read_layout,
    safetensors_dtype,
    weight_files,
)

# Numbers of a tensor that are worked on at a time: with their sum they stay in a core's cache.
CHUNK = 1 << 18

# Threads that read and add: memory is not faster for more.
THREADS = min(4, os.cpu_count() or 1)

# Takes bytes of the named tensor from a place on.
Sink = Callable[[str, int, Any], object]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Args:
        dtype: as safetensors spells it.
        shape: of it.
        read: fills a buffer with its bytes, from a byte on.
        check: raises a ValueError if the file is no longer what it was when it was opened.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, memoryview], object]
    check: Callable[[], object] = lambda: None

    def __len__(self) -> int:
        return math.prod(self.shape)


@contextmanager
def open_files(folder: Path, *, allow_pickle: bool = False) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint by their plain names (`checkpoint.plain_names`); nothing of them is read yet.

    Raises:
        ValueError: if a file is truncated or not what its name says.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in weight_files(folder, allow_pickle=allow_pickle):
            if path.suffix == ".safetensors":
                part = _of_file(stack, path)
                twice = sorted(part.keys() & found.keys())
                if twice:
                    raise ValueError(f"{path}: {twice[0]} stands in another file of {folder}, too; save it again.")
                found |= part
            else:  # of one kind all are
                found = _of_pickles(folder)
                break
        yield {name: found[on_disk] for on_disk, name in plain_names(found, folder).items()}


def _of_file(stack: ExitStack, path: Path) -> dict[str, Tensor]:
    try:
        file = stack.enter_context(path.open("rb", buffering=0))
        status = os.fstat(file.fileno())
        size = status.st_size
        layout = read_layout(file, size)
        if hasattr(os, "posix_fadvise"):  # the system may read ahead while sums are taken
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a whole file of weights ({error}).") from error
    shared = _Shared(file)

    def check() -> None:
        now = os.stat(path)
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (status.st_ino, size, status.st_mtime_ns):
            raise ValueError(f"{path} has changed while it was read: nothing was written. Run the same again.")

    return {
        name: Tensor(dtype, shape, partial(_read, path, shared, layout.starts[name]), check)
        for name, (dtype, shape) in layout.header.items()
    }


def _read(path: Path, file: _Shared, start: int, first: int, kept: memoryview) -> None:
    done = 0
    while done < len(kept):  # one call may read less
        try:
            got = file.read(start + first + done, kept[done:])
        except OSError as error:  # not of what is written, which would be somebody else's fault
            raise ValueError(f"{path} can't be read: {error}.") from error
        if not got:
            raise ValueError(f"{path} has become shorter while it was read.")
        done += got


class _Shared:
    """A file that threads read and write at places of their own; some systems have but one place a file."""

    def __init__(self, file: FileIO):
        self.file, self.lock = file, threading.Lock()

    def read(self, start: int, kept: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [kept], start)
        with self.lock:
            self.file.seek(start)
            return self.file.readinto(kept) or 0

    def write(self, start: int, part: Any) -> None:
        rest, done = memoryview(part).cast("B"), 0
        while done < len(rest):  # one call may write less
            if hasattr(os, "pwrite"):
                done += os.pwrite(self.file.fileno(), rest[done:], start + done)
            else:
                with self.lock:
                    self.file.seek(start + done)
                    done += self.file.write(rest[done:])


def _of_pickles(folder: Path) -> dict[str, Tensor]:
    """Tensors that torch reads, in memory maps."""
    import torch

    found = {}
    for name, tensor in open_pickles(folder).items():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

        def fill(first: int, kept: memoryview, flat: memoryview = flat) -> None:
            kept[:] = flat[first : first + len(kept)]

        found[name] = Tensor(safetensors_dtype(tensor.dtype), tuple(tensor.shape), fill)
    return found


def average(
    files: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    target: Mapping[str, str],
    sink: Sink,
    *,
    on_chunk: Callable[[int], object] = lambda numbers: None,
    ids: Sequence[str] = (),
) -> None:
    """Weighted sums of the tensors that all files have; of integers, which count or index, the first stays.

    Args:
        files: of each checkpoint, tensors of the same names and shapes.
        weights: one for each.
        target: of each tensor the dtype that its sum is rounded to.
        sink: takes the bytes; several threads call it, for different bytes.
        on_chunk: hears how many numbers went by.
        ids: what to call the checkpoints in an error.

    Raises:
        ValueError: where a sum is no finite number, unless that number is the same in all of them; if a float16 can't
            hold it; if a file has changed meanwhile.
    """
    exact = sum_dtype([one.dtype for file in files for one in file.values()], target.values())
    own, stopped = threading.local(), threading.Event()

    def work(chunk: tuple[str, int]) -> None:
        if stopped.is_set():
            return
        if not hasattr(own, "room"):
            own.room = _Room(CHUNK, exact)
        name, start = chunk
        tensors = [file[name] for file in files]
        count = min(CHUNK, len(tensors[0]) - start)
        if target[name] in FLOATS:
            with np.errstate(over="ignore", invalid="ignore"):
                total = _sum(tensors, weights, start, count, own.room)
                is_number = bool(np.isfinite(total.sum()))
            if not is_number:  # or but large: whoever looks closer knows
                _refuse_strange(name, tensors, ids, start, total)
            part = rounded(total, target[name], own.room)
            if target[name] == "F16" and not np.isfinite(part.view(np.float16)).all() and np.isfinite(total).all():
                most = total[np.abs(total).argmax()]
                raise ValueError(
                    f"{name} has {most:.6g} in the average, more than a float16 holds; choose another dtype (--dtype)."
                )
            sink(name, start * BYTES[target[name]], part)
        else:
            size = BYTES[target[name]]
            raw = own.room.raw[: count * size]
            tensors[0].read(start * size, raw.data)
            sink(name, start * size, raw)
        on_chunk(count)

    chunks = [(name, start) for name in target for start in range(0, len(files[0][name]), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(work, chunk) for chunk in chunks]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    for check in {one.check for file in files for one in file.values()}:
        check()


def sum_dtype(ingredients: Iterable[str], target: Iterable[str]) -> type[np.floating]:
    """What sums are taken in: float32 has 13 bits to spare for a float16, which no hundreds of sums use up.

    Args:
        ingredients: the dtypes of what goes in, as safetensors spells them; integers don't count.
        target: of what comes out.
    """
    return np.float64 if {"F64", "F32"} & {*ingredients, *target} else np.float32


class _Room:
    """What a thread works in, for so many numbers: memory that is used again costs no page faults."""

    def __init__(self, count: int, exact: type[np.floating] = np.float64):
        self.raw = np.empty(8 * count, np.uint8)
        self.total, self.part = np.empty(count, exact), np.empty(count, exact)
        self.single, self.bits = np.empty(count, np.float32), np.empty(count, np.uint32)
        self.half, self.is_middle = np.empty(count, np.uint16), np.empty(count, bool)


def _sum(tensors: Sequence[Tensor], weights: Sequence[float], start: int, count: int, room: _Room) -> np.ndarray:
    """Of some numbers of each tensor the weighted sum, float64 or float32 `(count,)`."""
    total, part, wide = room.total[:count], room.part[:count], room.bits[:count]
    for index, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        size = BYTES[tensor.dtype]
        raw = room.raw[: count * size]
        tensor.read(start * size, raw.data)
        values = raw.view(NUMPY_NAMES[tensor.dtype])
        if tensor.dtype == "BF16":  # the upper half of a float32
            np.left_shift(values, 16, out=wide, dtype=np.uint32)
            values = wide.view(np.float32)
        into = part if index else total
        into[:] = values
        into *= weight
        if index:
            total += part
    return total


def _refuse_strange(name: str, tensors: Sequence[Tensor], ids: Sequence[str], start: int, total: np.ndarray) -> None:
    """Raises a ValueError for a sum that is no finite number, where that is not what all tensors have there."""
    odd = np.flatnonzero(~np.isfinite(total))
    if not len(odd):
        return
    values = []
    for tensor in tensors:
        room = _Room(len(total))
        values.append(_sum([tensor], [1.0], start, len(total), room)[odd].copy())
    same = np.all([one == values[0] for one in values], axis=0)
    if same.all():
        total[odd] = values[0]
        return
    place = int(np.flatnonzero(~same)[0])
    which = next((at for at, one in enumerate(values) if not np.isfinite(one[place])), 0)
    called = ids[which] if ids else f"checkpoint {which}"
    raise ValueError(
        f"{called}: {name} has {values[which][place]} at {start + int(odd[place])}; an average with it is no number. "
        "Leave it out."
    )


def rounded(values: np.ndarray, dtype: str, room: _Room | None = None) -> np.ndarray:
    """The nearest numbers of a dtype, to even of two that are as near, as bytes.

    Args:
        room: what to work in, and leave the bytes in.
    """
    count = len(values)
    room = room or _Room(count)
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            found = room.raw[: count * BYTES[dtype]].view(NUMPY_NAMES[dtype])
            found[:] = values
            return found.view(np.uint8)
        single, halves, is_middle = room.single[:count], room.bits[:count], room.is_middle[:count]
        single[:] = values
        bits = single.view(np.uint32)
        np.right_shift(bits, 16, out=halves)
        halves &= 1
        halves += 0x7FFF
        halves += bits
        halves >>= 16
        if values.dtype != single.dtype:
            # rounded twice, a number just beside the middle of two would go by the rule for the middle
            np.equal(bits.view(np.uint16)[_LOW::2], 0x8000, out=is_middle)
            middle = np.flatnonzero(is_middle)
            beyond, exact = np.abs(single[middle]).astype(np.float64), np.abs(values[middle])
            halves[middle] = np.where(exact == beyond, halves[middle], (bits[middle] >> 16) + (exact > beyond))
        np.isnan(single, out=is_middle)
        if is_middle.any():
            nothing = np.flatnonzero(is_middle)
            halves[nothing] = (bits[nothing] >> 16) | 0x40
        half = room.half[:count]
        half[:] = halves
        return half.view(np.uint8)


# Where the lower half of a number lies in memory.
_LOW = 0 if sys.byteorder == "little" else 1


def write(folder: Path, header: Header, fill: Callable[[Sink], object], *, max_shard_size: int | str) -> None:
    """Write a checkpoint's weights as `save_pretrained` lays them out: one file, or shards with an index.

    Args:
        header: of each tensor the dtype and the shape.
        fill: gives a sink the bytes of all tensors, in any order.
        max_shard_size: as in transformers, as in `5GB`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {name: BYTES[dtype] * math.prod(shape) for name, (dtype, shape) in header.items()}
    plan = split_state_dict_into_shards_factory(
        header,
        get_storage_size=lambda one: BYTES[one[0]] * math.prod(one[1]),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with ExitStack() as stack:
        places: dict[str, tuple[_Shared, int]] = {}
        files = []
        for filename, names in plan.filename_to_tensors.items():
            # numbers of many bytes first: then each lies at a multiple of its size
            ordered = sorted(names, key=lambda name: (-BYTES[header[name][0]], name))
            file = stack.enter_context((folder / filename).open("wb", buffering=0))
            files.append(file)
            shared = _Shared(file)
            text, start = _header_of({name: header[name] for name in ordered}, sizes)
            shared.write(0, text)
            file.truncate(start + sum(sizes[name] for name in names))
            for name in ordered:
                places[name] = shared, start
                start += sizes[name]
        fill(lambda name, first, part: places[name][0].write(places[name][1] + first, part))
        for file in files:
            os.fsync(file.fileno())
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _header_of(header: Header, sizes: Mapping[str, int]) -> tuple[bytes, int]:
    """The beginning of a safetensors file, and where its data begin."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name, (dtype, shape) in header.items():
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, first + sizes[name]]}
        first += sizes[name]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text)
