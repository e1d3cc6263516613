"""A tail gives what the whole model gives, to the last bit and for any number of images; else it is refused."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from shared.architectures import EXCEPTIONS, INSTALLED, build_processor, pictures, save_fine_tunes
from shared.models import little_memory
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import ModelOutput

from hf_radin.checkpoints.forward import Running
from hf_radin.tail.choose import made_batch
from hf_radin.tail.cut import CutError, find_cuts
from hf_radin.tail.stand_ins import GIVEN, Tail, recorded

NET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "layer_type": "basic"}


def running(batch_size: int = 4, **options) -> Running:
    return Running(Accelerator(cpu=True), torch.float32, batch_size, **options)


def answers(model, tail: Tail, batch: dict[str, torch.Tensor], how: Running) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a model, and those of its tail from what its first module was given meanwhile."""
    with recorded(model, tail.cut.module) as batches:
        (expected,) = how.logits([model], batch)
    (logits,) = how.logits([tail], {GIVEN: torch.cat(batches)})
    return torch.from_numpy(expected), torch.from_numpy(logits)


def exact_tail(model, cut, example: dict[str, torch.Tensor]) -> Tail | None:
    """None where it is refused, as where what goes past the cut is too little to be noticed when it is found."""
    try:
        return Tail.of(model, cut, running(), example)
    except CutError:
        return None


@pytest.mark.parametrize(
    "architecture", [architecture for architecture in INSTALLED if architecture.model_type not in EXCEPTIONS], ids=str
)
def test_every_architecture_has_an_exact_tail(tmp_path, architecture):
    save_fine_tunes(architecture, tmp_path, count=1)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "ft-0").eval()
    inputs = build_processor(architecture)(images=pictures(1), return_tensors="pt")
    example = {name: value[0] for name, value in inputs.items()}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    cuts = find_cuts(model, made_batch(example, model.main_input_name))
    blocks = (cut for cut in cuts if len({*cut.tensors} & matrices) > 2)
    tail = next(filter(None, (exact_tail(model, cut, example) for cut in islice(blocks, 4))))
    for images in (1, 7):  # a batch of 4 and a batch of 3
        expected, logits = answers(model, tail, made_batch(example, model.main_input_name, images), running())
        assert torch.equal(logits, expected) and len(logits) == images


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).eval()


def noise(seed: int = 8) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def cut_at(model, module: str):
    return next(cut for cut in find_cuts(model, made_batch(noise(), "pixel_values")) if cut.module == module)


def test_the_front_of_another_model_serves_where_it_is_the_same():
    model, other = vit(), vit()
    with torch.no_grad():
        for parameter in other.vit.layers[2].parameters():
            parameter.add_(0.1)
        other.classifier.weight.add_(0.1)
    tail = Tail.of(model, cut_at(model, "vit.layers.2"), running(), noise())
    expected, logits = answers(other, replace(tail, model=other), made_batch(noise(9), "pixel_values", 6), running())
    assert torch.equal(logits, expected)
    assert not torch.equal(answers(model, tail, made_batch(noise(9), "pixel_values", 6), running())[0], expected)


def test_a_tail_leaves_its_model_as_it_was():
    model = vit()
    before, hooks = {*vars(model.vit.layers[0])}, len(model._forward_hooks)
    tail = Tail.of(model, cut_at(model, "vit.layers.1"), running(), noise())
    answers(model, tail, made_batch(noise(9), "pixel_values", 5), running())
    assert {*vars(model.vit.layers[0])} == before and len(model._forward_hooks) == hooks
    assert not model.vit.layers[1]._forward_pre_hooks


@pytest.mark.parametrize("options", [{"channels_last": True}, {"dtype": torch.bfloat16}], ids=str)
def test_however_a_model_runs(options):
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**NET, num_labels=3)).eval()
    dtype = options.pop("dtype", torch.float32)
    how = Running(Accelerator(cpu=True), dtype, 4, **options)
    cut = cut_at(model, "resnet.encoder.stages.2.layers.0")
    tail = Tail.of(how.ready(model), cut, how, noise())
    expected, logits = answers(model, tail, made_batch(noise(9), "pixel_values", 6), how)
    assert torch.equal(logits, expected)


def test_a_batch_that_does_not_fit_into_memory_is_recorded_once():
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**NET, num_labels=3)).eval()
    with little_memory(2), recorded(model, "resnet.encoder.stages.1") as batches:
        running().logits([model], made_batch(noise(), "pixel_values", 6))
    assert [len(batch) for batch in batches] == [2, 2, 2]


class Counted(torch.nn.Module):
    """How many images there are, by a module that is told nothing else."""

    def forward(self, images: torch.Tensor) -> int:
        return len(images) ** 2


class Net(PreTrainedModel):
    """A net whose logits depend on how many images are shown, which a module in front of the cut says."""

    config_class = ViTConfig
    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__(ViTConfig())
        torch.manual_seed(0)
        self.count, self.first, self.head = Counted(), torch.nn.Linear(192, 6), torch.nn.Linear(6, 3)

    def forward(self, pixel_values: torch.Tensor) -> ModelOutput:
        number = self.count(pixel_values)
        return ModelOutput(logits=self.head(self.first(pixel_values.flatten(1))) * number)


def test_a_tail_that_depends_on_more_than_it_is_given_is_refused():
    model = Net().eval()
    with pytest.raises(CutError, match="its tail from head on does not run alone"):
        Tail.of(model, cut_at(model, "head"), running(), noise())


def test_whoever_listens_to_the_first_module_hears_what_it_is_given():
    model, heard = vit(), []
    tail = Tail.of(model, cut_at(model, "vit.layers.2"), running(), noise())
    model.vit.layers[2].register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0].clone()))
    given = torch.randn(3, 5, 16)
    running().logits([tail], {GIVEN: given})
    assert torch.equal(heard[0], given)
