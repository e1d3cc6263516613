"""The card says what was measured and nothing else, whatever the names in it, and has pictures."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from PIL import Image
from pymarkdown.api import PyMarkdownApi
from shared.logs import warned
from shared.soups import saved, soup

import hf_radin
from hf_radin.cli.main import main
from hf_radin.ingredients.card_metadata import card_origin, is_path
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.hub_commit import hub_address
from hf_radin.search.race import Budget
from hf_radin.soup import card, card_sentences, pictures
from hf_radin.soup.report import ClassHits, Overlap, SearchReport

__all__ = ["saved", "soup"]  # fixtures


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d\d)[%\u2013]", text)]


def as_read(soup: hf_radin.Soup) -> SearchReport:
    """The report of a soup that was saved and read."""
    return SearchReport.from_fields(soup.to_dict())


def render(fields: dict, **options) -> str:
    """The card of what `recipe.json` says."""
    return card.render(SearchReport.from_fields(fields), **options)


def with_base_model(report: SearchReport, name: str, repo_id: str | None) -> SearchReport:
    """A report all of whose ingredients name a base model."""
    entries = (replace(entry, base_model=name, base_model_repo_id=repo_id) for entry in report.ingredients)
    return replace(report, ingredients=tuple(entries))


def test_the_card_says_what_was_measured(saved, soup):
    card = ModelCard.load(saved / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert {"model-soup", "merge", "hf-radin"} <= set(data["tags"]) and "license" not in data
    results = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results == {(split, "accuracy"): soup.accuracy("soup", split) for split in ("validation", "test")}
    for result in soup.results:
        assert f"{100 * result.metrics['accuracy']:.2f}%" in card.text
    true = {round(100 * value, 2) for entry in soup.measurements for value in (entry.estimate, entry.measured)}
    true |= {round(100 * entry.predicted, 2) for entry in soup.measurements if entry.predicted is not None}
    true |= {round(100 * result.metrics["accuracy"], 2) for result in soup.results}
    true |= {round(100 * end, 2) for entry in (*soup.measurements, *soup.results) for end in entry.interval}
    assert set(numbers(card.text)) <= true, "the card holds a number that nobody measured"


def test_tables_of_the_card_are_whole(saved):
    lines = (saved / "README.md").read_text().splitlines()
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"\|[-:| ]+\|", line)]
    assert len(rules) == 5  # results, recipe, costs, soups and single models
    for number in rules:
        assert lines[number - 1].count("|") == lines[number].count("|")
        assert lines[number + 1].startswith("|"), "a table without a row"
        assert lines[number - 2] == "", "a table needs an empty line before it"


def test_the_card_names_a_licence_only_if_all_have_it(soup, caplog):
    report = as_read(soup)
    assert "license:" not in card.render(report) and not warned(caplog)
    report = replace(report, ingredients=tuple(replace(entry, license="mit") for entry in report.ingredients))
    assert "license: mit" in card.render(report)
    first = soup.recipe.ingredients[0]
    entries = tuple(replace(entry, license=None) if entry.id == first else entry for entry in report.ingredients)
    report = replace(report, ingredients=entries)
    assert "license:" not in card.render(report) and "the ingredients don't agree" in caplog.text
    assert "license: apache-2.0" in card.render(report, license="apache-2.0")


HOSTILE = "a|b`c`](javascript:alert(1))<script>\n## heading\u202e*x*"


def test_names_from_outside_stay_names(soup):
    fields = json.loads(
        json.dumps(soup.to_dict()).replace(json.dumps(soup.recipe.ingredients[0]), json.dumps(HOSTILE))
    )
    fields["data"]["name"] = HOSTILE
    text = render(fields)
    body = text.split("---\n", 2)[2]
    assert "<script" not in body and "\n## heading" not in body and "\u202e" not in body
    assert not re.search(r"(?<!\\)\]\(javascript", body)
    assert "a\\|b" in body
    assert ModelCard(text).data.eval_results[0].dataset_name  # and the YAML is still YAML


def test_the_card_says_what_the_method_did(bank):
    single, uniform = (card.render(as_read(find(bank))) for find in (hf_radin.best_single, hf_radin.uniform))
    assert "this is that model" not in single and "# Best single model of 5" in single
    assert "model-soup" not in single and "model-soup" in uniform
    assert "Nothing was chosen" in uniform


def test_the_card_is_made_anew_and_the_users_words_stay(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "soup")
    path = tmp_path / "soup" / "README.md"
    first, last = card.MARKS
    before = path.read_text()
    mine = "\nNot for medical use: `a|b`.\n\n## My heading\n"
    path.write_text(before.replace(f"{first}\n{last}", f"{first}{mine}{last}").replace("# Model soup of", "# Edited"))
    assert main(["card", str(tmp_path / "soup"), "--license", "mit"]) == 0
    text = path.read_text()
    assert f"{first}{mine}{last}" in text and "# Edited" not in text and "license: mit" in text
    assert main(["card", str(tmp_path / "soup")]) == 0 and path.read_text() == text  # the licence stays, too
    path.unlink()
    assert main(["card", str(tmp_path / "soup")]) == 0 and path.read_text() == before
    path.write_text(before.replace(last, "").replace(first, ""))
    assert main(["card", str(tmp_path / "soup")]) == 2 and "has no lines" in capsys.readouterr().err
    path.write_text(before.replace(last, ""))
    assert main(["card", str(tmp_path / "soup")]) == 2
    assert "has lost one of its marked lines" in capsys.readouterr().err
    fields = json.loads((tmp_path / "soup" / "recipe.json").read_text())
    del fields["results"]
    (tmp_path / "soup" / "recipe.json").write_text(json.dumps(fields))
    assert main(["card", str(tmp_path / "soup")]) == 2
    assert "soup/recipe.json is not a complete recipe: it does not say 'results'." in capsys.readouterr().err


def test_the_card_says_what_ingredients_were_trained_with(two, digits, cache, tmp_path):
    trial = {"learning_rate": 0.1 + 0.2, "seed": 1, "nested": {"no": 1}}
    (two / "ft-0" / "trainer_state.json").write_text(json.dumps({"trial_params": trial}))
    (two / "ft-1" / "trainer_state.json").write_text(json.dumps({"trial_params": None}))  # of no sweep
    listed = "# ft-1\n\n### Training hyperparameters\n\n- learning_rate: 0.3\n- seed: 2|`3`\n\n### Results\n- no: 1\n"
    (two / "ft-1" / "README.md").write_text(f"---\nbase_model: google/vit-base\n---\n{listed}")
    (two / "ft-0" / "README.md").write_text("---\nbase_model: google/vit-base\n---\n# ft-0\n")
    report = uniform_report(two, digits, cache)
    assert [entry.hyperparameters for entry in report.ingredients] == [
        {"learning_rate": "0.3", "seed": "1"},
        {"learning_rate": "0.3", "seed": "2|`3`"},
    ]
    text = card.render(report)
    assert "| ingredient | revision | weight | alone | seed |" in text and "2\\|\\`3\\`" in text
    assert "All were trained with learning\\_rate 0.3, by their own account." in text
    text = card.render(with_base_model(report, *["](javascript:alert(1))"] * 2))
    assert ModelCard(text).data.base_model is None and "\\](javascript" in text and "huggingface.co/](" not in text


@pytest.fixture
def cached(hub):
    """A cache of the Hub in which two models are: one was loaded, of the other it was asked for a file in vain."""
    cache = Path(constants.HF_HUB_CACHE)
    (cache / "models--google--vit-base" / "snapshots" / "0123").mkdir(parents=True)
    (cache / "models--org--asked" / ".no_exist").mkdir(parents=True)


def uniform_report(folder, digits, cache, base_model: str | None = None) -> SearchReport:
    """The report of a uniform soup of a folder's checkpoints, whose cards name a base model."""
    if base_model:
        for name in ("ft-0", "ft-1"):
            (folder / name / "README.md").write_text(f"---\nbase_model: {base_model}\n---\n")
    ingredients = hf_radin.gather(f"{folder}/*")
    return as_read(hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=cache)))


