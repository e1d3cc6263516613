"""Who is kin is seen from the angles between weights."""

import numpy as np
import pytest

from hf_radin.ingredients.kinship import KIN, Weights, find_far_off, inner_products, relate

ENTRIES = 5000


def fine_tunes(start: np.ndarray, count: int, spread: float, seed: int) -> list[Weights]:
    generator = np.random.default_rng(seed)
    moved = [start + spread * generator.standard_normal(ENTRIES) for _ in range(count)]
    return [Weights(entries.astype(np.float32)) for entries in moved]


@pytest.fixture
def starts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(ENTRIES) for _ in range(4)]


def named(*groups: list[Weights]) -> dict[str, Weights]:
    return {f"{place}-{member}": weights for place, group in enumerate(groups) for member, weights in enumerate(group)}


def kin(weights: dict[str, Weights]) -> list[str]:
    return [relation.id for relation in relate(weights) if relation.is_kin]


def test_fine_tunes_of_one_start_are_kin(starts):
    weights = named(fine_tunes(starts[0], 5, 0.3, seed=1))
    relations = relate(weights)
    assert kin(weights) == list(weights)
    # what it should be for independent steps: each lies 0.3 * sqrt(1 - 1/5) from the mean
    mean = np.mean([model.entries for model in weights.values()], axis=0)
    for relation in relations:
        assert relation.distance == pytest.approx(0.3 * np.sqrt(0.8) / np.sqrt(1 + 0.09 / 5), rel=0.05)
        entries = weights[relation.id].entries
        cosine = entries @ mean / np.linalg.norm(mean) / np.linalg.norm(entries)
        assert relation.cosine == pytest.approx(cosine, abs=1e-6)
        assert relation.nearest == pytest.approx(1 / 1.09, abs=0.02)


def test_the_larger_of_two_families_counts(starts):
    weights = named(fine_tunes(starts[0], 2, 0.3, seed=1), fine_tunes(starts[1], 3, 0.3, seed=2))
    assert kin(weights) == ["1-0", "1-1", "1-2"]
    others = [relation for relation in relate(weights) if not relation.is_kin]
    assert len(others) == 2
    assert all(relation.cosine < KIN / 2 and relation.distance > 0.9 for relation in others)


def test_of_equal_families_the_first_counts(starts):
    assert kin(named(fine_tunes(starts[0], 2, 0.3, seed=1), fine_tunes(starts[1], 2, 0.3, seed=2))) == ["0-0", "0-1"]


def test_models_of_their_own_are_nobodys_kin(starts):
    weights = named(*[fine_tunes(start, 1, 0.3, seed) for seed, start in enumerate(starts)])
    assert kin(weights) == ["0-0"]
    assert max(relation.nearest for relation in relate(weights)) < KIN / 2


def test_relatives_of_relatives_are_kin(starts):
    a, b = starts[:2]
    path = [Weights((np.cos(t) * a + np.sin(t) * b).astype(np.float32)) for t in np.linspace(0, 1.5, 4)]
    assert len(kin(named(path))) == 4 and relate(named(path))[0].nearest > KIN


def test_copies_of_nothing_are_kin():
    nothing = Weights(np.zeros(ENTRIES))
    assert len(kin(named([nothing, nothing]))) == 2


def test_products_are_those_of_the_differences_from_the_mean():
    rows = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    products = inner_products([Weights(row) for row in rows])
    centred = rows - rows.mean(axis=0)
    np.testing.assert_allclose(products / products[0, 0], centred @ centred.T / (centred[0] @ centred[0]), rtol=1e-4)
    assert products.trace() == pytest.approx(4) and np.abs(products.sum(axis=0)).max() < 1e-4
    assert (inner_products([Weights(rows[0])] * 3) == 0).all()


def test_a_model_that_lies_far_from_all_others_stands_out():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((8, 50))
    assert not find_far_off(products_of(rows))
    rows[5] *= 6
    assert [*find_far_off(products_of(rows))] == [5] and find_far_off(products_of(rows))[5] > 3
    assert not find_far_off(np.zeros((3, 3)))


def products_of(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(axis=0)
    return rows @ rows.T
