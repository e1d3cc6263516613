"""Which soup? Propose recipes, rank them by their ensembles, measure within the budget, choose. And the baselines."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_radin import origin
from hf_radin.averaging import average_model
from hf_radin.bank import LogitBank
from hf_radin.evaluate import compute_metrics, load_metrics, measure
from hf_radin.logits import of_split
from hf_radin.processes import log, on_main_process, progress_bar
from hf_radin.propose import SOUGHT, Candidates, propose, split_kinds
from hf_radin.recipe import Measurement, Recipe, Result
from hf_radin.seek import APART, seek, shortlist
from hf_radin.soup import Soup, versions

logger = logging.getLogger(__name__)


def radin(
    bank: LogitBank,
    *,
    budget: int = 8,
    proposals: str = "auto",
    candidates: int = 200,
    recipes: Sequence[Recipe] = (),
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
    seed: int = 0,
) -> Soup:
    """Recipe 2 of the paper (arXiv 2401.17790): the best soup that `budget` measured candidates can find.

    Candidates are ranked by the accuracy of their ensembles; the weights of the best are really averaged and measured
    on the bank's split. The singles are known from the logits. The uniform soup is always measured too, beside the
    budget, so that the result is never worse on this split than either; a soup that is not better than the best
    single model is not returned, the best single is.

    Args:
        bank: logits of the ingredients on the split that chooses.
        budget: how many candidates to measure, each one pass over the split. With 0 no model runs and no image is
            read: the candidate of the best estimate is returned, and its recipe and card say that it was not measured.
        proposals: kinds of candidates, as in `"monte-carlo,forward"`. Drawn: `auto`, `monte-carlo`, `subsets`,
            `dirichlet` (see `propose.propose`). Sought by their estimates: `forward` and `local` (see `seek`); with
            one of these the measured candidates differ from each other in more than a tenth of their weight.
        candidates: how many are drawn of each kind.
        recipes: candidates of your own.
        metric: what to choose by: `accuracy`.
        metrics: what to report, by names in the evaluate library.
        test_split: a split of the same dataset that takes no part in the choice, for the final figures; or its bank.
            It costs a pass an ingredient.
        seed: of the Monte-Carlo candidates.

    Raises:
        ValueError: for a budget below 0, or anything else that can't be used, before the first pass.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 0:
        raise ValueError(f"budget={budget!r}: it is the number of soups to measure, or 0 to estimate only.")
    report = _Report(bank, test_split, metric, metrics)
    kinds, own = split_kinds(proposals), _own(bank, recipes)

    def rank() -> tuple[Candidates, np.ndarray]:
        drawn = propose(len(bank.ingredients), proposals=proposals, count=candidates, seed=seed) + own
        return seek(drawn, bank.score(drawn.weights), bank.score, kinds)

    found, estimates = on_main_process(rank)
    rows = np.array([row for row, kind in enumerate(found.proposals) if kind != "single"])
    apart = APART if set(kinds) & set(SOUGHT) else 0.0  # what is sought by its score comes in near copies
    shortlisted = rows[shortlist(found.weights[rows], estimates[rows], max(1, budget), apart=apart)]
    baseline = [row for row in rows if found.proposals[row] == "uniform" and row not in shortlisted]
    best = [
        (_recipe(bank, found.weights[row]), found.proposals[row], float(estimates[row]))
        for row in (*shortlisted, *baseline)
    ]
    soups = _measure_all(bank, best) if budget else [Measurement(*best[0], measured=None, images=0)]
    measured = _singles(bank) + soups
    settings = {"budget": int(budget), "proposals": proposals, "candidates": int(candidates), "seed": int(seed)}
    settings["scored"] = len(found.proposals)  # with singles and uniform, or all subsets
    return report.soup("radin", measured, settings)


def greedy(
    bank: LogitBank,
    *,
    accept: str = ">=",
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
) -> Soup:
    """The greedy soup (arXiv 2203.05482): take the ingredients from the best down, keep each that does not hurt.

    Args:
        accept: `>=` keeps an ingredient if the soup's accuracy does not fall, which is Recipe 1 of that paper; `>` if
            it rises, which is what the published code does.
        metric, metrics, test_split: as in `radin`.
    """
    if accept not in (">=", ">"):
        raise ValueError(f"accept={accept!r}: it is '>=' or '>'.")
    report = _Report(bank, test_split, metric, metrics)
    singles = _singles(bank)
    order = sorted(singles, key=lambda one: -one.known)
    chosen, trials = order[0], []
    with progress_bar(total=len(bank) * (len(order) - 1), desc="Measuring soups", unit="image") as bar:
        for one in order[1:]:
            recipe = Recipe.uniform((*chosen.recipe.used, *one.recipe.used))
            trial = _measure(bank, recipe, "greedy", _estimate(bank, recipe), bar.update)
            trials.append(trial)
            if trial.known > chosen.known or (accept == ">=" and trial.known == chosen.known):
                chosen = trial
    return report.soup("greedy", singles + trials, {"accept": accept}, chosen=chosen)


