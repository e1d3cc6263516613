"""The checkpoints of a run that make its soup, whatever the Trainer removes and however often it is resumed."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.ingredients.resolve import STATE
from hf_radin.runtime.files import PARTIAL, is_of_a_checkpoint, remove_partials, write_json
from hf_radin.runtime.schema import read_record

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

# The folder in a run where ingredients are that are not, or will not be, among its checkpoints. A Trainer that pushes
# its output leaves out what begins so.
FOLDER = "_soup_ingredients"

RECORD = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """Which checkpoints a run has saved.

    Args:
        steps: of each, the earliest first.
        decay: of the average that was kept of each; None if it is the checkpoint itself.
    """

    steps: tuple[int, ...] = ()
    decay: float | None = None


@dataclass(frozen=True)
class Collection:
    """What is collected of a run; all of it is on disk, so that a resumed run goes on with it.

    Args:
        run: the folder that the Trainer writes to.
        limit: the Trainer's `save_total_limit`; None if it removes no checkpoint.
        decay: of the average that is kept of each checkpoint in its place.
        last: how many of the last checkpoints the soup is made of; None for all.
        config: of the model that adapters are trained in, which names their classes; None of whole checkpoints.
    """

    run: Path
    limit: int | None = None
    decay: float | None = None
    last: int | None = None
    config: PretrainedConfig | None = None

    @property
    def folder(self) -> Path:
        """Where ingredients are that are kept apart."""
        return self.run / FOLDER

    @property
    def is_apart(self) -> bool:
        """Whether ingredients are kept apart: averages, adapters, and checkpoints that the Trainer will remove."""
        return self.decay is not None or self.config is not None or bool(self.limit)

    @property
    def parent(self) -> Path:
        """The folder that the ingredients are in."""
        return self.folder if self.is_apart else self.run

    def places(self) -> list[Path]:
        """Where the ingredients of the soup are."""
        steps = self._read().steps
        places = [self.place(step) for step in (steps if self.last is None else steps[-self.last :])]
        if gone := [place.name for place in places if not place.is_dir()]:
            logger.warning("%s: %s were removed, and are not in the soup.", self.run, ", ".join(gone))
        return [place for place in places if place.is_dir()]

    def place(self, step: int) -> Path:
        """Where the ingredient of a step is."""
        apart = self.folder / f"checkpoint-{step}"
        return apart if self.decay is not None or apart.is_dir() else self.checkpoint(step)

    def checkpoint(self, step: int) -> Path:
        """Where the Trainer saves a checkpoint."""
        return self.run / f"checkpoint-{step}"

    def begin(self, *, overwrite: bool) -> None:
        """Begin with a new run.

        Raises:
            ValueError: if ingredients of an earlier run are kept here, and may not be removed.
        """
        remove_partials(self.folder)
        earlier = sorted(self.folder.glob("checkpoint-*"))
        if earlier and not overwrite:
            raise ValueError(
                f"{self.folder} keeps ingredients of an earlier run, {earlier[0].name} and others: resume that run, "
                "remove the folder, pass overwrite=True, or choose another output_dir."
            )
        for folder in earlier:
            shutil.rmtree(folder)
        self._write(())

    def resume(self, step: int) -> None:
        """Go on with a run that was resumed from the checkpoint of a step.

        Raises:
            ValueError: if the run kept averages and this one keeps none, or the other way round, or an average is not
                there.
        """
        remove_partials(self.folder)
        try:
            record = self._read()
        except FileNotFoundError:
            record = self._met(step)
        if record.decay != self.decay:
            raise ValueError(
                f"{self.folder}: the run was begun with decay={record.decay} and is resumed with decay={self.decay}: "
                f"averaged and raw weights are not mixed. Pass decay={record.decay}, or begin a new run."
            )
        steps = {number for number in record.steps if number <= step and self.place(number).is_dir()}
        if step not in steps:  # of a run that was killed between the Trainer's checkpoint and ours
            if self.decay is not None:
                known = f"resume from checkpoint-{max(steps)}, " if steps else ""
                raise ValueError(
                    f"{self.place(step)} is not there, which is the average that the run would go on with: {known}"
                    "leave decay out in a new run, or begin anew."
                )
            if self.checkpoint(step).is_dir():
                steps.add(step)
        for number in {*record.steps} - steps:  # they are made again
            shutil.rmtree(self.folder / f"checkpoint-{number}", ignore_errors=True)
        for number in steps if self.is_apart and self.decay is None else ():
            if not (self.folder / f"checkpoint-{number}").is_dir():
                self._fill(number, partial(self._link, number))
        self._write(sorted(steps))

    def add(self, step: int, write: Callable[[Path], object] | None = None) -> None:
        """Collect the checkpoint of a step, which the Trainer has just saved.

        Args:
            write: fills a folder with the average that is kept in its place.
        """
        if self.is_apart:
            self._fill(step, write or partial(self._link, step))
        steps = sorted({*self._read().steps, step})
        if len(steps) == 1 and self.is_apart:
            self._say_size(step)
        if self.last is not None:  # a checkpoint that is still there may be resumed from
            gone = [number for number in steps[: -self.last] if not self.checkpoint(number).is_dir()]
            for number in gone:
                shutil.rmtree(self.folder / f"checkpoint-{number}", ignore_errors=True)
            steps = [number for number in steps if number not in gone]
        self._write(steps)

    def _met(self, step: int) -> RunRecord:
        """The record of a run that was begun without one, by the checkpoints that it has."""
        folders = [folder for folder in self.run.glob("checkpoint-*") if (folder / STATE).is_file()]
        steps = [int(number) for folder in folders if (number := folder.name.partition("-")[2]).isdecimal()]
        return RunRecord(tuple(sorted(number for number in steps if number <= step)))

    def _read(self) -> RunRecord:
        return read_record(RunRecord, self.folder / RECORD, way_out="Begin a new run.")

    def _write(self, steps: Sequence[int]) -> None:
        write_json(self.folder / RECORD, asdict(RunRecord(tuple(steps), self.decay)))

    def _fill(self, step: int, write: Callable[[Path], object]) -> None:
        """Let `write` fill a temporary folder, then give it the name of a step's ingredient."""
        place = self.folder / f"checkpoint-{step}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=PARTIAL) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            write(new)
            shutil.rmtree(place, ignore_errors=True)
            new.replace(place)

    def _link(self, step: int, new: Path) -> None:
        """Give the files of a checkpoint a second name, which takes no room, or copy them where a disk has none."""
        for path in self.checkpoint(step).iterdir():
            if is_of_a_checkpoint(path.name) or path.suffix == ".py" or path.name in (STATE, "README.md"):
                try:
                    os.link(path, new / path.name)
                except OSError:
                    shutil.copyfile(path, new / path.name)
        if self.config is not None:
            self.config.save_pretrained(new)

    def _say_size(self, step: int) -> None:
        """Say how much room the ingredients take."""
        size = sum(path.stat().st_size for path in self.place(step).iterdir()) / 1e9
        why = "with the names of their classes" if self.decay is None else f"with decay={self.decay}"
        if self.limit and self.decay is None:
            why = f"save_total_limit={self.limit} removes them"
        what = "files" if self.decay is None else "average"
        logger.warning(
            "The %s of each checkpoint, %.2g GB, stay in %s, as ingredients of the soup (%s). Remove the folder when "
            "the soup is not to be cooked again.",
            what,
            size,
            self.folder,
            why,
        )
