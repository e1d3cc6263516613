"""Files are hashed by the bytes that are read of them for an average, once each, in whatever order threads do."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_radin.weights.average_tensors import FileHashes, average, open_files


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Write a checkpoint, its tensors in this order."""
    fields, content = {}, b""
    for name, tensor in tensors.items():
        dtype = {"f": "F32", "i": "I64"}[tensor.dtype.kind]
        end = len(content) + tensor.nbytes
        fields[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [len(content), end]}
        content += tensor.tobytes()
    header = json.dumps(fields).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content)
    return folder


@pytest.fixture
def tensors() -> list[dict[str, np.ndarray]]:
    """Of three checkpoints: many chunks, a counter, and a tensor of no number."""
    generator = np.random.default_rng(0)
    return [
        {
            "large": generator.standard_normal((300, 35), dtype=np.float32),
            "counter": np.array([number, 3]),
            "empty": np.zeros((0, 4), np.float32),
            "small": generator.standard_normal(7, dtype=np.float32),
        }
        for number in range(3)
    ]


def hashed(folders: Sequence[Path], count: list[int] | None = None, threads: int = 4) -> dict[Path, str]:
    """The hashes that are taken during an average; the sizes of all reads are added to `count`."""
    counted = count if count is not None else []
    with ExitStack() as stack:
        files = [stack.enter_context(open_files(folder)) for folder in folders]
        files = [{name: counting(tensor, counted) for name, tensor in file.items()} for file in files]
        target = {name: tensor.dtype for name, tensor in files[0].items()}
        hashes = FileHashes(files, target)
        options = {"chunk": 100, "threads": threads, "hashes": hashes}
        average(files, [1 / len(files)] * len(files), target, lambda name, first, content: None, **options)
        return hashes.result()


def counting(tensor, counted: list[int]):
    def read(first: int, buffer: memoryview) -> None:
        counted.append(len(buffer))
        tensor.read(first, buffer)

    return replace(tensor, read=read)


def sums(folders: Sequence[Path]) -> dict[Path, str]:
    paths = [folder / "model.safetensors" for folder in folders]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_they_are_those_of_the_files(tensors, tmp_path, threads):
    folders = [write(tmp_path / str(number), entry) for number, entry in enumerate(tensors)]
    count: list[int] = []
    assert hashed(folders, count, threads) == sums(folders)
    assert sum(count) == sum(array.nbytes for entry in tensors for array in entry.values())  # each byte once


def test_a_file_in_another_order_is_hashed_too(tensors, tmp_path):
    folders = [write(tmp_path / str(number), entry) for number, entry in enumerate(tensors[:2])]
    folders.append(write(tmp_path / "2", dict(reversed(tensors[2].items()))))
    assert hashed(folders) == sums(folders) and hashed(folders[::-1]) == sums(folders)


def test_nobody_waits_for_a_chunk_that_never_comes(tensors, tmp_path):
    tensors[1]["large"][2, 5] = np.nan
    folders = [write(tmp_path / str(number), entry) for number, entry in enumerate(tensors)]
    for _ in range(20):
        with pytest.raises(ValueError, match="checkpoint 1: large has nan at 75"):
            hashed(folders, threads=8)


def test_nobody_waits_for_a_file_that_can_not_be_read(tensors, tmp_path):
    folders = [write(tmp_path / str(number), entry) for number, entry in enumerate(tensors)]
    with ExitStack() as stack:
        files = [stack.enter_context(open_files(folder)) for folder in folders]
        target = {name: tensor.dtype for name, tensor in files[0].items()}
        hashes = FileHashes(files, target)
        path = folders[1] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:20_000])  # in the middle of the average, as it were
        with pytest.raises(ValueError, match="has become shorter while it was read"):
            average(files, [1 / 3] * 3, target, lambda *_: None, chunk=100, threads=8, hashes=hashes)
