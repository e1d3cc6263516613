"""What decides about logits: how models run and on which images; and what a bank says of itself in `bank.json`."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_radin.checkpoints.autotune import Modes
from hf_radin.checkpoints.processor import check_processor, prepare_image
from hf_radin.images.cache import block_size, parse_size
from hf_radin.images.decode import Source
from hf_radin.images.sample import Pilot
from hf_radin.images.split import OBJECT, DataSource, Split, open_split
from hf_radin.ingredients.ingredient import Ingredients, refuse_given
from hf_radin.ingredients.labels import match_labels
from hf_radin.runtime.schema import read_sealed, write_sealed
from hf_radin.weights.average import FULL
from hf_radin.weights.batchnorm import IMAGES, StatisticsRecord, check_images, statistics_source

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

    from hf_radin.runtime.processes import Processes

BANK = "bank.json"
LATEST = "latest.json"

# What is decided by the machine.
AUTO = "auto"

# Mixed precision, by accelerate's names of it.
PRECISIONS = (AUTO, "no", "bf16", "fp16", "fp8")

# What to do about a broken file of a bank.
COMPUTE_AGAIN = "Compute the logits again (compute_logits, hf-radin logits): intact files are reused."

# Seconds of work after which a process writes what it has, and so what a killed run loses at most: where a block takes
# all models longer, it is shown to a few after others. One model's logits of one block are not divided.
WRITE_EVERY = 5.0

# Seconds between two lines of a log, where there is no bar.
LOG_EVERY = 60.0


@dataclass(frozen=True)
class RunOptions:
    """How ingredients are run over images. The names are those of `compute_logits`, which explains the others.

    Args:
        mixed_precision: by accelerate's name of it; `auto` is what the accelerator was given, if it was.
        write_every: seconds of work after which a process writes what it has.
        log_every: seconds between two lines of a log, where there is no bar.
        block_size: samples in a block of images and logits; by default what suits the split.

    Raises:
        ValueError: for a value that can't be used.
    """

    batch_size: int | str = "auto"
    models_in_memory: int | str = "auto"
    pixel_cache: int | str = "auto"
    workers: int | str = "auto"
    channels_last: bool | str = "auto"
    torch_compile: bool | str = "auto"
    mixed_precision: str = "auto"
    dtype: str = "float32"
    logits_dtype: str = "float32"
    on_error: str = "raise"
    strangers: str = "warn"
    batchnorm_split: str | None = None
    batchnorm_images: int = IMAGES
    cache_dir: str | Path | None = None
    write_every: float = WRITE_EVERY
    log_every: float = LOG_EVERY
    block_size: int | None = None

    def __post_init__(self) -> None:
        check_number("batch_size", self.batch_size)
        check_number("models_in_memory", self.models_in_memory)
        check_number("workers", self.workers, least=0)
        parse_size(self.pixel_cache)
        for name in ("channels_last", "torch_compile"):
            if not isinstance(getattr(self, name), bool) and getattr(self, name) != AUTO:
                raise ValueError(f"{name}={getattr(self, name)!r}: it is 'auto', True or False.")
        if self.mixed_precision not in PRECISIONS:
            names = ", ".join(map(repr, PRECISIONS))
            raise ValueError(f"mixed_precision={self.mixed_precision!r}: it is one of {names}.")
        if self.logits_dtype not in ("float32", "float16"):
            raise ValueError(f"logits_dtype={self.logits_dtype!r}: it is 'float32' or 'float16'.")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={self.on_error!r}: it is 'raise' or 'skip'.")
        if self.strangers not in ("warn", "drop", "keep"):
            raise ValueError(f"strangers={self.strangers!r}: it is 'warn', 'drop' or 'keep'.")
        check_images(self.batchnorm_images)

    def settled(self, modes: Modes) -> RunOptions:
        """These options, where modes of a GPU take the place of `auto`."""
        return replace(self, **{name: getattr(modes, name) for name in self.open_modes})

    def on(self, processes: Processes) -> RunOptions:
        """These options, without `auto` where nothing is to be chosen: on CPUs, or as this run was started.

        Raises:
            ValueError: if it was started with another mixed precision.
        """
        options = self
        if self.mixed_precision == AUTO and (named := processes.precision) is not None:
            options = replace(self, mixed_precision=named)
        elif self.mixed_precision == AUTO and self.dtype != "float32":
            options = replace(self, mixed_precision="no")
        elif self.mixed_precision != AUTO and not processes.has_precision(self.mixed_precision):
            raise ValueError(
                f"mixed precision {self.mixed_precision!r}: this run was started with {processes.precision!r}; "
                f"accelerate launch --mixed_precision {self.mixed_precision}."
            )
        return options if processes.is_on_gpu else options.settled(Modes())

    @property
    def open_modes(self) -> list[str]:
        """The names of the modes of a GPU that are `auto`."""
        return [field.name for field in fields(Modes) if getattr(self, field.name) == AUTO]

    def samples_in_block(self, samples: int | None) -> int:
        """Samples in a block of a split with so many samples; None if that is not known before it is read."""
        return self.block_size or block_size(samples)


@dataclass(frozen=True)
class DataRecord:
    """Where a split's images are, and what they are.

    Args:
        name: Hub id or folder; of an object, `Dataset`.
        key: identifies the content: commit, file listing or fingerprint. Of a recipe it is not kept.
        label_column: empty if no labels are known.
    """

    name: str
    split: str
    config_name: str | None = None
    revision: str | None = None
    key: str = ""
    image_column: str | None = None
    label_column: str | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether the labels of the images are known."""
        return self.label_column != ""

    @classmethod
    def of(cls, split: Split) -> DataRecord:
        """The record of an open split."""
        names = ("name", "split", "config_name", "revision", "key", "image_column", "label_column")
        return cls(**{name: getattr(split, name) for name in names})


