"""What a soup will cost before it is made: seconds and bytes, by arithmetic from a probe of this machine."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.autotune import BATCH_SIZE, Modes, bytes_of, count_workers, most_workers, settle_threads
from hf_radin.checkpoints.files import as_dtype
from hf_radin.checkpoints.forward import Running
from hf_radin.checkpoints.model import random_model
from hf_radin.checkpoints.processor import made_up_image, prepare_image
from hf_radin.images.cache import SPARED, Images, find_home, parse_size
from hf_radin.images.decode import Source, time_decoding
from hf_radin.images.pixels import Inputs, count_images, join
from hf_radin.images.sample import Pilot
from hf_radin.images.split import DataSource, Split, count_rows, open_split
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.ingredients.labels import match_labels
from hf_radin.logits.compute import dtype_name
from hf_radin.logits.manifest import RunOptions, check_ingredients, check_number, is_in_full_precision
from hf_radin.logits.passes import choose_batch_size, models_at_once
from hf_radin.logits.preflight import load_digests
from hf_radin.recipes.propose import usual_passes
from hf_radin.runtime.processes import Processes
from hf_radin.sharing.common import PassOrder, any_in_common
from hf_radin.sharing.digests import TensorDigests, differing
from hf_radin.tail.front import find_front, may_share
from hf_radin.weights.average import are_averaged_in_full
from hf_radin.weights.batchnorm import IMAGES, has_batchnorm
from hf_radin.weights.head import differ_in_heads

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

# Images of the split that are decoded and shown to a model, and for how many seconds at least it runs.
SHOWN, SECONDS = 32, 0.5


@dataclass(frozen=True)
class Estimate:
    """A job in numbers, and what follows from them.

    No seconds have downloads in them, nor loading and averaging weights.

    Args:
        ingredients, images, classes, processes: how many; each process is as fast as the one that was measured.
        budget: passes over the split for soups; the uniform soup takes one more.
        probe: what was measured.
        at_once: models that see each image while it is there.
        workers: processes that decode beside each that runs models; without any, it decodes itself.
        pixel_room: bytes that the pixel cache may take.
        download_bytes: of weights that are on the Hub and not here.
        free_disk, free_hub: bytes free where the cache is, and where downloads go.
        one_disk: whether these are the same bytes.
        statistics: images that each process estimates each soup's BatchNorm statistics from.
        logit_bytes: of one logit in the bank.
        pilot: which images' logits are computed first; None if all are.
        together: what logits of all images take at most, in passes of one model, where what models have in common
            that see an image together runs once; None if that is not known, and counted as if they had nothing.
        tail: the share of a pass that soups after the first take, where what is in front of it is cached; 1 if not.
        exact: whether the models differ in their heads alone and all is float32, so that soups take no pass.
    """

    ingredients: int
    images: int
    classes: int
    processes: int
    budget: float
    probe: Probe
    at_once: int
    workers: int
    pixel_room: int
    download_bytes: int
    free_disk: int
    free_hub: int
    one_disk: bool
    statistics: int
    logit_bytes: int
    pilot: Pilot | None = None
    together: float | None = None
    tail: float = 1.0
    exact: bool = False

    @property
    def groups(self) -> int:
        """How often the images go by for the logits."""
        return math.ceil(self.ingredients / self.at_once)

    @property
    def soups(self) -> float:
        """Passes for soups at most; the uniform soup's own is beside the budget."""
        return 0 if self.exact else self.budget + 1

    @property
    def head(self) -> int:
        """Passes that say whether the best soup's head is better refitted; after a pilot heads are averaged."""
        return int(self.pilot is None)

    @property
    def logits(self) -> float:
        """Passes for logits; after a pilot about as many as they were in zoos of ours."""
        return self.ingredients if self.pilot is None else self.pilot.passes(self.ingredients)

    @property
    def work(self) -> float:
        """What passes for logits take, in passes of one model; of a pilot's, the same share."""
        return self.logits if self.together is None else self.together * self.logits / self.ingredients

    @property
    def soup_work(self) -> float:
        """What passes for soups take, in passes of one model: the first shows what further ones begin with."""
        return min(1.0, self.soups) + max(0.0, self.soups - 1) * self.tail

    @property
    def completed(self) -> int:
        """How many models' logits of all images are computed."""
        return self.ingredients if self.pilot is None else self.pilot.whole(self.ingredients)

    @property
    def bank_bytes(self) -> int:
        return round(self.logits * self.images) * self.classes * self.logit_bytes

    @property
    def pixel_bytes(self) -> int:
        """Of all images, prepared."""
        return self.images * self.probe.image_bytes

    @property
    def cached_bytes(self) -> int:
        """Of the prepared images that are cached on disk."""
        return min(self.pixel_bytes, self.pixel_room, max(0, self.free_disk - SPARED))

    @property
    def disk_bytes(self) -> int:
        """What is written to the disk of the cache."""
        return self.bank_bytes + self.cached_bytes + (self.download_bytes if self.one_disk else 0)

    @property
    def decodings(self) -> tuple[float, float]:
        """How often an image is decoded, for the logits and for soups: once if it is cached, else in each pass."""
        again = self.groups - 1 if self.pilot is None else 2 * self.groups
        return 1 + again * self._gone, self.soups * self._gone

    @property
    def _gone(self) -> float:
        """The share of the prepared images that are not cached."""
        return 1 - self.cached_bytes / self.pixel_bytes

    @property
    def logits_seconds(self) -> float:
        return self._together(self.decodings[0], self.work)

    @property
    def soups_seconds(self) -> float:
        statistics = self.soups * self.statistics * self.probe.forward_seconds
        return self._together(self.decodings[1], self.soup_work) + statistics

    @property
    def head_seconds(self) -> float:
        statistics = self.head * self.statistics * self.probe.forward_seconds
        return self._together(self.head * self._gone, self.head) + statistics

    def _together(self, decodings: float, passes: float) -> float:
        """Seconds of decoding and running: with workers at the same time, else one after the other."""
        images = self.images / self.processes
        decoding = images * decodings * self.probe.decode_seconds
        running = images * passes * self.probe.forward_seconds
        return max(decoding / self.workers, running) if self.workers else decoding + running


