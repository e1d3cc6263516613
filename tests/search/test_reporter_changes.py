"""What a soup changes image by image is what its report counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.banks import plain_inputs
from shared.heads import own_heads, own_heads_bank
from shared.zoo import zoo, zoo_pilot

import hf_radin
from hf_radin.search.held_out import bank_of_split, proving_bank

__all__ = ["own_heads", "own_heads_bank", "zoo", "zoo_pilot"]  # fixtures


def gain(soup: hf_radin.Soup, split: str) -> float:
    """What a report says that a soup gains; the best single model itself gains nothing."""
    if soup.report.is_single:
        return 0.0
    (comparison,) = (entry for entry in soup.report.against_best_single if entry.split == split)
    return comparison.gain


def assert_counted(bank: hf_radin.LogitBank, soup: hf_radin.Soup) -> hf_radin.Changes:
    """The changes on a bank, which are those that the report counts."""
    changes = hf_radin.soup_changes(bank, soup)
    assert changes.won - changes.lost == pytest.approx(gain(soup, bank.split) * len(bank), abs=1e-6)
    assert len(changes) >= changes.won + changes.lost
    return changes


def test_an_averaged_soup_on_both_splits(bank, predictions):
    soup = hf_radin.uniform(bank, test_split="test")
    test = proving_bank(bank, soup.report)
    assert (test.split, len(test)) == ("test", 497)
    for judging in (bank, test):
        changes = assert_counted(judging, soup)
        assert len(changes) and np.isfinite(changes.margins).all() and (changes.margins > -1e-3).all()
    with torch.inference_mode():
        logits = np.concatenate([soup.model(**inputs).logits.numpy() for inputs in plain_inputs(test)])
    rows = np.searchsorted(test.ids, changes.ids)
    ordered = np.sort(logits[rows], axis=1)
    np.testing.assert_allclose(changes.margins[:, 1], ordered[:, -1] - ordered[:, -2], atol=1e-3)
    is_clear = changes.margins[:, 1] > 1e-3  # whatever the batches
    np.testing.assert_array_equal(changes.predictions[is_clear, 1], logits[rows].argmax(axis=1)[is_clear])
    assert is_clear.any()
    predictions.clear()
    hf_radin.soup_changes(test, soup)
    assert not predictions  # all is cached


def test_the_best_single_model_changes_nothing(bank):
    assert len(hf_radin.soup_changes(bank, hf_radin.best_single(bank))) == 0


def test_a_soup_that_was_read_changes_the_same(bank, own_heads_bank, tmp_path):
    for given, search in ((bank, hf_radin.uniform), (own_heads_bank, refitted)):
        soup = search(given, test_split="test")
        soup.save_pretrained(tmp_path / search.__name__)
        test = proving_bank(given, soup.report)
        before = assert_counted(test, soup)
        after = hf_radin.soup_changes(test, hf_radin.Soup.from_pretrained(tmp_path / search.__name__))
        np.testing.assert_array_equal(after.ids, before.ids)
        np.testing.assert_array_equal(after.predictions, before.predictions)
    with pytest.raises(ValueError, match="which chose the soup, is what last layers say that did not see them"):
        hf_radin.soup_changes(own_heads_bank, hf_radin.Soup.from_pretrained(tmp_path / "refitted"))


def refitted(bank: hf_radin.LogitBank, **options) -> hf_radin.Soup:
    return hf_radin.radin(bank, budget=1, head="refit", **options)


def test_refitted_heads_that_did_not_see_the_image_count(own_heads_bank):
    for options in ({"test_split": "test"}, {"hold_out": 0.3, "seed": 2}):
        soup = refitted(own_heads_bank, **options)
        assert soup.report.has_refitted_head
        proving = proving_bank(own_heads_bank, soup.report)
        assert proving.split == soup.report.held_out
        assert np.isfinite(assert_counted(proving, soup).margins).all()
        if "test_split" in options:
            changes = assert_counted(own_heads_bank, soup)
            assert np.isfinite(changes.margins[:, 0]).all() and np.isnan(changes.margins[:, 1]).all()
        else:  # among all images are those that proved it
            with pytest.raises(ValueError, match="of the images that chose"):
                hf_radin.soup_changes(own_heads_bank, soup)
            choosing, _ = own_heads_bank.divided(0.3, 2)
            assert_counted(choosing, soup)


def test_a_split_that_taught_the_last_layers_is_refused(own_heads_bank):
    soup = hf_radin.distill(own_heads_bank, hf_radin.uniform(own_heads_bank), split="test", labels=False)
    assert soup.report.head.split == "test"
    with pytest.raises(ValueError, match="'test' taught the last layers of the soup: name another"):
        hf_radin.soup_changes(bank_of_split(own_heads_bank, "test"), soup)
    assert_counted(own_heads_bank, soup)


def test_distilled_layers_with_margins_where_a_metric_took_logits(own_heads_bank):
    before = hf_radin.uniform(own_heads_bank, test_split="test", metrics=("accuracy", "log_loss"))
    soup = hf_radin.distill(own_heads_bank, before)
    assert soup.report.is_distilled
    for given in (own_heads_bank, proving_bank(own_heads_bank, soup.report)):
        changes = assert_counted(given, soup)
        assert len(changes) and np.isfinite(changes.margins).all()


def test_after_a_pilot_the_split_that_proves_tells(zoo_pilot):
    soup = hf_radin.radin(zoo_pilot, budget=2, head="average", test_split="test")
    proving = proving_bank(zoo_pilot, soup.report)
    assert len(proving.ingredients) < len(zoo_pilot.ingredients)
    assert bool(len(assert_counted(proving, soup))) == soup.report.is_average
    with pytest.raises(ValueError, match=r"are of a part of it \(pilot\)"):
        hf_radin.soup_changes(zoo_pilot, soup)


def test_what_can_not_be_compared_is_refused(bank):
    soup = hf_radin.uniform(bank)
    used = [name for name in bank.ingredients.ids if name != hf_radin.best_single(bank).recipe.ingredients[0]]
    with pytest.raises(ValueError, match="No ingredient"):
        hf_radin.soup_changes(replace(bank, ingredients=bank.ingredients.select(used)), soup)
    unsearched = hf_radin.Soup(replace(soup.report, method="average"), bank.ingredients)
    with pytest.raises(ValueError, match="was not searched for"):
        hf_radin.soup_changes(bank, unsearched)
    classes = tuple(reversed(bank.classes))
    with pytest.raises(ValueError, match=r"has the classes \['nine', .*, and the soup \['zero', "):
        hf_radin.soup_changes(replace(bank, manifest=replace(bank.manifest, classes=classes)), soup)
