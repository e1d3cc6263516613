"""Checkpoints whose classes differ share a soup on those that all have, or on those of a split."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from checkpoints.test_lora import save_adapter
from safetensors.torch import load_file, save_file
from shared.architectures import EXCEPTIONS, INSTALLED, pictures, save_fine_tunes
from shared.classes import digits_of, name_classes, with_classes
from shared.logs import warned
from shared.training import NAMES
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin import Recipe
from hf_radin.cli.main import main
from hf_radin.images.split import DataSource, open_split
from hf_radin.ingredients.labels import split_classes
from hf_radin.logits.bank import LogitBank
from hf_radin.soup.cook import find_ingredients
from hf_radin.soup.report import SearchReport

# What three checkpoints have, and share.
FIRST = [*NAMES[:8]]
SECOND = [*NAMES[2:7], "ten", "seven", "nine"]
THIRD = NAMES[::-1]
COMMON = NAMES[2:8]


@pytest.fixture(scope="module")
def mixed(runs, tmp_path_factory) -> Path:
    """Three fine-tunes with classes of their own."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, names in enumerate((FIRST, SECOND, THIRD)):
        with_classes(runs / f"ft-{number}", folder / f"ft-{number}", names)
    return folder


@pytest.fixture(scope="module")
def common_digits(tmp_path_factory) -> Path:
    return digits_of(tmp_path_factory.mktemp("common"), COMMON)


def rows_of(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with the rows of its head for these classes."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    numbers = [model.config.label2id[name] for name in names]
    return {
        name: tensor[numbers] if name.startswith("classifier") else tensor
        for name, tensor in model.state_dict().items()
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_classes_that_differ_are_refused_with_the_way_out(mixed):
    with pytest.raises(ValueError, match=r"in its classes: it has .*--classes common\)"):
        hf_radin.gather(f"{mixed}/*")


def test_what_all_have_is_kept_of_each_and_said(mixed, caplog):
    ingredients = hf_radin.gather(f"{mixed}/*", classes="common")
    assert ingredients.labels == tuple(COMMON)
    assert [ingredient.left_out for ingredient in ingredients] == [2, 2, 4]
    assert any("ft-0 has 8 classes, of which 2 are left out: 'zero', 'one'." in line for line in warned(caplog))
    assert any("ft-1 has 8 classes, of which 2 are left out: 'ten', 'nine'." in line for line in warned(caplog))
    for ingredient in ingredients:
        model = ingredient.load_model(torch.float32)
        assert model.config.id2label == dict(enumerate(COMMON))
        assert equal(model.state_dict(), rows_of(ingredient.folder, COMMON))


def test_the_order_does_not_depend_on_that_of_the_user(mixed):
    names = [mixed / f"ft-{number}" for number in (2, 0, 1)]
    assert hf_radin.gather(names, classes="common").labels == hf_radin.gather(names[::-1], classes="common").labels


def test_all_classes_are_what_they_are_without_the_option(runs, tmp_path):
    """Where nothing is left out, permuting is the same, to the last bit and in each record."""
    with_classes(runs / "ft-0", tmp_path / "ft-0", NAMES)
    with_classes(runs / "ft-1", tmp_path / "ft-1", THIRD)
    before = hf_radin.gather(f"{tmp_path}/ft-*")
    assert hf_radin.gather(f"{tmp_path}/ft-*", classes="common") == before
    named = hf_radin.gather(f"{tmp_path}/ft-*", classes=before.labels)
    assert named == before and [each.content for each in named] == [each.content for each in before]
    shuffled = hf_radin.gather(f"{tmp_path}/ft-*", classes=before.labels[::-1])
    recipe = Recipe(before.ids, (0.3, 0.7))
    soup, other = (hf_radin.average(ingredients, recipe) for ingredients in (before, shuffled))
    assert torch.equal(soup["classifier.weight"], other["classifier.weight"].flip(0))


def test_a_soup_of_selected_classes_is_the_selection_of_the_soup(runs):
    """Averaging and leaving out classes can be done in either order, to the last bit."""
    names = ["seven", "two", "nine"]
    places = [runs / "ft-0", runs / "ft-1"]
    whole, selected = hf_radin.gather(places), hf_radin.gather(places, classes=names)
    soup = hf_radin.average(selected, Recipe(selected.ids, (0.4, 0.6)))
    expected = hf_radin.average(whole, Recipe(whole.ids, (0.4, 0.6)))
    for name in ("classifier.weight", "classifier.bias"):
        expected[name] = expected[name][[NAMES.index(label) for label in names]]
    assert equal(soup, expected)


def test_logits_are_those_of_the_checkpoints_for_these_classes(mixed, runs, common_digits, cache):
    selected = hf_radin.compute_logits(hf_radin.gather(f"{mixed}/*", classes="common"), common_digits, cache_dir=cache)
    whole = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), common_digits, cache_dir=cache)
    columns = [NAMES.index(name) for name in COMMON]
    for number in range(3):
        expected = whole.logits(number)[:, columns]
        np.testing.assert_allclose(selected.logits(number), expected, atol=1e-5)
        assert (selected.logits(number).argmax(1) == expected.argmax(1)).all()
    assert [COMMON[label] for label in selected.labels] == [NAMES[label] for label in whole.labels]


