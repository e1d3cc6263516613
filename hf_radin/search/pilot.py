"""After a pilot: which images tell recipes apart, so that most models need no logits of the rest.

Where the best single models agree by a wide margin, hardly any mix of the ingredients predicts something else. How
wide it has to be the pilot says, whose images all models have seen. A few models are run on all images; the others on
those where these don't agree so clearly. The rest counts as decided: what was assumed there is the same for all
recipes, so that it ranks none above another, and of each soup that is measured a random sample of it is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_radin.images.sample import ENOUGH, Chosen, Pilot
from hf_radin.images.split import OBJECT
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.logits.bank import LogitBank, Partly
from hf_radin.logits.bank_files import Spent, spent
from hf_radin.logits.compute import NOT_FINITE, compute_logits
from hf_radin.logits.passes import as_computed
from hf_radin.logits.sources import source_of
from hf_radin.recipes import pruning, scoring
from hf_radin.recipes.propose import monte_carlo
from hf_radin.recipes.pruning import Pruned, join, prune
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.processes import on_main_process, progress_bar, the_accelerator
from hf_radin.runtime.tracking import log
from hf_radin.search.measure import trial_of

logger = logging.getLogger(__name__)

# Of the predictions that recipes make where the leading models agree clearly, so many may be different ones.
ASTRAY = 0.001

# So many recipes are asked.
RECIPES = 200

# How many logits of a model are looked at together.
AT_ONCE = 1 << 22


def complete(bank: LogitBank, wanted: Collection[str] = ()) -> tuple[LogitBank, dict[str, Any]]:
    """The bank of all images of a pilot's ingredients, with the logits that matter.

    Args:
        bank: of a pilot.
        wanted: ids of ingredients that must not be lost.

    Raises:
        ValueError: if too many classes can win, the images or the precision are not those of the pilot, an ingredient
            in `wanted` gives a logit that is no finite number, or too few are left that don't.

    Returns:
        the bank, and what to say of the pilot: its `share` and `seed`, and how many images it has (`drawn`); how many
        ingredients were `given`, and how many of them are `leading`; the ids of those that were run on all images
        (`whole`); on how many images the others were run (`shown`), and the least `margin` by which the leading agree
        about the rest (None where nothing is left); the `passes` that all these logits took, the `seconds`, and on
        which `devices`.
    """
    _check(bank)
    if len(bank) < ENOUGH:
        logger.warning(
            "A pilot of %d images says little of how clearly models must agree to speak for others; take %d or more.",
            len(bank),
            ENOUGH,
        )
    count = Pilot.whole(len(bank.ingredients))
    singles = bank.score(np.eye(len(bank.ingredients)))
    best = np.argsort(-singles, kind="stable")[:count]
    leading = [bank.ingredients.ids[one] for one in sorted(best)]
    request = {**bank.request, "split": bank.split}
    first = compute_logits(bank.ingredients.select(leading), **{**request, "pilot": Chosen()})
    _check_images(bank, first)
    passes = len(bank.ingredients) * len(bank) / bank.samples + count
    took = spent(bank.folder, bank.ingredients) + spent(first.folder, first.ingredients)
    about = {**bank.about["pilot"], "given": len(bank.ingredients), "leading": count, "drawn": len(bank)}
    if count == len(bank.ingredients):
        found, margin = first, None
    else:
        others = bank.ingredients.select([name for name in bank.ingredients.ids if name not in leading])
        found, margin, more, longer = _with_others(bank, first, others, request)
        passes, took = passes + more, took + longer
    remarks = tuple(dict.fromkeys((*bank.remarks, *found.remarks)))
    lost = [name for name in wanted if name not in found.ingredients.ids]
    if lost:
        why = next((text for name, text in remarks if name == lost[0]), "is left out of the soup.")
        raise ValueError(f"{lost[0]}, which a recipe uses or is the start, {why}")
    if len(found.ingredients) < 2:
        raise ValueError(f"A soup needs two ingredients; {len(found.ingredients)} are left: {_told(remarks)}")
    whole, rest = (found.partly.whole, found.partly.rest) if found.partly else (found.ingredients.ids, ())
    about |= {"whole": list(whole), "shown": found.samples - len(rest), "margin": margin, "passes": passes}
    about |= {"seconds": took.seconds, "devices": sorted(took.devices)}
    return replace(found, remarks=remarks), about


def _check(bank: LogitBank) -> None:
    """Raises a ValueError if a pilot can't be completed, as far as that is known without running a model."""
    share = len(bank) / bank.samples
    if not on_main_process(lambda: bank.is_prunable() and bank.pruned().logits.nbytes <= share * pruning.MOST):
        raise ValueError(
            f"The logits in {bank.folder} are of a part of the split, and of too many classes that can win to say "
            "which images matter: compute them without pilot (--pilot)."
        )
    dataset = bank.request["dataset"]
    if isinstance(dataset, str) and dataset == OBJECT:
        raise ValueError(
            f"The logits in {bank.folder} are of a part of a Dataset object, and the rest takes the object again: "
            "call compute_logits with it and the same arguments; what is there is used."
        )
    as_computed(bank, the_accelerator())
    for one in bank.ingredients:
        one.download()
    if bank.about["data"]["name"] != OBJECT:  # an object's images are compared when they were seen
        on_main_process(lambda: source_of(bank.folder, bank.ingredients, bank.request) and None)


