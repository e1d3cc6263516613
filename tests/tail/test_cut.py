"""A model can be cut in two wherever its logits depend on nothing but what one module is given."""

import copy
from itertools import pairwise

import pytest
import torch
from shared.architectures import EXCEPTIONS, INSTALLED, build_processor, pictures, save_fine_tunes
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import ModelOutput

from hf_radin.tail.choose import choose_cut
from hf_radin.tail.cut import CutError, find_cuts, open_tail


def vit(**options) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes, **options)).eval()


def images(count: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def logits_of(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else output[0]


def given_to(model, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    given = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()))
    logits_of(model, batch)
    hook.remove()
    return given[0]


class Net(torch.nn.Module):
    """Two linear layers and one activation, which both use and which changes what it is given in place."""

    def __init__(self, *, is_tied: bool = False, adds_input: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.adds_input = adds_input
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.act, self.head = torch.nn.ReLU(inplace=True), torch.nn.Linear(6, 3)
        if is_tied:
            self.second.weight = self.first.weight

    def forward(self, pixel_values: torch.Tensor) -> ModelOutput:
        hidden = self.act(self.first(pixel_values))
        inner = self.act(self.second(hidden))
        return ModelOutput(logits=self.head(inner + pixel_values if self.adds_input else inner))


@pytest.mark.parametrize(
    "architecture", [architecture for architecture in INSTALLED if architecture.model_type not in EXCEPTIONS], ids=str
)
def test_every_architecture_has_a_tail_that_runs_alone(tmp_path, architecture):
    save_fine_tunes(architecture, tmp_path, count=1)
    model = AutoModelForImageClassification.from_pretrained(next(tmp_path.glob("*/config.json")).parent).eval()
    processor = build_processor(architecture)
    inputs = [processor(images=[picture], return_tensors="pt") for picture in pictures(6)]
    batch = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}
    cut = choose_cut(model, {name: value[0] for name, value in batch.items()}, "block")
    expected = logits_of(model, batch)
    others = {name: value.roll(1, 0) for name, value in batch.items()}
    with open_tail(model, cut, others) as run, torch.inference_mode():
        answer = run(given_to(model, cut.module, batch))
    assert (answer - expected).abs().max() <= 1e-3 * (expected - expected.mean(0)).abs().max()
    matrices = [name for name in cut.tensors if model.get_parameter(name).ndim > 1]
    assert len(matrices) >= 2 and 0 < cut.share < 1
    assert torch.equal(logits_of(model, batch), expected)  # all is as it was


def test_each_cut_has_more_behind_it():
    model = vit()
    cuts = [*find_cuts(model, images(2))]
    names = [cut.module for cut in cuts]
    assert names[:4] == ["classifier", "vit.layernorm", "vit.layers.2", "vit.layers.1"]
    for smaller, larger in pairwise(cuts):
        assert {*smaller.tensors} < {*larger.tensors} and smaller.share <= larger.share
        assert smaller.parameters < larger.parameters
    assert cuts[2].shape == (5, 16) and cuts[2].width == 80 and cuts[2].front[-1] == "vit.layers.1"
    behind = {name for name, _ in model.named_parameters() if not name.startswith(("vit.embeddings", "vit.layers"))}
    assert {*cuts[1].tensors} == behind
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_that_is_used_on_both_sides_and_in_place():
    model = Net()
    batch = {"pixel_values": torch.randn(4, 6)}
    cuts = {cut.module: cut for cut in find_cuts(model, {"pixel_values": batch["pixel_values"][:2]})}
    assert {*cuts} == {"head", "second", "first"}
    with open_tail(model, cuts["second"], {"pixel_values": torch.randn(4, 6)}) as run:
        for _ in range(2):  # what was changed in place is given anew
            answer = run(given_to(model, "second", batch))
            assert torch.allclose(answer, logits_of(model, batch), atol=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("is_tied", {"head", "first"}), ("adds_input", {"head"})])
def test_no_cut_where_more_than_one_thing_goes_through_or_a_tensor_is_on_both_sides(kind, expected):
    cuts = find_cuts(Net(**{kind: True}), {"pixel_values": torch.randn(2, 6)})
    assert {cut.module for cut in cuts} == expected


def test_the_tail_learns_and_nothing_else():
    model = vit()
    cut = choose_cut(model, {"pixel_values": images(1)["pixel_values"][0]}, "block")
    with open_tail(model, cut, images(4)) as run:
        run(given_to(model, cut.module, images(4, seed=2))).sum().backward()
    slopes = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert slopes == {*cut.tensors}


def test_images_that_are_all_the_same_to_a_model_are_refused():
    model = vit()
    torch.nn.init.zeros_(model.classifier.weight)
    with pytest.raises(CutError, match="gives all images the same logits"):
        [*find_cuts(model, images(2))]


def test_which_layers_can_be_chosen():
    model, example = vit(), {"pixel_values": images(1)["pixel_values"][0]}
    assert choose_cut(model, example, "block").module == "vit.layers.2"
    assert choose_cut(model, example, "stage").module == "vit.layers.2"  # a third, and there is none with a quarter
    assert choose_cut(model, example, "vit.layers.1").module == "vit.layers.1"
    with pytest.raises(CutError, match="classifier is the head, or a norm before it: a head is refitted"):
        choose_cut(model, example, "classifier")
    with pytest.raises(
        CutError, match=r"can't be cut in two at 'vit.layers.9'; it can at classifier, vit.layernorm, vit"
    ):
        choose_cut(model, example, "vit.layers.9")
    deep = copy.deepcopy(model)
    deep.vit.layers.extend([copy.deepcopy(model.vit.layers[0]) for _ in range(9)])
    assert choose_cut(deep, example, "stage").module == "vit.layers.9"  # three of twelve
