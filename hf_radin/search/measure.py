"""Measure averaged weights on a split, image by image; what was measured once is cached beside the bank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.images.pixels import Inputs, select
from hf_radin.images.shards import Block
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import Joined, Spent, Target, not_as_written, open_array
from hf_radin.logits.passes import Passes, compute_soup
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import digest, take_away
from hf_radin.runtime.schema import MADE_ANEW, known_arrays, known_record, read_sealed, write_arrays, write_sealed
from hf_radin.weights.average import average_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The class of an image that a soup was not shown.
UNKNOWN = -2


@dataclass(frozen=True)
class Pace:
    """The seconds that devices took for so many images, added up, and which devices."""

    seconds: float = 0.0
    images: int = 0
    device: str | None = None

    def after(self, seconds: float, images: int, device: str) -> Pace:
        """The pace with further images."""
        devices = sorted({*(self.device or device).split(" and "), device})
        return Pace(round(self.seconds + seconds, 3), self.images + images, " and ".join(devices))


@dataclass(frozen=True)
class SoupRecord:
    """What is known of a soup's logits, in the file beside them: it says that they are complete.

    Args:
        pace: what they took.
        sha256: of the file that they are in.
    """

    pace: Pace
    sha256: str


class MeasuredSoup:
    """A soup that is measured bit by bit: what it predicts for the images that it was shown.

    What was measured once is cached beside the bank and not measured again.

    Args:
        bank: on whose images.
        recipe: names what is measured.
        make_model: averages the weights; it is called when the first image is shown, and never if all are known.
        entries: whose logits of the soup are cached too, in `values` `(entries,)`; NaN of images that it was not
            shown.
    """

    def __init__(
        self,
        bank: LogitBank,
        recipe: Recipe,
        make_model: Callable[[], PreTrainedModel],
        entries: Pruned | None = None,
    ):
        self.bank, self.recipe = bank, recipe
        self._make_model, self._model = make_model, None
        decide = bank.processes.decide
        parts = [[ingredient.key, recipe.used[ingredient.id]] for ingredient in bank.ingredients.select(recipe.used)]
        estimated = [bank.statistics.record.key] if bank.statistics else []
        self._path = bank.folder / "soups" / f"{digest(parts, *estimated)}.npz"
        unknown = np.full(bank.samples, UNKNOWN)
        self._classes: np.ndarray = decide(lambda: self._read(self._path, unknown))  # of the whole split
        self.predictions = np.full(len(bank), UNKNOWN)
        places, classes = entries.entries if entries else (np.zeros(0, int), np.zeros(0, int))
        self._entries = bank.places[places], classes  # positions in the split
        part = bank.part if bank.partial is None else bank.partial.unseen
        key = digest(bank.ingredients.keys, bank.partial is None, part is not None and part.tolist())
        self._values_path = self._path.with_name(f"{self._path.stem}-{key}.npz")
        self._pace_path = self._path.with_suffix(".json")
        pace_subject = self._subject(self._pace_path)
        self._pace: Pace = decide(lambda: known_record(Pace, self._pace_path, pace_subject) or Pace())
        nothing = np.full(len(classes), np.nan, dtype=np.float32)
        self.values: np.ndarray = decide(lambda: self._read(self._values_path, nothing)) if len(classes) else nothing

    def look(self, images: np.ndarray, *, on_block: Callable[[int], object] = lambda samples: None) -> np.ndarray:
        """Show it images; `predictions` then has their classes too, -1 where a logit is not finite.

        Each process takes its blocks; one sum of integers brings them together.

        Args:
            images: bool `(samples,)`.
            on_block: hears how many images of all processes went by.

        Raises:
            ValueError: if this run's mixed precision is not that of the bank.
        """
        places = self.bank.places
        missing = np.zeros(self.bank.samples, dtype=bool)
        missing[places] = images
        unknown = self._classes == UNKNOWN
        entries, _ = self._entries
        unknown[entries[~np.isfinite(self.values) & (self._classes[entries] >= 0)]] = True
        missing &= unknown
        on_block(int(np.sum(images & ~missing[places] & (self.predictions == UNKNOWN))))
        if missing.any():
            self._measure(missing, on_block)
        self.predictions = np.where(images, self._classes[places], self.predictions)
        return self.predictions

    def logits(self) -> tuple[np.ndarray, Spent]:
        """Its logits on the images of the bank `(samples, classes)`, and what those of the whole split took.

        They are cached beside the bank, block by block until all are there. Images that it was not shown yet count as
        shown: their predictions are known then.

        Raises:
            ValueError: as `look` does.
        """
        bank, processes = self.bank, self.bank.processes
        passes, path = bank.passes(), self._path.with_name(f"{self._path.stem}-logits.npy")
        record_path, subject = path.with_suffix(".json"), self._subject(path)
        device = processes.device_name

        def write_record(joined: Joined) -> None:
            pace = Pace().after(joined.seconds, bank.samples, device)
            write_sealed(record_path, SoupRecord(pace, joined.sha256), subject)

        def discard_broken() -> None:
            record = known_record(SoupRecord, record_path, subject)
            if record is not None and processes.checks.broken({path: record.sha256}):
                logger.warning("%s", not_as_written([path], MADE_ANEW))
            elif record is not None:
                return
            take_away(record_path)
            take_away(path)

        processes.on_each_disk(path.parent, discard_broken)
        processes.wait()
        processes.sync_files(path.parent, path.name, record_path.name)
        if processes.decide(lambda: not record_path.exists()):
            target = Target("Logits of the soup", path, len(bank.classes), subject)
            compute_soup(target, bank.images, self._make_model, passes, bank.samples, write_record)
        pace = processes.decide(lambda: read_sealed(SoupRecord, record_path, subject)).pace
        logits = open_array(path)
        unknown = np.flatnonzero(self._classes == UNKNOWN)
        if len(unknown):
            self._classes[unknown] = _predicted(logits[unknown])
            processes.decide(lambda: self._write(self._path, self._classes))
        return np.asarray(logits[bank.places]), Spent.on(pace.seconds, pace.device)

    def took(self, images: int) -> tuple[float | None, str | None]:
        """The seconds that it takes to show it so many images, and on which device.

        Averaging included, at the pace of all that were timed; None if none were.
        """
        pace = self._pace
        return (round(pace.seconds * images / pace.images, 3) if pace.images else None), pace.device

    def forget(self) -> None:
        """Release the model; it is made anew if there is more to show."""
        self._model = None

    def _measure(self, missing: np.ndarray, on_block: Callable[[int], object]) -> None:
        """Show the soup the missing images of the split, bool `(samples,)`, and write what it predicts."""
        bank, processes, begun = self.bank, self.bank.processes, time.perf_counter()
        passes = bank.passes()
        if self._model is None:
            self._model = passes.running.ready(self._make_model())
        tally = _Tally(bank, self._entries, missing)
        for block, inputs in passes.stream(bank.images, tally.is_wanted):
            count = tally.show(passes, self._model, block, inputs)
            on_block(count * processes.count)
        processes.wait()
        processes.sync_files(bank.images.folder, "*.json")
        processes.decide(bank.images.check_order)
        classes = processes.sum(tally.classes)
        if classes[-1] != missing.sum():
            raise RuntimeError(f"{classes[-1]} images were measured where {missing.sum()} were meant; this is a bug.")
        self._classes = np.where(missing, classes[:-1].numpy(), self._classes)
        if len(tally.values):
            values = processes.sum(tally.values).numpy()
            self.values = np.where(missing[self._entries[0]], values, self.values)
        seconds = (time.perf_counter() - begun) * processes.count
        self._pace = processes.decide(lambda: self._pace.after(seconds, int(missing.sum()), processes.device_name))
        if processes.is_main:
            write_sealed(self._pace_path, self._pace, self._subject(self._pace_path))
            if len(tally.values):
                self._write(self._values_path, self.values)
            self._write(self._path, self._classes)

    def _subject(self, path: Path) -> str:
        """What a file of the soup is about; its name says of which recipe."""
        return f"{self.bank.manifest.key} {path.name}"

    def _read(self, path: Path, nothing: np.ndarray) -> np.ndarray:
        """The array in a file; a broken file, or an array of another form, tells nothing."""
        array = (known_arrays(path, self._subject(path)) or {}).get("array", nothing)
        return array if (array.shape, array.dtype) == (nothing.shape, nothing.dtype) else nothing

    def _write(self, path: Path, array: np.ndarray) -> None:
        write_arrays(path, {"array": array}, self._subject(path))


class _Tally:
    """What a soup predicts for this process's images.

    Args:
        entries: positions in the split and classes, `(entries,)` each, whose logits are wanted.
        missing: which images are shown, bool `(samples,)`.
    """

    def __init__(self, bank: LogitBank, entries: tuple[np.ndarray, np.ndarray], missing: np.ndarray):
        import torch

        self.bank, self.missing = bank, missing
        self.blocks = bank.blocks
        self._images, self._classes = entries
        self._order = np.argsort(self._images, kind="stable")
        # an entry for each sample, filled by the process that has its block, and a last one that counts them
        self.classes = torch.zeros(bank.samples + 1, dtype=torch.int64)
        self.values = torch.zeros(len(self._images))

    def is_wanted(self, block: Block) -> bool:
        """Whether images of a block are shown."""
        return bool(self.missing[self.blocks[block]].any())

    def show(self, passes: Passes, model: PreTrainedModel, block: Block, inputs: Inputs) -> int:
        """Show a model the images of a block that are missing: how many these were."""
        samples = self.blocks[block]
        rows = np.flatnonzero(self.missing[samples])
        (answers,) = passes.running.logits([model], select(inputs, rows))
        logits = answers.astype(passes.logits_dtype)  # as those that it is compared with are stored
        self.classes[samples.start + rows] = _as_tensor(_predicted(logits))
        self.classes[-1] += len(rows)
        first, last = np.searchsorted(self._images[self._order], (samples.start, samples.stop))
        entries = self._order[first:last]
        entries = entries[self.missing[self._images[entries]]]
        positions = np.searchsorted(rows, self._images[entries] - samples.start)
        self.values[entries] = _as_tensor(logits[positions, self._classes[entries]].astype(np.float32))
        return len(rows)


def measured_soup(bank: LogitBank, recipe: Recipe, entries: Pruned | None = None) -> MeasuredSoup:
    """The soup of a recipe of a bank's ingredients, measured on its images; `entries` as in `MeasuredSoup`."""
    make_model = partial(average_model, bank.ingredients, recipe, statistics=bank.statistics)
    return MeasuredSoup(bank, recipe, make_model, entries)


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def _predicted(logits: np.ndarray) -> np.ndarray:
    """The class of the largest logit of each image `(samples,)`, -1 where one is no finite number."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