def _check_images(bank: LogitBank, first: LogitBank) -> None:
    """Raises a ValueError if the images are no longer those of the pilot."""
    names = ("samples", "blocks", "skipped")
    if (
        any(bank.about[name] != first.about[name] for name in names)
        or (first.labels[bank.places] != bank.labels).any()
    ):
        raise ValueError(
            f"The images have changed since the logits of a part of them were computed in {bank.folder}: compute them "
            "again."
        )


def _with_others(
    bank: LogitBank, first: LogitBank, others: Ingredients, request: dict[str, Any]
) -> tuple[LogitBank, float | None, float, Spent]:
    """The bank of all ingredients, of which the others see the telling images; the margin, and what it took."""
    if not len(first.ingredients):
        raise ValueError(f"The best of the ingredients can't be used: {_told(first.remarks)}")
    said, margins = on_main_process(lambda: agreed(first))
    asked = scoring.predict(bank.pruned(), monte_carlo(len(bank.ingredients), count=RECIPES, seed=0).weights)
    least = clear_margin(margins[bank.places], (asked != said[bank.places]).mean(axis=0))
    is_rest = margins >= least
    is_rest[bank.places] = False
    places, rest = np.setdiff1d(np.flatnonzero(~is_rest), bank.places), np.flatnonzero(is_rest)
    clear = bank.places[margins[bank.places] >= least]
    right = said[clear] == first.labels[clear]
    log({"pilot/images": len(bank) + len(places)}, images=len(bank))
    chosen = Chosen(places, tuple(map(tuple, first.about["blocks"])))
    told = compute_logits(others, **{**request, "pilot": chosen}) if len(places) else None
    usable = {*first.ingredients.ids, *(told.ingredients.ids if told else others.ids)}
    kept = bank.ingredients.select([name for name in bank.ingredients.ids if name in usable])
    remarks = [*first.remarks, *(told.remarks if told else ())]
    passes = len(others) * len(places) / first.samples
    took = spent(told.folder, told.ingredients) if told else Spent(0.0)
    singles: dict[str, np.ndarray] = {}
    while True:
        parts = [(replace(bank, ingredients=kept).pruned(), bank.places), (_decided(said[rest], len(kept)), rest)]
        if told:
            known = [
                np.asarray(first.logits(name)[places]) if name in first.ingredients.ids else told.logits(name)
                for name in kept.ids
            ]
            parts.append((prune(known), places))
        partly = Partly(rest, (*first.ingredients.ids, *singles), join(parts), clear, right, singles)
        found = replace(first, ingredients=kept, remarks=tuple(remarks), partly=partly)
        best = max(kept.ids, key=lambda name: _accuracy(found, name))
        if best in partly.whole or singles:
            return found, least if len(rest) else None, passes, took
        # the best single model is the one to beat: of it nothing is assumed. One that is only estimated to be better
        # after that is one of several that were lucky on a sample
        classes, more = _on_all(found, best)
        passes, took = passes + len(rest) / first.samples, took + more
        if (classes < 0).any():
            remarks.append((best, NOT_FINITE))
            kept = kept.select([name for name in kept.ids if name != best])
        else:
            singles = {**singles, best: classes}


