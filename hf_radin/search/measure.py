"""Measure averaged weights on a split, image by image; what was measured once is cached beside the bank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.images.pixels import Inputs, join, select
from hf_radin.images.shards import Block, BlockRows, grouped
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import Pace, Spent, Target, write_part
from hf_radin.logits.passes import Passes, compute_soup
from hf_radin.metrics.named import Answers
from hf_radin.recipes.pruning import NONE, Pruned
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.runtime.files import digest
from hf_radin.runtime.schema import known_arrays, known_record, read_arrays, write_arrays, write_sealed
from hf_radin.tail.front import Front, FrontRun
from hf_radin.tail.stand_ins import Tail
from hf_radin.weights.head import Head, LastLayers, Recording
from hf_radin.weights.refit import Lesson, Refit, refit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The class of an image that a soup was not shown.
UNKNOWN = -2

# What is named as the device of soups that a function evaluates.
EVALUATE = "evaluate"


@dataclass(frozen=True, eq=False)
class RefittedAnswers:
    """What a refitted head says of the images that its soup was shown: the head of the other folds, of each image.

    Args:
        refit: the head that all these images teach; its own `predictions` are of these only.
        predictions: `(samples,)`, multi-label `(samples, classes)`; `UNKNOWN` for all other images.
        logits: `(samples, classes)`; None if they were not wanted.
    """

    refit: Refit
    predictions: np.ndarray
    logits: np.ndarray | None


class MeasuredSoup:
    """A soup that is measured bit by bit: what it predicts for the images that it was shown.

    What was measured once is cached beside the bank and not measured again. Of multi-label models predictions are
    decisions, `(samples, classes)`, as `multi_label.decisions_of` gives them.

    Args:
        bank: on whose images.
        recipe: names what is measured.
        make_model: averages the weights; it is called when the first image is shown, and never if all are known.
        entries: whose logits of the soup are cached too, in `values` `(entries,)`; NaN of images that it was not
            shown.
        head: whose features are cached too, for `refit`; by default none are.
        last_layers: the hash of those that its model has in the place of the averaged ones.
    """

    def __init__(
        self,
        bank: LogitBank,
        recipe: Recipe,
        make_model: Callable[[], PreTrainedModel],
        entries: Pruned | None = None,
        head: Head | None = None,
        last_layers: str | None = None,
    ):
        self.bank, self.recipe = bank, recipe
        self._make_model = make_model
        self._model: PreTrainedModel | None = None
        self._tail: Tail | None = None  # of the model, where it runs alone
        self._recording: Recording | None = None
        decide = bank.processes.decide
        self._path = bank.soup_path(recipe, last_layers)
        self._classes: np.ndarray = decide(lambda: self._read(self._path, _unknown(bank, bank.samples)))  # of all
        self.predictions = _unknown(bank, len(bank))
        places, classes = entries.entries if entries else (np.zeros(0, int), np.zeros(0, int))
        self._entries = bank.places[places], classes  # positions in the split
        part = bank.part if bank.partial is None else bank.partial.unseen
        is_whole = [True] if entries is not None and not entries.top else []  # all classes of all images
        key = digest(bank.ingredients.keys, bank.partial is None, part is not None and part.tolist(), *is_whole)
        self._values_path = self._path.with_name(f"{self._path.stem}-{key}.npz")
        self._pace_path = self._path.with_suffix(".json")
        pace_subject = self._subject(self._pace_path)
        self._pace: Pace = decide(lambda: known_record(Pace, self._pace_path, pace_subject) or Pace())
        self._head, self._features = head, bank.soup_features(recipe)
        # images whose features are cached, bool (samples of the split,)
        self._recorded = decide(lambda: self._features.shown(bank.samples)) if head else np.ones(bank.samples, bool)
        nothing = np.full(len(classes), np.nan, dtype=np.float32)
        self.values: np.ndarray = decide(lambda: self._read(self._values_path, nothing)) if len(classes) else nothing

    @property
    def shown(self) -> np.ndarray:
        """Which images of the bank it was shown before, bool `(samples,)`: to look at these takes no model."""
        return ~self._missing[self.bank.places]

    def look(self, images: np.ndarray, *, on_block: Callable[[int], object] = lambda samples: None) -> np.ndarray:
        """Show it images; `predictions` then has their classes too, -1 where a logit is not finite.

        Each process takes its blocks; one sum of integers brings them together. Images of several of its blocks run
        together: the last bits of their logits may depend on the number of processes.

        Args:
            images: bool `(samples,)`.
            on_block: hears how many images of all processes went by.

        Raises:
            ValueError: if this run's mixed precision is not that of the bank.
        """
        places = self.bank.places
        missing = np.zeros(self.bank.samples, dtype=bool)
        missing[places] = images
        missing &= self._missing
        on_block(int(np.sum(images & ~missing[places] & is_unknown(self.predictions))))
        if missing.any():
            self._measure(missing, on_block)
        self.predictions = where_images(images, self._classes[places], self.predictions)
        return self.predictions

    @property
    def _missing(self) -> np.ndarray:
        """Images of the split of which something that is wanted is not known, bool."""
        missing = is_unknown(self._classes) | ~self._recorded
        entries, _ = self._entries
        missing[entries[~np.isfinite(self.values) & is_predicted(self._classes)[entries]]] = True
        return missing

    def logits(self) -> tuple[np.ndarray, Spent]:
        """Its logits on the images of the bank `(samples, classes)`, and what those of the whole split took.

        They are cached beside the bank, block by block until all are there. Images that it was not shown yet count as
        shown: their predictions are known then.

        Raises:
            ValueError: as `look` does.
        """
        bank, path = self.bank, self._path.with_name(f"{self._path.stem}-logits.npy")
        target = Target("Logits of the soup", path, len(bank.classes), self._subject(path))
        write_known = partial(self._write_known, target)
        logits, pace = compute_soup(
            target, bank.images, self._make_model, bank.passes(), bank.samples, write_known=write_known
        )
        unknown = np.flatnonzero(is_unknown(self._classes))
        if len(unknown):
            self._classes[unknown] = bank.predictions_of(logits[unknown])
            bank.processes.decide(lambda: self._write(self._path, self._classes))
        return np.asarray(logits[bank.places]), Spent.on(pace.seconds, pace.device)

    @property
    def kept_logits(self) -> np.ndarray:
        """Where all entries are wanted (`Pruned.top` is 0), the logits of images that it was shown.

        Of the images of the bank, float32 `(samples, classes)`; zeros where a logit is no finite number, and of images
        that it was not shown.
        """
        logits = self.values.reshape(-1, len(self.bank)).T
        return np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits, np.float32(0))

    def took(self, images: int) -> tuple[float | None, str | None]:
        """The seconds that it takes to show it so many images, and on which device.

        Averaging included, at the pace of all that were timed; None if none were.
        """
        pace = self._pace
        return (round(pace.seconds * images / pace.images, 3) if pace.images else None), pace.device

    def forget(self) -> None:
        """Release the model; it is made anew if there is more to show."""
        self._model = self._tail = self._recording = None

    def refit(self, teacher: Teacher, *, seed: int = 0, with_logits: bool = False) -> RefittedAnswers:
        """Its head refitted to a teacher, without a further pass, as `refit.refit` does it.

        The images that it was shown by `look` teach it. In `predictions` they have the class, or the decisions, that
        the head of the other folds gives them, and all others are `UNKNOWN`. The soup may have been shown them in
        other batches than a single pass would make: for the head that is saved see `cook.refit_head`.

        Args:
            with_logits: whether the logits of these images are wanted, too.

        Raises:
            ValueError: if the logits of the teacher are not known of all images, or there are too few of these.
        """
        bank, row = self.bank, self.bank.row(teacher.ensemble)

        def refitted() -> RefittedAnswers:
            images, features = self._features.read()
            layer, places = self._features.layer(), bank.places[~is_unknown(self.predictions)]
            if layer is None or not np.isin(places, images).all():
                raise ValueError(f"{self._features.folder} was changed while it was used. Run the same again.")
            rows, shown = np.searchsorted(images, places), np.flatnonzero(~is_unknown(self.predictions))
            labels = np.asarray(bank.labels)[shown] if teacher.labels else None
            device = bank.processes.float64_device
            teaching = bank.mixed(row, shown)
            lesson = Lesson(features[rows], teaching, layer, labels, device=device, multi_label=bank.is_multi_label)
            result = refit(lesson, bank.contents[shown], seed=seed)
            predictions, logits = _unknown(bank, len(bank)), None
            predictions[shown] = result.predictions
            if with_logits:
                logits = np.zeros((len(bank), len(bank.classes)), dtype=np.float32)
                logits[shown] = result.unseen_logits(features[rows])
            return RefittedAnswers(result, predictions, logits)

        return bank.processes.decide(refitted)

    def _measure(self, missing: np.ndarray, on_block: Callable[[int], object]) -> None:
        """Show the soup the missing images of the split, bool `(samples,)`, and write what it predicts."""
        bank, processes, begun = self.bank, self.bank.processes, time.perf_counter()
        passes = bank.passes()
        run, tally = self._front_run(passes), _Tally(bank, self._entries, missing)
        for block, logits, features in self._answers(passes, run, tally):
            images = tally.note(block, logits.astype(passes.logits_dtype))  # as what it is compared with is stored
            if features is not None:
                self._features.write(block, images, features)
            on_block(len(images) * processes.count)
        processes.wait()
        if self._head is not None:
            processes.sync_files(self._features.folder, "*.npz")
        processes.sync_files(bank.images.folder, "*.json")
        processes.decide(bank.images.check_order)
        classes, shown = processes.sum(tally.classes), int(processes.sum(tally.shown))
        if shown != missing.sum():
            raise RuntimeError(f"{shown} images were measured where {missing.sum()} were meant; this is a bug.")
        self._classes = where_images(missing, classes.numpy(), self._classes)
        self._recorded = self._recorded | missing
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

    def _answers(
        self, passes: Passes, run: FrontRun | None, tally: _Tally
    ) -> Iterator[tuple[Block, np.ndarray, np.ndarray | None]]:
        """This process's blocks, and of their images that are missing the logits `(images, classes)` and the features
        `(images, features)`, if these are wanted.

        Of a block few images may be missing: those of several blocks, up to as many as a block has, run together.
        """
        images, processes, known = self.bank.images, passes.processes, set()
        # none are listed where what the pixels are is not known here: they are decoded again as they are streamed
        listed = filter(tally.is_wanted, images.blocks_of(processes.index, processes.count))
        groups = list(grouped([BlockRows(block, tally.rows(block)) for block in listed], images.size))
        for group in groups:
            if run is not None and (logits := run.known(group)) is not None:
                known |= {part.block for part in group}
                yield from self._by_block(group, logits)
        waiting: dict[Block, Inputs] = {}

        def streamed() -> Iterator[BlockRows]:
            for block, inputs in passes.stream(images, lambda block: tally.is_wanted(block) and block not in known):
                part = BlockRows(block, tally.rows(block))
                waiting[block] = select(inputs, part.rows)
                yield part

        # what runs together is the same whatever is known: the last bits of logits may depend on it
        for group in grouped(streamed(), images.size, begin={group[0].block for group in groups}):
            inputs = join([waiting.pop(part.block) for part in group])
            logits = passes.running.logits([self._model], inputs)[0] if run is None else run.logits(group, inputs)
            yield from self._by_block(group, logits)

    def _by_block(
        self, group: list[BlockRows], logits: np.ndarray
    ) -> Iterator[tuple[Block, np.ndarray, np.ndarray | None]]:
        """The blocks of a group, with the logits and the features of each that the model has just given."""
        features, start = self._take_features(), 0
        for part in group:
            of_part = slice(start, start + len(part.rows))
            yield part.block, logits[of_part], None if features is None else features[of_part]
            start = of_part.stop

    def _take_features(self) -> np.ndarray | None:
        """Those of the images that went by since the last call; None if none are recorded."""
        return None if self._recording is None else self._recording.take()

    def _front_run(self, passes: Passes) -> FrontRun | None:
        """The soup, made if it was not; as it runs where the ingredients share a front. None if they share none.

        All processes call this at the same point.
        """
        images, front = self.bank.images, self.bank.front()
        if self._model is None:
            self._model = self._new_model(passes, front)
        if front is None:
            return None
        room = passes.room(images) if images.is_cached_by_all() else 0  # pixels come first
        if self._tail is None:
            return None
        return FrontRun(self._model, self._tail, front.activations, passes.running, room)

    def _write_known(self, target: Target) -> None:
        """Write the logits of those of this process's blocks for which all of the soup need not run."""
        passes, processes, front = self.bank.passes(), self.bank.processes, self.bank.front()
        if front is None or processes.decide(lambda: front.activations.is_empty):
            return
        if (run := self._front_run(passes)) is None:
            return
        for block in self.bank.images.blocks_of(processes.index, processes.count):
            begun, samples = time.perf_counter(), self.bank.blocks[block]
            if samples.start < samples.stop and not target.part(block).exists():
                logits = run.known([BlockRows(block, np.arange(samples.stop - samples.start))])
                if logits is not None:
                    write_part(target, block, logits.astype(passes.logits_dtype), time.perf_counter() - begun)
                if self._recording is not None:
                    self._recording.take()  # they are cached when images are looked at

    def _new_model(self, passes: Passes, front: Front | None) -> PreTrainedModel:
        """The soup, ready to run; its features are recorded from now on if its head may be refitted."""
        model, running = self._make_model(), passes.running
        if self._head is not None and self.bank.processes.is_main:
            self._features.write_layer(self._head.layer_of(model))
        has_front = front is not None and front.is_of(model.to(running.dtype))
        model = running.ready(model)
        if front is not None and has_front:
            self._tail = front.tail_of(model, running)
        if self._head is not None:
            self._recording = Recording(model, self._head)
        return model

    def _subject(self, path: Path) -> str:
        """What a file of the soup is about; its name says of which recipe."""
        return f"{self.bank.manifest.key} {path.name}"

    def _read(self, path: Path, nothing: np.ndarray) -> np.ndarray:
        """The array in a file; a broken file, or an array of another form, tells nothing."""
        array = (known_arrays(path, self._subject(path)) or {}).get("array", nothing)
        return array if (array.shape, array.dtype) == (nothing.shape, nothing.dtype) else nothing

    def _write(self, path: Path, array: np.ndarray) -> None:
        write_arrays(path, {"array": array}, self._subject(path))


