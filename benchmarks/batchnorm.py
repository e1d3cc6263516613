"""Test accuracy of a soup of ResNets by its BatchNorm statistics: an ingredient's, averaged, or estimated anew.

    python benchmarks/batchnorm.py --seeds 3

Each seed draws the data, trains a small ResNet on Fashion-MNIST and eight fine-tunes of it, and measures all rows of
the table, the ensemble included, on the same images. Only the best single model is chosen, by validation. The learning
rates of the zoo (up to four times that of the start) were chosen so that the rows differ: at lower rates averaged
statistics are as good.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from zoo import fashion

import hf_radin
from hf_radin.checkpoints import forward
from hf_radin.weights.average import average_model

RAW, AVERAGED, ANEW = "uniform, raw", "uniform, averaged", "uniform, estimated anew"


def accuracy(model: torch.nn.Module, bank: hf_radin.LogitBank) -> float:
    """In percent, on the images of a bank."""
    hits = 0
    for block, place in bank.blocks.items():
        (logits,) = forward.forward([model], bank.images.read(block), batch_size=256, accelerator=Accelerator())
        hits += int((logits.argmax(1).numpy() == bank.labels[place]).sum())
    return 100 * hits / len(bank)


def with_statistics_of(model: torch.nn.Module, ingredient: hf_radin.Ingredient) -> torch.nn.Module:
    """The model with one ingredient's buffers, as a soup of parameters alone would have them."""
    buffers = dict(ingredient.load_model(torch.float32).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def measure(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy in percent by row and split."""
    data = fashion.make_data(folder / "data", seed=seed)
    zoo = fashion.resnet_zoo(folder / "resnets", data, seed=seed)
    ingredients = hf_radin.gather(f"{zoo}/ft-*")
    accuracies: dict[str, dict[str, float]] = {}
    best = ""
    for split in ("validation", "test"):
        bank = hf_radin.compute_logits(ingredients, data, split=split, cache_dir=folder / "cache")
        recipe = hf_radin.Recipe.uniform(ingredients.ids)
        averaged = average_model(ingredients, recipe)
        rows = {
            AVERAGED: accuracy(averaged, bank),
            RAW: accuracy(with_statistics_of(averaged, ingredients[0]), bank),
            ANEW: accuracy(average_model(ingredients, recipe, statistics=bank.statistics), bank),
            "ensemble": 100 * bank.score([recipe.weights])[0],
        }
        singles = dict(zip(ingredients.ids, 100 * bank.score(np.eye(len(ingredients))), strict=True))
        best = best or max(singles, key=singles.__getitem__)
        for name, value in {"best single": singles[best], **rows}.items():
            accuracies.setdefault(name, {})[split] = float(value)
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep data and zoos here (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the number of threads changes what a model learns
    with tempfile.TemporaryDirectory() as temporary:
        runs = [measure((args.folder or Path(temporary)) / str(seed), seed) for seed in range(args.seeds)]
    print(f"\nFashion-MNIST, 8 ResNets a seed, {args.seeds} seeds; test is 10,000 images that took no part\n")
    print("| | validation, mean | test, mean | test minus averaged, mean ± sd | each seed |\n|---|---:|---:|---:|---|")
    for name in ("best single", RAW, AVERAGED, ANEW, "ensemble"):
        gains = [run[name]["test"] - run[AVERAGED]["test"] for run in runs]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        means = [statistics.mean(run[name][split] for run in runs) for split in ("validation", "test")]
        each = ", ".join(f"{gain:+.2f}" for gain in gains)
        print(
            f"| {name} | {means[0]:.2f}% | {means[1]:.2f}% | {statistics.mean(gains):+.2f} ± {spread:.2f} | {each} |"
        )


if __name__ == "__main__":
    main()
