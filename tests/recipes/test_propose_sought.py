"""Candidates that are sought by their scores get better, stay on the simplex, and differ."""

from itertools import product

import numpy as np
import pytest

from hf_radin.recipes.propose import (
    best_subsets,
    dirichlet,
    forward,
    line_search,
    local_search,
    model_stock,
    shortlist,
    wise_ft,
)

MODELS = 7
TARGET = np.array([0.5, 0.25, 0.25, 0, 0, 0, 0])


def nearness(rows: np.ndarray) -> np.ndarray:
    """A score that one mixture has most of."""
    return -((rows - TARGET) ** 2).sum(axis=1)


def on_simplex(rows: np.ndarray) -> bool:
    return bool(np.allclose(rows.sum(axis=1), 1) and (rows >= 0).all())


def test_forward_selection_finds_a_mixture_of_unequal_parts():
    candidates = forward(MODELS, nearness)
    assert on_simplex(candidates.weights) and set(candidates.proposals) == {"forward"}
    assert (candidates.weights == TARGET).all(axis=1).any()  # 2, 1 and 1 parts
    assert len({row.tobytes() for row in candidates.weights}) == len(candidates.weights) <= 2 * MODELS


def test_forward_selection_begins_with_the_best_single_and_adds_one_part_at_a_time():
    candidates = forward(MODELS, nearness, steps=5)
    assert (candidates.weights[0] == np.eye(MODELS)[0]).all()
    for parts, row in enumerate(candidates.weights, start=1):
        assert np.allclose(row * parts, np.round(row * parts))


@pytest.mark.parametrize("seed", range(5))
def test_local_search_ends_where_no_neighbour_is_better(seed):
    table = dict(zip(product((0, 1), repeat=5), np.random.default_rng(seed).normal(size=32), strict=True))

    def score(rows: np.ndarray) -> np.ndarray:
        return np.array([table[tuple(int(weight > 0) for weight in row)] for row in rows])

    start = np.array([1, 1, 0, 0, 0], bool)
    candidates = local_search(start, score)
    end = candidates.weights[0] > 0 if len(candidates.weights) else start
    if len(candidates.weights):
        assert on_simplex(candidates.weights) and score(end[None])[0] > score(start[None])[0]
    members = np.array(list(table), bool)[1:]
    changed = (members != end).sum(axis=1)
    swapped = (changed == 2) & (members.sum(axis=1) == end.sum())
    near = members[(changed == 1) | swapped]
    assert score(near).max() <= score(end[None])[0]


def test_a_subset_that_can_not_be_bettered_gives_nothing():
    assert len(local_search(np.array([1, 1, 1], bool), lambda rows: (rows > 0).sum(axis=1)).weights) == 0


def test_dirichlet_draws_lie_on_the_simplex_and_depend_on_the_seed():
    first, same, other = (dirichlet(MODELS, count=50, seed=seed).weights for seed in (1, 1, 2))
    assert on_simplex(first) and (first == same).all() and (first != other).any()


def test_a_shortlist_holds_the_best_and_no_two_alike():
    rows = np.concatenate([np.eye(3)[:1] + 1e-3 * np.random.default_rng(0).dirichlet(np.ones(3), 20), np.eye(3)[1:]])
    rows /= rows.sum(axis=1, keepdims=True)
    scores = np.concatenate([np.linspace(0.9, 0.8, 21)[:-1], [0.5, 0.4]])
    assert shortlist(rows, scores, 3) == [0, 20, 21]
    assert shortlist(rows, scores, 5) == [0, 20, 21, 1, 2]  # the best of the others, if no more differ
    assert shortlist(rows, scores, 100)[:3] == [0, 20, 21] and sorted(shortlist(rows, scores, 100)) == list(range(22))
    assert shortlist(rows, scores, 2, apart=0) == [0, 1]


def test_the_best_of_all_subsets_are_found_in_parts():
    members = np.array(list(product((False, True), repeat=MODELS)))[1:]
    rows = members / members.sum(axis=1, keepdims=True)
    best = np.sort(nearness(rows))[::-1]
    candidates = best_subsets(MODELS, nearness, keep=5, scored_at_once=10)
    assert set(candidates.proposals) == {"subset"} and len(candidates.weights) == 5
    np.testing.assert_allclose(nearness(candidates.weights), best[:5])
    assert len(best_subsets(3, lambda rows: nearness(np.pad(rows, ((0, 0), (0, 4))))).weights) == 7


