"""The adapter of a soup is the soup: reloaded by peft alone, it gives the same logits to rounding."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from shared.lora import logits, reloaded, save_trained
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ImageGPTConfig,
    ImageGPTImageProcessor,
    PretrainedConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import hf_radin
from hf_radin.adapters.adapter import AdapterError, check_adapters, rank_limit, write_adapter
from hf_radin.checkpoints import lora
from hf_radin.recipes.recipe import Pull, Recipe
from hf_radin.soup.report import SearchReport
from hf_radin.weights.average import average_model
from hf_radin.weights.start import find_start

SIZE = 16
IMAGES = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
VIT = ViTConfig(
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    **{"image_size": SIZE, "patch_size": 4, "num_labels": 5},
)


def save_base(folder: Path, config: PretrainedConfig = VIT) -> Path:
    """A base of an architecture, with random weights."""
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    if config.model_type == "imagegpt":
        processor = ImageGPTImageProcessor(clusters=[[-1.0] * 3, [1.0] * 3], size={"height": 4, "width": 4})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapters(base, tmp_path) -> Callable[..., hf_radin.Ingredients]:
    """Makes adapters of the base, one for each set of options, and gathers them."""

    def gather(*options: dict) -> hf_radin.Ingredients:
        places = [
            save_trained(base, tmp_path / f"ft-{seed}", seed, **{"target_modules": ["q_proj", "fc1"], **chosen})
            for seed, chosen in enumerate(options)
        ]
        return hf_radin.gather(places)

    return gather


def cooked(ingredients: hf_radin.Ingredients, folder: Path, recipe: Recipe | None = None, **options) -> SearchReport:
    """What the recipe says of an average with its adapter, by default one with other weights for each."""
    count = len(ingredients)
    recipe = recipe or Recipe(ingredients.ids, tuple(2 * (at + 1) / (count * (count + 1)) for at in range(count)))
    hf_radin.average(ingredients, recipe, output=folder, **{"save_adapter": True, **options})
    return SearchReport.read(folder / "recipe.json", is_saved=True)


def assert_is_the_soup(base: Path, folder: Path, images: torch.Tensor = IMAGES) -> None:
    """The law: base and adapter, loaded by peft alone, are the soup to rounding."""
    soup = AutoModelForImageClassification.from_pretrained(folder).eval()
    expected = logits(soup, images)
    torch.testing.assert_close(logits(reloaded(base, folder / "adapter"), images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(AutoModelForImageClassification.from_pretrained(base).eval(), images))


ARCHITECTURES = {
    "convnext": (
        ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], patch_size=2, image_size=SIZE, num_labels=5),
        r".*(pwconv\d|downsampling_layer\.1|patch_embeddings)",
    ),
    "swin": (
        SwinConfig(
            **{"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 2},
            image_size=SIZE,
            num_labels=5,
        ),
        r".*(q_proj|query|fc1|intermediate\.dense|reduction|projection)",
    ),
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="bottleneck", num_labels=5),
        r".*convolution",
    ),
    "imagegpt": (
        ImageGPTConfig(vocab_size=3, n_positions=16, n_embd=16, n_layer=2, n_head=2, num_labels=5),
        r".*(c_attn|c_fc)",
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_the_soup_in_other_architectures(tmp_path, name):
    """Convolutions of all sizes; weights that are stored the other way round, as of ImageGPT."""
    config, targets = ARCHITECTURES[name]
    base = save_base(tmp_path / "base", config)
    saved = ["score"] if name == "imagegpt" else ["classifier"]
    options = {"target_modules": targets, "modules_to_save": saved}
    ingredients = hf_radin.gather([save_trained(base, tmp_path / f"ft-{seed}", seed, **options) for seed in range(2)])
    made = cooked(ingredients, tmp_path / "soup").adapter
    assert made.layers > 3 and made.lost == 0 and len(made.modules_to_save) == 1
    images = torch.randint(3, (6, 16), generator=torch.Generator().manual_seed(0)) if name == "imagegpt" else IMAGES
    assert_is_the_soup(base, tmp_path / "soup", images)


KINDS = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"fc1": 16}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "trained biases": {"bias": "all"},
    "trained biases of its layers": {"bias": "lora_only"},
    "a bias of its own": {"lora_bias": True},
    "other layers": {"target_modules": ["v_proj", "projection"], "r": 2},
    "no head": {"modules_to_save": None},
    "another head": {"target_modules": ["q_proj", "classifier"], "modules_to_save": None},
    "a module that holds layers": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "classifier"]},
    "what is no module": {"modules_to_save": ["vit.embeddings", "classifier"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_soup_of_adapters_of_two_kinds(base, adapters, tmp_path, kind):
    """One of the usual kind, and another: peft#1626 and peft#3737 among what could go wrong."""
    cooked(adapters({}, KINDS[kind]), tmp_path / "soup")
    assert_is_the_soup(base, tmp_path / "soup")


