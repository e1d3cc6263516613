"""Measure soups side by side on the images that tell them apart, and drop those that cannot win any more.

Each candidate is shown a growing sample: all contested images in the end, and of the decided ones an audit (see
`strata`). It is compared on the same images with the best so far, and dropped as soon as it is behind by more than
chance. Who is left with the highest accuracy is measured on the whole split; if that puts another in front, so is
that one, as long as the budget lasts.

The rule, at the k-th look: with the difference d of the two, weighted up to the whole split, and its standard error s,
a candidate is dropped if d + z s < 0, where a normal variable exceeds z with probability `ERROR` / 2^k / c, and c is
the number of candidates that the other was the best of. So one that is no worse than it on the whole split is dropped
with a probability of about `ERROR` at most, however often it is looked at, and however lucky the other was.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

import numpy as np

from hf_radin.logits.bank import LogitBank
from hf_radin.recipes.intervals import LEVEL, Strata, accuracy_interval
from hf_radin.recipes.recipe import Measurement, Recipe
from hf_radin.runtime.processes import on_main_process, progress_bar, the_accelerator
from hf_radin.runtime.tracking import log
from hf_radin.search.budget import Budget
from hf_radin.search.measure import Trial, trial_of

logger = logging.getLogger(__name__)

# How likely a candidate is dropped that is not worse, at most.
ERROR = 0.05

# Parts of the sample after which a candidate is compared with the best so far, and how many images of each kind there
# are at least: of a handful no normal variable can be made.
LOOKS, LEAST = (0.25, 0.5, 1.0), 64

# The audit begins with this share of the decided images, and doubles until it adds less than this share
# to the standard error that the accuracy has anyway, because the split has no more images.
AUDIT, SURE = 1 / 32, 0.5


@dataclass(frozen=True)
class Entry:
    """A candidate.

    Args:
        recipe: of the soup.
        proposal: what proposed it.
        estimate: the accuracy of its ensemble.
        predicted: the accuracy that the soups measured before say it has; None where they were not asked.
    """

    recipe: Recipe
    proposal: str
    estimate: float
    predicted: float | None = None


@dataclass(eq=False)
class _Runner:
    """A candidate in the race.

    Args:
        ensemble: which images its ensemble gets right: bool `(samples,)`.
        hits: which it gets right itself, of those that it was shown: bool `(samples,)`.
        known: which it was shown: bool `(samples,)`.
        is_out: whether it was dropped.
    """

    entry: Entry
    trial: Trial
    ensemble: np.ndarray
    hits: np.ndarray = field(init=False)
    known: np.ndarray = field(init=False)
    is_out: bool = False

    def __post_init__(self) -> None:
        self.hits, self.known = np.zeros_like(self.ensemble), np.zeros_like(self.ensemble)

    @property
    def gains(self) -> np.ndarray:
        """What it gets right and its ensemble does not (1), and the other way round (-1): `(samples,)`."""
        return self.hits.astype(int) - self.ensemble


def race(
    bank: LogitBank,
    entries: Iterable[Entry],
    budget: Budget,
    *,
    best: np.ndarray | None,
    beside: Sequence[Entry] = (),
    learn: Callable[[Recipe, np.ndarray], object] | None = None,
    full: bool = False,
    seed: int = 0,
    begun: float | None = None,
) -> tuple[list[Measurement], str, list[tuple[float, float]]]:
    """Measure candidates as long as the budget lasts, and the best of them on the whole split.

    One is begun while a whole pass is left: what its own sample does not take, the rest of the best one's images will.
    An interrupt (of one process alone) ends the race early; the best so far is still measured on the whole split.

    Args:
        entries: the most promising first; each is asked for when the one before was measured.
        best: classes `(samples,)` that the best single model predicts: the one to beat. None if nobody is, yet.
        beside: baselines, which are shown their whole sample and are not counted.
        learn: hears of each soup, in all processes alike, its logits for the classes that can win (`Trial.values`).
        full: show each candidate the whole split, which is the procedure of arXiv 2401.17790.
        seed: of the samples.
        begun: when a budget of time began, by `time.perf_counter`; by default now.

    Returns:
        a measurement of each candidate that was shown its sample, where one of less than the whole split is an
        estimate; what ended the race: `candidates` if all were measured, `budget`, or `interrupt`; and what was known
        after so many passes: these, and the accuracy of the best so far, as far as its images tell.
    """
    ended = "candidates"
    total = None if math.isinf(budget.passes) else math.ceil((budget.passes + len(beside)) * len(bank))
    with progress_bar(total=total, desc="Measuring soups", unit="image") as bar:
        begun = time.perf_counter() if begun is None else begun
        run = _Race(bank, budget, best, learn, full, seed, begun, bar.update)
        try:
            for entry in beside:
                run.enter(entry, stays=True)
            run.spent = 0
            waiting = iter(entries)
            while run.can_afford(run.needed()):
                found = next(waiting, None)
                if found is None:
                    break
                run.enter(found)
            else:
                ended = "budget"
        except KeyboardInterrupt:
            if the_accelerator().num_processes > 1 or not run.runners:
                raise
            ended = "interrupt"
            logger.warning(
                "Interrupted: no further candidates. Once more to stop at once. The same again, with overwrite "
                "(--overwrite) if a soup was written, goes on."
            )
        run.finish()
    if ended == "budget" and len(run.runners) <= len(beside):
        logger.warning("The budget was over before a candidate was measured.")
    return [run.measurement(one) for one in run.runners], ended, run.curve


class _Race:
    """The state of a race: who was shown what, who leads, and what was spent."""

    def __init__(
        self,
        bank: LogitBank,
        budget: Budget,
        best: np.ndarray | None,
        learn: Callable[[Recipe, np.ndarray], object] | None,
        full: bool,
        seed: int,
        begun: float,
        on_block: Callable[[int], object],
    ):
        self.bank, self.budget, self.learn, self.on_block = bank, budget, learn, on_block
        self.labels, self.images = np.asarray(bank.labels), len(bank)
        self.strata = Strata.shuffled(_groups(bank, full), seed)
        decided = self.strata.groups[1]
        self.full = full
        self.audit = max(LEAST, math.ceil(AUDIT * len(decided)))
        # the hits of who leads, and of which images they are known
        nobody = np.zeros(self.images, dtype=bool)
        self.leader = nobody if best is None else best == self.labels, np.ones(self.images, dtype=bool)
        self.single = float(self.leader[0].mean())
        self.spent = self.shown = 0  # images: of the budget, and of all that was measured
        self.begun, self.raced = begun, time.perf_counter()
        self.runners: list[_Runner] = []
        self.curve: list[tuple[float, float]] = []
        self._note()

    @cached_property
    def looks(self) -> tuple[float, ...]:
        """After the baselines went by: what is kept then will be; other images are decoded anew for each look."""
        return LOOKS if not self.full and self.bank.images.is_cached_by_all() else (1.0,)

    def can_afford(self, images: int) -> bool:
        """Whether so many images more are within the budget; the same in all processes."""
        wanted = self.spent + images
        taken, raced = on_main_process(lambda: [time.perf_counter() - one for one in (self.begun, self.raced)])
        seconds = taken + raced * images / self.shown if self.shown else taken
        return wanted <= self.budget.passes * self.images and seconds <= self.budget.seconds

    def needed(self) -> int:
        """Images for one candidate more, and then for the rest of the best, whoever that is."""
        sample = int(self._sample(1.0).sum())
        return sample + max(self.images - sample, self._left())

    def _left(self) -> int:
        """The most images that one of those who may still win was not shown."""
        return max((int((~one.known).sum()) for one in self.runners if not one.is_out), default=0)

    def enter(self, entry: Entry, *, stays: bool = False) -> None:
        """Show a candidate more and more images until it is behind or the sample is over; if it stays, all at once."""
        bank, recipe = self.bank, entry.recipe
        trial = trial_of(bank, recipe, bank.pruned() if self.learn else None)
        one = _Runner(entry, trial, bank.predict(bank.row(recipe)) == bank.labels)
        for look, some in enumerate(self._samples(one, (1.0,) if stays else self.looks), start=1):
            self._show(one, some)
            if self._is_behind(one, look) and not stays:
                break
        else:
            if self._lead(one)[0] > 0:
                self.leader = one.hits, one.known
        trial.forget()
        if self.learn:  # of what it was shown in this race, whatever is known from another
            images, _ = bank.pruned().entries
            self.learn(recipe, np.where(one.known[images], trial.values, np.nan))
        self.runners.append(one)  # only now: of one that was interrupted nothing is known
        self._note()
        value, error = self.accuracy(one)
        log({"soup/estimate": entry.estimate, "soup/measured": value}, images=int(one.known.sum()))
        logger.info(
            "Soup of %d (%s): estimated %.4f%s, measured %.4f%s.",
            len(recipe.used),
            entry.proposal,
            entry.estimate,
            "" if entry.predicted is None else f", predicted {entry.predicted:.4f}",
            value,
            f" by {one.known.sum():,} images (\u00b1 {error:.4f} for the others){', dropped' if one.is_out else ''}"
            if error
            else "",
        )

    def finish(self) -> None:
        """Measure the best on the whole split, and again if that puts another in front."""
        while standing := [one for one in self.runners if not one.is_out]:
            first = max(standing, key=lambda one: (self.accuracy(one)[0], one.entry.estimate))
            left = int((~first.known).sum())
            if not left or (any(one.known.all() for one in standing) and not self.can_afford(left)):
                return
            self._show(first, np.ones(self.images, dtype=bool))
            self._note()
            first.trial.forget()

    def _note(self) -> None:
        known = [self.accuracy(one)[0] for one in self.runners if not one.is_out]
        self.curve.append((self.shown / self.images, max([self.single, *known])))

    def accuracy(self, one: _Runner) -> tuple[float, float]:
        """On the whole split, and its standard error: what the ensemble gets right is known of all images."""
        gain, error = self.strata.mean(one.gains, one.known)
        return min(1.0, max(0.0, float(one.ensemble.mean()) + gain)), error

    def measurement(self, one: _Runner) -> Measurement:
        value, error = self.accuracy(one)
        if one.known.all():
            value, between = float(one.hits.mean()), accuracy_interval(one.hits)
        else:
            spread = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.hypot(
                error, math.sqrt(value * (1 - value) / self.images)
            )
            between = max(0.0, value - spread), min(1.0, value + spread)
        images = int(one.known.sum())
        seconds, device = one.trial.took(images)
        return Measurement(
            one.entry.recipe,
            one.entry.proposal,
            one.entry.estimate,
            value,
            images,
            interval=between,
            passes=images / self.images,
            predicted=one.entry.predicted,
            dropped=one.is_out,
            seconds=seconds,
            device=device,
        )

    def _samples(self, one: _Runner, looks: tuple[float, ...]) -> Iterator[np.ndarray]:
        """What a candidate is shown, bit by bit; how much of the decided images depends on what it does there."""
        yield from map(self._sample, looks)
        decided = len(self.strata.groups[1])
        while self.audit < decided:
            value, error = self.accuracy(one)
            more = min(2 * self.audit, decided) - self.audit
            # whoever is best then still has to be measured on all images
            sure = error <= SURE * math.sqrt(value * (1 - value) / self.images)
            left = self.images - int(one.known.sum()) - more
            if sure or not self.can_afford(more + max(left, self._left())):
                return
            self.audit += more
            yield self._sample(1.0)

    def _sample(self, share: float) -> np.ndarray:
        """So much of the contested images and of the audit: bool `(samples,)`."""
        contested, decided = map(len, self.strata.groups)
        wanted = (contested, min(self.audit, decided))
        return self.strata.first([max(math.ceil(share * count), min(count, LEAST)) for count in wanted])

    def _show(self, one: _Runner, some: np.ndarray) -> None:
        some = some | one.known
        new = int((some & ~one.known).sum())
        self.spent, self.shown = self.spent + new, self.shown + new
        one.hits, one.known = one.trial.look(some, on_block=self.on_block) == self.labels, some

    def _lead(self, one: _Runner) -> tuple[float, float]:
        """By how much it is ahead of the leader on the whole split, and the standard error of that."""
        hits, known = self.leader
        return self.strata.mean(one.hits.astype(int) - hits, one.known & known)

    def _is_behind(self, one: _Runner, look: int) -> bool:
        """Whether it can't win any more."""
        ahead, error = self._lead(one)
        chance = ERROR / 2**look / max(1, len(self.runners))
        one.is_out = ahead + NormalDist().inv_cdf(1 - chance) * error < 0
        return one.is_out


def _groups(bank: LogitBank, full: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions among the images: contested ones and decided ones.

    To show all, all are one group, and so are they where logits are too many to tell.
    """
    prunable = not full and bank.is_prunable()
    decided = bank.pruned().decided if prunable else np.zeros(0, dtype=int)
    return np.setdiff1d(np.arange(len(bank)), decided), decided
