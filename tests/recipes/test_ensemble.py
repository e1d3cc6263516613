"""Scores of recipes are those of a dense computation, whatever the blocks."""

import numpy as np
import pytest
import torch

from hf_radin.checkpoints.autotune import peak_of
from hf_radin.recipes import ensemble


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(4, 57, 6)).astype(np.float32)  # (models, samples, classes)


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(0, 6, size=57)


def simplex(count: int, models: int) -> np.ndarray:
    return np.random.default_rng(2).dirichlet(np.ones(models), size=count)


def dense(logits: np.ndarray, recipes: np.ndarray) -> np.ndarray:
    """Predictions `(recipes, samples)`, all at once."""
    return np.einsum("rm,msc->rsc", recipes, logits.astype(np.float64)).argmax(axis=-1)


@pytest.mark.parametrize("at_once", [1, 100, 1000, 1 << 23])
def test_hits_equal_the_dense_computation(logits, labels, at_once):
    recipes = np.concatenate([np.eye(4), simplex(40, 4)])
    hits = ensemble.count_hits(list(logits), labels, recipes, mixed_at_once=at_once)
    assert (hits == (dense(logits, recipes) == labels).sum(axis=1)).all()


def test_predictions_equal_the_dense_computation(logits):
    for recipe in simplex(10, 4):
        assert (ensemble.predict(list(logits), recipe) == dense(logits, recipe[None])[0]).all()


def test_a_single_predicts_what_its_model_does(logits):
    for index, row in enumerate(np.eye(4)):
        assert (ensemble.predict(list(logits), row) == logits[index].argmax(axis=-1)).all()


def test_ties_go_to_the_lower_class():
    assert ensemble.predict([np.ones((3, 5), dtype=np.float32)], np.ones(1)).tolist() == [0, 0, 0]


def test_progress_counts_every_prediction(logits, labels):
    counts = []
    ensemble.count_hits(list(logits), labels, simplex(9, 4), on_block=counts.append)
    assert sum(counts) == 9 * len(labels)


@pytest.mark.parametrize(
    "recipes", [[[0.5, 0.5]], [[0.5, 0.5, 0.5, 0.5]], [[2.0, -1.0, 0.0, 0.0]], [[np.nan, 1.0, 0.0, 0.0]]]
)
def test_what_is_no_recipe_is_refused(logits, labels, recipes):
    with pytest.raises(ValueError):
        ensemble.count_hits(list(logits), labels, np.array(recipes))


def test_a_large_bank_does_not_stay_in_memory(tmp_path):
    """Of a memory map all that was scored stays resident as long as there is room; of what is read, a block."""
    shape, models = (20_000, 1000), 8  # 320 MB in float16
    for model in range(models):
        array = np.lib.format.open_memmap(tmp_path / f"{model}.npy", "w+", np.float16, shape)
        array[:] = np.random.default_rng(model).normal(size=shape[1])
        del array
    mapped = [np.load(tmp_path / f"{model}.npy", mmap_mode="r") for model in range(models)]
    labels, recipes = np.zeros(shape[0], np.int64), simplex(3, models)
    peaks, hits = [], []
    for logits in ([ensemble.Stored.of(array) for array in mapped], mapped):
        cpu = torch.device("cpu")
        peaks.append(peak_of(lambda logits=logits: hits.append(ensemble.count_hits(logits, labels, recipes)), cpu))
    assert (hits[0] == hits[1]).all()
    assert peaks[0] < 320e6 < peaks[1]


def test_what_is_stored_is_read_as_it_is(tmp_path, logits):
    for dtype in ("<f4", "<f2"):
        np.save(tmp_path / "one.npy", logits[0].astype(dtype))
        stored = ensemble.Stored.of(np.load(tmp_path / "one.npy", mmap_mode="r"))
        assert stored.shape == (57, 6) and (stored[3:50] == logits[0].astype(dtype)[3:50]).all()
        assert stored[50:100].shape == (7, 6) and stored[57:].shape == (0, 6)
