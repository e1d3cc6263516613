"""A race picks what measuring everything picks, spends less, and can be stopped and taken up again."""

import contextlib

import numpy as np
import pytest

import hf_radin
from hf_radin.search import measure as evaluate
from hf_radin.search import race


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
        (uniform,) = (one for one in soup.measurements if one.proposal == "uniform")
        images = uniform.images + sum(one.images for one in raced)
        assert soup.report.passes.soups == pytest.approx(images / 600)


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
    average_model = evaluate.average_model
    monkeypatch.setattr(evaluate, "average_model", lambda *a, **k: made.append(a[1]) or average_model(*a, **k))
    first, raced = shown(fresh, budget=2)
    assert len(made) <= len(raced) + 2
    again, _ = shown(fresh, budget=2)
    assert len(made) <= len(raced) + 2 and again.measurements == first.measurements and again.results == first.results


@pytest.mark.parametrize("stopped", [1, 4, 9])
def test_a_killed_race_goes_on_to_the_same_end(fresh, monkeypatch, stopped):
    measure, count = evaluate.MeasuredSoup._measure, [0]

    def killed(*args):
        count[0] += 1
        if count[0] == stopped:
            raise SystemExit
        return measure(*args)

    monkeypatch.setattr(evaluate.MeasuredSoup, "_measure", killed)
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
    measure = evaluate.MeasuredSoup._measure

    def slow(self, todo, on_block):
        clock[0] += float(todo.sum())  # a second an image
        return measure(self, todo, on_block)

    monkeypatch.setattr(evaluate.MeasuredSoup, "_measure", slow)
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])
    soup, raced = shown(fresh, budget="40m")
    assert len(raced) > 1 and 1200 < clock[0] <= 2400 + 600 and soup.report.budget == "2400s"


def test_soups_that_are_far_behind_cost_little(bank, monkeypatch):
    """All of them wrong everywhere: dropped at the first look, and no soup is returned."""
    wrong = np.full(600, 11)
    monkeypatch.setattr(evaluate.MeasuredSoup, "look", lambda self, some, **_: np.where(some, wrong, evaluate.UNKNOWN))
    soup, raced = shown(bank, budget=4)
    assert len(soup.recipe.used) == 1 and all(one.images < 300 for one in raced) and len(raced) > 4


def test_a_share_held_out_takes_no_part_in_the_choice(bank):
    soup = hf_radin.radin(bank, budget=3, hold_out=0.25, seed=1)
    images = {(one.split, one.images) for one in soup.results if one.name != "uniform"}
    assert images == {("validation", 450), ("validation (held out)", 150)}
    assert soup.report.held_out == "validation (held out)" and soup.report.hold_out == 0.25
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
    for one in soup.report.against_best_single:
        gain = soup.accuracy("soup", one["split"]) - soup.accuracy("best single", one["split"])
        assert one["gain"] == pytest.approx(gain) and one["interval"][0] <= gain <= one["interval"][1]
        assert 0 < one["p_value"] <= 1
    assert [one["split"] for one in soup.report.against_best_single] == ["validation", "test"]


class Equal:
    """Stands for a trial: on every image hit or miss at random, with exactly the same number of hits on the split."""

    def __init__(self, bank, recipe, kept=None):
        generator = np.random.default_rng(abs(hash(recipe)) % 2**32)
        self.labels = np.asarray(bank.labels)
        hits = generator.permutation(np.arange(len(self.labels)) < 0.8 * len(self.labels))
        self.classes = np.where(hits, self.labels, -1)
        self.values = np.full(len(kept.entries[0]) if kept else 0, np.nan, np.float32)

    def look(self, some, **_):
        return np.where(some, self.classes, evaluate.UNKNOWN)

    def took(self, images):
        return None, None

    def forget(self):
        pass


@pytest.mark.parametrize("pilot", [None, 0.2])
def test_candidates_that_are_as_good_are_seldom_dropped(bank, digits, cache, monkeypatch, pilot):
    """Each is compared with the luckiest so far, on the same sample: the rule has to make up for that."""
    found = bank if pilot is None else hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=pilot)
    monkeypatch.setattr(race, "measured_soup", Equal)
    dropped = []
    for seed in range(12):
        rows = np.random.default_rng(seed).dirichlet(np.ones(5), size=24)
        recipes = [hf_radin.Recipe(bank.ingredients.ids, tuple(row)) for row in rows]
        entries = [race.Entry(recipe, "own", 0.8) for recipe in recipes]
        run = race._Race(found, race.Budget(), None, None, False, seed, 0.0, lambda images: None)
        for entry in entries:
            run.enter(entry)
        dropped += [one.is_out for one in run.runners]
    assert np.mean(dropped) < 0.07


@pytest.mark.parametrize("budget", [1, 1.3, 1.5, 2, 2.7])
@pytest.mark.parametrize("seed", range(3))
def test_no_budget_is_overspent(bank, monkeypatch, budget, seed):
    """Soups that differ from their ensembles on decided images too: the audit would like to grow."""
    monkeypatch.setattr(race, "measured_soup", Equal)
    _, raced = shown(bank, budget=budget, seed=seed)
    assert sum(one.images for one in raced) <= budget * 600


