"""Average weights: many checkpoints in, one out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_radin import adapter, card, checkpoint, modeling, origin, tensors
from hf_radin.average_files import are_alike, header_of, refuse_ingredients, stream, widest, write_weights
from hf_radin.batchnorm import Statistics, estimate_statistics
from hf_radin.checkpoint import SHARD
from hf_radin.files import check_output, write_folder
from hf_radin.ingredients import Ingredients
from hf_radin.processes import on_main_process
from hf_radin.recipe import Recipe
from hf_radin.recipe_file import RECIPE, as_kept, unmeasured

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


def average(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = SHARD,
    statistics: Statistics | None = None,
    about: dict[str, Any] | None = None,
    license: str | None = None,
) -> dict[str, torch.Tensor] | None:
    """The weighted average of checkpoints, `sum_k p_k w_k`.

    Sums are taken in float64, of 16-bit weights in float32, and rounded once. Where files name their tensors alike,
    a written average takes one pass over them, and memory for a few chunks; elsewhere the loaded models are averaged,
    two of them in memory.

    Args:
        ingredients: must hold all that the recipe uses; of a weight of zero nothing is read.
        output: a folder to write the soup to, as an ordinary checkpoint with `recipe.json` and a card, under the names
            that the first ingredient's files use; none by default. With several processes the main one writes.
        overwrite: allow an output folder that holds something.
        dtype: of the result; by default that of the ingredients, float32 if they differ.
        max_shard_size: of a file of weights, as in `5GB`; as in transformers.
        statistics: images to estimate BatchNorm statistics from (`LogitBank.statistics`); without them the statistics
            of the ingredients are averaged like all else.
        about: what a `recipe.json` says of this recipe, to be written beside the weights; by default that nothing was
            measured of it.
        license: for the card beside them; by default that of the ingredients, if they agree.

    Returns:
        The tensors of the averaged model's `state_dict()`; None if they were written.

    Raises:
        ValueError: if the recipe names an ingredient that is not there, or one of them can't be loaded; if the output
            folder is not empty, or an ingredient's; if the disk is too small, or `max_shard_size` is no size.
    """
    max_shard_size = checkpoint.shard_size(max_shard_size)
    if dtype is not None:
        checkpoint.as_dtype(dtype)
    if output is None:
        return average_model(ingredients, recipe, dtype=dtype, statistics=statistics).state_dict()
    folder = Path(output)
    check_output(folder, overwrite=overwrite)
    refuse_ingredients(folder, ingredients)
    options: dict[str, Any] = {"dtype": dtype, "statistics": statistics, "max_shard_size": max_shard_size}

    def fill(new: Path) -> None:
        saved = str(checkpoint.as_dtype(dtype)).removeprefix("torch.") if dtype else saved_dtype(ingredients, recipe)
        fields = as_kept(about, saved) if about else _unmeasured(ingredients, recipe, statistics, saved)
        contents = card.contents(fields, folder / RECIPE, license=license)  # refused before anything is averaged
        write_average(ingredients, recipe, new, **options)
        for name, content in contents.items():
            (new / name).write_bytes(content)

    on_main_process(lambda: write_folder(folder, fill, overwrite=overwrite))
    return None


def _unmeasured(ingredients: Ingredients, recipe: Recipe, statistics: Statistics | None, dtype: str) -> dict[str, Any]:
    """What a `recipe.json` says of an average that nobody measured."""
    used = ingredients.select(recipe.used)
    about = {
        "processor": adapter.describe(used[0].processor),
        "classes": list(used.labels),
        "architecture": used[0].architecture,
        "image_processor": used[0].image_processor,
        "batchnorm": statistics and statistics.about,
    }
    weights = {"ingredients": list(recipe.used), "weights": list(recipe.used.values())}
    return unmeasured(weights, [origin.describe(ingredient) for ingredient in used], about, dtype)


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
            target = checkpoint.as_dtype(dtype) if dtype else checkpoint.torch_dtype(widest(files))
            header = header_of(files, checkpoint.spelled(target))
            config = modeling.shared_config([ingredient.config for ingredient in used])
            # that what is written fills the model is known before the first byte is
            model, _ = modeling.check_header(used[0].id, config, header)
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
    with modeling.quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)


def saved_dtype(ingredients: Ingredients, recipe: Recipe) -> str:
    """The dtype that an average has by default, as torch names it."""
    with _opened(ingredients.select(recipe.used)) as files:
        return str(checkpoint.torch_dtype(widest(files))).removeprefix("torch.")


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
    used = ingredients.select(recipe.used)
    with _opened(used) as files:
        config = modeling.shared_config([ingredient.config for ingredient in used])
        target = checkpoint.as_dtype(dtype) if dtype else checkpoint.torch_dtype(widest(files))
        if are_alike(used, files):
            header = header_of(files, checkpoint.spelled(target))
            kept = {
                name: np.empty(checkpoint.BYTES[kind] * math.prod(shape), np.uint8)
                for name, (kind, shape) in header.items()
            }

            def keep(name: str, first: int, part: np.ndarray) -> None:
                kept[name][first : first + part.nbytes] = part.view(np.uint8)

            stream(files, recipe, header, keep)
            found = {name: _as_torch(kept.pop(name), *header[name]) for name in list(kept)}
            return modeling.load_model(
                used[0].folder,
                dtype=target,
                config=config,
                tensors=found,
                trust_remote_code=used[0].trust_remote_code,
            )
        exact = tensors.sum_dtype((one.dtype for file in files for one in file.values()), [checkpoint.spelled(target)])
    sum_in = torch.float64 if exact is np.float64 else torch.float32
    sums: dict[str, torch.Tensor] = {}
    strange: dict[str, torch.Tensor] = {}
    for index, (one, weight) in enumerate(recipe.used.items()):
        model = adapter.load(used[index], sum_in, config)
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
    dtype = checkpoint.torch_dtype(kind)
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
    kind = checkpoint.spelled(dtype)
    flat, size = tensor.contiguous().reshape(-1).numpy(), checkpoint.BYTES[kind]
    kept = np.empty(size * len(flat), np.uint8)
    for start in range(0, len(flat), tensors.CHUNK):
        some = slice(start, start + tensors.CHUNK)
        kept[size * some.start : size * some.stop] = tensors.rounded(flat[some], kind)
    return _as_torch(kept, kind, tuple(tensor.shape))
