"""The names of the classes: read them, and bring those of all ingredients into one order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hf_radin.ingredients import Ingredient


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
