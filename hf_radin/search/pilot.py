"""After a pilot: which images tell recipes apart, so that most models need no logits of the others.

Where the best single models agree by a wide margin, hardly any mix of the ingredients predicts something else. How
wide it has to be, the pilot's images say, which all models have seen. A few models are run on all images; the others
where these don't agree so clearly. All other images count as decided: what was assumed there is the same for all
recipes, so that it ranks none above another, and of each soup that is measured a random sample of them is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_radin.images.sample import ENOUGH, Chosen, Pilot
from hf_radin.images.split import OBJECT
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.logits.bank import LogitBank, PartialLogits
from hf_radin.logits.bank_files import Spent
from hf_radin.logits.compute import NOT_FINITE, extend_bank
from hf_radin.logits.manifest import is_object, reopen_images
from hf_radin.recipes import scoring
from hf_radin.recipes.propose import monte_carlo
from hf_radin.recipes.pruning import Pruned, join, prune
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.processes import progress_bar
from hf_radin.search.measure import measured_soup
from hf_radin.soup.report import PilotReport

logger = logging.getLogger(__name__)

# Of the predictions that recipes make where the leading models agree clearly, so many may be different ones.
ASTRAY = 0.001

# Random recipes whose predictions are compared.
RECIPES = 200

# How many logits of a model are looked at together.
AT_ONCE = 1 << 22


def complete(bank: LogitBank, wanted: Collection[str] = ()) -> tuple[LogitBank, PilotReport]:
    """The bank of all images of a pilot's ingredients, with the logits that matter, and what to report of the pilot.

    Args:
        bank: of a pilot.
        wanted: ids of ingredients that must not be lost.

    Raises:
        ValueError: if too many classes can win, the images or the precision are not those of the pilot, an ingredient
            in `wanted` gives a logit that is no finite number, or too few are left that don't.
    """
    _check(bank)
    count = len(bank.ingredients)
    # with all logits soups are exact and take no pass, and one pass of the body that models share gives them all
    leaders = count if bank.exact else Pilot.whole(count)
    if len(bank) < ENOUGH:
        logger.warning(
            "A pilot of %d images is too small to tell how clearly models must agree; use %d or more.",
            len(bank),
            ENOUGH,
        )
    singles = bank.score(np.eye(count))
    best = np.argsort(-singles, kind="stable")[:leaders]
    leading = [bank.ingredients.ids[position] for position in sorted(best)]
    first = _extended(bank, bank.ingredients.select(leading), None)
    _check_images(bank, first)
    cost = _Cost(
        count * len(bank) / bank.samples + leaders,
        bank.spent + first.spent,
    )
    completed, margin = first, None
    if leaders < count:
        others = bank.ingredients.select([name for name in bank.ingredients.ids if name not in leading])
        completed, margin, further = _with_others(bank, first, others)
        cost = cost.plus(further.passes, further.spent)
    completed = replace(completed, remarks=tuple(dict.fromkeys((*bank.remarks, *completed.remarks))))
    _check_left(completed, wanted)
    partial = completed.partial
    unseen = 0 if partial is None else len(partial.unseen)
    pilot = bank.manifest.pilot
    report = PilotReport(
        share=pilot.share if pilot else len(bank) / bank.samples,
        seed=pilot.seed if pilot else 0,
        given=count,
        leading=leaders,
        drawn=len(bank),
        whole=completed.ingredients.ids if partial is None else partial.complete,
        shown=completed.samples - unseen,
        margin=margin,
        passes=cost.passes,
        seconds=cost.spent.seconds,
        devices=tuple(sorted(cost.spent.devices)),
    )
    return completed, report


@dataclass(frozen=True)
class _Cost:
    """What logits took."""

    passes: float
    spent: Spent

    def plus(self, passes: float, spent: Spent) -> _Cost:
        """With further work."""
        return _Cost(self.passes + passes, self.spent + spent)


@dataclass(frozen=True, eq=False)
class _Agreement:
    """What the leading models predict, and by how much they agree, on the images of a split.

    Args:
        classes: predicted by the first of them, `(samples,)`.
        margins: the least margin to the next class; 0 where they don't agree, `(samples,)`.
        least: the margin from which on hardly any recipe predicts something else.
    """

    classes: np.ndarray
    margins: np.ndarray
    least: float

    @property
    def is_clear(self) -> np.ndarray:
        """Where they agree clearly: bool `(samples,)`."""
        return self.margins >= self.least


def agreed(bank: LogitBank) -> tuple[np.ndarray, np.ndarray]:
    """What all models of a bank predict, and the least margin to the next class; 0 where they don't agree.

    Returns:
        classes and margins, `(samples,)` each.
    """
    classes, margins = np.zeros(len(bank), dtype=np.int64), np.full(len(bank), np.inf)
    step = max(1, AT_ONCE // len(bank.classes))
    for position in range(len(bank.ingredients)):
        logits = bank.logits(position)
        for start in range(0, len(bank), step):
            block = slice(start, start + step)
            values = np.asarray(logits[block], dtype=np.float32)
            best = values.argmax(axis=1)
            highest = np.sort(np.partition(values, -2, axis=1)[:, -2:], axis=1)
            classes[block] = best if position == 0 else classes[block]
            least = np.minimum(margins[block], highest[:, 1] - highest[:, 0])
            margins[block] = np.where(best == classes[block], least, 0.0)
    return classes, margins


def clear_margin(margins: np.ndarray, astray: np.ndarray) -> float:
    """The least margin from which on recipes go astray in `ASTRAY` of their predictions at most; infinite if none is.

    Args:
        margins: of images, `(samples,)`; 0 is none.
        astray: the share of recipes that predict something else, `(samples,)`.
    """
    order = np.argsort(-margins, kind="stable")
    sorted_margins = margins[order]
    rates = np.cumsum(astray[order]) / np.arange(1, len(order) + 1)
    is_last = np.append(np.diff(sorted_margins) < 0, True)  # of those with the same margin
    good = np.flatnonzero((rates <= ASTRAY) & is_last & (sorted_margins > 0))
    return float(sorted_margins[good[-1]]) if len(good) else np.inf


def _check(bank: LogitBank) -> None:
    """Refuse a pilot that can't be completed, as far as that is known without running a model.

    Raises:
        ValueError: if it can't.
    """
    share, decide = len(bank) / bank.samples, bank.processes.decide
    if not decide(lambda: bank.is_prunable() and bank.pruned().logits.nbytes <= share * bank.most_pruned):
        raise ValueError(
            f"The logits in {bank.folder} are of a part of the split, and of too many classes that can win to say "
            "which images matter: compute them without pilot (--pilot)."
        )
    if is_object(bank.source):
        raise ValueError(
            f"The logits in {bank.folder} are of a part of a Dataset object, and the other images take the object "
            "again: call compute_logits with it and the same arguments; what is there is used."
        )
    bank.passes()  # refuses another precision
    for ingredient in bank.ingredients:
        ingredient.download()
    if bank.manifest.data.name != OBJECT:  # an object's images are compared when they were seen
        decide(lambda: reopen_images(bank.folder, bank.ingredients, bank.source) and None)


def _check_images(bank: LogitBank, first: LogitBank) -> None:
    """Refuse images that are no longer those of the pilot.

    Raises:
        ValueError: if they are others.
    """
    names = ("samples", "blocks", "skipped")
    changed = any(getattr(bank.manifest, name) != getattr(first.manifest, name) for name in names)
    if changed or (first.labels[bank.places] != bank.labels).any():
        raise ValueError(
            f"The images have changed since the logits of a part of them were computed in {bank.folder}: compute them "
            "again."
        )


def _check_left(bank: LogitBank, wanted: Collection[str]) -> None:
    """Refuse a bank that has lost ingredients that must not be lost, or nearly all.

    Raises:
        ValueError: if it has.
    """
    lost = [name for name in wanted if name not in bank.ingredients.ids]
    if lost:
        reason = next((text for name, text in bank.remarks if name == lost[0]), "is left out of the soup.")
        raise ValueError(f"{lost[0]}, which a recipe uses or is the start, {reason}")
    if len(bank.ingredients) < 2:
        remarks = _joined(bank.remarks)
        raise ValueError(f"A soup needs two ingredients; {len(bank.ingredients)} are left: {remarks}")


def _extended(bank: LogitBank, ingredients: Ingredients, chosen: Chosen | None) -> LogitBank:
    """The logits of ingredients on chosen images of the bank's split, or on all."""
    extended = extend_bank(ingredients, bank.source.at(bank.split), bank.options, bank.processes, sample=chosen)
    return replace(extended, most_pruned=bank.most_pruned, exact=bank.exact)


