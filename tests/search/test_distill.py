"""The last layers of a soup are taught by the ensemble: what comes of it is measured, told, saved and cooked again."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from shared.banks import plain_inputs
from shared.heads import own_heads, own_heads_bank
from shared.launching import launch
from shared.logs import warned
from shared.training import digit_images, image_dataset
from transformers import ViTForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.layers.distilled import distill_tail, find_cut
from hf_radin.metrics.cross_entropy import best_scale
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.search.held_out import bank_of_split
from hf_radin.soup.report import SearchReport
from hf_radin.soup.soup import Soup
from hf_radin.tail.teach import Course
from hf_radin.weights.refit import draw_folds

__all__ = ["own_heads", "own_heads_bank"]  # fixtures


@pytest.fixture
def bank(runs, digits, cache) -> hf_radin.LogitBank:
    return hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), digits, cache_dir=cache)


def average(saved: Path, output: Path, cache: Path) -> int:
    return main(["average", "--recipe", str(saved), "--output", str(output), "--cache-dir", str(cache)])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def card(folder: Path) -> str:
    return re.sub(r"\s+", " ", (folder / "README.md").read_text())


def unescaped(folder: Path) -> str:
    return card(folder).replace("\\", "")


def image_files(folder: Path, part: slice) -> Path:
    """A folder of digits that nobody labelled."""
    folder.mkdir()
    for place, image in enumerate(digit_images(part)[0]):
        image.save(folder / f"{place:04}.png")
    return folder


def teaching(soup: Soup, bank: hf_radin.LogitBank, *, halves: bool = True) -> float:
    """The passes over the images that taught a soup's last block, by the number of multiplications."""
    return Course(soup.report.head.tail.epochs, 1e-3).passes(find_cut(bank, soup.recipe, "block"), halves=halves)


def test_a_soup_becomes_better_on_images_that_took_no_part(own_heads_bank, tmp_path):
    before = hf_radin.uniform(own_heads_bank, test_split="test")
    soup = hf_radin.distill(own_heads_bank, before)
    names = {(result.name, result.split) for result in soup.results}
    assert {("soup", "test"), ("not distilled", "test"), ("soup", "validation"), ("ensemble", "test")} <= names
    gap = soup.accuracy("ensemble", "test") - soup.accuracy("not distilled", "test")
    assert soup.accuracy("soup", "test") > soup.accuracy("not distilled", "test") + 0.5 * gap
    assert soup.accuracy("not distilled", "test") == before.accuracy("soup", "test")
    test = bank_of_split(own_heads_bank, "test")
    with torch.inference_mode():
        predicted = [soup.model(**inputs).logits.argmax(1).numpy() for inputs in plain_inputs(test)]
    assert np.mean(np.concatenate(predicted) == test.labels) == pytest.approx(soup.accuracy("soup", "test"), abs=0.005)
    assert [entry.split for entry in soup.report.against_best_single] == ["validation", "test"]
    assert soup.report.is_chosen(soup.measurements[-1]) and soup.measurements[-1].proposal == "distilled"
    # it was shown the split once more, and teaching took as many passes as multiplications say
    assert soup.report.passes.total == pytest.approx(before.report.passes.total + 1 + teaching(soup, own_heads_bank))


