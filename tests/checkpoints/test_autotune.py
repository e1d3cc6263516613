"""What is measured of the machine decides as it should; the figures themselves are the machine's."""

import os
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from shared.models import LinearClassifier

from hf_radin.checkpoints import autotune
from hf_radin.checkpoints.autotune import Modes
from hf_radin.checkpoints.forward import Running
from hf_radin.images import cache

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({64: 100, 128: 200, 256: 400}, 256),  # pays to the end
        ({64: 100, 128: 150, 256: 160}, 128),  # a twentieth is not worth twice the memory
        ({64: 100, 128: 100}, 64),
        ({64: 100, 128: None}, 64),  # does not fit
        ({64: None}, 32),
    ],
)
def test_a_batch_grows_until_it_stops_paying(rates, chosen):
    def seconds(size):
        return None if rates[size] is None else size / rates[size]

    assert autotune.grow_batch(seconds, start=64, most=256) == chosen


def test_out_of_memory_is_told_from_a_mistake():
    def fail(error):
        def run(size):
            raise error

        return autotune.timed(run)

    assert fail(RuntimeError("CUDA out of memory."))(64) is None
    assert fail(RuntimeError("DefaultCPUAllocator: can't allocate memory"))(64) is None
    with pytest.raises(RuntimeError, match="shapes"):
        fail(RuntimeError("shapes"))(64)


def test_a_call_is_timed_once_it_is_warm():
    sizes = []
    assert autotune.timed(sizes.append)(64) >= 0 and sizes == [64, 64]


