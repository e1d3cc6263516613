"""How many models and images at a time suit this machine, and which modes, by measuring its memory and speed."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.checkpoints.forward import Running
from hf_radin.images.pixels import Pixels
from hf_radin.runtime.processes import local_processes
from hf_radin.runtime.text import one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The share of free memory that models may take; blocks of images and other processes need the rest.
SHARE = 0.8

# Images in a forward pass on a CPU, where more gain nothing (benchmarks/logits.py), and with a fixed number every run
# gives the same last bits. On an accelerator the search starts here.
BATCH_SIZE = 64

# Bfloat16 and compilation are chosen only if they keep the predictions of so many images that are tried, at least.
AGREE = 0.99

# How many images are tried for that: at 0.99, predictions of two may differ.
TRIED = 256

# A job of fewer seconds is over before its models are compiled, so that nobody tries.
SHORT = 10

# How often a job compiles a model: for its first batch, and for batches of any other size.
COMPILATIONS = 2

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


@dataclass(frozen=True)
class Modes:
    """What makes models faster on a GPU: each changes the last bits of logits, and none is used on a CPU by itself.

    Args:
        mixed_precision: by accelerate's name of it.
        channels_last, torch_compile: see `compute_logits`.
    """

    mixed_precision: str = "no"
    channels_last: bool = False
    torch_compile: bool = False


def agree(logits: np.ndarray, expected: np.ndarray, *, multi_label: bool = False) -> bool:
    """Whether two ways to run a model predict the same of `AGREE` of the images or more.

    Args:
        logits, expected: `(images, classes)`. What is no finite number agrees with nothing.
        multi_label: whether an image agrees if each class is there by both or by neither; else its best class counts.
    """
    if not (len(expected) and np.isfinite(logits).all() and np.isfinite(expected).all()):
        return False
    if multi_label:
        same = ((logits > 0) == (expected > 0)).all(axis=1)
    else:
        same = logits.argmax(axis=1) == expected.argmax(axis=1)
    return float(same.mean()) >= AGREE


def choose_modes(
    models: Sequence[PreTrainedModel],
    inputs: Mapping[str, torch.Tensor | Pixels],
    running: Running,
    *,
    has_bfloat16: bool,
    batches: float,
    multi_label: bool = False,
) -> Modes:
    """The modes in which models run faster on a GPU, of those that keep what they predict.

    Convolutions run in `channels_last`. Bfloat16 is for models that agree with themselves in float32, each on these
    images (`agree`); compilation for models that agree so, too, if it saves a job more time than it takes.

    Args:
        models: some of those that run, with weights of float32; they are of no use afterwards.
        inputs: prepared images by name, `(images, ...)` each.
        running: where they run.
        has_bfloat16: whether the device computes in it.
        batches: of `BATCH_SIZE` images that the job shows to all its models together; 0 if that is not known.
    """
    exact = replace(
        running, batch_size=BATCH_SIZE, channels_last=has_convolutions(models[0]), compiled=False, mixed_precision="no"
    )
    ready = [exact.ready(model) for model in models]
    expected = exact.logits(ready, inputs)

    def keeps(answers: Sequence[np.ndarray]) -> bool:
        pairs = zip(answers, expected, strict=True)
        return all(agree(logits, exactly, multi_label=multi_label) for logits, exactly in pairs)

    chosen = exact
    if has_bfloat16 and keeps((mixed := replace(exact, mixed_precision="bf16")).logits(ready, inputs)):
        chosen = mixed
    is_compiled = bool(batches) and _compiling_pays(ready, inputs, chosen, batches, keeps)
    return Modes(str(chosen.mixed_precision), chosen.channels_last, is_compiled)


def _compiling_pays(
    models: Sequence[PreTrainedModel],
    inputs: Mapping[str, torch.Tensor | Pixels],
    running: Running,
    batches: float,
    keeps: Callable[[Sequence[np.ndarray]], bool],
) -> bool:
    """Whether a job of so many batches ends earlier with compiled models, and these keep what they predict."""
    compiled, batch = replace(running, compiled=True), {name: value[:BATCH_SIZE] for name, value in inputs.items()}
    plain_seconds = timed(lambda _: running.logits(models[:1], batch))(BATCH_SIZE)
    if plain_seconds is None or batches * plain_seconds < SHORT:
        return False
    try:
        ready = [compiled.ready(model) for model in models]
        begun = time.perf_counter()
        compiled.logits(ready[:1], batch)
        compiling = time.perf_counter() - begun
        seconds = timed(lambda _: compiled.logits(ready[:1], batch))(BATCH_SIZE)
        is_kept = keeps(compiled.logits(ready, inputs))
    except Exception as error:  # compilers fail in many ways, with models and on machines that have none
        logger.info("torch.compile is not used: it fails here (%s).", one_line(error))
        return False
    return seconds is not None and is_kept and saves(plain_seconds - seconds, batches=batches, compiling=compiling)


def saves(gain: float, *, batches: float, compiling: float) -> bool:
    """Whether so many batches, each of which is faster by a gain, save more than compiling takes. In seconds."""
    return batches * gain > COMPILATIONS * compiling


def has_convolutions(model: torch.nn.Module) -> bool:
    """Whether a model has layers that the memory format `channels_last` is for."""
    import torch

    return any(isinstance(module, torch.nn.Conv2d) for module in model.modules())


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
