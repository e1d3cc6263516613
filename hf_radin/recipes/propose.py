"""Candidate recipes: which mixtures are worth a look. Scoring them costs no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.scoring import MIXED_AT_ONCE

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


# By how much of their weight the measured candidates differ at least, where they are sought by their scores.
APART = 0.1

# How many of the best candidates local search and line search start from.
STARTS, LINES = 5, 2

# What `auto` seeks, beside what it draws: those that `benchmarks/budget.py` finds better than drawing alone.
AUTO = ("local", "line")

# From rows `(recipes, models)` on the simplex to their scores `(recipes,)`; more is better.
Score = Callable[[np.ndarray], np.ndarray]

# From two recipes `(models,)` to the best step from one to the other, in [0, 1], and how many images are right there.
Step = Callable[[np.ndarray, np.ndarray], tuple[float, int]]

# How many subsets are scored at a time, and how many of all are kept.
SCORED_AT_ONCE, KEPT = 1 << 15, 4096


def seek(
    drawn: Candidates,
    scores: np.ndarray,
    score: Score,
    step: Step,
    kinds: Sequence[str],
    *,
    start: int | None = None,
    products: np.ndarray | None = None,
) -> tuple[Candidates, np.ndarray]:
    """The drawn candidates and those that are sought from there, and the scores of all.

    Args:
        drawn: the first of them are the singles.
        scores: theirs, `(recipes,)`.
        kinds: `subsets`, `forward`, `local`, `line`, and `auto` for the last two; `wise-ft` and `model-stock`; others
            add nothing.
        start: which model the others were fine-tuned from, for the last two.
        products: of all pairs of models, as they lie to their mean, for `model-stock` (see `kinship.products`).
    """
    models, found = drawn.weights.shape[1], drawn
    kinds = (*kinds, *AUTO) if "auto" in kinds else kinds
    if "subsets" in kinds:
        found += best_subsets(models, score)
    if "forward" in kinds:
        found += forward(models, score)
    if "local" in kinds:
        equal = (drawn.weights > 0) / (drawn.weights > 0).sum(axis=1, keepdims=True)
        subsets = np.flatnonzero((drawn.weights == equal).all(axis=1))
        for row in subsets[np.argsort(-scores[subsets], kind="stable")][:STARTS]:
            found += local_search(drawn.weights[row] > 0, score)
    if "line" in kinds:
        for row in np.argsort(-scores, kind="stable")[:LINES]:
            found += line_search(drawn.weights[row], step)
    if "wise-ft" in kinds and start is not None:
        order = np.argsort(-scores, kind="stable")
        rows = drawn.weights[order[drawn.weights[order, start] == 0]]
        found += wise_ft(start, rows[:STARTS])
    if "model-stock" in kinds and start is not None and products is not None:
        found += model_stock(start, products)
    new = found.weights[len(drawn.weights) :]
    return found, np.concatenate([scores, score(new)]) if len(new) else scores


def best_subsets(models: int, score: Score, *, keep: int = KEPT) -> Candidates:
    """Of all subsets in equal parts those with the best scores, the best first; some are looked at after others.

    Args:
        keep: how many.
    """
    best, scores = np.zeros((0, models), dtype=bool), np.zeros(0)
    for start in range(1, 1 << models, SCORED_AT_ONCE):
        numbers = np.arange(start, min(start + SCORED_AT_ONCE, 1 << models))
        members = ((numbers[:, None] >> np.arange(models)) & 1).astype(bool)  # (subsets, models)
        scores = np.concatenate([scores, score(equal_parts(members))])
        order = np.argsort(-scores, kind="stable")[:keep]
        best, scores = np.concatenate([best, members])[order], scores[order]
    return Candidates(equal_parts(best), ("subset",) * len(best))


def line_search(start: np.ndarray, step: Step) -> Candidates:
    """From a recipe to better ones: of one ingredient after another the weight is set to the very best one.

    In each round that ingredient is taken whose best weight, the others keeping their proportions, gets most images
    right; it ends when none gets more. All recipes on the way are candidates.

    Args:
        start: `(models,)`.
        step: the best step from one recipe to another, and how many images are right there.
    """
    models, row, found = len(start), start, []
    most = max(step(start, start)[1], 0)
    for _ in range(2 * models):
        rounds = []
        for one in np.flatnonzero(row < 1):
            rest = np.where(np.arange(models) == one, 0, row)
            rest = rest / rest.sum()
            share, right = step(rest, np.eye(models)[one])
            rounds.append((right, (1 - share) * rest + share * np.eye(models)[one]))
        right, better = max(rounds, key=lambda each: each[0])  # of equals the first
        if right <= most:
            break
        most, row = right, better
        found.append(row / row.sum())
    return Candidates(np.array(found).reshape(-1, models), ("line",) * len(found))


def forward(models: int, score: Score, *, steps: int | None = None) -> Candidates:
    """Forward selection with replacement (Caruana et al. 2004): each step adds the ingredient that helps most.

    An ingredient may be added again, which gives it more weight. All mixtures on the way are candidates, since the
    score may fall before it rises.

    Args:
        steps: how many ingredients are added; by default twice as many as there are.
    """
    parts = np.zeros(models)
    found: dict[bytes, np.ndarray] = {}
    for _ in range(steps or 2 * models):
        trials = parts + np.eye(models)
        rows = trials / trials.sum(axis=1, keepdims=True)
        best = int(np.argmax(score(rows)))  # of equals the first
        parts = trials[best]
        found.setdefault(rows[best].tobytes(), rows[best])
    return Candidates(np.stack(list(found.values())), ("forward",) * len(found))


def local_search(members: np.ndarray, score: Score) -> Candidates:
    """From a subset in equal parts to better ones: one ingredient is added, dropped or swapped until nothing helps.

    Args:
        members: bool `(models,)`, the subset to start from.

    Returns:
        the subset that it ends with, if it is another.
    """
    start = members = np.asarray(members, dtype=bool)
    best = float(score(equal_parts(members[None]))[0])
    while True:
        near = neighbours(members)
        scores = score(equal_parts(near))
        place = int(np.argmax(scores))
        if scores[place] <= best:
            break
        best, members = float(scores[place]), near[place]
    found = members[None][: int((members != start).any())]
    return Candidates(equal_parts(found), ("local",) * len(found))


def wise_ft(start: int, rows: np.ndarray) -> Candidates:
    """Recipes `(recipes, models)` mixed with the model that all began from, in nine steps (arXiv 2109.01903)."""
    models = rows.shape[1]
    shares = np.arange(1, 10)[:, None] / 10
    found = [share * row + (1 - share) * np.eye(models)[start] for row in rows for share in shares]
    return Candidates(np.array(found).reshape(-1, models), ("wise-ft",) * len(found))


def model_stock(start: int, products: np.ndarray) -> Candidates:
    """The mean of all others drawn to their start by the angle between them, one for all layers (arXiv 2403.19522).

    With n models and the mean cosine c of their differences from the start, the mean counts n c / (1 + (n - 1) c):
    that point is nearest to the centre of the shell on which fine-tunes seem to lie. The paper has an angle a layer.
    """
    models = len(products)
    others = np.flatnonzero(np.arange(models) != start)
    apart = products - products[start] - products[:, [start]] + products[start, start]
    apart, n = apart[np.ix_(others, others)], models - 1
    lengths = np.sqrt(np.maximum(apart.diagonal(), np.finfo(float).tiny))
    cosines = apart / np.outer(lengths, lengths)
    cosine = np.clip((cosines.sum() - n) / max(n * (n - 1), 1), 0, 1) if n > 1 else 1.0
    share = n * cosine / (1 + (n - 1) * cosine)
    row = np.full(models, share / n)
    row[start] = 1 - share
    return Candidates(row[None] / row.sum(), ("model-stock",))


def shortlist(weights: np.ndarray, scores: np.ndarray, count: int, *, apart: float = APART) -> list[int]:
    """The places of `count` good candidates that differ: eight copies of one soup are one measurement for eight.

    From the best down each is taken that differs from all that were taken in more than `apart` of its weight (half the
    sum of absolute differences, the total variation). Where there are not so many, the best of the others fill up.

    Args:
        weights: `(recipes, models)`.
        scores: `(recipes,)`.
    """
    ranked = np.argsort(-scores, kind="stable")
    taken: list[int] = []
    for row in ranked:
        if len(taken) == count:
            break
        if not taken or (np.abs(weights[taken] - weights[row]).sum(axis=1) > 2 * apart).all():
            taken.append(int(row))
    left = [int(row) for row in ranked if int(row) not in set(taken)]
    return taken + left[: count - len(taken)]


def neighbours(members: np.ndarray) -> np.ndarray:
    """The subsets that differ by one ingredient added, dropped or swapped; none is empty: bool `(subsets, models)`."""
    inside, outside = np.flatnonzero(members), np.flatnonzero(~members)
    changes = [[one] for one in outside]
    changes += [[one] for one in inside if len(inside) > 1]
    changes += [[one, other] for one in inside for other in outside]
    near = np.repeat(members[None], len(changes), axis=0)
    for row, change in zip(near, changes, strict=True):
        row[change] = ~row[change]
    return near


def best_step(pruned: Pruned, labels: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[float, int]:
    """The step in [0, 1] from one recipe to another at which most images are right, and how many these are.

    Of the steps at which as many are, the middle of the longest run is taken: there no tie decides.

    Args:
        pruned: the classes that can win, with `top` 1.
        labels: of the split `(samples,)`.
        start, end: recipes `(models,)`.
    """
    lows, highs, always = [], [], 0
    for bucket in pruned.buckets():
        right = bucket.classes == labels[bucket.images]  # (k, images)
        there = right.any(axis=0)  # of the others the label never wins
        if not len(bucket.logits):
            always += int(there.sum())
            continue
        images, step = np.flatnonzero(there), max(1, MIXED_AT_ONCE // bucket.logits[:, :, 0].size)
        for first in range(0, len(images), step):
            some = images[first : first + step]
            flat = bucket.logits[:, :, some].reshape(pruned.models, -1).astype(np.float64)
            from_start, to_end = (np.stack([start, end]) @ flat).reshape(2, len(right), -1)  # (k, images) each
            low, high = _between(from_start, to_end - from_start, right[:, some].argmax(axis=0))
            lows.append(low)
            highs.append(high)
    low, high = (np.concatenate(found) if found else np.zeros(0) for found in (lows, highs))
    runs = low < high
    low, high = low[runs], high[runs]
    steps = np.unique(np.concatenate([[0.0, 1.0], low, high]))
    middles = (steps[1:] + steps[:-1]) / 2
    counts = np.searchsorted(np.sort(low), middles) - np.searchsorted(np.sort(high), middles)  # of each run
    best = counts == counts.max()
    at = int(np.argmax(np.where(best, steps[1:] - steps[:-1], -1)))
    return float(middles[at]), always + int(counts[at])


def _between(at: np.ndarray, slope: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From which step to which the class at `place` `(images,)` is ahead of all others; the same twice if nowhere.

    Args:
        at, slope: of each class's line `(k, images)`.
    """
    each = np.arange(len(place))
    ahead, rise = at[place, each] - at, slope[place, each] - slope
    others = np.arange(len(at))[:, None] != place
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -ahead / rise
    low = np.where(others & (rise > 0), crossing, 0.0).max(axis=0)
    high = np.where(others & (rise < 0), crossing, 1.0).min(axis=0)
    behind = (others & (rise == 0) & (ahead < 0)).any(axis=0)
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    return low, np.where(behind, low, np.maximum(low, high))
