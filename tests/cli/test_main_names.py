"""No name from outside moves the cursor, forges a line or ends a command: control characters are shown escaped."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_radin.cli.main import Lines, main

HOSTILE = "ok\nhf-radin: all is well\x1b[2J\r\u202egnp.\u2028end"
ESCAPED = r"ok\nhf-radin: all is well\x1b[2J\r\u202egnp.\u2028end"


def change(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def is_clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_names_of_folders_are_escaped_in_tables_and_errors(two, capsys):
    (two / "ft-1").rename(two / HOSTILE)
    (two / "ft-0").rename(two / ("long" * 50))
    assert main(["inspect", "--models", f"{two}/*"]) == 0
    shown = capsys.readouterr()
    assert ESCAPED in shown.out and is_clean(shown.out) and is_clean(shown.err)
    header, *rows = shown.out.splitlines()[:3]
    assert all(row.index("ViTFor") == header.index("architecture") for row in rows)
    (two / HOSTILE / "model.safetensors").unlink()
    assert main(["soup", "--models", f"{two}/*"]) == 2
    error = capsys.readouterr().err
    assert ESCAPED in error and len(error.splitlines()) == 1 and is_clean(error)


@pytest.mark.parametrize("label", [HOSTILE, "x" * 20_000, "\ud800"])
def test_names_of_classes_are_escaped(two, capsys, label):
    names = {str(number): f"class {number}" for number in range(9)} | {"9": label}
    change(two / "ft-1", id2label=names, label2id={})
    assert main(["inspect", "--models", f"{two}/*"]) == 2
    shown = capsys.readouterr()
    assert is_clean(shown.out) and is_clean(shown.err) and len(shown.err.splitlines()) == 1
    assert "differs from" in shown.out and len(shown.out) < 30_000


def test_what_a_card_names_is_escaped(two, capsys):
    for number, name in enumerate((HOSTILE, "org/pets")):
        content = json.dumps({"datasets": [name]})
        (two / f"ft-{number}" / "README.md").write_text(f"---\n{content}\n---\n")
    assert main(["soup", "--models", f"{two}/*", "--output", str(two / "soup")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and is_clean(error) and "don't agree" in error


@pytest.mark.parametrize("name", ["hf_radin.images.split", "datasets.load", "py.warnings"])
def test_what_is_logged_forges_no_line(name):
    record = logging.LogRecord(name, logging.WARNING, "", 0, "The class %s is odd.", (HOSTILE,), None)
    first, *others = Lines().format(record).split("\n")
    assert first.startswith("The class ok") and all(line.startswith("  ") for line in others)
    assert is_clean(first) and not (others and name.startswith("hf_radin"))


def test_options_are_escaped(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--models", "a", "--\x1b[2J\n--of-a-file"])
    assert is_clean(capsys.readouterr().err)


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_files_are_read_alike_in_any_locale(two, locale):
    names = {str(number): f"café {number}" for number in range(10)}
    for folder in two.iterdir():
        change(folder, id2label=names, label2id={})
        card = "---\nlicense: mit\n---\n# é\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
    start = [
        sys.executable,
        "-X",
        "utf8=0",
        "-m",
        "hf_radin",
        "inspect",
        "--models",
        str(two / "ft-0"),
        str(two / "ft-1"),
    ]
    run = subprocess.run(start, env=os.environ | {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0"}, capture_output=True)
    assert run.returncode == 0 and b"a soup can be made of these 2" in run.stdout and not run.stderr.strip()


# Names whose bytes are no text.
BYTES = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "--models", BYTES, "ft-0"],
        ["inspect", "--models", "*", "--base-model", BYTES],
        ["soup", "--models", "ft-*", "--dataset", BYTES],
        ["soup", "--models", "ft-*", "--dataset", "images"],
        ["soup", "--models", "ft-*", "--dataset", "d", "--output", BYTES],
        ["logits", "--models", "ft-*", "--dataset", "d", "--cache-dir", BYTES],
        ["average", "--recipe", f"{BYTES}/recipe.json", "--output", "o"],
        ["search", BYTES],
        ["card", BYTES],
        ["push", BYTES, "org/a"],
    ],
)
def test_a_name_that_is_no_text_is_named(two, capsys, monkeypatch, arguments):
    monkeypatch.chdir(two)
    (two / BYTES).mkdir()
    (two / "images" / "validation" / "a").mkdir(parents=True)
    (two / "images" / "validation" / "a" / f"{BYTES}.png").touch()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and is_clean(error)
    assert r"caf\udce9" in error and "is no UTF-8 text: rename what is called so." in error


@pytest.mark.parametrize("names", ["folder", "list"])
def test_a_name_that_the_locale_lacks_is_named_with_the_way_out(two, names):
    (two / "ft-0").rename(two / "caf\u00e9")
    (two / "list.txt").write_text("caf\u00e9\nft-1\n", encoding="utf-8")
    models = ["list.txt"] if names == "list" else [b"caf\xc3\xa9", "ft-1"]
    start = [sys.executable, "-X", "utf8=0", "-m", "hf_radin", "inspect", "--models", *models]
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(start, env=environment, cwd=two, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert r"The name caf\xe9 can't be used in this locale" in run.stderr and "LC_ALL=C.UTF-8" in run.stderr
