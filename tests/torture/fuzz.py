"""Files with one thing changed: in their bytes, their text, or what their JSON says."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from shared.fuzzing import changed

PIECES = (
    b"\0",
    b"\xff\xfe",
    b"\n",
    b"\x1b[31m",
    b"{",
    b"[" * 3000,
    b'"',
    b": ",
    b"- ",
    b"9" * 5000,
    b"\r\n",
    "é".encode(),
)


def fuzzed(content: bytes, random: Random) -> bytes:
    """The bytes of a file with one to three things changed; half of the time within its JSON, if it is some."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        fields = _read(content) if random.random() < 0.6 else None
        content = json.dumps(changed(fields, random)).encode() if fields else spoilt(content, random)
    return content


def spoilt(content: bytes, random: Random) -> bytes:
    """Bytes with something cut, put in, doubled or changed at one place."""
    at = random.randrange(len(content) + 1)
    end = min(len(content), at + random.choice((1, 1, 8, 100)))
    changes = (
        content[:at],
        content[:at] + content[end:],
        content[:end] + content[at:],
        content[:at] + random.choice(PIECES) + content[at:],
        content[:at] + random.choice(PIECES) + content[end:],
        content[:at] + bytes([random.randrange(256)]) + content[at + 1 :],
    )
    return random.choice(changes)


def _read(content: bytes) -> Any:
    """The JSON in a file, if there is some that has places."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, (dict, list)) else None
