"""Which candidate to measure next: the one that is predicted to be best, by all that was measured before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np

from hf_radin.logits.bank import LogitBank
from hf_radin.metrics.objective import ACCURACY, Objective, score_recipes
from hf_radin.recipes.gaps import Gaps
from hf_radin.recipes.propose import Candidates, equal_parts, neighbours
from hf_radin.recipes.recipe import Measurement, Pull, Recipe, Teacher
from hf_radin.search.race import Entry

# By how much of its weight a candidate differs from all that were measured, as long as there are such.
APART = 0.01

# From how many of the best subsets the search goes on, how many steps at most for one candidate, how many neighbours
# it takes at each, and how many candidates of all.
STARTS, STEPS, NEAR, POOL = 3, 8, 64, 2048

# How many of the best soups are pulled to a start in the end, how many steps there are to it, and after how many that
# are no better than the best one before a soup is left.
PULLED, PARTS, PATIENCE = 5, 10, 2


class Guide:
    """Candidates, the most promising first; each measured soup says more about the others (see `gaps`).

    The processes share the work of predicting, and all of them come to the same candidates.

    Args:
        bank: that the soups are measured on.
        candidates: the first of them are the singles, which are not measured.
        products: of the ingredients, as `Gaps` has them.
        local: whether the best subsets' neighbours are candidates too: one ingredient added, dropped or swapped.
        objective: what makes a soup better.
    """

    def __init__(
        self,
        bank: LogitBank,
        candidates: Candidates,
        products: np.ndarray,
        *,
        local: bool,
        objective: Objective = ACCURACY,
    ):
        self.bank, self.local, self.objective = bank, local, objective
        self._plain = self._gaps = Gaps.none(products, bank.pruned(objective.top))
        self._labels, self._classes = np.asarray(bank.labels), len(bank.classes)
        self._pool = candidates
        self._taken = [np.eye(len(products)), np.full((1, len(products)), 1 / len(products))]
        self._done: set[bytes] = set()
        self._known: dict[bytes, float] = {}  # ranks of recipes by what is predicted of them now

    def __iter__(self) -> Iterator[Entry]:
        while entry := self._next():
            yield entry

    def learn(self, recipe: Recipe, values: np.ndarray) -> None:
        """Learn a soup's logits `(entries,)`, as `Gaps.learn` takes them."""
        self._gaps = self._gaps.learn(self.bank.row(recipe), values)
        self._known = {}

    def _next(self) -> Entry | None:
        if self.local:
            self._look_around()
        rows, taken = self._pool.weights, np.concatenate(self._taken)
        order = np.argsort(-self._predict(rows), kind="stable")
        apart = [float(np.abs(taken - rows[place]).sum(axis=1).min()) for place in order]
        # where only near copies are left, the best of these
        wanted = [place for place, far in zip(order, apart, strict=True) if far > 2 * APART]
        wanted += [place for place, far in zip(order, apart, strict=True) if 0 < far <= 2 * APART]
        if not wanted:
            return None
        row, proposal = rows[wanted[0]], self._pool.proposals[wanted[0]]
        self._taken.append(row[None])
        estimate, predicted = (
            float(self._scores(gaps, row[None])[self.objective.name][0]) for gaps in (self._plain, self._gaps)
        )
        return Entry(self.bank.recipe(row), proposal, estimate, predicted)

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        """The rank of soups by what is predicted of them: the more the better. Each is predicted once."""
        keys = [row.tobytes() for row in rows]
        new = rows[[place for place, key in enumerate(keys) if key not in self._known]]
        if len(new):
            ranks = self.bank.processes.score(lambda block: self.objective.ranks(self._scores(self._gaps, block)), new)
            self._known |= zip([row.tobytes() for row in new], ranks.tolist(), strict=True)
        return np.array([self._known[key] for key in keys])

    def _scores(self, gaps: Gaps, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What gaps predict of soups by each metric: `(recipes,)`."""
        sums = gaps.sums(rows)
        return {
            metric.name: score_recipes(metric, gaps.pruned, self._labels, self._classes, sums)
            for metric in self.objective.metrics
        }

    def _look_around(self) -> None:
        """Add the neighbours of the best subsets, then those of the best of these, until there are no better ones."""
        for _ in range(STEPS):
            rows = self._pool.weights
            order = np.argsort(-self._predict(rows), kind="stable")
            best = [row for row in rows[order] if np.ptp(row[row > 0]) == 0][:STARTS]
            starts = [row for row in best if row.tobytes() not in self._done]
            if not starts:
                break
            self._pool = Candidates(rows[order], tuple(self._pool.proposals[position] for position in order)).first(
                POOL
            )
            for row in starts:
                self._done.add(row.tobytes())
                near = equal_parts(neighbours(row > 0))
                near = near[np.argsort(-self._predict(near), kind="stable")[:NEAR]]
                self._pool += Candidates(near, ("local",) * len(near))


class PulledSoups:
    """Candidates, and after each of them the best soup so far, pulled a further step to a start that is no ingredient.

    Ensembles say nothing of the share that a start should have, and measured soups do: a soup is pulled further as
    long as that helps (see `PATIENCE`). When no candidate is left, the next best soups are pulled, too.

    Args:
        entries: the candidates, the most promising first.
        start: the id of the start.
        singles: what is known of the single models, which are pulled as well.
        with_heads: gives a soup the heads that are to be measured.
        objective: what makes a soup better.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        start: str,
        singles: Sequence[Measurement],
        with_heads: Callable[[Entry], Entry] = lambda entry: entry,
        objective: Objective = ACCURACY,
    ):
        self._entries, self._start, self._with_heads = entries, start, with_heads
        self._objective = objective
        self._ways: dict[Recipe, _Way] = {}  # of each soup that was measured
        for single in singles:
            self.hear(single)

    def __iter__(self) -> Iterator[Entry]:
        for entry in self._entries:
            yield entry
            if pulled := self._next(1):
                yield pulled
        while pulled := self._next(PULLED):
            yield pulled

    def hear(self, measurement: Measurement) -> None:
        """Hear what was measured of a soup."""
        recipe, pull = measurement.recipe.ensemble, measurement.recipe.pull
        if pull is None or measurement.proposal == "wise-ft":  # shares of a user's own recipes are no steps
            way, step = self._ways.setdefault(recipe, _Way(measurement.estimate)), 0
            if pull is not None:
                step = round(PARTS * pull.share)
            way.known[step] = max(self._objective.rank(measurement), way.known.get(step, -math.inf))

    def _next(self, count: int) -> Entry | None:
        """The next step of one of the best soups; None if none of them is to be pulled further."""
        best = sorted(self._ways.items(), key=lambda pair: -pair[1].known[0])
        for recipe, way in best[:count]:
            if not way.is_over:
                pull = Pull(self._start, len(way.known) / PARTS)
                return self._with_heads(Entry(replace(recipe, pull=pull), "wise-ft", way.estimate))
        return None


