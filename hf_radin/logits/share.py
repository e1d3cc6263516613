"""A bank on the Hub: a dataset repository of logits, for others to search without images and without a GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_radin.images.digests import DTYPE
from hf_radin.images.split import OBJECT
from hf_radin.ingredients.ingredient import from_record
from hf_radin.logits.bank_files import DIGESTS
from hf_radin.runtime.files import digest, write_folder
from hf_radin.runtime.hub_commit import is_repo_id
from hf_radin.runtime.hub_errors import asking_the_hub
from hf_radin.runtime.text import escape, percent, shown

pass

COMMIT_MESSAGE = "Upload logits computed with hf_radin"
PATTERNS = ("*.json", "*.npy", "logits/*.json", "logits/*.npy")


def public_files(
    folder: Path,
    about: dict[str, Any],
    latest: dict[str, Any],
    records: Sequence[dict[str, Any]],
    scores: Sequence[float],
    repo_id: str,
) -> dict[str, Path | bytes]:
    """What of a bank is uploaded, by name: all but paths, which say more of a machine than of logits.

    Args:
        about: the contents of `bank.json`.
        latest: of `latest.json`.
        records: what the bank says of each of its ingredients, in order.
        scores: the accuracy of each.
        repo_id: where to.
    """
    data = about["data"]
    name = data["name"] if data["revision"] else Path(data["name"]).name
    about = {**about, "data": {**data, "name": name}, "dataset": name if data["revision"] else None}
    records = [_without_paths(one) for one in records]
    latest = {**latest, "remarks": [[shown(name), text] for name, text in latest["remarks"]]}
    card = _card(about, records, scores, repo_id)
    files: dict[str, Path | bytes] = {"bank.json": _json(about), "latest.json": _json(latest)}
    files |= {"README.md": card.encode(), **{name: folder / name for name in _arrays(folder)}}
    for record, key in zip(records, latest["keys"], strict=True):
        files[f"logits/{key}.npy"] = folder / "logits" / f"{key}.npy"
        files[f"logits/{key}.json"] = _json(record)
    return files


def named_repositories(
    about: dict[str, Any], records: Sequence[dict[str, Any]], remarks: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The repositories that a bank names, with their types.

    Args:
        about: the contents of `bank.json`.
        records: what the bank says of each of its ingredients.
        remarks: what it says of checkpoints, by their ids.
    """
    checkpoints = [*records, *(record["base"] for record in records if record["base"])]
    models = [checkpoint["repo_id"] for checkpoint in checkpoints if checkpoint["repo_id"]]
    if any(record["repo_id"] for record in records):  # those that were left out may be on the Hub, too
        left_out = (str(name).partition("@")[0].partition(":")[0] for name, _ in remarks)
        models += [name for name in left_out if is_repo_id(name) and not Path(name).exists()]
    processors = (str(record["image_processor"] or "").partition("@") for record in records)
    models += [name for name, revision, _ in processors if revision and is_repo_id(name)]
    data = about["data"]
    return [*((name, "model") for name in models), *([(data["name"], "dataset")] if data["revision"] else [])]


