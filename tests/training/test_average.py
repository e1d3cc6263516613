"""The average of the weights that a training goes through."""

import copy

import pytest
import torch
from shared.architectures import INSTALLED, build, build_processor
from transformers import ViTConfig, ViTForImageClassification

from hf_radin.training.average import RunningAverage, decay_at

RESNET = next(architecture for architecture in INSTALLED if architecture.model_type == "resnet")


def moved(model, seed: int):
    """A copy of a model whose tensors are all others, counters of batches included."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += torch.rand(tensor.shape, generator=generator).to(tensor)
        else:
            tensor += seed
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_written_as_a_checkpoint_and_read_back_bit_for_bit(tmp_path, dtype):
    start = build(RESNET).to(dtype)
    average = RunningAverage.of(start.state_dict())
    average.update(moved(start, 1).state_dict(), 0.7)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    average.write(start, tmp_path)
    build_processor(RESNET).save_pretrained(tmp_path)
    again = RunningAverage.read(tmp_path, start.state_dict(), trust_remote_code=False)
    assert {tensor.dtype for tensor in average.tensors.values()} == {torch.float32, torch.int64}
    assert all(again.tensors[name].equal(tensor) for name, tensor in average.tensors.items())
    assert all(start.state_dict()[name].equal(tensor) for name, tensor in before.items())


def test_weights_and_statistics_are_averaged_and_counters_are_the_last():
    start = build(RESNET)
    later = moved(start, 3)
    average = RunningAverage.of(start.state_dict())
    average.update(later.state_dict(), 0.75)
    for name, tensor in average.tensors.items():
        before, after = start.state_dict()[name], later.state_dict()[name]
        expected = 0.75 * before + 0.25 * after if tensor.is_floating_point() else after
        torch.testing.assert_close(tensor, expected)
        assert not tensor.equal(before)


def test_it_forgets_faster_in_the_first_steps_only():
    decays = [decay_at(step, 0.99) for step in (1, 2, 100, 10_000)]
    assert decays == [2 / 11, 3 / 12, 101 / 110, 0.99]


def test_that_of_another_model_is_refused(tmp_path):
    start = build(RESNET)
    RunningAverage.of(start.state_dict()).write(start, tmp_path)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="is no average of the model that is trained"):
        weights = ViTForImageClassification(config).state_dict()
        RunningAverage.read(tmp_path, weights, trust_remote_code=False)
