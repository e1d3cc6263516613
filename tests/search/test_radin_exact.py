"""Where models differ in their heads alone, a soup is its ensemble: what logits say is measured, for nothing."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import label_sets
from shared.classes import digits_of, with_classes
from shared.launching import launch
from shared.lora import save_trained
from shared.training import NAMES, save, train
from transformers import ViTForImageClassification

import hf_radin
from hf_radin.cli.in_common import InCommon
from hf_radin.cli.tables import soup_table
from hf_radin.layers.taught import refit_head
from hf_radin.recipes.recipe import Measurement, Recipe, Teacher
from hf_radin.search.measure import measured_soup
from hf_radin.soup.card import render
from hf_radin.soup.report import SearchReport

SEARCHES = {
    "radin": lambda bank, **options: hf_radin.radin(bank, head="average", **options),
    "in time": lambda bank, **options: hf_radin.radin(bank, budget="15m", head="average", **options),
    "of nothing": lambda bank, **options: hf_radin.radin(bank, budget=0, **options),
    "full": lambda bank, **options: hf_radin.radin(bank, measure="full", **options),
    "greedy": hf_radin.greedy,
    "uniform": hf_radin.uniform,
}


@pytest.fixture(scope="module")
def probes(start, tmp_path_factory) -> Path:
    """Five linear probes of one body: `probe-0` to `probe-4`."""
    folder = tmp_path_factory.mktemp("probes")
    for seed in range(5):
        model = ViTForImageClassification.from_pretrained(start)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.weight, std=0.2)  # heads of their own, as new ones are
        train(model, learning_rate=3e-2, epochs=2, seed=seed + 1, share=0.1, names=("classifier",))
        save(model, folder / f"probe-{seed}")
    return folder


@pytest.fixture(scope="module")
def probe_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("probe-cache")


@pytest.fixture(scope="module")
def linear(probes, digits, probe_cache) -> hf_radin.LogitBank:
    """The logits of the probes on the validation split."""
    return hf_radin.compute_logits(hf_radin.gather(f"{probes}/probe-*"), digits, cache_dir=probe_cache)


@pytest.fixture(scope="module")
def proof(probes, digits, probe_cache) -> hf_radin.LogitBank:
    """Their logits on the test split."""
    ingredients = hf_radin.gather(f"{probes}/probe-*")
    return hf_radin.compute_logits(ingredients, digits, split="test", cache_dir=probe_cache)


@pytest.mark.parametrize("seed", range(3))
def test_a_soup_that_really_runs_predicts_what_its_ensemble_does(linear, seed):
    weights = np.random.default_rng(seed).dirichlet(np.ones(5))
    soup = measured_soup(linear, linear.recipe(weights))
    predictions = soup.look(np.ones(len(linear), dtype=bool))
    logits, spent = soup.logits()
    mixed = linear.answers(weights, with_logits=True).logits
    assert spent.seconds and np.abs(logits - mixed).max() < 1e-5 * np.abs(mixed).max()
    assert (predictions == linear.predict(weights)).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_no_search_runs_a_model(linear, proof, predictions, model_calls, search):
    soup = SEARCHES[search](linear, test_split=proof, metrics=("accuracy", "log_loss"))
    report = soup.report
    # the random model that shows where the head is sees two made-up images
    assert not predictions and sum(model_calls) <= 2 and report.soups and report.is_exact
    for entry in report.soups:
        assert entry.exact and entry.passes == 0 and entry.images == len(linear)
        assert entry.measured == pytest.approx(entry.estimate) == linear.score(entry.recipe)[0]
    passes = report.passes
    assert passes.total == passes.logits == 5 and report.time.soups in (None, 0)
    row = proof.row(soup.recipe)
    (proved,) = [result for result in report.results if result.name == "soup" and result.split == "test"]
    assert proved.metrics["accuracy"] == proof.score(row[None])[0]
    assert proved.metrics["log_loss"] == pytest.approx(proof.score(row[None], "log_loss")[0])
    assert {comparison.split for comparison in report.against_best_single} <= {"validation", "test"}
    assert report.verdict is not None and report.verdict.is_proof


@pytest.mark.parametrize("metric", ["accuracy", "f1", "log_loss"])
def test_the_best_estimate_is_the_best_soup_and_no_worse_than_what_measuring_finds(linear, metric):
    exact = hf_radin.radin(linear, metric=metric, head="average")
    sign = -1 if metric == "log_loss" else 1
    measured = hf_radin.radin(replace(linear, exact=False), metric=metric, budget=4, head="average")
    assert measured.report.passes.soups > 0 and not measured.report.is_exact
    values = [
        next(entry.measured for entry in soup.report.measurements if entry.recipe == soup.recipe)
        for soup in (exact, measured)
    ]
    assert sign * values[0] >= sign * values[1] - 1e-9
    best = max(sign * entry.measured for entry in exact.report.measurements)
    assert sign * values[0] == best
    if metric == "accuracy":
        assert best >= linear.score(np.random.default_rng(0).dirichlet(np.ones(5), 200)).max() - 1 / 600


def test_weights_along_lines_are_candidates(linear):
    proposals = {entry.proposal for entry in hf_radin.radin(linear, proposals="line").report.soups}
    assert "line" in proposals


def test_all_recipes_of_the_user_are_measured(linear, predictions):
    ids = linear.ingredients.ids
    mine = [Recipe(ids[:2], (share, 1 - share)) for share in (0.01, 0.3, 0.99)] + [Recipe.uniform(ids[:1])]
    report = hf_radin.radin(linear, recipes=mine, budget=1).report
    known = {tuple(entry.recipe.used.items()) for entry in report.measurements}
    assert all(tuple(recipe.used.items()) in known for recipe in mine) and not predictions


def test_a_floor_is_kept_by_what_is_exact(linear, predictions):
    best = linear.score(np.eye(5)).max()
    report = hf_radin.radin(linear, metric="f1", keep=f"accuracy >= {best:.4f}").report
    (chosen,) = [entry for entry in report.measurements if report.is_chosen(entry)]
    assert chosen.keeps and not predictions


def test_a_part_that_is_held_out_proves_it_without_a_pass(linear, predictions):
    soup = hf_radin.radin(linear, hold_out=0.3, head="average")
    results = {result.name: result for result in soup.report.results if result.split == soup.report.held_out}
    held_out = linear.divided(0.3, 0)[1]
    assert results["soup"].metrics["accuracy"] == held_out.score(soup.recipe)[0] and not predictions


def test_after_a_pilot_all_logits_are_computed_and_no_soup_runs(probes, digits, tmp_path):
    ingredients = hf_radin.gather(f"{probes}/probe-*")
    bank = hf_radin.compute_logits(ingredients, digits, pilot=0.5, cache_dir=tmp_path)
    report = hf_radin.radin(bank, budget=2).report
    assert report.is_exact and report.passes.soups == 0 and report.images == 600 and not report.unseen
    assert {entry.images for entry in report.measurements} == {600}
    estimated = hf_radin.radin(bank, budget=0).report
    assert not estimated.is_exact  # of a part of the images alone


@pytest.fixture
def unrefitted(linear, tmp_path) -> hf_radin.LogitBank:
    """The same logits where no head was refitted yet."""
    folder = tmp_path / "unrefitted" / "banks" / linear.folder.name
    shutil.copytree(linear.folder, folder, ignore=shutil.ignore_patterns("soups", "features"))
    return replace(linear, folder=folder)


@pytest.mark.parametrize("options", [{}, {"head": "refit"}, {"head": "refit", "measure": "full"}])
def test_the_soup_ends_with_a_refitted_head_for_one_pass_of_the_body(unrefitted, predictions, caplog, options):
    caplog.set_level(logging.INFO, logger="hf_radin")
    soup = hf_radin.radin(unrefitted, **options)
    report = soup.report
    assert report.is_exact and report.has_refitted_head and sum(predictions) == len(unrefitted)
    assert report.passes.head == 1 and report.passes.soups == 0 and report.passes.total == 6
    assert "One pass of the body that they share, beside the budget" in caplog.text
    averaged = hf_radin.radin(unrefitted, head="average").report
    entries = {entry.teacher is None: entry.measured for entry in report.measurements if report.is_chosen(entry)}
    assert entries.keys() == {False} and entries[False] > max(entry.measured for entry in averaged.measurements)
    # what is reported is said by heads that did not see the image
    assert soup.unseen.hits.mean() == entries[False]
    text = " ".join(render(report).split())
    assert "| refitting the head of the soup | 1 | |" in text and "with a refitted head, is another function" in text


def test_what_the_body_gives_is_computed_once_for_all_soups(unrefitted, predictions):
    first = hf_radin.radin(unrefitted)
    assert predictions
    predictions.clear()
    other = hf_radin.radin(unrefitted, metric="log_loss", recipes=[Recipe.uniform(unrefitted.ingredients.ids[:2])])
    assert other.recipe != first.recipe and other.report.passes.head == 1 and not predictions


@pytest.mark.parametrize("names", [(0, 1), (0, 2, 4)])
def test_the_head_is_that_of_the_soup_that_runs(unrefitted, names):
    ids = unrefitted.ingredients.ids
    recipe = Recipe.uniform([ids[place] for place in names])
    teacher = Teacher(Recipe.uniform(ids), labels=True)
    known, run = (refit_head(replace(unrefitted, exact=exact), recipe, teacher).head for exact in (True, False))
    assert known.sha256 == run.sha256


def test_a_head_is_averaged_where_that_is_asked_for_or_there_is_no_pass(linear, predictions, caplog):
    caplog.set_level(logging.INFO, logger="hf_radin")
    assert hf_radin.radin(linear, head="average").report.head is None and "pass of the body" not in caplog.text
    assert hf_radin.radin(linear, budget=0).report.head is None and not predictions
    assert "With a budget of 0 heads are averaged" in caplog.text
    elsewhere = hf_radin.radin(linear, head_split="train").report
    assert elsewhere.is_exact and elsewhere.passes.soups == 0 and elsewhere.passes.head > 5


def test_distilled_layers_are_run_and_said_to_be(linear, proof, predictions, caplog):
    caplog.set_level(logging.INFO, logger="hf_radin")
    soup = hf_radin.distill(linear, hf_radin.uniform(linear, test_split=proof))
    assert soup.report.is_distilled and soup.report.is_exact and sum(predictions) >= len(proof)
    assert "the same up to" not in caplog.text  # no soup runs from there on
    for text in (" ".join(render(soup.report).split()), soup_table(soup)):
        assert "with an averaged head is the same function as the ensemble of its ingredients" in text
        assert "This one, with distilled last layers, is another function than the ensemble: it was run." in text
    assert "| the figures on test, in passes over it | 6 | |" in render(soup.report)  # of five logits and of this soup


def test_what_changes_takes_no_pass(linear, predictions):
    soup = hf_radin.greedy(linear)
    changes = hf_radin.soup_changes(linear, soup)
    single = hf_radin.best_single(linear).recipe
    known = linear.compare(single, soup.recipe)
    assert not soup.report.is_single and (changes.predictions == known.predictions).all() and not predictions
    assert np.allclose(changes.margins, known.margins, atol=1e-5)


def test_it_is_said_in_plain_words_and_read_back(linear, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="hf_radin")
    soup = hf_radin.radin(linear)
    assert "The 5 ingredients differ in their heads alone" in caplog.text and "greedy" not in caplog.text
    assert "Heads of their own" not in caplog.text and soup.report.estimate_error is None
    sentence = "is the same function as the ensemble of its ingredients, up to rounding"
    card, printed = " ".join(render(soup.report).split()), soup_table(soup)
    assert sentence in card and ", exact |" in card and "soups took nothing of it" in card and "before" not in card
    assert sentence in printed and "0 for soups (a budget of 4, which is not touched: soups are exact)" in printed
    assert "5 passes over validation for logits (counted as if each ran alone; they share one body)" in printed
    assert "logits of 5 checkpoints (counted as if each ran alone; they share one body) | 5 |" in card
    assert "were off by" not in printed + card
    report = SearchReport.from_fields(soup.report.to_fields())
    assert report.is_exact and report.soups == soup.report.soups
    assert "exact" not in Measurement(Recipe.uniform(["a"]), "single", 0.5, 0.5, 2).to_dict()


def test_the_log_names_the_best_three_and_counts_the_others(linear, caplog):
    caplog.set_level(logging.INFO, logger="hf_radin")
    soups = hf_radin.radin(linear, head="average").report.soups
    best = sorted((entry.measured for entry in soups), reverse=True)[:3]
    lines = [message for message in caplog.messages if ", exact." in message]
    assert [line.split(": ")[1] for line in lines] == [f"{value:.2%}, exact." for value in best]
    assert f"{len(soups) - 3} further soups, exact too, are no better." in caplog.messages


def changed(probes: Path, folder: Path, change) -> Path:
    """The first two probes, the second with other tensors."""
    for seed in range(2):
        shutil.copytree(probes / f"probe-{seed}", folder / f"probe-{seed}")
    path = folder / "probe-1" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def last_bit(name: str):
    """Changes a tensor by the last bit of one number."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[:1] = torch.nextafter(tensors[name].view(-1)[:1], torch.tensor(torch.inf))

    return change


