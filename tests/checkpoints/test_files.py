"""Each kind of bad checkpoint is refused with a message that names it, before an image is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.training import NAMES
from transformers import TimmWrapperConfig, ViTForImageClassification

import hf_radin
from hf_radin.checkpoints.files import read_header, read_layout, shard_size
from hf_radin.checkpoints.lora import read_base
from hf_radin.checkpoints.model import load_config

WEIGHTS = "model.safetensors"


def change(folder: Path, name: str = "config.json", **fields) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def lose(folder: Path, *fields: str) -> None:
    path = folder / "config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in fields})
    )


def rewrite(folder: Path, **changes) -> None:
    """Change, add or (with None) remove tensors of the file of weights."""
    tensors = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file(
        {name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS, {"format": "pt"}
    )


def weights_as(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data)


def index(folder: Path, text: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(text)


def pickled(folder: Path, content) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def unreadable(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)


def labels(*names: str) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def fewer_classes(folder: Path) -> None:
    ViTForImageClassification.from_pretrained(folder, num_labels=9, ignore_mismatched_sizes=True).save_pretrained(
        folder
    )


def adapter(folder: Path, text: str, weights: bytes = b"") -> None:
    """In place of the checkpoint an adapter's folder with just these files."""
    emptied(folder)
    (folder / "adapter_config.json").write_text(text)
    save_file({"base_model.model.classifier.weight": torch.zeros(10, 32)}, folder / "adapter_model.safetensors")


