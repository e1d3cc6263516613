"""The head of a classifier: the last linear layers, and the features that they are given.

Nothing is known of an architecture by its name. A model of its configuration runs once, and the head is the linear
layer whose output is the logits, or the two whose outputs' mean is (DeiT and LeViT with a teacher, SwiftFormer).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints.forward import Running, batch_logits
from hf_radin.checkpoints.model import random_model
from hf_radin.checkpoints.processor import made_up_image, prepare_image
from hf_radin.images.pixels import Pixels
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.sharing.replay import SharedModules
from hf_radin.tail.teach import TaughtTail

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# How near the mean of the heads' outputs comes to the logits, relative to the largest of these: they are the same sums
# in float32, perhaps in another order.
NEAR = 1e-4

WAY_OUT = "Average the heads: head='average' (--head average)."


class HeadError(ValueError):
    """A head that can't be refitted."""


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear function from features to logits.

    Args:
        weight: float64 `(classes, features)`.
        bias: float64 `(classes,)`; None if the layer has none.
    """

    weight: np.ndarray
    bias: np.ndarray | None = None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The logits of images, float64 `(images, classes)`.

        Args:
            features: `(images, features)`.
        """
        logits = features.astype(np.float64) @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    @property
    def sha256(self) -> str:
        """The hash of its numbers."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        return hashlib.sha256(b"".join(np.ascontiguousarray(part, "<f8").tobytes() for part in parts)).hexdigest()

    def scaled(self, factor: float) -> LinearLayer:
        """The layer whose logits are so many times as large."""
        return LinearLayer(factor * self.weight, None if self.bias is None else factor * self.bias)

    def __add__(self, other: LinearLayer) -> LinearLayer:
        if self.bias is None or other.bias is None:
            return LinearLayer(self.weight + other.weight)
        return LinearLayer(self.weight + other.weight, self.bias + other.bias)


@dataclass(frozen=True)
class Inputs:
    """What modules of a model are given of an image, as one row of numbers.

    Args:
        modules: their names in the model, in the order in which they are called.
        widths: how many numbers each is given of an image.
    """

    modules: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def features(self) -> int:
        """How many numbers all are given of an image together."""
        return sum(self.widths)


@dataclass(frozen=True)
class Head(Inputs):
    """The last linear layers of an architecture; the mean of their outputs is the logits.

    Args:
        classes: how many logits there are.
        has_bias: whether each has a bias.
    """

    classes: int
    has_bias: bool

    def layer_of(self, model: PreTrainedModel) -> LinearLayer:
        """What the head of a model does to its features, with those of all its layers side by side."""
        layers: list[Any] = [model.get_submodule(name) for name in self.modules]
        weight = np.concatenate([_as_float64(layer.weight) for layer in layers], axis=1) / len(layers)
        if not self.has_bias:
            return LinearLayer(weight)
        return LinearLayer(weight, np.mean([_as_float64(layer.bias) for layer in layers], axis=0))

    def put(self, model: PreTrainedModel, layer: LinearLayer) -> None:
        """Give a model another head, in place; dtype and device stay, and so does all else.

        Args:
            layer: as `layer_of` gives it: a function of the features of all layers side by side.

        Raises:
            ValueError: if it has another shape, or a tensor of the head is that of another layer, too.
        """
        import torch

        if layer.weight.shape != (self.classes, self.features) or (layer.bias is not None) != self.has_bias:
            has = f"{layer.weight.shape} {'without a' if layer.bias is None else 'with a'} bias"
            needs = f"{(self.classes, self.features)} {'with a' if self.has_bias else 'without a'} bias"
            raise ValueError(f"A head of the shape {has} does not fit a model that takes {needs}: refit it.")
        self.refuse_tied(model)
        ends = np.cumsum(self.widths).tolist()
        with torch.no_grad():
            for name, end, width in zip(self.modules, ends, self.widths, strict=True):
                module: Any = model.get_submodule(name)
                weight = layer.weight[:, end - width : end] * len(self.modules)
                module.weight.copy_(torch.from_numpy(weight))
                if layer.bias is not None:
                    module.bias.copy_(torch.from_numpy(layer.bias))

    def refuse_tied(self, model: PreTrainedModel) -> None:
        """Refuse a head whose tensors are those of another layer, too: changing it would change that.

        Raises:
            HeadError: if there is such a tensor.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for shared in names.values():
            if len(shared) > 1 and any(name.rpartition(".")[0] in self.modules for name in shared):
                raise HeadError(
                    f"{type(model).__name__}: {shared[0]} and {shared[1]} are one tensor, so that another head would "
                    f"change more than the head. {WAY_OUT}"
                )


@dataclass(frozen=True, eq=False)
class RefittedHead:
    """A head that takes the place of the averaged one: where it is in a model, and what it does."""

    place: Head
    layer: LinearLayer

    @property
    def sha256(self) -> str:
        """The hash of its numbers."""
        return self.layer.sha256

    def put_into(self, model: PreTrainedModel) -> None:
        """Give a model this head; see `Head.put`."""
        self.place.put(model, self.layer)


# What takes the place of a soup's own last layers: both can be put into a model, and have a hash.
LastLayers = RefittedHead | TaughtTail


