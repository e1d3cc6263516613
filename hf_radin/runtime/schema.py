"""Records: frozen dataclasses that are written as JSON and read back, checked field by field."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_radin.runtime.files import WAY_OUT, BrokenFileError, read_json

T = TypeVar("T")

# Letters of a value that an error shows.
SHOWN = 100

# Whole numbers up to here are also floats.
LARGEST = 1 << 53


def to_json(value: Any) -> Any:
    """A record as JSON: dataclasses become objects by their fields, tuples become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    if isinstance(value, Mapping):
        return {name: to_json(entry) for name, entry in value.items()}
    return value


def read_record(record: type[T], path: Path, *, way_out: str = WAY_OUT) -> T:
    """The record of a type that a small file of JSON holds.

    Raises:
        FileNotFoundError: if there is no file.
        BrokenFileError: if it can't be read or holds another record.
    """
    content = read_json(path, way_out=way_out)
    try:
        return from_json(record, content)
    except ValueError as error:
        raise BrokenFileError(path, error, way_out) from error


def from_json(record: type[T], value: Any, *, place: str = "") -> T:
    """The record of a type that JSON holds. Fields that the type does not have are ignored: newer versions add some.

    Args:
        record: a dataclass of str, int, float, bool, None, tuples, dictionaries by str, Any, or of such dataclasses.
        place: of the value in what was read, to be named in an error.

    Raises:
        ValueError: if a field without a default is missing, or a value is of another type.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{place or 'it'} is {_shown(value)}, not a {record.__name__}")
    arguments: dict[str, Any] = {}
    dataclass_type: Any = record  # that a type has fields can't be said of a type variable
    hints = _hints(dataclass_type)
    for field in fields(dataclass_type):
        inner = f"{place}.{field.name}" if place else field.name
        if field.name in value:
            arguments[field.name] = _read(hints[field.name], value[field.name], inner)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"it does not say {inner!r}")
    return record(**arguments)


@cache
def _hints(record: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(record)


def _read(kind: Any, value: Any, place: str) -> Any:
    """A value as a type holds it."""
    if kind is Any:
        return value
    if get_origin(kind) in (Union, types.UnionType):
        if value is None and types.NoneType in get_args(kind):
            return None
        (kind,) = (option for option in get_args(kind) if option is not types.NoneType)
        return _read(kind, value, place)
    if isinstance(kind, type) and is_dataclass(kind):
        return from_json(kind, value, place=place)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(kinds) == len(value):
            return tuple(
                _read(inner, entry, f"{place}[{at}]")
                for at, (inner, entry) in enumerate(zip(kinds, value, strict=True))
            )
    if get_origin(kind) is dict and isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _read(get_args(kind)[1], entry, f"{place}.{name}") for name, entry in value.items()}
    if kind is float and (type(value) is float or (type(value) is int and abs(value) <= LARGEST)):
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise ValueError(f"its {place!r} is {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(str(value)[:SHOWN])
