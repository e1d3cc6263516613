"""Soups that were measured say which is worth measuring next."""

import re

import numpy as np
import pytest
import torch

import hf_radin
from hf_radin.logits.preflight import load_inner_products
from hf_radin.recipes.gaps import Gaps
from hf_radin.recipes.propose import propose, subsets
from hf_radin.search.guide import Guide
from hf_radin.search.measure import measured_soup


@pytest.fixture(scope="module")
def products(bank):
    return load_inner_products(bank.ingredients, bank.home, torch.float32, bank.processes)


def shown_all(bank, recipe):
    soup = measured_soup(bank, recipe, bank.pruned())
    soup.look(np.ones(len(bank), dtype=bool))
    return soup


def test_one_soup_brings_predictions_nearer_to_what_is_measured(bank, products):
    rows = subsets(5).weights[5:]  # of two and more
    truth = np.array([shown_all(bank, bank.recipe(row)).values for row in rows])  # (recipes, entries)
    gaps = Gaps.none(products, bank.pruned())
    errors = []
    for row, values in [(None, None), (rows[-1], truth[-1]), (rows[3], truth[3])]:
        gaps = gaps if row is None else gaps.learn(row, values)
        errors.append(((gaps.sums(rows) @ gaps.pruned.logits - truth) ** 2).mean())
    assert errors[2] < errors[1] < 0.5 * errors[0]


def test_before_a_soup_was_measured_the_best_estimate_comes_first(bank, products):
    candidates = propose(5)
    entry = next(iter(Guide(bank, candidates, products, local=False)))
    soups = [row for row in candidates.weights if 1 < np.count_nonzero(row) < 5]
    assert entry.estimate == entry.predicted == bank.score(soups).max()


def test_each_candidate_comes_once_and_no_single_model(bank, products):
    entries = list(Guide(bank, propose(5), products, local=True))
    assert len(entries) == len({entry.recipe for entry in entries}) == 2**5 - 1 - 5 - 1
    assert all(1 < len(entry.recipe.used) < 5 for entry in entries)


def test_neighbours_of_the_best_are_found_from_a_few(bank, products):
    """From the single models and all of them, by steps of one ingredient, to the best of all subsets."""
    candidates = propose(5, proposals="monte-carlo", count=1)
    assert len(candidates.weights) == 7
    entry = next(iter(Guide(bank, candidates, products, local=True)))
    rows = subsets(5).weights
    rows = rows[(rows > 0).sum(axis=1) > 1]
    assert entry.estimate == pytest.approx(bank.score(rows).max()) and entry.proposal == "local"


def test_near_copies_come_last(bank, products):
    rows = [[0.5, 0.5, 0, 0, 0], [0.505, 0.495, 0, 0, 0], [0.6, 0.4, 0, 0, 0]]
    candidates = propose(5, proposals="monte-carlo", count=1).first(5)
    candidates += type(candidates)(np.array(rows), ("own",) * 3)
    offered = [tuple(entry.recipe.used.values()) for entry in Guide(bank, candidates, products, local=False)]
    assert len(offered) == 3 and offered[2] in ((0.5, 0.5), (0.505, 0.495)) and (0.6, 0.4) in offered[:2]


def test_samples_of_weights_that_are_gone_are_taken_anew(bank, products):
    samples = list((bank.home / "weights").glob("*.npz"))
    assert samples
    for path in samples:
        path.unlink()
    again = load_inner_products(bank.ingredients, bank.home, torch.float32, bank.processes)
    assert (again == products).all() and any(path.exists() for path in samples)


def test_logits_of_soups_that_are_gone_are_computed_anew(bank):
    soups = bank.folder / "soups"
    for path in soups.glob("*"):
        path.unlink()
    options = {"budget": 3, "seed": 4, "head": "average"}
    before = hf_radin.radin(bank, **options)
    values = list(soups.glob("*-*.npz"))
    assert len(values) == sum(measurement.proposal != "single" for measurement in before.measurements) > 0
    for path in values:
        path.unlink()
    assert hf_radin.radin(bank, **options).measurements == before.measurements
    assert all(path.exists() for path in values)


def test_a_search_says_what_was_predicted(bank, caplog):
    with caplog.at_level("INFO", logger="hf_radin"):
        hf_radin.radin(bank, budget=3)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Soup of")]
    assert (
        len(lines) > 2
        and "predicted" not in lines[0]
        and all(re.search(r", predicted \d+\.\d\d%,", line) for line in lines[1:])
    )


def test_each_recipe_is_predicted_once_until_a_soup_says_more(bank, products, monkeypatch):
    predicted: list[bytes] = []
    score = bank.processes.score

    def counting(of, rows):
        predicted.extend(row.tobytes() for row in rows)
        return score(of, rows)

    monkeypatch.setattr(bank.processes, "score", counting)
    guide = Guide(bank, propose(5), products, local=True)
    entries = iter(guide)
    first = next(entries)
    next(entries)
    assert len(predicted) == len(set(predicted)) >= len(propose(5).weights)
    before = len(predicted)
    guide.learn(first.recipe, shown_all(bank, first.recipe).values)
    next(entries)
    assert len(predicted) == before + len(set(predicted))
