"""The classes that can win: what is left of a bank's logits when all that no recipe can predict is dropped.

A prediction is the argmax of the logits that `ensemble.in_order` mixes, the lower class of equals. Class d *beats*
class c of an image if in every model its logit is at least that of c where d < c, and greater where d > c. Then no
recipe predicts c, rounding included:

- d < c. Rounding is monotone: a <= b gives fl(a) <= fl(b). Products with a weight >= 0 and sums in one order keep the
  order of what goes in at each step, so the mixed logit of d is at least that of c; of equals the lower, d, is taken.
- d > c. Different float32 numbers a > b are at least 2^-25 (|a| + |b|) apart, so in real numbers the mixed logits
  differ by 2^-25 S or more, where S = sum_i w_i (|a_i| + |b_i|). The two sums in float64 are off by less than
  1.01 n 2^-53 S together (n products and sums, each off by 2^-53), which is less than half of that for n below 2^26
  models; what products lose that are too small for float64, n 2^-1074, is nothing beside it. So d stays ahead.

The class that a recipe predicts is therefore beaten by no other and never dropped, whichever pairs are compared: to
compare fewer keeps more and is as right. For the best `top` classes a class is dropped if `top` others beat it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from hf_radin.recipes.ensemble import Stored
from hf_radin.runtime.files import write_atomically

logger = logging.getLogger(__name__)

_ARRAYS = ("images", "counts", "classes", "logits")

# How many logits of all models a thread reads at a time: 32 MiB in float16.
READ_AT_ONCE = 1 << 24

# How many models choose the classes that all others are first compared with: any are right, good ones drop more.
POLLED = 8

# With how many of an image's classes the others are compared, so that hundreds that survive don't cost their square.
ROUNDS = 32


# How many bytes of logits may be left in memory. Of fine-tunes of one start it is a few megabytes; where models say
# quite different things, hardly a class is dropped.
MOST = 1 << 29


class TooMuchLeftError(ValueError):
    """Too little was dropped for the rest to be held in memory."""


@dataclass(frozen=True)
class Bucket:
    """Images of which the same number `k` of classes can win.

    Args:
        images: their positions in the split `(images,)`.
        classes: `(k, images)`, of each image ascending.
        logits: `(models, k, images)`; nothing, `(0, k, images)`, where the images are decided.
    """

    images: np.ndarray
    classes: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True, eq=False)
class Pruned:
    """Of each image the classes that can be among the best `top` under some recipe, and their logits.

    An image with no more than `top` such classes is *decided*: it is the same under every recipe.

    Args:
        images: positions in the split `(samples,)`, by their number of classes, those of the same number ascending.
        counts: how many classes each of these has `(samples,)`.
        classes: `(entries,)`; of images with `k` classes the entries lie together as `(k, images)`.
        logits: float16 or float32 `(models, entries of the images that are not decided)`, which are the last ones.
    """

    images: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    logits: np.ndarray
    top: int = 1

    @property
    def models(self) -> int:
        return len(self.logits)

    def is_whole(self, models: int, samples: int, top: int) -> bool:
        """Whether it can be what is left of the logits of so many models and images."""
        if (self.models, self.top, len(self.counts)) != (models, top, samples) or (self.counts < 1).any():
            return False
        entries = int(self.counts.sum()), int(self.counts[self.counts > self.top].sum())
        return (
            entries == (len(self.classes), self.logits.shape[1])
            and bool((np.sort(self.images) == np.arange(samples)).all())
            and bool(np.isfinite(self.logits).all())
        )

    @property
    def decided(self) -> np.ndarray:
        """Positions of the decided images, ascending."""
        return np.sort(self.images[self.counts <= self.top])

    @property
    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each entry that has logits the image's position and the class: `(entries,)` each."""
        known = [one for one in self.buckets() if len(one.logits)]
        images = [np.tile(one.images, len(one.classes)) for one in known]
        return np.concatenate([np.zeros(0, int), *images]), self.classes[len(self.classes) - self.logits.shape[1] :]

    def select(self, some: np.ndarray) -> Pruned:
        """What is known of some images alone, which are counted anew: positions `(samples,)`, ascending."""
        place = np.full(len(self.images), -1)
        place[some] = np.arange(len(some))
        parts = []
        for bucket in self.buckets():
            these = place[bucket.images] >= 0
            logits = bucket.logits[:, :, these] if len(bucket.logits) else bucket.logits
            parts.append(Bucket(place[bucket.images][these], bucket.classes[:, these], logits))
        return _of_buckets(parts, self.logits[:, :0], self.top)

    def buckets(self) -> Iterator[Bucket]:
        """All images, by their number of classes."""
        sizes = np.bincount(self.counts)
        image = entry = 0
        known = len(self.classes) - self.logits.shape[1]  # entries of decided images come first and have no logits
        for k in np.flatnonzero(sizes).tolist():
            n = int(sizes[k])
            some = slice(entry - known, entry - known + k * n) if k > self.top else slice(0, 0)
            logits = self.logits[:, some] if k > self.top else self.logits[:0, :0]
            yield Bucket(
                self.images[image : image + n],
                self.classes[entry : entry + k * n].reshape(k, n),
                logits.reshape(len(logits), k, n),
            )
            image, entry = image + n, entry + k * n


