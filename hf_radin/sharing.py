"""A bank on the Hub: a dataset repository of logits, for others to search without images and without a GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_radin import foreign
from hf_radin.access import asking_the_hub
from hf_radin.commit import is_repo_id
from hf_radin.data import OBJECT
from hf_radin.files import digest, write_folder
from hf_radin.kept import DIGESTS
from hf_radin.text import escape, percent, shown

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


def fetch(repo_id: str, home: Path, *, revision: str | None, token: str | bool | None) -> Path:
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
    about, latest, records = foreign.check(snapshot, origin)
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
