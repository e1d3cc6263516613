"""What the processes of one run agree on, and what only the main one says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def on_main_process(decide: Callable[[], T]) -> T:
    """What `decide` returns in the main process, in every process: what all must agree on is decided once."""
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

    # an Accelerator, not a PartialState: made first, that would settle for one process where the CPU is used
    return broadcast_object_list([decide() if Accelerator().is_main_process else None])[0]


def smallest(number: int) -> int:
    """The smallest of all processes' numbers."""
    from accelerate.utils import gather_object

    return int(min(gather_object([number])))


def local_processes() -> int:
    """How many processes of this run share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def progress_bar(**options: Any) -> Any:
    """A bar of the main process; HF_HUB_DISABLE_PROGRESS_BARS silences it."""
    from huggingface_hub.utils import tqdm

    return tqdm(disable=not is_main_process() or None, leave=False, unit_scale=True, **options)


def is_main_process() -> bool:
    """Whether this process speaks for all; the environment says it before anybody has decided about devices."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """Part from the other processes, when all is done: an interpreter that ends while it is connected may abort."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
