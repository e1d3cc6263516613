"""One process and two give the same bank and the same soup, byte for byte."""

import pytest
from accelerate import Accelerator
from shared.launching import launch
from shared.timeless import contents
from shared.training import digit_images, image_dataset

import hf_radin
from hf_radin.runtime.processes import Processes


@pytest.fixture(scope="module")
def folders(runs, digits, tmp_path_factory):
    """Of a run in one process, and of the same run in two."""
    folders = [tmp_path_factory.mktemp(f"processes-{processes}") for processes in (1, 2)]
    for processes, folder in enumerate(folders, start=1):
        options = ["--models", f"{runs}/ft-*", "--dataset", digits, "--budget", "4", "--test-split", "test"]
        run = launch(folder, processes, *options)
        assert run.returncode == 0, run.stderr
        (folder / "stdout").write_text(run.stdout)
    return folders


def test_the_banks_are_equal(folders):
    single, double = (contents(folder / "cache") for folder in folders)
    assert single.keys() == double.keys() and len(single) > 20
    assert [name for name in single if single[name] != double[name]] == []


def test_the_soups_are_equal(folders):
    single, double = (contents(folder / "soup") for folder in folders)
    assert single == double and "model.safetensors" in single


def test_the_main_process_alone_speaks(folders):
    single, double = ((folder / "stdout").read_text() for folder in folders)
    assert single == double and single.count("\nbest single") == 1


def test_after_a_pilot_the_banks_and_the_soups_are_equal(runs, start, digits, tmp_path):
    """Six ingredients: the logits of most are of the images that tell recipes apart."""
    options = ["--models", f"{runs}/ft-*", start, "--dataset", digits, "--budget", "2", "--pilot", "0.25"]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run = launch(tmp_path / str(processes), processes, *options)
        assert run.returncode == 0, run.stderr
    single, double = (contents(tmp_path / str(processes) / "cache") for processes in (1, 2))
    assert single == double and sum(name.endswith("bank.json") for name in single) == 3
    assert contents(tmp_path / "1" / "soup") == contents(tmp_path / "2" / "soup")


def test_bad_input_ends_all_processes(runs, digits, tmp_path):
    run = launch(tmp_path, 2, "--models", f"{runs}/ft-*", "--dataset", digits, "--test-split", "dev")
    assert run.returncode != 0
    assert "has no split 'dev'; it has 'train', 'validation', 'test'" in run.stderr
    assert not (tmp_path / "soup").exists()


def test_an_unreadable_image_of_another_process_ends_them_all(runs, tmp_path):
    images, labels = digit_images(slice(700, 1300))
    broken = {"bytes": b"no image", "path": None}
    image_dataset([*images[:300], broken, *images[301:]], labels).to_parquet(tmp_path / "data" / "validation.parquet")
    run = launch(tmp_path, 2, "--models", f"{runs}/ft-*", "--dataset", "data")
    assert run.returncode != 0 and "Sample 300 of data" in run.stderr


def test_mixed_precision_is_what_the_launcher_says(runs, digits, tmp_path, monkeypatch):
    options = ["--models", f"{runs}/ft-*", "--dataset", digits, "--budget", "1"]
    assert launch(tmp_path, 1, *options, mixed_precision="bf16").returncode == 0
    (folder,) = (path.parent for path in tmp_path.glob("cache/banks/*/bank.json"))
    bank = hf_radin.LogitBank.open(folder)
    assert bank.manifest.run.mixed_precision == "bf16"
    exact = bank.logits(0).astype("float32")
    assert (exact.view("uint32") & 0xFFFF == 0).all()  # the head's outputs have the bits of bfloat16
    soup = hf_radin.uniform(bank)  # a run that was started without a word of it does as the bank does
    assert soup.report.mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="computed with mixed precision 'bf16', this run has 'no'"):
        hf_radin.greedy(bank)


def test_a_mixed_precision_is_named_by_an_accelerator_or_the_environment(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert Processes().precision is None and Processes().has_precision("bf16")
    named = Processes(Accelerator())
    assert named.precision == "no" and named.has_precision("no") and not named.has_precision("bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert Processes().precision == "no" and not Processes().has_precision("bf16")


def test_a_cpu_is_no_gpu():
    assert not Processes().is_on_gpu and not Processes().has_bfloat16


STREAM = """
import sys, datasets, hf_radin
models, data, _, cache = sys.argv[1:]
stream = datasets.load_dataset(data, split="validation").to_iterable_dataset().shuffle(buffer_size=600)
hf_radin.compute_logits(hf_radin.gather(models), stream, cache_dir=cache)
"""


def test_a_stream_that_each_process_sees_in_another_order_is_refused(runs, digits, tmp_path):
    (tmp_path / "stream.py").write_text(STREAM)
    run = launch(tmp_path, 2, f"{runs}/ft-[01]", digits, script=tmp_path / "stream.py")
    assert run.returncode != 0 and "in different orders. Shuffle it with a seed, or not at all." in run.stderr
    assert not list(tmp_path.glob("cache/banks/*/logits/*"))


ENDING = """
import atexit, os, torch.distributed as distributed
from pathlib import Path
from hf_radin.runtime.processes import Processes
place = Path(f"end-of-{os.environ['RANK']}")
# what is registered first runs last
atexit.register(lambda: place.write_text(f"{distributed.is_initialized()}, {len(os.listdir('/proc/self/task'))}"))
processes = Processes()
assert processes.smallest(processes.index + 5) == 5
"""


def test_a_script_that_says_nothing_at_its_end_is_disconnected(tmp_path):
    """An interpreter that ends while threads of gloo drop tensors, for which they need it, aborts now and then."""
    (tmp_path / "ending.py").write_text(ENDING)
    run = launch(tmp_path, 2, "models", "data", script=tmp_path / "ending.py")
    assert run.returncode == 0, run.stderr
    assert [path.read_text() for path in sorted(tmp_path.glob("end-of-*"))] == ["False, 1"] * 2


def test_a_process_that_was_launched_with_others_does_not_work_alone(monkeypatch):
    """As where the launcher meant GPUs that are not there."""
    Processes().check_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^2 processes were launched, accelerate knows of 1\. .*ACCELERATE_USE_CPU"):
        Processes().check_launch()
