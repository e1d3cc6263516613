"""Banks on the Hub: a dataset repository of logits, for others to search without images and without a GPU.

Nothing in somebody else's bank is believed before it was checked.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.images.digests import DTYPE
from hf_radin.images.split import OBJECT
from hf_radin.ingredients.ingredient import IngredientRecord, is_selection
from hf_radin.logits.bank_files import DIGESTS, LogitsRecord, logits_path, open_array
from hf_radin.logits.manifest import BANK, LATEST, BankManifest, Latest
from hf_radin.runtime.files import digest, read_json, sha256_of_each, write_folder
from hf_radin.runtime.hub_commit import (
    PushOptions,
    commit_files,
    hidden_repositories,
    hub_address,
    is_private,
    is_repo_id,
    refuse_offline,
)
from hf_radin.runtime.hub_errors import asking_the_hub
from hf_radin.runtime.liveness import lock
from hf_radin.runtime.schema import from_json, to_json
from hf_radin.runtime.text import escape, percent, shown

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

COMMIT_MESSAGE = "Upload logits computed with hf_radin"
PATTERNS = ("*.json", "*.npy", "logits/*.json", "logits/*.npy")

# Rows of logits that are checked together.
AT_ONCE = 4096

# Seconds that logits may have taken: more than ten years are a mistake.
LONGEST = 10 * 366 * 86400

# The largest number of anything that a bank may claim to have.
LARGEST = 1 << 40

# Values that a bank's run may have.
_RUN_VALUES = {
    "dtype": ("float32", "float16", "bfloat16", "float64"),
    "logits_dtype": ("float32", "float16"),
    "mixed_precision": ("no", "fp16", "bf16", "fp8"),
    "on_error": ("raise", "skip"),
}


@dataclass(frozen=True)
class PublishedBank:
    """What is pushed of a bank.

    Args:
        folder: that holds its arrays.
        records: of its ingredients' logits, by key.
        scores: the accuracy of each ingredient.
    """

    folder: Path
    manifest: BankManifest
    latest: Latest
    records: Mapping[str, LogitsRecord]
    scores: tuple[float, ...]

    def files(self, repo_id: str) -> dict[str, Path | bytes]:
        """What is uploaded, by name: all but paths, which say more of a machine than of logits."""
        data = self.manifest.data
        name = data.name if data.revision else Path(data.name).name
        dataset = name if data.revision else None
        manifest = replace(self.manifest, data=replace(data, name=name), dataset=dataset)
        remarks = tuple((shown(checkpoint), text) for checkpoint, text in self.latest.remarks)
        records = {key: replace(record, ingredient=_public(record.ingredient)) for key, record in self.records.items()}
        card = _card(manifest, [record.ingredient for record in records.values()], self.scores, repo_id)
        files: dict[str, Path | bytes] = {BANK: _json(manifest), LATEST: _json(replace(self.latest, remarks=remarks))}
        files |= {"README.md": card.encode(), **{array: self.folder / array for array in _arrays(self.folder)}}
        for key, record in records.items():
            files[f"logits/{key}.npy"] = self.folder / "logits" / f"{key}.npy"
            files[f"logits/{key}.json"] = _json(record)
        return files

    def repositories(self) -> list[tuple[str, str]]:
        """The repositories that the bank names, with their types."""
        ingredients = [record.ingredient for record in self.records.values()]
        checkpoints = [*ingredients, *(ingredient.base for ingredient in ingredients if ingredient.base)]
        models = [checkpoint.repo_id for checkpoint in checkpoints if checkpoint.repo_id]
        if any(ingredient.repo_id for ingredient in ingredients):  # those that were left out may be on the Hub, too
            left_out = (name.partition("@")[0].partition(":")[0] for name, _ in self.latest.remarks)
            models += [name for name in left_out if is_repo_id(name) and not Path(name).exists()]
        processors = (str(ingredient.image_processor or "").partition("@") for ingredient in ingredients)
        models += [name for name, revision, _ in processors if revision and is_repo_id(name)]
        data = self.manifest.data
        return [*((name, "model") for name in models), *([(data.name, "dataset")] if data.revision else [])]


def push_bank(bank: PublishedBank, repo_id: str, options: PushOptions) -> CommitInfo:
    """Upload a bank as a dataset repository in one commit.

    Raises:
        ValueError: if the id is none, or the token may not write there.
    """
    refuse_offline(repo_id, "Push it later: `LogitBank.open(folder).push_to_hub(id)`.")
    local = [record.ingredient.id for record in bank.records.values() if record.ingredient.repo_id is None]
    if local:
        logger.warning(
            "%d of %d checkpoints are not on the Hub (%s, ...): others can search recipes of them, but cook none.",
            len(local),
            len(bank.records),
            local[0],
        )
    if not is_private(repo_id, options) and (names := hidden_repositories(bank.repositories(), options.token)):
        logger.warning("The bank names what is private, and everybody can read it: %s.", ", ".join(names))
    return commit_files(repo_id, bank.files(repo_id), options)


def fetch_bank(repo_id: str, home: Path, *, revision: str | None, token: str | bool | None) -> Path:
    """A bank on the Hub as a folder among the banks of `home`.

    Raises:
        ValueError: if there is no such repository, or no bank in it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
    from huggingface_hub import try_to_load_from_cache as find_cached
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing = f"There is no folder {repo_id!r} here and no such dataset on the Hub"
    with asking_the_hub(f"The bank {repo_id}", revision=revision, missing=missing):
        options = {"repo_type": "dataset", "revision": revision, "token": token}
        where = {"repo_type": "dataset", "revision": revision}
        try:
            if not constants.HF_HUB_OFFLINE and not isinstance(find_cached(repo_id, BANK, **where), str):
                # without a cached file, a download would be tried for six minutes where a Hub does not answer
                get_hf_file_metadata(hf_hub_url(repo_id, BANK, **where), token=token)
            hf_hub_download(repo_id, BANK, **options)
        except LocalEntryNotFoundError:  # the Hub could not be asked
            raise
        except EntryNotFoundError as error:
            raise ValueError(f"The dataset {repo_id} is not a logit bank: it has no {BANK}.") from error
        snapshot = Path(snapshot_download(repo_id, allow_patterns=list(PATTERNS), **options))
    folder = home / "banks" / digest(repo_id, snapshot.name)
    with lock(folder.with_suffix(".lock"), f"taking over the bank {repo_id}"):
        if not folder.exists():
            write_folder(folder, lambda new: _adopt(snapshot, new, f"{repo_id}@{snapshot.name}"))
    return folder


