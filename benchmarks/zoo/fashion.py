"""Zoos of tiny ResNets and ViTs on Fashion-MNIST: fine-tunes of one or two starts, and models with different starts.

    data = make_data(folder / "data")
    zoo = resnet_zoo(folder / "resnets", data, seed=0)

The images are those of the Debian package dataset-fashion-mnist (github.com/zalandoresearch/fashion-mnist, MIT). All
training reads only the training split. Finished models are kept: a benchmark that was stopped continues.
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_radin.runtime.files import write_folder

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
VALIDATION, TRAIN = 5_000, 20_000  # of the 60 000 images that are not for tests
TEST = 10_000
BATCH_SIZE = 64

Architecture = Literal["resnet", "vit"]


@dataclass(frozen=True)
class Run:
    """How one checkpoint of a zoo comes about.

    Args:
        name: of its folder.
        start: name of the run whose weights it begins with; None for random ones.
        rate: highest learning rate, in units of the architecture's usual one.
        images: how many of the training split it sees, drawn with its own seed.
        new_head: begin with the start's body alone, and a random head.
    """

    name: str
    start: str | None
    rate: float
    epochs: int
    images: int
    new_head: bool = False


def batch_norm_runs() -> tuple[Run, ...]:
    """Eight fine-tunes of one start, head included.

    At these rates their features drift apart: statistics of one fine-tune don't suit the average of all weights.
    """
    rates = (0.5, 1, 2, 4) * 2
    return (
        Run("start", None, 1, epochs=8, images=10_000),
        *(Run(f"ft-{number}", "start", rate, epochs=4, images=5_000) for number, rate in enumerate(rates)),
    )


def kinship_runs() -> tuple[Run, ...]:
    """Two starts, fine-tunes of each, fine-tunes of the first one's body with new heads, and models from scratch."""
    rates = (0.1, 0.2, 0.4, 0.8, 1.6, 2.5)  # as far apart as a bold sweep
    few = rates[1::2]
    return (
        *(Run(name, None, 1, epochs=6, images=10_000) for name in ("start-a", "start-b")),
        *(Run(f"start-a-{number}", "start-a", rate, epochs=4, images=5_000) for number, rate in enumerate(rates)),
        *(Run(f"start-b-{number}", "start-b", rate, epochs=4, images=5_000) for number, rate in enumerate(few)),
        *(Run(f"heads-{number}", "start-a", rate, 4, 5_000, new_head=True) for number, rate in enumerate(few)),
        *(Run(f"scratch-{number}", None, 1, epochs=6, images=10_000) for number in range(3)),
    )


def resnet_zoo(folder: Path, data: Path, *, seed: int = 0) -> Path:
    """ResNets whose BatchNorm statistics a soup has to find anew: `start` and its fine-tunes `ft-0`, `ft-1`, ..."""
    return make(folder, data, batch_norm_runs(), "resnet", seed)


def kinship_zoo(folder: Path, data: Path, architecture: Architecture, *, seed: int = 0) -> Path:
    """Checkpoints `FAMILY-NUMBER` of four families, and the starts of the first two without a number.

    `start-a` and `start-b` are fine-tuned from these starts, heads included; `heads` from the first one's body, each
    with a random head of its own; `scratch` from nothing.
    """
    return make(folder, data, kinship_runs(), architecture, seed)


# --- images ---


