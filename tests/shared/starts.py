"""What fine-tunes began from, without a head for their classes."""

from pathlib import Path

import torch
from transformers import ViTForImageClassification, ViTModel

import hf_radin
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.weights.start import find_start


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
