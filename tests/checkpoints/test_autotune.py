"""What is measured of the machine decides as it should; the figures themselves are the machine's."""

import os

import pytest
import torch

from hf_radin.checkpoints import autotune
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


@pytest.mark.parametrize(("size", "count"), [("auto", None), ("off", 0), ("2GB", 2 * 10**9), (77, 77)])
def test_the_size_of_the_pixel_cache(size, count):
    assert cache.parse_size(size) == count


@pytest.mark.parametrize("size", ["many", "", "-1GB", -1, True])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="it is 'auto', 'off' or a size as in '20GB'"):
        cache.parse_size(size)
