"""Class names: those of all ingredients in one order, and the classes that the labels of a dataset mean."""

from __future__ import annotations

import logging
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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

# A whole number as people write it, or as pandas does in a column with gaps.
_WHOLE_NUMBER = re.compile(r"-?\d+(\.0+)?")

# What the values of a column are by the beginning of its dtype. For other dtypes the first value decides.
_KINDS = {"bool": "boolean"} | dict.fromkeys(("int", "uint", "float"), "number")


@dataclass(frozen=True)
class Alignment:
    """How the classes of one checkpoint become those of the others.

    Args:
        labels: the common names, in the common order.
        order: for each of `labels` the number of the class in the checkpoint; None if nothing moves.
        note: what the user should know of it; empty for nothing.
        problem: why they can't; empty if they can.
    """

    labels: tuple[str, ...]
    order: tuple[int, ...] | None = None
    note: str = ""
    problem: str = ""


def read_labels(name: str, config: PretrainedConfig) -> tuple[str, ...]:
    """The class names of a configuration, in the order of the logits.

    Two classes may have the same name, as the two cranes of ImageNet: they differ by number (pytorch/vision#1734).

    Raises:
        ValueError: if the classes are not numbered from 0.
    """
    id2label = config.id2label if isinstance(config.id2label, dict) else {}
    if sorted(id2label) != list(range(len(id2label))) or len(id2label) < 2:
        raise ValueError(
            f"{name}: id2label has the keys {sorted(id2label)[:5]}; a classifier numbers two or more classes from 0."
        )
    return tuple(str(id2label[index]) for index in range(len(id2label)))


def are_placeholders(labels: Sequence[str]) -> bool:
    """Whether the labels are those that transformers gives to classes without names: LABEL_0, LABEL_1, ..."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))


def align(ingredients: Sequence[Ingredient]) -> dict[str, Alignment]:
    """Bring the classes of ingredients with equally many of them into the order that most of them have.

    Of equally frequent orders it is the first as words are sorted, whichever ingredient is named first. Names in
    another order are permuted. Placeholders are matched by number. Ingredients with other names than most
    have a problem.

    Returns:
        The alignments by the ids of the ingredients.
    """
    named = [ingredient for ingredient in ingredients if not are_placeholders(ingredient.labels)]
    if not named:
        return {ingredient.id: Alignment(ingredient.labels) for ingredient in ingredients}
    common = _most_frequent(tuple(sorted(ingredient.labels)) for ingredient in named)
    alike = [ingredient for ingredient in named if tuple(sorted(ingredient.labels)) == common]
    references: dict[tuple[str, ...], Ingredient] = {}  # by the order of their classes
    for ingredient in alike:
        references.setdefault(ingredient.labels, ingredient)
    first = references.pop(_most_frequent(ingredient.labels for ingredient in alike))
    return {ingredient.id: _alignment(ingredient, [first, *references.values()]) for ingredient in ingredients}


def _most_frequent(labels: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Of equally frequent ones the first as words are sorted, not the first that is met."""
    counts = Counter(labels)
    return min(counts, key=lambda names: (-counts[names], names))


def _alignment(ingredient: Ingredient, references: list[Ingredient]) -> Alignment:
    """How an ingredient's classes become those of the first reference.

    Args:
        references: ingredients with the common names, one for each order of them.
    """
    first, *others = references
    if ingredient.labels == first.labels:
        return Alignment(first.labels)
    if sorted(ingredient.labels) == sorted(first.labels):
        order, ambiguous = _permutation(ingredient.labels, first.labels)
        if ambiguous is not None:
            problem = (
                f"{ingredient.id} has its classes in another order than {first.id}, and "
                f"{first.labels.count(ambiguous)} of them are called {ambiguous!r}: which is which can't be told. "
                "Give them different names in id2label."
            )
            return Alignment(first.labels, problem=problem)
        note = f"{ingredient.id} has its classes in another order: brought into that of {first.id}."
        return Alignment(first.labels, order, note)
    if are_placeholders(ingredient.labels):
        if others:
            problem = (
                f"{ingredient.id} calls its classes LABEL_0, LABEL_1, ..., and {first.id} and {others[0].id} have "
                "theirs in different orders, so what its numbers mean can't be told. Write the names into its "
                "id2label."
            )
            return Alignment(first.labels, problem=problem)
        note = f"{ingredient.id} calls its classes LABEL_0, LABEL_1, ...: matched to those of {first.id} by number."
        return Alignment(first.labels, note=note)
    surplus = list((Counter(ingredient.labels) - Counter(first.labels)).elements())
    lacking = list((Counter(first.labels) - Counter(ingredient.labels)).elements())
    problem = (
        f"{ingredient.id} differs from {first.id} in its classes: it has {_first_names(surplus)} and not "
        f"{_first_names(lacking)}. Leave it out, or rename its classes if they mean the same."
    )
    return Alignment(first.labels, problem=problem)


