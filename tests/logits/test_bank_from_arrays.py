"""A bank of arrays says what a bank of checkpoints with these logits says, and refuses what is no such bank."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.given import twin
from shared.logs import warned

import hf_radin
from hf_radin.soup.report import Overlap

NAMES = ("a", "b", "c")


def logits_of(names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(seed).normal(size=(20, 4)) for seed, name in enumerate(names)}


LABELS = np.arange(20) % 4


def test_scores_predictions_and_changes_are_those_of_checkpoints(bank):
    given, recipes = twin(bank), np.random.default_rng(0).dirichlet(np.ones(5), 50)
    assert (given.ingredients.ids, given.classes, len(given)) == (bank.ingredients.ids, bank.classes, 600)
    for metric in ("accuracy", "f1", "log_loss", "top5_accuracy"):
        np.testing.assert_array_equal(given.score(recipes, metric), bank.score(recipes, metric))
    np.testing.assert_array_equal(given.predict(recipes[0]), bank.predict(recipes[0]))
    changes, expected = (either.compare(*recipes[:2]) for either in (given, bank))
    for name in ("ids", "labels", "predictions", "margins"):
        np.testing.assert_array_equal(getattr(changes, name), getattr(expected, name))
    assert len(changes)


def test_labels_may_be_names_and_ids_may_be_any_numbers():
    classes, ids = ["cat", "dog", "elk", "fox"], np.arange(20)[::-1] * 7
    named = hf_radin.LogitBank.from_arrays(logits_of(), [classes[label] for label in LABELS], classes=classes, ids=ids)
    numbered = hf_radin.LogitBank.from_arrays(logits_of(), LABELS)
    np.testing.assert_array_equal(named.labels, LABELS)
    np.testing.assert_array_equal(named.ids, ids)
    assert (named.classes, numbered.classes) == (tuple(classes), ("0", "1", "2", "3"))
    np.testing.assert_array_equal(numbered.ids, np.arange(20))
    assert named.score([[1, 0, 0]]) == numbered.score([[1, 0, 0]])


def proved(*, chosen: np.ndarray | None, proving: np.ndarray | None, **options) -> hf_radin.Soup:
    """The best single model, proved by images of these ids."""
    banks = [
        hf_radin.LogitBank.from_arrays({**logits_of(), "a": logits_of()["a"] + at}, LABELS, ids=ids, split=split)
        for at, (split, ids) in enumerate({"validation": chosen, "test": proving}.items())
    ]
    return hf_radin.radin(banks[0], test_split=banks[1], **options)


def test_ids_that_are_given_say_which_images_splits_share(caplog):
    numbers = np.arange(20)
    assert proved(chosen=numbers, proving=numbers + 20).report.overlap == Overlap(20, 0)
    held_out = hf_radin.LogitBank.from_arrays(logits_of(), LABELS, ids=numbers)
    assert hf_radin.radin(held_out, hold_out=0.5).report.overlap == Overlap(10, 0)
    assert not [line for line in warned(caplog) if "images" in line]
    with pytest.raises(
        ValueError, match="5 of the 20 images of the split 'test' are in the split 'validation' too, by"
    ):
        proved(chosen=numbers, proving=numbers + 15)
    assert proved(chosen=numbers, proving=numbers + 15, allow_overlap=True).report.overlap == Overlap(20, 5)


@pytest.mark.parametrize("ids", [None, np.arange(20)])
def test_without_ids_that_is_not_known_and_a_line_says_how_it_would_be(caplog, ids):
    assert proved(chosen=None, proving=ids).report.overlap == Overlap(20, None)
    (line,) = [line for line in warned(caplog) if "share images" in line]
    assert "is not known: give each image an id that is the same in both (LogitBank.from_arrays(..., ids=...))" in line


def test_logits_are_kept_as_float32_and_what_is_changed_later_changes_nothing():
    arrays = {**logits_of(), "b": logits_of()["b"].astype(np.float32)}
    bank = hf_radin.LogitBank.from_arrays(arrays, LABELS)
    expected = arrays["b"].copy()
    arrays["b"][:] = 0
    assert bank.logits("a").dtype == np.float32
    assert bank.logits("b").dtype == np.float32
    np.testing.assert_array_equal(bank.logits("b"), expected)


def test_tensors_are_taken_with_a_gradient_and_in_any_precision():
    arrays = {name: values.astype(np.float32) for name, values in logits_of().items()}
    tensors = {name: torch.tensor(values, requires_grad=True) for name, values in arrays.items()}
    tensors["b"] = tensors["b"].bfloat16()
    bank = hf_radin.LogitBank.from_arrays(tensors, torch.tensor(LABELS), evaluate=lambda recipe: tensors["b"] * 2)
    np.testing.assert_array_equal(bank.logits("a"), arrays["a"])
    np.testing.assert_allclose(bank.logits("b"), arrays["b"], rtol=2**-8)
    soup = hf_radin.uniform(bank)
    assert soup.measurements[-1].measured == bank.score([[0, 1, 0]])


def test_a_temporary_folder_lasts_as_long_as_the_last_bank_in_it(tmp_path):
    bank = hf_radin.LogitBank.from_arrays(logits_of(), LABELS)
    folder, part = bank.folder, bank.divided(0.5, 0)[1]
    del bank
    gc.collect()
    assert len(part.labels) == 10 and part.score([[1, 0, 0]]).shape == (1,)
    del part
    gc.collect()
    assert not folder.parent.parent.exists()
    named = hf_radin.LogitBank.from_arrays(logits_of(), LABELS, folder=tmp_path).folder
    gc.collect()
    assert named.is_relative_to(tmp_path)
    opened = hf_radin.LogitBank.open(named)
    np.testing.assert_array_equal(opened.logits("c"), logits_of()["c"].astype(np.float32))
    with pytest.raises(ValueError, match=r"evaluate=\.\.\."):
        hf_radin.greedy(opened)


def test_the_order_of_names_changes_nothing(tmp_path):
    arrays = logits_of()
    first = hf_radin.LogitBank.from_arrays(arrays, LABELS, folder=tmp_path)
    backwards = dict(reversed(arrays.items()))
    other = hf_radin.LogitBank.from_arrays(backwards, LABELS, folder=tmp_path)
    assert (first.folder, first.by_content.ingredients.ids) == (other.folder, other.by_content.ingredients.ids)
    assert other.ingredients.ids == NAMES[::-1] and first.ingredients.ids == NAMES


def spoilt(name: str, place: tuple[int, int], value: float) -> dict[str, np.ndarray]:
    arrays = logits_of()
    arrays[name][place] = value
    return arrays


REFUSED = {
    "no model": ({"logits": {}}, "of two models at least; 0 were given"),
    "one model": ({"logits": logits_of(("a",))}, "of two models at least; 1 were given"),
    "no names": ({"logits": list(logits_of().values())}, "by the names of their models.*a list was given"),
    "a number as name": ({"logits": {1: LABELS, "b": LABELS}}, "named by a string, and not by 1"),
    "other images": (
        {"logits": {**logits_of(), "d": np.zeros((19, 4))}},
        r"'d' have the shape \(19, 4\), and those of 'a' \(20, 4\)",
    ),
    "a single column": ({"logits": {"a": np.zeros(20), "b": np.zeros(20)}}, r"'a' have the shape \(20,\)"),
    "rows of other lengths": ({"logits": {"a": [[1.0, 2.0], [1.0]], "b": np.zeros((2, 2))}}, "'a' is no array"),
    "predictions": ({"logits": {"a": np.zeros((20, 4), int), "b": np.zeros((20, 4))}}, "'a' is int64: logits are"),
    "not finite": ({"logits": spoilt("b", (3, 1), np.nan)}, "'b' is not finite: nan in row 3, column 1"),
    "too large": ({"logits": spoilt("c", (0, 2), 1e39)}, r"'c' is not finite: 1e\+39 in row 0, column 2"),
    "fewer labels": ({"labels": LABELS[1:]}, r"labels have the shape \(19,\), and there are logits of 20 images"),
    "a label outside": ({"labels": LABELS + 1}, "The label 4 is none of the classes, which are 0 to 3"),
    "a label below": ({"labels": LABELS - 1}, "The label -1 is none of the classes"),
    "NaN as label": ({"labels": np.where(LABELS == 2, np.nan, LABELS)}, "labels are float64, as in nan"),
    "names of no classes": ({"labels": ["cat"] * 20}, "The labels are names, as in 'cat': give classes"),
    "another name": ({"labels": ["e"] * 20, "classes": list("abcd")}, "The label 'e' is none of the 4 classes"),
    "other classes": ({"classes": list("abc")}, "3 classes are named, and the logits have 4 columns"),
    "a class twice": ({"classes": list("abca")}, "The class 'a' is named 2 times"),
    "a number as class": ({"classes": ["a", "b", "c", 3]}, "A class is named by a string, and not by 3"),
    "a word as classes": ({"classes": "abcd"}, "classes='abcd': they are a list of strings"),
    "fewer ids": ({"ids": LABELS[1:]}, r"The ids are int64 of the shape \(19,\)"),
    "an id twice": ({"ids": LABELS}, "The id 0 stands for 5 images"),
    "no split": ({"split": ""}, "split='': it is the name of a split"),
    "no function": ({"evaluate": 0.5}, r"evaluate=0\.5: it is a function from a recipe to logits"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_bank_is_refused_by_name(options, message, tmp_path):
    arguments = {"logits": logits_of(), "labels": LABELS, "folder": tmp_path, **options}
    with pytest.raises(ValueError, match=message):
        hf_radin.LogitBank.from_arrays(arguments.pop("logits"), arguments.pop("labels"), **arguments)
    assert not any(tmp_path.iterdir())


def test_without_checkpoints_a_bank_is_not_pushed():
    bank = hf_radin.LogitBank.from_arrays(logits_of(), LABELS)
    with pytest.raises(ValueError, match=r"push_to_hub of a bank takes checkpoints .* 'a' logits are all"):
        bank.push_to_hub("org/logits")
    assert replace(bank, part=np.arange(5)).given is bank.given