def test_it_is_saved_told_and_cooked_again(own_heads_bank, tmp_path, caplog):
    soup = hf_radin.distill(own_heads_bank, hf_radin.uniform(own_heads_bank, test_split="test"))
    soup.save_pretrained(tmp_path / "soup")
    record = SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True).head
    assert record == soup.report.head and record.kind == "distilled" and record.labels == 0.5
    assert record.tail.module == "vit.layers.1" and record.images == 600
    text = card(tmp_path / "soup")
    assert "Model soup of 4 checkpoints, with distilled last layers" in text and "- distillation" in text
    assert "Its last layers, from vit.layers.1 on, were distilled" in text and "| not distilled | test |" in text
    assert "their labels, which count for 50%, in 21 epochs at a rate of 0.001 from the seed 0 on" in text
    assert "Nothing was chosen" not in text
    row = f"distilling the last layers of the soup, by multiplications | {1 + teaching(soup, own_heads_bank):.3g} |"
    assert row in text
    caplog.clear()
    assert average(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup") and not warned(caplog)
    assert SearchReport.read(tmp_path / "again" / "recipe.json") == SearchReport.read(
        tmp_path / "soup" / "recipe.json"
    )
    assert all(
        torch.equal(tensor, soup.model.state_dict()[name])
        for name, tensor in Soup.from_pretrained(tmp_path / "soup").model.state_dict().items()
    )


def test_a_net_with_batchnorm_is_distilled_and_cooked_again(nets, digits, tmp_path):
    ingredients = hf_radin.gather(f"{nets}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "first", batchnorm_images=128)
    soup = hf_radin.distill(bank, hf_radin.uniform(bank))
    assert soup.report.is_distilled
    soup.save_pretrained(tmp_path / "soup")
    before = hf_radin.uniform(bank).model.state_dict()
    for name, tensor in soup.model.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, before[name]), name
    assert average(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")


@pytest.mark.parametrize("kind", ["split", "folder"])
def test_a_net_with_batchnorm_that_other_images_taught_is_cooked_again(
    nets, digits, tmp_path, caplog, monkeypatch, kind
):
    monkeypatch.setattr("hf_radin.search.distill.hindrance", lambda *_: "")  # better or not, it is cooked again
    bank = hf_radin.compute_logits(hf_radin.gather(f"{nets}/ft-*"), digits, cache_dir=tmp_path / "first")
    teaching = {"split": "test", "labels": False}
    if kind == "folder":
        teaching = {"images": str(image_files(tmp_path / "unlabelled", slice(0, 400)))}
    soup = hf_radin.distill(bank, hf_radin.uniform(bank), **teaching)
    assert (soup.report.head.source is None) == (kind == "split") and soup.report.batchnorm.split == "train"
    soup.save_pretrained(tmp_path / "soup")
    caplog.clear()
    assert average(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup") and not warned(caplog)


def test_another_split_teaches_and_all_images_of_the_first_judge(own_heads, digits, tmp_path, predictions):
    cache = tmp_path / "cache"  # of its own: what soups say is cached, and what was is not counted
    bank = hf_radin.compute_logits(hf_radin.gather(f"{own_heads}/ft-*"), digits, cache_dir=cache)
    before, test = hf_radin.uniform(bank), bank_of_split(bank, "test")
    predictions.clear()
    soup = hf_radin.distill(bank, before, split="test", labels=False)
    assert sum(predictions) == len(bank) + len(test)  # the soup sees both; of its teachers, the logits are there
    record = soup.report.head
    assert (record.split, record.images, record.labels) == ("test", 497, 0)
    taught = teaching(soup, bank, halves=False)
    # four teachers, and the soup on both; teaching by its multiplications
    assert soup.report.passes.tail == pytest.approx(1 + (5 + taught) * 497 / 600) and taught > 1
    assert soup.accuracy("soup", "validation") > soup.accuracy("not distilled", "validation")
    with torch.inference_mode():
        predicted = [soup.model(**inputs).logits.argmax(1).numpy() for inputs in plain_inputs(bank)]
    measured = np.mean(np.concatenate(predicted) == bank.labels)
    assert measured == pytest.approx(soup.accuracy("soup", "validation"), abs=0.005)  # they saw none of these images
    soup.save_pretrained(tmp_path / "soup")
    assert "of 497 images of the split test, and not of their labels" in card(tmp_path / "soup")
    assert average(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")
    before = hf_radin.uniform(bank, test_split="test")
    with pytest.raises(ValueError, match=r"proves the soup; another one has to teach \(--split\)"):
        hf_radin.distill(bank, before, split="test")


def test_a_part_that_was_held_out_proves_it(own_heads_bank, tmp_path):
    before = hf_radin.radin(own_heads_bank, budget=1, head="average", hold_out=0.3, seed=3)
    soup = hf_radin.distill(own_heads_bank, before)
    assert soup.report.head.images == 420 and soup.report.head.hold_out == 0.3
    held_out = soup.report.held_out
    assert soup.accuracy("not distilled", held_out) == before.accuracy("soup", held_out)
    assert soup.accuracy("soup", held_out) > before.accuracy("soup", held_out) - 0.1  # of 180 images
    soup.save_pretrained(tmp_path / "soup")
    assert average(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")


def test_one_model_may_teach_and_one_that_is_left_out_may_not(own_heads_bank):
    bank = own_heads_bank
    first, last = bank.ingredients.ids[0], bank.ingredients.ids[-1]
    soup = hf_radin.distill(bank, hf_radin.uniform(bank), teacher=Recipe.uniform([first]))
    assert soup.report.head.teacher.used == {first: 1.0}
    part = replace(bank, ingredients=bank.ingredients.select(bank.ingredients.ids[:-1]))
    with pytest.raises(ValueError, match=re.escape(last)):
        hf_radin.distill(part, hf_radin.uniform(part), teacher=Recipe.uniform([last]))


def test_a_soup_that_the_ensemble_is_ahead_of_is_told_how_to_go_on(own_heads_bank, bank, caplog):
    caplog.set_level("INFO", "hf_radin")
    hf_radin.uniform(own_heads_bank)
    assert "The ensemble of all is ahead of the soup on 'validation' by" in caplog.text
    assert "hf-radin distill" in caplog.text
    caplog.clear()
    hf_radin.best_single(replace(bank, ingredients=bank.ingredients.select(bank.ingredients.ids[:1])))
    assert "hf-radin distill" not in caplog.text


def test_images_that_are_not_cached_and_weights_of_16_bits(runs, digits, tmp_path):
    for index in range(3):
        model = ViTForImageClassification.from_pretrained(runs / f"ft-{index}").to(torch.bfloat16)
        model.save_pretrained(tmp_path / f"ft-{index}")
        shutil.copy(runs / f"ft-{index}" / "preprocessor_config.json", tmp_path / f"ft-{index}")
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache", pixel_cache="off")
    recipe = Recipe.uniform(ingredients.ids)
    cooked = distill_tail(
        bank, recipe, Teacher(recipe, labels=True), Course(epochs=2, rate=1e-3, share=0.5), judge=bank
    )
    tensors = hf_radin.average(ingredients, recipe, head=cooked.head)
    name = "classifier.weight"
    assert tensors[name].dtype == torch.bfloat16
    assert torch.equal(tensors[name], cooked.head.tensors[name].to(torch.bfloat16))


def test_the_order_of_the_ingredients_changes_no_bit(own_heads_bank, tmp_path):
    bank, course = own_heads_bank, Course(epochs=2, share=0.5)
    turned = hf_radin.compute_logits(
        hf_radin.Ingredients([*bank.ingredients][::-1]), bank.source.dataset, cache_dir=tmp_path
    )
    hashes = []
    for given in (bank, turned):
        recipe = Recipe.uniform(given.ingredients.ids)
        hashes.append(distill_tail(given, recipe, Teacher(recipe, labels=True), course).record.sha256)
    assert hashes[0] == hashes[1]


def test_equal_ingredients_and_the_own_logits_change_nothing(bank):
    recipe = Recipe.uniform(bank.ingredients.ids[:1])
    taught = distill_tail(bank, recipe, Teacher(recipe), Course(), judge=bank)
    named = dict(hf_radin.best_single(bank).model.named_parameters())
    assert taught.head.tensors.keys() < named.keys()
    single = hf_radin.average(bank.ingredients, recipe)
    assert all(torch.equal(tensor, single[name]) for name, tensor in taught.head.tensors.items())
    np.testing.assert_array_equal(taught.predictions, bank.predict(bank.row(recipe)))


def test_one_number_makes_a_soup_as_sure_as_its_ensemble_first(own_heads_bank):
    recipe = Recipe.uniform(own_heads_bank.ingredients.ids)
    cooked = distill_tail(
        own_heads_bank, recipe, Teacher(recipe, False), Course(1, 1e-12), judge=own_heads_bank, with_logits=True
    )
    model = hf_radin.uniform(own_heads_bank).model
    with torch.inference_mode():
        averaged = np.concatenate([model(**inputs).logits.numpy() for inputs in plain_inputs(own_heads_bank)])
    ensemble = own_heads_bank.mixed(own_heads_bank.row(recipe), np.arange(len(own_heads_bank)))
    probabilities = torch.from_numpy(ensemble).softmax(1).numpy()
    folds = draw_folds(own_heads_bank.contents, seed=0, folds=2)
    for fold in range(2):  # each half sees the number of the other
        expected = averaged[folds == fold] * best_scale(averaged[folds != fold], probabilities[folds != fold])
        np.testing.assert_allclose(cooked.logits[folds == fold], expected, atol=2e-3)
    assert abs(best_scale(averaged, probabilities) - 1) > 0.05


def test_a_budget_leaves_epochs_out(own_heads_bank):
    soup = hf_radin.uniform(own_heads_bank)
    share = find_cut(own_heads_bank, soup.recipe, "block").share
    three = hf_radin.distill(own_heads_bank, soup, budget=max(1, 6 * 3.5 * share))
    assert three.report.head.tail.epochs == max(3, int(1 / (6 * share)))
    assert hf_radin.distill(own_heads_bank, soup, epochs=2, budget="1h").report.head.tail.epochs == 2
    cut = find_cut(own_heads_bank, soup.recipe, "block")
    course = Course(50, seconds=1e-6)
    hurried = distill_tail(own_heads_bank, soup.recipe, Teacher(soup.recipe, True), course, tail=cut)
    assert hurried.record.tail.epochs == 1
    with pytest.raises(ValueError, match="budget='soon': what teaching may take at most is a time, as in '90s', or"):
        hf_radin.distill(own_heads_bank, soup, budget="soon")
    for budget in (0, "0s", float("nan"), -1, 0.5):
        with pytest.raises(ValueError, match=rf"budget={budget!r}: what teaching may take at most .* leave it out"):
            hf_radin.distill(own_heads_bank, soup, budget=budget)


def test_nothing_to_learn_is_said_before_a_pass(bank, caplog, predictions):
    worst = min(bank.ingredients.ids, key=lambda name: bank.score(bank.row(Recipe.uniform([name]))[None])[0])
    soup = hf_radin.best_single(bank)
    assert worst not in soup.recipe.used
    predictions.clear()
    result = hf_radin.distill(bank, soup, labels=False, teacher=Recipe.uniform([worst]))
    assert "There is nothing to learn" in caplog.text and not sum(predictions)
    assert result is soup


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"epochs": 0}, "epochs=0: it is a whole number"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"seed": -1}, "seed=-1: it is a whole number, 0 at least"),
        ({"seed": 2**63}, "and below 2\\*\\*63"),
        ({"seed": None}, "seed=None"),
        ({"split": ["train"]}, "it is the name of a split"),
        ({"split": "validation"}, "chose the soup, and teaches if no other one is named: leave --split out"),
        ({"test_split": "train"}, "test_split='train': the soup was proved by no split"),
        ({"split": "train", "tail": "no.such"}, "can't be cut in two at 'no.such'"),
        ({"rate": 1.0}, "rate=1.0: the rate of learning is above 0 and below 1"),
        ({"tail": "no.such"}, r"can't be cut in two at 'no.such'; it can at .*vit.layers.1"),
        ({"tail": "classifier"}, "classifier is the head"),
    ],
)
def test_what_can_not_be_is_refused_before_a_pass(bank, predictions, options, problem):
    soup = hf_radin.uniform(bank)
    predictions.clear()
    with pytest.raises(ValueError, match=problem):
        hf_radin.distill(bank, soup, **options)
    assert not predictions


