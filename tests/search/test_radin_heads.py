"""Heads of their own: `radin` measures each soup once with all its heads, and returns one if it is the best."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.banks import plain_inputs
from shared.heads import own_heads, own_heads_bank
from shared.launching import launch
from shared.logs import warned
from shared.training import digit_images, image_dataset
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin import Measurement, Recipe
from hf_radin.cli.main import main
from hf_radin.recipes.recipe import Teacher
from hf_radin.search.measure import MeasuredSoup
from hf_radin.search.race import Budget, Entry, RaceOptions, race
from hf_radin.search.reporter import choose
from hf_radin.soup.report import SearchReport
from hf_radin.weights.average import average_model
from hf_radin.weights.head import find_head

__all__ = ["own_heads", "own_heads_bank"]  # fixtures


@pytest.fixture
def fresh(own_heads_bank, tmp_path) -> hf_radin.LogitBank:
    """The bank without any soup that was measured."""
    folder = tmp_path / "home" / "banks" / own_heads_bank.folder.name
    shutil.copytree(own_heads_bank.folder, folder)
    shutil.rmtree(folder / "soups", ignore_errors=True)
    shutil.rmtree(folder / "features", ignore_errors=True)
    return replace(own_heads_bank, folder=folder)


@pytest.fixture(scope="module")
def soup(own_heads_bank) -> hf_radin.Soup:
    return hf_radin.radin(own_heads_bank, budget=3, test_split="test")


def refitted(soup: hf_radin.Soup) -> list[Measurement]:
    return [entry for entry in soup.measurements if entry.teacher is not None]


def test_heads_that_were_drawn_apart_are_found_and_a_refitted_one_wins(soup):
    report = soup.report
    assert report.heads == "auto" and report.head is not None and report.head.teacher.used
    (uniform,) = (entry for entry in report.soups if entry.proposal == "uniform" and entry.teacher is None)
    won = next(entry for entry in report.measurements if report.is_chosen(entry))
    assert won.teacher is not None and won.images == 600 and won.measured > uniform.measured
    assert won.measured == soup.accuracy("soup", "validation") > soup.accuracy("best single", "validation")
    assert soup.accuracy("soup", "test") > soup.accuracy("uniform", "test")


def test_each_soup_has_both_heads_and_each_single_model_that_of_all(soup):
    everything = Recipe.uniform(soup.ingredients.ids).used
    by_recipe: dict = {}
    for entry in soup.report.soups:
        teacher = entry.teacher and (tuple(sorted(entry.teacher.used.items())), entry.teacher.labels)
        by_recipe.setdefault((entry.proposal, tuple(sorted(entry.recipe.used.items()))), []).append(teacher)
    of_all = tuple(sorted(everything.items()))
    assert any(proposal == "alone" for proposal, _ in by_recipe)
    for (proposal, recipe), teachers in by_recipe.items():
        if proposal == "alone":
            assert len(recipe) == 1 and teachers == [(of_all, False), (of_all, True)]
        else:
            assert len(recipe) > 1 and {*teachers} == {None, (recipe, False), (of_all, False), (of_all, True)}


def test_a_further_head_of_a_soup_costs_no_pass(fresh, predictions):
    soup = hf_radin.radin(fresh, budget=2)
    counts = soup.report.passes
    measured = [entry for entry in soup.report.soups if entry.passes]
    assert len({(entry.proposal, entry.recipe) for entry in measured}) == len(measured)
    assert all(entry.teacher is None or entry.proposal == "alone" for entry in measured)
    assert sum(entry.passes for entry in measured if entry.proposal != "uniform") <= 2
    assert counts.soups == pytest.approx(sum(entry.passes for entry in measured))
    assert (counts.head == 1) == (soup.report.head is not None)
    assert sum(predictions) == pytest.approx(600 * (counts.soups + counts.head))


def test_what_is_reported_is_what_the_saved_model_does(soup, own_heads_bank, tmp_path, digits):
    soup.save_pretrained(tmp_path / "soup")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval()
    test = hf_radin.compute_logits(
        own_heads_bank.ingredients, digits, split="test", cache_dir=own_heads_bank.folder.parent.parent
    )
    with torch.inference_mode():
        predicted = np.concatenate([saved(**inputs).logits.argmax(1).numpy() for inputs in plain_inputs(test)])
    assert soup.accuracy("soup", "test") == (predicted == test.labels).mean()
    report = SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True)
    assert report.measurements == soup.measurements and report.head == soup.report.head
    assert hf_radin.Soup.from_pretrained(tmp_path / "soup").report.passes == soup.report.passes


def test_a_search_that_is_made_again_finds_the_same_and_runs_no_model(fresh, predictions):
    first = hf_radin.radin(fresh, budget=2, hold_out=0.3, seed=3)
    assert predictions and first.report.head.hold_out == 0.3
    predictions.clear()
    again = hf_radin.radin(fresh, budget=2, hold_out=0.3, seed=3)
    assert not predictions
    assert (again.measurements, again.results) == (first.measurements, first.results)
    assert again.report.head == first.report.head


def test_averaged_heads_are_what_they_were_and_not_silent(fresh, caplog):
    soup = hf_radin.radin(fresh, budget=1, head="average")
    assert not refitted(soup) and soup.report.head is None and soup.report.passes.head == 0
    (line,) = (line for line in warned(caplog) if "Heads of their own" in line)
    assert "cosine" in line and "averaged" in line
    assert not (fresh.folder / "features").exists()


def test_the_refitted_soup_of_equal_models_is_that_model(runs, digits, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(runs / "ft-0", tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt", "copy": name})
    bank = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/[ab]"), digits, cache_dir=tmp_path / "cache")
    soup = hf_radin.radin(bank, budget=2, head="refit")
    taught = [entry for entry in soup.measurements if entry.teacher is None or not entry.teacher.labels]
    assert refitted(soup) and len({entry.measured for entry in taught}) == 1
    assert choose(taught).proposal == "single"  # no better, so the simplest


def test_of_equals_the_averaged_head_is_chosen():
    recipe, teacher = Recipe(("a", "b"), (0.5, 0.5)), Teacher(Recipe(("a", "b"), (0.1, 0.9)))
    averaged = Measurement(recipe, "own", 0.7, 0.8, 10)
    refit = Measurement(recipe, "own", 0.9, 0.8, 10, teacher=teacher)
    single = Measurement(Recipe(("a",), (1.0,)), "single", 0.8, 0.8, 10)
    alone = Measurement(Recipe(("a",), (1.0,)), "alone", 0.9, 0.8, 10, teacher=teacher)
    assert choose([refit, averaged]) == averaged and choose([alone, refit, averaged, single]) == single
    assert choose([replace(refit, teacher=Teacher(recipe, labels=True), estimate=0.95), refit]) == refit
    assert choose([single, replace(alone, measured=0.81)]).teacher == teacher
    assert Measurement.from_dict(json.loads(json.dumps(alone.to_dict()))) == alone
    without = {name: value for name, value in averaged.to_dict().items() if name != "teacher"}
    assert Measurement.from_dict(without) == averaged  # of an earlier version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "x"}, "head='x'"),
        ({"head": "refit", "budget": 0}, "budget of 0"),
    ],
)
def test_what_can_not_be_is_refused_before_a_pass(own_heads_bank, predictions, options, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(own_heads_bank, **options)
    assert not predictions


def test_after_a_pilot_heads_are_averaged_and_that_is_said(own_heads, digits, tmp_path, caplog):
    ingredients = hf_radin.gather(f"{own_heads}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path, pilot=0.5)
    with pytest.raises(ValueError, match="after a pilot"):
        hf_radin.radin(bank, budget=1, head="refit")
    assert not refitted(hf_radin.radin(bank, budget=1))
    assert any("Heads of their own" in line and "after a pilot" in line for line in warned(caplog))


@pytest.mark.parametrize(("images", "is_few"), [(20, True), (40, False)])
def test_fewer_images_than_features_are_enough_and_that_is_said(own_heads, tmp_path, caplog, images, is_few):
    few = image_dataset(*digit_images(slice(700, 700 + images)))
    bank = hf_radin.compute_logits(hf_radin.gather(f"{own_heads}/ft-*"), few, cache_dir=tmp_path)
    soup = hf_radin.radin(bank, budget=1)
    assert all(entry.images == images for entry in refitted(soup)) and refitted(soup)
    assert any(f"{images} images teach heads of 32 features each" in line for line in warned(caplog)) == is_few


def test_metrics_of_logits_are_those_of_heads_that_did_not_see_the_image(own_heads_bank, tmp_path):
    bank = own_heads_bank
    soup = hf_radin.radin(bank, budget=3, metrics=["accuracy", "log_loss"])
    (row,) = (result.metrics for result in soup.results if result.name == "soup")
    soup.save_pretrained(tmp_path / "soup")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval()
    with torch.inference_mode():
        logits = torch.cat([saved(**inputs).logits for inputs in plain_inputs(bank)])
    seen = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(bank.labels)))
    assert soup.report.head and float(seen) < row["log_loss"] < 1
    assert soup.report.passes.probabilities == 1  # of the uniform soup


def test_the_command_line_refits_and_cooks_again(own_heads, digits, tmp_path, capsys):
    options = ["--dataset", str(digits), "--cache-dir", str(tmp_path / "cache"), "--budget", "3"]
    command = ["soup", "--models", f"{own_heads}/ft-*", *options, "--output", str(tmp_path / "soup")]
    assert main([*command, "--head", "refit"]) == 0
    report = SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True)
    assert report.heads == "refit" and report.head is not None
    cook = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "again")]
    assert main([*cook, "--cache-dir", str(tmp_path / "cache")]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("soup", "again"))
    assert first == second
    assert "head is refitted to the ensemble" in capsys.readouterr().out


@pytest.mark.parametrize("other", [["--method", "greedy"], ["--pilot", "0.5"]])
def test_options_that_do_not_go_with_a_head_are_refused(other, tmp_path, capsys):
    command = ["soup", "--models", "nowhere", "--output", str(tmp_path / "soup"), "--head", "refit", *other]
    assert main(command) != 0
    assert "--head refit" in capsys.readouterr().err


SCRIPT = """
import sys
import hf_radin

