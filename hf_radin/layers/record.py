"""How the last layers of a soup were taught: all that makes them again from the same checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_radin.logits.manifest import DataRecord, RunRecord
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.schema import IF_ANY
from hf_radin.weights.refit import FOLDS, SHARES

# What last layers are that an ensemble taught: a tail, and not a refitted head.
DISTILLED = "distilled"

# Seeds are below, as torch takes them.
SEEDS = 2**63

# Each half of the images judges the tail that the other half taught.
HALVES = 2


@dataclass(frozen=True)
class TailRecord:
    """Which last layers of a soup were distilled, and how they learned.

    Args:
        module: the first of them.
        parameters: how many numbers these are.
        share: of the model's multiplications, that which they take.
        epochs, rate, batch_size: as in `teach.Course`.
    """

    module: str
    parameters: int
    share: float
    epochs: int
    rate: float
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class HeadRecord:
    """How the last layers of a soup were taught: all that makes them again from the same checkpoints.

    Args:
        kind: `refit` of a head that was refitted (`refit.refit`), `distilled` of a tail (`teach.teach`).
        teacher: whose ensemble's logits the head was fitted to.
        data: key of the split's data.
        split: whose images taught it.
        hold_out, hold_out_seed: the share of them that was held out, and how it was drawn; None if none was.
        images: how many taught it.
        places: a hash of their positions in the split.
        run: how the models ran.
        batch_size: images in a forward pass.
        seed, folds: of the folds that judged it.
        penalty: relative to the mean eigenvalue of the features' covariance; 0 of a tail.
        labels: the share of the labels in what taught it.
        sha256: of the head in float64, of a tail in float32.
        tail: which layers learned, and how; None of a head.
        source: of the images, if they are of another dataset than those that chose the soup; it has no labels then.
    """

    kind: str = "refit"
    teacher: Recipe
    data: str
    split: str
    hold_out: float | None = None
    hold_out_seed: int = 0
    images: int
    places: str
    run: RunRecord
    batch_size: int
    seed: int = 0
    folds: int
    penalty: float
    labels: float = 0.0
    sha256: str
    tail: TailRecord | None = field(default=None, metadata=IF_ANY)
    source: DataRecord | None = field(default=None, metadata=IF_ANY)


def check_head(record: HeadRecord | None) -> None:
    """Refuse a head that this version can't make.

    Raises:
        ValueError: for another kind of head or number of folds, or a part, a seed or a share of labels that can't be.
    """
    if record is None:
        return
    if (record.kind, record.folds) not in (("refit", FOLDS), (DISTILLED, HALVES)):
        raise ValueError(
            f"its 'head' says kind={record.kind!r}, folds={record.folds}; it may be 'refit' and {FOLDS}, or "
            f"{DISTILLED!r} and {HALVES}"
        )
    if (record.kind == DISTILLED) != (record.tail is not None):
        raise ValueError(f"its 'head' says kind={record.kind!r} and tail={record.tail!r}")
    if not 0 < (0.5 if record.hold_out is None else record.hold_out) < 1 or not (
        0 <= min(record.seed, record.hold_out_seed) <= max(record.seed, record.hold_out_seed) < SEEDS
    ):
        values = f"hold_out={record.hold_out}, hold_out_seed={record.hold_out_seed}, seed={record.seed}"
        raise ValueError(f"its 'head' says {values}")
    if record.tail is not None:
        return _check_tail(record.tail, record.labels)
    if record.labels not in (0.0, *SHARES):
        raise ValueError(f"its 'head' says labels={record.labels}; it may be 0, {', '.join(map(str, SHARES))}")


def _check_tail(record: TailRecord, labels: float) -> None:
    """Refuse a tail that can't have learned so.

    Raises:
        ValueError: for a number that can't be.
    """
    if record.module in ("block", "stage"):
        raise ValueError(f"its 'head' says module={record.module!r}, which is no module")
    if min(record.epochs, record.batch_size) < 1 or not 0 < record.rate < 1 or not 0 <= labels <= 1:
        values = f"epochs={record.epochs}, batch_size={record.batch_size}, rate={record.rate}, labels={labels}"
        raise ValueError(f"its 'head' says {values}")
