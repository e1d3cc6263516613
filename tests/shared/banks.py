"""What tests ask of a bank as a user of plain transformers would, and banks that behave otherwise."""

from dataclasses import fields
from typing import TypeVar

import torch

import hf_radin

Kind = TypeVar("Kind", bound=hf_radin.LogitBank)


def plain_inputs(bank: hf_radin.LogitBank) -> list[dict[str, torch.Tensor]]:
    """Of each block of images what a model takes, as the image processor made it."""
    blocks = [bank.images.read(block) for block in bank.images.blocks]
    return [{name: value.to("cpu").clone() for name, value in inputs.items()} for inputs in blocks]


def as_kind(bank: hf_radin.LogitBank, kind: type[Kind]) -> Kind:
    """The same bank as one of a subclass."""
    return kind(**{field.name: getattr(bank, field.name) for field in fields(bank) if field.init})