def check_bank_files(folder: Path, origin: str) -> tuple[BankManifest, Latest, dict[str, LogitsRecord]]:
    """What a bank says of itself, of its last computation, and of each of its ingredients by key.

    Args:
        folder: with `bank.json`, `latest.json`, the logits and their records.
        origin: what it is called in an error.

    Raises:
        ValueError: if a file is missing or broken, or says what can't be true.
    """
    try:
        manifest = from_json(BankManifest, _read(folder / BANK))
        latest = from_json(Latest, _read(folder / LATEST))
        problem = next(_problems(manifest, latest), None)
        records: dict[str, LogitsRecord] = {}
        if problem is None:
            records = {key: from_json(LogitsRecord, _read(folder / "logits" / f"{key}.json")) for key in latest.keys}
            problem = next(_record_problems(manifest, records), None)
        if problem is None:
            problem = next(_array_problems(folder, manifest, list(records)), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError) as error:
        raise ValueError(f"The dataset {origin} is not a logit bank: {error!r}") from error
    if problem is not None:
        raise ValueError(f"The dataset {origin} is not a logit bank: {problem}.")
    return manifest, latest, records


def _adopt(snapshot: Path, folder: Path, origin: str) -> None:
    """Write the same bank into another folder. The places that it names are its author's: nothing is read there.

    Raises:
        ValueError: if it is none, or not what it says it is.
    """
    pixels = {name: f"../../pixels/{digest(origin, name)}" for name in ("images", "statistics")}
    manifest, latest, records = check_bank_files(snapshot, origin)
    dataset = manifest.data.name if manifest.data.revision else OBJECT
    manifest = replace(manifest, origin=origin, dataset=dataset, pixels=pixels["images"])
    if latest.statistics is not None:
        latest = replace(latest, statistics=replace(latest.statistics, pixels=pixels["statistics"]))
    names = [*_arrays(snapshot), *(f"logits/{key}.npy" for key in records)]
    hashes = dict(zip(names, sha256_of_each([snapshot / name for name in names]), strict=True))
    published = manifest.arrays | {f"logits/{key}.npy": record.sha256 for key, record in records.items()}
    for name, sha256 in hashes.items():
        if sha256 is None or published.get(name, sha256) not in (sha256, None):  # an earlier version published none
            raise ValueError(
                f"{(snapshot / name).resolve()} is not the {name} that was published as {origin}, by its SHA-256. "
                "Remove it: then it is downloaded again."
            )
    key = digest(origin)
    arrays = {name: str(hashes[name]) for name in _arrays(snapshot)}
    replace(manifest, key=key, arrays=arrays).write(folder)
    latest.write(folder, key)
    for name, record in records.items():
        sha256 = hashes[f"logits/{name}.npy"]
        replace(record, ingredient=_without_places(record.ingredient), sha256=sha256).write(folder, key, name)
    for name in names:
        try:
            os.symlink((snapshot / name).resolve(), folder / name)
        except OSError:  # a system without links
            shutil.copy(snapshot / name, folder / name)


