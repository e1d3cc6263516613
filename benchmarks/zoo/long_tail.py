"""Zoos on a Fashion-MNIST with a long tail: fine-tunes of one start, some of which are taught rare classes more often.

    long_tail_zoo(folder / "long-tail-0", seed=0)

From class to class, in an order that the seed draws, there are half as many images: 1,000 to 2 on the validation
split, five times as many on the training split. The test split is Fashion-MNIST's own, with 1,000 of each class.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ViTForImageClassification, ViTImageProcessor

from hf_radin.runtime.files import write_folder

from . import fashion

# Images of the most frequent and of the rarest class on the validation split, and how many times as many train.
MOST, LEAST, TRAIN = 1_000, 2, 5

RATES = (0.2, 2.0)  # lowest and highest, in units of the ViT's usual one
EPOCH = 5_000  # images of the training split's 10 000 that are drawn for what a fine-tune counts as an epoch

# How rare classes are drawn, in turn: 0 as often as they come, 1 as often as all others.
BALANCES = (0.0, 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class LongTailRun:
    """What one fine-tune is made with.

    Args:
        rate: highest learning rate, in units of the ViT's usual one.
        shift: by how many pixels images are moved at most.
        smoothing: of labels.
        balance: each image is drawn in proportion to its class's number of images to the power of minus this.
    """

    rate: float
    epochs: int
    shift: int
    smoothing: float
    balance: float


def draw(seed: int, index: int) -> LongTailRun:
    """One point of the sweep; it does not depend on how many are drawn."""
    rng = np.random.default_rng([seed, index])
    return LongTailRun(
        rate=math.exp(rng.uniform(math.log(RATES[0]), math.log(RATES[1]))),
        epochs=int(rng.integers(2, 5)),
        shift=int(rng.integers(0, 3)),
        smoothing=float(rng.choice([0.0, 0.1])),
        balance=BALANCES[index % len(BALANCES)],
    )


def long_tail_zoo(folder: Path, *, seed: int = 0, count: int = 8) -> Path:
    """ViTs `ft-00`, `ft-01`, ... in the folder, beside their start and the images (`fashion-mnist`)."""
    data = make_long_tail(folder / "fashion-mnist", seed=seed)
    fashion.make(folder, data, (fashion.Run("start", None, 1, epochs=4, images=10_000),), "vit", seed)
    todo = [index for index in range(count) if not (folder / f"ft-{index:02d}").exists()]
    if not todo:
        return folder
    processor = ViTImageProcessor.from_pretrained(folder / "start")
    images, labels = fashion.read_train(data, processor)
    torch.set_num_threads(1)  # models so small gain nothing from more, and the figures shall not depend on cores
    for index in todo:
        name = f"ft-{index:02d}"
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        model = ViTForImageClassification.from_pretrained(folder / "start")
        fine_tune(model, images, labels, draw(seed, index))

        def fill(new: Path, model: PreTrainedModel = model) -> None:
            model.save_pretrained(new)
            processor.save_pretrained(new)

        write_folder(folder / name, fill)
    return folder


def class_sizes() -> np.ndarray:
    """Images of each class on the validation split, from the most frequent to the rarest."""
    return np.geomspace(MOST, LEAST, len(fashion.CLASSES)).round().astype(int)


def make_long_tail(folder: Path, source: Path = fashion.SOURCE, *, seed: int = 0) -> Path:
    """Write train and validation with a long tail, and test with equal classes.

    Raises:
        FileNotFoundError: if the source has no Fashion-MNIST in it.
    """
    if folder.exists():
        return folder
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    images, labels = (fashion.read_idx(source / f"train-{kind}.gz") for kind in kinds)
    tests, answers = (fashion.read_idx(source / f"t10k-{kind}.gz") for kind in kinds)
    rng = np.random.default_rng(seed)
    seen, unseen = [], []
    for label, size in zip(rng.permutation(len(fashion.CLASSES)), class_sizes(), strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        unseen.append(rows[:size])
        seen.append(rows[size : (TRAIN + 1) * size])
    train, validation = (rng.permutation(np.concatenate(rows)) for rows in (seen, unseen))
    return fashion.write_splits(
        folder,
        train=(images[train], labels[train]),
        validation=(images[validation], labels[validation]),
        test=(tests, answers),
    )


def fine_tune(model: PreTrainedModel, images: torch.Tensor, labels: torch.Tensor, run: LongTailRun) -> None:
    """One cycle of the learning rate, in whole batches of images that are drawn by their classes and moved."""
    steps = EPOCH // fashion.BATCH_SIZE
    rate = 2e-3 * run.rate
    chances = labels.bincount()[labels].double() ** -run.balance
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, run.epochs * steps, cycle_momentum=False)
    model.train()
    for _ in range(run.epochs):
        order = chances.multinomial(EPOCH, replacement=run.balance > 0)
        for rows in order.split(fashion.BATCH_SIZE)[:steps]:
            moves = torch.randint(-run.shift, run.shift + 1, (2,)).tolist()
            optimizer.zero_grad()
            logits = model(pixel_values=images[rows].roll(moves, (2, 3))).logits
            cross_entropy(logits, labels[rows], label_smoothing=run.smoothing).backward()
            optimizer.step()
            schedule.step()
    model.eval()
