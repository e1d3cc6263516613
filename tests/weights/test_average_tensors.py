"""Files are averaged as exactly as their dtypes can say, and what is written is whole."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared.written import WEIGHTS, write_average

from hf_radin.checkpoints.files import safetensors_dtype
from hf_radin.weights.average_tensors import average, open_files, rounded

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def folders(request, tmp_path):
    """Three checkpoints of one dtype, with a tensor of more than a chunk, an empty one, a scalar and a counter."""
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        large, small = torch.randn(300, 33, generator=generator), torch.randn((), generator=generator)
        tensors = {"large": large, "small": small, "empty": torch.zeros(0, 4)}
        tensors = {name: tensor.to(DTYPES[request.param]) for name, tensor in tensors.items()}
        tensors["counter"] = torch.tensor([number + 7, 3])
        save_file(tensors, tmp_path / str(number) / "model.safetensors", {"format": "pt"})
    return [tmp_path / str(number) for number in range(3)]


def written_average(folders: list[Path], output: Path, kind: str, *weights, **options) -> dict[str, torch.Tensor]:
    """The average as it is read back from the folder that it was written to; arguments as of `write_average`."""
    write_average(folders, output, kind, *weights, **options)
    return {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}


def is_nearest(values: torch.Tensor, exact: torch.Tensor, unsure: torch.Tensor | float = 0.0) -> bool:
    """Whether no other number of the dtype is nearer, for an exact one that may be off by `unsure`."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    error = (values.double() - exact).abs()
    others = [(values.view(bits) + step).view(values.dtype).double() for step in (-1, 1)]
    return bool(all((error <= (other - exact).abs() + 2 * unsure).all() for other in others))


@pytest.mark.parametrize("kind", DTYPES)
def test_sums_are_rounded_once_to_the_nearest_number(folders, tmp_path, kind):
    written = written_average(folders, tmp_path / "out", kind, chunk=1000)
    parts = [load_file(folder / "model.safetensors") for folder in folders]
    for name in ("large", "small", "empty"):
        exact = sum(weight * part[name].double() for weight, part in zip(WEIGHTS, parts, strict=True))
        assert written[name].dtype == DTYPES[kind] and written[name].shape == parts[0][name].shape
        unsure = torch.zeros(exact.shape)
        if max(parts[0][name].element_size(), written[name].element_size()) == 2:  # then sums are float32
            unsure = (
                4
                * 2**-24
                * sum(weight * part[name].double().abs() for weight, part in zip(WEIGHTS, parts, strict=True))
            )
        assert is_nearest(written[name].reshape(-1), exact.reshape(-1), unsure.reshape(-1))
    assert torch.equal(written["counter"], parts[0]["counter"])


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), WEIGHTS])
@pytest.mark.parametrize("last", [None, 0, 1, 2])
def test_what_some_files_share_changes_no_bit_of_the_sum(folders, tmp_path, weights, last):
    """As of ingredients of which only the last differ from the first, or one of them in one number."""
    parts = [load_file(folder / "model.safetensors") for folder in folders]
    for number, folder in enumerate(folders):
        shared = parts[0]["large"].clone()
        if number == last:
            shared[299, 32] += 1
        save_file(parts[0] | {"large": shared}, folder / "model.safetensors", {"format": "pt"})
    for kind in DTYPES:
        written = written_average(folders, tmp_path / kind, kind, weights, chunk=1000)
        wide = (
            torch.float32 if {kind, safetensors_dtype(parts[0]["large"].dtype)} <= {"F16", "BF16"} else torch.float64
        )
        total = torch.zeros(300, 33, dtype=wide)
        for number, weight in enumerate(weights):
            part = load_file(folders[number] / "model.safetensors")["large"].to(wide) * weight
            total = part if number == 0 else total + part
        assert written["large"].dtype == DTYPES[kind]
        assert is_nearest(written["large"].reshape(-1), total.double().reshape(-1))


