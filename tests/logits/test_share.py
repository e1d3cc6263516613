"""Of somebody else's bank nothing is believed that was not looked at."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hf_radin.ingredients.ingredient import to_record
from hf_radin.logits import bank_files
from hf_radin.logits import share as foreign
from hf_radin.logits import share as sharing


@pytest.fixture(scope="module")
def whole(bank, tmp_path_factory) -> Path:
    """A bank as it is pushed."""
    folder = tmp_path_factory.mktemp("pushed")
    latest = {"keys": list(bank.ingredients.keys), "remarks": [], "statistics": None}
    records = [{**to_record(one), "finite": True} for one in bank.ingredients]
    files = sharing.public_files(bank.folder, bank.about, latest, records, [0.5] * 5, "org/bank")
    for name, content in files.items():
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
    with pytest.raises(ValueError, match="The dataset org/bank is no logit bank: ") as error:
        foreign.check_bank_files(folder, "org/bank")
    assert str(error.value).isprintable()
    return str(error.value)


def test_a_bank_as_it_is_pushed_is_believed(whole, bank):
    about, latest, records = foreign.check_bank_files(whole, "org/bank")
    assert about["samples"] == 600 and list(records) == latest["keys"] == list(bank.ingredients.keys)


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
    ],
)
def test_labels_and_ids_that_can_not_be_are_refused(folder, name, change):
    np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))
    refused(folder)


@pytest.mark.parametrize("name", [*foreign._ABOUT, *(f"data {name}" for name in foreign._DATA)])
def test_what_it_says_of_itself_is_looked_at(folder, name):
    path, content = folder / "bank.json", json.loads((folder / "bank.json").read_text())
    where = content["data"] if name.startswith("data ") else content
    key = name.removeprefix("data ")
    for value in ({"odd": -5} if key != "processor" else -5, [["a"]], "\x1b[2J", -(10**30), ...):
        spoilt = {one: bank_files for one, bank_files in where.items() if one != key} | (
            {} if value is ... else {key: value}
        )
        path.write_text(json.dumps({**content, "data": spoilt} if where is not content else spoilt))
        refused(folder)


def spoil(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["data"].update(name="/etc", revision="a" * 40),
        lambda about: about["data"].update(name="..", revision="a" * 40),
        lambda about: about.update(blocks=[[0, 0, 10**9]]),
        lambda about: about["classes"].reverse(),
        lambda about: about.update(classes=["a"] * 10),
        lambda about: about.update(samples=10**30),
    ],
)
def test_data_that_can_not_be_are_refused(folder, change):
    spoil(folder / "bank.json", change)
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda latest: latest.update(keys=latest["keys"][:1]),
        lambda latest: latest.update(keys=latest["keys"][:1] * 3),
        lambda latest: latest.update(keys=["../../../etc", *latest["keys"]]),
        lambda latest: latest.update(keys=None),
        lambda latest: latest.update(statistics={}),
        lambda latest: latest.update(statistics={"about": {}, "size": 64}),
        lambda latest: latest.update(statistics={"about": {}, "size": 0}),
        lambda latest: latest.update(remarks=[["a"]]),
        lambda latest: latest.pop("remarks"),
    ],
)
def test_a_list_of_ingredients_that_is_none_is_refused(folder, change):
    spoil(folder / bank_files.LATEST, change)
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(id="\x1b]0;owned\x07"),
        lambda record: record.update(revision="../../../../etc"),
        lambda record: record.update(subfolder="../../other"),
        lambda record: record.update(repo_id="/etc"),
        lambda record: record.update(repo_id="org/other"),
        lambda record: record.update(labels=None),
        lambda record: record["labels"].reverse(),
        lambda record: record.update(order=[0] * 10),
        lambda record: record.update(finite="no"),
        lambda record: record.update(seconds=-1),
        lambda record: record.update(seconds=10**400),
        lambda record: record.update(seconds=1e300),
        lambda record: record.update(device="x" * 1000),
        lambda record: record.update(seconds=float("nan")),
        lambda record: record.update(seconds="1"),
        lambda record: record.update(device=["CPU"]),
        lambda record: record.pop("revision"),
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
