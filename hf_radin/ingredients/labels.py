"""Class names: those of all ingredients in one order, and the classes that the labels of a dataset mean.

The label of an image is the number of its class. Of a multi-label dataset, where it may have any number of classes, it
is the whole number with a bit for each of them: 0b101 for the classes 0 and 2.
"""

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

from hf_radin.checkpoints.model import is_multi_label
from hf_radin.images.decode import label_of
from hf_radin.images.split import Split

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hf_radin.ingredients.ingredient import Ingredient, Ingredients

logger = logging.getLogger(__name__)

# What `classes` is for the classes that all ingredients have.
COMMON = "common"

# The class of an image whose label is not known.
NO_LABEL = -1

# How two checkpoints with different classes come into one soup.
WAY_OUT = "make a soup of the classes that all have with classes='common' (--classes common)"

# How many classes an image may choose several of: of more, JSON holds no number with a bit for each.
MOST_LABELS = 14_000

# In how many rows a list that is not empty is looked for.
ROWS_WITH_LISTS = 256

# A whole number as people write it, or as pandas does in a column with gaps.
_WHOLE_NUMBER = re.compile(r"-?\d+(\.0+)?")

# What the values of a column are by the beginning of its dtype. For other dtypes the first value decides.
_KINDS = {"bool": "boolean"} | dict.fromkeys(("int", "uint", "float"), "number")


@dataclass(frozen=True)
class Alignment:
    """How the classes of one checkpoint become those of the others.

    Args:
        labels: the common names, in the common order.
        order: for each of `labels` the number of the class in the checkpoint; None if all are the same.
        left_out: how many classes of the checkpoint are not among `labels`.
        note: what the user should know of it; empty for nothing.
        problem: why they can't; empty if they can.
    """

    labels: tuple[str, ...]
    order: tuple[int, ...] | None = None
    left_out: int = 0
    note: str = ""
    problem: str = ""


def read_labels(name: str, config: PretrainedConfig) -> tuple[str, ...]:
    """The class names of a configuration, in the order of the logits.

    Two classes may have the same name, as the two cranes of ImageNet: they differ by number (pytorch/vision#1734).

    Raises:
        ValueError: if the classes are not numbered from 0.
    """
    id2label = config.id2label if isinstance(config.id2label, dict) else {}
    least = 1 if is_multi_label(config) else 2  # a class that is there or not
    if sorted(id2label) != list(range(len(id2label))) or len(id2label) < least:
        raise ValueError(
            f"{name}: id2label has the keys {sorted(id2label)[:5]}; a classifier numbers two or more classes from 0, "
            "a multi-label one at least one."
        )
    return tuple(str(id2label[index]) for index in range(len(id2label)))