def _alone(bank: LogitBank, name: str) -> np.ndarray:
    return bank.predict(bank.row(Recipe.uniform([name])))


def _accuracy(bank: LogitBank, name: str) -> float:
    """Of an ingredient on all images, as far as it is known."""
    hits = _alone(bank, name) == bank.labels
    partly = bank.partly
    return float(hits.mean()) if partly is None or name in partly.whole else partly.estimate(hits)[0]


def _on_all(bank: LogitBank, name: str) -> tuple[np.ndarray, Spent]:
    """The classes that an ingredient predicts, on the rest of the images measured, `(samples,)`, -1 for none; and what
    that took.
    """
    assert bank.partly is not None
    rest = np.zeros(len(bank), dtype=bool)
    rest[bank.partly.rest] = True
    trial = trial_of(bank, Recipe.uniform([name]))
    with progress_bar(total=int(rest.sum()), desc="The best single model", unit="image") as bar:
        classes = np.where(rest, trial.look(rest, on_block=bar.update), _alone(bank, name))
    seconds, device = trial.took(int(rest.sum()))
    return classes, Spent(seconds, frozenset(filter(None, [device])))


def _told(remarks: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {text}" for name, text in remarks)


def agreed(bank: LogitBank) -> tuple[np.ndarray, np.ndarray]:
    """What all models of a bank predict, and the least margin to the next class; 0 where they don't agree.

    Returns:
        classes and margins, `(samples,)` each.
    """
    said, margins = np.zeros(len(bank), dtype=np.int64), np.full(len(bank), np.inf)
    step = max(1, AT_ONCE // len(bank.classes))
    for place in range(len(bank.ingredients)):
        logits = bank.logits(place)
        for start in range(0, len(bank), step):
            some = slice(start, start + step)
            part = np.asarray(logits[some], dtype=np.float32)
            best = part.argmax(axis=1)
            ahead = np.sort(np.partition(part, -2, axis=1)[:, -2:], axis=1)
            said[some] = best if place == 0 else said[some]
            margins[some] = np.where(best == said[some], np.minimum(margins[some], ahead[:, 1] - ahead[:, 0]), 0.0)
    return said, margins


def clear_margin(margins: np.ndarray, astray: np.ndarray) -> float:
    """The least margin from which on recipes go astray in `ASTRAY` of their predictions at most; infinite if none is.

    Args:
        margins: of some images, `(samples,)`; 0 is none.
        astray: the share of recipes that predict something else, `(samples,)`.
    """
    order = np.argsort(-margins, kind="stable")
    sorted_margins = margins[order]
    rates = np.cumsum(astray[order]) / np.arange(1, len(order) + 1)
    is_last = np.append(np.diff(sorted_margins) < 0, True)  # of those with the same margin
    good = np.flatnonzero((rates <= ASTRAY) & is_last & (sorted_margins > 0))
    return float(sorted_margins[good[-1]]) if len(good) else np.inf


def _decided(classes: np.ndarray, models: int) -> Pruned:
    """Images of which one class each `(samples,)` is left."""
    count = len(classes)
    return Pruned(
        np.arange(count), np.ones(count, dtype=int), classes.astype(np.int32), np.zeros((models, 0), np.float32)
    )
