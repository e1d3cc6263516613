"""Which files make a split is said by the first folder level, or by a file's own name, and by nothing else in a path.

datasets#7201 and #5650: it looks for the words of splits anywhere.
"""

import json

import datasets
import numpy as np
import pytest
from shared.training import NAMES, digit_images, image_dataset

import hf_radin
from hf_radin.images.split import DataSource, count_rows, open_split
from hf_radin.images.split_files import find_splits


def pictures(folder, *paths: str):
    """Images of which no two are alike, at paths below a folder."""
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        digit_images(slice(number, number + 1))[0][0].save(folder / path)
    return folder


def tables(folder, *paths: str):
    """Parquet files of two images each."""
    for path in paths:
        image_dataset(*digit_images(slice(0, 2))).to_parquet(folder / path)
    return folder


def rows_of(folder) -> dict[str, int]:
    """How many rows each split has: by reading them, and by counting them without."""
    splits = find_splits(folder.resolve()).patterns
    opened = {name: open_split(DataSource(folder, name, labelled=False)) for name in splits}
    counts = {name: sum(1 for _ in split.rows) for name, split in opened.items()}
    assert {name: count_rows(split) for name, split in opened.items()} == counts
    return counts


def test_a_class_called_test_and_an_image_called_so_stay_where_they_are(tmp_path):
    classes = ("pass", "test")
    paths = [f"validation/{name}/img_test_{number}.png" for name in classes for number in range(2)]
    paths += [f"test/{name}/{number}.png" for name in classes for number in range(1)]
    for folder in (tmp_path / "data", tmp_path / "test" / "train-data [val]"):
        assert rows_of(pictures(folder, *paths)) == {"validation": 4, "test": 2}
        assert open_split(DataSource(folder)).class_names == classes


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("training", "dev", "testing"), {"train": 1, "validation": 1, "test": 1}),
        (("train", "valid", "eval"), {"train": 1, "validation": 1, "test": 1}),
        (("train", "val"), {"train": 1, "validation": 1}),
        (("train_images", "images-val"), {"train": 1, "validation": 1}),
        (("Train", "Validation", "TEST"), {"train": 1, "validation": 1, "test": 1}),
        (("test_tube", "beaker"), {"train": 2}),
    ],
)
def test_folders_are_called_as_datasets_calls_splits(tmp_path, names, splits):
    assert rows_of(pictures(tmp_path / "data", *(f"{name}/cat/1.png" for name in names))) == splits
    wrapped = pictures(tmp_path / "wrapped", *(f"images/{name}/cat/1.png" for name in names))
    assert rows_of(wrapped) == splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("data/validation-00000-of-00002.parquet", "data/validation-00001-of-00002.parquet"), {"validation": 4}),
        (("data/fold_1-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"), {"train": 2, "fold_1": 2}),
        (("validation.parquet", "my-test.parquet"), {"validation": 2, "test": 2}),
        (("validation/0.parquet", "validation/test/1.parquet", "test/0.parquet"), {"validation": 4, "test": 2}),
        (("a/0.parquet", "b/1.parquet"), {"train": 4}),
    ],
)
def test_files_are_called_so_too(tmp_path, names, splits):
    assert rows_of(tables(tmp_path / "test", *names)) == splits


def test_files_that_are_no_data_are_not_read_as_such(tmp_path, caplog):
    folder = tables(tmp_path / "data", "validation/0.parquet", "test/0.parquet")
    for name in ("validation/checksums.txt", "LICENSE", "test/.hidden.parquet", "README.md"):
        (folder / name).write_text("---\nlicense: mit\n---\n")
    assert rows_of(folder) == {"validation": 2, "test": 2} and not caplog.text


@pytest.mark.parametrize(
    ("make", "paths", "left_out"),
    [
        (pictures, ("validation/cat/1.png", "unlabelled/1.png", "other/1.png"), "other, unlabelled: in no folder"),
        (tables, ("validation.parquet", "train_test.parquet"), "train_test.parquet: in no folder of a split, and"),
        (tables, ("validation/0.parquet", "extra.parquet"), "extra.parquet: in no"),
        (tables, ("data/validation/0.parquet", "notes/extra.csv"), "notes: in no"),
    ],
)
def test_what_belongs_to_no_split_is_said(tmp_path, caplog, make, paths, left_out):
    assert rows_of(make(tmp_path / "data", *paths)).keys() == {"validation"}
    assert left_out in caplog.text


