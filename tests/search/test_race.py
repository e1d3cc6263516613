"""A race picks what measuring everything picks, spends less, and can be stopped and taken up again."""

from dataclasses import replace
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from shared.banks import as_kind
from shared.clock import clock
from shared.stopping import Stopping
from shared.training import PARTS, digit_images, image_dataset

import hf_radin
from hf_radin.logits.preflight import load_inner_products
from hf_radin.recipes.propose import propose
from hf_radin.recipes.pruning import TooMuchLeftError
from hf_radin.runtime.processes import Processes
from hf_radin.search.guide import Guide
from hf_radin.search.measure import UNKNOWN, MeasuredSoup, measured_soup
from hf_radin.search.race import Budget, Entry, RaceOptions, RaceResult, race
from hf_radin.search.radin import single_measurements
from hf_radin.search.reporter import Reporter, ReportOptions, choose
from hf_radin.soup.report import SearchSettings
from hf_radin.weights.average import average_model

__all__ = ["clock"]  # a fixture


def shown(bank, **options):
    """A soup with averaged heads, and what was measured of its candidates, but for the baseline."""
    soup = hf_radin.radin(bank, head="average", **options)
    return soup, [entry for entry in soup.report.soups if entry.proposal != "uniform"]


def guided_race(bank, budget, *, seed=0, soup_of=measured_soup) -> RaceResult:
    """The race that `radin` runs by default, the uniform soup beside it, of soups made otherwise."""
    products = load_inner_products(bank.ingredients, bank.home, torch.float32, bank.processes)
    guide = Guide(bank, propose(len(bank.ingredients)), products, local=True)
    uniform = hf_radin.Recipe.uniform(bank.ingredients.ids)
    best = choose(single_measurements(bank)).recipe
    return race(
        bank,
        guide,
        RaceOptions(Budget.of(budget), seed=seed),
        best=bank.answers(bank.row(best)),
        beside=[Entry(uniform, "uniform", float(bank.score(uniform)[0]))],
        learn=guide.learn,
        soup_of=soup_of,
    )


def stopped(bank, method: str, number: int, error: type[BaseException] = KeyboardInterrupt) -> hf_radin.LogitBank:
    """The bank, whose run stops at a call of its accelerator."""
    return replace(bank, processes=Processes(Stopping(method, number, error)))


def forget(bank) -> None:
    """Remove all that was measured of soups."""
    for path in (bank.folder / "soups").glob("*"):
        path.unlink()


@pytest.fixture
def fresh(bank):
    """The bank without any soup that was measured before."""
    forget(bank)
    return bank


def test_the_winner_is_measured_on_the_whole_split_and_the_budget_is_kept(bank, caplog):
    caplog.set_level("INFO", "hf_radin")
    for budget in (1, 1.5, 3):
        caplog.clear()
        soup, raced = shown(bank, budget=budget)
        assert sum(entry.images for entry in raced) <= budget * 600
        won = next(entry for entry in soup.measurements if entry.recipe == soup.recipe)
        assert won.images == 600 and won.measured == soup.accuracy("soup", "validation")
        assert won.interval[0] < won.measured < won.interval[1]
        assert any(line.endswith(f"measured {won.measured:.2%}.") for line in caplog.messages)  # and not of a part
        (uniform,) = (entry for entry in soup.measurements if entry.proposal == "uniform")
        images = uniform.images + sum(entry.images for entry in raced)
        assert soup.report.passes.soups == pytest.approx(images / 600)


def test_more_candidates_are_measured_for_the_same_budget(bank):
    _, raced = shown(bank, budget=3)
    _, whole = shown(bank, budget=3, measure="full")
    assert len(raced) > len(whole) == 3 and all(entry.images == 600 for entry in whole)


def test_what_a_part_says_is_near_what_the_whole_says(bank):
    _, raced = shown(bank, budget=1000, proposals="monte-carlo")
    _, whole = shown(bank, budget=1000, measure="full", proposals="monte-carlo")
    truth = {entry.recipe: entry.measured for entry in whole}
    assert any(entry.images < 600 for entry in raced)
    for entry in raced:
        assert abs(entry.measured - truth[entry.recipe]) < 0.03
        assert entry.interval[0] <= truth[entry.recipe] <= entry.interval[1]