def test_of_linear_models_the_soup_is_the_ensemble(heads, common_digits, cache, tmp_path):
    for number, names in enumerate((FIRST, SECOND, THIRD)):
        with_classes(heads / f"ft-{number}", tmp_path / f"ft-{number}", names)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*", classes="common")
    bank = hf_radin.compute_logits(ingredients, common_digits, cache_dir=cache)
    soup = hf_radin.uniform(bank, test_split="test")
    for split in ("validation", "test"):
        assert soup.accuracy("soup", split) == soup.accuracy("ensemble", split)


def test_a_bank_of_other_classes_is_another_bank(runs, common_digits, cache):
    """The very same checkpoints with other classes have other logits, and neither bank is taken for the other."""
    places = [runs / "ft-0", runs / "ft-1"]
    banks = [
        hf_radin.compute_logits(hf_radin.gather(places, classes=classes), common_digits, cache_dir=cache)
        for classes in (None, COMMON, COMMON[::-1])
    ]
    assert len({bank.folder for bank in banks}) == 3 and [bank.logits(0).shape[1] for bank in banks] == [10, 6, 6]
    np.testing.assert_allclose(banks[1].logits(0), banks[2].logits(0)[:, ::-1], atol=1e-5)
    for bank in banks:
        opened = LogitBank.open(bank.folder)
        assert opened.ingredients == bank.ingredients and opened.classes == bank.classes
        assert hf_radin.uniform(opened).recipe == hf_radin.uniform(bank).recipe


