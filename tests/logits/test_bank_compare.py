"""Images on which two ensembles differ are those of their predictions, and no others."""

import numpy as np
import pytest
from shared.zoo import zoo, zoo_bank, zoo_pilot

import hf_radin
from hf_radin.recipes import ensemble

__all__ = ["zoo", "zoo_bank", "zoo_pilot"]  # fixtures


def pair(bank) -> tuple[hf_radin.Recipe, hf_radin.Recipe]:
    ids = bank.ingredients.ids
    return hf_radin.Recipe(ids[:2], (0.3, 0.7)), hf_radin.Recipe.uniform(ids)


def test_equal_recipes_change_nothing(bank):
    for recipe in pair(bank):
        changes = bank.compare(recipe, recipe)
        assert (len(changes), changes.won, changes.lost) == (0, 0, 0)


def test_won_and_lost_are_the_difference_of_the_scores(bank):
    first, second = pair(bank)
    changes = bank.compare(first, second)
    assert len(changes) >= changes.won + changes.lost > 0
    scores = bank.score([first, second])
    assert changes.won - changes.lost == round((scores[1] - scores[0]) * len(bank))
    opposite = bank.compare(bank.row(second), first)
    assert (opposite.won, opposite.lost) == (changes.lost, changes.won)
    np.testing.assert_array_equal(opposite.ids, changes.ids)
    np.testing.assert_array_equal(opposite.margins, changes.margins[:, ::-1])


@pytest.mark.parametrize("kind", ["whole", "held out", "pilot"])
def test_rows_are_the_images_at_their_place_in_the_split(bank, zoo_pilot, kind):
    given = {"whole": bank, "held out": bank.divided(0.3, 1)[1], "pilot": zoo_pilot}[kind]
    recipes = pair(given)
    changes = given.compare(*recipes)
    logits = [given.logits(position) for position in range(len(given.ingredients))]
    mixed = [ensemble.mix(logits, given.row(recipe)) for recipe in recipes]
    classes = np.stack([values.argmax(axis=1) for values in mixed], axis=1)
    rows = np.flatnonzero(classes[:, 0] != classes[:, 1])
    assert len(rows)
    np.testing.assert_array_equal(changes.ids, given.ids[rows])
    np.testing.assert_array_equal(changes.labels, given.labels[rows])
    np.testing.assert_array_equal(changes.predictions, classes[rows])
    for column, values in enumerate(mixed):
        ordered = np.sort(values[rows], axis=1)
        expected = (ordered[:, -1] - ordered[:, -2]).astype(np.float32)
        np.testing.assert_array_equal(changes.margins[:, column], expected)


def test_recipes_of_others_are_refused(bank):
    first, _ = pair(bank)
    with pytest.raises(ValueError, match="No ingredient 'other'"):
        bank.compare(first, hf_radin.Recipe(("other",), (1.0,)))
    with pytest.raises(ValueError, match=r"Recipes have the shape \(recipes, 5\)"):
        bank.compare(np.array([0.5, 0.5]), first)


def test_what_is_more_or_less_than_a_recipe_is_refused(bank):
    """Of several rows one would pass for all."""
    first, _ = pair(bank)
    for other in (np.eye(5), bank.ingredients.ids[0], first.used, None, hf_radin.best_single(bank)):
        with pytest.raises(ValueError, match=r"compare takes two recipes.*soup_changes\(bank, soup\)"):
            bank.compare(first, other)
