"""Tensors are told apart to the last bit."""

import copy

import pytest
import torch

from hf_radin.sharing.digests import TensorDigests, differing


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


def test_equal_models_differ_in_nothing(model):
    digests = TensorDigests.of(model)
    assert {*digests.by_name} == {*model.state_dict()}
    assert differing([digests, TensorDigests.of(copy.deepcopy(model))]) == frozenset()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.weight", lambda tensor: tensor[0, 0].mul_(1 + 1e-7)),
        ("0.bias", lambda tensor: tensor.zero_().neg_()),  # -0 is no 0
        ("1.running_mean", lambda tensor: tensor.add_(1)),
        ("1.num_batches_tracked", lambda tensor: tensor.add_(1)),
    ],
)
def test_a_bit_makes_a_difference(model, name, change):
    torch.nn.init.zeros_(model[0].bias)
    changed, third = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        change(changed.state_dict()[name])
    assert differing([TensorDigests.of(each) for each in (model, changed, third)]) == {name}


def test_dtype_and_shape_count_and_a_missing_tensor_differs(model):
    whole, half = TensorDigests.of(model), TensorDigests.of(copy.deepcopy(model).bfloat16())
    assert differing([whole, half]) == {*whole.by_name} - {"1.num_batches_tracked"}
    flat = TensorDigests.of(torch.nn.Linear(1, 4, bias=False))
    assert differing([flat, TensorDigests({})]) == {"weight"}
    square = torch.nn.ParameterDict({"weight": torch.zeros(2, 2)})
    row = torch.nn.ParameterDict({"weight": torch.zeros(4)})
    assert differing([TensorDigests.of(square), TensorDigests.of(row)]) == {"weight"}


def test_a_tensor_of_two_names_has_both(model):
    model[2] = model[0]
    assert TensorDigests.of(model).by_name.keys() >= {"0.weight", "2.weight"}
