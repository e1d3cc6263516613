"""Labels mean a class by name, or by number where that is told; where two could be meant, nobody guesses."""

import datasets
import numpy as np
import pandas as pd
import pytest
from shared.training import NAMES, digit_images

import hf_radin
from hf_radin.images.split import DataSource, open_split
from hf_radin.ingredients import labels

COUNT = 4


def labelled(values: list, feature=None, **others) -> datasets.Dataset:
    """As many digits as there are labels of one type, with the columns of `others` (a feature and its values) too."""
    columns = {"label": (feature, values), **others}
    images = datasets.Dataset.from_dict({"image": digit_images(slice(0, len(values)))[0]})
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": images["image"]}
    for name, (kind, content) in columns.items():
        features[name] = kind or datasets.Dataset.from_dict({name: content}).features[name]
        rows[name] = content
    return datasets.Dataset.from_dict(rows, features=features)


def indices(dataset, classes, **options) -> list[int]:
    labels.warn_once.cache_clear()
    split = open_split(DataSource({"validation": dataset}, **options))
    to_class = labels.match_labels(split, tuple(classes))
    return [labels.label_of(row[split.label_column], number, split, to_class) for number, row in enumerate(split.rows)]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("False", "True"), [1, 0]),
        (("true", "false"), [0, 1]),
        (("maybe", "TRUE", "FALSE"), [1, 2]),
        (("1", "0"), [0, 1]),
        (("LABEL_0", "LABEL_1"), [1, 0]),
        (("LABEL_1", "LABEL_0"), [0, 1]),
    ],
)
def test_booleans_are_matched_by_name_or_by_the_number_that_is_a_name(classes, expected, caplog):
    assert indices(labelled([True, False]), classes) == expected
    by_name = {"true", "false"} <= {name.casefold() for name in classes}
    assert ("are booleans: False is taken as" in caplog.text) != by_name


