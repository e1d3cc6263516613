"""Checkpoints of one start are distinguished from those of another, and from such as were trained from scratch."""

import shutil
from pathlib import Path

import pytest
import torch
from shared.logs import warned
from shared.training import save, train
from transformers import ViTForImageClassification

import hf_radin


@pytest.fixture(scope="module")
def zoo(start, runs, tmp_path_factory) -> Path:
    """Three fine-tunes of one start, two of another, two from scratch."""
    folder = tmp_path_factory.mktemp("zoo")
    config = ViTForImageClassification.from_pretrained(start).config
    for number in range(3):
        shutil.copytree(runs / f"ft-{number}", folder / f"one-{number}")
    torch.manual_seed(1)
    other = ViTForImageClassification(config)
    train(other, learning_rate=3e-3, epochs=25, seed=9)
    save(other, folder / "start")
    for seed in range(2):
        model = ViTForImageClassification.from_pretrained(folder / "start")
        train(model, learning_rate=2e-3, epochs=4, seed=seed)
        save(model, folder / f"two-{seed}")
        torch.manual_seed(10 + seed)
        model = ViTForImageClassification(config)
        train(model, learning_rate=3e-3, epochs=25, seed=seed)
        save(model, folder / f"scratch-{seed}")
    return folder


def bank_of(names: list[str], zoo: Path, digits: Path, cache: Path, **options):
    return hf_radin.compute_logits(hf_radin.gather([zoo / name for name in names]), digits, cache_dir=cache, **options)


ONE = ["one-0", "one-1", "one-2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_fine_tunes_of_one_start_raise_no_alarm(zoo, digits, cache, caplog):
    assert len(bank_of(ONE, zoo, digits, cache).ingredients) == 3
    assert not warned(caplog)


@pytest.mark.parametrize("strangers", [["two-0", "two-1"], ["scratch-0"], ["scratch-0", "scratch-1", "two-0"]])
def test_strangers_are_named_with_figures_and_dropped_if_wanted(zoo, digits, cache, caplog, strangers, tmp_path):
    names = [*strangers, *ONE]  # it is not the order that counts
    assert len(bank_of(names, zoo, digits, cache).ingredients) == len(names)
    for name in strangers:
        assert f"{name} does not seem to share its start with 3 others: its weights lie" in caplog.text
    assert "--strangers drop" in caplog.text and "one-0 does not" not in caplog.text
    caplog.clear()
    assert len(bank_of(names, zoo, digits, cache, strangers="keep").ingredients) == len(names) and not warned(caplog)
    bank = bank_of(names, zoo, digits, cache, strangers="drop")
    assert [Path(name).name for name in bank.ingredients.ids] == ONE
    assert f"{zoo / strangers[0]} does not" in caplog.text and "It is left out of the soup." in caplog.text
    caplog.clear()
    soup = hf_radin.uniform(bank, test_split="test")
    assert len(soup.results) > 4 and not warned(caplog)  # once is enough
    assert hf_radin.LogitBank.open(bank.folder).ingredients.ids == bank.ingredients.ids  # of all that lies there
    for opened in (bank, hf_radin.LogitBank.open(bank.folder)):
        hf_radin.uniform(opened).save_pretrained(tmp_path / "soup", overwrite=True)
        card = (tmp_path / "soup" / "README.md").read_text()
        assert "Of the checkpoints that were given:" in card and card.count("It is left out") == len(strangers)
        assert str(zoo.parent) not in card


def test_where_nobody_is_kin_there_is_nothing_to_drop_to(zoo, digits, cache, caplog):
    names = ["scratch-0", "scratch-1", "two-0"]
    bank_of(names, zoo, digits, cache)
    assert (
        "No two of these 3 checkpoints seem to share a start: the cosines between their weights are at" in caplog.text
    )
    assert "1.00" not in caplog.text and "--strangers drop" not in caplog.text
    with pytest.raises(ValueError, match=r"No two of these .* two ingredients that share a start; 0 of 3 are left"):
        bank_of(names, zoo, digits, cache, strangers="drop")


def test_another_word_is_refused(zoo, digits, cache):
    with pytest.raises(ValueError, match="strangers='forget': it is 'warn', 'drop' or 'keep'"):
        bank_of(ONE, zoo, digits, cache, strangers="forget")
