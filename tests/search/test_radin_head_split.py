"""A head that another split teaches than the one that chooses."""

import re

import datasets
import numpy as np
import pytest
import torch
from shared.banks import plain_inputs
from shared.heads import own_heads, own_heads_bank
from shared.logs import warned
from transformers import AutoModelForImageClassification

import hf_radin
from hf_radin.cli.main import main
from hf_radin.search.held_out import bank_of_split
from hf_radin.soup.report import SearchReport

__all__ = ["own_heads", "own_heads_bank"]  # fixtures


@pytest.fixture(scope="module")
def choosing(own_heads, digits, tmp_path_factory) -> hf_radin.LogitBank:
    """Few images choose, so that others have more to teach."""
    folder = tmp_path_factory.mktemp("few")
    for path in (digits / "data").glob("*.parquet"):
        rows = datasets.Dataset.from_parquet(str(path))
        rows = rows.select(range(60)) if path.name.startswith("validation") else rows
        rows.to_parquet(folder / "digits" / "data" / path.name)
    ingredients = hf_radin.gather(f"{own_heads}/ft-*")
    return hf_radin.compute_logits(ingredients, folder / "digits", cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def soup(choosing) -> hf_radin.Soup:
    return hf_radin.radin(choosing, budget=2, head_split="train", test_split="test")


def accuracy(folder, bank: hf_radin.LogitBank) -> float:
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        predicted = [model(**inputs).logits.argmax(1).numpy() for inputs in plain_inputs(bank)]
    return float((np.concatenate(predicted) == bank.labels).mean())


def test_the_images_that_choose_had_no_part_in_the_head_and_judge_the_saved_model(soup, choosing, tmp_path):
    soup.save_pretrained(tmp_path / "soup")
    report = SearchReport.read(tmp_path / "soup" / "recipe.json", is_saved=True)
    teaching = bank_of_split(choosing, "train")
    assert (report.head.split, report.head.images) == ("train", len(teaching))
    for split, bank in (("validation", choosing), ("test", bank_of_split(choosing, "test"))):
        assert soup.accuracy("soup", split) == accuracy(tmp_path / "soup", bank)
    assert soup.accuracy("soup", "validation") > soup.accuracy("best single", "validation")
    over = len(teaching) / len(choosing)
    assert report.passes.head == pytest.approx(over * (1 + len(report.head.teacher.used)) + 1)
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "of the split train and with" in re.sub(r"\s+", " ", card)


def test_where_it_teaches_worse_the_images_that_choose_do(own_heads_bank, caplog):
    soup = hf_radin.radin(own_heads_bank, budget=2, head_split="train")
    assert soup.report.head.split == "validation"
    over = len(bank_of_split(own_heads_bank, "train")) / len(own_heads_bank)
    assert soup.report.passes.head == pytest.approx(1 + over * 5)  # what was tried is counted
    assert any("The head that the split 'train' teaches" in line for line in warned(caplog))


def test_it_is_cooked_again(soup, choosing, tmp_path):
    soup.save_pretrained(tmp_path / "soup")
    cook = ["average", "--recipe", str(tmp_path / "soup"), "--output", str(tmp_path / "again")]
    assert main([*cook, "--cache-dir", str(choosing.folder.parent.parent)]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("soup", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_split": "validation"}, "'validation' chooses the soup, and teaches its head"),
        ({"head_split": "test", "test_split": "test"}, "'test' proves the soup; another one has to teach its head"),
        ({"head_split": "nowhere"}, "nowhere"),
        ({"head_split": "train", "head": "average"}, "head_split='train': averaged heads"),
    ],
)
def test_a_split_that_can_not_teach_is_refused_before_a_pass(own_heads_bank, predictions, options, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.radin(own_heads_bank, **options)
    assert not predictions


def test_where_heads_are_averaged_it_is_said_that_the_split_teaches_nothing(bank, caplog):
    assert hf_radin.radin(bank, budget=1, measure="full", head_split="train").report.head is None
    assert "The split 'train' teaches nothing: heads are averaged." in warned(caplog)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head-split", "validation"], "--head-split validation: this split chooses the soup"),
        (["--head-split", "test", "--test-split", "test"], "--head-split test: this split proves the soup"),
        (["--head-split", "train", "--head", "average"], "--head-split train: averaged heads"),
        (["--head-split", "train", "--method", "greedy"], "--head-split train: greedy has no candidates"),
    ],
)
def test_the_command_line_refuses_it_before_logits(own_heads, digits, tmp_path, capsys, predictions, options, message):
    command = ["soup", "--models", f"{own_heads}/ft-*", "--dataset", str(digits), "--split", "validation"]
    assert main([*command, "--output", str(tmp_path / "soup"), "--cache-dir", str(tmp_path), *options]) != 0
    assert message in capsys.readouterr().err and not predictions
