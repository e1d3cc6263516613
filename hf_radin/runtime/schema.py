"""Records: frozen dataclasses that are written as JSON and read back, checked field by field.

What the cache holds is sealed: a record, or some arrays, with the SHA-256 of it and of what it is about. So it is
noticed if a byte has changed, and if a file lies where another belongs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from hf_radin.runtime.files import WAY_OUT, BrokenFileError, open_regular, read_json, take_away, write_to_cache

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The name of the seal, among the fields of a record and among arrays.
SEAL = "seal"

# What a warning says of a broken file of the cache.
MADE_ANEW = "It is made anew."

# Letters of a value that an error shows.
SHOWN = 100

# Of a field that stands in JSON only where it says something: it is left out where it is None.
IF_ANY = {"if_any": True}

# Whole numbers up to here are also floats.
LARGEST = 1 << 53


def to_json(value: Any) -> Any:
    """A record as JSON: dataclasses become objects by their fields (see `IF_ANY`), tuples become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name) for field in fields(value)}
        absent = {field.name for field in fields(value) if "if_any" in field.metadata and values[field.name] is None}
        return {name: to_json(entry) for name, entry in values.items() if name not in absent}
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


def write_sealed(path: Path, record: Any, subject: str) -> None:
    """Write a record into the cache.

    Args:
        subject: what it is about, so that it is not taken for another's.
    """
    values = json.loads(json.dumps(to_json(record)))  # as they are read back
    text = json.dumps({**values, SEAL: _seal(subject, values)})
    write_to_cache(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_sealed(record: type[T], path: Path, subject: str, *, way_out: str = WAY_OUT) -> T:
    """The record of a type that `write_sealed` wrote about this subject.

    Raises:
        FileNotFoundError: if there is no file.
        BrokenFileError: if it holds anything else.
    """
    content = read_json(path, way_out=way_out)
    if not isinstance(content, dict):
        raise BrokenFileError(path, f"it is {_shown(content)}, not a {record.__name__}", way_out)
    _check_seal(path, content.pop(SEAL, None), _seal(subject, content), way_out)
    try:
        return from_json(record, content)
    except ValueError as error:
        raise BrokenFileError(path, error, way_out) from error


def known_record(record: type[T], path: Path, subject: str) -> T | None:
    """As `read_sealed`; None if there is no such file. A broken one is named, and goes, to be made anew."""
    return _known(path, partial(read_sealed, record, path, subject, way_out=MADE_ANEW))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], subject: str, *, forced: bool = True) -> None:
    """Write arrays by their names into one file of the cache. Arguments as of `write_sealed` and `write_to_cache`."""
    sealed: dict[str, Any] = {**arrays, SEAL: np.array(_seal_of_arrays(subject, arrays))}
    write_to_cache(path, lambda partial: np.savez(partial, **sealed), forced=forced)


def read_arrays(path: Path, subject: str, *, way_out: str = WAY_OUT) -> dict[str, np.ndarray]:
    """The arrays that `write_arrays` wrote about this subject, by name. Errors as of `read_sealed`."""
    with open_regular(path, way_out=way_out) as file:
        try:
            with np.load(file) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # a broken archive may fail in any way
            raise BrokenFileError(path, f"it is no archive of arrays ({error})", way_out) from error
    seal = arrays.pop(SEAL, None)
    _check_seal(path, None if seal is None else str(seal), _seal_of_arrays(subject, arrays), way_out)
    return arrays


def known_arrays(path: Path, subject: str) -> dict[str, np.ndarray] | None:
    """As `read_arrays`; None if there is no such file. A broken one is named, and goes, to be made anew."""
    return _known(path, partial(read_arrays, path, subject, way_out=MADE_ANEW))


def _known(path: Path, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except FileNotFoundError:
        return None
    except BrokenFileError as error:
        logger.warning("%s", error)
        take_away(path)
        return None


def _seal(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _seal_of_arrays(subject: str, arrays: Mapping[str, np.ndarray]) -> str:
    forms = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    digest = hashlib.sha256(_seal(subject, forms).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def _check_seal(path: Path, seal: Any, expected: str, way_out: str) -> None:
    if seal is None:
        raise BrokenFileError(path, "it has no seal: an earlier version of hf_radin wrote it", way_out)
    if seal != expected:
        raise BrokenFileError(path, "its seal does not fit: it was changed, or belongs elsewhere", way_out)


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
        if kinds[1:] == (...,) and kinds[0] in (str, int, bool) and {*map(type, value)} <= {kinds[0]}:
            return tuple(value)  # there may be one for each sample
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