def test_a_race_picks_as_good_a_soup_as_measuring_all(bank):
    whole = hf_radin.radin(bank, budget=1000, measure="full").accuracy("soup", "validation")
    for seed in range(5):
        assert hf_radin.radin(bank, budget=1000, seed=seed).accuracy("soup", "validation") >= whole - 0.005


def test_each_soup_is_averaged_once_or_twice_and_what_was_measured_is_not_measured_again(fresh):
    made = []

    def soup_of(bank, recipe, entries):
        def make_model():
            made.append(recipe)
            return average_model(bank.ingredients, recipe)

        return MeasuredSoup(bank, recipe, make_model, entries)

    first = guided_race(fresh, 2, soup_of=soup_of).measurements
    assert len(first) > 2 and {entry.recipe for entry in first} == {*made} and len(made) <= len(first) + 1
    made.clear()
    assert guided_race(fresh, 2, soup_of=soup_of).measurements == first and not made


def test_a_search_that_is_made_again_finds_the_same_and_runs_no_model(fresh, predictions):
    first, _ = shown(fresh, budget=2)
    assert predictions
    predictions.clear()
    again, _ = shown(fresh, budget=2)
    assert not predictions and again.measurements == first.measurements and again.results == first.results


@pytest.mark.parametrize("number", [1, 4, 9])
def test_a_killed_race_goes_on_to_the_same_end(fresh, predictions, number):
    options = {"budget": 2, "seed": 3}
    whole = hf_radin.radin(fresh, **options).measurements
    took = sum(predictions)
    forget(fresh)
    predictions.clear()
    with pytest.raises(SystemExit):
        hf_radin.radin(stopped(fresh, "reduce", number, SystemExit), **options)
    assert 0 < sum(predictions) < took
    assert hf_radin.radin(fresh, **options).measurements == whole


def test_an_interrupt_ends_the_race_and_the_best_so_far_is_measured(fresh):
    soup, raced = shown(stopped(fresh, "log", 3), budget=100)
    assert soup.report.ended == "interrupt"
    assert len(raced) == 2 and soup.accuracy("soup", "validation") >= soup.accuracy("uniform", "validation")


def test_an_interrupt_before_anything_was_measured_is_one(fresh):
    with pytest.raises(KeyboardInterrupt):
        hf_radin.radin(stopped(fresh, "reduce", 1), budget=2)


def test_a_duration_is_kept(bank, clock):
    class Slow(MeasuredSoup):
        """Takes a second an image."""

        def look(self, images, **options):
            clock.advance(float((images & (self.predictions == UNKNOWN)).sum()))
            return super().look(images, **options)

    def soup_of(bank, recipe, entries):
        return Slow(bank, recipe, partial(average_model, bank.ingredients, recipe), entries)

    result = guided_race(bank, "40m", soup_of=soup_of)
    assert result.ended == "budget" and len(result.measurements) > 2 and 1200 < clock.ahead <= 2400 + 600


def test_a_duration_is_reported_in_seconds(bank):
    assert hf_radin.radin(bank, budget="40m").report.budget == "2400s"


def test_the_time_that_the_logits_took_is_part_of_a_duration(bank, caplog):
    soup, raced = shown(replace(bank, seconds=2400.0), budget="39m")
    assert soup.report.ended == "budget" and not raced
    assert "The budget was used up before a candidate was measured." in caplog.text
    assert shown(replace(bank, seconds=2400.0), budget="80m")[1]


class Equal:
    """Stands for a soup: on every image hit or miss at random, with exactly the same number of hits on the split."""

    def __init__(self, bank, recipe, entries=None):
        self.generator = np.random.default_rng([round(1e9 * weight) for weight in bank.row(recipe)])
        self.labels = np.asarray(bank.labels)
        hits = self.generator.permutation(np.arange(len(self.labels)) < 0.8 * len(self.labels))
        self.classes = np.where(hits, self.labels, -1)
        self.values = np.full(len(entries.entries[0]) if entries else 0, np.nan, np.float32)

    def look(self, images, **_):
        return np.where(images, self.classes, UNKNOWN)

    def took(self, images):
        return None, None

    def forget(self):
        pass


