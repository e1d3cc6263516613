"""Small files from anywhere are read at once or refused in a line, whatever lies under their name."""

import hashlib
import json
from dataclasses import dataclass

import pytest
from shared import odd_files

from hf_radin.runtime.files import (
    YAML_SIZE,
    BrokenFileError,
    card_metadata,
    parse_yaml,
    read_json,
    read_small,
    sha256_of,
    sha256_of_each,
)
from hf_radin.runtime.schema import known_record, read_record, write_sealed
from hf_radin.runtime.text import printable


@dataclass(frozen=True)
class Record:
    """A record with one field."""

    number: int


def fill(path, kind):
    if kind in odd_files.KINDS:
        odd_files.put(path, kind)
    elif kind == "circle":
        path.symlink_to(path)
    else:
        path.write_bytes(CONTENTS[kind])


CONTENTS = {
    "nested": b"[" * 100_000,
    "not UTF-8": b'"\xe9"',
    "cut": b'{"number": ',
    "empty": b"",
    "list": b"[1]",
    "another type": b'{"number": "3"}',
}

REASONS = {
    "pipe": "no regular file",
    "device": "no regular file",
    "folder": "[Dd]irectory",
    "circle": "symbolic links",
    "too large": "more than 16 MB",
    "nested": "nested too deeply",
    "not UTF-8": "no UTF-8 text",
    "cut": "Expecting value",
    "empty": "Expecting value",
    "list": "not a Record",
    "another type": "'number'",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_no_record_is_refused_in_one_line_that_names_the_file(tmp_path, kind):
    fill(tmp_path / "record.json", kind)
    with pytest.raises(BrokenFileError, match=REASONS[kind]) as error:
        read_record(Record, tmp_path / "record.json", way_out="Make it again.")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'record.json'} can't be read: ") and message.endswith(". Make it again.")
    assert len(message.splitlines()) == 1


def test_no_file_is_no_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "record.json")


def test_what_is_whole_is_read_in_any_locale(tmp_path):
    (tmp_path / "record.json").write_bytes('\ufeff{"number": 3, "name": "é"}'.encode())
    assert read_json(tmp_path / "record.json") == {"number": 3, "name": "é"}
    assert read_record(Record, tmp_path / "record.json") == Record(3)


def test_hashes_are_those_of_the_bytes(tmp_path):
    contents = [b"", b"a" * (3 << 20), json.dumps([1]).encode()]
    paths = [tmp_path / str(place) for place in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    assert [sha256_of(path) for path in paths] == hashes
    assert sha256_of_each([*paths, tmp_path / "none", tmp_path]) == [*hashes, None, None]


def test_what_moves_the_cursor_is_shown():
    assert printable("a\n\x1b[2J\u202eb\ud800 é") == r"a\n\x1b[2J\u202eb\ud800 é"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: b\n" * (YAML_SIZE // 5 + 1), "it has more than .* kB of YAML"),
        ("a: [", "it is no YAML: .*line 1"),
        ("a: 2026-13-45", "month must be in"),
    ],
    ids=["long", "cut", "no date"],
)
def test_what_is_no_short_yaml_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


@pytest.mark.parametrize("block", ["- a\n- b", "3", "words"])
def test_metadata_of_a_card_is_a_mapping(block):
    with pytest.raises(ValueError, match="its metadata is no mapping"):
        card_metadata(f"---\n{block}\n---\n# A model\n")


@dataclass(frozen=True)
class Later:
    """What another version wrote where a `Record` belongs."""

    number: str


def test_a_sealed_record_of_other_fields_is_named_and_made_anew(tmp_path, caplog):
    """Its seal fits, but another version wrote it."""
    write_sealed(tmp_path / "record.json", Later("three"), "the same")
    assert known_record(Record, tmp_path / "record.json", "the same") is None
    (warning,) = caplog.messages
    assert warning == f"{tmp_path / 'record.json'} can't be read: its 'number' is 'three'. It is made anew."
    assert not (tmp_path / "record.json").exists()
