"""Average the tensors of many files chunk by chunk: each byte is read once, and no whole tensor is held in memory.

This is plain numpy, because averaging files must not wait for the import of torch. Sums are taken in float64, or in
float32 where all inputs and outputs have 16 bits. Product and sum are rounded one after the other, ingredient after
ingredient, and the result is rounded once. All machines and any number of threads therefore give the same bits, and
the average of equal tensors is that tensor again, for any weights; except in float64, where sums have no spare bits.
What several fine-tunes share, as a frozen body, is therefore compared and not summed up.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
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
from hf_radin.runtime.files import sha256_of

# Numbers that are summed at a time: they and their sum in float64 fit into a core's own cache, with room to spare.
CHUNK = 1 << 16

# Threads that read and add: more of them don't get more out of the memory.
THREADS = min(4, os.cpu_count() or 1)

# The bytes that are looked at first, to see whether two chunks are the same.
GLANCE = 1024

# Takes the name of a tensor, the offset of its first byte, and bytes of it.
Sink = Callable[[str, int, Any], object]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Args:
        dtype: as safetensors spells it.
        shape: of the tensor.
        read: takes an offset in bytes and a buffer, and fills the buffer with the bytes from there on.
        check: raises a ValueError if the file has changed since it was opened.
        path: of the file; None for a pickle.
        start: where in the file it begins.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, memoryview], object]
    check: Callable[[], object] = lambda: None
    path: Path | None = None
    start: int = 0

    def __len__(self) -> int:
        return math.prod(self.shape)


@contextmanager
def open_files(folder: Path, *, allow_pickle: bool = False) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint by their plain names (`files.plain_names`). None of them is read yet.

    Raises:
        ValueError: if a file is truncated or not what its name says.
    """
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in weight_files(folder, allow_pickle=allow_pickle):
            if path.suffix != ".safetensors":  # then all files are pickles
                tensors = _open_pickled(folder)
                break
            shard = _open_safetensors(stack, path)
            if repeated := sorted(shard.keys() & tensors.keys()):
                raise ValueError(f"{path}: {repeated[0]} stands in another file of {folder}, too; save it again.")
            tensors |= shard
        yield {name: tensors[on_disk] for on_disk, name in plain_names(tensors, folder).items()}


def _open_safetensors(stack: ExitStack, path: Path) -> dict[str, Tensor]:
    """The tensors of one file, which `stack` closes."""
    try:
        file = stack.enter_context(path.open("rb", buffering=0))
        status = os.fstat(file.fileno())
        size = status.st_size
        layout = read_layout(file, size)
        if hasattr(os, "posix_fadvise"):  # lets the system read ahead while sums are taken
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a whole file of weights ({error}).") from error
    shared = _SharedFile(file)

    def check() -> None:
        now = os.stat(path)
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (status.st_ino, size, status.st_mtime_ns):
            raise ValueError(f"{path} has changed while it was read: nothing was written. Run the same again.")

    return {
        name: Tensor(dtype, shape, partial(_read, path, shared, start := layout.starts[name]), check, path, start)
        for name, (dtype, shape) in layout.header.items()
    }


def _read(path: Path, file: _SharedFile, start: int, first: int, buffer: memoryview) -> None:
    """Fill a buffer from byte `first` of the tensor that begins at byte `start` of the file."""
    done = 0
    while done < len(buffer):  # a call may read fewer bytes
        try:
            count = file.read(start + first + done, buffer[done:])
        except OSError as error:  # name the file that is read: an OSError would be taken for one of the output
            raise ValueError(f"{path} can't be read: {error}.") from error
        if not count:
            raise ValueError(f"{path} has become shorter while it was read.")
        done += count


