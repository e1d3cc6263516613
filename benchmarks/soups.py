"""Seconds that measuring a soup takes where ingredients share their first layers, and where these run for each soup.

    OMP_NUM_THREADS=1 python benchmarks/soups.py

Eight checkpoints of the size of ViT-Ti/16 with random weights, which differ in the last two of twelve layers and in
the head; images of noise. Soups with random recipes are shown all images, in turn with what the shared layers give
cached and without, in one run. Averaging the weights is included. Medians of five soups, after a first one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import hf_radin
from hf_radin.recipes.recipe import Recipe
from hf_radin.search.measure import measured_soup

MODELS, SOUPS, CLASSES = 8, 5, [str(number) for number in range(10)]

TRAINED = ("vit.layers.10", "vit.layers.11", "vit.layernorm", "classifier")


def save_fine_tunes(folder: Path) -> None:
    """Checkpoints that differ in their last layers."""
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    labels = {name: number for number, name in names.items()}
    start = ViTForImageClassification(ViTConfig(**sizes, id2label=names, label2id=labels))
    for number in range(MODELS):
        model = copy.deepcopy(start)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(TRAINED):
                    parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(folder / f"ft-{number}")
        ViTImageProcessor().save_pretrained(folder / f"ft-{number}")


def noise(count: int) -> datasets.Dataset:
    """Images of noise, with labels in turn."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [*map(Image.fromarray, pixels)], "label": [number % len(CLASSES) for number in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


def seconds(bank: hf_radin.LogitBank, row: np.ndarray) -> float:
    """What it takes to average weights, and to show the soup all images."""
    soup, begun = measured_soup(bank, Recipe(bank.ingredients.ids, tuple(row.tolist()))), time.perf_counter()
    soup.look(np.ones(len(bank), dtype=bool))
    return time.perf_counter() - begun


def main() -> None:
    """Print what soups take."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, default=128)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        save_fine_tunes(home)
        cached = hf_radin.compute_logits(hf_radin.gather(f"{home}/ft-*"), noise(images), cache_dir=home / "cache")
        plain = replace(cached, options=replace(cached.options, pixel_cache="off"))  # pixels are cached already
        begun = time.perf_counter()
        front = cached.front()
        if front is None:
            raise SystemExit("Nothing is cached.")
        print(f"to find {front.cut.module}, from where on they differ: {time.perf_counter() - begun:.1f} s")
        recipes = np.random.default_rng(1).dirichlet(np.ones(MODELS), 2 * SOUPS + 1)
        print(f"first soup, {images} images: {seconds(cached, recipes[0]):.2f} s")
        pairs = [(seconds(cached, row), seconds(plain, other)) for row, other in recipes[1:].reshape(SOUPS, 2, -1)]
        further, without = map(statistics.median, zip(*pairs, strict=True))
        size = sum(path.stat().st_size for path in front.activations.folder.iterdir())
        print(f"further soups: {further:.2f} s, without the cache {without:.2f} s; {further / without:.2f} of it")
        print(f"cached: {size / images / 1e3:.0f} kB an image")


if __name__ == "__main__":
    main()
