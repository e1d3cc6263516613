"""On a GPU, models run as is fastest there if that keeps what they predict: decided once, and the user's word counts.

No test has a GPU. Here a CPU passes for one: what is decided, and what follows from that, is the same.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from shared.models import watched

import hf_radin
from hf_radin.checkpoints.autotune import Modes
from hf_radin.images.split import DataSource
from hf_radin.logits import compute, cost
from hf_radin.logits.manifest import RunOptions
from hf_radin.runtime.processes import Processes
from hf_radin.runtime.schema import write_sealed


class OnGpu(Processes):
    """Processes that take their CPU for a GPU with bfloat16."""

    is_on_gpu = True
    has_bfloat16 = True


def make(runs: Path, data: Path, cache: Path, processes: Processes | None = None, **options) -> hf_radin.LogitBank:
    """The bank of two fine-tunes, or of other `models`."""
    ingredients = hf_radin.gather(options.pop("models", f"{runs}/ft-[01]"))
    options = {"batch_size": 64, "models_in_memory": 2, **options}
    return compute.make_bank(
        ingredients, DataSource(data), RunOptions(cache_dir=cache, **options), processes or OnGpu()
    )


def decide(cache: Path, modes: Modes) -> None:
    """Let this be what was decided in a cache where something was."""
    (path,) = cache.glob("modes/*.json")
    write_sealed(path, modes, path.stem)


def modes_of(bank: hf_radin.LogitBank) -> Modes:
    run = bank.manifest.run
    return Modes(run.mixed_precision, run.channels_last, run.torch_compile)


@pytest.fixture(scope="module")
def decided(runs, digits, tmp_path_factory) -> tuple[Path, hf_radin.LogitBank]:
    """A cache in which bfloat16 was decided for, whatever a probe says, and a bank in it."""
    cache = tmp_path_factory.mktemp("decided")
    make(runs, digits, cache)
    decide(cache, Modes("bf16", channels_last=True))
    return cache, make(runs, digits, cache)


def test_on_a_cpu_nothing_is_chosen(runs, digits, tmp_path, model_calls):
    bank = make(runs, digits, tmp_path, Processes())
    assert modes_of(bank) == Modes() and not list(tmp_path.glob("modes/*"))
    assert model_calls == [1, 1, *[64] * 18, *[24] * 2]  # each is tried with an image, and no more


def test_a_model_that_has_convolutions_gets_channels_last_and_a_short_job_is_not_compiled(runs, digits, tmp_path):
    bank = make(runs, digits, tmp_path)
    modes = modes_of(bank)
    assert modes.channels_last and not modes.torch_compile and modes.mixed_precision in ("no", "bf16")
    assert len(list(tmp_path.glob("modes/*.json"))) == 1


def test_what_was_decided_stays_and_models_run_so(decided, runs, digits, model_calls):
    cache, bank = decided
    assert modes_of(bank) == Modes("bf16", channels_last=True)
    logits = np.array(bank.logits(0), np.float32)
    assert (logits.view("uint32") & 0xFFFF == 0).all()  # the bits of bfloat16
    again = make(runs, digits, cache)
    assert again.folder == bank.folder and not model_calls


def test_linear_probes_run_in_float32_in_which_their_soups_are_exact(runs, digits, tmp_path):
    """What was decided for other fine-tunes of that architecture does not count for them."""
    make(runs, digits, tmp_path)
    decide(tmp_path, Modes("bf16"))
    probe = tmp_path / "probe"
    shutil.copytree(runs / "ft-0", probe)
    weights = load_file(probe / "model.safetensors")
    head = next(name for name in weights if name.startswith("classifier") and name.endswith("weight"))
    save_file(weights | {head: weights[head] * 1.5}, probe / "model.safetensors", {"format": "pt"})
    probes = make(runs, digits, tmp_path, models=[runs / "ft-0", probe])
    assert modes_of(probes).mixed_precision == "no" and probes.with_exactness.exact
    assert len(list(tmp_path.glob("modes/*.json"))) == 2
    assert modes_of(make(runs, digits, tmp_path)).mixed_precision == "bf16"


def test_soups_and_other_splits_run_as_the_bank_does(decided, runs, digits):
    _, bank = decided
    opened = hf_radin.LogitBank.open(bank.folder)
    assert opened.options.settled(Modes()) == opened.options  # nothing is left to be chosen
    running = opened.passes().running
    assert (running.mixed_precision, running.channels_last, running.compiled) == ("bf16", True, False)
    soup = hf_radin.radin(opened, budget=1, test_split="test")
    assert soup.report.mixed_precision == "bf16"


def test_the_users_word_counts(decided, runs, digits):
    cache, _ = decided
    assert modes_of(make(runs, digits, cache, channels_last=False)) == Modes("bf16")
    assert modes_of(make(runs, digits, cache, OnGpu(Accelerator()))) == Modes("no", channels_last=True)
    bank = make(runs, digits, cache, dtype="bfloat16", channels_last=False, torch_compile=False)
    assert modes_of(bank) == Modes()  # weights of bfloat16 need no autocast


def test_a_bank_of_the_same_modes_is_the_same_bank(decided, runs, digits):
    """Whoever names what was decided computes nothing again."""
    cache, bank = decided
    named = make(runs, digits, cache, Processes(), channels_last=True, mixed_precision="bf16")
    assert named.folder == bank.folder


def test_another_mixed_precision_than_this_run_was_started_with_is_refused(runs, digits, tmp_path, model_calls):
    with pytest.raises(
        ValueError, match="'bf16': this run was started with 'no'; accelerate launch --mixed_precision"
    ):
        make(runs, digits, tmp_path, Processes(Accelerator()), mixed_precision="bf16")
    assert not model_calls


def test_what_can_not_be_tried_is_left_out_and_not_recorded(runs, digits, tmp_path, caplog):
    calls = []

    def fail(images: int) -> None:
        calls.append(images)
        if len(calls) == 1:
            raise RuntimeError("a kernel is missing")

    with watched(fail):
        bank = make(runs, digits, tmp_path)
    assert modes_of(bank) == Modes() and not list(tmp_path.glob("modes/*.json"))
    assert "Models run in plain float32: other ways can't be tried (a kernel is missing)." in caplog.text


def test_a_mixed_precision_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="mixed_precision='half': it is one of 'auto', 'no', 'bf16', 'fp16', 'fp8'"):
        RunOptions(mixed_precision="half")


def test_an_estimate_supposes_what_is_likely_and_says_so(runs, digits, tmp_path):
    ingredients, job = hf_radin.gather(f"{runs}/ft-[01]"), cost.JobSize()
    estimates = [
        cost.estimate_job(
            ingredients, DataSource(digits), RunOptions(cache_dir=tmp_path, batch_size=4), job, processes
        )
        for processes in (OnGpu(), Processes())
    ]
    assert [estimate.probe.dtype for estimate in estimates] == ["float32 (bf16 autocast)", "float32"]
    assert not list(tmp_path.glob("modes/*"))