class EvaluatedSoup(MeasuredSoup):
    """A soup of models that are no checkpoints: a function averages their weights (`LogitBank.from_arrays`).

    The function gives the logits of all images of the split at once. They are kept beside the bank, and all else is
    read from them.
    """

    def logits(self) -> tuple[np.ndarray, Spent]:
        """As of any soup; it is shown all images, if it was not."""
        logits = self._evaluated()
        self._classes = self.bank.predictions_of(logits)
        return logits[self.bank.places], Spent.on(self._pace.seconds, self._pace.device)

    def _measure(self, missing: np.ndarray, on_block: Callable[[int], object]) -> None:
        logits = self._evaluated()
        self._classes, self.values = self.bank.predictions_of(logits), logits[self._entries]
        on_block(int(missing.sum()))

    def _evaluated(self) -> np.ndarray:
        """The soup's logits of all images of the split, float32 `(samples, classes)`."""
        path = self._path.with_name(f"{self._path.stem}-evaluated.npz")
        self._pace = self.bank.processes.decide(lambda: self._evaluate(path))
        (logits,) = read_arrays(path, self._subject(path)).values()
        return logits

    def _evaluate(self, path: Path) -> Pace:
        """Have a file with the logits; returns what they took."""
        bank, begun = self.bank, time.perf_counter()
        if bank.given is None or known_arrays(path, self._subject(path)) is not None:
            return self._pace
        logits = bank.given.logits(self.recipe, (bank.samples, len(bank.classes)))
        pace = self._pace.after(time.perf_counter() - begun, bank.samples, EVALUATE)
        write_sealed(self._pace_path, pace, self._subject(self._pace_path))
        self._write(path, logits)
        return pace


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
        # an entry for each sample, filled by the process that has its block, and how many were filled
        self.classes = torch.zeros_like(_as_tensor(_unknown(bank, bank.samples)))
        self.shown = torch.zeros(1, dtype=torch.int64)
        self.values = torch.zeros(len(self._images))

    def is_wanted(self, block: Block) -> bool:
        """Whether images of a block are shown."""
        return bool(self.missing[self.blocks[block]].any())

    def rows(self, block: Block) -> np.ndarray:
        """The places in a block of the images that are shown."""
        return np.flatnonzero(self.missing[self.blocks[block]])

    def note(self, block: Block, logits: np.ndarray) -> np.ndarray:
        """Note the logits of a block's images that are shown `(images, classes)`: their positions in the split."""
        samples, rows = self.blocks[block], self.rows(block)
        self.classes[samples.start + rows] = _as_tensor(self.bank.predictions_of(logits))
        self.shown += len(rows)
        first, last = np.searchsorted(self._images[self._order], (samples.start, samples.stop))
        entries = self._order[first:last]
        entries = entries[self.missing[self._images[entries]]]
        positions = np.searchsorted(rows, self._images[entries] - samples.start)
        classes = self._classes[entries]
        values = np.where(classes == NONE, 0, logits[positions, classes])  # that of none is 0, as in `Pruned.entries`
        self.values[entries] = _as_tensor(values.astype(np.float32))
        return samples.start + rows


