"""Every architecture that transformers can classify images with goes the whole road, and multi-label a shorter one."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from shared import label_set_road
from shared.architectures import EXCEPTIONS, INSTALLED, TINY, Architecture, save_fine_tunes
from shared.whole_road import broken_laws, walk
from shared.write_table import WHOLE_ROAD, read_table
from transformers import AutoConfig, ViTImageProcessor

import hf_radin

# As small as they get: only their names and configurations are looked at.
EXCEPTED = {
    "dinat": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "dilations": [[1], [1]]},
    "shieldgemma2": {
        "text_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16},
        "vision_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    },
}


@pytest.mark.parametrize(
    "architecture", [architecture for architecture in INSTALLED if architecture.model_type not in EXCEPTIONS], ids=str
)
def test_the_whole_road(hub, tmp_path, architecture):
    findings = walk(architecture, tmp_path)
    assert broken_laws(architecture, findings) == [], findings
    assert label_set_road.broken_laws(tmp_path) == []


@pytest.mark.parametrize("classes", [("cat",), ("cat", "dog")], ids=["one logit", "two logits"])
@pytest.mark.parametrize("model_type", ["vit", "resnet", "swin", "siglip", "convnext"])
def test_few_logits_are_label_sets_too(tmp_path, model_type, classes):
    [architecture] = [installed for installed in INSTALLED if installed.model_type == model_type]
    save_fine_tunes(architecture, tmp_path, 2, classes=classes)
    assert label_set_road.broken_laws(tmp_path, classes) == []


def test_few_architectures_are_excepted():
    assert len(EXCEPTIONS) <= 2 and EXCEPTIONS.keys() <= {architecture.model_type for architecture in INSTALLED}


def test_a_new_architecture_is_not_passed_over():
    with pytest.raises(LookupError, match="NewForImageClassification is new"):
        walk(Architecture("new", "NewForImageClassification"), Path())


@pytest.mark.parametrize(("model_type", "reason"), [("dinat", "natten"), ("shieldgemma2", "answers a prompt")])
def test_what_is_excepted_is_refused_with_the_reason(tmp_path, model_type, reason):
    assert reason in EXCEPTIONS[model_type]
    [architecture] = [installed for installed in INSTALLED if installed.model_type == model_type]
    for index, folder in enumerate((tmp_path / "ft-0", tmp_path / "ft-1")):
        config = AutoConfig.for_model(model_type, architectures=[architecture.class_name], **EXCEPTED[model_type])
        config.save_pretrained(folder)
        save_file({"classifier.bias": torch.full((2,), float(index))}, folder / "model.safetensors")
        ViTImageProcessor().save_pretrained(folder)
    with pytest.raises(ValueError, match=reason):
        hf_radin.gather(f"{tmp_path}/ft-*")


def test_the_table_lists_every_architecture_and_its_outcome():
    versions, rows = read_table()
    listed = {(row["model type"], row["class"]) for row in rows}
    installed = {(architecture.model_type, str(architecture)) for architecture in INSTALLED}
    table, here = Version(versions["transformers"]), Version(transformers.__version__)
    if table == here:
        assert listed == installed, "run `make architectures`"
    else:  # releases add classes
        assert listed <= installed if table < here else installed <= listed
    assert {row["model type"] for row in rows} == TINY.keys() | EXCEPTIONS.keys()
    assert {row["model type"]: row["outcome"] for row in rows if row["outcome"] != WHOLE_ROAD} == EXCEPTIONS
    assert len(rows) == len(listed)
