"""One better image classifier from many fine-tunes: model soups on a budget (RADIN, arXiv 2401.17790)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that `import hf_radin` loads no torch.
_HOMES = {
    "Ingredient": "ingredients.ingredient",
    "Ingredients": "ingredients.ingredient",
    "gather": "ingredients.gather",
    "inspect": "ingredients.gather",
    "Verdict": "ingredients.gather",
    "LogitBank": "logits.bank",
    "compute_logits": "logits.compute",
    "Estimate": "logits.cost",
    "estimate": "logits.cost",
    "Measurement": "recipes.recipe",
    "Changes": "metrics.changes",
    "Pull": "recipes.recipe",
    "Recipe": "recipes.recipe",
    "average": "soup.cook",
    "distill": "search.distill",
    "soup_changes": "search.reporter",
    "best_single": "search.radin",
    "greedy": "search.radin",
    "radin": "search.radin",
    "uniform": "search.radin",
    "Pilot": "images.sample",
    "Soup": "soup.soup",
    "SoupCallback": "training.callback",
    "push_soup_to_hub": "soup.soup",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from hf_radin.images.sample import Pilot as Pilot
    from hf_radin.ingredients.gather import Verdict as Verdict
    from hf_radin.ingredients.gather import gather as gather
    from hf_radin.ingredients.gather import inspect as inspect
    from hf_radin.ingredients.ingredient import Ingredient as Ingredient
    from hf_radin.ingredients.ingredient import Ingredients as Ingredients
    from hf_radin.logits.bank import LogitBank as LogitBank
    from hf_radin.logits.compute import compute_logits as compute_logits
    from hf_radin.logits.cost import Estimate as Estimate
    from hf_radin.logits.cost import estimate as estimate
    from hf_radin.metrics.changes import Changes as Changes
    from hf_radin.recipes.recipe import Measurement as Measurement
    from hf_radin.recipes.recipe import Pull as Pull
    from hf_radin.recipes.recipe import Recipe as Recipe
    from hf_radin.search.distill import distill as distill
    from hf_radin.search.radin import best_single as best_single
    from hf_radin.search.radin import greedy as greedy
    from hf_radin.search.radin import radin as radin
    from hf_radin.search.radin import uniform as uniform
    from hf_radin.search.reporter import soup_changes as soup_changes
    from hf_radin.soup.cook import average as average
    from hf_radin.soup.soup import Soup as Soup
    from hf_radin.soup.soup import push_soup_to_hub as push_soup_to_hub
    from hf_radin.training.callback import SoupCallback as SoupCallback


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
