"""Models run in the mixed precision that they are to run in, and what is compiled for one of them serves all."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from shared.models import LinearClassifier

from hf_radin.checkpoints.forward import Running


def running(**options) -> Running:
    """How models run in batches of four."""
    return Running(Accelerator(), torch.float32, 4, **options)


def models(count: int) -> list[LinearClassifier]:
    torch.manual_seed(0)
    return [LinearClassifier(torch.randn(3, 5)) for _ in range(count)]


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 60).reshape(12, 5)}


def test_mixed_precision_is_what_is_said_else_the_accelerators(images):
    (model,) = models(1)
    exact, usual, mixed = (
        running(mixed_precision=precision).logits([model], images)[0] for precision in ("no", None, "bf16")
    )
    assert (exact == usual).all() and (exact != mixed).any()
    assert (mixed.view("uint32") & 0xFFFF == 0).all()  # the bits of bfloat16
    np.testing.assert_allclose(exact, images["pixel_values"] @ model.weight.detach().T, rtol=1e-5, atol=1e-6)


def test_a_mixed_precision_that_takes_an_accelerator_is_refused():
    with pytest.raises(ValueError, match="'fp8' takes an accelerator that has it, and this one has 'no': accelerate"):
        running(mixed_precision="fp8").autocast()


def test_what_is_compiled_for_a_model_serves_all_models_like_it(images):
    """Nothing is compiled again for other weights, and each model keeps its own."""
    expected = running().logits(models(3), images)
    compiled = running(compiled=True)
    first, *others = [compiled.ready(model) for model in models(3)]
    (answer,) = compiled.logits([first], images)
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = [answer, *compiled.logits(others, images)]
    for logits, plain in zip(answers, expected, strict=True):
        assert abs(logits - plain).max() < 1e-5
    assert abs(answers[0] - answers[1]).max() > 0.1
