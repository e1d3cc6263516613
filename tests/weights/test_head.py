"""The head of any architecture: found by running it once, read, recorded and replaced, and nothing else with it."""

import pytest
import torch
from shared.architectures import CLASSES, EXCEPTIONS, INSTALLED, build, build_processor, pictures
from shared.models import little_memory
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_radin.checkpoints.forward import Running
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.runtime.processes import Processes
from hf_radin.weights.head import Head, LinearLayer, Recording, differ_in_heads, find_head, locate_head

PAIRS = {
    "DeiTForImageClassificationWithTeacher": ("cls_classifier", "distillation_classifier"),
    "LevitForImageClassificationWithTeacher": ("classifier.linear", "classifier_distill.linear"),
    "SwiftFormerForImageClassification": ("head", "dist_head"),
}


def vit(**options) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes, **options)).eval()


def shuffled(model):
    """The model with weights by which each image has logits of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1 + noise / 10)
    return model


def images(count: int = 5) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def running(batch_size: int = 2, **options) -> Running:
    return Running(Processes().accelerator, torch.float32, batch_size, **options)


def another(layer: LinearLayer) -> LinearLayer:
    return LinearLayer(layer.weight[::-1] * 2, None if layer.bias is None else layer.bias - 1)


@pytest.mark.parametrize(
    "architecture", [architecture for architecture in INSTALLED if architecture.model_type not in EXCEPTIONS], ids=str
)
def test_every_architecture_has_a_head(tmp_path, architecture):
    model, processor = shuffled(build(architecture)), build_processor(architecture)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ingredient = Ingredient("ft", "sha256:0", tmp_path, CLASSES, architecture.class_name)
    inputs = dict(processor(images=pictures(3), return_tensors="pt"))
    head = find_head(ingredient)
    assert head == locate_head(model, inputs) == find_head(ingredient, {name: v[0] for name, v in inputs.items()})
    assert head.classes == 3 and head.has_bias == (architecture.model_type != "imagegpt")
    if len(head.modules) > 1:
        assert head.modules == PAIRS[architecture.class_name]
    recording, before = Recording(model, head), {name: value.clone() for name, value in model.state_dict().items()}
    (logits,) = running().logits([model], inputs)
    features, layer = recording.take(), head.layer_of(model)
    assert features.shape == (3, head.features) and abs(features[0] - features[1]).max() > 0
    torch.testing.assert_close(layer(features), logits.astype(float), rtol=1e-4, atol=1e-4)
    head.put(model, another(layer))
    (logits,) = running().logits([model], inputs)
    torch.testing.assert_close(another(layer)(features), logits.astype(float), rtol=1e-4, atol=1e-4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == set(head.modules)


def test_new_heads_of_zeros_are_found_as_well(tmp_path):
    model = vit()
    torch.nn.init.zeros_(model.classifier.weight)
    assert locate_head(model, images()).modules == ("classifier",)


def test_what_is_read_and_put_back_is_the_same_head():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model = shuffled(vit()).to(dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        head = Head(("classifier",), (16,), 3, True)
        head.put(model, head.layer_of(model))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_logits_of_no_linear_layer_are_refused():
    class Cool(ViTForImageClassification):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits / 2
            return output

    model = Cool(vit().config).eval()
    with pytest.raises(ValueError, match="Cool: its logits are the output of no linear layer"):
        locate_head(shuffled(model), images())


def test_a_model_that_takes_no_such_image_is_named(tmp_path):
    vit().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(tmp_path)
    ingredient = Ingredient("org/ft", "sha256:0", tmp_path, CLASSES, "ViTForImageClassification")
    with pytest.raises(ValueError, match="org/ft: to find its head it was shown an image, which it does not take"):
        find_head(ingredient)
    assert find_head(ingredient, {"pixel_values": images(1)["pixel_values"][0]}).modules == ("classifier",)


def test_a_processor_that_keeps_the_size_of_images_is_shown_one_of_the_models_size(tmp_path):
    vit().save_pretrained(tmp_path)
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    ingredient = Ingredient("org/ft", "sha256:0", tmp_path, CLASSES, "ViTForImageClassification")
    assert find_head(ingredient).modules == ("classifier",)
    alone = Ingredients([ingredient])
    assert differ_in_heads(alone, {"classifier.bias"}) and not differ_in_heads(alone, {"vit.layernorm.bias"})


def test_a_head_that_is_tied_to_another_layer_is_refused():
    model = shuffled(vit())
    model.vit.layernorm.bias = torch.nn.Parameter(torch.zeros(16))
    model.twin = torch.nn.Linear(16, 3)
    model.twin.weight = model.classifier.weight
    with pytest.raises(ValueError, match=r"classifier\.weight and twin\.weight are one tensor"):
        locate_head(model, images())
    head = Head(("classifier",), (16,), 3, True)
    with pytest.raises(ValueError, match="are one tensor"):
        head.put(model, head.layer_of(model))


def test_a_head_of_another_shape_is_refused():
    model = shuffled(vit())
    head = locate_head(model, images())
    layer = head.layer_of(model)
    for other in (LinearLayer(layer.weight[:2], layer.bias[:2]), LinearLayer(layer.weight)):
        with pytest.raises(ValueError, match=r"does not fit a model that takes \(3, 16\) with a bias"):
            head.put(model, other)


def test_batches_that_failed_are_not_recorded():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = shuffled(ResNetForImageClassification(config).eval())
    head = locate_head(model, images())
    recording = Recording(model, head)
    running().logits([model], images(7))
    features = recording.take()
    with little_memory(images=3):
        (logits,) = running(batch_size=7).logits([model], images(7))
    again = recording.take()
    torch.testing.assert_close(again, features)
    torch.testing.assert_close(head.layer_of(model)(again), logits.astype(float), rtol=1e-4, atol=1e-5)
    assert len(recording.take()) == 0


def test_a_model_gives_the_same_logits_while_it_is_recorded():
    model = shuffled(vit())
    (logits,) = running().logits([model], images())
    recording = Recording(model, locate_head(model, images()))
    (recorded,) = running().logits([model], images())
    assert (logits == recorded).all() and recording.take().shape == (5, 16)


def test_features_of_half_precision_are_recorded_in_full():
    model = shuffled(vit())
    head = locate_head(model, images())
    recording = Recording(model, head)
    with torch.autocast("cpu", torch.bfloat16):
        (logits,) = running().logits([model], images())
    features = recording.take()
    assert features.dtype == "float32"
    torch.testing.assert_close(head.layer_of(model)(features), logits.astype(float), rtol=2e-2, atol=2e-2)


def test_a_compiled_model_is_recorded_too():
    model = shuffled(vit())
    head = locate_head(model, images())
    recording = Recording(model, head)
    model.compile(backend="eager")  # traced as by any other backend, in a second
    (logits,) = running(batch_size=4).logits([model], images(4))
    features = recording.take()
    assert features.shape == (4, 16)
    torch.testing.assert_close(head.layer_of(model)(features), logits.astype(float), rtol=1e-4, atol=1e-5)
