"""What tests ask of a bank as a user of plain transformers would."""

import torch

import hf_radin


def plain_inputs(bank: hf_radin.LogitBank) -> list[dict[str, torch.Tensor]]:
    """Of each block of images what a model takes, as the image processor made it."""
    blocks = [bank.images.read(block) for block in bank.images.blocks]
    return [{name: value.to("cpu").clone() for name, value in inputs.items()} for inputs in blocks]
