"""Classes that mean the same are the same, in whatever order a checkpoint has them; those that don't are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared.architectures import CLASSES, EXCEPTIONS, INSTALLED, save_fine_tunes
from shared.classes import name_classes
from shared.training import NAMES
from transformers import AutoModelForImageClassification, ViTForImageClassification

import hf_radin
from hf_radin import Recipe
from hf_radin.checkpoints import processor
from hf_radin.soup.cook import find_ingredients
from hf_radin.soup.soup import Soup

ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


def shuffle(folder: Path) -> None:
    """The same model with its classes in another order."""
    model = ViTForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for tensor in (model.classifier.weight, model.classifier.bias):
            tensor.copy_(tensor[ORDER])
    model.save_pretrained(folder)
    name_classes(folder, [NAMES[index] for index in ORDER])


def placeholders(folder: Path) -> None:
    name_classes(folder, [f"LABEL_{index}" for index in range(10)])


@pytest.fixture
def shuffled(two, runs) -> Path:
    shutil.copytree(runs / "ft-2", two / "ft-2")
    shuffle(two / "ft-1")
    return two


def test_another_order_is_permuted_in_the_logits_and_in_the_head(shuffled, runs, digits, tmp_path, caplog):
    ingredients = hf_radin.gather(f"{shuffled}/*")
    assert "ft-1 has its classes in another order: brought into that of" in caplog.text
    assert {ingredient.labels for ingredient in ingredients} == {tuple(NAMES)}
    assert [ingredient.order is None for ingredient in ingredients] == [1, 0, 1]
    before = hf_radin.gather([f"{runs}/ft-{number}" for number in range(3)])
    straight = hf_radin.compute_logits(before, digits, cache_dir=tmp_path / "cache")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    assert np.array_equal(bank.logits(1), straight.logits(1))
    soup = hf_radin.average(ingredients, Recipe(ingredients.ids, (0.5, 0.3, 0.2)))
    expected = hf_radin.average(before, Recipe(before.ids, (0.5, 0.3, 0.2)))
    assert all(torch.equal(soup[name], tensor) for name, tensor in expected.items())
    opened = hf_radin.LogitBank.open(bank.folder)
    assert opened.ingredients == ingredients


def test_most_say_the_order_and_the_soup_has_it(shuffled, digits, tmp_path):
    shuffle(shuffled / "ft-2")
    ingredients = hf_radin.gather([shuffled / "ft-1", shuffled / "ft-0", shuffled / "ft-2"])
    assert ingredients.labels == tuple(NAMES[index] for index in ORDER)
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    assert (bank.logits(0).argmax(1) == bank.labels).mean() > 0.7
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert tuple(soup.config.id2label.values()) == ingredients.labels
    cooked = hf_radin.average(*find_ingredients(tmp_path / "soup"))
    assert all(torch.equal(cooked[name], tensor) for name, tensor in soup.state_dict().items())


def test_a_soup_of_others_still_has_the_order_of_most(shuffled, runs, tmp_path):
    for number in (3, 4):
        shutil.copytree(runs / f"ft-{number}", shuffled / f"ft-{number}")
        shuffle(shuffled / f"ft-{number}")
    ingredients = hf_radin.gather([shuffled / f"ft-{number}" for number in (1, 3, 4, 0, 2)])
    others = ingredients[3:]
    hf_radin.average(ingredients, Recipe.uniform(others.ids), output=tmp_path / "soup")
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert tuple(soup.config.id2label.values()) == ingredients.labels == tuple(NAMES[index] for index in ORDER)
    permuted = hf_radin.average(others, Recipe.uniform(others.ids))
    straight = hf_radin.gather([shuffled / "ft-0", shuffled / "ft-2"])
    natural = hf_radin.average(straight, Recipe.uniform(straight.ids))
    assert torch.equal(natural["classifier.weight"][ORDER], permuted["classifier.weight"])


@pytest.mark.parametrize("first", ["ft-0", "ft-1"])
def test_placeholders_are_taken_by_number_and_said(two, caplog, first):
    placeholders(two / "ft-1")
    ingredients = hf_radin.gather([two / first, two / ("ft-1" if first == "ft-0" else "ft-0")])
    assert "ft-1 calls its classes LABEL_0, LABEL_1, ...: matched to those of" in caplog.text
    assert {ingredient.labels for ingredient in ingredients} == {tuple(NAMES)}
    assert [ingredient.order for ingredient in ingredients] == [None, None]
    assert ingredients[0].load_model(torch.float32).config.id2label == dict(enumerate(NAMES))


def test_placeholders_among_two_orders_mean_nothing(shuffled):
    placeholders(shuffled / "ft-2")
    with pytest.raises(
        ValueError, match=r"ft-2 calls its classes LABEL_0.* and .*ft-[01] and .*ft-[01] have theirs in diff"
    ):
        hf_radin.gather(f"{shuffled}/*")


def test_placeholders_in_another_order_are_names(two):
    name_classes(two / "ft-0", [f"LABEL_{index}" for index in range(9, -1, -1)])
    placeholders(two / "ft-1")
    assert [ingredient.order for ingredient in hf_radin.gather(f"{two}/*")] == [None, tuple(range(9, -1, -1))]


def test_equal_weights_are_a_copy_only_if_their_numbers_mean_the_same(two):
    for name in ("ft-2", "ft-3"):
        shutil.copytree(two / "ft-0", two / name)
    placeholders(two / "ft-2")
    name_classes(two / "ft-3", NAMES[::-1])
    assert len(hf_radin.gather([two / "ft-0", two / "ft-1", two / "ft-2"])) == 2
    assert len(hf_radin.gather([two / "ft-0", two / "ft-1", two / "ft-3"])) == 3


def test_placeholders_are_cooked_as_they_were(shuffled, digits, tmp_path):
    """What their numbers mean is in the recipe, whatever lies beside them when it is cooked."""
    placeholders(shuffled / "ft-2")
    gathered = hf_radin.gather([shuffled / "ft-0", shuffled / "ft-2"])
    soup = hf_radin.uniform(hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    ingredients, recipe = find_ingredients(tmp_path / "soup", models=[str(shuffled / "ft-2"), str(shuffled / "ft-0")])
    cooked = hf_radin.average(ingredients, recipe)
    assert all(torch.equal(cooked[name], tensor) for name, tensor in soup.model.state_dict().items())


def test_another_named_checkpoint_does_not_change_what_placeholders_mean(two, runs, digits, tmp_path):
    for name in ("ft-2", "ft-3"):
        shutil.copytree(runs / name, two / name)
    for name in ("ft-0", "ft-1"):
        placeholders(two / name)
    name_classes(two / "ft-3", NAMES[::-1])
    gathered = hf_radin.gather([two / f"ft-{number}" for number in range(3)])
    bank = hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")
    report = replace(hf_radin.uniform(bank).report, recipe=Recipe.uniform(gathered.ids[:2]))
    soup = Soup(report, gathered)
    soup.save_pretrained(tmp_path / "soup")
    ingredients, cooked = find_ingredients(
        tmp_path / "soup", models=[str(two / f"ft-{number}") for number in (0, 1, 3)]
    )
    assert [ingredient.order for ingredient in ingredients] == [None, None] and ingredients.labels == tuple(NAMES)
    tensors = hf_radin.average(ingredients, cooked)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in soup.model.state_dict().items())


def test_placeholders_alone_stay(two):
    for name in ("ft-0", "ft-1"):
        placeholders(two / name)
    assert hf_radin.gather(f"{two}/*").labels[:2] == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("architecture", [known for known in INSTALLED if known.model_type not in EXCEPTIONS], ids=str)
def test_every_architecture_is_permuted(architecture, tmp_path):
    """Whatever it calls its heads: as if the classes had stood in that order."""
    save_fine_tunes(architecture, tmp_path, count=2)
    config = json.loads((tmp_path / "ft-1" / "config.json").read_text())
    names = [CLASSES[index] for index in (2, 0, 1)]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if "label_names" in config:  # timm's own
        config["label_names"] = names
    (tmp_path / "ft-1" / "config.json").write_text(json.dumps(config))
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    assert ingredients[1].order == (1, 2, 0)
    straight = ingredients[1].load_model(torch.float32)
    shuffled = replace(ingredients[1], order=None).load_model(torch.float32)
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    inputs = {name: value[None] for name, value in processor.prepare_image(ingredients[0].processor, image).items()}
    with torch.inference_mode():
        outputs = [model(**inputs) for model in (straight, shuffled)]
    a, b = (output.logits if "logits" in output else output[0] for output in outputs)
    assert torch.allclose(a, b[:, [1, 2, 0]], atol=1e-6) and not torch.allclose(a, b, atol=1e-6)
