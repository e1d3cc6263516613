"""A start is the body that fine-tunes began from, under whatever head: it is mixed into theirs, or refused."""

import copy
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.architectures import INSTALLED, build, save_fine_tunes
from shared.starts import save_backbone, with_start
from transformers import (
    AutoModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import hf_radin
from hf_radin.checkpoints.model import class_axes
from hf_radin.recipes.recipe import Pull, Recipe
from hf_radin.weights.average import average_model
from hf_radin.weights.start import find_start, load_body, named_start


@pytest.fixture(scope="module")
def backbone(start, tmp_path_factory):
    return save_backbone(start, tmp_path_factory.mktemp("backbone"), noise=0.1)


@pytest.fixture(scope="module")
def pulled(runs, backbone):
    """Three fine-tunes, and where they began, but for noise."""
    return with_start(hf_radin.gather(f"{runs}/ft-[012]"), backbone)


def body_of(backbone) -> dict[str, torch.Tensor]:
    """The tensors of a backbone as a classifier calls them."""
    return {f"vit.{name}": tensor for name, tensor in ViTModel.from_pretrained(backbone).state_dict().items()}


def recipe_of(ingredients, share, weights=(0.5, 0.2, 0.3)) -> Recipe:
    return Recipe(ingredients.ids, weights, Pull(ingredients.start.id, share))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.7])
def test_the_body_is_mixed_by_the_share_and_the_head_is_the_soups(pulled, backbone, share):
    recipe, body = recipe_of(pulled, share), body_of(backbone)
    soup = hf_radin.average(pulled, recipe.ensemble, dtype="float64")
    mixed = hf_radin.average(pulled, recipe)
    assert mixed.keys() == soup.keys() and {name for name in mixed if name not in body} == {
        "classifier.weight",
        "classifier.bias",
    }
    for name, tensor in mixed.items():
        expected = soup[name]
        if name in body:
            expected = (1 - share) * soup[name] + share * body[name].double()
        assert torch.equal(tensor, expected.float()), name


def test_a_start_of_the_same_body_changes_nothing(runs, tmp_path):
    ingredients = hf_radin.gather([f"{runs}/ft-0", f"{runs}/ft-1"])
    single = Recipe.uniform(ingredients.ids[:1])
    with_itself = with_start(ingredients, save_backbone(runs / "ft-0", tmp_path / "body"))
    for share in (0.1, 0.37, 0.9):
        again = hf_radin.average(with_itself, replace(single, pull=Pull(with_itself.start.id, share)))
        assert all(torch.equal(tensor, again[name]) for name, tensor in hf_radin.average(ingredients, single).items())


def test_a_start_that_changes_is_noticed(pulled, runs, start, tmp_path):
    folder = save_backbone(start, tmp_path / "start")
    ingredients = with_start(hf_radin.gather(f"{runs}/ft-[01]"), folder)
    recipe = recipe_of(ingredients, 0.5, (0.5, 0.5))
    average_model(ingredients, recipe)
    save_backbone(start, folder, noise=0.2)
    with pytest.raises(ValueError, match="has changed: it was sha256:"):
        average_model(ingredients, recipe)


def test_the_random_numbers_of_the_user_stay_the_same(pulled):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_body(pulled.start, pulled[0].config, torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_statistics_of_batchnorm_are_mixed_and_counts_are_the_soups(nets, tmp_path):
    ResNetForImageClassification.from_pretrained(nets / "start").resnet.save_pretrained(tmp_path / "body")
    ingredients = with_start(hf_radin.gather(f"{nets}/ft-*"), tmp_path / "body")
    recipe = recipe_of(ingredients, 0.4)
    soup = hf_radin.average(ingredients, recipe.ensemble, dtype="float64")
    mixed = hf_radin.average(ingredients, recipe)
    name = "resnet.embedder.embedder.normalization"
    began = ResNetModel.from_pretrained(tmp_path / "body").state_dict()["embedder.embedder.normalization.running_var"]
    expected = 0.6 * soup[f"{name}.running_var"].double() + 0.4 * began.double()
    assert torch.equal(mixed[f"{name}.running_var"], expected.float())
    assert torch.equal(mixed[f"{name}.num_batches_tracked"], soup[f"{name}.num_batches_tracked"])


def others_of(config: ViTConfig, kind: str) -> PreTrainedModel:
    """A model of the same body that was made for something else."""
    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    match kind:
        case "other classes":
            return ViTForImageClassification(ViTConfig(**{**config.to_dict(), "num_labels": 1000}))
        case "masked images":
            return ViTForMaskedImageModeling(config)
        case "masked autoencoder":
            decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
            return ViTMAEForPreTraining(ViTMAEConfig(**{name: getattr(config, name) for name in sizes}, **decoder))
    return ViTModel(config)


@pytest.mark.parametrize("kind", ["other classes", "masked images", "masked autoencoder", "shards", "half precision"])
def test_what_was_trained_for_something_else_is_a_start(runs, start, tmp_path, kind):
    model = ViTForImageClassification.from_pretrained(start)
    other = others_of(model.config, kind)
    getattr(other, "vit", other).load_state_dict(model.vit.state_dict(), strict=False)
    other.to(torch.float16 if kind == "half precision" else torch.float32)
    other.save_pretrained(tmp_path, max_shard_size="20kB" if kind == "shards" else "1GB")
    ingredients = with_start(hf_radin.gather(f"{runs}/ft-[01]"), tmp_path)
    body = load_body(ingredients.start, ingredients[0].config, torch.float32)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vit.")}
    assert body.keys() == expected.keys()
    tolerance = 1e-3 if kind == "half precision" else 0
    for name, tensor in body.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance)