@pytest.mark.parametrize("classes", [("cat", "dog"), ("0", "1", "2"), ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_booleans_are_never_positions(classes):
    with pytest.raises(ValueError, match=rf"are booleans, and the models know {classes[0]}, .*label_column"):
        indices(labelled([True, False]), classes)


def test_a_gap_among_booleans_is_named_with_its_sample():
    with pytest.raises(ValueError, match=r"Sample 1 of .* has the label None, which the models don't know"):
        indices(labelled([True, None, False]), ("False", "True"))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float32", "float64"])
def test_whole_numbers_are_positions_and_that_is_said_once(dtype, caplog):
    dataset = labelled([2, 0, 1], datasets.Value(dtype))
    assert indices(dataset, ("ant", "bee", "cat")) == [2, 0, 1]
    split = open_split(DataSource({"validation": dataset}))
    labels.match_labels(split, ("ant", "bee", "cat"))
    assert caplog.text.count("are numbers: 0 is taken as 'ant', 1 is taken as 'bee', 2 is taken as 'cat'.") == 1


def test_numbers_as_pandas_makes_them_are_numbers(caplog):
    assert indices(labelled([1.0, 0.0], datasets.Value("float64")), ("1.0", "0.0")) == [0, 1]
    assert indices(labelled(["1.0", "0.0"]), ("1", "0")) == [0, 1]
    assert not caplog.text  # they are called so


@pytest.mark.parametrize("classes", [("0", "1", "2"), ("2", "0", "1"), ("LABEL_2", "LABEL_0", "LABEL_1")])
def test_numbers_mean_the_classes_that_are_called_by_them(classes, caplog):
    expected = [[name[-1] for name in classes].index(text) for text in "012"]
    assert indices(labelled([0, 1, 2]), classes) == expected
    assert indices(labelled(["0", "1", "2"]), classes) == expected
    assert not caplog.text


def test_numbers_of_classes_called_true_and_false_are_taken_where_both_readings_agree():
    assert indices(labelled([1, 0]), ("False", "True")) == [1, 0]
    with pytest.raises(ValueError, match="whether 1 means the class that is true or the second one can't be told"):
        indices(labelled([1, 0]), ("True", "False"))


@pytest.mark.parametrize("value", [None, float("nan"), 0.5, -1, 3])
def test_what_is_no_whole_number_of_a_class_is_named_with_its_sample(value):
    dataset = labelled([0, 1, value, 2], datasets.Value("float64"))
    with pytest.raises(ValueError, match=r"Sample 2 of .* has the label .*, which the models don't know"):
        indices(dataset, ("ant", "bee", "cat"))


def test_strings_of_digits_are_numbers_where_no_class_is_called_so(caplog):
    assert indices(labelled(["1", "0", "2"]), ("ant", "bee", "cat")) == [1, 0, 2]
    assert "are numbers: 0 is taken as 'ant'" in caplog.text


def test_a_column_of_names_holds_no_numbers():
    with pytest.raises(ValueError, match=r"Sample 1 of .* has the label '1', which"):
        indices(labelled(["bee", "1"]), ("ant", "bee"))
    with pytest.raises(ValueError, match=r"Sample 1 of .* has the label 'bee', which"):
        indices(labelled(["1", "bee"]), ("ant", "bee"))


def test_where_some_classes_are_called_by_numbers_a_string_is_a_name_or_asked_about():
    assert indices(labelled(["911", "beetle"]), ("beetle", "911")) == [1, 0]
    with pytest.raises(ValueError, match="some of the models' classes are called by numbers and others are not"):
        indices(labelled(["1", "0"]), ("beetle", "911"))


def test_two_classes_of_one_number_are_asked_about():
    with pytest.raises(ValueError, match="several of the models' classes are called by that of '01'"):
        indices(labelled([1, 2]), ("01", "1", "2"))


TWICE = ("crane", "dog", "crane")  # as ImageNet has it: a bird, and a machine


def test_two_classes_of_one_name_are_told_apart_by_number_only():
    assert indices(labelled([2, 0, 1]), TWICE) == [2, 0, 1]
    assert indices(labelled(["dog", "dog"]), TWICE) == [1, 1]
    named = labelled([0, 1], datasets.ClassLabel(names=["dog", "crane"]))
    for dataset in (labelled(["dog", "crane"]), named):
        with pytest.raises(
            ValueError, match=r"class 'crane', and 2 of the models' classes are called that \(0 and 2\)"
        ):
            indices(dataset, TWICE)


def test_class_labels_called_like_placeholders_are_names():
    dataset = labelled([0, 1], datasets.ClassLabel(names=["LABEL_1", "LABEL_0"]))
    assert indices(dataset, ("LABEL_0", "LABEL_1")) == [1, 0]


def test_a_column_called_label_and_one_of_class_labels_are_asked_about(runs, tmp_path):
    blurred = (datasets.ClassLabel(names=["no", "yes"]), [0, 1, 0])
    dataset = labelled(["yes", "no", "yes"], blurred=blurred)
    with pytest.raises(ValueError, match=r"2 columns .*'label' and 'blurred'; .* label_column \(--label-column\)"):
        hf_radin.compute_logits(hf_radin.gather(f"{runs}/ft-*"), dataset, cache_dir=tmp_path)
    assert indices(dataset, ("no", "yes"), label_column="label") == [1, 0, 1]
    assert indices(dataset, ("no", "yes"), label_column="blurred") == [0, 1, 0]
    with pytest.raises(ValueError, match=r"'label' and 'labels'"):
        indices(labelled([0, 1], labels=(None, [1, 0])), ("no", "yes"))


def test_one_column_of_class_labels_is_taken_whatever_else_there_is():
    dataset = labelled([0, 1], year=(None, [1999, 2000]), kind=(datasets.ClassLabel(names=["no", "yes"]), [1, 0]))
    assert indices(dataset.remove_columns("label"), ("no", "yes")) == [1, 0]


@pytest.mark.parametrize("text", ["True", "true"])
def test_booleans_of_a_metadata_file_end_in_the_bank_by_name(runs, two, tmp_path, text):
    """FARM#66, pandas#48487: the reader of the file makes booleans of the names."""
    from ingredients.test_labels import name_classes

    for folder in two.iterdir():
        name_classes(folder, ["True", "False", *NAMES[2:]])
    images, _ = digit_images(slice(0, COUNT))
    folder = tmp_path / "data" / "validation"
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    values = [text if number % 2 else "False" for number in range(COUNT)]
    rows = {"file_name": [f"{number}.png" for number in range(COUNT)], "label": values}
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    bank = hf_radin.compute_logits(hf_radin.gather(f"{two}/*"), folder.parent, cache_dir=tmp_path / "cache")
    assert np.array_equal(bank.labels, [1, 0, 1, 0])