def test_two_folders_of_one_split_are_said(tmp_path, caplog):
    assert rows_of(pictures(tmp_path / "data", "val/a/1.png", "validation/b/1.png")) == {"validation": 2}
    assert "The folders val and validation are both taken as the split 'validation'." in caplog.text


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_in_the_folder_of_a_split_is_read(tmp_path, suffix):
    folder = pictures(tmp_path / "data", *(f"{split}/{at}.png" for split in ("val", "test") for at in range(2)))
    for split in ("val", "test"):
        rows = [{"file_name": f"{at}.png", "label": NAMES[at]} for at in range(2)]
        lines = [json.dumps(row) for row in rows] if suffix == "jsonl" else ["file_name,label"]
        lines += [] if suffix == "jsonl" else [",".join(row.values()) for row in rows]
        (folder / split / f"metadata.{suffix}").write_text("\n".join(lines) + "\n")
    assert [row["label"] for row in open_split(DataSource(folder)).rows] == NAMES[:2]
    assert rows_of(folder) == {"validation": 2, "test": 2}


def test_metadata_of_all_images_is_read_where_there_is_one_split_and_else_told(tmp_path, caplog):
    lines = "file_name,label\n" + "".join(f"val/{at}.png,{NAMES[at]}\n" for at in range(2))
    flat = pictures(tmp_path / "flat", "0.png", "1.png")
    (flat / "metadata.csv").write_text(lines.replace("val/", ""))
    assert [row["label"] for row in open_split(DataSource(flat, "train")).rows] == NAMES[:2] and not caplog.text
    split = pictures(tmp_path / "split", "val/0.png", "val/1.png", "test/0.png")
    (split / "metadata.csv").write_text(lines)
    with pytest.raises(
        ValueError, match=r"lie in the folders of its splits, .* metadata\.csv with file_name and label"
    ):
        open_split(DataSource(split))
    assert "metadata.csv: in no folder of a split" in caplog.text
    assert "Of metadata.csv, put one into the folder of each split" in caplog.text


@pytest.mark.parametrize(("card", "ends"), [("README.md", "---\n"), (".huggingface.yaml", "")])
def test_a_card_that_lists_files_is_asked_and_so_is_what_datasets_saved(tmp_path, card, ends):
    folder = tables(tmp_path / "data", "a/test.parquet", "b/x.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {path}\n"
        for name, path in {"first": "a/test.parquet", "second": "b/*"}.items()
    )
    (folder / card).write_text(f"{ends}configs:\n{configs}{ends}")
    for name in ("first", "second"):
        split = open_split(DataSource(folder, config_name=name))
        assert count_rows(split) == sum(1 for _ in split.rows) == 2
    with pytest.raises(ValueError, match=r"\['first', 'second'\].*Name one with config_name \(--dataset-config\)"):
        open_split(DataSource(folder))
    datasets.DatasetDict(fold=image_dataset(*digit_images(slice(0, 3)))).save_to_disk(tmp_path / "saved")
    assert count_rows(open_split(DataSource(tmp_path / "saved", "fold"))) == 3


def test_the_bank_has_the_images_of_the_folder(runs, tmp_path):
    folder = pictures(
        tmp_path / "data", *(f"validation/{name}/test_{at}.png" for name in NAMES[:2] for at in range(3))
    )
    pictures(folder, "train/zero/1.png", "train/one/1.png")
    bank = hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), folder, cache_dir=tmp_path / "cache")
    assert np.bincount(bank.labels).tolist() == [3, 3]


def test_a_class_called_like_a_split_without_splits_around_it_is_asked_about(tmp_path):
    folder = pictures(tmp_path / "data", "bus/0.png", "car/1.png", "train/2.png")
    with pytest.raises(
        ValueError, match=r"The folder 'train' is called like a split .* as bus, car do: if it is a cl"
    ):
        open_split(DataSource(folder, "train"))
    around = pictures(tmp_path / "around", "validation/bus/0.png", "validation/train/1.png")
    assert rows_of(around) == {"validation": 2}
