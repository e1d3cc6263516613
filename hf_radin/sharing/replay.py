"""Modules that are the same in several models run once a batch, and the others are given what they gave.

Nothing is known of an architecture by its name. A module of two models is the same where both have one class and, with
all below, tensors of the same bits; what it gives is the same where its inputs are the same tensors, or have the same
bits. So logits are to the last bit those of each model alone. Any tree of sharing is used as it is: of four models
that share six layers, two may share nine.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from hf_radin.runtime.text import one_line
from hf_radin.sharing.digests import TensorDigests

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# What a module may be given beside tensors and collections of them: what is equal is the same.
_PLAIN = (bool, int, float, str, bytes, type(None))

# A module by its name in the model, and the number of what it is (`_numbers`).
_Key = tuple[str, int]


@dataclass(eq=False)
class _Record:
    """What a module gave for a batch.

    Args:
        inputs: that it was given, positional and by name.
        output: that it gave.
        versions: of the tensors in both, which count how often these were changed in place.
        holder: the model that was given the output last.
    """

    inputs: tuple[Any, ...]
    output: Any
    versions: list[int]
    holder: torch.nn.Module

    def gave_for(self, inputs: tuple[Any, ...]) -> bool:
        """Whether this is what the module gives for other inputs, too."""
        return _versions((self.inputs, self.output)) == self.versions and _is_same(self.inputs, inputs)

    def hand_on(self, model: torch.nn.Module, *, copied: bool) -> Any:
        """The output for a model; a copy for one that has it already, or it would change two outputs at once."""
        copied, self.holder = copied or self.holder is model, model
        return _copy(self.output) if copied else _handed_on(self.output)


class SharedModules:
    """Models of one architecture that are shown the same batches, and run once what they have in common.

    Which modules that saves is seen once, on a small batch (`learn`). From there on these modules keep what they gave
    until no model to come needs it.

    Args:
        models: in evaluation mode, on one device.
        digests: of the tensors of each.
    """

    def __init__(self, models: Sequence[torch.nn.Module], digests: Sequence[TensorDigests]):
        numbers: dict[Any, int] = {}
        self._models = list(models)
        self._running = models[0]
        self._numbers = [_numbers(model, tensors, numbers) for model, tensors in zip(models, digests, strict=True)]
        self._counts = Counter(key for modules in self._numbers for key in modules.items())
        self._records: dict[_Key, list[_Record]] = {}
        self._waiting: Counter[_Key] = Counter()
        self._copied: set[str] = set()
        self._used: set[_Key] = set()
        self._held = 0

    def learn(self, run: Callable[[Any], Result], run_other: Callable[[Any], object]) -> bool:
        """See which modules need not run for each model, by running all of them; returns whether that saves anything.

        What is changed in place after it was recorded is copied from now on, and looked for once more. Where models
        don't give the same as alone nothing is shared: a module that does not run leaves nothing behind for others,
        as one does that keeps what it computed.

        Args:
            run: shows a model a small batch, the same tensors for all.
            run_other: shows it other images, so that what they left behind is seen.
        """
        alone = [run(model) for model in self._models]
        for model in self._models:
            run_other(model)
        try:
            self._see(run)
            self._held = 0
            is_exact = _is_same(alone, self._run_all(self._models, run))
        except Exception as error:  # each architecture fails in its own way
            logger.debug("Where modules run once, models don't: %s", one_line(error))
            is_exact = False
        if not is_exact:
            self.forget()
        return bool(self._used)

    def forget(self) -> None:
        """Share nothing from here on; the models are as they were."""
        self._used, self._held = set(), 0
        self._wrap(self._used)

    @property
    def may_save(self) -> bool:
        """Whether two models have a module with weights in common; whether they give it the same is not known yet."""
        return any(count > 1 and self._has_weights(key) for key, count in self._counts.items())

    @property
    def held(self) -> int:
        """Bytes of what modules were given and gave that were kept for models to come, at most since it was learnt."""
        return self._held

    @property
    def names(self) -> set[str]:
        """The names of modules that run once for several models, as far as that was learnt."""
        return {name for name, _ in self._used}

    def run(self, models: Sequence[torch.nn.Module], run: Callable[[Any], Result]) -> list[Result]:
        """What each of these models gives for a batch.

        Args:
            models: any of those that share.
            run: shows a model a batch, the same tensors for all; gradients are off.
        """
        return self._run_all(models, run)

    def _see(self, run: Callable[[Any], object]) -> None:
        """Note and wrap the modules that need not run for each model; see `learn`."""
        everything = {key for key, count in self._counts.items() if count > 1}
        for _ in range(2):
            self._used = set()
            self._wrap(everything)
            copied = len(self._copied)
            self._run_all(self._models, run, note_changes=True)
            if len(self._copied) == copied:
                break
        self._used = {key for key in self._used if self._has_weights(key)}
        self._wrap(self._used)

    def _run_all(
        self, models: Sequence[torch.nn.Module], run: Callable[[Any], Result], *, note_changes: bool = False
    ) -> list[Result]:
        keys = [self._wrapped_of(model) for model in models]
        self._waiting = Counter(key for of_model in keys for key in of_model)
        results = []
        try:
            for model, of_model in zip(models, keys, strict=True):
                self._running = model
                results.append(run(model))
                self._held = max(self._held, _bytes_of(self._records.values()))
                if note_changes:
                    self._note_changes()
                for key in of_model:
                    self._waiting[key] -= 1
                    if not self._waiting[key]:
                        self._records.pop(key, None)
        finally:  # also where memory was short
            self._records.clear()
            self._waiting.clear()
        return results

    def _wrapped_of(self, model: torch.nn.Module) -> list[_Key]:
        """The modules of a model that may stand in for those of others."""
        place = next(index for index, candidate in enumerate(self._models) if candidate is model)
        return [(name, number) for name, number in self._numbers[place].items() if (name, number) in self._wanted]

    def _wrap(self, wanted: set[_Key]) -> None:
        """Let these modules record what they give, and no others."""
        self._wanted = wanted
        for model, numbers in zip(self._models, self._numbers, strict=True):
            for name, number in numbers.items():
                module: Any = model.get_submodule(name)
                vars(module).pop("forward", None)
                if (name, number) in wanted:
                    module.forward = partial(self._forward, (name, number), module.forward)

    def _forward(self, key: _Key, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a module gives: recorded of the same module of another model, else by its own `forward`."""
        inputs = (args, options)
        for record in self._records.get(key, ()):
            if record.gave_for(inputs):
                self._used.add(key)
                return record.hand_on(self._running, copied=key[0] in self._copied)
        if self._waiting[key] < 2 or not _is_known(inputs):
            return forward(*args, **options)
        versions = _versions(inputs)
        recorded = _copy(inputs) if key[0] in self._copied else inputs
        output = forward(*args, **options)
        if _is_known(output) and _versions(inputs) == versions:
            result = _copy(output) if key[0] in self._copied else output
            record = _Record(recorded, result, _versions((recorded, result)), self._running)
            self._records.setdefault(key, []).append(record)
        return output

    def _note_changes(self) -> None:
        """Note which modules' records were changed in place since they were made."""
        for (name, _), records in self._records.items():
            if any(_versions((record.inputs, record.output)) != record.versions for record in records):
                self._copied.add(name)

    def _has_weights(self, key: _Key) -> bool:
        """Whether a module has parameters: without any it hardly takes time."""
        place = next(index for index, numbers in enumerate(self._numbers) if numbers.get(key[0]) == key[1])
        return any(True for _ in self._models[place].get_submodule(key[0]).parameters())


