"""How fast this machine is with some models and images, and what they take in memory: measured on a few."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from hf_radin import modeling
from hf_radin.adapter import Running
from hf_radin.batchnorm import has_batchnorm
from hf_radin.decoding import Source, decode
from hf_radin.ingredients import Ingredient
from hf_radin.passes import choose_batch_size, models_at_once
from hf_radin.pixels import Inputs, join
from hf_radin.processes import smallest
from hf_radin.tuning import bytes_of

# Images of the split that are decoded and shown to a model, and for how many seconds at least it runs.
SHOWN, SECONDS = 32, 0.5


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Args:
        device, dtype: where the model ran, and its weights.
        batch_size: images in a forward pass.
        decode_seconds: of an image: decoded and prepared, by one process.
        forward_seconds: of an image through one model.
        image_bytes: of a prepared image.
        model_bytes: of a model in memory.
        fit: models that fit into memory together.
        has_batchnorm: whether soups need statistics of their own.
    """

    device: str
    dtype: str
    batch_size: int
    decode_seconds: float
    forward_seconds: float
    image_bytes: int
    model_bytes: int
    fit: int
    has_batchnorm: bool


def probe(source: Source, ingredient: Ingredient, running: Running, batch_size: int | str) -> Probe:
    """Decode the first images of a split and run a model like the ingredient; its weights are not read.

    Args:
        batch_size: as in `compute_logits`; it goes before that of `running`.

    Raises:
        ValueError: if none of these images can be read.
    """
    import torch

    decode_seconds, shown = _decode_some(source)
    model = running.ready(modeling.random_model(ingredient.config, trust_remote_code=ingredient.trust_remote_code))
    example = {name: value[:1].to(torch.device("cpu"))[0] for name, value in shown.items()}
    size = choose_batch_size(ingredient, running, example, model) if batch_size == "auto" else int(batch_size)
    running = replace(running, batch_size=size)
    fit = smallest(models_at_once(model, example, running))
    batch = _repeat(shown, min(size, source.size))  # the first pass is behind us, which is slower than the others
    return Probe(
        device=running.accelerator.device.type,
        dtype=str(running.dtype).removeprefix("torch."),
        batch_size=size,
        decode_seconds=decode_seconds,
        forward_seconds=_seconds(lambda: running.logits([model], batch)) / min(size, source.size),
        image_bytes=sum(one[:1].nbytes for one in shown.values()),
        model_bytes=bytes_of(model),
        fit=fit,
        has_batchnorm=has_batchnorm(model),
    )


def _decode_some(source: Source) -> tuple[float, Inputs]:
    """Seconds to decode and prepare an image of the split, and its first images prepared."""
    rows = list(source.split.rows.take(SHOWN))
    decode(source, (0, 0), rows[:1])  # the first call finds the tables, and loads what reads such files
    begun = time.perf_counter()
    inputs = decode(source, (0, 0), rows).inputs
    seconds = time.perf_counter() - begun
    if not inputs:
        split = source.split
        raise ValueError(f"None of the first {len(rows)} images of {split.name}, split {split.split!r}, can be read.")
    return seconds / len(rows), inputs


def _repeat(inputs: Inputs, size: int) -> Inputs:
    """A batch of so many images."""
    have = len(next(iter(inputs.values())))
    whole = join([inputs] * math.ceil(size / have))
    return {name: value[:size] for name, value in whole.items()}


def _seconds(run: Callable[[], object]) -> float:
    """Of a call, the mean of those that fill half a second, or of one."""
    count, begun = 0, time.perf_counter()
    while not count or time.perf_counter() - begun < SECONDS:
        run()
        count += 1
    return (time.perf_counter() - begun) / count
