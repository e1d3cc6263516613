"""Banks of arrays that say what banks of checkpoints say."""

from dataclasses import replace
from typing import Any

import numpy as np

import hf_radin
from hf_radin.search.measure import measured_soup


class Evaluating:
    """What averages the checkpoints of a bank and shows them its images.

    Args:
        evaluated: the recipes that it was called with.
    """

    def __init__(self, bank: hf_radin.LogitBank):
        self.bank = bank
        self.evaluated: list[hf_radin.Recipe] = []

    def __call__(self, recipe: hf_radin.Recipe) -> np.ndarray:
        self.evaluated.append(recipe)
        whole = replace(self.bank, part=None)
        return measured_soup(whole, recipe.in_order(whole.by_content.ingredients.ids)).logits()[0]


def twin(bank: hf_radin.LogitBank, **options: Any) -> hf_radin.LogitBank:
    """A bank of arrays with the names, logits and labels of a bank of checkpoints."""
    logits = {name: bank.logits(name) for name in bank.ingredients.ids}
    options = {"classes": bank.classes, "split": bank.split, "evaluate": Evaluating(bank), **options}
    return hf_radin.LogitBank.from_arrays(logits, bank.labels, **options)
