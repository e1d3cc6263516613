"""Pixels as codes of one byte that stand for exactly what the image processor makes of them.

A processor that decodes, resizes and crops in bytes, and rescales and normalises last, can only give 256 values in
each channel. As codes they take a quarter of the space, and are looked up where the model runs. The values are the
processor's own, so nothing is rounded. Each image is compared, and one with other values is stored in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

# From an image, or where it takes them from upright RGB pixels `(3, height, width)`, to the models' inputs; where it
# takes lists, from several of one size to the inputs with a batch dimension.
Prepare = Callable[["Image.Image | torch.Tensor | list[Image.Image | torch.Tensor]"], "dict[str, torch.Tensor]"]

# The models' inputs for some samples, by name.
Inputs = dict[str, "torch.Tensor | Pixels"]

_VALUES = 256


@dataclass(frozen=True)
class Pixels:
    """Images as a float tensor `(samples, channels, height, width)`, of which only the codes are stored.

    Args:
        codes: uint8, of that shape.
        table: float32 `(channels, 256)`: the value that each code stands for.
    """

    codes: torch.Tensor
    table: torch.Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, samples: slice | torch.Tensor) -> Pixels:
        return Pixels(self.codes[samples], self.table)

    @property
    def nbytes(self) -> int:
        """The bytes of the codes; many images share a table."""
        return self.codes.nbytes

    def pin_memory(self) -> Pixels:
        return Pixels(self.codes.pin_memory(), self.table.pin_memory())

    def is_floating_point(self) -> bool:
        return True

    def to(
        self, device: torch.device, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> torch.Tensor:
        """The images themselves; only the codes are copied to the device."""
        import torch

        codes = self.codes.to(device, non_blocking=non_blocking).int()  # (samples, channels, height, width)
        table = self.table.to(device, dtype, non_blocking=non_blocking)
        first = torch.arange(len(table), dtype=torch.int32, device=device) * _VALUES  # of each channel, in all tables
        codes += first.view(-1, 1, 1)
        return torch.index_select(table.flatten(), 0, codes.flatten()).view(codes.shape)


def select(inputs: Inputs, rows: np.ndarray) -> Inputs:
    """Some samples `(rows,)` of a block."""
    import torch

    if len(rows) == count_images(inputs):
        return inputs
    return {name: value[torch.from_numpy(rows)] for name, value in inputs.items()}


def count_images(inputs: Inputs) -> int:
    """How many images inputs are of."""
    return len(next(iter(inputs.values())))


def find_tables(prepare: Prepare) -> dict[str, torch.Tensor]:
    """The values of the inputs that have just 256 in each channel, by name: `(channels, 256)`, ascending.

    Args:
        prepare: from an image to the inputs `(channels, height, width)` by name. It is given all shades of grey; if
            it refuses them, no input has such values.
    """
    import torch

    seen: dict[str, list[torch.Tensor]] = {}  # the distinct values of each channel
    for image in _greys():
        try:
            inputs = prepare(image)
        except Exception:  # it takes images of some sizes only: what is wrong with the user's is said of these
            return {}
        for name, value in inputs.items():
            if value.is_floating_point() and value.ndim == 3:
                before = seen.get(name, [value.new_zeros(0)] * len(value))
                channels = zip(before, value.flatten(1), strict=True)
                seen[name] = [torch.unique(torch.cat(values)) for values in channels]
        if all(len(values) >= _VALUES for tables in seen.values() for values in tables):
            break
    return {
        name: torch.stack(tables).float()
        for name, tables in seen.items()
        if all(len(values) == _VALUES for values in tables)
    }


def encode(values: torch.Tensor, table: torch.Tensor) -> Pixels | None:
    """Images `(samples, channels, height, width)` as codes; None if some value is not in the table."""
    import torch

    first, last = table[:, :1, None], table[:, -1:, None]
    guess = (values - first).mul_((_VALUES - 1) / (last - first)).round_().clamp_(0, _VALUES - 1)
    pixels = Pixels(guess.nan_to_num_().to(torch.uint8), table)
    return pixels if torch.equal(pixels.to(values.device), values) else None


def pack(samples: Sequence[Mapping[str, torch.Tensor]], tables: Mapping[str, torch.Tensor]) -> Inputs:
    """The inputs of some images, which have one shape, as `(samples, ...)`: as codes if they have a table."""
    import torch

    full = {name: torch.stack([inputs[name] for inputs in samples]) for name in samples[0]}
    codes = {name: encode(value, tables[name]) for name, value in full.items() if name in tables}
    return {name: codes.get(name) or value for name, value in full.items()}


def join(parts: Sequence[Inputs]) -> Inputs:
    """Put packed inputs together: as codes if all parts are codes, else in full."""
    return {name: _join([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _join(parts: Sequence[torch.Tensor | Pixels]) -> torch.Tensor | Pixels:
    import torch

    codes = [part for part in parts if isinstance(part, Pixels)]
    if len(codes) == len(parts):
        return Pixels(torch.cat([part.codes for part in codes]), codes[0].table)
    return torch.cat([part.to(torch.device("cpu")) for part in parts])


def _greys() -> Iterator[Image.Image]:
    """All shades of grey in one image, with a margin that may be cropped; then one by one, in case that blurs them."""
    shades = np.arange(_VALUES, dtype=np.uint8)
    squares = np.kron(shades.reshape(16, 16), np.ones((24, 24), np.uint8))  # 384 pixels wide
    yield Image.fromarray(np.pad(squares, 128)).convert("RGB")
    for shade in shades:
        yield Image.new("RGB", (32, 32), (int(shade),) * 3)
