"""Trackers (trackio, tensorboard, wandb) that hear how a run goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_radin.runtime.processes import PATIENCE, the_accelerator

_seen = 0


def track(names: list[str], folder: Path, settings: dict[str, Any]) -> None:
    """Let trackers that accelerate knows (trackio, tensorboard, wandb) hear what is logged from here on.

    Args:
        folder: where those write that keep files.
        settings: of the run, to be shown beside it.

    Raises:
        ValueError: if one is not installed.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import InitProcessGroupKwargs

    there = [str(one.value) for one in get_available_trackers()]
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(f"--log-with {missing[0]}: it is not installed. pip install {missing[0]}")
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = the_accelerator(Accelerator(log_with=names, project_dir=folder, kwargs_handlers=[patience]))
    plain = {name: one if isinstance(one, (bool, int, float)) else str(one) for name, one in settings.items()}
    try:
        accelerator.init_trackers("hf_radin", config=plain)
    except OSError as error:
        accelerator.trackers = []  # what never began can't end
        raise ValueError(f"--log-with {' '.join(names)}: nothing can be written to {folder}: {error}") from error


def log(values: dict[str, float], *, images: int = 0) -> None:
    """Tell the trackers, if there are any, what came of so many images more.

    A step is an image that a model or a soup has seen: trackers want one count for all that they hear.
    """
    count_images(images)
    the_accelerator().log(values, step=_seen)


def count_images(images: int) -> None:
    """Let the steps of what is logged begin after what an earlier run has seen, where it is not seen again."""
    global _seen
    _seen += images
