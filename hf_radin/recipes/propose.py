"""Candidate recipes: which mixtures are worth scoring. Scoring costs no forward pass.

`propose` draws candidates without looking at scores, `seek` searches from there for better ones, and `shortlist` picks
the few that are worth measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.scoring import MIXED_AT_ONCE

# Kinds of candidates that are drawn at random or enumerated, and kinds that are sought by their scores.
DRAWN = ("auto", "monte-carlo", "dirichlet")
SOUGHT = ("subsets", "forward", "local", "line", "wise-ft", "model-stock")

# The kinds that need the model that all others were fine-tuned from.
FROM_START = ("wise-ft", "model-stock")

# What `auto` seeks beside what it draws: the kinds that `benchmarks/budget.py` finds better than drawing alone.
AUTO = ("local", "line")

# Up to this many ingredients `auto` also draws unequal mixtures: there are hardly any subsets to choose from.
FEW = 3

# Up to this many ingredients `auto` takes all subsets: they are fewer than 4096.
EXHAUSTIVE_UP_TO = 12

# Passes that a search takes for soups at most where nobody says.
MOST_PASSES = 8

# By how much of their weight measured candidates differ at least, where candidates are sought by their scores.
APART = 0.1

# From how many of the best candidates local search and line search start.
STARTS, LINES = 5, 2

# Decimals of a step of line search: far fewer than the last bits of logits change, far more than soups differ by.
STEP_DIGITS = 4

# Weights of a line search that are left out where as many images stay right: so small a share of the largest weight.
DUST = 1e-3

# How many subsets are scored at a time, and how many of all are returned.
SCORED_AT_ONCE, KEPT = 1 << 15, 4096

# From rows `(recipes, models)` on the simplex to their scores `(recipes,)`; more is better.
Score = Callable[[np.ndarray], np.ndarray]

# From two recipes `(models,)` to the best step from one to the other, in [0, 1], and how many images are right there.
Step = Callable[[np.ndarray, np.ndarray], tuple[float, int]]


@dataclass(frozen=True)
class Candidates:
    """Recipes as rows `(recipes, models)`, and for each the kind that proposed it."""

    weights: np.ndarray
    proposals: tuple[str, ...]

    def __add__(self, other: Candidates) -> Candidates:
        """Both, in order, without the rows of the second that the first has already."""
        seen = {row.tobytes() for row in self.weights}
        new = [index for index, row in enumerate(other.weights) if row.tobytes() not in seen]
        return Candidates(
            np.concatenate([self.weights, other.weights[new]]),
            self.proposals + tuple(other.proposals[index] for index in new),
        )

    def first(self, count: int) -> Candidates:
        """The first `count` candidates."""
        return Candidates(self.weights[:count], self.proposals[:count])


def propose(models: int, *, proposals: str = "auto", count: int = 200, seed: int = 0) -> Candidates:
    """Candidates that are drawn without looking at scores: the single models, the uniform soup, and others.

    Args:
        models: how many ingredients there are.
        proposals: kinds, separated by commas. `monte-carlo` draws subsets in equal parts as the paper does; `auto`
            takes all subsets of up to 12 ingredients (at most 4095 recipes) and draws beyond, and of up to 3
            ingredients also draws unequal mixtures; `dirichlet` draws unequal mixtures. Kinds that are sought by
            their scores (see `seek`) add nothing here.
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
    candidates = singles(models) + uniform(models)
    if "auto" in kinds and models <= EXHAUSTIVE_UP_TO:
        candidates += subsets(models)
    elif "auto" in kinds or "monte-carlo" in kinds:
        candidates += monte_carlo(models, count=count, seed=seed)
    if "dirichlet" in kinds or ("auto" in kinds and models <= FEW):
        candidates += dirichlet(models, count=count, seed=seed)
    return candidates


def split_kinds(proposals: str) -> tuple[str, ...]:
    """The kinds in a comma-separated list.

    Raises:
        ValueError: if there is none, or an unknown one.
    """
    kinds = tuple(kind.strip() for kind in str(proposals).split(","))
    for kind in kinds:
        if kind not in DRAWN + SOUGHT:
            known = ", ".join(map(repr, DRAWN + SOUGHT))
            raise ValueError(f"proposals={proposals!r}: it is one of {known}, or several with commas between.")
    return kinds


