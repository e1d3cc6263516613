"""Which soup? Propose recipes, rank them by their ensembles, measure within the budget, choose. And the baselines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np

from hf_radin.checkpoints.files import as_dtype
from hf_radin.ingredients.ingredient import Ingredient, Ingredients, refuse_given
from hf_radin.ingredients.kinship import find_far_off
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.preflight import load_cosines, load_inner_products
from hf_radin.metrics.bootstrap import metric_interval
from hf_radin.metrics.named import Answers, load_metrics, score_or_nan
from hf_radin.metrics.objective import ACCURACY, Objective
from hf_radin.recipes.propose import (
    APART,
    SOUGHT,
    Candidates,
    check_start,
    propose,
    seek,
    shortlist,
    split_kinds,
    usual_passes,
)
from hf_radin.recipes.recipe import Measurement, Recipe
from hf_radin.runtime.processes import progress_bar
from hf_radin.runtime.text import counted, show_metric
from hf_radin.search.guide import Guide, PulledSoups, refitted_entries, with_heads
from hf_radin.search.measure import measured_soup, soup_answers
from hf_radin.search.pilot import complete
from hf_radin.search.race import Budget, Entry, RaceOptions, RaceResult, race, remember
from hf_radin.search.reporter import (
    Reporter,
    ReportOptions,
    best_known,
    check_report,
    fewest_of_a_class,
    single_measurements,
)
from hf_radin.soup.report import PilotReport, SearchSettings
from hf_radin.soup.soup import Soup
from hf_radin.weights.head import Head, HeadError, find_head
from hf_radin.weights.refit import FOLDS
from hf_radin.weights.start import find_start, named_start

logger = logging.getLogger(__name__)

# How many candidates a pass can be enough for: those that are dropped at the first look cost that little.
ENTRANTS = 16

# The last part of a search in which what is found suggests that there is more to be found.
LATE = 1 / 3

# Exact soups that are named in the log: all cost nothing, and there may be many.
NAMED = 3

# Why a soup can't be unmeasured, of a budget.
UNMEASURED = (
    "unmeasured=True: soups are measured with a budget of {}. It goes with budget=0 (--budget 0), where the best "
    "estimate is returned without that."
)

# Which heads soups may have.
HEADS = ("auto", "average", "refit")


def radin(
    bank: LogitBank,
    *,
    budget: float | str | None = None,
    unmeasured: bool = False,
    measure: str = "race",
    proposals: str = "auto",
    candidates: int = 200,
    recipes: Sequence[Recipe] = (),
    start: str | None = None,
    head: str = "auto",
    head_split: str | None = None,
    metric: Any = None,
    keep: str | Sequence[str] = (),
    metrics: Sequence[Any] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    hold_out: float | None = None,
    allow_overlap: bool = False,
    seed: int = 0,
) -> Soup:
    """The best soup that can be found within a budget, after Recipe 2 of the paper (arXiv 2401.17790).

    The singles are known from the logits. The uniform soup is measured first, beside the budget; then, as long as that
    lasts, the candidate whose soup is predicted to be best by the logits and by all soups that were measured before
    (see `gaps` and `guide`). A soup that is not better than the best single model is not returned, the best single is.
    Of a pilot, the logits of other images are computed first where they tell recipes apart (`pilot`).

    Where the ingredients differ in their heads alone, as linear probes of one body do, a soup is in float32 the same
    function as its ensemble, up to rounding. Estimates are measurements then: soups take no pass, whatever the budget,
    and the candidate of the best estimate is the best soup (`LogitBank.with_exactness`). One pass shows what the body
    gives heads, beside the budget: as any soup, that is returned with a refitted head if that is better (`head`).

    Args:
        bank: logits of the ingredients on the split that chooses.
        budget: passes over the split that soups may take (2.5, say), or a duration as in `"15m"`, which counts the
            time that this process took to compute the logits. By default as many passes as greedy measures soups, one
            less than there are ingredients, and 8 at most; or 0 where nothing can measure soups. With 0 no model runs
            and no image is read: the best single model is returned, or what soups that an earlier search measured say
            is better. An interrupt ends the search early with the best
            so far.
        unmeasured: with a budget of 0, return the candidate of the best estimate all the same, if that is above the
            accuracy of the best single model; its recipe and card say that it was not measured.
        measure: `race` shows candidates the contested images first and drops those that are behind (see `race`), so
            that a pass is enough for several; the winner is measured on the whole split. `full` is the paper's
            procedure: those of the best estimates (the accuracy of the ensemble), as many as the budget has passes,
            each on the whole split. Where a function evaluates soups, `race` shows all images too (see
            `LogitBank.from_arrays`).
        proposals: kinds of candidates, as in `"monte-carlo,forward"`. Drawn: `monte-carlo`, `dirichlet` (see
            `propose.propose`). Sought by their estimates: `subsets` (all of them, up to 20 ingredients), `forward` and
            `line` (see `seek`); by predictions, after each soup anew: `local`. `auto` takes all subsets of up to 12
            ingredients, else as many as `monte-carlo` draws, and `local`; where soups don't guide the search (`full`,
            a budget of 0, too many classes that can win) `local` goes by estimates, and `auto` has `line` too.
            `wise-ft` and `model-stock` mix with the model that all began from (see `seek`), as in `"auto,wise-ft"`.
            Where all ingredients name one base model a line says so.
        candidates: how many are drawn of each kind.
        recipes: candidates of your own (`own`), by the ids of the ingredients; ranked with the others, and measured if
            their turn comes. Those that are pulled to `start` (`Recipe.pull`) are measured first.
        start: for `wise-ft` and `model-stock`, the id of the ingredient that all others were fine-tuned from, with the
            same classes. For `wise-ft` also a folder or Hub id of what all were fine-tuned from, with a head for other
            classes or none: after each candidate, the best soup so far has its body pulled to it by a further tenth,
            as long as that helps (see `guide.PulledSoups`), and keeps its averaged or refitted head.
        head: `average` averages heads like all else. `refit` measures each soup with its averaged head and, from the
            same images, with its head refitted to its ensemble, to the ensemble of all, and to this and the
            labels (see `refit`); each single model with a head of the latter is a candidate (`alone`), which takes
            passes like a soup. Such a soup's accuracy on the split that chooses is that of heads which did not see
            the image. If one is returned, it is shown the whole split once more, beside the budget. `auto` does so
            where the ingredients' heads were drawn apart, by their cosines. Where they come from one start, heads are
            averaged, and the soup that is best in the end (or single model) is shown the split once more, beside the
            budget: it is returned with its head refitted to the ensemble of all and the labels if heads that did not
            see the image are better than that (see `Reporter`); not with `full`, nor after an interrupt. Where heads
            can't be refitted they are averaged. Where soups are exact, they have the features of one body, so that
            `refit` refits the head of the best soup in the end, as `auto` does, and measures none with its own.
        head_split: another split of the same dataset that teaches the refitted head of the soup that is returned,
            unless it does so worse beyond chance: one with more images, say. It costs a pass of each teacher and
            of the soup over it, and one more of the soup over the split that chooses, beside the budget.
        metric: what to choose by: a name in `metrics.named.NAMES`, as in `f1`, one with a number or a class, as in
            `top3_accuracy` or `recall[melanoma]`, one of the evaluate library, or a function
            `(logits, labels) -> float` (see `load_metrics`). By default `accuracy`; of multi-label checkpoints `f1`,
            and there the names are those in `metrics.multi_label.NAMES`. Of `log_loss`, `brier_score` and
            `calibration_error` less is better. `race` says how soups are judged from samples.
        keep: floors that the soup must keep on the split that chooses, as in `"accuracy >= best single - 0.002"`,
            `"recall[melanoma] >= 0.9"` or `"log_loss <= 0.3"`. A candidate that breaks one does not win; a warning
            says if all do.
        metrics: what to report beside it, named in the same way. Those that take logits cost a pass of each soup that
            is reported, unless soups are chosen by such a metric.
        test_split: a split of the same dataset that takes no part in the choice, for the final figures; or its bank.
            It costs a pass an ingredient.
        hold_out: where there is no such split: a share of the bank's images, drawn at random, that takes no part in
            the choice and gives the final figures. Its logits are known. Copies of one image stay together.
        allow_overlap: whether the split that proves may have images of the split that chooses; recipe and card then
            say how many. By default that is refused: before anything is computed where the files are here, as the
            images go by where they are streamed.
        seed: of candidates and samples that are drawn.

    Raises:
        ValueError: for a budget or anything else that can't be used, before the first pass.
    """
    limit, mine = _checked_budget(budget, bank, unmeasured=unmeasured), _checked_recipes(recipes)
    search = _Search(limit, unmeasured, measure, proposals, candidates, mine, start, head, seed)
    options = ReportOptions(metric, metrics, test_split, hold_out, head_split, allow_overlap, seed, keep)
    if head_split is not None and head == "average":
        raise ValueError(f"head_split={head_split!r}: averaged heads (head='average') learn from no images.")
    search.check_given(bank, options)
    begun = time.perf_counter() - bank.seconds
    ids, bank = bank.ingredients.ids, bank.by_content
    check_start(search.kinds, start, ids, passes=search.budget.passes)
    search = search.leaving_out(Objective.of(metric, keep, bank.classes, of_label_sets=bank.is_multi_label))
    search, pulled_to = search.with_start(bank)
    bank = search.with_exactness(bank, pulled_to)
    if budget is None and not bank.exact:
        _say_usual(search.budget, len(ids))
    drawn, pilot, heads = search.draw(bank), None, search.find_heads(bank)
    if bank.is_pilot and search.budget.passes:
        check_report(bank, options)  # before the logits of further images
        wanted = {name for recipe in search.recipes for name in recipe.used} | {name for name in ids if name == start}
        bank, pilot = complete(bank, wanted)
        drawn = search.draw(bank)
    bank = replace(bank, ingredients=Ingredients(bank.ingredients, start=pulled_to))
    if head_split is not None and heads.place is None:
        logger.warning("The split %r teaches nothing: heads are averaged.", head_split)
    paused = time.perf_counter()
    reporter = Reporter.of(bank, options, ids=ids)
    begun += time.perf_counter() - paused  # the final figures' logits are no part of the budget
    return search.soup(reporter, drawn, pilot, heads, begun)


@dataclass(frozen=True)
class _Heads:
    """What becomes of the heads of soups.

    Args:
        place: the head that is refitted; None if all are averaged.
        race: whether refitted heads are candidates, else the soup that is returned has its head refitted in the end.
    """

    place: Head | None = None
    race: bool = False


@dataclass(frozen=True)
class _Search:
    """How `radin` searches; see there."""

    budget: Budget
    unmeasured: bool
    measure: str
    proposals: str
    candidates: int
    recipes: tuple[Recipe, ...]
    start: str | None
    head: str
    seed: int
    objective: Objective = ACCURACY

    def __post_init__(self) -> None:
        if self.measure not in ("race", "full"):
            raise ValueError(f"measure={self.measure!r}: it is 'race' or 'full'.")
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}: it is 'auto', 'average' or 'refit'.")
        split_kinds(self.proposals)

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of candidates."""
        return split_kinds(self.proposals)

    @property
    def is_full(self) -> bool:
        """Whether each candidate is shown the whole split."""
        return self.measure == "full"

    def check_given(self, bank: LogitBank, options: ReportOptions) -> None:
        """Refuse what takes checkpoints or images where a bank has neither.

        Raises:
            ValueError: if the search takes them.
        """
        if self.budget.passes:
            bank.check_measurable(f"budget={str(self.budget)!r}")
        if self.budget.passes or self.unmeasured:
            _check_proof(bank, options)
        if bank.given is None:
            return
        takes = {
            "head='refit'": self.head == "refit",
            f"head_split={options.head_split!r}": options.head_split is not None,
            f"start={self.start!r}": self.start is not None and self.start not in bank.ingredients.ids,
            "proposals='model-stock'": "model-stock" in self.kinds,
        }
        for what in (what for what, is_asked in takes.items() if is_asked):
            refuse_given(bank.ingredients, what, "Leave it out.")

    def leaving_out(self, objective: Objective) -> _Search:
        """The same search without candidates along a line, which is searched for accuracy only.

        Raises:
            ValueError: if the user names these.
        """
        if not objective.is_accuracy and "line" in self.proposals.split(","):
            raise ValueError(
                "proposals='line' finds where most images are right: it goes with metric='accuracy' only."
            )
        return replace(self, objective=objective)

    def draw(self, bank: LogitBank) -> Candidates:
        """The candidates that are drawn, and the user's own."""
        count = len(bank.ingredients)
        drawn = propose(count, proposals=self.proposals, count=self.candidates, seed=self.seed)
        return drawn + _own(bank, [recipe for recipe in self.recipes if recipe.pull is None])

    def with_start(self, bank: LogitBank) -> tuple[_Search, Ingredient | None]:
        """The same search with the start that its soups are pulled to, if there is one that is no ingredient.

        Raises:
            ValueError: if the user names one that does not fit, or one of the user's recipes is pulled to another.
        """
        ingredients, start = bank.ingredients, None
        if self.start is not None and self.start not in ingredients.ids:
            name = self.start
            start = bank.processes.decide(lambda: find_start(name, ingredients))
        elif self.start is None and self.budget.passes and bank.given is None and (base := named_start(ingredients)):
            logger.info(
                "The ingredients' base model is %s: name it as start (--start) with proposals='auto,wise-ft' "
                "(--proposals) to pull soups to it, too.",
                base,
            )
        recipes = tuple(_pulled(recipe, self.start, start) for recipe in self.recipes)
        return replace(self, start=start.id if start else self.start, recipes=recipes), start

    def with_exactness(self, bank: LogitBank, start: Ingredient | None) -> LogitBank:
        """The bank, which says whether the soups of this search are exact.

        Not where bodies are pulled to a start. Nor, with a budget of 0, where a pilot's logits are all there will be,
        or checkpoints of a published bank would have to be loaded.
        """
        is_estimated = not self.budget.passes and (bank.is_pilot or bank.manifest.origin is not None)
        if start is not None or is_estimated:
            return replace(bank, exact=False)
        return _with_exactness(bank)

    def find_heads(self, bank: LogitBank) -> _Heads:
        """The head that soups have refitted, and when.

        Raises:
            ValueError: if it is to be refitted, and can't be.
        """
        hindrance = self._hindrance(bank)
        if self.head == "refit" and hindrance:
            raise ValueError(f"head='refit': {hindrance}. Average the heads: head='average' (--head average).")
        if not self.budget.passes:
            if self.head == "auto" and bank.exact:
                logger.info(
                    "With a budget of 0 heads are averaged: a refitted one, which may be better, takes a pass."
                )
            return _Heads()
        kinds = "" if self.head == "refit" else _heads_of_their_own(bank)
        if kinds and (self.head == "average" or hindrance):
            _warn_of_averaging(kinds, hindrance if self.head == "auto" else "")
        # exact soups are known with their averaged heads, and have the features of one body
        race = bool(kinds) or (self.head == "refit" and not bank.exact)
        # the paper's procedure ends with what was measured
        if self.head == "average" or hindrance or (self.is_full and self.head == "auto" and not race):
            return _Heads()
        if kinds:
            logger.info("%s. Both averaged and refitted ones enter.", kinds)

        def find() -> tuple[Head | None, str]:
            try:
                return find_head(bank.ingredients[0], bank.images.example()), ""
            except HeadError as error:
                if self.head == "refit":
                    raise
                return None, str(error)

        place, problem = bank.processes.decide(find)
        if problem and race:
            logger.warning("The heads are averaged, which is seldom good: %s", problem)
        if race and place is not None and len(bank) < place.features:
            logger.warning(
                "%d images teach heads of %d features each: with fewer images than features the heads stay nearer to "
                "the averaged ones, and are worse than more images would make them.",
                len(bank),
                place.features,
            )
        if race and place is not None and (least := fewest_of_a_class(bank)) < FOLDS:
            logger.warning(
                "The split %r has %d different images %s: a refitted head forgets what it is not shown. "
                "Name a split with more of them, or average the heads: head='average' (--head average).",
                bank.split,
                least,
                "with one class, or without it" if bank.is_multi_label else "of one class",
            )
        if bank.exact and place is not None:
            logger.info(
                "One pass of the body that they share, beside the budget, shows in the end whether a refitted head is "
                "better than the averaged one: head='average' (--head average) does without."
            )
        return _Heads(place, race and place is not None)

    def _hindrance(self, bank: LogitBank) -> str:
        """Why no head can be refitted on the images of a bank, whatever the architecture; empty if it can."""
        if bank.given is not None:
            return "a head is refitted to what a soup makes of images, and there are logits alone"
        if not self.budget.passes:
            return "a head is refitted to what a soup makes of images, and with a budget of 0 it is shown none"
        if bank.is_pilot:
            return "a head is refitted to the logits of all images, and after a pilot they are known of some only"
        different = len(np.unique(bank.contents))
        if different < FOLDS:
            return f"a head is refitted in {FOLDS} folds, and the split has {different} different images"
        return ""

    def soup(
        self, reporter: Reporter, drawn: Candidates, pilot: PilotReport | None, heads: _Heads, begun: float
    ) -> Soup:
        """The best soup among the drawn candidates and those that are sought.

        Args:
            begun: when the budget of time began, by `time.perf_counter`.
        """
        bank = reporter.bank
        objective = reporter.objective
        search, singles = replace(self, objective=objective), single_measurements(bank, objective)
        can_guide = not self.is_full and not heads.race and objective.is_fast and not bank.exact
        is_guided = can_guide and bank.processes.decide(partial(bank.is_prunable, objective.top))
        is_guided = is_guided and (self.budget.passes > 0 or _is_uniform_known(reporter))
        ranked = search._rank(bank, drawn, is_guided)
        if bank.exact:
            result = RaceResult(search._exact(ranked), "candidates", ())
        elif heads.race and heads.place is not None:
            result = search._race_of_heads(ranked, singles, heads.place, begun)
        elif self.budget.passes:
            result = search._race(bank, ranked, singles, is_guided, begun)
        elif is_guided:
            result = RaceResult(search._predicted(bank, ranked), "", ())
        else:
            result = RaceResult(search._estimated(ranked, singles), "", ())
        settings = SearchSettings(
            budget=str(self.budget),
            measure=self.measure,
            proposals=self.proposals,
            candidates=int(self.candidates),
            seed=int(self.seed),
            hold_out=reporter.hold_out,
            ended=result.ended or None,
            start=self.start,
            heads=self.head,
            scored=len(ranked.candidates.proposals),  # with singles and uniform, or all subsets
            pilot=pilot,
            curve=result.curve,
        )
        refits = heads.place is not None and result.ended != "interrupt"  # else what took a pass is wanted at once
        soup = reporter.soup("radin", singles + result.measurements, settings, refits=refits)
        search._advise(bank, result, soup.recipe, is_guided and bank.given is None)
        return soup

    def _exact(self, ranked: _Ranked) -> list[Measurement]:
        """What is known of exact soups without a pass: of the uniform one, the user's own and the best others."""
        bank, rows = ranked.bank, [*ranked.rows("uniform")]
        for recipe in self.recipes:
            rows += [*np.flatnonzero((ranked.candidates.weights == bank.row(recipe)).all(axis=1))]
        entries = [ranked.entry(row) for row in rows] + self._shortlist(ranked, ENTRANTS)
        soups: dict[Recipe, str] = {}
        for entry in entries:
            if not entry.recipe.is_single:
                soups.setdefault(entry.recipe, entry.proposal)
        known = [_measure(bank, *soup, self.objective, on_block=lambda images: None) for soup in soups.items()]
        for measurement in sorted(known, key=self.objective.rank, reverse=True)[:NAMED]:
            _say_measured(measurement, self.objective)
        if (further := len(known) - NAMED) > 0:
            logger.info(
                "%s, exact too, %s no better.", counted(further, "further soup"), "is" if further == 1 else "are"
            )
        return known

    def _estimated(self, ranked: _Ranked, singles: list[Measurement]) -> list[Measurement]:
        """The candidate of the best estimate, if the user wants what is not measured; else none, as a line says."""
        estimated = ranked.best_estimate()
        if self.unmeasured:
            return [estimated]
        best = best_known(singles, len(ranked.bank), self.objective)
        logger.warning(
            "With a budget of 0 no soup is measured, and the best single model is returned: %s, whose %s is "
            "%s. The best estimate of a soup is %s, and estimates are usually too high: with unmeasured=True "
            "(--unmeasured) that soup is returned all the same, or with %s soups are measured.",
            *best.recipe.used,
            self.objective.name,
            show_metric(self.objective.name, best.known),
            show_metric(self.objective.name, estimated.estimate),
            "a budget above 0" if ranked.bank.is_measurable else "LogitBank.from_arrays(..., evaluate=...)",
        )
        return []

    def _predicted(self, bank: LogitBank, ranked: _Ranked) -> list[Measurement]:
        """What earlier searches found, and the candidate that one would measure next by that, unmeasured."""
        guide, options = self._guide(bank, ranked), RaceOptions(self.budget, seed=self.seed, objective=self.objective)
        entries = chain([ranked.entry(row) for row in ranked.rows("uniform")], guide)
        known, entry = remember(bank, entries, options, guide.learn)
        if entry is None:
            return known
        following = Measurement(entry.recipe, entry.proposal, entry.estimate, None, 0, predicted=entry.predicted)
        logger.info(
            "With a budget of 0 no soup is measured. By what earlier searches measured (%s), the %s of the best other "
            "candidate is predicted to be %s; that of its ensemble is %s.",
            counted(len(known), "soup"),
            self.objective.name,
            show_metric(self.objective.name, following.known),
            show_metric(self.objective.name, entry.estimate),
        )
        return [*known, following]

    def _guide(self, bank: LogitBank, ranked: _Ranked) -> Guide:
        """What says which candidate is next."""
        is_local = bool({"auto", "local"} & set(self.kinds))
        return Guide(bank, ranked.candidates, _inner_products(bank), local=is_local, objective=self.objective)

    def _race(
        self, bank: LogitBank, ranked: _Ranked, singles: list[Measurement], is_guided: bool, begun: float
    ) -> RaceResult:
        """Measure the most promising candidates within the budget, and the uniform soup beside it."""
        guide = self._guide(bank, ranked) if is_guided else None
        entries, hear = self._with_pulled(bank, guide or self._shortlist(ranked, self._entrants), singles)
        return race(
            bank,
            entries,
            # what is evaluated elsewhere is evaluated for all images
            RaceOptions(self.budget, self.is_full or bank.given is not None, self.seed, begun, self.objective),
            best=self._best_answers(bank, singles),
            beside=[ranked.entry(row) for row in ranked.rows("uniform")],
            learn=guide.learn if guide else None,
            hear=hear,
        )

    def _race_of_heads(self, ranked: _Ranked, singles: list[Measurement], place: Head, begun: float) -> RaceResult:
        """Measure soups and single models with refitted heads within the budget, and the uniform soup beside it."""
        bank, everything = ranked.bank, Recipe.uniform(ranked.bank.ingredients.ids)
        uniform = [with_heads(ranked.entry(row), everything) for row in ranked.rows("uniform")]
        estimate = float(bank.processes.decide(lambda: bank.score(everything, self.objective.metric))[0])
        soups = self._shortlist(ranked, self._entrants)
        candidates = refitted_entries(soups, singles, everything, estimate, self.objective)
        entries, hear = self._with_pulled(bank, candidates, singles, lambda entry: with_heads(entry, everything))
        return race(
            bank,
            entries,
            # a head that is fitted to mostly contested images is better at these than the one that all will give
            RaceOptions(self.budget, full=True, seed=self.seed, begun=begun, objective=self.objective),
            best=self._best_answers(bank, singles),
            beside=uniform,
            hear=hear,
            soup_of=partial(measured_soup, head=place),
        )

    def _advise(self, bank: LogitBank, result: RaceResult, chosen: Recipe, is_guided: bool) -> None:
        """Say what the figures suggest for a next search.

        Args:
            is_guided: whether the weights were compared, to guide it.
        """
        for place, times in (find_far_off(_inner_products(bank)) if is_guided else {}).items():
            if (name := bank.ingredients.ids[place]) not in chosen.used:
                logger.info(
                    "%s lies %.1f times as far from the mean of all ingredients as the median one, and is not in the "
                    "soup: its run may have diverged, or learnt much faster.",
                    name,
                    times,
                )
        values = [self.objective.metric.rank(value) for _, value in result.curve]
        last = next((place for place in range(len(values) - 1, 0, -1) if values[place] > values[place - 1]), 0)
        if result.ended == "budget" and last > (1 - LATE) * len(values):
            logger.info(
                "The best was found late: a larger budget (--budget) than %s may find better soups.", self.budget
            )

    def _best_answers(self, bank: LogitBank, singles: list[Measurement]) -> Answers:
        """What the best single model says of the images."""
        best = best_known(singles, len(bank), self.objective)
        return bank.answers(bank.row(best.recipe), with_logits=self.objective.needs_logits)

    def _with_pulled(
        self,
        bank: LogitBank,
        candidates: Iterable[Entry],
        singles: list[Measurement],
        with_heads: Callable[[Entry], Entry] = lambda entry: entry,
    ) -> tuple[Iterable[Entry], Callable[[Measurement], object]]:
        """Candidates with those that are pulled to the start, if there is one, and what hears of measurements.

        Args:
            with_heads: gives a soup the heads that are to be measured.
        """
        start, mine = bank.ingredients.start, [recipe for recipe in self.recipes if recipe.pull]
        if start is None:
            return candidates, lambda measurement: None
        estimates = bank.processes.decide(lambda: bank.score(mine, self.objective.metric) if mine else np.zeros(0))
        entries = [
            with_heads(Entry(recipe, "own", float(estimate))) for recipe, estimate in zip(mine, estimates, strict=True)
        ]
        pulled = PulledSoups(candidates, start.id, singles, with_heads, self.objective)
        return chain(entries, pulled), pulled.hear

    @property
    def _entrants(self) -> int | None:
        """How many candidates the budget may be enough for; None for all."""
        passes = self.budget.passes
        return math.ceil(passes * (1 if self.is_full else ENTRANTS)) if math.isfinite(passes) else None

    def _shortlist(self, ranked: _Ranked, most: int | None) -> list[Entry]:
        """The candidates of the best estimates, so many at most."""
        rows = ranked.soup_rows()
        # candidates that are sought by their scores come in near copies
        apart = APART if set(self.kinds) & {"auto", *SOUGHT} else 0.0
        most = len(rows) if most is None else most
        order = shortlist(ranked.candidates.weights[rows], ranked.ranks[rows], most, apart=apart)
        return [ranked.entry(rows[position]) for position in order]

    def _rank(self, bank: LogitBank, drawn: Candidates, is_guided: bool) -> _Ranked:
        """The drawn candidates and those that are sought by their estimates, with their estimates.

        Raises:
            ValueError: if the logits can't be searched along a line.
        """
        decide, kinds, objective = bank.processes.decide, self.kinds, self.objective
        is_prunable = decide(partial(bank.is_prunable, objective.top))
        if "line" in kinds and not is_prunable:
            raise ValueError(
                "proposals='line' needs few classes that can win, and here there are too many: leave it out."
            )
        # what is not asked for by name would take too long where too much is left; measured soups are a better guide
        left_out = {"auto", "local"} if is_guided else set() if is_prunable else {"auto"}
        sought = [kind for kind in kinds if kind not in left_out]
        if not objective.is_accuracy:  # a line is searched for accuracy only
            sought = ["local" if kind == "auto" else kind for kind in sought]
        score = partial(bank.processes.score, partial(_ranks, bank, objective))
        candidates, ranks = seek(
            drawn,
            score(drawn.weights),
            score,
            lambda start, end: decide(lambda: bank.best_step(start, end)),
            sought,
            start=bank.ingredients.ids.index(self.start) if self.start in bank.ingredients.ids else None,
            products=_inner_products(bank) if "model-stock" in kinds else None,
        )
        return _Ranked(bank, candidates, ranks, objective)


