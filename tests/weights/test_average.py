"""The average of the weights is what the formula says, whatever files they lie in."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.averages import are_averaged_as_files, average_loaded
from shared.calls import counted
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

import hf_radin
from hf_radin import Recipe
from hf_radin.checkpoints.files import files_stamp
from hf_radin.checkpoints.model import load_model
from hf_radin.cli.main import main
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.runtime.files import write_folder
from hf_radin.soup import cook
from hf_radin.weights.average import average_model, by_content, open_weights, write_average
from hf_radin.weights.average_files import header_of, write_weights
from hf_radin.weights.head import LinearLayer, RefittedHead, find_head


@pytest.fixture(scope="module")
def three(runs):
    return hf_radin.gather(f"{runs}/ft-[012]")


def states(ingredients) -> list[dict[str, torch.Tensor]]:
    return [ViTForImageClassification.from_pretrained(ingredient.folder).state_dict() for ingredient in ingredients]


def test_it_is_the_weighted_sum(three):
    weights = (0.5, 0.2, 0.3)
    soup = hf_radin.average(three, Recipe(three.ids, weights))
    added, recipe = by_content(three, Recipe(three.ids, weights))
    weights, parts = recipe.weights, states(added)
    assert soup.keys() == parts[0].keys()
    for name, tensor in soup.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=0)


def test_the_average_of_equal_models_is_that_model(runs, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(runs / "ft-0", tmp_path / name)
        # another file, the same weights: else the copies would be one ingredient
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt", "copy": name})
    ingredients = hf_radin.gather(f"{tmp_path}/*")
    original = states(ingredients)[0]
    for weights in [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), (0.123, 0.456, 0.421)]:
        soup = hf_radin.average(ingredients, Recipe(ingredients.ids, weights))
        assert all(torch.equal(soup[name], original[name]) for name in original)


def test_a_single_ingredient_stays_as_it_is(three):
    soup = hf_radin.average(three, Recipe.uniform([three.ids[1]]))
    assert all(torch.equal(tensor, soup[name]) for name, tensor in states(three)[1].items())


def test_a_weight_of_zero_is_as_good_as_absent(three):
    with_zero = hf_radin.average(three, Recipe(three.ids, (0.5, 0.0, 0.5)))
    without = hf_radin.average(three, Recipe((three.ids[0], three.ids[2]), (0.5, 0.5)))
    assert all(torch.equal(with_zero[name], without[name]) for name in without)


def rename_as_module(folder):
    """The names that the modules have, in place of those that transformers writes: another version's layout."""
    state = ViTForImageClassification.from_pretrained(folder).state_dict()
    on_disk = load_file(folder / "model.safetensors")
    assert state.keys() != on_disk.keys()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_files_that_name_their_tensors_differently_give_the_same_soup(two):
    ingredients = hf_radin.gather(f"{two}/*")
    recipe = Recipe(ingredients.ids, (0.3, 0.7))
    expected = hf_radin.average(ingredients, recipe)
    rename_as_module(two / "ft-1")
    mixed = hf_radin.average(hf_radin.gather(f"{two}/*"), recipe)
    assert expected.keys() == mixed.keys()
    assert all(torch.equal(expected[name], mixed[name]) for name in expected)


def test_a_tensor_of_no_number_harms_nobody(two):
    ingredients = hf_radin.gather(f"{two}/*")
    recipe = Recipe(ingredients.ids, (0.3, 0.7))
    expected = hf_radin.average(ingredients, recipe)
    for folder in two.iterdir():
        tensors = load_file(folder / "model.safetensors") | {"note": torch.zeros(0, 3)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    averaged = hf_radin.average(hf_radin.gather(f"{two}/*"), recipe)
    assert all(torch.equal(averaged[name], tensor) for name, tensor in expected.items())


def test_shards_give_the_same_soup(two):
    ingredients = hf_radin.gather(f"{two}/*")
    recipe = Recipe(ingredients.ids, (0.3, 0.7))
    expected = hf_radin.average(ingredients, recipe)
    model = ViTForImageClassification.from_pretrained(two / "ft-1")
    (two / "ft-1" / "model.safetensors").unlink()
    model.save_pretrained(two / "ft-1", max_shard_size="20KB")
    assert len(list((two / "ft-1").glob("model-*.safetensors"))) > 2
    mixed = hf_radin.average(hf_radin.gather(f"{two}/*"), recipe)
    assert all(torch.equal(expected[name], mixed[name]) for name in expected)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16", "bfloat16"), torch.bfloat16),
        (("float16", "float32"), torch.float32),
        (("float16", "bfloat16"), torch.float32),
    ],
)
def test_the_soup_has_the_widest_dtype_and_is_rounded_once(two, dtypes, expected):
    for name, dtype in zip(("ft-0", "ft-1"), dtypes, strict=True):
        model = ViTForImageClassification.from_pretrained(two / name, dtype=getattr(torch, dtype))
        model.save_pretrained(two / name)
    ingredients = hf_radin.gather(f"{two}/*")
    files = [ingredient.folder / "model.safetensors" for ingredient in ingredients]
    parts = [load_file(file)["classifier.weight"].double() for file in files]
    soup = hf_radin.average(ingredients, Recipe(ingredients.ids, (0.25, 0.75)))["classifier.weight"]
    assert soup.dtype == expected
    assert torch.equal(soup, (0.25 * parts[0] + 0.75 * parts[1]).to(expected))


