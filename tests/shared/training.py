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
    return [Image.fromarray(one) for one in pixels], digits.target[part].tolist()


def image_dataset(images: list, labels: list[int], names: list[str] | None = NAMES) -> datasets.Dataset:
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def train(model, *, learning_rate: float, epochs: int, seed: int, names: tuple[str, ...] = ("",)) -> None:
    """Train in place the parameters whose names start with one of `names`, on a random half of the training part."""
    images, labels = digit_images(PARTS["train"])
    pixels = (torch.tensor(np.stack([np.asarray(one) for one in images])) / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    target = torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(target), generator=generator)[: len(target) // 2]
    chosen = [value for name, value in model.named_parameters() if name.startswith(names)]
    optimizer = torch.optim.AdamW(chosen, lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for batch in some[torch.randperm(len(some), generator=generator)].split(32):
            loss = model(pixel_values=pixels[batch], labels=target[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
