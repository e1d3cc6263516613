"""What a checkpoint's small files may ask for is bounded before anything is made of it."""

import json
import math
import os
from pathlib import Path

import pytest
from shared import odd_files
from transformers import ViTConfig

import hf_radin
from hf_radin.checkpoints.fields import (
    NUMBER,
    SIDE,
    check_adapter_config,
    check_config,
    check_processor,
    declared_fields,
)
from hf_radin.checkpoints.model import empty_model
from hf_radin.ingredients.card_metadata import describe_ingredient
from hf_radin.runtime.files import BrokenFileError

PATH = Path("config.json")


def change(path: Path, *removed: str, **fields) -> None:
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in removed}))


@pytest.mark.parametrize("value", [10**9, 3 * 10**6, 1e18, 10**400, math.inf, math.nan, -(10**9)])
@pytest.mark.parametrize("name", ["num_labels", "num_hidden_layers", "hidden_size", "image_size", "patch_size"])
def test_a_number_that_no_classifier_has_is_refused_before_a_model_is_made(two, name, value):
    change(two / "ft-1" / "config.json", "id2label", "label2id", **{name: value})
    problem = hf_radin.inspect([two / "ft-0", two / "ft-1"])[1].problem
    assert f"ft-1/config.json can't be read: its {name} is " in problem and "\n" not in problem


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "swin", "depths": [NUMBER, NUMBER]},
        {"model_type": "resnet", "depths": [2] * NUMBER},
        {"model_type": "clip", "vision_config": {"num_hidden_layers": 10**9}},
        {"model_type": "imagegpt", "num_hidden_layers": 10**9},
        {"model_type": "timm_wrapper", "model_args": {"depth": 10**9}},
        {"num_labels": 10**9},
    ],
)
def test_numbers_add_up_and_are_found_wherever_they_stand(fields):
    with pytest.raises(BrokenFileError, match="beyond 1,048,576"):
        check_config(PATH, fields)


def test_somebodys_own_notes_are_of_any_size():
    check_config(PATH, {"model_type": "vit", "total_steps": 10**12, "note": math.nan, "id2label": {"0": "a"}})


@pytest.mark.parametrize("layers", [1_000, 100_000, NUMBER])
def test_layers_are_counted_while_a_model_is_built(layers):
    config = ViTConfig(hidden_size=8, num_hidden_layers=layers, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="it would have more than 5,000 tensors"):
        empty_model(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"height": 10**9, "width": 8}},
        {"size": {"shortest_edge": SIDE + 1}},
        {"size": 1e9},
        {"crop_size": [8, 10**6]},
        {"crop_size": math.inf},
        {"size": 224, "crop_pct": 1e-9},
        {"size": 224, "crop_pct": math.nan},
        {"max_num_patches": 10**6, "patch_size": 16},
        {"size_divisor": 10**9},
        {"pad_size": {"height": 10**400}},
    ],
)
def test_images_of_a_size_that_no_processor_makes_are_refused(two, fields):
    with pytest.raises(BrokenFileError, match="can't be read: its"):
        check_processor(PATH, fields)
    change(two / "ft-1" / "preprocessor_config.json", **fields)
    assert "preprocessor_config.json can't be read: its" in hf_radin.inspect(two / "ft-1")[0].problem


def test_usual_processors_are_not_refused():
    check_processor(PATH, {"size": {"height": 1024, "width": 1024}, "image_mean": [123.7], "max_pixels": 12_845_056})
    check_processor(PATH, {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "note": 10**12})
    check_processor(PATH, {"max_num_patches": 4096, "patch_size": 16})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"r": 10**9}, "its r is 1000000000, beyond the tensors, which have 64 rows at most"),
        ({"r": 8, "rank_pattern": {"query": 10**9}}, "its rank_pattern.query is"),
        ({"r": 8, "lora_alpha": math.inf}, "its lora_alpha holds what is no number"),
        ({"r": 8, "target_modules": "(a+)+$"}, "may take hours to be tried. List the layers"),
        ({"r": 8, "target_modules": "(a|a)*b"}, "may take hours to be tried"),
        ({"r": 8, "alpha_pattern": {".*.*.*.*.*x": 4}}, "may take hours to be tried"),
    ],
)
def test_an_adapter_that_would_take_memory_or_hours_is_refused(fields, reason):
    with pytest.raises(BrokenFileError, match=reason):
        check_adapter_config(PATH, fields, largest=64)


def test_usual_adapters_are_not_refused():
    pattern = r"^(?!.*head).*\.(attention|mlp)\.\d+\.(query|value)$"
    check_adapter_config(PATH, {"r": 64, "lora_alpha": 10_000, "target_modules": pattern, "seed": 10**12}, largest=64)
    check_adapter_config(PATH, {"r": 4, "target_modules": ["query", "value"], "rank_pattern": None}, largest=64)


@pytest.mark.parametrize("kind", odd_files.KINDS)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "preprocessor_config.json", "model.safetensors.index.json", "extra.py"],
)
def test_what_is_no_small_regular_file_is_never_read_to_its_end(two, name, kind):
    path = two / "ft-1" / name
    path.unlink(missing_ok=True)
    if name.endswith("index.json"):
        (two / "ft-1" / "model.safetensors").unlink()
    odd_files.put(path, kind)
    verdict = hf_radin.inspect([two / "ft-0", two / "ft-1"])[1]
    assert bool(verdict.problem) == (name != "extra.py") and "\n" not in verdict.problem
    assert not verdict.problem or "ft-1" in verdict.problem


@pytest.mark.parametrize("name", ["README.md", "trainer_state.json", "adapter_config.json"])
def test_a_pipe_beside_a_checkpoint_is_not_waited_for(two, name):
    ingredient = hf_radin.gather(f"{two}/*")[0]
    os.mkfifo(ingredient.folder / name)
    assert describe_ingredient(ingredient).license is None


class Before:
    """A configuration as versions of transformers before its dataclasses write it."""

    def __init__(self, hidden_size=8, **options):
        self.hidden_size = hidden_size


class Derived(Before):
    def __init__(self, window=3, **options):
        super().__init__(**options)


@pytest.mark.parametrize(
    ("configuration", "names"), [(ViTConfig, {"hidden_size"}), (Derived, {"hidden_size", "window"})]
)
def test_declared_fields_are_inherited_too(configuration, names):
    assert declared_fields(configuration) >= names and "wandb_run_id" not in declared_fields(configuration)
