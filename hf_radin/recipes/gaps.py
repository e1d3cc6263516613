"""What measured soups tell about all others: how far a soup's logits are from those of its ensemble.

To second order a model's logits are a quadratic function of its weights, and a soup of the weights w_p = sum_i p_i w_i
then differs from its ensemble by

    soup_p - ensemble_p = -1/2 tr(H S_p),    S_p = sum_i p_i (w_i - w_p)(w_i - w_p)',

where each image and class has its curvature H, which no recipe changes. So gaps are linear in S_p, the spread of the
ingredients about the soup. If nothing more is known about H than that its entries are as likely of either sign, and
that it may be the same in all directions, the gaps of two recipes p and q have the covariance

    <S_p, S_q> + c tr(S_p) tr(S_q),

which follows from the products of all pairs of ingredients. The best linear prediction of a gap from the gaps of
measured soups (simple kriging, as in a Gaussian process) is a sum of these, with factors that are the same for all
images and classes. A predicted soup is a sum of the ingredients' logits and the measured gaps: it is scored as
ensembles are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_radin.recipes.ensemble import mix_in_order
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.scoring import count_hits

# The share of a gap's variance that is of higher order, and says nothing about other recipes.
NOISE = 0.05


@dataclass(frozen=True, eq=False)
class Gaps:
    """Gaps of measured soups, and the soups of other recipes that they predict.

    Args:
        products: of all pairs of ingredients about their mean, `(models, models)`: see `kinship.inner_products`.
        pruned: the classes that can win, with the ingredients' logits and, below them, the gaps of measured soups:
            `(models + measured, entries)`.
        recipes: of the measured soups, `(measured, models)`.
        noise: the share of a gap's variance that says nothing about other recipes.
    """

    products: np.ndarray
    pruned: Pruned
    recipes: np.ndarray
    noise: float = NOISE

    @classmethod
    def none(cls, products: np.ndarray, pruned: Pruned, *, noise: float = NOISE) -> Gaps:
        """Before any soup is measured: every prediction is the ensemble."""
        return cls(products, pruned, np.zeros((0, len(products))), noise)

    def learn(self, recipe: np.ndarray, values: np.ndarray) -> Gaps:
        """These gaps and that of one more soup.

        Args:
            recipe: `(models,)`.
            values: the soup's logits of the entries that `pruned` has, `(entries,)`. They are not finite for images
                that it was not shown: its gaps there are taken to be the predicted ones, which teach nothing.
        """
        logits = self.pruned.logits
        ensemble = mix_in_order(recipe[None], logits[: len(recipe), None])[0]
        predicted = mix_in_order(self.sums(recipe[None]), logits[:, None])[0]
        gap = np.where(np.isfinite(values), values, predicted) - ensemble
        pruned = replace(self.pruned, logits=np.concatenate([logits, gap[None].astype(logits.dtype)]))
        return replace(self, pruned=pruned, recipes=np.concatenate([self.recipes, recipe[None]]))

    def score(self, labels: np.ndarray, recipes: np.ndarray) -> np.ndarray:
        """The accuracy that soups of these recipes `(recipes, models)` are predicted to have: `(recipes,)`."""
        return count_hits(self.pruned, labels, self.sums(recipes)) / len(labels)

    def sums(self, recipes: np.ndarray) -> np.ndarray:
        """The factors of ingredients and gaps in the predicted soups of recipes: `(recipes, models + measured)`."""
        if not len(self.recipes):
            return recipes
        measured = covariance(self.products, self.recipes, self.recipes)
        # the last term is for ingredients that are all alike: no soup has a gap there
        measured += np.diag(self.noise * measured.diagonal() + np.finfo(float).eps)
        factors = np.linalg.solve(measured, covariance(self.products, self.recipes, recipes))
        return np.concatenate([recipes, factors.T], axis=1)


def covariance(products: np.ndarray, recipes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The covariance of the gaps of recipes `(recipes, models)` and `(others, models)`: `(recipes, others)`.

    Both terms count the same for the soup of all ingredients in equal parts.
    """
    uniform = np.full((1, len(products)), 1 / len(products))
    largest = _trace(products, uniform)[0] ** 2
    share = spread_products(products, uniform, uniform)[0, 0] / max(largest, np.finfo(float).tiny)
    return spread_products(products, recipes, others) + share * np.outer(
        _trace(products, recipes), _trace(products, others)
    )


def spread_products(products: np.ndarray, recipes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """<S_p, S_q> `(recipes, others)`, where (w_i - w_p)'(w_j - w_q) is squared and multiplied out."""
    to_recipes, to_others = recipes @ products, others @ products  # (recipes, models), (others, models)
    squares = recipes @ products**2 @ others.T - recipes @ (to_others**2).T - to_recipes**2 @ others.T
    return squares + (to_recipes @ others.T) ** 2


def logit_products(logits: Sequence[np.ndarray], *, at_once: int) -> np.ndarray:
    """Inner products of all pairs of models, as differences from their mean, by what they say: `(models, models)`.

    Where weights are not known these stand for theirs (`kinship.inner_products`), and are scaled alike: near a common
    start logits are linear in the weights.

    Args:
        logits: of each model `(samples, classes)`.
        at_once: samples that are read at a time.
    """
    products = np.zeros((len(logits), len(logits)))
    for start in range(0, len(logits[0]), at_once):
        block = np.stack([np.asarray(array[start : start + at_once], dtype=np.float64) for array in logits])
        block -= block.mean(axis=2, keepdims=True)  # what is added to all classes makes no difference
        block -= block.mean(axis=0)
        flat = block.reshape(len(block), -1)
        products += flat @ flat.T
    return products / max(products.trace() / len(products), np.finfo(float).tiny)


def _trace(products: np.ndarray, recipes: np.ndarray) -> np.ndarray:
    """tr S_p, the mean square distance of the ingredients to the soup: `(recipes,)`."""
    return recipes @ products.diagonal() - np.einsum("ri,ij,rj->r", recipes, products, recipes)
