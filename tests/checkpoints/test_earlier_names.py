"""Adapters whose layers were renamed by transformers since they were trained (peft's ViT tutorial: query, value)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shared.architectures import INSTALLED, build, build_processor
from transformers import AutoModelForImageClassification

import hf_radin

PREFIX = "base_model.model."
ATTENTION = [
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
]
DENSE = [*ATTENTION, ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")]
SWIN = [(now, earlier.replace("attention.attention", "attention.self")) for now, earlier in DENSE]
# Of each architecture what its layers are called now, and were in transformers 4.
RENAMED = {
    "ViTForImageClassification": [("vit.layers.", "vit.encoder.layer."), *DENSE],
    "BeitForImageClassification": [("beit.layers.", "beit.encoder.layer."), *DENSE],
    "DeiTForImageClassification": [("deit.layers.", "deit.encoder.layer."), *DENSE],
    "ViTMSNForImageClassification": [("vit.layers.", "vit.encoder.layer."), *DENSE],
    "Dinov2ForImageClassification": ATTENTION,
    "SwinForImageClassification": SWIN,
    "CLIPForImageClassification": [],
    "SiglipForImageClassification": [],
    "ConvNextForImageClassification": [],
}
NOW = {"ConvNextForImageClassification": ["pwconv1"], "CLIPForImageClassification": ["q_proj", "v_proj"]}
NOW["SiglipForImageClassification"] = NOW["CLIPForImageClassification"]
EARLIER = {now.rpartition(".")[2]: earlier.rpartition(".")[2] for now, earlier in DENSE}


def save_adapter(class_name: str, folder: Path, **options) -> Path:
    """A base and an adapter of it, in today's names."""
    architecture = next(architecture for architecture in INSTALLED if architecture.class_name == class_name)
    torch.manual_seed(0)
    base = build(architecture)
    base.save_pretrained(folder / "base")
    build_processor(architecture).save_pretrained(folder / "base")
    model = AutoModelForImageClassification.from_pretrained(folder / "base")
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
    get_peft_model(model, config).save_pretrained(folder / "now")
    return folder / "now"


def rename(folder: Path, pairs: list[tuple[str, str]], **fields) -> Path:
    """The same adapter as an earlier version saved it."""
    earlier = Path(shutil.copytree(folder, folder.parent / "earlier"))
    tensors = load_file(folder / "adapter_model.safetensors")
    for now, then in pairs:
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    save_file(tensors, earlier / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (earlier / "adapter_config.json").write_text(json.dumps(config | fields))
    return earlier


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (verdict,) = hf_radin.inspect(folder)
    assert verdict.ingredient, verdict.problem
    return verdict.ingredient.load_model(torch.float32).state_dict()


@pytest.mark.parametrize("class_name", RENAMED)
def test_an_adapter_under_earlier_names_merges_to_the_same_bits(class_name, tmp_path):
    targets = NOW.get(class_name, ["q_proj", "v_proj"])
    now = save_adapter(class_name, tmp_path, target_modules=targets)
    earlier = rename(now, RENAMED[class_name], target_modules=[EARLIER.get(name, name) for name in targets])
    if not RENAMED[class_name]:
        earlier = now
    merged = tensors_of(earlier)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tensors_of(now).items())
    tensors = load_file(now / "adapter_model.safetensors")
    by_hand = AutoModelForImageClassification.from_pretrained(tmp_path / "base").state_dict()
    for name in (name for name in tensors if "lora_A" in name):
        change = 1.5 * (tensors[name.replace("lora_A", "lora_B")] @ tensors[name])
        by_hand[name.removeprefix(PREFIX).replace(".lora_A", "")] += change
    assert len(tensors) > 2 and all(torch.equal(tensor, merged[name]) for name, tensor in by_hand.items())


VIT = "ViTForImageClassification"
OPTIONS = [
    # now, earlier
    ({"target_modules": ["o_proj", "fc1", "fc2"]}, {"target_modules": ["dense"]}),
    (
        {"target_modules": r".*layers\.1\.attention\.(q|v)_proj"},
        {"target_modules": r".*layer\.1\.attention\.attention\.(query|value)"},
    ),
    (
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"1.*q_proj": 9}},
        {"target_modules": ["query", "value"], "rank_pattern": {"value": 2}, "alpha_pattern": {"1.*query": 9}},
    ),
    (
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "layers.1.mlp.fc1"]},
        {"target_modules": ["query"], "modules_to_save": ["classifier", "layer.1.intermediate.dense"]},
    ),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["vit.layers.0.attention.q_proj"]},
        {"target_modules": ["query"], "exclude_modules": ["vit.encoder.layer.0.attention.attention.query"]},
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    ({"target_modules": ["v_proj"], "bias": "all"}, {"target_modules": ["value"], "bias": "all"}),
]


@pytest.mark.parametrize(("now", "earlier"), OPTIONS, ids=[str(earlier) for _, earlier in OPTIONS])
def test_all_that_a_configuration_says_of_layers_is_read_in_their_earlier_names(now, earlier, tmp_path):
    folder = save_adapter(VIT, tmp_path, **now)
    merged = tensors_of(rename(folder, RENAMED[VIT], **earlier))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tensors_of(folder).items())


def test_it_is_told_what_was_read_as_what(tmp_path):
    folder = save_adapter(VIT, tmp_path, target_modules=["q_proj", "fc1"])
    (verdict,) = hf_radin.inspect(rename(folder, RENAMED[VIT], target_modules=["query", "intermediate.dense"]))
    assert verdict.notes == (
        f"{verdict.id} names layers as earlier versions of transformers did; they are fc1, q_proj here.",
    )
    (verdict,) = hf_radin.inspect(folder)
    assert verdict.notes == ()


def test_an_adapter_is_held_to_its_configuration_under_earlier_names_too(tmp_path):
    folder = save_adapter(VIT, tmp_path, target_modules=["q_proj", "v_proj"])
    earlier = rename(folder, RENAMED[VIT], target_modules=["query"])
    with pytest.raises(ValueError, match=r"does not fit its base model: .*v_proj.lora_A.weight has .* for nothing"):
        hf_radin.gather([earlier, folder])


def test_layers_that_never_were_are_answered_with_those_that_are(tmp_path):
    folder = save_adapter(VIT, tmp_path, target_modules=["q_proj"])
    earlier = rename(folder, [("q_proj", "to_q")], target_modules=["to_q"])
    with pytest.raises(ValueError, match=r"to_q.lora_A.weight, and ViTForImageClassification .* k_proj, .*q_proj"):
        hf_radin.gather([earlier, folder])


def test_what_can_not_be_said_in_the_names_of_now_is_refused(tmp_path):
    folder = save_adapter(VIT, tmp_path, target_modules=["q_proj"])
    earlier = rename(folder, RENAMED[VIT], target_modules=["query"], layer_replication=[[0, 2]])
    with pytest.raises(ValueError, match="its layer_replication can't be translated into the names that layers have"):
        hf_radin.gather([earlier, folder])


def test_a_module_that_is_no_module_any_more_can_not_be_saved(tmp_path):
    """Queries, keys and values once had a module of their own; now the output's layer is in it, too."""
    folder = save_adapter(VIT, tmp_path, target_modules=["fc1"])
    fields = {"target_modules": ["intermediate.dense"], "modules_to_save": ["attention.attention"]}
    with pytest.raises(ValueError, match=r"its module to save .*attention\.attention is none of the model's now"):
        hf_radin.gather([rename(folder, RENAMED[VIT], **fields), folder])
