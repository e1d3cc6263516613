"""The features of a soup come by while it is measured, and its head is refitted from them without a further pass."""

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

import hf_radin
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.search.measure import UNKNOWN, MeasuredSoup, measured_soup
from hf_radin.weights.average import average_model
from hf_radin.weights.head import find_head

__all__ = ["own_heads", "own_heads_bank"]  # fixtures


@pytest.fixture
def fresh(own_heads_bank, tmp_path) -> hf_radin.LogitBank:
    """The bank without any soup that was measured."""
    folder = tmp_path / "banks" / own_heads_bank.folder.name
    shutil.copytree(own_heads_bank.folder, folder)
    return replace(own_heads_bank, folder=folder)


def uniform(bank: hf_radin.LogitBank) -> Recipe:
    return Recipe.uniform(bank.ingredients.ids)


def refit(soup, row: np.ndarray):
    """The soup's head refitted to the ensemble of a recipe `(models,)`."""
    return soup.refit(Teacher(soup.bank.recipe(row)))


def everything(bank: hf_radin.LogitBank) -> np.ndarray:
    return np.ones(len(bank), dtype=bool)


def recorded(bank: hf_radin.LogitBank, recipe: Recipe | None = None) -> MeasuredSoup:
    return measured_soup(bank, recipe or uniform(bank), head=find_head(bank.ingredients[0]))


def accuracy(predictions: np.ndarray, bank: hf_radin.LogitBank) -> float:
    return float((predictions == bank.labels).mean())


def test_features_cost_no_pass_and_the_head_that_they_give_is_better(fresh, predictions):
    soup, teacher = recorded(fresh), fresh.row(uniform(fresh))
    averaged = soup.look(everything(fresh))
    assert sum(predictions) == 600
    result = refit(soup, teacher)
    assert sum(predictions) == 600
    ensemble = accuracy(fresh.predict(teacher), fresh)
    assert accuracy(averaged, fresh) < accuracy(result.predictions, fresh) - 0.05
    assert accuracy(result.predictions, fresh) > ensemble - 0.05
    again = recorded(fresh)
    again.look(everything(fresh))
    assert (refit(again, teacher).predictions == result.predictions).all() and sum(predictions) == 600


def test_they_are_what_the_model_gives_its_head(fresh):
    soup = recorded(fresh)
    predicted = soup.look(everything(fresh))
    images, features = fresh.soup_features(uniform(fresh)).read()
    model, seen = average_model(fresh.ingredients, uniform(fresh)), []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numpy()))
    with torch.inference_mode():
        for inputs in plain_inputs(fresh):
            model(**inputs)
    assert images.tolist() == list(range(600)) and features.dtype == np.float32
    np.testing.assert_allclose(features, np.concatenate(seen), rtol=1e-4, atol=1e-5)
    assert (fresh.soup_features(uniform(fresh)).layer()(features).argmax(1) == predicted).all()


def test_images_that_were_not_shown_have_no_part_in_it(fresh, predictions):
    images, teacher = everything(fresh), fresh.row(uniform(fresh))
    images[::3] = False
    soup = recorded(fresh)
    soup.look(images)
    result = refit(soup, teacher)
    assert ((result.predictions == UNKNOWN) == ~images).all()
    soup.look(everything(fresh))
    assert sum(predictions) == 600  # each was shown once
    whole = refit(soup, teacher)
    part = recorded(fresh)  # another search, which is shown a part of what is known
    part.look(images)
    assert (refit(part, teacher).predictions == result.predictions).all() and sum(predictions) == 600
    shutil.rmtree(fresh.folder / "features")
    at_once = recorded(fresh)
    at_once.look(everything(fresh))
    np.testing.assert_allclose(
        refit(at_once, teacher).refit.layer.weight, whole.refit.layer.weight, rtol=1e-3, atol=1e-4
    )


def test_held_out_images_have_no_part_in_it(fresh):
    bank, held_out = fresh.divided(0.3, seed=0)
    recorded(fresh).look(everything(fresh))  # all features are cached
    soup, teacher = recorded(bank), bank.row(uniform(bank))
    soup.look(everything(bank))
    result = refit(soup, teacher)
    assert len(result.predictions) == len(bank) and UNKNOWN not in result.predictions
    shown = fresh.mixed(teacher, bank.places)
    assert (bank.mixed(teacher, np.arange(len(bank))) == shown).all()
    noise = replace(fresh, part=bank.places)
    for ingredient in held_out.ingredients:  # what the teacher says of held-out images
        path = fresh.folder / "logits" / f"{ingredient.key}.npy"
        logits = np.load(path)
        logits[held_out.places] = 100.0
        np.save(path, logits)
    again = recorded(noise)
    again.look(everything(noise))
    assert (refit(again, teacher).refit.layer.weight == result.refit.layer.weight).all()


