"""What sets a checkpoint apart from the others: architecture, configuration, shapes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.fields import comparable, flattened
from hf_radin.checkpoints.model import empty_model, task_of
from hf_radin.ingredients.ingredient import Ingredient

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fields of a configuration, by their beginnings, that may differ among fine-tunes of one start.
_NOT_COMPARED = (
    "_",
    "architectures",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer",
    "label2id",
    "label_names",
    "output_attentions",
    "output_hidden_states",
    "problem_type",  # compared by what it means
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def find_differences(ingredients: list[Ingredient]) -> dict[str, str]:
    """For each ingredient that is not like most, by id, the first thing in which it differs, in words."""
    found: dict[str, str] = {}
    _compare(found, ingredients, lambda one: {"architecture": one.architecture})
    _compare(found, ingredients, lambda one: {"number of classes": len(one.labels)})
    bases: dict[str, str] = {}  # one model by the first of its names
    for one in ingredients:
        if one.base:
            bases.setdefault(one.base.key, f"{one.base.id} at {one.base.revision[:19]}")
    _compare(found, ingredients, lambda one: {"base model": bases[one.base.key]} if one.base else {})
    configs = {one.id: one.config for one in ingredients}
    _compare(found, ingredients, lambda one: _prefixed("configuration's ", _compared(one, configs[one.id])))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # by configuration: most have one

    def shapes_of(one: Ingredient) -> dict[str, tuple[int, ...]]:
        same = describe(configs[one.id])
        if same not in shapes:
            shapes[same] = _shapes(configs[one.id], trust_remote_code=one.trust_remote_code)
        return shapes[same]

    _compare(found, ingredients, shapes_of, absent="absent")
    return found


_ANY = object()


def _compare(found: dict[str, str], ingredients: list[Ingredient], fields_of: Any, *, absent: Any = _ANY) -> None:
    """Add to `found` those whose fields are not the common ones, with all fields in which they differ.

    Args:
        absent: what a field counts as that only some have; by default such a field is not compared.
    """
    fields = {one.id: fields_of(one) for one in ingredients if one.id not in found}
    names = sorted(set().union(*fields.values())) if fields else []
    differences: dict[str, list[str]] = {}
    for name in names:
        values = {one: has.get(name, absent) for one, has in fields.items()}
        if any(value is _ANY for value in values.values()):
            continue
        common = Counter(map(comparable, values.values())).most_common(1)[0][0]
        other = next(one for one, value in values.items() if comparable(value) == common)
        for one, value in values.items():
            if comparable(value) != common:
                start = "; " if one in differences else f"{one} differs from {other} in "
                text = f"{start}{name}: {value!r} against {values[other]!r}"
                differences.setdefault(one, []).append(text)
    for one, parts in differences.items():
        more = f"; and {len(parts) - 8} more" if parts[8:] else ""
        found[one] = (
            f"{''.join(parts[:8])}{more}. Leave it out, or gather checkpoints of one architecture, one set of classes "
            "and one image processor."
        )


def _prefixed(prefix: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in fields.items()}


def _compared(ingredient: Ingredient, config: PretrainedConfig) -> dict[str, Any]:
    """What of a configuration decides about the function that the model computes, or how a pipeline reads it.

    That is what its class declares or its model's code reads, but for names, bookkeeping and training. Of a
    checkpoint with code of its own all else may be read, too.
    """
    own_code = getattr(config, "auto_map", None) is not None
    source = "" if own_code else _source(config)
    fields = {
        name: value
        for name, value in _declared_or_read(config, source, own_code).items()
        if not any(part.startswith(_NOT_COMPARED) or "drop" in part for part in name.split("."))
    }
    return {**fields, "task": task_of(config)}


def _source(config: PretrainedConfig) -> str:
    """The code of a model's module."""
    return inspect.getsource(sys.modules[type(empty_model(config)).__module__])


def _declared_or_read(config: PretrainedConfig, source: str, everything: bool, prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration, and of those in it, by their paths; notes that nobody reads are left out."""
    declared = _declared(config)
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part, word = getattr(config, name, None), re.escape(name)
        if callable(getattr(part, "to_diff_dict", None)):
            fields |= _declared_or_read(part, source, everything, f"{prefix}{name}.")
        elif everything or name in declared or re.search(rf"\.{word}\b|[\"']{word}[\"']", source):
            fields |= flattened({name: value}, prefix)
    return fields


def _declared(config: PretrainedConfig) -> set[str]:
    """The fields that a class of configurations has of its own, and those that all have."""
    if dataclasses.is_dataclass(config):
        return {field.name for field in dataclasses.fields(config)}
    return {name for cls in type(config).__mro__[:-1] for name in inspect.signature(cls).parameters}


def _shapes(config: PretrainedConfig, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by module name, from the configuration alone: file names of tensors differ between versions."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
    return {f"shape of {name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def describe(config: PretrainedConfig) -> str:
    """A configuration as text, without where it was read: equal texts are equal models."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return json.dumps(fields, sort_keys=True, default=str)
