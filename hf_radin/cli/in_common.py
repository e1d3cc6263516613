"""What `hf-radin inspect` says of weights: which tensors checkpoints have in common, and what that saves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from hf_radin.checkpoints.files import as_dtype
from hf_radin.checkpoints.model import empty_model
from hf_radin.checkpoints.processor import made_up_image, prepare_image
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.runtime.processes import progress_bar
from hf_radin.runtime.text import counted, one_line
from hf_radin.sharing.common import Common, groups
from hf_radin.sharing.digests import TensorDigests, named_tensors
from hf_radin.tail.front import find_front, may_share
from hf_radin.weights.average import are_averaged_in_full
from hf_radin.weights.head import differ_in_heads

logger = logging.getLogger(__name__)

# Groups of checkpoints, checkpoints of a group, and tensors that are named at most.
GROUPS, NAMES, TENSORS = 4, 3, 4


@dataclass(frozen=True)
class InCommon:
    """What checkpoints have in common whose weights are here.

    Args:
        ids: of these checkpoints.
        groups: what all have in common, then what some have beyond that; none of fewer than two checkpoints.
        is_exact: whether they differ in their heads alone, and soups of them are saved in float32 or more.
        cut: the module up to which all are the same, if their code can be cut in two there; else empty.
        unknown: how many other checkpoints there are.
    """

    ids: tuple[str, ...]
    groups: tuple[Common, ...]
    is_exact: bool
    unknown: int
    cut: str = ""

    @classmethod
    def of(cls, ingredients: Ingredients) -> InCommon:
        """Of ingredients; each is loaded, one at a time, and none is downloaded."""
        models: dict[str, TensorDigests] = {}
        with progress_bar(total=len(ingredients), desc="Comparing weights", unit="model") as bar:
            for ingredient in ingredients:
                if Ingredients([ingredient]).are_here and (digests := _digests(ingredient)) is not None:
                    models[ingredient.id] = digests
                bar.update()
        unknown = len(ingredients) - len(models)
        if len(models) < 2:
            return cls((*models,), (), False, unknown)
        first = ingredients.select(models)[0]
        empty = empty_model(first.config, trust_remote_code=first.trust_remote_code)
        sizes = {name: tensor.numel() for name, tensor in named_tensors(empty)}
        parts = groups([*models.values()], sizes)
        compared = ingredients.select(models)
        is_exact = differ_in_heads(compared, parts[0].differing) and are_averaged_in_full(compared)
        cut = _cut_of(first, [*models.values()]) if not is_exact and compared.have_one_code else ""
        return cls((*models,), (*parts,), is_exact, unknown, cut)

    @property
    def lines(self) -> list[str]:
        """What is said of it, a few lines."""
        lines = [self._of_group(common) for common in self.groups[: GROUPS + 1]]
        if self.groups[GROUPS + 1 :]:
            lines.append(f"{counted(len(self.groups) - GROUPS - 1, 'further group')} share more than all do.")
        if self.unknown:
            count = counted(self.unknown, "checkpoint")
            lines.append(f"What {count} share with others is not known: the weights are not here, or can't be read.")
        return lines

    def _of_group(self, common: Common) -> str:
        """What a group of checkpoints has in common, in a sentence."""
        count = len(common.models)
        who = (
            f"All {count}" if count == len(self.ids) else _listed([self.ids[place] for place in common.models], NAMES)
        )
        text = f"{who} share {common.tensors:,} of {common.of:,} tensors, {common.share:.1%} of the weights"
        if common is self.groups[0] and self.cut:
            text += f", and are the same up to {self.cut}"
        if common is not self.groups[0] or len(common.differing) > TENSORS:
            return f"{text}."
        names = _listed(sorted(common.differing), TENSORS)
        exact = ", the head: soups are exact in float32, and take no pass" if self.is_exact else ""
        return f"{text}: only {names} {'differs' if len(common.differing) == 1 else 'differ'}{exact}."


def _cut_of(ingredient: Ingredient, models: Sequence[TensorDigests]) -> str:
    """The module up to which models are the same, of which an ingredient is one; empty if there is none."""
    if not may_share(models):
        return ""
    try:
        example = prepare_image(ingredient.processor, made_up_image(ingredient.config))
    except Exception as error:  # each processor fails in its own way on an image that it does not take
        logger.debug("%s: no image could be made up for it: %s", ingredient.id, one_line(error))
        return ""
    shared = find_front(models, partial(ingredient.load_model, as_dtype("float32")), example)
    return shared.cut.module if shared.cut else ""


def _digests(ingredient: Ingredient) -> TensorDigests | None:
    """The hashes of a checkpoint's tensors, as it runs by default; None if it can't be loaded, as a line says."""
    import torch

    try:
        return TensorDigests.of(ingredient.load_model(torch.float32))
    except ValueError as error:
        logger.warning("%s can't be compared with the others: %s", ingredient.id, one_line(error))
        return None


def _listed(names: Sequence[str], most: int) -> str:
    """Names in a sentence, so many at most."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
