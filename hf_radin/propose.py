"""Candidate recipes: which mixtures are worth a look. Scoring them costs no forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# What draws its candidates blindly, and what seeks them by their scores (seek.py).
DRAWN = ("auto", "monte-carlo", "dirichlet")
SOUGHT = ("subsets", "forward", "local", "line", "wise-ft", "model-stock")

# Of these, which need to know the model that all others were fine-tuned from.
FROM_START = ("wise-ft", "model-stock")

# Of so few models there are hardly any subsets: how much of each is what is left to find.
FEW = 3

# Up to here all subsets are fewer than 4096, and none needs to be left to chance.
EXHAUSTIVE_UP_TO = 12


@dataclass(frozen=True)
class Candidates:
    """Recipes as rows `(recipes, models)`, and for each what proposed it."""

    weights: np.ndarray
    proposals: tuple[str, ...]

    def __add__(self, other: Candidates) -> Candidates:
        """Both, in order; what stands in the first is not taken again from the second."""
        seen = {row.tobytes() for row in self.weights}
        new = [index for index, row in enumerate(other.weights) if row.tobytes() not in seen]
        return Candidates(
            np.concatenate([self.weights, other.weights[new]]),
            self.proposals + tuple(other.proposals[index] for index in new),
        )

    def first(self, count: int) -> Candidates:
        """No more than so many."""
        return Candidates(self.weights[:count], self.proposals[:count])


def propose(models: int, *, proposals: str = "auto", count: int = 200, seed: int = 0) -> Candidates:
    """Candidates for `models` ingredients that are drawn blindly: the singles, the uniform soup, and others.

    Args:
        proposals: kinds, separated by commas. `monte-carlo` draws subsets in equal parts as the paper does; `auto`
            takes all up to 12 ingredients (at most 4095 recipes), of up to 3 mixtures of unequal parts too, and draws
            beyond; `dirichlet` draws mixtures of unequal parts. Kinds that are sought by their scores (`seek`) add
            nothing here.
        count: how many are drawn of each kind (200 in the paper).

    Raises:
        ValueError: for an unknown kind, or all subsets of more than 20 ingredients.
    """
    kinds = split_kinds(proposals)
    for name, value, least in (("candidates", count, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}={value!r}: it is a whole number, at least {least}.")
    if "subsets" in kinds and models > 20:
        raise ValueError(f"{models} ingredients have 2^{models} - 1 subsets; take proposals='monte-carlo'.")
    found = singles(models) + uniform(models)
    if "auto" in kinds and models <= EXHAUSTIVE_UP_TO:
        found += subsets(models)
    elif "auto" in kinds or "monte-carlo" in kinds:
        found += monte_carlo(models, count=count, seed=seed)
    if "dirichlet" in kinds or ("auto" in kinds and models <= FEW):
        found += dirichlet(models, count=count, seed=seed)
    return found


def split_kinds(proposals: str) -> tuple[str, ...]:
    """The kinds that stand between the commas.

    Raises:
        ValueError: if there is none, or an unknown one.
    """
    kinds = tuple(kind.strip() for kind in str(proposals).split(","))
    for kind in kinds:
        if kind not in DRAWN + SOUGHT:
            known = ", ".join(map(repr, DRAWN + SOUGHT))
            raise ValueError(f"proposals={proposals!r}: it is one of {known}, or several with commas between.")
    return kinds


def check_start(kinds: Sequence[str], start: str | None, ids: Sequence[str]) -> None:
    """Raises a ValueError if kinds need a start that is not there, or don't need the one that is given."""
    needing = [kind for kind in kinds if kind in FROM_START]
    if needing and start is None:
        raise ValueError(
            f"proposals={needing[0]!r} mixes with the model that all others were fine-tuned from: make that one of "
            "the ingredients, and name it with start=... (--start ID)."
        )
    if start is not None and not needing:
        raise ValueError(f"start={start!r} is for proposals={' or '.join(map(repr, FROM_START))}.")
    if start is not None and start not in ids:
        raise ValueError(f"start={start!r} is none of the ingredients: {', '.join(ids)}.")


def singles(models: int) -> Candidates:
    """Each ingredient alone."""
    return Candidates(np.eye(models), ("single",) * models)


def uniform(models: int) -> Candidates:
    """All ingredients in equal parts."""
    return Candidates(equal_parts(np.ones((1, models), dtype=bool)), ("uniform",))


def subsets(models: int) -> Candidates:
    """All subsets in equal parts: the small ones first."""
    members = (np.arange(1, 1 << models)[:, None] >> np.arange(models)) & 1  # (subsets, models)
    members = members[np.argsort(members.sum(axis=1), kind="stable")]
    return Candidates(equal_parts(members.astype(bool)), ("subset",) * len(members))


def monte_carlo(models: int, *, count: int = 200, seed: int = 0) -> Candidates:
    """Subsets in equal parts, none twice, their sizes drawn evenly from 2 to `models - 1` (arXiv 2401.17790).

    Fewer than `count` come back where there are not so many.
    """
    generator = np.random.default_rng(seed)
    wanted = min(count, (1 << models) - models - 2)  # all subsets but the empty one, the singles and the whole
    drawn: dict[bytes, np.ndarray] = {}
    while len(drawn) < wanted:
        members = np.zeros(models, dtype=bool)
        members[generator.choice(models, size=generator.integers(2, models), replace=False)] = True
        drawn.setdefault(members.tobytes(), members)
    members = np.stack(list(drawn.values())) if drawn else np.zeros((0, models), dtype=bool)
    return Candidates(equal_parts(members), ("monte-carlo",) * len(members))


def dirichlet(models: int, *, count: int = 200, seed: int = 0) -> Candidates:
    """Mixtures drawn evenly from the whole simplex."""
    rows = np.random.default_rng(seed).dirichlet(np.ones(models), size=count)
    return Candidates(rows / rows.sum(axis=1, keepdims=True), ("dirichlet",) * count)


def equal_parts(members: np.ndarray) -> np.ndarray:
    """Boolean rows `(recipes, models)` to rows on the simplex."""
    return members / members.sum(axis=1, keepdims=True)
