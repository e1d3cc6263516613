"""What fine-tunes began from, without a head for their classes."""

from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification, ViTModel

import hf_radin
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.weights.start import find_start
from shared.training import save


def save_backbone(start: Path, folder: Path, *, noise: float = 0.0) -> Path:
    """The body of a ViT that classifies images, as a `ViTModel`, which has a pooler in place of the head.

    Args:
        noise: how far each weight is moved, in standard deviations of its tensor.
    """
    body = ViTForImageClassification.from_pretrained(start).vit.state_dict()
    model = ViTModel(ViTForImageClassification.from_pretrained(start).config)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in body.items():
        spread = noise * tensor.std() if tensor.numel() > 1 else 0
        body[name] = tensor + spread * torch.randn(tensor.shape, generator=generator)
    model.load_state_dict(body, strict=False)
    model.save_pretrained(folder)
    return folder


def with_start(ingredients: Ingredients, start: Path) -> hf_radin.Ingredients:
    """The ingredients, whose recipes may be pulled to a start."""
    return Ingredients(ingredients, start=find_start(str(start), ingredients))


@pytest.fixture(scope="session")
def backbone(start, tmp_path_factory) -> Path:
    """What the fine-tunes began from, without a head."""
    return save_backbone(start, tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def astray(start, tmp_path_factory) -> Path:
    """A folder with three checkpoints that went far from the start, each into another direction: `ft-0` to `ft-2`."""
    folder = tmp_path_factory.mktemp("astray")
    for seed in range(3):
        model = ViTForImageClassification.from_pretrained(start)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.vit.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.8 * parameter.std() * noise
        save(model, folder / f"ft-{seed}")
    return folder


@pytest.fixture(scope="session")
def astray_bank(astray, digits, cache) -> hf_radin.LogitBank:
    """Their logits on the validation split."""
    return hf_radin.compute_logits(hf_radin.gather(f"{astray}/ft-*"), digits, cache_dir=cache)