@pytest.mark.parametrize("processes", [1, 4, 10_000])
def test_images_are_decoded_beside_a_device_and_not_beside_a_cpu(monkeypatch, processes):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert autotune.most_workers(CPU) == 0
    assert 1 <= autotune.most_workers(torch.device("meta")) <= max(1, (os.cpu_count() or 1) // processes)


@pytest.mark.parametrize(
    ("decode_seconds", "forward_seconds", "workers"),
    [(0.004, 0.001, 4), (0.0041, 0.001, 5), (0.001, 0.1, 1), (1.0, 0.001, 7), (0.1, 0.0, 7)],
)
def test_as_many_processes_decode_as_keep_up_with_the_models(decode_seconds, forward_seconds, workers):
    assert autotune.count_workers(decode_seconds, forward_seconds, most=7) == workers
    assert autotune.count_workers(decode_seconds, forward_seconds, most=0) == 0


def test_as_many_models_as_fit_beside_a_batch():
    size = autotune.bytes_of(torch.nn.Linear(1000, 1000, bias=False))
    assert size == 4_000_000
    assert autotune.count_models(size, free=100_000_000, work=20_000_000) == 1 + int((0.8 * 100e6 - 20e6) // 4e6)
    assert autotune.count_models(size, free=1_000, work=20_000_000) == 1


def test_a_whole_batch_is_what_its_share_lets_expect():
    model = torch.nn.Linear(10, 10)

    def run():
        torch.ones(50_000_000).sum()

    assert autotune.models_that_fit(model, run, CPU) > 1
    assert autotune.models_that_fit(model, run, CPU, share=1e-6) == 1  # 200 TB


def test_the_peak_of_a_call_is_seen_though_all_of_it_is_freed():
    size = 200_000_000
    assert autotune.peak_of(lambda: torch.ones(size // 4).sum(), CPU) == pytest.approx(size, rel=0.2)


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    alone = autotune.free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert autotune.free_memory(CPU) == pytest.approx(alone / 4, rel=0.2)


def test_processes_do_not_take_more_threads_than_there_are_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert autotune.count_threads(8) is None  # the tests set OMP_NUM_THREADS: the user's word counts
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert autotune.count_threads(8) == 2 and autotune.count_threads(2) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert autotune.count_threads(8) is None


def test_torch_uses_the_threads_of_the_process(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    try:
        torch.set_num_threads(2)
        autotune.settle_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def logits_that_differ(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of 200 images in two classes, and others that predict differently for the first of them."""
    expected = np.tile(np.float32([1, -1]), (200, 1))
    logits = expected.copy()
    logits[:images] *= -1
    return logits, expected


@pytest.mark.parametrize(("images", "is_kept"), [(0, True), (2, True), (3, False)])
@pytest.mark.parametrize("multi_label", [True, False])
def test_models_agree_if_one_prediction_of_a_hundred_differs_at_most(images, is_kept, multi_label):
    assert autotune.agree(*logits_that_differ(images), multi_label=multi_label) is is_kept


def test_of_several_labels_each_counts_and_of_classes_the_best():
    logits, expected = np.float32([[3, 1, -1]]), np.float32([[3, -1, 1]])
    assert autotune.agree(logits, expected) and not autotune.agree(logits, expected, multi_label=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_agrees_with_nothing(value):
    logits, expected = logits_that_differ(0)
    logits[0, 0] = value
    assert not autotune.agree(logits, expected) and not autotune.agree(expected, logits)
    assert not autotune.agree(logits, logits) and not autotune.agree(expected[:0], expected[:0])


def test_compiling_has_to_save_what_it_takes_twice():
    assert autotune.saves(0.01, batches=1001, compiling=5)
    assert not autotune.saves(0.01, batches=999, compiling=5) and not autotune.saves(-1, batches=999, compiling=0)


class Compiled(LinearClassifier):
    """A classifier that is fast once it is compiled, and then as right as it is told to be.

    Args:
        seconds: that compiling takes.
        sign: of its logits afterwards.
    """

    def __init__(self, *, seconds: float = 0, sign: int = 1):
        super().__init__(torch.eye(4))
        self.seconds, self.sign, self.compiled = seconds, sign, False

    def compile(self) -> None:
        time.sleep(self.seconds)
        self.compiled = True

    def forward(self, pixel_values):
        time.sleep(0 if self.compiled else 0.02)
        output = super().forward(pixel_values)
        output.logits = output.logits * (self.sign if self.compiled else 1)
        return output


class NotCompiled(Compiled):
    """A classifier that can't be compiled."""

    def compile(self) -> None:
        raise RuntimeError("no C++ compiler")


def images_of_classes(margin: float) -> dict[str, torch.Tensor]:
    """256 images whose class has one more than the others by this margin, where the weights are the unit matrix."""
    return {"pixel_values": torch.ones(256, 4) + margin * torch.eye(4).repeat(64, 1)}


def chosen(*models, margin: float = 1.0, has_bfloat16: bool = True, batches: float = 0) -> Modes:
    """The modes of some models, each of which is to keep its predictions of images with this margin."""
    inputs, running = images_of_classes(margin), Running(Accelerator(), torch.float32, 64)
    return autotune.choose_modes(models, inputs, running, has_bfloat16=has_bfloat16, batches=batches)


def test_bfloat16_is_for_models_that_all_keep_their_predictions_and_devices_that_have_it():
    sure, unsure = LinearClassifier(torch.eye(4)), LinearClassifier(torch.ones(4, 4) + 1e-4 * torch.eye(4))
    assert chosen(sure).mixed_precision == "bf16"
    assert chosen(sure, has_bfloat16=False).mixed_precision == "no"
    assert chosen(sure, margin=1e-4).mixed_precision == chosen(sure, unsure).mixed_precision == "no"


def test_channels_last_is_for_convolutions():
    assert not chosen(LinearClassifier(torch.eye(4))).channels_last
    assert autotune.has_convolutions(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)))


@pytest.mark.parametrize(
    ("model", "batches", "pays"),
    [
        (Compiled(), 1e6, True),
        (Compiled(), 0, False),  # a stream that does not say how long it is
        (Compiled(), 100, False),  # over in two seconds
        (Compiled(sign=-1), 1e6, False),
        (NotCompiled(), 1e6, False),
    ],
)
def test_models_are_compiled_where_that_saves_time_and_changes_no_prediction(model, batches, pays):
    assert chosen(model, batches=batches).torch_compile is pays


@pytest.mark.parametrize(("size", "count"), [("auto", None), ("off", 0), ("2GB", 2 * 10**9), (77, 77)])
def test_the_size_of_the_pixel_cache(size, count):
    assert cache.parse_size(size) == count


@pytest.mark.parametrize("size", ["many", "", "-1GB", -1, True])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="it is 'auto', 'off' or a size as in '20GB'"):
        cache.parse_size(size)
