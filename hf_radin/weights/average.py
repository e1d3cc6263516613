"""Average weights: many checkpoints in, one out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_radin.checkpoints.files import BYTES, SHARD, as_dtype, safetensors_dtype, torch_dtype
from hf_radin.checkpoints.model import check_header, load_model, quiet_transformers, shared_config
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.recipes.recipe import Recipe
from hf_radin.weights import tensors
from hf_radin.weights.average_files import are_alike, header_of, stream, widest, write_weights
from hf_radin.weights.batchnorm import Statistics, estimate_statistics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


def write_average(
    ingredients: Ingredients,
    recipe: Recipe,
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = SHARD,
    statistics: Statistics | None = None,
) -> None:
    """Write an average into an empty folder: weights, configuration and image processor. See `average`."""
    used = ingredients.select(recipe.used)
    with _opened(used) as files:
        if statistics is None and are_alike(used, files):
            target = as_dtype(dtype) if dtype else torch_dtype(widest(files))
            header = header_of(files, safetensors_dtype(target))
            config = shared_config([ingredient.config for ingredient in used])
            # that what is written fills the model is known before the first byte is
            model, _ = check_header(used[0].id, config, header)
            write_weights(folder, files, recipe, header, max_shard_size)
            config.architectures, config.dtype = [type(model).__name__], target
            config.save_pretrained(folder)
            used[0].processor.save_pretrained(folder)
            return
    model = average_model(ingredients, recipe, dtype=dtype, statistics=statistics)
    save_checkpoint(model, used[0].processor, folder, max_shard_size=max_shard_size)


def save_checkpoint(
    model: PreTrainedModel, processor: BaseImageProcessor, folder: Path, *, max_shard_size: int | str = SHARD
) -> None:
    """Model and image processor, as `from_pretrained` reads them."""
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)


def saved_dtype(ingredients: Ingredients, recipe: Recipe) -> str:
    """The dtype that an average has by default, as torch names it."""
    with _opened(ingredients.select(recipe.used)) as files:
        return str(torch_dtype(widest(files))).removeprefix("torch.")


def average_model(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    dtype: str | torch.dtype | None = None,
    statistics: Statistics | None = None,
) -> PreTrainedModel:
    """The averaged model, in evaluation mode on the CPU. See `average`."""
    model = _averaged(ingredients, recipe, dtype)
    if statistics is not None and len(recipe.used) > 1:
        estimate_statistics(model, statistics)
    return model


def _averaged(ingredients: Ingredients, recipe: Recipe, dtype: str | torch.dtype | None) -> PreTrainedModel:
    """The average of all tensors.

    Files are averaged tensor by tensor where all of them name their tensors alike. Different versions of transformers
    name them differently on disk (transformers#41693), but not in the modules: there the loaded models are averaged,
    and so are adapters, and classes that stand in different orders. Both ways give the same bits.
    """
    import torch

    used = ingredients.select(recipe.used)
    with _opened(used) as files:
        config = shared_config([ingredient.config for ingredient in used])
        target = as_dtype(dtype) if dtype else torch_dtype(widest(files))
        if are_alike(used, files):
            header = header_of(files, safetensors_dtype(target))
            kept = {name: np.empty(BYTES[kind] * math.prod(shape), np.uint8) for name, (kind, shape) in header.items()}

            def keep(name: str, first: int, part: np.ndarray) -> None:
                kept[name][first : first + part.nbytes] = part.view(np.uint8)

            stream(files, recipe, header, keep)
            found = {name: _as_torch(kept.pop(name), *header[name]) for name in list(kept)}
            return load_model(
                used[0].folder,
                dtype=target,
                config=config,
                tensors=found,
                trust_remote_code=used[0].trust_remote_code,
            )
        exact = tensors.sum_dtype((one.dtype for file in files for one in file.values()), [safetensors_dtype(target)])
    sum_in = torch.float64 if exact is np.float64 else torch.float32
    sums: dict[str, torch.Tensor] = {}
    strange: dict[str, torch.Tensor] = {}
    for index, (one, weight) in enumerate(recipe.used.items()):
        model = used[index].load_model(sum_in, config)
        for name, tensor in model.state_dict().items():
            odd = torch.where(torch.isfinite(tensor), 0, tensor)
            if index == 0:
                strange[name] = odd if odd.any() else torch.zeros((), dtype=odd.dtype)
            elif name in strange and (odd != strange[name]).any():
                value = tensor.reshape(-1)[int((odd != strange[name]).reshape(-1).nonzero()[0])]
                raise ValueError(f"{one}: {name} has {value}, which not all have; an average of it is no number.")
            _add(sums, name, tensor, weight)
    model = model.to(target)
    model.load_state_dict({name: _rounded(tensor, target) for name, tensor in sums.items()})
    return model


@contextmanager
def _opened(used: Ingredients) -> Iterator[list[dict[str, tensors.Tensor]]]:
    """The tensors of each ingredient's files, and of the bases of adapters."""
    for one in used:
        one.download()
    with ExitStack() as stack:
        yield [
            stack.enter_context(tensors.open_files(one.folder, allow_pickle=one.allow_pickle))
            for one in [*used, *dict.fromkeys(one.base for one in used if one.base)]
        ]


def _as_torch(kept: np.ndarray, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    dtype = torch_dtype(kind)
    return torch.from_numpy(kept).view(dtype).reshape(shape) if len(kept) else torch.empty(shape, dtype=dtype)


def _add(sums: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, weight: float) -> None:
    """Add a tensor's share to the sum of its name, as `tensors.average` does."""
    if not tensor.is_floating_point():
        sums.setdefault(name, tensor)
    elif name not in sums:
        sums[name] = tensor * weight
    elif sums[name].shape != tensor.shape:
        raise ValueError(
            f"{name} has the shapes {tuple(sums[name].shape)} and {tuple(tensor.shape)} in two ingredients."
        )
    else:
        sums[name] += tensor * weight


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the nearest number, once: torch itself goes by way of float32."""
    if not tensor.is_floating_point():
        return tensor
    kind = safetensors_dtype(dtype)
    flat, size = tensor.contiguous().reshape(-1).numpy(), BYTES[kind]
    kept = np.empty(size * len(flat), np.uint8)
    for start in range(0, len(flat), tensors.CHUNK):
        some = slice(start, start + tensors.CHUNK)
        kept[size * some.start : size * some.stop] = tensors.rounded(flat[some], kind)
    return _as_torch(kept, kind, tuple(tensor.shape))