def test_soups_that_can_not_be_distilled_are_refused(bank, unsearched, own_heads_bank, runs, tmp_path):
    distilled = hf_radin.distill(own_heads_bank, hf_radin.uniform(own_heads_bank))
    with pytest.raises(ValueError, match="are distilled already"):
        hf_radin.distill(own_heads_bank, distilled)
    with pytest.raises(ValueError, match="was not measured"):
        hf_radin.distill(bank, hf_radin.radin(unsearched, budget=0, unmeasured=True))
    with pytest.raises(ValueError, match=r"ft-"):
        hf_radin.distill(own_heads_bank, hf_radin.uniform(bank))
    few = image_dataset(*digit_images(slice(700, 850)))
    small = hf_radin.compute_logits(bank.ingredients, few, split="train", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"150 different images; to teach last layers,.* takes 200 at least"):
        hf_radin.distill(small, hf_radin.uniform(small))


def test_what_a_function_says_is_not_known_by_its_name(own_heads_bank, predictions, caplog):
    def sureness(logits, labels):
        return float(logits.max(axis=1).mean())

    by_function = hf_radin.uniform(own_heads_bank, metric=sureness)
    predictions.clear()
    with pytest.raises(ValueError, match="chosen by 'sureness', which was a function"):
        hf_radin.distill(own_heads_bank, by_function)
    assert not predictions
    beside = hf_radin.uniform(own_heads_bank, metrics=["accuracy", sureness])
    soup = hf_radin.distill(own_heads_bank, beside)
    assert "only their names are known: sureness" in caplog.text
    names = {result.name: set(result.metrics) for result in soup.results}
    assert (names["soup"], names["not distilled"]) == ({"accuracy"}, {"accuracy", "sureness"})


