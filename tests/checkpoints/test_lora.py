"""A LoRA adapter and its base are an ingredient like any other: merged, head included."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from shared.banks import plain_inputs
from shared.logs import warned
from shared.training import NAMES
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTModel

import hf_radin
from hf_radin.layers.distilled import distill_tail
from hf_radin.layers.taught import refit_head
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.soup.cook import find_ingredients
from hf_radin.tail.teach import Course
from hf_radin.weights.head import find_head, locate_head


def save_adapter(base: Path, folder: Path, seed: int, *, head: bool = True, processor: bool = True) -> None:
    """An adapter that was moved a little at random: what is tested is that it is merged, not that it learnt."""
    torch.manual_seed(seed)
    model = ViTForImageClassification.from_pretrained(base, num_labels=10, ignore_mismatched_sizes=True)
    saved = ["classifier"] if head else None
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if processor:
        shutil.copy(base / "preprocessor_config.json", folder)


@pytest.fixture
def adapters(start, tmp_path) -> Path:
    shutil.copytree(start, tmp_path / "base")
    for number in range(3):
        save_adapter(tmp_path / "base", tmp_path / "adapters" / f"ft-{number}", number)
    return tmp_path / "adapters"


def merged(folder: Path) -> dict[str, torch.Tensor]:
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = ViTForImageClassification.from_pretrained(base, dtype=torch.float64)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()


def test_an_ingredient_is_the_base_with_the_adapter_merged(adapters, digits, tmp_path):
    ingredients = hf_radin.gather(f"{adapters}/*")
    assert ingredients.labels == tuple(NAMES) and len(ingredients) == 3
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    inputs = plain_inputs(bank)[0]
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    unmerged = PeftModel.from_pretrained(base, str(adapters / "ft-1")).eval()
    with torch.inference_mode():
        expected = unmerged(**inputs).logits.numpy()
    np.testing.assert_allclose(bank.logits(1)[: len(expected)], expected, atol=1e-5)
    assert len(hf_radin.LogitBank.open(bank.folder).ingredients) == 3


def test_the_soup_of_adapters_is_an_ordinary_model(adapters, tmp_path):
    ingredients = hf_radin.gather(f"{adapters}/*")
    recipe = Recipe(ingredients.ids, (0.5, 0.3, 0.2))
    hf_radin.average(ingredients, recipe, output=tmp_path / "soup")
    soup, report = AutoModelForImageClassification.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not any(report.values()) and not list((tmp_path / "soup").glob("adapter*"))
    parts = [merged(ingredient.folder) for ingredient in ingredients]
    for name, tensor in soup.state_dict().items():
        by_hand = sum(weight * part[name] for weight, part in zip(recipe.weights, parts, strict=True))
        torch.testing.assert_close(tensor, by_hand.float(), rtol=1e-6, atol=1e-7)


def test_the_last_layers_of_adapters_are_taught_as_any_others(adapters, digits, tmp_path):
    ingredients = hf_radin.gather(f"{adapters}/ft-*")
    place = find_head(ingredients[0])
    images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert place == locate_head(ingredients[0].load_model(torch.float32), images)
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")
    recipe = Recipe.uniform(ingredients.ids)
    head = refit_head(bank, recipe, Teacher(recipe)).head
    tensors = hf_radin.average(ingredients, recipe, head=head)
    assert torch.equal(tensors["classifier.weight"], torch.from_numpy(head.layer.weight).float())
    tail = distill_tail(bank, recipe, Teacher(recipe, labels=True), Course(epochs=1)).head
    tensors = hf_radin.average(ingredients, recipe, head=tail)
    assert all(torch.equal(tensors[name], taught) for name, taught in tail.tensors.items()) and len(tail.tensors) > 2


def test_adapters_and_their_base_mix(adapters, digits, runs, tmp_path, caplog):
    ingredients = hf_radin.gather([tmp_path / "base", adapters / "ft-0", runs / "ft-1"])
    hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache"))
    assert not warned(caplog)  # and are kin
    ingredients = ingredients[:2]
    half = hf_radin.average(ingredients, Recipe.uniform(ingredients.ids))["classifier.weight"]
    base = ViTForImageClassification.from_pretrained(tmp_path / "base").classifier.weight.double()
    torch.testing.assert_close(half, ((base + merged(adapters / "ft-0")["classifier.weight"]) / 2).float())


def test_a_head_of_its_own_on_a_base_without_one(start, tmp_path, digits):
    """As on the Hub: a base that was pretrained without classes, adapters that bring the head."""
    base = ViTModel.from_pretrained(start, add_pooling_layer=False)
    base.config.num_labels = 5
    base.save_pretrained(tmp_path / "base")
    shutil.copy(start / "preprocessor_config.json", tmp_path / "base")
    for number in range(2):
        save_adapter(tmp_path / "base", tmp_path / f"ft-{number}", number, processor=False)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    assert ingredients.labels == tuple(f"LABEL_{index}" for index in range(10))  # an adapter's folder names no classes
    model = ingredients[0].load_model(torch.float32)
    head = load_file(tmp_path / "ft-0" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(model.classifier.weight, head)
    hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")


def test_a_base_without_a_head_needs_one_from_the_adapter(start, tmp_path):
    ViTModel.from_pretrained(start, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    shutil.copy(start / "preprocessor_config.json", tmp_path / "base")
    for number in range(2):
        save_adapter(tmp_path / "base", tmp_path / f"ft-{number}", number, head=False)
    with pytest.raises(ValueError, match=r"ft-0: no weights for classifier.bias, classifier.weight"):
        hf_radin.gather(f"{tmp_path}/ft-*")


def test_a_base_that_changed_is_noticed(adapters, runs, tmp_path):
    ingredients = hf_radin.gather(f"{adapters}/*")
    shutil.copy(runs / "ft-4" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="base has changed"):
        hf_radin.average(ingredients, Recipe.uniform(ingredients.ids))
    assert {ingredient.key for ingredient in ingredients}.isdisjoint(
        ingredient.key for ingredient in hf_radin.gather(f"{adapters}/*")
    )


def test_adapters_of_different_bases_make_no_soup(adapters, runs):
    save_adapter(runs / "ft-4", adapters / "ft-3", 3)
    with pytest.raises(ValueError, match=r"ft-3 differs from .*ft-0 in base model"):
        hf_radin.gather(f"{adapters}/*")


def test_a_base_that_moved_is_named(adapters, tmp_path):
    before = hf_radin.gather(f"{adapters}/*")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"ft-0: its base model '.*base' is not here; say where .*--base-model"):
        hf_radin.gather(f"{adapters}/*")
    assert hf_radin.gather(f"{adapters}/*", base_model=tmp_path / "elsewhere").keys == before.keys
    with pytest.raises(ValueError, match=r"ft-0: its base model 'nowhere' can't be used: .*--base-model"):
        hf_radin.gather(f"{adapters}/*", base_model="nowhere")


def test_an_adapter_of_an_adapter_is_refused(adapters):
    change(adapters / "ft-0", base_model_name_or_path=str(adapters / "ft-1"))
    with pytest.raises(ValueError, match=r"ft-0: its base model .*ft-1 is an adapter itself"):
        hf_radin.gather(f"{adapters}/*")


def test_an_adapter_of_wild_weights_is_a_stranger(adapters, digits, tmp_path, caplog):
    path = adapters / "ft-2" / "adapter_model.safetensors"
    tensors = {
        name: 50 * torch.randn_like(tensor) if "lora" in name else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    hf_radin.compute_logits(hf_radin.gather(f"{adapters}/*"), digits, cache_dir=tmp_path / "cache")
    assert "ft-2 does not seem to share its start with 2 others" in caplog.text


def test_an_adapter_that_does_not_fit_its_base_is_named(adapters):
    path = adapters / "ft-1" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"
    save_file({**tensors, name: tensors[name][:2].contiguous()}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"ft-1: the adapter does not fit its base model: .*lora_A.weight has \(2, 32"
    ):
        hf_radin.gather(f"{adapters}/*")
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lora_A.weight has nothing for \(4, 32\)"):
        hf_radin.gather(f"{adapters}/*")


def change(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_each_adapter_is_held_to_its_own_configuration(adapters):
    """Equal tensors, another configuration: what it would not use may not go unnoticed."""
    change(adapters / "ft-1", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"ft-1: the adapter does not fit its base model: .*v_proj.* for nothing"):
        hf_radin.gather(f"{adapters}/*")
    change(adapters / "ft-1", target_modules=["q_proj", "v_proj"], r=8)
    with pytest.raises(
        ValueError, match=r"ft-1: the adapter does not fit its base model: .* has \(4, 32\) for \(8, 32\)"
    ):
        hf_radin.gather(f"{adapters}/*")


def test_equal_tensors_at_another_scale_are_no_copy(adapters):
    shutil.copytree(adapters / "ft-0", adapters / "ft-3")
    change(adapters / "ft-3", lora_alpha=64)
    assert len(hf_radin.gather(f"{adapters}/*")) == 4


def test_a_scale_that_is_no_number_is_refused(adapters):
    change(adapters / "ft-1", lora_alpha=float("nan"))
    with pytest.raises(ValueError, match=r"adapter_config.json can't be read: its lora_alpha holds what is no number"):
        hf_radin.gather(f"{adapters}/*")


def save_trained(base: Path, folder: Path, **options) -> torch.nn.Module:
    """An adapter that was moved at random, with these options of `LoraConfig`; the model as it was in training."""
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], **options}
    torch.manual_seed(0)
    model = get_peft_model(ViTForImageClassification.from_pretrained(base), LoraConfig(r=4, lora_alpha=6, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def inspected(folder: Path) -> hf_radin.Ingredient:
    (verdict,) = hf_radin.inspect(folder)
    assert verdict.ingredient, verdict.problem
    return verdict.ingredient


KINDS = {
    **{
        f"began as {kind}": {"init_lora_weights": kind} for kind in (True, False, "gaussian", "pissa", "olora", "mica")
    },
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "init_lora_weights": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}, "init_lora_weights": "olora"},
    "biases": {"bias": "all"},
    "bias of its own": {"lora_bias": True},
    "a pattern": {"target_modules": r".*layers\.0\.attention\.(q|v)_proj"},
    "some layers": {"layers_to_transform": [1]},
    "without one": {"exclude_modules": ["vit.layers.1.attention.q_proj"]},
    "parameters": {"target_modules": None, "target_parameters": ["q_proj.weight"]},
    "a convolution": {"target_modules": ["projection"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_model_that_was_trained_and_one_model_in_all_dtypes(start, tmp_path, kind):
    """peft#1626: peft takes a part out of the base when it loads some kinds, and refuses float64."""
    trained = save_trained(start, tmp_path / "ft", **KINDS[kind])
    ingredient = inspected(tmp_path / "ft")
    model = ingredient.load_model(torch.float32)
    pixels = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels).logits, trained(pixels).logits, rtol=1e-4, atol=1e-5)
    for dtype in (torch.float64, torch.bfloat16):
        other = ingredient.load_model(dtype).state_dict()
        assert all(torch.equal(tensor.to(dtype), other[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("beginning", ["pissa", "olora"])
def test_logits_and_soups_are_of_the_same_adapters(start, digits, tmp_path, beginning):
    for seed in range(2):
        save_trained(start, tmp_path / f"ft-{seed}", init_lora_weights=beginning, lora_dropout=0.1 * seed)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    soup = hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache"))
    parts = [ingredient.load_model(torch.float32).state_dict() for ingredient in ingredients]
    for name, tensor in soup.model.state_dict().items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)


def test_what_a_load_draws_is_not_the_users(start, tmp_path):
    save_trained(start, tmp_path / "ft")
    ingredient = inspected(tmp_path / "ft")
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    ingredient.load_model(torch.float32)
    assert torch.equal(torch.rand(1), expected)


def test_a_random_beginning_is_told_and_loads_alike_each_time(start, tmp_path):
    save_trained(start, tmp_path / "ft", init_lora_weights="pissa_niter_4")
    (verdict,) = hf_radin.inspect(tmp_path / "ft")
    assert "began as pissa_niter_4: what was taken out of its base was drawn at random" in verdict.notes[0]
    first, second = (verdict.ingredient.load_model(torch.float32).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("beginning", ["corda", "loftq", "lora_ga", "PiSSA", "unheard-of"])
def test_a_beginning_that_cannot_be_had_again_is_refused_at_once(adapters, beginning):
    change(adapters / "ft-1", init_lora_weights=beginning)
    with pytest.raises(ValueError, match=rf"ft-1: an adapter that began as '{beginning}' .* \(merge_and_unload\)"):
        hf_radin.gather(f"{adapters}/*")


def test_adapters_of_float64_are_merged_in_float64(start, tmp_path):
    save_trained(start, tmp_path / "ft")
    path = tmp_path / "ft" / "adapter_model.safetensors"
    tensors = {name: tensor.double() / 3 for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    name = "vit.layers.0.attention.q_proj"
    weight = inspected(tmp_path / "ft").load_model(torch.float64).state_dict()[f"{name}.weight"]
    base = ViTForImageClassification.from_pretrained(start, dtype=torch.float64).state_dict()[f"{name}.weight"]
    down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(weight, base + 1.5 * up @ down, rtol=1e-12, atol=1e-14)


def test_several_adapters_in_a_folder_are_named_one_by_one(start, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(ViTForImageClassification.from_pretrained(start), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    assert inspected(tmp_path / "both" / "second")
    with pytest.raises(ValueError, match=r"both: no config.json.* Its folders look like checkpoints: .*both/\*"):
        hf_radin.gather(tmp_path / "both")


def test_the_base_is_not_written_over(adapters, tmp_path):
    ingredients = hf_radin.gather(f"{adapters}/*")
    with pytest.raises(ValueError, match=r"The output .*base is the ingredient .*base, which would be lost"):
        hf_radin.average(ingredients, Recipe.uniform(ingredients.ids), output=tmp_path / "base", overwrite=True)


def test_one_base_by_two_names_is_one(adapters, tmp_path):
    change(adapters / "ft-1", base_model_name_or_path=f"{tmp_path}/adapters/../base")
    assert len(hf_radin.gather(f"{adapters}/*")) == 3


def test_an_adapter_is_of_the_architecture_that_it_makes(start, runs, tmp_path):
    base = ViTModel.from_pretrained(start, add_pooling_layer=False)  # "ViTModel", says its configuration
    base.save_pretrained(tmp_path / "base")
    shutil.copy(start / "preprocessor_config.json", tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "ft-0", 0)
    ingredients = hf_radin.gather([tmp_path / "ft-0", runs / "ft-0"])
    assert {ingredient.architecture for ingredient in ingredients} == {"ViTForImageClassification"}


def test_a_copy_of_an_adapter_is_kept_once(adapters, caplog):
    shutil.copytree(adapters / "ft-0", adapters / "ft-copy")
    assert len(hf_radin.gather(f"{adapters}/*")) == 3
    assert "ft-copy is the same checkpoint as" in caplog.text


def test_without_peft_it_is_said_what_to_install(adapters):
    code = "import sys; sys.modules['peft'] = None; import hf_radin; hf_radin.gather(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, f"{adapters}/*"], capture_output=True, text=True)
    assert run.returncode == 1 and "ft-0 is a LoRA adapter: install hf_radin[peft]" in run.stderr


def test_a_soup_of_adapters_is_cooked_again(adapters, digits, tmp_path):
    ingredients = hf_radin.gather(f"{adapters}/*")
    soup = hf_radin.uniform(hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    cooked = hf_radin.average(*find_ingredients(tmp_path / "soup"))
    assert all(torch.equal(cooked[name], tensor) for name, tensor in soup.model.state_dict().items())
