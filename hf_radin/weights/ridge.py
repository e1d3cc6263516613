"""Refit a head: ridge regression from a model's features to the logits of a teacher, from sums over images.

What is fitted is the difference of the teacher's logits and those of the head that the model has, so that the penalty
pulls towards that head and not towards zero. Where a model says what its teacher says already (equal ingredients, or
ingredients that differ in a linear head alone), nothing changes, however few images there are.

The penalty is chosen by generalised cross-validation (Golub, Heath and Wahba, Technometrics 1979), which takes one
eigendecomposition and no further fits, also where there are fewer images than features. Accuracies come from
cross-fitting: what is predicted for an image comes from a head, and a penalty, that the image had no part in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from hf_radin.weights.head import LinearLayer

# Parts that the images are divided into: each has its predictions from a head that the others made.
FOLDS = 5

# Penalties to choose from, relative to the mean eigenvalue of the features' covariance.
PENALTIES = 10.0 ** np.linspace(-9, 2, 45)

# Images that are added up at a time: what is summed in another order is rounded otherwise, so it is no option.
CHUNK = 1024

# Gives the teacher's logits `(rows, classes)` of images, by their rows among the features.
Teacher = Callable[[np.ndarray], np.ndarray]


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
class Refit:
    """A refitted head, and what refitted heads predict for images that they did not see.

    Args:
        layer: fitted to all images.
        penalty: that it was fitted with, of `PENALTIES`.
        predictions: the class of each image, from the head that was fitted to the other folds: `(images,)`.
    """

    layer: LinearLayer
    penalty: float
    predictions: np.ndarray


def draw_folds(contents: np.ndarray, *, seed: int = 0, folds: int = FOLDS) -> np.ndarray:
    """The fold of each image, `(images,)`. It depends on the image and the seed, and not on the order of the images.

    Args:
        contents: what tells images from others, `(images,)`: their digests, so that copies of one image are in one
            fold; or their positions, where digests are not known.
        seed: of the draw.

    Raises:
        ValueError: if there are fewer different images than folds.
    """
    different, place = np.unique(contents, return_inverse=True)
    if len(different) < folds:
        raise ValueError(
            f"A head is refitted in {folds} folds, and there are {len(different)} different images: name more of them."
        )
    numbers = np.empty(len(different), dtype=int)
    numbers[np.random.default_rng(seed).permutation(len(different))] = np.arange(len(different)) % folds
    return numbers[place]


def refit(
    features: np.ndarray,
    teacher: Teacher,
    layer: LinearLayer,
    contents: np.ndarray,
    *,
    seed: int = 0,
    penalty: float | None = None,
) -> Refit:
    """Refit a head to the logits of a teacher, without labels.

    What the head lacks of the teacher's logits is centred for each image: a number that is added to all of its logits
    changes no probability, but would be an error to the regression, by which the penalty is chosen.

    It takes `folds x (features^2 + features x classes) x 8` bytes, and half as much again while a fold is solved: 0.4
    GB for 2,048 features and 1,000 classes, and 3 GB for 21,841.

    Args:
        features: of the images, `(images, features)`; may be memory-mapped.
        teacher: gives logits of images.
        layer: the head that the model has.
        contents, seed: as in `draw_folds`. Sums are taken in the order of the contents, so that the order of the
            images changes nothing.
        penalty: of all fits, relative to the mean eigenvalue of the features' covariance; by default chosen by each.

    Raises:
        ValueError: if there are fewer different images than folds, or a feature is no finite number.
    """
    folds = draw_folds(contents, seed=seed)
    order = np.argsort(contents, kind="stable")
    rows_of = [order[folds[order] == fold] for fold in range(FOLDS)]
    parts = [_moments(features, teacher, layer, rows) for rows in rows_of]
    predictions = np.zeros(len(features), dtype=int)
    for fold, rows in enumerate(rows_of):
        others = reduce(add, (part for number, part in enumerate(parts) if number != fold))
        fitted = layer + fit(others, has_bias=layer.bias is not None, penalty=penalty)[0]
        for chunk in _chunks(rows):
            predictions[chunk] = fitted(features[chunk]).argmax(1)
    difference, chosen = fit(reduce(add, parts), has_bias=layer.bias is not None, penalty=penalty)
    return Refit(layer + difference, chosen, predictions)


def fit(moments: Moments, *, has_bias: bool = True, penalty: float | None = None) -> tuple[LinearLayer, float]:
    """The ridge regression of targets on features, and its penalty.

    Args:
        moments: of the images.
        has_bias: whether there is a bias, which is not penalised.
        penalty: relative to the mean eigenvalue of the features' covariance; by default that of `PENALTIES` which
            generalised cross-validation finds best.
    """
    sums = moments.centred if has_bias else moments
    values, vectors = np.linalg.eigh(sums.products)
    values = values.clip(min=0)
    scale = values.mean() or 1.0  # of features that are all alike nothing is learnt
    turned = vectors.T @ sums.crossed  # (features, classes)
    if penalty is None:
        strengths = np.einsum("fc,fc->f", turned, turned)
        scores = [_score(sums, values, strengths, value * scale, has_bias) for value in PENALTIES]
        penalty = float(PENALTIES[::-1][np.argmin(scores[::-1])])  # of equal ones the largest
    weight = (vectors @ (turned / (values + penalty * scale)[:, None])).T
    if not has_bias:
        return LinearLayer(weight), penalty
    return LinearLayer(weight, (moments.targets - weight @ moments.features) / moments.images), penalty


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


def _moments(features: np.ndarray, teacher: Teacher, layer: LinearLayer, rows: np.ndarray) -> Moments:
    """The sums over images, given by their rows; targets are what the head lacks of the teacher's logits.

    Raises:
        ValueError: if a feature is no finite number.
    """

    def of_chunk(chunk: np.ndarray) -> Moments:
        seen, logits = features[chunk], teacher(chunk).astype(np.float64)
        if not np.isfinite(seen).all():
            raise ValueError(
                "The soup's features are not all finite numbers, so that no head can be refitted to them. Run it in "
                "float32 (--dtype float32)."
            )
        lacking = logits - layer(seen)
        return Moments.of(seen, lacking - lacking.mean(1, keepdims=True))

    return reduce(add, map(of_chunk, _chunks(rows)))


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
