"""LoRA adapters that were moved at random: what is tested is what becomes of their weights, not that they learnt."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, PreTrainedModel


def save_trained(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter of a base with these options of `LoraConfig`, by default of rank 4; its folder."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "modules_to_save": ["classifier"], **options}
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(base), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def reloaded(base: Path, adapter: Path, **options: Any) -> PreTrainedModel:
    """A base with an adapter, as peft alone loads it. Options are those of the base's `from_pretrained`."""
    model = AutoModelForImageClassification.from_pretrained(base, **options)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a model says of images, `(images, classes)`."""
    with torch.inference_mode():
        return model(images).logits