def _is_uniform_known(reporter: Reporter) -> bool:
    """Whether an earlier search measured the uniform soup, so that other soups can be predicted without a pass.

    Not where more counts than which predictions are right: what is known of a soup is too little then.
    """
    bank, held_out = reporter.bank, reporter.held_out
    is_measurable = bank.is_measurable and (held_out is None or held_out.is_measurable)
    if bank.is_pilot or reporter.need_logits or reporter.objective.floors or not is_measurable:
        return False
    soup = measured_soup(bank, Recipe.uniform(bank.ingredients.ids), bank.pruned(reporter.objective.top))
    return bool(np.isfinite(soup.values).any())


def _ranks(bank: LogitBank, objective: Objective, rows: np.ndarray) -> np.ndarray:
    """Of recipes `(recipes, models)`, values of which the largest is that of the best ensemble: `(recipes,)`."""
    return objective.ranks({metric.name: bank.score(rows, metric) for metric in objective.metrics})


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Candidates, and how good their ensembles are, the more the better: `(recipes,)`."""

    bank: LogitBank
    candidates: Candidates
    ranks: np.ndarray
    objective: Objective

    def entry(self, row: np.integer) -> Entry:
        """A candidate of the race."""
        weights, estimate = self.candidates.weights[row], float(self.ranks[row])
        if not self.objective.is_accuracy:
            score = partial(self.bank.score, weights[None], self.objective.metric)
            estimate = float(self.bank.processes.decide(score)[0])
        return Entry(self.bank.recipe(weights), self.candidates.proposals[int(row)], estimate)

    def rows(self, proposal: str) -> np.ndarray:
        """The rows of one kind of candidates."""
        return np.flatnonzero(np.array(self.candidates.proposals) == proposal)

    def soup_rows(self) -> np.ndarray:
        """The rows of all candidates that are neither single models nor the uniform soup."""
        kinds = np.array(self.candidates.proposals)
        return np.flatnonzero((kinds != "single") & (kinds != "uniform"))

    def best_estimate(self) -> Measurement:
        """The candidate of the best estimate that is no single model, which is not measured.

        Whether it keeps the floors is estimated too: else one that breaks them would win from a single model.
        """
        rows = np.flatnonzero(np.array(self.candidates.proposals) != "single")
        row = max(rows, key=lambda row: self.ranks[row])
        entry, keeps = self.entry(row), None
        if self.objective.floors:
            weights, with_logits = self.candidates.weights[row], self.objective.needs_logits
            keeps = not self.objective.broken(self.bank.answers(weights, with_logits=with_logits))
        return Measurement(entry.recipe, entry.proposal, entry.estimate, measured=None, images=0, keeps=keeps)


def greedy(
    bank: LogitBank,
    *,
    accept: str = ">=",
    metric: Any = None,
    keep: str | Sequence[str] = (),
    metrics: Sequence[Any] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    allow_overlap: bool = False,
) -> Soup:
    """The greedy soup (arXiv 2203.05482): take the ingredients from the best down, and keep each that does not hurt.

    Args:
        accept: `>=` keeps an ingredient if the soup does not get worse by the metric, which is Recipe 1 of that paper;
            `>` if it gets better, which is what the published code does.
        metric, keep, metrics, test_split, allow_overlap: as in `radin`.
    """
    if accept not in (">=", ">"):
        raise ValueError(f"accept={accept!r}: it is '>=' or '>'.")
    options = ReportOptions(metric, metrics, test_split, allow_overlap=allow_overlap, keep=keep)
    bank.check_measurable("greedy")
    _check_proof(bank, options)
    reporter = Reporter.of(_with_exactness(bank), options, takes_all=True)
    bank, objective = reporter.bank, reporter.objective
    singles = single_measurements(bank, objective)
    _warn_of_averaging(_heads_of_their_own(bank))
    order = sorted(singles, key=lambda single: -objective.rank(single))
    chosen, measured = order[0], []
    curve = [(0.0, chosen.known)]
    with progress_bar(total=len(bank) * (len(order) - 1), desc="Measuring soups", unit="image") as bar:
        for single in order[1:]:
            recipe = Recipe.uniform((*chosen.recipe.used, *single.recipe.used))
            soup = _measure(bank, recipe, "greedy", objective, bar.update)
            _say_measured(soup, objective)
            measured.append(soup)
            rank, best = objective.rank(soup), objective.rank(chosen)
            if rank > best or (accept == ">=" and rank == best):
                chosen = soup
            curve.append((sum(soup.passes for soup in measured), chosen.known))
    return reporter.soup("greedy", singles + measured, SearchSettings(accept=accept, curve=tuple(curve)), chosen)


def uniform(
    bank: LogitBank,
    *,
    metric: Any = None,
    keep: str | Sequence[str] = (),
    metrics: Sequence[Any] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    allow_overlap: bool = False,
) -> Soup:
    """All ingredients in equal parts. Arguments as in `radin`."""
    options = ReportOptions(metric, metrics, test_split, allow_overlap=allow_overlap, keep=keep)
    bank.check_measurable("uniform")
    _check_proof(bank, options)
    reporter = Reporter.of(_with_exactness(bank), options, takes_all=True)
    bank, recipe = reporter.bank, Recipe.uniform(reporter.bank.ingredients.ids)
    _warn_of_averaging(_heads_of_their_own(bank))
    with progress_bar(total=len(bank), desc="Measuring the soup", unit="image") as bar:
        measured = _measure(bank, recipe, "uniform", reporter.objective, bar.update)
    _say_measured(measured, reporter.objective)
    singles = single_measurements(bank, reporter.objective)
    return reporter.soup("uniform", [*singles, measured], SearchSettings(), measured)


def best_single(
    bank: LogitBank,
    *,
    metric: Any = None,
    keep: str | Sequence[str] = (),
    metrics: Sequence[Any] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    allow_overlap: bool = False,
) -> Soup:
    """The ingredient that is best on the bank's split, of equals the first by content. Arguments as in `radin`."""
    options = ReportOptions(metric, metrics, test_split, allow_overlap=allow_overlap, keep=keep)
    reporter = Reporter.of(bank, options, takes_all=True)
    return reporter.soup("best_single", single_measurements(reporter.bank, reporter.objective), SearchSettings())


