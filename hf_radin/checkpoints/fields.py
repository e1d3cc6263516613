"""Fields of configurations: in comparable form, those that several share, and what they may ask for.

Numbers that no image classifier has would take all memory, or hours. Models are built without memory for weights
before anything else is made of a configuration, and are held to the shapes in the header of the weights. What is
bounded here is what costs time or memory even so: the names of classes, layers one by one, the images that a processor
makes, and patterns that are tried on the names of layers.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_radin.checkpoints.files import SAVED_AGAIN
from hf_radin.runtime.files import BrokenFileError

# The largest number in a configuration, and the largest sum of the numbers in a list, as in `depths`. The largest
# vocabulary of a text tower has 900,000 words.
NUMBER = 1 << 20

# Tensors of a model; the deepest image classifiers have some 2,000.
TENSORS = 5_000

# The longest side of the images that a processor makes, in pixels.
SIDE = 4096

# The smallest part of an image that is cropped from it: the image is first made larger by as much.
SMALLEST_PART = 0.1

# Fields of an image processor that bound its images together.
_TOGETHER = ("crop_pct", "max_num_patches", "patch_size")

# Repetitions without an end in a pattern for the names of layers: each takes a hundred times as long to be tried.
REPETITIONS = 4

# Fields of a configuration that are as large as their file is.
_NAMES_OF_CLASSES = ("id2label", "label2id")

# A repeated group, whose every repetition may be read in several ways, and a repetition without an end.
_REPEATED_GROUP, _REPETITION = re.compile(r"\)\s*(?:[*+]|\{)"), re.compile(r"(?<!\\)[*+]|\{\d*,\}")


def flattened(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their paths, as in `size.height`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def comparable(value: Any) -> str:
    """A value as text, the same for equal values: 4 and 4.0 are equal, and no number equals True."""
    if isinstance(value, int):  # which True and False are, too
        return repr(value)
    if isinstance(value, float):
        return repr(int(value)) if float(value).is_integer() else repr(float(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(comparable, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {comparable(value[name])}' for name in sorted(value, key=str))}}}"
    return repr(value)


def shared_fields(configurations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that all configurations have with equal values, as the first spells them; the same for nested fields.

    A field that others don't have is a note about its run, or an option of its training.
    """
    first, *others = configurations
    shared: dict[str, Any] = {}
    for name, value in first.items():
        other_values = [fields.get(name, _ABSENT) for fields in others]
        if all(comparable(value) == comparable(other) for other in other_values):
            shared[name] = value
        elif isinstance(value, Mapping) and all(isinstance(other, Mapping) for other in other_values):
            shared[name] = shared_fields([value, *other_values])
    return shared


_ABSENT = object()


def declared_fields(configuration: type) -> set[str]:
    """The fields that a class of configurations declares, inherited ones included."""
    if dataclasses.is_dataclass(configuration):
        return {field.name for field in dataclasses.fields(configuration)}
    return {name for cls in configuration.__mro__[:-1] for name in inspect.signature(cls).parameters}


def check_config(path: Path, fields: Mapping[str, Any]) -> None:
    """Check the numbers in a configuration that its class reads; notes of somebody's own are not read.

    Raises:
        BrokenFileError: if one is larger than any image classifier's.
    """
    for name in _read_fields(fields.get("model_type")):
        if name in fields:
            for place, number in _numbers(name, fields[name]):
                if not number <= NUMBER:
                    raise _too_large(path, place, number, f"beyond {NUMBER:,}")


def _read_fields(model_type: Any) -> set[str]:
    """The fields that transformers reads of configurations of a type; none of a type that it does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {"num_labels"}
    configuration = CONFIG_MAPPING[model_type]
    names = declared_fields(configuration) | {"num_labels", *configuration.attribute_map}
    return names.difference(_NAMES_OF_CLASSES)


def check_processor(path: Path, fields: Mapping[str, Any]) -> None:
    """Check the sizes of images in the configuration of an image processor.

    Raises:
        BrokenFileError: if one is larger than any image classifier's.
    """
    for name, value in fields.items():
        if "size" in name or "patch" in name:
            for place, number in _numbers(name, value):
                # as many patches as make an image of that size
                limit = SIDE**2 if name == "max_num_patches" else SIDE
                if not number <= limit:
                    raise _too_large(path, place, number, f"beyond {limit:,} pixels")
    share, patches, side = (dict(_numbers(name, fields.get(name, 1))).get(name, 1) for name in _TOGETHER)
    if not share >= SMALLEST_PART:
        raise BrokenFileError(path, f"its crop_pct is {share:.3g}, below {SMALLEST_PART}", SAVED_AGAIN)
    if not patches * side * side <= SIDE * SIDE:
        raise _too_large(path, "max_num_patches", patches, f"beyond an image of {SIDE:,} x {SIDE:,} pixels")


def check_adapter_config(path: Path, fields: Mapping[str, Any], largest: int) -> None:
    """Check the ranks of an adapter, and the patterns for names of layers.

    Args:
        largest: length of an axis of the adapter's tensors.

    Raises:
        BrokenFileError: if a rank is larger than the tensors are, or a pattern may take hours to be tried.
    """
    for name, value in fields.items():
        if any(number != number or number == float("inf") for _, number in _numbers(name, value)):
            raise BrokenFileError(path, f"its {name} holds what is no number", SAVED_AGAIN)
    for name in ("r", "rank_pattern"):
        for place, number in _numbers(name, fields.get(name)):
            if not number <= max(largest, 1):
                raise _too_large(path, place, number, f"beyond the tensors, which have {largest} rows at most")
    for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = fields.get(name)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else ():
            if isinstance(pattern, str) and (
                _REPEATED_GROUP.search(pattern) or len(_REPETITION.findall(pattern)) > REPETITIONS
            ):
                reason = f"its {name} has the pattern {pattern[:100]!r}, which may take hours to be tried"
                raise BrokenFileError(path, reason, "List the layers by their names.")


@contextmanager
def few_tensors() -> Iterator[None]:
    """Let models of up to `TENSORS` tensors be built, one by one in this block.

    Raises:
        ValueError: at the first tensor beyond.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def refuse(module: Any, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > TENSORS:
            raise ValueError(f"it would have more than {TENSORS:,} tensors")

    handle = register_module_parameter_registration_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a field without their signs, with their places; of numbers in one list their sum."""
    if isinstance(value, Mapping):
        for inner, entry in value.items():
            yield from _numbers(f"{name}.{inner}", entry)
    elif isinstance(value, list):
        yield name, sum(map(_magnitude, value))
        for entry in value:
            if isinstance(entry, (list, Mapping)):
                yield from _numbers(name, entry)
    elif isinstance(value, (int, float)):
        yield name, _magnitude(value)


def _magnitude(value: Any) -> float:
    """A number without its sign, if it is one; else 0. No integer is larger than floats can be."""
    if isinstance(value, float):
        return abs(value)
    return min(abs(value), 10**300) if isinstance(value, int) else 0


def _too_large(path: Path, name: str, number: float, limit: str) -> BrokenFileError:
    return BrokenFileError(path, f"its {name} is {number:.10g}, {limit}", SAVED_AGAIN)