def _with_others(bank: LogitBank, first: LogitBank, others: Ingredients) -> tuple[LogitBank, float | None, _Cost]:
    """The bank of all ingredients, of which the others see the telling images; the margin, and what it took.

    Args:
        bank: of the pilot.
        first: of the leading ingredients, on all images.
    """
    if not len(first.ingredients):
        raise ValueError(f"The best of the ingredients can't be used: {_joined(first.remarks)}")
    agreement = _agreement(bank, first)
    is_unseen = agreement.is_clear.copy()
    is_unseen[bank.places] = False
    places, unseen = np.setdiff1d(np.flatnonzero(~is_unseen), bank.places), np.flatnonzero(is_unseen)
    bank.processes.log({"pilot/images": len(bank) + len(places)}, images=len(bank))
    telling = _extended(bank, others, Chosen(places, first.manifest.blocks)) if len(places) else None
    cost = _Cost(len(others) * len(places) / first.samples, Spent())
    remarks = list(first.remarks)
    if telling is not None:
        cost = cost.plus(0.0, telling.spent)
        remarks += telling.remarks
    usable = {*first.ingredients.ids, *(telling.ingredients.ids if telling else others.ids)}
    ingredients = bank.ingredients.select([name for name in bank.ingredients.ids if name in usable])
    clear = bank.places[agreement.margins[bank.places] >= agreement.least]
    right = agreement.classes[clear] == first.labels[clear]
    singles: dict[str, np.ndarray] = {}
    while True:
        parts = [
            (replace(bank, ingredients=ingredients).pruned(), bank.places),
            (_decided(agreement.classes[unseen], len(ingredients)), unseen),
        ]
        if telling is not None:
            telling_logits = _telling_logits(first, telling, ingredients, places)
            parts.append((prune(telling_logits, most=bank.most_pruned), places))
        partial = PartialLogits(unseen, (*first.ingredients.ids, *singles), join(parts), clear, right, singles)
        completed = replace(first, ingredients=ingredients, remarks=tuple(remarks), partial=partial)
        best = max(ingredients.ids, key=lambda name: _accuracy(completed, name))
        if best in partial.complete or singles:
            return completed, agreement.least if len(unseen) else None, cost
        # the best single model is the one to beat: of it nothing is assumed. A model that is only estimated to be
        # better after that is one of several that were lucky on a sample
        classes, spent = _on_all(completed, best)
        cost = cost.plus(len(unseen) / first.samples, spent)
        if (classes < 0).any():
            remarks.append((best, NOT_FINITE))
            ingredients = ingredients.select([name for name in ingredients.ids if name != best])
        else:
            singles = {**singles, best: classes}