def check_options(classes: tuple[str, ...], *, is_multi_label: bool = False, **options: Any) -> None:
    """Refuse options of `radin` that can't be used whatever the bank, long before there is one.

    Args:
        classes: of the models.
        is_multi_label: whether an image may have any number of them.
        options: as `radin` takes them.

    Raises:
        ValueError: if one can't be used, or two don't go together.
    """
    defaults = {name: parameter.default for name, parameter in signature(radin).parameters.items()}
    given = SimpleNamespace(**{**defaults, **options})
    budget, mine = Budget.of(1 if given.budget is None else given.budget), _checked_recipes(given.recipes)
    if given.unmeasured and budget.passes:
        raise ValueError(UNMEASURED.format("the usual one" if given.budget is None else budget))
    shape = (given.measure, given.proposals, given.candidates, mine, given.start, given.head, given.seed)
    search = _Search(budget, given.unmeasured, *shape)
    objective = Objective.of(given.metric, given.keep, classes, of_label_sets=is_multi_label)
    search.leaving_out(objective)
    load_metrics(given.metrics, classes, of_label_sets=is_multi_label)
    propose(2, proposals=given.proposals, count=given.candidates, seed=given.seed)
    if given.hold_out is not None and not 0 < given.hold_out < 1:
        raise ValueError(f"hold_out={given.hold_out!r}: it is a share of the split, as in 0.2.")
    if given.hold_out is not None and given.test_split is not None:
        raise ValueError(f"hold_out={given.hold_out!r}: the split {given.test_split!r} proves the soup already.")
    if given.head_split is not None and given.head == "average":
        raise ValueError(f"head_split={given.head_split!r}: averaged heads (head='average') learn from no images.")
    if is_multi_label and given.head == "refit":
        raise ValueError("head='refit': a head is refitted where each image has one class: leave it out.")


