"""A start that is no ingredient: soups are pulled to it, measured like others, and reported as they are."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.banks import plain_inputs
from shared.launching import launch
from shared.starts import astray, astray_bank, backbone, save_backbone, with_start
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.recipes.recipe import Measurement, Pull, Recipe
from hf_radin.search.reporter import choose
from hf_radin.soup.report import SearchReport
from hf_radin.weights.average import average_model

__all__ = ["astray", "astray_bank", "backbone"]  # fixtures


@pytest.fixture(scope="module")
def soup(astray_bank, backbone) -> hf_radin.Soup:
    return hf_radin.radin(
        astray_bank, budget=12, proposals="auto,wise-ft", start=str(backbone), test_split="test", head="average"
    )


def pulled(soup: hf_radin.Soup) -> list[Measurement]:
    return [entry for entry in soup.measurements if entry.recipe.pull]


def test_where_fine_tunes_went_astray_the_pulled_soup_wins(soup, backbone):
    assert soup.recipe.pull and soup.recipe.pull.start == soup.report.start == str(backbone)
    best = max(entry.known for entry in soup.measurements if not entry.recipe.pull)
    won = next(entry for entry in soup.measurements if soup.report.is_chosen(entry))
    assert won.recipe.pull and won.proposal == "wise-ft" and won.measured > best + 0.02
    assert won.images == 600 and won.measured == soup.accuracy("soup", "validation")
    assert soup.accuracy("soup", "test") > soup.accuracy("uniform", "test")
    assert won.estimate == pytest.approx(
        next(entry.estimate for entry in soup.measurements if entry.recipe.is_same(won.recipe.ensemble))
    )


def test_what_is_reported_is_what_the_saved_model_does(soup, astray_bank, digits, tmp_path):
    soup.save_pretrained(tmp_path / "soup")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval()
    test = hf_radin.compute_logits(astray_bank.ingredients, digits, split="test", cache_dir=astray_bank.home)
    with torch.inference_mode():
        predicted = np.concatenate([saved(**inputs).logits.argmax(1).numpy() for inputs in plain_inputs(test)])
    assert soup.accuracy("soup", "test") == (predicted == test.labels).mean()
    report = SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True)
    assert (report.recipe, report.measurements) == (soup.recipe, soup.measurements)
    assert report.pulled_to == soup.report.pulled_to and report.pulled_to.revision.startswith("sha256:")
    assert hf_radin.Soup.from_pretrained(tmp_path / "soup").recipe == soup.recipe


def test_a_start_of_the_ingredients_own_body_changes_no_prediction(runs, digits, cache, tmp_path):
    body = save_backbone(runs / "ft-0", tmp_path / "body")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), digits, cache_dir=cache)
    first = Recipe.uniform(bank.ingredients.ids[:1])
    mine = [replace(first, pull=Pull(str(body), share)) for share in (0.2, 0.5)]
    options = {"start": str(body), "recipes": mine, "proposals": "auto,wise-ft", "measure": "full"}
    soup = hf_radin.radin(bank, budget=3, **options)
    mixed = [entry for entry in soup.measurements if entry.proposal == "own"]
    (single,) = (entry for entry in soup.measurements if entry.proposal == "single" and entry.recipe == first)
    assert [entry.recipe for entry in mixed] == mine and {entry.measured for entry in mixed} == {single.measured}
    with pytest.raises(ValueError, match=r"pulled to the start 'other', and there is .*body: name it"):
        hf_radin.radin(bank, budget=3, **{**options, "recipes": [replace(first, pull=Pull("other", 0.5))]})
    with pytest.raises(ValueError, match="pulled to the start 'other', and there is none"):
        hf_radin.radin(bank, budget=3, recipes=[replace(first, pull=Pull("other", 0.5))])


def test_what_was_measured_of_one_start_is_not_taken_for_another(astray_bank, backbone, start, tmp_path):
    moved = save_backbone(start, tmp_path / "moved", noise=0.3)
    paths = set()
    for folder in (backbone, moved):
        bank = replace(astray_bank, ingredients=with_start(astray_bank.ingredients, folder))
        recipe = Recipe.uniform(bank.ingredients.ids)
        paths |= {bank.soup_path(recipe)}
        paths |= {bank.soup_path(replace(recipe, pull=Pull(str(folder), share))) for share in (0.1, 0.2)}
    assert len(paths) == 5
    with pytest.raises(ValueError, match="these ingredients have none"):
        astray_bank.soup_path(replace(recipe, pull=Pull(str(moved), 0.1)))


def test_measured_again_it_is_the_same_and_runs_no_model(soup, astray_bank, backbone, predictions):
    again = hf_radin.radin(
        astray_bank, budget=12, proposals="auto,wise-ft", start=str(backbone), test_split="test", head="average"
    )
    assert not predictions and (again.measurements, again.results) == (soup.measurements, soup.results)


@pytest.mark.parametrize("options", [{"measure": "full"}, {"head": "refit", "budget": 2}, {"hold_out": 0.3}])
def test_every_way_to_measure_has_pulled_soups(astray_bank, backbone, options):
    options = {"budget": 6, "proposals": "auto,wise-ft", "start": str(backbone), **options}
    soup = hf_radin.radin(astray_bank, **options)
    assert pulled(soup) and (soup.recipe.pull or "head" in options)
    if "head" in options:  # with another head, a single model may be as good
        assert {entry.teacher is None for entry in pulled(soup)} == {True, False}
        assert all(entry.teacher is None or entry.teacher.ensemble.pull is None for entry in soup.measurements)


def test_after_a_pilot_too(astray, backbone, digits, tmp_path):
    ingredients = hf_radin.gather(f"{astray}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path, pilot=0.3)
    soup = hf_radin.radin(bank, budget=6, proposals="auto,wise-ft", start=str(backbone))
    assert soup.recipe.pull and soup.report.pilot.is_completed


def test_statistics_of_pulled_nets_are_estimated_anew(nets, digits, tmp_path):
    ingredients = hf_radin.gather(f"{nets}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path, batchnorm_images=128)
    start = with_start(ingredients, nets / "start").start
    mine = Recipe(ingredients.ids[:1], (1.0,), Pull(start.id, 0.3))
    soup = hf_radin.radin(bank, budget=1, proposals="wise-ft", start=start.id, recipes=[mine])
    measured = [entry for entry in soup.measurements if entry.passes]
    assert any(entry.recipe.is_same(mine) for entry in measured)
    assert soup.report.passes.batchnorm == pytest.approx((len(measured) + soup.report.passes.head) * 128 / 600)
    averaged = average_model(with_start(ingredients, nets / "start"), mine, statistics=bank.statistics)
    name = "resnet.embedder.embedder.normalization.running_var"
    plain = average_model(with_start(ingredients, nets / "start"), mine).state_dict()[name]
    assert not torch.equal(averaged.state_dict()[name], plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "nowhere/at/all"}, "There is no folder 'nowhere/at/all' here"),
        ({"proposals": "auto"}, r"is for proposals='wise-ft' or 'model-stock'"),
        ({"budget": 0}, "has to be measured, and with a budget of 0 nothing is"),
    ],
)
def test_a_start_that_is_refused_leaves_nothing_measured(astray_bank, backbone, predictions, options, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(astray_bank, **{"budget": 2, "proposals": "auto,wise-ft", "start": str(backbone), **options})
    assert not predictions


def test_on_the_command_line_it_is_refused_before_any_pass(astray, backbone, digits, tmp_path, capsys):
    models = ["--models", f"{astray}/ft-*", "--dataset", str(digits), "--cache-dir", str(tmp_path / "cache")]
    command = ["soup", *models, "--output", str(tmp_path / "soup"), "--proposals", "auto,wise-ft"]
    for start, message in (
        (f"{digits}", "no config.json"),
        (f"{astray}/ft-0/config.json", "is a file"),
        (f"{astray}/ft-0/", "name it so"),
    ):
        assert main([*command, "--start", start]) == 2
        assert message in capsys.readouterr().err
    shutil.copytree(backbone, tmp_path / "soup")
    assert main([*command, "--start", str(tmp_path / "soup"), "--overwrite"]) == 2
    assert "which would be lost" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and (tmp_path / "soup" / "model.safetensors").exists()


def test_a_base_model_that_all_name_is_proposed_as_a_start(astray, backbone, digits, tmp_path, caplog):
    caplog.set_level("INFO")
    for run in sorted(astray.iterdir()):
        shutil.copytree(run, tmp_path / run.name)
        (tmp_path / run.name / "README.md").write_text(f"---\nbase_model: {backbone}\n---\n")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/ft-*"), digits, cache_dir=tmp_path / "cache")
    soup = hf_radin.radin(bank, budget=1, head="average")
    assert soup.recipe.pull is None and soup.report.start is None
    (line,) = (line for line in caplog.messages if "base model" in line)
    assert f"{backbone}: name it as start (--start)" in line
    named = hf_radin.radin(bank, budget=6, head="average", start=str(backbone), proposals="auto,wise-ft")
    assert named.recipe.pull and named.report.start == str(backbone)


SCRIPT = """
import sys
from pathlib import Path
import hf_radin

models, data, start, _, cache = sys.argv[1:]
bank = hf_radin.compute_logits(hf_radin.gather(models), data, cache_dir=cache)
hf_radin.radin(bank, budget=5, proposals="auto,wise-ft", start=start, head="average").save_pretrained("soup")
"""


def test_one_process_equals_two(astray, backbone, digits, tmp_path):
    script, results = tmp_path / "script.py", []
    script.write_text(SCRIPT)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run = launch(folder, processes, f"{astray}/ft-*", digits, backbone, script=script)
        assert run.returncode == 0, run.stderr
        report = SearchReport.read(folder / "soup" / "recipe.json", is_saved=True)
        weights = (folder / "soup" / "model.safetensors").read_bytes()
        results.append((report.recipe, report.measurements, report.results, weights))
    assert results[0][0].pull and results[0] == results[1]


def test_of_equals_the_soup_that_is_pulled_to_no_start_is_chosen():
    plain = Measurement(Recipe.uniform("ab"), "own", 0.7, 0.8, 10)
    pulled = Measurement(replace(plain.recipe, pull=Pull("start", 0.1)), "own", 0.9, 0.8, 10)
    assert choose([pulled, plain]) == plain and choose([plain, replace(pulled, measured=0.81)]).recipe.pull
