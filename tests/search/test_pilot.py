"""Logits of a part of the split say which others tell recipes apart; soups are measured on all of it."""

import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest

import hf_radin
from hf_radin.cli import tables
from hf_radin.images import sample
from hf_radin.logits import compute as logits
from hf_radin.recipes import pruning
from hf_radin.search import measure, report
from hf_radin.search import pilot as telling


@pytest.fixture(scope="module")
def pilot(bank, digits, cache):
    return hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=0.25)


def test_its_logits_are_those_of_the_images_that_were_drawn(pilot, bank):
    assert len(pilot) == pytest.approx(150, abs=10) and pilot.samples == 600 and pilot.is_pilot
    assert (pilot.labels == bank.labels[pilot.places]).all() and (pilot.ids == bank.ids[pilot.places]).all()
    for index in range(5):
        np.testing.assert_allclose(pilot.logits(index), bank.logits(index)[pilot.places], atol=1e-4)
    assert pilot.folder != bank.folder and pilot.images.folder == bank.images.folder


def test_it_is_the_same_for_any_blocks_size_of_groups_and_opened_again(pilot, bank, digits, tmp_path):
    again = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pilot=0.25, models_in_memory=2)
    opened = hf_radin.LogitBank.open(again.folder)
    for one in (again, opened):
        assert (one.places == pilot.places).all()
        assert all((one.logits(index) == pilot.logits(index)).all() for index in range(5))
    assert hf_radin.radin(opened, budget=2).measurements == hf_radin.radin(pilot, budget=2).measurements


@pytest.fixture
def two_lead(monkeypatch):
    """Of five ingredients two see all images; by themselves that few would all see them."""
    monkeypatch.setattr(sample, "LEADING", 2)


@pytest.fixture
def lenient(two_lead, monkeypatch):
    """A margin that leaves images out, of a zoo whose models say quite different things."""
    monkeypatch.setattr(telling, "ASTRAY", 0.02)


def test_most_see_only_the_images_that_tell_recipes_apart(pilot, bank, lenient):
    found, told = telling.complete(pilot)
    assert not found.is_pilot and len(found) == 600 and found.ingredients.ids == bank.ingredients.ids
    rest, whole = found.partial.rest, found.partial.whole
    assert 0 < len(rest) < 600 - len(pilot) and not set(rest) & set(pilot.places)
    assert (told["share"], told["seed"], told["given"], told["whole"]) == (0.25, 0, 5, list(whole))
    assert told["shown"] == 600 - len(rest) and told["margin"] > 0
    more = len(whole) - 2  # the best single model may be none of the two
    expected = 5 * len(pilot) + 2 * 600 + 3 * (600 - len(pilot) - len(rest)) + more * len(rest)
    assert told["passes"] == pytest.approx(expected / 600)


def test_what_is_known_is_what_all_logits_say_and_the_rest_is_what_the_leading_agree_on(pilot, bank, lenient, cache):
    found, told = telling.complete(pilot)
    rest = found.partial.rest
    shown = np.setdiff1d(np.arange(600), rest)
    recipes = np.random.default_rng(0).dirichlet(np.ones(5), size=50)
    for row in recipes:
        assert (found.predict(row)[shown] == bank.predict(row)[shown]).all()
    leading = [bank.predict(bank.row(hf_radin.Recipe.uniform([name]))) for name in told["whole"][:2]]
    assert (leading[0][rest] == leading[1][rest]).all()
    assert all((found.predict(row)[rest] == leading[0][rest]).all() for row in recipes)
    for name in told["whole"]:
        row = bank.row(hf_radin.Recipe.uniform([name]))
        assert (found.predict(row) == bank.predict(row)).all()
    logits = np.stack([np.asarray(bank.logits(name))[rest] for name in told["whole"][:2]])
    ahead = np.diff(np.sort(logits, axis=2)[:, :, -2:], axis=2)
    assert ahead.min() >= told["margin"] - 1e-4


def test_where_all_images_tell_recipes_apart_it_is_the_search_with_all_logits(pilot, bank, two_lead, monkeypatch):
    monkeypatch.setattr(telling, "ASTRAY", -1.0)
    soup, other = hf_radin.radin(pilot, budget=3, seed=2), hf_radin.radin(bank, budget=3, seed=2)
    assert soup.report.pilot.margin is None and soup.report.pilot.shown == 600
    assert soup.recipe == other.recipe and soup.results == other.results
    assert soup.measurements == other.measurements
    assert soup.report.passes.logits == pytest.approx(5 + 2 * len(pilot) / 600)