def join(parts: Sequence[tuple[Pruned, np.ndarray]]) -> Pruned:
    """What is known of parts of a split as one: of each part its images' positions in the whole."""
    by_count: dict[int, list[Bucket]] = {}
    for pruned, places in parts:
        for bucket in pruned.buckets():
            by_count.setdefault(len(bucket.classes), []).append(replace(bucket, images=places[bucket.images]))
    buckets = []
    for _, same in sorted(by_count.items()):
        images = np.concatenate([one.images for one in same])
        order = np.argsort(images)
        classes = np.concatenate([one.classes for one in same], axis=1)[:, order]
        buckets.append(
            Bucket(images[order], classes, np.concatenate([one.logits for one in same], axis=2)[:, :, order])
        )
    first = parts[0][0]
    return _of_buckets(buckets, first.logits[:, :0], first.top)


def _of_buckets(buckets: Sequence[Bucket], none: np.ndarray, top: int) -> Pruned:
    """Buckets put together; `none` are the logits of no entry, `(models, 0)`."""
    contested = [one.logits.reshape(len(none), -1) for one in buckets if len(one.logits)]
    return Pruned(
        np.concatenate([one.images for one in buckets]),
        np.concatenate([np.full(len(one.images), len(one.classes)) for one in buckets]),
        np.concatenate([one.classes.ravel() for one in buckets]),
        np.concatenate([none, *contested], axis=1),
        top,
    )


def kept(path: Path, sources: Sequence[Path], make: Callable[[], Pruned], *, samples: int, top: int) -> Pruned:
    """What lies at `path`, if it is whole and no source of it is newer; else it is made, and kept if it can be.

    Args:
        sources: the logits of each model.
        samples, top: how many images it is about, and how many of their classes can be among the best.
    """
    try:
        made_at = path.stat().st_mtime_ns
        if all(one.stat().st_mtime_ns <= made_at for one in sources):
            with np.load(path) as found:
                pruned = Pruned(**{name: found[name] for name in _ARRAYS}, top=int(found["top"]))
            if pruned.is_whole(len(sources), samples, top):
                return pruned
            logger.info("%s is made anew: it is not of these logits.", path)
    except FileNotFoundError:
        pass
    except Exception as error:  # a broken file may fail in any way
        logger.info("%s is made anew: %s", path, error)
    made = make()
    arrays = {name: getattr(made, name) for name in _ARRAYS}
    try:
        write_atomically(path, partial(np.savez, top=np.array(made.top), **arrays))
    except OSError as error:
        logger.warning("The pruned logits can't be kept, and are made again when they are needed again: %s", error)
    return made


def prune(
    logits: Sequence[np.ndarray | Stored],
    *,
    top: int = 1,
    threads: int = 1,
    on_block: Callable[[int], object] = lambda samples: None,
) -> Pruned:
    """Drop the classes that no recipe puts among the best `top`, reading each logit once.

    Args:
        logits: for each model float16 or float32 `(samples, classes)`, finite, read in blocks of samples.
        threads: how many blocks are worked on at a time, each in some 40 MiB where few classes are left.
        on_block: hears how many samples were read, for a progress bar.

    Raises:
        ValueError: for logits of another type, or if among those that are left one is not a finite number.
        TooMuchLeftError: if more than `MOST` bytes are left.
    """
    samples, classes = logits[0].shape
    dtypes = {str(one.dtype) for one in logits}
    if not (dtypes == {"float16"} or dtypes == {"float32"}):
        raise ValueError(f"The logits of all models are float16, or of all float32; got {', '.join(sorted(dtypes))}.")
    step = max(1, min(samples, READ_AT_ONCE // (len(logits) * classes)))

    own = threading.local()

    def work(start: int) -> list[np.ndarray]:
        if not hasattr(own, "kept"):
            own.kept = [np.empty((step, classes), one.dtype) if isinstance(one, Stored) else None for one in logits]
        block = [
            one.read(start, kept) if isinstance(one, Stored) else one[start : start + step]
            for one, kept in zip(logits, own.kept, strict=True)
        ]
        images, *rest = _prune_block(block, top)
        return [images + start, *rest]

    parts: list[list[np.ndarray]] = []
    left = 0
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, samples, step * threads):
            starts = range(first, min(first + step * threads, samples), step)
            for start, part in zip(starts, pool.map(work, starts), strict=True):
                parts.append(part)
                left += part[-1].nbytes
                on_block(min(step, samples - start))
            if left > MOST:
                raise TooMuchLeftError(f"Of {start + step} samples {left} bytes of logits are left.")
    if not parts:
        parts = [_prune_block([one[:0] for one in logits], top)]
    images, which, values = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _arrange(images, which.astype(np.int32), values, samples, top)


def _prune_block(block: list[np.ndarray], top: int) -> list[np.ndarray]:
    """What is left of some samples, in their order: of each entry the sample, the class and the logits `(models,)`."""
    images, classes = np.nonzero(~_far_behind(block, top))
    values = np.stack([one[images, classes] for one in block], axis=1)  # (entries, models)
    if not np.isfinite(values).all():
        entry, model = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"Model {model} has the logit {values[entry, model]} for class {classes[entry]}.")
    keep = np.sort(_unbeaten(values.astype(np.float32), images, classes, top))
    return [images[keep], classes[keep], values[keep]]


