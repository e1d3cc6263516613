"""The adapter of a soup: what of it adds up to one LoRA of the same base, and what has to be saved whole.

A soup of LoRA adapters is their base and a weighted sum of what each adds, `sum_k p_k B_k A_k`, which is a product of
stacked factors. All else in which the soup differs from the base, by whatever made it so (heads that were trained
whole, refitted heads, distilled layers, biases, statistics), is found by comparing the two, and saved as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_radin.adapters.factors import Reduced, added, bound, largest_rank, reduced
from hf_radin.checkpoints.files import ADAPTER, ADAPTER_CONFIG, read_fields, read_header
from hf_radin.checkpoints.lora import Factors, adapter_tensors
from hf_radin.checkpoints.model import load_model, quiet_transformers
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import ADAPTER_FOLDER, read_text, sha256_of

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

# How far a weight may be from what the adapters add to the base, by the numbers that were added up for it,
# which is done in float32.
NEAR = 1e-5

# How far any other number may be from the base's, which was averaged with its equals.
SAME = 1e-6

# What is said to do about checkpoints of which no adapter can be made.
WAY_OUT = "Leave save_adapter (--save-adapter) out: the soup itself can be made of them."


class AdapterError(ValueError):
    """A soup that can't be an adapter; it can be saved without."""


@dataclass(frozen=True)
class AdapterRecord:
    """What `recipe.json` says of the adapter that lies beside a soup.

    Args:
        base: the model that it is for.
        revision: commit of that on the Hub; None for a folder.
        rank: of the layer where it is largest.
        layers: how many have factors.
        parameters: of factors and of what is saved whole.
        limit: the rank that it was cut to; None if it is exact.
        lost: what that lost, by the Frobenius norm of all layers together, over the norm of what there was.
        full: how many layers have ranks that add up beyond their matrix, and so have that of the matrix: nothing is
            lost by it.
        modules_to_save: the modules that are saved whole.
        files: the SHA-256 of each file by its name.
    """

    base: str
    rank: int
    layers: int
    parameters: int
    revision: str | None = None
    limit: int | None = None
    lost: float = 0.0
    full: int = 0
    modules_to_save: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def rank_limit(save_adapter: bool | int) -> int | None:
    """The rank that `save_adapter` names; None for an exact adapter.

    Raises:
        ValueError: if it names none.
    """
    if save_adapter is True:
        return None
    if isinstance(save_adapter, int) and save_adapter > 0:
        return save_adapter
    raise ValueError(f"save_adapter={save_adapter!r}: it is True, or a rank above 0 (--save-adapter, or with a rank).")


def check_soup(ingredients: Ingredients, recipe: Recipe) -> Ingredient:
    """See that the soup of a recipe can be an adapter: see `check_adapters`, and `check_pull`; the base."""
    base = check_adapters(ingredients.select(recipe.used))
    check_pull(ingredients.start_of(recipe), base)
    return base


def check_pull(start: Ingredient | None, base: Ingredient) -> None:
    """See that a start to which soups may be pulled, if there is one, is the base of their adapters.

    Raises:
        AdapterError: if it is another model.
    """
    if start is not None and start.version != base.version:
        raise AdapterError(
            f"save_adapter (--save-adapter): a soup that is pulled to {_named(start)} is no adapter of "
            f"{_named(base)}. Pull it to this, or leave save_adapter out."
        )


def check_adapters(ingredients: Ingredients) -> Ingredient:
    """See that any soup of these ingredients can be saved as an adapter. Weights are not read.

    Returns:
        The base of all.

    Raises:
        AdapterError: if there is no adapter, or one that is not plain LoRA, or a checkpoint that is none, unless it is
            the base itself; if bases differ; or if peft is missing.
    """
    adapters = [ingredient for ingredient in ingredients if ingredient.base]
    if not adapters:
        names = ", ".join(ingredients.ids[:3]) + (", ..." if ingredients.ids[3:] else "")
        raise AdapterError(f"save_adapter (--save-adapter): none of {names} is a LoRA adapter. {WAY_OUT}")
    first, base = adapters[0], adapters[0].base
    assert base is not None  # as was just looked at
    for ingredient in ingredients:
        if ingredient.base and ingredient.base.version != base.version:
            raise AdapterError(
                f"save_adapter (--save-adapter): {first.id} is an adapter of {_named(base)}, and {ingredient.id} of "
                f"{_named(ingredient.base)}. {WAY_OUT}"
            )
        if ingredient.base is None and ingredient.version != base.version:
            raise AdapterError(
                f"save_adapter (--save-adapter): {ingredient.id} is a whole checkpoint, and no adapter of "
                f"{_named(base)} as {first.id} is. {WAY_OUT}"
            )
    if find_spec("peft") is None:
        raise AdapterError("save_adapter (--save-adapter): install hf_radin[peft], which writes adapters.")
    seen = set()
    for ingredient in adapters:
        if not ingredient.is_here:  # as in a bank from the Hub
            ingredient.download()
        kind = read_text(ingredient.folder / ADAPTER_CONFIG), repr(sorted(read_header(ingredient.folder).items()))
        if kind not in seen:
            seen.add(kind)
            try:
                ingredient.check_plain()
            except ValueError as error:
                raise AdapterError(f"save_adapter (--save-adapter): {error}") from error
    return base


