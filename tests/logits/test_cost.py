"""What a job costs is known before it starts: bytes exactly, seconds by arithmetic, and no weights are downloaded."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from shared.training import NAMES, digit_images, image_dataset, save
from transformers import ViTConfig, ViTForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.cli.tables import estimate_table
from hf_radin.images.cache import SPARED
from hf_radin.images.sample import Pilot
from hf_radin.images.split import DataSource, count_rows, open_split
from hf_radin.logits.bank_files import logits_path
from hf_radin.logits.cost import Estimate, Probe
from hf_radin.runtime.text import clock


@pytest.fixture(scope="module")
def job(runs, digits, tmp_path_factory) -> Estimate:
    return hf_radin.estimate(hf_radin.gather(f"{runs}/ft-*"), digits, cache_dir=tmp_path_factory.mktemp("estimate"))


def test_the_bytes_are_those_that_are_written(job, bank):
    # the folder may hold the logits of others too, which another test computed
    paths = [logits_path(bank.folder, key) for key in bank.ingredients.keys]
    headers = [np.lib.format.open_memmap(path).offset for path in paths]
    written = sum(path.stat().st_size for path in paths)
    assert job.images == len(bank) and job.bank_bytes == written - sum(headers)
    cached = 0
    for path in bank.images.folder.glob("block-*.safetensors"):
        with safe_open(path, "np") as file:
            cached += file.get_tensor("inputs.pixel_values").nbytes
    assert job.pixel_bytes == job.cached_bytes == cached
    assert job.disk_bytes == job.bank_bytes + job.cached_bytes


def test_a_model_takes_what_its_weights_do(job, runs):
    weights = load_file(runs / "ft-0" / "model.safetensors")
    assert job.probe.model_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert job.at_once == job.ingredients == 5 and job.groups == 1


def test_no_weights_are_needed(runs, digits, tmp_path):
    ingredients = hf_radin.gather([runs / "ft-0", runs / "ft-1"])
    without = [replace(ingredient, folder=tmp_path / f"{number}") for number, ingredient in enumerate(ingredients)]
    for ingredient, copy in zip(ingredients, without, strict=True):
        shutil.copytree(ingredient.folder, copy.folder)
        (copy.folder / "model.safetensors").unlink()
    job = hf_radin.estimate(hf_radin.Ingredients(without), digits, cache_dir=tmp_path / "cache")
    assert (job.ingredients, job.classes) == (2, 10) and job.probe.forward_seconds > 0
    assert job.together is None and job.work == 2 and "not all are here" in estimate_table(job)


def test_twice_the_processes_take_half_the_time(job):
    twice = replace(job, processes=2 * job.processes)
    assert 2 * twice.logits_seconds == job.logits_seconds and 2 * twice.soups_seconds == job.soups_seconds


PROBE = Probe("cuda", "float32", 256, 2e-3, 1e-3, 3 * 224 * 224, 346_000_000, 8, False)
LARGE = Estimate(
    ingredients=72,
    images=50_000,
    classes=1000,
    processes=4,
    budget=8,
    probe=PROBE,
    at_once=8,
    workers=0,
    pixel_room=10**11,
    download_bytes=72 * 346_000_000,
    free_disk=10**12,
    free_hub=10**12,
    one_disk=True,
    statistics=0,
    logit_bytes=4,
)


def test_the_arithmetic():
    assert LARGE.groups == 9 and LARGE.decodings == (1, 0)
    assert LARGE.logits_seconds == pytest.approx(50_000 * (2e-3 + 72 * 1e-3) / 4)
    assert LARGE.soups_seconds == pytest.approx(50_000 * 9 * 1e-3 / 4)
    half = replace(LARGE, pixel_room=LARGE.pixel_bytes // 2)
    assert half.decodings == (5, 4.5)  # what is not cached is decoded again in each pass
    assert half.soups_seconds == pytest.approx(50_000 * (4.5 * 2e-3 + 9 * 1e-3) / 4)
    assert replace(half, workers=1).soups_seconds == pytest.approx(50_000 * 9 * 2e-3 / 2 / 4 * 1)
    assert replace(LARGE, statistics=1024).soups_seconds == LARGE.soups_seconds + 9 * 1.024
    assert replace(LARGE, logit_bytes=2).bank_bytes == LARGE.bank_bytes / 2
    assert replace(LARGE, free_disk=SPARED).cached_bytes == 0


def test_what_models_have_in_common_counts_once():
    shared = replace(LARGE, together=24.75)
    assert LARGE.work == 72 and shared.work == 24.75
    assert replace(shared, pilot=Pilot(0.1)).work == pytest.approx(24.75 * Pilot(0.1).passes(72) / 72)
    assert shared.logits_seconds == pytest.approx(50_000 * (2e-3 + 24.75 * 1e-3) / 4)
    assert shared.soups_seconds == LARGE.soups_seconds and shared.bank_bytes == LARGE.bank_bytes
    assert "at most 24.8 passes' work" in estimate_table(shared) and "at most" not in estimate_table(LARGE)
    tails = replace(shared, tail=0.25)
    assert tails.soup_work == 1 + 8 * 0.25 and "at most 3 passes' work" in estimate_table(tails)
    assert tails.soups_seconds == pytest.approx(50_000 * 3 * 1e-3 / 4)
    exact = replace(shared, exact=True)
    assert exact.soups == exact.soups_seconds == 0 and "exact, without a pass" in estimate_table(exact)


def test_what_is_nearly_all_in_common_is_said_in_words():
    probes = estimate_table(replace(LARGE, together=1.001, exact=True)).partition("memory and disk")[0]
    assert "all but the heads runs once, decoded once" in probes and "100%" not in probes


def test_a_pass_for_the_refitted_head_is_counted_but_not_after_a_pilot():
    for exact in (True, False):
        job = replace(LARGE, exact=exact)
        assert job.head == 1 and job.head_seconds == pytest.approx(50_000 * 1e-3 / 4)
        together = clock(job.logits_seconds + job.soups_seconds + job.head_seconds)
        assert "50,000 images x 1 pass, whether" in estimate_table(job) and together in estimate_table(job)
        assert replace(job, pixel_room=job.pixel_bytes // 2).head_seconds == pytest.approx(50_000 * 2e-3 / 4)
    after = replace(LARGE, pilot=Pilot(0.1))
    assert after.head == after.head_seconds == 0 and "averaged after a pilot" in estimate_table(after)


def test_linear_probes_cost_one_body_and_no_soup(heads, digits, tmp_path):
    job = hf_radin.estimate(hf_radin.gather(f"{heads}/*"), digits, cache_dir=tmp_path)
    assert job.exact and job.soups == job.soup_work == 0 and 1 < job.work < 1.02


def test_processors_that_keep_the_size_of_images_change_no_cost(heads, digits, tmp_path):
    for number in range(2):
        folder = shutil.copytree(heads / f"ft-{number}", tmp_path / f"ft-{number}")
        fields = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps({**fields, "do_resize": False}))
    job = hf_radin.estimate(hf_radin.gather(f"{tmp_path}/ft-*"), digits, cache_dir=tmp_path / "cache")
    assert job.exact and 1 < job.work < 1.02


def save_tree(folder: Path) -> Path:
    """Four fine-tunes of six layers: all share the first three, and 0 and 1 five."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 128}
    start = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=4, num_labels=10))
    start.config.id2label = dict(enumerate(NAMES))
    for number, first in enumerate((5, 5, 3, 3)):
        model = deepcopy(start)
        with torch.no_grad():
            for part in (*model.vit.layers[first:], model.classifier):
                for parameter in part.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape)
        save(model, folder / f"ft-{number}", size=16)
    return folder