@pytest.mark.parametrize("folders", ["F16", "BF16"], indirect=True)
@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.5), (1 / 3, 1 / 3, 1 / 3), WEIGHTS])
def test_sums_of_16_bits_are_those_of_float32(folders, tmp_path, weights):
    parts = [load_file(folder / "model.safetensors") for folder in folders]
    for kind in ("F16", "BF16"):
        written = written_average(folders, tmp_path / kind, kind, weights)
        total = weights[0] * parts[0]["large"].float()
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            total = total + weight * part["large"].float()
        assert torch.equal(written["large"], total.to(DTYPES[kind]))


def test_of_a_number_just_beside_the_middle_of_two_the_nearer_is_taken():
    """Rounded by way of float32, it would be in the middle, and go to the even one."""
    values = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, 1 + 3 * 2**-8 - 2**-40, 1 + 2**-8, 1 + 3 * 2**-8])
    values = np.concatenate([values, -values, [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e300, 2.0**-140]])
    nearest = torch.from_numpy(rounded(values, "BF16")).view(torch.bfloat16).double().numpy()
    steps = np.array([1, 0, 1, 0, 2]) * 2**-7 + 1
    np.testing.assert_array_equal(nearest[:10], np.concatenate([steps, -steps]))
    assert np.isnan(nearest[10]) and nearest[11] == np.inf and nearest[12] == -np.inf and nearest[15] == np.inf
    assert not np.signbit(nearest[13]) and np.signbit(nearest[14]) and nearest[16] == 0.0


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), (0.123, 0.456, 0.421)])
def test_the_average_of_equal_tensors_is_that_tensor(folders, tmp_path, weights):
    kind = next(
        name for name, dtype in DTYPES.items() if load_file(folders[0] / "model.safetensors")["large"].dtype == dtype
    )
    written = written_average([folders[0]] * 3, tmp_path / "out", kind, weights)
    if kind == "F64":  # a sum in the same dtype has nothing to spare
        torch.testing.assert_close(written["large"], load_file(folders[0] / "model.safetensors")["large"])
    else:
        for name, tensor in load_file(folders[0] / "model.safetensors").items():
            assert torch.equal(written[name], tensor)


@pytest.mark.parametrize(("threads", "chunk"), [(1, 1 << 16), (4, 777), (2, 64)])
def test_threads_and_chunks_change_no_bit(folders, tmp_path, threads, chunk):
    expected = written_average(folders, tmp_path / "expected", "F32")
    written = written_average(folders, tmp_path / "out", "F32", threads=threads, chunk=chunk)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_where_files_have_but_one_place_the_same_is_written(folders, tmp_path):
    """Where threads can't read a file at offsets of their own, as on Windows."""
    expected = written_average(folders, tmp_path / "expected", "F32")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "shared.written", *folders, tmp_path / "out"]
    subprocess.run(command, env=environment, check=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_a_file_is_laid_out_as_the_library_does_it(folders, tmp_path):
    written = written_average(folders, tmp_path / "out", "BF16")
    save_file(written, tmp_path / "again.safetensors", {"format": "pt"})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and sorted(file.keys()) == sorted(written)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (tmp_path / "again.safetensors").stat().st_size


def test_shards_have_an_index_and_hold_the_same(folders, tmp_path):
    whole, parts = (
        written_average(folders, tmp_path / "whole", "F32"),
        written_average(folders, tmp_path / "parts", "F32", max_shard_size=5000),
    )
    assert whole.keys() == parts.keys() and all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert len({*index["weight_map"].values()}) == len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}rest"])
def test_a_file_that_is_none_is_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole file of weights"), open_files(tmp_path):
        pass


def test_a_file_that_shrinks_while_it_is_read_is_named(folders, tmp_path):
    with open_files(folders[0]) as file, open(folders[0] / "model.safetensors", "r+b") as same:
        same.truncate(100)
        with pytest.raises(ValueError, match=r"0/model\.safetensors has become shorter"):
            average([file], [1.0], {name: tensor.dtype for name, tensor in file.items()}, lambda *_: None)