def _far_behind(block: list[np.ndarray], top: int) -> np.ndarray:
    """Which classes are below each of the `top` strongest in every model: `(samples, classes)`.

    A class that is beaten and yet equal somewhere is left for `_unbeaten` to see.
    """
    order = _order(block[0])
    total = np.zeros(block[0].shape, dtype=np.float32)
    for one in block[:: -(-len(block) // POLLED)]:
        np.add(total, order(one), out=total, casting="unsafe")
    top = min(top, block[0].shape[1])
    strongest = np.argpartition(total, -top, axis=1)[:, -top:] if top > 1 else total.argmax(axis=1)[:, None]
    behind, below = np.ones(total.shape, dtype=bool), np.empty(total.shape, dtype=bool)
    for one in block:
        ordered = order(one)
        weakest = np.take_along_axis(ordered, strongest, axis=1).min(axis=1, keepdims=True)
        if weakest.dtype == np.int16:
            weakest[weakest == 0] = -1  # -0.0 stands below 0.0 there, and is not
        np.less(ordered, weakest, out=below)
        np.logical_and(behind, below, out=behind)
    return behind


def _order(like: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Numbers that stand in the order of the logits, and that the processor compares fast: of float16, integers.

    Their bits are those of an integer and a sign; where that is set, the others count backwards.
    """
    if like.dtype != np.float16:
        return lambda one: one
    kept = np.empty(like.shape, dtype=np.int16)

    def order(one: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(one).view(np.int16)
        np.right_shift(bits, 15, out=kept)
        np.bitwise_and(kept, 0x7FFF, out=kept)
        return np.bitwise_xor(kept, bits, out=kept)

    return order


def _unbeaten(values: np.ndarray, images: np.ndarray, classes: np.ndarray, top: int) -> np.ndarray:
    """Which entries fewer than `top` others of their image beat; `values` are `(entries, models)`.

    The entries of an image are compared with its first by the mean, then what is left with the next: an entry is only
    ever beaten by one of a higher mean.
    """
    there = np.lexsort((classes, -values.mean(axis=1, dtype=np.float64), images))
    values, images, classes = values[there], images[there], classes[there]
    beaten = np.zeros(len(there), dtype=np.int64)
    for place in range(ROUNDS):
        first = np.searchsorted(images, images)  # of each entry, where its image begins
        later = np.flatnonzero(np.arange(len(images)) - first > place)
        if not len(later):
            break
        strong = first[later] + place
        higher, lower = values[strong], values[later]
        beats = np.where(classes[strong] < classes[later], (higher >= lower).all(axis=1), (higher > lower).all(axis=1))
        beaten[later] += beats
        keep = beaten < top
        there, values, images, classes, beaten = (one[keep] for one in (there, values, images, classes, beaten))
    return there


def _arrange(images: np.ndarray, classes: np.ndarray, values: np.ndarray, samples: int, top: int) -> Pruned:
    """Entries in the order of samples and classes, put into buckets."""
    counts = np.bincount(images, minlength=samples)
    place = np.arange(len(images)) - np.searchsorted(images, images)  # of a class among those of its image
    order = np.lexsort((images, place, counts[images]))
    by_count = np.argsort(counts, kind="stable")
    contested = order[counts[images[order]] > top]
    return Pruned(by_count, counts[by_count], classes[order], np.ascontiguousarray(values[contested].T), top)
