"""How many models and images at a time suit this machine, by measuring its memory and speed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.runtime.processes import local_processes

if TYPE_CHECKING:
    import torch

# The share of free memory that models may take; blocks of images and other processes need the rest.
SHARE = 0.8

# Images in a forward pass on a CPU, where more gain nothing (benchmarks/logits.py), and with a fixed number every run
# gives the same last bits. On an accelerator the search starts here.
BATCH_SIZE = 64

# A batch of twice the size is preferred if it shows so many times the images a second.
PAYS = 1.1


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU's memory, or of its share of the machine's or container's."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current"))
        reclaimable = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text("utf-8").splitlines()
            if line.startswith("inactive_file ")
        )
        if limit != "max":
            free = min(free, int(limit) - int(used) + reclaimable)
    except (OSError, ValueError, StopIteration):  # no control group, or one of another version
        pass
    return max(0, int(free)) // local_processes()


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes at its peak beyond those taken before; 0 if this system doesn't tell."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return 0


def models_that_fit(model: torch.nn.Module, run: Callable[[], object], device: torch.device, share: float = 1) -> int:
    """How many models of this size fit into the device's memory together, including the one that is there.

    Args:
        run: shows the model a batch, to measure what that takes; only one model runs at a time.
        share: the share of a whole batch that `run` shows.
    """
    work = int(peak_of(run, device) / share)
    return count_models(bytes_of(model), free=free_memory(device), work=work)


def count_models(size: int, *, free: int, work: int) -> int:
    """How many models fit into memory together, including one that is there already. All arguments are in bytes.

    Args:
        size: of a model.
        free: memory that is left.
        work: what a forward pass needs beside the models.
    """
    return 1 + max(0, int((SHARE * free - work) // max(1, size)))


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes that a model takes in memory; weights that it uses twice count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def grow_batch(seconds: Callable[[int], float | None], *, start: int, most: int) -> int:
    """The number of images in a forward pass, doubled until it stops paying.

    Args:
        seconds: of a forward pass with so many images; None if they don't fit into memory.
        start: the first size that is tried.
        most: no larger size is tried.
    """
    size, rate = start, 0.0
    while True:
        duration = seconds(size)
        if duration is None or size / duration < PAYS * rate:
            return max(1, size // 2)
        rate = size / duration
        if size >= most:
            return size
        size *= 2


def timed(run: Callable[[int], object]) -> Callable[[int], float | None]:
    """The seconds that a call with a number of images takes the second time; None if it runs out of memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    def seconds(size: int) -> float | None:
        try:
            run(size)
            begun = time.perf_counter()
            run(size)
            return time.perf_counter() - begun
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            return None

    return seconds


def settle_threads() -> None:
    """Let torch use this process's share of the cores: more threads than cores slow each other tenfold."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = count_threads(cores)
    if threads is not None:
        torch.set_num_threads(threads)


def count_threads(cores: int) -> int | None:
    """How many threads each process of this machine should use; None if that is not for us to say.

    It is not where there is one process alone, or the user has set OMP_NUM_THREADS.
    """
    if local_processes() == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, cores // local_processes())


def most_workers(device: torch.device) -> int:
    """How many processes may decode while the models run: none on a CPU, where both would need the same cores."""
    if device.type == "cpu":
        return 0
    return max(1, (os.cpu_count() or 1) // local_processes() - 1)


def count_workers(decode_seconds: float, forward_seconds: float, *, most: int) -> int:
    """How many processes decode as fast as models run, so that these don't wait.

    Args:
        decode_seconds: that one process takes to decode and prepare an image.
        forward_seconds: of an image through all models that see it at once.
        most: there are no more of them.
    """
    return min(most, math.ceil(decode_seconds / max(forward_seconds, 1e-9)))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
