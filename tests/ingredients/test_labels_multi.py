"""Lists of classes, vectors of 0 and 1, and columns of them mean the same; what could mean two things is refused."""

import datasets
import numpy as np
import pytest
from shared.training import digit_images

from hf_radin.images.split import DataSource, open_split
from hf_radin.ingredients import labels
from ingredients.test_labels_matching import labelled

CLASSES = ("ant", "bee", "cat")
TRUTH = np.array([[True, False, True], [False, False, False], [False, True, False]])
OF_TEXT = datasets.Sequence(datasets.Value("string"))
OF_NUMBERS = datasets.Sequence(datasets.Value("int64"))


def sets(dataset: datasets.Dataset, names: tuple[str, ...] = CLASSES, **options) -> np.ndarray:
    labels.warn_once.cache_clear()
    split = open_split(DataSource({"validation": dataset}, **options))
    to_classes = labels.match_labels(split, names, multi_label=True)
    labels.check_first_label(split, to_classes)
    of_images = [labels.label_of(split.label(row), place, split, to_classes) for place, row in enumerate(split.rows)]
    return labels.stack_labels(of_images, len(names))


def columns(**flags: list) -> datasets.Dataset:
    images = digit_images(slice(0, len(next(iter(flags.values())))))[0]
    features = datasets.Dataset.from_dict(flags).features
    features["image"] = datasets.Image()
    return datasets.Dataset.from_dict({**flags, "image": images}, features=features)


FORMS = {
    "names": labelled([["cat", "ant"], [], ["bee"]], OF_TEXT),
    "numbers": labelled([[0, 2], [], [1]], OF_NUMBERS),
    "class labels in another order": labelled(
        [[0, 2], [], [1]], datasets.Sequence(datasets.ClassLabel(names=["cat", "bee", "ant"]))
    ),
    "numbers as text": labelled([["0", "2"], [], ["1"]], OF_TEXT),
    "none in the first image": labelled([["ant", "cat"], [], ["bee"]][::-1], OF_TEXT).select([2, 1, 0]),
    "vectors": labelled([[1.0, 0.0, 1.0], [0.0] * 3, [0.0, 1.0, 0.0]]),
    "booleans": labelled(TRUTH.tolist()),
    "columns": columns(cat=[1, 0, 0], bee=[0, 0, 1], ant=[1, 0, 0]),
    "columns of booleans": columns(ant=[True, False, False], bee=[False, False, True], cat=[True, False, False]),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_mean_the_same(form):
    options = {"label_column": "ant, bee, cat"} if form.startswith("columns") else {}
    assert (sets(FORMS[form], **options) == TRUTH).all()


def test_columns_that_are_called_as_the_classes_are_taken_where_no_other_could_be_meant():
    assert (sets(FORMS["columns"], classes=CLASSES) == TRUTH).all()
    named = FORMS["columns"].add_column("label", [["bee"], [], []], feature=OF_TEXT)
    assert sets(named, classes=CLASSES).sum() == 1
    (one_class,) = sets(columns(bee=[0, 1], other=[5, 5]), ("bee",), classes=("bee",)).T
    assert one_class.tolist() == [False, True]
    with pytest.raises(ValueError, match="0 columns of class labels"):
        sets(FORMS["columns"])


def test_many_classes_are_told_apart():
    generator = np.random.default_rng(0)
    truth = generator.random((20, 203)) < 0.1
    rows = [generator.permutation(np.flatnonzero(row)).tolist() for row in truth]
    assert (sets(labelled(rows, OF_NUMBERS), tuple(f"c{number}" for number in range(203))) == truth).all()


@pytest.mark.parametrize(
    ("values", "feature", "reason"),
    [
        ([["ant"], ["wasp"]], OF_TEXT, r"Sample 1 .* has the label \['wasp'\], which the models don't know"),
        ([[0], [3]], OF_NUMBERS, r"Sample 1 .* has the label \[3\]"),
        ([[0], [-1]], OF_NUMBERS, r"Sample 1 .* has the label \[-1\]"),
        ([[0], None], OF_NUMBERS, "Sample 1 .* has the label None"),
        ([["ant"], ["bee", None]], OF_TEXT, "Sample 1 .* has the label"),
        ([[0, 1, 0]], OF_NUMBERS, r"names a class twice: \[0, 1, 0\]. If it holds 0 or 1 .* as booleans or floats"),
        ([[1.0, 0.0, 1.0], [float("nan"), 0.0, 0.0]], None, r"Sample 1 .* has the label \[nan"),
        ([[1.0, 0.5, 1.0]], None, r"Sample 0 .* has the label \[1.0, 0.5"),
        ([[1.0, 0.0]], None, r"Sample 0 .* has the label \[1.0, 0.0\]"),
    ],
)
def test_what_no_class_is_called_is_named_with_its_sample(values, feature, reason):
    with pytest.raises(ValueError, match=reason):
        sets(labelled(values, feature))


def test_columns_are_called_as_the_classes():
    flags = columns(ant=[1], bee=[0], wasp=[1])
    with pytest.raises(ValueError, match="'cat' has none, and 'wasp' is no class of the models"):
        sets(flags, label_column="ant,bee,wasp")
    with pytest.raises(ValueError, match="no label column 'ant,bee,cat'"):
        sets(flags, label_column="ant,bee,cat")
    with pytest.raises(ValueError, match=r"Sample 0 .* has the label \[1, 2, 0\]"):
        sets(columns(ant=[1], bee=[2], cat=[0]), label_column="ant,bee,cat")


def test_labels_of_the_other_task_are_refused():
    with pytest.raises(ValueError, match="are one for an image, and the checkpoints are multi-label"):
        sets(labelled(["ant"]))
    split = open_split(DataSource({"validation": FORMS["names"]}))
    with pytest.raises(ValueError, match="are several for an image, and the checkpoints give each image one class"):
        labels.match_labels(split, CLASSES)