@dataclass(frozen=True)
class RunRecord:
    """All that decides about the bits of logits beside images and weights.

    Args:
        processor: the image processor, as `describe_processor` describes it.
        dtype: of the weights while running.
        mixed_precision: by accelerate's name of it.
        channels_last, torch_compile, logits_dtype, on_error: see `RunOptions`.
    """

    processor: dict[str, Any]
    dtype: str
    mixed_precision: str
    channels_last: bool
    torch_compile: bool
    logits_dtype: str
    on_error: str


def is_in_full_precision(run: RunOptions | RunRecord) -> bool:
    """Whether weights, what models make of images and logits are float32 or more: ensembles are mixed in that, too."""
    return run.dtype in FULL and run.mixed_precision == "no" and run.logits_dtype in FULL


@dataclass(frozen=True)
class BankManifest:
    """What `bank.json` says of a bank.

    Args:
        data: the split that the logits are of.
        classes: class names in the order of the logits.
        run: how the models were run.
        batch_size: images in a forward pass.
        samples: in the split, whatever part of it has logits.
        skipped: ids of the images that were left out.
        rows: images that have logits.
        block_size: samples in a block of prepared images.
        blocks: of each the shard, its number there and how many samples it has.
        pixels: folder of the prepared images, relative to that of the bank.
        dataset: what to open again for the images; None if they came as an object.
        pilot: the part of the split that has logits; None for all, or where `chosen` says which.
        chosen: whether the images that have logits were chosen one by one, after a pilot.
        origin: of a bank from the Hub the repository and commit, as in `org/bank@sha`.
        hf_radin: the version that wrote it.
        key: of all that decides about the logits; where they were computed, the folder's name. All other records of
            the bank are sealed with it.
        arrays: the SHA-256 of the files that say of each sample what it is, by their names.
        multi_label: whether an image may have any number of classes: logits say of each by itself whether it is there.
    """

    data: DataRecord
    classes: tuple[str, ...]
    run: RunRecord
    batch_size: int
    samples: int
    skipped: tuple[int, ...]
    rows: int
    block_size: int
    blocks: tuple[tuple[int, int, int], ...]
    pixels: str
    hf_radin: str
    dataset: str | None = None
    pilot: Pilot | None = None
    chosen: bool = False
    origin: str | None = None
    key: str = ""
    arrays: dict[str, str] = field(default_factory=dict)
    multi_label: bool = False

    @classmethod
    def read(cls, folder: Path) -> BankManifest:
        """The manifest of the bank in a folder.

        Raises:
            ValueError: if there is none, or one that is broken or of an earlier version.
        """
        try:
            return read_sealed(cls, folder / BANK, BANK, way_out=COMPUTE_AGAIN)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is not a logit bank, or was never finished ({error}).") from error

    def write(self, folder: Path) -> None:
        """Say that the bank in a folder has all but its logits."""
        write_sealed(folder / BANK, self, BANK)