def test_the_user_may_choose_the_dtype(three):
    assert (
        hf_radin.average(three, Recipe.uniform(three.ids), dtype="float16")["classifier.weight"].dtype == torch.float16
    )
    with pytest.raises(ValueError, match="dtype='int4'"):
        hf_radin.average(three, Recipe.uniform(three.ids), dtype="int4")


def test_a_written_average_is_an_ordinary_checkpoint(three, tmp_path):
    expected = hf_radin.average(three, Recipe.uniform(three.ids))
    assert hf_radin.average(three, Recipe.uniform(three.ids), output=tmp_path / "out") is None
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_an_ingredient_that_is_not_there_is_named(three):
    with pytest.raises(ValueError, match="No ingredient 'other'"):
        hf_radin.average(three, Recipe.uniform([three.ids[0], "other"]))


def test_integers_are_not_averaged(tmp_path):
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    for seed in range(2):
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        model = ResNetForImageClassification(config)
        model.resnet.embedder.embedder.normalization.num_batches_tracked.fill_(10 + seed)
        model.save_pretrained(tmp_path / str(seed))
        ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / str(seed))
    ingredients = hf_radin.gather(f"{tmp_path}/*")
    soup = hf_radin.average(ingredients, Recipe.uniform(ingredients.ids))
    counters = [tensor for name, tensor in soup.items() if name.endswith("num_batches_tracked")]
    assert counters and counters[0].dtype == torch.int64 and counters[0] == 10


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
def test_what_is_written_is_what_is_averaged_in_memory(three, tmp_path, dtype):
    recipe = Recipe(three.ids, (0.5, 0.2, 0.3))
    expected = hf_radin.average(three, recipe, dtype=dtype)
    hf_radin.average(three, recipe, output=tmp_path / "out", dtype=dtype)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert str(loaded.dtype) == f"torch.{dtype or 'float32'}"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.id2label == dict(enumerate(three.labels))
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").to_dict() == three[0].processor.to_dict()
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(three[0].folder / "model.safetensors").keys()
    )