def _agreement(bank: LogitBank, first: LogitBank) -> _Agreement:
    """What the leading ingredients agree on, and how clearly they have to, by a pilot's images."""
    classes, margins = bank.processes.decide(lambda: agreed(first))
    recipes = monte_carlo(len(bank.ingredients), count=RECIPES, seed=0).weights
    astray = (scoring.predict(bank.pruned(), recipes) != classes[bank.places]).mean(axis=0)
    return _Agreement(classes, margins, clear_margin(margins[bank.places], astray))


def _telling_logits(
    first: LogitBank, telling: LogitBank, ingredients: Ingredients, places: np.ndarray
) -> list[np.ndarray]:
    """Of each ingredient the logits of the telling images `(images, classes)`."""
    return [
        np.asarray(first.logits(name)[places]) if name in first.ingredients.ids else telling.logits(name)
        for name in ingredients.ids
    ]


def _alone(bank: LogitBank, name: str) -> np.ndarray:
    """The classes that an ingredient predicts, `(samples,)`."""
    return bank.predict(bank.row(Recipe.uniform([name])))


def _accuracy(bank: LogitBank, name: str) -> float:
    """Of an ingredient on all images, as far as it is known."""
    hits = _alone(bank, name) == bank.labels
    partial = bank.partial
    return float(hits.mean()) if partial is None or name in partial.complete else partial.estimate(hits)[0]


def _on_all(bank: LogitBank, name: str) -> tuple[np.ndarray, Spent]:
    """The classes that an ingredient predicts, measured on unseen images, and what that took.

    Returns:
        classes `(samples,)`, -1 for none, and the time.
    """
    assert bank.partial is not None
    unseen = np.zeros(len(bank), dtype=bool)
    unseen[bank.partial.unseen] = True
    soup = measured_soup(bank, Recipe.uniform([name]))
    with progress_bar(total=int(unseen.sum()), desc="The best single model", unit="image") as bar:
        classes = np.where(unseen, soup.look(unseen, on_block=bar.update), _alone(bank, name))
    return classes, Spent.on(*soup.took(int(unseen.sum())))


def _joined(remarks: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {text}" for name, text in remarks)


def _decided(classes: np.ndarray, models: int) -> Pruned:
    """Images of which one class each `(samples,)` is left."""
    count = len(classes)
    return Pruned(
        np.arange(count), np.ones(count, dtype=int), classes.astype(np.int32), np.zeros((models, 0), np.float32)
    )