def _check_proof(bank: LogitBank, options: ReportOptions) -> None:
    """Refuse images that are to prove a soup where nothing averages its weights.

    Raises:
        ValueError: if nothing does.
    """
    if options.hold_out is not None:
        bank.check_measurable(f"hold_out={options.hold_out!r}")
    if isinstance(options.test_split, LogitBank):
        options.test_split.check_measurable("test_split")


def _checked_budget(budget: float | str | None, bank: LogitBank, *, unmeasured: bool) -> Budget:
    """What soups may take; where nobody says, no more than a greedy soup of these ingredients.

    Raises:
        ValueError: for a budget that is none, or above 0 where nothing is to be measured.
    """
    ingredients = len(bank.ingredients)
    usual = usual_passes(ingredients) if bank.is_measurable else 0
    checked = Budget.of(usual if budget is None else budget)
    if unmeasured and checked.passes:
        raise ValueError(UNMEASURED.format(checked))
    return checked


def _say_usual(budget: Budget, ingredients: int) -> None:
    """Say what soups may take where nobody said it."""
    if budget.passes:
        logger.info(
            "%s: greedy measures %s; this search takes at most %s, and one for the uniform soup (budget, --budget).",
            counted(ingredients, "ingredient"),
            counted(ingredients - 1, "soup"),
            counted(int(budget.passes), "pass"),
        )


