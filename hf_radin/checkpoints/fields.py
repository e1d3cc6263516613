"""Fields of configurations: flattened, in comparable form, and those that several configurations share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any


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
