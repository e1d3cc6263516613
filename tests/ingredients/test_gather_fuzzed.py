"""Whatever the small files of a checkpoint hold, it is used or refused in a line."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from shared.fuzzing import SETTINGS, cases, outcome
from transformers import ViTForImageClassification

import hf_radin

# The file of each kind, and the folder that it is in.
PLACES = {
    "config": ("ft-1", "config.json"),
    "weights": ("ft-1", "model.safetensors"),
    "index": ("shards", "model.safetensors.index.json"),
    "processor": ("ft-1", "preprocessor_config.json"),
    "adapter": ("adapter", "adapter_config.json"),
}


@pytest.fixture(scope="module")
def folder(runs, start, tmp_path_factory) -> Path:
    """Two checkpoints, one of shards that are not there, and an adapter of `start`."""
    folder = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(start, folder / "start")
    for name in ("ft-0", "ft-1"):
        shutil.copytree(runs / name, folder / name)
    shutil.copytree(runs / "ft-1", folder / "shards")
    (folder / "shards" / "model.safetensors").unlink()
    options = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], base_model_name_or_path="../start")
    adapted = get_peft_model(ViTForImageClassification.from_pretrained(folder / "start"), options)
    adapted.save_pretrained(folder / "adapter")
    shutil.copy(start / "preprocessor_config.json", folder / "adapter")
    return folder


def judge(folder: Path, models: list[str]) -> None:
    """Raise what is wrong with the last of some models."""
    if problem := hf_radin.inspect([folder / name for name in models])[-1].problem:
        raise ValueError(problem)


@pytest.mark.parametrize("kind", PLACES)
@settings(SETTINGS, max_examples=60)
@given(seed=st.integers(0, 10**9))
def test_it_is_used_or_refused(folder, kind, seed):
    name, file = PLACES[kind]
    path = folder / name / file
    before = path.read_bytes() if path.exists() else None
    ((_, content),) = cases(kind, seed, 1)
    path.write_bytes(content)
    try:
        outcome(lambda: judge(folder, ["ft-0", name]))
    finally:
        if before is not None:
            path.write_bytes(before)