def measured_soup(
    bank: LogitBank, recipe: Recipe, entries: Pruned | None = None, head: Head | None = None
) -> MeasuredSoup:
    """The soup of a recipe of a bank's ingredients, measured on its images; `entries` and `head` as there.

    Raises:
        ValueError: if the bank has logits alone, and nothing averages weights.
    """
    make_model = partial(bank.soup_model, recipe)
    if bank.given is not None:
        bank.check_measurable(f"The soup of {', '.join(recipe.used)}")
        in_order = recipe.in_order(bank.ingredients.by_content.ids)  # whatever the order, it is evaluated once
        return EvaluatedSoup(bank, in_order, make_model, entries)
    return MeasuredSoup(bank, recipe, make_model, entries, head)


def soup_answers(
    bank: LogitBank,
    recipe: Recipe,
    *,
    with_logits: bool = False,
    on_block: Callable[[int], object] = lambda samples: None,
) -> tuple[Answers, MeasuredSoup]:
    """What a soup says of all images of a bank, and the soup.

    Args:
        with_logits: whether its logits are wanted: they are held in memory where a search may hold them, else read
            from a file. Of an image with a logit that is no finite number they are zeros.
    """
    is_kept = with_logits and bank.processes.decide(partial(bank.is_prunable, 0))
    soup = measured_soup(bank, recipe, bank.pruned(0) if is_kept else None)
    predictions, logits = soup.look(np.ones(len(bank), dtype=bool), on_block=on_block), None
    if with_logits:
        logits = soup.kept_logits if is_kept else np.where(is_predicted(predictions)[:, None], soup.logits()[0], 0.0)
    return Answers(predictions, np.asarray(bank.labels), len(bank.classes), logits), soup