def test_other_images_than_those_that_chose_or_proved_are_refused(
    own_heads_bank, digits, tmp_path, predictions, capsys
):
    bank = own_heads_bank
    before = hf_radin.uniform(bank, test_split="test")
    folder = tmp_path / "others"
    image_dataset(*digit_images(slice(0, 600))).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    image_dataset(*digit_images(slice(600, 1097))).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    others = hf_radin.compute_logits(bank.ingredients, folder, cache_dir=tmp_path)
    predictions.clear()
    with pytest.raises(
        ValueError, match=r"'validation' has other images than the report .* \(--dataset\), or search anew"
    ):
        hf_radin.distill(others, before, test_split=bank_of_split(bank, "test"))
    with pytest.raises(ValueError, match="'test' has other images than the report"):
        hf_radin.distill(bank, before, test_split=bank_of_split(others, "test"), allow_overlap=True)
    before.save_pretrained(tmp_path / "soup")
    options = ["--dataset", str(folder), "--output", str(tmp_path / "two"), "--cache-dir", str(tmp_path / "cold")]
    wrong = [["--rate", "7"], ["--split", "nowhere"], ["--images", str(folder), "--split", "nowhere"]]
    wrong += [["--images", str(tmp_path / "nowhere")], ["--layers", "no.such"], ["--budget", "nan"]]
    for further in wrong:
        assert main(["distill", str(tmp_path / "soup"), *options, *further]) == 2
        error = capsys.readouterr().err
        assert further[-1] in error and not (tmp_path / "cold").exists()
    assert main(["distill", str(tmp_path / "soup"), *options]) == 2 and not (tmp_path / "two").exists()


