"""Passes over the images: as many models as fit see each block, and each process keeps its part of their logits."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints.files import as_dtype
from hf_radin.checkpoints.forward import Running, forward
from hf_radin.images.cache import BLOCK, Images, parse_size
from hf_radin.images.pixels import Inputs, select
from hf_radin.images.sample import Chosen, Pilot
from hf_radin.images.shards import Block
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import (
    Target,
    Told,
    join_parts,
    read_about,
    remove_broken_parts,
    target_of,
    write_part,
    write_record,
)
from hf_radin.runtime.autotune import BATCH_SIZE, default_workers, grow_batch, models_that_fit, timed
from hf_radin.runtime.file_sync import on_each_disk, share
from hf_radin.runtime.processes import device_name, on_main_process, progress_bar, smallest
from hf_radin.runtime.tracking import count_images, log

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Of a batch, so many images show on a CPU what the whole takes, in a fraction of its time.
SHOWN = 8

# Seconds between two lines of a log, where there is no bar.
PAUSE = 60

# Seconds of work after which a process keeps what it has, and so what a killed run loses at most: where a block takes
# all models longer, it is shown to some after others. One model's logits of one block are not divided.
LOST = 5.0


@dataclass(frozen=True)
class Passes:
    """How images go by.

    Args:
        running: how models run.
        models_in_memory: how many at a time, or `auto`.
        pixel_cache: how much of the prepared images is kept: `auto`, `off` or a size.
        workers: processes that decode beside this one, or `auto`.
        pilot: which images the models see; all by default.
        example: an image of the split, prepared, to see what a model takes.
    """

    running: Running
    models_in_memory: int | str = "auto"
    pixel_cache: int | str = "auto"
    workers: int | str = "auto"
    pilot: Pilot | Chosen | None = None
    example: Mapping[str, torch.Tensor] | None = None

    def stream(
        self, images: Images, wanted: Callable[[Block], bool] = lambda block: True
    ) -> Iterator[tuple[Block, Inputs]]:
        """This process's blocks and their inputs. All processes call this at the same point."""
        accelerator = self.running.accelerator
        world = accelerator.num_processes
        room = on_main_process(lambda: images.room(parse_size(self.pixel_cache))) // world
        workers = default_workers(accelerator.device) if self.workers == "auto" else int(self.workers)
        return images.stream(accelerator.process_index, world, wanted=wanted, room=room, workers=workers)


@dataclass
class _Meter:
    """Tells the bar, the trackers and, where there is no terminal, the log how many predictions were made.

    Args:
        total: of all models, if that is known.
        earlier: those of them that an earlier run made.
    """

    bar: Any
    total: int | None
    earlier: int
    begun: float
    seen: int = 0
    said: float = 0.0

    def update(self, predictions: int) -> None:
        self.bar.update(predictions)
        self.seen += predictions
        spent = time.perf_counter() - self.begun
        rate = self.seen / spent
        if self.bar.disable and spent > self.said + PAUSE:
            self.said, there = spent, self.earlier + self.seen
            of = "" if self.total is None else f" of {self.total:,}, {(self.total - there) / rate:,.0f} s left"
            logger.info("%s predictions%s (%.0f a second).", f"{there:,}", of, rate)
        log({"logits/images per second": rate}, images=predictions)


def as_computed(bank: LogitBank, accelerator: Accelerator) -> Passes:
    """As the logits of a bank were computed: a soup is compared with its ingredients under the same conditions.

    Raises:
        ValueError: if this run's mixed precision is another one.
    """
    about = bank.about
    if accelerator.mixed_precision != about["mixed_precision"]:
        raise ValueError(
            f"The logits in {bank.folder} were computed with mixed precision {about['mixed_precision']!r}, this run "
            f"has {accelerator.mixed_precision!r}; a soup is compared with its ingredients under one and the same."
        )
    running = Running(
        accelerator, as_dtype(about["dtype"]), about["batch_size"], about["channels_last"], about["compiled"]
    )
    return Passes(
        running, pixel_cache=bank.request.get("pixel_cache", "auto"), workers=bank.request.get("workers", "auto")
    )


