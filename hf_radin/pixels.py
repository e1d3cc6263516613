"""Pixels of one byte that stand for exactly what the image processor makes of them.

A processor that decodes, resizes and crops in bytes and rescales and normalises last can only give 256 values for a
channel. Kept by their numbers these take a quarter of the room, and are looked up where the model runs. The values
are the processor's own, so that nothing is rounded; each image is compared, and one that has others is kept in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

Prepare = Callable[[Image.Image], "dict[str, torch.Tensor]"]

# What models take for some samples, by name.
Inputs = dict[str, "torch.Tensor | Pixels"]

_VALUES = 256


@dataclass(frozen=True)
class Pixels:
    """Images as a float tensor `(samples, channels, height, width)`, of which only the codes are kept.

    Args:
        codes: uint8, of that shape.
        table: float32 `(channels, 256)`: the value that each code stands for.
    """

    codes: torch.Tensor
    table: torch.Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, samples: slice) -> Pixels:
        return Pixels(self.codes[samples], self.table)

    def pin_memory(self) -> Pixels:
        return Pixels(self.codes.pin_memory(), self.table.pin_memory())

    def is_floating_point(self) -> bool:
        return True

    def to(
        self, device: torch.device, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> torch.Tensor:
        """The images themselves; only bytes travel to the device."""
        import torch

        codes = self.codes.to(device, non_blocking=non_blocking).int()
        table = self.table.to(device, dtype, non_blocking=non_blocking)
        channels = [
            torch.index_select(values, 0, codes[:, channel].flatten()).view(codes[:, channel].shape)
            for channel, values in enumerate(table)
        ]
        return torch.stack(channels, dim=1)


def find_tables(prepare: Prepare) -> dict[str, torch.Tensor]:
    """Those of a model's inputs that have at most 256 values in each channel, and which: `(channels, 256)`.

    Args:
        prepare: from an image to the inputs `(channels, height, width)` by name. It is shown all shades of grey.
    """
    import torch

    seen: dict[str, list[torch.Tensor]] = {}
    for image in _greys():
        for name, value in prepare(image).items():
            if value.is_floating_point() and value.ndim == 3:
                before = seen.get(name, [value.new_zeros(0)] * len(value))
                both = zip(before, value.flatten(1), strict=True)
                seen[name] = [torch.unique(torch.cat(values)) for values in both]
        if all(len(values) >= _VALUES for channels in seen.values() for values in channels):
            break
    return {
        name: torch.stack(channels).float()
        for name, channels in seen.items()
        if all(len(values) == _VALUES for values in channels)
    }


def encode(value: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
    """The codes of one image `(channels, height, width)`, uint8; None if it has a value that is not in the table."""
    import torch

    first, last = table[:, :1, None], table[:, -1:, None]
    guess = (value - first).mul_((_VALUES - 1) / (last - first)).round_().clamp_(0, _VALUES - 1)
    codes = guess.nan_to_num_().to(torch.uint8)
    return codes if torch.equal(Pixels(codes[None], table).to(value.device)[0], value) else None


def stack(values: list[torch.Tensor], table: torch.Tensor | None) -> torch.Tensor:
    """Inputs of several samples as one tensor: uint8 codes if all of them are codes, else in full."""
    import torch

    if table is None or all(value.dtype == torch.uint8 for value in values):
        return torch.stack(values)
    full = [Pixels(one[None], table).to(one.device)[0] if one.dtype == torch.uint8 else one for one in values]
    return torch.stack(full)


def pack(inputs: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One image's inputs, as codes where they have them."""
    codes = {name: encode(value, tables[name]) if name in tables else None for name, value in inputs.items()}
    return {name: value if (code := codes[name]) is None else code for name, value in inputs.items()}


def _greys() -> Iterator[Image.Image]:
    """All shades on one image, amid room that may be cropped; then, where that would blur them, one by one."""
    shades = np.arange(_VALUES, dtype=np.uint8)
    squares = np.kron(shades.reshape(16, 16), np.ones((24, 24), np.uint8))  # 384 pixels wide
    yield Image.fromarray(np.pad(squares, 128)).convert("RGB")
    for shade in shades:
        yield Image.new("RGB", (32, 32), (int(shade),) * 3)