models, data = sys.argv[1:3]
bank = hf_radin.compute_logits(hf_radin.gather(models), data, cache_dir="cache")
soup = hf_radin.radin(bank, budget=3, test_split="test")
soup.save_pretrained("soup")
"""


def test_two_processes_find_what_one_finds(own_heads, digits, tmp_path):
    script = tmp_path / "search.py"
    script.write_text(SCRIPT)
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run = launch(folder, processes, f"{own_heads}/ft-*", digits, script=script)
        assert run.returncode == 0, run.stderr
        report = SearchReport.read(folder / "soup" / "recipe.json", is_saved=True)
        weights = (folder / "soup" / "model.safetensors").read_bytes()
        results.append((report.measurements, report.results, report.head, weights))
    assert results[0][2] is not None and results[0] == results[1]


def test_a_split_of_fewer_images_than_folds_teaches_no_head(own_heads, tmp_path, predictions, caplog):
    images, labels = digit_images(slice(0, 4))
    ingredients = hf_radin.gather(f"{own_heads}/ft-*")
    bank = hf_radin.compute_logits(ingredients, image_dataset(images, labels), cache_dir=tmp_path)
    predictions.clear()
    with pytest.raises(ValueError, match="5 folds, and the split has 4 different images"):
        hf_radin.radin(bank, budget=1, head="refit")
    assert not predictions
    assert not refitted(hf_radin.radin(bank, budget=1))
    assert any("5 folds" in line for line in warned(caplog))


def test_a_soup_without_finite_logits_has_no_head_that_is_right(fresh):
    recipe = Recipe.uniform(fresh.ingredients.ids)
    place = find_head(fresh.ingredients[0])

    def soup_of(bank, recipe, entries):
        model = average_model(bank.ingredients, recipe)
        model.classifier.bias.data.fill_(float("nan"))
        return MeasuredSoup(bank, recipe, lambda: model, entries, place)

    both = Entry(recipe, "own", 0.8, teachers=(None, Teacher(recipe)))
    result = race(fresh, [both], RaceOptions(Budget.of(2)), best=None, soup_of=soup_of)
    assert [(entry.teacher, entry.measured) for entry in result.measurements] == [(None, 0.0), (Teacher(recipe), 0.0)]


@pytest.mark.parametrize("method", [hf_radin.greedy, hf_radin.uniform])
def test_the_baselines_do_not_average_such_heads_in_silence(own_heads_bank, caplog, method):
    assert method(own_heads_bank).report.head is None
    assert any("Heads of their own" in line for line in warned(caplog))
