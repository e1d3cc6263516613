"""What tests of a push share: a soup as it was saved, and what a repository holds."""

import re
import time
from pathlib import Path

import pytest

import hf_radin

OLD = {
    "README.md": b"# A soup of last week",
    "recipe.json": b"{}",
    "model.safetensors": b"old weights",
    "notes.txt": b"mine",
}

# What a card says to load until it is pushed.
UNNAMED = "path/or/id/of/this/model"


@pytest.fixture
def folder(bank, tmp_path):
    """A soup as it was saved."""
    hf_radin.uniform(bank).save_pretrained(tmp_path / "soup")
    return tmp_path / "soup"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting for what is over at once: neither here nor in the client, whose pauses are seconds."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder as they are pushed: of each absolute path in the recipe the last two parts."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "recipe.json" in files:
        files["recipe.json"] = re.sub(rb'"/(?:[^"/]+/)*([^"/]+/[^"/]+)"', rb'"\1"', files["recipe.json"])
    return files


def held(hub, repo_id: str) -> dict[str, bytes]:
    """What a repository holds, with the card as it was before the push wrote the repository's name into it."""
    files = {name: bytes(data) for name, data in hub.files(repo_id).items() if name != ".gitattributes"}
    if "README.md" in files:
        assert line_to_load(UNNAMED) not in files["README.md"], "the card does not say what to load"
        files["README.md"] = files["README.md"].replace(line_to_load(repo_id), line_to_load(UNNAMED))
    return files


def line_to_load(name: str) -> bytes:
    """The line of a card that loads the model of this name."""
    return f'classify = pipeline("image-classification", model="{name}")\n'.encode()