def test_of_models_that_share_some_layers_two_may_share_more_and_soups_take_what_is_behind(
    digits, tmp_path, free_bytes
):
    free_bytes(10**12)
    models, cache = hf_radin.gather(f"{save_tree(tmp_path / 'tree')}/ft-*"), tmp_path / "cache"
    job = hf_radin.estimate(models, digits, cache_dir=cache)
    layers = (6 + 1 + 3 + 3) / 6  # all of one, the last of its twin, three of each of the others
    assert job.work == pytest.approx(layers, abs=0.05) and job.tail == pytest.approx(0.5, abs=0.03)
    assert job.soup_work == pytest.approx(1 + job.budget * job.tail)
    pairs = hf_radin.estimate(models, digits, cache_dir=cache, models_in_memory=2)
    assert pairs.work == pytest.approx((6 + 1 + 6 + 3) / 6, abs=0.05)
    for options in ({"pixel_cache": "off"}, {"pixel_cache": job.pixel_bytes}):
        assert hf_radin.estimate(models, digits, cache_dir=cache, **options).tail == 1


def test_fine_tunes_of_everything_cost_all_passes(job):
    assert job.together == 5 and job.tail == 1 and not job.exact and job.work == 5 and job.soups == job.budget + 1


def test_the_worked_example_of_the_docs_is_this_arithmetic():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    assert f"{LARGE.bank_bytes / 1e9:.1f} GB" in page and f"{LARGE.pixel_bytes / 1e9:.1f} GB" in page


