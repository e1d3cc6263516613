"""Which layers of a model are its tail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_radin.tail.cut import Cut, CutError, find_cuts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# The share of a model's multiplications that its last stage takes at most.
STAGE = 0.25


def choose_cut(model: PreTrainedModel, example: Mapping[str, torch.Tensor], tail: str) -> Cut:
    """Where the tail of a model begins.

    Args:
        model: in evaluation mode.
        example: an image, prepared, without the batch dimension.
        tail: `block` is the smallest tail that has a matrix, or the filters of a convolution, before the head: the
            last block of most networks. `stage` is the largest one with a quarter of the multiplications, or that
            block if it has more. Else the name of the first module.

    Raises:
        CutError: if there is no such place.
    """
    cuts = find_cuts(model, made_batch(example, model.main_input_name))
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    head, chosen = None, None
    seen = []
    for cut in cuts:
        seen.append(cut.module)
        if head is None:
            head = {*cut.tensors} & matrices
        has_block = bool(({*cut.tensors} & matrices) - head)
        if cut.module == tail and not has_block:
            raise CutError(
                f"{tail} is the head, or a norm before it: a head is refitted (head='refit', --head refit)."
            )
        if cut.module == tail:
            return cut
        if has_block and tail == "block":
            return cut
        if has_block and tail == "stage" and chosen is not None and cut.share > STAGE:
            return chosen
        chosen = cut if has_block else chosen
    if tail == "stage" and chosen is not None:
        return chosen
    raise CutError(
        f"{type(model).__name__} can't be cut in two at {tail!r}; it can at {', '.join(seen) or 'no module'}, or say "
        "'block' or 'stage'."
    )


def made_batch(example: Mapping[str, torch.Tensor], main: str, images: int = 2) -> dict[str, torch.Tensor]:
    """An image, and others of noise; what comes beside the main input, as a mask does, is the same for all.

    Args:
        example: the image, prepared, without the batch dimension.
        main: the name of the main input.
        images: how many there are in all.
    """
    import torch

    generator, batch = torch.Generator().manual_seed(0), {}
    for name, value in example.items():
        tensor = torch.as_tensor(value)
        if tensor.is_floating_point():
            others = [torch.randn(tensor.shape, generator=generator).to(tensor) for _ in range(images - 1)]
        elif name == main and (highest := int(tensor.max()) + 1):
            others = [torch.randint(highest, tensor.shape, generator=generator).to(tensor) for _ in range(images - 1)]
        else:
            others = [tensor] * (images - 1)
        batch[name] = torch.stack([tensor, *others])
    return batch
