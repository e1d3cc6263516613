"""However the images go by, the bank is the same, and no image is decoded once more than it has to be."""

import io
import logging
import multiprocessing
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from shared.launching import SMALL_BLOCKS, banks_of_processes, launch
from shared.making import make_bank
from shared.models import interrupted, little_memory, watched
from shared.training import NAMES, digit_images, image_dataset

import hf_radin
from hf_radin.logits import passes as passing


def rows() -> datasets.Dataset:
    images, labels = digit_images(slice(700, 1000))
    return image_dataset(images, labels)


def as_parquet(folder: Path) -> None:
    for shard in range(3):
        rows().shard(3, shard).to_parquet(folder / f"validation-{shard}-of-3.parquet")


def as_folders(folder: Path) -> None:
    for number, (image, label) in enumerate(zip(*digit_images(slice(700, 1000)), strict=True)):
        place = folder / "validation" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:04d}.png")


def as_webdataset(folder: Path) -> None:
    images, labels = digit_images(slice(700, 1000))
    for shard in range(2):
        with tarfile.open(folder / f"validation-{shard}.tar", "w") as tar:
            for number in range(shard * 150, shard * 150 + 150):
                buffer = io.BytesIO()
                images[number].save(buffer, "PNG")
                for ending, content in (("png", buffer.getvalue()), ("cls", str(labels[number]).encode())):
                    entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


# Beside the passes an image of each size, up to three, is decoded: models are tried with it. Here all are of one size.
TRIED = 1


def compute(models, data, folder: Path, **options) -> hf_radin.LogitBank:
    """A bank in blocks of 32 images."""
    return make_bank(models, data, folder, block_size=32, **options)


def all_logits(bank: hf_radin.LogitBank) -> np.ndarray:
    return np.stack([bank.logits(index) for index in range(len(bank.ingredients))])


@pytest.fixture(scope="module")
def expected(runs, tmp_path_factory):
    """The bank of the plainest run."""
    return compute(f"{runs}/ft-[012]", rows(), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("write", [as_parquet, as_folders, as_webdataset])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_of_files_are_read_in_shards(runs, tmp_path, write, workers, expected, decoded):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    options = {"label_column": "cls"} if write is as_webdataset else {}
    bank = compute(f"{runs}/ft-[012]", str(tmp_path / "data"), tmp_path / "cache", workers=workers, **options)
    assert len(bank) == 300 and bank.ids.tolist() == list(range(300))
    shards = {shard for shard, _ in bank.blocks}
    assert len(shards) == {as_parquet: 3, as_folders: 1, as_webdataset: 2}[write]
    assert len(decoded) == TRIED + (0 if workers else 300)  # workers decode where this process can't count
    order = np.argsort(bank.labels, kind="stable") if write is as_folders else np.arange(300)
    plain = np.argsort(expected.labels, kind="stable") if write is as_folders else np.arange(300)
    assert bank.labels[order].tolist() == expected.labels[plain].tolist()
    if write is not as_folders:  # whose order within a class is that of the names
        np.testing.assert_allclose(all_logits(bank), all_logits(expected), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"models_in_memory": 1},
        {"models_in_memory": 2},
        {"pixel_cache": "off"},
        {"pixel_cache": "off", "models_in_memory": 1, "workers": 2},
        {"pixel_cache": "20KB", "models_in_memory": 2},
        {"workers": 1},
    ],
)
def test_how_images_go_by_changes_no_bit(runs, tmp_path, expected, options):
    bank = compute(f"{runs}/ft-[012]", rows(), tmp_path, **options)
    assert (all_logits(bank) == all_logits(expected)).all()
    soup, plain = hf_radin.uniform(bank), hf_radin.uniform(expected)
    assert soup.recipe == plain.recipe and soup.measurements == plain.measurements


@pytest.mark.parametrize(("models", "at_once"), [(2, 1), (5, 2), (5, "auto")])
def test_images_are_decoded_once_for_all_models_and_soups(runs, tmp_path, decoded, models, at_once):
    names = "".join(map(str, range(models)))
    bank = compute(f"{runs}/ft-[{names}]", rows(), tmp_path, models_in_memory=at_once)
    soup = hf_radin.radin(bank, budget=8)
    assert len(decoded) == TRIED + 300 and soup.report.passes.soups >= 1


@pytest.mark.parametrize("workers", [2, "auto"])
def test_processes_decode_where_images_are_not_cached(bank, tmp_path, monkeypatch, workers):
    """By a probe they are one or more, as if beside a GPU of a machine with three cores."""
    monkeypatch.setattr(passing, "most_workers", lambda device: 2)
    passes = replace(bank.passes(), workers=workers, example=bank.images.example())
    model = passes.running.ready(bank.ingredients[0].load_model(passes.running.dtype))

    def decoding(images) -> int:
        stream = passes.stream(images, show=lambda inputs: passes.running.logits([model], inputs))
        next(stream)
        count = len(multiprocessing.active_children())
        stream.close()
        return count

    assert decoding(bank.images) == 0
    assert decoding(replace(bank.images, folder=tmp_path)) in ([2] if workers == 2 else [1, 2])


def test_without_a_cache_images_are_decoded_once_a_group_and_a_soup(runs, tmp_path, decoded):
    bank = compute(f"{runs}/ft-[012]", rows(), tmp_path, models_in_memory=2, pixel_cache="off")
    assert len(decoded) == TRIED + 2 * 300 and not list(tmp_path.glob("pixels/*/*.safetensors"))
    hf_radin.uniform(bank)
    assert len(decoded) == TRIED + 3 * 300