# Classes whose backbone has all but the head; those of others lack a norm that is behind the body.
WHOLE = {
    "Beit",
    "Bit",
    "CLIP",
    "ConvNext",
    "DeiT",
    "Dinov2",
    "EfficientNet",
    "MobileNetV2",
    "ResNet",
    "Swin",
    "ViTMSN",
}


@pytest.mark.parametrize(
    "architecture",
    [each for each in INSTALLED if each.class_name.removesuffix("ForImageClassification") in WHOLE],
    ids=str,
)
def test_the_backbone_of_an_architecture_is_a_start(architecture, tmp_path):
    save_fine_tunes(architecture, tmp_path, count=2)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    model = AutoModel.from_config(build(architecture).config)
    model.save_pretrained(tmp_path / "backbone")
    ingredients = with_start(ingredients, tmp_path / "backbone")
    mixed = hf_radin.average(ingredients, recipe_of(ingredients, 0.3, (0.5, 0.5)))
    soup = hf_radin.average(ingredients, Recipe.uniform(ingredients.ids), dtype="float64")
    body = load_body(ingredients.start, ingredients[0].config, torch.float64)
    assert mixed.keys() - body.keys() == {*class_axes(ingredients[0].config)} and body.keys() < mixed.keys()
    began = [tensor.double() for tensor in model.state_dict().values()]
    for name, tensor in mixed.items():
        expected = soup[name]
        if name in body and tensor.is_floating_point():
            assert any(torch.equal(body[name], other) for other in began), name
            expected = 0.7 * expected + 0.3 * body[name]
        assert torch.equal(tensor, expected.to(tensor.dtype)), name


def test_what_does_not_fit_is_refused(runs, start, backbone, tmp_path):
    config = ViTForImageClassification.from_pretrained(start).config
    ViTModel(ViTConfig(**{**config.to_dict(), "hidden_size": 64})).save_pretrained(tmp_path / "wide")
    ViTModel(ViTConfig(**{**config.to_dict(), "num_hidden_layers": 1})).save_pretrained(tmp_path / "flat")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path / "net")
    (tmp_path / "file").write_text("a model")
    (tmp_path / "pickled").mkdir()
    config.save_pretrained(tmp_path / "pickled")
    torch.save(ViTModel(config).state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    tensors = load_file(backbone / "model.safetensors")
    tensors["layernorm.bias"][3] = float("nan")
    shutil.copytree(backbone, tmp_path / "broken")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    says = {
        "wide": r"wide': no weights for vit\.embeddings\.cls_token \(it has \(1, 1, 64\) for \(1, 1, 32\)\)",
        "flat": r"flat': no weights for vit\.layers\.1",
        "net": r"net': no weights for vit\.embeddings\.cls_token",
        "file": r"is a file; a checkpoint is a folder",
        "nothing": r"There is no folder .*nothing' here",
        "pickled": r"It has pytorch_model.bin: only safetensors are read",
        "broken": r"vit\.layernorm\.bias has NaN",
    }
    ingredients = hf_radin.gather(f"{runs}/ft-[01]")
    for name, message in says.items():
        with pytest.raises(ValueError, match=f"start='{tmp_path}/.*{message}.*leave start \\(--start\\) out"):
            find_start(str(tmp_path / name), ingredients)
    with pytest.raises(ValueError, match=r"is the ingredient .*ft-0: name it so"):
        find_start(f"{runs}/ft-0/", ingredients)
    with pytest.raises(ValueError, match="it names 2 checkpoints"):
        find_start(f"{tmp_path}/[wn]*", hf_radin.gather(f"{runs}/ft-[01]"))


def test_a_recipe_whose_start_is_not_there_is_refused(pulled, runs):
    ingredients = hf_radin.gather(f"{runs}/ft-[012]")
    with pytest.raises(ValueError, match=r"pulls its soup to the start '.*', and these ingredients have none"):
        hf_radin.average(ingredients, recipe_of(pulled, 0.5))
    with pytest.raises(ValueError, match=f"the start 'other', and these ingredients have {pulled.start.id}"):
        hf_radin.average(pulled, Recipe(pulled.ids[:1], (1.0,), Pull("other", 0.5)))


def test_what_is_selected_of_ingredients_has_their_start(pulled):
    for ingredients in (pulled.select(pulled.ids[:2]), pulled.by_content, pulled[1:], copy.deepcopy(pulled)):
        assert ingredients.start == pulled.start
    assert pickle.loads(pickle.dumps(pulled)).start == pulled.start


def test_a_base_model_is_named_where_all_cards_agree_on_it(two, backbone):
    assert named_start(hf_radin.gather(f"{two}/*")) is None
    for run in two.iterdir():
        assert named_start(hf_radin.gather(f"{two}/*")) is None
        (run / "README.md").write_text(f"---\nbase_model: {backbone}\n---\n")
    assert named_start(hf_radin.gather(f"{two}/*")) == str(backbone)


def test_what_transformers_4_writes_into_configurations_names_the_start_too(two, backbone):
    for run in two.iterdir():
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "_name_or_path": str(backbone)}))
    assert named_start(hf_radin.gather(f"{two}/*")) == str(backbone)
    (run / "README.md").write_text("---\nbase_model: org/vit\n---\n")
    assert named_start(hf_radin.gather(f"{two}/*")) == str(backbone)  # one card alone says nothing of all
