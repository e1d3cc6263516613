"""A recipe says which ingredients go into a soup and how much of each; a measurement says how good the soup is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_radin.runtime.schema import IF_ANY, from_json, to_json

# Weights further from the simplex than the first are refused; weights nearer than the second are not rescaled.
SIMPLEX_TOLERANCE = 1e-6
ROUNDING = 1e-12


@dataclass(frozen=True)
class Pull:
    """How far the body of a soup, which is all but its head, is pulled to a start (WiSE-FT, arXiv 2109.01903).

    Args:
        start: the checkpoint that the ingredients were fine-tuned from, which is none of them.
        share: of the start in the body, in (0, 1): the body is `(1 - share) * soup + share * start`.

    Raises:
        ValueError: if it names no start, or the share is none.
    """

    start: str
    share: float

    def __post_init__(self) -> None:
        if not isinstance(self.start, str) or not self.start:
            raise ValueError(f"A recipe names its start by a string, not by {self.start!r}.")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share < 1:
            raise ValueError(
                f"The share of the start {self.start!r} in the body of a soup is {self.share!r}; it is above 0 and "
                "below 1."
            )

    def __str__(self) -> str:
        return f"{100 * self.share:.4g}% of {self.start}"


@dataclass(frozen=True)
class Recipe:
    """Ingredient ids and their weights on the simplex (`p` in arXiv 2401.17790).

    Args:
        ingredients: ids, each once.
        weights: one for each ingredient, finite, at least 0, with sum 1.
        pull: where the body of their average is pulled to a start that is no ingredient, which start and how far.

    Raises:
        ValueError: if the weights are not on the simplex or do not fit the ingredients.
    """

    ingredients: tuple[str, ...]
    weights: tuple[float, ...]
    pull: Pull | None = field(default=None, metadata=IF_ANY)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ingredients", tuple(self.ingredients))
        try:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        except OverflowError as error:
            raise ValueError(f"A weight of a recipe is too large to be one: {error}.") from error
        if not self.ingredients:
            raise ValueError("A recipe needs at least one ingredient.")
        if len(self.ingredients) != len(self.weights):
            raise ValueError(f"A recipe of {len(self.ingredients)} ingredients has {len(self.weights)} weights.")
        if not all(isinstance(name, str) for name in self.ingredients):
            raise ValueError(f"A recipe names its ingredients by strings, not by {self.ingredients!r}.")
        repeated = sorted({name for name in self.ingredients if self.ingredients.count(name) > 1})
        if repeated:
            raise ValueError(f"Ingredient {repeated[0]!r} appears twice in a recipe; add up its weights instead.")
        for name, weight in zip(self.ingredients, self.weights, strict=True):
            if not 0 <= weight <= 1 + SIMPLEX_TOLERANCE:
                raise ValueError(f"The weight of {name!r} is {weight}; weights are at least 0 and add up to 1.")
        total = math.fsum(self.weights)
        if abs(total - 1) > SIMPLEX_TOLERANCE:
            raise ValueError(f"The weights of a recipe add up to {total!r}, not to 1.")
        if abs(total - 1) > ROUNDING:  # float32 weights, say; a recipe that is read back is not rescaled again
            object.__setattr__(self, "weights", tuple(weight / total for weight in self.weights))

    @classmethod
    def uniform(cls, ingredients: tuple[str, ...] | list[str]) -> Recipe:
        """The same weight for every ingredient."""
        if not ingredients:
            raise ValueError("A recipe needs at least one ingredient.")
        return cls(tuple(ingredients), (1 / len(ingredients),) * len(ingredients))

    @property
    def used(self) -> dict[str, float]:
        """The ingredients with a weight above 0, in order."""
        return {name: weight for name, weight in zip(self.ingredients, self.weights, strict=True) if weight > 0}

    @property
    def is_single(self) -> bool:
        """Whether its soup is one of the ingredients as it is."""
        return len(self.used) == 1 and self.pull is None

    @property
    def ensemble(self) -> Recipe:
        """The same without a pull, of which an ensemble knows nothing: a start has no logits."""
        return replace(self, pull=None)

    def is_same(self, other: Recipe) -> bool:
        """Whether it is the same mixture, in whatever order the ingredients stand."""
        return (self.used, self.pull) == (other.used, other.pull)

    def in_order(self, ids: Sequence[str]) -> Recipe:
        """The same mixture, with the ingredients that it uses in the order of these ids."""
        used = self.used
        names = [name for name in ids if name in used]
        return Recipe(tuple(names), tuple(used[name] for name in names), self.pull)

    def to_json(self) -> str:
        """The recipe as JSON, exactly: Python prints the shortest digits that read back as the same float."""
        return json.dumps(to_json(self))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is not a recipe, or its weights are not on the simplex.
        """
        try:
            fields = json.loads(text)
            pull = fields.get("pull")
            pull = None if pull is None else from_json(Pull, pull)
            return cls(tuple(fields["ingredients"]), tuple(fields["weights"]), pull)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Not a recipe: expected 'ingredients' and 'weights', got {text[:200]!r}.") from error


