"""Which soup? Propose recipes, rank them by their ensembles, measure within the budget, choose. And the baselines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hf_radin.checkpoints.files import as_dtype
from hf_radin.logits import preflight
from hf_radin.logits.bank import LogitBank
from hf_radin.recipes.intervals import accuracy_interval
from hf_radin.recipes.propose import APART, SOUGHT, Candidates, check_start, propose, seek, shortlist, split_kinds
from hf_radin.recipes.recipe import Measurement, Recipe
from hf_radin.runtime.processes import on_main_process, over_processes, progress_bar, the_accelerator
from hf_radin.runtime.tracking import log
from hf_radin.search.budget import Budget
from hf_radin.search.guide import Guide
from hf_radin.search.measure import trial_of
from hf_radin.search.pilot import complete
from hf_radin.search.race import Entry, race
from hf_radin.search.report import Report, best_known
from hf_radin.soup.soup import Soup

logger = logging.getLogger(__name__)

# How many candidates a pass can be enough for: those that are dropped at the first look cost that little.
ENTRANTS = 16


def radin(
    bank: LogitBank,
    *,
    budget: float | str = 8,
    measure: str = "race",
    proposals: str = "auto",
    candidates: int = 200,
    recipes: Sequence[Recipe] = (),
    start: str | None = None,
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    hold_out: float | None = None,
    allow_overlap: bool = False,
    seed: int = 0,
) -> Soup:
    """The best soup that can be found within a budget, after Recipe 2 of the paper (arXiv 2401.17790).

    The singles are known from the logits. The uniform soup is measured first, beside the budget; then, as long as that
    lasts, the candidate whose soup is predicted to be best by the logits and by all soups that were measured before
    (see `gap` and `guide`). A soup that is not better than the best single model is not returned, the best single is.
    Of a pilot, the logits of other images are computed first where they tell recipes apart (`telling`).

    Args:
        bank: logits of the ingredients on the split that chooses.
        budget: passes over the split that soups may take (2.5, say), or a duration as in `"15m"`. With 0 no model
            runs and no image is read: the candidate of the best estimate is returned, and its recipe and card say that
            it was not measured. An interrupt ends the search early with the best so far.
        measure: `race` shows candidates the contested images first and drops those that are behind (see `race`), so
            that a pass is enough for several; the winner is measured on the whole split. `full` is the paper's
            procedure: those of the best estimates (the accuracy of the ensemble), as many as the budget has passes,
            each on the whole split.
        proposals: kinds of candidates, as in `"monte-carlo,forward"`. Drawn: `monte-carlo`, `dirichlet` (see
            `propose.propose`). Sought by their estimates: `subsets` (all of them, up to 20 ingredients), `forward` and
            `line` (see `seek`); by predictions, after each soup anew: `local`. `auto` takes all subsets of up to 12
            ingredients, else as many as `monte-carlo` draws, and `local`; where soups don't guide the search (`full`,
            a budget of 0, too many classes that can win) `local` goes by estimates, and `auto` has `line` too.
            `wise-ft` and `model-stock` mix with the model that all began from (see `seek`), as in `"auto,wise-ft"`.
        candidates: how many are drawn of each kind.
        recipes: candidates of your own (`own`), by the ids of the ingredients; ranked with the others, and measured if
            their turn comes.
        start: for `wise-ft` and `model-stock`, the id of the ingredient that all others were fine-tuned from, with the
            same classes.
        metric: what to choose by: `accuracy`.
        metrics: what to report, by names in `metrics.NAMES` or of the evaluate library. Those that take logits cost
            a pass of each soup that is reported.
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
    spend = Budget.of(budget)
    recipes = recipes if isinstance(recipes, Recipe) else list(recipes)
    if measure not in ("race", "full"):
        raise ValueError(f"measure={measure!r}: it is 'race' or 'full'.")
    begun = time.perf_counter()
    kinds = split_kinds(proposals)

    def draw() -> Candidates:
        found = propose(len(bank.ingredients), proposals=proposals, count=candidates, seed=seed)
        return found + _own(bank, recipes)

    check_start(kinds, start, bank.ingredients.ids)
    drawn, pilot = draw(), bank.about.get("pilot")
    if bank.is_pilot and spend.passes:
        Report.check(
            bank, test_split, metric, metrics, hold_out=hold_out, allow_overlap=allow_overlap
        )  # before the rest of the logits
        own = {name for recipe in recipes for name in recipe.used} | ({start} if start else set())
        bank, pilot = complete(bank, own)
        drawn = draw()
    paused = time.perf_counter()
    report = Report(bank, test_split, metric, metrics, hold_out=hold_out, seed=seed, allow_overlap=allow_overlap)
    begun += time.perf_counter() - paused  # the final figures' logits are no part of the budget
    bank, full = report.bank, measure == "full"
    guided = not full and spend.passes > 0 and on_main_process(bank.is_prunable)
    found, estimates = _seek(bank, drawn, kinds, start, guided)
    kind_of, singles = np.array(found.proposals), _singles(bank)

    def entry(row: np.integer) -> Entry:
        return Entry(bank.recipe(found.weights[row]), found.proposals[int(row)], float(estimates[row]))

    if spend.passes:
        guide, entries = _guide(bank, found, kinds) if guided else None, []
        if guide is None:
            rows = np.flatnonzero((kind_of != "single") & (kind_of != "uniform"))
            # what is sought by its score comes in near copies
            apart = APART if set(kinds) & {"auto", *SOUGHT} else 0.0
            most = len(rows) if math.isinf(spend.passes) else math.ceil(spend.passes * (1 if full else ENTRANTS))
            entries = [entry(rows[one]) for one in shortlist(found.weights[rows], estimates[rows], most, apart=apart)]
        soups, ended, curve = race(
            bank,
            guide or entries,
            spend,
            best=bank.predict(bank.row(best_known(singles, len(bank)).recipe)),
            beside=[entry(row) for row in np.flatnonzero(kind_of == "uniform")],
            learn=guide.learn if guide else None,
            full=full,
            seed=seed,
            begun=begun,
        )
    else:
        one = entry(max(np.flatnonzero(kind_of != "single"), key=lambda row: estimates[row]))
        soups = [Measurement(one.recipe, one.proposal, one.estimate, measured=None, images=0)]
        ended, curve = None, []
    settings = {"budget": str(spend), "measure": measure, "proposals": proposals, "candidates": int(candidates)}
    settings |= {"seed": int(seed), "hold_out": hold_out, "ended": ended, "start": start}
    settings |= {"scored": len(found.proposals), "pilot": pilot}  # with singles and uniform, or all subsets
    settings["curve"] = curve
    return report.soup("radin", singles + soups, settings)


