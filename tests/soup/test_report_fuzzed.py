"""Whatever a `recipe.json` holds, it is a report or refused in a line."""

import json

from hypothesis import given, settings
from shared.fuzzing import RECIPE, SETTINGS, cases, files, outcome

from hf_radin.soup.report import SearchReport


def read(path) -> None:
    """Read a report and what is said of it, and write it again."""
    report = SearchReport.read(path, is_saved=True)
    assert SearchReport.from_fields(json.loads(report.text)).recipe == report.recipe


@settings(SETTINGS, max_examples=300)
@given(content=files("recipe"))
def test_a_recipe_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    path.write_bytes(content)
    outcome(lambda: read(path))


def test_some_are_read(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    assert not outcome(lambda: read(path))
    refused = 0
    for _, content in cases("recipe", 0, 200):
        path.write_bytes(content)
        refused += bool(outcome(lambda: read(path)))
    assert 50 < refused < 200
