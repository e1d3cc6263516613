"""The cards in model_cards/ are what the code makes: the first is made anew and compared."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_radin.soup import pictures

CARDS = Path(__file__).parents[2] / "model_cards"
NAMES = ("digits", "fashion-mnist-resnets", "fashion-mnist-vits")

# Lines of a table: how many there are depends on how many soups were worth measuring.
ROW = re.compile(r"^\|")
# What another processor or another day may round or spend otherwise; whether a difference may be chance hangs on it.
CHANCE = re.compile(r", which may be chance( \(p = [^()]* test\))?")
VERDICT = re.compile(r"is [a-z ]+ the best single model( beyond chance)?, by the accuracy")
# Whether its head is refitted does, too.
HEAD = re.compile(r"Its head was refitted [^\n]*\n\n|, or of that which its head was refitted to")
NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e-\d+)?( m?s\b)?")


def frame(text: str) -> list[str]:
    """The card without its numbers, without what varies with releases, and of each table the head alone."""
    lines, framing = HEAD.sub("", text).splitlines(), []
    for before, line in zip(["", *lines], lines, strict=False):
        if not (ROW.match(line) and ROW.match(before)) and "backend); hf_radin" not in line:
            line = (
                NUMBER.sub("#", VERDICT.sub("is #", CHANCE.sub("", line)))
                .replace("better than", "as good as")
                .replace("worse than", "as good as")
            )
            framing.append(line)
    return framing


def accuracies(text: str) -> dict[str, float]:
    """Of each row of the table of results the accuracy, by its name and split."""
    rows = re.findall(r"^\| ([\w ()]+) \| (\w+) \| [\d,]+ \| \u2248?(\d+\.\d+)% \|", text, re.MULTILINE)
    return {f"{name}, {split}": float(value) for name, split, value in rows}


def test_the_first_card_is_made_anew(tmp_path):
    """By the script that made it; on another processor, training ends a little elsewhere."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import make; "
        "make.make('digits', Path('zoos').resolve(), Path('out'))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(CARDS)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    published, made = ((folder / "README.md").read_text() for folder in (CARDS / "digits", tmp_path / "out"))
    assert frame(made) == frame(published)
    assert len(accuracies(published)) == 8
    assert accuracies(made) == pytest.approx(accuracies(published), abs=1.5)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (CARDS / "digits").iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_cards_name_no_place_of_the_machine_that_made_them(name):
    text = (CARDS / name / "README.md").read_text()
    assert not re.search(r"/(tmp|home|root|work)/", text)
    shown = re.findall(r"\]\((\w+\.png)\)", text)
    assert sorted(shown) == sorted(pictures.NAMES)
    for picture in shown:
        assert (CARDS / name / picture).read_bytes().startswith(b"\x89PNG")
