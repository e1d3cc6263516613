"""The order in which ingredients are named changes nothing but the order in which they are shown."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from shared.making import make_bank
from shared.timeless import timeless
from shared.training import NAMES, digit_images, image_dataset, save
from transformers import ViTForImageClassification

import hf_radin
from hf_radin import Recipe
from hf_radin.soup.report import SearchReport

# So few images that many accuracies are equal: whoever is first would win.
FEW = image_dataset(*digit_images(slice(700, 760)))

SEARCHES = {
    "race": lambda bank: hf_radin.radin(bank, budget=4),
    "full": lambda bank: hf_radin.radin(bank, budget=4, measure="full"),
    "drawn": lambda bank: hf_radin.radin(bank, budget=3, proposals="monte-carlo,dirichlet", candidates=8),
    "sought": lambda bank: hf_radin.radin(bank, budget=2, measure="full", proposals="forward,line,local"),
    "estimated": lambda bank: hf_radin.radin(bank, budget=0, unmeasured=True),
    "held out": lambda bank: hf_radin.radin(bank, budget=2, hold_out=0.3),
    "greedy": hf_radin.greedy,
    "greedy, strictly": lambda bank: hf_radin.greedy(bank, accept=">"),
    "uniform": hf_radin.uniform,
    "best single": hf_radin.best_single,
}
ORDERS = ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3))


def unordered(report: SearchReport) -> object:
    """What a report says, whatever the order of names in its recipes."""
    fields = timeless(report.to_fields())
    for recipe in (fields["recipe"], *fields["measurements"]):
        pairs = sorted(zip(recipe.pop("ingredients"), recipe.pop("weights"), strict=True))
        recipe["parts"] = pairs
    for teacher in (entry["teacher"] for entry in fields["measurements"] if entry["teacher"]):
        ensemble = teacher["ensemble"]
        teacher["ensemble"] = sorted(zip(ensemble["ingredients"], ensemble["weights"], strict=True))
    if fields.get("head"):
        teacher = fields["head"]["teacher"]
        fields["head"]["teacher"] = sorted(zip(teacher["ingredients"], teacher["weights"], strict=True))
    fields["ingredients"] = sorted(fields["ingredients"], key=lambda entry: entry["id"])
    singles = [entry for entry in fields["measurements"] if entry["proposal"] == "single"]
    soups = [entry for entry in fields["measurements"] if entry["proposal"] != "single"]
    fields["measurements"] = sorted(singles, key=lambda entry: entry["parts"]) + soups
    return fields


def weights(soup: hf_radin.Soup) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in soup.model.state_dict().items()}


@pytest.mark.parametrize("search", SEARCHES)
def test_any_order_gives_the_same_soup(runs, tmp_path, search):
    soups = []
    for order in ORDERS:  # each with a cache of its own, so that none finds what another measured
        names = [f"{runs}/ft-{number}" for number in order]
        bank = make_bank(names, FEW, tmp_path / "-".join(map(str, order)))
        assert bank.ingredients.ids == tuple(names)
        soup = SEARCHES[search](bank)
        shown = [name for name in names if name in soup.recipe.ingredients]
        assert list(soup.recipe.ingredients) == shown
        assert [entry.id for entry in soup.report.ingredients] == names
        singles = [entry.recipe.ingredients[0] for entry in soup.report.measurements if entry.proposal == "single"]
        assert singles == names
        soups.append(soup)
    first, *others = soups
    for soup in others:
        assert unordered(soup.report) == unordered(first.report)
        assert weights(soup) == weights(first)


def test_any_order_gives_the_same_logits_and_classes(runs, tmp_path):
    """Though the checkpoints have their classes in different orders: none is taken because it is named first."""
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    model = ViTForImageClassification.from_pretrained(runs / "ft-1")
    for tensor in (model.classifier.weight, model.classifier.bias):
        tensor.data = tensor.data[order]
    model.config.id2label = {place: NAMES[number] for place, number in enumerate(order)}
    model.config.label2id = {name: place for place, name in model.config.id2label.items()}
    save(model, tmp_path / "shuffled")
    names = [f"{runs}/ft-0", str(tmp_path / "shuffled")]
    banks = [make_bank(list(pair), FEW, tmp_path / f"cache-{place}") for place, pair in enumerate(permutations(names))]
    assert banks[0].classes == banks[1].classes
    for name in names:
        assert (banks[0].logits(name) == banks[1].logits(name)).all()
    assert weights(hf_radin.uniform(banks[0])) == weights(hf_radin.uniform(banks[1]))


def test_an_average_has_the_same_bits_in_any_order(runs, tmp_path):
    written = set()
    for order in permutations(range(4)):
        ingredients = hf_radin.gather([f"{runs}/ft-{number}" for number in order])
        shares = dict(zip(range(4), (0.1, 0.2, 0.3, 0.4), strict=True))
        recipe = Recipe(ingredients.ids, tuple(shares[number] for number in order))
        folder = tmp_path / "-".join(map(str, order))
        hf_radin.average(ingredients, recipe, output=folder)
        written.add((folder / "model.safetensors").read_bytes())
    assert len(written) == 1


def test_copies_under_other_names_give_the_same_soup(runs, tmp_path):
    """What counts is what is in a checkpoint, not where it is."""
    for number in range(4):
        (tmp_path / f"run-{9 - number}").symlink_to(runs / f"ft-{number}")
    soups = [
        hf_radin.radin(make_bank(str(pattern), FEW, tmp_path / f"cache-{place}"), budget=3, measure="full")
        for place, pattern in enumerate([tmp_path / "run-*", runs / "ft-[0-3]"])
    ]
    assert weights(soups[0]) == weights(soups[1])
    assert np.isclose(soups[0].report.measurements[-1].known, soups[1].report.measurements[-1].known)


def test_the_content_of_a_checkpoint_is_in_the_bank(runs, tmp_path):
    bank = make_bank(f"{runs}/ft-*", FEW, tmp_path / "cache")
    contents = [ingredient.content for ingredient in bank.ingredients]
    assert all(contents) and len(set(contents)) == 5
    reopened = hf_radin.LogitBank.open(Path(bank.folder))
    assert [ingredient.content for ingredient in reopened.ingredients] == contents