@pytest.mark.parametrize("saved", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_files_and_loaded_models_give_the_same_bits(runs, tmp_path, saved, dtype):
    """Also where sums are float32, because nothing has more than 16 bits."""
    for name in ("ft-0", "ft-1", "ft-2"):
        model = ViTForImageClassification.from_pretrained(runs / name, dtype=getattr(torch, saved))
        model.save_pretrained(tmp_path / name)
        AutoImageProcessor.from_pretrained(runs / name).save_pretrained(tmp_path / name)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    recipe = Recipe(ingredients.ids, (0.5, 0.2, 0.3))
    assert are_averaged_as_files(ingredients)
    of_files = hf_radin.average(ingredients, recipe, dtype=dtype)
    of_models = average_loaded(ingredients, recipe, dtype)
    assert str(of_files["classifier.weight"].dtype) == f"torch.{dtype or saved}"
    assert of_files.keys() == of_models.keys()
    assert all(torch.equal(of_files[name], tensor) for name, tensor in of_models.items())


def test_a_written_average_takes_no_model(three, tmp_path):
    recipe = Recipe.uniform(three.ids)
    with counted(load_model) as calls:
        hf_radin.average(three, recipe, output=tmp_path / "out")
    assert calls.total() == 0
    with counted(load_model) as calls:
        expected = hf_radin.average(three, recipe)
    assert calls.total() == 1
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_large_models_are_written_in_shards(three, tmp_path):
    hf_radin.average(three, Recipe.uniform(three.ids), output=tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    expected = hf_radin.average(three, Recipe.uniform(three.ids))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def without_files(ingredients: Ingredients, folder: Path) -> Ingredients:
    """The same ingredients, but nothing of them can be read."""
    gone = Ingredients([replace(ingredient, folder=folder / "gone") for ingredient in ingredients])
    with pytest.raises(ValueError, match="is not here"):
        hf_radin.average(gone, Recipe.uniform(gone.ids))
    return gone


@pytest.mark.parametrize(
    "size", ["abc", "", "0GB", "-1", "0", "5XB", "infGB", "9" * 400 + "GB", 0, -1, 1.5, None, True]
)
def test_a_size_that_is_none_is_refused_before_anything_is_read(three, tmp_path, size):
    gone = without_files(three, tmp_path)
    with pytest.raises(ValueError, match=r"max_shard_size=.*: it is a size as in '5GB' \(--max-shard-size\)"):
        hf_radin.average(gone, Recipe.uniform(gone.ids), output=tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(three, tmp_path):
    """No disk has room for a tensor of so many numbers."""
    recipe = Recipe.uniform(three.ids)
    with open_weights(three) as files:
        header = header_of(files, "F32") | {"classifier.weight": ("F32", (10**9, 10**9))}
        message = r"The soup takes 4,000,[\d,]+ bytes, and there are [\d,]+ free where it is written: make room"
        with pytest.raises(ValueError, match=message):
            write_folder(tmp_path / "out", lambda new: write_weights(new, files, recipe, header, "5GB"))
    assert list(tmp_path.iterdir()) == []


def test_an_average_that_is_killed_leaves_nothing_under_its_name(three, tmp_path):
    """It ends when the last tensor of the second ingredient is read."""
    recipe = Recipe.uniform(three.ids)
    with open_weights(three) as files:
        name, tensor = list(files[1].items())[-1]

        def be_killed(start: int, buffer: memoryview) -> None:
            assert list(tmp_path.rglob("*.safetensors")), "nothing was written yet"
            raise SystemExit

        files[1][name] = replace(tensor, read=be_killed)
        with pytest.raises(SystemExit):
            write_folder(
                tmp_path / "out", lambda new: write_weights(new, files, recipe, header_of(files, "F32"), "5GB")
            )
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_too_few_is_refused(two, tmp_path):
    """What transformers would fill with random numbers is not written, whoever vetted it."""
    gathered = hf_radin.gather(f"{two}/*")
    for ingredient in gathered:
        tensors = load_file(ingredient.folder / "model.safetensors")
        del tensors["classifier.bias"]
        save_file(tensors, ingredient.folder / "model.safetensors", {"format": "pt"})
    # as if they had been vetted like this
    ingredients = Ingredients([replace(ingredient, stamp=files_stamp(ingredient.folder)) for ingredient in gathered])
    with pytest.raises(ValueError, match=r"no weights for classifier\.bias"):
        hf_radin.average(ingredients, Recipe.uniform(ingredients.ids), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_cooked_from_files_alone_where_that_is_all_it_takes(runs, digits, cache, tmp_path):
    """Without torch: the same bits as the soup that was saved."""
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=cache)
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    code = (
        "import sys; from hf_radin.cli.main import main; "
        f"code = main(['average', '--recipe', {str(tmp_path / 'soup')!r} + '/recipe.json', '--output', 'out']); "
        "assert code == 0 and not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    saved, cooked = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("soup", "out")
    )
    assert saved.keys() == cooked.keys() and all(torch.equal(saved[name], cooked[name]) for name in saved)
    config, again = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name).config.to_dict() for name in ("soup", "out")
    )
    assert {**config, "_name_or_path": ""} == {**again, "_name_or_path": ""}
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").to_dict() == bank.ingredients[0].processor.to_dict()


def without_names(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    named = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps(named | {"num_labels": 10}))


def placeholders(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    labels = {str(number): f"LABEL_{number}" for number in range(10)}
    (folder / "config.json").write_text(
        json.dumps(fields | {"id2label": labels, "label2id": {name: int(number) for number, name in labels.items()}})
    )


@pytest.mark.parametrize(
    ("names", "spoil"),
    [
        (("ft-1",), rename_as_module),
        (("ft-1",), placeholders),
        (("ft-0", "ft-1"), without_names),
    ],
)
def test_what_takes_models_is_cooked_from_models_alone(two, digits, tmp_path, names, spoil):
    for name in names:
        spoil(two / name)
    gathered = hf_radin.gather(f"{two}/*")
    soup = hf_radin.uniform(hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    assert not cook.cook_files(tmp_path / "soup", tmp_path / "cooked") and not (tmp_path / "cooked").exists()
    averaged = hf_radin.average(*cook.find_ingredients(tmp_path / "soup"))
    assert all(torch.equal(averaged[name], tensor) for name, tensor in soup.model.state_dict().items())


def test_a_recipe_that_was_made_by_hand_is_vetted(runs, digits, cache, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=cache)
    hf_radin.uniform(bank).save_recipe(tmp_path / "recipe.json")
    assert cook.cook_files(tmp_path / "recipe.json", tmp_path / "out")
    fields = json.loads((tmp_path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**fields, "measurements": []}))
    assert not cook.cook_files(tmp_path / "recipe.json", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_files_are_hashed_again_only_where_they_may_have_changed(runs, digits, cache, tmp_path):
    for name in ("ft-0", "ft-1"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
    bank = hf_radin.compute_logits(hf_radin.gather(f"{tmp_path}/runs/*"), digits, cache_dir=cache)
    hf_radin.uniform(bank).save_recipe(tmp_path / "recipe.json")
    fields = json.loads((tmp_path / "recipe.json").read_text())
    for entry in fields["ingredients"]:
        entry["revision"] = f"sha256:{'0' * 64}"  # which a hash would show to be wrong
    (tmp_path / "wrong.json").write_text(json.dumps(fields))
    assert cook.cook_files(tmp_path / "wrong.json", tmp_path / "not-hashed")
    path = tmp_path / "runs" / "ft-1" / "model.safetensors"
    path.write_bytes(path.read_bytes())  # the same, at another time
    assert cook.cook_files(tmp_path / "recipe.json", tmp_path / "hashed")
    with pytest.raises(ValueError, match="ft-1 has changed: it was sha256:000000000000"):
        cook.cook_files(tmp_path / "wrong.json", tmp_path / "out")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="ft-1 has changed"):
        cook.cook_files(tmp_path / "recipe.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def soup_of(runs, digits, cache, folder) -> dict:
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=cache)
    hf_radin.uniform(bank).save_recipe(folder / "recipe.json")
    return json.loads((folder / "recipe.json").read_text())


def test_an_ingredient_that_is_not_used_is_not_overwritten_either(runs, digits, cache, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "runs")
    fields = soup_of(tmp_path / "runs", digits, cache, tmp_path)
    ids = [entry["id"] for entry in fields["ingredients"]]
    fields["recipe"] = {"ingredients": ids[:2], "weights": [0.5, 0.5]}
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    before = (Path(ids[2]) / "model.safetensors").read_bytes()
    command = ["average", "--recipe", str(tmp_path / "recipe.json"), "--output", ids[2], "--overwrite"]
    assert main(command) == 2 and "which would be lost" in capsys.readouterr().err
    assert (Path(ids[2]) / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("subfolder", ["../../elsewhere", "/elsewhere", "a/../../b"])
def test_a_recipe_stays_in_the_repository_that_it_names(runs, digits, cache, tmp_path, subfolder):
    fields = soup_of(runs, digits, cache, tmp_path)
    fields["ingredients"][0] |= {"repo_id": "org/a", "subfolder": subfolder}
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="is not a complete recipe"):
        cook.cook_files(tmp_path / "recipe.json", tmp_path / "out")


def test_a_recipe_that_lists_one_twice_is_refused(runs, digits, cache, tmp_path):
    fields = soup_of(runs, digits, cache, tmp_path)
    fields["ingredients"].append(fields["ingredients"][0])
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"it lists .*ft-0' twice"):
        cook.cook_files(tmp_path / "recipe.json", tmp_path / "out")


def test_a_soup_is_named_by_its_folder_too(runs, digits, cache, tmp_path):
    soup_of(runs, digits, cache, tmp_path)
    assert cook.cook_files(tmp_path, tmp_path / "out")


def test_counters_that_some_keep_as_numbers_are_counters(tmp_path):
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    for name in ("one", "other"):
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ResNetForImageClassification(config).save_pretrained(tmp_path / name)
        ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / name)
    path = tmp_path / "one" / "model.safetensors"
    tensors = {name: tensor.float() if "num_batches" in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    both = hf_radin.gather([str(tmp_path / "one"), str(tmp_path / "other")])
    soup = hf_radin.average(both, Recipe.uniform(both.ids))
    counters = [tensor for name, tensor in soup.items() if "num_batches" in name]
    assert counters and all(counter.dtype == torch.int64 for counter in counters)


@pytest.mark.parametrize("name", ["ft-0", "ft-1"])
def test_what_is_no_number_in_a_loaded_model_is_named(two, name):
    model = ViTForImageClassification.from_pretrained(two / name)
    model.classifier.bias.data[3] = torch.inf
    model.save_pretrained(two / name)
    ingredients = hf_radin.gather(f"{two}/*")
    recipe = Recipe.uniform(ingredients.ids)
    with pytest.raises(ValueError, match=rf"{name}: classifier\.bias has inf at 3; an average with it is no number"):
        hf_radin.average(ingredients, recipe)
    with pytest.raises(ValueError, match=rf"{name}: classifier\.bias has inf, which not all have"):
        average_loaded(ingredients, recipe)


def test_a_dtype_that_is_none_is_refused_before_anything_is_read(three, tmp_path):
    gone = without_files(three, tmp_path)
    with pytest.raises(ValueError, match="dtype='float31'"):
        hf_radin.average(gone, Recipe.uniform(gone.ids), dtype="float31")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("are_alike", [True, False])
def test_another_head_takes_the_place_of_the_averaged_one_and_nothing_else_changes(two, tmp_path, dtype, are_alike):
    if not are_alike:
        rename_as_module(two / "ft-0")
    ingredients = hf_radin.gather(f"{two}/*")
    assert are_averaged_as_files(ingredients) == are_alike
    recipe = Recipe.uniform(ingredients.ids)
    place = find_head(ingredients[0])
    layer = place.layer_of(average_model(ingredients, recipe))
    head = RefittedHead(place, LinearLayer(2 * layer.weight[::-1], layer.bias - 1 / 3))
    for name, options in (("plain", {}), ("refitted", {"head": head})):
        (tmp_path / name).mkdir()
        write_average(ingredients, recipe, tmp_path / name, dtype=dtype, **options)
    plain, refitted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "refitted"))
    assert plain.keys() == refitted.keys()
    for name, tensor in refitted.items():
        assert tensor.dtype == plain[name].dtype == getattr(torch, dtype)
        expected = {"classifier.weight": head.layer.weight, "classifier.bias": head.layer.bias}.get(name)
        expected = plain[name] if expected is None else torch.from_numpy(expected.copy()).to(tensor.dtype)
        assert torch.equal(tensor, expected), name
    returned = hf_radin.average(ingredients, recipe, dtype=dtype, head=head)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "refitted").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in returned.items())
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        path.name for path in (tmp_path / "refitted").iterdir()
    }


