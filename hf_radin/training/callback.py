"""The callback that makes a soup of a run's checkpoints when the training ends."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from hf_radin.ingredients.gather import gather
from hf_radin.logits.compute import compute_logits
from hf_radin.runtime.files import check_output
from hf_radin.runtime.processes import Processes
from hf_radin.search.radin import radin
from hf_radin.training.average import RunningAverage, decay_at
from hf_radin.training.checks import (
    AFTERWARDS,
    Training,
    check_resumed,
    check_training,
    is_adapted,
    saved_config,
)
from hf_radin.training.collection import Collection
from hf_radin.training.options import SoupOptions

if TYPE_CHECKING:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_radin.soup.soup import Soup

logger = logging.getLogger(__name__)

# What a state has after it was given to a callback; each training has a state of its own.
_MARK = "_hf_radin_soup"


class SoupCallback(TrainerCallback):
    """A soup of a run's checkpoints, made on the evaluation set when transformers' `Trainer` has trained.

    `trainer.add_callback(SoupCallback(dataset["validation"], budget=4))` is all that it takes. Before the first step
    it is checked that there will be checkpoints, with image processors, and that the images have the model's classes.
    The training is what it would be without the callback. The soup is that of `gather`, `compute_logits` and `radin`
    for the same checkpoints, in the mixed precision of the training, whatever the number of processes. If none can be
    made in the end, an error is logged, and the training ends as it would.

    Checkpoints that `save_total_limit` removes stay as ingredients in `<output_dir>/_soup_ingredients`, as further
    names of their files, or as copies on disks that have no such names; so do adapters, with the configuration that
    names their classes. A resumed run goes on with those of the whole run.

    Args:
        dataset: the evaluation set, whose images choose the soup: a `Dataset` with a column of images, whatever
            transform it has, a dictionary of these, a folder or a Hub id. (Callbacks are not told what the Trainer has
            before it evaluates.)
        output: folder for the soup, with recipe and card; by default `<output_dir>/soup`.
        last: how many of the last checkpoints it is made of; by default all.
        decay: make it of exponential averages in place of the checkpoints: of all weights after each step, of which
            `decay` is left at each further step, or `(1 + step) / (10 + step)` where that is less. The average is in
            memory in float32 and is written for each checkpoint; a run goes on with that of the checkpoint that it
            is resumed from. The averages are never loaded into the training.
        overwrite: allow an output folder that is not empty, and remove the ingredients of an earlier run.
        license: for the card; by default that of the ingredients, if they agree.
        options: those of `radin` (`budget`, `metric`, `keep`, `test_split`, `seed`, ...), of `compute_logits`
            (`split`, `image_column`, `label_column`, `batch_size`, `cache_dir`, ...), and `image_processor`,
            `base_model` and `trust_remote_code` of `gather`.

    Attributes:
        soup: the `Soup`; None before it is made, or if none can be.

    Raises:
        ValueError: for an option that can't be used, here or when the training begins.
        TypeError: for an option that there is not.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        output: str | Path | None = None,
        last: int | None = None,
        decay: float | None = None,
        overwrite: bool = False,
        license: str | None = None,
        **options: Any,
    ):
        place = None if output is None else Path(output)
        self._given = SoupOptions.of(
            dataset, options, output=place, last=last, decay=decay, overwrite=overwrite, license=license
        )
        self._options = self._given
        self._collection = Collection(Path())
        self._average: RunningAverage | None = None
        self.soup: Soup | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        """Check all that can be checked, and go on with what an earlier part of the run collected."""
        _refuse_another(state)
        given, model = self._given, _unwrapped(model)
        options = self._options = replace(given, output=given.output or Path(args.output_dir) / "soup")
        self.soup, self._average = None, None
        with _beside_training() as processes:
            check_training(Training(args, state, model, processing_class), options, processes)
            self._collection = Collection(
                Path(args.output_dir),
                args.save_total_limit or None,
                options.decay,
                options.last,
                saved_config(model) if is_adapted(model) else None,
            )
            processes.decide(partial(self._begin, state.global_step, model))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        **others: Any,
    ) -> None:
        """Take the weights into the average."""
        if self._average is not None:
            weights = _unwrapped(model).state_dict()
            self._average.update(weights, decay_at(state.global_step, self._options.decay or 0.0))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        """Collect the checkpoint that was saved. What can't be kept is no reason to end a training."""
        if not state.is_world_process_zero:
            return
        try:
            write = None if self._average is None else partial(self._write_average, model, processing_class)
            self._collection.add(state.global_step, write)
        except Exception as error:  # safetensors' own, say, of a disk that is full
            logger.error("The checkpoint of step %d will not be in the soup: %s", state.global_step, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Make the soup."""
        self._average = None
        try:
            with _beside_training() as processes:
                self.soup = self._make(processes)
        except Exception as error:  # a user's metric, or a GPU that is full: what was trained is not lost by it
            is_foreseen = isinstance(error, (ValueError, OSError))
            if args.world_size > 1 and not is_foreseen:  # the other processes wait for this one, and end with it
                raise
            if state.is_world_process_zero:
                logger.error(
                    "No soup was made of the checkpoints in %s: %s You can %s.",
                    args.output_dir,
                    error if is_foreseen else f"{type(error).__name__}: {error}.",
                    AFTERWARDS.format(self._collection.parent),
                    exc_info=not is_foreseen,
                )

    def _begin(self, step: int, model: Any) -> None:
        """What the main process does when a training begins, which was resumed if it has gone some steps."""
        options, collection = self._options, self._collection
        output = options.output or Path()
        if output.resolve() in (collection.run.resolve(), collection.folder.resolve()):
            raise ValueError(f"SoupCallback: the output {output} is the run's own folder. Name another one.")
        check_output(output, overwrite=options.overwrite)
        if step:
            check_resumed(model, collection.checkpoint(step), trust_remote_code=options.trusts_code)
            collection.resume(step)
        else:
            collection.begin(overwrite=options.overwrite)
        if options.decay is not None:
            weights = model.state_dict()
            if step:
                trusts = options.trusts_code
                self._average = RunningAverage.read(collection.place(step), weights, trust_remote_code=trusts)
            else:
                self._average = RunningAverage.of(weights)

    def _write_average(self, model: Any, processor: Any, folder: Path) -> None:
        """Fill a folder with the average as a checkpoint."""
        if self._average is not None:
            self._average.write(_unwrapped(model), folder)
        if processor is not None:
            processor.save_pretrained(folder)

    def _make(self, processes: Processes) -> Soup:
        """The soup, which is saved.

        Raises:
            ValueError: if it can't be made.
        """
        options = self._options
        places: list[Path] = processes.decide(self._collection.places)
        if not processes.smallest(int(all(place.is_dir() for place in places))):
            raise ValueError("not all processes see the folder of the checkpoints.")
        ingredients = gather(places, **options.vetting)
        bank = compute_logits(ingredients, options.dataset, accelerator=processes.accelerator, **options.logits)
        soup = radin(bank, **options.search)
        soup.save_pretrained(options.output or "", overwrite=options.overwrite, license=options.license)
        logger.info("The soup of %d checkpoints is in %s.", len(places), options.output)
        return soup


def _refuse_another(state: TrainerState) -> None:
    """Refuse a second callback of one training: the two would keep their ingredients under the same names.

    Raises:
        ValueError: if there is one.
    """
    if _MARK in vars(state):  # no field, and so not among what the Trainer saves of its state
        raise ValueError(
            "SoupCallback: the Trainer has two of them, which would take each other's ingredients: remove one "
            "(trainer.pop_callback). Of the same checkpoints another soup can be made afterwards, with hf-radin soup."
        )
    vars(state)[_MARK] = True


@contextmanager
def _beside_training() -> Iterator[Processes]:
    """The processes of a training, which is afterwards what it was: random numbers, threads, accumulated gradients."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import GradientState

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    accumulation, threads = dict(GradientState().plugin_kwargs), torch.get_num_threads()
    numbers, state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield Processes(Accelerator())
        finally:
            random.setstate(numbers)
            np.random.set_state(state)
            torch.set_num_threads(threads)
            GradientState().plugin_kwargs = accumulation


def _unwrapped(model: Any) -> torch.nn.Module:
    """A model without what wraps it for several processes or `torch.compile`."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)