def check_start(kinds: Sequence[str], start: str | None, ids: Sequence[str], *, passes: float) -> None:
    """Check that there is a start where a kind of candidates needs one, and none where no kind does.

    Args:
        start: an ingredient's id or, for `wise-ft`, the name of another checkpoint.
        ids: of the ingredients.
        passes: that soups may take.

    Raises:
        ValueError: if there is not; or it is no ingredient, and `model-stock` takes one or nothing is measured.
    """
    needing = [kind for kind in kinds if kind in FROM_START]
    if needing and start is None:
        raise ValueError(
            f"proposals={needing[0]!r} mixes with the model that all others were fine-tuned from: name it with "
            "start=... (--start ID); for 'model-stock' make it one of the ingredients."
        )
    if start is not None and not needing:
        raise ValueError(f"start={start!r} is for proposals={' or '.join(map(repr, FROM_START))}.")
    if start is not None and start not in ids and "model-stock" in needing:
        raise ValueError(
            f"start={start!r} is none of the ingredients, as proposals='model-stock' takes it: {', '.join(ids)}."
        )
    if start is not None and start not in ids and not passes:
        raise ValueError(
            f"start={start!r} is no ingredient: what soups reach that are pulled to it has to be measured, and with a "
            "budget of 0 nothing is."
        )


def usual_passes(ingredients: int) -> int:
    """Passes that soups take at most where nobody says: as many as for a greedy soup of these ingredients, or 8."""
    return min(MOST_PASSES, max(1, ingredients - 1))


def equal_parts(members: np.ndarray) -> np.ndarray:
    """Boolean rows `(recipes, models)` to rows on the simplex."""
    return members / members.sum(axis=1, keepdims=True)


def singles(models: int) -> Candidates:
    """Each ingredient alone."""
    return Candidates(np.eye(models), ("single",) * models)


def uniform(models: int) -> Candidates:
    """All ingredients in equal parts."""
    return Candidates(equal_parts(np.ones((1, models), dtype=bool)), ("uniform",))


def subsets(models: int) -> Candidates:
    """All subsets in equal parts, small ones first."""
    members = (np.arange(1, 1 << models)[:, None] >> np.arange(models)) & 1  # (subsets, models)
    members = members[np.argsort(members.sum(axis=1), kind="stable")]
    return Candidates(equal_parts(members.astype(bool)), ("subset",) * len(members))


def monte_carlo(models: int, *, count: int = 200, seed: int = 0) -> Candidates:
    """Distinct subsets in equal parts, their sizes drawn evenly from 2 to `models - 1` (arXiv 2401.17790).

    Where there are fewer than `count` such subsets, all are returned.
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
        drawn: from `propose`; the first of them are the single models.
        scores: of the drawn candidates, `(recipes,)`.
        score: scores further recipes.
        step: finds the best step between two recipes.
        kinds: `subsets`, `forward`, `local`, `line`, and `auto` for the last two; `wise-ft` and `model-stock`. Other
            kinds add nothing.
        start: which model the others were fine-tuned from, for `wise-ft` and `model-stock`.
        products: of all pairs of models about their mean, for `model-stock` (see `kinship.inner_products`).
    """
    models, candidates = drawn.weights.shape[1], drawn
    kinds = (*kinds, *AUTO) if "auto" in kinds else kinds
    if "subsets" in kinds:
        candidates += best_subsets(models, score)
    if "forward" in kinds:
        candidates += forward(models, score)
    if "local" in kinds:
        equal = (drawn.weights > 0) / (drawn.weights > 0).sum(axis=1, keepdims=True)
        rows = np.flatnonzero((drawn.weights == equal).all(axis=1))
        for row in rows[np.argsort(-scores[rows], kind="stable")][:STARTS]:
            candidates += local_search(drawn.weights[row] > 0, score)
    if "line" in kinds:
        for row in np.argsort(-scores, kind="stable")[:LINES]:
            candidates += line_search(drawn.weights[row], step)
    if "wise-ft" in kinds and start is not None:
        order = np.argsort(-scores, kind="stable")
        rows = drawn.weights[order[drawn.weights[order, start] == 0]]
        candidates += wise_ft(start, rows[:STARTS])
    if "model-stock" in kinds and start is not None and products is not None:
        candidates += model_stock(start, products)
    new = candidates.weights[len(drawn.weights) :]
    return candidates, np.concatenate([scores, score(new)]) if len(new) else scores