def uniform(
    bank: LogitBank,
    *,
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
) -> Soup:
    """All ingredients in equal parts. Arguments as in `radin`."""
    report = _Report(bank, test_split, metric, metrics)
    recipe = Recipe.uniform(bank.ingredients.ids)
    measured = _measure_all(bank, [(recipe, "uniform", _estimate(bank, recipe))])
    return report.soup("uniform", _singles(bank) + measured, {}, chosen=measured[0])


def best_single(
    bank: LogitBank,
    *,
    metric: str = "accuracy",
    metrics: Sequence[str] = ("accuracy",),
    test_split: str | LogitBank | None = None,
) -> Soup:
    """The ingredient that is best on the bank's split, the first of equals. Arguments as in `radin`."""
    report = _Report(bank, test_split, metric, metrics)
    return report.soup("best_single", _singles(bank), {})


def choose(measured: Iterable[Measurement]) -> Measurement:
    """The best measured; of equals the better estimate, but a single model before any soup that is not better."""
    return max(measured, key=lambda one: (one.known, one.proposal == "single", one.estimate))


class _Report:
    """What is checked before a search spends anything, and reported after it."""

    def __init__(self, bank: LogitBank, test_split: str | LogitBank | None, metric: str, metrics: Sequence[str]):
        if metric != "accuracy":
            raise ValueError(f"metric={metric!r}: soups are chosen by 'accuracy'.")
        self.bank = bank
        self.metrics = load_metrics(metrics)
        self.held_out = _held_out(bank, test_split)

    def soup(
        self, method: str, measured: list[Measurement], settings: dict[str, Any], chosen: Measurement | None = None
    ) -> Soup:
        bank = self.bank
        chosen = chosen or choose(measured)
        singles = [one for one in measured if one.proposal == "single"]
        soups = [one for one in measured if one.proposal != "single"]
        rows = [("soup", chosen), ("best single", choose(singles))]
        rows += [("uniform", one) for one in soups if one.proposal == "uniform"]
        results = [
            Result(name, split.split, compute_metrics(self.metrics, predictions, split.labels), len(split))
            for split in [bank] + ([self.held_out] if self.held_out else [])
            for name, predictions in [
                *(
                    (name, _predict(split, one.recipe))
                    for name, one in rows
                    if split is not bank or one.measured is not None
                ),
                ("ensemble", split.predict(_weights(split, Recipe.uniform(bank.ingredients.ids)))),
            ]
        ]
        log({f"{one.split}/{one.name} {key}": value for one in results for key, value in one.metrics.items()})
        if method != "best_single" and chosen.proposal == "single":
            logger.warning("No soup was better than the best single model, %s: it is returned.", *chosen.recipe.used)
        about = {
            "method": method,
            **settings,
            "passes": {"logits": len(bank.ingredients), "soups": sum(one.measured is not None for one in soups)},
            "measured": chosen.measured is not None,
            "bank": bank.origin,
            "dtype": bank.about["dtype"],
            "logits_dtype": bank.about["logits_dtype"],
            "mixed_precision": bank.about["mixed_precision"],
            "processor": bank.about["processor"],
            "data": {name: value for name, value in bank.about["data"].items() if name != "key"},
            "images": len(bank),
            "skipped": len(bank.about["skipped"]),
            "held_out": self.held_out.split if self.held_out else None,
            "remarks": [list(remark) for remark in bank.remarks],
            "batchnorm": bank.statistics and bank.statistics.about,
            "classes": list(bank.classes),
            "image_processor": bank.ingredients[0].image_processor,
            "ingredients": [origin.describe(one) for one in bank.ingredients],
            "versions": versions(),
        }
        return Soup(chosen.recipe, bank.ingredients, measured, results, about, statistics=bank.statistics)


