"""Which images two models predict differently, and by which margins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_radin.runtime.files import write_atomically


@dataclass(frozen=True, eq=False)
class Changes:
    """The images for which two models, a and b, predict different classes: a row for each.

    Args:
        ids: positions of the images in their split, `(images,)`.
        labels: the true classes `(images,)`.
        predictions: classes of a and of b, `(images, 2)`; -1 for none.
        margins: by how much the logit of the predicted class is ahead of that of the best other class, of a and of b,
            float32 `(images, 2)`; NaN where logits are not known, or a class is not predicted.
        classes: the names of all classes.
    """

    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    margins: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def won(self) -> int:
        """How many images b gets right, and a wrong."""
        return int((self.predictions[:, 1] == self.labels).sum())

    @property
    def lost(self) -> int:
        """How many images a gets right, and b wrong."""
        return int((self.predictions[:, 0] == self.labels).sum())

    def to_parquet(self, path: str | Path) -> None:
        """Write a row for each image: `id`, `label`, `label_name`, `prediction_a`, `prediction_b` (names of classes,
        null for none), `margin_a`, `margin_b`. The file appears when it is whole, and takes the place of another.

        Raises:
            OSError: if it can't be written.
        """
        import pyarrow
        from pyarrow import parquet

        names = [*self.classes, None]  # of class -1
        columns = {
            "id": pyarrow.array(self.ids, pyarrow.int64()),
            "label": pyarrow.array(self.labels, pyarrow.int64()),
            "label_name": pyarrow.array([names[label] for label in self.labels], pyarrow.string()),
        }
        for column, model in enumerate("ab"):
            predicted = [names[label] for label in self.predictions[:, column]]
            columns[f"prediction_{model}"] = pyarrow.array(predicted, pyarrow.string())
        for column, model in enumerate("ab"):
            columns[f"margin_{model}"] = pyarrow.array(self.margins[:, column], pyarrow.float32())
        table = pyarrow.table(columns)
        write_atomically(Path(path), lambda new: parquet.write_table(table, new))


def margins_of(logits: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """By how much the logits of predicted classes are ahead of those of the best other class: float32 `(images,)`.

    Args:
        logits: `(images, classes)`.
        predictions: classes `(images,)`, -1 for none; of these the margin is NaN.
    """
    each = np.arange(len(predictions))
    others = np.array(logits, dtype=np.float64)
    predicted = others[each, predictions]
    others[each, predictions] = -np.inf
    margins = np.full(len(predictions), np.nan)
    is_known = predictions >= 0
    margins[is_known] = (predicted - others.max(axis=1))[is_known]
    return margins.astype(np.float32)