def compute(
    folder: Path,
    dtype: str,
    images: Images,
    ingredients: Ingredients,
    passes: Passes,
    *,
    samples: int | None,
    finished: int,
    found: Callable[[], None],
) -> None:
    """Compute the logits of some ingredients: in groups that fit into memory, with one barrier a group.

    What an earlier run left unfinished is used, prediction by prediction, and bar and log begin there.

    Args:
        folder: of the bank.
        dtype: of the logits as they are kept.
        samples: that each model is shown, as far as that is known before they were.
        finished: how many other ingredients have all their logits.
        found: is called by one process of each disk when all images were seen.
    """
    accelerator = passes.running.accelerator
    left, at_once = list(ingredients), passes.models_in_memory
    models_in_all = finished + len(left)
    if (folder / "bank.json").exists():
        samples = int(read_about(folder)["rows"])
    total = None if samples is None else samples * models_in_all
    everyone = [target_of(folder, one) for one in left]
    on_each_disk(folder, lambda: remove_broken_parts(everyone))
    accelerator.wait_for_everyone()
    earlier = on_main_process(lambda: finished * (samples or 0) + _count_earlier(everyone, images, passes.pilot))
    if left and earlier:
        of = "" if total is None else f" of {total:,} ({earlier / total:.0%})"
        logger.info("%s%s predictions are there from earlier: going on from these.", f"{earlier:,}", of)
    count_images(earlier)
    with progress_bar(total=total, initial=earlier, desc="Logits", unit="prediction") as bar:
        meter = _Meter(bar, total, earlier, time.perf_counter())
        while left:
            models = [passes.running.ready(left[0].load_model(passes.running.dtype))]
            if at_once == "auto":
                at_once = smallest(models_at_once(models[0], passes.example, passes.running))
            group = left[: int(at_once)]
            left = left[len(group) :]
            models += [passes.running.ready(one.load_model(passes.running.dtype)) for one in group[1:]]
            last = models_in_all - len(left)
            bar.set_postfix_str(f"models {last - len(group) + 1} to {last} of {models_in_all}")
            targets = [target_of(folder, one) for one in group]
            _run_group(targets, dtype, images, models, passes, meter)
            del models
            accelerator.wait_for_everyone()
            share(images.folder, "*.json")
            share(folder, *(f"{one.parts.relative_to(folder)}/*.npz" for one in targets))
            on_each_disk(folder, partial(_join_group, folder, dtype, images, group, found, device_name(accelerator)))
            accelerator.wait_for_everyone()


def choose_batch_size(
    ingredient: Ingredient,
    running: Running,
    example: Mapping[str, torch.Tensor] | None,
    model: PreTrainedModel | None = None,
) -> int:
    """The `auto` batch size: on an accelerator it grows as long as that pays.

    Args:
        example: an image of the split, prepared.
        model: ready to run, if there is one like the ingredient's already.
    """
    if running.accelerator.device.type == "cpu" or example is None:
        return BATCH_SIZE
    model = running.ready(ingredient.load_model(running.dtype)) if model is None else model

    def run(size: int) -> object:
        return forward([model], _repeated(example, size), batch_size=size, accelerator=running.accelerator)

    return grow_batch(timed(run), start=BATCH_SIZE, most=BLOCK)


def models_at_once(model: PreTrainedModel, example: Mapping[str, torch.Tensor] | None, running: Running) -> int:
    """How many models fit, by what this one takes with a batch of copies of an image of the split, prepared."""
    if example is None:
        return 1
    device, size = running.accelerator.device, min(running.batch_size, BLOCK)
    shown = min(size, SHOWN) if device.type == "cpu" else size
    inputs = _repeated(example, shown)
    return models_that_fit(model, lambda: running.logits([model], inputs), device, shown / size)


