"""A start on the Hub is downloaded once where it is named, and not where nobody named it."""

import pytest
from shared.pushed import contents
from shared.starts import backbone

import hf_radin
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.recipes.recipe import Pull, Recipe
from hf_radin.weights.average import average_model
from hf_radin.weights.start import find_start, named_start

__all__ = ["backbone"]  # fixtures

CARD = "---\nbase_model: org/base\n---\n"


@pytest.fixture
def named(hub, two, backbone) -> hf_radin.Ingredients:
    """Two fine-tunes on this machine whose cards name a base model that is on the Hub."""
    hub.add_repo("org/base", contents(backbone))
    for run in two.iterdir():
        (run / "README.md").write_text(CARD)
    return hf_radin.gather(f"{two}/*")


def asked(hub) -> list[str]:
    return [request.path for request in hub.requests if "org/base" in request.path]


def test_what_nobody_asked_for_is_named_and_not_downloaded(hub, named):
    assert named_start(named) == "org/base" and not asked(hub)


def test_what_is_cached_is_a_start_without_asking_the_hub(hub, named, go_offline):
    online = find_start("org/base", named)
    before = len(asked(hub))
    assert online.repo_id == "org/base" and online.revision == hub.commits("org/base")[0].sha
    recipe = Recipe(named.ids, (0.5, 0.5), Pull("org/base", 0.3))
    average_model(Ingredients(named, start=online), recipe)
    assert len(asked(hub)) == before
    go_offline()
    assert find_start("org/base", named) == online and len(asked(hub)) == before


def test_a_start_at_a_revision_stays_what_it_was(hub, named, backbone, start):
    first = hub.commits("org/base")[0].sha
    hub.add_commit("org/base", contents(start))
    pinned = find_start(f"org/base@{first}", named)
    assert (pinned.id, pinned.revision) == (f"org/base@{first}", first)
    with pytest.raises(ValueError, match="org/base has no revision 'v9'"):
        find_start("org/base@v9", named)
    with pytest.raises(ValueError, match="no such model on the Hub"):
        find_start("org/nowhere", named)