def _seek(
    bank: LogitBank, drawn: Candidates, kinds: Sequence[str], start: str | None, guided: bool
) -> tuple[Candidates, np.ndarray]:
    """The drawn candidates and those that are sought by their estimates, and the estimates `(recipes,)`.

    Raises:
        ValueError: if the logits can't be searched along a line.
    """
    prunable = on_main_process(bank.is_prunable)
    if "line" in kinds and not prunable:
        raise ValueError(
            "proposals='line' works on the classes that can win, and of these too many can: leave it out."
        )
    # what is not asked for by name would take too long where too much is left; measured soups are a better guide
    left_out = {"auto", "local"} if guided else set() if prunable else {"auto"}
    score = partial(over_processes, bank.score)

    def step(start: np.ndarray, end: np.ndarray) -> tuple[float, int]:
        return on_main_process(lambda: bank.best_step(start, end))

    return seek(
        drawn,
        score(drawn.weights),
        score,
        step,
        [kind for kind in kinds if kind not in left_out],
        start=None if start is None else bank.ingredients.ids.index(start),
        products=_products(bank) if "model-stock" in kinds else None,
    )


def _guide(bank: LogitBank, candidates: Candidates, kinds: Sequence[str]) -> Guide:
    return Guide(bank, candidates, _products(bank), local=bool({"auto", "local"} & set(kinds)))


def _products(bank: LogitBank) -> np.ndarray:
    home, dtype = bank.folder.parent.parent, as_dtype(bank.about["dtype"])
    return preflight.load_inner_products(bank.ingredients, home, dtype, the_accelerator())