def make_data(
    folder: Path,
    source: Path = SOURCE,
    *,
    train: int = TRAIN,
    validation: int = VALIDATION,
    test: int = TEST,
    seed: int = 0,
) -> Path:
    """Write train, validation and test; `datasets.load_dataset(folder)` reads them.

    Args:
        train, validation: how many images, of the 60 000 that are not for tests.
        test: how many of the 10 000 images that are meant for it, the first ones.

    Raises:
        FileNotFoundError: if the source has no Fashion-MNIST in it.
    """
    if folder.exists():
        return folder
    images, labels = (read_idx(source / f"train-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    tests = [read_idx(source / f"t10k-{kind}.gz")[:test] for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    seen, unseen, _ = np.split(np.random.default_rng(seed).permutation(len(images)), [train, train + validation])
    return write_splits(
        folder,
        train=(images[seen], labels[seen]),
        validation=(images[unseen], labels[unseen]),
        test=(tests[0], tests[1]),
    )


def write_splits(folder: Path, **splits: tuple[np.ndarray, np.ndarray]) -> Path:
    """Write images `(samples, 28, 28)` and labels `(samples,)` of each split as parquet files."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))

    def fill(new: Path) -> None:
        for name, (pixels, classes) in splits.items():
            columns = {"image": [Image.fromarray(image) for image in pixels], "label": classes}
            split = datasets.Dataset.from_dict(columns, features=features)
            split.to_parquet(new / "data" / f"{name}-00000-of-00001.parquet")

    write_folder(folder, fill)
    return folder


def read_idx(path: Path) -> np.ndarray:
    """A file of bytes in MNIST's format: its fourth byte counts dimensions, their sizes follow, big-endian."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no {path}. Install the Debian package dataset-fashion-mnist, or name a folder with the four "
            ".gz files of github.com/zalandoresearch/fashion-mnist."
        ) from None
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


# --- checkpoints ---


def make(folder: Path, data: Path, runs: Sequence[Run], architecture: Architecture, seed: int) -> Path:
    """Train the missing runs, each a folder with model and image processor; a start comes before its fine-tunes.

    A run's result depends on the data, its own row, its start and the seed, not on what was trained before it.
    """
    todo = [run for run in runs if not (folder / run.name).exists()]
    if not todo:
        return folder
    processor = ViTImageProcessor(size={"height": 28, "width": 28})
    images, labels = read_train(data, processor)
    torch.set_num_threads(1)  # models so small gain nothing from more, and the figures shall not depend on cores
    for run in todo:
        torch.manual_seed(zlib.crc32(f"{seed} {run.name}".encode()))
        model = begin(folder, run, architecture)
        rows = torch.randperm(len(images))[: run.images]
        train(model, images[rows], labels[rows], run)

        def fill(new: Path, model: PreTrainedModel = model) -> None:
            model.save_pretrained(new)
            processor.save_pretrained(new)

        write_folder(folder / run.name, fill)
    return folder


def read_train(data: Path, processor: ViTImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels `(samples, 3, height, width)` and labels of the training split."""
    split = datasets.load_dataset(str(data), split="train")
    images = processor([image.convert("RGB") for image in split["image"]], return_tensors="pt")["pixel_values"]
    return images, torch.tensor(split["label"])


def begin(folder: Path, run: Run, architecture: Architecture) -> PreTrainedModel:
    """The model that a run begins with."""
    model = random_model(architecture, CLASSES)
    if run.start is None:
        return model
    start = type(model).from_pretrained(folder / run.start)
    if run.new_head:
        start.classifier = model.classifier
    return start


def label_maps(classes: Sequence[str]) -> dict[str, dict]:
    """What a configuration says of its classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


def random_model(architecture: Architecture, classes: Sequence[str]) -> PreTrainedModel:
    names = label_maps(classes)
    if architecture == "resnet":
        return ResNetForImageClassification(
            ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", **names)
        )
    return ViTForImageClassification(
        ViTConfig(
            image_size=28,
            patch_size=7,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            **names,
        )
    )


def train(model: PreTrainedModel, images: torch.Tensor, labels: torch.Tensor, run: Run) -> None:
    """One cycle of the learning rate, in whole batches."""
    steps = len(images) // BATCH_SIZE
    optimizer: torch.optim.Optimizer
    if model.config.model_type == "resnet":
        rate = 0.1 * run.rate
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        rate = 2e-3 * run.rate
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, run.epochs * steps, cycle_momentum=False)
    model.train()
    for _ in range(run.epochs):
        for rows in torch.randperm(len(images)).split(BATCH_SIZE)[:steps]:
            optimizer.zero_grad()
            model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
