"""Logits of a part of the split rank recipes; soups are measured on all of it."""

import numpy as np
import pytest

import hf_radin
from hf_radin import logits


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


def test_soups_are_measured_on_the_whole_split(pilot, bank):
    soup = hf_radin.radin(pilot, budget=3, proposals="monte-carlo", test_split="test")
    rows = {(one.name, one.split): one.images for one in soup.results}
    assert rows["soup", "validation"] == rows["best single", "validation"] == rows["uniform", "validation"] == 600
    assert rows["ensemble", "validation"] == len(pilot) and rows["soup", "test"] == 497
    chosen = next(one for one in soup.measurements if one.recipe == soup.recipe and one.images == 600)
    whole = hf_radin.radin(bank, budget=1000, measure="full", proposals="monte-carlo")
    truth = {one.recipe: one.measured for one in whole.measurements}
    assert chosen.measured == pytest.approx(truth[soup.recipe], abs=1e-9)
    assert soup.accuracy("soup", "validation") >= soup.accuracy("best single", "validation")
    assert soup.about["passes"]["logits"] == pytest.approx(5 * len(pilot) / 600)
    assert soup.about["pilot"] == {"share": 0.25, "seed": 0}


def test_what_was_measured_of_a_part_says_what_the_whole_says(pilot, bank):
    raced = hf_radin.radin(pilot, budget=30, proposals="monte-carlo").measurements
    whole = hf_radin.radin(bank, budget=1000, measure="full", proposals="monte-carlo").measurements
    truth = {one.recipe: one.measured for one in whole}
    parts = [one for one in raced if one.proposal not in ("single", "uniform") and one.images < 600]
    assert parts
    for one in parts:
        assert one.interval[0] - 0.02 <= truth[one.recipe] <= one.interval[1] + 0.02


def test_the_best_single_is_returned_where_it_is_best(pilot, monkeypatch):
    from hf_radin import evaluate

    look = evaluate.Trial.look

    def wrong(self, some, **options):
        found = look(self, some, **options)
        return found if len(self.recipe.used) == 1 else np.where(some, 11, evaluate.UNKNOWN)

    monkeypatch.setattr(evaluate.Trial, "look", wrong)
    soup = hf_radin.radin(pilot, budget=3)
    assert len(soup.recipe.used) == 1
    singles = [one for one in soup.measurements if one.proposal == "single"]
    assert len(singles) == 5 and sum(one.images == 600 for one in singles) >= 1


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
    with pytest.raises(ValueError, match=r"hold_out=0\.2: soups are measured on all images of a pilot"):
        hf_radin.radin(pilot, hold_out=0.2)
    with pytest.raises(ValueError, match="can't be shared"):
        pilot.push_to_hub("org/bank")


def test_estimates_of_a_pilot_are_compared_with_singles(pilot, monkeypatch):
    monkeypatch.setattr(type(pilot), "score", lambda self, rows, *_, **__: np.full(len(rows), 0.01))
    soup = hf_radin.radin(pilot, budget=0)
    assert len(soup.recipe.used) == 1


def test_the_card_says_that_a_part_chose(pilot, tmp_path):
    hf_radin.radin(pilot, budget=2).save_pretrained(tmp_path / "soup")
    assert "ranked by the logits of a random 25.00 % of these images" in (tmp_path / "soup" / "README.md").read_text()
