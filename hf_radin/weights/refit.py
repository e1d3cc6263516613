"""Refit a head to the probabilities that a teacher gives the classes, without labels or with them.

First, ridge regression (see `ridge`) from a model's features to what its head lacks of the teacher's logits: that
gives a start, and a penalty. Then the cross-entropy to the teacher's probabilities is minimised: errors of logits
matter where classes are close, and squared ones count most where they are not. The penalty pulls towards the head that
the model has, and not towards zero: where it says what its teacher says already (equal ingredients, or ingredients
that differ in a linear head alone), nothing changes, however few images there are.

Accuracies come from cross-fitting: what is predicted for an image comes from a head, and a penalty, that the image had
no part in. The second step is taken if it brings such heads nearer to the teacher: few images may not be enough.

The labels of the images may have a part in what a head is taught. How large it is best, cross-fitting says: the more
images, the larger.

Multi-label, each class has a regression and a cross-entropy of its own, and they add up: of the logits as they are,
since a number that is added to all of an image changes all its probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.metrics.cross_entropy import compared, normalised, taught_probabilities
from hf_radin.metrics.multi_label import decisions_of
from hf_radin.weights.head import LinearLayer
from hf_radin.weights.ridge import Moments, Ridge, fit

if TYPE_CHECKING:
    import torch

# Parts that the images are divided into: each has its predictions from a head that the others made.
FOLDS = 5

# Images that are added up at a time: what is summed in another order is rounded otherwise, so it is no option.
CHUNK = 1024

# Bytes of features that are held as float64, since each of a hundred steps needs them again. What takes more is
# converted anew for each, a chunk at a time.
HELD = 64 << 20

# Steps to the least cross-entropy at most, how many of them are remembered, and what is no step any more. The unknowns
# are scaled so that images leave each of them a standard error of about 1.
STEPS, MEMORY, SMALL = 100, 8, 1e-3

# Shares of the labels in what a head is taught, if they have a part: those to choose from.
SHARES = (0.1, 0.25, 0.5)


@dataclass(frozen=True, eq=False)
class Refit:
    """A refitted head, and what refitted heads predict for images that they did not see.

    Args:
        layer: fitted to all images.
        penalty: that it was fitted with, as in `ridge.Ridge`.
        predictions: the class of each image `(images,)`, multi-label all decisions `(images, classes)`, from the head
            that was fitted to the other folds.
        folds: of the images, `(images,)`.
        layers: fitted without the images of each fold.
        labels: the share of the labels in what it was taught.
    """

    layer: LinearLayer
    penalty: float
    predictions: np.ndarray
    folds: np.ndarray
    layers: tuple[LinearLayer, ...]
    labels: float = 0.0

    def unseen_logits(self, features: np.ndarray) -> np.ndarray:
        """The logits of each image, from the head that was fitted to the other folds: float32 `(images, classes)`.

        Args:
            features: of the same images, in the same order.
        """
        logits = np.zeros((len(features), len(self.layer.weight)), np.float32)
        for fold, layer in enumerate(self.layers):
            rows = np.flatnonzero(self.folds == fold)
            logits[rows] = logits_of(layer, features, rows)
        return logits


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a head is taught.

    Args:
        features: of the images, `(images, features)`; may be memory-mapped.
        teacher: logits of the images, `(images, classes)`; may be memory-mapped.
        layer: the head that the model has.
        labels: of the images, `(images,)`, multi-label bool `(images, classes)`; None if they have no part.
        share: that labels have in the probabilities that are taught; the teacher has the rest.
        device: of torch, for sums over images; it takes float64.
        multi_label: whether an image may have any number of classes.
        memory: bytes of images in float64 that are held; more are made anew each time.
    """

    features: np.ndarray
    teacher: np.ndarray
    layer: LinearLayer
    labels: np.ndarray | None = None
    share: float = 0.0
    device: str = "cpu"
    multi_label: bool = False
    memory: int = HELD

    def at(self, share: float) -> Lesson:
        """The same with another share of the labels."""
        return replace(self, share=share)

    def wanted(self, rows: np.ndarray) -> torch.Tensor:
        """The probabilities that are taught, of images by their rows, float64 `(rows, classes)`."""
        labels = None if self.labels is None else self.labels[rows]
        return taught_probabilities(self._tensor(self.teacher[rows]), labels, self.share, multi_label=self.multi_label)

    def predictions(self, layer: LinearLayer, rows: np.ndarray) -> np.ndarray:
        """The classes that a head gives some images `(rows,)`, multi-label its decisions `(rows, classes)`."""
        logits = layer(self.features[rows])
        return decisions_of(logits) if self.multi_label else logits.argmax(1)

    def moments(self, rows: np.ndarray) -> Moments:
        """The sums over images, given by their rows; targets are what the head lacks of the teacher's logits.

        The targets are centred for each image: a number that is added to all of its logits changes no probability, but
        would be an error to the regression, by which the penalty is chosen. Multi-label it changes all, and they stay.

        Raises:
            ValueError: if a feature is no finite number.
        """

        def of_chunk(chunk: np.ndarray) -> Moments:
            features = self.features[chunk]
            if not np.isfinite(features).all():
                raise ValueError(
                    "The soup's features are not all finite numbers, so that no head can be refitted to them. Run it "
                    "in float32 (--dtype float32)."
                )
            lacking = self.teacher[chunk].astype(np.float64) - self.layer(features)
            return Moments.of(features, lacking if self.multi_label else lacking - lacking.mean(1, keepdims=True))

        return reduce(add, map(of_chunk, _chunks(rows)))

    def errors(self, layer: LinearLayer, rows: np.ndarray) -> Errors:
        """How far the probabilities of a head are from those that are taught, on some images."""
        weight, bias = self.tensors(layer)

        def of_chunk(chunk: np.ndarray) -> Errors:
            wanted = self.wanted(chunk)
            logits = self._tensor(self.features[chunk]) @ weight.T + bias
            entropies, errors = compared(logits, wanted, multi_label=self.multi_label)
            return Errors(entropies.sum(), (errors**2).sum() + (wanted * (1 - wanted)).sum())

        return reduce(add, map(of_chunk, _chunks(rows)))

    def sums(self, weight: torch.Tensor, bias: torch.Tensor, chunks: Iterable[torch.Tensor]) -> Sums:
        """Of the probabilities that a head with these weights and biases gives, on some images."""

        def of_chunk(features: torch.Tensor) -> Sums:
            logs, given = normalised(features @ weight.T + bias, multi_label=self.multi_label)
            return Sums(given.T @ features, given.sum(0), logs.sum())

        return reduce(add, map(of_chunk, chunks))

    def sums_of_wanted(self, rows: np.ndarray) -> Sums:
        """Of the probabilities that are taught, on some images."""

        def of_chunk(chunk: np.ndarray) -> Sums:
            wanted = self.wanted(chunk)
            return Sums(wanted.T @ self._tensor(self.features[chunk]), wanted.sum(0))

        return reduce(add, map(of_chunk, _chunks(rows)))

    def chunks(self, rows: np.ndarray) -> Iterator[torch.Tensor]:
        """Features of images by their rows, float64 `(images, features)`: made as one goes through them."""
        return (self._tensor(self.features[chunk]) for chunk in _chunks(rows))

    def is_held(self, rows: np.ndarray) -> bool:
        """Whether the chunks of some images are few enough to be held."""
        return len(rows) * self.features.shape[1] * 8 <= self.memory

    def tensors(self, layer: LinearLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of a head and its biases, zeros if it has none."""
        weight = self._tensor(layer.weight)
        return weight, weight.new_zeros(len(weight)) if layer.bias is None else self._tensor(layer.bias)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device).double()


@dataclass(frozen=True, eq=False)
class Errors:
    """Of a head's probabilities, in sums over images; those of two sets add up.

    Args:
        entropy: the cross-entropy, in nats.
        squares: squared errors as expected where the probabilities that are taught are the truth (the Brier score).
    """

    entropy: torch.Tensor
    squares: torch.Tensor

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.entropy + other.entropy, self.squares + other.squares)


@dataclass(frozen=True, eq=False)
class Sums:
    """Of probabilities, over images; those of two sets add up.

    Args:
        crossed: probabilities times features, `(classes, features)`.
        classes: probabilities, `(classes,)`.
        normalised: the logarithms of what a head's logits are normalised by, in one number.
    """

    crossed: torch.Tensor
    classes: torch.Tensor
    normalised: torch.Tensor | float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.crossed + other.crossed, self.classes + other.classes, self.normalised + other.normalised)


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
    lesson: Lesson,
    contents: np.ndarray,
    *,
    seed: int = 0,
    penalty: float | None = None,
    on_fit: Callable[[], object] = lambda: None,
) -> Refit:
    """Refit a head to a teacher.

    It takes `(5 features^2 + 30 features x classes) x 8` bytes: 0.7 GB for 2,048 features and 1,000 classes.

    Args:
        lesson: what the head is taught. If labels are to have a part, their share is that of `SHARES` with which heads
            give labels of images that they did not see the highest probabilities.
        contents, seed: as in `draw_folds`. Sums are taken in the order of the contents, so that the order of the
            images changes nothing.
        penalty: of all fits, relative to the mean eigenvalue of the features' covariance; by default chosen by each.
        on_fit: is called after each of the `FOLDS` + 1 fits.

    Raises:
        ValueError: if there are fewer different images than folds, or a feature is no finite number.
    """
    folds = draw_folds(contents, seed=seed)
    order = np.argsort(contents, kind="stable")
    parts = [_Part(lesson.moments(rows), rows) for rows in (order[folds[order] == fold] for fold in range(FOLDS))]
    taught = []
    for left_out in parts:
        taught.append(_teach(lesson, [part for part in parts if part is not left_out], penalty))
        on_fit()
    judging = lesson if lesson.labels is None else lesson.at(1.0)
    entropies = [
        [float(judging.errors(head, part.rows).entropy) for head in fold.heads]
        for fold, part in zip(taught, parts, strict=True)
    ]
    step = int(np.sum(entropies, axis=0).argmin())
    layers = tuple(fold.heads[step] for fold in taught)
    predictions = np.zeros(lesson.teacher.shape if lesson.multi_label else len(lesson.features), dtype=int)
    for layer_without, part in zip(layers, parts, strict=True):
        for chunk in _chunks(part.rows):
            predictions[chunk] = lesson.predictions(layer_without, chunk)
    final = _teach(lesson, parts, penalty)
    on_fit()
    share = 0.0 if lesson.labels is None else SHARES[step]
    return Refit(final.heads[step], final.penalty, predictions, folds, layers, share)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some images, by their rows, and the sums over them."""

    moments: Moments
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class _Taught:
    """Heads to choose from: those after either step, or one for each of `SHARES`; and the penalty of all."""

    heads: tuple[LinearLayer, ...]
    penalty: float


def _teach(lesson: Lesson, parts: Sequence[_Part], penalty: float | None) -> _Taught:
    """The heads that some images teach."""
    moments = reduce(add, (part.moments for part in parts))
    ridge = fit(moments, has_bias=lesson.layer.bias is not None, penalty=penalty)
    rows = np.concatenate([part.rows for part in parts])
    first = lesson.layer + ridge.layer
    if lesson.labels is None:
        return _Taught((first, least_entropy(lesson, ridge, rows, start=first)), ridge.penalty)
    return _Taught(least_entropies(lesson, ridge, rows, SHARES, start=first), ridge.penalty)


def least_entropy(lesson: Lesson, ridge: Ridge, rows: np.ndarray, *, start: LinearLayer) -> LinearLayer:
    """The head with the least cross-entropy to what is taught of some images, as in `least_entropies`."""
    return least_entropies(lesson, ridge, rows, (lesson.share,), start=start)[0]


def least_entropies(
    lesson: Lesson, ridge: Ridge, rows: np.ndarray, shares: Sequence[float], *, start: LinearLayer
) -> tuple[LinearLayer, ...]:
    """The heads with the least cross-entropy to what is taught of some images, with the penalty of a ridge regression.

    In a cross-entropy, squared errors of logits count as much as squared errors of probabilities say, on average over
    images and classes: those of the head that the model has, which has not seen the images. The penalty is given the
    same weight, that it may pull as hard as it did.

    Of what is taught, a cross-entropy needs the sums over images alone. Each head begins where the one before came to.

    Args:
        ridge: from the features of these images to what the head lacks.
        rows: of the images that teach.
        shares: that labels have in what is taught, one for each head.
        start: a head to begin from.
    """
    import torch

    lessons = [lesson.at(share) for share in shares]
    counts = [float(taught.errors(lesson.layer, rows).squares) / len(start.weight) / len(rows) for taught in lessons]
    if not counts[0]:  # the teacher has no doubt at all, and the model says the same
        return (start,) * len(shares)
    unknowns = _Unknowns.of(lesson, ridge, start, counts[0], len(rows))
    held = list(lesson.chunks(rows)) if lesson.is_held(rows) else None

    unknown, heads = unknowns.begun.clone().requires_grad_(), []

    def loss(wanted: Sums, pull: float) -> torch.Tensor:
        point = unknown.detach()
        weight, bias = unknowns.head(point)
        sums = lesson.sums(weight, bias, lesson.chunks(rows) if held is None else held)
        entropy = sums.normalised - (wanted.crossed * weight).sum() - (wanted.classes * bias).sum()
        change = point[:, :-1] * unknowns.scales
        unknown.grad = unknowns.slopes(sums.crossed - wanted.crossed, sums.classes - wanted.classes)
        unknown.grad[:, :-1] += pull * unknowns.scales * change
        return entropy + pull * (change**2).sum() / 2

    for taught, count in zip(lessons, counts, strict=True):
        torch.optim.LBFGS(
            [unknown],
            max_iter=STEPS,
            history_size=MEMORY,
            tolerance_grad=SMALL,
            tolerance_change=SMALL,
            line_search_fn="strong_wolfe",
        ).step(partial(loss, taught.sums_of_wanted(rows), count * ridge.strength))
        weight, bias = (tensor.cpu().numpy() for tensor in unknowns.head(unknown.detach()))
        heads.append(LinearLayer(weight, None if start.bias is None else bias))
    return tuple(heads)


@dataclass(frozen=True, eq=False)
class _Unknowns:
    """Heads as float64 `(classes, features + 1)`: what they add to the weights of the model's head, along the
    eigenvectors of the features' covariance and so scaled that all matter alike; in the last column the biases.

    Args:
        weight, bias: of the head to begin from.
        change: what it adds to the weights of the model's head.
        begun: the head to begin from.
        scales: of all columns but the last, `(features,)`.
        vectors: the eigenvectors times these, `(features, features)`.
        mean: of the features, `(features,)`.
        bias_scale: of the last column; zero if there are no biases.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    change: torch.Tensor
    begun: torch.Tensor
    scales: torch.Tensor
    vectors: torch.Tensor
    mean: torch.Tensor
    bias_scale: float

    @classmethod
    def of(cls, lesson: Lesson, ridge: Ridge, start: LinearLayer, count: float, images: int) -> _Unknowns:
        """Those of heads that so many images teach, where squared errors of logits count so much."""
        import torch

        (weight, bias), (had, _) = lesson.tensors(start), lesson.tensors(lesson.layer)
        arrays = ridge.values, ridge.vectors, ridge.mean
        values, vectors, mean = (torch.from_numpy(array).to(lesson.device) for array in arrays)
        scales = (count * (values + ridge.strength).clamp(min=torch.finfo(torch.float64).tiny)).rsqrt()
        begun = torch.cat([(weight - had) @ vectors / scales, torch.zeros_like(bias)[:, None]], dim=1)
        bias_scale = 0.0 if start.bias is None else (count * images) ** -0.5
        return cls(weight, bias, weight - had, begun, scales, vectors * scales, mean, bias_scale)

    def head(self, unknown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of a head `(classes, features)`, and its biases `(classes,)`."""
        change = unknown[:, :-1] @ self.vectors.T - self.change
        return self.weight + change, self.bias + (unknown[:, -1] * self.bias_scale - change @ self.mean)

    def slopes(self, crossed: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Along the unknowns, of what has these slopes along weights and biases."""
        import torch

        along = (crossed - classes[:, None] * self.mean) @ self.vectors
        return torch.cat([along, classes[:, None] * self.bias_scale], dim=1)


def logits_of(layer: LinearLayer, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What a head makes of the features of some images, given by their rows: float32 `(rows, classes)`."""
    return np.concatenate([layer(features[chunk]).astype(np.float32) for chunk in _chunks(rows)])


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
