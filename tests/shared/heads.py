"""A sweep as transformers' own script makes it: fine-tunes of one body, each with a head that was drawn for it."""

from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification

import hf_radin
from shared.training import save, train

COUNT = 4


@pytest.fixture(scope="module")
def own_heads(start, tmp_path_factory) -> Path:
    """A folder with four fine-tunes whose heads have nothing in common."""
    folder = tmp_path_factory.mktemp("own-heads")
    for seed in range(COUNT):
        model = ViTForImageClassification.from_pretrained(start)
        torch.manual_seed(seed)
        # heads of a length as they have it where they are wider: with less, training makes them alike
        torch.nn.init.normal_(model.classifier.weight, std=0.2)
        torch.nn.init.zeros_(model.classifier.bias)
        train(model, learning_rate=1e-3, epochs=6, seed=seed + 1)
        save(model, folder / f"ft-{seed}")
    return folder


@pytest.fixture(scope="module")
def own_heads_bank(own_heads, digits, tmp_path_factory) -> hf_radin.LogitBank:
    """Their logits on the validation split, in a cache of their own."""
    ingredients = hf_radin.gather(f"{own_heads}/ft-*")
    return hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path_factory.mktemp("own-heads-cache"))
