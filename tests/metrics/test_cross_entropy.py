"""Cross-entropies are those of torch, multi-label those of two classes a pair; log losses at the best temperature."""

import numpy as np
import pytest
import torch

from hf_radin.metrics.cross_entropy import (
    best_scale,
    calibrated_losses,
    compared,
    log_losses,
    normalised,
    probabilities,
    taught_probabilities,
)


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(7, size=3000)  # more than are added up at a time
    logits = 3 * generator.normal(size=(3000, 7)) + 4 * np.eye(7)[labels]
    return logits.astype(np.float32), labels


def test_they_are_those_of_torch(answers):
    logits, labels = answers
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(labels), reduction="none")
    np.testing.assert_allclose(log_losses(logits, labels), expected, rtol=1e-12, atol=1e-14)


def test_no_other_temperature_is_better(answers):
    logits, labels = answers
    best = calibrated_losses(logits, labels).mean()
    around = [log_losses(scale * logits.astype(float), labels).mean() for scale in np.geomspace(0.1, 10, 41)]
    assert best <= min(around) and best == pytest.approx(min(around), abs=0.01) and max(around) > best + 0.1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_scale_of_the_logits_makes_no_difference(answers, scale):
    logits, labels = answers
    np.testing.assert_allclose(
        calibrated_losses(scale * logits, labels).mean(), calibrated_losses(logits, labels).mean(), rtol=1e-4
    )


def test_where_all_are_right_there_is_no_best_temperature_and_hardly_a_loss():
    labels = np.arange(5)
    assert calibrated_losses(np.eye(5, dtype=np.float32), labels).max() < 1e-6
    assert calibrated_losses(np.ones((5, 3), np.float32), labels % 3) == pytest.approx(np.log(3) * np.ones(5))


def test_logits_are_brought_to_probabilities_by_one_number():
    logits = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    powers = np.exp(2.5 * logits)
    assert best_scale(logits, powers / powers.sum(1, keepdims=True)) == pytest.approx(2.5, rel=1e-4)
    labels = np.random.default_rng(1).integers(0, 4, 200)
    assert best_scale(logits, np.eye(4)[labels]) == pytest.approx(best_scale(logits, labels), rel=1e-6)


@pytest.fixture
def label_sets() -> tuple[np.ndarray, np.ndarray]:
    """Logits of images that may have any number of classes, and which they have."""
    generator = np.random.default_rng(0)
    labels = generator.random((2000, 5)) < 0.3
    return (6 * labels - 4 + 3 * generator.normal(size=labels.shape)).astype(np.float32), labels


def of_two_classes(logits: np.ndarray) -> np.ndarray:
    """Each pair of an image and a class as an image of two classes, that it is there and that it is not."""
    pairs = logits.reshape(-1, 1)
    return np.concatenate([np.zeros_like(pairs), pairs], axis=1)


def test_multi_label_losses_are_those_of_pairs_of_two_classes(label_sets):
    logits, labels = label_sets
    pairs, of_pairs = of_two_classes(logits), labels.ravel().astype(int)
    expected = log_losses(pairs, of_pairs).reshape(labels.shape).mean(1)
    np.testing.assert_allclose(log_losses(logits, labels), expected, rtol=1e-12, atol=1e-14)
    of_torch = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits).double(), torch.tensor(labels).double(), reduction="none"
    )
    np.testing.assert_allclose(log_losses(logits, labels), of_torch.mean(1), rtol=1e-12, atol=1e-14)
    scale = best_scale(pairs, of_pairs)
    assert best_scale(logits, labels, multi_label=True) == pytest.approx(scale, rel=1e-9) != 1
    np.testing.assert_allclose(calibrated_losses(logits, labels), log_losses(scale * logits, labels), rtol=1e-6)


def test_sigmoids_are_brought_to_probabilities_by_one_number(label_sets):
    logits, _ = label_sets
    wanted = 1 / (1 + np.exp(-0.4 * logits.astype(float)))
    assert best_scale(logits, wanted, multi_label=True) == pytest.approx(0.4, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_taught_of_classes_by_themselves_is_taught_of_pairs(label_sets, share):
    logits, labels = label_sets
    teacher = torch.from_numpy(logits[::-1].copy()).double()
    wanted = taught_probabilities(teacher, labels, share, multi_label=True)
    of_pairs = taught_probabilities(
        torch.from_numpy(of_two_classes(teacher.numpy())), labels.ravel().astype(int), share
    )
    torch.testing.assert_close(wanted.ravel(), of_pairs[:, 1])
    given = torch.from_numpy(logits).double()
    entropies, errors = compared(given, wanted, multi_label=True)
    both = compared(torch.from_numpy(of_two_classes(given.numpy())), of_pairs)
    torch.testing.assert_close(entropies.ravel(), both[0].sum(1))
    torch.testing.assert_close(errors.ravel(), both[1][:, 1])


@pytest.mark.parametrize("multi_label", [False, True])
def test_errors_are_the_slope_of_the_cross_entropy(multi_label):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    wanted = taught_probabilities(teacher, None, 0.0, multi_label=multi_label)
    entropies, errors = compared(logits, wanted, multi_label=multi_label)
    (slope,) = torch.autograd.grad(entropies.sum(), logits)
    torch.testing.assert_close(slope, errors.detach())
    other = teacher + 1.0  # a number for all classes
    is_same = torch.allclose(probabilities(other, multi_label=multi_label), wanted)
    assert is_same != multi_label


@pytest.mark.parametrize("multi_label", [False, True])
def test_what_normalises_gives_probabilities_and_cross_entropies(multi_label):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = 30 * torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    wanted = probabilities(teacher, multi_label=multi_label)
    logs, given = normalised(logits, multi_label=multi_label)
    torch.testing.assert_close(given, probabilities(logits, multi_label=multi_label))
    entropies, _ = compared(logits, wanted, multi_label=multi_label)
    torch.testing.assert_close(logs.sum(1) - (wanted * logits).sum(1), entropies.sum(1))


def test_logits_without_doubt_have_finite_losses():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    labels = np.array([[True, False], [True, True]])
    assert log_losses(logits, labels) == pytest.approx([0, 5e3])
    assert np.isfinite(calibrated_losses(logits, labels)).all()
