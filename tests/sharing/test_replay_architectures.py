"""Fine-tunes with a frozen first half give, of every architecture, the very logits that each gives alone."""

import copy

import pytest
import torch
from shared.architectures import EXCEPTIONS, INSTALLED, build, build_processor, pictures
from transformers import PreTrainedModel

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.sharing.digests import TensorDigests
from hf_radin.sharing.memory import held_once
from hf_radin.sharing.replay import SharedModules

Batch = dict[str, torch.Tensor]


def tuned(start: PreTrainedModel, seed: int, share: float) -> PreTrainedModel:
    """A fine-tune whose first parameters, so many of all, are frozen."""
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
    parameters = [*model.parameters()]
    with torch.no_grad():
        for parameter in parameters[int(share * len(parameters)) :]:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    output = model(**batch)
    return (output.logits if "logits" in output else output[0]).clone()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize(
    "architecture", [architecture for architecture in INSTALLED if architecture.model_type not in EXCEPTIONS], ids=str
)
@torch.no_grad()
def test_a_frozen_first_half_runs_once_and_no_bit_is_another(architecture):
    torch.manual_seed(0)
    start, processor = build(architecture), build_processor(architecture)
    prepared = [prepare_image(processor, picture) for picture in pictures(5)]
    batch = {name: torch.stack([torch.as_tensor(image[name]) for image in prepared]) for name in prepared[0]}
    models = [tuned(start, seed, share) for seed, share in ((1, 0.5), (2, 0.5), (3, 0.25), (4, 0.9))]
    digests = [TensorDigests.of(model) for model in models]
    # of the very tensors that are held: where a tensor lies in memory may decide the last bit of a product
    models = [*held_once(models, digests)]
    alone = [logits_of(model, batch) for model in models]
    shared = SharedModules(models, digests)
    first, others = ({name: tensor[part] for name, tensor in batch.items()} for part in (slice(2), slice(2, 4)))
    assert shared.learn(lambda model: logits_of(model, first), lambda model: logits_of(model, others))
    for subset in ([0, 1, 2, 3], [3, 1]):
        logits = shared.run([models[place] for place in subset], lambda model: logits_of(model, batch))
        assert all(same_bits(of_model, alone[place]) for of_model, place in zip(logits, subset, strict=True))