def best_by_grid(start, end):
    """A step on a fine grid, scored in whole numbers as images are."""
    steps = np.linspace(0, 1, 1001)
    scores = (1e6 * nearness((1 - steps[:, None]) * start + steps[:, None] * end)).astype(int)
    return float(steps[scores.argmax()]), int(scores.max()) + 10**7


@pytest.mark.parametrize("start", [np.eye(MODELS)[3], np.full(MODELS, 1 / MODELS), np.eye(MODELS)[0]])
def test_line_search_goes_up_and_finds_parts_that_no_subset_has(start):
    candidates = line_search(start, best_by_grid)
    scores = nearness(candidates.weights)
    assert on_simplex(candidates.weights) and set(candidates.proposals) == {"line"}
    assert (np.diff(scores) > 0).all() and scores[0] > nearness(start[None])[0]
    assert scores[-1] > -1e-3


@pytest.mark.parametrize(("counts", "left"), [(False, {0, 1, 3}), (True, {0, 1, 2, 3})])
def test_line_search_leaves_dust_out_unless_it_counts(counts, left):
    def step(start: np.ndarray, end: np.ndarray) -> tuple[float, int]:
        """The fourth model makes images right, and the dust of the third does if it counts."""
        rows = np.array([(1 - share) * start + share * end for share in (0.0, 0.3)])
        rights = 10 * (rows[:, 3] > 0) + 5 * counts * (rows[:, 2] > 0)
        return (0.0, 0.3)[rights.argmax()], int(rights.max())

    rows = line_search(np.array([0.5, 0.4999, 1e-4, 0]), step).weights
    assert len(rows) == 1 and on_simplex(rows) and {*np.flatnonzero(rows[0])} == left


def test_line_search_ends_at_once_where_nothing_is_better():
    assert line_search(TARGET, best_by_grid).weights.shape == (0, MODELS)


def test_recipes_are_mixed_with_the_start_in_tenths():
    rows = np.array([TARGET, np.eye(MODELS)[1]])
    candidates = wise_ft(6, rows)
    assert on_simplex(candidates.weights) and len(candidates.weights) == 18
    assert set(candidates.proposals) == {"wise-ft"}
    np.testing.assert_allclose(candidates.weights[2], 0.3 * TARGET + 0.7 * np.eye(MODELS)[6])
    assert wise_ft(0, np.zeros((0, MODELS))).weights.shape == (0, MODELS)


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.2, np.pi / 2])
def test_model_stock_is_nearest_to_the_centre_of_the_shell(angle):
    """Fine-tunes that lie at one distance from the start and at one angle to each other, around an unknown centre."""
    models, start = 5, np.random.default_rng(0).normal(size=40)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(40, models)))[0].T
    # `angle` lies between any two of them
    apart = np.sqrt(np.cos(angle)) * basis[0] + np.sqrt(1 - np.cos(angle)) * basis[1:]
    weights = np.vstack([start + 2 * apart, start])
    centred = weights - weights.mean(axis=0)
    (row,) = model_stock(models - 1, centred @ centred.T).weights
    assert np.isclose(row.sum(), 1) and (row >= -1e-12).all() and np.ptp(row[:-1]) < 1e-9
    n, cosine = models - 1, np.cos(angle)
    assert row[-1] == pytest.approx(1 - n * cosine / (1 + (n - 1) * cosine), abs=1e-9)
    centre = start + 2 * np.sqrt(np.cos(angle)) * basis[0]  # what the noise of each lies around
    share = np.linspace(0, 1, 1001)[:, None]
    line = start + share * (weights[:-1].mean(axis=0) - start)
    nearest = share[np.argmin(((line - centre) ** 2).sum(axis=1))].item()
    assert 1 - row[-1] == pytest.approx(nearest, abs=1e-3)


def test_model_stock_of_models_that_are_their_start_is_a_recipe():
    assert on_simplex(model_stock(0, np.zeros((3, 3))).weights)
    assert on_simplex(model_stock(1, np.zeros((2, 2))).weights)