@dataclass(frozen=True)
class StatisticsPlace:
    """Images that soups estimate their BatchNorm statistics from.

    Args:
        record: what they are.
        pixels: folder of the prepared images, relative to that of the bank.
        size: images in a batch.
    """

    record: StatisticsRecord
    pixels: str
    size: int


@dataclass(frozen=True)
class Latest:
    """What the last computation in a folder was for (`latest.json`): several sets of checkpoints may share it.

    Args:
        keys: of the ingredients.
        remarks: ids (or nothing) and what is to be said of these checkpoints.
        statistics: where the images for BatchNorm statistics are.
    """

    keys: tuple[str, ...]
    remarks: tuple[tuple[str, str], ...]
    statistics: StatisticsPlace | None

    @classmethod
    def read(cls, folder: Path, bank: str) -> Latest:
        """What the last computation in a folder was for.

        Args:
            bank: the key of its manifest.

        Raises:
            ValueError: if none was finished: what lies there may belong to several sets that don't fit each other.
        """
        try:
            return read_sealed(cls, folder / LATEST, bank, way_out=COMPUTE_AGAIN)
        except FileNotFoundError as error:
            raise ValueError(f"no computation of it was finished by this version. {COMPUTE_AGAIN}") from error

    def write(self, folder: Path, bank: str) -> None:
        """Let this be the last computation in a folder."""
        write_sealed(folder / LATEST, self, bank)


def check_ingredients(ingredients: Ingredients) -> None:
    """Refuse fewer than two ingredients.

    Raises:
        ValueError: if there are fewer.
    """
    if len(ingredients) < 2:
        raise ValueError(f"A soup needs at least two ingredients; {len(ingredients)} were given.")


def check_number(name: str, value: int | str, *, least: int = 1) -> int | str:
    """`auto`, or a number.

    Raises:
        ValueError: if it is neither.
    """
    if value == "auto":
        return value
    if isinstance(value, (bool, str)) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name}={value!r}: it is 'auto' or a number, at least {least}.")
    return operator.index(value)


def reopen_images(folder: Path, ingredients: Ingredients, source: DataSource) -> Source:
    """The images of the bank in a folder.

    Args:
        source: where they are.

    Raises:
        ValueError: if they are no longer there or no longer the same, or only logits of them were given.
    """
    refuse_given(ingredients, "What is computed from images")
    manifest = BankManifest.read(folder)
    if is_object(source):
        _refuse_object(folder / manifest.pixels, manifest)
    split = _reopen(replace(source, split=manifest.data.split), manifest.data.key, folder)
    to_class = match_labels(split, ingredients.labels, multi_label=ingredients.multi_label)
    prepare = partial(prepare_image, _same_processor(ingredients, manifest))
    return Source(split, prepare, to_class, manifest.run.on_error, manifest.block_size)


def reopen_sample(folder: Path, ingredients: Ingredients, source: DataSource, record: StatisticsRecord) -> Source:
    """The images that BatchNorm statistics are estimated from. Arguments and errors as of `reopen_images`."""
    manifest = BankManifest.read(folder)
    if is_object(source):
        _refuse_object(folder, manifest)
    split = _reopen(replace(source, split=record.split, labelled=False), record.data, folder)
    processor = _same_processor(ingredients, manifest)
    return statistics_source(split, processor, count=record.images, seed=record.seed, on_error=record.on_error)


def is_object(source: DataSource) -> bool:
    """Whether the images came as an object, which can't be opened again."""
    return isinstance(source.dataset, str) and source.dataset == OBJECT


def _reopen(source: DataSource, key: str, folder: Path) -> Split:
    split = open_split(source)
    if split.key != key:
        raise ValueError(f"{split.name} has changed since the logits in {folder} were computed; compute them again.")
    return split


def _same_processor(ingredients: Ingredients, manifest: BankManifest) -> BaseImageProcessor:
    ingredients.by_content[0].download()
    processor = ingredients.processor
    check_processor(processor, manifest.run.processor)
    return processor


def _refuse_object(folder: Path, manifest: BankManifest) -> NoReturn:
    if manifest.origin:
        raise ValueError(
            f"The images of the bank {manifest.origin} are not on the Hub, so that no soup can be measured on them. "
            "Search with budget=0, unmeasured=True (--budget 0 --unmeasured): recipes are then estimated only."
        )
    raise ValueError(f"{folder} is gone, or parts of it; run compute_logits again to prepare the images anew.")
