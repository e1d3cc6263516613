"""Images of a stream that another split has too are met as they go by, and what was computed up to there is kept."""

import pytest
from shared.training import digit_images, image_dataset

import hf_radin
from hf_radin import LogitBank
from hf_radin.images import decode
from hf_radin.logits import compute

CHOSE, PROVES = slice(0, 60), slice(20, 100)  # two thirds of what chose come first in what proves


@pytest.fixture
def bank(hub, runs, tmp_path, monkeypatch):
    """Of two models on a split on the Hub, which shares images with its test split."""
    monkeypatch.setattr(compute, "block_size", lambda samples: 16)
    for name in ("ft-0", "ft-1"):
        hub.add_repo(f"org/{name}", {path.name: path.read_bytes() for path in (runs / name).iterdir()})
    parts = {}
    for split, part in {"validation": CHOSE, "test": PROVES}.items():
        image_dataset(*digit_images(part)).to_parquet(tmp_path / "part.parquet")
        parts[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "part.parquet").read_bytes()
    hub.add_repo("org/twice", parts, "dataset")
    return hf_radin.compute_logits(hf_radin.gather("org/ft-*"), "org/twice", cache_dir=tmp_path / "cache")


def test_it_is_refused_at_the_first_block_and_again(bank, tmp_path, monkeypatch):
    decoded, opened = [], decode.open_image
    monkeypatch.setattr(decode, "open_image", lambda *args: decoded.append(1) or opened(*args))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"16 of 16 images of the split 'test' that have just been read are in"):
            hf_radin.radin(bank, budget=1, test_split="test")
    tried = 1  # image that models are tried with before the pass
    assert len(decoded) == tried + 16  # the second time they are known
    soup = hf_radin.radin(bank, budget=1, test_split="test", allow_overlap=True)
    assert soup.report.overlap == {"of": 80, "images": 40, "batchnorm": None} and len(decoded) == tried + 80


def test_a_bank_that_was_pushed_knows_its_images(bank, hub, tmp_path):
    bank.push_to_hub("org/bank")
    fetched = LogitBank.from_hub("org/bank", cache_dir=tmp_path / "other")
    assert (fetched.digests == bank.digests).all()
    with pytest.raises(ValueError, match=r"16 of 16 images of the split 'test'"):
        hf_radin.best_single(fetched, test_split="test")


def test_one_of_an_earlier_version_does_not(bank, hub, tmp_path, caplog):
    (bank.folder / "digests.npy").unlink()
    bank.push_to_hub("org/old")
    fetched = LogitBank.from_hub("org/old", cache_dir=tmp_path / "other")
    soup = hf_radin.best_single(fetched, test_split="test")
    assert soup.report.overlap.images is None
    assert "Whether the splits 'test' and 'validation' share images can't be told" in caplog.text
