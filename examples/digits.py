"""Data and models for a soup, made without a network: scikit-learn's digits, a small ViT and its fine-tunes.

    python digits.py --output digits

writes a dataset (`digits/data`), a start that was trained on turned digits (`digits/start`) and a sweep of fine-tunes
(`digits/runs/ft-00`, ...). Digits are easy, so the training split is small: the fine-tunes then make errors, and
different ones, and the two other splits are large enough to tell a better soup from a lucky one.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from finetune_sweep import Settings, finished_or_absent, sweep
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TURNS = ["left", "upside down", "right"]  # by one, two and three quarters; upright digits are left to the fine-tunes


def make_dataset(folder: str | Path, *, train: int = 400, validation: int = 600, seed: int = 0) -> Path:
    """Write the 1797 digits as train, validation and test (the rest); `datasets.load_dataset(folder)` reads them."""
    folder = Path(folder)
    if folder.exists():
        return folder
    digits = load_digits()  # images (1797, 8, 8) of 0 to 16
    both, test = split_rows(np.arange(len(digits.target)), digits.target, train + validation, seed)
    seen, unseen = split_rows(both, digits.target, train, seed)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    with finished_or_absent(folder) as part:
        for name, rows in {"train": seen, "validation": unseen, "test": test}.items():
            images = [Image.fromarray((image / 16 * 255).astype(np.uint8)) for image in digits.images[rows]]
            split = datasets.Dataset.from_dict({"image": images, "label": digits.target[rows]}, features=features)
            split.to_parquet(part / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def split_rows(rows: np.ndarray, target: np.ndarray, first: int, seed: int) -> list[np.ndarray]:
    """`first` of the rows and the others, each with the same share of every digit."""
    return train_test_split(rows, train_size=first, stratify=target[rows], random_state=seed)


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more, and what comes out no longer depends on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def make_start(folder: str | Path, dataset: str | Path, *, epochs: int = 50, seed: int = 0) -> Path:
    """Train a small ViT to tell digit and turn of turned training images, and save it with its processor.

    Only the training split is read. The 30 classes are not those of the dataset: the sweep has to fit a new head.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    split = datasets.load_dataset(str(dataset), split="train")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    upright = processor([image.convert("RGB") for image in split["image"]], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(split["label"])
    images = torch.cat([upright.rot90(quarters, (2, 3)) for quarters in (1, 2, 3)])  # (3 * train, 3, 16, 16)
    labels = torch.cat([labels + len(NAMES) * turn for turn in range(3)])  # (3 * train,)
    names = dict(enumerate(f"{name}, {turn}" for turn in TURNS for name in NAMES))
    transformers.set_seed(seed)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = ViTForImageClassification(config)
    pretrain(model, images, labels, epochs=epochs)
    with finished_or_absent(folder) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
    return folder


def pretrain(
    model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor, *, epochs: int, batch_size: int = 128
) -> None:
    """AdamW with one cycle of the learning rate, on images that are tilted, shifted and scaled a little."""
    steps = epochs * len(images) // batch_size
    jitter = v2.RandomAffine(
        15, translate=(0.1, 0.1), scale=(0.85, 1.15), interpolation=v2.InterpolationMode.BILINEAR, fill=-1
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(steps), desc="pre-training"):
        rows = torch.randint(len(images), (batch_size,))
        pixels = torch.cat([jitter(few) for few in images[rows].split(16)])  # one draw for each few images
        loss = model(pixel_values=pixels, labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@one_thread()
def make_fine_tunes(
    start: str | Path, dataset: str | Path, output: str | Path, *, count: int = 16, seed: int = 0
) -> list[Path]:
    """The sweep, with settings that suit the digits: each fine-tune sees its own two thirds of the training images."""
    return sweep(
        Settings(
            model=str(start),
            dataset=str(dataset),
            output=str(output),
            count=count,
            epochs=20,
            learning_rates=[4e-4, 2e-3],
            fraction=0.65,
            seed=seed,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("digits"))
    parser.add_argument("--count", type=int, default=16, help="how many fine-tunes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()  # it would show one for every load and save
    data = make_dataset(args.output / "data", seed=args.seed)
    start = make_start(args.output / "start", data, seed=args.seed)
    make_fine_tunes(start, data, args.output / "runs", count=args.count, seed=args.seed)


if __name__ == "__main__":
    main()
