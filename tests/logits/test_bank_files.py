"""What of a cache is broken is made anew, or named; it never passes for whole, and no stale image for a new one."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from shared.making import make_bank
from shared.models import interrupted
from shared.training import NAMES, digit_images, image_dataset

import hf_radin
from hf_radin.logits.bank_files import Target, join_parts, write_part


@pytest.fixture
def cache(runs, digits, tmp_path) -> Path:
    """The cache of a finished run."""
    hf_radin.uniform(compute(runs, digits, tmp_path / "cache"))
    return tmp_path / "cache"


def compute(runs: Path, data: object, cache: Path, **options) -> hf_radin.LogitBank:
    """The bank of two checkpoints, in blocks of 100 images."""
    return make_bank(f"{runs}/ft-[01]", data, cache, block_size=100, **options)


def outcome(bank: hf_radin.LogitBank) -> list:
    soup = hf_radin.uniform(bank)
    return [*(bank.logits(index).tolist() for index in range(2)), bank.labels.tolist(), soup.measurements]


def first_file(cache: Path, pattern: str) -> Path:
    return min(path for path in cache.glob(pattern) if not path.name.startswith("."))


FILES = ["banks/*/bank.json", "banks/*/latest.json", "banks/*/batch_size.json", "banks/*/ids.npy"]
FILES += ["banks/*/labels.npy", "banks/*/logits/*.npy", "banks/*/logits/*.json", "banks/*/soups/*.npz"]
FILES += ["banks/*/soups/*.json"]
FILES += ["banks/*/pruned/*.npz"]
FILES += ["pixels/*/block-*.json", "pixels/*/shard-*.json", "weights/*.npz"]


@pytest.mark.parametrize("pattern", FILES)
def test_a_broken_file_is_made_anew(runs, digits, cache, pattern):
    expected = outcome(compute(runs, digits, cache))
    path = first_file(cache, pattern)
    content = path.read_bytes()
    for broken in (None, content[: len(content) // 2], b"{}"):
        path.unlink(missing_ok=True)
        if pattern.startswith("pixels"):
            shutil.rmtree(first_file(cache, "banks/*/bank.json").parent)  # else nobody asks for pixels
        if broken is not None:
            path.write_bytes(broken)
        assert outcome(compute(runs, digits, cache)) == expected
        hf_radin.LogitBank.open(first_file(cache, "banks/*/bank.json").parent)


def test_a_broken_block_of_pixels_is_named_and_made_anew(runs, digits, cache, caplog, decoded):
    path = first_file(cache, "pixels/*/block-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    shutil.rmtree(cache / "banks")
    decoded.clear()
    assert len(compute(runs, digits, cache)) == 600
    assert len(decoded) == 100 and path.read_bytes() == whole  # no other block is decoded
    assert caplog.text.count(f"{path} can't be read") == 1


@pytest.mark.parametrize("broken", [lambda part: part[:200], lambda part: part[:300] + bytes(80) + part[380:]])
def test_broken_parts_are_named_removed_and_made_anew(broken, runs, digits, tmp_path, caplog):
    # each block is two batches of each model: of the last block the second model is shown one
    with pytest.raises(KeyboardInterrupt), interrupted(calls=23):
        compute(runs, digits, tmp_path, models_in_memory=2, write_every=0)
    paths = sorted(tmp_path.glob("banks/*/logits/*.parts/*.npz"))
    assert len(paths) == 2 * 6 - 1
    for path in paths[:3]:
        path.write_bytes(broken(path.read_bytes()))
    assert len(compute(runs, digits, tmp_path)) == 600  # in the same run, however many there are
    assert ": 3 blocks of its logits were broken and are computed again" in caplog.text


def test_what_a_killed_writer_left_harms_nobody(runs, digits, cache):
    folder = first_file(cache, "banks/*/bank.json").parent
    (folder / "logits" / ".0123456789ab.x.json").touch()
    bank = compute(runs, digits, cache)
    assert len(hf_radin.LogitBank.open(bank.folder).ingredients) == 2


def shades(folder: Path, shade: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    for number in range(40):
        pixels = np.full((8, 8), shade + number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(40)]


def test_images_that_are_named_amid_others_are_looked_at_again(runs, tmp_path):
    def rows() -> datasets.Dataset:
        named = [{"path": path, "bytes": None} for path in shades(tmp_path / "images", 0)[1:]]
        return image_dataset([None, *named], [0] * 40)

    first = compute(runs, rows(), tmp_path / "cache", on_error="skip")
    data = rows()
    shades(tmp_path / "images", 100)
    second = compute(runs, data, tmp_path / "cache", on_error="skip")
    assert first.folder != second.folder and (first.logits(0) != second.logits(0)).any()


def test_images_that_a_folder_names_elsewhere_are_looked_at_again(runs, tmp_path):
    named = [{"path": path, "bytes": None} for path in shades(tmp_path / "images", 0)]
    rows = datasets.Dataset.from_dict({"image": named, "label": [0] * 40}).cast_column("image", datasets.Image())
    rows = rows.cast_column("label", datasets.ClassLabel(names=NAMES))
    (tmp_path / "data").mkdir()
    rows.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "data" / "validation.parquet")
    first = compute(runs, tmp_path / "data", tmp_path / "cache")
    shades(tmp_path / "images", 100)
    second = compute(runs, tmp_path / "data", tmp_path / "cache")
    assert first.folder != second.folder and (first.logits(0) != second.logits(0)).any()


def test_a_stream_that_mixes_images_of_one_class_between_passes_is_refused(runs, tmp_path):
    images, labels = digit_images(slice(700, 900))
    order = np.argsort(labels, kind="stable")
    random = np.random.default_rng(0)

    def rows():
        mixed = sorted(order, key=lambda row: (labels[row], random.random()))
        for row in mixed:
            yield {"image": images[row], "label": labels[row]}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    with pytest.raises(ValueError, match=r"in different orders\. Shuffle it with a seed, or not at all"):
        compute(runs, stream, tmp_path, models_in_memory=1, pixel_cache="off")


def test_the_mode_that_a_dataset_wants_stays(runs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    banks = []
    for mode in ("L", None):
        features = {"image": datasets.Image(mode=mode), "label": datasets.ClassLabel(names=NAMES)}
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": [0] * 40}
        rows = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        banks.append((compute(runs, rows, tmp_path / str(mode)), rows))
    grey, colour = banks
    assert grey[1][0]["image"].mode == "L"
    again = [{"image": row["image"].convert("RGB"), "label": 0} for row in grey[1]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    plain = compute(runs, datasets.Dataset.from_list(again, features=features), tmp_path / "plain")
    assert (grey[0].logits(0) == plain.logits(0)).all() and (colour[0].logits(0) != plain.logits(0)).any()


def test_batchnorm_has_its_images_on_a_disk_that_is_nearly_full(nets, digits, tmp_path, free_bytes):
    free_bytes(900_000_000)
    ingredients = hf_radin.gather(f"{nets}/ft-[01]")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path, batchnorm_images=128)
    assert not list(bank.images.folder.glob("*.safetensors"))  # nothing else was cached
    assert hf_radin.uniform(bank).accuracy("uniform", "validation") > 0


def test_a_folder_may_be_called_dataset(runs, digits, tmp_path, monkeypatch):
    shutil.copytree(digits, tmp_path / "Dataset")
    monkeypatch.chdir(tmp_path)
    bank = compute(runs, "Dataset", tmp_path / "cache")
    assert hf_radin.uniform(bank, test_split="test").accuracy("soup", "test") > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": ""}, "The name of the dataset is empty"),
        ({"dataset": "x" * 5000}, "nor a Hub id|no folder"),
        ({"revision": "main"}, "is a folder here, which has no revision 'main'"),
        ({"accelerator": "x"}, "accelerator='x'"),
        ({"pixel_cache": "infGB"}, "pixel_cache='infGB'"),
        ({"pixel_cache": None}, "pixel_cache=None"),
    ],
)
def test_what_makes_no_sense_is_one_line(runs, digits, tmp_path, options, message):
    ingredients = hf_radin.gather(f"{runs}/ft-[01]")
    with pytest.raises(ValueError, match=message):
        hf_radin.compute_logits(ingredients, options.pop("dataset", digits), cache_dir=tmp_path, **options)
    assert len(compute(runs, digits, tmp_path)) == 600  # nothing of it stays


def test_a_recipe_that_is_saved_alone_says_what_the_soup_says(runs, digits, cache, tmp_path):
    hf_radin.uniform(compute(runs, digits, cache)).save_pretrained(tmp_path / "soup")
    hf_radin.Soup.from_pretrained(tmp_path / "soup").save_recipe(tmp_path / "recipe.json")
    first, second = (json.loads((folder / "recipe.json").read_text()) for folder in (tmp_path / "soup", tmp_path))
    assert first == second | {"files": first["files"]} and first["recipe"] and not second["files"]


def test_parts_that_a_killed_run_left_beside_whole_logits_go(runs, digits, tmp_path):
    compute(runs, digits, tmp_path)
    parts = first_file(tmp_path, "banks/*/logits/*.npy").with_suffix(".parts")
    parts.mkdir()
    (parts / "block-00000-000000.npz").write_bytes(b"of a run that was killed")
    compute(runs, digits, tmp_path)
    assert not parts.exists()


def test_parts_of_other_images_are_not_joined(tmp_path):
    target = Target("ft-0", tmp_path / "ft-0.npy", 10, "a bank")
    target.parts.mkdir()
    for number in range(2):
        write_part(target, (0, number), np.zeros((4, 10), np.float32), 0.1)
    blocks = [(0, 0), (0, 1)]
    with pytest.raises(ValueError, match=rf"^ft-0: 8 rows of logits for 9 images; remove {target.parts}\.$"):
        join_parts(target, blocks, 9, "float32")
    assert not target.path.exists() and join_parts(target, blocks, 8, "float32").is_finite