def fetch_bank(repo_id: str, home: Path, *, revision: str | None, token: str | bool | None) -> Path:
    """A bank on the Hub as a folder among the banks of `home`.

    Raises:
        ValueError: if there is no such repository, or no bank in it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing = f"There is no folder {repo_id!r} here, and no such dataset on the Hub"
    with asking_the_hub(f"The bank {repo_id}", revision=revision, missing=missing):
        options = {"repo_type": "dataset", "revision": revision, "token": token}
        try:
            hf_hub_download(repo_id, "bank.json", **options)
        except LocalEntryNotFoundError:  # the Hub could not be asked
            raise
        except EntryNotFoundError as error:
            raise ValueError(f"The dataset {repo_id} is no logit bank: it has no bank.json.") from error
        snapshot = Path(snapshot_download(repo_id, allow_patterns=list(PATTERNS), **options))
    folder = home / "banks" / digest(repo_id, snapshot.name)
    if not folder.exists():
        write_folder(folder, lambda new: _adopt(snapshot, new, f"{repo_id}@{snapshot.name}"))
    return folder


def _adopt(snapshot: Path, folder: Path, origin: str) -> None:
    """The same bank in another folder. The places that it names are somebody else's: nothing is looked for there.

    Raises:
        ValueError: if it is none, or not what it says it is.
    """
    pixels = {name: f"../../pixels/{digest(origin, name)}" for name in ("images", "statistics")}
    about, latest, records = check_bank_files(snapshot, origin)
    on_hub = about["data"]["name"] if about["data"]["revision"] else OBJECT
    about = {**about, "origin": origin, "dataset": on_hub, "pixels": pixels["images"]}
    if latest["statistics"] is not None:
        latest = {**latest, "statistics": {**latest["statistics"], "pixels": pixels["statistics"]}}
    (folder / "logits").mkdir()
    contents = {"bank.json": about, "latest.json": latest}
    contents |= {f"logits/{key}.json": _at_home(record) for key, record in records.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(_json(content))
    for name in (*_arrays(snapshot), *(f"logits/{key}.npy" for key in records)):
        try:
            os.symlink((snapshot / name).resolve(), folder / name)
        except OSError:  # a system without links
            shutil.copy(snapshot / name, folder / name)


def _arrays(folder: Path) -> list[str]:
    """The files that say of each sample what it is; one of an earlier version has no digests."""
    return ["ids.npy", "labels.npy", *([DIGESTS] if (folder / DIGESTS).exists() else [])]


def _at_home(record: dict[str, Any]) -> dict[str, Any]:
    """What a bank of the Hub says of an ingredient, without the places where its author had it."""
    return {
        **record,
        "folder": record["folder"] if record["repo_id"] is None else "",
        "processor_folder": None,
        "base": record["base"] and _at_home(record["base"]),
    }


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    return {
        **record,
        "id": shown(record["id"]),
        "folder": shown(record["folder"]) if record["repo_id"] is None else "",
        "processor_folder": None,
        "image_processor": record["image_processor"] and shown(record["image_processor"]),
        "base": record["base"] and _without_paths(record["base"]),
    }


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


def _card(about: dict[str, Any], records: Sequence[dict[str, Any]], scores: Sequence[float], repo_id: str) -> str:
    """What a visitor of the repository reads."""
    from huggingface_hub import DatasetCardData

    data = about["data"]
    metadata = DatasetCardData(
        pretty_name=f"Logits of {len(records)} image classifiers",
        task_categories=["image-classification"],
        tags=["model-soup", "logits", "hf-radin", "arxiv:2401.17790"],
        source_datasets=[data["name"]] if data["revision"] else None,
        viewer=False,
    )
    configuration = f", configuration {escape(data['config_name'])}" if data["config_name"] else ""
    where = f"the folder {escape(data['name'])} of its author"
    if data["revision"]:
        place = f"https://huggingface.co/datasets/{data['name']}"
        where = f"[{escape(data['name'])}]({place}){configuration}, commit `{escape(data['revision'])}`"
    rows = [
        f"| {_linked(record)} | `{escape(record['revision'])}` | {percent(score)} |"
        for record, score in zip(records, scores, strict=True)
    ]
    precision = about["dtype"] + ("" if about["mixed_precision"] == "no" else f", autocast {about['mixed_precision']}")
    return f"""---
{metadata}
---

# Logits of {len(records)} image classifiers

What each of these checkpoints says of {about["samples"]} images in {len(about["classes"])} classes: raw logits, kept
in {escape(about["logits_dtype"])}, computed in {escape(precision)} with hf_radin {escape(about["hf_radin"])}. The
images are those of {where}, split {escape(data["split"])}. They are not here; their labels are.

| checkpoint | revision | accuracy |
|---|---|---:|
{chr(10).join(rows)}

## Use

Recipes of [model soups](https://arxiv.org/abs/2203.05482) can be scored by their ensembles
([RADIN](https://arxiv.org/abs/2401.17790)), without the images and without running a model:

```python
import hf_radin

bank = hf_radin.LogitBank.from_hub("{repo_id}")
soup = hf_radin.radin(bank, budget=0)  # estimated, not measured; a larger budget needs images and checkpoints
print(soup.recipe)
```

`logits/*.npy` are arrays `(samples, classes)`, `labels.npy`, `ids.npy` and `digests.npy` (of the bytes of the image
files, to find images that two splits share) `(samples,)`, all of them plain NumPy files.
"""


def _linked(record: dict[str, Any]) -> str:
    name = escape(record["id"])
    return f"[{name}](https://huggingface.co/{record['repo_id']})" if record["repo_id"] else name


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


def check_bank_files(folder: Path, origin: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
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
