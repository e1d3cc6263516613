"""Intervals hold what they promise, and the paired test is the binomial one."""

import math

import numpy as np
import pytest

from hf_radin.metrics.intervals import accuracy_interval, difference_interval, is_above_zero, mcnemar


def hits(count: int, samples: int) -> np.ndarray:
    return np.arange(samples) < count


def by_hand(won: int, lost: int) -> float:
    count = won + lost
    tail = sum(math.comb(count, k) for k in range(min(won, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 20), (0, 30)])
def test_the_test_is_exact_whatever_the_others_are(won, lost):
    soup = np.repeat([True, False, True, False], [won, lost, 100, 7])
    single = np.repeat([False, True, True, False], [won, lost, 100, 7])
    assert mcnemar(soup, single) == pytest.approx(by_hand(won, lost), rel=1e-9)
    assert mcnemar(single, soup) == pytest.approx(mcnemar(soup, single), rel=1e-12)


def test_the_test_of_many_images_does_not_overflow():
    soup = np.repeat([True, False], [30_200, 29_800])
    assert mcnemar(soup, ~soup) == pytest.approx(math.erfc(399 / math.sqrt(2 * 60_000)), rel=1e-3)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = accuracy_interval(generator.random(500) < 0.8)
        covered += low <= 0.8 <= high
    assert 0.92 <= covered / 400 <= 0.975


def test_models_that_agree_on_most_images_differ_by_little():
    soup = hits(900, 1000)
    single = soup.copy()
    single[:5] = False
    low, high = difference_interval(soup, single)
    assert 0 < low < 0.005 < high < 0.011
    assert difference_interval(soup, soup) == (0, 0)
    assert accuracy_interval(hits(10, 10)) == (1, 1)


def test_a_mean_is_above_zero_beyond_chance():
    gains = np.random.default_rng(0).normal(size=1000)
    assert not is_above_zero(gains - gains.mean()) and not is_above_zero(-gains - 1) and is_above_zero(gains + 0.2)
    assert not is_above_zero(np.zeros(10)) and is_above_zero(np.ones(10)) and not is_above_zero(np.ones(1))
