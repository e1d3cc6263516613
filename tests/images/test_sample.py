"""What a sample says of the whole split is right on average, as sure as it says, and certain when nothing is left."""

import json

import numpy as np
import pytest

from hf_radin.images.sample import Chosen, Pilot
from hf_radin.metrics.intervals import Strata
from hf_radin.runtime.schema import to_json
from hf_radin.search.race import Budget

GROUPS = [np.arange(0, 1000, 4), np.setdiff1d(np.arange(1000), np.arange(0, 1000, 4))]  # 250 and 750


def values(seed: int, rare: float = 0.01) -> np.ndarray:
    """Differences of hits: many where images are contested, few where they are not."""
    generator = np.random.default_rng(seed)
    differences = generator.choice([-1, 0, 1], size=1000, p=[0.1, 0.8, 0.1])
    differences[GROUPS[1]] = generator.choice([-1, 0], size=750, p=[rare, 1 - rare])
    return differences


def test_a_whole_split_is_known_exactly():
    differences = values(0)
    mean, error = Strata.shuffled(GROUPS, 0).mean(differences, np.ones(1000, dtype=bool))
    assert mean == pytest.approx(differences.mean(), abs=1e-12) and error == 0


def test_estimates_are_right_on_average_and_as_sure_as_they_say():
    differences = values(1, rare=0.05)
    means, errors = [], []
    for seed in range(400):
        strata = Strata.shuffled(GROUPS, seed)
        mean, error = strata.mean(differences, strata.first([100, 150]))
        means.append(mean)
        errors.append(error)
    assert np.mean(means) == pytest.approx(differences.mean(), abs=4 * np.std(means) / 20)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_a_few_equal_images_are_no_certainty():
    strata = Strata.shuffled(GROUPS, 0)
    nothing = np.zeros(1000, dtype=int)
    errors = [strata.mean(nothing, strata.first([250, count]))[1] for count in (10, 100, 750)]
    assert errors[0] > errors[1] > errors[2] == 0
    assert strata.mean(nothing, strata.first([250, 0]))[1] == np.inf


def test_what_is_not_known_is_not_looked_at():
    strata = Strata.shuffled(GROUPS, 3)
    known = strata.first([50, 60])
    differences = values(2)
    assert strata.mean(differences, known) == strata.mean(np.where(known, differences, 1), known)


def test_samples_grow_and_an_empty_group_is_none():
    strata = Strata.shuffled([np.arange(10), np.arange(0)], 0)
    assert (strata.first([3, 0]) <= strata.first([7, 5])).all() and strata.first([7, 5]).sum() == 7
    assert strata.mean(np.ones(10, dtype=int), strata.first([10, 0])) == (1.0, 0.0)


PASSES = [(8, 8), (2.5, 2.5), ("3", 3), (0, 0), (np.int64(4), 4)]
SECONDS = [("90s", 90), ("15m", 900), ("1.5h", 5400), ("2 min", 120)]


@pytest.mark.parametrize(
    ("given", "passes", "seconds"),
    [(given, n, np.inf) for given, n in PASSES] + [(given, np.inf, n) for given, n in SECONDS],
)
def test_a_budget_is_passes_or_time(given, passes, seconds):
    budget = Budget.of(given)
    assert (budget.passes, budget.seconds) == (passes, seconds)
    assert Budget.of(str(budget)) == budget


@pytest.mark.parametrize("given", [-1, 0.99, True, None, "", "m", "-5m", "1e400", "nan", float("inf"), "15 days", [8]])
def test_no_budget(given):
    with pytest.raises(ValueError, match="it is a number of passes over the split, at least the 1"):
        Budget.of(given)


def test_a_pilot_draws_the_share_that_it_says_from_every_block():
    pilot = Pilot(0.23, seed=4)
    drawn = [pilot.rows((0, number), 64) for number in range(400)]
    assert {len(rows) for rows in drawn} == {14, 15}
    assert sum(map(len, drawn)) / (400 * 64) == pytest.approx(0.23, abs=0.002)
    counts = np.bincount(np.concatenate(drawn), minlength=64)
    assert counts.min() > 50 and all((np.diff(rows) > 0).all() for rows in drawn)
    assert (pilot.rows((0, 3), 64) == drawn[3]).all() and len(pilot.rows((1, 0), 0)) == 0
    assert any(set(Pilot(0.23, seed=5).rows((0, n), 64)) != set(drawn[n]) for n in range(9))


def test_images_that_all_say_the_same_are_no_certainty_either():
    strata = Strata.shuffled([np.arange(100)], 0)
    losses = np.full(100, -1)
    mean, error = strata.mean(losses, strata.first([3]))
    assert mean == -1 and error > 0.3
    assert strata.mean(losses, strata.first([100])) == (-1, 0)


def test_numbers_of_numpy_are_numbers():
    pilot = Pilot(np.float64(0.25), seed=np.int64(3))
    assert pilot == Pilot(0.25, seed=3) and json.dumps(to_json(pilot)) == '{"share": 0.25, "seed": 3}'
    assert Pilot(np.float32(0.25)) == Pilot(0.25)


@pytest.mark.parametrize("seed", [-1, 1.5, None, True])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match="The seed of a pilot is"):
        Pilot(0.2, seed=seed)


def test_images_that_were_chosen_are_found_in_their_blocks():
    blocks = ((0, 0, 5), (0, 1, 3), (1, 0, 4))
    chosen = Chosen(np.array([0, 4, 5, 11]), blocks)
    rows = [chosen.rows((shard, number), count).tolist() for shard, number, count in blocks]
    assert rows == [[0, 4], [0], [3]]
    assert chosen.share == 4 / 12 and Chosen(np.array([0, 4, 5]), blocks).key != chosen.key


def test_what_a_pilot_takes_is_less_than_all_logits_as_soon_as_few_can_speak_for_many():
    assert [Pilot(0.1).passes(models) < models for models in (2, 5, 6, 100)] == [False, False, True, True]
    assert Pilot.whole(5) == 5 and Pilot.whole(6) == Pilot.whole(100) == 3
