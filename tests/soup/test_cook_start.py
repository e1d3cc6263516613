"""A soup that is pulled to a start says so, and cooks again to the last bit from the same start."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from shared.logs import warned
from shared.pushed import contents, quick
from shared.starts import astray, astray_bank, backbone, save_backbone, with_start

import hf_radin
from hf_radin.cli.main import main
from hf_radin.ingredients.card_metadata import describe_start
from hf_radin.layers.taught import refit_head
from hf_radin.recipes.recipe import Pull, Recipe, Teacher
from hf_radin.soup import card, redact
from hf_radin.soup.report import SearchReport
from hf_radin.soup.soup import Soup

__all__ = ["astray", "astray_bank", "backbone", "quick"]  # fixtures


def pulled_soup(bank: hf_radin.LogitBank, start: str, *, share: float = 0.3, budget: int = 1, **options) -> Soup:
    """The soup of all, pulled to a start, as a search returns it."""
    mine = replace(Recipe.uniform(bank.ingredients.ids), pull=Pull(start, share))
    options = {"recipes": [mine], "proposals": "wise-ft", "start": start, "head": "average", **options}
    soup = hf_radin.radin(bank, budget=budget, **options)
    assert soup.recipe.is_same(mine)
    return soup


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def cook(saved: Path, output: Path, *options: object) -> int:
    return main(["average", "--recipe", str(saved), "--output", str(output), *map(str, options)])


def test_it_is_cooked_again(astray_bank, backbone, tmp_path, caplog):
    pulled_soup(astray_bank, str(backbone)).save_pretrained(tmp_path / "soup")
    caplog.clear()
    assert cook(tmp_path / "soup", tmp_path / "again") == 0 and not warned(caplog)
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")
    before, after = (SearchReport.read(tmp_path / name / "recipe.json", is_saved=True) for name in ("soup", "again"))
    assert after == before and before.recipe.pull == Pull(str(backbone), 0.3)
    assert before.to_fields()["format_version"] == 3  # earlier readers would leave the start out


def test_a_share_that_nobody_measured_is_cooked_too(astray_bank, backbone, tmp_path):
    pulled_soup(astray_bank, str(backbone)).save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "recipe.json"
    content = json.loads(path.read_text())
    content["recipe"]["pull"]["share"] = 0.35
    path.write_text(json.dumps(content))
    assert cook(path, tmp_path / "again") == 0
    ingredients = with_start(astray_bank.ingredients, backbone)
    recipe = replace(Recipe.uniform(ingredients.ids), pull=Pull(str(backbone), 0.35))
    hf_radin.average(ingredients, recipe, output=tmp_path / "other")
    assert weights(tmp_path / "again") == weights(tmp_path / "other") != weights(tmp_path / "soup")
    assert "Nothing was measured" in (tmp_path / "again" / "README.md").read_text()
    assert cook(tmp_path / "other", tmp_path / "third") == 0
    assert weights(tmp_path / "third") == weights(tmp_path / "other")


def test_with_a_refitted_head_and_with_statistics_of_batchnorm(nets, digits, tmp_path, caplog):
    ingredients = with_start(hf_radin.gather(f"{nets}/ft-*"), nets / "start")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache", batchnorm_images=128)
    everything = Recipe.uniform(ingredients.ids)
    recipe = replace(everything, pull=Pull(ingredients.start.id, 0.3))
    cooked = refit_head(bank, recipe, Teacher(everything))
    start = describe_start(ingredients, recipe)
    report = replace(hf_radin.uniform(bank).report, recipe=recipe, pulled_to=start, measurements=())
    averaged = Soup(report, bank.ingredients, statistics=bank.statistics)
    averaged.save_pretrained(tmp_path / "averaged")
    refitted = Soup(
        replace(report, head=cooked.record), bank.ingredients, statistics=bank.statistics, head=cooked.head
    )
    refitted.save_pretrained(tmp_path / "soup")
    caplog.clear()
    for name in ("soup", "averaged"):
        assert cook(tmp_path / name, tmp_path / f"{name}-again", "--cache-dir", tmp_path / "second") == 0
        assert weights(tmp_path / f"{name}-again") == weights(tmp_path / name) and not warned(caplog)
    assert weights(tmp_path / "soup") != weights(tmp_path / "averaged")


def test_a_start_that_moved_is_named_and_another_one_is_refused(astray_bank, start, tmp_path, capsys):
    folder = save_backbone(start, tmp_path / "start")
    pulled_soup(astray_bank, str(folder)).save_pretrained(tmp_path / "soup")
    shutil.move(folder, tmp_path / "moved")
    assert cook(tmp_path / "soup", tmp_path / "again") == 2
    assert f"no folder '{folder}' here, to which the soup of" in capsys.readouterr().err
    assert cook(tmp_path / "soup", tmp_path / "again", "--start", tmp_path / "moved") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")
    save_backbone(start, folder, noise=0.1)
    capsys.readouterr()
    assert cook(tmp_path / "soup", tmp_path / "third") == 2
    assert "is not the start that the recipe was made with: it has the revision sha256:" in capsys.readouterr().err
    assert cook(tmp_path / "soup", tmp_path / "moved", "--start", tmp_path / "moved", "--overwrite") == 2
    assert "which would be lost" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["recipe"]["pull"].update(share=1.0), "is 1.0; it is above 0 and below 1"),
        (lambda content: content["recipe"]["pull"].update(start="other"), "pulled to 'other', and its 'pulled_to' is"),
        (lambda content: content.pop("pulled_to"), "and its 'pulled_to' is None"),
        (lambda content: content["recipe"].pop("pull"), "it is pulled to None, and its 'pulled_to' is"),
        (lambda content: content["pulled_to"].update(subfolder="../x"), "outside of its repository"),
    ],
)
def test_a_recipe_that_says_nonsense_of_its_start_is_refused(astray_bank, backbone, tmp_path, change, message):
    pulled_soup(astray_bank, str(backbone)).save_recipe(tmp_path / "recipe.json")
    content = json.loads((tmp_path / "recipe.json").read_text())
    change(content)
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        SearchReport.read(tmp_path / "recipe.json")


def test_a_soup_without_a_start_says_nothing_of_one(bank, tmp_path, capsys):
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    text = (tmp_path / "soup" / "recipe.json").read_text()
    assert json.loads(text)["format_version"] == 2
    assert "pull" not in text and "WiSE-FT" not in (tmp_path / "soup" / "README.md").read_text()
    assert cook(tmp_path / "soup", tmp_path / "again", "--start", tmp_path) == 2
    assert "is pulled to no start" in capsys.readouterr().err


def test_the_card_says_whose_weights_are_in_it(astray_bank, backbone):
    report = pulled_soup(astray_bank, str(backbone)).report
    text = re.sub(r"\s+", " ", card.render(report))
    assert "# Model soup of 3 checkpoints" in text and "own, 30% start (**this one**) |" in text
    named, revision = "/".join(backbone.parts[-2:]), report.pulled_to.revision[:19]
    assert "All else is 70% of their sum and 30% of a start that is no ingredient" in text
    assert f"{named}, revision `{revision}`." in text.replace("\\", "") and str(backbone) not in text
    alone = replace(report, recipe=replace(Recipe.uniform(report.recipe.ingredients[:1]), pull=report.recipe.pull))
    assert alone.is_average and "# Model soup of a checkpoint and its start" in card.render(alone)


def test_a_search_that_used_no_start_does_not_tell_where_it_is(bank, backbone):
    soup = hf_radin.radin(bank, budget=1, proposals="wise-ft", start=str(backbone))
    report = replace(soup.report, recipe=Recipe.uniform(bank.ingredients.ids), pulled_to=None)
    assert report.start == str(backbone)
    assert str(backbone.parent) not in redact.without_paths(report).text


@pytest.fixture
def on_the_hub(hub, astray, backbone, digits, tmp_path):
    """A soup of checkpoints on the Hub, pulled to one on the Hub that is private."""
    for name in ("ft-0", "ft-1", "ft-2"):
        files = {**contents(astray / name), "README.md": b"---\nlicense: mit\n---\n"}
        hub.add_repo(f"org/{name}", files)
    hub.add_repo("org/base", {**contents(backbone), "README.md": b"---\nlicense: apache-2.0\n---\n"}, private=True)
    bank = hf_radin.compute_logits(hf_radin.gather("org/ft-*"), digits, cache_dir=tmp_path / "cache")
    return pulled_soup(bank, "org/base@main")


def test_a_start_on_the_hub_is_a_parent_and_found_again(hub, on_the_hub, tmp_path, caplog):
    report = on_the_hub.report
    assert (report.pulled_to.repo_id, report.recipe.pull.start) == ("org/base", "org/base@main")
    assert len(report.pulled_to.revision) == 40
    data = ModelCard(card.render(report)).data
    assert data.base_model == ["org/ft-0", "org/ft-1", "org/ft-2", "org/base"]
    assert data.to_dict()["base_model_relation"] == "merge" and data.license is None
    on_the_hub.save_pretrained(tmp_path / "soup")
    hub.add_repo("org/other", contents(tmp_path / "soup"))
    assert cook(tmp_path / "soup", tmp_path / "again") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "soup")
    caplog.clear()
    on_the_hub.push_to_hub("org/soup")
    assert "org/base" in caplog.text
    pushed = Soup.from_pretrained("org/soup")
    assert pushed.recipe == on_the_hub.recipe


def test_a_private_start_is_hidden_where_that_is_asked(hub, on_the_hub):
    on_the_hub.push_to_hub("org/soup", hide_private=True)
    for name, content in hub.files("org/soup").items():
        assert b"org/base" not in bytes(content), name
    report = Soup.from_pretrained("org/soup").report
    assert (report.pulled_to.revision, report.pulled_to.repo_id) == ("hidden", None)
    assert report.pulled_to.id == report.recipe.pull.start != "org/base@main"
    assert "nobody can make it again" in bytes(hub.files("org/soup")["README.md"]).decode()


@pytest.mark.parametrize("is_saved", [False, True])
def test_its_last_layers_are_distilled_and_cooked_again(astray_bank, backbone, tmp_path, is_saved):
    soup = pulled_soup(astray_bank, str(backbone))
    soup.save_pretrained(tmp_path / "soup")
    before = Soup.from_pretrained(tmp_path / "soup") if is_saved else soup
    best = max(soup.report.singles, key=lambda entry: entry.known).recipe  # all together know next to nothing
    distilled = hf_radin.distill(astray_bank, before, teacher=best)
    assert distilled.report.is_distilled and distilled.recipe.pull == Pull(str(backbone), 0.3)
    distilled.save_pretrained(tmp_path / "distilled")
    assert cook(tmp_path / "distilled", tmp_path / "again", "--cache-dir", tmp_path / "cache") == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "distilled")
