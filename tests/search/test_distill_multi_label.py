"""Last layers of multi-label soups are taught what the ensemble says of each class; all else is as of other soups."""

from pathlib import Path

import numpy as np
import pytest
import torch
from shared.banks import plain_inputs
from shared.label_sets import dataset, digit_sets, f1, f1_of_pipeline, own_heads_of_sets, own_heads_of_sets_bank
from shared.logs import warned
from shared.training import digit_images

import hf_radin
from hf_radin.cli.main import main
from hf_radin.layers.distilled import distill_tail
from hf_radin.metrics.cross_entropy import best_scale
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.soup.report import SearchReport
from hf_radin.tail.teach import Course
from hf_radin.weights.refit import draw_folds

__all__ = ["digit_sets", "own_heads_of_sets", "own_heads_of_sets_bank"]  # fixtures


@pytest.fixture
def bank(own_heads_of_sets_bank) -> hf_radin.LogitBank:
    return own_heads_of_sets_bank


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_soup_becomes_better_is_saved_told_and_cooked_again(bank, tmp_path, caplog):
    caplog.set_level("INFO", "hf_radin")
    before = hf_radin.uniform(bank, test_split="test")
    assert "The ensemble of all is ahead of the soup on 'test' by" in caplog.text and "hf-radin distill" in caplog.text
    soup = hf_radin.distill(bank, before)
    report = soup.report
    assert report.is_distilled and report.metric == "f1" and report.head.labels == 0.5
    gap = f1(soup, "ensemble", "test") - f1(soup, "not distilled", "test")
    assert f1(soup, "soup", "test") > f1(soup, "not distilled", "test") + 0.5 * gap
    assert {entry.metric for entry in report.against_best_single} == {"f1"}
    soup.save_pretrained(tmp_path / "soup")
    assert f1_of_pipeline(tmp_path / "soup") == pytest.approx(f1(soup, "soup", "test"), abs=5e-3)
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "with distilled last layers" in card and "- distillation" in card and "| not distilled | test |" in card
    changes = hf_radin.soup_changes(bank, soup)
    best, labels = bank.predict(bank.row(hf_radin.best_single(bank).recipe)), np.array(bank.labels)
    right = [(decisions == labels).sum() for decisions in (best, soup.unseen.predictions)]
    assert changes.won - changes.lost == right[1] - right[0] and len(changes)
    assert np.isfinite(changes.margins[:, 0]).all() and np.isnan(changes.margins[:, 1]).all()  # no metric took logits
    caplog.clear()
    command = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "again")]
    assert main([*command, "--cache-dir", str(tmp_path / "cache")]) == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup") and not warned(caplog)
    read = [SearchReport.read(tmp_path / name / "recipe.json", is_saved=True) for name in ("again", "soup")]
    assert read[0] == read[1]


def test_images_without_labels_teach_and_those_that_chose_judge(bank, tmp_path):
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    for place, image in enumerate(digit_images(slice(0, 400))[0]):
        image.save(folder / f"{place}.png")
    soup = hf_radin.distill(bank, hf_radin.uniform(bank), images=str(folder))
    assert soup.report.head.labels == 0 and soup.report.head.images == 400
    assert f1(soup, "soup", bank.split) > f1(soup, "not distilled", bank.split)
    soup.save_pretrained(tmp_path / "soup")
    command = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "again")]
    assert main([*command, "--cache-dir", str(tmp_path / "cache")]) == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")


def test_the_option_ends_as_the_function_does(own_heads_of_sets, digit_sets, bank, tmp_path):
    command = ["soup", "--models", f"{own_heads_of_sets}/ft-*", "--dataset", str(digit_sets), "--method", "uniform"]
    assert main([*command, "--distill", "--cache-dir", str(bank.home), "--output", str(tmp_path / "one")]) == 0
    hf_radin.distill(bank, hf_radin.uniform(bank)).save_pretrained(tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert SearchReport.read(tmp_path / "one" / "recipe.json").is_distilled


def test_the_own_logits_change_nothing(bank):
    recipe = Recipe.uniform(bank.ingredients.ids[:1])
    taught = distill_tail(bank, recipe, Teacher(recipe), Course(), judge=bank)
    single = hf_radin.average(bank.ingredients, recipe)
    assert all((tensor == single[name]).all() for name, tensor in taught.head.tensors.items())
    np.testing.assert_array_equal(taught.predictions, bank.predict(bank.row(recipe)))


def test_one_number_makes_a_soup_as_sure_as_its_ensemble_first(bank):
    """Which changes no decision: a sigmoid is above one half where its logit is above 0."""
    recipe = Recipe.uniform(bank.ingredients.ids)
    cooked = distill_tail(bank, recipe, Teacher(recipe), Course(1, 1e-12), judge=bank, with_logits=True)
    model = hf_radin.uniform(bank).model
    with torch.inference_mode():
        averaged = np.concatenate([model(**inputs).logits.numpy() for inputs in plain_inputs(bank)])
    assert np.mean(cooked.predictions == (averaged > 0)) > 0.999
    wanted = 1 / (1 + np.exp(-bank.mixed(bank.row(recipe), np.arange(len(bank))).astype(float)))
    folds = draw_folds(bank.contents, seed=0, folds=2)
    for fold in range(2):  # each half sees the number of the other
        scale = best_scale(averaged[folds != fold], wanted[folds != fold], multi_label=True)
        np.testing.assert_allclose(cooked.logits[folds == fold], averaged[folds == fold] * scale, atol=2e-3)
        assert abs(scale - 1) > 0.05


def test_no_image_has_a_part_in_its_own_decisions(bank, tmp_path):
    """The labels of one half are turned round: what is decided on it stays to the last bit."""
    folds, rows = draw_folds(bank.contents, seed=0, folds=2), dataset()
    others = [
        sorted({*range(4)} - {*row}) if fold == 0 else row for row, fold in zip(rows["label"], folds, strict=True)
    ]
    data = rows.remove_columns("label").add_column("label", others, feature=rows.features["label"])
    turned = hf_radin.compute_logits(bank.ingredients, data, cache_dir=tmp_path)
    recipe, course = Recipe.uniform(bank.ingredients.ids), Course(epochs=2, share=0.5)
    before, after = (
        distill_tail(given, recipe, Teacher(recipe, labels=True), course, judge=given, with_logits=True)
        for given in (bank, turned)
    )
    assert before.record.sha256 != after.record.sha256
    np.testing.assert_array_equal(before.logits[folds == 0], after.logits[folds == 0])
    assert (before.logits[folds == 1] != after.logits[folds == 1]).any()
