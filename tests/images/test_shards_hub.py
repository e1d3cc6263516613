"""A split on the Hub is downloaded once, whatever is made of it, and a connection that drops is taken up again."""

import numpy as np
import pytest
from PIL import Image
from shared.training import image_dataset

import hf_radin
from hf_radin.images import decode

PLACE = "data/validation"


@pytest.fixture
def shards(hub, runs, tmp_path):
    """Five models, and a split of 600 images of noise in two files of two blocks each; how many bytes these have."""
    for number in range(5):
        hub.add_repo(f"org/ft-{number}", {path.name: path.read_bytes() for path in (runs / f"ft-{number}").iterdir()})
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(600)]
    rows = image_dataset(images, [number % 10 for number in range(600)])
    parts = {}
    for shard in range(2):
        rows.shard(2, shard).to_parquet(tmp_path / "shard.parquet")
        parts[f"{PLACE}-{shard:05d}-of-00002.parquet"] = (tmp_path / "shard.parquet").read_bytes()
    hub.add_repo("org/noise", parts, "dataset")
    return sum(map(len, parts.values()))


@pytest.mark.parametrize("at_once", [1, 2, "auto"])
def test_one_pass_downloads_the_split_once(hub, shards, tmp_path, monkeypatch, at_once):
    decoded, open_image = [], decode.open_image
    monkeypatch.setattr(decode, "open_image", lambda *args: decoded.append(1) or open_image(*args))
    gathered = hf_radin.gather("org/ft-*")
    bank = hf_radin.compute_logits(gathered, "org/noise", cache_dir=tmp_path / "cache", models_in_memory=at_once)
    hf_radin.radin(bank, budget=8)
    checked = 1  # images that models are checked with before the pass
    assert len(decoded) == checked + len(bank) == 601 and [*bank.blocks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    served = sum(request.served for request in hub.logged("GET", PLACE))
    headers = 2 * 2 * 65536  # of each file the end, which says what is in it: on opening, and on reading
    assert shards <= served <= shards + headers + first_rows(shards)


def first_rows(shards: int) -> int:
    """What the images that models are checked with cost, at most: the first row group, here one of the two files."""
    return shards // 2 + 65536


def test_without_a_cache_it_is_downloaded_once_a_pass(hub, shards, tmp_path):
    gathered = hf_radin.gather("org/ft-*")
    hf_radin.compute_logits(gathered, "org/noise", cache_dir=tmp_path / "cache", models_in_memory=2, pixel_cache="off")
    served = sum(request.served for request in hub.logged("GET", PLACE))
    assert 3 * shards <= served <= 3 * (shards + 2 * 2 * 65536) + first_rows(shards)


def test_a_connection_that_drops_is_taken_up_again(hub, shards, tmp_path):
    gathered = hf_radin.gather("org/ft-[01]")
    whole = hf_radin.compute_logits(gathered, "org/noise", cache_dir=tmp_path / "whole")
    hub.break_off(PLACE, times=2, after=300_000)
    bank = hf_radin.compute_logits(gathered, "org/noise", cache_dir=tmp_path / "dropped")
    assert not hub._breaking
    assert all((bank.logits(index) == whole.logits(index)).all() for index in range(2))
    assert bank.ids.tolist() == list(range(600))


def test_a_hub_that_stays_away_is_named_and_what_is_finished_is_kept(hub, shards, tmp_path, monkeypatch):
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)  # its client waits longer each time
    gathered = hf_radin.gather("org/ft-[01]")
    hub.break_off("00001-of-00002", times=1000, after=300_000)
    with pytest.raises(OSError, match=r"org/noise.* broke off.*run the same again"):
        hf_radin.compute_logits(gathered, "org/noise", cache_dir=tmp_path / "cache")
    finished = list((tmp_path / "cache").glob("banks/*/logits/*.parts/*.npz"))
    assert len(finished) == 2 * 2  # all blocks of the first file, of both models
    hub._breaking.clear()
    assert len(hf_radin.compute_logits(gathered, "org/noise", cache_dir=tmp_path / "cache")) == 600
