"""Compute a logit bank: every ingredient once over a split, by any number of processes, resumed where it stopped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import hf_radin
from hf_radin.checkpoints.autotune import BATCH_SIZE, TRIED, Modes, choose_modes, settle_threads
from hf_radin.checkpoints.files import as_dtype
from hf_radin.checkpoints.forward import Running
from hf_radin.checkpoints.processor import (
    check_same_pixels,
    describe_processor,
    prepare_image,
    read_alike,
)
from hf_radin.images.cache import ACTIVATIONS, Images, find_home
from hf_radin.images.decode import Source, decode, example_images, prepared_example
from hf_radin.images.digests import refuse_met
from hf_radin.images.sample import Chosen, Pilot, drawn_places
from hf_radin.images.split import OBJECT, DataSource, Split, count_rows, open_split
from hf_radin.ingredients.ingredient import Ingredient, IngredientRecord, Ingredients
from hf_radin.ingredients.labels import check_first_label, check_numbers, match_labels, stack_labels
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import (
    BATCH_SIZE_FILE,
    DIGESTS,
    BatchSize,
    LogitsRecord,
    clean_pixels,
    discard_broken,
    folders_of,
    record_path,
    write_index,
)
from hf_radin.logits.manifest import BANK, BankManifest, DataRecord, RunOptions, RunRecord, check_ingredients
from hf_radin.logits.passes import Passes, choose_batch_size, compute
from hf_radin.logits.preflight import (
    Remark,
    check_models,
    differ_in_heads_alone,
    load_digests,
    share_statistics,
    usable_ingredients,
)
from hf_radin.runtime import liveness
from hf_radin.runtime.files import digest, refuse_files
from hf_radin.runtime.processes import Processes
from hf_radin.runtime.schema import known_record, write_sealed
from hf_radin.runtime.text import counted, one_line
from hf_radin.sharing.digests import TensorDigests
from hf_radin.sharing.replay import SharedModules
from hf_radin.weights.batchnorm import IMAGES, Statistics, prepare_statistics, statistics_split

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Banks of which this process said what is to compute: to distil, those of the search are opened again.
_SAID: set[Path] = set()

# How many ingredients are tried to see how models run fastest; each of them has to keep its predictions.
MODELS_TRIED = 2

NOT_FINITE = "gives NaN or infinite logits: left out of the soup."
SAVES_NOTHING = "pilot=%s saves nothing: the logits of %d ingredients take %.3g passes with it."


def compute_logits(
    ingredients: Ingredients,
    dataset: Any,
    *,
    split: str = "validation",
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int | str = "auto",
    models_in_memory: int | str = "auto",
    pixel_cache: int | str = "auto",
    workers: int | str = "auto",
    channels_last: bool | str = "auto",
    torch_compile: bool | str = "auto",
    dtype: str | torch.dtype | None = None,
    logits_dtype: str = "float32",
    on_error: str = "raise",
    strangers: str = "warn",
    batchnorm_split: str | None = None,
    batchnorm_images: int = IMAGES,
    pilot: float | Pilot | None = None,
    apart_from: LogitBank | None = None,
    accelerator: Accelerator | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> LogitBank:
    """Run every ingredient once on a labelled split and write its logits to disk.

    Images are decoded once, whatever the number of ingredients and processes. What is in `cache_dir` already is not
    computed again, so a killed run goes on where it was; the outcome is the same for any number of processes.

    Args:
        ingredients: from `gather`. Their order changes nothing but the order in which they are shown.
        dataset: a Hub id, a folder, or a `Dataset`, `IterableDataset` or a dictionary of these.
        split: used to choose; never the split that shall prove the choice.
        config_name, revision: of the dataset, as in `load_dataset`.
        image_column, label_column: needed where the dataset has several that could be meant. Of multi-label
            checkpoints the latter may be columns of 0 and 1, one for each class, with commas between.
        batch_size: images in a forward pass; `auto` is 64 on a CPU and grows on an accelerator as long as that pays.
            It is decided once for a bank. On an accelerator give a number if two runs shall agree to the last bit.
        models_in_memory: how many models see each image while it is there; `auto` is as many as fit.
        pixel_cache: how much of the prepared images is cached on disk, to be read again by further models and by
            soups: `off`, a size as in `20GB`, or `auto`: up to half of what is free, at most 100 GB. What is not
            cached is decoded anew.
        workers: processes that decode beside each that runs models; `auto` is none on a CPU, else as many as keep up
            with the models, by a probe of both, and fewer than there are cores.
        channels_last: give images to the models in this memory format, which convolutions on GPUs like; `auto` is for
            models with convolutions, on a GPU.
        torch_compile: run the models through `torch.compile`; `auto` is on a GPU where a probe says that it pays.
        dtype: of the weights while running: float32 unless you say otherwise. For autocast see `accelerator`.
        logits_dtype: of the logits on disk: `float32`, or `float16` for half the room and eleven bits.
        on_error: an image that can't be read raises a ValueError, or with `skip` is left out and counted.
        strangers: what to do with ingredients whose weights seem to have a different start than the others': `warn`,
            `drop` them, or `keep` them without a word.
        batchnorm_split: of models with BatchNorm, the split whose images soups estimate their statistics anew from;
            its labels are not used. By default `train` if the dataset has it, else the split itself.
        batchnorm_images: how many of them, drawn at random with a fixed seed.
        pilot: the share of the split, as in 0.2, that logits are computed of: images drawn at random, the same for all
            models. `radin` computes the logits of further images where they tell recipes apart. `Pilot(0.2, seed=1)`
            is another sample. By default logits are computed of all images.
        apart_from: a bank whose images this split must not have: it is refused at the first image in both.
        accelerator: with the device, processes and mixed precision to use; by default what `accelerate launch` set.
            Without either, float32 weights run in bfloat16 (autocast) on a GPU if they then predict the same of 99%
            of some images. All that is `auto` is decided once for a cache, split and architecture.
        cache_dir: where banks and prepared images are cached; by default `hf_radin` in HF_HOME.

    Raises:
        ValueError: if the split or its columns are not there, an image or a label can't be used, a checkpoint lacks
            weights, or fewer than two ingredients give finite logits.
    """
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
        strangers=strangers,
        batchnorm_split=batchnorm_split,
        batchnorm_images=batchnorm_images,
        cache_dir=cache_dir,
    )
    return make_bank(
        ingredients, source, options, Processes(accelerator), pilot=Pilot.of(pilot), apart_from=apart_from
    )


def make_bank(
    ingredients: Ingredients,
    source: DataSource,
    options: RunOptions,
    processes: Processes,
    *,
    pilot: Pilot | None = None,
    apart_from: LogitBank | None = None,
) -> LogitBank:
    """The bank of at least two ingredients. See `compute_logits`."""
    begun = time.perf_counter()
    check_ingredients(ingredients)
    if pilot is not None and ingredients.multi_label:
        raise ValueError(
            f"pilot={pilot.share}: it goes by which class of an image is the best, and these checkpoints are "
            "multi-label: compute the logits of all images, without pilot."
        )
    if pilot is not None and (passes := pilot.passes(len(ingredients))) >= len(ingredients):
        logger.warning(SAVES_NOTHING, pilot.share, len(ingredients), passes)
    bank = extend_bank(ingredients, source, options, processes, sample=pilot, apart_from=apart_from)
    if len(bank.ingredients) < 2:
        broken = [name for name in ingredients.ids if name not in bank.ingredients.ids]
        raise ValueError(
            f"{', '.join(broken)} give NaN or infinite logits, and a soup needs two ingredients: "
            f"{len(bank.ingredients)} of {len(ingredients)} are left."
        )
    processes.on_each_disk(bank.folder, lambda: bank.latest.write(bank.folder, bank.manifest.key))
    processes.wait()
    return replace(bank, seconds=processes.decide(lambda: time.perf_counter() - begun))


def extend_bank(
    ingredients: Ingredients,
    source: DataSource,
    options: RunOptions,
    processes: Processes,
    *,
    sample: Pilot | Chosen | None = None,
    apart_from: LogitBank | None = None,
) -> LogitBank:
    """The logits of any number of ingredients on a sample of a split's images, as a step of a search needs them.

    Args:
        sample: which images; by default all.

    Raises:
        ValueError: as `compute_logits` does, but any number of ingredients may give finite logits.
    """
    processes.check_launch()
    settle_threads()
    planned = _plan(ingredients.by_content, source, options, processes, sample)
    processes.decide(lambda: refuse_files(*planned.folders))  # later, an error would cost what was computed until then
    task = _with_modes(planned)
    with _alone(task):
        bank = _run(task, apart_from)
    usable = bank.ingredients.ids
    return replace(bank, ingredients=bank.ingredients.select([name for name in ingredients.ids if name in usable]))


@dataclass(frozen=True)
class _Task:
    """What a bank is computed from; nothing of it has cost a pass yet.

    Args:
        ingredients: by their content, whatever order the user named them in.
        split: opened.
        sampled: whose images BatchNorm statistics are estimated from; None without BatchNorm.
        samples: in the split; None if that is not known before it was read.
        processor: the image processor, as `describe_processor` describes it.
        content: what the prepared images and their classes are.
    """

    ingredients: Ingredients
    source: DataSource
    options: RunOptions
    processes: Processes
    sample: Pilot | Chosen | None
    split: Split
    sampled: Split | None
    samples: int | None
    processor: dict[str, Any]
    home: Path
    content: tuple[Any, ...]

    @cached_property
    def run(self) -> RunRecord:
        """What decides about the bits of the logits."""
        options = self.options
        return RunRecord(
            processor=self.processor,
            dtype=options.dtype,
            mixed_precision=options.mixed_precision,
            channels_last=options.channels_last is True,
            torch_compile=options.torch_compile is True,
            logits_dtype=options.logits_dtype,
            on_error=options.on_error,
        )

    @cached_property
    def folder(self) -> Path:
        """Of the bank."""
        return self.home / "banks" / digest(*self.content, self.sample and self.sample.key, asdict(self.run))

    @cached_property
    def pixels(self) -> Path:
        """Of its prepared images."""
        return self.home / "pixels" / digest(*self.content)

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that may be written to, and are made where there are none."""
        of_images = (self.pixels, *self.pixels.glob(f"{ACTIVATIONS}*"))
        return (*folders_of(self.folder), *of_images, *(self.home / name for name in ("weights", "modes", "digests")))

    @property
    def block(self) -> int:
        """Samples in a block."""
        return self.options.samples_in_block(self.samples)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights while running."""
        return as_dtype(self.options.dtype)

    @property
    def shown(self) -> int | None:
        """How many images each model is shown, as far as that is known."""
        return None if self.samples is None else round(self.samples * (self.sample.share if self.sample else 1))

    def images(self, apart_from: LogitBank | None) -> Images:
        """The images as the models take them; those of another bank are refused."""
        to_class = match_labels(self.split, self.ingredients.labels, multi_label=self.ingredients.multi_label)
        prepare = partial(prepare_image, self.ingredients.processor)
        source = Source(self.split, prepare, to_class, self.options.on_error, self.block)
        refusal = _refusal(apart_from, self.split)
        return Images(self.pixels, self.block, lambda: source, refusal, self.processes.checks)

    def passes(self, batch_size: int, example: dict[str, torch.Tensor] | None) -> Passes:
        """How the images go through the models."""
        options, accelerator = self.options, self.processes.accelerator
        modes = (self.run.channels_last, self.run.torch_compile, self.run.mixed_precision)
        running = Running(accelerator, self.dtype, batch_size, *modes)
        return Passes(
            self.processes,
            running,
            options.logits_dtype,
            options.models_in_memory,
            options.pixel_cache,
            options.workers,
            self.sample,
            example,
            options.write_every,
            options.log_every,
        )


def _plan(
    ingredients: Ingredients,
    source: DataSource,
    options: RunOptions,
    processes: Processes,
    sample: Pilot | Chosen | None,
) -> _Task:
    """Open the split and see that its labels fit; where banks and images go is decided by what is in them."""
    split = open_split(source)
    if split.name != OBJECT and split.revision is None:
        source = replace(source, dataset=str(Path(source.dataset).resolve()))  # wherever the process goes
    split = replace(split, key=processes.decide(lambda: split.key))  # an object without fingerprint has a random one
    check_numbers(split, ingredients)
    to_class = match_labels(split, ingredients.labels, multi_label=ingredients.multi_label)
    if split.is_here:  # of a stream, the first image comes no sooner
        check_first_label(split, to_class)
    sampled = statistics_split(ingredients[0], split, source, options.batchnorm_split)
    if sampled is not None:
        key = sampled.key
        sampled = replace(sampled, key=processes.decide(lambda: key))
    processor = describe_processor(ingredients.processor)
    samples = processes.decide(lambda: count_rows(split))
    home, options = find_home(options.cache_dir), options.on(processes)
    # what the data are called may vary (`data`, `./data`); what they are is in the key
    data = asdict(replace(DataRecord.of(split), name=""))
    content = [options.samples_in_block(samples), data, ingredients.labels, processor, options.on_error]
    content += ["multi-label"] if ingredients.multi_label else []
    return _Task(
        ingredients=ingredients,
        source=source,
        options=options,
        processes=processes,
        sample=sample,
        split=split,
        sampled=sampled,
        samples=samples,
        processor=processor,
        home=home,
        content=tuple(content),
    )


def _with_modes(task: _Task) -> _Task:
    """A task whose models run as is fastest on this device, where the user did not say how."""
    if not task.options.open_modes:
        return task
    are_probes = _are_probes(task)
    modes = task.processes.decide(lambda: _modes(task, are_probes))
    logger.info(
        "Where it is not said otherwise, models run with mixed precision %r, channels_last=%s, torch_compile=%s.",
        modes.mixed_precision,
        modes.channels_last,
        modes.torch_compile,
    )
    return replace(task, options=task.options.settled(modes))


def _are_probes(task: _Task) -> bool:
    """Whether ingredients differ in their heads alone: their body runs once, and in float32 soups are exact."""
    if len(task.ingredients) < 2 or not task.processes.decide(lambda: task.ingredients.are_here):
        return False
    return differ_in_heads_alone(task.ingredients, task.home, task.dtype, task.processes)


def _modes(task: _Task, are_probes: bool) -> Modes:
    """The modes that suit this device, decided once for a cache, split and architecture: see `choose_modes`."""
    subject = [
        *task.content,
        task.ingredients[0].architecture,
        task.options.dtype,
        *(["probes"] if are_probes else []),
    ]
    path = task.home / "modes" / f"{digest(*subject)}.json"
    with liveness.lock(path.with_suffix(".lock"), "how models run fastest here"):
        decided = known_record(Modes, path, path.stem)
        if decided is None:
            try:
                decided = _probed_modes(task, are_probes)
            except Exception as error:  # a checkpoint or an image that is of no use is named where it is checked
                logger.warning("Models run in plain float32: other ways can't be tried (%s).", one_line(error))
                return Modes()
            write_sealed(path, decided, path.stem)
    return decided


def _probed_modes(task: _Task, are_probes: bool) -> Modes:
    """The modes in which the first ingredients run over the first images of a split best.

    Probes run in float32: their one pass takes longer than in bfloat16, and soups of them take none.
    """
    source, ingredients = task.images(None).source(), task.ingredients[:MODELS_TRIED]
    rows = list(source.split.rows.take(TRIED))
    models = [ingredient.load_model(task.dtype) for ingredient in ingredients]
    # what is compiled runs as a whole: models that have modules in common are better off without
    may_share = SharedModules(models, [TensorDigests.of(model) for model in models]).may_save
    return choose_modes(
        models,
        decode(source, (0, 0), rows).inputs,
        Running(task.processes.accelerator, task.dtype, BATCH_SIZE),
        has_bfloat16=task.processes.has_bfloat16 and not are_probes,
        batches=0 if may_share else (task.shown or 0) * len(task.ingredients) / BATCH_SIZE,
        multi_label=task.ingredients.multi_label,
    )


def _run(task: _Task, apart_from: LogitBank | None) -> LogitBank:
    """Check the models, show them the images, and open what was written."""
    processes, folder, options = task.processes, task.folder, task.options
    processes.on_each_disk(folder, lambda: discard_broken(folder, task.ingredients, processes.checks))
    processes.on_each_disk(task.pixels, lambda: clean_pixels(task.pixels))
    processes.wait()
    # what is broken on one machine, another may have
    processes.sync_files(folder, "*.npy", "*.json", "logits/*.npy", "logits/*.json", "logits/*.parts/*.npz")
    missing = processes.decide(lambda: _without_logits(folder, task.ingredients))
    images = task.images(apart_from)
    # a checkpoint that can't be run, or has a different start, is known before the images go by
    example = processes.decide(lambda: _example(images, task.ingredients)) if missing else None
    check_models(task.ingredients, missing, task.home, example=example, dtype=task.dtype, processes=processes)
    ingredients, remarks = usable_ingredients(task.ingredients, task.home, options.strangers, task.dtype, processes)
    missing = [name for name in missing if name in ingredients.ids]
    _log_beginning(task, len(ingredients), len(missing))
    statistics = _statistics(task, ingredients)
    batch_size = processes.decide(lambda: _batch_size(task, example))
    processes.sync_files(folder, BATCH_SIZE_FILE)
    unseen = ingredients.select(missing)
    digests = load_digests(unseen, task.home, task.dtype, processes) if missing else []
    compute(
        folder,
        images,
        unseen,
        task.passes(batch_size, example),
        digests=dict(zip(missing, digests, strict=True)),
        samples=task.shown,
        finished=len(ingredients) - len(missing),
        write_index=lambda: _write_index(task, images, batch_size),
    )
    processes.on_each_disk(folder, lambda: _rewrite_records(folder, ingredients))
    processes.wait()
    return _open(task, ingredients, images, remarks, statistics)


def _open(
    task: _Task,
    ingredients: Ingredients,
    images: Images,
    remarks: list[Remark],
    statistics: Statistics | None,
) -> LogitBank:
    """The bank of those ingredients whose logits are all finite."""
    folder = task.folder
    finite = [ingredient.id for ingredient in ingredients if _record(folder, ingredient).finite]
    broken = [name for name in ingredients.ids if name not in finite]
    if broken and len(finite) >= 2:
        logger.warning("%s give NaN or infinite logits: left out of the soup.", ", ".join(broken))
    manifest = BankManifest.read(task.folder)
    return LogitBank(
        folder=task.folder,
        ingredients=ingredients.select(finite),
        manifest=manifest,
        images=images,
        source=task.source,
        options=replace(task.options, cache_dir=task.home, batch_size=manifest.batch_size, strangers="keep"),
        processes=task.processes,
        statistics=statistics,
        remarks=(*remarks, *((name, NOT_FINITE) for name in broken)),
        part=drawn_places(manifest.blocks, task.sample),
    )


def _without_logits(folder: Path, ingredients: Ingredients) -> list[str]:
    """The ids of those whose logits are not complete."""
    return [ingredient.id for ingredient in ingredients if not record_path(folder, ingredient.key).exists()]


def _log_beginning(task: _Task, models: int, missing: int) -> None:
    if not missing and task.folder in _SAID:
        return
    _SAID.add(task.folder)
    logger.info(
        "Logits of %d checkpoints on the split %r of %s: %d to compute, on %s in %s, in %s.",
        models,
        task.split.split,
        task.split.name,
        missing,
        task.processes.device.type,
        counted(task.processes.count, "process"),
        task.folder,
    )


def _statistics(task: _Task, ingredients: Ingredients) -> Statistics | None:
    """The images that soups estimate their BatchNorm statistics from; None if they have none or keep them."""
    if task.sampled is None:
        return None
    is_named = task.options.batchnorm_split is not None
    if not is_named and share_statistics(ingredients, task.home, task.dtype, task.processes):
        logger.info(
            "All ingredients have the same BatchNorm statistics, and so have soups: name a batchnorm_split "
            "(--batchnorm-split) to have them estimated anew."
        )
        return None
    return prepare_statistics(
        task.sampled,
        task.options.batchnorm_images,
        task.home,
        processor=task.ingredients.processor,
        on_error=task.options.on_error,
        processes=task.processes,
    )


def _rewrite_records(folder: Path, ingredients: Ingredients) -> None:
    """Say where each checkpoint is now: it may have moved since its logits were computed."""
    for ingredient in ingredients:
        record = replace(_record(folder, ingredient), ingredient=IngredientRecord.of(ingredient))
        record.write(folder, folder.name, ingredient.key)


def _record(folder: Path, ingredient: Ingredient) -> LogitsRecord:
    return LogitsRecord.read(folder, folder.name, ingredient.key)


def _refusal(bank: LogitBank | None, split: Split) -> Callable[[Sequence[str]], None] | None:
    """Refuses images of a split as they go by, if they are in a bank; None without a bank, or without its digests."""
    digests = None if bank is None else replace(bank, part=None).digests
    if bank is None or digests is None:
        return None
    return partial(refuse_met, chosen=np.sort(digests), names=(split.split, bank.split))


@contextmanager
def _alone(task: _Task) -> Iterator[None]:
    """Only one run at a time computes a bank; another waits, and finds it computed."""
    models, split = len(task.ingredients), f"{task.split.split!r} of {task.split.name}"
    with ExitStack() as stack:
        lock = liveness.lock(task.folder.with_suffix(".lock"), f"logits of {models} models on the split {split}")
        task.processes.decide(lambda: stack.enter_context(lock) and None)
        yield


def _example(images: Images, ingredients: Ingredients) -> dict[str, torch.Tensor] | None:
    """An image of a split as the models take it; None if none of the first can be read.

    Where an earlier run has prepared images, and no processors are to be compared, nothing is read or downloaded.

    Raises:
        ValueError: if the image processors of the ingredients make different pixels of some images, or none.
    """
    processors = {ingredient.id: ingredient.processor for ingredient in ingredients}
    are_alike = read_alike(processors.values())
    if are_alike and (example := images.example()) is not None:
        return example
    source = images.source()
    originals = example_images(source.split, least=1 if are_alike else 3)
    check_same_pixels(processors, list(originals.values()))
    return prepared_example(source.split, source.prepare, originals)


def _batch_size(task: _Task, example: dict[str, torch.Tensor] | None) -> int:
    """The number of images in a forward pass, decided once for a bank, so that a resumed run goes on as it began."""
    wanted = task.options.batch_size
    if wanted != "auto":
        return int(wanted)
    decided = BatchSize.read(task.folder)
    if decided is None:
        ingredient: Ingredient = task.ingredients[0]
        decided = BatchSize(choose_batch_size(ingredient, task.passes(BATCH_SIZE, example).running, example))
        decided.write(task.folder)
    return decided.images


def _write_index(task: _Task, images: Images, batch_size: int) -> None:
    """Write what a bank has beside its logits: its samples, their labels, and its manifest."""
    if (task.folder / BANK).exists():
        return
    index = images.index()
    ids, skipped, counts = index.ids, index.skipped, index.counts
    if not len(ids):
        raise ValueError(
            f"The split {task.split.split!r} of {task.split.name} has no image to use; {len(skipped)} were skipped."
        )
    if skipped:
        logger.warning("%d of %d images can't be read: left out.", len(skipped), len(ids) + len(skipped))
    blocks = tuple((*block, count) for block, count in zip(images.blocks, counts, strict=True))
    places = drawn_places(blocks, task.sample)
    if task.sample is not None and places is not None and not len(places):
        raise ValueError(f"pilot={task.sample.share}: that is none of {len(ids)} images.")
    arrays = {"ids.npy": ids, "labels.npy": _label_array(task, index.labels), DIGESTS: index.digests}
    hashes = write_index(task.folder, arrays)
    is_object = task.split.name == OBJECT
    BankManifest(
        data=DataRecord.of(task.split),
        classes=task.ingredients.labels,
        run=task.run,
        batch_size=batch_size,
        samples=len(ids),
        skipped=tuple(skipped),
        rows=len(ids) if places is None else len(places),
        block_size=images.size,
        blocks=blocks,
        pixels=os.path.relpath(images.folder, task.folder),
        hf_radin=hf_radin.__version__,
        dataset=None if is_object else str(task.source.dataset),
        pilot=task.sample if isinstance(task.sample, Pilot) else None,
        chosen=isinstance(task.sample, Chosen),
        key=task.folder.name,
        arrays=hashes,
        multi_label=task.ingredients.multi_label,
    ).write(task.folder)


def _label_array(task: _Task, labels: Sequence[int]) -> np.ndarray:
    """The labels of a split, as `LogitBank.labels` has them, where they are known."""
    if not (task.ingredients.multi_label and task.split.label_column):
        return np.array(labels, np.int64)
    stacked = stack_labels(labels, len(task.ingredients.labels))
    if without := int((~stacked.any(axis=1)).sum()):
        logger.info(
            "%d of %d images of the split %r have none of the classes; they count as all others.",
            without,
            len(stacked),
            task.split.split,
        )
    return stacked


def dtype_name(dtype: str | torch.dtype | None) -> str:
    """A dtype of weights by torch's name, as in `bfloat16`; None is float32."""
    return str(as_dtype(dtype or "float32")).removeprefix("torch.")