def doubled(folder: Path) -> None:
    """One tensor is in both of two files."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / WEIGHTS).rename(folder / names[0])
    save_file({"classifier.bias": torch.zeros(10)}, folder / names[1], {"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))


SHARDS = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
OUTSIDE = '{"weight_map": {"a": "../ft-0/model.safetensors"}}'

# What is done to the second of two good checkpoints, and the message
KINDS = {
    "empty folder": (emptied, "ft-1: no config.json"),
    "no configuration": (lambda bad: (bad / "config.json").unlink(), "ft-1: no config.json"),
    "configuration cut off": (
        lambda bad: (bad / "config.json").write_text("{"),
        "ft-1/config.json can't be read: Expecting",
    ),
    "configuration that is a list": (
        lambda bad: (bad / "config.json").write_text("[]"),
        "ft-1/config.json can't be read: it holds list",
    ),
    "configuration in another encoding": (
        lambda bad: (bad / "config.json").write_bytes(b"\xff\xfe\x00"),
        "ft-1/config.json can't be read: it is no UTF-8",
    ),
    "unknown model type": (
        lambda bad: change(bad, model_type="no-such-type"),
        "ft-1: config.json can't be used",
    ),
    "sizes of the wrong type": (lambda bad: change(bad, hidden_size="much"), "ft-1"),
    "no image classifier": (
        lambda bad: change(bad, model_type="bert", architectures=["BertForSequenceClassification"]),
        r"ft-1: config.json \(model type 'bert', .*\) makes no image classifier",
    ),
    "two classes could be meant": (
        lambda bad: change(bad, model_type="deit", architectures=None),
        "Its `architectures` has to name one of DeiTForImageClassification, DeiTForImageClassificationWithTeacher",
    ),
    "answers prompts": (lambda bad: change(bad, model_type="shieldgemma2"), "ft-1: .*answers a prompt"),
    "another architecture's name": (
        lambda bad: change(bad, model_type="deit", architectures=["DeiTForImageClassification"]),
        "ft-1: no weights for deit.embeddings.cls_token",
    ),
    "no id2label": (
        lambda bad: lose(bad, "id2label", "label2id"),
        r"ft-1: no weights for classifier.bias \(it has \(10,\) for \(2,\)\)",
    ),
    "classes numbered with gaps": (
        lambda bad: change(bad, id2label={0: "a", 2: "b"}),
        r"ft-1: id2label has the keys \[0, 2\]",
    ),
    "two classes of one name, and not in the other": (
        lambda bad: change(bad, **labels("zero", *NAMES[:8], "nine")),
        "ft-1 differs from .*ft-0 in its classes: it has 'zero' and not 'eight'",
    ),
    "several labels for an image, in one alone": (
        lambda bad: change(bad, problem_type="multi_label_classification"),
        "ft-1 differs from .*ft-0 in configuration's task: 'multi-label classification' against 'single-label",
    ),
    "regression": (
        lambda bad: change(bad, problem_type="regression"),
        "ft-1: it is made for regression",
    ),
    "one output": (
        lambda bad: change(bad, problem_type=None, **labels("score")),
        r"ft-1: it is made for regression \(its config.json says 1 output\)",
    ),
    "weights elsewhere": (
        lambda bad: change(bad, transformers_weights="other.safetensors"),
        r"ft-1: config.json names 'other.safetensors' as its weights \(transformers_weights\)",
    ),
    "weights under the name of a variant": (
        lambda bad: (bad / WEIGHTS).rename(bad / "model.fp16.safetensors"),
        r"ft-1: no weights .* It has model.fp16.safetensors: rename what holds the weights to model.safetensors",
    ),
    "two tensors of one name but for a wrapper": (
        lambda bad: rewrite(bad, _orig_mod__classifier__bias=torch.zeros(10)),
        "ft-1: _orig_mod.classifier.bias and classifier.bias are both classifier.bias in the model|"
        "ft-1: classifier.bias and _orig_mod.classifier.bias are both classifier.bias in the model",
    ),
    "other classes": (
        lambda bad: change(bad, **labels(*(f"zz{number}" for number in range(10)))),
        r"ft-1 differs from .*ft-0 in its classes: it has 'zz0', .* and not 'zero'",
    ),
    "another number of classes": (
        fewer_classes,
        r"ft-1 calls its classes LABEL_0, .*, and has 9 of them where .*ft-0 has 10",
    ),
    "quantised": (
        lambda bad: change(bad, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "ft-1: its weights are quantised",
    ),
    "no weights": (lambda bad: (bad / WEIGHTS).unlink(), r"ft-1: no weights \(model.safetensors"),
    "weights of no bytes": (
        lambda bad: weights_as(bad, b""),
        "ft-1/model.safetensors: not a whole file of weights",
    ),
    "no safetensors at all": (
        lambda bad: weights_as(bad, b"not safetensors at all"),
        "not a whole file of weights",
    ),
    "header longer than the file": (
        lambda bad: weights_as(bad, (1 << 40).to_bytes(8, "little") + b"{}"),
        "ft-1/model.safetensors: not a whole file of weights",
    ),
    "header that is no JSON": (
        lambda bad: weights_as(bad, (4).to_bytes(8, "little") + b"{{{{"),
        "ft-1/model.safetensors: not a whole file of weights",
    ),
    "truncated weights": (
        lambda bad: weights_as(bad, (bad / WEIGHTS).read_bytes()[:-100]),
        "ft-1/model.safetensors: not a whole file of weights",
    ),
    "weights of no tensor": (
        lambda bad: weights_as(bad, (2).to_bytes(8, "little") + b"{}"),
        "ft-1: its weights hold no tensor",
    ),
    "weights that are a link in a circle": (unreadable, "ft-1"),
    "no head": (
        lambda bad: rewrite(bad, classifier__weight=None, classifier__bias=None),
        "ft-1: no weights for classifier.bias, classifier.weight; .*Is this a fine-tuned image classifier",
    ),
    "a tensor is missing": (
        lambda bad: rewrite(bad, vit__layernorm__weight=None),
        "ft-1: no weights for vit.layernorm.weight",
    ),
    "a shape off by one": (
        lambda bad: rewrite(bad, classifier__weight=torch.zeros(10, 33)),
        r"ft-1: no weights for classifier.weight \(it has \(10, 33\) for \(10, 32\)\)",
    ),
    "a tensor in two files": (doubled, r"ft-1.*classifier\.bias stands in another file of .*, too; save it again"),
    "more tensors than any classifier has": (
        lambda bad: rewrite(bad, **{f"note{number}": torch.zeros(1) for number in range(5_001)}),
        r"ft-1: it has 5,\d+ tensors, and no image classifier more than 5,000",
    ),
    "floats of eight bits": (
        lambda bad: rewrite(bad, classifier__weight=torch.zeros(10, 32).to(torch.float8_e4m3fn)),
        r"ft-1: classifier.weight \(10, 32\) is kept in F8_E4M3; weights are averaged from F64, F32",
    ),
    "only a pickle": (
        lambda bad: pickled(bad, {}),
        "ft-1: no weights .* It has pytorch_model.bin: only safetensors are read, unless you pass allow_pickle=True",
    ),
    "an index of a shard that is not there": (
        lambda bad: index(bad, SHARDS),
        "ft-1: model.safetensors.index.json names 'model-00001-of-00002.safetensors', which is not in the folder",
    ),
    "an index that leaves the folder": (
        lambda bad: index(bad, OUTSIDE),
        "not an index of shards: it names '../ft-0",
    ),
    "an index of safetensors that names a pickle": (
        lambda bad: index(bad, '{"weight_map": {"a": "weights.bin"}}'),
        "ft-1/model.safetensors.index.json: not an index of shards: it names 'weights.bin'",
    ),
    "a weight that is kept as integers": (
        lambda bad: rewrite(bad, classifier__bias=torch.zeros(10, dtype=torch.int64)),
        r"ft-1: classifier.bias \(10,\) is kept in I64; weights are averaged from F64, F32, F16, BF16",
    ),
    "a weight in eight bits": (
        lambda bad: rewrite(bad, classifier__bias=torch.zeros(10, dtype=torch.int8)),
        r"ft-1: classifier.bias \(10,\) is kept in I8; weights are averaged from",
    ),
    "a configuration that makes timm read a pickle": (
        lambda bad: TimmWrapperConfig(
            architecture="test_vit", num_labels=10, model_args={"checkpoint_path": str(bad / "harm.bin")}
        ).save_pretrained(bad),
        r"ft-1: config.json makes timm load other files \(checkpoint_path\)",
    ),
    "an adapter whose base has a number for a revision": (
        lambda bad: adapter(bad, '{"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": {}}'),
        "ft-1/adapter_config.json can't be read: its 'revision'",
    ),
    "an adapter's configuration without end": (
        lambda bad: adapter(bad, "[" * 100_000),
        "ft-1/adapter_config.json can't be read: it is nested too deeply",
    ),
    "an index that is none": (lambda bad: index(bad, "[]"), "index.json can't be read: it is .*not a ShardIndex"),
    "no image processor": (
        lambda bad: (bad / "preprocessor_config.json").unlink(),
        r"ft-1: no usable image processor .*--image-processor ID",
    ),
    "an image processor cut off": (
        lambda bad: (bad / "preprocessor_config.json").write_text("{"),
        "ft-1/preprocessor_config.json can't be read: .*--image-processor ID",
    ),
    "pixels of another scale": (
        lambda bad: change(bad, "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5], resample=3),
        r"ft-1 differs from .*ft-0 in image processor's image_mean: \[0.4, 0.5, 0.5\] against .*; "
        r"image processor's resample: .* make other pixels of the same image\. .*\(--image-processor ID\)",
    ),
    "another activation function": (
        lambda bad: change(bad, hidden_act="relu"),
        "ft-1 differs from .*ft-0 in configuration's hidden_act: 'relu' against 'gelu'",
    ),
    "whole weights and an adapter": (
        lambda bad: (bad / "adapter_config.json").write_text("{}"),
        "ft-1: adapter_config.json is there beside model.safetensors",
    ),
    "an adapter of another kind": (
        lambda bad: adapter(bad, '{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "org/base"}'),
        "ft-1: an adapter of the kind 'PREFIX_TUNING'",
    ),
    "an adapter of layers that no classifier here has": (
        lambda bad: adapter(
            bad, '{"peft_type": "LORA", "base_model_name_or_path": "org/base", "megatron_config": {"a": 1}}'
        ),
        "ft-1: an adapter for Megatron layers",
    ),
    "an adapter of no base": (
        lambda bad: adapter(bad, '{"peft_type": "LORA", "base_model_name_or_path": null}'),
        "ft-1: adapter_config.json names no base model",
    ),
    "an adapter of a base that is not here": (
        lambda bad: adapter(bad, '{"peft_type": "LORA", "base_model_name_or_path": "/scratch/me/vit"}'),
        "ft-1: its base model '/scratch/me/vit' is not here",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_refused_and_named(two, kind):
    spoil, message = KINDS[kind]
    spoil(two / "ft-1")
    with pytest.raises(ValueError, match=message) as error:
        hf_radin.gather(f"{two}/ft-*")
    assert "ft-1" in str(error.value) and "\n" not in str(error.value)
    good, bad = hf_radin.inspect(f"{two}/ft-*")
    assert bad.problem == str(error.value) and not bad.ingredient
    assert not good.problem and good.ingredient


def test_a_header_beyond_all_limits_is_not_read(two):
    path = two / "ft-1" / WEIGHTS
    with path.open("rb") as file, pytest.raises(ValueError, match=r"its header says that it has \d+ bytes"):
        read_layout(file, path.stat().st_size, limit=1000)
    with path.open("rb") as file:
        assert read_layout(file, path.stat().st_size).header == read_header(two / "ft-1")


def test_there_are_25_kinds_and_more():
    assert len(KINDS) >= 25


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_before_an_image_is_read(runs, two, digits, tmp_path, caplog, value):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    weight = load_file(two / "ft-1" / WEIGHTS)["vit.layernorm.weight"]
    weight[3] = value
    rewrite(two / "ft-1", vit__layernorm__weight=weight)
    bank = hf_radin.compute_logits(hf_radin.gather(f"{two}/ft-*"), digits, cache_dir=tmp_path / "cache")
    assert [Path(name).name for name in bank.ingredients.ids] == ["ft-0", "ft-2"]
    assert "ft-1 has NaN or infinite weights in vit.layernorm.weight: left out of the soup" in caplog.text


def test_a_pickle_that_would_run_code_does_not(two):
    import os

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(two / "harm"),)

    pickled(two / "ft-1", {"classifier.weight": Harm()})
    with pytest.raises(ValueError, match=r"ft-1/pytorch_model.bin: not a whole file of weights"):
        hf_radin.gather(f"{two}/*", allow_pickle=True)
    assert not (two / "harm").exists()


def test_a_pickle_of_more_than_tensors_is_refused(two):
    pickled(two / "ft-1", {"model": {"classifier.weight": torch.zeros(10, 32)}, "epoch": 3})
    with pytest.raises(ValueError, match=r"ft-1/pytorch_model.bin: not a state dict"):
        hf_radin.gather(f"{two}/*", allow_pickle=True)


def test_links_in_a_circle_are_no_checkpoints(two):
    (two / "ft-9").symlink_to(two / "ft-9")
    assert len(hf_radin.gather(f"{two}/ft-*")) == 2
    with pytest.raises(ValueError, match=r"There is no folder '.*ft-9'"):
        hf_radin.gather([str(two / "ft-0"), str(two / "ft-9")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/ft:../../secrets", "'../../secrets' is no folder inside a repository"),
        ("org/../ft", "There is no folder 'org/../ft' here, and it is no name on the Hub either"),
        ("../ft", "There is no folder '../ft' here"),
        ("org/ft:a//b", "'a//b' is no folder inside a repository"),
    ],
)
def test_names_do_not_leave_where_they_are(two, name, message):
    with pytest.raises(ValueError, match=message):
        hf_radin.gather([str(two / "ft-0"), name])


def test_all_that_is_wrong_is_counted(two, runs):
    shutil.copytree(runs / "ft-2", two / "ft-2")
    for name in ("ft-1", "ft-2"):
        emptied(two / name)
    with pytest.raises(ValueError, match=r"ft-1: no config.json.* 1 more can't be used either; `hf-radin inspect`"):
        hf_radin.gather(f"{two}/ft-*")


def test_weights_that_the_model_does_not_use_are_said(two, caplog):
    rewrite(two / "ft-1", decoder__weight=torch.zeros(3))
    ingredients = hf_radin.gather(f"{two}/ft-*")
    assert "ft-1 has weights that its model does not use: decoder.weight. The soup's does not either." in caplog.text
    soup = hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids))
    assert "decoder.weight" not in soup


@pytest.mark.parametrize(("read", "message"), [(load_config, "no config.json"), (read_base, "no adapter_config.json")])
def test_what_is_gone_between_two_looks_is_named(tmp_path, read, message):
    """A Trainer removes old checkpoints while others look at them."""
    with pytest.raises(ValueError, match=f"{tmp_path}: {message}"):
        read(tmp_path)


def test_the_size_of_a_file_of_weights_is_bytes_or_as_in_transformers():
    assert [shard_size(size) for size in (1000, "1000", "5GB", "0.5MB")] == [1000, 1000, "5GB", "0.5MB"]
    for size in (0, -1, True, "0GB", "many", "", 1.5, "9" * 30):
        with pytest.raises(ValueError, match=r"max_shard_size=.*it is a size as in '5GB'"):
            shard_size(size)