class Odd(Equal):
    """Stands for a soup that differs from its ensemble on decided images too, on more and more of them."""

    def __init__(self, bank, recipe, entries=None):
        super().__init__(bank, recipe, entries)
        wrong = self.generator.random(len(bank)) < self.generator.choice([0.0, 0.02, 0.2])
        self.classes = np.where(wrong, -1, bank.predict(bank.row(recipe)))


class Wrong(Equal):
    """Stands for a soup that is wrong everywhere."""

    def __init__(self, bank, recipe, entries=None):
        super().__init__(bank, recipe, entries)
        self.classes = np.full(len(bank), -1)


def test_soups_that_are_far_behind_cost_little(bank):
    """All of them wrong everywhere: dropped at the first look, and no soup is returned."""
    uniform, *raced = guided_race(bank, 4, soup_of=Wrong).measurements
    assert len(raced) > 4 and all(entry.images < 300 and entry.dropped for entry in raced)
    measurements = [*single_measurements(bank), uniform, *raced]
    soup = Reporter.of(bank, ReportOptions()).soup("radin", measurements, SearchSettings())
    assert len(soup.recipe.used) == 1


def test_a_share_held_out_takes_no_part_in_the_choice(bank):
    soup = hf_radin.radin(bank, budget=3, hold_out=0.25, seed=1)
    images = {(entry.split, entry.images) for entry in soup.results if entry.name != "uniform"}
    assert images == {("validation", 450), ("validation (held out)", 150)}
    assert soup.report.held_out == "validation (held out)" and soup.report.hold_out == 0.25
    chosen = next(entry for entry in soup.measurements if entry.recipe == soup.recipe)
    assert chosen.images == 450
    chooses, proves = bank.divided(0.25, 1)
    assert (
        sorted([*chooses.places, *proves.places]) == list(range(600))
        and (chooses.ids == bank.ids[chooses.places]).all()
    )
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
        parts = [part.score(recipes, metric) for part in (chooses, proves)]
        assert all(part.shape == (20,) for part in parts)
        if metric in ("accuracy", "top5_accuracy", "cross_entropy"):
            np.testing.assert_allclose(parts[0] * 0.75 + parts[1] * 0.25, bank.score(recipes, metric), atol=1e-12)
    for recipe in recipes:
        assert (chooses.predict(recipe) == bank.predict(recipe)[chooses.places]).all()


def test_soup_and_best_single_are_compared_image_by_image(bank):
    soup = hf_radin.radin(bank, budget=2, test_split="test")
    comparisons = soup.report.against_best_single
    assert [comparison.split for comparison in comparisons] == ["validation", "test"]
    for comparison in comparisons:
        gain = soup.accuracy("soup", comparison.split) - soup.accuracy("best single", comparison.split)
        low, high = comparison.interval
        assert comparison.gain == pytest.approx(gain) and low <= gain <= high and 0 < comparison.p_value <= 1


@pytest.mark.parametrize("pilot", [None, 0.2])
def test_candidates_that_are_as_good_are_seldom_dropped(bank, digits, cache, pilot):
    """Each is compared with the luckiest so far, on the same sample: the rule has to make up for that."""
    if pilot is not None:
        bank = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=pilot)
    dropped = []
    for seed in range(12):
        rows = np.random.default_rng(seed).dirichlet(np.ones(5), size=24)
        entries = [Entry(bank.recipe(row), "own", 0.8) for row in rows]
        result = race(bank, entries, RaceOptions(Budget(), seed=seed), best=None, soup_of=Equal)
        dropped += [entry.dropped for entry in result.measurements]
    assert len(dropped) == 12 * 24 and np.mean(dropped) < 0.07


@pytest.mark.parametrize("budget", [1, 1.3, 1.5, 2, 2.7])
@pytest.mark.parametrize("seed", range(3))
def test_no_budget_is_overspent(bank, budget, seed):
    """Soups that differ from their ensembles on decided images too: the audit would like to grow."""
    _, *raced = guided_race(bank, budget, seed=seed, soup_of=Equal).measurements
    assert 0 < sum(entry.images for entry in raced) <= budget * 600