def _arrays(folder: Path) -> list[str]:
    """The files that say of each sample what it is; digests are not always known."""
    return ["ids.npy", "labels.npy", *([DIGESTS] if (folder / DIGESTS).exists() else [])]


def _without_places(record: IngredientRecord) -> IngredientRecord:
    """What a bank of the Hub says of an ingredient, without the places where its author had it."""
    return replace(
        record,
        folder=record.folder if record.repo_id is None else "",
        processor_folder=None,
        base=record.base and _without_places(record.base),
    )


def _public(record: IngredientRecord) -> IngredientRecord:
    """What a published bank says of an ingredient: of paths, the last two folders."""
    return replace(
        record,
        id=shown(record.id),
        folder=shown(record.folder) if record.repo_id is None else "",
        processor_folder=None,
        image_processor=record.image_processor and shown(record.image_processor),
        base=record.base and _public(record.base),
    )


def _json(record: Any) -> bytes:
    return json.dumps(to_json(record), indent=2).encode()


def _read(path: Path) -> Any:
    content = read_json(path)
    unprintable = next((text for text in _texts(content) if not text.isprintable()), None)
    if unprintable is not None:  # such letters can do things to a terminal
        raise ValueError(f"{path.name} holds {unprintable[:50]!r}")
    return content


def _problems(manifest: BankManifest, latest: Latest) -> Iterator[str]:
    """What can't be true of a bank."""
    from huggingface_hub.utils import validate_repo_id

    for name, values in _RUN_VALUES.items():
        if getattr(manifest.run, name) not in values:
            yield f"its {name!r} is {str(getattr(manifest.run, name))[:100]!r}"
    for name in ("samples", "batch_size", "block_size"):
        if not _is_count(getattr(manifest, name)):
            yield f"its {name!r} is {getattr(manifest, name)!r}"
    if not manifest.classes:
        yield "it has no classes"
    if manifest.pilot is not None or manifest.chosen or manifest.rows != manifest.samples:
        yield "it is of a part of its split only"
    if manifest.data.revision:
        validate_repo_id(manifest.data.name)
    if sum(count for _, _, count in manifest.blocks) != manifest.samples:
        yield f"its blocks don't hold {manifest.samples} samples"
    if len(set(latest.keys)) != len(latest.keys) or len(latest.keys) < 2:
        yield "it does not list two ingredients or more, each once"
    if any(not key.isalnum() for key in latest.keys):
        yield "it lists an ingredient by a name that is no key"
    if latest.statistics is not None:
        record = latest.statistics.record
        if not _is_count(latest.statistics.size):
            yield f"its BatchNorm statistics have batches of {latest.statistics.size!r}"
        if not (_is_count(record.images) and _is_count(record.used)):
            yield f"its BatchNorm statistics come from {record.used!r} of {record.images!r} images"
        if record.seed < 0 or record.on_error not in _RUN_VALUES["on_error"]:
            yield f"its BatchNorm statistics have the seed {record.seed!r} and on_error={record.on_error[:100]!r}"


def _record_problems(manifest: BankManifest, records: Mapping[str, LogitsRecord]) -> Iterator[str]:
    """What can't be true of its ingredients."""
    for key, record in records.items():
        ingredient = record.ingredient
        for checkpoint in filter(None, (ingredient, ingredient.base)):
            parts = [checkpoint.subfolder, checkpoint.repo_id or "", checkpoint.revision]
            if any(".." in part or part.startswith(("/", "\\")) for part in parts):
                yield f"its ingredient {checkpoint.id!r} is in no repository"
        if record.seconds is not None and not 0 <= record.seconds < LONGEST:
            yield f"its ingredient {ingredient.id!r} took {str(record.seconds)[:100]} seconds"
        if record.device is not None and len(record.device) >= 200:
            yield f"its ingredient {ingredient.id!r} was run on {record.device[:100]}"
        if ingredient.labels != manifest.classes:
            yield f"its ingredient {ingredient.id!r} has other classes than it"
        if not is_selection(ingredient.order, len(manifest.classes), ingredient.left_out):
            yield f"its ingredient {ingredient.id!r} has classes in the order {str(ingredient.order)[:100]}"
        if not record.finite or ingredient.load().key != key:
            yield f"its ingredient {ingredient.id!r} is not what it is filed under"


