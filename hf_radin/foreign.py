"""Somebody else's bank: nothing in it is believed that was not looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_radin.digests import DTYPE
from hf_radin.kept import DIGESTS
from hf_radin.records import from_record

# Rows of logits that are looked at together.
AT_ONCE = 4096

# Seconds that logits may have taken: more than ten years are a mistake.
LONGEST = 10 * 366 * 86400

# What a bank must say of itself, and of the data; and what must be true of it.
_ABOUT: dict[str, Callable[[Any], bool]] = {
    "data": lambda value: (
        isinstance(value, dict) and all(name in value and fits(value[name]) for name, fits in _DATA.items())
    ),
    "samples": lambda value: _is_count(value),
    "classes": lambda value: _are(str, value) and len(value) > 0,
    "processor": lambda value: isinstance(value, dict),
    "dtype": lambda value: value in ("float32", "float16", "bfloat16", "float64"),
    "logits_dtype": lambda value: value in ("float32", "float16"),
    "mixed_precision": lambda value: value in ("no", "fp16", "bf16", "fp8"),
    "channels_last": lambda value: isinstance(value, bool),
    "compiled": lambda value: isinstance(value, bool),
    "on_error": lambda value: value in ("raise", "skip"),
    "batch_size": lambda value: _is_count(value),
    "block_size": lambda value: _is_count(value),
    "skipped": lambda value: _are(int, value),
    "blocks": lambda value: isinstance(value, list) and all(_are(int, one) and len(one) == 3 for one in value),
    "hf_radin": lambda value: isinstance(value, str),
}
_DATA: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "split", "key", "image_column", "label_column"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("config_name", "revision"), lambda value: isinstance(value, (str, type(None)))),
}
_STATISTICS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("data", "split", "key"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("images", "used"), lambda value: _is_count(value)),
    "seed": lambda value: type(value) is int and value >= 0,
    "on_error": lambda value: value in ("raise", "skip"),
}


def check(folder: Path, origin: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """What a bank says of itself, of its last computation, and of each of its ingredients by key.

    Args:
        folder: with `bank.json`, `latest.json`, the logits and their records.
        origin: what it is called in an error.

    Raises:
        ValueError: if a file is missing or broken, or says what can't be true.
    """
    try:
        about, latest = (dict(_read(folder / name)) for name in ("bank.json", "latest.json"))
        problem = next(_problems(about, latest), None)
        if problem is None:
            records = {key: dict(_read(folder / "logits" / f"{key}.json")) for key in latest["keys"]}
            problem = next(_problems_of_records(about, records), None)
        if problem is None:
            problem = next(_problems_of_arrays(folder, about, list(records)), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError) as error:
        raise ValueError(f"The dataset {origin} is no logit bank: {error!r}") from error
    if problem is not None:
        raise ValueError(f"The dataset {origin} is no logit bank: {problem}.")
    return about, latest, records


def _read(path: Path) -> Any:
    found = json.loads(path.read_text())
    odd = next((text for text in _texts(found) if not text.isprintable()), None)
    if odd is not None:  # such letters can do things to a terminal
        raise ValueError(f"{path.name} holds {odd[:50]!r}")
    return found


def _problems(about: dict[str, Any], latest: dict[str, Any]) -> Iterator[str]:
    from huggingface_hub.utils import validate_repo_id

    for name, fits in _ABOUT.items():
        if not fits(about.get(name)):
            yield f"its {name!r} is {str(about.get(name))[:100]!r}"
    if about.get("pilot") is not None:
        yield "it is of a part of its split only"
    if about["data"]["revision"]:
        validate_repo_id(about["data"]["name"])
        if not about["data"]["name"].strip("./"):
            yield "its data have no name"
    if sum(count for _, _, count in about["blocks"]) != about["samples"]:
        yield f"its blocks don't hold {about['samples']} samples"
    if not _are(str, latest["keys"]) or len(set(latest["keys"])) != len(latest["keys"]) or len(latest["keys"]) < 2:
        yield "it does not list two ingredients or more, each once"
    if any(not key.isalnum() for key in latest["keys"]):
        yield "it lists an ingredient by a name that is no key"
    if not all(_are(str, one) and len(one) == 2 for one in latest["remarks"]):
        yield "its remarks are none"
    told = latest["statistics"]
    if told is not None:
        if not _is_count(told.get("size")):
            yield f"its BatchNorm statistics have batches of {told.get('size')!r}"
        for name, fits in _STATISTICS.items():
            if not fits(told["about"].get(name)):
                yield f"its BatchNorm statistics say {name!r} is {str(told['about'].get(name))[:100]!r}"


def _problems_of_records(about: dict[str, Any], records: dict[str, dict[str, Any]]) -> Iterator[str]:
    for key, record in records.items():
        for one in (record, record["base"]):
            parts = [one["subfolder"] or "", one["repo_id"] or "", one["revision"]] if one else []
            if any(".." in part or part.startswith(("/", "\\")) for part in parts):
                yield f"its ingredient {one['id']!r} is in no repository"
        seconds, device = record.get("seconds"), record.get("device")
        if seconds is not None and not (type(seconds) in (int, float) and 0 <= seconds < LONGEST):
            yield f"its ingredient {record['id']!r} took {str(seconds)[:100]} seconds"
        if device is not None and not (type(device) is str and len(device) < 200):
            yield f"its ingredient {record['id']!r} was run on {str(device)[:100]}"
        if record["labels"] != about["classes"]:
            yield f"its ingredient {record['id']!r} has other classes than it"
        if record["order"] is not None and sorted(record["order"]) != list(range(len(about["classes"]))):
            yield f"its ingredient {record['id']!r} has classes in the order {str(record['order'])[:100]}"
        if record["finite"] is not True or from_record(record).key != key:
            yield f"its ingredient {record['id']!r} is not what it is filed under"


def _problems_of_arrays(folder: Path, about: dict[str, Any], keys: list[str]) -> Iterator[str]:
    samples, classes = about["samples"], len(about["classes"])
    ids, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "labels"))
    for name, array in (("ids", ids), ("labels", labels)):
        if array.shape != (samples,) or array.dtype.kind not in "iu":
            yield f"{name}.npy is {array.dtype} {array.shape}, not whole numbers ({samples},)"
    if (folder / DIGESTS).exists():
        digests = np.load(folder / DIGESTS, mmap_mode="r")
        if digests.shape != (samples,) or digests.dtype != DTYPE:
            yield f"{DIGESTS} is {digests.dtype} {digests.shape}, not {DTYPE} ({samples},)"
    if (np.diff(ids) <= 0).any() or (labels < 0).any() or (labels >= classes).any():
        yield "its ids do not rise, or its labels are not among its classes"
    for key in keys:
        logits = np.load(folder / "logits" / f"{key}.npy", mmap_mode="r")
        if logits.shape != (samples, classes) or logits.dtype != about["logits_dtype"]:
            wanted = f"{about['logits_dtype']} {(samples, classes)}"
            yield f"logits/{key}.npy is {logits.dtype} {logits.shape}, not {wanted}"
        if not logits.flags.c_contiguous:
            yield f"logits/{key}.npy is stored by columns"
        for start in range(0, samples, AT_ONCE):
            if not np.isfinite(logits[start : start + AT_ONCE]).all():
                yield f"logits/{key}.npy has NaN or infinite logits"


def _texts(value: Any) -> Iterator[str]:
    """All strings in what JSON said."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(name)
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 40


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)
