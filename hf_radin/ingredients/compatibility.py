"""Which checkpoints differ from most in architecture, configuration or shapes, and can't be averaged with them."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.fields import comparable, declared_fields, flattened
from hf_radin.checkpoints.model import empty_model, model_class, task_of
from hf_radin.ingredients.ingredient import Ingredient

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Two classes: what any classifier may have.
PLACEHOLDERS = ("LABEL_0", "LABEL_1")

# What the names of those fields of a configuration begin with that may differ among fine-tunes of one start.
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
    "problem_type",  # compared as the task that it means
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def find_differences(ingredients: list[Ingredient]) -> dict[str, str]:
    """Find the ingredients that differ from most, and say in what they do.

    Architectures are compared first, then base models, configurations and shapes; an ingredient that differs in one of
    these is not compared further. What classes they have counts nowhere: for that see `align`.

    Returns:
        A text for each ingredient that differs, by its id.
    """
    bases: dict[str, str] = {}  # by key: the same model may go by several names, and the first is used
    for ingredient in ingredients:
        if ingredient.base:
            bases.setdefault(ingredient.base.key, f"{ingredient.base.id} at {ingredient.base.revision[:19]}")
    # as if all had the same classes
    configs = {ingredient.id: replace(ingredient, labels=PLACEHOLDERS).config for ingredient in ingredients}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # by configuration: most ingredients have the same

    def base_of(ingredient: Ingredient) -> dict[str, Any]:
        return {"base model": bases[ingredient.base.key]} if ingredient.base else {}

    def config_of(ingredient: Ingredient) -> dict[str, Any]:
        fields = _compared_fields(configs[ingredient.id])
        return {f"configuration's {name}": value for name, value in fields.items()}

    def shapes_of(ingredient: Ingredient) -> dict[str, Any]:
        config = configs[ingredient.id]
        text = describe(config)
        if text not in shapes:
            shapes[text] = _shapes(config, trust_remote_code=ingredient.trust_remote_code)
        return shapes[text]

    differences: dict[str, str] = {}
    _compare(differences, ingredients, lambda ingredient: {"architecture": ingredient.architecture})
    _compare(differences, ingredients, base_of)
    _compare(differences, ingredients, config_of)
    _compare(differences, ingredients, shapes_of, absent="absent")
    return differences


_NOT_COMPARED_IF_ABSENT = object()


def _compare(
    differences: dict[str, str],
    ingredients: list[Ingredient],
    fields_of: Callable[[Ingredient], dict[str, Any]],
    *,
    absent: Any = _NOT_COMPARED_IF_ABSENT,
) -> None:
    """Compare the ingredients that are not in `differences` yet, and add those that differ from most.

    Args:
        fields_of: what is compared of an ingredient: values by name.
        absent: the value of fields that an ingredient lacks; by default, fields that some lack are not compared.
    """
    fields = {ingredient.id: fields_of(ingredient) for ingredient in ingredients if ingredient.id not in differences}
    names = sorted(set().union(*fields.values())) if fields else []
    texts: dict[str, list[str]] = {}
    for name in names:
        values = {ingredient_id: values_of.get(name, absent) for ingredient_id, values_of in fields.items()}
        if any(value is _NOT_COMPARED_IF_ABSENT for value in values.values()):
            continue
        common = Counter(map(comparable, values.values())).most_common(1)[0][0]
        reference = next(ingredient_id for ingredient_id, value in values.items() if comparable(value) == common)
        for ingredient_id, value in values.items():
            if comparable(value) != common:
                start = "; " if ingredient_id in texts else f"{ingredient_id} differs from {reference} in "
                text = f"{start}{name}: {value!r} against {values[reference]!r}"
                texts.setdefault(ingredient_id, []).append(text)
    for ingredient_id, parts in texts.items():
        remaining = f"; and {len(parts) - 8} more" if parts[8:] else ""
        differences[ingredient_id] = (
            f"{''.join(parts[:8])}{remaining}. Leave it out, or gather checkpoints of one architecture and one image "
            "processor."
        )


def _compared_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields that decide what the model computes, or how a pipeline reads its output.

    These are the fields that the configuration's class declares or the model's code reads, without those for names,
    bookkeeping and training. A checkpoint that comes with code may read any field.
    """
    has_code = getattr(config, "auto_map", None) is not None
    source = "" if has_code else _source(config)
    fields = {
        name: value
        for name, value in _declared_or_read(config, source, has_code).items()
        if not any(part.startswith(_NOT_COMPARED) or "drop" in part for part in name.split("."))
    }
    return {**fields, "task": task_of(config)}


def _source(config: PretrainedConfig) -> str:
    """The source of the module that defines the configuration's model."""
    return inspect.getsource(sys.modules[model_class(config).__module__])


def _declared_or_read(config: PretrainedConfig, source: str, everything: bool, prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration and of the configurations inside it, by dotted path.

    Args:
        source: of the model; fields that neither it nor the configuration's class mentions are left out.
        everything: keep these too.
    """
    declared = declared_fields(type(config))
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part, word = getattr(config, name, None), re.escape(name)
        if callable(getattr(part, "to_diff_dict", None)):
            fields |= _declared_or_read(part, source, everything, f"{prefix}{name}.")
        elif everything or name in declared or re.search(rf"\.{word}\b|[\"']{word}[\"']", source):
            fields |= flattened({name: value}, prefix)
    return fields


def _shapes(config: PretrainedConfig, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by module name, from the configuration alone: names in files differ between versions."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
    return {f"shape of {name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def describe(config: PretrainedConfig) -> str:
    """A configuration as text, without the place that it was read from: equal texts make equal models."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return json.dumps(fields, sort_keys=True, default=str)
