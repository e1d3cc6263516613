"""An exponential average of the weights that a training goes through, beside the training and never in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.checkpoints.model import load_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# With a decay of 0.999 the average of the first steps would be the start: until it is reached, the average forgets
# faster, by (EARLY + step) / (LATE + step) a step.
EARLY, LATE = 1, 10


def decay_at(step: int, decay: float) -> float:
    """What is left of the average at a step of the training, of which the first is 1."""
    return min(decay, (EARLY + step) / (LATE + step))


@dataclass(frozen=True, eq=False)
class RunningAverage:
    """The average: float tensors in float32, whatever dtype the training has; others as they are now.

    Args:
        tensors: by their names in the model, on its device.
    """

    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> RunningAverage:
        """The average that begins with these weights."""
        return cls({name: _copy(tensor) for name, tensor in weights.items()})

    @classmethod
    def read(cls, folder: Path, weights: Mapping[str, torch.Tensor], *, trust_remote_code: bool) -> RunningAverage:
        """The average that was written into a folder, bit for bit.

        Args:
            weights: of the model, for the devices.

        Raises:
            ValueError: if there is none, or of another model.
        """
        import torch

        model = load_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tensors = model.state_dict()
        if differing := sorted(tensors.keys() ^ weights.keys()):
            raise ValueError(
                f"{folder}: it is no average of the model that is trained: {differing[0]!r} is in one only."
            )
        return cls({name: _copy(tensors[name].to(tensor.device)) for name, tensor in weights.items()})

    def update(self, weights: Mapping[str, torch.Tensor], left: float) -> None:
        """Take in the weights after a step.

        Args:
            left: what is left of the average before it.
        """
        import torch

        with torch.no_grad():
            for name, average in self.tensors.items():
                tensor = weights[name].detach()
                if average.is_floating_point():
                    average.lerp_(tensor.to(average), 1 - left)
                else:
                    average.copy_(tensor)

    def write(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the average as a checkpoint of the model, whose own weights are not touched."""
        model.save_pretrained(folder, state_dict={name: tensor.cpu() for name, tensor in self.tensors.items()})


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True)