def find_head(ingredient: Ingredient, example: Mapping[str, torch.Tensor] | None = None) -> Head:
    """The head of an ingredient's architecture. Its weights are not loaded: random ones show where the head is.

    Args:
        example: an image, prepared, without the batch dimension; by default a made-up one.

    Raises:
        HeadError: if the logits come from no linear layer, or from a layer that is tied to another.
        ValueError: if the model does not take the image.
    """
    import torch

    model = random_model(ingredient.config, trust_remote_code=ingredient.trust_remote_code)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # new heads may be nothing but zeros, which all look alike
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
    try:
        if example is None:
            example = prepare_image(ingredient.processor, made_up_image(ingredient.config))
        batch = {name: torch.stack([torch.as_tensor(value)] * 2) for name, value in example.items()}
        return locate_head(model, batch)
    except HeadError:
        raise
    except Exception as error:  # each architecture fails in its own way on images that it does not take
        raise ValueError(
            f"{ingredient.id}: to find its head it was shown an image, which it does not take: {error}. {WAY_OUT}"
        ) from error


def differ_in_heads(ingredients: Ingredients, names: Collection[str]) -> bool:
    """Whether ingredients differ in their heads alone.

    Args:
        ingredients: of one architecture; where they bring code of their own, it has to be the same.
        names: of the tensors that differ.
    """
    modules = {name.rpartition(".")[0] for name in names}
    # a head is two layers at most: where there are more, no model has to show where it is
    if len(modules) > 2 or any(name.rpartition(".")[2] not in ("weight", "bias") for name in names):
        return False
    if not ingredients.have_one_code:
        return False
    try:
        return not modules or modules <= {*find_head(ingredients[0]).modules}
    except ValueError:  # logits that come from no linear layer; what is wrong with a model, a pass says
        return False


def locate_head(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Head:
    """The head of a model, which is shown a batch to see where its logits come from.

    Args:
        model: in evaluation mode.
        batch: its inputs by name, `(images, ...)` each, on the model's device.

    Raises:
        HeadError: as `find_head` does.
    """
    import torch

    calls: list[_Call] = []

    def note(name: str, module: torch.nn.Linear, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        calls.append(_Call(name, module, inputs[0], output))

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_hook(partial(note, name)) for name, module in linear]
    try:
        with torch.inference_mode():
            logits = batch_logits(model, dict(batch), nullcontext())
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(call.name for call in calls)
    # the last ones first: a model may do other things with its features before
    possible = [call for call in reversed(calls) if call.output.numel() == logits.numel() and times[call.name] == 1]
    for group in (group for count in (1, 2) for group in combinations(possible, count)):
        biases = {call.module.bias is not None for call in group}
        if len(biases) == 1 and _gives(group, logits):
            ordered = group[::-1]
            names, widths = zip(*((call.name, call.module.in_features) for call in ordered), strict=True)
            head = Head(names, widths, logits.shape[1], biases.pop())
            head.refuse_tied(model)
            return head
    raise HeadError(
        f"{type(model).__name__}: its logits are the output of no linear layer, nor the mean of two, so that there is "
        f"no head to be refitted. {WAY_OUT}"
    )


class Recording:
    """Keeps what modules of a model are given of all images that it is shown, while it runs as usual.

    To be made before a compiled model first runs: what is compiled already does not hear of it.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs):
        import torch

        self._of = inputs
        self._inputs: dict[str, torch.Tensor] = {}
        self._batches: list[np.ndarray] = []
        for name in inputs.modules:
            hook = torch.compiler.disable(partial(self._note, name))
            model.get_submodule(name).register_forward_pre_hook(hook)
        model.register_forward_hook(torch.compiler.disable(self._finish))

    def take(self) -> np.ndarray:
        """The features of the images that were shown since the last call, float32 `(images, features)`.

        A batch that failed, as for want of memory, does not count.
        """
        features = np.concatenate([np.zeros((0, self._of.features), np.float32), *self._batches])
        self._batches = []
        return features

    def _note(self, name: str, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs[name] = inputs[0].detach().clone()  # what comes later may change it in place

    def _finish(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        widths = zip(self._of.modules, self._of.widths, strict=True)
        parts = [self._inputs.pop(name).reshape(-1, width).float().cpu().numpy() for name, width in widths]
        self._batches.append(np.concatenate(parts, axis=1))


@dataclass(frozen=True)
class FeatureRunning(Running):
    """How one model runs for what modules of it are given, which comes in the place of its logits.

    Args:
        inputs: which these are: those of the head, say.
    """

    inputs: Inputs = field(kw_only=True)
    _recordings: list[Recording] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, running: Running, inputs: Inputs) -> FeatureRunning:
        """The same way to run a model, for its features."""
        return cls(**{field.name: getattr(running, field.name) for field in fields(running)}, inputs=inputs)

    def ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model on the device, to be run so, and recorded."""
        self._recordings.append(Recording(model, self.inputs))
        return super().ready(model)

    def logits(
        self,
        models: Sequence[PreTrainedModel],
        inputs: Mapping[str, torch.Tensor | Pixels],
        shared: SharedModules | None = None,
    ) -> list[np.ndarray]:
        """The features of the model that was made ready last for prepared images, float32 `(samples, features)`."""
        super().logits(models, inputs, shared)
        return [self._recordings[-1].take()]


@dataclass(frozen=True, eq=False)
class _Call:
    """A linear layer of a model that was called, with what it was given and what it gave."""

    name: str
    module: torch.nn.Linear
    input: torch.Tensor
    output: torch.Tensor


def _gives(group: Sequence[_Call], logits: torch.Tensor) -> bool:
    """Whether the mean of what layers make of their inputs is the logits `(images, classes)`."""
    import torch

    with torch.inference_mode():
        outputs = [torch.nn.functional.linear(call.input, call.module.weight, call.module.bias) for call in group]
    mean = torch.stack([output.float().cpu().reshape(logits.shape) for output in outputs]).mean(0)
    return bool((mean - logits).abs().max() <= NEAR * logits.abs().max())


def _as_float64(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().double().cpu().numpy()
    return array
