"""The names of the classes: read them, and bring those of all ingredients into one order."""

from __future__ import annotations

import logging
import numbers
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.images.decode import label_of
from hf_radin.images.split import Split

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hf_radin.ingredients.ingredient import Ingredient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alignment:
    """How the classes of one checkpoint become those of the others.

    Args:
        labels: the common names, in the common order.
        order: for each of `labels` the number of the class in the checkpoint; None if nothing moves.
        note: what the user should know of it.
        problem: why it can't be; empty if it can.
    """

    labels: tuple[str, ...]
    order: tuple[int, ...] | None = None
    note: str = ""
    problem: str = ""


def read_labels(name: str, config: PretrainedConfig) -> tuple[str, ...]:
    """The class names of a configuration, in the order of the logits.

    Two classes may have one name, as the two cranes of ImageNet: their places tell them apart (pytorch/vision#1734).

    Raises:
        ValueError: if they don't number the classes from 0.
    """
    id2label = config.id2label if isinstance(config.id2label, dict) else {}
    if sorted(id2label) != list(range(len(id2label))) or len(id2label) < 2:
        raise ValueError(
            f"{name}: id2label has the keys {sorted(id2label)[:5]}; a classifier numbers two or more classes from 0."
        )
    return tuple(str(id2label[index]) for index in range(len(id2label)))


