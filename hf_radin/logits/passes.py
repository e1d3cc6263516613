"""Passes over the images: as many models as fit see each block, and each process writes its part of their logits."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints.autotune import (
    BATCH_SIZE,
    bytes_of,
    count_workers,
    grow_batch,
    models_that_fit,
    most_workers,
    timed,
)
from hf_radin.checkpoints.forward import LEARNT, Running
from hf_radin.images.cache import BLOCK, Images, parse_size
from hf_radin.images.decode import time_decoding
from hf_radin.images.pixels import Inputs, count_images, select
from hf_radin.images.sample import Chosen, Pilot
from hf_radin.images.shards import Block
from hf_radin.ingredients.ingredient import Ingredient, IngredientRecord, Ingredients
from hf_radin.logits.bank_files import (
    LogitsRecord,
    Pace,
    SoupRecord,
    Target,
    join_parts,
    not_as_written,
    open_array,
    remove_broken_parts,
    target_of,
    write_part,
)
from hf_radin.logits.manifest import BANK, LOG_EVERY, WRITE_EVERY, BankManifest
from hf_radin.runtime import liveness
from hf_radin.runtime.files import Checks, take_away
from hf_radin.runtime.processes import Processes, progress_bar
from hf_radin.runtime.schema import MADE_ANEW, known_record, read_sealed, write_sealed
from hf_radin.runtime.text import one_line
from hf_radin.sharing.digests import TensorDigests
from hf_radin.sharing.memory import count_together, held_once, sizes_of
from hf_radin.sharing.replay import SharedModules
from hf_radin.tail.choose import made_batch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Images of a batch that show on a CPU what the whole batch takes, in a fraction of its time.
SHOWN = 8


@dataclass(frozen=True)
class Passes:
    """How images go through models.

    Args:
        processes: that share the work.
        running: how models run.
        logits_dtype: of the logits as they are written.
        models_in_memory: how many at a time, or `auto`.
        pixel_cache: how much of the prepared images is written to disk: `auto`, `off` or a size.
        workers: processes that decode beside each that runs models, or `auto`.
        sample: which images the models see; all by default.
        example: an image of the split, prepared, to see what a model takes.
        write_every: seconds of work after which a process writes what it has.
        log_every: seconds between two lines of a log, where there is no bar.
    """

    processes: Processes
    running: Running
    logits_dtype: str = "float32"
    models_in_memory: int | str = "auto"
    pixel_cache: int | str = "auto"
    workers: int | str = "auto"
    sample: Pilot | Chosen | None = None
    example: Mapping[str, torch.Tensor] | None = None
    write_every: float = WRITE_EVERY
    log_every: float = LOG_EVERY

    def stream(
        self,
        images: Images,
        wanted: Callable[[Block], bool] = lambda block: True,
        show: Callable[[Inputs], object] | None = None,
    ) -> Iterator[tuple[Block, Inputs]]:
        """This process's blocks and their inputs. All processes call this at the same point.

        Args:
            show: shows inputs to the models that see them; None if none do.
        """
        processes, room = self.processes, self.room(images)
        workers = 0 if images.is_cached() else self._count_workers(images, show)
        return images.stream(processes.index, processes.count, wanted=wanted, room=room, workers=workers)

    def room(self, images: Images) -> int:
        """Bytes that this process may add to the pixel cache. All processes call this at the same point."""
        limit = parse_size(self.pixel_cache)
        return self.processes.decide(lambda: images.room(limit)) // self.processes.count

    def _count_workers(self, images: Images, show: Callable[[Inputs], object] | None) -> int:
        """How many processes decode: what was asked for, or as many as keep up with the models, by a probe of both."""
        if self.workers != "auto":
            return int(self.workers)
        most = most_workers(self.processes.device)
        if most < 2 or show is None or self.example is None:
            return most
        decode_seconds, shown = time_decoding(images.source(), SHOWN)
        inputs: Inputs = {**repeated(self.example, self.running.batch_size)}
        forward_seconds = timed(lambda size: show(inputs))(self.running.batch_size)
        if not shown or forward_seconds is None:
            return most
        return count_workers(decode_seconds, forward_seconds / self.running.batch_size, most=most)

    def models_at_once(self, model: PreTrainedModel) -> int:
        """How many models see each image while it is there: what was asked for, or as many as fit on every device."""
        if self.models_in_memory != "auto":
            return int(self.models_in_memory)
        return self.processes.smallest(models_at_once(model, self.example, self.running))

    def count_group(
        self, digests: Sequence[TensorDigests], model: PreTrainedModel, at_once: int, *, recorded: int = 0
    ) -> int:
        """How many of the models to come see each image together, where tensors that are the same are held once.

        Args:
            digests: of these models, in order.
            model: the first of them.
            at_once: how many would if they had nothing in common.
            recorded: bytes of what modules give that is kept for other models (`recorded_bytes`).
        """
        if self.models_in_memory != "auto" or self.running.compiled:
            return min(at_once, len(digests))
        return count_together(digests, sizes_of(model), room=at_once * bytes_of(model) - recorded)

    def recorded_bytes(self, shared: SharedModules | None) -> int:
        """Bytes of what modules give for a batch that is kept for other models."""
        return 0 if shared is None else math.ceil(shared.held * min(self.running.batch_size, BLOCK) / LEARNT)

    def shared_modules(
        self, models: Sequence[PreTrainedModel], digests: Sequence[TensorDigests]
    ) -> SharedModules | None:
        """What models have in common, if to run that once saves anything; what is compiled runs as a whole."""
        if self.running.compiled or self.example is None:
            return None
        shared = SharedModules(models, digests)
        if not shared.may_save:
            return None
        if not self.running.learn(shared, made_batch(self.example, models[0].main_input_name, LEARNT + 1)):
            return None
        return shared


@dataclass
class _Meter:
    """Tells the bar, the trackers and, where there is no terminal, the log how many predictions were made.

    Args:
        total: of all models, if that is known.
        earlier: those of them that an earlier run made.
        log_every: seconds between two lines of the log.
    """

    bar: Any
    processes: Processes
    total: int | None
    earlier: int
    begun: float
    log_every: float
    made: int = 0
    logged: float = 0.0

    def update(self, predictions: int) -> None:
        """Count predictions that all processes have just made."""
        self.bar.update(predictions)
        self.made += predictions
        seconds = time.perf_counter() - self.begun
        rate = self.made / seconds
        if self.bar.disable and seconds > self.logged + self.log_every:
            self.logged, done = seconds, self.earlier + self.made
            of = "" if self.total is None else f" of {self.total:,}, {(self.total - done) / rate:,.0f} s left"
            logger.info("%s predictions%s (%.0f a second).", f"{done:,}", of, rate)
        self.processes.log({"logits/images per second": rate}, images=predictions)


def compute(
    folder: Path,
    images: Images,
    ingredients: Ingredients,
    passes: Passes,
    *,
    digests: Mapping[str, TensorDigests],
    samples: int | None,
    finished: int,
    write_index: Callable[[], None],
) -> None:
    """Compute the logits of ingredients: in groups that fit into memory, with one barrier a group.

    What models of a group have in common is run once (see `replay`). What an earlier run left unfinished is used,
    prediction by prediction, and bar and log begin there.

    Args:
        folder: of the bank.
        digests: of the tensors of each ingredient, by its id.
        samples: that each model is shown, as far as that is known before they were.
        finished: how many other ingredients have all their logits.
        write_index: writes the bank's manifest, labels and ids, when all images were seen; one process of each disk
            calls it.
    """
    # those that have much in common next to each other, so that they are in one group
    processes, waiting = passes.processes, sorted(ingredients, key=lambda ingredient: digests[ingredient.id].order)
    if (folder / BANK).exists():
        samples = BankManifest.read(folder).rows
    models_in_all = finished + len(waiting)
    total = None if samples is None else samples * models_in_all
    all_targets = [target_of(folder, ingredient) for ingredient in waiting]
    processes.on_each_disk(folder, lambda: remove_broken_parts(all_targets))
    processes.wait()
    earlier = processes.decide(lambda: finished * (samples or 0) + _count_earlier(all_targets, images, passes.sample))
    if waiting and earlier:
        of = "" if total is None else f" of {total:,} ({earlier / total:.0%})"
        logger.info("Continuing after %s%s predictions of an earlier run.", f"{earlier:,}", of)
    processes.count_images(earlier)
    room = Room()
    with progress_bar(total=total, initial=earlier, desc="Logits", unit="prediction") as bar:
        meter = _Meter(bar, processes, total, earlier, time.perf_counter(), passes.log_every)
        while waiting:
            models, shared = load_together(waiting, digests, passes, room)
            group, waiting = waiting[: len(models)], waiting[len(models) :]
            last = models_in_all - len(waiting)
            bar.set_postfix_str(f"models {last - len(group) + 1} to {last} of {models_in_all}")
            targets = [target_of(folder, ingredient) for ingredient in group]
            _run_group(_Group(targets, models, shared), images, passes, meter)
            del models, shared
            _join_group(folder, images, group, passes, write_index)
    if not ingredients and processes.decide(lambda: not (folder / BANK).exists()):  # it was broken, and no logits were
        list(passes.stream(images, lambda block: False))  # which is none: images are decoded if they never were
        _join_group(folder, images, [], passes, write_index)


@dataclass
class Room:
    """What is known of the memory that models take.

    Args:
        at_once: how many fit that have nothing in common; 0 if that is not known yet.
        recorded: bytes of what modules give that is kept for other models.
    """

    at_once: int = 0
    recorded: int = 0


def load_together(
    waiting: Sequence[Ingredient], digests: Mapping[str, TensorDigests], passes: Passes, room: Room
) -> tuple[list[PreTrainedModel], SharedModules | None]:
    """As many of the first models as fit into memory together, and what they have in common.

    What is kept for other models takes memory, too, and how much is only seen when they are there: some may go again.
    """
    models = [_load(waiting[0], passes.running)]
    room.at_once = room.at_once or passes.models_at_once(models[0])
    of_each = [digests[ingredient.id] for ingredient in waiting]
    count = passes.count_group(of_each, models[0], room.at_once, recorded=room.recorded)
    others = (_load(ingredient, passes.running) for ingredient in waiting[1:count])
    models = [*held_once(chain(models, others), of_each[:count])]
    shared = passes.shared_modules(models, of_each[:count])
    room.recorded = max(room.recorded, passes.recorded_bytes(shared))
    fit = passes.count_group(of_each[:count], models[0], room.at_once, recorded=room.recorded)
    if shared is not None and fit < count:
        shared.forget()
        del models[fit:]
        shared = passes.shared_modules(models, of_each[:fit])
    if shared is not None:
        sizes = sizes_of(models[0])
        different = {key for tensors in of_each[: len(models)] for key in tensors.by_name.items()}
        share = sum(sizes.get(name, 0) for name, _ in different) / (len(models) * sum(sizes.values()))
        logger.info(
            "%d models have much in common: their weights are held once (%.0f%% of what they take alone), and what "
            "is the same runs once.",
            len(models),
            100 * share,
        )
    return models, shared


def compute_soup(
    target: Target,
    images: Images,
    make_model: Callable[[], PreTrainedModel],
    passes: Passes,
    samples: int,
    *,
    write_known: Callable[[], object] = lambda: None,
) -> tuple[np.memmap, Pace]:
    """What one model, a soup, gives for all images, memory-mapped `(samples, classes)`, and what that took.

    What an earlier run left of it is used: all if that is whole, else the blocks that are. Only one run at a time
    computes soups of a bank so; another waits, and finds it computed.

    Args:
        make_model: is called if some of it is missing.
        samples: in the split.
        write_known: writes those of this process's blocks that are known without images, if some of it is missing.
    """
    processes, folder, path = passes.processes, target.path.parent, target.path
    record_path = path.with_suffix(".json")
    with ExitStack() as stack:
        if processes.decide(lambda: not record_path.exists()):
            lock = liveness.lock(folder.with_suffix(".lock"), target.name)
            processes.decide(lambda: stack.enter_context(lock) and None)
        processes.on_each_disk(folder, lambda: _discard_broken_soup(target, record_path, processes.checks))
        processes.wait()
        processes.sync_files(folder, path.name, record_path.name)
        if processes.decide(lambda: not record_path.exists()):
            processes.on_each_disk(folder, lambda: remove_broken_parts([target]))
            processes.wait()
            write_known()
            processes.wait()
            _run_soup(target, images, make_model, passes, samples)
            device = processes.device_name

            def join() -> None:
                images.check_order()
                joined = join_parts(target, images.blocks, samples, passes.logits_dtype)
                processes.checks.note(path, joined.sha256)
                record = SoupRecord(Pace().after(joined.seconds, samples, device), joined.sha256)
                write_sealed(record_path, record, target.subject)
                shutil.rmtree(target.parts)

            processes.on_each_disk(folder, join)
            processes.wait()
    return open_array(path), processes.decide(lambda: read_sealed(SoupRecord, record_path, target.subject)).pace


def _discard_broken_soup(target: Target, record_path: Path, checks: Checks) -> None:
    """Remove what a soup gave for all images, if it is not what was written, or not recorded."""
    record = known_record(SoupRecord, record_path, target.subject)
    if record is not None and checks.broken({target.path: record.sha256}):
        logger.warning("%s", not_as_written([target.path], MADE_ANEW))
    elif record is not None:
        return
    take_away(record_path)
    take_away(target.path)


def _run_soup(
    target: Target, images: Images, make_model: Callable[[], PreTrainedModel], passes: Passes, samples: int
) -> None:
    """Show a soup the blocks that it was not shown yet. Arguments as of `compute_soup`."""
    processes, folder = passes.processes, target.path.parent
    earlier = processes.decide(lambda: _count_earlier([target], images, None))
    if earlier < samples:
        processes.count_images(earlier)
        with progress_bar(total=samples, initial=earlier, desc=target.name, unit="image") as bar:
            meter = _Meter(bar, processes, samples, earlier, time.perf_counter(), passes.log_every)
            _run_group(_Group([target], [passes.running.ready(make_model())]), images, passes, meter)
    processes.wait()
    processes.sync_files(images.folder, "*.json")
    processes.sync_files(folder, f"{target.parts.name}/*.npz")


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
    model = _load(ingredient, running) if model is None else model

    def run(size: int) -> object:
        return replace(running, batch_size=size).logits([model], repeated(example, size))

    return grow_batch(timed(run), start=BATCH_SIZE, most=BLOCK)


def models_at_once(model: PreTrainedModel, example: Mapping[str, torch.Tensor] | None, running: Running) -> int:
    """How many models fit, by what this one takes with a batch of copies of an image of the split, prepared."""
    if example is None:
        return 1
    device, size = running.accelerator.device, min(running.batch_size, BLOCK)
    shown = min(size, SHOWN) if device.type == "cpu" else size
    inputs = repeated(example, shown)
    return models_that_fit(model, lambda: running.logits([model], inputs), device, shown / size)


def _load(ingredient: Ingredient, running: Running) -> PreTrainedModel:
    """An ingredient's model, ready to run."""
    return running.ready(ingredient.load_model(running.dtype))