def test_an_interrupted_candidate_is_as_if_it_had_not_begun(fresh, monkeypatch):
    look, looks, stopped = evaluate.MeasuredSoup.look, [0], [0]

    def interrupted(self, some, **options):
        looks[0] += 1
        if looks[0] == stopped[0]:
            raise KeyboardInterrupt
        return look(self, some, **options)

    monkeypatch.setattr(evaluate.MeasuredSoup, "look", interrupted)
    for number in range(2, 8):
        looks[0], stopped[0] = 0, number
        soup = hf_radin.radin(fresh, budget=3)
        assert all(one.images > 0 for one in soup.measurements) and soup.report.measured is True
        assert soup.accuracy("soup", "validation") >= soup.accuracy("uniform", "validation")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00v\x00{'descr': oops", b"\x00" * 4928]
)
def test_broken_files_of_soups_are_measured_anew(fresh, content):
    before = hf_radin.radin(fresh, budget=2)
    for path in (fresh.folder / "soups").glob("*.npy"):
        path.write_bytes(content)
    assert hf_radin.radin(fresh, budget=2).measurements == before.measurements


def test_where_images_are_not_kept_each_candidate_is_shown_its_sample_at_once(bank, digits, tmp_path, monkeypatch):
    alone = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pixel_cache="off")
    looks = []
    look = evaluate.MeasuredSoup.look
    monkeypatch.setattr(
        evaluate.MeasuredSoup, "look", lambda self, some, **o: looks.append(self) or look(self, some, **o)
    )
    hf_radin.radin(alone, budget=2, proposals="monte-carlo")
    audits = 8  # at most, each a look more
    assert len(looks) <= 2 * len(set(map(id, looks))) + audits


def test_lines_need_classes_that_can_not_win(bank, tmp_path, digits, monkeypatch):
    from hf_radin.recipes import pruning

    alone = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path)
    monkeypatch.setattr(pruning, "MOST", 3000)
    assert hf_radin.radin(alone, budget=2).report.scored > 30  # without what would have to be sought
    assert hf_radin.radin(alone, budget=0, proposals="auto,local").report.scored > 30
    with pytest.raises(ValueError, match="proposals='line' works on the classes that can win"):
        hf_radin.radin(alone, budget=2, proposals="line")


class Odd(Equal):
    """Stands for a trial whose soup differs from its ensemble on decided images too, on more and more of them."""

    def __init__(self, bank, recipe, kept=None):
        super().__init__(bank, recipe, kept)
        generator = np.random.default_rng(abs(hash(recipe)) % 2**32)
        self.classes = bank.predict(bank.row(recipe))
        wrong = generator.random(len(bank)) < generator.choice([0.0, 0.02, 0.2])
        self.classes = np.where(wrong, -1, self.classes)


@pytest.mark.parametrize("budget", [2, 3, 5])
def test_no_budget_is_overspent_where_audits_grow(bank, monkeypatch, budget):
    """The best so far may have been shown less than the last: what it lacks is counted before another begins."""
    monkeypatch.setattr(race, "measured_soup", Odd)
    for seed in range(40):
        rows = np.random.default_rng(seed).dirichlet(np.ones(5), size=24)
        entries = [race.Entry(bank.recipe(row), "own", 0.8) for row in rows]
        measured, _, _ = race.race(bank, entries, race.Budget(budget), best=None, seed=seed)
        assert sum(one.images for one in measured) <= budget * 600


def test_a_search_does_not_depend_on_what_others_left(fresh):
    alone = hf_radin.radin(fresh, budget=2, seed=1).measurements
    for path in (fresh.folder / "soups").glob("*"):
        path.unlink()
    hf_radin.radin(fresh, budget=1000, measure="full")
    hf_radin.radin(fresh, budget=3, seed=2)
    assert hf_radin.radin(fresh, budget=2, seed=1).measurements == alone


def test_logits_of_the_final_figures_are_no_part_of_a_duration(fresh, monkeypatch):
    from hf_radin.search import report

    clock, of_split = [0.0], report.of_split

    def slow(*args, **options):
        clock[0] += 1000
        return of_split(*args, **options)

    monkeypatch.setattr(report, "of_split", slow)
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])
    assert len(shown(fresh, budget="500s", test_split="test")[1]) > 1


def test_own_recipes_are_measured_however_near_they_are(fresh):
    ids = fresh.ingredients.ids
    mine = [hf_radin.Recipe(ids[:2], (0.5 + step, 0.5 - step)) for step in (0.001, 0.002, 0.49)]
    soup = hf_radin.radin(fresh, budget=100, recipes=(one for one in mine), proposals="monte-carlo", candidates=1)
    assert {one.recipe for one in soup.measurements if one.proposal == "own"} == {*mine}
