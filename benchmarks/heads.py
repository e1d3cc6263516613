"""The time to refit a head, beside the pass that gives its features.

    python benchmarks/heads.py [--images 10000] [--classes 100] [--rounds 3]

Features are drawn around one point for each class, with fewer and fewer differences along their dimensions, as those
of a network are; the teacher is another linear layer and noise. Its head is refitted to it, without labels and with
them, in the five folds that judge it and on all images. The pass is that of a ViT-B/16 with random weights, which has
as many features, timed on a few images.
"""

import argparse
import time

import numpy as np
import torch
from ensemble import spread
from transformers import ViTConfig, ViTForImageClassification

from hf_radin.weights.head import LinearLayer
from hf_radin.weights.refit import Lesson, refit

FEATURES = ViTConfig().hidden_size
# Images that the pass is timed on, after as many to warm up.
TIMED = 32


def draw(images: int, classes: int) -> tuple[np.ndarray, np.ndarray, LinearLayer, np.ndarray]:
    """Features, the teacher's logits, the head that the model has, and labels."""
    generator = np.random.default_rng(0)
    centres, labels = 0.35 * generator.normal(size=(classes, FEATURES)), generator.integers(classes, size=images)
    scales = (1 + np.arange(FEATURES) / 20) ** -0.5
    features = ((centres[labels] + generator.normal(size=(images, FEATURES))) * scales).astype(np.float32)
    heads = [0.3 * centres * scales + 0.02 * generator.normal(size=centres.shape) for _ in range(2)]
    logits = (features @ heads[0].T + 0.5 * generator.normal(size=(images, classes))).astype(np.float32)
    return features, logits, LinearLayer(heads[1], np.zeros(classes)), labels


@torch.inference_mode()
def seconds_of_pass(images: int, device: str) -> float:
    """Of a ViT-B/16, extrapolated from a few images."""
    model, pixels = ViTForImageClassification(ViTConfig()).eval().to(device), torch.rand(TIMED, 3, 224, 224)
    for _ in range(2):
        begun = time.perf_counter()
        model(pixels.to(device)).logits.cpu()
    return (time.perf_counter() - begun) * images / TIMED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features, logits, layer, labels = draw(args.images, args.classes)
    taught: dict[str, list[float]] = {"an ensemble": [], "an ensemble and labels": []}
    passes = []
    for _ in range(args.rounds):
        passes.append(seconds_of_pass(args.images, device))
        for name, given in zip(taught, (None, labels), strict=True):
            begun = time.perf_counter()
            refit(Lesson(features, logits, layer, given, device=device), np.arange(args.images))
            taught[name].append(time.perf_counter() - begun)
    print(f"{args.images:,} images, {FEATURES} features, {args.classes:,} classes, {device}, {args.rounds} rounds\n")
    print("| | seconds | of a pass |\n|---|---:|---:|")
    print(f"| pass of a ViT-B/16 | {spread(passes, '.3g')} | |")
    for name, seconds in taught.items():
        shares = [duration / whole for duration, whole in zip(seconds, passes, strict=True)]
        print(f"| head refitted to {name} | {spread(seconds, '.3g')} | {spread(shares, '.2g')} |")


if __name__ == "__main__":
    main()