def best_subsets(models: int, score: Score, *, keep: int = KEPT, scored_at_once: int = SCORED_AT_ONCE) -> Candidates:
    """The subsets in equal parts with the best scores, best first.

    Args:
        keep: how many.
        scored_at_once: how many subsets are scored at a time, to bound the memory.
    """
    best, scores = np.zeros((0, models), dtype=bool), np.zeros(0)
    for start in range(1, 1 << models, scored_at_once):
        numbers = np.arange(start, min(start + scored_at_once, 1 << models))
        members = ((numbers[:, None] >> np.arange(models)) & 1).astype(bool)  # (subsets, models)
        scores = np.concatenate([scores, score(equal_parts(members))])
        order = np.argsort(-scores, kind="stable")[:keep]
        best, scores = np.concatenate([best, members])[order], scores[order]
    return Candidates(equal_parts(best), ("subset",) * len(best))


def forward(models: int, score: Score, *, steps: int | None = None) -> Candidates:
    """Forward selection with replacement (Caruana et al. 2004): each step adds the ingredient that helps most.

    An ingredient may be added again, which gives it more weight. All mixtures on the way are candidates, since the
    score may fall before it rises.

    Args:
        steps: how many ingredients are added; by default twice as many as there are.
    """
    parts = np.zeros(models)
    rows: dict[bytes, np.ndarray] = {}
    for _ in range(steps or 2 * models):
        extended = parts + np.eye(models)
        mixtures = extended / extended.sum(axis=1, keepdims=True)
        best = int(np.argmax(score(mixtures)))  # the first of equals
        parts = extended[best]
        rows.setdefault(mixtures[best].tobytes(), mixtures[best])
    return Candidates(np.stack(list(rows.values())), ("forward",) * len(rows))


