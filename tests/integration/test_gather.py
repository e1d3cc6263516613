"""Ingredients are found by any name that users give them, and the odd one out is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification

import hf_radin


def change(folder: Path, name: str = "config.json", **fields) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_pattern_gives_all_that_it_matches_in_order(runs):
    found = hf_radin.gather(f"{runs}/ft-*")
    assert [Path(one.id).name for one in found] == ["ft-0", "ft-1", "ft-2", "ft-3", "ft-4"]
    assert found.labels[:3] == ("zero", "one", "two")
    assert found[0].architecture == "ViTForImageClassification"
    assert len({one.revision for one in found}) == 5


def test_folders_patterns_and_lists_give_the_same(runs, monkeypatch):
    monkeypatch.chdir(runs)
    by_name = hf_radin.gather(["ft-0", Path("ft-1")])
    assert by_name.ids == ("ft-0", "ft-1")
    assert hf_radin.gather("ft-[01]") == by_name
    assert hf_radin.gather(["ft-0", "ft-[01]"]) == by_name  # a checkpoint named twice is one ingredient


def test_it_can_not_be_changed(runs):
    found = hf_radin.gather(f"{runs}/ft-*")
    with pytest.raises(TypeError):
        found[0] = found[1]
    with pytest.raises(AttributeError):
        found[0].id = "other"


def test_the_revision_is_the_content(two):
    before = hf_radin.gather(f"{two}/*")
    shutil.copytree(two / "ft-0", two / "moved")
    shutil.rmtree(two / "ft-0")
    assert {one.revision for one in hf_radin.gather(f"{two}/*")} == {one.revision for one in before}
    change(two / "moved", hidden_dropout_prob=0.5)
    assert {one.revision for one in hf_radin.gather(f"{two}/*")} != {one.revision for one in before}


def test_a_copy_is_kept_once_and_said(two, caplog):
    shutil.copytree(two / "ft-0", two / "ft-copy")
    assert len(hf_radin.gather(f"{two}/*")) == 2
    assert "ft-copy is the same checkpoint as" in caplog.text


def test_select_knows_the_ids(runs):
    found = hf_radin.gather(f"{runs}/ft-*")
    assert found.select([found.ids[3], found.ids[1]]) == (found[3], found[1])
    with pytest.raises(ValueError, match="No ingredient 'other'"):
        found.select(["other"])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "an empty list gives none"),
        ("nothing-*", "matches no folder"),
        ("./nothing/at/all", "no folder"),
        ("*/x/y", "matches no folder"),
        ("", "no folder"),
    ],
)
def test_what_matches_nothing_is_refused(models, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_radin.gather(models)


def test_one_ingredient_makes_no_soup(runs):
    with pytest.raises(ValueError, match=r"at least two different checkpoints; .*ft-0"):
        hf_radin.gather(str(runs / "ft-0"))


def spoil_config(folder):
    (folder / "config.json").unlink()


def spoil_json(folder):
    (folder / "config.json").write_text("{")


def spoil_type(folder):
    change(folder, model_type="no-such-type")


def spoil_architecture(folder):
    change(folder, model_type="deit", architectures=None)  # deit has two heads, and only `architectures` says which


def spoil_task(folder):
    change(folder, model_type="bert", architectures=["BertForSequenceClassification"])


def spoil_architectures(folder):
    change(folder, architectures=5)


def spoil_labels(folder):
    change(folder, id2label={index: "zero" if index == 9 else str(index) for index in range(10)} | {0: "zero"})


def spoil_weights(folder):
    (folder / "model.safetensors").unlink()


def spoil_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_header(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")


def spoil_pickle(folder):
    spoil_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def spoil_index(folder):
    spoil_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def spoil_index_path(folder):
    spoil_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../ft-0/model.safetensors"}}')


def spoil_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def spoil_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "no config.json"),
        (spoil_json, "config.json can't be used"),
        (spoil_type, "config.json can't be used"),
        (spoil_architecture, "in architecture: 'deit' against"),
        (spoil_task, "in architecture: 'BertForSequenceClassification' against"),
        (spoil_architectures, "ft-1"),
        (spoil_labels, "2 classes of id2label are called 'zero'"),
        (spoil_weights, "no weights"),
        (spoil_truncated, "not a whole file of weights"),
        (spoil_header, "not a whole file of weights"),
        (spoil_pickle, "It has pytorch_model.bin: only safetensors are read, unless you pass allow_pickle=True"),
        (spoil_index, "names 'model-00001-of-00002.safetensors', which is not in the folder"),
        (spoil_index_path, "names '../ft-0/model.safetensors', which is not in the folder"),
        (spoil_processor, "no usable image processor"),
        (spoil_empty, "no config.json"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(two, spoil, message):
    spoil(two / "ft-1")
    with pytest.raises(ValueError, match=message) as error:
        hf_radin.gather(f"{two}/ft-*")
    assert "ft-1" in str(error.value)


def other_labels(folder):
    labels = [f"digit {number}" for number in range(10)]
    change(folder, id2label=dict(enumerate(labels)), label2id={name: index for index, name in enumerate(labels)})


def other_order(folder):
    config = json.loads((folder / "config.json").read_text())
    labels = [*config["id2label"].values()][::-1]
    change(folder, id2label=dict(enumerate(labels)), label2id={name: index for index, name in enumerate(labels)})


def fewer_classes(folder):
    model = ViTForImageClassification.from_pretrained(folder, num_labels=9, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)


def other_size(folder):
    change(folder, intermediate_size=65)


def other_activation(folder):
    change(folder, hidden_act="relu")  # the same shapes, another function


def other_architecture(folder):
    change(folder, model_type="deit", architectures=["DeiTForImageClassification"])


def other_pixels(folder):
    change(folder, "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])


def other_interpolation(folder):
    change(folder, "preprocessor_config.json", resample=3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_labels, "in name of class 0: 'digit 0' against 'zero'"),
        (other_order, "in name of class 0: 'nine' against 'zero'"),
        (fewer_classes, "in number of classes: 9 against 10"),
        (other_size, "in configuration's intermediate_size: 65 against 64"),
        (other_activation, "in configuration's hidden_act: 'relu' against 'gelu'"),
        (other_architecture, "in architecture: 'DeiTForImageClassification' against 'ViTForImageClassification'"),
        (other_pixels, "in image processor's image_mean"),
        (other_interpolation, "in image processor's resample"),
    ],
)
def test_the_odd_one_out_and_the_difference_are_named(runs, two, spoil, message):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    spoil(two / "ft-0")  # the first of three, so that it is the majority that counts, not the order
    with pytest.raises(ValueError, match=message) as error:
        hf_radin.gather(f"{two}/ft-*")
    assert "ft-0 differs from" in str(error.value)


def test_a_file_is_no_checkpoint(runs):
    with pytest.raises(ValueError, match="is a file; a checkpoint is a folder"):
        hf_radin.gather([str(runs / "ft-0" / "config.json"), str(runs / "ft-1")])


def test_a_pattern_passes_files_by(two):
    (two / "ft-notes.txt").write_text("notes")
    assert len(hf_radin.gather(f"{two}/ft-*")) == 2


def test_pickles_are_read_when_allowed_and_never_run_code(two):
    from safetensors.torch import load_file

    for name in ("ft-0", "ft-1"):
        torch.save(load_file(two / name / "model.safetensors"), two / name / "pytorch_model.bin")
        (two / name / "model.safetensors").unlink()
    found = hf_radin.gather(f"{two}/*", allow_pickle=True)
    assert len(hf_radin.average(found, hf_radin.Recipe.uniform(found.ids))) > 10

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(two / "harm"),)

    torch.save({"classifier.weight": Harm()}, two / "ft-1" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a whole file of weights"):
        hf_radin.gather(f"{two}/*", allow_pickle=True)
    assert not (two / "harm").exists()


def test_what_is_no_image_classifier_is_named(two):
    for name in ("ft-0", "ft-1"):
        change(two / name, model_type="bert", architectures=["BertForSequenceClassification"])
    with pytest.raises(ValueError, match=r"ft-0: config.json \(model type 'bert', .*\) makes no image classifier"):
        hf_radin.gather(f"{two}/*")


def test_a_slice_is_a_sequence_of_ingredients(runs):
    found = hf_radin.gather(f"{runs}/ft-*")
    assert found[1:3] == found.select(found.ids[1:3]) and found[1:3].labels == found.labels


def test_a_checkpoint_that_changed_since_is_not_used(runs, two):
    found = hf_radin.gather(f"{two}/*")
    shutil.copytree(two / "ft-1", two / "kept")
    shutil.copy(runs / "ft-4" / "model.safetensors", two / "ft-1" / "model.safetensors")
    with pytest.raises(ValueError, match=r"ft-1 has changed: it was sha256:.* Gather again"):
        hf_radin.average(found, hf_radin.Recipe.uniform(found.ids))
    shutil.copy(two / "kept" / "model.safetensors", two / "ft-1" / "model.safetensors")  # as it was, at another time
    assert hf_radin.average(found, hf_radin.Recipe.uniform(found.ids))