def test_the_command_ends_as_the_option_does(own_heads, digits, tmp_path, caplog, capsys):
    common = ["--models", f"{own_heads}/ft-*", "--dataset", str(digits), "--test-split", "test", "--method", "uniform"]
    common += ["--cache-dir", str(tmp_path / "cache")]
    caplog.set_level("INFO", "hf_radin")
    assert main(["soup", *common, "--output", str(tmp_path / "one"), "--distill"]) == 0
    lines = [message for message in caplog.messages if message.startswith("Logits of")]
    assert len(lines) == 2 and "ahead of the soup" not in caplog.text
    caplog.clear()
    assert main(["soup", *common, "--output", str(tmp_path / "plain")]) == 0
    assert "ahead of the soup" in caplog.text  # who does not distil hears of it, in the same process too
    options = ["--output", str(tmp_path / "two"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["distill", str(tmp_path / "plain" / "recipe.json"), *options]) == 0
    assert weights(tmp_path / "two") == weights(tmp_path / "one") != weights(tmp_path / "plain")
    reports = [SearchReport.read(tmp_path / name / "recipe.json", is_saved=True) for name in ("one", "two")]
    assert reports[0] == reports[1] and reports[0].is_distilled
    out = capsys.readouterr().out
    assert "Its last layers, from vit.layers.1 on, are distilled from the ensemble of 4 and the labels" in out
    assert main(["distill", str(tmp_path / "plain"), "--output", str(tmp_path / "plain"), "--overwrite"]) == 2
    assert "would be lost" in capsys.readouterr().err


def test_checkpoints_that_moved_are_named(own_heads, digits, tmp_path, capsys):
    place = shutil.copytree(own_heads, tmp_path / "then")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{place}/ft-*"), digits, cache_dir=tmp_path / "cache")
    before = hf_radin.uniform(bank)
    before.save_pretrained(tmp_path / "soup")
    hf_radin.distill(bank, before).save_pretrained(tmp_path / "one")
    place.rename(tmp_path / "now")
    command = ["distill", str(tmp_path / "soup"), "--output", str(tmp_path / "two")]
    command += ["--cache-dir", str(tmp_path / "cache")]
    assert main(command) == 2 and r"with models=... (--models)" in capsys.readouterr().err
    assert main([*command, "--models", f"{tmp_path}/now/ft-[012]"]) == 2
    assert f"{tmp_path}/then/ft-3 is not the checkpoint that the recipe was made with" in capsys.readouterr().err
    assert main([*command, "--models", f"{tmp_path}/now/ft-*"]) == 0
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    reports = [SearchReport.read(tmp_path / name / "recipe.json", is_saved=True) for name in ("one", "two")]
    assert replace(reports[0], ingredients=()) == replace(reports[1], ingredients=())
    assert [entry.id for entry in reports[0].ingredients] == [entry.id for entry in reports[1].ingredients]


def test_a_soup_that_can_not_be_distilled_is_saved_all_the_same(runs, tmp_path, caplog):
    image_dataset(*digit_images(slice(700, 850))).to_parquet(tmp_path / "few" / "data" / "validation.parquet")
    options = ["--models", f"{runs}/ft-[012]", "--dataset", str(tmp_path / "few"), "--budget", "1", "--distill"]
    options += ["--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "soup")]
    assert main(["soup", *options]) == 0
    assert "Nothing is distilled: The split 'validation' has 150 different images" in caplog.text
    assert (tmp_path / "soup" / "model.safetensors").exists()


def test_a_soup_that_stays_is_named(nets, digits, tmp_path, capsys, caplog):
    options = ["--dataset", str(digits), "--cache-dir", str(tmp_path / "cache"), "--batchnorm-images", "64"]
    command = ["soup", "--models", f"{nets}/ft-*", *options, "--method", "uniform", "--output", str(tmp_path / "soup")]
    assert main(command) == 0
    command = [
        "distill",
        str(tmp_path / "soup"),
        "--output",
        str(tmp_path / "two"),
        "--rate",
        "1e-12",
        "--epochs",
        "1",
    ]
    assert main([*command, "--no-labels", "--cache-dir", str(tmp_path / "cache")]) == 0
    assert "600 images are few to teach last layers. A split with more of them" in caplog.text
    out = capsys.readouterr().out
    assert f"Nothing is written to {tmp_path / 'two'}: the distilled layers are not taken." in out
    assert f"The model to use is the soup in {tmp_path / 'soup'}, as it is." in out and not (tmp_path / "two").exists()


def test_other_layers_than_the_recipe_tells_of_have_no_figures(own_heads_bank, tmp_path, caplog):
    soup = hf_radin.distill(own_heads_bank, hf_radin.uniform(own_heads_bank))
    soup.save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    report = SearchReport.read(path)
    tail = replace(report.head.tail, epochs=1)
    path.write_text(replace(report, head=replace(report.head, tail=tail)).text)
    assert average(path, tmp_path / "again", own_heads_bank.home) == 0
    assert "Its figures are those of the layers before, and are left out" in warned(caplog)[-1]
    cooked = SearchReport.read(tmp_path / "again" / "recipe.json")
    assert cooked.is_distilled and cooked.head.tail.epochs == 1 and cooked.head.sha256 != report.head.sha256
    assert not (cooked.results or cooked.measurements or cooked.against_best_single or cooked.measured)
    assert f"{100 * soup.accuracy('soup', 'validation'):.2f}" not in card(tmp_path / "again")
    caplog.clear()
    assert average(tmp_path / "again", tmp_path / "third", own_heads_bank.home) == 0
    assert weights(tmp_path / "third") == weights(tmp_path / "again") and not warned(caplog)


def test_two_processes_make_what_one_makes(own_heads, digits, tmp_path):
    options = ["--models", f"{own_heads}/ft-*", "--dataset", digits, "--method", "uniform", "--distill"]
    options += ["--test-split", "test", "--changes", "changes.parquet"]
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        run = launch(tmp_path / str(count), count, *options)
        assert run.returncode == 0, run.stderr
    paths = [tmp_path / name / "soup" / "recipe.json" for name in "12"]
    reports = [replace(SearchReport.read(path, is_saved=True), time=None) for path in paths]
    assert reports[0] == reports[1] and reports[0].is_distilled
    assert weights(tmp_path / "1" / "soup") == weights(tmp_path / "2" / "soup")
    changes = [pq.read_table(tmp_path / name / "changes.parquet").to_pydict() for name in "12"]
    for name, column in changes[0].items():
        if name.startswith("margin"):  # of other batches
            np.testing.assert_allclose(changes[1][name], column, atol=1e-4)
        else:
            assert changes[1][name] == column and len(column)


def test_options_that_do_not_go_together_are_refused(runs, digits, tmp_path, capsys):
    options = ["soup", "--models", f"{runs}/ft-*", "--dataset", str(digits), "--output", str(tmp_path / "soup")]
    for further in (["--pilot", "0.5"], ["--budget", "0"]):
        assert main([*options, "--distill", *further]) == 2
        assert "--distill" in capsys.readouterr().err


def test_images_without_labels_of_another_dataset_teach(own_heads_bank, tmp_path, caplog):
    folder = image_files(tmp_path / "unlabelled", slice(0, 400))
    before = hf_radin.uniform(own_heads_bank, test_split="test")
    soup = hf_radin.distill(own_heads_bank, before, images=str(folder))
    record = soup.report.head
    assert (record.images, record.split, record.labels, record.source.name) == (400, "train", 0.0, str(folder))
    assert soup.accuracy("soup", "validation") > before.accuracy("soup", "validation")
    taught = teaching(soup, own_heads_bank, halves=False)
    assert soup.report.passes.total == pytest.approx(before.report.passes.total + 1 + (5 + taught) * 400 / 600)
    soup.save_pretrained(tmp_path / "soup")
    assert f"says of 400 images of the split train of {folder.parent.name}/{folder.name}" in unescaped(
        tmp_path / "soup"
    )
    caplog.clear()
    assert average(tmp_path / "soup", tmp_path / "again", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup") and not warned(caplog)
    folder = folder.rename(tmp_path / "moved")
    command = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "third")]
    assert main([*command, "--cache-dir", str(tmp_path / "cache"), "--dataset", str(folder)]) == 0
    assert weights(tmp_path / "third") == weights(tmp_path / "soup")
    output = tmp_path / "by-command"
    before.save_pretrained(tmp_path / "before")
    command = ["distill", str(tmp_path / "before"), "--output", str(output), "--images", str(folder)]
    assert main([*command, "--cache-dir", str(own_heads_bank.home)]) == 0
    assert weights(output) == weights(tmp_path / "soup")
    assert "hinton2015distilling" in (output / "README.md").read_text()


def test_a_dataset_object_teaches_a_net_with_batchnorm(nets, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{nets}/ft-*"), digits, cache_dir=tmp_path / "cache")
    images = image_dataset(*digit_images(slice(0, 250))).remove_columns("label")
    soup = hf_radin.distill(bank, hf_radin.uniform(bank), images=images)
    assert soup.report.passes.tail > 1  # taken or not, it was taught


def test_images_that_judge_do_not_teach(own_heads_bank, digits, predictions):
    soup = hf_radin.uniform(own_heads_bank, test_split="test")
    done = len(predictions)
    for split in ("validation", "test"):
        problem = (
            rf"images of the split '{split}' are in the split '{split}' too.* or judge last layers and teach them"
        )
        with pytest.raises(ValueError, match=problem):
            hf_radin.distill(own_heads_bank, soup, images=digits, split=split)
    assert len(predictions) == done
    with pytest.raises(ValueError, match="nowhere"):
        hf_radin.distill(own_heads_bank, soup, images=digits, split="nowhere")
