"""Images that the split which proves a soup shares with the one that chose it are counted exactly.

They are refused before anything is computed where the files are here, and as they go by where they are streamed.
"""

import io
import json
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from shared.launching import launch
from shared.training import NAMES, digit_images, image_dataset

import hf_radin
from hf_radin import LogitBank
from hf_radin.cli.main import main
from hf_radin.images.digests import count_shared, find_shared, split_digests, with_copies
from hf_radin.images.split import DataSource, open_split
from hf_radin.runtime.schema import read_arrays, write_arrays
from hf_radin.search.held_out import find_split
from hf_radin.soup import card
from hf_radin.soup.report import Overlap

CHOSE, PROVES, SHARED = slice(0, 40), slice(33, 63), 7  # of the digits, of which no two are alike


@pytest.fixture(scope="module")
def gathered(runs):
    return hf_radin.gather([str(runs / "ft-0"), str(runs / "ft-1")])


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder, split: str, part: slice) -> None:
    """As files whose names say nothing of what is in them."""
    for number, (image, label) in enumerate(zip(*digit_images(part), strict=True)):
        place = folder / split / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{split}-{number}.png").write_bytes(png(image))


def rows_of(part: slice) -> datasets.Dataset:
    images, labels = digit_images(part)
    return image_dataset([{"bytes": png(image), "path": None} for image in images], labels)


def splits_of(kind: str, folder):
    """The two splits as a dataset of some kind, none of which looks like another."""
    parts = {"validation": CHOSE, "test": PROVES}
    if kind == "files":
        for split, part in parts.items():
            write_images(folder, split, part)
        return folder
    if kind == "parquet":
        for split, part in parts.items():
            rows_of(part).to_parquet(folder / f"{split}.parquet")
        table = pq.read_table(folder / "test.parquet")
        pq.write_table(table, folder / "test.parquet", compression="zstd", row_group_size=7, use_dictionary=False)
        return folder
    if kind == "saved":
        datasets.DatasetDict({split: rows_of(part) for split, part in parts.items()}).save_to_disk(folder)
        return folder
    rows = {split: rows_of(part) for split, part in parts.items()}
    return (
        {split: part.to_iterable_dataset(num_shards=2) for split, part in rows.items()} if kind == "stream" else rows
    )


def card_of(soup) -> str:
    return card.card_files(soup.report)["README.md"].decode()


@pytest.mark.parametrize("kind", ["files", "parquet", "saved", "objects", "stream"])
def test_shared_images_are_counted_and_refused(gathered, tmp_path, caplog, kind):
    bank = hf_radin.compute_logits(gathered, splits_of(kind, tmp_path / "data"), cache_dir=tmp_path / "cache")
    count = "7 of 15 images" if kind == "stream" else "7 of the 30 images"
    with pytest.raises(ValueError, match=rf"{count} of the split 'test' .* 'validation' too.*--allow-overlap"):
        hf_radin.radin(bank, budget=1, test_split="test")
    folders = list((tmp_path / "cache" / "banks").glob("*/bank.json"))
    assert len(folders) == 1  # nothing of the test split was computed to its end
    soup = hf_radin.uniform(bank, test_split="test", allow_overlap=True)
    assert soup.report.overlap == Overlap(30, SHARED)
    assert "7 of 30 images of the split 'test' are in 'validation' too." in caplog.text


@pytest.mark.parametrize("method", ["radin", "greedy", "uniform", "best_single"])
def test_a_bank_that_shares_images_does_not_prove(gathered, tmp_path, method):
    source = splits_of("objects", tmp_path)
    banks = {
        split: hf_radin.compute_logits(gathered, rows, cache_dir=tmp_path / "cache") for split, rows in source.items()
    }
    search = getattr(hf_radin, method)
    with pytest.raises(ValueError, match="7 of the 30 images"):
        search(banks["validation"], test_split=banks["test"])
    soup = search(banks["validation"], test_split=banks["test"], allow_overlap=True)
    assert soup.report.overlap.images == SHARED


def test_splits_that_share_none_say_nothing(gathered, digits, cache, caplog):
    bank = hf_radin.compute_logits(gathered, digits, cache_dir=cache)
    soup = hf_radin.best_single(bank, test_split="test")
    assert soup.report.overlap == Overlap(497, 0)
    assert "images of the split" not in caplog.text and "in common" not in card_of(soup)


def test_the_card_says_it_beside_the_results(gathered, tmp_path):
    folder = splits_of("files", tmp_path / "data")
    bank = hf_radin.compute_logits(gathered, folder, cache_dir=tmp_path / "cache")
    soup = hf_radin.greedy(bank, test_split="test", allow_overlap=True)
    text = card_of(soup)
    assert "**7 of the 30 images of test are in validation too**, byte for byte, and so had a part in the" in text
    assert "test took no part in the choice, but for these 7 images." in text
    with pytest.raises(ValueError, match="7 of those of the split 'test' did"):
        card.eval_results(soup.report, "org/bench:default")


