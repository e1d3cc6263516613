"""Candidates are what the paper says they are."""

import numpy as np
import pytest

from hf_radin.recipes.propose import monte_carlo, propose, singles, subsets, uniform


def sizes(weights: np.ndarray) -> np.ndarray:
    return (weights > 0).sum(axis=1)


@pytest.mark.parametrize("models", [2, 3, 5, 13, 40])
@pytest.mark.parametrize("kind", ["auto", "monte-carlo"])
def test_all_lie_on_the_simplex_and_none_stands_twice(models, kind):
    candidates = propose(models, proposals=kind)
    assert np.allclose(candidates.weights.sum(axis=1), 1) and (candidates.weights >= 0).all()
    assert len({row.tobytes() for row in candidates.weights}) == len(candidates.weights) == len(candidates.proposals)


@pytest.mark.parametrize("kind", ["auto", "monte-carlo", "subsets"])
def test_singles_and_the_uniform_soup_are_always_there(kind):
    candidates = propose(6, proposals=kind)
    assert candidates.proposals[:7] == ("single",) * 6 + ("uniform",)
    assert (candidates.weights[:6] == np.eye(6)).all() and (candidates.weights[6] == 1 / 6).all()


def test_monte_carlo_draws_200_subsets_of_2_to_all_but_one_in_equal_parts():
    candidates = monte_carlo(13, seed=1)
    assert len(candidates.weights) == 200
    assert set(sizes(candidates.weights)) == set(range(2, 13))
    for row in candidates.weights:
        assert len(set(row[row > 0])) == 1


def test_monte_carlo_draws_the_sizes_evenly():
    drawn = np.bincount(sizes(monte_carlo(40, count=20_000).weights), minlength=41)[4:37]
    assert drawn.min() > 0.8 * drawn.mean() and drawn.max() < 1.2 * drawn.mean()


def test_monte_carlo_stops_where_there_are_no_more():
    assert len(monte_carlo(4).weights) == 2**4 - 4 - 2
    assert len(monte_carlo(2).weights) == 0


def test_a_seed_decides_the_draw():
    assert (monte_carlo(13, seed=3).weights == monte_carlo(13, seed=3).weights).all()
    assert (monte_carlo(13, seed=3).weights != monte_carlo(13, seed=4).weights).any()


def test_auto_takes_all_subsets_up_to_12():
    assert len(propose(12).weights) == 2**12 - 1
    assert len(propose(13).weights) == 200 + 13 + 1


def test_subsets_are_all_and_the_small_ones_come_first():
    candidates = subsets(5)
    assert len(candidates.weights) == 31
    assert (np.diff(sizes(candidates.weights)) >= 0).all()


def test_adding_keeps_the_first_name():
    candidates = singles(3) + uniform(3) + subsets(3)
    assert candidates.proposals.count("single") == 3 and candidates.proposals.count("uniform") == 1
    assert len(candidates.weights) == 7


@pytest.mark.parametrize("arguments", [{"proposals": "genetic"}, {"models": 21, "proposals": "subsets"}, {"count": 0}])
def test_what_can_not_be_proposed_is_refused(arguments):
    with pytest.raises(ValueError):
        propose(**{"models": 4, **arguments})
