"""Compute a logit bank: every ingredient once over a split, by any number of processes, resumed where it stopped."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin import adapter, data
from hf_radin.bank import LogitBank, digest, is_finite, logits_path, record_path, write_record
from hf_radin.checkpoint import as_dtype
from hf_radin.data import OBJECT, Prepared, Split, match_labels, open_split, prepare_split
from hf_radin.files import write_atomically
from hf_radin.ingredients import Ingredient, Ingredients
from hf_radin.processes import on_main_process, progress_bar

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
        accelerator: with the device, processes and mixed precision to use; by default what `accelerate launch` set.
        cache_dir: where banks and prepared images are kept; by default `hf_radin` in HF_HOME.

    Raises:
        ValueError: if the split or its columns are not there, an image or a label can't be used, a checkpoint lacks
            weights, or fewer than two ingredients give finite logits.
    """
    from accelerate import Accelerator
    from huggingface_hub.constants import HF_HOME

    size = _batch_size(batch_size)
    weights_dtype = as_dtype(dtype or "float32")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: it is 'raise' or 'skip'.")
    accelerator = accelerator or Accelerator()
    columns = {"config_name": config_name, "image_column": image_column, "label_column": label_column}
    source = {"dataset": dataset, **columns, "revision": revision, "token": token}
    opened = open_split(split=split, **source)
    opened = replace(opened, key=on_main_process(lambda: opened.key))  # an object without fingerprint has a random one
    home = Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "hf_radin"
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
    pixels = (
        home / "pixels" / digest(data.BLOCK, *(about[name] for name in ("data", "classes", "processor", "on_error")))
    )
    folder = home / "banks" / digest(about)
    missing = on_main_process(lambda: [one.id for one in ingredients if not record_path(folder, one).exists()])
    # a checkpoint that can't be run is refused before the first image is read
    for one in ingredients.select(missing[accelerator.process_index :: accelerator.num_processes]):
        adapter.load(one, weights_dtype)
    accelerator.wait_for_everyone()
    prepared = _prepare(opened, pixels, partial(adapter.prepare, processor), to_class, on_error, accelerator)
    if accelerator.is_main_process and not (folder / "bank.json").exists():
        _found(folder, prepared, {**about, "batch_size": size})
    accelerator.wait_for_everyone()
    _run(folder, prepared, ingredients.select(missing), weights_dtype, size, accelerator)
    request = {**source, "batch_size": size, "dtype": dtype, "on_error": on_error, "cache_dir": cache_dir}
    return replace(LogitBank.open(folder), ingredients=_usable(folder, ingredients), request=request)


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


def _prepare(
    split: Split,
    folder: Path,
    prepare: Callable[..., Any],
    to_class: Callable[[Any], int],
    on_error: str,
    accelerator: Accelerator,
) -> Prepared:
    """Decode and prepare the split with all processes, unless it is there."""
    done = folder / "split.json"
    if not on_main_process(done.exists):
        length = len(split.rows) if hasattr(split.rows, "__len__") else None
        with progress_bar(total=length, desc="Preparing images", unit="image") as bar:
            blocks = prepare_split(
                split,
                folder,
                prepare=prepare,
                to_class=to_class,
                on_error=on_error,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                on_block=bar.update,
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_atomically(done, lambda path: path.write_text(json.dumps({"blocks": blocks, "size": data.BLOCK})))
        accelerator.wait_for_everyone()
    return Prepared(folder, **json.loads(done.read_text()))


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
        whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(samples, len(ingredient.labels)))
        start = 0
        for number in range(blocks):
            part = np.load(_part_path(parts, number))
            whole[start : start + len(part)] = part
            finite = finite and bool(np.isfinite(part).all())
            start += len(part)
        if start != samples:
            raise ValueError(f"{ingredient.id}: {start} rows of logits for {samples} images; remove {parts}.")
        whole.flush()

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
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: it is 'auto' or a number of images, at least 1.")
    return batch_size


def _part_path(parts: Path, number: int) -> Path:
    return parts / f"block-{number:06d}.npy"