def are_placeholders(labels: Sequence[str]) -> bool:
    """Whether the labels are those that transformers gives to classes without names: LABEL_0, LABEL_1, ..."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))


def chosen_classes(classes: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """What `gather` takes as `classes`: None, `common` or names.

    Raises:
        ValueError: if it is something else, or fewer than two names, or a name twice.
    """
    if classes is None or classes == COMMON:
        return None if classes is None else COMMON
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"classes={classes!r}: it is {COMMON!r} or a list of names; those of a dataset are in "
            "features['label'].names."
        )
    names = tuple(classes)
    if len(names) < 2:
        raise ValueError(f"classes={list(names)}: a classifier has two classes or more.")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"classes: {repeated[0]!r} is named twice; name each class of the soup once.")
    return names


def align(ingredients: Sequence[Ingredient], classes: str | tuple[str, ...] | None = None) -> dict[str, Alignment]:
    """Bring the classes of ingredients into one order.

    By default all ingredients have the same classes. Of classes that differ, those that all have (`common`), or those
    that are named, are selected from each ingredient by its own names for them.

    Returns:
        The alignments by the ids of the ingredients.
    """
    if isinstance(classes, tuple):
        return {ingredient.id: _selection(ingredient, classes) for ingredient in ingredients}
    alignments = _align_all(ingredients)
    if classes is None or not any(alignment.problem for alignment in alignments.values()):
        return alignments
    common = _common_classes(ingredients)
    return {ingredient.id: _selection(ingredient, common) for ingredient in ingredients}


def _common_classes(ingredients: Sequence[Ingredient]) -> tuple[str, ...]:
    """The names that all ingredients have, in the order of most of them; without those that have placeholders."""
    named = [ingredient.labels for ingredient in ingredients if not are_placeholders(ingredient.labels)]
    if not named:
        return ()
    common = set(named[0]).intersection(*named)
    return _most_frequent(tuple(dict.fromkeys(name for name in labels if name in common)) for labels in named)


def _selection(ingredient: Ingredient, classes: tuple[str, ...]) -> Alignment:
    """Some of an ingredient's classes, found by name; a class that it has not can't be added.

    A soup's logit would be missing of it, and minus infinity, which says so in an ensemble, is no average of weights:
    the ensemble would never predict the class, however sure the others are of it.
    """
    labels, counts = ingredient.labels, Counter(ingredient.labels)
    if labels == classes:
        return Alignment(classes)
    absent = [name for name in classes if name not in counts]
    repeated = [name for name in classes if counts[name] > 1]
    if are_placeholders(labels):
        problem = (
            f"{ingredient.id} calls its {len(labels)} classes LABEL_0, LABEL_1, ...: which of them are the soup's "
            "can't be told. Write the names into its id2label, or leave it out."
        )
    elif len(classes) < 2:
        problem = (
            f"{ingredient.id} has the classes {_first_names(list(labels))}, and all checkpoints together have "
            f"{_first_names(list(classes)) or 'none'} in common: a soup needs two. Leave out what has other classes, "
            "or rename those that mean the same in id2label."
        )
    elif absent:
        problem = (
            f"{ingredient.id} has no class {_first_names(absent)}, which the soup shall have: no ensemble with it "
            "predicts a class that it does not know. Leave it out, or leave out these classes and their images."
        )
    elif repeated:
        problem = (
            f"{ingredient.id} has {counts[repeated[0]]} classes that are called {repeated[0]!r}: which of them is the "
            "soup's can't be told. Give them different names in id2label."
        )
    else:
        surplus = [name for name in labels if name not in classes]
        note = f"{ingredient.id} has its classes in another order than the soup: brought into that."
        if surplus:
            listed = _first_names(surplus)
            note = f"{ingredient.id} has {len(labels)} classes, of which {len(surplus)} are left out: {listed}."
        order = tuple(map(labels.index, classes))
        return Alignment(classes, order, len(surplus), note)
    return Alignment(classes, problem=problem)


def _align_all(ingredients: Sequence[Ingredient]) -> dict[str, Alignment]:
    """Bring the classes of ingredients that have the same ones into the order that most of them have.

    Of equally frequent orders it is the first as words are sorted, whichever ingredient is named first. Names in
    another order are permuted. Placeholders are matched by number. Ingredients with other names than most
    have a problem.
    """
    if not ingredients:
        return {}
    named = [ingredient for ingredient in ingredients if not are_placeholders(ingredient.labels)] or ingredients
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
    first = references[0]
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
        return Alignment(first.labels, order, note=note)
    if are_placeholders(ingredient.labels):
        return _numbered(ingredient, references)
    surplus = list((Counter(ingredient.labels) - Counter(first.labels)).elements())
    lacking = list((Counter(first.labels) - Counter(ingredient.labels)).elements())
    has = f"{_first_names(surplus)} and not {_first_names(lacking)}"
    if not (surplus and lacking):
        has = f"{_first_names(surplus)} besides" if surplus else f"no {_first_names(lacking)}"
    shared = {*ingredient.labels} & {*first.labels}
    way_out = "Leave it out, or rename its classes if they mean the same."
    if len(shared) > 1:
        way_out = f"Leave it out, rename its classes if they mean the same, or {WAY_OUT}."
    problem = f"{ingredient.id} differs from {first.id} in its classes: it has {has}. {way_out}"
    return Alignment(first.labels, problem=problem)


def _numbered(ingredient: Ingredient, references: list[Ingredient]) -> Alignment:
    """How classes without names become those of the first reference: by number. Arguments as of `_alignment`."""
    first, *others = references
    called = f"{ingredient.id} calls its classes LABEL_0, LABEL_1, ..."
    note = problem = ""
    if len(ingredient.labels) != len(first.labels):
        problem = (
            f"{called}, and has {len(ingredient.labels)} of them where {first.id} has {len(first.labels)}: which are "
            "the same can't be told. Leave it out, or write the names into its id2label."
        )
    elif others:
        problem = (
            f"{called}, and {first.id} and {others[0].id} have theirs in different orders, so what its numbers mean "
            "can't be told. Write the names into its id2label."
        )
    else:
        note = f"{called}: matched to those of {first.id} by number."
    return Alignment(first.labels, note=note, problem=problem)


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


def match_labels(split: Split, classes: tuple[str, ...], *, multi_label: bool = False) -> Callable[[Any], int]:
    """A function from a label (`Split.label`) to the index of the models' class, or to a number with a bit for each.

    `datasets.ClassLabel`s and strings are matched by name. Numbers are matched by name if the names of all classes are
    numbers, else by position; booleans by name, else by number if the classes are 0 and 1. Matches other than by name
    are logged. (FARM#66, pandas#48487: `True` equals 1 in Python.)

    Multi-label, a label is a list of such values, each at most once; a list of booleans or floats, 0 or 1 for each
    class in the models' order; or 0 or 1 in each of the columns that are called as the classes.

    Args:
        classes: names of the models' classes.
        multi_label: whether the models say of each class by itself whether an image has it.

    Returns:
        The function. It raises a KeyError for a value that the models don't know. Of a split without labels it gives
        `NO_LABEL`.

    Raises:
        ValueError: if the dataset names classes that the models don't know, or that are ambiguous.
    """
    if not split.label_column:
        return _no_label
    _check_kind(split, classes, multi_label=multi_label)
    if split.label_columns:
        return partial(_bits_of_flags, _order_of_columns(split, classes))
    if split.has_label_lists and _are_vectors(split):
        warn_once(
            f"The labels of {split.name}, split {split.split!r}, are vectors of 0 and 1, whose numbers are taken as "
            f"{_listed(classes)}, in this order."
        )
        return partial(_bits_of_flags, range(len(classes)))
    to_class = _match_values(split, classes)
    return partial(_bits_of_list, to_class) if split.has_label_lists else to_class


def stack_labels(labels: Sequence[int], classes: int) -> np.ndarray:
    """Of a multi-label split, which classes the images have: bool `(samples, classes)`.

    Args:
        labels: of the images, with a bit for each class.
    """
    width = -(-classes // 8)
    packed = np.frombuffer(b"".join(label.to_bytes(width, "little") for label in labels), np.uint8)
    return np.unpackbits(packed.reshape(-1, width), axis=1, count=classes, bitorder="little").astype(bool)


def _check_kind(split: Split, classes: tuple[str, ...], *, multi_label: bool) -> None:
    """Refuse labels of one class for models that choose any number of them, and the other way round.

    Raises:
        ValueError: if they don't go together, or there are too many classes.
    """
    labels = f"The labels of {split.name}, split {split.split!r}, in {split.label_column!r}"
    if split.is_multi_label and not multi_label:
        raise ValueError(
            f"{labels} are several for an image, and the checkpoints give each image one class: name another column "
            "with label_column (--label-column), or take multi-label checkpoints."
        )
    if multi_label and not split.is_multi_label:
        raise ValueError(
            f"{labels} are one for an image, and the checkpoints are multi-label: they say of each class by itself "
            "whether an image has it. Write a list of classes for each image, or name the columns that hold 0 or 1 "
            "for each class with label_column (--label-column), with commas between."
        )
    if multi_label and len(classes) > MOST_LABELS:
        raise ValueError(f"Multi-label checkpoints may have {MOST_LABELS:,} classes; these have {len(classes):,}.")


def _are_vectors(split: Split) -> bool:
    """Whether lists hold 0 or 1 for each class, and no numbers of classes: by their type."""
    return split.class_names is None and (split.label_dtype or "").startswith(("bool", "float"))


def _order_of_columns(split: Split, classes: tuple[str, ...]) -> list[int]:
    """Of each label column the number of the class that it is called by.

    Raises:
        ValueError: if a class has no column, or a column no class.
    """
    indices, columns = Classes.of(classes).by_name, split.label_columns
    absent, unknown = (
        [name for name in classes if name not in columns],
        [name for name in columns if name not in indices],
    )
    if absent or unknown:
        raise ValueError(
            f"The label columns of {split.name}, split {split.split!r}, are one for each class, called as it is: "
            f"{_first_names(absent) or 'no class'} has none, and {_first_names(unknown) or 'none of them'} "
            "is no class of the models."
        )
    return [indices[name] for name in columns]


def _match_values(split: Split, classes: tuple[str, ...]) -> Callable[[Any], int]:
    """A function from a value of the label column, or of a list in it, to the index of the models' class."""
    if split.class_names is not None:
        return _match_class_labels(split, split.class_names, classes)
    known = Classes.of(classes)
    if _kind_of_labels(split) == "boolean":
        return _match_booleans(split, classes, known)
    if _are_numbers(split, known):
        return _match_numbers(split, classes, known)
    refusals = {name: _shared_name_error(split, name, classes) for name in known.shared}
    return partial(_index_of_name, known.by_name, refusals)


def check_numbers(split: Split, ingredients: Ingredients) -> None:
    """Refuse labels that number classes, where classes were left out: there a number says nothing.

    Raises:
        ValueError: if labels are numbers, and classes were left out that they may number too.
    """
    if not split.label_column:
        return
    known = Classes.of(ingredients.labels)
    selected = [ingredient.id for ingredient in ingredients if ingredient.left_out]
    if not selected or split.class_names is not None or split.label_columns:
        return
    if (split.has_label_lists and _are_vectors(split)) or (not known.numbers_are_names and _are_numbers(split, known)):
        raise ValueError(
            f"The labels of {split.name}, split {split.split!r}, are numbers, and classes of {selected[0]} are left "
            "out: whether they number the soup's classes or the checkpoint's can't be told. Write the names of the "
            f"classes into {split.label_column!r}."
        )


def split_classes(split: Split) -> tuple[str, ...]:
    """The classes that a split has: the names of its `ClassLabel` in their order, or the words that are its labels.

    Words are sorted; for them the labels of all images are read.

    Raises:
        ValueError: if its labels are no words.
    """
    if split.class_names is not None:
        return split.class_names
    if split.label_columns:
        return split.label_columns
    if _kind_of_labels(split) not in ("text", "number as text"):
        raise ValueError(
            f"The labels of {split.name}, split {split.split!r}, are no names of classes: which classes it has can't "
            f"be told. Write the names into {split.label_column!r}."
        )
    return tuple(sorted(value for value in _all_values(split) if isinstance(value, str)))


def check_first_label(split: Split, to_class: Callable[[Any], int]) -> None:
    """Check the label of the first row: test splits often have no labels, and are refused before any work.

    Raises:
        ValueError: if the models don't know the label.
    """
    for row in split.rows.take(1):
        label_of(split.label(row), 0, split, to_class)


def _all_values(split: Split) -> set[Any]:
    """The values of the label column, or of the lists in it; of all images these are read."""
    column = split.label_column
    rows = split.rows.select_columns([column])
    if split.has_label_lists:
        return {value for row in rows for value in row[column] or ()}
    return {row[column] for row in rows}


def _no_label(value: Any) -> int:
    return NO_LABEL


def _match_class_labels(split: Split, names: tuple[str, ...], classes: tuple[str, ...]) -> Callable[[Any], int]:
    """Match labels that are numbers, for which the dataset has `names`; those of no image need not be known."""
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
    if unknown and hasattr(split.rows, "select"):  # a part of a dataset keeps the names of all its classes
        values = _all_values(split) if split.has_label_lists else split.rows.unique(split.label_column)
        labels = {_whole_number(value) for value in values}
        unknown = [name for number, name in enumerate(names) if name in unknown and number in labels]
    if unknown:
        raise ValueError(
            f"The dataset {split.name} has classes that the models don't know: {', '.join(unknown[:5])}"
            f"{' and more' if len(unknown) > 5 else ''}. The models know {_listed(classes)}. Rename either, so that "
            "equal names mean equal classes, or leave out their images."
        )
    indices = {number: known.by_name[name] for number, name in enumerate(names) if name in known.by_name}
    return partial(_index_of_number, indices)


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


def _bits_of_list(to_class: Callable[[Any], int], value: Any) -> int:
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise KeyError(value)
    numbers_of_classes = [to_class(entry) for entry in value]
    if len({*numbers_of_classes}) < len(numbers_of_classes):
        raise ValueError(
            f"A list of labels names a class twice: {str(list(value))[:100]}. If it holds 0 or 1 for each class, "
            "write it as booleans or floats."
        )
    return sum(1 << number for number in numbers_of_classes)


def _bits_of_flags(order: Sequence[int], value: Any) -> int:
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != len(order):
        raise KeyError(value)
    if any(not isinstance(flag, (numbers.Real, np.bool_)) or flag not in (0, 1) for flag in value):
        raise KeyError(value)
    return sum(1 << number for number, flag in zip(order, value, strict=True) if flag)


def _kind_of_labels(split: Split) -> str:
    """`boolean`, `number`, `number as text` or `text`."""
    dtype = re.match("[a-z]*", split.label_dtype or "")
    if dtype and dtype.group() in _KINDS:
        return _KINDS[dtype.group()]
    value = _first_label(split)
    if isinstance(value, str):
        return "text" if _number_in(value) is None else "number as text"
    return "text" if _whole_number(value) is None else "number"


def _are_numbers(split: Split, known: Classes) -> bool:
    """Whether labels number the classes, be it as text."""
    kind = _kind_of_labels(split)
    return kind == "number" or (kind == "number as text" and not _are_names(split, known))


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
    if not split.has_label_lists:
        return next((split.label(row) for row in split.rows.take(1)), None)
    lists = (split.label(row) for row in split.rows.take(ROWS_WITH_LISTS))
    return next((values[0] for values in lists if isinstance(values, (list, np.ndarray)) and len(values)), None)


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