def _with_exactness(bank: LogitBank) -> LogitBank:
    """The bank, which says whether its soups are exact, and so does a line if they are."""
    bank = bank.with_exactness
    if bank.exact:
        logger.info(
            "The %d ingredients differ in their heads alone: a soup is the same function as its ensemble, up to "
            "rounding. So estimates are exact, and soups take no pass.",
            len(bank.ingredients),
        )
    return bank


def _checked_recipes(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """A user's recipes.

    Raises:
        ValueError: if they are no list of recipes.
    """
    if isinstance(recipes, Recipe):
        raise ValueError(f"recipes={recipes!r}: it is a list of Recipe.")
    recipes = tuple(recipes)  # it may be an iterator
    if not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise ValueError(f"recipes={recipes!r}: it is a list of Recipe.")
    return recipes


def _pulled(recipe: Recipe, name: str | None, start: Ingredient | None) -> Recipe:
    """A user's recipe, which names the start that it is pulled to, if any, by its id.

    Args:
        name: what the user calls the start.

    Raises:
        ValueError: if it is pulled to another start.
    """
    if recipe.pull is None:
        return recipe
    if start is None or recipe.pull.start not in (name, start.id):
        raise ValueError(
            f"A recipe is pulled to the start {recipe.pull.start!r}, and there is {start.id if start else 'none'}: "
            'name it with start=... and proposals="auto,wise-ft".'
        )
    return replace(recipe, pull=replace(recipe.pull, start=start.id))


def _own(bank: LogitBank, recipes: Sequence[Recipe]) -> Candidates:
    """A user's recipes as candidates.

    Raises:
        ValueError: if one names an ingredient that the bank does not have.
    """
    for recipe in recipes:
        bank.ingredients.select(recipe.used)
    rows = [bank.row(recipe) for recipe in recipes]
    return Candidates(np.array(rows).reshape(-1, len(bank.ingredients)), ("own",) * len(rows))


def _heads_of_their_own(bank: LogitBank) -> str:
    """Where the ingredients' heads were drawn apart, how far apart they are; else nothing.

    Nor is anything said where that is not known, or makes no difference.
    """
    if bank.given is not None or bank.exact:  # averaged heads on one body are the ensemble
        return ""
    cosines = load_cosines(bank.ingredients, bank.home, as_dtype(bank.manifest.run.dtype), bank.processes)
    if cosines.is_one_start:
        return ""
    return (
        f"Heads of their own: the cosine is as low as {cosines.heads:.2f} between the heads, and {cosines.bodies:.2f} "
        "between the bodies"
    )


def _warn_of_averaging(kinds: str, reason: str = "") -> None:
    """Say that heads are averaged that were drawn apart, if there are such, and why."""
    if kinds:
        because = f": {reason}" if reason else ""
        logger.warning("%s. The heads are averaged, which is seldom good%s.", kinds, because)


def _inner_products(bank: LogitBank) -> np.ndarray:
    """Of all pairs of ingredients `(models, models)`; where no weights are known, by their logits."""
    if bank.given is not None:
        return bank.processes.decide(bank.logit_products)
    return load_inner_products(bank.ingredients, bank.home, as_dtype(bank.manifest.run.dtype), bank.processes)


def _measure(
    bank: LogitBank, recipe: Recipe, proposal: str, objective: Objective, on_block: Callable[[int], object]
) -> Measurement:
    """Measure a soup on all images; an exact one by its ensemble, without a pass."""
    metric, row = objective.metric, bank.row(recipe)
    estimate = float(bank.processes.decide(lambda: bank.score(row[None], metric))[0])
    seconds, device = None, None
    if bank.exact:
        answers = bank.answers(row, with_logits=objective.needs_logits)
        on_block(len(bank))
    else:
        answers, soup = soup_answers(bank, recipe, with_logits=objective.needs_logits, on_block=on_block)
        seconds, device = soup.took(len(bank))
    value = score_or_nan(metric, answers)
    bank.processes.log({"soup/estimate": estimate, "soup/measured": value}, images=len(bank))
    return Measurement(
        recipe,
        proposal,
        estimate,
        value,
        len(bank),
        interval=metric_interval(metric, answers),
        passes=0.0 if bank.exact else 1.0,
        seconds=seconds,
        device=device,
        keeps=not objective.broken(answers) if objective.floors else None,
        exact=bank.exact or None,
    )


def _say_measured(soup: Measurement, objective: Objective) -> None:
    """Say what was measured of a soup."""
    estimate, value = (show_metric(objective.name, figure) for figure in (soup.estimate, soup.known))
    if soup.exact:
        logger.info("Soup of %d (%s): %s, exact.", len(soup.recipe.used), soup.proposal, value)
    else:
        logger.info("Soup of %d: estimated %s, measured %s.", len(soup.recipe.used), estimate, value)
