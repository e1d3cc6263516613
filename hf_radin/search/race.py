"""Measure soups side by side on the images that tell them apart, and drop those that cannot win any more.

Each candidate is shown a growing sample: all contested images in the end, and of the decided ones an audit (see
`intervals`). It is compared on the same images with the best so far, and dropped as soon as it is behind by more than
chance. Who is left with the highest accuracy is measured on the whole split; if that puts another in front, so is
that one, as long as the budget lasts.

The rule, at the k-th look: with the difference d of the two, weighted up to the whole split, and its standard error s,
a candidate is dropped if d + z s < 0, where a normal variable exceeds z with probability `ERROR` / 2^k / c, and c is
the number of candidates that the other was the best of. So one that is no worse than it on the whole split is dropped
with a probability of about `ERROR` at most, however often it is looked at, and however lucky the other was.

What "better" means is the objective's: of a metric of which less is better, d is the other way round. A candidate is
also dropped if it breaks a floor by more than chance, and one that keeps all of them goes before any that does not.
Where a metric depends on probabilities no image is decided: soups differ from their ensembles everywhere, so that all
images are drawn alike, and a candidate is shown the whole split if it isn't dropped before.

A soup may have several heads, averaged or refitted to an ensemble (see `refit`). Each makes a candidate, and all of
them are judged by the same images: so the further ones cost no pass. What counts of a refitted head is what heads that
were fitted to other images predict for an image. Fitted to few of them it is worse than it will be, so that such a
soup is shown its whole sample before it may be dropped.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from statistics import NormalDist
from typing import Any

import numpy as np

from hf_radin.logits.bank import LogitBank
from hf_radin.metrics.intervals import LEVEL, Strata, accuracy_interval
from hf_radin.metrics.judge import Judge, sample_groups
from hf_radin.metrics.named import Answers
from hf_radin.metrics.objective import ACCURACY, Floor, Objective
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.recipe import Measurement, Recipe, Teacher
from hf_radin.runtime.processes import progress_bar
from hf_radin.runtime.text import is_share, show_difference, show_metric
from hf_radin.search.measure import MeasuredSoup, is_predicted, measured_soup, where_images

logger = logging.getLogger(__name__)

# How likely a candidate is dropped that is not worse, at most.
ERROR = 0.05

# Parts of the sample after which a candidate is compared with the best so far, and how many images of each kind there
# are at least: of a handful no normal variable can be made.
LOOKS, LEAST = (0.25, 0.5, 1.0), 64

# The audit begins with this share of the decided images, and doubles until it adds less than this share
# to the standard error that the accuracy has anyway, because the split has no more images.
AUDIT, SURE = 1 / 32, 0.5

# From a bank, a recipe of its ingredients and the entries whose logits are wanted, as `measured_soup` takes them.
MakeSoup = Callable[[LogitBank, Recipe, Pruned | None], MeasuredSoup]


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}
_DURATION = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?) ?(s|m|min|h)")


@dataclass(frozen=True)
class Budget:
    """A number of passes over the split, or of seconds.

    Args:
        passes: images that soups are shown, over the images of the split; 0 is to estimate only.
        seconds: from the beginning of the search.
    """

    passes: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, value: float | str) -> Budget:
        """From a number, or a duration as in `90s`, `15m` or `1.5h`.

        Raises:
            ValueError: for anything else, and for less than the one pass that the best soup is measured on.
        """
        text = str(value).strip()
        duration = _DURATION.fullmatch(text)
        if duration:
            return cls(seconds=float(duration[1]) * _UNITS[duration[2]])
        try:
            passes = math.nan if isinstance(value, bool) else float(text)
        except ValueError:
            passes = math.nan
        if not (passes == 0 or 1 <= passes < math.inf):
            raise ValueError(
                f"budget={value!r}: it is a number of passes over the split, at least the 1 that the best soup is "
                "measured on, or a duration as in '15m'; with 0, soups are estimated only."
            )
        return cls(passes=abs(passes))  # of -0.0 the sign is nothing

    def __str__(self) -> str:
        number = self.seconds if self.passes == math.inf else self.passes
        text = repr(float(number)).removesuffix(".0")
        return f"{text}s" if self.passes == math.inf else text


@dataclass(frozen=True)
class Entry:
    """A soup that is to be measured: a candidate, or one with each of several heads.

    Args:
        recipe: of the soup.
        proposal: what proposed it.
        estimate: the metric of its ensemble.
        predicted: the metric that the soups measured before say it has; None where they say nothing.
        teachers: what its head is refitted to, `None` for the averaged head: a candidate for each.
    """

    recipe: Recipe
    proposal: str
    estimate: float
    predicted: float | None = None
    teachers: tuple[Teacher | None, ...] = (None,)

    @property
    def is_refitted(self) -> bool:
        """Whether it may have another head than the averaged one."""
        return self.teachers != (None,)


@dataclass(frozen=True)
class RaceOptions:
    """How a race is run.

    Args:
        budget: that it may take; baselines are beside it.
        full: show each candidate the whole split, which is the procedure of arXiv 2401.17790.
        seed: of the samples, and of the folds that judge refitted heads.
        begun: when a budget of time began, by `time.perf_counter`; by default when the race does.
        objective: what makes a soup better.
    """

    budget: Budget
    full: bool = False
    seed: int = 0
    begun: float | None = None
    objective: Objective = ACCURACY


@dataclass(frozen=True)
class RaceResult:
    """What came of a race.

    Args:
        measurements: of each candidate that was shown its sample; those of less than the whole split are estimates.
        ended: what ended the race: `candidates` if all were measured, `budget`, or `interrupt`.
        curve: passes, and the metric of the best so far, as far as its images tell.
    """

    measurements: list[Measurement]
    ended: str
    curve: tuple[tuple[float, float], ...]


@dataclass(eq=False)
class _Runner:
    """A candidate in the race.

    Args:
        teacher: what its head is refitted to; None for the averaged head.
        ensemble: what its ensemble says of all images, or that of its teacher.
        is_first: whether the images that its soup is shown are counted with it, and not with another head of it.
        answers: what it says itself of the images that it was shown, and its ensemble of the others.
        known: which it was shown: bool `(samples,)`.
        is_out: whether it was dropped.
        measured: what was found of it, where its logits were forgotten.
    """

    entry: Entry
    soup: MeasuredSoup
    teacher: Teacher | None
    ensemble: Answers
    is_first: bool
    answers: Answers = field(init=False)
    known: np.ndarray = field(init=False)
    is_out: bool = False
    measured: Measurement | None = None

    def __post_init__(self) -> None:
        self.answers, self.known = self.ensemble, np.zeros(len(self.ensemble.labels), dtype=bool)


def race(
    bank: LogitBank,
    entries: Iterable[Entry],
    options: RaceOptions,
    *,
    best: Answers | None,
    beside: Sequence[Entry] = (),
    learn: Callable[[Recipe, np.ndarray], object] | None = None,
    hear: Callable[[Measurement], object] = lambda measurement: None,
    soup_of: MakeSoup = measured_soup,
) -> RaceResult:
    """Measure candidates as long as the budget lasts, and the best of them on the whole split.

    A candidate is begun while a whole pass is left: what its own sample does not take, the remaining images of the
    best will. An interrupt (where there is one process) ends the race early; the best so far is still measured on the
    whole split.

    Args:
        entries: the most promising first; each is drawn when the candidate before was measured.
        best: what the best single model says of the images: the one to beat. None if there is none yet.
        beside: baselines, which are shown their whole sample and are not counted.
        learn: hears of each soup, in all processes alike, its logits for the classes that can win
            (`MeasuredSoup.values`). Of those that are pulled to a start it does not: gaps say nothing of them.
        hear: hears what was measured of each candidate, in all processes alike.
        soup_of: makes the soup of a candidate, which is shown the images.
    """
    ended, passes = "candidates", options.budget.passes
    total = None if math.isinf(passes) else math.ceil((passes + len(beside)) * len(bank))
    with progress_bar(total=total, desc="Measuring soups", unit="image") as bar:
        course = _Race(bank, options, best, learn, bar, soup_of)
        try:
            for entry in beside:
                course.enter(entry, hear, stays=True)
            course.spent = 0
            waiting = iter(entries)
            while course.can_afford(course.needed()):
                candidate = next(waiting, None)
                if candidate is None:
                    break
                course.enter(candidate, hear)
            else:
                ended = "budget"
        except KeyboardInterrupt:
            if bank.processes.count > 1 or not course.runners:
                raise
            ended = "interrupt"
            logger.warning(
                "Interrupted: no further candidates. Once more to stop at once. The same again, with overwrite "
                "(--overwrite) if a soup was written, goes on."
            )
        course.finish()
    if ended == "budget" and len(course.runners) <= sum(len(entry.teachers) for entry in beside):
        logger.warning("The budget was used up before a candidate was measured.")
    return RaceResult([course.measurement(runner) for runner in course.runners], ended, tuple(course.curve))


def remember(
    bank: LogitBank, entries: Iterable[Entry], options: RaceOptions, learn: Callable[[Recipe, np.ndarray], object]
) -> tuple[list[Measurement], Entry | None]:
    """What earlier races on a bank found of candidates, up to the first of which nothing is known; no model runs.

    Args:
        entries: each is drawn when the one before was learnt.
        learn: as in `race`.

    Returns:
        Measurements, which take no passes now, and the candidate that nothing is known of; None if there is none.
    """
    course = _Race(bank, options, None, learn, None, measured_soup)
    known: list[Measurement] = []
    for entry in entries:
        if (measurement := course.remembered(entry)) is None:
            return known, entry
        known.append(measurement)
    return known, None


class _Race:
    """The state of a race: who was shown what, who leads, and what was spent."""

    def __init__(
        self,
        bank: LogitBank,
        options: RaceOptions,
        best: Answers | None,
        learn: Callable[[Recipe, np.ndarray], object] | None,
        bar: Any,
        soup_of: MakeSoup,
    ):
        self.soup_of = soup_of
        self.bank, self.budget, self.learn, self.bar = bank, options.budget, learn, bar
        self.seed, self.objective = options.seed, options.objective
        self.images = len(bank)
        # what is kept of a soup's logits: where that is too much for memory, all images are shown, and none is kept
        self.keeps_logits = self.objective.needs_logits and bank.processes.decide(partial(bank.is_prunable, 0))
        self.full = options.full or (self.objective.needs_logits and not self.keeps_logits)
        self.strata = Strata.shuffled(_groups(bank, self.full, self.objective), options.seed)
        self.judge = Judge(self.objective.metric, self.strata)
        self.audit = max(LEAST, math.ceil(AUDIT * len(self.strata.groups[1])))
        # what the one who leads says, and of which images that is known
        self.leader = None if best is None else (best, np.ones(self.images, dtype=bool))
        self.single = None if best is None else self.judge.value(best)
        self.spent = self.shown = 0  # images: of the budget, and of all that was measured
        self.raced = time.perf_counter()
        self.begun = self.raced if options.begun is None else options.begun
        self.runners: list[_Runner] = []
        self.curve: list[tuple[float, float]] = []
        self._note()

    @cached_property
    def looks(self) -> tuple[float, ...]:
        """After the baselines went by: what is cached then stays; other images are decoded anew for each look."""
        return LOOKS if not self.full and self.bank.images.is_cached_by_all() else (1.0,)

    def can_afford(self, images: int) -> bool:
        """Whether so many further images are within the budget; the same in all processes."""
        taken, raced = self.bank.processes.decide(
            lambda: [time.perf_counter() - start for start in (self.begun, self.raced)]
        )
        seconds = taken + raced * images / self.shown if self.shown else taken
        return self.spent + images <= self.budget.passes * self.images and seconds <= self.budget.seconds

    def needed(self) -> int:
        """Images for a further candidate, and then for the remaining ones of the best, whoever that is."""
        sample = int(self._sample(1.0).sum())
        return sample + max(self.images - sample, self._left())

    def _left(self) -> int:
        """The most images that a candidate which may still win was not shown."""
        return max((int((~runner.known).sum()) for runner in self.runners if not runner.is_out), default=0)

    def enter(self, entry: Entry, hear: Callable[[Measurement], object], *, stays: bool = False) -> None:
        """Show a soup more and more images until it is behind or the sample is over; if it stays, all at once."""
        bank, recipe = self.bank, entry.recipe
        learn = self.learn if recipe.pull is None else None
        entries = bank.pruned(self.objective.top) if learn or self.keeps_logits else None
        soup = self.soup_of(bank, recipe, entries)
        runners = [self._runner(entry, soup, teacher) for teacher in entry.teachers]
        for look, images in enumerate(
            self._samples(runners, (1.0,) if stays or entry.is_refitted else self.looks), start=1
        ):
            self._show(runners, images)
            behind = [self._is_behind(runner, look) for runner in runners]
            if all(behind) and not stays:
                break
        for runner in runners:
            if self._takes_the_lead(runner):
                self.leader = runner.answers, runner.known
        soup.forget()
        if learn and entries is not None:  # of what it was shown in this race, whatever is known from another
            images, _ = entries.entries
            learn(recipe, np.where(runners[0].known[images], soup.values, np.nan))
        self.runners += runners  # only now: of a candidate that was interrupted nothing is known
        self._note()
        for runner in runners:
            self._log(runner, int(runner.known.sum()))
            hear(self.measurement(runner))
            if runner.is_out and self.objective.needs_logits:  # these are a lot, and of no more use
                runner.measured = self.measurement(runner)
                runner.ensemble = runner.answers = replace(runner.answers, logits=None)

    def remembered(self, entry: Entry) -> Measurement | None:
        """What is known of a soup with an averaged head by what it was shown before; None if that says nothing."""
        entries = self.bank.pruned(self.objective.top)
        soup, (images, _) = self.soup_of(self.bank, entry.recipe, entries), entries.entries
        if not np.isfinite(soup.values).any():
            return None
        runner, known = self._runner(entry, soup, None), soup.shown
        runner.answers, runner.known = self._answers(runner, soup.look(known), known, is_finite=True), known
        if self.learn:
            self.learn(entry.recipe, np.where(known[images], soup.values, np.nan))
        return replace(self.measurement(runner), passes=0.0, seconds=None, device=None)

    def _runner(self, entry: Entry, soup: MeasuredSoup, teacher: Teacher | None) -> _Runner:
        """A candidate: a soup with one of its heads."""
        row = self.bank.row(teacher.ensemble if teacher else entry.recipe)
        ensemble = self.bank.answers(row, with_logits=self.objective.needs_logits)
        return _Runner(entry, soup, teacher, ensemble, is_first=teacher == entry.teachers[0])

    def finish(self) -> None:
        """Measure the best on the whole split, and again if that puts another in front."""
        while standing := [runner for runner in self.runners if not runner.is_out]:
            first = max(
                standing,
                key=lambda runner: (
                    self._keeps(runner),
                    self._rank(runner),
                    not runner.teacher,
                    not runner.entry.recipe.pull,
                    self.objective.metric.rank(self._estimate(runner)),
                ),
            )
            left = int((~first.known).sum())
            if not left or (any(runner.known.all() for runner in standing) and not self.can_afford(left)):
                return
            heads = [runner for runner in self.runners if runner.soup is first.soup and runner.measured is None]
            self._show(heads, np.ones(self.images, dtype=bool))
            self._note()
            self._log(first, left)
            first.soup.forget()

    def _note(self) -> None:
        """Add a point to the curve."""
        known = [self.value(runner)[0] for runner in self.runners if not runner.is_out and self._keeps(runner)]
        single = [] if self.single is None else [self.single]
        self.curve.append(
            (self.shown / self.images, max([*single, *known], key=self.objective.metric.rank, default=0.0))
        )

    def _log(self, runner: _Runner, images: int) -> None:
        """Say what was found of a candidate, which was shown so many images since that was said last."""
        entry, (value, error) = runner.entry, self.value(runner)
        estimate, metric = self._estimate(runner), self.objective.name
        values = {"soup/estimate": estimate, "soup/measured": value}
        self.bank.processes.log(values, images=images)
        prediction = "" if entry.predicted is None else f", predicted {show_metric(metric, entry.predicted)}"
        part = ""
        if error:
            dropped = ", dropped" if runner.is_out else ""
            shown = f"{runner.known.sum():,} of {self.images:,} images"
            part = f" by {shown} (\u00b1 {show_difference(metric, error)}){dropped}"
        logger.info(
            "Soup of %d (%s): %sestimated %s%s, measured %s%s.",
            len(entry.recipe.used),
            entry.proposal
            + ("" if entry.recipe.pull is None else f", with {entry.recipe.pull}")
            + ("" if runner.teacher is None else f", head refitted to {runner.teacher}"),
            "" if metric == "accuracy" else f"{metric} ",
            show_metric(metric, estimate),
            prediction,
            show_metric(metric, value),
            part,
        )

    def value(self, runner: _Runner) -> tuple[float, float]:
        """The metric on the whole split, and its standard error: what the ensemble says is known of all images."""
        return self._value(self.judge, runner)

    def _value(self, judge: Judge, runner: _Runner) -> tuple[float, float]:
        gain, error = judge.difference(runner.answers, runner.ensemble, runner.known)
        value = judge.value(runner.ensemble) + gain
        return (min(1.0, max(0.0, value)) if is_share(judge.metric.name) else value), error

    def _rank(self, runner: _Runner) -> float:
        """The more the better: the metric, behind all others if it is undefined."""
        rank = self.objective.metric.rank(self.value(runner)[0])
        return -math.inf if math.isnan(rank) else rank

    def _estimate(self, runner: _Runner) -> float:
        """The metric of the ensemble that it stands for."""
        return runner.entry.estimate if runner.teacher is None else self.judge.value(runner.ensemble)

    def _keeps(self, runner: _Runner) -> bool:
        """Whether it keeps all floors, as far as is known."""
        if runner.known.all():
            return not self.objective.broken(runner.answers)
        return all(self._lead_over(floor, runner)[0] >= 0 for floor in self.objective.floors)

    def _lead_over(self, floor: Floor, runner: _Runner) -> tuple[float, float]:
        """By how much it keeps a floor, and the standard error of that."""
        value, error = self._value(Judge(floor.metric, self.strata), runner)
        return floor.metric.rank(value) - floor.metric.rank(floor.bound), error

    def measurement(self, runner: _Runner) -> Measurement:
        """What was found of a candidate."""
        if runner.measured is not None:
            return runner.measured
        metric, is_known = self.objective.metric, bool(runner.known.all())
        value, error = self.value(runner)
        if is_known:
            value = self.judge.value(runner.answers)
        interval: tuple[float, float]
        if is_known and metric.name == "accuracy":
            interval = accuracy_interval(runner.answers.hits)
        else:
            deviation = math.hypot(error, self.judge.deviation(value, runner.answers))
            spread = NormalDist().inv_cdf((1 + LEVEL) / 2) * deviation
            interval = value - spread, value + spread
            if is_share(metric.name):
                interval = max(0.0, interval[0]), min(1.0, interval[1])
        images = int(runner.known.sum())
        seconds, device = runner.soup.took(images) if runner.is_first else (None, None)
        return Measurement(
            runner.entry.recipe,
            runner.entry.proposal,
            self._estimate(runner),
            value,
            images,
            interval=interval,
            passes=images / self.images if runner.is_first else 0.0,
            predicted=runner.entry.predicted,
            dropped=runner.is_out,
            seconds=seconds,
            device=device,
            teacher=runner.teacher,
            keeps=self._keeps(runner) if self.objective.floors else None,
        )

    def _samples(self, runners: Sequence[_Runner], looks: tuple[float, ...]) -> Iterator[np.ndarray]:
        """What a soup is shown, bit by bit; how much of the decided images depends on what it does there."""
        yield from map(self._sample, looks)
        decided = len(self.strata.groups[1])
        while self.audit < decided:
            (value, error), runner = max(
                ((self.value(runner), runner) for runner in runners),
                key=lambda pair: (self.objective.metric.rank(pair[0][0]), pair[0][1]),
            )
            further = min(2 * self.audit, decided) - self.audit
            # whoever is best then still has to be measured on all images
            is_sure = error <= SURE * self.judge.deviation(value, runner.answers)
            left = self.images - int(runners[0].known.sum()) - further
            if is_sure or not self.can_afford(further + max(left, self._left())):
                return
            self.audit += further
            yield self._sample(1.0)

    def _sample(self, share: float) -> np.ndarray:
        """So much of the contested images and of the audit, and all that every sample has: bool `(samples,)`."""
        contested, decided, always = map(len, self.strata.groups)
        wanted = (contested, min(self.audit, decided))
        return self.strata.first([*(max(math.ceil(share * count), min(count, LEAST)) for count in wanted), always])

    def _show(self, runners: Sequence[_Runner], images: np.ndarray) -> None:
        """Show images to a soup, and let each of its heads say what they are."""
        known, soup = runners[0].known, runners[0].soup
        images = images | known
        new = int((images & ~known).sum())
        self.spent, self.shown = self.spent + new, self.shown + new
        averaged = soup.look(images, on_block=self.bar.update)
        is_finite = bool((averaged[images] >= 0).all())  # else no head can be refitted
        for runner in runners:
            runner.answers, runner.known = self._answers(runner, averaged, images, is_finite=is_finite), images

    def _answers(self, runner: _Runner, averaged: np.ndarray, images: np.ndarray, *, is_finite: bool) -> Answers:
        """What a candidate says of the images that it was shown, and its ensemble of the others.

        Args:
            averaged: what its soup predicts with its averaged head, `(samples,)`, or decides.
            is_finite: whether all logits are numbers.
        """
        soup, ensemble, logits = runner.soup, runner.ensemble, None
        if runner.teacher is not None and is_finite:
            refit = soup.refit(runner.teacher, seed=self.seed, with_logits=self.objective.needs_logits)
            predictions, own_logits = refit.predictions, refit.logits
        else:
            predictions = np.full_like(averaged, -1) if runner.teacher is not None else averaged
            own_logits = self._own_logits(soup) if self.objective.needs_logits else None
        if own_logits is not None and ensemble.logits is not None:
            # an image with a logit that is no number is wrong, and says nothing about classes
            own_logits = np.where(is_predicted(predictions)[:, None], own_logits, 0.0)
            logits = np.where(images[:, None], own_logits, ensemble.logits)
        predictions = where_images(images, predictions, ensemble.predictions)
        return Answers(predictions, ensemble.labels, ensemble.classes, logits)

    def _own_logits(self, soup: MeasuredSoup) -> np.ndarray:
        """A soup's logits of the images that it was shown, `(samples, classes)`."""
        return soup.kept_logits if self.keeps_logits else soup.logits()[0]

    def _lead(self, runner: _Runner) -> tuple[float, float]:
        """By how much it is ahead of the leader on the whole split, and the standard error of that."""
        if self.leader is None:
            return math.inf, 0.0
        answers, known = self.leader
        gain, error = self.judge.difference(runner.answers, answers, runner.known & known)
        return self.objective.metric.rank(gain), error

    def _takes_the_lead(self, runner: _Runner) -> bool:
        """Whether it is better than who leads, or keeps floors that this one breaks."""
        if self.leader is not None and self.objective.broken(self.leader[0]):
            return self._keeps(runner) or self._lead(runner)[0] > 0
        return self._keeps(runner) and self._lead(runner)[0] > 0

    def _is_behind(self, runner: _Runner, look: int) -> bool:
        """Whether it can't win any more."""
        chance = ERROR / 2**look / max(1, len(self.runners))
        quantile = NormalDist().inv_cdf(1 - chance)
        leads = [self._lead_over(floor, runner) for floor in self.objective.floors]
        if self.leader is None or not self.objective.broken(self.leader[0]):
            leads.append(self._lead(runner))
        runner.is_out = any(ahead + quantile * error < 0 for ahead, error in leads)
        return runner.is_out


def _groups(bank: LogitBank, full: bool, objective: Objective) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions among the images: contested ones, decided ones, and those that every sample has.

    To show all, all are contested, and so are they where logits are too many to tell, or probabilities count.
    """
    prunable = not full and not objective.needs_logits and bank.is_prunable()
    decided = bank.pruned().decided if prunable else np.zeros(0, dtype=int)
    contested = np.setdiff1d(np.arange(len(bank)), decided)
    always, contested, decided = sample_groups(objective.metrics, np.asarray(bank.labels), contested, decided)
    return contested, decided, always
