"""The names that the layers of a model had in earlier versions of transformers, which adapters may still use.

Transformers 5 renames the layers of many models (`attention.attention.query` is now `attention.q_proj`), and reads and
writes checkpoints under the earlier names. peft takes the names in an adapter literally, and finds no such layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def earlier_names(model: PreTrainedModel) -> dict[str, str]:
    """The names of a model's tensors, by those that they had in earlier versions of transformers.

    They come from transformers itself, which writes tensors under their earlier names. Tensors that it splits or joins
    are left out, since an adapter for the one does not fit the other.

    Returns:
        Names now, by earlier names; empty if this version of transformers has no such names.
    """
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # not part of transformers' public API; without it, such adapters are refused
        return {}
    now = list(model.state_dict())
    written = revert_weight_conversion(model, {name: torch.tensor([index]) for index, name in enumerate(now)})
    names = {earlier: now[int(index)] for earlier, index in written.items() if index.numel() == 1}
    start = f"{model.base_model_prefix}."
    # files may leave out the first part of a name, which the layer had nevertheless
    return {
        name if name.startswith(start) or not new.startswith(start) else f"{start}{name}": new
        for name, new in names.items()
    }


def renamed_fields(options: LoraConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an adapter's configuration that name layers, with their names now in place of the earlier ones.

    Patterns and ends of names are matched with the earlier names, as peft did when the adapter was trained; the result
    has whole names.

    Args:
        names: names now, by earlier names (`earlier_names`).

    Raises:
        ValueError: if the configuration names something that does not exist now.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    unsupported = ("trainable_token_indices", "target_parameters", "layer_replication")
    if used := [name for name in unsupported if getattr(options, name, None)]:
        raise ValueError(f"its {used[0]} can't be translated into the names that layers have now")
    layers = {
        earlier.removesuffix(".weight"): now.removesuffix(".weight")
        for earlier, now in names.items()
        if earlier.endswith(".weight") and now.endswith(".weight")
    }
    targets = [now for earlier, now in layers.items() if check_target_module_exists(options, earlier)]

    def patterns(values: Mapping[str, int] | None) -> dict[str, int]:
        by_name: dict[str, int] = {}
        for earlier, now in layers.items():
            for pattern, value in (values or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", earlier):  # the first that matches, as in peft
                    by_name.setdefault(re.escape(now), value)
        return by_name

    saved = options.modules_to_save
    return {
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": patterns(options.rank_pattern),
        "alpha_pattern": patterns(options.alpha_pattern),
        "modules_to_save": saved and _modules_now(names, lambda module: any(module.endswith(end) for end in saved)),
    }


def _modules_now(names: Mapping[str, str], is_wanted: Callable[[str], bool]) -> list[str]:
    """The names now of the modules that are wanted by their earlier names.

    Raises:
        ValueError: if no module now has the tensors of one of them.
    """
    tensors_now = _tensors_by_module(names.values())
    modules = []
    for earlier, tensors in _tensors_by_module(names).items():
        if is_wanted(earlier):
            wanted = {names[tensor] for tensor in tensors}
            equal = [module for module, tensors in tensors_now.items() if tensors == wanted]
            if not equal:
                raise ValueError(f"its module to save {earlier} is none of the model's now")
            modules.append(equal[0])
    return modules


def _tensors_by_module(names: Iterable[str]) -> dict[str, set[str]]:
    """The names of the tensors in each module."""
    modules: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            modules.setdefault(".".join(parts[:end]), set()).add(name)
    return modules
