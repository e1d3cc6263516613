"""Checkpoints as people have them: wrapped, written by older versions, with notes of their run, of one size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shared.calls import counted
from shared.training import NAMES, digit_images, image_dataset, train
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_radin
from hf_radin import Recipe
from hf_radin.checkpoints import files
from hf_radin.checkpoints import model as modeling
from hf_radin.checkpoints.fields import comparable, shared_fields
from hf_radin.images.decode import example_images
from hf_radin.images.split import DataSource, open_split
from hf_radin.soup.cook import find_ingredients

WEIGHTS = "model.safetensors"


def change(folder: Path, name: str = "config.json", **fields) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rename(folder: Path, new_name) -> None:
    """Give all tensors of a checkpoint other names on disk."""
    tensors = {new_name(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def half(gathered) -> dict[str, torch.Tensor]:
    return hf_radin.average(gathered, Recipe.uniform(gathered.ids))


# What is loaded is what is hashed and averaged


@pytest.mark.parametrize("kind", ["the file", "shards", "a pickle", "an old pickle", "shards of other names"])
def test_what_is_loaded_is_what_plain_transformers_loads(two, kind):
    expected = ViTForImageClassification.from_pretrained(two / "ft-1")
    if "shards" in kind:
        (two / "ft-1" / WEIGHTS).unlink()
        expected.save_pretrained(two / "ft-1", max_shard_size="20KB")
    if kind == "shards of other names":
        index = two / "ft-1" / f"{WEIGHTS}.index.json"
        index.write_text(index.read_text().replace('"model-', '"part-'))
        for path in list((two / "ft-1").glob("model-*.safetensors")):
            path.rename(path.with_name(path.name.replace("model-", "part-")))
    if "pickle" in kind:
        torch.save(
            load_file(two / "ft-1" / WEIGHTS),
            two / "ft-1" / "pytorch_model.bin",
            _use_new_zipfile_serialization=kind == "a pickle",
        )
        (two / "ft-1" / WEIGHTS).unlink()
    gathered = hf_radin.gather(f"{two}/*", allow_pickle="pickle" in kind)
    used = [path.name for path in files.weight_files(two / "ft-1", allow_pickle=True)]
    assert set(used) <= files.file_hashes(two / "ft-1", allow_pickle=True).keys()
    alone = hf_radin.average(gathered, Recipe.uniform(gathered.ids[1:]))
    plain = expected.state_dict()
    assert alone.keys() == plain.keys() and all(torch.equal(alone[name], plain[name]) for name in plain)
    loaded = gathered[1].load_model(torch.float32).state_dict()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)


def test_a_configuration_that_names_the_usual_file_redirects_nobody(two):
    change(two / "ft-1", transformers_weights=WEIGHTS)
    assert len(hf_radin.gather(f"{two}/*")) == 2


def test_a_redirection_that_came_later_is_seen(two, digits, tmp_path):
    gathered = hf_radin.gather(f"{two}/*")
    change(two / "ft-1", transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match=r"ft-1 has changed: .* Gather again"):
        hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")


# Names that wrappers leave


@pytest.mark.parametrize(
    "wrap",
    [
        "_orig_mod.{}".format,
        "module.{}".format,
        "module._orig_mod.{}".format,
        "_orig_mod.module.{}".format,
        "_fsdp_wrapped_module.{}".format,
        lambda name: name.replace("vit.", "vit._orig_mod.", 1),
        lambda name: name.replace("layer.0.", "layer.0._checkpoint_wrapped_module.").replace(
            "layers.0.", "layers.0._checkpoint_wrapped_module."
        ),
    ],
    ids=["compiled", "parallel", "compiled, parallel", "parallel, compiled", "sharded", "body compiled", "a layer"],
)
def test_names_of_wrapped_models_are_read_without_and_said(two, runs, digits, tmp_path, caplog, wrap):
    rename(two / "ft-1", wrap)
    gathered = hf_radin.gather(f"{two}/*")
    assert "ft-1: it was saved as torch.compile or DistributedDataParallel wrapped it" in caplog.text
    plain = hf_radin.gather([f"{runs}/ft-0", f"{runs}/ft-1"])
    expected, soup = half(plain), half(gathered)
    assert soup.keys() == expected.keys() and all(torch.equal(soup[name], expected[name]) for name in expected)
    hf_radin.average(gathered, Recipe.uniform(gathered.ids), output=tmp_path / "soup")
    hf_radin.average(plain, Recipe.uniform(plain.ids), output=tmp_path / "plain")
    assert (tmp_path / "soup" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
    banks = [
        hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / name)
        for ingredients, name in ((gathered, "wrapped"), (plain, "plain"))
    ]
    assert np.array_equal(banks[0].logits(1), banks[1].logits(1))


def test_a_name_that_only_looks_wrapped_stays():
    names = ["module.weight", "classifier.weight", "my_orig_mod.bias"]
    assert files.plain_names(names, "here") == {name: name for name in names}


# Index buffers of older versions, pickles of older torch

NAMED = {"id2label": dict(enumerate("abc")), "label2id": {name: number for number, name in enumerate("abc")}}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOWER = {**TINY, "image_size": 32, "patch_size": 8}
OLDER = {
    "beit": (
        BeitForImageClassification,
        BeitConfig(**TOWER, use_relative_position_bias=True, out_indices=[0, 1], **NAMED),
        {
            f"beit.encoder.layer.{layer}.attention.attention.relative_position_bias.relative_position_index": (17, 17)
            for layer in range(2)
        },
    ),
    "clip": (
        CLIPForImageClassification,
        CLIPConfig(vision_config=TOWER, text_config=TINY, projection_dim=16, **NAMED),
        {"vision_model.embeddings.position_ids": (1, 17)},
    ),
    "swin": (
        SwinForImageClassification,
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, **NAMED),
        {"swin.encoder.layers.0.blocks.0.attention.self.relative_position_index": (16, 16)},
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_index_buffers_of_older_versions_are_no_quantised_weights(tmp_path, name):
    model_class, config, buffers = OLDER[name]
    for seed in range(2):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(tmp_path / f"ft-{seed}")
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / f"ft-{seed}")
    expected = half(hf_radin.gather(f"{tmp_path}/ft-*"))
    for folder in (tmp_path / "ft-0", tmp_path / "ft-1"):
        indices = {path: torch.arange(int(np.prod(shape))).reshape(shape) for path, shape in buffers.items()}
        save_file(load_file(folder / WEIGHTS) | indices, folder / WEIGHTS, {"format": "pt"})
    soup = half(hf_radin.gather(f"{tmp_path}/ft-*"))
    # transformers 5.0 still has the table of Swin in its model, and takes that of the file
    floats = {path: tensor for path, tensor in expected.items() if tensor.is_floating_point()}
    assert floats and all(torch.equal(soup[path], tensor) for path, tensor in floats.items())


# Image processors are the same if they make the same pixels

RESIZED = {
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def prepared_by(folder: Path, image_processor_type: str, **fields) -> None:
    fields = {**RESIZED, "image_processor_type": image_processor_type, **fields}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("MobileNetV1ImageProcessor", "LevitImageProcessor"),
        ("CLIPImageProcessor", "LevitImageProcessor"),
        ("CLIPImageProcessor", "PoolFormerImageProcessor"),
        ("BitImageProcessor", "ConvNextImageProcessor"),
    ],
)
def test_equal_fields_of_classes_that_make_other_pixels_are_refused(two, first, second):
    prepared_by(two / "ft-0", first)
    prepared_by(two / "ft-1", second)
    with pytest.raises(ValueError, match=rf"image processor's class: '{second}' against '{first}'.*make other pixels"):
        hf_radin.gather(f"{two}/*")


@pytest.mark.parametrize(
    ("fields", "is_said"),
    [
        ({"image_std": [1, 1, 1]}, False),
        ({"image_processor_type": "ViTImageProcessorFast"}, False),
        ({"processor_class": "CLIPProcessor"}, False),
        ({"do_convert_rgb": None, "input_data_format": None}, False),
        ({"crop_pct": 0.9, "note": "run 7"}, True),
        ({"_valid_processor_keys": ["images", "do_resize"]}, False),
    ],
)
def test_fields_that_change_no_pixel_do_not_count(two, digits, tmp_path, caplog, fields, is_said):
    change(two / "ft-0", "preprocessor_config.json", image_std=[1.0, 1.0, 1.0])
    change(two / "ft-1", "preprocessor_config.json", **{"image_std": [1.0, 1.0, 1.0], **fields})
    gathered = hf_radin.gather(f"{two}/*")
    assert ("They make the same pixels" in caplog.text) == is_said
    bank = hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")
    plain = AutoModelForImageClassification.from_pretrained(two / "ft-1").eval()
    processor = AutoImageProcessor.from_pretrained(two / "ft-1")
    images, _ = digit_images(slice(700, 704))
    with torch.inference_mode():
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        expected = plain(**inputs).logits.numpy()
    np.testing.assert_allclose(bank.logits(1)[:4], expected, atol=1e-5)


def test_where_only_resizing_differs_it_is_said(two):
    change(two / "ft-1", "preprocessor_config.json", do_resize=False)
    with pytest.raises(ValueError, match=r"do_resize: False against True\. .* own size already they make the same"):
        hf_radin.gather(f"{two}/*")


def test_other_means_change_no_pixel_where_nothing_is_normalised(two, caplog):
    for name, mean in (("ft-0", 0.5), ("ft-1", 0.4)):
        change(two / name, "preprocessor_config.json", do_normalize=False, image_mean=[mean] * 3)
    assert len(hf_radin.gather(f"{two}/*")) == 2
    assert "ft-1 differs from" in caplog.text and "They make the same pixels" in caplog.text


def test_what_made_up_images_do_not_show_the_splits_own_do(two, tmp_path, caplog):
    """A processor that is another for small images, of which none is made up."""
    code = [
        "from transformers import ViTImageProcessor",
        "class Darkening(ViTImageProcessor):",
        "    def preprocess(self, images, *args, **options):",
        "        if images.width < 50:",
        "            images = images.point(lambda value: value // 2)",
        "        return super().preprocess(images, *args, **options)",
    ]
    (two / "ft-1" / "darkening.py").write_text("\n".join(code))
    change(
        two / "ft-1",
        "preprocessor_config.json",
        image_processor_type="Darkening",
        auto_map={"AutoImageProcessor": "darkening.Darkening"},
    )
    gathered = hf_radin.gather(f"{two}/*", trust_remote_code=True)
    assert "They make the same pixels" in caplog.text
    dataset = image_dataset([Image.new("RGB", (20, 30), "white"), Image.new("RGB", (9, 8))], [0, 1])
    with pytest.raises(ValueError, match=r"ft-[01] makes other pixels of images of the split than .*ft-[01].*class"):
        hf_radin.compute_logits(gathered, dataset, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_where_processors_take_no_made_up_images_the_splits_own_decide(two, digits, tmp_path, caplog):
    """Two that take square images alone, of which none is made up, with fields that make no difference to these."""
    code = [
        "from transformers import ViTImageProcessor",
        "class Square(ViTImageProcessor):",
        "    def preprocess(self, images, *args, **options):",
        "        if images.width != images.height:",
        "            raise ValueError('not square')",
        "        return super().preprocess(images, *args, **options)",
    ]
    for name, rate in (("ft-0", 0.8), ("ft-1", 0.9)):
        (two / name / "square.py").write_text("\n".join(code))
        fields = {"image_processor_type": "Square", "auto_map": {"AutoImageProcessor": "square.Square"}}
        change(two / name, "preprocessor_config.json", crop_pct=rate, **fields)
    gathered = hf_radin.gather(f"{two}/*", trust_remote_code=True)
    assert "Whether they make the same pixels is tried on images of the split." in caplog.text
    assert len(hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache").ingredients) == 2


def test_a_soup_without_the_ingredient_whose_processor_prepared_the_images_is_saved_and_cooked(two, digits, tmp_path):
    tensors = load_file(two / "ft-0" / WEIGHTS)
    tensors["classifier.weight"].zero_()  # which leaves it out
    save_file(tensors, two / "ft-0" / WEIGHTS, {"format": "pt"})
    change(two / "ft-1", "preprocessor_config.json", crop_pct=0.9)
    gathered = hf_radin.gather(f"{two}/*")
    bank = hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache", strangers="keep")
    soup = hf_radin.best_single(bank)
    assert [Path(name).name for name in soup.recipe.used] == ["ft-1"]
    soup.save_pretrained(tmp_path / "soup")
    assert len(find_ingredients(tmp_path / "soup")[0]) == 1
    change(two / "ft-1", "preprocessor_config.json", image_mean=[0.4] * 3)
    with pytest.raises(ValueError, match=r"ft-1 has changed|is not the checkpoint that the recipe was made with"):
        find_ingredients(tmp_path / "soup")


# Configurations


def test_notes_of_a_run_do_not_count_and_stay_with_it(two, digits, tmp_path):
    for number, name in enumerate(("ft-0", "ft-1")):
        change(two / name, wandb_run_id=f"run{number}", sweep="digits", hidden_dropout_prob=number / 10)
    gathered = hf_radin.gather(f"{two}/*")
    soup = hf_radin.uniform(hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    assert soup.model.config.sweep == "digits" and not hasattr(soup.model.config, "wandb_run_id")
    from hf_radin.soup.cook import cook_files

    assert cook_files(tmp_path / "soup", tmp_path / "cooked")
    for name in ("soup", "cooked"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["sweep"] == "digits" and "wandb_run_id" not in config
        assert config.get("hidden_dropout_prob", 0.0) == 0.0


@pytest.mark.parametrize("spoilt", [{name: str(number) for number, name in enumerate(NAMES)}, {}, None])
def test_the_numbers_of_classes_are_those_of_their_names_whatever_a_script_wrote(two, digits, tmp_path, spoilt):
    """transformers' run_image_classification.py writes them as texts."""
    from hf_radin.soup.cook import cook_files

    change(two / "ft-1", label2id=spoilt, architectures=None)
    gathered = hf_radin.gather(f"{two}/*")
    soup = hf_radin.uniform(hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache"))
    soup.save_pretrained(tmp_path / "soup")
    assert cook_files(tmp_path / "soup", tmp_path / "cooked")
    for name in ("soup", "cooked"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["label2id"] == {name: number for number, name in enumerate(NAMES)}
        assert config["architectures"] == ["ViTForImageClassification"]


def test_notes_stay_behind_where_models_are_averaged(two, tmp_path):
    names = {"id2label": dict(enumerate(NAMES[::-1])), "label2id": {name: 9 - at for at, name in enumerate(NAMES)}}
    change(two / "ft-0", run=1)
    change(two / "ft-1", run=2, **names)
    gathered = hf_radin.gather(f"{two}/*")
    hf_radin.average(gathered, Recipe.uniform(gathered.ids), output=tmp_path / "soup")
    assert "run" not in json.loads((tmp_path / "soup" / "config.json").read_text())


def test_what_is_shared_is_what_all_say_in_whatever_spelling():
    first = {"a": 4, "b": {"c": 1, "d": 2}, "e": True, "f": [1, 2.0], "g": 1}
    second = {"a": 4.0, "b": {"c": 1.0, "d": 3}, "e": 1, "f": (1.0, 2), "h": 1}
    assert shared_fields([first, second]) == {"a": 4, "b": {"c": 1}, "f": [1, 2.0]}
    assert comparable(4) == comparable(4.0) != comparable("4") and comparable(True) != comparable(1)


def test_no_problem_type_and_a_single_label_are_the_same_task(two):
    change(two / "ft-0", problem_type=None)
    change(two / "ft-1", problem_type="single_label_classification")
    assert len(hf_radin.gather(f"{two}/*")) == 2


def test_equal_numbers_in_another_spelling_are_no_difference(tmp_path):
    model_class, config, _ = OLDER["swin"]
    for seed, mlp_ratio in enumerate((4, 4.0)):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(tmp_path / f"ft-{seed}")
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / f"ft-{seed}")
        change(tmp_path / f"ft-{seed}", mlp_ratio=mlp_ratio)
    assert len(hf_radin.gather(f"{tmp_path}/ft-*")) == 2


def test_a_field_that_its_class_does_not_declare_is_compared_where_the_models_code_reads_it(two):
    from hf_radin.ingredients.compatibility import _declared_or_read

    change(two / "ft-0", window=3, wandb_run_id="run 1")
    config = modeling.load_config(two / "ft-0")
    reads = _declared_or_read(config, 'width = getattr(config, "window", None)', everything=False)
    assert reads["window"] == 3 and reads["hidden_size"] == 32 and "wandb_run_id" not in reads
    assert "wandb_run_id" in _declared_or_read(config, "", everything=True)  # code of its own may read all


def test_attention_maps_are_nobodys_function_and_a_soup_has_none(two, digits, tmp_path):
    for name in ("ft-0", "ft-1"):
        change(two / name, output_attentions=True, output_hidden_states=True, return_dict=False)
    gathered = hf_radin.gather(f"{two}/*")
    bank = hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert not loaded.config.output_attentions and not loaded.config.output_hidden_states


UNSAVABLE = """
from transformers import ViTConfig, ViTForImageClassification

class OddConfig(ViTConfig):
    model_type = "odd"

    def save_pretrained(self, *_, **__):
        raise ValueError("The field 'x' is not valid.")

class OddModel(ViTForImageClassification):
    config_class = OddConfig
"""


def test_what_can_not_be_saved_is_known_before_the_compute(two):
    (two / "ft-0" / "odd.py").write_text(UNSAVABLE)
    classes = {"AutoConfig": "odd.OddConfig", "AutoModelForImageClassification": "odd.OddModel"}
    change(two / "ft-0", model_type="odd", architectures=["OddModel"], auto_map=classes)
    with pytest.raises(ValueError, match=r"ft-0: config.json loads and can't be saved, .* The field 'x' is not valid"):
        hf_radin.gather(f"{two}/*", trust_remote_code=True)


UNLOADABLE = """
from transformers import ViTForImageClassification

class OddModel(ViTForImageClassification):
    @classmethod
    def from_pretrained(cls, *_, **__):
        raise RuntimeError("Tensors are\\nof another make.")
"""


def test_whatever_a_loader_raises_the_checkpoint_is_named(two):
    """A class of somebody's own fails in its own way."""
    (two / "ft-0" / "odd.py").write_text(UNLOADABLE)
    change(two / "ft-0", architectures=["OddModel"], auto_map={"AutoModelForImageClassification": "odd.OddModel"})
    with pytest.raises(ValueError, match=r"ft-0: the weights can't be loaded: Tensors are"):
        hf_radin.gather(f"{two}/*", trust_remote_code=True)


def test_the_task_of_a_checkpoint_without_a_head_is_named(two):
    change(two / "ft-1", architectures=["ViTForMaskedImageModeling"])
    weights = load_file(two / "ft-1" / WEIGHTS)
    tensors = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    save_file(tensors, two / "ft-1" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for classifier.* It was saved as ViTForMaskedImageModeling"):
        hf_radin.gather(f"{two}/*")


# Classes of one name


def cranes(folder: Path, names: list[str]) -> None:
    change(folder, id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)})


