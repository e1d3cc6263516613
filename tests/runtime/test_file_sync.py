"""Two machines, with one disk or two, make the bank and the soup of one process, byte for byte."""

import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from shared.launching import EXAMPLE, WITNESS, free_port, launch
from shared.timeless import contents


def launch_on_two(
    folders: list[Path], caches: list[Path], *options: object, script: Path = EXAMPLE
) -> list[subprocess.CompletedProcess[str]]:
    """`accelerate launch` twice at once, as on two machines that know each other by an address and a port."""
    port, runs = free_port(), []
    for rank, (folder, cache) in enumerate(zip(folders, caches, strict=True)):
        (folder / "witness.py").write_text(WITNESS)
        command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 2, "--machine_rank", rank]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_processes", 2]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1]
        command += ["witness.py", script, *options, "--cache-dir", cache]
        runs.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=folder,
                env=os.environ | {"ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [run.communicate(timeout=300) for run in runs]
    for rank, folder in enumerate(folders):
        assert (folder / f"process-{rank}-of-2").exists(), outputs
    return [
        subprocess.CompletedProcess(run.args, run.returncode, *texts) for run, texts in zip(runs, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def options(runs, nets, digits) -> dict[str, list[object]]:
    common = ["--dataset", digits, "--budget", "2", "--test-split", "test"]
    return {
        "vit": ["--models", f"{runs}/ft-*", *common],
        "resnet": ["--models", f"{nets}/ft-*", *common, "--batchnorm-images", "128"],
    }


@pytest.fixture(scope="module")
def expected(options, tmp_path_factory) -> dict[str, Path]:
    """The folders of runs in one process."""
    folders = {name: tmp_path_factory.mktemp(name) for name in options}
    for name, folder in folders.items():
        run = launch(folder, 1, *options[name])
        assert run.returncode == 0, run.stderr
    return folders


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_machines_with_a_disk_each_collect_what_they_computed(options, expected, folders, kind):
    runs = launch_on_two(folders, [folder / "cache" for folder in folders], *options[kind])
    assert [run.returncode for run in runs] == [0, 0], runs
    whole = contents(expected[kind] / "cache")
    caches = [contents(folder / "cache") for folder in folders]
    for machine, cache in enumerate(caches):
        banks = {name for name in whole if re.match(r"banks/(?!.*(/soups/|/features/|\.lock))", name)}
        assert banks and banks <= cache.keys()
        assert not cache.keys() - whole.keys()
        # logits of soups may differ in their last bits, where images are few and threads are not as many
        logits = {name for name in cache if re.fullmatch(r".*/soups/\w+-\w+\.npy", name)}
        assert [name for name in cache if cache[name] != whole[name] and name not in logits] == []
        for name in logits:
            values, expected_values = (np.load(BytesIO(files[name])) for files in (cache, whole))
            np.testing.assert_allclose(values, expected_values, atol=1e-5)
        # the first process alone reads which images soups get right, and the head that theirs took the place of; what
        # a soup gives for the whole split is put together on each disk
        of_main = {name for name in whole if re.fullmatch(r".*/soups/\w+\.npz|.*/features/\w+/layer.npz", name)}
        assert of_main and of_main & cache.keys() == (of_main if machine == 0 else set())
        of_all = {name for name in whole if re.fullmatch(r".*/soups/\w+-features\.(npy|json)", name)}
        assert of_all and of_all <= cache.keys()
    pixels = [{name for name in cache if name.startswith("pixels/") and "safetensors" in name} for cache in caches]
    assert pixels[0] | pixels[1] == {name for name in whole if name.startswith("pixels/") and "safetensors" in name}
    assert pixels[0] != pixels[1]  # each machine prepares images of its own
    assert contents(folders[0] / "soup") == contents(expected[kind] / "soup")
    assert not (folders[1] / "soup").exists() and runs[1].stdout == ""


def test_machines_with_a_shared_folder_make_the_same(options, expected, folders, tmp_path):
    runs = launch_on_two(folders, [tmp_path / "cache"] * 2, *options["vit"])
    assert [run.returncode for run in runs] == [0, 0], runs
    assert contents(tmp_path / "cache") == contents(expected["vit"] / "cache")
    assert contents(folders[0] / "soup") == contents(expected["vit"] / "soup")


def test_what_one_machine_has_already_is_not_computed_again(options, expected, folders):
    """The second machine comes with the bank of an earlier run; the first gets it and runs no model but soups."""
    earlier = expected["vit"] / "cache"
    (folders[1] / "cache").symlink_to(earlier)
    runs = launch_on_two(folders, [folder / "cache" for folder in folders], *options["vit"])
    assert [run.returncode for run in runs] == [0, 0], runs
    assert contents(folders[0] / "soup") == contents(expected["vit"] / "soup")
    assert re.findall(r"Logits of 5 checkpoints on the split '(\w+)' .*: (\d+) to compute", runs[0].stderr) == [
        ("validation", "0"),
        ("test", "0"),
    ]
    records = {path.relative_to(earlier): path.read_bytes() for path in earlier.glob("banks/*/logits/*.json")}
    assert len(records) == 10
    for path, record in records.items():  # with the seconds that the earlier run took
        assert (folders[0] / "cache" / path).read_bytes() == record
