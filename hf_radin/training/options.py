"""What a user says of a soup at the end of a training; most of it by the names that it has without one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_radin.images.cache import find_home
from hf_radin.images.sample import Pilot
from hf_radin.images.split import DataSource
from hf_radin.ingredients.checkpoint_files import Options
from hf_radin.ingredients.gather import find_processor, gather
from hf_radin.logits.compute import compute_logits, dtype_name
from hf_radin.logits.manifest import RunOptions
from hf_radin.search.radin import radin

# Of `gather`'s arguments, what can be said of checkpoints that are yet to be made.
OF_CHECKPOINTS = {"image_processor", "base_model", "trust_remote_code"}

# What the training decides, or can't be known before it.
DECIDED = {"accelerator", "apart_from", "recipes"}


@dataclass(frozen=True)
class SoupOptions:
    """The arguments of `SoupCallback`, which explains them.

    Args:
        vetting, logits, search: what goes to `gather`, `compute_logits` and `radin`.

    Raises:
        ValueError: for a value that can't be used, as far as that is known without a model and images.
    """

    dataset: Any
    output: Path | None = None
    last: int | None = None
    decay: float | None = None
    overwrite: bool = False
    license: str | None = None
    vetting: Mapping[str, Any] = field(default_factory=dict)
    logits: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_whole = isinstance(self.last, int) and not isinstance(self.last, bool)
        if self.last is not None and not (is_whole and self.last >= 2):
            raise ValueError(f"last={self.last!r}: a soup is made of the last two checkpoints at least.")
        if self.decay is not None and not (isinstance(self.decay, float) and 0 < self.decay < 1):
            raise ValueError(f"decay={self.decay!r}: it is what is left of the average at each step, as in 0.999.")
        given = _given(compute_logits, self.logits)
        RunOptions(**{**_of(RunOptions, self.logits), "dtype": dtype_name(given.dtype)})
        Pilot.of(given.pilot)

    @classmethod
    def of(cls, dataset: Any, options: Mapping[str, Any], **others: Any) -> SoupOptions:
        """The options, each for the function that takes it.

        Raises:
            TypeError: if no function takes one.
        """
        of_logits, of_search = _keywords(compute_logits) - DECIDED, _keywords(radin) - DECIDED
        if unknown := sorted(options.keys() - OF_CHECKPOINTS - of_logits - of_search):
            raise TypeError(
                f"SoupCallback takes no {unknown[0]!r}: beside its own arguments it takes those of radin and "
                f"compute_logits, except {', '.join(sorted(DECIDED))}; and {', '.join(sorted(OF_CHECKPOINTS))}."
            )
        return cls(
            dataset,
            vetting=_among(options, OF_CHECKPOINTS),
            logits=_among(options, of_logits),
            search=_among(options, of_search),
            **others,
        )

    @property
    def source(self) -> DataSource:
        """The images that choose."""
        return DataSource(self.dataset, **_of(DataSource, self.logits))

    @property
    def home(self) -> Path:
        """Where logits and images are cached."""
        return find_home(_given(compute_logits, self.logits).cache_dir)

    @property
    def has_processor(self) -> bool:
        """Whether the user names an image processor in place of the checkpoints' own."""
        return _given(gather, self.vetting).image_processor is not None

    def check_processor(self) -> None:
        """See that the image processor is there that the user names.

        Raises:
            ValueError: if it is not, or can't be used.
        """
        find_processor(self.vetting["image_processor"], Options(trust_remote_code=self.trusts_code))

    @property
    def trusts_code(self) -> bool:
        """Whether code that comes with a checkpoint may run."""
        return bool(_given(gather, self.vetting).trust_remote_code)

    @property
    def other_splits(self) -> list[str]:
        """The splits that prove the soup or teach its head."""
        given = _given(radin, self.search)
        return [name for name in (given.test_split, given.head_split) if isinstance(name, str)]

    @property
    def allows_overlap(self) -> bool:
        """Whether these may share images with the one that chooses."""
        return bool(_given(radin, self.search).allow_overlap)


def _of(record: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    return _among(options, {entry.name for entry in fields(record)})


def _among(options: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The options of these names."""
    return {name: value for name, value in options.items() if name in names}


def _given(function: Callable[..., Any], options: Mapping[str, Any]) -> SimpleNamespace:
    """What a function is given, with the defaults of what the user does not say."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return SimpleNamespace(**{**defaults, **options})


def _keywords(function: Callable[..., Any]) -> set[str]:
    """The names of a function's arguments that are given by their names."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
