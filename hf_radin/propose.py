"""Candidate recipes: which mixtures are worth a look. Scoring them costs no forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def propose(models: int, *, proposals: str = "auto", count: int = 200, seed: int = 0) -> Candidates:
    """Candidates for `models` ingredients: the singles, the uniform soup, and subsets of equal weights.

    Args:
        proposals: `monte-carlo` draws subsets as the paper does; `subsets` takes all of them; `auto` takes all up to
            12 ingredients (at most 4095 recipes) and draws beyond.
        count: how many subsets are drawn (200 in the paper).

    Raises:
        ValueError: for an unknown kind, or all subsets of more than 20 ingredients.
    """
    if proposals not in ("auto", "monte-carlo", "subsets"):
        raise ValueError(f"proposals={proposals!r}: it is 'auto', 'monte-carlo' or 'subsets'.")
    for name, value, least in (("candidates", count, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}={value!r}: it is a whole number, at least {least}.")
    if proposals == "subsets" and models > 20:
        raise ValueError(f"{models} ingredients have 2^{models} - 1 subsets; take proposals='monte-carlo'.")
    always = singles(models) + uniform(models)
    if proposals == "subsets" or (proposals == "auto" and models <= EXHAUSTIVE_UP_TO):
        return always + subsets(models)
    return always + monte_carlo(models, count=count, seed=seed)


def singles(models: int) -> Candidates:
    """Each ingredient alone."""
    return Candidates(np.eye(models), ("single",) * models)


def uniform(models: int) -> Candidates:
    """All ingredients in equal parts."""
    return Candidates(_equal_parts(np.ones((1, models), dtype=bool)), ("uniform",))


def subsets(models: int) -> Candidates:
    """All subsets in equal parts: the small ones first."""
    members = (np.arange(1, 1 << models)[:, None] >> np.arange(models)) & 1  # (subsets, models)
    members = members[np.argsort(members.sum(axis=1), kind="stable")]
    return Candidates(_equal_parts(members.astype(bool)), ("subset",) * len(members))


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
    return Candidates(_equal_parts(members), ("monte-carlo",) * len(members))


def _equal_parts(members: np.ndarray) -> np.ndarray:
    """Boolean rows `(recipes, models)` to rows on the simplex."""
    return members / members.sum(axis=1, keepdims=True)
