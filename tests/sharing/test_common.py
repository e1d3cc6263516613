"""What models have in common is counted tensor by tensor, and of a tree branch by branch."""

import pytest
import torch

from hf_radin.sharing.common import Common, PassOrder, groups
from hf_radin.sharing.digests import TensorDigests

SIZES = {"a": 60, "b": 30, "c": 10}


def digests(*models: str) -> list[TensorDigests]:
    """Models of three tensors; the same letter is the same tensor."""
    return [TensorDigests(dict(zip(SIZES, model, strict=True))) for model in models]


def test_shares_are_of_numbers_and_not_of_tensors():
    (everything,) = groups(digests("xyz", "xyw"), SIZES)
    assert everything == Common((0, 1), 2, 3, 0.9, frozenset("c"))
    assert groups(digests("xyz", "uvw"), SIZES) == [Common((0, 1), 0, 3, 0.0, frozenset("abc"))]


def test_a_tree_has_its_branches_the_deepest_first():
    tree = digests("xyz", "xpq", "xyw", "xpr", "xst")
    parts = groups(tree, SIZES)
    assert parts[0].models == (0, 1, 2, 3, 4) and parts[0].share == pytest.approx(0.6)
    assert [(common.models, common.share) for common in parts[1:]] in (
        [((0, 2), pytest.approx(0.9)), ((1, 3), pytest.approx(0.9))],
        [((1, 3), pytest.approx(0.9)), ((0, 2), pytest.approx(0.9))],
    )


def test_those_who_share_with_nobody_are_in_no_group():
    parts = groups(digests("xyz", "uvw", "xyr"), SIZES)
    assert [(common.models, common.tensors) for common in parts] == [((0, 1, 2), 0), ((0, 2), 2)]


class Model(torch.nn.Module):
    """Three layers with as many multiplications each, one of which is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        self.head = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        layer = self.head["layer"]
        return torch.nn.functional.linear(self.body(images), layer.weight, layer.bias)


@pytest.mark.parametrize(
    ("names", "share"),
    [
        ([], 1.0),
        (["body.2.bias"], 1 / 3),
        (["body.1.running_mean"], 1 / 3),
        (["body.2.weight", "body.0.weight"], 0.0),
        (["head.layer.weight"], 0.0),  # who knows when that is used: the model itself has it
    ],
)
def test_what_comes_before_the_first_difference_is_common_work(names, share):
    batch = {"images": torch.zeros(2, 4)}
    assert PassOrder.of(Model().eval(), batch).before(names) == pytest.approx(share)
