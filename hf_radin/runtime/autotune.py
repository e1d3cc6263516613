"""What the machine can hold and how fast it is, measured: how many models at a time, how many images."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.runtime.processes import local_processes

if TYPE_CHECKING:
    import torch

# Of the memory that is free, what models may take; the rest is for blocks of images and for others.
SHARE = 0.8

# Images in a forward pass of a CPU, which is busy with these: more gain nothing there (benchmarks/logits.py), and with
# a fixed number every run gives the same last bits. An accelerator starts here.
BATCH_SIZE = 64

# A batch that is twice as large must be faster by so much, an image, to be preferred.
PAYS = 1.1


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take, of a GPU's or of its share of the machine's (or container's) memory."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        reclaimable = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        if limit != "max":
            free = min(free, int(limit) - int(used) + reclaimable)
    except (OSError, ValueError, StopIteration):  # no such group, or of another version
        pass
    return max(0, int(free)) // local_processes()


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes at its peak beyond what was there before; 0 if this system doesn't tell."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return 0


def models_that_fit(model: torch.nn.Module, run: Callable[[], object], device: torch.device, share: float = 1) -> int:
    """How many models of this size may be in the device's memory together, the one that is there included.

    Args:
        run: shows it a batch, to see what that takes; only one model runs at a time.
        share: how much of a whole batch that is.
    """
    work = int(peak_of(run, device) / share)
    return 1 + max(0, int((SHARE * free_memory(device) - work) // max(1, bytes_of(model))))


def bytes_of(model: torch.nn.Module) -> int:
    """What a model takes in memory; weights that it uses twice count once."""
    return sum({one.data_ptr(): one.nbytes for one in (*model.parameters(), *model.buffers())}.values())


def grow_batch(seconds: Callable[[int], float | None], *, start: int, most: int) -> int:
    """The number of images in a forward pass, doubled until it stops paying.

    Args:
        seconds: what a pass of so many images takes; None if they don't fit.
    """
    size, rate = start, 0.0
    while True:
        took = seconds(size)
        if took is None or size / took < PAYS * rate:
            return max(1, size // 2)
        rate = size / took
        if size >= most:
            return size
        size *= 2


def timed(run: Callable[[int], object]) -> Callable[[int], float | None]:
    """The seconds of a call with a number of images, at its second time; None if it runs out of memory."""
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
    """Processes on one machine share its cores: more threads than cores slow each other tenfold."""
    import torch

    if local_processes() > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes()))


def default_workers(device: torch.device) -> int:
    """Processes that decode while the models run: on a CPU these would take each other's cores."""
    if device.type == "cpu":
        return 0
    return max(1, min(8, (os.cpu_count() or 1) // local_processes() - 1))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