def write_adapter(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    ingredients: Ingredients,
    recipe: Recipe,
    folder: Path,
    *,
    limit: int | None = None,
) -> AdapterRecord:
    """Write the adapter of a soup into a new folder inside that of the soup, with its image processor.

    Args:
        model: the soup.
        ingredients, recipe: of the soup, as `check_soup` has seen them.
        folder: of the soup.
        limit: the rank that it is cut to; by default it is exact.

    Raises:
        AdapterError: if the soup differs from the base in a tensor that belongs to no module, or in no layer by
            factors.
    """
    from safetensors.torch import save_file

    used = ingredients.select(recipe.used)
    base = next(ingredient.base for ingredient in used if ingredient.base)
    soup = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    exact = _factors_of(used, recipe)
    whole, bias = _whole_modules(soup, _base_tensors(base, model), exact)
    exact = {layer: factors for layer, factors in exact.items() if not _is_within(layer, whole)}
    if not exact:
        raise AdapterError(f"The soup has no layer in which it is an adapter of {_named(base)}. {WAY_OUT}")
    cut = {layer: _cut(layer, factors, limit) for layer, factors in exact.items()}
    factors = {layer: entry.factors for layer, entry in cut.items()}
    options = _options(base, factors, whole, bias)
    tensors = _tensors(model, soup, factors, options, trust_remote_code=base.trust_remote_code)
    target = folder / ADAPTER_FOLDER
    target.mkdir()
    save_file(tensors, target / ADAPTER, {"format": "pt"})
    _write_options(options, target)
    with quiet_transformers():  # without a `config.json`, with which transformers looks for whole weights there
        processor.save_pretrained(target)
    lost, total = (sum(getattr(entry, name) for entry in cut.values()) for name in ("lost", "whole"))
    return AdapterRecord(
        base=base.repo_id or base.id,
        rank=max(entry.rank for entry in factors.values()),
        layers=len(factors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        revision=base.revision if base.repo_id else None,
        limit=limit if lost else None,
        lost=(lost / total) ** 0.5 if total else 0.0,
        full=sum(entry.rank > largest_rank(entry) for entry in exact.values()),
        modules_to_save=tuple(whole),
        files={path.name: sha256_of(path) for path in sorted(target.iterdir())},
    )


def _cut(layer: str, factors: Factors, limit: int | None) -> Reduced:
    """The factors of a layer, of a rank that is not above the limit, nor above that of the matrix that they make."""
    try:
        return reduced(factors, min(limit or factors.rank, largest_rank(factors)))
    except ValueError as error:
        raise AdapterError(f"The adapter of the soup can't be cut: {layer}: {error}. {WAY_OUT}") from error


def _named(checkpoint: Ingredient) -> str:
    return f"{checkpoint.id} at {checkpoint.revision[:19]}"


def _factors_of(used: Ingredients, recipe: Recipe) -> dict[str, Factors]:
    """What a soup adds to the base, by the names of layers: those of each ingredient, stacked.

    A layer that not all adapters have is nothing in the others. A pull to the base leaves a part of all.
    """
    share = recipe.pull.share if recipe.pull else 0.0
    parts: dict[str, list[tuple[float, Factors]]] = {}
    for ingredient in used.by_content:
        for layer, factors in ingredient.load_factors().items():
            parts.setdefault(layer, []).append(((1 - share) * recipe.used[ingredient.id], factors))
    return {layer: added(of_layer) for layer, of_layer in parts.items()}


def _base_tensors(base: Ingredient, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of the base by their names in a soup's model; at random where it has none, or another shape."""
    import torch

    exact = torch.float64 if model.dtype == torch.float64 else torch.float32
    with torch.random.fork_rng(devices=[]):
        loaded = load_model(
            base.folder,
            dtype=exact,
            config=model.config,
            given=model.state_dict().keys(),
            allow_pickle=base.allow_pickle,
            trust_remote_code=base.trust_remote_code,
        )
    return loaded.state_dict()


def _whole_modules(
    soup: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], factors: Mapping[str, Factors]
) -> tuple[list[str], Literal["none", "lora_only", "all"]]:
    """The modules that factors don't make of the base, and which biases are saved beside them, as peft names these.

    Raises:
        AdapterError: if a tensor differs that belongs to no module.
    """
    differ = {name for name, tensor in soup.items() if not _is_made(name, tensor, base[name], factors)}
    biases = {name for name in differ if name.rpartition(".")[2] == "bias"}
    modules = {name.rpartition(".")[0] for name in differ - biases}
    if "" in modules:
        name = next(name for name in sorted(differ - biases) if "." not in name)
        raise AdapterError(f"The soup has another {name} than the base, which an adapter can't have. {WAY_OUT}")
    whole = sorted(module for module in modules if not _is_within(module, modules - {module}))
    lone = {name.rpartition(".")[0] for name in biases if not _is_within(name, whole)}
    return whole, "none" if not lone else "lora_only" if lone <= factors.keys() else "all"


def _is_made(name: str, tensor: torch.Tensor, base: torch.Tensor, factors: Mapping[str, Factors]) -> bool:
    """Whether a tensor of a soup is that of the base, with what factors add to it, to rounding."""
    import torch

    layer = name.removesuffix(".weight")
    if not tensor.is_floating_point():
        return bool(torch.equal(tensor, base))
    if name == layer or layer not in factors:
        expected = base.to(tensor.dtype)
        return bool(torch.allclose(tensor.double(), expected.double(), rtol=SAME, atol=0.0, equal_nan=True))
    if factors[layer].up.shape[0] * factors[layer].down.shape[1] != base.numel():  # it has other classes
        return False
    expected = base.double() + factors[layer].of_shape(base.shape)
    scale = base.abs().max().item() + bound(factors[layer])
    rounding = 2 * torch.finfo(tensor.dtype).eps
    return bool(torch.allclose(tensor.double(), expected, rtol=rounding, atol=NEAR * scale, equal_nan=True))


def _is_within(name: str, modules: Collection[str]) -> bool:
    """Whether something in a model is one of these modules or inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _options(
    base: Ingredient, factors: Mapping[str, Factors], whole: list[str], bias: Literal["none", "lora_only", "all"]
) -> LoraConfig:
    """The configuration of an adapter with these factors, whose scale is 1 in each layer."""
    from peft import LoraConfig

    ranks = {layer: entry.rank for layer, entry in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # peft takes the first that fits the end of a name, and adapters without it can't be reloaded (peft#3737)
    others = {
        re.escape(layer): ranks[layer] for layer in sorted(ranks, key=len, reverse=True) if ranks[layer] != usual
    }
    return LoraConfig(
        base_model_name_or_path=base.repo_id or str(base.folder),
        revision=base.revision if base.repo_id else None,
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(factors),
        modules_to_save=whole or None,
        bias=bias,
        fan_in_fan_out=any(entry.is_transposed for entry in factors.values()),
        inference_mode=True,
    )


def _tensors(
    model: PreTrainedModel,
    soup: Mapping[str, torch.Tensor],
    factors: Mapping[str, Factors],
    options: LoraConfig,
    *,
    trust_remote_code: bool,
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the names that peft saves them under: factors, and the soup's own."""
    import torch

    exact = torch.float64 if model.dtype == torch.float64 else torch.float32
    tensors, modules = {}, dict(model.named_modules())
    for name, of_model in adapter_tensors(options, model.config, trust_remote_code=trust_remote_code).items():
        if ".lora_" not in name:
            tensors[name] = soup[of_model].clone().contiguous()
            continue
        entry, kernel = factors[of_model], getattr(modules[of_model], "kernel_size", ())
        if ".lora_A." in name:
            shape: tuple[int, ...] = (entry.rank, entry.down.shape[1] // math.prod(kernel), *kernel)
            tensors[name] = entry.down.reshape(shape).to(exact).contiguous()
        else:
            tensors[name] = entry.up.reshape(*entry.up.shape, *(1 for _ in kernel)).to(exact).contiguous()
    return tensors


def _write_options(options: LoraConfig, folder: Path) -> None:
    """Write the configuration of an adapter, the same for the same options."""
    options.save_pretrained(str(folder))
    stored = read_fields(folder / ADAPTER_CONFIG)  # sets are in any order
    fields = {name: sorted(value) if isinstance(value, list) else value for name, value in stored.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