@dataclass(frozen=True)
class Teacher:
    """What a head is refitted to.

    Args:
        ensemble: the recipe whose ensemble's logits teach.
        labels: whether the labels of the images have a part, too.
    """

    ensemble: Recipe
    labels: bool = False

    def __str__(self) -> str:
        return f"{len(self.used)}" + (" and labels" if self.labels else "")

    @property
    def used(self) -> dict[str, float]:
        """The weights in the ensemble that are not zero, by ingredient."""
        return self.ensemble.used

    def in_order(self, ids: Sequence[str]) -> Teacher:
        """The same with the ingredients in the order of these ids."""
        return replace(self, ensemble=self.ensemble.in_order(ids))


@dataclass(frozen=True)
class Measurement:
    """One candidate: the estimate by its ensemble, and what the averaged weights were measured to reach.

    Args:
        recipe: the candidate.
        proposal: what proposed it: `single`, `uniform`, `own`, `greedy`, `subset`, `alone` (a single model with a
            refitted head), or a kind of candidates.
        estimate: of the ensemble on the validation split what soups are chosen by, the accuracy in [0, 1] unless the
            user says otherwise; with a refitted head, of its teacher.
        measured: the same of the soup on the same images; None if it was only estimated. With a refitted
            head, that of heads which did not see the image (`refit.refit`).
        images: how many images the soup was measured on; if these are not all, `measured` is estimated from them.
        interval: the 95% interval of what was measured, given the images; None if nothing was measured.
        passes: images that the soup was shown, as a share of the split; 0 for a single model, whose logits are known,
            and for a further head of a soup that was shown them.
        predicted: what soups that were measured before predict of it; None if there was no prediction.
        dropped: whether it was behind by more than chance and was shown no more images: it is then more likely better
            than it seems.
        seconds: of the device for these images, summed over devices; None if not timed. Ignored in comparisons.
        device: on which it was measured. Ignored in comparisons.
        teacher: what its head was refitted to; None where the head is averaged like all else.
        keeps: whether it keeps all floors; None where there are none.
        exact: True where the soup is the same function as its ensemble, up to rounding, so that what logits say of
            this is measured; else it is not said.
    """

    recipe: Recipe
    proposal: str
    estimate: float
    measured: float | None
    images: int
    interval: tuple[float, float] | None = None
    passes: float = 0.0
    predicted: float | None = None
    dropped: bool = False
    seconds: float | None = field(default=None, compare=False)
    device: str | None = field(default=None, compare=False)
    teacher: Teacher | None = None
    keeps: bool | None = field(default=None, metadata=IF_ANY)
    exact: bool | None = field(default=None, metadata=IF_ANY)

    @property
    def known(self) -> float:
        """What was measured, or else predicted, or else estimated."""
        values = self.measured, self.predicted, self.estimate
        return next(value for value in values if value is not None)

    def to_dict(self) -> dict[str, Any]:
        return {
            **to_json(self.recipe.in_order(tuple(self.recipe.used))),
            "proposal": self.proposal,
            "estimate": self.estimate,
            "predicted": self.predicted,
            "measured": self.measured,
            "interval": self.interval and list(self.interval),
            "images": self.images,
            "passes": self.passes,
            "dropped": self.dropped,
            "seconds": self.seconds,
            "device": self.device,
            "teacher": self.teacher
            and {
                "ensemble": {"ingredients": list(self.teacher.used), "weights": list(self.teacher.used.values())},
                "labels": self.teacher.labels,
            },
            **({} if self.keeps is None else {"keeps": self.keeps}),
            **({} if self.exact is None else {"exact": self.exact}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` wrote.

        Raises:
            ValueError: if a field is missing or of another type.
        """
        return from_json(cls, {**fields, "recipe": fields})


@dataclass(frozen=True)
class Result:
    """The scores of one way to use the ingredients on one split.

    Args:
        name: `soup`, `best single`, `uniform`, `greedy` or `ensemble`.
        split: name of the split.
        metrics: scores by name; accuracy in [0, 1].
        images: how many images they were computed on.
        interval: the 95% interval of the accuracy: by the bootstrap, or for a baseline that was shown only a part of
            the images the one of its measurement.
    """

    name: str
    split: str
    metrics: dict[str, float]
    images: int
    interval: tuple[float, float] | None = None
