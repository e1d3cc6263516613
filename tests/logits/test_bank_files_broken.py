"""Whatever happens to a file of the cache is noticed before it is believed: it is named, and only it is made anew."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from shared.making import make_bank
from shared.models import interrupted
from shared.timeless import without_times
from shared.training import digit_images, image_dataset

import hf_radin
from hf_radin.cli.main import main

IMAGES, BLOCK = {"validation": 120, "test": 80}, 40

PAGE = 4096


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        pattern: of its files in the cache.
        predictions: that are made at most if one of them is broken.
        decoded: images that are decoded at most.
        is_named: whether it is read; a file that is only written anew is not.
    """

    pattern: str
    predictions: int = 0
    decoded: int = 0
    is_named: bool = True


# Measuring soups again takes up to four of them: three go by images that choose, and one by those that prove, too.
SOUPS = 4 * sum(IMAGES.values())

# Logits of one model on the larger of the splits, and a batch that shows how many models fit into memory.
LOGITS = IMAGES["validation"] + 8

KINDS = [
    Kind("banks/*/bank.json"),
    Kind("banks/*/latest.json", is_named=False),
    Kind("banks/*/batch_size.json"),
    Kind("banks/*/ids.npy"),
    Kind("banks/*/labels.npy"),
    Kind("banks/*/digests.npy"),
    Kind("banks/*/logits/*.npy", LOGITS),
    Kind("banks/*/logits/*.json", LOGITS),
    Kind("banks/*/pruned/*.npz"),
    Kind("banks/*/soups/*.npz", SOUPS),
    Kind("banks/*/soups/*-logits.npy", IMAGES["validation"]),
    Kind("banks/*/soups/*.json", IMAGES["validation"]),
    Kind("weights/*.npz"),
    Kind("digests/*.npz"),
    Kind("pixels/*/block-*.safetensors", SOUPS, BLOCK),
    Kind("pixels/*/block-*.json", SOUPS, BLOCK),
    Kind("pixels/*/shard-*.json", SOUPS),
]


