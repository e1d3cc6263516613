"""Compute a logit bank: every ingredient once over a split, by any number of processes, resumed where it stopped."""

from __future__ import annotations

import json
import logging
import operator
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin import adapter
from hf_radin.bank import (
    LogitBank,
    is_finite,
    logits_path,
    read_about,
    record_path,
    write_latest,
    write_record,
)
from hf_radin.batchnorm import IMAGES, check_images, collect_statistics, find_sampled
from hf_radin.checkpoint import as_dtype
from hf_radin.data import OBJECT, match_labels, open_split
from hf_radin.files import digest, write_atomically
from hf_radin.ingredients import Ingredient, Ingredients
from hf_radin.prepared import BLOCK, Prepared, find_home, prepare_once
from hf_radin.processes import on_main_process, progress_bar
from hf_radin.trial import sound, try_all

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Images in one forward pass unless the user says otherwise: enough to fill a CPU's or a GPU's arithmetic units for
# most classifiers, small enough for 8 GB.
BATCH_SIZE = 64


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
    dtype: str | torch.dtype | None = None,
    on_error: str = "raise",
    strangers: str = "warn",
    batchnorm_split: str | None = None,
    batchnorm_images: int = IMAGES,
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
        batch_size: images in a forward pass; `auto` is 64.
        dtype: of the weights while running: float32 unless you say otherwise. For autocast see `accelerator`.
        on_error: an image that can't be read raises a ValueError, or with `skip` is left out and counted.
        strangers: what to do with ingredients whose weights say that they don't share their start with the others:
            `warn`, `drop` them, or `keep` them without a word.
        batchnorm_split: of models with BatchNorm, the split whose images soups estimate their statistics anew from;
            its labels are not used. By default `train` if the dataset has it, else the split itself.
        batchnorm_images: how many of them, drawn at random with a fixed seed.
        accelerator: with the device, processes and mixed precision to use; by default what `accelerate launch` set.
        cache_dir: where banks and prepared images are kept; by default `hf_radin` in HF_HOME.

    Raises:
        ValueError: if the split or its columns are not there, an image or a label can't be used, a checkpoint lacks
            weights, or fewer than two ingredients give finite logits.
    """
    from accelerate import Accelerator

    if len(ingredients) < 2:
        raise ValueError(f"A soup needs at least two ingredients; {len(ingredients)} were given.")
    size = _batch_size(batch_size)
    weights_dtype = as_dtype(dtype or "float32")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: it is 'raise' or 'skip'.")
    if strangers not in ("warn", "drop", "keep"):
        raise ValueError(f"strangers={strangers!r}: it is 'warn', 'drop' or 'keep'.")
    check_images(batchnorm_images)
    accelerator = accelerator or Accelerator()
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, accelerate knows of {accelerator.num_processes}. "
            "On CPUs, set ACCELERATE_USE_CPU=true; make no PartialState before the Accelerator."
        )
    columns = {"config_name": config_name, "image_column": image_column, "label_column": label_column}
    source = {"dataset": dataset, **columns, "revision": revision, "token": token}
    opened = open_split(split=split, **source)
    if opened.name != OBJECT and opened.revision is None:
        source["dataset"] = str(Path(dataset).resolve())  # the same folder, wherever the process goes
    opened = replace(opened, key=on_main_process(lambda: opened.key))  # an object without fingerprint has a random one
    home = find_home(cache_dir)
    processor = ingredients[0].processor
    about = {
        "data": opened.describe(),
        "classes": ingredients.labels,
        "processor": adapter.describe(processor),
        "dtype": str(weights_dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "on_error": on_error,
    }
    to_class = match_labels(opened, ingredients.labels)
    sampled = find_sampled(ingredients[0], opened, source, batchnorm_split)
    if sampled is not None:
        key = sampled.key
        sampled = replace(sampled, key=on_main_process(lambda: key))
    # what the data are called may vary (`data`, `./data`); what they are is in the key
    images = {
        **opened.describe(),
        "name": None,
        **{name: about[name] for name in ("classes", "processor", "on_error")},
    }
    pixels = home / "pixels" / digest(BLOCK, images)
    folder = home / "banks" / digest(images, about["dtype"], about["mixed_precision"])
    with _alone(folder):
        missing = on_main_process(lambda: [one.id for one in ingredients if not record_path(folder, one).exists()])
        # a checkpoint that can't be run, or is none of the family, is known before the first image is read
        try_all(ingredients, missing, home, processor=processor, dtype=weights_dtype, accelerator=accelerator)
        ingredients, remarks = sound(ingredients, home, strangers, weights_dtype)
        missing = [name for name in missing if name in ingredients.ids]
        statistics = None
        if sampled is not None:
            statistics = collect_statistics(
                sampled, batchnorm_images, home, processor=processor, on_error=on_error, accelerator=accelerator
            )
        prepared = prepare_once(
            opened, pixels, partial(adapter.prepare, processor), to_class, on_error, accelerator, size=BLOCK
        )
        if accelerator.is_main_process and not (folder / "bank.json").exists():
            where = None if opened.name == OBJECT else source["dataset"]
            _found(folder, prepared, {**about, "batch_size": size, "dataset": where})
        accelerator.wait_for_everyone()
        _run(folder, prepared, ingredients.select(missing), weights_dtype, size, accelerator)
        if accelerator.is_main_process:
            for one in ingredients:  # a checkpoint may have moved since its logits were computed
                write_record(folder, one, finite=is_finite(folder, one))
        usable = _usable(folder, ingredients)
        remarks += [
            (name, "gives NaN or infinite logits: left out of the soup.")
            for name in ingredients.ids
            if name not in usable.ids
        ]
        if accelerator.is_main_process:
            write_latest(folder, usable, remarks, statistics)
        accelerator.wait_for_everyone()
    request = {**source, "batch_size": size, "dtype": dtype, "on_error": on_error, "cache_dir": home}
    request |= {"strangers": "keep", "batchnorm_split": batchnorm_split, "batchnorm_images": batchnorm_images}
    return LogitBank(folder, usable, read_about(folder), request, statistics, tuple(remarks))


def of_split(bank: LogitBank, split: str) -> LogitBank:
    """The bank of the same ingredients on another split of the same dataset, computed if it is not there yet.

    Raises:
        ValueError: if the bank was computed from an object that is one split.
    """
    if bank.about["data"]["name"] == OBJECT and not isinstance(bank.request["dataset"], Mapping):
        raise ValueError(
            f"The bank in {bank.folder} was computed from a Dataset object, which has no other splits. Compute the "
            f"bank of the split {split!r} with compute_logits and pass that."
        )
    return compute_logits(bank.ingredients, split=split, **bank.request)


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


def _found(folder: Path, prepared: Prepared, about: dict[str, Any]) -> None:
    """Write what a bank has before the first logit: its samples, their labels, where all of it comes from."""
    import hf_radin

    ids, labels, skipped = prepared.index()
    if not len(ids):
        name, split = about["data"]["name"], about["data"]["split"]
        raise ValueError(f"The split {split!r} of {name} has no image to use; {len(skipped)} were skipped.")
    if skipped:
        logger.warning("%d of %d images can't be read: left out.", len(skipped), len(ids) + len(skipped))
    write_atomically(folder / "ids.npy", partial(np.save, arr=ids))
    write_atomically(folder / "labels.npy", partial(np.save, arr=labels))
    about = {
        **about,
        "samples": len(ids),
        "skipped": skipped,
        "blocks": {"blocks": prepared.blocks, "size": prepared.size},
        "pixels": os.path.relpath(prepared.folder, folder),
        "hf_radin": hf_radin.__version__,
    }
    write_atomically(folder / "bank.json", lambda path: path.write_text(json.dumps(about, indent=2)))


def _run(
    folder: Path,
    prepared: Prepared,
    ingredients: Ingredients,
    dtype: torch.dtype,
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    """Compute the logits of some ingredients: each process its blocks, one barrier an ingredient."""
    samples = len(np.load(folder / "ids.npy", mmap_mode="r"))
    total = samples * len(ingredients)
    with progress_bar(total=total, desc="Logits", unit="image") as bar:
        for one in ingredients:
            parts = logits_path(folder, one).with_suffix(".parts")
            mine = range(accelerator.process_index, prepared.blocks, accelerator.num_processes)
            todo = [number for number in mine if not _part_path(parts, number).exists()]
            if todo:
                model = adapter.load(one, dtype).to(accelerator.device)
            for number in mine:
                ids, _, inputs = prepared.read(number)
                if number in todo:
                    logits = (
                        adapter.forward(model, inputs, batch_size=batch_size, accelerator=accelerator).numpy()
                        if inputs
                        else np.zeros((0, len(one.labels)), dtype=np.float32)
                    )
                    if logits.shape[1] != len(one.labels):
                        raise ValueError(
                            f"{one.id} gives {logits.shape[1]} logits, but its id2label names {len(one.labels)}."
                        )
                    write_atomically(_part_path(parts, number), partial(np.save, arr=logits))
                bar.update(len(ids) * accelerator.num_processes if number + 1 < prepared.blocks else len(ids))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _join(folder, one, parts, prepared.blocks)
            accelerator.wait_for_everyone()


def _join(folder: Path, ingredient: Ingredient, parts: Path, blocks: int) -> None:
    """Put one ingredient's blocks into one file, in order, and say that it is done."""
    samples = len(np.load(folder / "ids.npy", mmap_mode="r"))
    finite = True

    def write(path: Path) -> None:
        nonlocal finite
        start = 0
        with path.open("wb") as file:  # not through a memory map: a full disk must be an error, not a crash
            shape = (samples, len(ingredient.labels))
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for number in range(blocks):
                part = np.load(_part_path(parts, number))
                file.write(np.ascontiguousarray(part, dtype="<f4").tobytes())
                finite = finite and bool(np.isfinite(part).all())
                start += len(part)
        if start != samples:
            raise ValueError(f"{ingredient.id}: {start} rows of logits for {samples} images; remove {parts}.")

    write_atomically(logits_path(folder, ingredient), write)
    write_record(folder, ingredient, finite=finite)
    shutil.rmtree(parts)


def _usable(folder: Path, ingredients: Ingredients) -> Ingredients:
    """The ingredients whose logits are all finite.

    Raises:
        ValueError: if fewer than two are.
    """
    finite = [one.id for one in ingredients if is_finite(folder, one)]
    broken = [name for name in ingredients.ids if name not in finite]
    if len(finite) < 2:
        raise ValueError(
            f"{', '.join(broken)} give NaN or infinite logits, and a soup needs two ingredients: "
            f"{len(finite)} of {len(ingredients)} are left."
        )
    if broken:
        logger.warning("%s give NaN or infinite logits: left out of the soup.", ", ".join(broken))
    return ingredients.select(finite)


def _batch_size(batch_size: int | str) -> int:
    if batch_size == "auto":
        return BATCH_SIZE
    if isinstance(batch_size, (bool, str)) or not hasattr(batch_size, "__index__") or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: it is 'auto' or a number of images, at least 1.")
    return operator.index(batch_size)


def _part_path(parts: Path, number: int) -> Path:
    return parts / f"block-{number:06d}.npy"