@pytest.mark.parametrize("number", [4, 5, 7, 9, 11, 13])
def test_an_interrupted_candidate_is_as_if_it_had_not_begun(fresh, number):
    soup = hf_radin.radin(stopped(fresh, "reduce", number), budget=3)
    assert soup.report.ended == "interrupt"
    assert all(entry.images > 0 for entry in soup.measurements) and soup.report.measured is True
    assert soup.accuracy("soup", "validation") >= soup.accuracy("uniform", "validation")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00v\x00{'descr': oops", b"\x00" * 4928]
)
def test_broken_files_of_soups_are_measured_anew(fresh, content):
    before = hf_radin.radin(fresh, budget=2)
    paths = list((fresh.folder / "soups").glob("*.npz"))
    assert paths
    for path in paths:
        path.write_bytes(content)
    assert hf_radin.radin(fresh, budget=2).measurements == before.measurements


def test_where_images_are_not_cached_each_candidate_is_shown_its_sample_at_once(bank, digits, tmp_path):
    def looks_of(bank) -> list[int]:
        """How often each candidate was shown images, audits apart."""
        looks: dict[hf_radin.Recipe, int] = {}

        class Counted(MeasuredSoup):
            def look(self, images, **options):
                looks[self.recipe] = looks.get(self.recipe, 0) + 1
                return super().look(images, **options)

        def soup_of(bank, recipe, entries):
            return Counted(bank, recipe, partial(average_model, bank.ingredients, recipe), entries)

        _, *raced = guided_race(bank, 2, soup_of=soup_of).measurements
        return [looks[entry.recipe] for entry in raced]

    alone = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pixel_cache="off")
    decoded, cached = looks_of(alone), looks_of(bank)
    audits = 8  # at most, each a look more
    assert sum(decoded) <= 2 * len(decoded) + audits
    assert min(decoded) == 1 < max(cached)


class Overfull(hf_radin.LogitBank):
    """Too many classes can win."""

    def pruned(self, top: int = 1):
        raise TooMuchLeftError


def test_lines_need_classes_that_can_not_win(bank):
    crowded = as_kind(bank, Overfull)
    assert hf_radin.radin(crowded, budget=2).report.scored > 30  # without what would have to be sought
    assert hf_radin.radin(crowded, budget=0, unmeasured=True, proposals="auto,local").report.scored > 30
    with pytest.raises(ValueError, match="proposals='line' needs few classes that can win"):
        hf_radin.radin(crowded, budget=2, proposals="line")


@pytest.mark.parametrize("budget", [2, 3, 5])
def test_no_budget_is_overspent_where_audits_grow(bank, budget):
    """The best so far may have been shown less than the last: what it lacks is counted before another begins."""
    for seed in range(40):
        rows = np.random.default_rng(seed).dirichlet(np.ones(5), size=24)
        entries = [Entry(bank.recipe(row), "own", 0.8) for row in rows]
        options = RaceOptions(Budget(budget), seed=seed)
        measurements = race(bank, entries, options, best=None, soup_of=Odd).measurements
        assert 600 <= sum(entry.images for entry in measurements) <= budget * 600


def test_a_search_does_not_depend_on_what_others_left(fresh):
    alone = hf_radin.radin(fresh, budget=2, seed=1).measurements
    forget(fresh)
    hf_radin.radin(fresh, budget=1000, measure="full")
    hf_radin.radin(fresh, budget=3, seed=2)
    assert hf_radin.radin(fresh, budget=2, seed=1).measurements == alone


def test_logits_of_the_final_figures_are_no_part_of_a_duration(bank, tmp_path, clock):
    chooses, proves = (image_dataset(*digit_images(PARTS[split])) for split in ("validation", "test"))

    def read():
        clock.advance(1000)
        yield from proves

    stream = datasets.IterableDataset.from_generator(read, features=proves.features)
    splits = {"validation": chooses, "test": stream}
    slow = hf_radin.compute_logits(bank.ingredients, splits, cache_dir=tmp_path)
    soup, raced = shown(slow, budget="500s", test_split="test")
    assert clock.ahead >= 1000 and len(raced) > 1 and soup.report.held_out == "test"


def test_own_recipes_are_measured_however_near_they_are(fresh):
    ids = fresh.ingredients.ids
    mine = [hf_radin.Recipe(ids[:2], (0.5 + step, 0.5 - step)) for step in (0.001, 0.002, 0.49)]
    soup = hf_radin.radin(fresh, budget=100, recipes=iter(mine), proposals="monte-carlo", candidates=1)
    assert {entry.recipe for entry in soup.measurements if entry.proposal == "own"} == {*mine}
