"""Which ingredients deserve the logits of all images, by what a pilot's say."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from hf_radin.bank import LogitBank
from hf_radin.data import OBJECT
from hf_radin.evaluate import trial_of
from hf_radin.guide import Guide
from hf_radin.logits import compute_logits
from hf_radin.processes import log, on_main_process, progress_bar
from hf_radin.recipe import Recipe
from hf_radin.strata import Pilot

# So many of the best recipes say which ingredients are worth it, and the best single models are.
RECIPES, SINGLES = 30, 2


def narrow(
    bank: LogitBank, make_guide: Callable[[], Guide], kept: Collection[str]
) -> tuple[LogitBank, dict[str, Any]]:
    """The bank of all images of those ingredients of a pilot that the best soups are made of.

    The soup of all ingredients in equal parts is shown the pilot's contested images; by what that teaches, recipes are
    ranked on the pilot. Each ingredient counts by its weight in the best of them.

    Args:
        bank: of a pilot.
        make_guide: makes it, with the candidates.
        kept: ingredients that are kept whatever the pilot says.

    Raises:
        ValueError: if too many classes can win, or of an ingredient in `kept` a logit is no finite number.

    Returns:
        the bank, and what to say of the pilot: `share`, `seed`, how many ingredients were `given`, the ids
        `left_out`, and the `passes` that it took.
    """
    if not on_main_process(bank.is_prunable):
        raise ValueError(
            f"The logits in {bank.folder} are of a part of the split, and of too many classes that can win to say "
            "which ingredients are worth all images: compute them without pilot (--pilot)."
        )
    dataset = bank.request["dataset"]
    if isinstance(dataset, str) and dataset == OBJECT:
        raise ValueError(
            f"The logits in {bank.folder} are of a part of a Dataset object, and the rest takes the object again: "
            "call compute_logits with it and the same arguments; what is there is used."
        )
    pilot = bank.about["pilot"]
    recipe, contested = Recipe.uniform(bank.ingredients.ids), np.ones(len(bank), dtype=bool)
    contested[bank.pruned().decided] = False
    trial = trial_of(bank, recipe, bank.pruned())
    with progress_bar(total=int(contested.sum()), desc="Measuring soups", unit="image") as bar:
        trial.look(contested, on_block=bar.update)
    guide = make_guide()
    guide.learn(recipe, trial.values)
    names = _worthy(bank, guide, kept)
    request = {**bank.request, "pilot": None}
    whole = compute_logits(bank.ingredients.select(names), split=bank.split, **request)
    log({"pilot/ingredients": len(names)}, images=len(bank))
    share = len(bank) / bank.samples
    passes = {"logits": share * len(bank.ingredients), "soups": float(share * contested.mean())}
    if bank.statistics:
        passes["batchnorm"] = bank.statistics.about["images"] / bank.samples
    lost = [name for name in kept if name not in whole.ingredients.ids]
    if lost:
        why = next((text for name, text in whole.remarks if name == lost[0]), "is left out of the soup.")
        raise ValueError(f"{lost[0]}, which a recipe uses or is the start, {why}")
    about = {**pilot, "given": len(bank.ingredients), "passes": passes}
    about["left_out"] = [one for one in bank.ingredients.ids if one not in names]
    return replace(whole, remarks=tuple(dict.fromkeys((*bank.remarks, *whole.remarks)))), about


def _worthy(bank: LogitBank, guide: Guide, kept: Collection[str]) -> list[str]:
    """The ids of ingredients, as they stand in the bank."""
    singles = bank.score(np.eye(len(bank.ingredients)))
    first = [bank.ingredients.ids[one] for one in np.argsort(-singles, kind="stable")[:SINGLES]]
    weights = guide.leading(RECIPES).mean(axis=0)
    ranked = [bank.ingredients.ids[one] for one in np.argsort(-weights, kind="stable")]
    wanted = [*dict.fromkeys([*kept, *first, *ranked])]
    count = max(len({*kept, *first}), Pilot(**bank.about["pilot"]).whole(len(bank.ingredients)))
    return [name for name in bank.ingredients.ids if name in wanted[:count]]