def test_a_soup_that_was_measured_without_is_shown_its_images_again(fresh, predictions):
    before = measured_soup(fresh, uniform(fresh)).look(everything(fresh))
    soup = recorded(fresh)
    assert (soup.look(everything(fresh)) == before).all() and sum(predictions) == 1200
    refit(soup, fresh.row(uniform(fresh)))


def test_broken_features_are_named_and_made_anew(fresh, predictions, caplog):
    teacher = fresh.row(uniform(fresh))
    first = recorded(fresh)
    first.look(everything(fresh))
    result = refit(first, teacher)
    paths = sorted((fresh.folder / "features").rglob("*.npz"))
    assert [path.name for path in paths if path.name == "layer.npz"] and len(paths) > 2
    for path, shown in ((paths[1], 64), (paths[-1], 600)):  # without its head, features are worth nothing
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        predictions.clear()
        soup = recorded(fresh)
        soup.look(everything(fresh))
        assert sum(predictions) == shown and path.name in warned(caplog)[-1]
        np.testing.assert_allclose(
            refit(soup, teacher).refit.layer.weight, result.refit.layer.weight, rtol=1e-3, atol=1e-4
        )


def test_a_single_model_learns_from_all(fresh):
    """The teacher is another recipe than the soup's."""
    single, teacher = Recipe.uniform(fresh.ingredients.ids[:1]), fresh.row(uniform(fresh))
    soup = recorded(fresh, single)
    before = soup.look(everything(fresh))
    taught = refit(soup, teacher)
    by_itself = refit(soup, fresh.row(single))
    assert (by_itself.predictions == before).all()  # its own logits teach it nothing
    agreement = [float((answers == fresh.predict(teacher)).mean()) for answers in (before, taught.predictions)]
    assert agreement[1] > agreement[0]


def test_the_soup_of_equal_models_keeps_its_head(runs, digits, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(runs / "ft-0", tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt", "copy": name})
    bank = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/[ab]"), digits, cache_dir=tmp_path / "cache")
    soup = recorded(bank)
    predicted = soup.look(everything(bank))
    assert (refit(soup, bank.row(uniform(bank))).predictions == predicted).all()


def test_heads_of_one_body_have_their_ensemble(heads, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{heads}/ft-*"), digits, cache_dir=tmp_path)
    teacher = np.array([0.5, 0.3, 0.2])
    soup = recorded(bank)  # another mixture
    soup.look(everything(bank))
    assert (refit(soup, teacher).predictions == bank.predict(teacher)).mean() > 0.995
    same = recorded(bank, bank.recipe(teacher))
    same.look(everything(bank))
    assert (refit(same, teacher).predictions == bank.predict(teacher)).all()


def test_a_net_with_batchnorm_is_refitted_with_its_new_statistics(nets, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{nets}/ft-*"), digits, cache_dir=tmp_path, batchnorm_images=128)
    soup = recorded(bank)
    predicted = soup.look(everything(bank))
    layer = bank.soup_features(uniform(bank)).layer()
    images, features = bank.soup_features(uniform(bank)).read()
    assert (layer(features).argmax(1) == predicted[images]).all()
    assert accuracy(refit(soup, bank.row(uniform(bank))).predictions, bank) > 0.5


def test_features_that_somebody_removes_are_missed(fresh):
    soup, teacher = recorded(fresh), fresh.row(uniform(fresh))
    soup.look(everything(fresh))
    shutil.rmtree(fresh.folder / "features")
    with pytest.raises(ValueError, match="was changed while it was used"):
        refit(soup, teacher)


SCRIPT = """
import sys
import numpy as np
import hf_radin
from hf_radin.recipes.recipe import Teacher
from hf_radin.search.measure import measured_soup
from hf_radin.layers.taught import refit_head
from hf_radin.weights.head import find_head

models, data, output = sys.argv[1:4]
bank = hf_radin.compute_logits(hf_radin.gather(models), data, cache_dir="cache")
recipe = hf_radin.Recipe.uniform(bank.ingredients.ids)
soup = measured_soup(bank, recipe, head=find_head(bank.ingredients[0]))
images = np.ones(len(bank), dtype=bool)
soup.look(images & (np.arange(len(bank)) % 2 == 0))
soup.look(images)
refitted = soup.refit(Teacher(recipe))
head = refit_head(bank, recipe, Teacher(recipe, labels=True)).head
arrays = {"weight": refitted.refit.layer.weight, "predictions": refitted.predictions, "saved": head.layer.weight}
np.savez(f"{output}-{bank.processes.index}.npz", **arrays)
bank.processes.wait()
"""


def test_two_processes_refit_the_head_of_one(own_heads, digits, tmp_path):
    script = tmp_path / "refit.py"
    script.write_text(SCRIPT)
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run = launch(folder, processes, f"{own_heads}/ft-*", digits, "result", script=script)
        assert run.returncode == 0, run.stderr
        results += [dict(np.load(folder / f"result-{index}.npz")) for index in range(processes)]
    assert len(results) == 3
    for result in results[1:]:
        assert all(np.array_equal(array, results[0][name]) for name, array in result.items())