def local_search(members: np.ndarray, score: Score) -> Candidates:
    """Improve a subset in equal parts: add, drop or swap one ingredient at a time until nothing helps.

    Args:
        members: bool `(models,)`, the subset to start from.

    Returns:
        the subset that the search ends with, or nothing if that is where it started.
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
    improved = members[None][: int((members != start).any())]
    return Candidates(equal_parts(improved), ("local",) * len(improved))


def neighbours(members: np.ndarray) -> np.ndarray:
    """The non-empty subsets that differ by one ingredient added, dropped or swapped: bool `(subsets, models)`."""
    inside, outside = np.flatnonzero(members), np.flatnonzero(~members)
    changes = [[added] for added in outside]
    changes += [[dropped] for dropped in inside if len(inside) > 1]
    changes += [[dropped, added] for dropped in inside for added in outside]
    near = np.repeat(members[None], len(changes), axis=0)
    for row, change in zip(near, changes, strict=True):
        row[change] = ~row[change]
    return near


def line_search(start: np.ndarray, step: Step) -> Candidates:
    """Improve a recipe by setting the weight of one ingredient after another to its very best value.

    Each round picks the ingredient whose best weight, with the others keeping their proportions, gets most images
    right. The search ends when no ingredient gets more. All recipes on the way are candidates, without weights that
    are next to nothing if as many images stay right without them.

    Args:
        start: `(models,)`.
        step: finds the best step from one recipe to another, and how many images are right there.
    """
    models, row, rows = len(start), start, []
    most = max(step(start, start)[1], 0)
    for _ in range(2 * models):
        options = []
        for ingredient in np.flatnonzero(row < 1):
            others = np.where(np.arange(models) == ingredient, 0, row)
            others = others / others.sum()
            share, right = step(others, np.eye(models)[ingredient])
            options.append((right, (1 - share) * others + share * np.eye(models)[ingredient]))
        right, better = max(options, key=lambda option: option[0])  # the first of equals
        if right <= most:
            break
        most, row = right, _without_dust(better, right, step)
        rows.append(row / row.sum())
    return Candidates(np.array(rows).reshape(-1, models), ("line",) * len(rows))


def _without_dust(row: np.ndarray, right: int, step: Step) -> np.ndarray:
    """A recipe `(models,)` without its next to nothing weights, if so many images stay right, and two are left."""
    clean = np.where(row < DUST * row.max(), 0, row)
    clean = clean / clean.sum()
    return clean if np.count_nonzero(clean) > 1 and step(clean, clean)[1] >= right else row


def best_step(
    pruned: Pruned, labels: np.ndarray, start: np.ndarray, end: np.ndarray, *, mixed_at_once: int = MIXED_AT_ONCE
) -> tuple[float, int]:
    """The step in [0, 1] from one recipe to another at which most images are right, and how many are.

    Where several steps get as many right, it is the middle of the longest run of them: no tie decides there. It is
    rounded, such that the last bits of logits, which depend on the batch size, change no recipe.

    Args:
        pruned: the classes that can win, with `top` 1.
        labels: of the split `(samples,)`.
        start, end: recipes `(models,)`.
        mixed_at_once: how many logits are held at a time.
    """
    lows, highs, always = [], [], 0
    for bucket in pruned.buckets():
        right = bucket.classes == labels[bucket.images]  # (k, images)
        can_win = right.any(axis=0)  # elsewhere the label never wins
        if not len(bucket.logits):
            always += int(can_win.sum())
            continue
        images, size = np.flatnonzero(can_win), max(1, mixed_at_once // bucket.logits[:, :, 0].size)
        for first in range(0, len(images), size):
            block = images[first : first + size]
            flat = bucket.logits[:, :, block].reshape(pruned.models, -1).astype(np.float64)
            from_start, to_end = (np.stack([start, end]) @ flat).reshape(2, len(right), -1)  # (k, images) each
            low, high = _between(from_start, to_end - from_start, right[:, block].argmax(axis=0))
            lows.append(low)
            highs.append(high)
    low, high = (np.concatenate(ends) if ends else np.zeros(0) for ends in (lows, highs))
    runs = low < high
    low, high = low[runs], high[runs]
    steps = np.unique(np.concatenate([[0.0, 1.0], low, high]))
    middles = (steps[1:] + steps[:-1]) / 2
    counts = np.searchsorted(np.sort(low), middles) - np.searchsorted(np.sort(high), middles)  # of each run
    best = counts == counts.max()
    longest = int(np.argmax(np.where(best, steps[1:] - steps[:-1], -1)))
    middle = round(float(middles[longest]), STEP_DIGITS)
    if not steps[longest] < middle < steps[longest + 1]:
        middle = float(middles[longest])
    return middle, always + int(counts[longest])


def wise_ft(start: int, rows: np.ndarray) -> Candidates:
    """Recipes `(recipes, models)` mixed in nine steps with the model that all began from (arXiv 2109.01903)."""
    models = rows.shape[1]
    shares = np.arange(1, 10)[:, None] / 10
    mixtures = [share * row + (1 - share) * np.eye(models)[start] for row in rows for share in shares]
    return Candidates(np.array(mixtures).reshape(-1, models), ("wise-ft",) * len(mixtures))


def model_stock(start: int, products: np.ndarray) -> Candidates:
    """The mean of all others, drawn to their start by the angle between them (arXiv 2403.19522).

    With n models and the mean cosine c of their differences from the start, the mean has the share
    n c / (1 + (n - 1) c): that point is nearest to the centre of the shell on which fine-tunes seem to lie. The paper
    has one angle for each layer; here it is one for all.
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
    """The positions of `count` good candidates that differ: to measure near copies of one soup tells nothing new.

    From the best down, a candidate is taken if it differs from all taken before in more than `apart` of its weight
    (half the sum of absolute differences, the total variation). If these are too few, the best of the others fill up.

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


def _between(level: np.ndarray, slope: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From which step to which the class at `place` `(images,)` is ahead of all others; the same twice if nowhere.

    Args:
        level, slope: of each class's line `(k, images)`: its logit at step 0, and what a whole step adds.
    """
    images = np.arange(len(place))
    ahead, rise = level[place, images] - level, slope[place, images] - slope
    others = np.arange(len(level))[:, None] != place
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -ahead / rise
    low = np.where(others & (rise > 0), crossing, 0.0).max(axis=0)
    high = np.where(others & (rise < 0), crossing, 1.0).min(axis=0)
    behind = (others & (rise == 0) & (ahead < 0)).any(axis=0)
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    return low, np.where(behind, low, np.maximum(low, high))