def test_a_base_model_that_was_loaded_from_the_hub_is_linked(cached, two, digits, cache):
    text = card.render(uniform_report(two, digits, cache, "google/vit-base"))
    assert f"name the base model [google/vit-base]({hub_address('google/vit-base')})." in text
    data = ModelCard(text).data
    assert data.base_model == ["google/vit-base"] and data.to_dict()["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    "name", ["start", "start--v2", "org/start", "org/asked", "./start", "runs/2024/start", "~/start"]
)
def test_a_base_model_that_only_looks_like_one_on_the_hub_is_text(cached, two, digits, cache, name):
    """A Trainer writes where its start came from: the name of a folder, most often."""
    report = uniform_report(two, digits, cache, name)
    assert {(entry.base_model, entry.base_model_repo_id) for entry in report.ingredients} == {(name, None)}
    text = card.render(report)
    assert f"name the base model {name}." in text.replace("\\", "")
    data = ModelCard(text).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict() and "huggingface.co" not in text


def test_a_folder_of_that_name_goes_before_the_hub(cached, two, digits, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "vit-base").mkdir(parents=True)
    text = card.render(uniform_report(two, digits, cache, "google/vit-base"))
    assert ModelCard(text).data.base_model is None and "huggingface.co" not in text


def test_a_recipe_of_an_earlier_version_links_what_cards_on_the_hub_name(soup):
    fields = soup.to_dict()
    for entry in fields["ingredients"]:
        entry["base_model"] = "org/start"
        del entry["base_model_repo_id"]
    assert ModelCard(render(fields)).data.base_model is None
    for number, entry in enumerate(fields["ingredients"]):
        entry["repo_id"] = f"org/ft-{number}"
    assert "org/start" in ModelCard(render(fields)).data.base_model