def test_few_ingredients_all_see_all_images(pilot, bank):
    soup, other = hf_radin.radin(pilot, budget=3, seed=2), hf_radin.radin(bank, budget=3, seed=2)
    assert soup.report.pilot.whole == list(bank.ingredients.ids)
    assert (soup.recipe, soup.measurements, soup.results) == (other.recipe, other.measurements, other.results)
    assert soup.report.passes.logits == pytest.approx(5 + 5 * len(pilot) / 600)


def test_the_figures_are_of_the_whole_split_and_a_held_out_one_takes_few_logits(pilot, bank, lenient, monkeypatch):
    asked = []
    of_split = report.of_split
    monkeypatch.setattr(
        report, "of_split", lambda bank, name, **_: asked.append(bank.ingredients.ids) or of_split(bank, name)
    )
    soup = hf_radin.radin(pilot, budget=3, test_split="test")
    rows = {(one.name, one.split): one.images for one in soup.results}
    assert rows["soup", "validation"] == rows["best single", "validation"] == 600
    assert rows["ensemble", "validation"] == soup.report.pilot.shown < 600
    assert rows["soup", "test"] == rows["best single", "test"] == 497 and ("ensemble", "test") not in rows
    assert asked == [tuple(soup.report.pilot.whole)] and soup.report.held_out_logits == len(asked[0])
    singles = {one.recipe.ingredients[0]: one.images for one in soup.measurements if one.proposal == "single"}
    whole = soup.report.pilot.whole
    assert all((images == 600) == (name in whole) for name, images in singles.items())
    assert all(one.images == 600 for one in soup.measurements if one.recipe == soup.recipe)


def test_the_best_single_model_is_known_on_all_images(pilot, bank, lenient, monkeypatch):
    """Whichever two lead: here the two that are worst."""
    score = type(pilot).score
    monkeypatch.setattr(type(pilot), "score", lambda self, rows, **options: -score(self, rows, **options))
    found, told = telling.complete(pilot)
    monkeypatch.undo()
    singles = [(found.predict(row) == bank.labels).mean() for row in np.eye(5)]
    best = bank.ingredients.ids[int(np.argmax(singles))]
    assert best in told["whole"][2:]
    row = bank.row(hf_radin.Recipe.uniform([best]))
    assert (found.predict(row) == bank.predict(row)).all()


def test_without_measuring_recipes_are_estimated(pilot):
    soup = hf_radin.radin(pilot, budget=0)
    assert soup.measurements[-1].measured is None and soup.report.measured is False


def test_what_was_not_computed_is_estimated_without_a_bias(bank, digits, cache, lenient):
    """By the images of the pilot on which the leading agree as clearly: over pilots, the errors are on both sides."""
    true = [float((bank.predict(row) == bank.labels).mean()) for row in np.eye(5)]
    errors, assumed, inside = [], [], []
    for seed in range(12):
        made = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=sample.Pilot(0.25, seed))
        found, _ = telling.complete(made)
        for place, name in enumerate(bank.ingredients.ids):
            if name not in found.partial.whole:
                hits = found.predict(np.eye(5)[place]) == bank.labels
                value, (low, high) = found.partial.estimate(hits)
                errors.append(value - true[place])
                assumed.append(float(hits.mean()) - true[place])
                inside.append(low <= true[place] <= high)
    assert len(errors) > 20 and np.mean(inside) > 0.9
    assert abs(np.mean(errors)) < 0.005 < np.mean(assumed)  # taking what the leading say for theirs is too good


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, True, "0.2", float("nan")])
def test_a_share_that_is_none_is_refused(bank, digits, cache, share, monkeypatch):
    monkeypatch.setattr(logits, "compute", lambda *_, **__: pytest.fail("logits were computed"))
    with pytest.raises(ValueError, match="it is the share of the split that logits are computed of"):
        hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=share)


def test_what_takes_all_logits_says_so(pilot):
    for method in (hf_radin.greedy, hf_radin.uniform, hf_radin.best_single):
        with pytest.raises(ValueError, match="compute them without pilot, or use radin"):
            method(pilot)
    with pytest.raises(ValueError, match=r"hold_out=0\.2: the images of a pilot say which others are looked at"):
        hf_radin.radin(pilot, hold_out=0.2)
    with pytest.raises(ValueError, match="can't be shared"):
        pilot.push_to_hub("org/bank")


def test_estimates_of_a_pilot_are_compared_with_singles(pilot, monkeypatch):
    monkeypatch.setattr(type(pilot), "score", lambda self, rows, *_, **__: np.full(len(rows), 0.01))
    soup = hf_radin.radin(pilot, budget=0)
    assert len(soup.recipe.used) == 1