class _SharedFile:
    """A file that several threads read and write, each at an offset of its own.

    Where the system can't do that (Windows has no `preadv`), a lock guards the file's one position.
    """

    def __init__(self, file: FileIO):
        self.file, self.lock = file, threading.Lock()

    def read(self, start: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [buffer], start)
        with self.lock:
            self.file.seek(start)
            return self.file.readinto(buffer) or 0

    def write(self, start: int, content: Any) -> None:
        buffer, done = memoryview(content).cast("B"), 0
        while done < len(buffer):  # a call may write fewer bytes
            if hasattr(os, "pwrite"):
                done += os.pwrite(self.file.fileno(), buffer[done:], start + done)
            else:
                with self.lock:
                    self.file.seek(start + done)
                    done += self.file.write(buffer[done:])


def _open_pickled(folder: Path) -> dict[str, Tensor]:
    """Tensors that torch maps into memory."""
    import torch

    tensors = {}
    for name, tensor in open_pickles(folder).items():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

        def read(first: int, buffer: memoryview, flat: memoryview = flat) -> None:
            buffer[:] = flat[first : first + len(buffer)]

        tensors[name] = Tensor(safetensors_dtype(tensor.dtype), tuple(tensor.shape), read)
    return tensors


@dataclass
class _OrderedHash:
    """The SHA-256 of the bytes of a file up to `end`."""

    value: hashlib._Hash
    end: int
    turn: threading.Condition = field(default_factory=threading.Condition)


