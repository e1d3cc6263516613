"""Checkpoints on disk that differ in nothing but their numbers.

What loads of one of them loads of their average: neither torch nor transformers is needed to know that, whose imports
take longer than the average. Whatever differs, or is not as `save_pretrained` writes it, is left to `gather`, which
knows more and says what is wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_radin.checkpoints.files import (
    ADAPTER_CONFIG,
    BYTES,
    CONFIG,
    FLOATS,
    INTEGERS,
    PROCESSOR_FILES,
    Header,
    files_stamp,
    read_fields,
    weight_files,
)
from hf_radin.ingredients.resolve import Place
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.schema import from_json
from hf_radin.soup.cook import soup_config
from hf_radin.weights.average_files import Files
from hf_radin.weights.average_tensors import Tensor, open_files

# Fields of a configuration that say nothing of the model.
_NOTES = ("_", "transformers_version")

# Fields of a configuration that ask for more than the files of usual checkpoints: code, other weights, other dtypes.
_UNUSUAL = ("auto_map", "quantization_config", "transformers_weights")

MULTI_LABEL = "multi_label_classification"

# The tasks of classifiers; without one, an image has one class.
_TASKS = (None, "single_label_classification", MULTI_LABEL)

# Bytes of each tensor that tell checkpoints apart.
SAMPLE = 1024


@dataclass(frozen=True)
class ClassifierFields:
    """What is read of the configuration of a classifier."""

    architectures: tuple[str, ...]
    id2label: dict[str, str]
    problem_type: str | None = None


@dataclass(frozen=True)
class ProcessorFields:
    """What is read of the configuration of an image processor."""

    image_processor_type: str


@dataclass(frozen=True)
class Classifier:
    """What the configuration of an image classifier says of it.

    Args:
        architecture: class name of the model.
        labels: class names, in the order of the logits.
        multi_label: whether it says of each class by itself whether an image has it.
    """

    architecture: str
    labels: tuple[str, ...]
    multi_label: bool


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that agrees with others.

    Args:
        name: what the user calls it.
        folder: where it is.
        stamp: sizes and times of its files, before they were opened.
        tensors: of its files, which are open.
        sample: a hash of the beginning of each tensor. Other weights have another one.
        size: bytes of its weights.
    """

    name: str
    folder: Path
    stamp: str
    tensors: Mapping[str, Tensor]
    sample: str
    size: int


@dataclass(frozen=True)
class Agreement:
    """Checkpoints that differ in nothing but their numbers, in the order that the user named them in.

    Args:
        config, processor: the fields of their average's configuration and image processor.
    """

    checkpoints: tuple[Checkpoint, ...]
    classifier: Classifier
    config: Mapping[str, Any]
    processor: Mapping[str, Any]

    def in_order_of_content(self, recipe: Recipe) -> list[Checkpoint]:
        """The checkpoints that a recipe uses, in an order that depends on their weights, and not on their names.

        Sums are rounded: in the user's order, equal recipes would give different bits.
        """
        used = [checkpoint for checkpoint in self.checkpoints if checkpoint.name in recipe.used]
        return sorted(used, key=lambda checkpoint: checkpoint.sample)


@contextmanager
def open_agreeing(places: Sequence[Place]) -> Iterator[Agreement | None]:
    """The checkpoints at these places, their files open; None if they may differ in more than their numbers.

    All are folders on this disk, with safetensors of the same names, shapes and dtypes, the same configuration of an
    image classifier, and the same image processor. None of them seems to be a copy of another.
    """
    with ExitStack() as stack:
        try:
            agreement = _agreement(places, stack)
        except (ValueError, OSError):  # which `gather` finds, too
            agreement = None
        yield agreement


def _agreement(places: Sequence[Place], stack: ExitStack) -> Agreement | None:
    folders = [place.folder.resolve() for place in places if place.folder]
    if len(folders) < max(len(places), 2) or any(map(_is_unusual, folders)):
        return None
    stamps = [files_stamp(folder) for folder in folders]
    configs = [_decisive(read_fields(folder / CONFIG)) for folder in folders]
    processors = [read_fields(folder / PROCESSOR_FILES[0]) for folder in folders]
    classifier = read_classifier(configs[0])
    if classifier is None or not (_are_equal(configs) and _are_equal(processors) and _is_usual(processors[0])):
        return None
    files: Files = [stack.enter_context(open_files(folder)) for folder in folders]
    headers = [header_of(tensors) for tensors in files]
    if not (_are_equal(headers) and _is_averaged(headers[0]) and _has_head(headers[0], len(classifier.labels))):
        return None
    samples = [sample_of(tensors) for tensors in files]
    config = soup_config(folders, classifier.labels, classifier.architecture)
    if len({*samples}) < len(samples) or config is None:
        return None
    checkpoints = tuple(
        Checkpoint(place.name, folder, stamp, tensors, sample, _size(folder))
        for place, folder, stamp, tensors, sample in zip(places, folders, stamps, files, samples, strict=True)
    )
    return Agreement(checkpoints, classifier, config, processors[0])


def read_classifier(config: Mapping[str, Any]) -> Classifier | None:
    """What a configuration says of its image classifier; None if it takes transformers to tell.

    Raises:
        ValueError: if it does not say what the configuration of a classifier does.
    """
    fields = from_json(ClassifierFields, config)
    labels = tuple(fields.id2label.get(str(number), "") for number in range(len(fields.id2label)))
    architecture = fields.architectures[0] if len(fields.architectures) == 1 else ""
    is_usual = architecture.endswith("ForImageClassification") and not any(name in config for name in _UNUSUAL)
    if not is_usual or len(labels) < 2 or not all(labels) or fields.problem_type not in _TASKS:
        return None
    return Classifier(architecture, labels, fields.problem_type == MULTI_LABEL)


def header_of(tensors: Mapping[str, Tensor]) -> Header:
    """Dtype and shape of each tensor of a checkpoint."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def sample_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the first bytes of each tensor, in the order of their names."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(SAMPLE))
    for _, tensor in sorted(tensors.items()):
        part = buffer[: min(SAMPLE, len(tensor) * BYTES[tensor.dtype])]
        tensor.read(0, part)
        digest.update(part)
    return digest.hexdigest()[:20]


def _is_unusual(folder: Path) -> bool:
    """Whether a folder has an adapter, or an image processor beside the usual one."""
    return any((folder / name).exists() for name in (ADAPTER_CONFIG, *PROCESSOR_FILES[1:]))


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith(_NOTES)}


def _are_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _is_usual(processor: Mapping[str, Any]) -> bool:
    """Whether an image processor is of transformers, and no code of its own."""
    kind = from_json(ProcessorFields, processor).image_processor_type
    return "ImageProcessor" in kind and not any(name in processor for name in _UNUSUAL)


def _is_averaged(header: Header) -> bool:
    """Whether all tensors are weights and counters, and no quantisation."""
    dtypes = {dtype for dtype, _ in header.values()}
    return dtypes <= {*FLOATS, *INTEGERS} and bool(dtypes & {*FLOATS})


def _has_head(header: Header, classes: int) -> bool:
    """Whether there is a tensor with a row for each class, as that of a linear layer or of a convolution."""
    return any(len(shape) >= 2 and shape[0] == classes for _, shape in header.values())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))