def greedy(
    bank: LogitBank,
    *,
    accept: str = ">=",
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    allow_overlap: bool = False,
) -> Soup:
    """The greedy soup (arXiv 2203.05482): take the ingredients from the best down, keep each that does not hurt.

    Args:
        accept: `>=` keeps an ingredient if the soup's accuracy does not fall, which is Recipe 1 of that paper; `>` if
            it rises, which is what the published code does.
        metric, metrics, test_split, allow_overlap: as in `radin`.
    """
    if accept not in (">=", ">"):
        raise ValueError(f"accept={accept!r}: it is '>=' or '>'.")
    report = Report(bank, test_split, metric, metrics, whole=True, allow_overlap=allow_overlap)
    singles = _singles(bank)
    order = sorted(singles, key=lambda one: -one.known)
    chosen, trials = order[0], []
    curve = [(0.0, chosen.known)]
    with progress_bar(total=len(bank) * (len(order) - 1), desc="Measuring soups", unit="image") as bar:
        for one in order[1:]:
            recipe = Recipe.uniform((*chosen.recipe.used, *one.recipe.used))
            preflight = _measure(bank, recipe, "greedy", bar.update)
            trials.append(preflight)
            if preflight.known > chosen.known or (accept == ">=" and preflight.known == chosen.known):
                chosen = preflight
            curve.append((float(len(trials)), chosen.known))
    return report.soup("greedy", singles + trials, {"accept": accept, "curve": curve}, chosen=chosen)


def uniform(
    bank: LogitBank,
    *,
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    allow_overlap: bool = False,
) -> Soup:
    """All ingredients in equal parts. Arguments as in `radin`."""
    report = Report(bank, test_split, metric, metrics, whole=True, allow_overlap=allow_overlap)
    recipe = Recipe.uniform(bank.ingredients.ids)
    with progress_bar(total=len(bank), desc="Measuring the soup", unit="image") as bar:
        measured = _measure(bank, recipe, "uniform", bar.update)
    return report.soup("uniform", [*_singles(bank), measured], {}, chosen=measured)


def best_single(
    bank: LogitBank,
    *,
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    allow_overlap: bool = False,
) -> Soup:
    """The ingredient that is best on the bank's split, the first of equals. Arguments as in `radin`."""
    report = Report(bank, test_split, metric, metrics, whole=True, allow_overlap=allow_overlap)
    return report.soup("best_single", _singles(bank), {})


def _own(bank: LogitBank, recipes: Sequence[Recipe]) -> Candidates:
    """A user's recipes as candidates.

    Raises:
        ValueError: if one names an ingredient that the bank does not have.
    """
    if isinstance(recipes, Recipe) or not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise ValueError(f"recipes={recipes!r}: it is a list of Recipe.")
    for recipe in recipes:
        bank.ingredients.select(recipe.used)
    rows = [bank.row(recipe) for recipe in recipes]
    return Candidates(np.array(rows).reshape(-1, len(bank.ingredients)), ("own",) * len(rows))


def _singles(bank: LogitBank) -> list[Measurement]:
    """Each ingredient alone: its logits are known, so nothing is left to measure."""
    found = []
    for name in bank.ingredients.ids:
        recipe = Recipe.uniform([name])
        hits = bank.predict(bank.row(recipe)) == bank.labels
        score, between, images = float(hits.mean()), accuracy_interval(hits), len(bank)
        if bank.partly and len(bank.partly.rest) and name not in bank.partly.whole:
            score, between = bank.partly.estimate(hits)
            images -= len(bank.partly.rest)
        found.append(Measurement(recipe, "single", score, score, images, interval=between))
    return found


def _measure(bank: LogitBank, recipe: Recipe, proposal: str, on_block: Any) -> Measurement:
    estimate = float(on_main_process(lambda: bank.score(bank.row(recipe)[None]))[0])
    preflight = trial_of(bank, recipe)
    hits = preflight.look(np.ones(len(bank), dtype=bool), on_block=on_block) == bank.labels
    measured = float(hits.mean())
    log({"soup/estimate": estimate, "soup/measured": measured}, images=len(bank))
    logger.info("Soup of %d: estimated %.4f, measured %.4f.", len(recipe.used), estimate, measured)
    seconds, device = preflight.took(len(bank))
    return Measurement(
        recipe,
        proposal,
        estimate,
        measured,
        len(bank),
        interval=accuracy_interval(hits),
        passes=1.0,
        seconds=seconds,
        device=device,
    )
