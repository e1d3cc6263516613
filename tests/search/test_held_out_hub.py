"""Images of a stream that another split has too are met as they go by, and what was computed up to there is kept."""

from pathlib import Path

import pytest
from shared.training import digit_images, image_dataset

import hf_radin
from hf_radin import LogitBank
from hf_radin.soup.report import Overlap

CHOSE, PROVES = slice(0, 200), slice(100, 300)  # the first half of what proves chose: its first block of 64, and more
# With the number of images, of which the size of blocks depends.
CARD = b"""---
dataset_info:
  splits:
  - name: validation
    num_examples: 200
  - name: test
    num_examples: 200
---
"""


@pytest.fixture
def bank(hub, runs, tmp_path):
    """Of two models on a split on the Hub, which shares images with its test split."""
    for name in ("ft-0", "ft-1"):
        hub.add_repo(f"org/{name}", {path.name: path.read_bytes() for path in (runs / name).iterdir()})
    parts = {"README.md": CARD}
    for split, part in {"validation": CHOSE, "test": PROVES}.items():
        image_dataset(*digit_images(part)).to_parquet(tmp_path / "part.parquet")
        parts[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "part.parquet").read_bytes()
    hub.add_repo("org/twice", parts, "dataset")
    return hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/twice", cache_dir=tmp_path / "cache")


def prepared(cache: Path, *folders: Path) -> dict[Path, int]:
    """The files of prepared images in a cache, but for those in folders, and what changes if they are rewritten."""
    paths = (path for path in cache.glob("pixels/*/*") if path.parent not in folders)
    return {path: path.stat().st_ino for path in paths}


def test_it_is_refused_at_the_first_block_and_again(bank, tmp_path, predictions):
    cache, chosen = tmp_path / "cache", bank.images.folder
    predictions.clear()
    with pytest.raises(ValueError, match=r"64 of 64 images of the split 'test' that have just been read are in"):
        hf_radin.radin(bank, budget=1, test_split="test")
    first = prepared(cache, chosen)
    assert sum("block" in path.name for path in first) == 2  # a record and its pixels
    with pytest.raises(ValueError, match=r"64 of 64 images of the split 'test' that have just been read are in"):
        hf_radin.radin(bank, budget=1, test_split="test")
    assert prepared(cache, chosen) == first  # the second time they are known
    soup = hf_radin.radin(bank, budget=1, test_split="test", allow_overlap=True)
    assert soup.report.overlap == Overlap(200, 100)
    assert first.items() < prepared(cache, chosen).items()
    with pytest.raises(ValueError, match=r"100 of the 200 images of the split 'test' are in the split 'validation'"):
        hf_radin.radin(bank, budget=1, test_split="test")  # now all are known, and no image goes by


def test_a_bank_that_was_pushed_knows_its_images(bank, hub, tmp_path):
    bank.push_to_hub("org/bank")
    fetched = LogitBank.from_hub("org/bank", cache_dir=tmp_path / "other")
    assert (fetched.digests == bank.digests).all()
    with pytest.raises(ValueError, match=r"64 of 64 images of the split 'test'"):
        hf_radin.best_single(fetched, test_split="test")


def test_one_of_an_earlier_version_does_not(bank, hub, tmp_path, caplog):
    (bank.folder / "digests.npy").unlink()
    bank.push_to_hub("org/old")
    fetched = LogitBank.from_hub("org/old", cache_dir=tmp_path / "other")
    soup = hf_radin.best_single(fetched, test_split="test")
    assert soup.report.overlap.images is None
    assert "Whether the splits 'test' and 'validation' share images is not known" in caplog.text