def refitted_soup(bank: LogitBank, recipe: Recipe, head: LastLayers) -> MeasuredSoup:
    """The soup of a recipe with a head that was refitted to other images than a bank's, measured on its images."""
    make_model = partial(bank.soup_model, recipe, head=head)
    return MeasuredSoup(bank, recipe, make_model, last_layers=head.sha256)


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def is_unknown(predictions: np.ndarray) -> np.ndarray:
    """Of which images nothing is predicted yet: bool `(samples,)`. Decisions are known of all classes or of none."""
    return np.asarray((predictions if predictions.ndim == 1 else predictions[:, 0]) == UNKNOWN)


def is_predicted(predictions: np.ndarray) -> np.ndarray:
    """Of which images something is predicted, because all logits are finite numbers: bool `(samples,)`."""
    return np.asarray((predictions if predictions.ndim == 1 else predictions[:, 0]) >= 0)


def where_images(images: np.ndarray, predictions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The predictions of these images, bool `(samples,)`, and the others of all others."""
    return np.where(images if predictions.ndim == 1 else images[:, None], predictions, others)


def _unknown(bank: LogitBank, samples: int) -> np.ndarray:
    """What is predicted of images before they are shown."""
    if bank.is_multi_label:
        return np.full((samples, len(bank.classes)), UNKNOWN, np.int8)
    return np.full(samples, UNKNOWN)
