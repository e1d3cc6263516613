"""What ingredients have in common is computed once, and the bank is the same to the last bit."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from shared.launching import banks_of_processes
from shared.lora import save_trained
from shared.making import make_bank
from shared.models import calls_of, interrupted, is_convolution, is_linear
from shared.timeless import contents
from shared.training import digit_images, image_dataset, save
from transformers import ViTForImageClassification

import hf_radin
from hf_radin.checkpoints.autotune import bytes_of
from hf_radin.checkpoints.forward import Running
from hf_radin.logits.passes import Passes, Room, load_together
from hf_radin.runtime.processes import Processes
from hf_radin.sharing.digests import TensorDigests


@pytest.fixture(scope="module")
def tree(start, tmp_path_factory) -> Path:
    """Five fine-tunes: all have the embeddings in common, 0 to 3 the first layer too, 0 and 1 all but the head."""
    folder = tmp_path_factory.mktemp("tree")
    for number in range(5):
        model = ViTForImageClassification.from_pretrained(start)
        generator = torch.Generator().manual_seed(number)
        trained = {0: ("classifier",), 1: ("classifier",), 4: ("layer", "classifier")}.get(
            number, ("layers.1", "classifier")
        )
        for name, parameter in model.named_parameters():
            if any(part in name for part in trained):
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        save(model, folder / f"ft-{number}")
    return folder


def rows(count: int = 150) -> datasets.Dataset:
    return image_dataset(*digit_images(slice(700, 700 + count)))


def all_logits(bank: hf_radin.LogitBank) -> np.ndarray:
    return np.stack([bank.logits(name) for name in sorted(bank.ingredients.ids)])


@pytest.mark.parametrize("options", [{}, {"pilot": 0.5}, {"models_in_memory": 3}, {"dtype": "bfloat16"}])
def test_the_bank_is_that_of_each_model_alone(tree, tmp_path, options):
    ingredients = hf_radin.gather(f"{tree}/ft-*")
    alone = make_bank(ingredients, rows(), tmp_path / "alone", block_size=32, **{**options, "models_in_memory": 1})
    shared = make_bank(ingredients, rows(), tmp_path / "shared", block_size=32, **options)
    assert (all_logits(alone) == all_logits(shared)).all() and len(np.unique(all_logits(alone)[:, 0, 0])) == 5
    assert contents(alone.folder) == contents(shared.folder)


def test_images_go_through_what_is_shared_once(tree, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_radin")
    ingredients = hf_radin.gather(f"{tree}/ft-*")
    with calls_of(is_convolution) as images, calls_of(is_linear) as shown:
        make_bank(ingredients, rows(), tmp_path, models_in_memory=5)
    assert sum(size for size in images if size > 2) == 150  # models are tried with fewer
    # the first layer of 0 to 3 and of 4, the second of 0 with 1 and of the others, with six linear ones each; heads
    assert sum(size for size in shown if size > 2) == 150 * (6 * (2 + 4) + 5)
    assert "5 models have much in common" in caplog.text


def test_models_with_nothing_in_common_run_as_ever(runs, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_radin")
    with calls_of(is_convolution) as images:
        make_bank(f"{runs}/ft-*", rows(), tmp_path, models_in_memory=5)
    assert sum(size for size in images if size > 2) == 5 * 150
    assert len([size for size in images if size <= 2]) == 5  # the one image that each is tried with
    assert "in common" not in caplog.text


def test_a_run_that_was_stopped_goes_on_with_what_is_shared(tree, tmp_path, predictions):
    ingredients = hf_radin.gather(f"{tree}/ft-*")
    whole = make_bank(ingredients, rows(), tmp_path / "whole", block_size=32, models_in_memory=5)
    wanted = sum(predictions)
    predictions.clear()
    with pytest.raises(KeyboardInterrupt), interrupted(12, least=3):
        make_bank(ingredients, rows(), tmp_path / "stopped", block_size=32, models_in_memory=5)
    earlier = sum(predictions)
    predictions.clear()
    resumed = make_bank(ingredients, rows(), tmp_path / "stopped", block_size=32, models_in_memory=5)
    assert 0 < earlier < wanted and earlier + sum(predictions) == wanted == 5 * 150
    assert contents(resumed.folder) == contents(whole.folder)


def test_of_a_block_that_some_have_seen_the_others_share(tree, tmp_path):
    ingredients = hf_radin.gather(f"{tree}/ft-*")
    whole = make_bank(ingredients, rows(), tmp_path / "whole", block_size=32)
    first = make_bank(ingredients[:2], rows(), tmp_path / "grown", block_size=32)
    with calls_of(is_convolution) as images:
        grown = make_bank(ingredients, rows(), tmp_path / "grown", block_size=32, models_in_memory=5)
    assert sum(size for size in images if size > 2) == 150
    assert grown.folder == first.folder and contents(grown.folder) == contents(whole.folder)


def test_models_that_share_are_in_one_group_whatever_their_order(tree, tmp_path):
    for place, number in enumerate((0, 2, 4, 3, 1)):
        shutil.copytree(tree / f"ft-{number}", tmp_path / "models" / f"ft-{place}")
    with calls_of(is_convolution) as images:
        make_bank(f"{tmp_path}/models/ft-*", rows(), tmp_path / "cache", models_in_memory=4)
    assert sum(size for size in images if size > 2) == 2 * 150


def test_what_shares_tensors_takes_less_memory_so_that_more_fit(tree):
    models = [ingredient.load_model(torch.float32) for ingredient in hf_radin.gather(f"{tree}/ft-*")]
    digests = [TensorDigests.of(model) for model in models]
    processes = Processes()
    passes = Passes(processes, Running(processes.accelerator, torch.float32, 64))
    assert [passes.count_group(digests[first:], models[first], 1) for first in range(5)] == [1, 1, 1, 1, 1]
    assert passes.count_group(digests, models[0], 3) > 3 == passes.count_group([digests[4]] * 3, models[4], 3)
    assert replace(passes, models_in_memory=2).count_group(digests, models[0], 2) == 2


class Tight(Passes):
    """Where three models fit into memory that have nothing in common."""

    def models_at_once(self, model) -> int:
        return 3


def test_what_is_kept_for_other_models_takes_the_room_of_some(tree):
    processes, ingredients = Processes(), [*hf_radin.gather(f"{tree}/ft-[0-3]")]
    digests = {model.id: TensorDigests.of(model.load_model(torch.float32)) for model in ingredients}
    example, room = {"pixel_values": torch.randn(3, 8, 8)}, Room()

    def loaded(batch_size: int) -> int:
        passes = Tight(processes, Running(processes.accelerator, torch.float32, batch_size), example=example)
        models, shared = load_together(ingredients, digests, passes, room)
        if len(models) > 1:
            batch = {"pixel_values": torch.randn(3, 3, 8, 8)}
            alone = passes.running.logits(models, batch)
            assert all(map(np.array_equal, passes.running.logits(models, batch, shared), alone))
        return len(models)

    assert loaded(1) == 4 and 0 < room.recorded < 20_000
    of_image = room.recorded
    largest = 3 * bytes_of(ingredients[0].load_model(torch.float32)) // of_image
    sizes = [loaded(size) for size in (*range(1, largest), 2 * largest)]
    assert {*sizes} >= {1, 2, 4} and sizes == sorted(sizes, reverse=True)


def test_two_processes_compute_what_one_does(tree, tmp_path):
    (tmp_path / "data").mkdir()
    rows(100).to_parquet(tmp_path / "data" / "validation.parquet")
    caches = banks_of_processes(tmp_path, f"{tree}/ft-*", (1, 2))
    assert caches[0] == caches[1] and len(caches[0]) > 10


def test_adapters_of_the_last_layer_share_the_first(start, tmp_path):
    options = {"target_modules": r".*layers\.1\.attention\.q_proj", "modules_to_save": ["classifier"]}
    for seed in range(3):
        save_trained(start, tmp_path / "adapters" / f"ft-{seed}", seed, **options)
    ingredients = hf_radin.gather(f"{tmp_path}/adapters/ft-*")
    with calls_of(is_convolution) as images, calls_of(is_linear) as shown:
        shared = make_bank(ingredients, rows(), tmp_path / "shared", models_in_memory=3)
    assert sum(size for size in images if size > 2) == 150
    assert sum(size for size in shown if size > 2) == 150 * (6 + 3 * 6 + 3)  # a first layer, and three second ones
    alone = make_bank(ingredients, rows(), tmp_path / "alone", models_in_memory=1)
    assert (all_logits(alone) == all_logits(shared)).all()
