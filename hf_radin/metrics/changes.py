"""Which images two models predict differently, or which classes of an image, and by which margins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_radin.metrics.multi_label import THRESHOLD
from hf_radin.runtime.files import write_atomically


@dataclass(frozen=True, eq=False)
class Changes:
    """The images for which two models, a and b, predict different classes: a row for each.

    Multi-label, the pairs of an image and a class that they decide differently.

    Args:
        ids: positions of the images in their split, `(rows,)`.
        labels: the true classes `(rows,)`; multi-label, whether the image has the class of the row: bool.
        predictions: classes of a and of b, `(rows, 2)`; multi-label 1 where it says that the image has the class of
            the row, else 0. -1 for none.
        margins: by how much the logit of the predicted class is ahead of that of the best other class, multi-label how
            far the logit is from the threshold, of a and of b: float32 `(rows, 2)`; NaN where logits are not known, or
            nothing is predicted.
        classes: the names of all classes.
        of_class: multi-label, the numbers of the classes that the rows are about, `(rows,)`; else None.
    """

    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    margins: np.ndarray
    classes: tuple[str, ...]
    of_class: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def won(self) -> int:
        """How many images (multi-label, pairs) b gets right, and a wrong."""
        return int((self.predictions[:, 1] == self.labels).sum())

    @property
    def lost(self) -> int:
        """How many images (multi-label, pairs) a gets right, and b wrong."""
        return int((self.predictions[:, 0] == self.labels).sum())

    def to_parquet(self, path: str | Path) -> None:
        """Write a row for each image: `id`, `label`, `label_name`, `prediction_a`, `prediction_b` (names of classes,
        null for none), `margin_a`, `margin_b`.

        Multi-label, for each pair of an image and a class: `id`, `class`, `class_name`, and `label`, `prediction_a`,
        `prediction_b` as booleans, null for none. The file appears when it is whole, and takes the place of another.

        Raises:
            OSError: if it can't be written.
        """
        import pyarrow
        from pyarrow import parquet

        columns = {"id": pyarrow.array(self.ids, pyarrow.int64())}
        if self.of_class is None:
            columns["label"] = pyarrow.array(self.labels, pyarrow.int64())
            columns["label_name"] = pyarrow.array([self.classes[label] for label in self.labels], pyarrow.string())
            words: list[Any] = [*self.classes, None]  # None of class -1
            kind = pyarrow.string()
        else:
            columns["class"] = pyarrow.array(self.of_class, pyarrow.int64())
            columns["class_name"] = pyarrow.array([self.classes[place] for place in self.of_class], pyarrow.string())
            columns["label"] = pyarrow.array(self.labels, pyarrow.bool_())
            words, kind = [False, True, None], pyarrow.bool_()
        for column, model in enumerate("ab"):
            predicted = [words[prediction] for prediction in self.predictions[:, column]]
            columns[f"prediction_{model}"] = pyarrow.array(predicted, kind)
        for column, model in enumerate("ab"):
            columns[f"margin_{model}"] = pyarrow.array(self.margins[:, column], pyarrow.float32())
        table = pyarrow.table(columns)
        write_atomically(Path(path), lambda new: parquet.write_table(table, new))


def margins_of(logits: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """By how much the logits of predicted classes are ahead of those of the best other class, or how far those of
    pairs of an image and a class are from the threshold: float32 `(rows,)`.

    Args:
        logits: of images `(rows, classes)`, or of pairs `(rows,)`.
        predictions: classes, or decisions, `(rows,)`, -1 for none; of these the margin is NaN.
    """
    values = np.array(logits, dtype=np.float64)
    if values.ndim == 1:
        margins = np.abs(values - THRESHOLD)
    else:
        each = np.arange(len(predictions))
        predicted = values[each, predictions]
        values[each, predictions] = -np.inf
        margins = predicted - values.max(axis=1)
    return np.where(predictions >= 0, margins, np.nan).astype(np.float32)
