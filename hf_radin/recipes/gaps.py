"""What measured soups tell of all others: how far a soup's logits are from those of its ensemble.

To second order a model's logits are a quadratic function of its weights, and a soup of the weights w_p = sum_i p_i w_i
then differs from its ensemble by

    soup_p - ensemble_p = -1/2 tr(H S_p),    S_p = sum_i p_i (w_i - w_p)(w_i - w_p)',

for each image and class with a curvature H of its own, that no recipe changes. So gaps are linear in S_p, the spread
of the ingredients about the soup. If of H no more is known than that its entries are as likely of either sign, and
that it may be the same in all directions, the gaps of two recipes p and q have the covariance

    <S_p, S_q> + c tr(S_p) tr(S_q),

which the products of all pairs of ingredients give, and the best linear prediction of a gap from those of measured
soups (simple kriging, as of a Gaussian process) is a sum of these, with factors that are the same for all images and
classes. A predicted soup is a sum of the ingredients' logits and the measured gaps: it is scored as ensembles are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hf_radin.recipes.ensemble import in_order
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.scoring import count_hits

# What of a gap's variance is of higher order, and says nothing about other recipes.
NOISE = 0.05


@dataclass(frozen=True, eq=False)
class Gaps:
    """Gaps of measured soups, and what they say of the soups of other recipes.

    Args:
        products: of all pairs of ingredients, as they lie to their mean, `(models, models)`: see `kinship.products`.
        pruned: the classes that can win, with the ingredients' logits and, below them, the gaps of measured soups:
            `(models + measured, entries)`.
        recipes: of the measured soups, `(measured, models)`.
    """

    products: np.ndarray
    pruned: Pruned
    recipes: np.ndarray

    @classmethod
    def none(cls, products: np.ndarray, pruned: Pruned) -> Gaps:
        """Before a soup was measured: every prediction is the ensemble."""
        return cls(products, pruned, np.zeros((0, len(products))))

    def learn(self, recipe: np.ndarray, values: np.ndarray) -> Gaps:
        """These and that of one soup more.

        Args:
            recipe: `(models,)`.
            values: the soup's logits where the ingredients' are kept, `(entries,)`; of images that it was not shown
                they are no finite numbers, and it has the gaps there that were predicted: they teach nothing.
        """
        logits = self.pruned.logits
        ensemble = in_order(recipe[None], logits[: len(recipe), None])[0]
        predicted = in_order(self.sums(recipe[None]), logits[:, None])[0]
        gap = np.where(np.isfinite(values), values, predicted) - ensemble
        known = replace(self.pruned, logits=np.concatenate([logits, gap[None].astype(logits.dtype)]))
        return replace(self, pruned=known, recipes=np.concatenate([self.recipes, recipe[None]]))

    def score(self, labels: np.ndarray, recipes: np.ndarray) -> np.ndarray:
        """The accuracy that soups of these recipes `(recipes, models)` are predicted to have: `(recipes,)`."""
        return count_hits(self.pruned, labels, self.sums(recipes)) / len(labels)

    def sums(self, recipes: np.ndarray) -> np.ndarray:
        """Of which ingredients and gaps the soups of these recipes are predicted: `(recipes, models + measured)`."""
        if not len(self.recipes):
            return recipes
        known = covariance(self.products, self.recipes, self.recipes)
        # the last term is for ingredients that are all alike: no soup has a gap there
        known += np.diag(NOISE * known.diagonal() + np.finfo(float).eps)
        factors = np.linalg.solve(known, covariance(self.products, self.recipes, recipes))
        return np.concatenate([recipes, factors.T], axis=1)


def covariance(products: np.ndarray, recipes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of the gaps of recipes `(recipes, models)` with those of others `(others, models)`: `(recipes, others)`.

    Both terms count the same for the soup of all ingredients in equal parts.
    """
    alike = np.full((1, len(products)), 1 / len(products))
    largest = _trace(products, alike)[0] ** 2
    share = _product(products, alike, alike)[0, 0] / max(largest, np.finfo(float).tiny)
    return _product(products, recipes, others) + share * np.outer(_trace(products, recipes), _trace(products, others))


def _product(products: np.ndarray, recipes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """<S_p, S_q>, where (w_i - w_p)'(w_j - w_q) is squared and multiplied out."""
    to_recipes, to_others = recipes @ products, others @ products  # (recipes, models), (others, models)
    found = recipes @ products**2 @ others.T - recipes @ (to_others**2).T - to_recipes**2 @ others.T
    return found + (to_recipes @ others.T) ** 2


def _trace(products: np.ndarray, recipes: np.ndarray) -> np.ndarray:
    """tr S_p, the mean square distance of the ingredients to the soup: `(recipes,)`."""
    return recipes @ products.diagonal() - np.einsum("ri,ij,rj->r", recipes, products, recipes)
