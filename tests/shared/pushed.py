"""What tests of a push share: a soup as it was saved, and what a repository holds."""

import json
import time
from pathlib import Path

import pytest

import hf_radin
from hf_radin.soup import card, redact

OLD = {
    "README.md": b"# A soup of last week",
    "recipe.json": b"{}",
    "model.safetensors": b"old weights",
    "notes.txt": b"mine",
}


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
    """The files of a folder, the recipe as it is pushed."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    recipe = json.loads(files.get("recipe.json", b"null"))
    text = json.dumps(redact.without_paths(recipe), indent=2) + "\n" if recipe else ""
    return files | ({"recipe.json": text.encode()} if recipe else {})


def held(hub, repo_id: str) -> dict[str, bytes]:
    """What a repository holds, with the card as it was before the push named the repository in it."""
    files = {name: bytes(data) for name, data in hub.files(repo_id).items() if name != ".gitattributes"}
    return files | {name: card.naming(files[name], card.PLACE) for name in files.keys() & {"README.md"}}
