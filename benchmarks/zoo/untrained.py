"""Untrained models, and images to run them on, for benchmarks that depend on shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from .fashion import SOURCE, read_idx

LABELS = [str(number) for number in range(10)]


@dataclass(frozen=True)
class Case:
    """A model's shape, the side of its images, and how many images there are."""

    name: str
    side: int
    patch: int
    hidden: int
    layers: int
    images: int


def make_models(
    folder: Path,
    case: Case,
    count: int,
    seed: int,
    classes: int = len(LABELS),
    differs: Callable[[str], bool] = lambda name: True,
) -> None:
    """Save so many models.

    Args:
        differs: of the name of a parameter, whether the models differ in it.
    """
    torch.manual_seed(seed)
    names = [str(number) for number in range(classes)]
    config = ViTConfig(
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64),
        intermediate_size=4 * case.hidden,
        image_size=case.side,
        patch_size=case.patch,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    for number in range(count):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if differs(name):
                    parameter.add_(1e-3 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"ft-{number:02d}")
        ViTImageProcessor(size={"height": case.side, "width": case.side}).save_pretrained(folder / f"ft-{number:02d}")


def make_split(folder: Path, images: int, side: int = 28, classes: int = len(LABELS)) -> Path:
    """A folder with so many of Fashion-MNIST's test and training images as a validation split in parquet.

    Args:
        side: of the corner of each image that is taken.
        classes: that the split names; the images are of the first ten.
    """
    parts = [
        (SOURCE / f"{part}-images-idx3-ubyte.gz", SOURCE / f"{part}-labels-idx1-ubyte.gz")
        for part in ("t10k", "train")
    ]
    pixels = np.concatenate([read_idx(images_path) for images_path, _ in parts])
    labels = np.concatenate([read_idx(labels_path) for _, labels_path in parts])
    if images > len(pixels):
        raise SystemExit(f"Fashion-MNIST has {len(pixels)} images; {images} were asked for.")
    names = [str(number) for number in range(classes)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {
        "image": [Image.fromarray(image[:side, :side]) for image in pixels[:images]],
        "label": labels[:images].tolist(),
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "validation.parquet")
    return folder