def test_the_card_says_what_was_not_computed(pilot, tmp_path, lenient):
    soup = hf_radin.radin(pilot, budget=2, test_split="test")
    soup.save_pretrained(tmp_path / "soup")
    text = " ".join((tmp_path / "soup" / "README.md").read_text().split())
    shown = soup.report.pilot.shown
    whole = len(soup.report.pilot.whole)
    assert (
        f"Each checkpoint was run on a random 25% of the 600 images of validation first, and {whole} of 5 then on all"
        in text
    )
    assert (
        f"The rest of the checkpoints saw {shown} images. On the remaining {600 - shown} the best 2 agree, so clearly"
        in text
    )
    soups = 2 if len(soup.recipe.used) > 1 else 1
    assert f"| the figures on test, in passes over it | {len(soup.report.pilot.whole) + soups} | |" in text
    assert f"{whole} of 5 ingredients were run on all 600 images: what the others" in tables.table(soup)
    hf_radin.radin(pilot, budget=0).save_pretrained(tmp_path / "estimated")
    assert "The images that chose are a random 25% of the split" in (tmp_path / "estimated" / "README.md").read_text()


def test_one_that_was_opened_goes_on(bank, digits, tmp_path):
    """Of a folder by itself; of a Dataset object it needs the object."""
    made = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pilot=0.25)
    opened = hf_radin.LogitBank.open(made.folder)
    assert hf_radin.radin(opened, budget=1).measurements == hf_radin.radin(made, budget=1).measurements


def test_one_with_too_much_left_says_so(bank, digits, tmp_path, monkeypatch):
    made = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pilot=0.25)
    monkeypatch.setattr(pruning, "MOST", 0)
    with pytest.raises(ValueError, match="of too many classes"):
        hf_radin.radin(made, budget=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"test_split": "nosuch"}, "nosuch"), ({"metrics": ("nosuch",)}, "nosuch"), ({"test_split": None}, "pilot")],
)
def test_what_can_not_be_is_refused_before_the_rest_of_the_logits(pilot, monkeypatch, options, message):
    monkeypatch.setattr("hf_radin.search.pilot.compute_logits", lambda *_, **__: pytest.fail("logits were computed"))
    options = {"test_split": pilot} if "pilot" in message else options
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(pilot, budget=2, **options)


def test_without_measuring_the_held_out_split_is_whole(pilot):
    soup = hf_radin.radin(pilot, budget=0, test_split="test")
    assert {one.images for one in soup.results if one.split == "test"} == {497}


@pytest.mark.parametrize(("leading", "count"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_ingredients_that_are_lost_on_the_rest_are_named(runs, digits, tmp_path, monkeypatch, lenient, leading, count):
    """Their logits are numbers on the pilot, and on other images they are not."""
    monkeypatch.setattr(sample.Pilot, "whole", staticmethod(lambda models: 3))
    made = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), digits, cache_dir=tmp_path, pilot=0.1)
    compute, lost = telling.compute_logits, []

    def losing(ingredients, **options):
        found = compute(ingredients, **options)
        if (options["pilot"].places is None) != leading:
            return found
        lost[:] = ingredients.ids[:count]
        remarks = tuple((name, "gives logits that are no finite numbers.") for name in lost)
        return replace(found, ingredients=ingredients[count:], remarks=remarks)

    monkeypatch.setattr(telling, "compute_logits", losing)
    soup = hf_radin.radin(made, budget=1)
    told = [tuple(one) for one in soup.report.remarks]
    assert all((name, "gives logits that are no finite numbers.") in told for name in lost)
    assert soup.report.pilot.given == 5 and len(soup.report.ingredients) == 5 - count
    assert not {*lost} & {*soup.recipe.used}
    mine = hf_radin.Recipe.uniform([lost[0], soup.report.ingredients[0]["id"]])
    with pytest.raises(ValueError, match=r"which a recipe uses or is the start, gives logits that are no finite"):
        hf_radin.radin(made, budget=1, recipes=[mine])


def test_one_of_a_dataset_object_needs_the_object_again(bank, digits, tmp_path):
    data = datasets.load_dataset("parquet", data_dir=str(digits / "data"), split="validation")
    data = data.cast_column("image", datasets.Image()) if "image" in data.column_names else data
    made = hf_radin.compute_logits(bank.ingredients, data, cache_dir=tmp_path, pilot=0.25)
    with pytest.raises(ValueError, match="the rest takes the object again"):
        hf_radin.radin(hf_radin.LogitBank.open(made.folder), budget=1)
    assert hf_radin.radin(made, budget=1).recipe


def test_a_pilot_that_saves_nothing_says_so(bank, digits, cache, caplog):
    hf_radin.compute_logits(bank.ingredients[:3], digits, cache_dir=cache, pilot=0.25)
    assert "pilot=0.25 saves nothing: the logits of 3 ingredients take 3.75 passes with it" in caplog.text