def test_ranks_add_up_and_heads_are_saved_whole(base, adapters, tmp_path):
    made = cooked(adapters({"r": 4}, {"r": 2}, {"r": 3}), tmp_path / "soup").adapter
    assert (made.rank, made.layers, made.limit, made.lost, made.full) == (9, 4, None, 0.0, 0)
    assert made.modules_to_save == ("classifier",)
    options = json.loads((tmp_path / "soup" / "adapter" / "adapter_config.json").read_text())
    assert (options["r"], options["lora_alpha"], options["rank_pattern"], options["use_rslora"]) == (9, 9, {}, False)
    saved = load_file(tmp_path / "soup" / "adapter" / "adapter_model.safetensors")
    assert made.parameters == sum(tensor.numel() for tensor in saved.values())
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert torch.equal(saved["base_model.model.classifier.weight"], soup.classifier.weight)


def test_a_layer_that_one_adapter_has_keeps_its_rank(adapters, tmp_path):
    cooked(adapters({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}), tmp_path / "soup")
    saved = load_file(tmp_path / "soup" / "adapter" / "adapter_model.safetensors")
    ranks = {name.split(".")[-3]: len(tensor) for name, tensor in saved.items() if ".lora_A." in name}
    assert ranks == {"q_proj": 8, "v_proj": 4}


def test_ranks_beyond_the_matrix_are_those_of_the_matrix_and_lose_nothing(base, adapters, tmp_path):
    report = cooked(adapters({"r": 20}, {"r": 20}), tmp_path / "soup")
    assert (report.adapter.rank, report.adapter.full, report.adapter.lost, report.adapter.limit) == (32, 4, 0.0, None)
    assert "In 4 layers ranks add up beyond that of the matrix" in (tmp_path / "soup" / "README.md").read_text()
    assert_is_the_soup(base, tmp_path / "soup")


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_what_a_cut_loses_is_what_is_recorded(base, adapters, tmp_path, rank):
    """Against the merged weights: the Frobenius norm of the difference over that of what the adapters add."""
    report = cooked(adapters({}, {"r": 2}), tmp_path / "soup", save_adapter=rank)
    assert (report.adapter.rank, report.adapter.limit) == (rank, rank)
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").state_dict()
    cut = reloaded(base, tmp_path / "soup" / "adapter").merge_and_unload().state_dict()
    before = AutoModelForImageClassification.from_pretrained(base).state_dict()
    adapted = [name for name in soup if name.endswith(("q_proj.weight", "fc1.weight"))]

    def norm(first, second) -> float:
        return math.sqrt(sum(float(((first[name] - second[name]).double() ** 2).sum()) for name in adapted))

    assert math.isclose(report.adapter.lost, norm(soup, cut) / norm(soup, before), rel_tol=1e-4)
    assert f"It was cut to rank {rank}, which lost" in (tmp_path / "soup" / "README.md").read_text()


def test_a_limit_that_cuts_nothing_is_exact(base, adapters, tmp_path):
    assert cooked(adapters({}, {}), tmp_path / "soup", save_adapter=8).adapter.limit is None
    assert_is_the_soup(base, tmp_path / "soup")


def test_the_base_may_be_an_ingredient_and_a_start(base, adapters, tmp_path):
    adapters({}, {})
    ingredients = hf_radin.gather([tmp_path / "ft-0", tmp_path / "ft-1", base])
    cooked(ingredients, tmp_path / "soup")
    assert_is_the_soup(base, tmp_path / "soup")
    two = ingredients[:2]
    pulled = hf_radin.Ingredients(two, start=find_start(str(base), two))
    recipe = Recipe(two.ids, (0.5, 0.5), Pull(str(base), 0.4))
    cooked(pulled, tmp_path / "pulled", recipe)
    assert_is_the_soup(base, tmp_path / "pulled")


