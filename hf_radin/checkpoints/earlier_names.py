"""What the layers of a model were called by earlier versions of transformers, and adapters that still say so.

Transformers 5 renames the layers of many models (`attention.attention.query` is `attention.q_proj`), and reads and
writes checkpoints under the names that they had before. peft reads adapters as they are, and finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def earlier_names(model: PreTrainedModel) -> dict[str, str]:
    """Of each tensor of a model the name that it had in earlier versions, and its name now.

    Transformers itself tells: it writes tensors under their earlier names. Tensors that it cuts or joins are not
    there, since no adapter of the one can be one of the other.

    Returns:
        Names now by earlier names; empty where this version of transformers has no such names.
    """
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # no promise of transformers; what is lost is this convenience
        return {}
    now = list(model.state_dict())
    written = revert_weight_conversion(model, {name: torch.tensor([index]) for index, name in enumerate(now)})
    names = {earlier: now[int(index)] for earlier, index in written.items() if index.numel() == 1}
    start = f"{model.base_model_prefix}."
    # a file may lack the first part of a name, which the layer had nevertheless
    return {
        name if name.startswith(start) or not new.startswith(start) else f"{start}{name}": new
        for name, new in names.items()
    }


def renamed(options: LoraConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """What an adapter's configuration says of layers under earlier names, said of these layers as they are called now.

    Patterns and ends of names are held against the earlier names, as peft did when the adapter was trained; what comes
    of it are whole names.

    Args:
        names: as `earlier_names` gives them.

    Returns:
        Fields of the configuration.

    Raises:
        ValueError: if it names what has no equal now.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = ("trainable_token_indices", "target_parameters", "layer_replication")
    if odd := [name for name in fields if getattr(options, name, None)]:
        raise ValueError(f"its {odd[0]} can't be said in the names that layers have now")
    layers = {
        earlier.removesuffix(".weight"): now.removesuffix(".weight")
        for earlier, now in names.items()
        if earlier.endswith(".weight") and now.endswith(".weight")
    }
    targets = [now for earlier, now in layers.items() if check_target_module_exists(options, earlier)]

    def patterns(values: Mapping[str, int] | None) -> dict[str, int]:
        found: dict[str, int] = {}
        for earlier, now in layers.items():
            for pattern, value in (values or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", earlier):  # the first that matches, as in peft
                    found.setdefault(re.escape(now), value)
        return found

    saved = options.modules_to_save
    return {
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": patterns(options.rank_pattern),
        "alpha_pattern": patterns(options.alpha_pattern),
        "modules_to_save": saved and _modules(names, lambda module: any(module.endswith(end) for end in saved)),
    }


def _modules(names: Mapping[str, str], is_wanted: Callable[[str], bool]) -> list[str]:
    """The modules, as they are called now, that hold the tensors of the wanted ones.

    Raises:
        ValueError: if one of them was taken apart.
    """
    now = _held(names.values())
    found = []
    for module, held in _held(names).items():
        if is_wanted(module):
            wanted = {names[tensor] for tensor in held}
            equal = [name for name, tensors in now.items() if tensors == wanted]
            if not equal:
                raise ValueError(f"its module to save {module} is none of the model's now")
            found.append(equal[0])
    return found


def _held(names: Iterable[str]) -> dict[str, set[str]]:
    """Of each module, by its name, the tensors in it."""
    modules: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            modules.setdefault(".".join(parts[:end]), set()).add(name)
    return modules