def test_the_docs_show_what_is_printed(job):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    shown = next(part for part in page.split("```") if part.strip().startswith("an image, measured")).strip()
    words = [[line.split()[0] for line in text.splitlines()] for text in (shown, estimate_table(job))]
    assert words[0] == words[1]


def test_what_does_not_fit_is_said():
    assert "lacks" not in estimate_table(LARGE)
    assert "The disk lacks 32.4 GB: name another place" in estimate_table(replace(LARGE, free_disk=14_400_000_000))
    apart = replace(LARGE, one_disk=False, free_hub=0)
    assert "downloaded to lacks 24.9 GB" in estimate_table(apart)
    assert "9 models at once are too many" in estimate_table(replace(LARGE, at_once=9))


def test_with_a_pilot_few_passes_give_the_logits():
    """Those of a part of the images first, then all logits of the best."""
    job = replace(LARGE, pilot=Pilot(0.1))
    assert job.logits == job.pilot.passes(72) < 72 and job.completed == job.pilot.whole(72) < 72
    assert f"{job.logits:.3g} passes: 0.1 of 72 ingredients, all of {job.completed}" in estimate_table(job)


def write(kind: str, folder: Path) -> None:
    images, labels = digit_images(slice(700, 720))
    rows = image_dataset(images, labels)
    if kind == "imagefolder":
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            (folder / "validation" / NAMES[label]).mkdir(parents=True, exist_ok=True)
            image.save(folder / "validation" / NAMES[label] / f"{number}.png")
    elif kind == "saved":
        rows.save_to_disk(folder / "data")
    else:
        for shard in range(2):
            rows.shard(2, shard).to_parquet(folder / f"validation-{shard}-of-2.parquet")


@pytest.mark.parametrize("kind", ["parquet", "imagefolder", "saved"])
def test_local_images_are_counted(tmp_path, kind):
    write(kind, tmp_path)
    assert count_rows(open_split(DataSource(tmp_path / "data" if kind == "saved" else tmp_path))) == 20


def test_a_stream_that_does_not_say_its_number_has_to_be_told(runs, tmp_path):
    rows = image_dataset(*digit_images(slice(700, 720))).to_iterable_dataset()
    ingredients = hf_radin.gather([runs / "ft-0", runs / "ft-1"])
    with pytest.raises(ValueError, match=r"does not say how many images it has\. Give .* \(--images N\)"):
        hf_radin.estimate(ingredients, rows, cache_dir=tmp_path)
    assert hf_radin.estimate(ingredients, rows, images=10**6, cache_dir=tmp_path).bank_bytes == 10**6 * 2 * 10 * 4


def test_batchnorm_costs_its_statistics(nets, digits, tmp_path):
    job = hf_radin.estimate(hf_radin.gather(f"{nets}/ft-*"), digits, cache_dir=tmp_path, batchnorm_images=128)
    assert job.statistics == 128 and "BatchNorm of each from 128" in estimate_table(job)


@pytest.mark.parametrize("option", ["images", "processes", "budget"])
def test_numbers_are_numbers(runs, digits, tmp_path, option):
    ingredients = hf_radin.gather([runs / "ft-0", runs / "ft-1"])
    with pytest.raises(ValueError, match=f"{option}=0"):
        hf_radin.estimate(ingredients, digits, cache_dir=tmp_path, **{option: 0})


def test_the_command_prints_it(runs, digits, tmp_path, capsys):
    options = ["--models", f"{runs}/ft-*", "--dataset", str(digits), "--cache-dir", str(tmp_path)]
    assert main(["estimate", *options, "--processes", "2", "--models-in-memory", "2"]) == 0
    printed = capsys.readouterr().out
    assert "time of 2 processes" in printed and "in 3 groups" in printed
    assert "600 images x 5 ingredients x 10 classes x 4 B" in printed and "120.0 kB" in printed
    assert not list(tmp_path.glob("banks")) and not list(tmp_path.rglob("block-*"))


def test_the_command_says_in_one_line_what_is_missing(runs, digits, tmp_path, capsys):
    options = ["--models", f"{runs}/ft-*", "--dataset", str(digits), "--cache-dir", str(tmp_path)]
    assert main(["estimate", *options, "--split", "dev"]) == 2
    assert "has no split 'dev'" in capsys.readouterr().err


def test_images_of_which_none_can_be_read_tell_nothing(runs, tmp_path):
    rows = image_dataset([{"bytes": b"no image", "path": None}] * 20, [0] * 20)
    with pytest.raises(ValueError, match=r"^None of the first \d+ images of .* can be read\."):
        hf_radin.estimate(hf_radin.gather(f"{runs}/ft-*"), rows, on_error="skip", cache_dir=tmp_path)
