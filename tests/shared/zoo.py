"""Six checkpoints, of which a pilot lets three see all images and the others those that tell recipes apart."""

import pytest

import hf_radin

# How many of the six lead.
LEADING = 3


@pytest.fixture(scope="module")
def zoo(runs, start) -> hf_radin.Ingredients:
    """Five fine-tunes and the checkpoint that they began from."""
    return hf_radin.gather([f"{runs}/ft-*", str(start)])


@pytest.fixture(scope="module")
def zoo_bank(zoo, digits, cache) -> hf_radin.LogitBank:
    """All logits of the six."""
    return hf_radin.compute_logits(zoo, digits, cache_dir=cache)


@pytest.fixture(scope="module")
def zoo_pilot(zoo, digits, cache) -> hf_radin.LogitBank:
    """The six on a quarter of the split."""
    return hf_radin.compute_logits(zoo, digits, cache_dir=cache, pilot=0.25)
