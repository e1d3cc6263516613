"""Heads of multi-label models are refitted class by class, where they have no common start or where it is better."""

from pathlib import Path

import numpy as np
import pytest
from shared.label_sets import dataset, digit_sets, f1, f1_of_pipeline, own_heads_of_sets, own_heads_of_sets_bank
from shared.logs import warned

import hf_radin
from hf_radin.cli.main import main
from hf_radin.layers.taught import refit_head
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.search.reporter import fewest_of_a_class
from hf_radin.soup.report import SearchReport

__all__ = ["digit_sets", "own_heads_of_sets", "own_heads_of_sets_bank"]  # fixtures


@pytest.fixture
def bank(own_heads_of_sets_bank) -> hf_radin.LogitBank:
    return own_heads_of_sets_bank


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_soup_with_a_refitted_head_wins_is_saved_and_cooked_again(bank, tmp_path, caplog):
    soup = hf_radin.radin(bank, budget=2, test_split="test")
    report = soup.report
    assert report.heads == "auto" and report.has_refitted_head and report.metric == "f1"
    assert f1(soup, "soup", "test") > f1(soup, "uniform", "test")
    won = next(entry for entry in report.measurements if report.is_chosen(entry))
    assert won.measured == f1(soup, "soup", bank.split) > f1(soup, "best single", bank.split)
    soup.save_pretrained(tmp_path / "soup")
    assert f1_of_pipeline(tmp_path / "soup") == pytest.approx(f1(soup, "soup", "test"), abs=5e-3)
    caplog.clear()
    command = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "again")]
    assert main([*command, "--cache-dir", str(tmp_path / "cache")]) == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup") and not warned(caplog)


def test_what_counts_is_what_heads_say_that_did_not_see_the_image(bank):
    recipe = Recipe.uniform(bank.ingredients.ids)
    cooked = refit_head(bank, recipe, Teacher(recipe, labels=True), with_logits=True)
    np.testing.assert_array_equal(cooked.predictions, cooked.logits > 0)
    soup = hf_radin.radin(bank, budget=1, head="refit", metrics=("log_loss",))
    changes = hf_radin.soup_changes(bank, soup)
    best, labels = bank.predict(bank.row(hf_radin.best_single(bank).recipe)), np.array(bank.labels)
    right = [(decisions == labels).sum() for decisions in (best, soup.unseen.predictions)]
    assert changes.won - changes.lost == right[1] - right[0] and np.isfinite(changes.margins).all()


def test_the_head_of_a_model_that_teaches_itself_stays(bank):
    recipe = Recipe.uniform(bank.ingredients.ids[:1])
    cooked = refit_head(bank, recipe, Teacher(recipe))
    single = hf_radin.average(bank.ingredients, recipe)
    np.testing.assert_allclose(cooked.head.layer.weight, single["classifier.weight"].numpy(), atol=1e-4)
    assert np.mean(cooked.predictions == bank.predict(bank.row(recipe))) > 0.999


def test_few_images_that_have_a_class_or_lack_it_are_said(bank, tmp_path, caplog):
    rows = dataset().select(range(60))
    for have in (3, 57):
        labels = [[*row, 0] if place < have else row for place, row in enumerate([[1], [2], [1, 3]] * 20)]
        data = rows.remove_columns("label").add_column("label", labels, feature=rows.features["label"])
        given = hf_radin.compute_logits(bank.ingredients, data, cache_dir=tmp_path / str(have))
        assert fewest_of_a_class(given) == 3
        caplog.clear()
        hf_radin.radin(given, budget=1, head="refit")
        assert "has 3 different images with one class, or without it: a refitted head forgets" in caplog.text


def test_the_option_ends_as_the_function_does(own_heads_of_sets, digit_sets, bank, tmp_path):
    command = ["soup", "--models", f"{own_heads_of_sets}/ft-*", "--dataset", str(digit_sets), "--head", "refit"]
    command += ["--budget", "1", "--cache-dir", str(bank.home), "--output", str(tmp_path / "one")]
    assert main(command) == 0
    report = hf_radin.radin(bank, budget=1, head="refit").report
    written = SearchReport.read(tmp_path / "one" / "recipe.json")
    assert written.head == report.head and written.measurements == report.measurements
