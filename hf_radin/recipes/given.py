"""Logits that were computed elsewhere, of models that are no checkpoints of transformers, and their averages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_radin.recipes.recipe import Recipe

# From a recipe to the logits of really averaged weights, `(samples, classes)`.
Evaluate = Callable[[Recipe], Any]


@dataclass(frozen=True, eq=False)
class GivenModels:
    """Models of which logits were given, and no checkpoints.

    Args:
        evaluate: gives the logits of their averages; None if nothing does.
    """

    evaluate: Evaluate | None = None

    def logits(self, recipe: Recipe, shape: tuple[int, int]) -> np.ndarray:
        """The logits of averaged weights on the images of the split: float32 `(samples, classes)`.

        Args:
            shape: that they must have.

        Raises:
            ValueError: if they have another one, are no floats, or are not finite.
        """
        if self.evaluate is None:
            raise ValueError("Without evaluate=... (LogitBank.from_arrays) nothing averages weights.")
        parts = ", ".join(f"{weight:.4g} {name}" for name, weight in recipe.used.items())
        what = f"What evaluate gives for the recipe {parts}"
        logits = _as_array(what, self.evaluate(recipe))
        if logits.shape != shape:
            raise ValueError(f"{what} has the shape {logits.shape}; it is (samples, classes), here {shape}.")
        return _finite_floats(what, logits)


@dataclass(frozen=True, eq=False)
class GivenLogits:
    """Logits of models on one split, with the labels: they fit each other.

    Args:
        arrays: of each model by its name, float32 `(samples, classes)`.
        labels: int64 `(samples,)`.
        classes: names in the order of the logits.
        ids: of the samples, int64 `(samples,)`.
        split: its name.
        has_ids: whether the user gave these, and they are no positions.
    """

    arrays: dict[str, np.ndarray]
    labels: np.ndarray
    classes: tuple[str, ...]
    ids: np.ndarray
    split: str
    has_ids: bool = False

    @classmethod
    def of(cls, logits: Any, labels: Any, *, classes: Any = None, ids: Any = None, split: str) -> GivenLogits:
        """What was given, checked. Arguments and errors as of `LogitBank.from_arrays`."""
        if not isinstance(split, str) or not split:
            raise ValueError(f"split={split!r}: it is the name of a split.")
        arrays = _checked_logits(logits)
        samples, count = next(iter(arrays.values())).shape
        names = tuple(map(str, range(count))) if classes is None else _checked_classes(classes, count)
        given = _checked_labels(labels, samples, names, are_named=classes is not None)
        return cls(arrays, given, names, _checked_ids(ids, samples), split, ids is not None)


def _checked_logits(logits: Any) -> dict[str, np.ndarray]:
    """The logits of each model by its name, float32 `(samples, classes)`.

    Raises:
        ValueError: if there are fewer than two, a name is no string, or their shapes differ.
    """
    if not isinstance(logits, Mapping) or len(logits) < 2:
        given = f"{len(logits)} were given" if isinstance(logits, Mapping) else f"a {type(logits).__name__} was given"
        raise ValueError(f"logits are arrays by the names of their models, of two models at least; {given}.")
    arrays: dict[str, np.ndarray] = {}
    for name, values in logits.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"A model is named by a string, and not by {name!r}.")
        array = _as_array(f"What is given as logits of {name!r}", values)
        if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
            raise ValueError(
                f"The logits of {name!r} have the shape {array.shape}; it is (samples, classes), with two classes or "
                "more."
            )
        first = next(iter(arrays), name)
        if arrays and array.shape != arrays[first].shape:
            raise ValueError(
                f"The logits of {name!r} have the shape {array.shape}, and those of {first!r} {arrays[first].shape}: "
                "all are of the same images and classes."
            )
        arrays[name] = _finite_floats(f"What is given as logits of {name!r}", array)
    return arrays


def _as_array(what: str, values: Any) -> np.ndarray:
    """An array of what may be a tensor, on any device, of any precision, with a gradient or without.

    Raises:
        ValueError: if it is none.
    """
    import torch

    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{what} is no array (samples, classes): {error}") from error


def _finite_floats(what: str, array: np.ndarray) -> np.ndarray:
    """An array of floats as float32.

    Raises:
        ValueError: if it has other values, or some that are no finite number in float32.
    """
    if array.dtype.kind != "f":
        raise ValueError(f"{what} is {array.dtype}: logits are floats.")
    with np.errstate(over="ignore"):  # what is too large for float32 is noticed below
        floats = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(floats).all():
        sample, column = np.argwhere(~np.isfinite(floats))[0]
        raise ValueError(f"{what} is not finite: {array[sample, column]} in row {sample}, column {column}.")
    return floats


def _checked_classes(classes: Any, count: int) -> tuple[str, ...]:
    """The names of classes.

    Raises:
        ValueError: if they are no strings, of another number, or one stands twice.
    """
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ValueError(f"classes={classes!r}: they are a list of strings.")
    names = tuple(classes)
    if others := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"A class is named by a string, and not by {others[0]!r}.")
    if len(names) != count:
        raise ValueError(f"{len(names)} classes are named, and the logits have {count} columns.")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"The class {name!r} is named {times} times.")
    return tuple(map(str, names))  # numpy has strings of its own


def _checked_labels(labels: Any, samples: int, classes: tuple[str, ...], *, are_named: bool) -> np.ndarray:
    """The number of each sample's class, int64 `(samples,)`.

    Args:
        are_named: whether the names of the classes were given.

    Raises:
        ValueError: if there are more or fewer, or one is no class.
    """
    array = np.asarray(labels)
    if array.shape != (samples,):
        raise ValueError(f"The labels have the shape {array.shape}, and there are logits of {samples} images.")
    values: list[Any] = array.tolist()
    if all(isinstance(label, str) for label in values):
        if not are_named:
            raise ValueError(f"The labels are names, as in {values[0]!r}: give classes, in the order of the logits.")
        numbers = {name: number for number, name in enumerate(classes)}
        if others := [label for label in values if label not in numbers]:
            raise ValueError(f"The label {others[0]!r} is none of the {len(classes)} classes, {list(classes)[:10]}.")
        return np.array([numbers[label] for label in values], dtype=np.int64)
    if array.dtype.kind not in "iu":
        odd = next((label for label in values if label != label), values[0])
        raise ValueError(f"The labels are {array.dtype}, as in {odd!r}: they are ints, or names of classes.")
    if outside := [label for label in values if not 0 <= label < len(classes)]:
        raise ValueError(f"The label {outside[0]} is none of the classes, which are 0 to {len(classes) - 1}.")
    return array.astype(np.int64)


def _checked_ids(ids: Any, samples: int) -> np.ndarray:
    """A number for each sample, int64 `(samples,)`; by default its position.

    Raises:
        ValueError: if they are no ints, of another number, or one stands twice.
    """
    array = np.arange(samples) if ids is None else np.asarray(ids)
    if array.shape != (samples,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"The ids are {array.dtype} of the shape {array.shape}; they are ints, one for each of {samples} images."
        )
    values, counts = np.unique(array, return_counts=True)
    if len(values) < samples:
        raise ValueError(f"The id {values[counts.argmax()]} stands for {counts.max()} images.")
    return array.astype(np.int64)