def test_two_classes_of_one_name_are_told_apart_by_their_places(two, digits, tmp_path):
    names = ["crane", *NAMES[1:5], "crane", *NAMES[6:]]
    for name in ("ft-0", "ft-1"):
        cranes(two / name, names)
    gathered = hf_radin.gather(f"{two}/*")
    assert gathered.labels == tuple(names)
    images, labels = digit_images(slice(700, 760))
    bank = hf_radin.compute_logits(gathered, image_dataset(images, labels, None), cache_dir=tmp_path / "cache")
    assert bank.labels.tolist() == labels
    soup = hf_radin.uniform(bank)
    soup.save_pretrained(tmp_path / "soup")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "soup")
    assert [loaded.config.id2label[number] for number in range(10)] == names


def test_classes_in_another_order_around_two_of_one_name_are_permuted(two):
    names = ["crane", *NAMES[1:5], "crane", *NAMES[6:]]
    cranes(two / "ft-0", names)
    cranes(two / "ft-1", ["crane", names[2], names[1], *names[3:]])
    assert hf_radin.gather(f"{two}/*")[1].order == (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)
    cranes(two / "ft-1", [names[1], "crane", *names[2:]])
    with pytest.raises(
        ValueError, match=r"ft-1 has its classes in another order than .* 2 of them are called 'crane'"
    ):
        hf_radin.gather(f"{two}/*")