def estimate(
    ingredients: Ingredients,
    dataset: Any,
    *,
    split: str = "validation",
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    images: int | str = "auto",
    processes: int | str = "auto",
    budget: float | None = None,
    batch_size: int | str = "auto",
    models_in_memory: int | str = "auto",
    pixel_cache: int | str = "auto",
    workers: int | str = "auto",
    channels_last: bool | str = "auto",
    torch_compile: bool | str = "auto",
    dtype: str | torch.dtype | None = None,
    logits_dtype: str = "float32",
    on_error: str = "raise",
    batchnorm_images: int = IMAGES,
    pilot: float | Pilot | None = None,
    accelerator: Accelerator | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Estimate:
    """What `compute_logits` with these arguments and `radin` with this budget cost, from the beginning.

    No weights are downloaded: the first images of the split are decoded, and a model of the ingredients' architecture
    with random weights runs for a moment. Where the weights of all ingredients are here they are read, and what comes
    before the first tensor in which two differ counts once for both, if they see an image together: of models that
    share six layers, two may share nine. Soups after the first take what is behind the layers that all share, where
    what these give will be cached. Seconds are at most that many: what is shared behind a layer that differs is not
    counted. Of what is in `cache_dir` already nothing is subtracted.

    Args:
        images: how many the split has; `auto` is what the dataset says.
        processes: how many there will be, each as fast as this one is now; `auto` is as many as there are.
        budget: a number of passes as in `radin`, with the same default.

    Raises:
        ValueError: if the dataset does not say how many images it has, or for what `compute_logits` would refuse.
    """
    is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if budget is not None and not (is_number and 1 <= budget < math.inf):
        raise ValueError(f"budget={budget!r}: an estimate is made for a number of passes, at least 1 (--budget).")
    source = DataSource(dataset, split, config_name, revision, image_column, label_column, token)
    source = replace(source, classes=ingredients.labels if ingredients.multi_label else ())
    options = RunOptions(
        batch_size=batch_size,
        models_in_memory=models_in_memory,
        pixel_cache=pixel_cache,
        workers=workers,
        channels_last=channels_last,
        torch_compile=torch_compile,
        dtype=dtype_name(dtype),
        logits_dtype=logits_dtype,
        on_error=on_error,
        batchnorm_images=batchnorm_images,
        cache_dir=cache_dir,
    )
    size = JobSize(images, processes, None if budget is None else float(budget), Pilot.of(pilot))
    return estimate_job(ingredients, source, options, size, Processes(accelerator))


@dataclass(frozen=True)
class JobSize:
    """How large a job is.

    Args:
        images: in the split; `auto` is what the dataset says.
        processes: that share the work; `auto` is as many as there are.
        budget: passes over the split for soups; None for as many as `radin` takes by default.
        pilot: which images' logits are computed first; None for all.

    Raises:
        ValueError: for numbers that can't be used.
    """

    images: int | str = "auto"
    processes: int | str = "auto"
    budget: float | None = None
    pilot: Pilot | None = None

    def __post_init__(self) -> None:
        check_number("images", self.images)
        check_number("processes", self.processes)


def estimate_job(
    ingredients: Ingredients, source: DataSource, options: RunOptions, size: JobSize, processes: Processes
) -> Estimate:
    """What a job costs. See `estimate`."""
    from huggingface_hub.constants import HF_HUB_CACHE

    check_ingredients(ingredients)
    options = options.on(processes).settled(_likely_modes(processes))
    home, split = find_home(options.cache_dir), open_split(source)
    count = _count_images(split, size.images)
    block = options.samples_in_block(count)
    prepare = partial(prepare_image, ingredients.processor)
    images = Source(
        split,
        prepare,
        match_labels(split, ingredients.labels, multi_label=ingredients.multi_label),
        options.on_error,
        block,
    )
    settle_threads()
    dtype = as_dtype(options.dtype)
    modes = (options.channels_last is True, options.torch_compile is True, options.mixed_precision)
    running = Running(processes.accelerator, dtype, BATCH_SIZE, *modes)
    measured = probe(images, ingredients[0], running, options.batch_size, processes)
    bases = [ingredient.base for ingredient in ingredients if ingredient.base]
    downloads = {checkpoint.key: checkpoint.size for checkpoint in (*ingredients, *bases) if not checkpoint.is_here}
    hub = next(place for place in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if place.exists())
    at_once = measured.fit if options.models_in_memory == "auto" else int(options.models_in_memory)
    at_once = min(len(ingredients), at_once)
    pixel_room = Images(home / "pixels", block, lambda: images).room(parse_size(options.pixel_cache))
    left = pixel_room - count * measured.image_bytes
    shared = _shared(ingredients, home, options, at_once, processes)
    return Estimate(
        ingredients=len(ingredients),
        images=count,
        classes=len(ingredients.labels),
        processes=processes.count if size.processes == "auto" else int(size.processes),
        budget=usual_passes(len(ingredients)) if size.budget is None else size.budget,
        pilot=size.pilot,
        probe=measured,
        at_once=at_once,
        workers=_count_workers(measured, at_once, options, processes),
        pixel_room=pixel_room,
        download_bytes=sum(downloads.values()),
        free_disk=shutil.disk_usage(home).free,
        free_hub=shutil.disk_usage(hub).free,
        one_disk=os.stat(home).st_dev == os.stat(hub).st_dev,
        statistics=options.batchnorm_images if measured.has_batchnorm else 0,
        logit_bytes=4 if options.logits_dtype == "float32" else 2,
        together=None if shared is None else shared.together,
        tail=1.0 if shared is None or measured.has_batchnorm else shared.tail(left, count),
        exact=shared is not None and shared.exact and options.batchnorm_split is None,
    )


def _likely_modes(processes: Processes) -> Modes:
    """The modes that a job is likely to choose: what random weights predict says nothing of what it will."""
    return Modes("bf16" if processes.has_bfloat16 else "no", channels_last=processes.is_on_gpu)


@dataclass(frozen=True)
class _Shared:
    """What models save that have much in common.

    Args:
        together: as of `Estimate`.
        exact: whether soups are their ensembles.
        behind: the share of a pass behind what all have in common, where it pays to cache what that gives; else None.
        given: bytes of what is cached of an image then.
    """

    together: float
    exact: bool = False
    behind: float | None = None
    given: int = 0

    def tail(self, room: int, images: int) -> float:
        """The share of a pass that soups after the first take.

        Args:
            room: bytes that pixels leave.
            images: that soups are shown.
        """
        return 1.0 if self.behind is None or images * self.given > room else self.behind


def _shared(
    ingredients: Ingredients, home: Path, options: RunOptions, at_once: int, processes: Processes
) -> _Shared | None:
    """What is saved by what models have in common; None if that is not known."""
    if not processes.decide(lambda: ingredients.are_here):
        return None
    dtype = as_dtype(options.dtype)
    models = sorted(load_digests(ingredients, home, dtype, processes), key=lambda digests: digests.order)
    return processes.decide(lambda: _look(ingredients, models, options, at_once, processes.device.type))


def _look(
    ingredients: Ingredients, models: list[TensorDigests], options: RunOptions, at_once: int, device: str
) -> _Shared:
    """As `_shared`, of models sorted by what they have in common, by a pass of a model with random weights."""
    import torch

    first, names = ingredients[0], differing(models)
    load = partial(random_model, first.config, trust_remote_code=first.trust_remote_code)
    if not any_in_common(models):
        return _Shared(len(models))
    is_exact = is_in_full_precision(options) and differ_in_heads(ingredients, names)
    is_exact = is_exact and are_averaged_in_full(ingredients)
    if options.torch_compile is True:  # what is compiled runs as a whole
        return _Shared(len(models), is_exact)
    example = prepare_image(ingredients.processor, made_up_image(first.config))
    inputs = {name: torch.as_tensor(value) for name, value in example.items()}
    order = PassOrder.of(load(), {name: value[None] for name, value in inputs.items()})
    together = sum(order.work(models[start : start + at_once]) for start in range(0, len(models), at_once))
    if is_exact or not (may_share(models) and ingredients.have_one_code):
        return _Shared(together, is_exact)
    front, dtype = find_front(models, load, inputs), as_dtype(options.dtype)
    if front.cut is None or not front.pays(device, dtype):
        return _Shared(together)
    return _Shared(together, behind=front.cut.share, given=front.cut.width * dtype.itemsize)


def _count_workers(measured: Probe, at_once: int, options: RunOptions, processes: Processes) -> int:
    """How many processes decode beside each that runs models."""
    if options.workers != "auto":
        return int(options.workers)
    most = most_workers(processes.device)
    return count_workers(measured.decode_seconds, measured.forward_seconds * at_once, most=most)


def _count_images(split: Split, images: int | str) -> int:
    """The number of images that is given, or that the dataset says."""
    count = count_rows(split) if images == "auto" else int(images)
    if not count:
        says = "does not say how many images it has" if count is None else "has no image"
        raise ValueError(f"{split.name}, split {split.split!r}, {says}. Give their number with images (--images N).")
    return count


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Args:
        device, dtype: where the model ran, and its weights, with the mixed precision in words.
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


def probe(
    source: Source, ingredient: Ingredient, running: Running, batch_size: int | str, processes: Processes
) -> Probe:
    """Decode the first images of a split and run a model like the ingredient; its weights are not read.

    Args:
        batch_size: as in `compute_logits`; it goes before that of `running`.

    Raises:
        ValueError: if none of these images can be read.
    """
    import torch

    decode_seconds, shown = time_decoding(source, SHOWN)
    if not shown:
        split = source.split
        raise ValueError(f"None of the first {SHOWN} images of {split.name}, split {split.split!r}, can be read.")
    model = running.ready(random_model(ingredient.config, trust_remote_code=ingredient.trust_remote_code))
    example = {name: value[:1].to(torch.device("cpu"))[0] for name, value in shown.items()}
    size = choose_batch_size(ingredient, running, example, model) if batch_size == "auto" else int(batch_size)
    running = replace(running, batch_size=size)
    fit = processes.smallest(models_at_once(model, example, running))
    autocast = "" if running.mixed_precision in (None, "no") else f" ({running.mixed_precision} autocast)"
    batch = _repeat(shown, min(size, source.size))  # the first pass is behind us, which is slower than the others
    return Probe(
        device=running.accelerator.device.type,
        dtype=str(running.dtype).removeprefix("torch.") + autocast,
        batch_size=size,
        decode_seconds=decode_seconds,
        forward_seconds=_seconds(lambda: running.logits([model], batch)) / min(size, source.size),
        image_bytes=sum(value[:1].nbytes for value in shown.values()),
        model_bytes=bytes_of(model),
        fit=fit,
        has_batchnorm=has_batchnorm(model),
    )


def _repeat(inputs: Inputs, size: int) -> Inputs:
    """A batch of so many images."""
    have = count_images(inputs)
    whole = join([inputs] * math.ceil(size / have))
    return {name: value[:size] for name, value in whole.items()}


def _seconds(run: Callable[[], object]) -> float:
    """The mean seconds of a call, over as many as fill half a second."""
    count, begun = 0, time.perf_counter()
    while not count or time.perf_counter() - begun < SECONDS:
        run()
        count += 1
    return (time.perf_counter() - begun) / count