def test_a_start_that_is_another_model_is_refused(adapters, tmp_path):
    two = adapters({}, {})
    torch.manual_seed(1)
    model = AutoModelForImageClassification.from_config(VIT)
    model.save_pretrained(tmp_path / "other")
    pulled = hf_radin.Ingredients(two, start=find_start(str(tmp_path / "other"), two))
    with pytest.raises(AdapterError, match=r"a soup that is pulled to .*other at .* is no adapter of .*base"):
        cooked(pulled, tmp_path / "soup", Recipe(two.ids, (0.5, 0.5), Pull(str(tmp_path / "other"), 0.4)))
    assert not (tmp_path / "soup").exists()


def test_half_precision_and_double(base, adapters, tmp_path):
    ingredients = adapters({}, {"init_lora_weights": "pissa"})
    for dtype, near in (("bfloat16", 0.05), ("float64", 1e-5)):
        made = cooked(ingredients, tmp_path / dtype, dtype=dtype).adapter
        assert made.modules_to_save == ("classifier",)
        soup = AutoModelForImageClassification.from_pretrained(tmp_path / dtype, dtype="float32").eval()
        torch.testing.assert_close(
            logits(reloaded(base, tmp_path / dtype / "adapter"), IMAGES), logits(soup, IMAGES), rtol=0, atol=near
        )


def test_a_base_without_a_head_has_that_of_the_adapter(tmp_path):
    base = save_base(tmp_path / "base")
    ViTModel(VIT, add_pooling_layer=False).save_pretrained(base)
    ingredients = hf_radin.gather(
        [save_trained(base, tmp_path / f"ft-{seed}", seed, target_modules=["q_proj"]) for seed in range(2)]
    )
    cooked(ingredients, tmp_path / "soup")
    assert_is_the_soup(base, tmp_path / "soup")


def test_classes_in_another_order_and_left_out(tmp_path):
    base = save_base(tmp_path / "base")
    names = [["a", "b", "c", "d", "e"], ["e", "d", "c", "b", "x"]]
    for seed, classes in enumerate(names):
        folder = save_trained(base, tmp_path / f"ft-{seed}", seed, target_modules=["q_proj"])
        config = ViTConfig(**{**VIT.to_dict(), "id2label": dict(enumerate(classes)), "label2id": None})
        config.save_pretrained(folder)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*", classes=["b", "c", "d", "e"])
    cooked(ingredients, tmp_path / "soup")
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval()
    again = reloaded(base, tmp_path / "soup" / "adapter", config=soup.config, ignore_mismatched_sizes=True)
    torch.testing.assert_close(logits(again, IMAGES), logits(soup, IMAGES), rtol=1e-4, atol=1e-5)


def test_transformers_loads_it_by_its_folder_and_it_is_an_ingredient_again(adapters, tmp_path):
    cooked(adapters({}, {"bias": "all"}), tmp_path / "soup")
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval()
    model = AutoModelForImageClassification.from_pretrained(str(tmp_path / "soup" / "adapter")).eval()
    torch.testing.assert_close(logits(model, IMAGES), logits(soup, IMAGES), rtol=1e-4, atol=1e-5)
    (verdict,) = hf_radin.inspect(tmp_path / "soup" / "adapter")
    merged = verdict.ingredient.load_model(torch.float32)
    torch.testing.assert_close(logits(merged, IMAGES), logits(soup, IMAGES), rtol=1e-4, atol=1e-5)


def test_the_same_adapter_is_the_same_file(adapters, tmp_path):
    ingredients = adapters({}, {"r": 3, "target_modules": ["v_proj", "fc1"]})
    recipe = Recipe.uniform(ingredients.ids)
    first, second = (cooked(ingredients, tmp_path / name, recipe).adapter for name in ("first", "second"))
    assert first == second and {"adapter_model.safetensors", "adapter_config.json"} <= first.files.keys()
    other = hf_radin.Ingredients(reversed(ingredients))
    third = cooked(other, tmp_path / "third", Recipe.uniform(other.ids)).adapter
    assert third.files == first.files


@pytest.mark.parametrize("changed", ["vit.layers.1", "vit.layernorm", "vit.embeddings", "classifier"])
def test_whatever_else_made_the_soup_another_is_saved_whole(base, adapters, tmp_path, changed):
    """As refitted heads and distilled layers do."""
    ingredients = adapters({}, {"bias": "all"})
    recipe = Recipe.uniform(ingredients.ids)
    soup = average_model(ingredients, recipe)
    with torch.no_grad():
        for parameter in soup.get_submodule(changed).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    made = write_adapter(soup, ingredients.processor, ingredients, recipe, tmp_path)
    assert all(name.startswith((changed, "classifier")) for name in made.modules_to_save)
    again = reloaded(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, IMAGES), logits(soup, IMAGES), rtol=1e-4, atol=1e-5)


