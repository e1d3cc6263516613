"""The best step between two recipes: no grid finds a better one, and the dense computation agrees."""

import numpy as np
import pytest

from hf_radin.recipes import pruning
from hf_radin.recipes.ensemble import count_hits
from hf_radin.recipes.propose import best_step


def bank(seed: int, samples: int = 300, models: int = 4, classes: int = 6, dtype=np.float32):
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(samples, classes))
    logits = [(shared + generator.normal(scale=1.5, size=shared.shape)).astype(dtype) for _ in range(models)]
    return logits, (shared + generator.normal(size=shared.shape)).argmax(axis=1)


def recipe(seed: int, models: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(models))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("seed", range(6))
def test_no_grid_finds_more_and_the_dense_computation_finds_as_many(seed, dtype):
    logits, labels = bank(seed, dtype=dtype)
    start, end = (np.eye(4)[0], np.eye(4)[2]) if seed % 2 else (recipe(seed), recipe(seed + 50))
    step, right = best_step(pruning.prune(logits), labels, start, end)
    steps = np.append(np.linspace(0, 1, 2001), step)
    hits = count_hits(logits, labels, (1 - steps[:, None]) * start + steps[:, None] * end)
    assert hits.max() <= right and hits[-1] == right


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_trying_the_middle_of_every_run_finds(seed):
    logits, labels = bank(seed, samples=40)
    start, end = recipe(seed), recipe(seed + 9)
    at, to = (np.tensordot(weights, np.stack(logits).astype(np.float64), axes=1) for weights in (start, end))
    crossings = [0.0, 1.0]
    for first, second in ((a, b) for a in range(6) for b in range(a)):
        ahead, rise = at[:, first] - at[:, second], (to - at)[:, first] - (to - at)[:, second]
        crossings += (-ahead / rise)[(-ahead / rise > 0) & (-ahead / rise < 1)].tolist()
    crossings = np.unique(crossings)
    middles = (crossings[1:] + crossings[:-1]) / 2
    hits = [((at + step * (to - at)).argmax(axis=1) == labels).sum() for step in middles]
    step, right = best_step(pruning.prune(logits), labels, start, end)
    assert right == max(hits)
    assert ((at + step * (to - at)).argmax(axis=1) == labels).sum() == right


def test_from_a_recipe_to_itself_nothing_changes():
    logits, labels = bank(0)
    step, right = best_step(pruning.prune(logits), labels, recipe(1), recipe(1))
    assert step == 0.5 and right == count_hits(logits, labels, recipe(1)[None])[0]


def test_where_every_image_is_decided_any_step_is_as_good():
    logits, labels = bank(0, models=2)
    step, right = best_step(pruning.prune([logits[0], logits[0]]), labels, np.eye(2)[0], np.eye(2)[1])
    assert step == 0.5 and right == (logits[0].argmax(axis=1) == labels).sum()


def test_blocks_change_nothing():
    logits, labels = bank(3)
    whole = best_step(pruning.prune(logits), labels, recipe(1), recipe(2))
    assert best_step(pruning.prune(logits), labels, recipe(1), recipe(2), mixed_at_once=64) == whole


@pytest.mark.parametrize("seed", range(6))
def test_the_last_bits_of_logits_change_no_step(seed):
    logits, labels = bank(seed)
    generator = np.random.default_rng(seed)
    others = [
        np.nextafter(array, array + generator.choice([-1, 1], size=array.shape).astype("f4")) for array in logits
    ]
    assert all((other != array).all() for other, array in zip(others, logits, strict=True))
    step, right = best_step(pruning.prune(logits), labels, recipe(1), recipe(2))
    assert best_step(pruning.prune(others), labels, recipe(1), recipe(2)) == (step, right)
    assert round(step, 4) == step
