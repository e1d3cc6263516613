"""What two models predict differently is written as it is: names for classes, nulls for what is not known."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_radin.metrics.changes import Changes, margins_of


def changes() -> Changes:
    return Changes(
        ids=np.array([3, 5, 8]),
        labels=np.array([0, 1, 2]),
        predictions=np.array([[0, 1], [2, 1], [1, -1]]),
        margins=np.array([[0.5, 0.25], [2, 1], [4, np.nan]], np.float32),
        classes=("cat", "dog", "owl"),
    )


def test_an_image_is_won_where_the_second_alone_is_right():
    assert (len(changes()), changes().won, changes().lost) == (3, 1, 1)


def test_what_is_written_is_read_back(tmp_path):
    changes().to_parquet(tmp_path / "changes.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["changes.parquet"]
    rows = pq.read_table(tmp_path / "changes.parquet").to_pylist()
    assert rows[1] == {
        **{"id": 5, "label": 1, "label_name": "dog", "prediction_a": "owl", "prediction_b": "dog"},
        **{"margin_a": 2.0, "margin_b": 1.0},
    }
    assert rows[2]["prediction_b"] is None and np.isnan(rows[2]["margin_b"])


def test_no_rows_have_columns_too(tmp_path):
    nothing = np.zeros(0, int)
    Changes(nothing, nothing, np.zeros((0, 2), int), np.zeros((0, 2), np.float32), ("a", "b")).to_parquet(
        tmp_path / "nothing.parquet"
    )
    changes().to_parquet(tmp_path / "changes.parquet")
    empty, full = (pq.read_schema(tmp_path / f"{name}.parquet") for name in ("nothing", "changes"))
    assert empty == full


@pytest.mark.parametrize("classes", [2, 7])
def test_a_margin_is_what_would_have_to_be_taken_from_the_class_to_lose_it(classes):
    logits = np.random.default_rng(0).standard_normal((50, classes))
    predictions = logits.argmax(axis=1)
    margins = margins_of(logits, predictions)
    for factor, is_first in ((0.99, True), (1.01, False)):
        less = logits.copy()
        less[np.arange(50), predictions] -= factor * margins
        assert ((less.argmax(axis=1) == predictions) == is_first).all()


def test_no_class_has_no_margin():
    logits = np.array([[1.0, 3.0, np.nan], [1.0, 3.0, 2.5]])
    np.testing.assert_array_equal(margins_of(logits, np.array([-1, 1])), np.array([np.nan, 0.5], np.float32))
    pairs = np.array([np.nan, -0.25, 0.5])
    np.testing.assert_array_equal(margins_of(pairs, np.array([-1, 0, 1])), np.array([np.nan, 0.25, 0.5], np.float32))


def test_pairs_of_an_image_and_a_class_are_rows(tmp_path):
    pairs = Changes(
        ids=np.array([3, 3, 8]),
        labels=np.array([True, False, True]),
        predictions=np.array([[0, 1], [1, 0], [1, -1]], np.int8),
        margins=np.array([[0.5, 0.25], [2, 1], [4, np.nan]], np.float32),
        classes=("cat", "dog", "owl"),
        of_class=np.array([0, 2, 1]),
    )
    assert (len(pairs), pairs.won, pairs.lost) == (3, 2, 1)
    pairs.to_parquet(tmp_path / "pairs.parquet")
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert rows[1] == {
        **{"id": 3, "class": 2, "class_name": "owl", "label": False, "prediction_a": True, "prediction_b": False},
        **{"margin_a": 2.0, "margin_b": 1.0},
    }
    assert rows[2]["prediction_b"] is None and np.isnan(rows[2]["margin_b"])
