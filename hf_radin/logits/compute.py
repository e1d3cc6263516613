"""Compute a logit bank: every ingredient once over a split, by any number of processes, resumed where it stopped."""

from __future__ import annotations

import json
import logging
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints import processor as processors
from hf_radin.checkpoints.files import as_dtype
from hf_radin.checkpoints.forward import Running
from hf_radin.checkpoints.processor import check_same_pixels, read_alike
from hf_radin.images.cache import Images, block_size, find_home, parse_size
from hf_radin.images.decode import Source, example_images, prepared_example
from hf_radin.images.digests import refuse_met
from hf_radin.images.sample import Chosen, Pilot, drawn_places
from hf_radin.images.split import OBJECT, DataSource, Split, count_rows, open_split
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.ingredients.labels import check_first_label, match_labels
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import (
    BATCH_SIZE_FILE,
    DIGESTS,
    discard_broken,
    read_about,
    read_told,
    record_path,
    write_latest,
    write_record,
)
from hf_radin.logits.passes import Passes, choose_batch_size, compute
from hf_radin.logits.preflight import sound, try_all
from hf_radin.runtime.autotune import BATCH_SIZE, settle_threads
from hf_radin.runtime.file_sync import on_each_disk, share
from hf_radin.runtime.files import digest, remove_partials, write_atomically, write_json
from hf_radin.runtime.processes import on_main_process, the_accelerator
from hf_radin.weights.batchnorm import IMAGES, check_images, collect_statistics, find_sampled

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

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
    channels_last: bool = False,
    compiled: bool = False,
    dtype: str | torch.dtype | None = None,
    logits_dtype: str = "float32",
    on_error: str = "raise",
    strangers: str = "warn",
    batchnorm_split: str | None = None,
    batchnorm_images: int = IMAGES,
    pilot: float | Pilot | Chosen | None = None,
    apart_from: LogitBank | None = None,
    accelerator: Accelerator | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> LogitBank:
    """Run every ingredient once on a labelled split and keep its logits.

    Images are decoded once, whatever the number of ingredients and processes. What is in `cache_dir` already is not
    computed again, so a killed run goes on where it was; the outcome is the same for any number of processes.

    Args:
        ingredients: from `gather`.
        dataset: a Hub id, a folder, or a `Dataset`, `IterableDataset` or a dictionary of these.
        split: used to choose; never the one that shall prove the choice.
        config_name, revision: of the dataset, as in `load_dataset`.
        image_column, label_column: needed where the dataset has several that could be meant.
        batch_size: images in a forward pass; `auto` is 64 on a CPU and grows on an accelerator as long as that pays.
            It is decided once for a bank. On an accelerator give a number if two runs shall agree to the last bit.
        models_in_memory: how many models see each image while it is there; `auto` is as many as fit.
        pixel_cache: how much of the prepared images is kept on disk, to be read again by further models and by soups:
            `off`, a size as in `20GB`, or `auto`: up to half of what is free, at most 100 GB. What is not kept is
            decoded anew.
        workers: processes that decode beside each that runs models; `auto` is none on a CPU, else up to 8.
        channels_last: give images to the models in this memory format, which convolutions on GPUs like.
        compiled: use `torch.compile`.
        dtype: of the weights while running: float32 unless you say otherwise. For autocast see `accelerator`.
        logits_dtype: of the logits as they are kept: `float32`, or `float16` for half the room and eleven bits.
        on_error: an image that can't be read raises a ValueError, or with `skip` is left out and counted.
        strangers: what to do with ingredients whose weights say that they don't share their start with the others:
            `warn`, `drop` them, or `keep` them without a word.
        batchnorm_split: of models with BatchNorm, the split whose images soups estimate their statistics anew from;
            its labels are not used. By default `train` if the dataset has it, else the split itself.
        batchnorm_images: how many of them, drawn at random with a fixed seed.
        pilot: the share of the split, as in 0.2, that logits are computed of: images drawn at random, the same for all
            models. `radin` completes them where they tell recipes apart. `Pilot(0.2, seed=1)` is another sample. By
            default all of it.
        apart_from: a bank with none of whose images this split may have one in common: it is refused at the first.
        accelerator: with the device, processes and mixed precision to use; by default what `accelerate launch` set.
        cache_dir: where banks and prepared images are kept; by default `hf_radin` in HF_HOME.

    Raises:
        ValueError: if the split or its columns are not there, an image or a label can't be used, a checkpoint lacks
            weights, or fewer than two ingredients give finite logits.
    """
    check_running(
        ingredients,
        batch_size=batch_size,
        models_in_memory=models_in_memory,
        workers=workers,
        pixel_cache=pixel_cache,
        logits_dtype=logits_dtype,
        on_error=on_error,
        batchnorm_images=batchnorm_images,
    )
    is_step = isinstance(pilot, Chosen)  # of a search, which looks after what is left of its ingredients
    sample = Pilot.of(pilot) if not isinstance(pilot, Chosen) else None if pilot.places is None else pilot
    if isinstance(sample, Pilot) and sample.passes(len(ingredients)) >= len(ingredients):
        logger.warning(SAVES_NOTHING, sample.share, len(ingredients), sample.passes(len(ingredients)))
    weights_dtype = as_dtype(dtype or "float32")
    if strangers not in ("warn", "drop", "keep"):
        raise ValueError(f"strangers={strangers!r}: it is 'warn', 'drop' or 'keep'.")
    accelerator = the_accelerator(accelerator)
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, accelerate knows of {accelerator.num_processes}. "
            "On CPUs, set ACCELERATE_USE_CPU=true; make no PartialState before the Accelerator."
        )
    settle_threads()
    columns = {"config_name": config_name, "image_column": image_column, "label_column": label_column}
    request = {"dataset": dataset, **columns, "revision": revision, "token": token}
    opened = open_split(DataSource(**request, split=split))
    if opened.name != OBJECT and opened.revision is None:
        request["dataset"] = str(Path(dataset).resolve())  # the same folder, wherever the process goes
    opened = replace(opened, key=on_main_process(lambda: opened.key))  # an object without fingerprint has a random one
    home = find_home(cache_dir)
    processor = ingredients[0].processor
    about = {
        "data": opened.describe(),
        "classes": ingredients.labels,
        "processor": processors.describe_processor(processor),
        "dtype": str(weights_dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "channels_last": channels_last,
        "compiled": compiled,
        "logits_dtype": logits_dtype,
        "on_error": on_error,
    }
    to_class = match_labels(opened, ingredients.labels)
    if opened.is_here:  # of a stream, the first image comes no sooner
        check_first_label(opened, to_class)
    sampled = find_sampled(ingredients[0], opened, request, batchnorm_split)
    if sampled is not None:
        key = sampled.key
        sampled = replace(sampled, key=on_main_process(lambda: key))
    # what the data are called may vary (`data`, `./data`); what they are is in the key
    content = {
        **opened.describe(),
        "name": None,
        **{name: about[name] for name in ("classes", "processor", "on_error")},
    }
    samples = on_main_process(lambda: count_rows(opened))
    block = block_size(samples)
    pixels = home / "pixels" / digest(block, content)
    bits = ("dtype", "logits_dtype", "mixed_precision", "channels_last", "compiled")
    folder = home / "banks" / digest(block, content, sample and sample.key, *(about[name] for name in bits))
    with _alone(folder):
        share(folder, "*.npy", "*.json", "logits/*.npy", "logits/*.json", "logits/*.parts/*.npz")
        on_each_disk(folder, lambda: discard_broken(folder, ingredients))
        on_each_disk(pixels, lambda: remove_partials(pixels))
        accelerator.wait_for_everyone()
        missing = on_main_process(lambda: [one.id for one in ingredients if not record_path(folder, one).exists()])
        # a checkpoint that can't be run, or is none of the family, is known before the images go by
        source = Source(opened, partial(processors.prepare_image, processor), to_class, on_error, block)
        images = Images(pixels, block, lambda: source, on_digests=_refusal(apart_from, opened))
        example = on_main_process(lambda: _example(images, ingredients)) if missing else None
        try_all(ingredients, missing, home, example=example, dtype=weights_dtype, accelerator=accelerator)
        ingredients, remarks = sound(ingredients, home, strangers, weights_dtype)
        missing = [name for name in missing if name in ingredients.ids]
        logger.info(
            "Logits of %d checkpoints on the split %r of %s: %d to compute, on %s in %d process(es), in %s.",
            len(ingredients),
            opened.split,
            opened.name,
            len(missing),
            accelerator.device.type,
            accelerator.num_processes,
            folder,
        )
        statistics = None
        if sampled is not None:
            statistics = collect_statistics(
                sampled, batchnorm_images, home, processor=processor, on_error=on_error, accelerator=accelerator
            )
        running = Running(accelerator, weights_dtype, BATCH_SIZE, channels_last, compiled)
        size = on_main_process(lambda: _batch_size(folder, batch_size, ingredients[0], running, example))
        share(folder, BATCH_SIZE_FILE)
        running = replace(running, batch_size=size)
        passes = Passes(running, models_in_memory, pixel_cache, workers, sample, example)
        where = None if opened.name == OBJECT else request["dataset"]
        compute(
            folder,
            logits_dtype,
            images,
            ingredients.select(missing),
            passes,
            samples=None if samples is None else round(samples * (sample.share if sample else 1)),
            finished=len(ingredients) - len(missing),
            found=lambda: _found(folder, images, {**about, "batch_size": size, "dataset": where}, sample),
        )

        def write_records() -> None:
            for one in ingredients:  # a checkpoint may have moved since its logits were computed
                write_record(folder, one, read_told(folder, one))

        on_each_disk(folder, write_records)
        accelerator.wait_for_everyone()
        usable = _usable(folder, ingredients, fewest=0 if is_step else 2)
        remarks += [(name, NOT_FINITE) for name in ingredients.ids if name not in usable.ids]
        if not is_step:
            on_each_disk(folder, lambda: write_latest(folder, usable, remarks, statistics))
        accelerator.wait_for_everyone()
    request |= {"batch_size": size, "dtype": dtype, "on_error": on_error, "cache_dir": home}
    request |= {name: about[name] for name in ("logits_dtype", "channels_last", "compiled")}
    request |= {"models_in_memory": models_in_memory, "pixel_cache": pixel_cache, "workers": workers}
    request |= {"strangers": "keep", "batchnorm_split": batchnorm_split, "batchnorm_images": batchnorm_images}
    found = read_about(folder)
    part = drawn_places(found["blocks"], sample)
    return LogitBank(
        folder, usable, found, images, {**request, "pilot": sample}, statistics, tuple(remarks), part=part
    )


def _refusal(bank: LogitBank | None, split: Split) -> Callable[[list[str]], None] | None:
    """Hears of the images of a split as they go by, and refuses them if one is in a bank; None without digests."""
    chosen = None if bank is None else replace(bank, part=None).digests
    if bank is None or chosen is None:
        return None
    return partial(refuse_met, chosen=np.sort(chosen), names=(split.split, bank.split))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one run at a time computes a bank; another waits, and finds it computed."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("Another run computes the same logits; waiting for it.")
            lock.acquire()

    on_main_process(acquire)
    try:
        yield
    finally:
        lock.release()


def _example(images: Images, ingredients: Ingredients) -> dict[str, torch.Tensor] | None:
    """An image of a split as the models take it; None if none of the first can be read.

    Where an earlier run has prepared some, and no processors are to be compared, nothing is read or downloaded.

    Raises:
        ValueError: if the image processors of the ingredients make different pixels of some images, or none.
    """
    processors = {one.id: one.processor for one in ingredients}
    alike = read_alike(processors.values())
    if alike and (example := images.example()) is not None:
        return example
    source = images.source()
    originals = example_images(source.split, least=1 if alike else 3)
    check_same_pixels(processors, list(originals.values()))
    return prepared_example(source.split, source.prepare, originals)


def _batch_size(
    folder: Path, wanted: int | str, ingredient: Ingredient, running: Running, example: dict[str, torch.Tensor] | None
) -> int:
    """The number of images in a forward pass, decided once for a bank, so that a resumed run goes on as it began."""
    path = folder / BATCH_SIZE_FILE
    if wanted != "auto":
        return int(wanted)
    if not path.exists():
        write_json(path, choose_batch_size(ingredient, running, example))
    return int(json.loads(path.read_text()))


def _found(folder: Path, images: Images, about: dict[str, Any], pilot: Pilot | Chosen | None) -> None:
    """Write what a bank has beside its logits: its samples, their labels, where all of it comes from."""
    import hf_radin

    if (folder / "bank.json").exists():
        return
    index = images.index()
    ids, labels, skipped, counts = index.ids, index.labels, index.skipped, index.counts
    if not len(ids):
        name, split = about["data"]["name"], about["data"]["split"]
        raise ValueError(f"The split {split!r} of {name} has no image to use; {len(skipped)} were skipped.")
    if skipped:
        logger.warning("%d of %d images can't be read: left out.", len(skipped), len(ids) + len(skipped))
    blocks = [(*block, count) for block, count in zip(images.blocks, counts, strict=True)]
    places = drawn_places(blocks, pilot)
    if pilot is not None and places is not None and not len(places):
        raise ValueError(f"pilot={pilot.share}: that is none of {len(ids)} images.")
    write_atomically(folder / "ids.npy", partial(np.save, arr=ids))
    write_atomically(folder / "labels.npy", partial(np.save, arr=labels))
    if (digests := images.digests()) is not None:
        write_atomically(folder / DIGESTS, partial(np.save, arr=digests))
    about = {
        **about,
        "samples": len(ids),
        "skipped": skipped,
        "block_size": images.size,
        "rows": len(ids) if places is None else len(places),  # of logits
        "pilot": pilot and pilot.describe(),
        "blocks": blocks,
        "pixels": os.path.relpath(images.folder, folder),
        "hf_radin": hf_radin.__version__,
    }
    write_json(folder / "bank.json", about)


def _usable(folder: Path, ingredients: Ingredients, fewest: int) -> Ingredients:
    """The ingredients whose logits are all finite.

    Raises:
        ValueError: if fewer than that are.
    """
    finite = [one.id for one in ingredients if read_told(folder, one).finite]
    broken = [name for name in ingredients.ids if name not in finite]
    if len(finite) < fewest:
        raise ValueError(
            f"{', '.join(broken)} give NaN or infinite logits, and a soup needs two ingredients: "
            f"{len(finite)} of {len(ingredients)} are left."
        )
    if broken:
        logger.warning("%s give NaN or infinite logits: left out of the soup.", ", ".join(broken))
    return ingredients.select(finite)


def check_running(
    ingredients: Ingredients,
    *,
    batch_size: int | str,
    models_in_memory: int | str,
    workers: int | str,
    pixel_cache: int | str,
    logits_dtype: str,
    on_error: str,
    batchnorm_images: int,
) -> None:
    """Refuse what can't be computed with.

    Raises:
        ValueError: for anything that `compute_logits` can't use.
    """
    if len(ingredients) < 2:
        raise ValueError(f"A soup needs at least two ingredients; {len(ingredients)} were given.")
    check_number("batch_size", batch_size)
    check_number("models_in_memory", models_in_memory)
    check_number("workers", workers, least=0)
    parse_size(pixel_cache)
    if logits_dtype not in ("float32", "float16"):
        raise ValueError(f"logits_dtype={logits_dtype!r}: it is 'float32' or 'float16'.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: it is 'raise' or 'skip'.")
    check_images(batchnorm_images)


def check_number(name: str, value: int | str, *, least: int = 1) -> int | str:
    """`auto`, or a number.

    Raises:
        ValueError: if it is neither.
    """
    if value == "auto":
        return value
    if isinstance(value, (bool, str)) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name}={value!r}: it is 'auto' or a number, at least {least}.")
    return operator.index(value)
