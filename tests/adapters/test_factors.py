"""Products of factors add up exactly, and the nearest one of a rank is found without forming any."""

import math

import pytest
import torch

from hf_radin.adapters.factors import added, bound, largest_rank, reduced
from hf_radin.checkpoints.lora import Factors


def drawn(rank: int, inputs: int = 9, outputs: int = 7, *, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    down, up = (
        torch.randn(shape, generator=generator, dtype=torch.double) for shape in ((rank, inputs), (outputs, rank))
    )
    return Factors(down, up)


def product(factors: Factors) -> torch.Tensor:
    return factors.up @ factors.down


def test_a_sum_of_products_is_a_product_whose_ranks_add_up():
    parts = [(0.5, drawn(2, seed=1)), (-0.25, drawn(3, seed=2)), (0.75, drawn(1, seed=3))]
    total = added(parts)
    assert total.rank == 6
    torch.testing.assert_close(product(total), sum(weight * product(factors) for weight, factors in parts))


@pytest.mark.parametrize("rank", range(1, 8))
def test_the_nearest_of_a_rank_loses_what_no_other_could_keep(rank):
    """By the theorem of Eckart and Young: the singular values beyond the rank."""
    factors = drawn(12)
    cut, values = reduced(factors, rank), torch.linalg.svdvals(product(factors))
    assert cut.factors.rank == rank and torch.linalg.matrix_rank(product(cut.factors)) == rank
    lost = torch.linalg.matrix_norm(product(cut.factors) - product(factors))
    assert math.isclose(lost, (values[rank:] ** 2).sum().sqrt(), abs_tol=1e-12)
    assert math.isclose(cut.lost, lost**2, abs_tol=1e-12)
    assert math.isclose(cut.whole, torch.linalg.matrix_norm(product(factors)) ** 2)


def test_with_the_rank_of_the_matrix_nothing_is_lost():
    factors = drawn(40)
    cut = reduced(factors, largest_rank(factors))
    assert (cut.factors.rank, cut.lost) == (7, 0.0)
    torch.testing.assert_close(product(cut.factors), product(factors))


def test_factors_of_a_lower_rank_stay_as_they_are():
    factors = drawn(3)
    cut = reduced(factors, 3)
    assert cut.factors is factors and cut.lost == 0
    assert math.isclose(cut.whole, torch.linalg.matrix_norm(product(factors)) ** 2)


def test_the_product_is_not_formed():
    """It would have 10^11 entries."""
    assert reduced(drawn(6, inputs=300_000, outputs=300_000), 2).factors.up.shape == (300_000, 2)


def test_what_is_no_number_has_no_rank():
    factors = drawn(5)
    factors.up[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        reduced(factors, 2)


def test_no_entry_is_beyond_the_bound():
    factors = drawn(5)
    assert product(factors).abs().max() <= bound(factors)