@dataclass
class _Way:
    """A soup on its way to a start.

    Args:
        estimate: the metric of its ensemble.
        known: what it reaches after so many steps, the best of its heads, the more the better.
    """

    estimate: float
    known: dict[int, float] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether the last steps did not help, or the next one would reach the start."""
        best = max(self.known, key=lambda step: (self.known[step], -step))
        return len(self.known) == PARTS or len(self.known) - 1 - best >= PATIENCE


def with_heads(entry: Entry, everything: Recipe) -> Entry:
    """A soup with its averaged head, with one refitted to its own ensemble, and with those that all teach."""
    teachers = None, Teacher(entry.recipe.ensemble), *_all_teach(everything)
    return replace(entry, teachers=tuple(dict.fromkeys(teachers)))


def _all_teach(everything: Recipe) -> tuple[Teacher, Teacher]:
    """The ensemble of all, without labels and with them."""
    return Teacher(everything), Teacher(everything, labels=True)


def refitted_entries(
    soups: Sequence[Entry],
    singles: Sequence[Measurement],
    everything: Recipe,
    estimate: float,
    objective: Objective = ACCURACY,
) -> list[Entry]:
    """Soups with refitted heads, and each single model with a head refitted to the ensemble of all, taking turns.

    What soups do with averaged heads says little of them with refitted ones: so none of them is predicted by others.

    Args:
        soups: the most promising first.
        everything: the recipe whose ensemble is that of all.
        estimate: the metric of that ensemble.
        objective: what makes a model better.
    """
    best = sorted(singles, key=lambda single: -objective.rank(single))
    alone = [Entry(single.recipe, "alone", estimate, teachers=_all_teach(everything)) for single in best]
    pairs = zip_longest(alone, (with_heads(entry, everything) for entry in soups))
    return [entry for pair in pairs for entry in pair if entry is not None]