# Images of one size, which no processor resizes


@pytest.fixture
def as_they_are(start, tmp_path) -> Path:
    """Two fine-tunes that take images of 8 x 8 pixels as they are."""
    for seed in range(2):
        model = ViTForImageClassification.from_pretrained(start)
        train(model, learning_rate=1e-3, epochs=1, seed=seed)
        model.save_pretrained(tmp_path / "sized" / f"ft-{seed}")
        ViTImageProcessor(do_resize=False).save_pretrained(tmp_path / "sized" / f"ft-{seed}")
    return tmp_path / "sized"


def test_images_of_one_size_go_the_whole_road(as_they_are, digits, tmp_path):
    gathered = hf_radin.gather(f"{as_they_are}/*")
    job = hf_radin.estimate(gathered, digits, cache_dir=tmp_path / "cache")
    assert job.probe.fit >= 1 and job.images == 600
    bank = hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")
    soup = hf_radin.radin(bank, budget=1, test_split="test")
    assert bank.score(np.eye(2)).min() > 0.5 and soup.accuracy("soup", "test") > 0.5


def test_images_of_another_size_are_named_before_the_passes(as_they_are, tmp_path):
    images, labels = digit_images(slice(700, 710))
    images[6] = images[6].resize((16, 16))
    gathered = hf_radin.gather(f"{as_they_are}/*")
    with pytest.raises(ValueError, match=r"shapes: \(3, 8, 8\) of sample 0, \(3, 16, 16\) of sample 6.*--image-pro"):
        hf_radin.compute_logits(gathered, image_dataset(images, labels), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_images_of_another_size_that_come_later_are_named_by_where_they_are(as_they_are, tmp_path):
    from hf_radin.images.cache import block_size

    images, labels = digit_images(slice(0, 700))
    block = block_size(len(images))
    images[block:] = [image.resize((16, 16)) for image in images[block:]]
    gathered = hf_radin.gather(f"{as_they_are}/*")
    place = rf"from number {block} of shard 0 on"
    with pytest.raises(ValueError, match=place + r" .* shape \(3, 16, 16\), .* \(3, 8, 8\)\. .*ID"):
        hf_radin.compute_logits(gathered, image_dataset(images, labels), cache_dir=tmp_path / "cache")


def test_images_of_a_size_that_the_models_do_not_take_are_named_before_the_passes(as_they_are, tmp_path):
    images, labels = digit_images(slice(700, 710))
    gathered = hf_radin.gather(f"{as_they_are}/*")
    larger = image_dataset([image.resize((16, 16)) for image in images], labels)
    with pytest.raises(ValueError, match=r"ft-[0-9]: its model can't be run on what its image processor makes"):
        hf_radin.compute_logits(gathered, larger, cache_dir=tmp_path / "cache")


def test_where_processors_read_differently_three_images_decide_and_else_one(tmp_path):
    images, labels = digit_images(slice(700, 710))
    split = open_split(DataSource(image_dataset(images, labels), "train"))
    assert list(example_images(split)) == [0] and list(example_images(split, least=3)) == [0, 1, 2]
    images[5], images[7] = images[5].resize((9, 30)), images[7].resize((40, 40))
    split = open_split(DataSource(image_dataset(images, labels), "train"))
    assert list(example_images(split)) == list(example_images(split, least=3)) == [0, 5, 7]
    split = open_split(DataSource(image_dataset(images[:2], labels[:2]), "train"))
    assert list(example_images(split, least=3)) == [0, 1]


def test_what_is_there_already_asks_no_image(two, digits, tmp_path):
    gathered = hf_radin.gather(f"{two}/*")
    with counted(example_images) as calls:
        hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")
    assert calls.total() == 1
    with counted(example_images) as calls:
        hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache" / "banks")  # the prepared images are there
        hf_radin.compute_logits(gathered, digits, cache_dir=tmp_path / "cache")
    assert calls.total() == 0


def test_the_class_of_equal_configurations_is_looked_up_once_and_of_others_anew():
    # of a size that no other test has
    tiny = {"image_size": 44, "patch_size": 4, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    configs = [SwinConfig(image_size=44, depths=[1], num_heads=[1]), *(ViTConfig(**tiny) for _ in range(3))]
    with counted(modeling.empty_model) as calls:
        classes = [modeling.model_class(config) for config in configs]
    assert classes == [SwinForImageClassification, *[ViTForImageClassification] * 3]
    assert calls["empty_model"] == 2
    broken = ViTConfig(**{**tiny, "patch_size": 0})  # what can't be built is refused, whatever was built before
    with pytest.raises(ValueError, match="makes no image classifier"):
        modeling.model_class(broken)
