"""Soups are pulled to a start step by step, as long as what is measured of them says that it helps."""

from collections.abc import Callable
from itertools import islice

from hf_radin.recipes.recipe import Measurement, Pull, Recipe, Teacher
from hf_radin.search.guide import PARTS, PATIENCE, PULLED, PulledSoups, with_heads
from hf_radin.search.race import Entry

SINGLES = [Measurement(Recipe.uniform([name]), "single", 0.5, 0.5, 10) for name in "abc"]


def entry(*names: str) -> Entry:
    return Entry(Recipe.uniform(names), "own", 0.6)


def run(entries: list[Entry], reaches: Callable[[Recipe], float], *, most: int = 100) -> list[Entry]:
    """The candidates that come when each reaches what it does."""
    soups, seen = PulledSoups(entries, "start", SINGLES), []
    for candidate in soups:
        seen.append(candidate)
        recipe = candidate.recipe
        soups.hear(Measurement(recipe, candidate.proposal, candidate.estimate, reaches(recipe), 10))
        if len(seen) == most:
            break
    return seen


def shares(entries: list[Entry], soup: Recipe) -> list[float]:
    return [each.recipe.pull.share for each in entries if each.recipe.pull and each.recipe.ensemble == soup]


def by_share(best: float) -> Callable[[Recipe], float]:
    """What soups reach, of which those of two are best, most of all at one share of the start."""

    def reaches(recipe: Recipe) -> float:
        share = recipe.pull.share if recipe.pull else 0.0
        return 0.5 + 0.1 * (len(recipe.used) == 2) - 0.1 * (share - best) ** 2

    return reaches


def test_the_best_soup_so_far_is_pulled_after_each_candidate():
    pair, triple = entry("a", "b"), entry("a", "b", "c")
    seen = run([triple, pair, triple], by_share(0.2), most=6)
    assert [each.proposal for each in seen] == ["own", "wise-ft"] * 3
    assert seen[1].recipe.ensemble in [single.recipe for single in SINGLES] + [triple.recipe]
    assert seen[3].recipe == Recipe(pair.recipe.ingredients, pair.recipe.weights, Pull("start", 0.1))
    assert seen[5].recipe.pull == Pull("start", 0.2) and seen[5].estimate == 0.6


def test_it_is_pulled_as_long_as_that_helps():
    pair = entry("a", "b")
    for best, last in ((0.0, PATIENCE), (0.3, 3 + PATIENCE), (1.0, PARTS - 1)):
        expected = [step / PARTS for step in range(1, last + 1)]
        assert shares(run([pair] * 20, by_share(best)), pair.recipe) == expected


def test_in_the_end_the_next_best_are_pulled_too_and_nothing_twice():
    pairs = [entry(*names) for names in ("ab", "ac", "bc", "abc")]
    seen = [each.recipe for each in run(pairs, by_share(0.0)) if each.recipe.pull]
    assert len({*seen}) == len(seen) == PULLED * PATIENCE
    assert run([], by_share(0.0))[0].recipe.is_same(Recipe(("a",), (1.0,), Pull("start", 0.1)))


def test_a_users_share_is_no_step():
    soups = PulledSoups([entry("a", "b")], "start", SINGLES)
    mine = Recipe(("a", "b"), (0.5, 0.5), Pull("start", 0.85))
    soups.hear(Measurement(mine, "own", 0.5, 0.99, 10))
    soups.hear(Measurement(mine.ensemble, "own", 0.5, 0.9, 10))
    first, second = islice(soups, 2)
    assert first.recipe.pull is None and second.recipe.pull == Pull("start", 0.1)


def test_a_pulled_soup_has_the_heads_of_others_and_its_ensemble_knows_no_start():
    everything = Recipe.uniform("abc")
    soups = PulledSoups([], "start", SINGLES, lambda candidate: with_heads(candidate, everything))
    first = next(iter(soups))
    teachers = (None, Teacher(first.recipe.ensemble), Teacher(everything), Teacher(everything, labels=True))
    assert first.recipe.pull and first.teachers == teachers
