"""Average the weights of checkpoints: as files where their tensors have the same names, else as loaded models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.checkpoints.autotune import bytes_of, free_memory
from hf_radin.checkpoints.files import BYTES, SHARD, as_dtype, safetensors_dtype, torch_dtype
from hf_radin.checkpoints.model import check_header, load_model, quiet_transformers, shared_config
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.recipes.recipe import Recipe
from hf_radin.weights import average_tensors
from hf_radin.weights.average_files import (
    Files,
    are_alike,
    differ_in_statistics,
    header_of,
    stream,
    widest,
    widest_of,
    write_weights,
)
from hf_radin.weights.batchnorm import Statistics, estimate_statistics
from hf_radin.weights.head import LastLayers
from hf_radin.weights.start import load_body

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

# Dtypes of weights whose rounding is that of ensembles, which are mixed in float32.
FULL = ("float32", "float64")

# The share of a device's free memory that ingredients may take to be averaged there.
RESIDENT = 0.5


def write_average(
    ingredients: Ingredients,
    recipe: Recipe,
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = SHARD,
    statistics: Statistics | None = None,
    head: LastLayers | None = None,
) -> None:
    """Write an average into an empty folder: weights, configuration and image processor. See `average`."""
    used, recipe = by_content(ingredients, recipe)
    with open_weights(used) as files:
        if statistics is None and head is None and recipe.pull is None and are_alike(used, files):
            target = as_dtype(dtype) if dtype else torch_dtype(widest(files))
            header = header_of(files, safetensors_dtype(target))
            config = _config_of(used)
            # that the tensors fill the model is checked before the first byte is written
            model, _ = check_header(used[0].id, config, header)
            write_weights(folder, files, recipe, header, max_shard_size)
            config.architectures, config.dtype = [type(model).__name__], target
            config.save_pretrained(folder)
            used.processor.save_pretrained(folder)
            return
    model = average_model(used, recipe, dtype=dtype, statistics=statistics, head=head)
    save_checkpoint(model, used.processor, folder, max_shard_size=max_shard_size)


def save_checkpoint(
    model: PreTrainedModel, processor: BaseImageProcessor, folder: Path, *, max_shard_size: int | str = SHARD
) -> None:
    """Save model and image processor for `from_pretrained`."""
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)


def saved_dtype(ingredients: Ingredients, recipe: Recipe) -> str:
    """The dtype that an average has by default, as torch names it."""
    with open_weights(ingredients.select(recipe.used)) as files:
        return str(torch_dtype(widest(files))).removeprefix("torch.")


def are_averaged_in_full(ingredients: Ingredients) -> bool:
    """Whether the average of any of these is saved in float32 or more, and no head is rounded to fewer bits."""
    return all(saved_dtype(ingredients, Recipe((name,), (1.0,))) in FULL for name in ingredients.ids)


def averages_statistics(ingredients: Ingredients, recipe: Recipe) -> bool:
    """Whether an average mixes BatchNorm statistics that differ. See `differ_in_statistics`."""
    if recipe.is_single:
        return False
    with open_weights(ingredients.select(recipe.used)) as files:
        return differ_in_statistics(files)


def average_model(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    dtype: str | torch.dtype | None = None,
    statistics: Statistics | None = None,
    head: LastLayers | None = None,
    resident: Callable[[Ingredients, Recipe], PreTrainedModel | None] | None = None,
) -> PreTrainedModel:
    """The averaged model, in evaluation mode on the CPU, or where `resident` has it. See `average`.

    Files are averaged tensor by tensor where all of them name their tensors alike. Different versions of transformers
    name them differently on disk (transformers#41693), but not in the modules: there the loaded models are averaged,
    and so are adapters, and classes that stand in different orders. Both ways give the same bits. Where a recipe pulls
    the soup to a start, which has a head of its own or none, models are averaged, too.

    Args:
        head: that takes the place of the averaged one.
        resident: gives the average of models that are in memory, as `Residents.soup` does; None where they are not.
            It is not asked for another `dtype`.
    """
    used, recipe = by_content(ingredients, recipe)
    model = resident(used, recipe) if resident and dtype is None else None
    if model is None:
        with open_weights(used) as files:
            target = as_dtype(dtype) if dtype else torch_dtype(widest(files))
            average = average_of_files if recipe.pull is None and are_alike(used, files) else average_of_models
            model = average(used, files, recipe, target)
    if statistics is not None and not recipe.is_single:
        estimate_statistics(model, statistics)
    if head is not None:
        head.put_into(model)
    return model


def by_content(ingredients: Ingredients, recipe: Recipe) -> tuple[Ingredients, Recipe]:
    """The ingredients that a recipe uses, and the recipe, in the order in which weights are added up.

    Sums are rounded, so that in the order of a user's list equal recipes would give different bits.
    """
    used = ingredients.select(recipe.used).by_content
    return used, recipe.in_order(used.ids)


@contextmanager
def open_weights(used: Ingredients) -> Iterator[list[dict[str, average_tensors.Tensor]]]:
    """Download weights and open them: the tensors of each ingredient and, after these, of adapters' base models."""
    for ingredient in used:
        ingredient.download()
    bases = dict.fromkeys(ingredient.base for ingredient in used if ingredient.base)
    with ExitStack() as stack:
        yield [
            stack.enter_context(average_tensors.open_files(ingredient.folder, allow_pickle=ingredient.allow_pickle))
            for ingredient in [*used, *bases]
        ]


def average_of_files(used: Ingredients, files: Files, recipe: Recipe, target: torch.dtype) -> PreTrainedModel:
    """The average of files that are alike, in a model.

    Args:
        used: the ingredients that the recipe uses, in its order.
        files: their tensors.
        target: dtype of the model.
    """
    config = _config_of(used)
    header = header_of(files, safetensors_dtype(target))
    contents = {name: np.empty(BYTES[dtype] * math.prod(shape), np.uint8) for name, (dtype, shape) in header.items()}

    def fill(name: str, first: int, part: np.ndarray) -> None:
        contents[name][first : first + part.nbytes] = part.view(np.uint8)

    stream(files, recipe, header, fill)
    return load_model(
        used[0].folder,
        dtype=target,
        config=config,
        tensors={name: _as_torch(contents.pop(name), *header[name]) for name in header},
        trust_remote_code=used[0].trust_remote_code,
    )


def average_of_models(used: Ingredients, files: Files, recipe: Recipe, target: torch.dtype) -> PreTrainedModel:
    """The average of models that are loaded one after the other; two of them are in memory at a time.

    Args:
        used: the ingredients that the recipe uses, in its order.
        files: their tensors, and those of the base models of adapters.
        target: dtype of the model.

    Raises:
        ValueError: if a number is NaN or infinite in some of the models and not in all.
    """
    import torch

    config = _config_of(used)
    dtypes = (tensor.dtype for file in files for tensor in file.values())
    sum_dtype = (
        torch.float64
        if average_tensors.sum_dtype(dtypes, [safetensors_dtype(target)]) is np.float64
        else torch.float32
    )
    sums: dict[str, torch.Tensor] = {}
    non_finite: dict[str, torch.Tensor] = {}  # of the first model: its NaN and infinite numbers, and 0 elsewhere
    for index, (ingredient, weight) in enumerate(zip(used, recipe.used.values(), strict=True)):
        model = ingredient.load_model(sum_dtype, config)
        for name, tensor in model.state_dict().items():
            values = torch.where(torch.isfinite(tensor), 0, tensor)
            if index == 0:
                non_finite[name] = values if values.any() else torch.zeros((), dtype=values.dtype)
            elif name in non_finite and (differs := _differs(values, non_finite[name])).any():
                place = int(differs.reshape(-1).nonzero()[0])
                value, owner = values.reshape(-1)[place], ingredient
                if value == 0:  # a number here, and none in the first model
                    value, owner = non_finite[name].reshape(-1)[place], used[0]
                raise ValueError(f"{owner.id}: {name} has {value}, which not all have; an average of it is no number.")
            _add(sums, name, tensor, weight)
    if (start := used.start_of(recipe)) and recipe.pull:
        _pull(sums, start, recipe.pull.share, load_body(start, config, sum_dtype))
    model = model.to(target)
    model.load_state_dict({name: _rounded(tensor, target) for name, tensor in sums.items()})
    return model


class Residents:
    """Ingredients whose weights stay in the memory of a device, where their soups are averaged: no file is read again.

    The bits are those of `average_of_files`. What it costs is memory: ingredients are loaded when a second soup is
    wanted, and only as long as all take no more than a share of what is free, so that soups and images have room.

    Args:
        share: of the memory that is free without them.
    """

    def __init__(self, share: float = RESIDENT) -> None:
        self._share = share
        self._soups = 0
        self._models: dict[Ingredient, PreTrainedModel] = {}
        self._dtypes: dict[Ingredient, frozenset[str]] = {}  # in their files, as safetensors spells them

    def soup(self, used: Ingredients, recipe: Recipe, *, device: torch.device) -> PreTrainedModel | None:
        """An average in evaluation mode on a device, or None if it has to be made from files.

        So it is of the first soup, where there is too little memory, of adapters, code of their own, pulled recipes
        and ingredients of several dtypes, and with a number that is not finite, which is settled or named there.

        Args:
            used: the ingredients that the recipe uses, in its order.
        """
        self._soups += 1
        if self._soups == 1 or recipe.pull is not None or any(map(_is_special, used)):
            return None
        if not self._load(used, device):
            return None
        models, dtypes = ([of_each[ingredient] for ingredient in used] for of_each in (self._models, self._dtypes))
        if len(set(map(widest_of, dtypes))) > 1:
            return None
        averaged = average_of_resident(models, list(recipe.used.values()), frozenset().union(*dtypes))
        return None if averaged is None else copy.deepcopy(models[0], averaged)

    def _load(self, used: Ingredients, device: torch.device) -> bool:
        """Whether ingredients are on the device, where those that are not yet are loaded if there is room."""
        import torch

        missing = [ingredient for ingredient in used if ingredient not in self._models]
        if not missing:
            return True
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what earlier passes took is free
        taken = sum(map(bytes_of, self._models.values()))
        with open_weights(Ingredients(missing)) as files:
            needed = sum(BYTES[tensor.dtype] * len(tensor) for file in files for tensor in file.values())
            if taken + needed > self._share * (taken + free_memory(device)):
                return False
            for ingredient, file in zip(missing, files, strict=True):
                self._dtypes[ingredient] = frozenset(tensor.dtype for tensor in file.values())
                self._models[ingredient] = ingredient.load_model(torch_dtype(widest([file]))).to(device)
        return True


def average_of_resident(
    models: Sequence[PreTrainedModel], weights: Sequence[float], dtypes: frozenset[str]
) -> dict[int, torch.Tensor] | None:
    """The averaged tensors of models on one device; None if a number of them is not finite.

    Sums are taken in the same dtype and order as of files, and are rounded once: the bits are the same.

    Args:
        models: of one dtype.
        dtypes: in their files, as safetensors spells them.

    Returns:
        By the `id` of the first model's tensor, so that a copy of this model takes them in its place.
    """
    import torch

    target = widest_of(dtypes)
    sum_dtype = torch.float64 if average_tensors.sum_dtype(dtypes, [target]) is np.float64 else torch.float32
    averaged: dict[int, torch.Tensor] = {}
    states = [model.state_dict(keep_vars=True) for model in models]
    with torch.no_grad():
        for name, tensor in states[0].items():
            sums: dict[str, torch.Tensor] = {}
            for state, weight in zip(states, weights, strict=True):
                values = state[name]
                _add(sums, name, values.to(sum_dtype) if values.is_floating_point() else values.clone(), weight)
            # some architectures keep a few tensors in float32
            average = sums[name].to(torch_dtype(target)).to(tensor.dtype) if tensor.is_floating_point() else sums[name]
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            averaged[id(tensor)] = torch.nn.Parameter(average, tensor.requires_grad) if is_parameter else average
        is_finite = torch.stack([tensor.isfinite().all() for tensor in averaged.values()]).all()
    return averaged if bool(is_finite) else None


def _is_special(ingredient: Ingredient) -> bool:
    """Whether the weights of a model are more than what its files say, as those of an adapter."""
    return ingredient.base is not None or ingredient.trust_remote_code


def _config_of(used: Ingredients) -> PretrainedConfig:
    return copy.deepcopy(shared_config(list(map(_config, used))))


@lru_cache(maxsize=1024)
def _config(ingredient: Ingredient) -> PretrainedConfig:
    """The configuration of an ingredient, read once for all soups: that its files are the same is checked for each."""
    return ingredient.config


def _as_torch(content: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these bytes.

    Args:
        content: uint8 `(bytes,)`.
        dtype: as safetensors spells it.
    """
    import torch

    if not len(content):
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.from_numpy(content).view(torch_dtype(dtype)).reshape(shape)


def _differs(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Where two tensors differ; NaN is the same as NaN."""
    return (values != others) & ~(values.isnan() & others.isnan())


def _add(sums: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, weight: float) -> None:
    """Add a weighted tensor to the sum of its name, in the same way as `average_tensors.average`."""
    if not tensor.is_floating_point():
        sums.setdefault(name, tensor)
    elif name not in sums:
        sums[name] = tensor * weight
    else:
        sums[name] += tensor * weight


def _pull(sums: dict[str, torch.Tensor], start: Ingredient, share: float, body: dict[str, torch.Tensor]) -> None:
    """Give a start its share in the tensors that it has of an average. What counts or indexes stays the average's.

    Raises:
        ValueError: if a number of the start is NaN or infinite, and that of the average is another.
    """
    import torch

    for name, tensor in body.items():
        if tensor.is_floating_point():
            broken = ~torch.isfinite(tensor) & (tensor != sums[name])
            if broken.any():
                raise ValueError(f"{start.id}: {name} has {tensor[broken][0]}, and an average with it is no number.")
            sums[name] = (1 - share) * sums[name] + share * tensor


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers of a dtype, rounded once: torch itself rounds to float32 first."""
    if not tensor.is_floating_point():
        return tensor
    spelling = safetensors_dtype(dtype)
    flat, size = tensor.contiguous().reshape(-1).numpy(), BYTES[spelling]
    content = np.empty(size * len(flat), np.uint8)
    for start in range(0, len(flat), average_tensors.CHUNK):
        end = min(start + average_tensors.CHUNK, len(flat))
        content[size * start : size * end] = average_tensors.rounded(flat[start:end], spelling)
    return _as_torch(content, spelling, tuple(tensor.shape))
