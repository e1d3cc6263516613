"""A recipe lies on the simplex and survives being written down."""

import json
import math
import random

import pytest

from hf_radin import Measurement, Recipe
from hf_radin.recipes.recipe import Pull


def test_uniform_gives_each_the_same_weight():
    assert Recipe.uniform(["a", "b", "c"]).weights == (1 / 3, 1 / 3, 1 / 3)


@pytest.mark.parametrize("weights", [(0.5, 0.4), (1.5, -0.5), (math.nan, 1.0), (math.inf, 0.0), (1.0,), (0.0, 0.0)])
def test_weights_off_the_simplex_are_refused(weights):
    with pytest.raises(ValueError):
        Recipe(("a", "b"), weights)


def test_an_ingredient_stands_once():
    with pytest.raises(ValueError, match="'a' appears twice"):
        Recipe(("a", "a"), (0.5, 0.5))


def test_ingredients_are_named_by_strings():
    with pytest.raises(ValueError, match=r"names its ingredients by strings, not by \('a', 1\)"):
        Recipe(("a", 1), (0.5, 0.5))


@pytest.mark.parametrize("make", [lambda: Recipe((), ()), lambda: Recipe.uniform([])])
def test_an_empty_recipe_is_refused(make):
    with pytest.raises(ValueError, match="at least one"):
        make()


def test_weights_that_are_off_by_rounding_are_scaled_once():
    recipe = Recipe(("a", "b", "c"), (0.3333333, 0.3333333, 0.3333333))
    assert abs(math.fsum(recipe.weights) - 1) < 1e-15
    assert Recipe(recipe.ingredients, recipe.weights) == recipe


def test_json_gives_back_the_same_floats():
    generator = random.Random(0)
    for _ in range(200):
        parts = [generator.random() for _ in range(7)]
        recipe = Recipe(tuple("abcdefg"), tuple(part / math.fsum(parts) for part in parts))
        assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("text", ["{}", "[]", '{"ingredients": ["a"]}', "no json", '{"ingredients": 3, "weights": 4}'])
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(ValueError):
        Recipe.from_json(text)


def test_used_leaves_out_what_has_no_weight():
    assert Recipe(("a", "b", "c"), (0.25, 0.0, 0.75)).used == {"a": 0.25, "c": 0.75}


def test_a_measurement_survives_being_written_down():
    measurement = Measurement(Recipe(("a", "b"), (0.25, 0.75)), "subset", 0.9, 0.8, 100)
    assert Measurement.from_dict(measurement.to_dict()) == measurement


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("estimate", "0.9"),
        ("measured", {}),
        ("interval", "ab"),
        ("interval", [0.1]),
        ("images", []),
        ("dropped", [[]]),
    ],
)
def test_a_measurement_of_other_types_is_refused(name, value):
    measurement = Measurement(Recipe(("a", "b"), (0.25, 0.75)), "subset", 0.9, 0.8, 100)
    with pytest.raises(ValueError, match=f"its '{name}"):
        Measurement.from_dict({**measurement.to_dict(), name: value})


@pytest.mark.parametrize("weights", [(10**400, 0), (1.7e308, 1.7e308), (2.0, -1.0)])
def test_weights_that_are_too_large_are_refused(weights):
    with pytest.raises(ValueError, match=r"too large|weights are at least 0 and add up to 1"):
        Recipe(("a", "b"), weights)


def test_a_recipe_that_is_pulled_to_a_start_survives_being_written_down():
    pulled = Recipe(("a", "b", "c"), (0.25, 0.0, 0.75), Pull("org/start@v1", 0.1 + 0.2))
    assert Recipe.from_json(pulled.to_json()) == pulled
    assert pulled.in_order(("c", "a")).pull == pulled.pull and pulled.ensemble.pull is None
    entry = Measurement(pulled.in_order("ca"), "wise-ft", 0.5, 0.5, 10)
    assert Measurement.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
    assert pulled.is_same(pulled.in_order("ca")) and not pulled.is_same(pulled.ensemble)
    single = Recipe.uniform(["a"])
    assert single.is_single and not Recipe(*vars(single).values()).ensemble.is_same(pulled)
    assert not Recipe(("a",), (1.0,), pulled.pull).is_single


def test_a_recipe_without_a_start_is_written_as_it_always_was():
    assert Recipe.uniform("ab").to_json() == '{"ingredients": ["a", "b"], "weights": [0.5, 0.5]}'
    assert "pull" not in Measurement(Recipe.uniform("ab"), "own", 0.5, 0.5, 10).to_dict()


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, True, "0.5", None])
def test_a_share_is_above_zero_and_below_one(share):
    with pytest.raises(ValueError, match="is above 0 and below 1"):
        Pull("start", share)
    with pytest.raises(ValueError):
        Recipe.from_json(json.dumps({"ingredients": ["a"], "weights": [1.0], "pull": {"start": "s", "share": share}}))


@pytest.mark.parametrize("pull", [[], ["start", 0.5], "start", {"start": ""}, {"start": 3, "share": 0.5}])
def test_what_pulls_nowhere_is_refused(pull):
    with pytest.raises(ValueError):
        Recipe.from_json(json.dumps({"ingredients": ["a"], "weights": [1.0], "pull": pull}))
