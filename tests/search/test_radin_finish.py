"""The end of a search: the best soup has its head refitted where that is better beyond chance."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.banks import plain_inputs
from shared.logs import warned
from shared.stopping import Stopping
from shared.training import digit_images, image_dataset
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin import Measurement, Recipe
from hf_radin.cli.main import main
from hf_radin.recipes.recipe import Teacher
from hf_radin.runtime.processes import Processes
from hf_radin.search.held_out import bank_of_split
from hf_radin.search.measure import MeasuredSoup
from hf_radin.search.radin import single_measurements
from hf_radin.search.reporter import Reporter, ReportOptions
from hf_radin.soup import card
from hf_radin.soup.report import SearchReport, SearchSettings
from hf_radin.weights.average import average_model


@pytest.fixture(scope="module")
def soup(bank) -> hf_radin.Soup:
    return hf_radin.radin(bank, budget=2, test_split="test", metrics=["accuracy", "log_loss"])


def test_the_race_is_that_of_averaged_heads_and_a_pass_refits_the_best(bank, soup):
    averaged = hf_radin.radin(bank, budget=2, head="average", test_split="test")
    *others, last = soup.measurements
    assert tuple(others) == averaged.measurements
    assert last.recipe == averaged.recipe and last.passes == 0
    assert last.teacher == Teacher(Recipe.uniform(bank.ingredients.ids), labels=True)
    assert soup.report.is_chosen(last) and soup.report.head is not None
    assert (soup.report.passes.head, averaged.report.passes.head) == (1, 0)
    assert soup.report.passes.soups == averaged.report.passes.soups


def test_it_gives_labels_a_higher_probability_on_other_images_too(bank, soup):
    averaged = hf_radin.radin(bank, budget=2, head="average", test_split="test", metrics=["accuracy", "log_loss"])
    for split in ("validation", "test"):
        first, second = (
            next(row.metrics for row in result.results if (row.name, row.split) == ("soup", split))
            for result in (soup, averaged)
        )
        assert first["log_loss"] < second["log_loss"]
    assert soup.accuracy("soup", "validation") == soup.measurements[-1].measured


def test_what_is_reported_is_what_the_saved_model_does(bank, soup, tmp_path):
    soup.save_pretrained(tmp_path / "soup")
    model, test = (
        AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval(),
        bank_of_split(bank, "test"),
    )
    with torch.inference_mode():
        predicted = np.concatenate([model(**inputs).logits.argmax(1).numpy() for inputs in plain_inputs(test)])
    assert soup.accuracy("soup", "test") == (predicted == test.labels).mean()
    assert SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True).measurements == soup.measurements


def test_it_is_cooked_again_from_its_images(bank, soup, tmp_path):
    soup.save_pretrained(tmp_path / "soup")
    cook = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "again")]
    assert main([*cook, "--cache-dir", str(bank.folder.parent.parent)]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("soup", "again"))
    assert first == second


def test_the_same_again_runs_no_model(bank, soup, predictions):
    again = hf_radin.radin(bank, budget=2, test_split="test", metrics=["accuracy", "log_loss"])
    assert not predictions
    assert (again.measurements, again.results, again.report.head) == (
        soup.measurements,
        soup.results,
        soup.report.head,
    )


def test_a_class_with_hardly_an_image_would_be_forgotten(runs, tmp_path, caplog):
    images, labels = digit_images(slice(700, 1000))
    rows = [*np.flatnonzero(np.array(labels) != 3)[:200], list(labels).index(3)]
    few = image_dataset([images[row] for row in rows], [labels[row] for row in rows])
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), few, cache_dir=tmp_path)
    with caplog.at_level(logging.INFO, logger="hf_radin"):
        soup = hf_radin.radin(bank, budget=1)
    assert soup.report.head is None and soup.report.passes.head == 0
    assert "1 different images of one class" in caplog.text
    hf_radin.radin(bank, budget=1, head="refit")
    assert any("a refitted head forgets what it is not shown" in line for line in warned(caplog))


def test_what_is_tried_and_not_taken_is_counted_and_said(bank, caplog):
    reporter = Reporter.of(bank, ReportOptions())
    *singles, last = single_measurements(reporter.bank)
    with caplog.at_level(logging.INFO, logger="hf_radin"):
        soup = reporter.soup(
            "radin", [*singles, replace(last, measured=1.0)], SearchSettings(), singles[0], refits=True
        )
    assert soup.report.head is None and soup.report.passes.head == 1
    assert (
        "The averaged head stays: of the best single model the accuracy is 100.00%, which is not worse." in caplog.text
    )
    assert "| refitting the head of the soup, which was not taken | 1 |" in card.render(soup.report)


def test_a_single_model_that_no_soup_beats_has_its_head_refitted(bank, caplog):
    reporter = Reporter.of(bank, ReportOptions())
    singles = single_measurements(reporter.bank)
    soup = reporter.soup("radin", singles, SearchSettings(), refits=True)
    assert soup.report.is_chosen(soup.measurements[-1])
    assert soup.measurements[-1].proposal == "alone" and soup.report.head is not None
    assert any("which is returned, with a refitted head." in line for line in warned(caplog))
    assert "\n- name: Best single model with a refitted head\n" in card.render(soup.report)
    assert soup.accuracy("soup", "validation") > soup.accuracy("best single", "validation")


@pytest.mark.parametrize("options", [{"measure": "full"}, {"budget": 0}, {"head": "average"}])
def test_otherwise_heads_stay_as_they_are(bank, options):
    report = hf_radin.radin(bank, **{"budget": 1, **options}).report
    assert report.head is None and report.passes.head == 0


def test_after_an_interrupt_there_is_no_further_pass(bank):
    report = hf_radin.radin(replace(bank, processes=Processes(Stopping("log", 2))), budget=2, seed=5).report
    assert report.ended == "interrupt" and report.head is None and report.passes.head == 0


def test_a_soup_without_finite_logits_teaches_nothing(bank, tmp_path):
    folder = tmp_path / "home" / "banks" / bank.folder.name
    shutil.copytree(bank.folder, folder, ignore=shutil.ignore_patterns("soups", "features"))
    reporter = Reporter.of(replace(bank, folder=folder), ReportOptions())
    recipe = Recipe.uniform(reporter.bank.ingredients.ids)
    model = average_model(bank.ingredients, recipe)
    model.classifier.bias.data.fill_(float("nan"))
    MeasuredSoup(reporter.bank, recipe, lambda: model).look(np.ones(len(bank), dtype=bool))  # cached from here on
    uniform = Measurement(recipe, "uniform", 0.8, 0.0, len(bank))
    singles = single_measurements(reporter.bank)
    soup = reporter.soup("radin", [*singles, uniform], SearchSettings(), uniform, refits=True)
    assert soup.report.head is None and soup.report.passes.head == 0


def test_another_split_can_teach_it(bank):
    soup = hf_radin.radin(bank, budget=1, head_split="train", test_split="test")
    teaching = bank_of_split(bank, "train")
    assert soup.report.passes.head == pytest.approx(1 + len(teaching) / len(bank) * (1 + len(bank.ingredients)))
    assert soup.measurements[-1].measured == soup.accuracy("soup", "validation")