def test_statistics_are_saved_whole(tmp_path):
    """BatchNorm's, which are no weights, and are estimated anew for a soup."""
    config, targets = ARCHITECTURES["resnet"]
    base = save_base(tmp_path / "base", config)
    options = {"target_modules": targets}
    ingredients = hf_radin.gather([save_trained(base, tmp_path / f"ft-{seed}", seed, **options) for seed in range(2)])
    recipe = Recipe.uniform(ingredients.ids)
    soup = average_model(ingredients, recipe)
    for name, buffer in soup.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1)
    made = write_adapter(soup, ingredients.processor, ingredients, recipe, tmp_path)
    assert any(name.endswith("normalization") for name in made.modules_to_save)
    again = reloaded(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, IMAGES), logits(soup, IMAGES), rtol=1e-4, atol=1e-5)


NOT_PLAIN = {
    "use_dora": {"use_dora": True},
    "target_parameters": {"target_modules": None, "target_parameters": ["q_proj.weight"]},
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_not_linear_is_refused_by_name_and_merged_as_before(adapters, tmp_path, kind):
    ingredients = adapters({}, NOT_PLAIN[kind])
    with pytest.raises(AdapterError, match=rf"ft-1: it has {kind}, and only plain LoRA .* without save_adapter"):
        cooked(ingredients, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    assert cooked(ingredients, tmp_path / "soup", save_adapter=False).adapter is None


def test_whole_checkpoints_and_none_but_these_are_refused_by_name(base, adapters, tmp_path):
    adapters({}, {})
    for name in ("whole-0", "whole-1"):
        shutil.copytree(base, tmp_path / name)
        torch.manual_seed(len(os.listdir(tmp_path)))
        AutoModelForImageClassification.from_config(VIT).save_pretrained(tmp_path / name)
    with pytest.raises(
        AdapterError, match=r"whole-0 is a whole checkpoint, and no adapter of .*base0 at .* as .*ft-0"
    ):
        check_adapters(hf_radin.gather([tmp_path / "ft-0", tmp_path / "whole-0"]))
    with pytest.raises(AdapterError, match=r"none of .*whole-0, .*whole-1 is a LoRA adapter\. Leave save_adapter"):
        check_adapters(hf_radin.gather(f"{tmp_path}/whole-*"))


def test_adapters_of_two_bases_are_refused_with_both(adapters, tmp_path):
    two = adapters({}, {})
    other = save_base(tmp_path / "other", ViTConfig(**{**VIT.to_dict(), "layer_norm_eps": 1e-5}))
    (verdict,) = hf_radin.inspect(save_trained(other, tmp_path / "far", 5, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"ft-0 is an adapter of .*base\S* at .*, and .*far of .*other at"):
        check_adapters(hf_radin.Ingredients([*two, verdict.ingredient]))


def test_a_soup_that_is_the_base_is_no_adapter(base, adapters, tmp_path):
    adapters({}, {})
    ingredients = hf_radin.gather([tmp_path / "ft-0", base])
    with pytest.raises(AdapterError, match="is a LoRA adapter"):
        cooked(ingredients, tmp_path / "soup", Recipe((str(base),), (1.0,)))


@pytest.mark.parametrize("value", [0, -3, 2.5, "4", None])
def test_what_is_no_rank_is_refused(adapters, tmp_path, value):
    with pytest.raises(ValueError, match="save_adapter="):
        cooked(adapters({}, {}), tmp_path / "soup", save_adapter=value)
    assert not (tmp_path / "soup").exists()


def test_true_is_no_rank_of_one():
    assert rank_limit(True) is None and rank_limit(1) == 1


def test_weights_are_looked_at_once_for_each_kind(adapters, monkeypatch):
    """Fifty adapters of one sweep are vetted as one."""
    calls, check = [], hf_radin.Ingredient.check_plain
    monkeypatch.setattr(hf_radin.Ingredient, "check_plain", lambda self: calls.append(self.id) or check(self))
    check_adapters(adapters({}, {}, {"r": 2}))
    assert len(calls) == 2


def test_the_fields_that_kinds_are_told_by_are_those_of_peft():
    assert {*lora.NOT_PLAIN} <= {field.name for field in fields(LoraConfig)}
