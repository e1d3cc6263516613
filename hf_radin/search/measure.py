"""Measure averaged weights on a split."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.images.pixels import select
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import Spent, Target
from hf_radin.logits.passes import as_computed, compute_soup
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.file_sync import share
from hf_radin.runtime.files import digest, write_atomically, write_json
from hf_radin.runtime.processes import device_name, on_main_process, the_accelerator
from hf_radin.weights.average import average_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What stands for the class of an image that a soup was not shown.
UNKNOWN = -2


@dataclass(frozen=True)
class Pace:
    """The seconds that a device took for so many images, those of several together."""

    seconds: float = 0.0
    images: int = 0
    device: str | None = None

    @classmethod
    def read(cls, path: Path) -> Pace:
        """What was kept; a broken file, or none, tells nothing."""
        try:
            found = json.loads(path.read_text())
            return cls(float(found["seconds"]), int(found["images"]), found["device"] and str(found["device"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return cls()

    def after(self, seconds: float, images: int, device: str) -> Pace:
        """With some more."""
        devices = sorted({*(self.device or device).split(" and "), device})
        return Pace(round(self.seconds + seconds, 3), self.images + images, " and ".join(devices))


class Trial:
    """A soup that is measured bit by bit: what it predicts for the images that it was shown.

    What was measured once is kept beside the bank and not measured again.

    Args:
        bank: on whose images.
        recipe: names what is measured.
        make_model: averages the weights; it is called when the first image is shown, and never if all are known.
        kept: of whose entries the soup's logits are kept too, in `values` `(entries,)`; NaN of images that it was not
            shown.
    """

    def __init__(
        self, bank: LogitBank, recipe: Recipe, make_model: Callable[[], PreTrainedModel], kept: Pruned | None = None
    ):
        self.bank, self.recipe = bank, recipe
        self._make_model, self._model = make_model, None
        parts = [[one.key, recipe.used[one.id]] for one in bank.ingredients.select(recipe.used)]
        anew = [bank.statistics.record.key] if bank.statistics else []
        self._path = bank.folder / "soups" / f"{digest(parts, *anew)}.npy"
        self._kept = on_main_process(
            lambda: _classes(self._path, bank.samples, len(bank.classes))
        )  # of the whole split
        self.predictions = np.full(len(bank), UNKNOWN)
        places, classes = kept.entries if kept else (np.zeros(0, int), np.zeros(0, int))
        self._entries = bank.places[places], classes  # positions in the split
        of_which = bank.part if bank.partly is None else bank.partly.rest
        entries = digest(bank.ingredients.keys, bank.partly is None, of_which is not None and of_which.tolist())
        self._pace_path = self._path.with_suffix(".json")
        self._pace = on_main_process(lambda: Pace.read(self._pace_path))
        self._values_path = self._path.with_name(f"{self._path.stem}-{entries}.npy")
        nothing = np.full(len(classes), np.nan, dtype=np.float32)
        self.values = on_main_process(lambda: _read(self._values_path, nothing)) if len(classes) else nothing

    def look(self, some: np.ndarray, *, on_block: Callable[[int], object] = lambda samples: None) -> np.ndarray:
        """Show it these images; `predictions` then has their classes too, -1 where a logit is not finite.

        Each process takes its blocks; one sum of integers brings them together.

        Args:
            some: bool `(samples,)`.
            on_block: hears how many images of all processes went by.

        Raises:
            ValueError: if this run's mixed precision is not that of the bank.
        """
        places = self.bank.places
        todo = np.zeros(self.bank.samples, dtype=bool)
        todo[places] = some
        unknown = self._kept == UNKNOWN
        images, _ = self._entries
        unknown[images[~np.isfinite(self.values) & (self._kept[images] >= 0)]] = True
        todo &= unknown
        on_block(int(np.sum(some & ~todo[places] & (self.predictions == UNKNOWN))))
        if todo.any():
            self._measure(todo, on_block)
        self.predictions = np.where(some, self._kept[places], self.predictions)
        return self.predictions

    def logits(self) -> tuple[np.ndarray, Spent]:
        """Its logits on the images of the bank `(samples, classes)`, and what those of the whole split took.

        They are kept beside the bank, block by block until all are there. Images that it was not shown yet count as
        shown: their predictions are known then.

        Raises:
            ValueError: as `look` does.
        """
        bank, accelerator, dtype = self.bank, the_accelerator(), self.bank.about["logits_dtype"]
        passes = as_computed(bank, accelerator)
        target = Target("Logits of the soup", self._path.with_name(f"{self._path.stem}-logits.npy"), len(bank.classes))
        note = target.path.with_suffix(".json")
        shape = bank.samples, target.classes
        if on_main_process(lambda: _array(target.path, shape, dtype) is None):
            seconds, device = compute_soup(target, dtype, bank.images, self._make_model, passes, bank.samples)
            on_main_process(lambda: write_json(note, asdict(Pace().after(seconds, bank.samples, device))))
        share(target.path.parent, target.path.name)
        pace = on_main_process(lambda: Pace.read(note))
        spent = Spent(pace.seconds if pace.images else None, frozenset(filter(None, [pace.device])))
        kept = np.load(target.path, mmap_mode="r")
        unknown = np.flatnonzero(self._kept == UNKNOWN)
        if len(unknown):
            self._kept[unknown] = _best(kept[unknown])
            on_main_process(lambda: write_atomically(self._path, partial(np.save, arr=self._kept)))
        return np.asarray(kept[bank.places]), spent

    def took(self, images: int) -> tuple[float | None, str | None]:
        """The seconds that it takes to show it so many images, and on which device.

        Averaging included, at the pace of all that were timed; None if none were.
        """
        pace = self._pace
        return (round(pace.seconds * images / pace.images, 3) if pace.images else None), pace.device

    def forget(self) -> None:
        """Let go of the model; it is made anew if there is more to show."""
        self._model = None

    def _measure(self, todo: np.ndarray, on_block: Callable[[int], object]) -> None:
        import torch

        bank, accelerator, begun = self.bank, the_accelerator(), time.perf_counter()
        passes = as_computed(bank, accelerator)
        if self._model is None:
            self._model = passes.running.ready(self._make_model())
        # one entry a sample, filled by the process that has its block, and a last one that counts them
        found = torch.zeros(bank.samples + 1, dtype=torch.int64)
        images, classes = self._entries
        values, order = torch.zeros(len(images)), np.argsort(images, kind="stable")
        blocks = bank.blocks
        for block, inputs in passes.stream(bank.images, lambda block: bool(todo[blocks[block]].any())):
            rows = np.flatnonzero(todo[blocks[block]])
            if inputs and len(rows):
                (logits,) = passes.running.logits([self._model], select(inputs, rows))
                logits = logits.astype(bank.about["logits_dtype"])  # as those that it is compared with are kept
                best = _best(logits)
                found[blocks[block].start + rows] = torch.from_numpy(best)
                found[-1] += len(best)
                here = order[slice(*np.searchsorted(images[order], (blocks[block].start, blocks[block].stop)))]
                here = here[todo[images[here]]]
                at = np.searchsorted(rows, images[here] - blocks[block].start)
                values[here] = torch.from_numpy(logits[at, classes[here]].astype(np.float32))
                on_block(len(best) * accelerator.num_processes)
        accelerator.wait_for_everyone()
        share(bank.images.folder, "*.json")
        on_main_process(bank.images.check_order)
        found = accelerator.reduce(found.to(accelerator.device), reduction="sum").cpu()
        if found[-1] != todo.sum():
            raise RuntimeError(f"{found[-1]} images were measured where {todo.sum()} were meant; this is a bug.")
        self._kept = np.where(todo, found[:-1].numpy(), self._kept)
        if len(values):
            values = accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()
            self.values = np.where(todo[images], values.numpy(), self.values)
        taken = (time.perf_counter() - begun) * accelerator.num_processes
        self._pace = on_main_process(lambda: self._pace.after(taken, int(todo.sum()), device_name(accelerator)))
        if accelerator.is_main_process:
            write_json(self._pace_path, asdict(self._pace))
            if len(values):
                write_atomically(self._values_path, partial(np.save, arr=self.values))
            write_atomically(self._path, partial(np.save, arr=self._kept))


def trial_of(bank: LogitBank, recipe: Recipe, kept: Pruned | None = None) -> Trial:
    """The soup of a recipe of a bank's ingredients, to be measured on its images; `kept` as `Trial` has it."""
    return Trial(bank, recipe, lambda: average_model(bank.ingredients, recipe, statistics=bank.statistics), kept)


def _best(logits: np.ndarray) -> np.ndarray:
    """The class of the largest logit of each image `(samples,)`, -1 where one is no finite number."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


def _classes(path: Path, samples: int, classes: int) -> np.ndarray:
    """The classes that a soup was found to predict `(samples,)`, -1 for none; unknown where a number is neither."""
    found = _read(path, np.full(samples, UNKNOWN))
    return np.where((found >= -1) & (found < classes), found, UNKNOWN)


def _read(path: Path, nothing: np.ndarray) -> np.ndarray:
    """What was kept of a soup, as far as known; a broken file, or one of another form, tells nothing."""
    found = _array(path, nothing.shape, nothing.dtype)
    return nothing if found is None else np.array(found)


def _array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """The array in a file, memory-mapped; None if there is none, or one of another form."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r")
    except Exception:  # a broken file may fail in any way
        return None
    return found if found.shape == shape and found.dtype == dtype else None
