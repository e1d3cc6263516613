"""The classes that can win: what is left of a bank's logits when every class that no recipe can predict is dropped.

A prediction is the argmax of the logits that `ensemble.mix_in_order` mixes, the lower class of equals. For an image,
class d *beats* class c if in every model its logit is at least that of c where d < c, and greater where d > c. Then no
recipe predicts c, rounding included:

- d < c. Rounding is monotone: a <= b gives fl(a) <= fl(b). Products with a weight >= 0 and sums in one order keep the
  order of what goes in at each step, so the mixed logit of d is at least that of c; of equals the lower, d, is taken.
- d > c. Different float32 numbers a > b are at least 2^-25 (|a| + |b|) apart, so in real numbers the mixed logits
  differ by 2^-25 S or more, where S = sum_i w_i (|a_i| + |b_i|). The two sums in float64 are off by less than
  1.01 n 2^-53 S together (n products and sums, each off by 2^-53), which is less than half of that for n below 2^26
  models; what products lose that are too small for float64, n 2^-1074, is nothing beside it. So d stays ahead.

The class that a recipe predicts is therefore beaten by no other and never dropped, whichever pairs are compared: to
compare fewer keeps more and is as right. For the best `top` classes a class is dropped if `top` others beat it.

Where an image may have any number of classes (multi-label), each *pair* of an image and a class is decided by itself:
the class is there if its mixed logit is above 0. So a pair is looked at as an image of its own with two classes, 0 for
no and 1 for yes, whose logits are 0 and that of the class; the argmax is the sign, and of 0 it is no. All that is said
above holds for pairs, and is plain here: if no model has a logit above 0, products and sums of numbers that are not
above 0 are not above 0, however they are rounded. If all have one above 0, which is 2^-149 at least, no product is
below 0, and that with the largest weight, 1/n at least, does not vanish in float64: their sum is above 0. Such pairs
are decided.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hf_radin.recipes.ensemble import Stored
from hf_radin.runtime.schema import known_arrays, write_arrays

logger = logging.getLogger(__name__)

# What is saved of pruned logits, beside `top`.
ARRAYS = ("images", "counts", "classes", "logits")

# The class of an entry that stands for none: its logit is 0 in every model.
NONE = -1

# How many logits of all models a thread reads at a time: 32 MiB in float16.
READ_AT_ONCE = 1 << 24

# How many models choose the classes that all others are first compared with: any choice is right, good ones drop more.
POLLED = 8

# With how many of an image's classes the others are compared, so that hundreds that survive don't cost their square.
ROUNDS = 32

# What is held of each pair: its position and its number of classes in 8 bytes each, the class in 4.
_BYTES_OF_A_PAIR = 20

# How many bytes of logits may be left in memory. Fine-tunes of one start leave a few megabytes; if models disagree
# widely, hardly a class is dropped.
MOST = 1 << 29


class TooMuchLeftError(ValueError):
    """Too few classes were dropped for the others to fit into memory."""


@dataclass(frozen=True)
class Bucket:
    """Images for which the same number `k` of classes can win.

    Args:
        images: their positions in the split `(images,)`.
        classes: `(k, images)`, ascending for each image.
        logits: `(models, k, images)`; empty, `(0, k, images)`, if the images are decided.
    """

    images: np.ndarray
    classes: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True, eq=False)
class Pruned:
    """For each image the classes that can be among the best `top` under some recipe, and their logits.

    An image with no more than `top` such classes is *decided*: every recipe predicts the same.

    Args:
        images: positions in the split `(samples,)`, sorted by their number of classes, then ascending.
        counts: how many classes each of these has `(samples,)`.
        classes: `(entries,)`; the entries of the images with `k` classes lie together as `(k, images)`.
        logits: float16 or float32 `(models, entries of the images that are not decided)`, which are the last entries.
        top: among how many best classes; 0 where all classes of all images are kept, and none is decided.
        pairs: how many classes an image has, where its pairs with them are what has classes: pair `image * pairs +
            class` then takes the place of an image; 0 for images.
    """

    images: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    logits: np.ndarray
    top: int = 1
    pairs: int = 0

    @property
    def models(self) -> int:
        return len(self.logits)

    @property
    def decided(self) -> np.ndarray:
        """Positions of the decided images, ascending; of pairs, of the images whose pairs are all decided."""
        decided = np.sort(self.images[self.counts <= self.top])
        if not self.pairs:
            return decided
        return np.flatnonzero(np.bincount(decided // self.pairs) == self.pairs)

    @property
    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """The image's position and the class of each entry that has logits: `(entries,)` each.

        Of pairs it is the class whose logit that is; `NONE` for no, whose logit is 0.
        """
        contested = [bucket for bucket in self.buckets() if len(bucket.logits)]
        parts = [np.tile(bucket.images, len(bucket.classes)) for bucket in contested]
        images = np.concatenate([np.zeros(0, int), *parts])
        classes = self.classes[len(self.classes) - self.logits.shape[1] :]
        if not self.pairs:
            return images, classes
        return images // self.pairs, np.where(classes == 1, images % self.pairs, NONE)

    def select(self, positions: np.ndarray) -> Pruned:
        """The part about some images, as a split of its own.

        Args:
            positions: of the images `(samples,)`, ascending.
        """
        if self.pairs:
            positions = (positions[:, None] * self.pairs + np.arange(self.pairs)).ravel()
        place = np.full(len(self.images), -1)
        place[positions] = np.arange(len(positions))
        parts = []
        for bucket in self.buckets():
            selected = place[bucket.images] >= 0
            logits = bucket.logits[:, :, selected] if len(bucket.logits) else bucket.logits
            parts.append(Bucket(place[bucket.images][selected], bucket.classes[:, selected], logits))
        return replace(_of_buckets(parts, self.logits[:, :0], self.top), pairs=self.pairs)

    def buckets(self) -> Iterator[Bucket]:
        """All images, grouped by their number of classes."""
        sizes = np.bincount(self.counts)
        image = entry = 0
        decided = len(self.classes) - self.logits.shape[1]  # entries of decided images come first and have no logits
        for k in np.flatnonzero(sizes).tolist():
            n = int(sizes[k])
            start = entry - decided
            logits = self.logits[:, start : start + k * n] if k > self.top else self.logits[:0, :0]
            yield Bucket(
                self.images[image : image + n],
                self.classes[entry : entry + k * n].reshape(k, n),
                logits.reshape(len(logits), k, n),
            )
            image, entry = image + n, entry + k * n


def join(parts: Sequence[tuple[Pruned, np.ndarray]]) -> Pruned:
    """Put the parts of a split together.

    Args:
        parts: the pruned logits of each part, and its images' positions in the split.
    """
    by_count: dict[int, list[Bucket]] = {}
    for pruned, places in parts:
        for bucket in pruned.buckets():
            by_count.setdefault(len(bucket.classes), []).append(replace(bucket, images=places[bucket.images]))
    buckets = []
    for _, group in sorted(by_count.items()):
        images = np.concatenate([bucket.images for bucket in group])
        order = np.argsort(images)
        classes = np.concatenate([bucket.classes for bucket in group], axis=1)[:, order]
        logits = np.concatenate([bucket.logits for bucket in group], axis=2)[:, :, order]
        buckets.append(Bucket(images[order], classes, logits))
    first = parts[0][0]
    return _of_buckets(buckets, first.logits[:, :0], first.top)


def load_or_make(path: Path, subject: str, make: Callable[[], Pruned], *, top: int, pairs: int = 0) -> Pruned:
    """The pruned logits that are cached at `path`, if they are those of this subject; else those that are made.

    What is made is cached, if it can be written.

    Args:
        subject: which logits they are made of, to the last bit.
        top, pairs: as in `Pruned`.
    """
    arrays = known_arrays(path, subject)
    if arrays is not None:
        return Pruned(**arrays, top=top, pairs=pairs)
    made = make()
    try:
        write_arrays(path, {name: getattr(made, name) for name in ARRAYS}, subject)
    except (OSError, ValueError) as error:
        logger.warning("The pruned logits can't be cached, and are made again when they are needed again: %s", error)
    return made


def prune(
    logits: Sequence[np.ndarray | Stored],
    *,
    top: int = 1,
    threads: int = 1,
    on_block: Callable[[int], object] = lambda samples: None,
    read_at_once: int = READ_AT_ONCE,
    rounds: int = ROUNDS,
    most: int = MOST,
) -> Pruned:
    """Drop the classes that no recipe puts among the best `top`, reading each logit once.

    Args:
        logits: for each model float16 or float32 `(samples, classes)`, finite, read in blocks of samples.
        top: among how many best classes.
        threads: how many blocks are worked on at a time, each in some 40 MiB where few classes are left.
        on_block: is told how many samples were read, for a progress bar.
        read_at_once: how many logits of all models a thread reads at a time.
        rounds: with how many of an image's classes the others are compared; fewer keep more, and are as right.
        most: how many bytes of logits may be left.

    Raises:
        ValueError: for logits of another type, or if a logit that is left is not finite.
        TooMuchLeftError: if more than `most` bytes are left.
    """
    samples, classes = logits[0].shape
    dtypes = {str(array.dtype) for array in logits}
    if dtypes not in ({"float16"}, {"float32"}):
        raise ValueError(f"Logits must be float16 for all models, or float32; got {', '.join(sorted(dtypes))}.")
    step = max(1, min(samples, read_at_once // (len(logits) * classes)))
    thread = threading.local()  # has for each stored array a buffer, which is used again

    def prune_from(start: int) -> _Entries:
        if not hasattr(thread, "buffers"):
            thread.buffers = [np.empty((step, classes), array.dtype) for array in logits if isinstance(array, Stored)]
        buffers = iter(thread.buffers)
        block = [
            array.read(start, next(buffers)) if isinstance(array, Stored) else array[start : start + step]
            for array in logits
        ]
        return _prune_block(block, start, top, rounds)

    parts: list[_Entries] = []
    left = 0
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, samples, step * threads):
            starts = range(first, min(first + step * threads, samples), step)
            for start, part in zip(starts, pool.map(prune_from, starts), strict=True):
                parts.append(part)
                left += part.logits.nbytes
                on_block(min(step, samples - start))
            if left > most:
                raise TooMuchLeftError(f"{left} bytes of logits are left of {start + step} samples.")
    if not parts:
        parts = [_prune_block([array[:0] for array in logits], 0, top, rounds)]
    entries = _Entries(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.classes for part in parts]).astype(np.int32),
        np.concatenate([part.logits for part in parts]),
    )
    return _arrange(entries, samples, top)


def prune_pairs(
    logits: Sequence[np.ndarray | Stored],
    *,
    on_block: Callable[[int], object] = lambda samples: None,
    read_at_once: int = READ_AT_ONCE,
    most: int = MOST,
) -> Pruned:
    """Of multi-label logits the pairs of an image and a class that recipes decide in two ways, and what others are.

    Args:
        logits: for each model `(samples, classes)`, finite, read in blocks of samples.
        on_block, read_at_once, most: as in `prune`.

    Raises:
        ValueError: if a logit is not finite.
        TooMuchLeftError: if more than `most` bytes are left, or what is known of all pairs takes more.
    """
    samples, classes = logits[0].shape
    left = samples * classes * _BYTES_OF_A_PAIR
    step = max(1, read_at_once // (len(logits) * classes))
    answers, contested, values = [], [], [np.zeros((len(logits), 0), logits[0].dtype)]
    for start in range(0, samples, step):
        if left > most:
            break
        block = np.stack([array[start : start + step].reshape(-1) for array in logits])  # (models, pairs)
        if not np.isfinite(block).all():
            model, pair = np.argwhere(~np.isfinite(block))[0]
            raise ValueError(f"Model {model} has the logit {block[model, pair]} for class {pair % classes}.")
        is_yes = block > 0
        is_open = is_yes.any(axis=0) & ~is_yes.all(axis=0)
        answers.append(is_yes[0])
        contested.append(is_open)
        values.append(block[:, is_open])
        left += 2 * values[-1].nbytes
        on_block(block.shape[1] // classes)
    if left > most:
        raise TooMuchLeftError(f"{left} bytes of logits are left of {samples} samples.")
    yes, is_contested = (np.concatenate([np.zeros(0, bool), *parts]) for parts in (answers, contested))
    return _arrange_pairs(yes, is_contested, np.concatenate(values, axis=1), classes)


def keep_all(logits: Sequence[np.ndarray | Stored], *, most: int = MOST) -> Pruned:
    """All classes of all images, in the form of pruned logits: for metrics of probabilities, to which all add.

    Args:
        logits: for each model float16 or float32 `(samples, classes)`.
        most: how many bytes of logits may be left.

    Raises:
        TooMuchLeftError: if there are more than `most`.
    """
    samples, classes = logits[0].shape
    size = len(logits) * samples * classes * logits[0].dtype.itemsize
    if size > most:
        raise TooMuchLeftError(f"{size} bytes of logits are left of {samples} samples.")
    stacked = np.empty((len(logits), classes, samples), logits[0].dtype)
    step = max(1, READ_AT_ONCE // classes)
    for of_model, array in zip(stacked, logits, strict=True):
        for start in range(0, samples, step):
            of_model[:, start : start + step] = array[start : start + step].T
    return Pruned(
        np.arange(samples),
        np.full(samples, classes),
        np.repeat(np.arange(classes, dtype=np.int32), samples),
        stacked.reshape(len(logits), -1),
        top=0,
    )


@dataclass(frozen=True, eq=False)
class _Entries:
    """Classes that can win, in the order of samples and classes.

    Args:
        images, classes: of each entry the sample and the class, `(entries,)`.
        logits: `(entries, models)`.
    """

    images: np.ndarray
    classes: np.ndarray
    logits: np.ndarray


def _of_buckets(buckets: Sequence[Bucket], empty: np.ndarray, top: int) -> Pruned:
    """Buckets put together; `empty` are the logits of no entry, `(models, 0)`."""
    contested = [bucket.logits.reshape(len(empty), -1) for bucket in buckets if len(bucket.logits)]
    return Pruned(
        np.concatenate([bucket.images for bucket in buckets]),
        np.concatenate([np.full(len(bucket.images), len(bucket.classes)) for bucket in buckets]),
        np.concatenate([bucket.classes.ravel() for bucket in buckets]),
        np.concatenate([empty, *contested], axis=1),
        top,
    )


def _prune_block(block: list[np.ndarray], start: int, top: int, rounds: int) -> _Entries:
    """What is left of a block of samples.

    Args:
        block: the logits of each model, `(samples, classes)`.
        start: position of the first sample in the split.
        top, rounds: as in `prune`.
    """
    images, classes = np.nonzero(~_far_behind(block, top))
    values = np.stack([array[images, classes] for array in block], axis=1)  # (entries, models)
    if not np.isfinite(values).all():
        entry, model = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"Model {model} has the logit {values[entry, model]} for class {classes[entry]}.")
    keep = np.sort(_unbeaten(values.astype(np.float32), images, classes, top, rounds))
    return _Entries(images[keep] + start, classes[keep], values[keep])


def _far_behind(block: list[np.ndarray], top: int) -> np.ndarray:
    """Which classes are below each of the `top` strongest in every model: `(samples, classes)`.

    Classes that are beaten by equal logits are left to `_unbeaten`.
    """
    sortable = _sortable_keys(block[0])
    total = np.zeros(block[0].shape, dtype=np.float32)
    for array in block[:: -(-len(block) // POLLED)]:
        np.add(total, sortable(array), out=total, casting="unsafe")
    top = min(top, block[0].shape[1])
    strongest = np.argpartition(total, -top, axis=1)[:, -top:] if top > 1 else total.argmax(axis=1)[:, None]
    behind, below = np.ones(total.shape, dtype=bool), np.empty(total.shape, dtype=bool)
    for array in block:
        keys = sortable(array)
        weakest = np.take_along_axis(keys, strongest, axis=1).min(axis=1, keepdims=True)
        if weakest.dtype == np.int16:
            weakest[weakest == 0] = -1  # the key of -0.0 is below that of 0.0, which is equal
        np.less(keys, weakest, out=below)
        np.logical_and(behind, below, out=behind)
    return behind


def _sortable_keys(like: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from logits to keys in the same order that the processor compares fast: integers for float16.

    The bits of a float16 are those of an integer and a sign; where that is set, the others count backwards.
    """
    if like.dtype != np.float16:
        return lambda logits: logits
    keys = np.empty(like.shape, dtype=np.int16)  # memory that is used again

    def sortable(logits: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(logits).view(np.int16)
        np.right_shift(bits, 15, out=keys)
        np.bitwise_and(keys, 0x7FFF, out=keys)
        return np.bitwise_xor(keys, bits, out=keys)

    return sortable


def _unbeaten(values: np.ndarray, images: np.ndarray, classes: np.ndarray, top: int, rounds: int) -> np.ndarray:
    """The entries that fewer than `top` others of their image beat; `values` are `(entries, models)`.

    The entries of an image are compared with its first by the mean, then what is left with the next: an entry is only
    ever beaten by one of a higher mean.
    """
    entries = np.lexsort((classes, -values.mean(axis=1, dtype=np.float64), images))
    values, images, classes = values[entries], images[entries], classes[entries]
    beaten = np.zeros(len(entries), dtype=np.int64)
    for place in range(rounds):
        first = np.searchsorted(images, images)  # of each entry, where its image begins
        later = np.flatnonzero(np.arange(len(images)) - first > place)
        if not len(later):
            break
        strong = first[later] + place
        higher, lower = values[strong], values[later]
        beats = np.where(classes[strong] < classes[later], (higher >= lower).all(axis=1), (higher > lower).all(axis=1))
        beaten[later] += beats
        keep = beaten < top
        entries, beaten = entries[keep], beaten[keep]
        values, images, classes = values[keep], images[keep], classes[keep]
    return entries


def _arrange(entries: _Entries, samples: int, top: int) -> Pruned:
    """Entries in the order of samples and classes, put into buckets."""
    images = entries.images
    counts = np.bincount(images, minlength=samples)
    place = np.arange(len(images)) - np.searchsorted(images, images)  # of a class among those of its image
    order = np.lexsort((images, place, counts[images]))
    by_count = np.argsort(counts, kind="stable")
    contested = order[counts[images[order]] > top]
    logits = np.ascontiguousarray(entries.logits[contested].T)
    return Pruned(by_count, counts[by_count], entries.classes[order], logits, top)


def _arrange_pairs(yes: np.ndarray, is_contested: np.ndarray, logits: np.ndarray, pairs: int) -> Pruned:
    """Pairs, the decided ones first.

    Args:
        yes: whether the class is there, of those that are decided: bool `(all pairs,)`.
        is_contested: which are not decided, bool `(all pairs,)`.
        logits: of these, `(models, contested)`.
        pairs: as in `Pruned`.
    """
    decided, contested = np.flatnonzero(~is_contested), np.flatnonzero(is_contested)
    counts = np.repeat([1, 2], [len(decided), len(contested)])
    answers = np.repeat(np.array([0, 1], np.int32), len(contested))
    return Pruned(
        np.concatenate([decided, contested]),
        counts,
        np.concatenate([yes[decided].astype(np.int32), answers]),
        np.concatenate([np.zeros_like(logits), logits], axis=1),
        pairs=pairs,
    )
