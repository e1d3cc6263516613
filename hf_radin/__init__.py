"""One better image classifier from many fine-tunes: model soups on a budget (RADIN, arXiv 2401.17790)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that `import hf_radin` loads no torch.
_HOMES = {
    "Ingredient": "ingredients",
    "Ingredients": "ingredients",
    "gather": "vetting",
    "inspect": "vetting",
    "Verdict": "vetting",
    "LogitBank": "bank",
    "compute_logits": "logits",
    "Estimate": "cost",
    "estimate": "cost",
    "Measurement": "recipe",
    "Recipe": "recipe",
    "average": "cook",
    "best_single": "search",
    "greedy": "search",
    "radin": "search",
    "uniform": "search",
    "Pilot": "sample",
    "Soup": "soup",
    "push_soup_to_hub": "soup",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from hf_radin.bank import LogitBank as LogitBank
    from hf_radin.cook import average as average
    from hf_radin.cost import Estimate as Estimate
    from hf_radin.cost import estimate as estimate
    from hf_radin.ingredients import Ingredient as Ingredient
    from hf_radin.ingredients import Ingredients as Ingredients
    from hf_radin.logits import compute_logits as compute_logits
    from hf_radin.recipe import Measurement as Measurement
    from hf_radin.recipe import Recipe as Recipe
    from hf_radin.sample import Pilot as Pilot
    from hf_radin.search import best_single as best_single
    from hf_radin.search import greedy as greedy
    from hf_radin.search import radin as radin
    from hf_radin.search import uniform as uniform
    from hf_radin.soup import Soup as Soup
    from hf_radin.soup import push_soup_to_hub as push_soup_to_hub
    from hf_radin.vetting import Verdict as Verdict
    from hf_radin.vetting import gather as gather
    from hf_radin.vetting import inspect as inspect


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
