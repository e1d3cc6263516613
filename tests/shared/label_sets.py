"""Multi-label classifiers of digits: of each property a digit may have, whether it has it. Nine tenths have some."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import ViTForImageClassification, pipeline

import hf_radin
from shared.training import PARTS, digit_images, save, train

# Digits that have a property. A seven has no curve, a one is neither: one in ten digits has none of these.
PROPERTIES = {"round": {0, 6, 8, 9}, "even": {0, 2, 4, 6, 8}, "prime": {2, 3, 5, 7}, "long": {4, 7, 9}}
NAMES = list(PROPERTIES)


def properties(digits: list[int]) -> list[list[int]]:
    """Of each digit the numbers of its properties."""
    return [[number for number, name in enumerate(NAMES) if digit in PROPERTIES[name]] for digit in digits]


def save_runs(start: Path, folder: Path, *, count: int = 4, own_heads: bool = False) -> None:
    """Fine-tunes, `ft-0` and so on, of a classifier of digits with a new head.

    Args:
        own_heads: whether each has one that was drawn for it, so that these have nothing in common.
    """
    torch.manual_seed(1)
    classes = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
    options = {"problem_type": "multi_label_classification", "ignore_mismatched_sizes": True, **classes}
    base = ViTForImageClassification.from_pretrained(start, **options)
    targets = torch.zeros(700, len(NAMES))
    for row, numbers in zip(targets, properties(digit_images(PARTS["train"])[1]), strict=True):
        row[numbers] = 1.0
    train(base, learning_rate=3e-3, epochs=3, seed=9, targets=targets)
    base.save_pretrained(folder / "base")
    for seed in range(count):
        model = ViTForImageClassification.from_pretrained(folder / "base")
        if own_heads:
            torch.manual_seed(seed)
            torch.nn.init.normal_(model.classifier.weight, std=0.2)
        train(model, learning_rate=2e-3, epochs=4 if own_heads else 2, seed=seed, targets=targets)
        save(model, folder / f"ft-{seed}")


def dataset(part: str = "validation") -> datasets.Dataset:
    """Images of a part of the digits, with lists of class labels."""
    images, digits = digit_images(PARTS[part])
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Sequence(datasets.ClassLabel(names=NAMES))}
    )
    return datasets.Dataset.from_dict({"image": images, "label": properties(digits)}, features=features)


def write_images(folder: Path, *, count: int = 40) -> None:
    """A folder of images with the splits validation and test, whose `metadata.jsonl` has lists of names."""
    for split, part in (("validation", PARTS["validation"]), ("test", PARTS["test"])):
        (folder / split).mkdir(parents=True)
        images, digits = digit_images(part)
        rows = zip(images[:count], properties(digits[:count]), strict=True)
        with open(folder / split / "metadata.jsonl", "w") as file:
            for place, (image, numbers) in enumerate(rows):
                image.save(folder / split / f"{place}.png")
                file.write(json.dumps({"file_name": f"{place}.png", "label": [NAMES[number] for number in numbers]}))
                file.write("\n")


@pytest.fixture(scope="module")
def own_heads_of_sets(start, tmp_path_factory) -> Path:
    """A folder with four fine-tunes whose heads have nothing in common."""
    folder = tmp_path_factory.mktemp("own-heads-of-sets")
    save_runs(start, folder, own_heads=True)
    return folder


@pytest.fixture(scope="module")
def digit_sets(tmp_path_factory) -> Path:
    """Digits with the names of their properties, in two splits."""
    folder = tmp_path_factory.mktemp("digit-sets") / "data"
    for split in ("validation", "test"):
        dataset(split).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder.parent


@pytest.fixture(scope="module")
def own_heads_of_sets_bank(own_heads_of_sets, digit_sets, tmp_path_factory) -> hf_radin.LogitBank:
    """Their logits on the validation split, in a cache of their own."""
    ingredients = hf_radin.gather(f"{own_heads_of_sets}/ft-*")
    return hf_radin.compute_logits(
        ingredients, digit_sets, cache_dir=tmp_path_factory.mktemp("own-heads-of-sets-cache")
    )


def f1(soup: hf_radin.Soup, name: str, split: str) -> float:
    """What a report says of it."""
    (result,) = (entry for entry in soup.results if (entry.name, entry.split) == (name, split))
    return result.metrics["f1"]


def f1_of_pipeline(folder: Path) -> float:
    """Of the test images, as users of a saved model have its decisions."""
    images, _ = digit_images(PARTS["test"])
    answers = pipeline("image-classification", model=str(folder))(images, top_k=len(NAMES))
    scores = [{answer["label"]: answer["score"] for answer in of_image} for of_image in answers]
    yes = [[of_image[name] > 0.5 for name in NAMES] for of_image in scores]
    truth = [[number in row for number in range(len(NAMES))] for row in dataset("test")["label"]]
    return f1_score(truth, yes, average="macro")
