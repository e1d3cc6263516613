"""Files with one thing changed: in their bytes, their text, or what their JSON says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS = (-1, 0, 1, 3.5, 1e308, 10**9, 2**31, 2**63, 10**18, 10**400, float("nan"), float("inf"), True)
TEXTS = ("", "7", "a\nb", "\x1b[2J", "\u202e", "\ud800", "../../x", "/dev/zero", "\0", "é", "x" * 5000)
VALUES: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, [], {}, [[]], {"": None}, [1, "a", None], {"a": {"b": [1]}})
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


def changed(content: Any, random: Random) -> Any:
    """A copy of JSON with one place changed: another value, nothing, one more entry, or a list around it."""
    content = json.loads(json.dumps(content))
    place, name = random.choice(list(_places(content)))
    what = random.choice(("value", "value", "value", "gone", "entry", "list"))
    if what == "gone":
        del place[name]
    elif what == "entry" and isinstance(place, dict):
        place[random.choice(TEXTS)] = random.choice(VALUES)
    elif what == "list":
        place[name] = [place[name]] * random.choice((1, 2, 50))
    else:
        place[name] = random.choice(VALUES)
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


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for name in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, name
        if isinstance(content[name], (dict, list)):
            yield from _places(content[name])