def are_placeholders(labels: Sequence[str]) -> bool:
    """Whether these are the names that transformers gives to classes without names."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))


def align(ingredients: Sequence[Ingredient]) -> dict[str, Alignment]:
    """Bring the classes of ingredients with equally many of them into the order of the first that names them.

    Names in another order are permuted. Placeholders are taken by their numbers. Other names are a problem of those
    that have not the names of most.
    """
    named = [one for one in ingredients if not are_placeholders(one.labels)]
    if not named:
        return {one.id: Alignment(one.labels) for one in ingredients}
    common = Counter(tuple(sorted(one.labels)) for one in named).most_common(1)[0][0]
    alike = [one for one in named if tuple(sorted(one.labels)) == common]
    orders: dict[tuple[str, ...], Ingredient] = {}
    for one in alike:
        orders.setdefault(one.labels, one)
    return {one.id: _onto(alike[0], one, list(orders.values())) for one in ingredients}


def _onto(first: Ingredient, one: Ingredient, of_each_order: list[Ingredient]) -> Alignment:
    if one.labels == first.labels:
        return Alignment(first.labels)
    if sorted(one.labels) == sorted(first.labels):
        order, ambiguous = _order(one.labels, first.labels)
        if ambiguous is not None:
            problem = (
                f"{one.id} has its classes in another order than {first.id}, and {first.labels.count(ambiguous)} of "
                f"them are called {ambiguous!r}: which is which can't be told. Give them different names in id2label."
            )
            return Alignment(first.labels, problem=problem)
        return Alignment(
            first.labels, order, f"{one.id} has its classes in another order: brought into that of {first.id}."
        )
    if are_placeholders(one.labels):
        if len(of_each_order) > 1:
            a, b = of_each_order[:2]
            problem = (
                f"{one.id} calls its classes LABEL_0, LABEL_1, ..., and {a.id} and {b.id} have theirs in different "
                "orders, so what its numbers mean can't be told. Write the names into its id2label."
            )
            return Alignment(first.labels, problem=problem)
        note = f"{one.id} calls its classes LABEL_0, LABEL_1, ...: matched to those of {first.id} by number."
        return Alignment(first.labels, note=note)
    mine, theirs = (list((Counter(a.labels) - Counter(b.labels)).elements()) for a, b in ((one, first), (first, one)))
    problem = (
        f"{one.id} differs from {first.id} in its classes: it has {_some(mine)} and not {_some(theirs)}. Leave it "
        "out, or rename its classes if they mean the same."
    )
    return Alignment(first.labels, problem=problem)


def _order(labels: Sequence[str], wanted: Sequence[str]) -> tuple[tuple[int, ...], str | None]:
    """For each class of `wanted` its place in `labels`, and a name that several classes have, at different places.

    Args:
        labels, wanted: the same names in two orders.
    """
    count = Counter(wanted)
    ambiguous = [label for place, label in enumerate(wanted) if count[label] > 1 and labels[place] != label]
    order = tuple(labels.index(label) if count[label] == 1 else place for place, label in enumerate(wanted))
    return order, ambiguous[0] if ambiguous else None


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")


# A whole number as people write it, or as pandas does where a column has gaps.
_WHOLE = re.compile(r"-?\d+(\.0+)?")

# Columns of these types say by that what their values are; of others the first value has to.
_DTYPES = {"bool": "boolean"} | dict.fromkeys(("int", "uint", "float"), "number")


@dataclass(frozen=True)
class Classes:
    """The models' classes by what a label may call them.

    Args:
        by_name: index of each class whose name no other has.
        shared: names that several classes have; which of them a label means can't be told.
        by_number: index of the class that a number means.
        numbers_are_names: whether the numbers are what the classes are called, not where they stand.
    """

    by_name: dict[str, int]
    shared: frozenset[str]
    by_number: dict[int, int]
    numbers_are_names: bool

    @classmethod
    def of(cls, names: Sequence[str]) -> Classes:
        """Classes of which all are called by numbers, in whatever order, are meant by these numbers."""
        counts = Counter(names)
        by_name = {name: index for index, name in enumerate(names) if counts[name] == 1}
        called = [_number_of_name(name) for name in names]
        by_called = {number: index for index, number in enumerate(called) if number is not None}
        numbers_are_names = len(by_called) == len(names)
        by_number = by_called if numbers_are_names else {index: index for index in range(len(names))}
        return cls(by_name, frozenset(counts) - frozenset(by_name), by_number, numbers_are_names)


def match_labels(split: Split, classes: tuple[str, ...]) -> Callable[[Any], int]:
    """A function from a value of the label column to the index of the models' class.

    Class labels of datasets and strings are matched by name. Numbers are matched by name where all classes are called
    by numbers, else by position; booleans by name, else by number where there are the classes 0 and 1. What is
    matched otherwise than by name is said. (FARM#66, pandas#48487: `True` equals 1 in Python.)

    The function raises a KeyError for a value that the models don't know.

    Raises:
        ValueError: if the dataset names classes that the models don't know, or that can't be told apart.
    """
    if split.class_names is not None:
        return _match_names(split, split.class_names, classes)
    known, kind = Classes.of(classes), _kind(split)
    if kind == "boolean":
        return _match_booleans(split, classes, known)
    if kind == "number" or (kind == "number as text" and not _are_names(split, known)):
        return _match_numbers(split, classes, known)

    refusals = {name: _shared(split, name, classes) for name in known.shared}
    return partial(_index_of_name, known.by_name, refusals)


def check_first_label(split: Split, to_class: Callable[[Any], int]) -> None:
    """Look at one row's label: a split without labels (as test splits often are) is refused before any work.

    Raises:
        ValueError: if the models don't know it.
    """
    for row in split.rows.take(1):
        label_of(row.get(split.label_column), 0, split, to_class)


def _match_names(split: Split, names: tuple[str, ...], classes: tuple[str, ...]) -> Callable[[Any], int]:
    """Of class labels, which are numbers of names that the dataset says."""
    known = Classes.of(classes)
    ambiguous = [name for name in names if name in known.shared]
    if ambiguous:
        raise ValueError(_shared(split, ambiguous[0], classes))
    unknown = [name for name in names if name not in known.by_name]
    if unknown and are_placeholders(classes) and len(names) == len(classes):
        pairs = ", ".join(f"LABEL_{number} is {name!r}" for number, name in enumerate(names[:3]))
        logger.warning(
            "The models call their classes LABEL_0, LABEL_1, ...: matched to the dataset's by number (%s, ...).", pairs
        )
        return partial(_index_of_number, {number: number for number in range(len(names))})
    if unknown:
        raise ValueError(
            f"The dataset {split.name} has classes that the models don't know: {', '.join(unknown[:5])}"
            f"{' and more' if len(unknown) > 5 else ''}. The models know {_listed(classes)}. Rename either, so that "
            "equal names mean equal classes."
        )
    return partial(_index_of_number, {number: known.by_name[name] for number, name in enumerate(names)})


def _match_numbers(split: Split, classes: tuple[str, ...], known: Classes) -> Callable[[Any], int]:
    called = [_number_of_name(name) for name in classes]
    if None not in called and not known.numbers_are_names:
        name = next(name for name, number in zip(classes, called, strict=True) if called.count(number) > 1)
        raise ValueError(
            f"The labels of {split.name}, split {split.split!r}, are numbers, and several of the models' classes are "
            f"called by that of {name!r}. Write the names of the classes into {split.label_column!r}."
        )
    if any(name.casefold() in ("false", "true") for name in classes) and any(
        index != number for number, index in known.by_number.items()
    ):
        raise ValueError(
            f"The labels of {split.name}, split {split.split!r}, are numbers, and the models' classes are "
            f"{_listed(classes)}, in this order: whether 1 means the class that is true or the second one can't be "
            f"told. Write the names of the classes into {split.label_column!r}."
        )
    if not known.numbers_are_names:
        _say_once(
            f"The labels of {split.name}, split {split.split!r}, are numbers: {_pairs(known.by_number, classes)}."
        )
    return partial(_index_of_number, known.by_number)


def _match_booleans(split: Split, classes: tuple[str, ...], known: Classes) -> Callable[[Any], int]:
    """Of true and false by name in any spelling, or by number where the classes are 0 and 1."""
    spelt = [name.casefold() for name in classes]
    if spelt.count("true") == spelt.count("false") == 1:
        return partial(_index_of_boolean, {True: spelt.index("true"), False: spelt.index("false")})
    if set(known.by_number) == {0, 1} and known.numbers_are_names:
        by_boolean = {bool(number): index for number, index in sorted(known.by_number.items())}
        _say_once(f"The labels of {split.name}, split {split.split!r}, are booleans: {_pairs(by_boolean, classes)}.")
        return partial(_index_of_boolean, by_boolean)
    raise ValueError(
        f"The labels of {split.name}, split {split.split!r}, are booleans, and the models know {_listed(classes)}: "
        f"which of them is true can't be told. Write the names of the classes into {split.label_column!r}, or name "
        "another column with label_column (--label-column)."
    )


def _index_of_name(indices: dict[str, int], refusals: dict[str, str], value: Any) -> int:
    if not isinstance(value, str):
        raise KeyError(value)
    if value in refusals:
        raise ValueError(refusals[value])
    return indices[value]


def _index_of_number(indices: dict[int, int], value: Any) -> int:
    number = _number_in(value) if isinstance(value, str) else _whole(value)
    if number is None:
        raise KeyError(value)
    return indices[number]


def _index_of_boolean(indices: dict[bool, int], value: Any) -> int:
    if not isinstance(value, (bool, np.bool_)):
        raise KeyError(value)
    return indices[bool(value)]


def _kind(split: Split) -> str:
    """What the label column holds: `boolean`, `number`, `number as text` or `text`."""
    dtype = re.match("[a-z]*", split.label_dtype or "")
    if dtype and dtype.group() in _DTYPES:
        return _DTYPES[dtype.group()]
    value = _first_label(split)
    if isinstance(value, (bool, np.bool_)):
        return "boolean"
    if isinstance(value, str):
        return "text" if _number_in(value) is None else "number as text"
    return "text" if _whole(value) is None else "number"


def _are_names(split: Split, known: Classes) -> bool:
    """Whether numbers as text are names of classes.

    Raises:
        ValueError: if some classes are called by numbers, and others are not: where they stand may be meant as well.
    """
    value = _first_label(split)
    if value in known.by_name or value in known.shared:
        return True
    if not known.numbers_are_names and any(_number_of_name(name) is not None for name in known.by_name):
        raise ValueError(
            f"The labels of {split.name}, split {split.split!r}, are numbers such as {value!r}, and some of the "
            f"models' classes are called by numbers and others are not: what {value!r} means can't be told. Write the "
            f"names of the classes into {split.label_column!r}."
        )
    return False


def _first_label(split: Split) -> Any:
    return next((row.get(split.label_column) for row in split.rows.take(1)), None)


def _whole(value: Any) -> int | None:
    """A whole number; pandas makes floats of those in a column that has gaps."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return int(number) if number.is_integer() else None


def _number_in(text: str) -> int | None:
    return int(text.split(".")[0]) if _WHOLE.fullmatch(text) else None


def _number_of_name(name: str) -> int | None:
    """The number that a class is called by, as in `3` and `LABEL_3`; `false` is 0 and `true` is 1."""
    if name.casefold() in ("false", "true"):
        return int(name.casefold() == "true")
    return _number_in(name.removeprefix("LABEL_"))


def _pairs(indices: dict[Any, int], classes: tuple[str, ...]) -> str:
    pairs = [f"{value} is taken as {classes[index]!r}" for value, index in list(indices.items())[:3]]
    return ", ".join(pairs) + (", ..." if len(indices) > 3 else "")


def _listed(classes: tuple[str, ...]) -> str:
    return f"{', '.join(classes[:10])}{' and more' if len(classes) > 10 else ''}"


def _shared(split: Split, name: str, classes: tuple[str, ...]) -> str:
    places = [str(index) for index, other in enumerate(classes) if other == name]
    return (
        f"The dataset {split.name} has the class {name!r}, and {len(places)} of the models' classes are called that "
        f"({' and '.join(places)}): which of them it means can't be told. Let the column {split.label_column!r} hold "
        "the numbers of the models' classes, as whole numbers, or give the classes names of their own in id2label."
    )


@lru_cache
def _say_once(text: str) -> None:
    """What several looks at one split would say again and again."""
    logger.warning(text)