def test_images_that_a_pilot_chose_are_no_bank_of_their_own(pilot, lenient, monkeypatch):
    made = []
    compute = telling.compute_logits
    monkeypatch.setattr(telling, "compute_logits", lambda *_, **__: made.append(compute(*_, **__)) or made[-1])
    telling.complete(pilot)
    with pytest.raises(ValueError, match="has logits of images that a pilot chose; open the folder of the pilot"):
        hf_radin.LogitBank.open(made[-1].folder)


@pytest.mark.parametrize(
    ("margins", "astray", "least"),
    [
        ([3.0, 2.0, 1.0], [0, 0, 0], 1.0),
        ([3.0, 2.0, 1.0], [0, 0, 1], 2.0),
        ([3.0, 2.0, 2.0, 1.0], [0, 0, 1, 0], 3.0),  # equal margins stand or fall together
        ([3.0, 2.0, 1.0], [1, 1, 1], np.inf),
        ([3.0, 0.0], [0, 0], 3.0),  # 0: they don't agree
        ([], [], np.inf),
    ],
)
def test_the_least_margin_is_the_first_from_which_on_few_recipes_go_astray(margins, astray, least):
    assert telling.clear_margin(np.array(margins), np.array(astray, dtype=float)) == least


def test_a_best_single_model_that_gives_no_numbers_on_the_rest_is_left_out(pilot, bank, lenient, monkeypatch):
    """Nothing is known of it there until it turns out to be the best of all; here none of the two that lead is."""
    score, look, lost = type(pilot).score, measure.MeasuredSoup.look, []
    monkeypatch.setattr(type(pilot), "score", lambda self, rows, **options: -score(self, rows, **options))

    def no_numbers(self, some, **options):
        lost.append(self.recipe.ingredients[0])
        return np.where(some, -1, look(self, some, **options))

    monkeypatch.setattr(measure.MeasuredSoup, "look", no_numbers)
    found, told = telling.complete(pilot)
    assert 0 < len(lost) <= 3 and not {*lost} & {*found.ingredients.ids}
    assert all((name, "gives NaN or infinite logits: left out of the soup.") in found.remarks for name in lost)
    assert told["whole"] == [name for name in bank.ingredients.ids if name in told["whole"]]


def test_images_that_have_changed_since_are_refused_before_a_model_runs(bank, digits, tmp_path, monkeypatch):
    shutil.copytree(digits, tmp_path / "data")
    made = hf_radin.compute_logits(bank.ingredients, tmp_path / "data", cache_dir=tmp_path / "cache", pilot=0.25)
    (path,) = (tmp_path / "data" / "data").glob("validation*.parquet")
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hf"))
    rows.select(range(len(rows) - 1, -1, -1)).to_parquet(path)
    monkeypatch.setattr(telling, "compute_logits", lambda *_, **__: pytest.fail("a model ran"))
    for one in (made, hf_radin.LogitBank.open(made.folder)):
        with pytest.raises(ValueError, match=r"has changed since the logits in .* were computed; compute them again"):
            hf_radin.radin(one, budget=2)


def test_images_of_an_object_that_has_changed_are_refused(pilot, bank):
    fewer = replace(bank, about={**bank.about, "samples": 599})
    with pytest.raises(ValueError, match="The images have changed since the logits of a part of them were computed"):
        telling._check_images(pilot, fewer)


def test_another_precision_is_refused_before_a_model_runs(pilot, monkeypatch):
    monkeypatch.setattr(telling, "compute_logits", lambda *_, **__: pytest.fail("a model ran"))
    other = replace(pilot, about={**pilot.about, "mixed_precision": "bf16"})
    with pytest.raises(ValueError, match="computed with mixed precision 'bf16', this run has 'no'"):
        hf_radin.radin(other, budget=2)


def test_where_the_whole_split_would_have_too_much_left_it_is_said_before_a_model_runs(pilot, monkeypatch):
    monkeypatch.setattr(telling, "compute_logits", lambda *_, **__: pytest.fail("a model ran"))
    monkeypatch.setattr(pruning, "MOST", 2 * pilot.pruned().logits.nbytes)  # four times as many images will have more
    with pytest.raises(ValueError, match="too many classes that can win to say"):
        hf_radin.radin(pilot, budget=2)


def test_what_a_folder_was_last_for_stays(bank, digits, tmp_path, lenient):
    whole = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path)
    hf_radin.radin(hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path, pilot=0.25), budget=1)
    assert hf_radin.LogitBank.open(whole.folder).ingredients.ids == bank.ingredients.ids


def test_where_all_saw_all_images_the_card_says_so(pilot, tmp_path):
    hf_radin.radin(pilot, budget=1).save_pretrained(tmp_path / "soup")
    text = " ".join((tmp_path / "soup" / "README.md").read_text().split())
    assert "Each checkpoint was run on a random 25% of the 600 images of validation first, and then on all." in text
