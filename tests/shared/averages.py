"""The average of loaded models, also where that of files would do: both have to give the same bits."""

import torch

from hf_radin.checkpoints.files import as_dtype, torch_dtype
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.recipes.recipe import Recipe
from hf_radin.weights.average import average_of_models, by_content, open_weights
from hf_radin.weights.average_files import are_alike, widest


def average_loaded(ingredients: Ingredients, recipe: Recipe, dtype: str | None = None) -> dict[str, torch.Tensor]:
    """What `hf_radin.average` would return of these ingredients if their files could not be averaged."""
    used, recipe = by_content(ingredients, recipe)
    with open_weights(used) as files:
        target = as_dtype(dtype) if dtype else torch_dtype(widest(files))
        return average_of_models(used, files, recipe, target).state_dict()


def are_averaged_as_files(ingredients: Ingredients) -> bool:
    with open_weights(ingredients) as files:
        return are_alike(ingredients, files)
