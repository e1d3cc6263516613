"""The front of models that share it to the last bit: a soup's is theirs, and need not run for each soup anew.

What the first module behind the deepest cut that all share is given of an image is computed once, and cached beside
the pixels where reading it takes less time than computing it would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints.forward import Running
from hf_radin.images.pixels import Inputs
from hf_radin.images.shards import BlockRows
from hf_radin.runtime.text import one_line
from hf_radin.sharing.activations import Activations
from hf_radin.sharing.digests import TensorDigests, differing
from hf_radin.tail.choose import made_batch
from hf_radin.tail.cut import Cut, CutError, find_cuts, multiplications
from hf_radin.tail.stand_ins import GIVEN, StandIns, Tail, recorded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The share of all tensors that models have in common at least, or nobody looks for a cut: the embeddings alone are
# little of the work.
LEAST_SHARED = 0.05

# Multiplications and additions that are saved for each byte that is read, at least: as many as are done while a byte
# is read. On a CPU four cores do 50 GFLOP/s each, and a disk gives 0.5 GB/s; a GPU does 200 TFLOP/s, and 2 GB/s are
# read and copied to it. Stated rates decide, and none is measured: so any number of processes, and a run that goes on
# after it was killed, decide alike. Cut in its middle, a ViT of any size saves some 10,000 a byte.
SAVED_ON_CPU = 4 * 50e9 / 0.5e9
SAVED_ON_GPU = 200e12 / 2e9


@dataclass(frozen=True)
class SharedFront:
    """How far models have all in common.

    Args:
        cut: the first of those behind which all that differs is; None if there is none.
        saved: multiplications and additions in front of it, for an image.
    """

    cut: Cut | None
    saved: float = 0.0

    def pays(self, device: str, dtype: torch.dtype) -> bool:
        """Whether what the first module behind the cut is given is read in less time than it is computed in.

        Args:
            device: its type, as torch names it.
            dtype: of the weights.
        """
        least = SAVED_ON_CPU if device == "cpu" else SAVED_ON_GPU
        return self.cut is not None and self.saved >= least * self.cut.width * dtype.itemsize


def may_share(models: Sequence[TensorDigests]) -> bool:
    """Whether models have so many tensors in common that it may pay to look for a cut."""
    return len(differing(models)) <= (1 - LEAST_SHARED) * len(models[0].by_name)


def find_front(
    models: Sequence[TensorDigests], load: Callable[[], PreTrainedModel], example: Mapping[str, torch.Tensor]
) -> SharedFront:
    """How far models have all in common.

    Args:
        models: their tensors.
        load: one of them, float32 on the CPU.
        example: an image, prepared, without the batch dimension.
    """
    different = differing(models)
    try:
        model = load()
        batch = made_batch(example, model.main_input_name)
        cut = next(find_cuts(model, batch, behind=different), None)
        if cut is None or not different <= _behind(model, cut):
            logger.debug("%s: no cut has all behind it that differs.", type(model).__name__)
            return SharedFront(None)
        in_all = multiplications(lambda: model(**batch)) / len(next(iter(batch.values())))
    except Exception as error:  # each architecture fails in its own way; soups are measured in whole then
        logger.debug("No cut was found: %s", one_line(error))
        return SharedFront(None)
    return SharedFront(cut, (1 - cut.share) * in_all)


def _behind(model: PreTrainedModel, cut: Cut) -> frozenset[str]:
    """The names of the tensors behind a cut: parameters, and buffers of modules all of whose parameters are there."""
    behind = {*cut.tensors}
    modules = {name.rpartition(".")[0] for name in behind}
    mixed = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name not in behind}
    buffers = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in modules - mixed}
    return frozenset(behind | buffers)


@dataclass(eq=False)
class Front:
    """The front of a bank's models while soups of them run.

    Args:
        cut: behind which all is that differs.
        digests: of the tensors of one of the models.
        activations: what the first module behind the cut is given.
        example: an image, prepared, without the batch dimension.
    """

    cut: Cut
    digests: TensorDigests
    activations: Activations
    example: Mapping[str, torch.Tensor]
    _stand_ins: tuple[StandIns, StandIns] | None = field(default=None, init=False, repr=False)  # and no model
    _is_exact: bool = field(default=True, init=False, repr=False)

    def is_of(self, model: PreTrainedModel) -> bool:
        """Whether a model has this front, to the last bit.

        Args:
            model: of the dtype in which it will run.
        """
        behind = _behind(model, self.cut)
        shared = {name: value for name, value in self.digests.by_name.items() if name not in behind}
        return TensorDigests.of(model, without=behind).by_name == shared

    def tail_of(self, model: PreTrainedModel, running: Running) -> Tail | None:
        """The tail of a model that has this front; None if it does not give what the whole model gives, bit by bit.

        Args:
            model: ready to run.
        """
        if self._stand_ins is None and self._is_exact:
            try:
                tail = Tail.of(model, self.cut, running, self.example)
                self._stand_ins = tail.pair, tail.triple
            except CutError as error:
                logger.debug("%s Soups are measured in whole.", error)
                self._is_exact = False
        return None if self._stand_ins is None else Tail(model, self.cut, *self._stand_ins)


@dataclass(eq=False)
class FrontRun:
    """A soup that runs, and of which the front need not run where it is known what that gives.

    Args:
        model: ready to run.
        tail: of the model.
        activations: what it is given.
        running: how both run.
        room: bytes that activations may take.
    """

    model: PreTrainedModel
    tail: Tail
    activations: Activations
    running: Running
    room: int

    def known(self, parts: Sequence[BlockRows]) -> np.ndarray | None:
        """The logits of some images, float32 `(images, classes)`; None where all of the model has to run."""
        import torch

        batches = []
        for part in parts:
            given = self.activations.read(part.block, part.rows)
            if given is None:
                return None
            batches.append(given)
        as_model: Any = self.tail
        (logits,) = self.running.logits([as_model], {GIVEN: torch.cat(batches)})
        return logits

    def logits(self, parts: Sequence[BlockRows], inputs: Inputs) -> np.ndarray:
        """The logits of some images, float32 `(images, classes)`, of all of the model.

        Args:
            inputs: of these images.
        """
        import torch

        with recorded(self.model, self.tail.cut.module) as batches:
            (logits,) = self.running.logits([self.model], inputs)
        of_parts = torch.cat(batches).split([len(part.rows) for part in parts])
        try:
            for part, given in zip(parts, of_parts, strict=True):
                self.room -= self.activations.write(part.block, part.rows, given, self.room)
        except (OSError, ValueError) as error:  # a full disk, above all: soups can do without
            self.room = 0
            _say_without(self.activations.folder, one_line(error.__cause__ or error))
        return logits


@cache
def _say_without(folder: Path, reason: str) -> None:
    """Say once in a run that nothing is cached for further soups, and not of each soup again."""
    logger.warning("%s can't be written to (%s). It goes on without: soups run in whole.", folder, reason)
