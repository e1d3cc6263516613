"""Real checkpoints for the tests: small ViTs that are trained here, on scikit-learn's digits, from one start."""

import os
import tempfile

# Read when the libraries are imported: no test may touch the user's caches, and tiny models want one thread.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_radin-tests-")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared.models import watched
from shared.training import NAMES, PARTS, digit_images, image_dataset, save, train
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

pytest_plugins = ["loopback_hub.fixtures", "shared.outside"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell, whose processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a configuration says of the classes.
CLASSES = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A dataset folder with the splits train, validation (600 images) and test (497), in parquet."""
    folder = tmp_path_factory.mktemp("digits")
    for split, part in PARTS.items():
        image_dataset(*digit_images(part)).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """The checkpoint that all fine-tunes start from."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        **CLASSES,
    )
    model = ViTForImageClassification(config)
    train(model, learning_rate=3e-3, epochs=25, seed=0)
    folder = tmp_path_factory.mktemp("start")
    save(model, folder)
    return folder


@pytest.fixture(scope="session")
def runs(start, tmp_path_factory) -> Path:
    """A folder with five fine-tunes, `ft-0` to `ft-4`, that differ in the images they saw and the learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(5):
        model = ViTForImageClassification.from_pretrained(start)
        train(model, learning_rate=(1e-3, 2e-3)[seed % 2], epochs=4, seed=seed + 1)
        save(model, folder / f"ft-{seed}")
    return folder


@pytest.fixture(scope="session")
def heads(start, tmp_path_factory) -> Path:
    """Three fine-tunes of the head alone: a linear classifier of the same features."""
    folder = tmp_path_factory.mktemp("heads")
    for seed in range(3):
        model = ViTForImageClassification.from_pretrained(start)
        train(model, learning_rate=3e-2, epochs=3, seed=seed + 1, names=("classifier",))
        save(model, folder / f"ft-{seed}")
    return folder


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> Path:
    """Three fine-tunes of a small ResNet that was trained on the digits."""
    folder = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    start = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **CLASSES)
    )
    train(start, learning_rate=1e-2, epochs=4, seed=0, share=1.0, size=16)
    start.save_pretrained(folder / "start")
    for seed in range(3):
        model = ResNetForImageClassification.from_pretrained(folder / "start")
        train(model, learning_rate=1e-2, epochs=3, seed=seed + 1, share=1.0, size=16)
        save(model, folder / f"ft-{seed}", size=16, resample=0)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache that tests share: what one computed, the next finds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def bank(runs, digits, cache):
    """The logits of all five fine-tunes on the validation split."""
    import hf_radin

    return hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), digits, cache_dir=cache)


@pytest.fixture
def unsearched(bank, tmp_path):
    """The same logits where no soup was measured yet."""
    folder = tmp_path / "unsearched" / "banks" / bank.folder.name
    shutil.copytree(bank.folder, folder, ignore=shutil.ignore_patterns("soups", "features"))
    return replace(bank, folder=folder)


@pytest.fixture
def predictions(monkeypatch) -> list[int]:
    """How many predictions each call of the models makes, in this process."""
    from hf_radin.logits import passes

    made, logits = [], passes.Running.logits

    def count(self, models, inputs, *shared):
        answers = logits(self, models, inputs, *shared)
        made.append(sum(map(len, answers)))
        return answers

    monkeypatch.setattr(passes.Running, "logits", count)
    return made


@pytest.fixture
def model_calls() -> Iterator[list[int]]:
    """How many images each call of a model is shown in this process, whoever makes it."""
    sizes: list[int] = []
    with watched(sizes.append):
        yield sizes


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Has an entry for each image that this process decodes."""
    from hf_radin.images import decode

    images, open_image = [], decode.open_image
    monkeypatch.setattr(decode, "open_image", lambda *args: images.append(1) or open_image(*args))
    return images


@pytest.fixture
def two(runs, tmp_path) -> Path:
    """A folder with copies of two fine-tunes, to be spoilt."""
    for name in ("ft-0", "ft-1"):
        shutil.copytree(runs / name, tmp_path / "two" / name)
    return tmp_path / "two"
