"""What the processes of one run agree on, and what only the main one says."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

T = TypeVar("T")

# How long processes wait for each other. They meet only when a group of models has seen all images, and by then one
# may be hours behind another; the usual ten minutes would end a run that is well.
PATIENCE = timedelta(days=1)

_accelerator: Accelerator | None = None


class MainStoppedError(ValueError):
    """The main process has stopped for an error, and says it; the others end with it."""


def the_accelerator(given: Accelerator | None = None) -> Accelerator:
    """The accelerator of this run: the one that a user gave, else one as `accelerate launch` set it up."""
    global _accelerator
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if given is not None:
        if not isinstance(given, Accelerator):
            raise ValueError(f"accelerator={given!r}: it is an Accelerator of accelerate's.")
        _accelerator = given
    if _accelerator is None:
        # an Accelerator, not a PartialState: made first, that would settle for one process where the CPU is used
        _accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    return _accelerator


def device_name(accelerator: Accelerator) -> str:
    """What a process of this run computes on, for the record."""
    import torch

    device = accelerator.device
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    name = getattr(getattr(torch, device.type, None), "get_device_name", lambda _: device.type)
    return str(name(device))


def on_main_process(decide: Callable[[], T]) -> T:
    """What `decide` returns in the main process, in every process: what all must agree on is decided once.

    Raises:
        MainStoppedError: in the others, if `decide` raises a ValueError or OSError in the main process.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    error: Exception | None = None
    if the_accelerator().is_main_process:
        try:
            found[0] = decide()
        except (ValueError, OSError) as caught:
            error, found[1] = caught, str(caught)
    result, said = broadcast_object_list(found)
    if error is not None:
        raise error
    if said is not None:
        raise MainStoppedError(said)
    return cast(T, result)


def over_processes(score: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Scores `(rows,)`, where each process works on some of the rows; all call this with the same and get the same."""
    import torch

    accelerator = the_accelerator()
    if accelerator.num_processes == 1:
        return score(rows)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    found = torch.zeros(len(rows), dtype=torch.float64)  # each score comes from one process, and from all others a 0
    if len(rows[mine]):
        found[mine] = torch.from_numpy(score(rows[mine]))
    scores: np.ndarray = accelerator.reduce(found.to(accelerator.device), reduction="sum").cpu().numpy()
    return scores


def smallest(number: int) -> int:
    """The smallest of all processes' numbers."""
    from accelerate.utils import gather_object

    return int(min(gather_object([number])))


def local_processes() -> int:
    """How many processes of this run share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def progress_bar(**options: Any) -> Iterator[Any]:
    """A bar of the main process, above which log lines go; HF_HUB_DISABLE_PROGRESS_BARS silences it."""
    from huggingface_hub.utils import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        tqdm(disable=not is_main_process() or None, leave=False, unit_scale=True, **options) as bar,
        nullcontext() if bar.disable else logging_redirect_tqdm(_loggers_to_the_terminal(), tqdm),
    ):
        yield bar


def _loggers_to_the_terminal() -> list[logging.Logger]:
    """Those that write to it themselves: the root, and libraries that have a handler of their own (transformers)."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [
        logger
        for logger in loggers
        if isinstance(logger, logging.Logger)
        and any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in logger.handlers)
    ]


def is_main_process() -> bool:
    """Whether this process speaks for all; the environment says it before anybody has decided about devices."""
    return int(os.environ.get("RANK", "0")) == 0


def leave(*, together: bool = True) -> None:
    """Part from the other processes: an interpreter that ends while it is connected may abort. Trackers end too.

    A second call does nothing.

    Args:
        together: wait for the others; not after an error, which they may not have heard of.
    """
    if together and (distributed := _connection()):
        distributed.barrier()
    if _accelerator is not None and _accelerator.trackers:
        _accelerator.end_training()  # closes the process group, since accelerate 1: nothing may be waited for after it
        _accelerator.trackers = []
    if distributed := _connection():
        distributed.destroy_process_group()


def _connection() -> Any:
    """torch.distributed while this process is connected with others; else None, and torch is not loaded for it."""
    distributed = sys.modules.get("torch.distributed")
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if is_connected else None
