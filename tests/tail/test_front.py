"""Where all ingredients share their first layers these run once: soups have the same bits, in a part of the time."""

import copy
import gc
import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from shared.launching import launch
from shared.logs import warned
from shared.making import make_bank
from shared.models import calls_of
from shared.stopping import Stopping
from shared.training import NAMES, digit_images, image_dataset, save
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import hf_radin
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.processes import Processes
from hf_radin.search.measure import MeasuredSoup, measured_soup
from hf_radin.sharing.activations import Activations
from hf_radin.sharing.digests import TensorDigests
from hf_radin.tail.cut import Cut
from hf_radin.tail.front import SharedFront, find_front, may_share

IMAGES, BLOCK = 100, 32

# Images of noise that the first soup is shown, in a run, to see that its tail is exact.
SHOWN = [2, 3, 5]

CLASSES = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 128}


@dataclass(frozen=True)
class Kind:
    """An architecture whose last layers were trained.

    Args:
        make: a model with random weights.
        trained: what the names of their parameters begin with.
        cut: the first module that was trained.
    """

    make: type
    config: type
    options: dict
    trained: tuple[str, ...]
    cut: str

    def start(self):
        torch.manual_seed(0)
        return self.make(self.config(**self.options, **CLASSES)).eval()


KINDS = {
    "vit": Kind(
        ViTForImageClassification,
        ViTConfig,
        TRANSFORMER | {"image_size": 16, "patch_size": 4},
        ("vit.layers.5", "vit.layernorm", "classifier"),
        "vit.layers.5",
    ),
    "convnext": Kind(
        ConvNextForImageClassification,
        ConvNextConfig,
        {"num_stages": 3, "depths": [1, 2, 1], "hidden_sizes": [32, 64, 64]},
        ("convnext.encoder.stages.2", "convnext.layernorm", "classifier"),
        "convnext.encoder.stages.2.downsampling_layer.0",
    ),
    "swin": Kind(
        SwinForImageClassification,
        SwinConfig,
        {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
        ("swin.encoder.layers.1.blocks.1", "swin.layernorm", "classifier"),
        "swin.encoder.layers.1.blocks.1",
    ),
    "resnet": Kind(
        ResNetForImageClassification,
        ResNetConfig,
        {"embedding_size": 32, "hidden_sizes": [32, 64, 64], "depths": [1, 1, 1], "layer_type": "basic"},
        ("resnet.encoder.stages.2", "classifier"),
        "resnet.encoder.stages.2.layers.0",
    ),
}


def save_fine_tunes(kind: Kind, folder: Path, count: int = 3, trained: tuple[str, ...] | None = None) -> Path:
    """Models around one start, which differ in the layers that were trained."""
    start = kind.start()
    for number in range(count):
        model, generator = copy.deepcopy(start), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(kind.trained if trained is None else trained):
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        save(model, folder / f"ft-{number}", size=16)
    return folder


def rows() -> datasets.Dataset:
    return image_dataset(*digit_images(slice(700, 700 + IMAGES)))


@pytest.fixture(autouse=True)
def room_on_disk(free_bytes):
    free_bytes(10**12)


@pytest.fixture(scope="module")
def vits(tmp_path_factory) -> Path:
    return save_fine_tunes(KINDS["vit"], tmp_path_factory.mktemp("vits"))


def bank_of(models: Path, folder: Path, **options) -> hf_radin.LogitBank:
    return make_bank(f"{models}/ft-*", rows(), folder, block_size=BLOCK, **options)


def recipes(bank: hf_radin.LogitBank) -> list[Recipe]:
    ids = bank.ingredients.ids
    return [Recipe.uniform(ids), Recipe(ids, (0.5, 0.3, 0.2)), Recipe(ids[:2], (0.9, 0.1))]


def soup_of(bank: hf_radin.LogitBank, recipe: Recipe) -> MeasuredSoup:
    """A soup whose logits are kept."""
    return measured_soup(bank, recipe, bank.pruned(0))


def some_images(bank: hf_radin.LogitBank) -> np.ndarray:
    return np.arange(len(bank)) % 3 > 0


def everything(bank: hf_radin.LogitBank) -> np.ndarray:
    return np.ones(len(bank), dtype=bool)


def values(bank: hf_radin.LogitBank) -> np.ndarray:
    """The logits of all soups, which are shown some images first and then the others, `(soups, entries)`."""
    soups = [soup_of(bank, recipe) for recipe in recipes(bank)]
    for soup in soups:
        soup.look(some_images(bank))
        soup.look(everything(bank))
    return np.stack([soup.values for soup in soups])


def files(bank: hf_radin.LogitBank) -> list[Path]:
    return sorted(bank.images.folder.glob("activations-*/block-*"))


def is_first(module: torch.nn.Module) -> bool:
    """Whether a module is the first convolution of a model."""
    return isinstance(module, torch.nn.Conv2d) and module.in_channels == 3


@pytest.mark.parametrize("name", KINDS)
def test_soups_have_the_bits_that_they_have_without(tmp_path, name):
    kind = KINDS[name]
    models = save_fine_tunes(kind, tmp_path / "models")
    cached = bank_of(models, tmp_path / "cached", pixel_cache="1GB")
    assert cached.front().cut.module == kind.cut
    with calls_of(is_first) as sizes:
        with_cache = values(cached)
    assert sum(sizes) == sum(SHOWN) + IMAGES and len(files(cached)) == 2 * len(cached.images.blocks)
    plain = bank_of(models, tmp_path / "plain", pixel_cache="off")
    assert plain.front() is None
    with calls_of(is_first) as sizes:
        without = values(plain)
    assert sum(sizes) == 3 * IMAGES and not files(plain)
    assert np.array_equal(with_cache, without) and not np.array_equal(without[0], without[1])


def test_another_run_finds_what_they_gave(vits, tmp_path):
    bank = bank_of(vits, tmp_path)
    soup_of(bank, recipes(bank)[0]).look(everything(bank))
    again = bank_of(vits, tmp_path)
    with calls_of(is_first) as sizes:
        for recipe in recipes(bank)[1:]:
            soup = soup_of(again, recipe)
            soup.look(some_images(again))  # fewer than were shown together
            soup.look(everything(again))
    assert sizes == SHOWN


def test_logits_of_whole_soups_are_the_same(vits, tmp_path):
    cached, plain = bank_of(vits, tmp_path / "cached"), bank_of(vits, tmp_path / "plain", pixel_cache="off")
    recipe = recipes(cached)[1]
    measured_soup(cached, recipes(cached)[0]).look(everything(cached))
    with calls_of(is_first) as sizes:
        logits, _ = measured_soup(cached, recipe).logits()
    assert not sizes
    assert np.array_equal(logits, measured_soup(plain, recipe).logits()[0]) and len(logits) == IMAGES
    (path,) = cached.folder.glob("soups/*-logits.npy")
    path.unlink()
    for lost in files(cached)[:2]:
        lost.unlink()
    assert np.array_equal(measured_soup(cached, recipe).logits()[0], logits)


def test_another_set_of_models_with_this_front_finds_it(vits, tmp_path):
    bank = bank_of(vits, tmp_path)
    pair = bank.ingredients[:2]
    soup_of(bank, recipes(bank)[0]).look(everything(bank))
    smaller = make_bank(hf_radin.Ingredients(pair), rows(), tmp_path, block_size=BLOCK)
    assert smaller.front().activations.folder == bank.front().activations.folder
    assert len([*bank.folder.glob("fronts/*.json")]) == 2


def test_up_to_where_all_are_the_same_is_said_when_it_is_found(vits, tmp_path, caplog):
    caplog.set_level("INFO", "hf_radin")
    for _ in range(2):
        bank = bank_of(vits, tmp_path)
        assert bank.front() is not None
    lines = [line for line in caplog.messages if "the same up to" in line]
    assert lines == [
        f"All ingredients are the same up to {bank.front().cut.module}: soups on 'validation' run from there on."
    ]


@pytest.mark.parametrize("number", [2, 3])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(vits, tmp_path, number):
    whole = values(bank_of(vits, tmp_path / "whole"))
    bank = bank_of(vits, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):  # when activations are written, and predictions are not
        values(replace(bank, processes=Processes(Stopping("reduce", number))))
    assert files(bank)
    assert np.array_equal(values(bank_of(vits, tmp_path / "killed")), whole)


def test_what_is_broken_is_computed_anew(vits, tmp_path, caplog):
    bank = bank_of(vits, tmp_path / "broken")
    soup_of(bank, recipes(bank)[0]).look(everything(bank))
    first, second, *_ = files(bank)
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    again = bank_of(vits, tmp_path / "broken")
    soup = soup_of(again, recipes(again)[1])
    soup.look(everything(again))
    assert first.name in warned(caplog)[-1] and len(files(again)) == len(again.images.blocks)
    plain = bank_of(vits, tmp_path / "plain", pixel_cache="off")
    expected = soup_of(plain, recipes(plain)[1])
    expected.look(everything(plain))
    assert np.array_equal(soup.values, expected.values)


def test_it_takes_no_more_room_than_pixels_leave(vits, tmp_path):
    bank = bank_of(vits, tmp_path, pixel_cache="1GB")
    pixels = sum(path.stat().st_size for path in bank.images.folder.glob("block-*.safetensors"))
    part = 32 * bank.front().cut.width * 4
    bank = replace(bank, options=replace(bank.options, pixel_cache=pixels + 5 * part // 2))
    soup_of(bank, recipes(bank)[0]).look(everything(bank))
    assert 2 * part < sum(path.stat().st_size for path in files(bank)) <= 5 * part // 2


class Full(Activations):
    """On a disk that is full, whatever it says of itself."""

    def write(self, *args) -> int:
        raise OSError("No space left on device")


def test_where_nothing_can_be_written_soups_run_in_whole(vits, tmp_path, caplog):
    whole = values(bank_of(vits, tmp_path / "whole"))
    bank = bank_of(vits, tmp_path / "full")
    front = bank.front()
    bank._fronts[:] = [replace(front, activations=Full(front.activations.folder, front.activations.checks))]
    assert np.array_equal(values(bank), whole) and not files(bank)
    (line,) = [line for line in warned(caplog) if "No space left on device" in line]
    assert str(front.activations.folder) in line and "soups run in whole" in line


def test_a_file_in_the_place_of_a_cache_is_named_before_anything_is_computed(vits, tmp_path, predictions):
    bank = bank_of(vits, tmp_path)
    folder = bank.front().activations.folder
    shutil.rmtree(folder)
    folder.touch()
    predictions.clear()
    again = hf_radin.LogitBank.open(bank.folder)
    for ask in (lambda: soup_of(again, recipes(again)[1]).look(everything(again)), lambda: bank_of(vits, tmp_path)):
        with pytest.raises(ValueError, match=f"^{folder} is a file where a folder goes"):
            ask()
    assert not predictions


def test_what_is_cached_goes_with_the_last_model_that_uses_it(vits, tmp_path):
    models = shutil.copytree(vits, tmp_path / "models")
    bank = bank_of(models, tmp_path / "cache")
    soup_of(bank, recipes(bank)[0]).look(everything(bank))
    cached = files(bank)
    (models / "ft-0").rename(tmp_path / "ft-0")
    left = bank_of(models, tmp_path / "cache")  # what the others use stays
    assert cached == files(left) and left.front().activations.folder == bank.front().activations.folder
    shutil.rmtree(models)
    others = save_fine_tunes(KINDS["vit"], tmp_path / "others", trained=("",))
    other = bank_of(others, tmp_path / "cache")
    assert other.images.folder == bank.images.folder and cached and not files(other)


def test_where_the_first_layers_differ_nobody_looks(tmp_path):
    kind = KINDS["vit"]
    bank = bank_of(save_fine_tunes(kind, tmp_path / "all", trained=("",)), tmp_path / "cache")
    assert bank.front() is None and not (bank.folder / "fronts").exists()
    models = save_fine_tunes(kind, tmp_path / "first", trained=("vit.embeddings",))
    bank = bank_of(models, tmp_path / "cache")
    assert bank.front() is None and len([*bank.folder.glob("fronts/*.json")]) == 1
    assert bank_of(models, tmp_path / "cache").front() is None


def test_a_soup_with_other_first_layers_runs_in_whole(vits, tmp_path):
    """As one that is pulled to a start, or one whose layers were taught."""
    bank, kind = bank_of(vits, tmp_path), KINDS["vit"]
    recipe = recipes(bank)[0]
    soup_of(bank, recipe).look(everything(bank))
    before = files(bank)
    model = kind.start()
    with torch.no_grad():
        model.vit.layers[2].layernorm_before.weight.mul_(1.1)
    soup = MeasuredSoup(bank, recipes(bank)[1], lambda: copy.deepcopy(model), bank.pruned(0))
    soup.look(everything(bank))
    plain = bank_of(vits, tmp_path / "plain", pixel_cache="off")
    expected = MeasuredSoup(plain, recipes(plain)[1], lambda: copy.deepcopy(model), plain.pruned(0))
    expected.look(everything(plain))
    assert np.array_equal(soup.values, expected.values) and files(bank) == before


def test_a_soup_that_is_forgotten_is_not_held_by_what_the_next_needs(vits, tmp_path):
    bank = bank_of(vits, tmp_path)
    running, front = bank.passes().running, bank.front()
    model = running.ready(bank.ingredients[0].load_model(torch.float32))
    assert front.is_of(model) and front.tail_of(model, running).model is model
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def test_a_statistic_counts_like_a_weight():
    kind = KINDS["resnet"]
    models = [kind.start(), kind.start()]
    example = {"pixel_values": torch.randn(3, 16, 16)}

    def found() -> SharedFront:
        return find_front([TensorDigests.of(model) for model in models], kind.start, example)

    with torch.no_grad():
        models[0].classifier[1].weight.add_(0.1)
    assert found().cut.module.startswith(("classifier", "resnet.pooler"))
    models[0].resnet.encoder.stages[2].layers[0].layer[1].normalization.running_mean.add_(0.1)
    assert found().cut.module == "resnet.encoder.stages.2.layers.0"
    models[0].resnet.embedder.embedder.normalization.running_mean.add_(0.1)
    shared = found()
    assert not shared.pays("cpu", torch.float32)


def test_it_pays_where_much_is_computed_for_what_is_read():
    cut = Cut("layer", (), (10, 100), (), 0, 0.5)
    assert SharedFront(cut, 4 * 400 * 1000).pays("cpu", torch.float32)
    assert not SharedFront(cut, 4 * 399 * 1000).pays("cpu", torch.float32)
    assert SharedFront(cut, 2 * 400 * 1000).pays("cpu", torch.bfloat16)
    assert not SharedFront(cut, 4 * 400 * 1000).pays("cuda", torch.float32)
    assert SharedFront(cut, 4 * 100_000 * 1000).pays("cuda", torch.float32)
    assert not SharedFront(None).pays("cpu", torch.float32)


def test_few_tensors_in_common_are_not_worth_a_look():
    def models(shared: int) -> list[TensorDigests]:
        return [
            TensorDigests({str(place): "same" if place < shared else str(number) for place in range(100)})
            for number in range(2)
        ]

    assert may_share(models(5)) and not may_share(models(4)) and may_share(models(100))


SCRIPT = """
import sys
import numpy as np
from shared.making import make_bank
from hf_radin.recipes.recipe import Recipe
from hf_radin.search.measure import measured_soup

models, data, output = sys.argv[1:4]
bank = make_bank(models, data, "cache", block_size=32, pixel_cache="1GB")
assert bank.front() is not None
values = []
for weights in ((0.4, 0.3, 0.3), (0.1, 0.2, 0.7)):
    soup = measured_soup(bank, Recipe(bank.ingredients.ids, weights), bank.pruned(0))
    soup.look(np.arange(len(bank)) % 3 > 0)
    soup.look(np.ones(len(bank), dtype=bool))
    values.append(soup.values)
np.save(f"{output}-{bank.processes.index}.npy", np.stack(values))
bank.processes.wait()
"""


def test_two_processes_have_the_soups_of_one(vits, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
    rows().to_parquet(tmp_path / "data" / "validation.parquet")
    script = tmp_path / "soups.py"
    script.write_text(SCRIPT)
    run = launch(tmp_path, 2, f"{vits}/ft-*", tmp_path / "data", "result", script=script)
    assert run.returncode == 0, run.stderr
    bank, expected = make_bank(f"{vits}/ft-*", tmp_path / "data", tmp_path / "alone", block_size=BLOCK), []
    for weights in ((0.4, 0.3, 0.3), (0.1, 0.2, 0.7)):
        soup = soup_of(bank, Recipe(bank.ingredients.ids, weights))
        soup.look(some_images(bank))
        soup.look(everything(bank))
        expected.append(soup.values)
    assert files(bank) and all(np.array_equal(np.load(tmp_path / f"result-{index}.npy"), expected) for index in (0, 1))