CODE = """
from transformers import ViTForImageClassification

class OwnModel(ViTForImageClassification):
    pass
"""


@pytest.fixture
def coded(two) -> Path:
    """Two fine-tunes whose class is code beside them."""
    for folder in two.iterdir():
        (folder / "own.py").write_text(CODE)
        fields = {"architectures": ["OwnModel"], "auto_map": {"AutoModelForImageClassification": "own.OwnModel"}}
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
    return two


def test_models_whose_class_is_their_own_code_make_a_soup(coded, digits, tmp_path):
    gathered = hf_radin.gather(f"{coded}/*", trust_remote_code=True)
    soup = hf_radin.uniform(hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup", trust_remote_code=True)
    assert type(soup.model).__name__ == type(saved).__name__ == "OwnModel"
    heads = [load_file(folder / "model.safetensors")["classifier.weight"] for folder in coded.iterdir()]
    torch.testing.assert_close(saved.classifier.weight.detach(), (heads[0] + heads[1]) / 2)


def test_classes_in_another_order_are_permuted_in_models_of_own_code_too(coded):
    config = json.loads((coded / "ft-1" / "config.json").read_text())
    names = list(config["id2label"].values())[::-1]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    (coded / "ft-1" / "config.json").write_text(json.dumps(config | labels))
    (other,) = (ingredient for ingredient in hf_radin.gather(f"{coded}/*", trust_remote_code=True) if ingredient.order)
    bias = load_file(other.folder / "model.safetensors")["classifier.bias"]
    assert torch.equal(other.load_model(torch.float32).classifier.bias, bias.flip(0))
