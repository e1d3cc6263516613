"""Ingredients are found by any name that users give them, and the odd one out is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_radin
from hf_radin.ingredients.ingredient import with_distinct_ids


def change(folder: Path, name: str = "config.json", **fields) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_pattern_gives_all_that_it_matches_in_order(runs):
    ingredients = hf_radin.gather(f"{runs}/ft-*")
    assert [Path(ingredient.id).name for ingredient in ingredients] == ["ft-0", "ft-1", "ft-2", "ft-3", "ft-4"]
    assert ingredients.labels[:3] == ("zero", "one", "two")
    assert ingredients[0].architecture == "ViTForImageClassification"
    assert len({ingredient.revision for ingredient in ingredients}) == 5


def test_folders_patterns_and_lists_give_the_same(runs, monkeypatch):
    monkeypatch.chdir(runs)
    by_name = hf_radin.gather(["ft-0", Path("ft-1")])
    assert by_name.ids == ("ft-0", "ft-1")
    assert hf_radin.gather("ft-[01]") == by_name
    assert hf_radin.gather(["ft-0", "ft-[01]"]) == by_name  # a checkpoint named twice is one ingredient


def test_it_can_not_be_changed(runs):
    ingredients = hf_radin.gather(f"{runs}/ft-*")
    with pytest.raises(TypeError):
        ingredients[0] = ingredients[1]
    with pytest.raises(AttributeError):
        ingredients[0].id = "other"


def revisions(ingredients: hf_radin.Ingredients) -> set[str]:
    return {ingredient.revision for ingredient in ingredients}


def test_the_revision_is_the_content(two):
    before = hf_radin.gather(f"{two}/*")
    shutil.copytree(two / "ft-0", two / "moved")
    shutil.rmtree(two / "ft-0")
    assert revisions(hf_radin.gather(f"{two}/*")) == revisions(before)
    change(two / "moved", hidden_dropout_prob=0.5)
    assert revisions(hf_radin.gather(f"{two}/*")) != revisions(before)


def test_a_copy_is_kept_once_and_said(two, caplog):
    shutil.copytree(two / "ft-0", two / "ft-copy")
    assert len(hf_radin.gather(f"{two}/*")) == 2
    assert "ft-copy is the same checkpoint as" in caplog.text


def test_what_is_to_be_said_of_several_is_said_once(two, runs, caplog):
    from safetensors.torch import load_file, save_file

    shutil.copytree(runs / "ft-2", two / "ft-2")
    for folder in two.iterdir():
        tensors = load_file(folder / "model.safetensors")
        save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    hf_radin.gather(f"{two}/*")
    lines = [record.getMessage() for record in caplog.records if "wrapped it" in record.getMessage()]
    assert len(lines) == 1 and "The same holds for " in lines[0] and "ft-2." in lines[0]


def test_select_knows_the_ids(runs):
    ingredients = hf_radin.gather(f"{runs}/ft-*")
    assert ingredients.select([ingredients.ids[3], ingredients.ids[1]]) == (ingredients[3], ingredients[1])
    with pytest.raises(ValueError, match="No ingredient 'other'"):
        ingredients.select(["other"])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "an empty list gives none"),
        ("nothing-*", "matches no folder"),
        ("./nothing/at/all", "no folder"),
        ("*/x/y", "matches no folder"),
        ("", "no folder"),
    ],
)
def test_what_matches_nothing_is_refused(models, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_radin.gather(models)


def test_one_ingredient_makes_no_soup(runs):
    with pytest.raises(ValueError, match=r"at least two different checkpoints; .*ft-0"):
        hf_radin.gather(str(runs / "ft-0"))


def test_it_is_the_majority_that_counts_not_the_order(runs, two):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    change(two / "ft-0", hidden_act="relu")  # the same shapes, another function
    with pytest.raises(ValueError, match=r"ft-0 differs from .*ft-1 in configuration's hidden_act: 'relu' against"):
        hf_radin.gather(f"{two}/ft-*")


def test_a_file_is_no_checkpoint(runs):
    with pytest.raises(ValueError, match="is a file; a checkpoint is a folder"):
        hf_radin.gather([str(runs / "ft-0" / "config.json"), str(runs / "ft-1")])


def test_a_pattern_passes_files_by(two):
    (two / "ft-notes.txt").write_text("notes")
    assert len(hf_radin.gather(f"{two}/ft-*")) == 2


def test_pickles_are_read_when_allowed(two):
    from safetensors.torch import load_file

    for name in ("ft-0", "ft-1"):
        torch.save(load_file(two / name / "model.safetensors"), two / name / "pytorch_model.bin")
        (two / name / "model.safetensors").unlink()
    ingredients = hf_radin.gather(f"{two}/*", allow_pickle=True)
    assert len(hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids))) > 10


def test_what_is_no_image_classifier_is_named(two):
    for name in ("ft-0", "ft-1"):
        change(two / name, model_type="bert", architectures=["BertForSequenceClassification"])
    with pytest.raises(ValueError, match=r"ft-0: config.json \(model type 'bert', .*\) makes no image classifier"):
        hf_radin.gather(f"{two}/*")


def test_a_slice_is_a_sequence_of_ingredients(runs):
    ingredients = hf_radin.gather(f"{runs}/ft-*")
    assert ingredients[1:3] == ingredients.select(ingredients.ids[1:3])
    assert ingredients[1:3].labels == ingredients.labels


def test_a_checkpoint_that_changed_since_is_not_used(runs, two):
    ingredients = hf_radin.gather(f"{two}/*")
    shutil.copytree(two / "ft-1", two / "kept")
    shutil.copy(runs / "ft-4" / "model.safetensors", two / "ft-1" / "model.safetensors")
    with pytest.raises(ValueError, match=r"ft-1 has changed: it was sha256:.* Gather again"):
        hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids))
    shutil.copy(two / "kept" / "model.safetensors", two / "ft-1" / "model.safetensors")  # as it was, at another time
    assert hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids))


def without_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def test_an_image_processor_is_named_for_all(runs, two, digits, tmp_path):
    without_processor(two / "ft-0")
    change(two / "ft-1", "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    ingredients = hf_radin.gather(f"{two}/*", image_processor=runs / "ft-2")
    assert {ingredient.processor.to_json_string() for ingredient in ingredients} == {
        hf_radin.gather(f"{runs}/ft-*")[0].processor.to_json_string()
    }
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    saved = json.loads((tmp_path / "soup" / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == [0.5, 0.5, 0.5]
    opened = hf_radin.LogitBank.open(bank.folder).ingredients[0]
    assert list(opened.processor.image_mean) == [0.5, 0.5, 0.5]
    from hf_radin.soup.cook import find_ingredients

    assert list(find_ingredients(tmp_path / "soup")[0][0].processor.image_mean) == [0.5, 0.5, 0.5]


def test_an_image_processor_that_changed_since_is_not_saved(runs, two, digits, tmp_path):
    shutil.copytree(runs / "ft-2", tmp_path / "processor")
    ingredients = hf_radin.gather(f"{two}/*", image_processor=tmp_path / "processor")
    soup = hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache"))
    change(tmp_path / "processor", "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    with pytest.raises(ValueError, match="The image processor is not the one that the logits were computed with"):
        soup.save_pretrained(tmp_path / "soup")


def test_nor_is_a_soup_cooked_with_it(runs, two, digits, tmp_path, caplog):
    from hf_radin.soup.cook import find_ingredients

    shutil.copytree(runs / "ft-2", tmp_path / "processor")
    ingredients = hf_radin.gather(f"{two}/*", image_processor=tmp_path / "processor")
    hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")).save_pretrained(
        tmp_path / "soup"
    )
    assert len(find_ingredients(tmp_path / "soup")[0]) == 2
    change(tmp_path / "processor", "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    with pytest.raises(ValueError, match="The image processor is not the one that the logits were computed with"):
        find_ingredients(tmp_path / "soup")
    recipe = tmp_path / "soup" / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"transformers": "', '"transformers": "0.'))  # other words, perhaps
    assert len(find_ingredients(tmp_path / "soup")[0]) == 2 and "Another version of transformers" in caplog.text


def test_code_of_its_own_is_part_of_a_checkpoint(two):
    before = hf_radin.gather(f"{two}/*")
    for text in ("# one", "# two"):
        (two / "ft-0" / "modeling_own.py").write_text(text)
        after = hf_radin.gather(f"{two}/*")
        assert after[0].key != before[0].key and after[1].key == before[1].key
        before = after


@pytest.mark.parametrize("name", ["", "nothing/here/at/all", "ft-0"])
def test_an_image_processor_that_is_none_is_refused(two, name, monkeypatch):
    without_processor(two / "ft-0")
    monkeypatch.chdir(two)
    with pytest.raises(ValueError, match=r"image processor|no such model"):
        hf_radin.gather(["ft-0", "ft-1"], image_processor=name)


def test_two_versions_under_one_name_are_told_apart_by_their_revisions(runs):
    first, second = hf_radin.gather(f"{runs}/ft-[01]")
    other = replace(first, revision="sha256:0123456789abcdef")
    assert with_distinct_ids([first, other, second]) == [
        replace(first, id=f"{first.id}@{first.revision[:19]}"),
        replace(other, id=f"{first.id}@sha256:0123456789ab"),
        second,
    ]
