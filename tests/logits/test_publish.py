"""Of somebody else's bank nothing is believed that was not looked at."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hf_radin.logits import publish
from hf_radin.logits.manifest import LATEST


@pytest.fixture(scope="module")
def whole(bank, tmp_path_factory) -> Path:
    """A bank as it is pushed."""
    folder = tmp_path_factory.mktemp("pushed")
    for name, content in bank.published().files("org/bank").items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "bank"))


def first(folder: Path, ending: str) -> Path:
    return sorted((folder / "logits").glob(f"*{ending}"))[0]


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match="The dataset org/bank is not a logit bank: ") as error:
        publish.check_bank_files(folder, "org/bank")
    assert str(error.value).isprintable()
    return str(error.value)


def test_a_bank_as_it_is_pushed_is_believed(whole, bank):
    manifest, latest, records = publish.check_bank_files(whole, "org/bank")
    assert manifest.samples == 600 and tuple(records) == latest.keys == bank.ingredients.keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array[:-1], r"(599, 10), not float32 (600, 10)"),
        (lambda array: np.array([{}] * len(array), dtype=object), "Python objects in dtype"),
        (lambda array: np.asfortranarray(array), "is stored by columns"),
        (lambda array: array.astype(np.int8), "is int8"),
        (lambda array: array.astype(str), "is <U"),
        (lambda array: array.astype(np.float16), "is float16"),
        (lambda array: array.astype(complex), "is complex"),
        (lambda array: array * np.where(np.arange(600) == 7, np.nan, 1)[:, None].astype("f4"), "NaN or infinite"),
    ],
)
def test_logits_that_are_none_are_refused(folder, change, message):
    path = first(folder, ".npy")
    np.save(path, change(np.load(path)), allow_pickle=True)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labels", lambda array: array[:-1]),
        ("labels", lambda array: array + 1),
        ("labels", lambda array: array - 5),
        ("labels", lambda array: array.astype(np.float32)),
        ("ids", lambda array: array * 0),
        ("ids", lambda array: array[::-1]),
        ("digests", lambda array: array[:-1]),
        ("digests", lambda array: array.astype("S8")),
    ],
)
def test_labels_ids_and_digests_that_can_not_be_are_refused(folder, name, change):
    np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))
    refused(folder)


FIELDS = [
    *("classes", "samples", "batch_size", "block_size", "skipped", "rows", "blocks", "pixels", "hf_radin"),
    *("data name", "data split", "data key", "data image_column", "data label_column", "data config_name"),
    *("data revision", "run processor", "run dtype", "run logits_dtype", "run mixed_precision", "run channels_last"),
    *("run torch_compile", "run on_error"),
]
# What may be left out.
OPTIONAL = {"data key", "data image_column", "data label_column", "data config_name", "data revision"}


@pytest.mark.parametrize("name", FIELDS)
def test_what_it_says_of_itself_is_looked_at(folder, name):
    path, content = folder / "bank.json", json.loads((folder / "bank.json").read_text())
    *inner, field = name.split()
    for value in ({"odd": -5} if field != "processor" else -5, [["a"]], "\x1b[2J", -(10**30), ...):
        if value is ... and name in OPTIONAL:
            continue
        fields = content[inner[0]] if inner else content
        spoilt = {key: entry for key, entry in fields.items() if key != field}
        spoilt |= {} if value is ... else {field: value}
        path.write_text(json.dumps({**content, inner[0]: spoilt} if inner else spoilt))
        refused(folder)


def spoil(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["data"].update(name="/etc", revision="a" * 40),
        lambda manifest: manifest["data"].update(name="..", revision="a" * 40),
        lambda manifest: manifest.update(blocks=[[0, 0, 10**9]]),
        lambda manifest: manifest["classes"].reverse(),
        lambda manifest: manifest.update(classes=["a"] * 10),
        lambda manifest: manifest.update(samples=10**30),
        lambda manifest: manifest.update(classes=[]),
        lambda manifest: manifest["run"].update(on_error="ignore"),
        lambda manifest: manifest["run"].update(mixed_precision="int4"),
    ],
)
def test_data_that_can_not_be_are_refused(folder, change):
    spoil(folder / "bank.json", change)
    refused(folder)


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, 0, "have batches of 0"),
        ({}, 10**30, "have batches of"),
        ({"images": 0}, 64, "come from 64 of 0 images"),
        ({"used": -1}, 64, "come from -1 of 128 images"),
        ({"seed": -1}, 64, "have the seed -1"),
        ({"on_error": "ignore"}, 64, "on_error='ignore'"),
    ],
)
def test_statistics_that_can_not_be_are_refused(folder, fields, size, message):
    record = {"data": "a", "split": "train", "images": 128, "seed": 0, "on_error": "raise", "used": 64, "key": "b"}
    spoil(folder / LATEST, lambda latest: latest.update(statistics={"record": record, "size": 64, "pixels": ""}))
    publish.check_bank_files(folder, "org/bank")
    record |= fields
    spoil(folder / LATEST, lambda latest: latest.update(statistics={"record": record, "size": size, "pixels": ""}))
    assert message in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda latest: latest.update(keys=latest["keys"][:1]),
        lambda latest: latest.update(keys=latest["keys"][:1] * 3),
        lambda latest: latest.update(keys=["../../../etc", *latest["keys"]]),
        lambda latest: latest.update(keys=None),
        lambda latest: latest.update(statistics={}),
        lambda latest: latest.update(statistics={"record": {}, "size": 64, "pixels": ""}),
        lambda latest: latest.update(statistics={"record": {}, "size": 0, "pixels": ""}),
        lambda latest: latest.update(remarks=[["a"]]),
        lambda latest: latest.pop("remarks"),
    ],
)
def test_a_list_of_ingredients_that_is_none_is_refused(folder, change):
    spoil(folder / LATEST, change)
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["ingredient"].update(id="\x1b]0;owned\x07"),
        lambda record: record["ingredient"].update(revision="../../../../etc"),
        lambda record: record["ingredient"].update(subfolder="../../other"),
        lambda record: record["ingredient"].update(repo_id="/etc"),
        lambda record: record["ingredient"].update(repo_id="org/other"),
        lambda record: record["ingredient"].update(labels=None),
        lambda record: record["ingredient"]["labels"].reverse(),
        lambda record: record["ingredient"].update(order=[0] * 10),
        lambda record: record.update(finite="no"),
        lambda record: record.update(seconds=-1),
        lambda record: record.update(seconds=10**400),
        lambda record: record.update(seconds=1e300),
        lambda record: record.update(device="x" * 1000),
        lambda record: record.update(seconds=float("nan")),
        lambda record: record.update(seconds="1"),
        lambda record: record.update(device=["CPU"]),
        lambda record: record["ingredient"].pop("revision"),
    ],
)
def test_an_ingredient_that_can_not_be_is_refused(folder, change):
    spoil(first(folder, ".json"), change)
    refused(folder)


@pytest.mark.parametrize("file", ["bank.json", "latest.json", "labels.npy", "ids.npy", "record", "logits"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{"])
def test_a_file_that_is_gone_or_broken_is_refused(folder, file, content):
    path = {"record": first(folder, ".json"), "logits": first(folder, ".npy")}.get(file, folder / file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(folder)