def test_a_bank_without_digests_can_not_tell_and_says_so(gathered, tmp_path, caplog):
    folder = splits_of("files", tmp_path / "data")
    bank = hf_radin.compute_logits(gathered, folder, cache_dir=tmp_path / "cache")
    manifest = bank.manifest
    arrays = {name: sha256 for name, sha256 in manifest.arrays.items() if name != "digests.npy"}
    replace(manifest, arrays=arrays).write(bank.folder)  # as of images that nobody can tell apart
    soup = hf_radin.best_single(LogitBank.open(bank.folder), test_split="test")
    assert soup.report.overlap.images is None
    assert "Whether the splits 'test' and 'validation' share images is not known" in caplog.text
    assert "have images in common can't be told" in card_of(soup)
    other = hf_radin.compute_logits(gathered, folder, split="test", cache_dir=tmp_path / "cache")
    unknown = replace(other, manifest=replace(other.manifest, arrays=arrays))
    assert hf_radin.best_single(bank, test_split=unknown).report.overlap.images is None


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_refuses_before_anything_is_computed(runs, tmp_path, processes):
    folder = splits_of("files", tmp_path / "data")
    options = ("--models", f"{runs}/ft-[01]", "--dataset", folder, "--test-split", "test", "--budget", "1")
    run = launch(tmp_path, processes, *options)
    assert run.returncode and run.stderr.count("hf-radin: 7 of the 30 images of the split 'test'") == 1
    assert not list((tmp_path / "cache").rglob("banks"))
    run = launch(tmp_path, processes, *options, "--allow-overlap")
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "soup" / "recipe.json").read_text())["overlap"]["images"] == SHARED


def test_hf_radin_search_asks_too(gathered, tmp_path, capsys):
    bank = hf_radin.compute_logits(gathered, splits_of("parquet", tmp_path / "data"), cache_dir=tmp_path / "cache")
    options = ["search", str(bank.folder), "--test-split", "test", "--budget", "0", "--output", str(tmp_path / "soup")]
    assert main(options) == 2 and "7 of the 30 images" in capsys.readouterr().err
    assert main([*options, "--allow-overlap"]) == 0


def test_images_are_read_once_until_they_change(gathered, tmp_path):
    folder = splits_of("files", tmp_path / "data")
    bank = hf_radin.compute_logits(gathered, folder, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="7 of the 30 images"):
        hf_radin.best_single(bank, test_split="test")
    (path,) = (tmp_path / "cache" / "digests").glob("*.npz")  # of the split that proves; the other's are in its bank
    write_arrays(path, {"digests": np.tile(read_arrays(path, path.stem)["digests"], 2)}, path.stem)
    with pytest.raises(ValueError, match="14 of the 60 images"):  # as is written there, and not in the images
        hf_radin.best_single(bank, test_split="test")
    shutil.rmtree(folder / "test")
    write_images(folder, "test", slice(40, 70))
    assert find_split(bank, "test").is_here
    soup = hf_radin.best_single(bank, test_split="test")
    assert soup.report.overlap.images == 0


def test_images_that_gave_batchnorm_its_statistics_are_told(nets, tmp_path, caplog):
    source = {"validation": rows_of(slice(0, 20)), "train": rows_of(slice(20, 60)), "test": rows_of(slice(50, 70))}
    bank = hf_radin.compute_logits(hf_radin.gather(f"{nets}/ft-*"), source, cache_dir=tmp_path / "cache")
    soup = hf_radin.uniform(bank, test_split="test")
    assert soup.report.overlap == Overlap(20, 0, batchnorm=10)
    assert "10 of 20 images of the split 'test' are among those that give BatchNorm its statistics." in caplog.text
    assert "10 of the 20 images of test gave BatchNorm its statistics too" in card_of(soup)


def test_copies_of_one_image_are_never_held_out_from_each_other(gathered, tmp_path, caplog):
    images, labels = digit_images(slice(0, 60))
    twice = image_dataset([*images, *images[:30]], [*labels, *labels[:30]])
    bank = hf_radin.compute_logits(gathered, twice, cache_dir=tmp_path)
    for seed in range(5):
        chooses, proves = bank.divided(0.3, seed)
        assert not np.isin(proves.digests, chooses.digests).any() and 0 < len(proves) < 27
        assert sorted([*chooses.places, *proves.places]) == list(range(90))
    assert "of 27 images have copies among the others: not held out." in caplog.text
    copies = hf_radin.compute_logits(gathered, image_dataset([images[0]] * 4, [0] * 4), cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"hold_out=0\.5: all of these 2 images have copies"):
        hf_radin.radin(copies, budget=1, hold_out=0.5)


def test_an_image_is_what_its_bytes_are(tmp_path):
    images, labels = digit_images(slice(0, 5))
    folder = tmp_path / "data"
    write_images(folder, "validation", slice(0, 5))
    files = open_split(DataSource(folder))
    rows = open_split(DataSource(rows_of(slice(0, 5))))
    other = open_split(DataSource(image_dataset(images, labels)))
    of_files, of_rows, again = (split_digests(split, tmp_path) for split in (files, rows, other))
    assert sorted(of_files) == sorted(of_rows) == sorted(again) and len({*of_files}) == 5
    shutil.rmtree(tmp_path / "digests")
    (folder / "validation" / NAMES[labels[0]] / "validation-0.png").unlink()
    assert sorted(split_digests(files, tmp_path)).count(b"") == 1  # a file that has gone is like none


def test_what_can_not_be_read_is_like_nothing_else():
    a, b = (np.array(digests, "S32") for digests in ([b"", b"1", b"2", b"2"], [b"", b"2", b"3"]))
    assert find_shared(a, b).tolist() == [False, False, True, True] and count_shared(a, b) == 2
    held_out, others = with_copies(np.array([0, 1, 2]), np.array([3]), a)
    assert held_out.tolist() == [0, 1] and others.tolist() == [3, 2]
