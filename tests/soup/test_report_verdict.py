"""The verdict of a search: beyond chance or not, by the split that proves, in the same words wherever it stands."""

from dataclasses import replace

import pytest
from shared.soups import soup

import hf_radin
from hf_radin.cli.tables import soup_table
from hf_radin.recipes.recipe import Recipe
from hf_radin.soup.card import render
from hf_radin.soup.card_sentences import VERDICTS, outcome, verdict_text
from hf_radin.soup.report import Comparison, SearchReport, SoupVerdict

__all__ = ["soup"]  # a fixture

# Of a gain in points, what the images say of it.
BETTER, ALIKE, WORSE = ((0.03, (0.01, 0.05), 0.001), (0.01, (-0.01, 0.03), 0.4), (-0.03, (-0.05, -0.01), 0.001))
KINDS = {"better": BETTER, "alike": ALIKE, "worse": WORSE}


def compared(report: SearchReport, **figures) -> SearchReport:
    """A report of these gains, by split."""
    return replace(report, against_best_single=tuple(Comparison(split, *gain) for split, gain in figures.items()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_the_split_that_proves_decides_and_else_the_split_that_chose(soup, kind, other):
    report = compared(soup.report, validation=KINDS[other], test=KINDS[kind])
    assert report.verdict == SoupVerdict("test", kind, is_proof=True)
    assert report.verdict.is_proven_worse == (kind == "worse")
    report = replace(report, held_out=None)
    assert report.verdict == SoupVerdict("validation", other, is_proof=False)
    assert not report.verdict.is_proven_worse


@pytest.mark.parametrize(
    ("gain", "interval", "p_value"),
    [(0.02, (0.001, 0.04), 0.06), (0.02, (-0.001, 0.04), 0.04), (-0.02, (-0.04, -0.001), 0.06), (0.0, (0, 0), 1.0)],
)
def test_where_interval_and_test_disagree_it_may_be_chance(soup, gain, interval, p_value):
    assert compared(soup.report, test=(gain, interval, p_value)).verdict.kind == "alike"


def test_the_best_single_model_is_neither_better_nor_worse(soup):
    single = replace(soup.report, recipe=Recipe.uniform(soup.recipe.ingredients[:1]), against_best_single=())
    assert single.verdict == SoupVerdict("test", "single", is_proof=True)
    assert verdict_text(single).endswith("so this is that model.") and verdict_text(single) in outcome(single)
    assert verdict_text(replace(single, measurements=tuple(single.singles))).startswith("No soup was measured")
    assert replace(single, method="best_single").verdict is None


def test_of_what_was_not_measured_there_is_none(unsearched):
    bank = unsearched
    report = hf_radin.radin(bank, budget=0, unmeasured=True).report
    assert report.verdict is None and verdict_text(report) == "" and report.estimate_error is None
    assert "Verdict" not in soup_table(hf_radin.best_single(bank))


@pytest.mark.parametrize("held_out", ["test", None])
@pytest.mark.parametrize("kind", KINDS)
def test_card_and_terminal_say_the_same_and_nothing_else(soup, kind, held_out):
    report = replace(compared(soup.report, validation=KINDS[kind], test=KINDS[kind]), held_out=held_out)
    printed, card = soup_table(hf_radin.Soup(report, soup.ingredients)), " ".join(render(report).split())
    sentence = f"This soup is {VERDICTS[kind]}, by the accuracy on the split {report.verdict.split}."
    assert f"Verdict: {sentence}" in printed and f"**{sentence}**" in card
    for text in (printed, card):
        assert not [words for other, words in VERDICTS.items() if other != kind and words in text]
        assert ("That split chose it too, which flatters it." in text) == (held_out is None)
    assert ("which may be chance" in card) == (kind == "alike")


@pytest.mark.parametrize("find", [hf_radin.radin, hf_radin.greedy, hf_radin.uniform])
def test_every_search_ends_with_one(bank, find):
    soup = find(bank)
    assert f"Verdict: {verdict_text(soup.report)}" in soup_table(soup)
    assert soup.report.verdict.split == "validation" and not soup.report.verdict.is_proof


def test_nothing_was_chosen_of_a_uniform_soup_but_what_it_is_compared_with(bank):
    alone, proven = (verdict_text(hf_radin.uniform(bank, test_split=split).report) for split in (None, "test"))
    assert "that split chose the best single model, which flatters the latter" in alone
    assert "flatters" not in proven and proven.endswith(
        "Nothing was chosen: all checkpoints are in it, in equal parts."
    )


def test_by_how_much_estimates_missed_is_said_in_the_median(soup):
    errors = sorted(abs(entry.measured - entry.estimate) for entry in soup.report.soups)
    assert errors[0] <= soup.report.estimate_error <= errors[-1]
    assert f"off by {100 * soup.report.estimate_error:.2f} points in the median" in soup_table(soup)
    three = [replace(soup.report.soups[0], estimate=0.9, measured=measured) for measured in (0.9, 0.6, 0.92)]
    report = replace(soup.report, measurements=(*soup.report.singles, *three))
    assert report.estimate_error == pytest.approx(0.02)