def _repeated(example: Mapping[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    return {name: value[None].expand(size, *value.shape) for name, value in example.items()}


def compute_soup(
    target: Target, dtype: str, images: Images, make_model: Callable[[], PreTrainedModel], passes: Passes, samples: int
) -> tuple[float, str]:
    """The logits of one model, a soup, on all images; what an earlier run left of them is used.

    Args:
        dtype: of the logits as they are kept.
        make_model: is called if some are missing.
        samples: in the split.

    Returns:
        the seconds that devices took for them, and which.
    """
    accelerator, folder = passes.running.accelerator, target.path.parent
    on_each_disk(folder, lambda: remove_broken_parts([target]))
    accelerator.wait_for_everyone()
    earlier = on_main_process(lambda: _count_earlier([target], images, None))
    if earlier < samples:
        count_images(earlier)
        with progress_bar(total=samples, initial=earlier, desc=target.name, unit="image") as bar:
            meter = _Meter(bar, samples, earlier, time.perf_counter())
            _run_group([target], dtype, images, [passes.running.ready(make_model())], passes, meter)
    accelerator.wait_for_everyone()
    share(images.folder, "*.json")
    share(folder, f"{target.parts.name}/*.npz")
    device = device_name(accelerator)
    found: list[float] = []

    def join() -> None:
        images.check_order()
        found.append(join_parts(target, images.blocks, samples, dtype)[1])
        shutil.rmtree(target.parts)

    on_each_disk(folder, join)
    accelerator.wait_for_everyone()
    return on_main_process(lambda: found[0]), device


def _run_group(
    targets: list[Target],
    dtype: str,
    images: Images,
    models: list[PreTrainedModel],
    passes: Passes,
    meter: _Meter,
) -> None:
    """Show this process's blocks to those models that have not seen them."""

    def missing(block: Block) -> list[int]:
        return [place for place, target in enumerate(targets) if not target.part(block).exists()]

    at_once, begun = 1, time.perf_counter()
    for block, inputs in passes.stream(images, lambda block: bool(missing(block))):
        todo = missing(block)
        if inputs and passes.pilot:
            rows = passes.pilot.rows(block, len(next(iter(inputs.values()))))
            inputs = select(inputs, rows) if len(rows) else {}
        preparing = (time.perf_counter() - begun) / len(todo)
        while todo:
            places, todo = todo[:at_once], todo[at_once:]
            begun = time.perf_counter()
            try:
                logits = _logits(
                    passes.running, [targets[place] for place in places], [models[place] for place in places], inputs
                )
            except Exception as error:  # each architecture fails in its own way on images that it does not take
                if (difference := _other_shape(inputs, passes.example)) is None:
                    raise
                raise ValueError(
                    f"Of the images from number {block[1] * images.size} of shard {block[0]} on the image processor "
                    f"makes {difference}. The models don't take both: name an image processor that resizes or crops "
                    f"to one size with image_processor=... (--image-processor ID). ({error})"
                ) from error
            seconds = (time.perf_counter() - begun) / len(places)
            for place, part in zip(places, logits, strict=True):
                with np.errstate(
                    over="ignore"
                ):  # what is too large for float16 is found when the parts are put together
                    write_part(targets[place].part(block), part.astype(dtype), preparing + seconds)
            if len(logits[0]):
                meter.update(len(logits[0]) * len(places) * passes.running.accelerator.num_processes)
            at_once = max(1, int(LOST / max(seconds, 1e-6)))
        begun = time.perf_counter()


def _other_shape(inputs: Inputs, example: Mapping[str, torch.Tensor] | None) -> str | None:
    """How prepared images differ in shape from the one that models were tried with, in words; None if they don't."""
    for name, value in (example or {}).items():
        shape = tuple(inputs[name][:1].to(value.device).shape[1:]) if name in inputs else None
        if shape is not None and shape != tuple(value.shape):
            return f"{name} of the shape {shape}, and of those that the models were tried with {tuple(value.shape)}"
    return None


def _logits(
    running: Running, targets: list[Target], models: list[PreTrainedModel], inputs: Inputs
) -> list[np.ndarray]:
    """Of each model, float32 `(samples, classes)`; of no inputs there are none.

    Raises:
        ValueError: if a model has another number of classes than its configuration names.
    """
    if not inputs:
        return [np.zeros((0, target.classes), np.float32) for target in targets]
    logits = running.logits(models, inputs)
    for target, found in zip(targets, logits, strict=True):
        if found.shape[1] != target.classes:
            raise ValueError(f"{target.name} gives {found.shape[1]} logits, but its id2label names {target.classes}.")
    return logits


def _count_earlier(targets: list[Target], images: Images, pilot: Pilot | Chosen | None) -> int:
    """How many predictions an earlier run, which did not come to its end, has left of these models."""
    counts = images.counts()
    shown = {block: len(pilot.rows(block, count)) if pilot else count for block, count in counts.items()}
    return sum(
        count
        for target in targets
        if target.parts.is_dir()
        for block, count in shown.items()
        if target.part(block).exists()
    )


def _join_group(
    folder: Path, dtype: str, images: Images, group: list[Ingredient], found: Callable[[], None], device: str
) -> None:
    """Put together what the processes have computed, each on such a device."""
    try:
        images.check_order()
    except ValueError:  # of rows in two orders, logits are worth nothing
        for one in group:
            shutil.rmtree(target_of(folder, one).parts, ignore_errors=True)
        raise
    found()
    for one in group:
        target = target_of(folder, one)
        finite, seconds = join_parts(target, images.blocks, read_about(folder)["rows"], dtype)
        told = Told(finite) if math.isnan(seconds) else Told(finite, round(seconds, 3), device)
        write_record(folder, one, told)
        shutil.rmtree(target.parts)  # last: without a record they are all that is known