def _held_out(bank: LogitBank, test_split: str | LogitBank | None) -> LogitBank | None:
    """The bank of the split that proves, refused if it is the split that chooses."""
    if test_split is None:
        return None
    if not isinstance(test_split, LogitBank) and str(test_split) == bank.split:
        raise ValueError(f"The split {test_split!r} chooses the soup; another one has to prove it.")
    if bank.statistics and not isinstance(test_split, LogitBank) and str(test_split) == bank.statistics.about["split"]:
        raise ValueError(
            f"The split {test_split!r} gives the soup its BatchNorm statistics; another one has to prove it."
        )
    held_out = test_split if isinstance(test_split, LogitBank) else of_split(bank, str(test_split))
    if bank.about["data"]["key"] == held_out.about["data"]["key"]:  # whatever the two are called
        raise ValueError(f"The split {bank.split!r} chooses the soup; another one has to prove it.")
    for name in ("classes", "processor", "dtype", "mixed_precision"):
        if bank.about[name] != held_out.about[name]:
            raise ValueError(
                f"The held-out bank in {held_out.folder} was computed with another {name} than that in {bank.folder}: "
                f"{held_out.about[name]} against {bank.about[name]}."
            )
    absent = [one.id for one in bank.ingredients if one.key not in held_out.ingredients.keys]
    if absent:
        raise ValueError(
            f"The held-out bank in {held_out.folder} has no logits of {absent[0]} as it is in {bank.folder}."
        )
    if bank.statistics and held_out.about["data"]["key"] == bank.statistics.about["data"]:
        raise ValueError(
            f"The split {held_out.split!r} gives the soup its BatchNorm statistics; another one has to prove it."
        )
    return replace(held_out, ingredients=bank.ingredients, statistics=bank.statistics)


def _recipe(bank: LogitBank, weights: np.ndarray) -> Recipe:
    """A row `(models,)` as a recipe of the ingredients that it uses."""
    used = np.flatnonzero(weights)
    return Recipe(tuple(bank.ingredients.ids[one] for one in used), tuple(weights[used].tolist()))


def _weights(bank: LogitBank, recipe: Recipe) -> np.ndarray:
    """A recipe as a row `(models,)` in the order of the bank."""
    return np.array([recipe.used.get(name, 0.0) for name in bank.ingredients.ids])


def _own(bank: LogitBank, recipes: Sequence[Recipe]) -> Candidates:
    """A user's recipes as candidates.

    Raises:
        ValueError: if one names an ingredient that the bank does not have.
    """
    for recipe in recipes:
        bank.ingredients.select(recipe.used)
    rows = [_weights(bank, recipe) for recipe in recipes]
    return Candidates(np.array(rows).reshape(-1, len(bank.ingredients)), ("own",) * len(rows))


def _estimate(bank: LogitBank, recipe: Recipe) -> float:
    return float(on_main_process(lambda: bank.score(_weights(bank, recipe)[None]))[0])


def _singles(bank: LogitBank) -> list[Measurement]:
    """Each ingredient alone: its logits are known, so nothing is left to measure."""
    scores = on_main_process(lambda: bank.score(np.eye(len(bank.ingredients))))
    return [
        Measurement(Recipe.uniform([name]), "single", float(score), float(score), len(bank))
        for name, score in zip(bank.ingredients.ids, scores, strict=True)
    ]


def _measure_all(bank: LogitBank, wanted: list[tuple[Recipe, str, float]]) -> list[Measurement]:
    with progress_bar(total=len(bank) * len(wanted), desc="Measuring soups", unit="image") as bar:
        return [_measure(bank, recipe, name, float(estimate), bar.update) for recipe, name, estimate in wanted]


def _measure(bank: LogitBank, recipe: Recipe, proposal: str, estimate: float, on_block: Any) -> Measurement:
    predictions = _predict(bank, recipe, on_block)
    measured = float((predictions == bank.labels).mean())
    log({"soup/estimate": estimate, "soup/measured": measured}, images=len(bank))
    logger.info("Soup of %d: estimated %.4f, measured %.4f.", len(recipe.used), estimate, measured)
    return Measurement(recipe, proposal, estimate, measured, len(bank))


def _predict(bank: LogitBank, recipe: Recipe, on_block: Any = lambda samples: None) -> np.ndarray:
    """Classes that the averaged weights predict `(samples,)`; of a single model they are known."""
    if len(recipe.used) == 1:
        return bank.predict(_weights(bank, recipe))
    return measure(
        bank,
        recipe,
        lambda: average_model(bank.ingredients, recipe, statistics=bank.statistics),
        on_block=on_block,
    )