def _numbers(model: torch.nn.Module, digests: TensorDigests, numbers: dict[Any, int]) -> dict[str, int]:
    """A number for each module that can run, the same for the same module of any model.

    Args:
        numbers: of all that were met so far, and to be extended.
    """
    import torch

    runnable: dict[str, int] = {}

    def number(name: str, module: torch.nn.Module) -> int:
        prefix = f"{name}." if name else ""
        below = [(leaf, number(f"{prefix}{leaf}", child)) for leaf, child in module.named_children()]
        leaves = [
            (leaf, digests.by_name.get(f"{prefix}{leaf}", object()))  # of what came later nothing is known
            for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        ]
        result = numbers.setdefault((type(module), name, *leaves, *below), len(numbers))
        # a list of modules is never called, and a module with a function of its own somebody else has changed
        if type(module).forward is not torch.nn.Module.forward and "forward" not in vars(module):
            runnable[name] = result
        return result

    number("", model)
    return runnable


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a module is given or gives."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _bytes_of(records: Iterable[Sequence[_Record]]) -> int:
    """The bytes that records hold; what several hold, in whatever part, counts once."""
    parts = [(record.inputs, record.output) for of_module in records for record in of_module]
    storages = [tensor.untyped_storage() for tensor in _tensors(parts)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _is_known(value: Any) -> bool:
    """Whether nothing is in a value but what can be compared, and tensors that count changes."""
    import torch

    if isinstance(value, torch.Tensor):
        return not value.is_inference() and value.layout == torch.strided
    if isinstance(value, Mapping):
        return all(_is_known(part) for part in value.values())
    if isinstance(value, (tuple, list)):
        return all(_is_known(part) for part in value)
    return isinstance(value, (*_PLAIN, torch.dtype, torch.device))


def _versions(value: Any) -> list[int]:
    """How often each tensor in a value was changed in place."""
    return [tensor._version for tensor in _tensors(value) if not tensor.is_inference()]


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are the same: tensors to the last bit, all else by being equal."""
    import torch

    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, torch.Tensor):
        return _has_same_bits(value, other)
    if isinstance(value, Mapping):
        return value.keys() == other.keys() and all(_is_same(value[name], other[name]) for name in value)
    if isinstance(value, (tuple, list)):
        return len(value) == len(other) and all(map(_is_same, value, other))
    return bool(value == other)


def _has_same_bits(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits in the same order in memory; the first of them show it most often."""
    import torch

    if (value.dtype, value.shape, value.stride(), value.device) != (
        other.dtype,
        other.shape,
        other.stride(),
        other.device,
    ):
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(value.element_size())
    if integers is None or value.is_complex():
        return False
    bits, others = value.view(integers), other.view(integers)
    first = (0,) * max(0, bits.ndim - 1)
    return torch.equal(bits[first], others[first]) and torch.equal(bits, others)


def _copy(value: Any) -> Any:
    """A value whose tensors are copies, in the same order in memory."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (tuple, list, Mapping)):
        return copy.deepcopy(value)
    return value


def _handed_on(value: Any) -> Any:
    """A value whose tensors are the same, in a collection of its own, which the one who asks may change."""
    return value if isinstance(value, tuple) or not isinstance(value, (list, Mapping)) else copy.copy(value)
