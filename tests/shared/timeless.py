"""Files of two runs are compared but for what tells the time: that is the one thing that no two share."""

import json
import re
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(path.relative_to(folder)): without_times(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def without_times(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name == "README.md":
        return re.sub(rb"(?<= \| )[\d.]+ (ms|s|min|h)(?= \|\n)| Time is that of .*", b"", content)
    return (
        json.dumps(timeless(json.loads(content))).encode()
        if path.suffix == ".json" and path.name[0] != "."
        else content
    )


def timeless(value: object) -> object:
    if isinstance(value, dict):
        times = ("seconds", "time", "device", "devices", "seal")  # a seal is of all that a record says
        return {name: timeless(content) for name, content in value.items() if name not in times}
    return [timeless(content) for content in value] if isinstance(value, list) else value