@pytest.mark.parametrize("name", ["vit.layernorm.bias", "vit.encoder.layer.0.output.dense.weight"])
def test_a_bit_that_differs_elsewhere_is_enough_to_measure(probes, digits, tmp_path, name):
    folder = changed(probes, tmp_path / "runs", last_bit(name))
    bank = hf_radin.compute_logits(hf_radin.gather(f"{folder}/*"), digits, cache_dir=tmp_path / "cache")
    report = hf_radin.uniform(bank).report
    assert not report.is_exact and report.passes.soups == 1


@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias"])
def test_a_bit_that_differs_in_a_head_is_not(probes, digits, tmp_path, name):
    def alone(tensors):
        other = load_file(probes / "probe-0" / "model.safetensors")
        tensors |= {key: value.clone() for key, value in other.items()}
        last_bit(name)(tensors)

    folder = changed(probes, tmp_path / "runs", alone)
    bank = hf_radin.compute_logits(hf_radin.gather(f"{folder}/*"), digits, cache_dir=tmp_path / "cache")
    assert hf_radin.uniform(bank).report.is_exact


def test_of_logits_alone_and_of_checkpoints_elsewhere_nothing_is_known(linear, probes, digits, tmp_path):
    logits = {name: np.asarray(linear.logits(name)) for name in linear.ingredients.ids}
    given = hf_radin.LogitBank.from_arrays(
        logits, linear.labels, evaluate=lambda recipe: logits[recipe.ingredients[0]]
    )
    assert given.with_exactness.exact is False
    shutil.copytree(probes, tmp_path / "runs")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/runs/*"), digits, cache_dir=tmp_path / "cache")
    assert bank.with_exactness.exact
    (tmp_path / "runs" / "probe-3" / "model.safetensors").unlink()
    assert bank.with_exactness.exact is False


def test_fine_tunes_of_everything_are_measured(bank):
    assert bank.with_exactness.exact is False


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"logits_dtype": "float16"}])
def test_in_sixteen_bits_soups_are_measured(probes, digits, tmp_path, predictions, options):
    """An averaged head is rounded to fewer bits there than its ensemble is mixed in."""
    ingredients = hf_radin.gather(f"{probes}/probe-*")[:2]
    bank = hf_radin.compute_logits(hf_radin.Ingredients(ingredients), digits, cache_dir=tmp_path, **options)
    predictions.clear()
    report = hf_radin.uniform(bank).report
    assert bank.with_exactness.exact is False and predictions and not report.is_exact and report.passes.soups > 0
    assert not hf_radin.estimate(bank.ingredients, digits, cache_dir=tmp_path / "cost", **options).exact


def test_heads_that_are_saved_in_sixteen_bits_are_measured(probes, digits, tmp_path):
    for number in range(2):
        folder = shutil.copytree(probes / f"probe-{number}", tmp_path / "runs" / f"probe-{number}")
        path = folder / "model.safetensors"
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    ingredients = hf_radin.gather(f"{tmp_path}/runs/*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    assert bank.with_exactness.exact is False and not hf_radin.estimate(ingredients, digits, cache_dir=tmp_path).exact
    assert "exact" not in " ".join(InCommon.of(ingredients).lines)


def test_batchnorm_statistics_count(nets, digits, tmp_path):
    for seed in range(2):
        shutil.copytree(nets / "ft-0", tmp_path / "runs" / f"ft-{seed}")
    path = tmp_path / "runs" / "ft-1" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.1.bias"] += 0.1
    save_file(tensors, path, {"format": "pt"})
    ingredients = hf_radin.gather(f"{tmp_path}/runs/*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    assert bank.with_exactness.exact
    anew = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache", batchnorm_split="train")
    assert anew.with_exactness.exact is False
    tensors["resnet.embedder.embedder.normalization.running_mean"] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    others = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/runs/*"), digits, cache_dir=tmp_path / "cache")
    assert others.with_exactness.exact is False


def really_measured(bank: hf_radin.LogitBank) -> tuple[np.ndarray, np.ndarray]:
    """What a soup that runs predicts, and its ensemble."""
    weights = np.random.default_rng(0).dirichlet(np.ones(len(bank.ingredients)))
    soup = measured_soup(bank, bank.recipe(weights))
    return soup.look(np.ones(len(bank), dtype=bool)), bank.predict(weights)


def test_classes_in_other_orders_and_those_left_out_are_matched_first(probes, tmp_path):
    common = NAMES[2:8]
    for number, names in enumerate((NAMES, NAMES[::-1], common)):
        with_classes(probes / f"probe-{number}", tmp_path / "runs" / f"probe-{number}", names)
    ingredients = hf_radin.gather(f"{tmp_path}/runs/*", classes="common")
    images = digits_of(tmp_path / "digits", common)
    bank = hf_radin.compute_logits(ingredients, images, cache_dir=tmp_path / "cache").with_exactness
    predictions, known = really_measured(bank)
    assert bank.exact and (predictions == known).all()


@pytest.mark.parametrize(("modules", "is_exact"), [(["classifier"], True), (["q_proj", "classifier"], False)])
def test_adapters_of_the_head_alone_are_exact(start, digits, tmp_path, modules, is_exact):
    for seed in range(2):
        options = {"target_modules": modules, "modules_to_save": None}
        save_trained(start, tmp_path / "runs" / f"lora-{seed}", seed, **options)
    ingredients = hf_radin.gather(f"{tmp_path}/runs/*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache").with_exactness
    assert bank.exact == is_exact
    if is_exact:
        predictions, known = really_measured(bank)
        assert (predictions == known).all()


OWN = """
from transformers import ViTForImageClassification

class Own(ViTForImageClassification):
    def forward(self, pixel_values=None, **options):
        return super().forward(pixel_values={sign}pixel_values, **options)
"""


WITHOUT_BIAS = """
import torch
from transformers import ViTForImageClassification

class Own(ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
"""


def with_code(folder: Path, code: str) -> Path:
    """A checkpoint that brings code of its own."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Own"], "auto_map": {"AutoModelForImageClassification": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(code)
    return folder


def test_heads_without_bias_are_exact(probes, digits, tmp_path):
    for seed in range(2):
        folder = with_code(shutil.copytree(probes / f"probe-{seed}", tmp_path / f"runs/probe-{seed}"), WITHOUT_BIAS)
        tensors = load_file(folder / "model.safetensors")
        del tensors["classifier.bias"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ingredients = hf_radin.gather(f"{tmp_path}/runs/*", trust_remote_code=True)
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache").with_exactness
    predictions, known = really_measured(bank)
    assert bank.exact and (predictions == known).all()
    assert "only classifier.weight differs, the head: soups are exact" in " ".join(InCommon.of(ingredients).lines)


@pytest.mark.parametrize("sign", ["", "-"])
def test_equal_tensors_under_other_code_are_another_model(probes, digits, tmp_path, sign):
    for seed in range(2):
        folder = shutil.copytree(probes / f"probe-{seed}", tmp_path / "runs" / f"probe-{seed}")
        with_code(folder, OWN.format(sign=seed * sign))
    ingredients = hf_radin.gather(f"{tmp_path}/runs/*", trust_remote_code=True)
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache").with_exactness
    predictions, known = really_measured(bank)
    assert bank.exact == (predictions == known).all() == (not sign)
    is_said = "soups are exact" in " ".join(InCommon.of(ingredients).lines)
    assert is_said == bank.exact and (bank.front() is None or bank.exact)


def test_soups_that_are_pulled_to_a_start_are_measured(linear, start, predictions):
    report = hf_radin.radin(linear, start=str(start), proposals="auto,wise-ft", budget=2, head="average").report
    assert not report.is_exact and predictions and any(entry.recipe.pull for entry in report.soups)


def test_one_process_is_two(probes, digits, tmp_path):
    options = ["--models", f"{probes}/probe-*", "--dataset", digits, "--output", "soup", "--test-split", "test"]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run = launch(tmp_path / str(processes), processes, *options)
        assert run.returncode == 0, run.stderr
    first, second = (SearchReport.read(tmp_path / str(processes) / "soup" / "recipe.json") for processes in (1, 2))
    assert first.is_exact and first.passes.soups == 0
    assert first.recipe == second.recipe and first.results == second.results
    assert first.measurements == second.measurements and first.verdict == second.verdict


def test_decisions_of_multi_label_probes_are_those_of_their_ensemble(start, tmp_path, predictions):
    label_sets.save_runs(start, tmp_path / "runs", count=1)
    for seed in range(3):
        model = ViTForImageClassification.from_pretrained(tmp_path / "runs" / "ft-0")
        torch.manual_seed(seed)
        with torch.no_grad():
            model.classifier.weight.add_(0.1 * torch.randn_like(model.classifier.weight))
        save(model, tmp_path / "probes" / f"probe-{seed}")
    ingredients = hf_radin.gather(f"{tmp_path}/probes/*")
    bank = hf_radin.compute_logits(ingredients, label_sets.dataset(), cache_dir=tmp_path / "cache").with_exactness
    decisions, known = really_measured(bank)
    assert bank.exact and (decisions == known).all()
    predictions.clear()
    report = hf_radin.radin(bank, metrics=("accuracy", "log_loss"), head="average").report
    assert report.is_exact and not predictions and report.metric == "f1"
    assert all(entry.measured == pytest.approx(entry.estimate) for entry in report.soups)
