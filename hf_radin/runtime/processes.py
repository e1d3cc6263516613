"""The processes of one run: what they agree on, what only the main one does, and the trackers that follow it."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hf_radin.runtime import file_sync
from hf_radin.runtime.files import Checks
from hf_radin.runtime.liveness import Watch, watch_others
from hf_radin.runtime.text import printable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator

T = TypeVar("T")

# How long processes wait for each other. They meet only when a group of models has seen all images, and by then one
# may be hours behind another; the usual ten minutes would end a run that is well.
PATIENCE = timedelta(days=1)


class MainStoppedError(ValueError):
    """The main process stopped with an error, which it reports itself; the others end with it."""


class Processes:
    """The processes of one run. It is handed down to everything that several processes do together.

    Args:
        accelerator: with the device, processes and mixed precision to use; by default what `accelerate launch` set
            up. It is made when it is first needed, so that nothing loads torch before.

    Raises:
        ValueError: if it is not an `accelerate.Accelerator`.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        if accelerator is not None:
            from accelerate import Accelerator

            if not isinstance(accelerator, Accelerator):
                raise ValueError(f"accelerator={accelerator!r}: it is an Accelerator of accelerate's.")
        self._accelerator = accelerator
        self._is_given = accelerator is not None
        self._watch: Watch | None = None
        self._images = 0
        self.is_apart: dict[Path, bool] = {}  # by folder, see `file_sync`
        self.checks = Checks()

    @property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of this run."""
        if self._accelerator is None:
            self._watch = watch_others()
            # an Accelerator, not a PartialState: made first, that would settle for one process where the CPU is used
            self._accelerator = _make_accelerator()
            atexit.register(self.leave, together=False)  # for scripts: they know of no connection
        return self._accelerator

    @property
    def count(self) -> int:
        """How many processes there are."""
        return int(self.accelerator.num_processes)

    @property
    def local_count(self) -> int:
        """How many of them share this machine."""
        return local_processes()

    @property
    def index(self) -> int:
        """Which of them this is."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def precision(self) -> str | None:
        """The mixed precision that an accelerator or its launcher was given; None if nobody named one."""
        precision = str(self.accelerator.mixed_precision)
        is_named = self._is_given or "ACCELERATE_MIXED_PRECISION" in os.environ or precision != "no"
        return precision if is_named else None

    def has_precision(self, precision: str) -> bool:
        """Whether this run was started with a mixed precision, or with none, so that it may use it."""
        return self.precision in (None, precision)

    @property
    def is_on_gpu(self) -> bool:
        """Whether the device is a GPU that CUDA (or ROCm) knows."""
        return self.device.type == "cuda"

    @property
    def has_bfloat16(self) -> bool:
        """Whether the device computes in bfloat16, and does not emulate it."""
        import torch

        return self.is_on_gpu and torch.cuda.get_device_capability(self.device) >= (8, 0)

    @property
    def float64_device(self) -> str:
        """That device if it is one for numbers in double precision, which Apple's is not; else the CPU."""
        return str(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def device_name(self) -> str:
        """The name of the device, for the record."""
        import torch

        device = self.device
        if device.type == "cpu":
            threads = torch.get_num_threads()
            return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
        name = getattr(getattr(torch, device.type, None), "get_device_name", lambda _: device.type)
        return str(name(device))

    def check_launch(self) -> None:
        """Refuse to work alone where several processes were launched.

        Raises:
            ValueError: if accelerate knows of another number of processes than the launcher.
        """
        if (launched := launched_processes()) != self.count:
            raise ValueError(
                f"{launched} processes were launched, accelerate knows of {self.count}. "
                "On CPUs, set ACCELERATE_USE_CPU=true; make no PartialState before the Accelerator."
            )

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()

    def decide(self, decision: Callable[[], T]) -> T:
        """What `decision` returns in the main process, in every process: what all must agree on is decided once.

        Raises:
            MainStoppedError: in the others, if `decision` raises a ValueError or OSError in the main process.
        """
        from accelerate.utils import broadcast_object_list

        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = decision()
            except (ValueError, OSError) as caught:
                error = caught
        result, message = broadcast_object_list([result, error and str(error)])
        if error is not None:
            raise error
        if message is not None:
            raise MainStoppedError(message)
        return cast(T, result)

    def score(self, score: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Scores `(rows,)`, where each process works on its part of the rows; all call this with the same rows."""
        import torch

        if self.count == 1:
            return score(rows)
        part = slice(self.index, None, self.count)
        scores = torch.zeros(len(rows), dtype=torch.float64)  # each score comes from one process, a 0 from the others
        if len(rows[part]):
            scores[part] = torch.from_numpy(score(rows[part]))
        return self.sum(scores).numpy()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        return self.accelerator.reduce(values.to(self.device), reduction="sum").cpu()

    def smallest(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        from accelerate.utils import gather_object

        return int(min(gather_object([number])))

    def on_each_disk(self, folder: Path, change: Callable[[], object]) -> None:
        """Let one process of each disk change a folder: the main one where all machines share it."""
        file_sync.on_each_disk(self, folder, change)

    def sync_files(self, folder: Path, *patterns: str) -> None:
        """Copy the files of a folder that match a pattern to each machine that lacks them. See `file_sync`."""
        file_sync.sync_files(self, folder, *patterns)

    def track(self, trackers: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        """Log to trackers that accelerate knows (trackio, tensorboard, wandb) from here on.

        Args:
            folder: where trackers write that keep files.
            settings: of the run, to be shown beside it.

        Raises:
            ValueError: if one is not installed, or nothing can be written to the folder.
        """
        from accelerate.tracking import get_available_trackers

        installed = [str(tracker.value) for tracker in get_available_trackers()]
        missing = [tracker for tracker in trackers if tracker not in installed]
        if missing:
            raise ValueError(f"--log-with {missing[0]}: it is not installed. pip install {missing[0]}")
        accelerator = self._accelerator = _make_accelerator(log_with=list(trackers), project_dir=folder)
        plain = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in settings.items()
        }
        try:
            accelerator.init_trackers("hf_radin", config=plain)
        except OSError as error:
            accelerator.trackers = []  # what never began can't end
            raise ValueError(
                f"--log-with {' '.join(trackers)}: nothing can be written to {folder}: {error}"
            ) from error

    def log(self, values: Mapping[str, float], *, images: int = 0) -> None:
        """Log values to the trackers, if there are any.

        Args:
            images: that models or soups have seen since the last call: a step is an image, since trackers want one
                count for all that is logged.
        """
        self.count_images(images)
        self.accelerator.log(dict(values), step=self._images)

    def count_images(self, images: int) -> None:
        """Move the step of what is logged by images that an earlier run has seen, and this one does not see again."""
        self._images += images

    def leave(self, *, together: bool = True) -> None:
        """Disconnect from the other processes, and end trackers.

        An interpreter that ends while it is connected may abort: a thread of gloo drops the tensors of the last
        exchange, and needs for that an interpreter that is no more.

        A second call does nothing.

        Args:
            together: wait for the others; not after an error, which they may not know of.
        """
        if together and (distributed := _connection()):
            distributed.barrier()
        if self._accelerator is not None and self._accelerator.trackers:
            self._accelerator.end_training()  # also closes the process group: nothing may be waited for after it
            self._accelerator.trackers = []
        if self._watch is not None:
            self._watch.end()
        if distributed := _connection():
            distributed.destroy_process_group()


def is_main_process() -> bool:
    """Whether this is the main process; the environment says so before anybody has decided about devices."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_of_machine() -> bool:
    """Whether this process is the first on its machine, by the environment, as `is_main_process`."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def launched_processes() -> int:
    """How many processes were launched, by the environment, as `is_main_process`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """How many processes of this run share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def progress_bar(*, desc: str, **options: Any) -> Iterator[Any]:
    """A bar of the main process, with log lines above it; HF_HUB_DISABLE_PROGRESS_BARS silences it."""
    from huggingface_hub.utils import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    name = printable(desc)
    with (
        tqdm(disable=not is_main_process() or None, leave=False, unit_scale=True, desc=name, **options) as bar,
        nullcontext() if bar.disable else logging_redirect_tqdm(_terminal_loggers(), tqdm),
    ):
        yield bar


def _make_accelerator(**options: Any) -> Accelerator:
    """An accelerator as `accelerate launch` set it up, patient enough for long passes."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **options)


def _connection() -> Any:
    """torch.distributed while this process is connected to others; else None, and torch is not loaded for it."""
    distributed = sys.modules.get("torch.distributed")
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if is_connected else None


def _terminal_loggers() -> list[logging.Logger]:
    """Loggers that write to the terminal: the root, and libraries with a handler of their own (transformers)."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [
        logger
        for logger in loggers
        if isinstance(logger, logging.Logger)
        and any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in logger.handlers)
    ]
