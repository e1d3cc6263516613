"""What may stand under the name of a small file, and is none."""

import os
from pathlib import Path

from hf_radin.runtime.files import SMALL

KINDS = ("pipe", "device", "folder", "too large")


def put(path: Path, kind: str) -> None:
    """Put something of a kind where a small file belongs."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(SMALL + 1)