def flip(paths: list[Path], place: float) -> None:
    content = bytearray(paths[0].read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    paths[0].write_bytes(content)


def zero(paths: list[Path]) -> None:
    content = paths[0].read_bytes()
    page = min(PAGE, len(content) // 2)
    start = (len(content) - page) // 2
    paths[0].write_bytes(content[:start] + bytes(page) + content[start + page :])


def swap(paths: list[Path], other: int) -> None:
    pair = paths[0], paths[other % len(paths)]
    first, second = (path.read_bytes() for path in pair)
    pair[0].write_bytes(second)
    pair[1].write_bytes(first)


def put(paths: list[Path], make: Callable[[Path], object]) -> None:
    paths[0].unlink()
    make(paths[0])


CORRUPTIONS: dict[str, Callable[[list[Path]], object]] = {
    "a bit at the start": lambda paths: flip(paths, 0),
    "a bit in the middle": lambda paths: flip(paths, 0.5),
    "a bit near the end": lambda paths: flip(paths, 0.97),
    "a page of zeros": zero,
    "cut": lambda paths: paths[0].write_bytes(paths[0].read_bytes()[:-7]),
    "longer": lambda paths: paths[0].write_bytes(paths[0].read_bytes() + b"0"),
    "empty": lambda paths: paths[0].write_bytes(b""),
    "swapped with the next": lambda paths: swap(paths, 1),
    "swapped with the last": lambda paths: swap(paths, -1),
    "a folder": lambda paths: put(paths, lambda path: (path / "inner").mkdir(parents=True)),
    "a pipe": lambda paths: put(paths, os.mkfifo),
    "an endless device": lambda paths: put(paths, lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": lambda paths: put(paths, lambda path: path.symlink_to("/nowhere")),
    "gone": lambda paths: put(paths, lambda path: None),
}
GONE = {"gone", "a link to nothing"}


@pytest.fixture(autouse=True)
def ample(free_bytes) -> None:
    """Pixels are cached however full the disk is on which these tests run."""
    free_bytes(10**12)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    start = 700
    for split, count in IMAGES.items():
        part = slice(start, start + count)
        image_dataset(*digit_images(part)).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        start += count
    return folder


@pytest.fixture(scope="module")
def whole(runs, data, tmp_path_factory) -> tuple[Path, list]:
    """The cache of a run, and what came of it."""
    cache = tmp_path_factory.mktemp("whole")
    return cache, outcome(runs, data, cache)


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(whole[0], tmp_path / "cache"))


def compute(runs: Path, data: Path, cache: Path, **options) -> hf_radin.LogitBank:
    return make_bank(f"{runs}/ft-[01]", data, cache, block_size=BLOCK, **options)


def outcome(runs: Path, data: Path, cache: Path) -> list:
    """All that a search says, and what it rests on."""
    bank = compute(runs, data, cache)
    soup = hf_radin.radin(bank, budget=2, test_split="test", metrics=("accuracy", "log_loss"))
    arrays = [bank.labels, bank.ids, bank.digests, *(bank.logits(index) for index in range(2))]
    return [[array.tolist() for array in arrays], soup.recipe, soup.measurements, soup.results]


def files(cache: Path, pattern: str) -> list[Path]:
    return sorted(path for path in cache.glob(pattern) if not path.name.startswith("."))


def meaning(path: Path) -> object:
    """What whoever reads a file gets to know: bytes of a zip that say nothing are left out."""
    if not path.is_file():
        return None
    try:
        if path.suffix != ".npz":
            return path.read_bytes()
        with np.load(path) as archive:
            return {name: (archive[name].dtype, archive[name].tobytes()) for name in archive.files}
    except Exception:  # a broken file may fail in any way
        return None


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.pattern)
def test_what_is_broken_is_named_and_only_that_is_made_anew(
    runs, data, whole, cache, caplog, predictions, decoded, kind, corruption
):
    paths = files(cache, kind.pattern)
    before, timeless = {path: meaning(path) for path in paths}, [without_times(path) for path in paths]
    CORRUPTIONS[corruption](paths)
    broken = [path for path in paths if meaning(path) != before[path]]
    if kind.pattern.startswith("pixels"):  # which only those who measure a soup ask for
        for folder in cache.glob("banks/*/soups"):
            shutil.rmtree(folder)
    predictions.clear()
    assert outcome(runs, data, cache) == whole[1]
    named = {path for path in paths if any(f"{path} can't be read: " in line for line in caplog.messages)}
    if corruption in GONE:  # of some files nobody knows that they were there
        assert named <= {*broken}, caplog.text
    else:
        assert named == {*(broken if kind.is_named else ())}, caplog.text
    assert sum("can't be read" in line for line in caplog.messages) == len(named)
    assert sum(predictions) <= kind.predictions * max(1, len(broken))
    assert len(decoded) <= kind.decoded * len(broken)
    if broken:
        made = [(path, before) for path, before in zip(paths, timeless, strict=True) if path.exists()]
        assert [without_times(path) for path, _ in made] == [before for _, before in made]
        assert made or kind.pattern.startswith("banks/*/soups")  # a search may do without a soup that it met before
    caplog.clear()
    assert outcome(runs, data, cache) == whole[1] and "can't be read" not in caplog.text


FOLDERS = ["pixels/*", "{bank}", *(f"{{cache}}/{name}" for name in ("banks", "pixels", "weights", "digests", "modes"))]
FOLDERS += [f"{{bank}}/{name}" for name in ("logits", "soups", "features", "fronts", "pruned")]


@pytest.mark.parametrize("pattern", FOLDERS)
def test_a_file_in_the_place_of_a_folder_is_named_before_anything_is_computed(
    runs, data, cache, predictions, decoded, pattern
):
    folder = min(cache.glob("banks/*/bank.json")).parent
    place = min(cache.glob("pixels/*")) if pattern == "pixels/*" else Path(pattern.format(cache=cache, bank=folder))
    if place.is_dir():
        shutil.rmtree(place)
    place.write_text("mine")
    predictions.clear()
    with pytest.raises(ValueError, match=f"^{place} is a file where a folder goes. Remove it, or move it away"):
        outcome(runs, data, cache)
    assert not predictions and not decoded and place.read_text() == "mine"
    if pattern.startswith("{bank}/"):
        with pytest.raises(ValueError, match=f"{place} is a file where a folder goes"):
            hf_radin.LogitBank.open(place.parent)


OF_A_BANK = ["bank.json", "latest.json", "ids.npy", "labels.npy", "digests.npy", "logits/*.npy", "logits/*.json"]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("pattern", OF_A_BANK)
def test_who_only_reads_a_bank_hears_which_file_is_broken_and_what_to_do(
    whole, cache, capsys, tmp_path, pattern, corruption
):
    paths = files(cache, f"banks/*/{pattern}")
    before = {path: meaning(path) for path in paths}
    CORRUPTIONS[corruption](paths)
    broken = [path.name for path in paths if meaning(path) != before[path]]
    folder = cache / paths[0].relative_to(cache).parents[-3]
    options = [str(folder), "--budget", "0", "--output", str(tmp_path / "soup")]
    status = main(["search", *options])
    error = capsys.readouterr().err
    if not broken:
        assert status == 0
        return
    with pytest.raises(ValueError, match=r"ompute the logits again|was never finished") as raised:
        hf_radin.LogitBank.open(folder)
    if pattern in ("bank.json", "latest.json"):  # each says whose the other is
        broken += ["bank.json", "latest.json", "was never finished", "no computation of it was finished"]
    assert any(name in str(raised.value) for name in broken)
    assert status == 2 and str(raised.value) in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_part_that_is_broken_is_computed_anew_and_no_other(
    runs, data, whole, tmp_path, caplog, predictions, corruption
):
    with pytest.raises(KeyboardInterrupt), interrupted(calls=5):
        compute(runs, data, tmp_path / "cache", models_in_memory=2, write_every=0)
    earlier = sum(predictions)
    paths = files(tmp_path / "cache", "banks/*/logits/*.parts/*.npz")
    before = {path: meaning(path) for path in paths}
    assert len(paths) == 5
    CORRUPTIONS[corruption](paths)
    broken = [path for path in paths if meaning(path) != before[path]]
    predictions.clear()
    bank = compute(runs, data, tmp_path / "cache")
    assert [bank.logits(index).tolist() for index in range(2)] == whole[1][0][-2:]
    blocks = [size for size in predictions if size % BLOCK == 0]  # others try how the model runs
    assert sum(blocks) == 2 * IMAGES["validation"] - earlier + BLOCK * len(broken)
    assert ("of its logits were broken and are computed again" in caplog.text) == (
        bool(broken) and corruption not in GONE
    )