def test_the_cache_keeps_to_its_bound_and_what_it_has_is_used(runs, tmp_path, decoded):
    compute(f"{runs}/ft-[012]", rows(), tmp_path, models_in_memory=2, pixel_cache=30_000)
    cached = list(tmp_path.glob("pixels/*/*.safetensors"))
    assert 2 <= len(cached) <= 5 and sum(path.stat().st_size for path in cached) < 40_000
    assert len(decoded) == TRIED + 300 + 300 - 32 * len(cached)


def test_pixels_are_not_cached_on_a_disk_that_is_nearly_full(runs, tmp_path, free_bytes):
    free_bytes(500_000_000)
    bank = compute(f"{runs}/ft-[01]", rows(), tmp_path, pixel_cache="10GB")
    assert len(bank) == 300 and not list(tmp_path.glob("pixels/*/*.safetensors"))


def test_a_model_that_was_added_sees_only_what_it_has_not_seen(runs, tmp_path, model_calls):
    options = {"models_in_memory": 3}  # else a model is run to see what that takes
    compute(f"{runs}/ft-[01]", rows(), tmp_path, **options)
    model_calls.clear()
    with pytest.raises(KeyboardInterrupt), interrupted(calls=9):  # all blocks but the last are there
        compute(f"{runs}/ft-[012]", rows(), tmp_path, **options)
    assert model_calls == [1, *[32] * 9, 12]  # it is tried with an image, and what comes last is lost
    (part,) = tmp_path.glob("banks/*/logits/*.parts/block-00000-000004.npz")
    part.unlink()
    model_calls.clear()
    compute(f"{runs}/ft-[012]", rows(), tmp_path, **options)
    assert model_calls == [1, 32, 12]


def test_running_out_of_memory_halves_the_batch_and_changes_nothing_else(runs, tmp_path, expected, caplog):
    with little_memory(images=5):
        bank = compute(f"{runs}/ft-[012]", rows(), tmp_path)
    np.testing.assert_allclose(all_logits(bank), all_logits(expected), atol=1e-5)
    assert caplog.text.count("going on with 4 images") == 1


@pytest.mark.parametrize("knob", ["channels_last", "torch_compile"])
def test_knobs_of_speed_give_a_bank_of_their_own(runs, tmp_path, expected, knob):
    banks = [compute(f"{runs}/ft-[012]", rows(), tmp_path, **{knob: value}) for value in (True, False)]
    assert banks[0].folder != banks[1].folder
    np.testing.assert_allclose(all_logits(banks[0]), all_logits(expected), atol=1e-4)
    again = hf_radin.LogitBank.open(banks[0].folder)
    assert getattr(again.options, knob) is True and hf_radin.uniform(again).accuracy("soup", "validation") > 0.5


@pytest.mark.parametrize(
    "option",
    [{"models_in_memory": 0}, {"models_in_memory": "all"}, {"workers": -1}, {"workers": 1.5}, {"pixel_cache": "big"}],
)
def test_what_makes_no_sense_is_refused_first(runs, tmp_path, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}="):
        hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), rows(), cache_dir=tmp_path, **option)
    assert not list(tmp_path.iterdir())


def test_a_log_without_a_terminal_counts_predictions(runs, digits, tmp_path, caplog):
    """Block by block here, each minute for a user."""
    caplog.set_level(logging.INFO, logger="hf_radin")
    make_bank(f"{runs}/ft-[012]", digits, tmp_path, log_every=0)
    lines = re.findall(r"([\d,]+) predictions of 1,800, [\d,]+ s left \([\d,]+ a second\)", caplog.text)
    counts = [int(line.replace(",", "")) for line in lines]
    # of the first block, a model says how long it takes
    assert counts == [64, *(192 * block for block in range(1, 10)), 1800]


@pytest.mark.parametrize("shards", [2, 5])
def test_one_two_and_three_processes_give_one_bank_of_any_number_of_shards(runs, tmp_path, shards):
    (tmp_path / "data").mkdir()
    few = rows().select(range(70))
    for shard in range(shards):
        few.shard(shards, shard, contiguous=True).to_parquet(tmp_path / "data" / f"validation-{shard}.parquet")
    caches = banks_of_processes(tmp_path, f"{runs}/ft-[01]", (1, 2, 3))
    assert caches[0] == caches[1] == caches[2] and len(caches[0]) > 10


def test_a_split_smaller_than_the_number_of_processes(runs, tmp_path):
    (tmp_path / "data").mkdir()
    rows().select(range(2)).to_parquet(tmp_path / "data" / "validation.parquet")
    run = launch(tmp_path, 3, f"{runs}/ft-[01]", tmp_path / "data", script=SMALL_BLOCKS)
    assert run.returncode == 0, run.stderr
    (folder,) = (path.parent for path in tmp_path.glob("cache/banks/*/bank.json"))
    assert len(hf_radin.LogitBank.open(folder)) == 2 and (folder / "latest.json").exists()


def test_what_a_model_raises_on_images_of_the_usual_shape_is_passed_on(runs, tmp_path):
    class OddError(Exception):
        """Of a library."""

    def fail(images):
        if images > 1:  # models are tried with one image before the pass
            raise OddError

    with watched(fail), pytest.raises(OddError):
        compute(f"{runs}/ft-[01]", rows(), tmp_path, models_in_memory=1)