def test_names_in_the_shape_of_ids_are_folders_where_they_are(runs, digits, cache, tmp_path, monkeypatch):
    """Ingredients, an image processor and a dataset in folders that are called as repositories are."""
    monkeypatch.chdir(tmp_path)
    for name in ("ft-0", "ft-1"):
        shutil.copytree(runs / name, tmp_path / "org" / name)
    shutil.copytree(digits, tmp_path / "org" / "data")
    ingredients = hf_radin.gather("org/ft-*", image_processor="org/ft-1")
    assert ingredients.ids == ("org/ft-0", "org/ft-1")
    soup = hf_radin.uniform(hf_radin.compute_logits(ingredients, "org/data", cache_dir=cache), test_split="test")
    text = card.render(as_read(soup))
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None and "huggingface.co" not in text
    assert {(result.dataset_type, result.dataset_name) for result in data.eval_results} == {("./data", "data")}
    assert card_origin(data.to_dict()).dataset == "./data" and is_path("./data")


HOSTILE_NAMES = ["a|b", "`a`", "](javascript:alert(1))", "a\nb\n# c", "&anchor *alias", "x" * 300, "\u202egnp.exe"]
HOSTILE_NAMES += ["<b>", "{{ 1 }}", "- a: [b", "![a](http://a/b.png)", "https://a.b"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_text_wherever_they_stand(soup, name):
    """Read by a parser of Markdown: no link, no markup and no row of a table comes of them."""

    def shape(fields) -> tuple[list, list]:
        tokens = MarkdownIt("commonmark").enable("table").parse(render(fields).split("---\n", 2)[2])
        inline = [part for token in tokens for part in token.children or ()]
        links = [part.attrs["href"] for part in inline if part.type == "link_open"]
        return [token.type for token in tokens], links

    fields = json.loads(json.dumps(soup.to_dict()).replace(json.dumps(soup.recipe.ingredients[0]), json.dumps(name)))
    plain = json.loads(json.dumps(fields).replace(json.dumps(name), json.dumps("plain")))
    fields["data"]["name"] = fields["data"]["split"] = fields["start"] = fields["classes"][0] = name
    fields["remarks"] = [[name, name]]
    plain["remarks"] = [["plain", "plain"]]
    plain["start"] = "plain"
    for hostile, harmless in zip(fields["ingredients"], plain["ingredients"], strict=True):
        hostile["hyperparameters"] = {name: name}
        harmless["hyperparameters"] = {"plain": "plain"}
    assert shape(fields) == shape(plain)
    text = render(fields)
    assert "\u202e" not in text.split("---\n", 2)[2]
    data = ModelCard(text).data
    assert data.pipeline_tag == "image-classification" and data.eval_results


def lint(path: Path) -> list[tuple[int, str]]:
    """But for long lines, which tables have."""
    linter = PyMarkdownApi().enable_extension_by_identifier("front-matter").disable_rule_by_identifier("md013")
    result = linter.scan_path(str(path))
    assert not result.pragma_errors and not result.critical_errors
    return [(failure.line_number, failure.rule_description) for failure in result.scan_failures]


def test_the_linter_sees_what_is_wrong(saved, tmp_path):
    (tmp_path / "README.md").write_text((saved / "README.md").read_text().replace("\n\n## Use", "\n\n\n## Use"))
    assert lint(tmp_path / "README.md")


@pytest.mark.parametrize(
    "find",
    [
        hf_radin.best_single,
        hf_radin.uniform,
        hf_radin.greedy,
        lambda bank, **options: hf_radin.radin(bank, budget=0, unmeasured=True, **options),
        lambda bank, **options: hf_radin.radin(bank, budget=2, measure="full", **options),
    ],
)
@pytest.mark.parametrize("options", [{}, {"test_split": "test"}])
def test_cards_of_all_methods_are_sound(bank, tmp_path, find, options):
    soup = find(bank, **options)
    for name, content in card.card_files(as_read(soup), license="mit").items():
        (tmp_path / name).write_bytes(content)
    text = (tmp_path / "README.md").read_text()
    assert lint(tmp_path / "README.md") == []
    assert {*re.findall(r"\]\((\w+\.png)\)", text)} == {path.name for path in tmp_path.glob("*.png")}
    assert ("| this model |" in text) == (len(soup.recipe.used) == 1) and text.count("(**this one**)") <= 1
    if soup.report.measured and options:
        reached = 100 * soup.accuracy("soup", "test")
        assert re.search(rf"On the split test (the soup's|its) accuracy is {reached:.2f}%", text)


@pytest.mark.parametrize("name", ["digits", "fashion-mnist-resnets", "fashion-mnist-vits", None])
def test_a_linter_of_markdown_has_nothing_to_say(saved, name):
    path = saved if name is None else Path(__file__).parents[2] / "model_cards" / name
    assert lint(path / "README.md") == []


def test_what_others_may_have_written_is_text(soup):
    fields = soup.to_dict()
    evil = "<img src=x onerror=alert(1)> [a](http://evil) www.evil.example"
    for entry in fields["measurements"]:
        entry["proposal"] = evil if entry["proposal"] != "single" else "single"
    fields["results"][1]["name"] = evil
    fields["versions"] = {evil: evil}
    fields |= {"saved_dtype": evil, "dtype": evil, "mixed_precision": evil}
    fields["processor"] |= {"image_processor_type": evil, "backend": evil}
    fields["time"]["devices"] = [evil]
    for entry in fields["ingredients"]:
        entry["repo_id"] = "x) <b>[evil](http://evil"
    text = render(fields)
    assert text.count("onerror") > 5  # it does stand in the card, as text
    assert "<img" not in text and "<b>" not in text and "](http://evil" not in text and "www.evil" not in text
    assert ModelCard(text).data.base_model is None


def test_a_long_table_begins_with_this_soup(soup):
    report = as_read(soup)
    chosen = next(entry for entry in report.soups if report.is_chosen(entry))
    other = replace(chosen, recipe=Recipe.uniform(soup.recipe.ingredients[:1]))
    text = card.render(replace(report, measurements=(*report.singles, *[other] * 20, chosen)))
    assert "This soup, and the best 9 of 20 others that were measured" in text
    rows = text.partition("| proposed by |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) == 10 and "(**this one**)" in rows[0] and text.count("(**this one**)") == 1


def test_a_uniform_soup_stands_once_and_is_counted_once(bank):
    report = as_read(hf_radin.uniform(bank, test_split="test"))
    text = card.render(replace(report, method="radin"))  # which may choose it, too
    assert "| uniform | test |" not in text and "| soup | test |" in text
    assert "| the figures on test, in passes over it | 6 | |" in text


def test_costs_are_in_passes_of_one_size(bank):
    soup = hf_radin.radin(bank, budget=2, hold_out=0.3)
    text = card.render(as_read(soup))
    assert soup.report.passes.logits == pytest.approx(5 * 600 / 420) and "| logits of 5 checkpoints | 7.14 |" in text
    assert "A pass is as many images as chose" in text and "is a random 30% of the split, which" in text


@pytest.mark.parametrize(
    ("budget", "text"), [("2", "was 2 passes"), ("15m", "The budget was 900s."), ("1.5h", "5400s.")]
)
def test_the_budget_has_its_unit(soup, budget, text):
    assert text in card.render(replace(as_read(soup), budget=str(Budget.of(budget))))


def test_a_pilot_alone_gives_estimates(bank, digits, cache):
    pilot = hf_radin.compute_logits(bank.ingredients, digits, cache_dir=cache, pilot=0.25)
    text = card.render(as_read(hf_radin.radin(pilot, budget=0, unmeasured=True)))
    assert re.search(r"\| best single \| validation \| \d+ \| \u2248", text)


def test_recipes_of_the_first_version_have_no_intervals(soup):
    fields = soup.to_dict()
    for entry in (*fields["results"], *fields["measurements"]):
        del entry["interval"]
    text = render(fields)
    assert "\u2013" in render(soup.to_dict()) and "\u2013" not in text
    assert {round(100 * result.metrics["accuracy"], 2) for result in soup.results} <= {*numbers(text)}


def test_a_recipe_that_does_not_say_what_it_took_has_no_costs(soup):
    report = replace(soup.report, passes=None)
    assert card_sentences.spending(report) == "" and card_sentences.costs(report) == []


def test_images_that_chose_and_prove_are_said_beside_the_figure(soup):
    shared = replace(soup.report, overlap=Overlap(497, 120))
    assert "120 of its 497 images chose it too, which flatters it." in card.render(shared)


def test_the_licence_of_a_card_that_can_not_be_read_is_not_known(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "soup")
    (tmp_path / "soup" / "README.md").write_text("---\nlicense: mit\na: [\n---\n# mine\n")
    assert card.license_beside(tmp_path / "soup" / "recipe.json") is None
    (tmp_path / "soup" / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    assert card.license_beside(tmp_path / "soup" / "recipe.json") == "mit"


def test_another_metric_alone(soup):
    report = as_read(soup)
    results = tuple(replace(result, metrics={"f1": result.metrics["accuracy"]}) for result in report.results)
    soup_f1, single_f1 = (f"{100 * soup.accuracy(name, 'test'):.2f}%" for name in ("soup", "best single"))
    text = card.render(replace(report, results=results))
    assert f"the soup's f1 is {soup_f1}, and that of the best single ingredient {single_f1}." in text


EDITS = [
    ({"versions": 3}, "is not a complete recipe: its 'versions' is '3'"),
    ({"pilot": {"a": 1}}, "is not a complete recipe: it does not say 'pilot.share'"),
    ({"time": {"logits": 10**400, "soups": 1, "devices": []}}, "is not a complete recipe: its 'time.logits' is '1000"),
    ({"results": [3]}, "is not a complete recipe: results[0] is '3', not a Result"),
    ({"method": "other"}, "does not say enough for a card (KeyError('other'))"),
    ({"measurements": None}, "is not a complete recipe: it does not say 'measurements'"),
    ({"passes": None}, "does not say enough for a card: it does not say 'passes'"),
]


@pytest.mark.parametrize(("change", "message"), EDITS, ids=lambda value: next(iter(value)) if value else "")
def test_a_recipe_that_somebody_edited_is_told_in_a_line(saved, tmp_path, capsys, change, message):
    shutil.copytree(saved, tmp_path / "soup")
    fields = json.loads((saved / "recipe.json").read_text())
    (tmp_path / "soup" / "recipe.json").write_text(json.dumps({**fields, **change}))
    before = (saved / "README.md").read_bytes()
    assert main(["card", str(tmp_path / "soup")]) == 2
    error = capsys.readouterr().err
    assert f"soup/recipe.json {message}" in error and len(error.splitlines()) == 1
    assert (tmp_path / "soup" / "README.md").read_bytes() == before


def test_a_card_that_is_no_text_is_told(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "soup")
    (tmp_path / "soup" / "README.md").write_bytes(b"\xff")
    assert main(["card", str(tmp_path / "soup")]) == 2 and "README.md can't be read" in capsys.readouterr().err


def test_the_card_has_pictures_of_what_was_measured(saved, soup):
    text = (saved / "README.md").read_text()
    for name in pictures.NAMES:
        with Image.open(saved / name) as image:
            assert image.format == "PNG" and image.size == (960, 660)
            assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)  # on a dark page, too
        assert f"]({name})" in text
    assert pictures.draw(soup.report) == {name: (saved / name).read_bytes() for name in pictures.NAMES}


def test_without_matplotlib_there_are_none(saved, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from hf_radin.cli.main import main; main(sys.argv[1:])"
    command = ["average", "--recipe", str(saved), "--output", str(tmp_path / "soup")]
    subprocess.run([sys.executable, "-c", code, *command], check=True)
    assert not list((tmp_path / "soup").glob("*.png")) and ".png" not in (tmp_path / "soup" / "README.md").read_text()
    assert (tmp_path / "soup" / "recipe.json").read_bytes() == (saved / "recipe.json").read_bytes()


@pytest.mark.parametrize("name", ["$x^", "a" * 300, "\u202e\n", "\\frac{"])
def test_pictures_take_any_name_and_any_number_of_classes(soup, name):
    classes = tuple(f"{name}{number}" for number in range(60))
    hits = ClassHits(split=name, images=(*[10] * 59, 0), soup=(*range(10),) * 6, best_single=(5,) * 60)
    report = replace(soup.report, classes=classes, by_class=hits, data=replace(soup.report.data, split=name))
    assert pictures.draw(report).keys() == {*pictures.NAMES}


def test_where_there_is_nothing_to_see_nothing_is_drawn(bank):
    assert pictures.draw(hf_radin.best_single(bank).report) == {}
    uniform = hf_radin.uniform(bank)
    assert pictures.draw(uniform.report).keys() == {"classes.png"}
    hits = uniform.report.by_class
    assert hits.images == tuple(np.bincount(bank.labels, minlength=10))
    assert sum(hits.soup) / len(bank) == pytest.approx(uniform.accuracy("soup", "validation"))
