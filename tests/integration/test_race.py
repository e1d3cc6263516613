"""A race picks what measuring everything picks, spends less, and can be stopped and taken up again."""

import contextlib

import numpy as np
import pytest

import hf_radin
from hf_radin import evaluate, race


def shown(bank, **options):
    """A soup, and how many images its candidates were shown, but for the baseline."""
    soup = hf_radin.radin(bank, **options)
    return soup, [one for one in soup.measurements if one.proposal not in ("single", "uniform")]


@pytest.fixture
def fresh(bank):
    """The bank without any soup that was measured before."""
    for path in (bank.folder / "soups").glob("*"):
        path.unlink()
    return bank


def test_the_winner_is_measured_on_the_whole_split_and_the_budget_is_kept(bank):
    for budget in (1, 1.5, 3):
        soup, raced = shown(bank, budget=budget)
        assert sum(one.images for one in raced) <= budget * 600
        won = next(one for one in soup.measurements if one.recipe == soup.recipe)
        assert won.images == 600 and won.measured == soup.accuracy("soup", "validation")
        assert won.interval[0] < won.measured < won.interval[1]
        assert soup.about["passes"]["soups"] == pytest.approx(1 + sum(one.images for one in raced) / 600)


def test_more_candidates_are_measured_for_the_same_budget(bank):
    _, raced = shown(bank, budget=3)
    _, whole = shown(bank, budget=3, measure="full")
    assert len(raced) > len(whole) == 3 and all(one.images == 600 for one in whole)


def test_what_a_part_says_is_near_what_the_whole_says(bank):
    _, raced = shown(bank, budget=1000, proposals="monte-carlo")
    _, whole = shown(bank, budget=1000, measure="full", proposals="monte-carlo")
    truth = {one.recipe: one.measured for one in whole}
    assert any(one.images < 600 for one in raced)
    for one in raced:
        assert abs(one.measured - truth[one.recipe]) < 0.03
        assert one.interval[0] <= truth[one.recipe] <= one.interval[1]


def test_a_race_picks_as_good_a_soup_as_measuring_all(bank):
    whole = hf_radin.radin(bank, budget=1000, measure="full").accuracy("soup", "validation")
    for seed in range(5):
        assert hf_radin.radin(bank, budget=1000, seed=seed).accuracy("soup", "validation") >= whole - 0.005


def test_each_soup_is_averaged_once_or_twice_and_what_was_measured_is_not_measured_again(fresh, monkeypatch):
    made = []
    average_model = race.average_model
    monkeypatch.setattr(race, "average_model", lambda *a, **k: made.append(a[1]) or average_model(*a, **k))
    first, raced = shown(fresh, budget=2)
    assert len(made) <= len(raced) + 2
    again, _ = shown(fresh, budget=2)
    assert len(made) <= len(raced) + 2 and again.measurements == first.measurements and again.results == first.results


@pytest.mark.parametrize("stopped", [1, 4, 9])
def test_a_killed_race_goes_on_to_the_same_end(fresh, monkeypatch, stopped):
    measure, count = evaluate.Trial._measure, [0]

    def killed(*args):
        count[0] += 1
        if count[0] == stopped:
            raise SystemExit
        return measure(*args)

    monkeypatch.setattr(evaluate.Trial, "_measure", killed)
    with contextlib.suppress(SystemExit):
        hf_radin.radin(fresh, budget=2, seed=3)
    resumed = hf_radin.radin(fresh, budget=2, seed=3)
    for path in (fresh.folder / "soups").glob("*"):
        path.unlink()
    count[0] = stopped + 1
    assert hf_radin.radin(fresh, budget=2, seed=3).measurements == resumed.measurements


def test_an_interrupt_ends_the_race_and_the_best_so_far_is_measured(fresh, monkeypatch):
    enter, entered = race._Race.enter, []

    def interrupted(self, entry, **options):
        if len(entered) == 3:
            raise KeyboardInterrupt
        entered.append(entry)
        return enter(self, entry, **options)

    monkeypatch.setattr(race._Race, "enter", interrupted)
    soup, raced = shown(fresh, budget=100)
    assert len(raced) == 2 and soup.accuracy("soup", "validation") >= soup.accuracy("uniform", "validation")


def test_an_interrupt_before_anything_was_measured_is_one(fresh, monkeypatch):
    monkeypatch.setattr(race._Race, "enter", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hf_radin.radin(fresh, budget=2)


def test_a_duration_is_kept(fresh, monkeypatch):
    clock = [0.0]
    measure = evaluate.Trial._measure

    def slow(self, todo, on_block):
        clock[0] += float(todo.sum())  # a second an image
        return measure(self, todo, on_block)

    monkeypatch.setattr(evaluate.Trial, "_measure", slow)
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])
    soup, raced = shown(fresh, budget="40m")
    assert len(raced) > 1 and 1200 < clock[0] <= 2400 + 600 and soup.about["budget"] == "2400s"


def test_soups_that_are_far_behind_cost_little(bank, monkeypatch):
    """All of them wrong everywhere: dropped at the first look, and no soup is returned."""
    wrong = np.full(600, 11)
    monkeypatch.setattr(evaluate.Trial, "look", lambda self, some, **_: np.where(some, wrong, evaluate.UNKNOWN))
    soup, raced = shown(bank, budget=4)
    assert len(soup.recipe.used) == 1 and all(one.images < 300 for one in raced) and len(raced) > 4


def test_a_share_held_out_takes_no_part_in_the_choice(bank):
    soup = hf_radin.radin(bank, budget=3, hold_out=0.25, seed=1)
    assert {(one.split, one.images) for one in soup.results} == {("validation", 450), ("validation (held out)", 150)}
    assert soup.about["held_out"] == "validation (held out)" and soup.about["hold_out"] == 0.25
    chosen = next(one for one in soup.measurements if one.recipe == soup.recipe)
    assert chosen.images == 450
    rest, out = bank.divided(0.25, 1)
    assert sorted([*rest.places, *out.places]) == list(range(600)) and (rest.ids == bank.ids[rest.places]).all()
    recipes = np.random.default_rng(0).dirichlet(np.ones(5), size=20)
    for metric in (
        "accuracy",
        "balanced_accuracy",
        "f1",
        "mcc",
        "top5_accuracy",
        "cross_entropy",
        "calibration_error",
    ):
        parts = [part.score(recipes, metric) for part in (rest, out)]
        assert all(part.shape == (20,) for part in parts)
        if metric in ("accuracy", "top5_accuracy", "cross_entropy"):
            np.testing.assert_allclose(parts[0] * 0.75 + parts[1] * 0.25, bank.score(recipes, metric), atol=1e-12)
    for recipe in recipes:
        assert (rest.predict(recipe) == bank.predict(recipe)[rest.places]).all()


def test_soup_and_best_single_are_compared_image_by_image(bank):
    soup = hf_radin.radin(bank, budget=2, test_split="test")
    for one in soup.about["against_best_single"]:
        gain = soup.accuracy("soup", one["split"]) - soup.accuracy("best single", one["split"])
        assert one["gain"] == pytest.approx(gain) and one["interval"][0] <= gain <= one["interval"][1]
        assert 0 < one["p_value"] <= 1
    assert [one["split"] for one in soup.about["against_best_single"]] == ["validation", "test"]