def test_what_a_sink_raises_ends_it_all(folders):
    seen = []

    def full(name, first, part):
        seen.append(name)
        time.sleep(0.01)
        raise OSError("No space left on device")

    with open_files(folders[0]) as file, pytest.raises(OSError, match="No space left"):
        average([file], [1.0], {name: tensor.dtype for name, tensor in file.items()}, full, chunk=10)
    assert len(seen) < 100  # of a thousand


def test_pickles_give_the_same(folders, tmp_path):
    expected = written_average(folders, tmp_path / "expected", "F32")
    for folder in folders:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    written = written_average(folders, tmp_path / "out", "F32", allow_pickle=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def numbers(folder: Path, **values: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    return folder


def average_of(*folders: Path, kind: str = "F32", **options) -> torch.Tensor:
    with ExitStack() as stack:
        files = [stack.enter_context(open_files(folder)) for folder in folders]
        content = bytearray(4 * len(files[0]["x"]))

        def keep(name, first, part):
            content[first : first + part.nbytes] = part.tobytes()

        ids = [folder.name for folder in folders]
        average(files, [1 / len(files)] * len(files), {"x": kind}, keep, ids=ids, **options)
    return torch.frombuffer(content, dtype=torch.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_one_of_them_is_named(tmp_path, value, recwarn):
    first = numbers(tmp_path / "one", x=torch.tensor([1.0, 2.0, 3.0]))
    second = numbers(tmp_path / "other", x=torch.tensor([1.0, value, 3.0]))
    with pytest.raises(ValueError, match=f"other: x has {value} at 1; an average with it is no number. Leave it out"):
        average_of(first, second)
    assert not recwarn.list


def test_infinite_numbers_that_all_have_stay(tmp_path):
    """Masks have such."""
    values = torch.tensor([-np.inf, 2.0, np.inf])
    folders = [numbers(tmp_path / name, x=values + step) for name, step in (("one", 0), ("other", 1))]
    assert average_of(*folders).tolist() == [-np.inf, 2.5, np.inf]


def test_large_numbers_are_numbers(tmp_path):
    """Of a chunk, the sum is infinite, and of no number."""
    values = torch.full((1000,), 3e38)
    folders = [numbers(tmp_path / name, x=values.clone()) for name in ("one", "other")]
    assert torch.equal(average_of(*folders), values)
    rounded = [numbers(tmp_path / f"rounded {name}", x=values.bfloat16()) for name in ("one", "other")]
    averaged = average_of(*rounded, kind="BF16").view(torch.bfloat16)[:1000]
    assert torch.equal(averaged, values.bfloat16())


def test_what_float16_can_not_hold_is_refused(tmp_path):
    folders = [numbers(tmp_path / name, x=torch.tensor([1.0, -1e6])) for name in ("one", "other")]
    with pytest.raises(ValueError, match=r"x has -1e\+06 in the average, more than a float16 holds; choose another"):
        average_of(*folders, kind="F16")


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    """As a run that still trains would: in place, of the same size."""
    folders = [numbers(tmp_path / name, x=torch.ones(3)) for name in ("one", "other")]

    def change(numbers: int) -> None:
        save_file({"x": torch.zeros(3)}, folders[1] / "model.safetensors")
        os.utime(folders[1] / "model.safetensors", ns=(0, 0))

    with pytest.raises(ValueError, match=r"other/model\.safetensors has changed while it was read: nothing was"):
        average_of(*folders, on_chunk=change)


def test_a_tensor_that_stands_in_two_shards_is_refused(tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, shard in enumerate(shards):
        save_file({"x": torch.full((2,), float(number))}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": shards[0], "y": shards[1]}})
    )
    with pytest.raises(ValueError, match="x stands in another file of"), open_files(tmp_path):
        pass
