"""BatchNorm statistics of a soup are those of its own activations, from images alone; nothing else changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from shared.architectures import INSTALLED, save_fine_tunes
from shared.banks import plain_inputs
from shared.launching import launch
from shared.logs import warned
from shared.timeless import contents
from shared.training import digit_images, image_dataset
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.images.split import DataSource, open_split, sample_split
from hf_radin.search.held_out import bank_of_split
from hf_radin.soup.cook import cook_recipe, find_ingredients, find_statistics
from hf_radin.soup.report import SearchReport
from hf_radin.weights import batchnorm


@pytest.fixture(scope="module")
def bank_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def bank_of(nets, digits, cache, **options) -> hf_radin.LogitBank:
    return hf_radin.compute_logits(hf_radin.gather(f"{nets}/ft-*"), digits, cache_dir=cache, **options)


@pytest.fixture(scope="module")
def bank(nets, digits, bank_cache) -> hf_radin.LogitBank:
    return bank_of(nets, digits, bank_cache, batchnorm_images=256)


def buffers(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "running_" in name}


def test_the_statistics_are_those_of_the_activations(bank):
    model = hf_radin.uniform(bank).model
    first = model.resnet.embedder.embedder
    batches = [bank.statistics.images.read((0, number))["pixel_values"].to("cpu") for number in range(4)]
    assert [len(batch) for batch in batches] == [64] * 4
    with torch.no_grad():
        activations = [first.convolution(batch).transpose(0, 1).flatten(1) for batch in batches]  # (channels, values)
    means = torch.stack([values.mean(1) for values in activations]).mean(0)
    variances = torch.stack([values.var(1) for values in activations]).mean(0)
    torch.testing.assert_close(first.normalization.running_mean, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.normalization.running_var, variances, rtol=1e-5, atol=1e-6)
    assert first.normalization.num_batches_tracked == 4 and first.normalization.momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_weights_are_the_average_and_statistics_are_not(bank):
    soup = hf_radin.uniform(bank)
    plain = hf_radin.average(bank.ingredients, soup.recipe)
    tensors = soup.model.state_dict()
    for name, tensor in plain.items():
        moved = "running_" in name or "num_batches" in name
        assert torch.equal(tensor, tensors[name]) != moved, name
    anew = hf_radin.average(bank.ingredients, soup.recipe, statistics=bank.statistics)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in anew.items())


def test_what_is_measured_is_what_is_saved(bank, digits, tmp_path):
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "soup").eval()
    hits = 0
    for inputs, place in zip(plain_inputs(bank), bank.blocks.values(), strict=True):
        with torch.inference_mode():
            hits += int((saved(**inputs).logits.argmax(1).numpy() == bank.labels[place]).sum())
    assert hits / len(bank) == soup.accuracy("soup", "validation")
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "estimated anew from images of the split\ntrain (256 drawn at random, without their labels)" in card


def test_labels_are_not_looked_at(nets, bank, digits, tmp_path):
    data = datasets.load_dataset(str(digits))
    rows = {"image": data["train"]["image"], "label": [-1] * len(data["train"])}
    unlabelled = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows, features=data["train"].features), validation=data["validation"]
    )
    other = bank_of(nets, unlabelled, tmp_path, batchnorm_images=700)
    labelled = bank_of(nets, data, tmp_path, batchnorm_images=700)
    without, with_labels = (buffers(hf_radin.uniform(bank).model.state_dict()) for bank in (other, labelled))
    assert without and all(torch.equal(tensor, with_labels[name]) for name, tensor in without.items())


def test_a_single_model_keeps_its_own(bank):
    soup = hf_radin.best_single(bank)
    ingredient = AutoModelForImageClassification.from_pretrained(*soup.recipe.used).state_dict()
    assert all(torch.equal(ingredient[name], tensor) for name, tensor in soup.model.state_dict().items())


@pytest.fixture(scope="module")
def frozen(nets, tmp_path_factory) -> Path:
    """Fine-tunes whose BatchNorm statistics stayed those of their start."""
    folder, statistics = tmp_path_factory.mktemp("frozen"), {}
    for path in sorted(nets.glob("ft-*")):
        shutil.copytree(path, folder / path.name)
        model = AutoModelForImageClassification.from_pretrained(path)
        statistics = statistics or buffers(model.state_dict())
        model.load_state_dict(statistics, strict=False)
        model.save_pretrained(folder / path.name)
    return folder


def test_statistics_that_all_ingredients_share_are_those_of_the_soup(frozen, digits, tmp_path, caplog):
    caplog.set_level("INFO")
    bank = bank_of(frozen, digits, tmp_path)
    assert bank.statistics is None and "have the same BatchNorm statistics" in caplog.text
    assert hf_radin.LogitBank.open(bank.folder).statistics is None
    soup = hf_radin.uniform(bank)
    expected = buffers(bank.ingredients[0].load_model(torch.float32).state_dict())
    assert expected and all(torch.equal(tensor, soup.model.state_dict()[name]) for name, tensor in expected.items())
    soup.save_pretrained(tmp_path / "soup")
    assert "estimated anew" not in (tmp_path / "soup" / "README.md").read_text()
    cook_recipe(tmp_path / "soup" / "recipe.json", tmp_path / "again")
    assert contents(tmp_path / "again")["model.safetensors"] == contents(tmp_path / "soup")["model.safetensors"]
    assert bank_of(frozen, digits, tmp_path, batchnorm_split="train").statistics is not None


def test_the_split_is_train_or_the_one_that_is_named(nets, digits, bank, bank_cache, caplog):
    assert bank.statistics.record.split == "train" and bank.statistics.record.used == 256
    named = bank_of(nets, digits, bank_cache, batchnorm_split="validation", batchnorm_images=100)
    assert named.statistics.record.split == "validation"
    assert named.statistics.record.used == 64  # batches of one size
    assert named.folder == bank.folder  # logits don't depend on it
    opened = hf_radin.LogitBank.open(named.folder)
    assert opened.statistics == named.statistics
    assert (opened.options.batchnorm_split, opened.options.batchnorm_images) == ("validation", 100)
    soups = [hf_radin.uniform(bank) for bank in (named, opened)]
    assert soups[0].measurements == soups[1].measurements
    assert not torch.equal(
        soups[0].model.state_dict()["resnet.embedder.embedder.normalization.running_mean"],
        hf_radin.uniform(bank).model.state_dict()["resnet.embedder.embedder.normalization.running_mean"],
    )


def test_without_a_training_split_it_is_the_measured_one_and_said(nets, tmp_path, caplog):
    data = datasets.DatasetDict(validation=image_dataset(*digit_images(slice(700, 900))))
    bank = bank_of(nets, data, tmp_path)
    assert (
        "has no split 'train'; it has 'validation'. BatchNorm statistics come from images of 'validation'."
        in caplog.text
    )
    assert bank.statistics.record.split == "validation" and bank.statistics.record.used == 192
    single = bank_of(nets, data["validation"], tmp_path / "one")
    assert single.statistics.record.used == 192
    with pytest.raises(ValueError, match="batchnorm_split='train': a Dataset has one split; pass a DatasetDict"):
        bank_of(nets, data["validation"], tmp_path / "one", batchnorm_split="train")


def test_one_image_gives_no_statistics(nets, tmp_path):
    images, labels = digit_images(slice(700, 760))
    few = image_dataset(images[:1], labels[:1])
    data = datasets.DatasetDict(train=few, validation=image_dataset(images, labels))
    with pytest.raises(ValueError, match=r"The split 'train' of Dataset.* gives 1 images .* at least 2 are needed"):
        bank_of(nets, data, tmp_path)


def test_a_soup_of_images_that_nobody_else_has_says_so(nets, digits, tmp_path, caplog):
    """Statistics came from an object: elsewhere the images have to be named."""
    bank = bank_of(nets, datasets.load_dataset(str(digits)), tmp_path / "cache", batchnorm_images=128)
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    ingredients, _ = find_ingredients(tmp_path / "soup")
    with pytest.raises(ValueError, match=r"came from a dataset that it does not name; say where .*\(--dataset\)"):
        find_statistics(tmp_path / "soup", ingredients)
    statistics = find_statistics(tmp_path / "soup", ingredients, dataset=digits, cache_dir=tmp_path / "other")
    assert statistics.record.images == 128 and "It can't be told whether the images of" in caplog.text
    opened = hf_radin.LogitBank.open(bank.folder)
    shutil.rmtree(opened.statistics.images.folder)
    with pytest.raises(ValueError, match=r"is gone, or parts of it; run compute_logits again"):
        next(opened.statistics.images.stream(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchnorm_split": "dev"}, "has no split 'dev'"),
        ({"batchnorm_images": 1}, "batchnorm_images=1: it is a number of images, at least 2"),
        ({"batchnorm_images": "many"}, "batchnorm_images='many'"),
    ],
)
def test_bad_wishes_are_refused_before_an_image_is_read(nets, digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bank_of(nets, digits, tmp_path, **options)
    assert not (tmp_path / "pixels").exists()


def test_models_without_batchnorm_have_no_use_for_it(runs, digits, cache, bank):
    batchnorm.refuse_statistics_of("train", hf_radin.gather(f"{runs}/ft-*")[0], None)  # any split may prove their soup
    with pytest.raises(ValueError, match="ViTForImageClassification has no BatchNorm"):
        hf_radin.compute_logits(
            hf_radin.gather(f"{runs}/ft-*"), digits, batchnorm_split="train", cache_dir=cache / "none"
        )


def test_the_split_that_gives_statistics_does_not_prove(nets, digits, bank_cache, capsys):
    bank = bank_of(nets, digits, bank_cache, batchnorm_split="test", batchnorm_images=64)
    with pytest.raises(
        ValueError, match="The split 'test' gives the soup its BatchNorm statistics; another one has to"
    ):
        hf_radin.uniform(bank, test_split="test")
    proving = bank_of(nets, digits, bank_cache, split="test", batchnorm_split="train", batchnorm_images=64)
    with pytest.raises(ValueError, match="The split 'test' gives the soup its BatchNorm statistics; another one has"):
        hf_radin.uniform(bank, test_split=proving)
    same = bank_of(nets, digits, bank_cache, batchnorm_split="validation", batchnorm_images=64)
    with pytest.raises(ValueError, match=r"hold_out=0\.2: the split 'validation' gives soups their BatchNorm statist"):
        hf_radin.radin(same, hold_out=0.2)
    options = ["--dataset", str(digits), "--cache-dir", str(bank_cache), "--test-split", "train"]
    assert main(["soup", "--models", f"{nets}/ft-*", *options]) == 2
    assert "--test-split train: it gives the soup its BatchNorm statistics" in capsys.readouterr().err


def test_the_held_out_split_is_shown_the_same_soup(bank):
    soup = hf_radin.uniform(bank, test_split="test")
    model = soup.model
    test = bank_of_split(bank, "test")
    predicted = []
    for inputs in plain_inputs(test):
        with torch.inference_mode():
            predicted += model(**inputs).logits.argmax(1).tolist()
    assert np.mean(np.array(predicted) == test.labels) == soup.accuracy("soup", "test")


def test_it_is_cooked_again(nets, digits, bank_cache, tmp_path, caplog):
    soup = hf_radin.uniform(bank_of(nets, digits, bank_cache, batchnorm_images=256))
    soup.save_pretrained(tmp_path / "soup")
    record = SearchReport.read(tmp_path / "soup" / "recipe.json").batchnorm
    assert (record.split, record.used, record.seed) == ("train", 256, 0)
    ingredients, recipe = find_ingredients(tmp_path / "soup")
    statistics = find_statistics(tmp_path / "soup", ingredients, cache_dir=tmp_path / "cache")
    again = hf_radin.average(ingredients, recipe, statistics=statistics)
    assert all(torch.equal(again[name], tensor) for name, tensor in soup.model.state_dict().items())
    assert not warned(caplog)
    command = ["average", "--recipe", str(tmp_path / "soup" / "recipe.json"), "--output", str(tmp_path / "again")]
    assert main([*command, "--cache-dir", str(tmp_path / "cache")]) == 0
    assert contents(tmp_path / "again")["model.safetensors"] == contents(tmp_path / "soup")["model.safetensors"]


def test_a_sample_is_drawn_evenly_and_without_holding_the_stream(digits):
    split = open_split(DataSource(str(digits), "train"))
    drawn = [sample_split(split, 100, seed=seed) for seed in range(20)]
    assert all(len(sample.rows) == 100 for sample in drawn) and len({sample.key for sample in drawn}) == 20
    again = sample_split(split, 100, seed=3)
    assert again.rows["image"][:] == drawn[3].rows["image"][:] and again.rows["image"][:] != drawn[4].rows["image"][:]
    rows = [row["image"]["bytes"] for row in split.rows]
    places = np.concatenate([[rows.index(row["image"]["bytes"]) for row in sample.rows] for sample in drawn])
    assert abs(places.mean() - 349.5) < 4 * 202 / np.sqrt(2000)  # as likely from the end as from the start
    dataset = open_split(DataSource(datasets.load_dataset(str(digits)), "train"))
    assert len(sample_split(dataset, 100).rows) == 100 and len(sample_split(dataset, 5000).rows) == 700


def test_two_processes_give_the_soup_of_one(nets, digits, tmp_path):
    options = ["--models", f"{nets}/ft-*", "--dataset", digits, "--budget", "2", "--batchnorm-images", "192"]
    files = {}
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run = launch(tmp_path / str(processes), processes, *options)
        assert run.returncode == 0, run.stderr
        files[processes] = contents(tmp_path / str(processes) / "soup")
    assert files[1] == files[2]


def test_levit_forgets_the_weights_that_it_remembered(tmp_path):
    """It keeps a table of its attention biases from its first run on; a soup must not keep that of other weights."""
    architecture = next(known for known in INSTALLED if known.class_name == "LevitForImageClassification")
    save_fine_tunes(architecture, tmp_path)
    ingredients = hf_radin.gather(f"{tmp_path}/ft-*")
    images, labels = digit_images(slice(0, 64))
    data = image_dataset(images, [label % 3 for label in labels], ["cat", "dog", "fish"])
    bank = hf_radin.compute_logits(ingredients, data, cache_dir=tmp_path / "cache", dtype="bfloat16")
    model = hf_radin.uniform(bank).model
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    assert caches and not any(caches)
    model.to(torch.float64)
    batchnorm.estimate_statistics(model, bank.statistics)
    model(pixel_values=torch.zeros(1, 3, 32, 32, dtype=torch.float64))  # tables of another dtype would not fit


def test_mixed_precision_does_not_change_what_is_estimated(bank, tmp_path):
    """Else a soup could not be cooked again where its run was launched otherwise."""
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    code = (
        "import sys; from hf_radin.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "from accelerate import Accelerator; assert Accelerator().mixed_precision == 'bf16'"
    )
    command = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "again")]
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [sys.executable, "-c", code, *command, "--cache-dir", str(tmp_path / "cache")], env=environment, check=True
    )
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "soup" / "model.safetensors"
    ).read_bytes()


def test_weights_of_a_float64_soup_keep_their_digits(bank):
    recipe = hf_radin.Recipe(bank.ingredients.ids, (0.3, 0.3, 0.4))
    plain = hf_radin.average(bank.ingredients, recipe, dtype="float64")
    anew = hf_radin.average(bank.ingredients, recipe, dtype="float64", statistics=bank.statistics)
    moved = [name for name in plain if not torch.equal(plain[name], anew[name])]
    assert moved and all("running_" in name or "num_batches" in name for name in moved)


def test_a_split_without_labels_gives_statistics_too(nets, digits, tmp_path):
    data = datasets.load_dataset(str(digits))
    bare = datasets.DatasetDict(train=data["train"].remove_columns("label"), validation=data["validation"])
    for cache, options in (("named", {"batchnorm_split": "train"}), ("default", {})):
        bank = bank_of(nets, bare, tmp_path / cache, batchnorm_images=64, **options)
        assert bank.statistics.record.split == "train"


def test_a_folder_of_one_nameless_split_is_not_called_train(nets, tmp_path):
    image_dataset(*digit_images(slice(700, 900))).save_to_disk(tmp_path / "data")
    bank = bank_of(nets, tmp_path / "data", tmp_path / "cache", batchnorm_images=64)
    assert bank.statistics.record.split == bank.split == "validation"


def test_a_held_out_split_that_gives_statistics_is_refused_before_it_is_run(bank, bank_cache):
    before = {path: path.stat().st_mtime_ns for path in bank_cache.rglob("*.npy")}
    with pytest.raises(ValueError, match="The split 'train' gives the soup its BatchNorm statistics"):
        hf_radin.uniform(bank, test_split="train")
    assert before and {path: path.stat().st_mtime_ns for path in bank_cache.rglob("*.npy")} == before
