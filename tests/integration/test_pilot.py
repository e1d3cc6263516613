"""Logits of a part of the split rank recipes; soups are measured on all of it."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

import hf_radin
from hf_radin import logits, pruning, strata


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


def test_it_chooses_the_ingredients_whose_logits_are_computed_whole(pilot, bank):
    soup = hf_radin.radin(pilot, budget=3, test_split="test")
    told = soup.about["pilot"]
    kept = [name for name in bank.ingredients.ids if name not in told["left_out"]]
    assert len(kept) == 4 and [one["id"] for one in soup.about["ingredients"]] == kept
    assert (told["share"], told["seed"]) == (0.25, 0)
    share = len(pilot) / 600
    assert soup.about["passes"]["logits"] == pytest.approx(4 + 5 * share)
    of_soups = sum(one.passes for one in soup.measurements)
    assert of_soups < soup.about["passes"]["soups"] < of_soups + share
    rows = {(one.name, one.split): one.images for one in soup.results}
    assert rows["soup", "validation"] == rows["best single", "validation"] == rows["ensemble", "validation"] == 600
    assert rows["soup", "test"] == 497


def test_from_there_on_it_is_the_search_among_these(pilot, bank, digits, cache):
    soup = hf_radin.radin(pilot, budget=3, seed=2)
    kept = bank.ingredients.select([one["id"] for one in soup.about["ingredients"]])
    among = hf_radin.radin(hf_radin.compute_logits(kept, digits, cache_dir=cache), budget=3, seed=2)
    assert soup.recipe == among.recipe and soup.measurements == among.measurements and soup.results == among.results


def test_what_a_user_asks_for_and_what_is_good_alone_is_kept(pilot, bank, monkeypatch):
    monkeypatch.setattr(strata.Pilot, "whole", staticmethod(lambda models: 1))
    singles = pilot.score(np.eye(5))
    first = [bank.ingredients.ids[one] for one in np.argsort(-singles, kind="stable")]
    mine = hf_radin.Recipe.uniform(first[-2:])
    left_out = hf_radin.radin(pilot, budget=2, recipes=[mine]).about["pilot"]["left_out"]
    assert left_out == [first[2]]  # of five, two were asked for and two are the best


def test_without_measuring_recipes_are_estimated(pilot):
    soup = hf_radin.radin(pilot, budget=0)
    assert soup.measurements[-1].measured is None and soup.about["measured"] is False


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, True, "0.2", float("nan")])
def test_a_share_that_is_none_is_refused(bank, digits, cache, share, monkeypatch):
    monkeypatch.setattr(logits, "compute", lambda *_, **__: pytest.fail("logits were computed"))
    with pytest.raises(ValueError, match="it is the share of the split that logits are computed of"):
        hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=share)


def test_what_takes_all_logits_says_so(pilot):
    for method in (hf_radin.greedy, hf_radin.uniform, hf_radin.best_single):
        with pytest.raises(ValueError, match="compute them without pilot, or use radin"):
            method(pilot)
    with pytest.raises(ValueError, match=r"hold_out=0\.2: the images of a pilot say which"):
        hf_radin.radin(pilot, hold_out=0.2)
    with pytest.raises(ValueError, match="can't be shared"):
        pilot.push_to_hub("org/bank")


def test_estimates_of_a_pilot_are_compared_with_singles(pilot, monkeypatch):
    monkeypatch.setattr(type(pilot), "score", lambda self, rows, *_, **__: np.full(len(rows), 0.01))
    soup = hf_radin.radin(pilot, budget=0)
    assert len(soup.recipe.used) == 1


def test_the_card_says_what_was_not_computed(pilot, tmp_path):
    soup = hf_radin.radin(pilot, budget=2)
    soup.save_pretrained(tmp_path / "soup")
    text = (tmp_path / "soup" / "README.md").read_text()
    assert "All 5 checkpoints were run on a random 25.00 % of these images first, which said of which 4 the" in text
    (name,) = soup.about["pilot"]["left_out"]
    assert f"{Path(name).name}." in text.replace("\\", "")
    hf_radin.radin(pilot, budget=0).save_pretrained(tmp_path / "estimated")
    assert "These images are a random 25.00 % of the split" in (tmp_path / "estimated" / "README.md").read_text()


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
    monkeypatch.setattr("hf_radin.narrow.compute_logits", lambda *_, **__: pytest.fail("logits were computed"))
    options = {"test_split": pilot} if "pilot" in message else options
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(pilot, budget=2, **options)


def test_without_measuring_the_held_out_split_is_whole(pilot):
    soup = hf_radin.radin(pilot, budget=0, test_split="test")
    assert {one.images for one in soup.results if one.split == "test"} == {497}


def test_an_ingredient_that_is_lost_on_the_rest_is_named(runs, digits, tmp_path, monkeypatch):
    """Its logits are numbers on the pilot, and on other images they are not."""
    from hf_radin import narrow

    made = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), digits, cache_dir=tmp_path, pilot=0.1)
    compute, lost = narrow.compute_logits, []

    def losing(ingredients, dataset, **options):
        lost.append(ingredients.ids[0])
        found = compute(ingredients[1:], dataset, **options)
        return replace(found, remarks=((lost[0], "gives logits that are no finite numbers."),))

    monkeypatch.setattr(narrow, "compute_logits", losing)
    soup = hf_radin.radin(made, budget=1)
    assert (lost[0], "gives logits that are no finite numbers.") in [tuple(one) for one in soup.about["remarks"]]
    assert soup.about["pilot"]["given"] == 5 and lost[0] not in soup.about["pilot"]["left_out"]
    mine = hf_radin.Recipe.uniform([lost[0], soup.about["ingredients"][0]["id"]])
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
