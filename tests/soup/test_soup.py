"""A saved soup is an ordinary checkpoint, says what it is, and can be cooked again bit for bit."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shared.soups import saved, soup
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_radin
from hf_radin.cli.main import main
from hf_radin.soup.cook import find_ingredients
from hf_radin.soup.report import SearchReport
from hf_radin.soup.soup import Soup

__all__ = ["saved", "soup"]  # fixtures


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_is_an_ordinary_checkpoint(saved, soup):
    code = (
        "import sys; from transformers import AutoModelForImageClassification, pipeline\n"
        "from PIL import Image\n"
        "model, report = AutoModelForImageClassification.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(report.values()), report\n"
        "print(pipeline('image-classification', model=sys.argv[1])(Image.new('L', (8, 8)))[0]['label'])\n"
        "assert 'hf_radin' not in sys.modules"
    )
    label = subprocess.check_output([sys.executable, "-c", code, str(saved)], text=True).strip()
    classify = pipeline("image-classification", model=soup.model, image_processor=soup.processor)
    assert label == classify(Image.new("L", (8, 8)))[0]["label"]


def test_what_is_saved_is_what_was_measured(saved, soup):
    loaded = AutoModelForImageClassification.from_pretrained(saved).state_dict()
    assert loaded.keys() == soup.model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in soup.model.state_dict().items())
    assert AutoImageProcessor.from_pretrained(saved).to_dict() == soup.processor.to_dict()


def test_it_holds_what_it_should_and_nothing_else(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "classes.png",
        "config.json",
        "estimates.png",
        "model.safetensors",
        "passes.png",
        "preprocessor_config.json",
        "recipe.json",
    ]
    assert [path.name for path in saved.parent.iterdir()] == ["soup"]


def test_an_accuracy_that_is_not_there_is_named(soup):
    result = soup.results[0]
    assert soup.accuracy(result.name, result.split) == result.metrics["accuracy"]
    without = Soup(replace(soup.report, results=(replace(result, metrics={}),)), soup.ingredients)
    for known, split in ((soup, "train"), (without, result.split)):
        with pytest.raises(ValueError, match=f"no accuracy of '{result.name}' on '{split}'"):
            known.accuracy(result.name, split)


def test_it_reads_back(saved, soup):
    again = hf_radin.Soup.from_pretrained(saved)
    assert (again.recipe, again.measurements, again.results) == (soup.recipe, soup.measurements, soup.results)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), soup.model.parameters(), strict=True))
    assert replace(again.report, files={}) == replace(soup.report, saved_dtype="float32")


def test_a_soup_that_was_read_can_be_saved(saved, tmp_path):
    hf_radin.Soup.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_a_recipe_read_back_cooks_the_same_bits(saved, tmp_path):
    assert main(["average", "--recipe", str(saved / "recipe.json"), "--output", str(tmp_path / "cooked")]) == 0
    assert (tmp_path / "cooked" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (tmp_path / "cooked" / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def test_even_where_the_ingredients_have_moved(saved, runs, tmp_path, capsys):
    fields = json.loads((saved / "recipe.json").read_text())
    for part in (fields["recipe"], fields["measurements"][0]):
        part["ingredients"] = [name.replace(str(runs), "/gone") for name in part["ingredients"]]
    for entry in fields["ingredients"]:
        entry["id"] = entry["id"].replace(str(runs), "/gone")
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    command = ["average", "--recipe", str(tmp_path / "recipe.json"), "--output", str(tmp_path / "cooked")]
    assert main(command) == 2
    assert "There is no folder '/gone/ft-" in capsys.readouterr().err
    assert main([*command, "--models", f"{runs}/ft-*"]) == 0
    assert load_file(tmp_path / "cooked" / "model.safetensors").keys() == load_file(saved / "model.safetensors").keys()
    assert (tmp_path / "cooked" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_an_ingredient_that_changed_is_not_cooked(saved, runs, two, tmp_path, capsys):
    command = ["average", "--recipe", str(saved / "recipe.json"), "--output", str(tmp_path / "out")]
    (two / "ft-0" / "config.json").write_text((two / "ft-0" / "config.json").read_text().replace("0.0", "0.1"))
    assert main([*command, "--models", str(two / "ft-0")]) == 2
    assert "is not the checkpoint that the recipe was made with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "no json", "[]", "{}", '{"format": 99}', '{"format_version": 99}'])
def test_what_is_no_soup_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match=r"recipe"):
        hf_radin.Soup.from_pretrained(tmp_path)


def test_an_output_folder_that_holds_something_is_refused(soup, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an older checkpoint")
    with pytest.raises(ValueError, match="is not empty"):
        soup.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        soup.save_pretrained(tmp_path / "notes.txt")
    soup.save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()
    assert AutoModelForImageClassification.from_pretrained(tmp_path)


def test_an_ingredient_is_never_written_over(two, digits, cache, capsys):
    ingredients = hf_radin.gather(f"{two}/*")
    before = (two / "ft-0" / "model.safetensors").read_bytes()
    soup = hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=cache))
    with pytest.raises(ValueError, match=r"is the ingredient .*ft-0, which would be lost"):
        soup.save_pretrained(two / "ft-0", overwrite=True)
    with pytest.raises(ValueError, match=r"is the ingredient .*ft-0, which would be lost"):
        hf_radin.average(ingredients, soup.recipe, output=two / "ft-0", overwrite=True)
    options = ["--models", f"{two}/*", "--dataset", str(digits), "--overwrite", "--output", str(two / "ft-0")]
    assert main(["soup", *options]) == 2
    assert "ft-0, which would be lost" in capsys.readouterr().err
    assert (two / "ft-0" / "model.safetensors").read_bytes() == before


def test_an_average_over_a_soup_leaves_no_recipe_of_another(saved, soup, tmp_path):
    soup.save_pretrained(tmp_path / "out")
    hf_radin.average(soup.ingredients, soup.recipe, output=tmp_path / "out", overwrite=True)
    again = hf_radin.Soup.from_pretrained(tmp_path / "out")
    assert again.report.method == "average" and not again.results and not again.measurements
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_recipe_read_back_writes_the_same_card(saved, tmp_path):
    assert main(["average", "--recipe", str(saved / "recipe.json"), "--output", str(tmp_path / "cooked")]) == 0
    assert contents(tmp_path / "cooked") == contents(saved) and (saved / "README.md").exists()


@pytest.mark.parametrize("models", [[], ["--models"]])
def test_weights_saved_in_another_dtype_say_that_the_figures_are_of_others(saved, soup, runs, tmp_path, models):
    places = [*models, f"{runs}/ft-*"] if models else []

    def cook(source, output, *options):
        command = ["average", "--recipe", str(source / "recipe.json"), "--output", str(output), *options, *places]
        assert main(command) == 0
        return json.loads((output / "recipe.json").read_text()), (output / "README.md").read_text()

    fields, text = cook(saved, tmp_path / "half", "--dtype", "bfloat16")
    assert (fields["saved_dtype"], fields["measured_dtype"]) == ("bfloat16", "float32")
    line = "These figures are of the weights in float32. They are saved in bfloat16 here, and were not measured so."
    assert line in text and "weights saved in bfloat16" in text
    half = hf_radin.Soup.from_pretrained(tmp_path / "half")
    assert half.model.dtype == torch.bfloat16 and half.results == soup.results
    fields, text = cook(tmp_path / "half", tmp_path / "whole")
    assert fields == json.loads((saved / "recipe.json").read_text()) and line not in text


def test_a_recipe_whose_weights_were_changed_has_no_figures(saved, soup, tmp_path):
    fields = json.loads((saved / "recipe.json").read_text())
    fields["recipe"] = {"ingredients": list(soup.ingredients.ids[:2]), "weights": [0.123, 0.877]}
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    assert main(["average", "--recipe", str(tmp_path / "recipe.json"), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**Nothing was measured of this model.**" in text and "%" not in text.partition("## Cite")[0]
    again = hf_radin.Soup.from_pretrained(tmp_path / "out")
    assert again.recipe.used == dict(zip(soup.ingredients.ids, (0.123, 0.877), strict=False))


def test_the_licence_stays_with_the_recipe(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "soup")
    assert main(["card", str(tmp_path / "soup"), "--license", "mit"]) == 0
    command = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "out"), "--dtype", "float16"]
    assert main(command) == 0
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("change", [{"passes": ...}, {"method": "other"}])
def test_a_recipe_that_says_too_little_for_a_card_is_refused_before_anything_is_averaged(
    saved, tmp_path, capsys, change
):
    fields = json.loads(spoilt(json.loads((saved / "recipe.json").read_text()), **change))
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    assert main(["average", "--recipe", str(tmp_path / "recipe.json"), "--output", str(tmp_path / "out")]) == 2
    assert "does not say enough for a card" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_average_that_nobody_measured_can_be_read_carded_cooked_and_saved(bank, tmp_path):
    weights = (0.25, 0.75)
    ingredients = bank.ingredients[:2]
    recipe = hf_radin.Recipe(ingredients.ids, weights)
    hf_radin.average(ingredients, recipe, output=tmp_path / "out")
    soup = hf_radin.Soup.from_pretrained(tmp_path / "out")
    assert soup.recipe == recipe and not soup.results and not soup.measurements and soup.report.data is None
    expected = hf_radin.average(ingredients, recipe)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in soup.model.state_dict().items())
    assert soup.processor.to_dict() == ingredients[0].processor.to_dict()
    soup.save_pretrained(tmp_path / "saved")
    assert main(["card", str(tmp_path / "out")]) == 0
    assert main(["average", "--recipe", str(tmp_path / "out"), "--output", str(tmp_path / "cooked")]) == 0
    for name in ("recipe.json", "README.md", "model.safetensors"):
        content = (tmp_path / "out" / name).read_bytes()
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "cooked" / name).read_bytes() == content


def test_a_save_that_fails_leaves_nothing_behind(soup, tmp_path):
    """The card is written after the weights, and this report is none that a card can be made of."""
    broken = Soup(replace(soup.report, method="other"), soup.ingredients)
    with pytest.raises(KeyError, match="other"):
        broken.save_pretrained(tmp_path / "soup")
    assert not list(tmp_path.iterdir())


def spoilt(fields, **changes) -> str:
    """The JSON with other values of some fields; `...` takes a field away."""
    return json.dumps({name: value for name, value in {**fields, **changes}.items() if value is not ...})


@pytest.mark.parametrize(
    ("changes", "readers"),
    [
        ({"recipe": ...}, "read cook"),
        ({"recipe": []}, "read cook"),
        ({"ingredients": ...}, "read cook"),
        ({"ingredients": ["a"]}, "read cook"),
        ({"ingredients": [{"id": ["a"], "revision": "b"}]}, "read cook"),
        ({"recipe": {"ingredients": ["a"], "weights": [0.5]}}, "read cook"),
        ({"ingredients": []}, "cook"),
        ({"recipe": {"ingredients": [[], {}], "weights": [0.5, 0.5]}}, "read cook"),
        ({"data": ...}, "read cook"),
        ({"data": "digits"}, "read cook"),
        ({"data": {"name": "digits", "split": 5}}, "read cook"),
        ({"processor": 5}, "read cook"),
        ({"classes": 5}, "read cook"),
        ({"classes": [5]}, "read cook"),
        ({"image_processor": 5}, "read cook"),
        ({"batchnorm": "train"}, "read cook"),
        ({"batchnorm": {"split": "train"}}, "read cook"),
        ({"batchnorm": {"data": "a", "split": "b", "images": "5", "seed": 0, "on_error": "skip"}}, "read cook"),
        ({"batchnorm": {"data": "a", "split": "b", "images": 5, "seed": -1, "on_error": "skip"}}, "read cook"),
        ({"ingredients": [{"id": "a", "revision": "b"}]}, "read cook"),
        ({"ingredients": [{"id": "a", "revision": "b", "repo_id": None, "base": "c"}]}, "read cook"),
        ({"ingredients": [{"id": "a", "revision": "b", "repo_id": None, "base": {"id": "c"}}]}, "read cook"),
        ({"ingredients": [{"id": "a", "revision": "b", "repo_id": None, "subfolder": [5]}]}, "read cook"),
        ({"ingredients": [{"id": "a", "revision": "b", "repo_id": None, "order": ["x"]}]}, "read cook"),
        ({"measurements": ...}, "read"),
        ({"saved_dtype": ...}, "read"),
        ({"method": ...}, "read"),
        ({"results": [{"name": "soup", "other": 1}]}, "read"),
    ],
)
def test_a_recipe_that_was_tampered_with_is_refused(soup, tmp_path, capsys, changes, readers):
    path = tmp_path / "recipe.json"
    path.write_text(spoilt(soup.to_dict(), **changes))
    if "read" in readers:
        with pytest.raises(ValueError, match=r"recipe\.json is not a complete recipe"):
            hf_radin.Soup.from_pretrained(tmp_path)
    if "cook" in readers:
        assert main(["average", "--recipe", str(path), "--output", str(tmp_path / "out")]) == 2
        assert "recipe.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_recipe_that_was_not_tampered_with_is_read_and_cooked(soup, tmp_path):
    (tmp_path / "recipe.json").write_text(spoilt(soup.to_dict()))
    assert hf_radin.Soup.from_pretrained(tmp_path).recipe == soup.recipe
    assert main(["average", "--recipe", str(tmp_path), "--output", str(tmp_path / "out")]) == 0


def test_a_recipe_written_by_hand_is_cooked(soup, tmp_path):
    """It says of each ingredient what finds it again, and nothing of a search."""
    fields = soup.to_dict()
    names = ("format_version", "recipe", "ingredients", "processor", "classes", "data")
    (tmp_path / "recipe.json").write_text(json.dumps({name: fields[name] for name in names}))
    assert main(["average", "--recipe", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    tensors = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in soup.model.state_dict().items())
    named = {name: fields[name] for name in names if name != "classes"}  # then they are those of the first ingredient
    (tmp_path / "recipe.json").write_text(json.dumps(named))
    averaged = hf_radin.average(*find_ingredients(tmp_path))
    assert all(torch.equal(averaged[name], tensor) for name, tensor in tensors.items())


def test_a_recipe_of_the_first_version_is_read(soup, tmp_path):
    """It named its version otherwise, and the hits of the best single model."""
    fields = soup.to_dict()
    fields["format"] = 1
    del fields["format_version"]
    fields["by_class"]["best single"] = fields["by_class"].pop("best_single")
    fields["curve"] = None  # others have none
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    report = SearchReport.read(tmp_path / "recipe.json")
    assert report == replace(soup.report, saved_dtype="float32", curve=()) and report.by_class is not None


def test_a_recipe_without_a_bottom_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        hf_radin.Soup.from_pretrained(tmp_path)


def test_the_output_may_be_a_link_or_a_mounted_folder(soup, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    soup.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
    soup.save_pretrained(tmp_path / "real", overwrite=True)
    assert len(list((tmp_path / "real").iterdir())) == 8


def test_a_recipe_is_not_lost_to_the_soup_it_cooks(saved, soup, tmp_path, capsys):
    soup.save_pretrained(tmp_path / "out")
    for recipe in (tmp_path / "out", tmp_path / "out" / "recipe.json"):
        options = ["--recipe", str(recipe), "--output", str(tmp_path / "out"), "--overwrite"]
        assert main(["average", *options]) == 2
        assert "is the folder of the recipe, which would be lost" in capsys.readouterr().err
    assert (tmp_path / "out" / "recipe.json").exists()


def test_a_recipe_is_cooked_in_its_own_order(bank, soup, tmp_path):
    """The order in which numbers are added decides about their last bits."""
    ids = bank.ingredients.ids
    recipe = hf_radin.Recipe((ids[4], ids[0], ids[2]), (0.4, 0.35, 0.25))
    reordered = Soup(replace(soup.report, recipe=recipe), bank.ingredients)
    reordered.save_pretrained(tmp_path / "soup")
    ingredients, cooked = find_ingredients(tmp_path / "soup")
    assert ingredients.ids == (ids[4], ids[0], ids[2])
    tensors = hf_radin.average(ingredients, cooked)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in reordered.model.state_dict().items())


def test_files_of_a_soup_can_be_read_by_whoever_may_read_the_folder(saved):
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert {*modes.values()} == {modes["config.json"]} and modes["config.json"] & 0o044