class FileHashes:
    """The SHA-256 of files, taken of the bytes that are read of them for an average: no file is read twice.

    Threads read chunks side by side, and a hash takes the bytes of a file one after the other. So a thread waits until
    the others have hashed what lies before its chunk. A file whose tensors are averaged in another order than that in
    which they lie in it is hashed by itself afterwards.

    Args:
        files: as `average` takes them.
        names: of the tensors, in the order in which they are averaged.
    """

    def __init__(self, files: Sequence[Mapping[str, Tensor]], names: Iterable[str]):
        self._stopped = threading.Event()
        self._paths = {tensor.path for file in files for tensor in file.values() if tensor.path}
        firsts: dict[Path, int] = {}
        ends: dict[Path, int] = {}
        for tensor in (file[name] for name in names for file in files):
            if tensor.path and ends.setdefault(tensor.path, tensor.start) == tensor.start:
                firsts.setdefault(tensor.path, tensor.start)
                ends[tensor.path] += len(tensor) * BYTES[tensor.dtype]
        in_order = [path for path, end in ends.items() if end == path.stat().st_size]
        self._hashes = {path: _hash_of_beginning(path, firsts[path]) for path in in_order}

    def taken_of(self, files: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The same tensors, which are hashed when they are read."""
        return [
            {name: replace(tensor, read=partial(self._read, tensor)) for name, tensor in file.items()}
            for file in files
        ]

    def _read(self, tensor: Tensor, first: int, buffer: memoryview) -> None:
        """Fill a buffer as `tensor.read` does, and hash it, if it was not hashed before."""
        tensor.read(first, buffer)
        if tensor.path not in self._hashes:
            return
        entry, start = self._hashes[tensor.path], tensor.start + first
        with entry.turn:
            entry.turn.wait_for(lambda: entry.end >= start or self._stopped.is_set())
            if entry.end == start:
                entry.value.update(buffer)
                entry.end += len(buffer)
                entry.turn.notify_all()

    def stop(self) -> None:
        """Let no thread wait any more, since what it waits for may never come."""
        self._stopped.set()
        for entry in self._hashes.values():
            with entry.turn:
                entry.turn.notify_all()

    def result(self) -> dict[Path, str]:
        """The hash of each file, in hexadecimal, after all of it was averaged."""
        hashes = {path: entry.value.hexdigest() for path, entry in self._hashes.items()}
        return {**hashes, **{path: sha256_of(path) for path in self._paths - hashes.keys()}}


def _hash_of_beginning(path: Path, size: int) -> _OrderedHash:
    """The hash of the first bytes of a file."""
    with path.open("rb") as file:
        return _OrderedHash(hashlib.sha256(file.read(size)), size)


def average(
    files: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    target: Mapping[str, str],
    sink: Sink,
    *,
    on_chunk: Callable[[int], object] = lambda numbers: None,
    ids: Sequence[str] = (),
    chunk: int = CHUNK,
    threads: int = THREADS,
    hashes: FileHashes | None = None,
) -> None:
    """Weighted sums of the tensors of all files. Of integers, which count or index, the first file's are taken.

    Args:
        files: of each checkpoint, tensors of the same names and shapes.
        weights: one for each checkpoint.
        target: the dtype that the sum of each tensor is rounded to, as safetensors spells it.
        sink: takes the bytes. Several threads call it, each for different bytes.
        on_chunk: is called with the count of numbers that were averaged.
        ids: the checkpoints' names for errors.
        chunk: numbers that are read and summed at a time.
        threads: that do so.
        hashes: of these files, which are taken meanwhile; by default none are.

    Raises:
        ValueError: if a sum is not a finite number, unless all tensors have that number there; if it is too large for
            a float16 target; if a file has changed since it was opened.
    """
    if hashes is not None:
        files = hashes.taken_of(files)
    averaging = _Averaging(files, weights, target, ids)
    local, stopped = threading.local(), threading.Event()

    def work(name: str, start: int, count: int) -> None:
        if stopped.is_set():
            return
        if not hasattr(local, "workspace"):
            local.workspace = _Workspace(chunk, averaging.sum_dtype)
        sink(name, start * BYTES[target[name]], averaging.average_chunk(name, start, count, local.workspace))
        on_chunk(count)

    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(work, name, start, min(chunk, len(files[0][name]) - start))
            for name in target
            for start in range(0, len(files[0][name]), chunk)
        ]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stopped.set()
            if hashes is not None:
                hashes.stop()
            pool.shutdown(cancel_futures=True)
            raise
    for check in {tensor.check for file in files for tensor in file.values()}:
        check()


def sum_dtype(ingredients: Iterable[str], target: Iterable[str]) -> type[np.floating]:
    """The dtype of sums. For 16-bit numbers float32 will do: its 13 spare bits outlast hundreds of summands.

    Args:
        ingredients: dtypes of the tensors that are averaged, as safetensors spells them; integers don't count.
        target: dtypes of the averages.
    """
    return np.float64 if {"F64", "F32"} & {*ingredients, *target} else np.float32


class _Workspace:
    """Buffers of one thread for `count` numbers: memory that is used again costs no page faults."""

    def __init__(self, count: int, sum_dtype: type[np.floating] = np.float64):
        self.raw, self.first = np.empty(8 * count, np.uint8), np.empty(8 * count, np.uint8)
        self.total, self.part = np.empty(count, sum_dtype), np.empty(count, sum_dtype)
        self.single, self.bits = np.empty(count, np.float32), np.empty(count, np.uint32)
        self.half, self.is_middle = np.empty(count, np.uint16), np.empty(count, bool)


@dataclass(frozen=True)
class _Averaging:
    """An average of checkpoints, of which any chunk can be computed. The fields are arguments of `average`."""

    files: Sequence[Mapping[str, Tensor]]
    weights: Sequence[float]
    target: Mapping[str, str]
    ids: Sequence[str]

    @cached_property
    def sum_dtype(self) -> type[np.floating]:
        return sum_dtype([tensor.dtype for file in self.files for tensor in file.values()], self.target.values())

    def average_chunk(self, name: str, start: int, count: int, workspace: _Workspace) -> np.ndarray:
        """The bytes of `count` numbers of a tensor, from the number `start` on; they lie in the workspace."""
        tensors, dtype = [file[name] for file in self.files], self.target[name]
        if dtype not in FLOATS:
            raw = workspace.raw[: count * BYTES[dtype]]
            for tensor in reversed(tensors):  # of all but the first one only to be hashed
                tensor.read(start * BYTES[dtype], raw.data)
            return raw
        with np.errstate(over="ignore", invalid="ignore"):
            total = _weighted_sum(tensors, self.weights, start, count, workspace, keeps_equal=self._keeps_equal(name))
            is_finite = total is None or bool(np.isfinite(total.sum()))
        if total is None:
            return workspace.first[: count * BYTES[dtype]]
        if not is_finite:  # there is such a number, or the numbers are merely large
            self._settle_non_finite(name, start, total)
        part = rounded(total, dtype, workspace)
        if dtype == "F16" and not np.isfinite(part.view(np.float16)).all() and np.isfinite(total).all():
            largest = total[np.abs(total).argmax()]
            raise ValueError(
                f"{name} has {largest:.6g} in the average, more than a float16 holds; choose another dtype (--dtype)."
            )
        return part

    def _keeps_equal(self, name: str) -> bool:
        """Whether the average of equal tensors is that tensor, to the last bit; rounded to another dtype it is not."""
        dtypes = {self.target[name], *(file[name].dtype for file in self.files)}
        return len(dtypes) == 1 and "F64" not in dtypes and self._is_average

    @cached_property
    def _is_average(self) -> bool:
        return math.isclose(math.fsum(self.weights), 1)

    def _settle_non_finite(self, name: str, start: int, total: np.ndarray) -> None:
        """Put the number that all tensors have in place of a sum that is not finite, as of masks with -inf.

        Raises:
            ValueError: where they have different numbers.
        """
        places = np.flatnonzero(~np.isfinite(total))
        if not len(places):
            return
        values = []
        for file in self.files:
            tensor, workspace = file[name], _Workspace(len(total))
            raw = workspace.raw[: len(total) * BYTES[tensor.dtype]]
            tensor.read(start * BYTES[tensor.dtype], raw.data)
            values.append(_with(None, raw, tensor.dtype, 1.0, workspace)[places].copy())
        is_same = np.all([row == values[0] for row in values], axis=0)
        if is_same.all():
            total[places] = values[0]
            return
        first = int(np.flatnonzero(~is_same)[0])
        index = next((index for index, row in enumerate(values) if not np.isfinite(row[first])), 0)
        checkpoint = self.ids[index] if self.ids else f"checkpoint {index}"
        raise ValueError(
            f"{checkpoint}: {name} has {values[index][first]} at {start + int(places[first])}; an average with it is "
            "no number. Leave it out."
        )


def _weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    start: int,
    count: int,
    workspace: _Workspace,
    *,
    keeps_equal: bool = False,
) -> np.ndarray | None:
    """The weighted sum of the same numbers of each tensor, in the dtype of the workspace `(count,)`.

    None where it need not be taken, of equal bytes of finite numbers, which are left in `workspace.first`.

    Args:
        keeps_equal: whether the average of equal tensors is that tensor, and so is not summed up.
    """
    total: np.ndarray | None = None
    waiting: list[float] = []  # the weights of tensors whose bytes are the first one's, as long as all are
    for tensor, weight in zip(tensors, weights, strict=True):
        size = BYTES[tensor.dtype]
        first = workspace.first[: count * size]
        raw = workspace.raw[: count * size] if total is not None or waiting or not keeps_equal else first
        tensor.read(start * size, raw.data)
        if keeps_equal and total is None and (raw is first or _are_equal(raw, first)):
            waiting.append(weight)
            continue
        for earlier in waiting:
            total = _with(total, first, tensor.dtype, earlier, workspace)
        waiting = []
        total = _with(total, raw, tensor.dtype, weight, workspace)
    if not waiting:
        return total
    if np.isfinite(_with(None, first, tensor.dtype, 1.0, workspace).sum()):
        return None
    for weight in waiting:
        total = _with(total, first, tensor.dtype, weight, workspace)
    return total


def _are_equal(content: np.ndarray, other: np.ndarray) -> bool:
    """Whether two uint8 arrays are the same; that they differ mostly shows in their first bytes."""
    return np.array_equal(content[:GLANCE], other[:GLANCE]) and np.array_equal(content, other)


def _with(total: np.ndarray | None, raw: np.ndarray, dtype: str, weight: float, workspace: _Workspace) -> np.ndarray:
    """A sum to which weighted numbers were added, in place; the first sum lies in the workspace `(count,)`.

    Args:
        raw: the numbers' bytes, uint8.
        dtype: of the numbers, as safetensors spells it.
    """
    values = raw.view(NUMPY_NAMES[dtype])
    count = len(values)
    if dtype == "BF16":  # the upper half of a float32
        wide = workspace.bits[:count]
        np.left_shift(values, 16, out=wide, dtype=np.uint32)
        values = wide.view(np.float32)
    into = (workspace.total if total is None else workspace.part)[:count]
    into[:] = values
    into *= weight
    if total is None:
        return into
    total += into
    return total


def rounded(values: np.ndarray, dtype: str, workspace: _Workspace | None = None) -> np.ndarray:
    """The nearest numbers of a dtype, as bytes; between two that are equally near, the even one.

    Args:
        values: float64 or float32 `(numbers,)`.
        dtype: as safetensors spells it.
        workspace: that the bytes are left in; by default a new one.
    """
    count = len(values)
    workspace = workspace or _Workspace(count)
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            nearest = workspace.raw[: count * BYTES[dtype]].view(NUMPY_NAMES[dtype])
            nearest[:] = values
            return nearest.view(np.uint8)
        single, halves, is_middle = workspace.single[:count], workspace.bits[:count], workspace.is_middle[:count]
        single[:] = values
        bits = single.view(np.uint32)
        np.right_shift(bits, 16, out=halves)
        halves &= 1
        halves += 0x7FFF
        halves += bits
        halves >>= 16
        if values.dtype != single.dtype:
            # a number just beside the middle of two, rounded to float32 first, would be taken for the middle
            np.equal(bits.view(np.uint16)[_LOW::2], 0x8000, out=is_middle)
            middle = np.flatnonzero(is_middle)
            through_single, exact = np.abs(single[middle]).astype(np.float64), np.abs(values[middle])
            nearer = (bits[middle] >> 16) + (exact > through_single)
            halves[middle] = np.where(exact == through_single, halves[middle], nearer)
        np.isnan(single, out=is_middle)
        if is_middle.any():
            places = np.flatnonzero(is_middle)
            halves[places] = (bits[places] >> 16) | 0x40
        half = workspace.half[:count]
        half[:] = halves
        return half.view(np.uint8)


# Which of the two halves of a float32 in memory is the lower one.
_LOW = 0 if sys.byteorder == "little" else 1


def write(folder: Path, header: Header, fill: Callable[[Sink], object], *, max_shard_size: int | str) -> None:
    """Write a checkpoint's weights as `save_pretrained` lays them out: one file, or shards with an index.

    Args:
        header: dtype and shape of each tensor.
        fill: takes a sink, and gives it the bytes of all tensors in any order.
        max_shard_size: as in transformers, as in `5GB`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {name: BYTES[dtype] * math.prod(shape) for name, (dtype, shape) in header.items()}
    plan = split_state_dict_into_shards_factory(
        header,
        get_storage_size=lambda entry: BYTES[entry[0]] * math.prod(entry[1]),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with ExitStack() as stack:
        places: dict[str, tuple[_SharedFile, int]] = {}
        files = []
        for filename, names in plan.filename_to_tensors.items():
            # wide dtypes first, so that each number lies at a multiple of its size
            ordered = sorted(names, key=lambda name: (-BYTES[header[name][0]], name))
            file = stack.enter_context((folder / filename).open("wb", buffering=0))
            files.append(file)
            shared = _SharedFile(file)
            text, start = _encoded_header({name: header[name] for name in ordered}, sizes)
            shared.write(0, text)
            file.truncate(start + sum(sizes[name] for name in names))
            for name in ordered:
                places[name] = shared, start
                start += sizes[name]

        def sink(name: str, first: int, content: Any) -> None:
            file, start = places[name]
            file.write(start + first, content)

        fill(sink)
        for file in files:
            os.fsync(file.fileno())
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _encoded_header(header: Header, sizes: Mapping[str, int]) -> tuple[bytes, int]:
    """The first bytes of a safetensors file, and the offset where its data begin."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name, (dtype, shape) in header.items():
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, first + sizes[name]]}
        first += sizes[name]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text)
