"""Fields of configurations: flat, in one spelling, and what several have in common."""

from __future__ import annotations

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
    """A value as text that is the same for equal values: 4 and 4.0 are equal, and no number equals True."""
    if isinstance(value, bool):
        return repr(value)
    if isinstance(value, (int, float)):
        return repr(int(value)) if float(value).is_integer() else repr(float(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(comparable, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {comparable(value[name])}' for name in sorted(value, key=str))}}}"
    return repr(value)


def shared_fields(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that all have with equal values, as the first spells them; of nested ones, the same.

    What one has that the others don't is a note of its run, or an option of its training.
    """
    first, *others = every
    shared: dict[str, Any] = {}
    for name, value in first.items():
        values = [fields.get(name, _ABSENT) for fields in others]
        if all(comparable(value) == comparable(other) for other in values):
            shared[name] = value
        elif isinstance(value, Mapping) and all(isinstance(other, Mapping) for other in values):
            shared[name] = shared_fields([value, *values])
    return shared


_ABSENT = object()
