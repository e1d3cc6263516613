"""What sets a checkpoint apart from the others: architecture, configuration, shapes, preprocessing."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from hf_radin import modeling
from hf_radin.ingredients import Ingredient

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
    "problem_type",
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
    _compare(found, ingredients, lambda one: _prefixed("configuration's ", _compared(configs[one.id])))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # by configuration: most have one

    def shapes_of(one: Ingredient) -> dict[str, tuple[int, ...]]:
        same = describe(configs[one.id])
        if same not in shapes:
            shapes[same] = _shapes(configs[one.id], trust_remote_code=one.trust_remote_code)
        return shapes[same]

    _compare(found, ingredients, shapes_of, absent="absent")
    _compare(found, ingredients, _processor_fields, absent=None)
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
        common = Counter(map(repr, values.values())).most_common(1)[0][0]
        other = next(one for one, value in values.items() if repr(value) == common)
        for one, value in values.items():
            if repr(value) != common:
                start = "; " if one in differences else f"{one} differs from {other} in "
                differences.setdefault(one, []).append(f"{start}{name}: {value!r} against {common}")
    for one, parts in differences.items():
        more = f"; and {len(parts) - 8} more" if parts[8:] else ""
        found[one] = (
            f"{''.join(parts[:8])}{more}. Leave it out, or gather checkpoints of one architecture, one set of classes "
            f"and one image processor{'; --image-processor ID takes one for all' if absent is None else ''}."
        )


def _prefixed(prefix: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in fields.items()}


def _compared(config: PretrainedConfig) -> dict[str, Any]:
    """What of a configuration decides about the model's outputs: neither names, nor bookkeeping, nor training."""
    fields = _flatten(config.to_dict())
    return {
        name: value
        for name, value in fields.items()
        if not any(part.startswith(_NOT_COMPARED) or "drop" in part for part in name.split("."))
    }


def _shapes(config: PretrainedConfig, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by module name, from the configuration alone: file names of tensors differ between versions."""
    model = modeling.empty_model(config, trust_remote_code=trust_remote_code)
    return {f"shape of {name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def describe(config: PretrainedConfig) -> str:
    """A configuration as text, without where it was read: equal texts are equal models."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return json.dumps(fields, sort_keys=True, default=str)


def _processor_fields(ingredient: Ingredient) -> dict[str, Any]:
    """What of an image processor may change pixels: all but its name, which is that of the backend too."""
    fields = _flatten(ingredient.processor.to_dict())
    return _prefixed(
        "image processor's ",
        {name: value for name, value in fields.items() if name not in ("image_processor_type", "processor_class")},
    )


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
