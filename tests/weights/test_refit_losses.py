"""Log losses, and those at the temperature that is best."""

import numpy as np
import pytest
import torch

from hf_radin.weights.refit import best_scale, calibrated_losses, log_losses


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