def _permutation(labels: Sequence[str], target: Sequence[str]) -> tuple[tuple[int, ...], str | None]:
    """The place in `labels` of each class of `target`, and a name that several classes have at different places.

    Args:
        labels, target: the same names in two orders.
    """
    counts = Counter(target)
    ambiguous = [label for place, label in enumerate(target) if counts[label] > 1 and labels[place] != label]
    order = tuple(labels.index(label) if counts[label] == 1 else place for place, label in enumerate(target))
    return order, ambiguous[0] if ambiguous else None


def _first_names(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")


@dataclass(frozen=True)
class Classes:
    """The models' classes by the names and numbers that labels may have.

    Args:
        by_name: index of each class whose name is unique.
        shared: names that several classes have, so that it is unclear which of them a label means.
        by_number: index of the class that a number means.
        numbers_are_names: whether numbers are the names of the classes, and not their positions.
    """

    by_name: dict[str, int]
    shared: frozenset[str]
    by_number: dict[int, int]
    numbers_are_names: bool

    @classmethod
    def of(cls, names: Sequence[str]) -> Classes:
        """The classes with these names. If all names are numbers, in whatever order, then numbers are names."""
        counts = Counter(names)
        by_name = {name: index for index, name in enumerate(names) if counts[name] == 1}
        numbers = [_number_of_name(name) for name in names]
        by_number = {number: index for index, number in enumerate(numbers) if number is not None}
        numbers_are_names = len(by_number) == len(names)
        if not numbers_are_names:
            by_number = {index: index for index in range(len(names))}
        return cls(by_name, frozenset(counts) - frozenset(by_name), by_number, numbers_are_names)


def match_labels(split: Split, classes: tuple[str, ...]) -> Callable[[Any], int]:
    """A function from a value of the label column to the index of the models' class.

    `datasets.ClassLabel`s and strings are matched by name. Numbers are matched by name if the names of all classes are
    numbers, else by position; booleans by name, else by number if the classes are 0 and 1. Matches other than by name
    are logged. (FARM#66, pandas#48487: `True` equals 1 in Python.)

    Args:
        classes: names of the models' classes.

    Returns:
        The function. It raises a KeyError for a value that the models don't know.

    Raises:
        ValueError: if the dataset names classes that the models don't know, or that are ambiguous.
    """
    if split.class_names is not None:
        return _match_class_labels(split, split.class_names, classes)
    known, kind = Classes.of(classes), _kind_of_labels(split)
    if kind == "boolean":
        return _match_booleans(split, classes, known)
    if kind == "number" or (kind == "number as text" and not _are_names(split, known)):
        return _match_numbers(split, classes, known)
    refusals = {name: _shared_name_error(split, name, classes) for name in known.shared}
    return partial(_index_of_name, known.by_name, refusals)


def check_first_label(split: Split, to_class: Callable[[Any], int]) -> None:
    """Check the label of the first row: test splits often have no labels, and are refused before any work.

    Raises:
        ValueError: if the models don't know the label.
    """
    for row in split.rows.take(1):
        label_of(row.get(split.label_column), 0, split, to_class)


def _match_class_labels(split: Split, names: tuple[str, ...], classes: tuple[str, ...]) -> Callable[[Any], int]:
    """Match labels that are numbers, for which the dataset has `names`."""
    known = Classes.of(classes)
    ambiguous = [name for name in names if name in known.shared]
    if ambiguous:
        raise ValueError(_shared_name_error(split, ambiguous[0], classes))
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
    """Match numbers by name or by position."""
    numbers = [_number_of_name(name) for name in classes]
    if None not in numbers and not known.numbers_are_names:
        name = next(name for name, number in zip(classes, numbers, strict=True) if numbers.count(number) > 1)
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
        warn_once(
            f"The labels of {split.name}, split {split.split!r}, are numbers: {_pairs(known.by_number, classes)}."
        )
    return partial(_index_of_number, known.by_number)


def _match_booleans(split: Split, classes: tuple[str, ...], known: Classes) -> Callable[[Any], int]:
    """Match true and false by name in any spelling, or by number if the classes are 0 and 1."""
    folded = [name.casefold() for name in classes]
    if folded.count("true") == folded.count("false") == 1:
        return partial(_index_of_boolean, {True: folded.index("true"), False: folded.index("false")})
    if set(known.by_number) == {0, 1} and known.numbers_are_names:
        by_boolean = {bool(number): index for number, index in sorted(known.by_number.items())}
        warn_once(f"The labels of {split.name}, split {split.split!r}, are booleans: {_pairs(by_boolean, classes)}.")
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
    number = _number_in(value) if isinstance(value, str) else _whole_number(value)
    if number is None:
        raise KeyError(value)
    return indices[number]


def _index_of_boolean(indices: dict[bool, int], value: Any) -> int:
    if not isinstance(value, (bool, np.bool_)):
        raise KeyError(value)
    return indices[bool(value)]


def _kind_of_labels(split: Split) -> str:
    """`boolean`, `number`, `number as text` or `text`."""
    dtype = re.match("[a-z]*", split.label_dtype or "")
    if dtype and dtype.group() in _KINDS:
        return _KINDS[dtype.group()]
    value = _first_label(split)
    if isinstance(value, str):
        return "text" if _number_in(value) is None else "number as text"
    return "text" if _whole_number(value) is None else "number"


def _are_names(split: Split, known: Classes) -> bool:
    """Whether numbers as text are names of classes, and not positions.

    Raises:
        ValueError: if that is unclear, because the names of only some classes are numbers.
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


def _whole_number(value: Any) -> int | None:
    """The integer that a number is equal to. In a column with gaps pandas turns integers into floats."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return int(number) if number.is_integer() else None


def _number_in(text: str) -> int | None:
    """The whole number that a text stands for."""
    return int(text.split(".")[0]) if _WHOLE_NUMBER.fullmatch(text) else None


def _number_of_name(name: str) -> int | None:
    """The number in the name of a class, as in `3` and `LABEL_3`; `false` is 0 and `true` is 1."""
    if name.casefold() in ("false", "true"):
        return int(name.casefold() == "true")
    return _number_in(name.removeprefix("LABEL_"))


def _pairs(indices: dict[Any, int], classes: tuple[str, ...]) -> str:
    pairs = [f"{value} is taken as {classes[index]!r}" for value, index in list(indices.items())[:3]]
    return ", ".join(pairs) + (", ..." if len(indices) > 3 else "")


def _listed(classes: tuple[str, ...]) -> str:
    return f"{', '.join(classes[:10])}{' and more' if len(classes) > 10 else ''}"


def _shared_name_error(split: Split, name: str, classes: tuple[str, ...]) -> str:
    places = [str(index) for index, other in enumerate(classes) if other == name]
    return (
        f"The dataset {split.name} has the class {name!r}, and {len(places)} of the models' classes are called that "
        f"({' and '.join(places)}): which of them it means can't be told. Let the column {split.label_column!r} hold "
        "the numbers of the models' classes, as whole numbers, or give the classes names of their own in id2label."
    )


@lru_cache
def warn_once(text: str) -> None:
    """Log a warning once in a process: labels of a split are matched several times."""
    logger.warning(text)
