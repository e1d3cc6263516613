"""A search spends no more than greedy does unless the user says so, and returns nothing unmeasured unasked."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shared.logs import warned

import hf_radin
from hf_radin.cli.main import main
from hf_radin.cli.tables import soup_table
from hf_radin.recipes.propose import usual_passes
from hf_radin.soup.card import render


def test_by_default_a_search_takes_no_more_passes_than_greedy_and_eight_at_most():
    assert [usual_passes(count) for count in (1, 2, 3, 6, 9, 10, 72)] == [1, 1, 2, 5, 8, 8, 8]


def selected(bank, count: int) -> hf_radin.LogitBank:
    return replace(bank, ingredients=bank.ingredients.select(bank.ingredients.ids[:count]))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_default_is_spent_and_said(bank, caplog, count):
    caplog.set_level(logging.INFO, logger="hf_radin")
    fewer, passes = selected(bank, count), max(1, count - 1)
    report = hf_radin.radin(fewer, measure="full", proposals="monte-carlo", head="average").report
    baseline = sum(entry.passes for entry in report.soups if entry.proposal == "uniform")
    assert report.budget == str(passes) and report.passes.soups - baseline <= passes
    if count > 2:  # of fewer ingredients there is no candidate but the uniform soup
        assert report.passes.soups - baseline == passes == hf_radin.greedy(fewer).report.passes.soups
        assert "5 ingredients: greedy measures 4 soups; this search takes at most 4 passes" in caplog.text
    if count == 2:
        assert "2 ingredients: greedy measures 1 soup; this search takes at most 1 pass," in caplog.text


def test_a_budget_that_is_named_is_kept_without_a_word(bank, caplog):
    caplog.set_level(logging.INFO, logger="hf_radin")
    assert hf_radin.radin(bank, budget=8, measure="full").report.budget == "8"
    assert "greedy" not in caplog.text


def test_an_estimate_of_costs_has_the_same_default(runs, digits, tmp_path):
    job = hf_radin.estimate(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    assert job.budget == usual_passes(3) == 2 and job.soups == 3


def test_with_nothing_measured_the_best_single_model_is_returned(unsearched, tmp_path, caplog, predictions):
    bank = unsearched
    soup, insisted = hf_radin.radin(bank, budget=0), hf_radin.radin(bank, budget=0, unmeasured=True)
    assert soup.recipe == hf_radin.best_single(bank).recipe and not soup.report.soups and not predictions
    best = bank.score(np.eye(5)).max()
    (line,) = [line for line in warned(caplog) if "budget of 0" in line]
    assert f"is returned: {soup.recipe.ingredients[0]}, whose accuracy is {best:.2%}" in line
    assert f"The best estimate of a soup is {insisted.measurements[-1].estimate:.2%}" in line
    assert len(insisted.recipe.used) > 1 and insisted.report.measured is False
    soup.save_pretrained(tmp_path / "soup")
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "No soup was measured, so this is the best single model" in card and "Estimated, not measured" not in card


@pytest.mark.parametrize("unmeasured", [False, True])
def test_soups_that_were_measured_before_predict_the_others(bank, unsearched, predictions, unmeasured):
    searched = hf_radin.radin(unsearched, budget=2, head="average")
    longer = hf_radin.radin(bank, budget=4, head="average")
    predictions.clear()
    soup = hf_radin.radin(unsearched, budget=0, unmeasured=unmeasured)
    assert not predictions and not soup.report.passes.soups
    *known, new = soup.report.soups
    before = {entry.recipe: (entry.measured, entry.images) for entry in searched.report.soups}
    assert {entry.recipe: (entry.measured, entry.images) for entry in known} == before
    assert new.measured is None and new.recipe == longer.report.soups[len(searched.report.soups)].recipe
    assert new.known == new.predicted != new.estimate
    whole = [entry for entry in known if entry.images == 600]
    best = max([*soup.report.singles, *whole, new], key=lambda entry: entry.known)
    assert soup.recipe == best.recipe and soup.report.measured == (best is not new)


def test_predicted_is_said_and_by_how_much_estimates_missed(unsearched):
    hf_radin.uniform(unsearched)  # of this soup alone it is known which images it gets right, and no logits
    assert not hf_radin.radin(unsearched, budget=0).report.soups
    hf_radin.radin(unsearched, budget=1, head="average")
    soup = hf_radin.radin(unsearched, budget=0)
    measured = [entry for entry in soup.report.soups if entry.measured is not None]
    off = f"{100 * soup.report.estimate_error:.2f} points in the median"
    chosen = replace(soup.report, recipe=soup.report.soups[-1].recipe, measured=False)
    printed, card = soup_table(hf_radin.Soup(chosen, soup.ingredients)), " ".join(render(chosen).split())
    predicted = f"{100 * chosen.soups[-1].predicted:.2f}%"
    assert f"Predicted by soups that were measured before, not measured: {predicted} on validation." in printed
    assert f"Estimates of soups were off by {off}" in printed
    assert re.search(rf"Of {len(measured)} soups? that w\w+ measured before, such estimates were off by {off}; ", card)
    assert f"; corrected by these, that of this soup is {predicted}." in card


@pytest.mark.parametrize("budget", [{}, {"budget": 2}, {"budget": "15m"}])
def test_unmeasured_says_nothing_where_soups_are_measured(bank, budget, predictions):
    with pytest.raises(ValueError, match="unmeasured=True: soups are measured with a budget of"):
        hf_radin.radin(bank, unmeasured=True, **budget)
    assert not predictions


@pytest.mark.parametrize("options", [[], ["--budget", "2"], ["--budget", "15m"], ["--method", "greedy"]])
def test_the_option_is_refused_before_a_model_is_looked_at(options, tmp_path, capsys):
    command = ["soup", "--models", "nowhere", "--output", str(tmp_path / "soup"), "--unmeasured"]
    assert main([*command, *options]) == 2
    assert "--unmeasured: soups are measured with a budget above 0; it goes with --budget 0" in capsys.readouterr().err


def test_the_options_are_those_of_the_function(bank, digits, tmp_path):
    bank = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=tmp_path / "cache")
    command = ["search", str(bank.folder), "--budget", "0", "--output"]
    assert main([*command, str(tmp_path / "single")]) == 0
    assert main([*command, str(tmp_path / "soup"), "--unmeasured"]) == 0
    single, soup = (hf_radin.Soup.from_pretrained(Path(tmp_path / name)) for name in ("single", "soup"))
    assert single.report.is_single and soup.recipe == hf_radin.radin(bank, budget=0, unmeasured=True).recipe
