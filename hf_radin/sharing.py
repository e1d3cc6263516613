"""A bank on the Hub: a dataset repository of logits, for others to search without images and without a GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_radin.access import asking_the_hub
from hf_radin.card import escape, percent, shown
from hf_radin.data import OBJECT
from hf_radin.files import digest, write_folder

COMMIT_MESSAGE = "Upload logits computed with hf_radin"
PATTERNS = ("*.json", "*.npy", "logits/*.json", "logits/*.npy")


def public_files(
    folder: Path,
    about: dict[str, Any],
    latest: dict[str, Any],
    records: Sequence[dict[str, Any]],
    scores: Sequence[float],
) -> dict[str, Path | bytes]:
    """What of a bank is uploaded, by name: all but paths, which say more of a machine than of logits.

    Args:
        about: the contents of `bank.json`.
        latest: of `latest.json`.
        records: what the bank says of each of its ingredients, in order.
        scores: the accuracy of each.
    """
    data = about["data"]
    name = data["name"] if data["revision"] else Path(data["name"]).name
    about = {**about, "data": {**data, "name": name}, "dataset": name if data["revision"] else None}
    records = [_without_paths(one) for one in records]
    latest = {**latest, "remarks": [[shown(name), text] for name, text in latest["remarks"]]}
    card = _card(about, records, scores)
    files: dict[str, Path | bytes] = {"bank.json": _json(about), "latest.json": _json(latest)}
    files |= {"README.md": card.encode(), **{f"{name}.npy": folder / f"{name}.npy" for name in ("ids", "labels")}}
    for record, key in zip(records, latest["keys"], strict=True):
        files[f"logits/{key}.npy"] = folder / "logits" / f"{key}.npy"
        files[f"logits/{key}.json"] = _json(record)
    return files


def fetch(repo_id: str, home: Path, *, revision: str | None, token: str | bool | None) -> Path:
    """A bank on the Hub as a folder among the banks of `home`.

    Raises:
        ValueError: if there is no such repository, or no bank in it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    missing = f"There is no dataset {repo_id!r} on the Hub"
    with asking_the_hub(f"The bank {repo_id}", revision=revision, missing=missing):
        options = {"repo_type": "dataset", "revision": revision, "token": token}
        try:
            hf_hub_download(repo_id, "bank.json", **options)
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
        ValueError: if it is none.
    """
    pixels = {name: f"../../pixels/{digest(origin, name)}" for name in ("images", "statistics")}
    try:
        about, latest = (json.loads((snapshot / name).read_text()) for name in ("bank.json", "latest.json"))
        on_hub = about["data"]["name"] if about["data"]["revision"] else OBJECT
        about = {**about, "origin": origin, "dataset": on_hub, "pixels": pixels["images"]}
        if latest["statistics"] is not None:
            latest["statistics"] = {**latest["statistics"], "pixels": pixels["statistics"]}
        records = {path.name: _checked(json.loads(path.read_text())) for path in snapshot.glob("logits/*.json")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The dataset {origin} is no logit bank: {error!r}") from error
    (folder / "logits").mkdir()
    contents = {"bank.json": about, "latest.json": latest, **{f"logits/{name}": one for name, one in records.items()}}
    for name, content in contents.items():
        (folder / name).write_bytes(_json(content))
    for path in (*snapshot.glob("*.npy"), *snapshot.glob("logits/*.npy")):
        place = folder / path.relative_to(snapshot)
        try:
            os.symlink(path.resolve(), place)
        except OSError:  # a system without links
            shutil.copy(path, place)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """What a bank of the Hub says of an ingredient, if it names no place outside of a repository.

    Raises:
        ValueError: if it does.
    """
    parts = (record["subfolder"] or "", record["repo_id"] or "", record["revision"])
    if any(".." in part or part.startswith(("/", "\\")) for part in parts):
        raise ValueError(f"{record['id']} is in no repository")
    return {
        **record,
        "folder": record["folder"] if record["repo_id"] is None else "",
        "processor_folder": None,
        "base": record["base"] and _checked(record["base"]),
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


def _card(about: dict[str, Any], records: Sequence[dict[str, Any]], scores: Sequence[float]) -> str:
    """What a visitor of the repository reads."""
    from huggingface_hub import DatasetCardData

    data = about["data"]
    metadata = DatasetCardData(
        pretty_name=f"Logits of {len(records)} image classifiers",
        task_categories=["image-classification"],
        tags=["model-soup", "logits", "hf-radin", "arxiv:2401.17790"],
        viewer=False,
    )
    configuration = f", configuration {escape(data['config_name'])}" if data["config_name"] else ""
    commit = f", commit `{data['revision']}`" if data["revision"] else ""
    rows = [
        f"| {escape(record['id'])} | `{record['revision'][:19]}` | {percent(score)} |"
        for record, score in zip(records, scores, strict=True)
    ]
    precision = about["dtype"] + ("" if about["mixed_precision"] == "no" else f", autocast {about['mixed_precision']}")
    return f"""---
{metadata}
---

# Logits of {len(records)} image classifiers

What each of these checkpoints says of {about["samples"]} images in {len(about["classes"])} classes: raw logits, kept
in {about["logits_dtype"]}, computed in {precision} with hf_radin {about["hf_radin"]}. The images are those of
{escape(data["name"])}{configuration}{commit}, split {escape(data["split"])}. They are not here; their labels are.

| checkpoint | revision | accuracy |
|---|---|---:|
{chr(10).join(rows)}

## Use

Recipes of [model soups](https://arxiv.org/abs/2203.05482) can be scored by their ensembles
([RADIN](https://arxiv.org/abs/2401.17790)), without the images and without running a model:

```python
import hf_radin

bank = hf_radin.LogitBank.from_hub("ID/OF-THIS-REPOSITORY")
soup = hf_radin.radin(bank, budget=0)  # estimated, not measured; a larger budget needs images and checkpoints
print(soup.recipe)
```

`logits/*.npy` are arrays `(samples, classes)`, `labels.npy` and `ids.npy` `(samples,)`, all of them plain NumPy files.
"""
