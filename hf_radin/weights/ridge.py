"""Ridge regression from features to targets, from sums over images.

The penalty is chosen by generalised cross-validation (Golub, Heath and Wahba, Technometrics 1979), which takes one
eigendecomposition and no further fits, also where there are fewer images than features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_radin.weights.head import LinearLayer

# Penalties to choose from, relative to the mean eigenvalue of the features' covariance.
PENALTIES = 10.0 ** np.linspace(-9, 2, 45)


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over images, in float64, which are all that a ridge regression needs; those of two sets add up.

    Args:
        images: how many.
        features: `(features,)`.
        targets: `(classes,)`.
        products: of features with each other, `(features, features)`.
        crossed: of features with targets, `(features, classes)`.
        squares: of all targets.
    """

    images: int
    features: np.ndarray
    targets: np.ndarray
    products: np.ndarray
    crossed: np.ndarray
    squares: float

    @classmethod
    def of(cls, features: np.ndarray, targets: np.ndarray) -> Moments:
        """The sums over some images.

        Args:
            features: `(images, features)`.
            targets: float64 `(images, classes)`.
        """
        wide = features.astype(np.float64)
        squares = float(np.einsum("ic,ic->", targets, targets))
        return cls(len(wide), wide.sum(0), targets.sum(0), wide.T @ wide, wide.T @ targets, squares)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.images + other.images,
            self.features + other.features,
            self.targets + other.targets,
            self.products + other.products,
            self.crossed + other.crossed,
            self.squares + other.squares,
        )

    @property
    def centred(self) -> Moments:
        """The sums of what is left of features and targets without their means: the bias is not penalised."""
        mean, offset = self.features / self.images, self.targets / self.images
        return Moments(
            self.images,
            np.zeros_like(mean),
            np.zeros_like(offset),
            self.products - np.outer(self.features, mean),
            self.crossed - np.outer(self.features, offset),
            self.squares - float(self.targets @ offset),
        )


@dataclass(frozen=True, eq=False)
class Ridge:
    """A ridge regression, and what it was solved with.

    Args:
        layer: from features to targets.
        penalty: relative to the mean eigenvalue of the features' covariance.
        values: eigenvalues of the products of (centred) features, `(features,)`.
        vectors: their eigenvectors, in columns, `(features, features)`.
        mean: of the features, `(features,)`; zero without a bias.
    """

    layer: LinearLayer
    penalty: float
    values: np.ndarray
    vectors: np.ndarray
    mean: np.ndarray

    @property
    def strength(self) -> float:
        """The penalty as it is added to the eigenvalues."""
        return self.penalty * _scale(self.values)


def fit(moments: Moments, *, has_bias: bool = True, penalty: float | None = None) -> Ridge:
    """The ridge regression of targets on features.

    Args:
        moments: of the images.
        has_bias: whether there is a bias, which is not penalised.
        penalty: relative to the mean eigenvalue of the features' covariance; by default that of `PENALTIES` which
            generalised cross-validation finds best.
    """
    sums = moments.centred if has_bias else moments
    values, vectors = np.linalg.eigh(sums.products)
    values = values.clip(min=0)
    scale = _scale(values)
    turned = vectors.T @ sums.crossed  # (features, classes)
    if penalty is None:
        strengths = np.einsum("fc,fc->f", turned, turned)
        scores = [_score(sums, values, strengths, value * scale, has_bias) for value in PENALTIES]
        penalty = float(PENALTIES[::-1][np.argmin(scores[::-1])])  # of equal ones the largest
    weight = (vectors @ (turned / (values + penalty * scale)[:, None])).T
    mean = moments.features / moments.images if has_bias else np.zeros_like(moments.features)
    bias = moments.targets / moments.images - weight @ mean if has_bias else None
    return Ridge(LinearLayer(weight, bias), penalty, values, vectors, mean)


def _scale(values: np.ndarray) -> float:
    """The mean eigenvalue; of features that are all alike nothing is learnt."""
    return float(values.mean()) or 1.0


def _score(sums: Moments, values: np.ndarray, strengths: np.ndarray, penalty: float, has_bias: bool) -> float:
    """What a penalty leaves of the squared targets, by generalised cross-validation: less is better.

    Args:
        sums: centred, if there is a bias.
        values: eigenvalues of the products `(features,)`.
        strengths: of the targets along each eigenvector, squared, `(features,)`.
        penalty: that is added to the eigenvalues.
    """
    freedom = sums.images - has_bias - float((values / (values + penalty)).sum())
    if freedom < 1:  # it would go through all points
        return np.inf
    explained = float((strengths * (values + 2 * penalty) / (values + penalty) ** 2).sum())
    return sums.images * max(0.0, sums.squares - explained) / freedom**2
