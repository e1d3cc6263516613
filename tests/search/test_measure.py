"""What logits and soups took is kept beside them, and a search says all of it, whenever it is made."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from shared.training import NAMES, digit_images, image_dataset

import hf_radin
from hf_radin.logits import passes
from hf_radin.runtime.text import clock
from hf_radin.search import pilot as telling
from hf_radin.search.measure import Pace
from hf_radin.soup import card
from search.test_pilot import lenient, pilot, two_lead

__all__ = ["lenient", "pilot", "two_lead"]  # fixtures


def seconds(folder: Path) -> dict[str, float]:
    """What the logits of each ingredient took."""
    return {path.stem: json.loads(path.read_text())["seconds"] for path in folder.glob("logits/*.json")}


def test_what_was_kept_is_told_again(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    took = seconds(bank.folder)
    assert len(took) == 3 and all(value > 0 for value in took.values())
    first = hf_radin.radin(bank, budget=2, test_split="test").report.time
    assert first["logits"] == pytest.approx(sum(took.values())) and first["soups"] > 0
    assert re.fullmatch(r"CPU \(\w+, \d+ threads?\)", *first["devices"])
    again = hf_radin.radin(bank, budget=2)
    assert again.report.time == first
    assert sum(one.seconds for one in again.measurements if one.passes) == pytest.approx(first["soups"])
    hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01234]"), digits, cache_dir=tmp_path)
    assert took.items() <= seconds(bank.folder).items()
    more = hf_radin.radin(hf_radin.LogitBank.open(bank.folder), budget=2).report.time
    assert more["logits"] == pytest.approx(sum(seconds(bank.folder).values()))
    text = card.render(again.to_dict())
    assert re.search(
        r"\n\| logits of 3 checkpoints \| 3 \| [\d.]+ m?s \|\n\| measuring soups \| [\d.]+ \| [\d.]+ m?s \|\n", text
    )
    assert re.search(r"Time is that of CPU \(x86", text)


def resumed(runs, tmp_path, monkeypatch, **told) -> hf_radin.LogitBank:
    """Of a run that was killed when all parts were there; beside the logits one of each model says this."""
    split = image_dataset(*digit_images(slice(0, 96)))
    monkeypatch.setattr("hf_radin.logits.compute.block_size", lambda samples: 32)
    join = passes.join_parts
    monkeypatch.setattr(passes, "join_parts", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    found = hf_radin.gather(f"{runs}/ft-[01]")
    with pytest.raises(KeyboardInterrupt):
        hf_radin.compute_logits(found, split, cache_dir=tmp_path)
    monkeypatch.setattr(passes, "join_parts", join)
    for path in tmp_path.glob("banks/*/logits/*.parts/block-00000-000001.npz"):
        with np.load(path) as part:
            np.savez(path, logits=part["logits"], **told)
    return hf_radin.compute_logits(found, split, cache_dir=tmp_path)


def test_a_run_that_was_killed_counts_what_it_took_before(runs, tmp_path, monkeypatch):
    bank = resumed(runs, tmp_path, monkeypatch, seconds=1000.0)
    assert len(bank.classes) == len(NAMES)
    assert all(1000 < value < 1100 for value in seconds(bank.folder).values())


def test_after_a_pilot_all_its_logits_are_counted(pilot, lenient):
    found, told = telling.complete(pilot)
    assert told["seconds"] > sum(seconds(pilot.folder).values()) + sum(
        seconds(found.folder)[one.key] for one in found.ingredients.select(told["whole"][:2])
    )
    time = hf_radin.radin(pilot, budget=2).report.time
    assert time["logits"] == pytest.approx(told["seconds"], abs=1e-3) and len(time["devices"]) == 1


def test_a_soup_takes_as_long_as_it_was_shown_images(runs, digits, tmp_path):
    """Also where another search, or the proof on images that were held out, has shown it more."""
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[012]"), digits, cache_dir=tmp_path)
    hf_radin.radin(bank, budget=2, hold_out=0.3)
    for path in bank.folder.glob("soups/*.json"):
        path.write_text(json.dumps({"seconds": 500.0, "images": 1000, "device": "an abacus"}))
    soup = hf_radin.radin(bank, budget=2, hold_out=0.3)
    soups = [one for one in soup.measurements if one.passes]
    assert [one.seconds for one in soups] == [0.5 * one.images for one in soups] and len(soups) > 1
    assert soup.report.time.soups == sum(0.5 * one.images for one in soups)
    assert "an abacus" in soup.report.time.devices and len(soup.report.time.devices) == 2


def test_what_two_devices_took_names_both():
    pace = Pace().after(2.0, 100, "a GPU").after(1.0, 50, "CPU").after(3.0, 50, "a GPU")
    assert pace == Pace(6.0, 200, "CPU and a GPU")


def test_of_soups_that_nobody_timed_nothing_is_said(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), digits, cache_dir=tmp_path)
    hf_radin.uniform(bank)
    (path,) = (path for path in bank.folder.glob("soups/*.json"))
    for content in ("", "[]", '{"seconds": "x"}', None):
        path.unlink() if content is None else path.write_text(content)
        soup = hf_radin.uniform(bank)
        assert soup.report.time.soups is None
        text = card.render(soup.to_dict())
        assert "| measuring soups | 1 | |" in text and re.search(
            r"\| logits of 2 checkpoints \| 2 \| [\d.]+ m?s \|", text
        )


def test_parts_of_a_run_that_timed_nothing_are_used(runs, tmp_path, monkeypatch):
    bank = resumed(runs, tmp_path, monkeypatch)
    assert len(bank) == 96 and {*seconds(bank.folder).values()} == {None}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (0.96, "1.0 s"), (59.97, "1.0 min"), (3599, "1.0 h"), (90, "1.5 min"), (7, "7.0 s")],
)
def test_times_are_in_the_unit_that_suits_them(value, text):
    assert clock(value) == text


def test_of_logits_that_nobody_timed_nothing_is_said(runs, digits, tmp_path):
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-[01]"), digits, cache_dir=tmp_path)
    path = next(bank.folder.glob("logits/*.json"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in record if name not in ("seconds", "device")}))
    soup = hf_radin.best_single(bank)
    assert soup.report.time == {"logits": None, "soups": 0, "devices": soup.report.time.devices}
    assert "| logits of 2 checkpoints | 2 | |" in card.render(soup.to_dict())
    assert re.search(r"\| measuring soups \| 1 \| [\d.]+ m?s \|", card.render(hf_radin.uniform(bank).to_dict()))
    fields = soup.to_dict()
    del fields["time"]  # a recipe of an earlier version
    assert "| logits of 2 checkpoints | 2 | |" in card.render(fields) and "Time is" not in card.render(fields)
