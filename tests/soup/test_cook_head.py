"""A soup with a refitted head is saved as an ordinary checkpoint, and cooks again to the last bit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shared.banks import plain_inputs
from shared.heads import own_heads, own_heads_bank
from shared.logs import warned
from shared.training import digit_images, image_dataset
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.layers.taught import refit_head
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.search.held_out import bank_of_split
from hf_radin.search.measure import measured_soup
from hf_radin.soup.cook import cook_recipe
from hf_radin.soup.report import SearchReport
from hf_radin.soup.soup import Soup
from hf_radin.weights.average import average_model
from hf_radin.weights.head import find_head

__all__ = ["own_heads", "own_heads_bank"]  # fixtures


def uniform(bank: hf_radin.LogitBank) -> Recipe:
    return Recipe.uniform(bank.ingredients.ids)


def refitted(bank: hf_radin.LogitBank, recipe: Recipe | None = None, *, labels: bool = False, **options) -> Soup:
    """The soup of a recipe, uniform by default, whose head is refitted to the ensemble of all."""
    cooked = refit_head(bank, recipe or uniform(bank), Teacher(uniform(bank), labels), **options)
    report = replace(hf_radin.uniform(bank).report, recipe=recipe or uniform(bank), head=cooked.record)
    return Soup(report, bank.ingredients, processes=bank.processes, statistics=bank.statistics, head=cooked.head)


def cook(saved: Path, output: Path, cache: Path, *options: str) -> int:
    return main(["average", "--recipe", str(saved), "--output", str(output), "--cache-dir", str(cache), *options])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def accuracy(model, bank: hf_radin.LogitBank) -> float:
    with torch.inference_mode():
        predicted = [model(**inputs).logits.argmax(1).numpy() for inputs in plain_inputs(bank)]
    return float((np.concatenate(predicted) == bank.labels).mean())


def test_a_saved_soup_has_the_head_and_is_better_on_other_images(own_heads_bank, tmp_path):
    bank = own_heads_bank
    soup = refitted(bank)
    soup.save_pretrained(tmp_path / "soup")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval()
    averaged = average_model(bank.ingredients, uniform(bank))
    head = find_head(bank.ingredients[0])
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, averaged.state_dict()[name]) != name.startswith("classifier."), name
    assert all(torch.equal(tensor, soup.model.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert head.modules == ("classifier",)
    test = bank_of_split(bank, "test")
    ensemble = float((test.predict(test.row(uniform(test))) == test.labels).mean())
    low, high = accuracy(averaged, test), accuracy(saved, test)
    assert low < ensemble - 0.05 and high > low + 0.5 * (ensemble - low)


def test_its_record_is_read_as_it_was_written(own_heads_bank, tmp_path):
    soup = refitted(own_heads_bank)
    soup.save_pretrained(tmp_path / "soup")
    record = soup.report.head
    assert SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True).head == record
    assert (record.kind, record.split, record.images, record.folds) == ("refit", "validation", 600, 5)
    assert record.teacher.used == uniform(own_heads_bank).used and 0 < record.penalty < 1
    assert soup.report.to_fields()["format_version"] == 3  # earlier readers would leave the head out
    assert Soup.from_pretrained(tmp_path / "soup").report.head == record


def test_it_is_cooked_again(own_heads_bank, tmp_path, caplog):
    refitted(own_heads_bank).save_pretrained(tmp_path / "soup")
    caplog.clear()
    assert cook(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup") and not warned(caplog)
    before, after = (SearchReport.read(tmp_path / name / "recipe.json") for name in ("soup", "again"))
    assert after == before


def test_with_labels_too(own_heads_bank, tmp_path):
    soup = refitted(own_heads_bank, labels=True)
    soup.save_pretrained(tmp_path / "soup")
    assert 0 < SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True).head.labels < 1
    assert cook(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")
    without = refitted(own_heads_bank)
    assert not torch.equal(without.model.classifier.weight, soup.model.classifier.weight)
    card = re.sub(r"\s+", " ", (tmp_path / "soup" / "README.md").read_text())
    assert f"with their labels, which count for {soup.report.head.labels:.0%}" in card


@pytest.mark.parametrize("seed", [0, 1])
def test_a_single_model_that_all_have_taught_is_cooked_again(own_heads_bank, tmp_path, seed):
    bank = own_heads_bank
    part, _ = bank.divided(0.25, 7)
    soup = refitted(part, Recipe.uniform(bank.ingredients.ids[1:2]), hold_out=(0.25, 7), seed=seed)
    assert not soup.report.is_single and len(soup.report.needed) == 4 and soup.report.head.images == 450
    soup.save_pretrained(tmp_path / "soup")
    assert cook(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")


def test_a_net_with_batchnorm_is_cooked_again(nets, digits, tmp_path, caplog):
    ingredients = hf_radin.gather(f"{nets}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "first", batchnorm_images=128)
    refitted(bank).save_pretrained(tmp_path / "soup")
    assert cook(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup") and not warned(caplog)


def test_what_a_search_has_shown_the_soup_before_changes_no_bit(own_heads_bank, tmp_path):
    bank = own_heads_bank
    place = find_head(bank.ingredients[0])
    soup = measured_soup(bank, uniform(bank), head=place)
    images = np.random.default_rng(0).random(600) < 0.3
    soup.look(images)
    first = refit_head(bank, uniform(bank), Teacher(uniform(bank)))
    soup.look(~images)
    again = hf_radin.compute_logits(bank.ingredients, bank.source.dataset, cache_dir=tmp_path)
    second = refit_head(again, uniform(bank), Teacher(uniform(bank)))
    assert first.record == second.record
    assert first.head.layer.sha256 == second.head.layer.sha256 == first.record.sha256
    cross_fitted = soup.refit(Teacher(uniform(bank))).refit
    np.testing.assert_allclose(cross_fitted.layer.weight, first.head.layer.weight, rtol=1e-3, atol=1e-4)


def test_features_are_cached_and_cost_no_further_pass(own_heads_bank, predictions):
    refit_head(own_heads_bank, uniform(own_heads_bank), Teacher(uniform(own_heads_bank)))
    predictions.clear()
    refit_head(own_heads_bank, uniform(own_heads_bank), Teacher(uniform(own_heads_bank)), seed=3)
    assert not predictions


def test_other_images_are_refused(own_heads_bank, tmp_path, capsys):
    refitted(own_heads_bank).save_pretrained(tmp_path / "soup")
    image_dataset(*digit_images(slice(700, 900))).to_parquet(tmp_path / "data" / "validation.parquet")
    assert cook(tmp_path / "soup", tmp_path / "again", tmp_path / "cache", "--dataset", str(tmp_path / "data")) == 2
    error = capsys.readouterr().err
    assert "600 images of the split 'validation' taught its last layers" in error and "are others (200)" in error
    assert not (tmp_path / "again").exists()


def test_a_split_with_changed_images_is_said(own_heads_bank, tmp_path, caplog):
    refitted(own_heads_bank).save_pretrained(tmp_path / "soup")
    image_dataset(*digit_images(slice(600, 1200))).to_parquet(tmp_path / "data" / "validation.parquet")
    assert cook(tmp_path / "soup", tmp_path / "again", tmp_path / "cache", "--dataset", str(tmp_path / "data")) == 0
    assert "are not the same to the last bit" in warned(caplog)[-1]
    caplog.clear()  # the new recipe is that of the head that was made
    other = ["--dataset", str(tmp_path / "data")]
    assert cook(tmp_path / "again", tmp_path / "third", tmp_path / "cache", *other) == 0
    assert not warned(caplog) and weights(tmp_path / "third") == weights(tmp_path / "again")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "distilled"}, "kind='distilled'"),
        ({"folds": 3}, "folds=3"),
        ({"hold_out": 1.5}, "hold_out=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"teacher": {"ingredients": ["a"], "weights": [2.0]}}, "weight"),
    ],
)
def test_a_record_that_says_nonsense_is_refused(own_heads_bank, tmp_path, fields, message):
    refitted(own_heads_bank).save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    contents = json.loads(path.read_text())
    contents["head"] |= fields
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message):
        SearchReport.read(path)


def test_a_teacher_that_is_not_listed_is_refused(own_heads_bank, tmp_path, capsys):
    refitted(own_heads_bank).save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    contents = json.loads(path.read_text())
    contents["head"]["teacher"] = {"ingredients": ["who"], "weights": [1.0]}
    path.write_text(json.dumps(contents))
    assert cook(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 2
    assert "gives 'who' a weight, but does not say which checkpoint that is" in capsys.readouterr().err


def test_another_mixed_precision_is_refused(own_heads_bank, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    soup = refitted(own_heads_bank)
    soup.save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    contents = json.loads(path.read_text())
    contents["head"]["run"]["mixed_precision"] = "bf16"
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="mixed precision 'bf16', and this run has 'no'"):
        cook_recipe(path, tmp_path / "again")


def test_a_head_is_not_written_without_a_report_of_it(own_heads_bank, tmp_path):
    head = refit_head(own_heads_bank, uniform(own_heads_bank), Teacher(uniform(own_heads_bank))).head
    with pytest.raises(ValueError, match="is written with a report that says how it was made"):
        hf_radin.average(own_heads_bank.ingredients, uniform(own_heads_bank), output=tmp_path / "soup", head=head)
    tensors = hf_radin.average(own_heads_bank.ingredients, uniform(own_heads_bank), head=head)
    assert torch.equal(tensors["classifier.bias"], torch.from_numpy(head.layer.bias).float())