def repeated(example: Mapping[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    return {name: value[None].expand(size, *value.shape) for name, value in example.items()}


@dataclass(eq=False)
class _Group:
    """Models that see each image while it is there.

    Args:
        targets: where their logits go.
        models: ready to run.
        shared: what they have in common; None where that saves nothing.
    """

    targets: Sequence[Target]
    models: Sequence[PreTrainedModel]
    shared: SharedModules | None = None

    def missing(self, block: Block) -> list[int]:
        """The models that have not seen a block, by their places."""
        return [place for place, target in enumerate(self.targets) if not target.part(block).exists()]

    def logits(self, running: Running, places: Sequence[int], inputs: Inputs) -> list[np.ndarray]:
        """Of the models at these places, float32 `(samples, classes)`; of no inputs there are none.

        Raises:
            ValueError: if a model has another number of classes than its configuration names.
        """
        targets = [self.targets[place] for place in places]
        if not inputs:
            return [np.zeros((0, target.classes), np.float32) for target in targets]
        answers = running.logits([self.models[place] for place in places], inputs, self.shared)
        for target, logits in zip(targets, answers, strict=True):
            if logits.shape[1] != target.classes:
                names = f"its id2label names {target.classes}"
                raise ValueError(f"{target.name} gives {logits.shape[1]} logits, but {names}.")
        return answers


def _run_group(group: _Group, images: Images, passes: Passes, meter: _Meter) -> None:
    """Show this process's blocks to those models that have not seen them; to all at once where these share modules."""
    at_once, begun = len(group.models) if group.shared else 1, time.perf_counter()
    everyone = range(len(group.models))
    for block, inputs in passes.stream(
        images,
        lambda block: bool(group.missing(block)),
        lambda inputs: group.logits(passes.running, everyone, inputs),
    ):
        waiting = group.missing(block)
        if inputs and passes.sample:
            rows = passes.sample.rows(block, count_images(inputs))
            inputs = select(inputs, rows) if len(rows) else {}
        # another run at the same work may have finished the block by now
        preparing = (time.perf_counter() - begun) / max(1, len(waiting))
        while waiting:
            places, waiting = waiting[:at_once], waiting[at_once:]
            begun = time.perf_counter()
            try:
                logits = group.logits(passes.running, places, inputs)
            except Exception as error:  # each architecture fails in its own way on images that it does not take
                if (difference := _other_shape(inputs, passes.example)) is None:
                    raise
                raise ValueError(
                    f"Of the images from number {block[1] * images.size} of shard {block[0]} on the image processor "
                    f"makes {difference}. The models don't take both: name an image processor that resizes or crops "
                    f"to one size with image_processor=... (--image-processor ID). ({one_line(error)})"
                ) from error
            seconds = (time.perf_counter() - begun) / len(places)
            for place, part in zip(places, logits, strict=True):
                with np.errstate(over="ignore"):  # what is too large for float16 is noticed when parts are joined
                    stored = part.astype(passes.logits_dtype)
                write_part(group.targets[place], block, stored, preparing + seconds)
            if len(logits[0]):
                meter.update(len(logits[0]) * len(places) * passes.processes.count)
            if group.shared is None:  # what is lost if the run ends here is not more than that
                at_once = max(1, int(passes.write_every / max(seconds, 1e-6)))
        begun = time.perf_counter()


def _other_shape(inputs: Inputs, example: Mapping[str, torch.Tensor] | None) -> str | None:
    """How prepared images differ in shape from the one that models were tried with, in words; None if they don't."""
    for name, value in (example or {}).items():
        shape = tuple(inputs[name][:1].to(value.device).shape[1:]) if name in inputs else None
        if shape is not None and shape != tuple(value.shape):
            return f"{name} of the shape {shape}, and of those that the models were tried with {tuple(value.shape)}"
    return None


def _count_earlier(targets: Sequence[Target], images: Images, sample: Pilot | Chosen | None) -> int:
    """How many predictions an earlier run, which did not come to its end, has left of these models."""
    counts = images.counts()
    shown = {block: len(sample.rows(block, count)) if sample else count for block, count in counts.items()}
    return sum(
        count
        for target in targets
        if target.parts.is_dir()
        for block, count in shown.items()
        if target.part(block).exists()
    )


def _join_group(
    folder: Path,
    images: Images,
    group: Sequence[Ingredient],
    passes: Passes,
    write_index: Callable[[], None],
) -> None:
    """Put together what the processes have computed of a group of ingredients, and write their records."""
    processes = passes.processes
    targets = [target_of(folder, ingredient) for ingredient in group]
    processes.wait()
    processes.sync_files(images.folder, "*.json")
    processes.sync_files(folder, *(f"{target.parts.relative_to(folder)}/*.npz" for target in targets))
    device = processes.device_name

    def join() -> None:
        try:
            images.check_order()
        except ValueError:  # of rows in two orders, logits are worth nothing
            for target in targets:
                shutil.rmtree(target.parts, ignore_errors=True)
            raise
        write_index()
        rows = BankManifest.read(folder).rows
        for ingredient, target in zip(group, targets, strict=True):
            joined = join_parts(target, images.blocks, rows, passes.logits_dtype)
            processes.checks.note(target.path, joined.sha256)
            record = IngredientRecord.of(ingredient)
            seconds = round(joined.seconds, 3)
            LogitsRecord(record, joined.is_finite, seconds, device, joined.sha256).write(
                folder, folder.name, ingredient.key
            )
            shutil.rmtree(target.parts)  # last: without a record they are all that is known

    processes.on_each_disk(folder, join)
    processes.wait()
