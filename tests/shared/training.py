"""Small models, trained on scikit-learn's digits."""

from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTImageProcessor

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PARTS = {"train": slice(0, 700), "validation": slice(700, 1300), "test": slice(1300, 1797)}


def digit_images(part: slice) -> tuple[list[Image.Image], list[int]]:
    digits = load_digits()
    pixels = (digits.images[part] * 255 / 16).astype(np.uint8)
    return [Image.fromarray(image) for image in pixels], digits.target[part].tolist()


def image_dataset(images: list, labels: list[int], names: list[str] | None = NAMES) -> datasets.Dataset:
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def train(
    model,
    *,
    learning_rate: float,
    epochs: int,
    seed: int,
    names: tuple[str, ...] = ("",),
    share: float = 0.5,
    size: int = 8,
    targets: torch.Tensor | None = None,
) -> None:
    """Train a model in place on a random share of the training part.

    Args:
        names: what the names of the parameters begin with that are trained; by default all are.
        share: of the images.
        size: that they are scaled to, as the processor of `save` does it.
        targets: what the model learns of all images of that part, by default their digits.
    """
    images, labels = digit_images(PARTS["train"])
    pixels = (torch.tensor(np.stack([np.asarray(image) for image in images])) / 127.5 - 1)[:, None]
    pixels = torch.nn.functional.interpolate(pixels.repeat(1, 3, 1, 1), (size, size))
    target = torch.tensor(labels) if targets is None else targets
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(target), generator=generator)[: round(share * len(target))]
    parameters = [parameter for name, parameter in model.named_parameters() if name.startswith(names)]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for batch in sample[torch.randperm(len(sample), generator=generator)].split(32):
            loss = model(pixel_values=pixels[batch], labels=target[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def save(model, folder: Path, size: int = 8, **options) -> None:
    """Save a model with an image processor; `options` are the processor's."""
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}, **options).save_pretrained(folder)
