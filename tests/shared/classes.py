"""Fine-tunes whose classes differ, and splits of some of the digits."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared.training import NAMES, PARTS, digit_images, image_dataset


def with_classes(source: Path, folder: Path, names: Sequence[str]) -> Path:
    """A copy of a fine-tune of the digits with these classes: rows of its head, and new ones for other names."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("classifier.weight", "classifier.bias"):
        rows = torch.cat([tensors[name], torch.randn(1, *tensors[name].shape[1:], generator=generator)])
        tensors[name] = rows[[NAMES.index(label) if label in NAMES else -1 for label in names]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    name_classes(folder, names)
    return folder


def name_classes(folder: Path, names: Sequence[str]) -> None:
    """Write names of classes into a configuration."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    path.write_text(json.dumps(config))


def digits_of(folder: Path, names: Sequence[str], kind: str = "class label") -> Path:
    """The splits of the digits that have these names, whose labels are class labels, words or numbers."""
    for split, part in PARTS.items():
        images, labels = digit_images(part)
        chosen = [(image, NAMES[label]) for image, label in zip(images, labels, strict=True) if NAMES[label] in names]
        rows = image_dataset([image for image, _ in chosen], [names.index(name) for _, name in chosen], list(names))
        if kind == "words":
            rows = rows.remove_columns("label").add_column("label", [name for _, name in chosen])
        if kind == "numbers":
            rows = image_dataset([image for image, _ in chosen], rows["label"], None)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder
