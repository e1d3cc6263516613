"""What logits and soups took is written beside them, and a search says all of it, whenever it is made."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shared.making import make_bank
from shared.models import watched
from shared.stopping import Stopping
from shared.zoo import LEADING, zoo, zoo_pilot

import hf_radin
from hf_radin.logits.bank_files import LogitsRecord
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.schema import read_arrays, write_arrays, write_sealed
from hf_radin.runtime.text import clock
from hf_radin.search.measure import UNKNOWN, Pace, measured_soup
from hf_radin.search.pilot import complete
from hf_radin.soup import card
from hf_radin.soup.report import SearchReport

__all__ = ["zoo", "zoo_pilot"]  # fixtures


def seconds(folder: Path) -> dict[str, float]:
    """What the logits of each ingredient took."""
    return {path.stem: json.loads(path.read_text())["seconds"] for path in folder.glob("logits/*.json")}


def test_what_was_timed_once_is_reported_again(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    took = seconds(bank.folder)
    assert len(took) == 3 and all(value > 0 for value in took.values())
    first = hf_radin.radin(bank, budget=2, test_split="test").report.time
    assert first.logits == pytest.approx(sum(took.values()), abs=1e-3) and first.soups > 0
    (device,) = first.devices
    assert re.fullmatch(r"CPU \(\w+, \d+ threads?\)", device)
    again = hf_radin.radin(bank, budget=2)
    assert again.report.time == first
    assert sum(soup.seconds for soup in again.measurements if soup.passes) == pytest.approx(first.soups, abs=1e-3)
    hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01234]"), digits, cache_dir=tmp_path)
    assert took.items() <= seconds(bank.folder).items()
    larger = hf_radin.radin(hf_radin.LogitBank.open(bank.folder), budget=2).report.time
    assert larger.logits > first.logits
    assert larger.logits == pytest.approx(sum(seconds(bank.folder).values()), abs=1e-3)
    text = card.render(again.report)
    assert re.search(
        r"\n\| logits of 3 checkpoints \| 3 \| [\d.]+ m?s \|\n\| measuring soups \| [\d.]+ \| [\d.]+ m?s \|\n", text
    )
    escaped = device.replace("_", r"\_")
    assert f"Time is that of {escaped}" in " ".join(text.split())


def resumed(runs, digits, tmp_path, **fields) -> hf_radin.LogitBank:
    """Of a run that was killed after a few blocks; beside the logits the first block of each model says this."""
    ingredients, options = hf_radin.gather(f"{runs}/ft-[01]"), {"cache_dir": tmp_path, "models_in_memory": 2}
    with pytest.raises(KeyboardInterrupt):
        hf_radin.compute_logits(ingredients, digits, accelerator=Stopping("log", 5), **options)
    paths = list(tmp_path.glob("banks/*/logits/*.parts/block-00000-000000.npz"))
    assert len(paths) == 2
    for path in paths:
        key = path.parent.name.removesuffix(".parts")
        subject = f"{path.parents[2].name} {key} {path.name}"
        write_arrays(path, read_arrays(path, subject) | fields, subject)
    return hf_radin.compute_logits(ingredients, digits, **options)


def test_a_run_that_was_killed_counts_what_it_took_before(runs, digits, tmp_path):
    bank = resumed(runs, digits, tmp_path, seconds=np.array(1000.0))
    took = seconds(bank.folder).values()
    assert len(took) == 2 and all(1000 < value < 1100 for value in took)


def test_after_a_pilot_all_its_logits_are_counted(zoo_pilot):
    bank, pilot = complete(zoo_pilot)
    leading = bank.ingredients.select(pilot.whole[:LEADING])
    known = sum(seconds(zoo_pilot.folder)[key] for key in zoo_pilot.ingredients.keys)
    known += sum(seconds(bank.folder)[key] for key in leading.keys)
    assert pilot.seconds > known
    time = hf_radin.radin(zoo_pilot, budget=2).report.time
    assert time.logits == pytest.approx(pilot.seconds, abs=1e-3) and len(time.devices) == 1


def test_a_few_images_of_each_block_are_shown_in_full_batches(runs, digits, tmp_path):
    """What a soup predicts of an image does not depend on those that are shown with it."""
    few, whole = (
        make_bank(f"{runs}/ft-[01]", digits, tmp_path / name, batch_size=8, block_size=16) for name in ("few", "whole")
    )
    recipe = Recipe.uniform(few.ingredients.ids)
    images, sizes = np.arange(len(few)) % 4 == 0, []
    with watched(sizes.append):
        shown = measured_soup(few, recipe).look(images)
    assert len(few.blocks) > 4 and sum(sizes) == images.sum()
    assert len(sizes) == -(-images.sum() // 8)
    assert (shown[~images] == UNKNOWN).all()
    assert np.array_equal(shown[images], measured_soup(whole, recipe).look(np.ones(len(whole), dtype=bool))[images])


def test_a_soup_takes_as_long_as_it_was_shown_images(runs, digits, tmp_path):
    """Also where another search, or the proof on images that were held out, has shown it more."""
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    hf_radin.radin(bank, budget=2, hold_out=0.3)
    paces = list(bank.folder.glob("soups/*.json"))
    assert len(paces) > 1
    for path in paces:
        write_sealed(path, Pace(500.0, 1000, "an abacus"), f"{bank.manifest.key} {path.name}")
    soup = hf_radin.radin(bank, budget=2, hold_out=0.3)
    soups = [entry for entry in soup.measurements if entry.passes]
    assert [entry.seconds for entry in soups] == [0.5 * entry.images for entry in soups] and len(soups) > 1
    assert soup.report.time.soups == sum(0.5 * entry.images for entry in soups)
    assert "an abacus" in soup.report.time.devices and len(soup.report.time.devices) == 2


def test_what_two_devices_took_names_both():
    pace = Pace().after(2.0, 100, "a GPU").after(1.0, 50, "CPU").after(3.0, 50, "a GPU")
    assert pace == Pace(6.0, 200, "CPU and a GPU")


def test_of_soups_that_nobody_timed_nothing_is_said(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), digits, cache_dir=tmp_path)
    hf_radin.uniform(bank)
    (path,) = bank.folder.glob("soups/*.json")
    for content in ("", "[]", '{"seconds": "x"}', None):
        path.write_text(content) if content is not None else path.unlink(missing_ok=True)
        soup = hf_radin.uniform(bank)
        assert soup.report.time.soups is None
        text = card.render(soup.report)
        assert "| measuring soups | 1 | |" in text and re.search(
            r"\| logits of 2 checkpoints \| 2 \| [\d.]+ m?s \|", text
        )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (0.96, "1.0 s"), (59.97, "1.0 min"), (3599, "1.0 h"), (90, "1.5 min"), (7, "7.0 s")],
)
def test_times_are_in_the_unit_that_suits_them(value, text):
    assert clock(value) == text


def test_of_logits_that_nobody_timed_nothing_is_said(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), digits, cache_dir=tmp_path)
    key = bank.ingredients.keys[0]
    record = LogitsRecord.read(bank.folder, bank.manifest.key, key)
    replace(record, seconds=None, device=None).write(bank.folder, bank.manifest.key, key)
    soup = hf_radin.best_single(bank)
    assert soup.report.time.logits is None and soup.report.time.soups == 0
    assert "| logits of 2 checkpoints | 2 | |" in card.render(soup.report)
    assert re.search(r"\| measuring soups \| 1 \| [\d.]+ m?s \|", card.render(hf_radin.uniform(bank).report))
    fields = soup.to_dict()
    del fields["time"]  # a recipe of an earlier version
    text = card.render(SearchReport.from_fields(fields))
    assert "| logits of 2 checkpoints | 2 | |" in text and "Time is" not in text