def _array_problems(folder: Path, manifest: BankManifest, keys: Sequence[str]) -> Iterator[str]:
    """What does not fit its manifest in its arrays."""
    samples, classes, dtype = manifest.samples, len(manifest.classes), manifest.run.logits_dtype
    ids, labels = (open_array(folder / f"{name}.npy") for name in ("ids", "labels"))
    whole = [("ids", ids)] if manifest.multi_label else [("ids", ids), ("labels", labels)]
    if manifest.multi_label and (labels.shape != (samples, classes) or labels.dtype != bool):
        yield f"labels.npy is {labels.dtype} {labels.shape}, not bool {(samples, classes)}"
    for name, array in whole:
        if array.shape != (samples,) or array.dtype.kind not in "iu":
            yield f"{name}.npy is {array.dtype} {array.shape}, not whole numbers ({samples},)"
    if (folder / DIGESTS).exists():
        digests = open_array(folder / DIGESTS)
        if digests.shape != (samples,) or digests.dtype != DTYPE:
            yield f"{DIGESTS} is {digests.dtype} {digests.shape}, not {DTYPE} ({samples},)"
    is_outside = not manifest.multi_label and bool((labels < 0).any() or (labels >= classes).any())
    if (np.diff(ids) <= 0).any() or is_outside:
        yield "its ids do not rise, or its labels are not among its classes"
    for key in keys:
        logits = open_array(logits_path(folder, key))
        if logits.shape != (samples, classes) or logits.dtype != dtype:
            yield f"logits/{key}.npy is {logits.dtype} {logits.shape}, not {dtype} {(samples, classes)}"
        if not logits.flags.c_contiguous:
            yield f"logits/{key}.npy is stored by columns"
        for start in range(0, samples, AT_ONCE):
            if not np.isfinite(logits[start : start + AT_ONCE]).all():
                yield f"logits/{key}.npy has NaN or infinite logits"


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _texts(name)
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _is_count(value: int) -> bool:
    return 1 <= value < LARGEST


def _card(
    manifest: BankManifest, ingredients: Sequence[IngredientRecord], scores: Sequence[float], repo_id: str
) -> str:
    """What a visitor of the repository reads."""
    from huggingface_hub import DatasetCardData

    data, run = manifest.data, manifest.run
    metadata = DatasetCardData(
        pretty_name=f"Logits of {len(ingredients)} image classifiers",
        task_categories=["image-classification"],
        tags=["model-soup", "logits", "hf-radin", "arxiv:2401.17790"],
        source_datasets=[data.name] if data.revision else None,
        viewer=False,
    )
    configuration = f", configuration {escape(data.config_name)}" if data.config_name else ""
    place = f"the folder {escape(data.name)} of its author"
    if data.revision:
        link = f"[{escape(data.name)}]({hub_address(data.name, 'dataset')})"
        place = f"{link}{configuration}, commit `{escape(data.revision)}`"
    rows = [
        f"| {_linked(ingredient)} | `{escape(ingredient.revision)}` | {percent(score)} |"
        for ingredient, score in zip(ingredients, scores, strict=True)
    ]
    labels = " (multi-label: bool) too" if manifest.multi_label else ""
    precision = run.dtype + ("" if run.mixed_precision == "no" else f", autocast {run.mixed_precision}")
    return f"""---
{metadata}
---

# Logits of {len(ingredients)} image classifiers

What each of these checkpoints says of {manifest.samples} images in {len(manifest.classes)} classes: raw logits, stored
in {escape(run.logits_dtype)}, computed in {escape(precision)} with hf_radin {escape(manifest.hf_radin)}. The
images are those of {place}, split {escape(data.split)}. They are not here; their labels are.

| checkpoint | revision | {"share of right decisions" if manifest.multi_label else "accuracy"} |
|---|---|---:|
{chr(10).join(rows)}

## Use

Recipes of [model soups](https://arxiv.org/abs/2203.05482) can be scored by their ensembles
([RADIN](https://arxiv.org/abs/2401.17790)), without the images and without running a model:

```python
import hf_radin

bank = hf_radin.LogitBank.from_hub("{repo_id}")
# estimated, not measured; a budget above 0 needs images and checkpoints
soup = hf_radin.radin(bank, budget=0, unmeasured=True)
print(soup.recipe)
```

`logits/*.npy` are arrays `(samples, classes)`, `labels.npy`{labels}, `ids.npy` and `digests.npy` (of the bytes of the
image files, to find images that two splits share) `(samples,)`, all of them plain NumPy files.
"""


def _linked(ingredient: IngredientRecord) -> str:
    name = escape(ingredient.id)
    return f"[{name}]({hub_address(ingredient.repo_id)})" if ingredient.repo_id else name