def test_the_saved_soup_is_cooked_again_bit_for_bit(mixed, common_digits, tmp_path):
    """Whatever it is asked for then: what was left out is in the recipe."""
    ingredients = hf_radin.gather(f"{mixed}/*", classes="common")
    soup = hf_radin.uniform(hf_radin.compute_logits(ingredients, common_digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert saved.config.id2label == dict(enumerate(COMMON)) and saved.config.num_labels == 6
    assert "3 of them had further classes, which were left out" in (tmp_path / "soup" / "README.md").read_text()
    report = SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True)
    assert [(entry.order, entry.left_out) for entry in report.ingredients] == [
        (ingredient.order, ingredient.left_out) for ingredient in ingredients
    ]
    for options in ([], ["--models", *(str(mixed / f"ft-{number}") for number in (2, 1, 0))]):
        cooked = tmp_path / f"cooked-{len(options)}"
        assert main(["average", "--recipe", str(tmp_path / "soup"), "--output", str(cooked), *options]) == 0
        for name in ("model.safetensors", "config.json"):
            assert (cooked / name).read_bytes() == (tmp_path / "soup" / name).read_bytes()


def test_a_recipe_whose_classes_are_not_the_checkpoints_is_refused(mixed, common_digits, tmp_path):
    ingredients = hf_radin.gather(f"{mixed}/*", classes="common")
    hf_radin.average(ingredients, Recipe.uniform(ingredients.ids), output=tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    recipe = json.loads(path.read_text())
    for changes in ({"left_out": 3}, {"order": [0] * 6}, {"order": [2, 3, 4, 5, 6, 99]}, {"order": [2, 3]}):
        entry = recipe["ingredients"][0]
        path.write_text(json.dumps({**recipe, "ingredients": [entry | changes, *recipe["ingredients"][1:]]}))
        with pytest.raises(ValueError, match=r"ft-0 has 8 classes, and its order .* is of 6 of"):
            hf_radin.average(*find_ingredients(path))


def test_what_can_not_be_selected_is_refused(mixed, runs, tmp_path):
    with_classes(runs / "ft-0", tmp_path / "few", ["zero", "eight"])
    with pytest.raises(ValueError, match=r"have 'eight' in common: a soup needs two"):
        hf_radin.gather([tmp_path / "few", with_classes(runs / "ft-1", tmp_path / "b", NAMES[1:])], classes="common")
    with_classes(runs / "ft-0", tmp_path / "nine", NAMES[:9])
    name_classes(tmp_path / "nine", [f"LABEL_{number}" for number in range(9)])
    with pytest.raises(ValueError, match=r"nine calls its 9 classes LABEL_0, LABEL_1, \.\.\.: which .* can't be told"):
        hf_radin.gather([mixed / "ft-0", tmp_path / "nine"], classes="common")
    with_classes(runs / "ft-1", tmp_path / "eight", NAMES[:8])
    name_classes(tmp_path / "eight", [f"LABEL_{number}" for number in range(8)])
    for classes in (None, "common"):
        with pytest.raises(ValueError, match=r"LABEL_0, .* can't be told"):
            hf_radin.gather([tmp_path / "nine", tmp_path / "eight"], classes=classes)
    with_classes(runs / "ft-1", tmp_path / "twice", FIRST)
    name_classes(tmp_path / "twice", [*FIRST[:-1], "two"])
    with pytest.raises(ValueError, match="twice has 2 classes that are called 'two'"):
        hf_radin.gather([mixed / "ft-0", tmp_path / "twice"], classes="common")
    with pytest.raises(ValueError, match=r"ft-1 has no class 'zero', which the soup shall have.*leave out these"):
        hf_radin.gather(f"{mixed}/*", classes=["zero", "two"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [("split", "it is 'common' or a list"), (["two"], "two classes or more"), (["two", "six", "two"], "named twice")],
)
def test_what_is_no_set_of_classes_is_refused(mixed, classes, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.gather(f"{mixed}/*", classes=classes)


def test_numbers_mean_nothing_where_classes_were_left_out(mixed, tmp_path):
    numbered = digits_of(tmp_path / "numbered", COMMON, "numbers")
    ingredients = hf_radin.gather(f"{mixed}/*", classes="common")
    with pytest.raises(ValueError, match=r"are numbers, and classes of .*ft-. are left out"):
        hf_radin.compute_logits(ingredients, numbered, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="are no names of classes"):
        split_classes(open_split(DataSource(numbered)))


def test_images_of_a_class_that_was_left_out_are_refused(mixed, digits, tmp_path):
    ingredients = hf_radin.gather(f"{mixed}/*", classes="common")
    with pytest.raises(ValueError, match=r"has classes that the models don't know: zero, .* leave out their images"):
        hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")


def test_a_part_of_a_dataset_may_name_classes_that_none_of_its_images_has(mixed, digits, common_digits, cache):
    """What `Dataset.filter` leaves has the names of all classes, and so their numbers."""
    ingredients = hf_radin.gather(f"{mixed}/*", classes="common")
    whole = datasets.load_dataset("parquet", data_dir=str(digits / "data"), split="validation", cache_dir=str(cache))
    numbers = [NAMES.index(name) for name in COMMON]
    part = whole.filter(lambda row: row["label"] in numbers)
    bank = hf_radin.compute_logits(ingredients, part, cache_dir=cache)
    expected = hf_radin.compute_logits(ingredients, common_digits, cache_dir=cache)
    assert bank.classes == expected.classes and np.array_equal(bank.labels, expected.labels)
    with pytest.raises(ValueError, match="classes that the models don't know: one, eight"):
        hf_radin.compute_logits(ingredients, whole.filter(lambda row: row["label"] not in (0, 9)), cache_dir=cache)


@pytest.mark.parametrize("kind", ["class label", "words"])
def test_a_split_says_which_classes_the_soup_has(mixed, kind, tmp_path, capsys):
    data = digits_of(tmp_path / "data", COMMON[:4], kind)
    classes = tuple(COMMON[:4]) if kind == "class label" else tuple(sorted(COMMON[:4]))
    assert split_classes(open_split(DataSource(data))) == classes
    models = [str(mixed / f"ft-{number}") for number in range(3)]
    command = ["soup", "--models", *models, "--method", "uniform", "--classes", "split"]
    where = ["--dataset", str(data), "--output", str(tmp_path / "soup"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, *where, "--test-split", "test"]) == 0
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert tuple(saved.config.id2label.values()) == classes
    lacking = [str(with_classes(Path(models[0]), tmp_path / "lacking", FIRST[:5])), *models]
    assert main(["soup", "--models", *lacking, "--classes", "split", *where, "--overwrite"]) == 2
    assert f"lacking has no class '{sorted({'five'}.intersection(classes))[0]}'" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "other")]) == 2
    assert "--classes split: name the dataset with --dataset" in capsys.readouterr().err


def test_common_classes_on_the_command_line(mixed, common_digits, tmp_path, capsys):
    models = ["--models", *(str(mixed / f"ft-{number}") for number in range(3))]
    assert main(["inspect", *models]) == 2
    assert "--classes common" in capsys.readouterr().out
    assert main(["inspect", *models, "--classes", "common"]) == 0
    assert "of which 2 are left out: 'ten', 'nine'" in " ".join(capsys.readouterr().out.split())
    where = ["--dataset", str(common_digits), "--cache-dir", str(tmp_path / "cache"), "--output"]
    assert main(["soup", *models, "--classes", "common", "--budget", "2", *where, str(tmp_path / "soup")]) == 0
    report = SearchReport.read(tmp_path / "soup" / "recipe.json")
    assert report.classes == tuple(COMMON)


@pytest.mark.parametrize("architecture", [known for known in INSTALLED if known.model_type not in EXCEPTIONS], ids=str)
def test_every_architecture_keeps_what_is_selected(architecture, tmp_path):
    """Whatever it calls its heads: its logits of the classes are what they were, and so when it was saved."""
    save_fine_tunes(architecture, tmp_path, count=2)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*", classes=["fish", "cat"])
    selected = ingredients[1].load_model(torch.float32)
    hf_radin.average(ingredients, Recipe.uniform(ingredients.ids[1:]), output=tmp_path / "saved")
    whole = AutoModelForImageClassification.from_pretrained(tmp_path / "ft-1", dtype=torch.float32).eval()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    for name, tensor in whole.state_dict().items():
        for part in (selected.state_dict()[name], saved.state_dict()[name]):
            axes = [axis for axis, size in enumerate(part.shape) if size != tensor.shape[axis]]
            assert torch.equal(part, tensor.index_select(axes[0], torch.tensor([2, 0])) if axes else tensor)
    inputs = ingredients.processor(images=pictures(2), return_tensors="pt")
    with torch.inference_mode():
        outputs = [model(**inputs) for model in (whole, selected, saved)]
    expected, *others = (output.logits if "logits" in output else output[0] for output in outputs)
    for logits in others:
        assert (logits - expected[:, [2, 0]]).abs().max() < 1e-4 * expected.abs().max()
    assert saved.config.id2label == {0: "fish", 1: "cat"}


def test_names_of_timm_are_those_of_the_soup(tmp_path):
    """It keeps them in a field of its own, which is saved in place of id2label."""
    save_fine_tunes(next(known for known in INSTALLED if known.net == "test_vit"), tmp_path, count=2)
    config = json.loads((tmp_path / "ft-1" / "config.json").read_text())
    (tmp_path / "ft-1" / "config.json").write_text(json.dumps(config | {"label_names": ["dog", "fish", "cat"]}))
    for classes in (None, ["fish", "dog"]):
        ingredients = hf_radin.gather(f"{tmp_path}/ft-*", classes=classes)
        folder = tmp_path / f"soup of {len(ingredients.labels)}"
        hf_radin.average(ingredients, Recipe.uniform(ingredients.ids), output=folder)
        soup = AutoModelForImageClassification.from_pretrained(folder)
        assert tuple(soup.config.id2label.values()) == ingredients.labels


def test_adapters_with_heads_of_their_own_classes(start, tmp_path):
    """The head comes with the adapter, and so do its classes; what is selected is that of the merged model."""
    shutil.copytree(start, tmp_path / "base")
    for number, names in enumerate((FIRST, SECOND)):
        folder = tmp_path / "adapters" / f"ft-{number}"
        save_adapter(tmp_path / "base", folder, number)
        tensors = load_file(folder / "adapter_model.safetensors")
        heads = {name: tensor[: len(names)].clone() for name, tensor in tensors.items() if "classifier" in name}
        save_file(tensors | heads, folder / "adapter_model.safetensors")
        shutil.copy(start / "config.json", folder)
        name_classes(folder, names)
    ingredients = hf_radin.gather(f"{tmp_path}/adapters/*", classes="common")
    assert ingredients.labels == tuple(COMMON) and [ingredient.left_out for ingredient in ingredients] == [2, 2]
    for ingredient, names in zip(ingredients, (FIRST, SECOND), strict=True):
        head = load_file(ingredient.folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]
        model = ingredient.load_model(torch.float32)
        assert torch.equal(model.classifier.weight, head[[names.index(name) for name in COMMON]])
        whole = replace(ingredient, labels=tuple(names), order=None, left_out=0).load_model(torch.float32).vit
        assert equal(model.vit.state_dict(), whole.state_dict())
    hf_radin.average(ingredients, Recipe.uniform(ingredients.ids), output=tmp_path / "soup")
    tensors = hf_radin.average(*find_ingredients(tmp_path / "soup"))
    assert equal(tensors, AutoModelForImageClassification.from_pretrained(tmp_path / "soup").state_dict())


def test_a_recipe_is_cooked_whatever_else_lies_there(runs, tmp_path):
    """Equal weights whose numbers mean other classes are another checkpoint, and not the one of the recipe."""
    for name, source, names in (("b", 0, NAMES[1:]), ("c", 1, NAMES)):
        with_classes(runs / f"ft-{source}", tmp_path / name, names)
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    name_classes(tmp_path / "a", [*NAMES[2:], "one"])
    ingredients = hf_radin.gather([tmp_path / "b", tmp_path / "c"], classes="common")
    soup = hf_radin.average(ingredients, Recipe.uniform(ingredients.ids))
    hf_radin.average(ingredients, Recipe.uniform(ingredients.ids), output=tmp_path / "soup")
    cooked = find_ingredients(tmp_path / "soup", models=[str(tmp_path / name) for name in "abc"])
    assert equal(hf_radin.average(*cooked), soup)
