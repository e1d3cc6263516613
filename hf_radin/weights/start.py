"""What fine-tunes began from: a checkpoint of the same body, with another head or none, to pull their soups to.

It is no ingredient: nobody can run it for these classes. Of its tensors, those with an entry for each class are left
out; every other tensor of the ingredients' model has to be there, in the same shape.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.files import CONFIG, read_fields
from hf_radin.checkpoints.model import check_header, class_axes, load_model
from hf_radin.ingredients.card_metadata import describe_ingredient
from hf_radin.ingredients.checkpoint_files import CheckpointFiles, Options, read_places
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.ingredients.resolve import find_places
from hf_radin.runtime.files import BrokenFileError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

WAY_OUT = "Name the model that the ingredients were fine-tuned from, or leave start (--start) out."


def find_start(name: str, ingredients: Ingredients) -> Ingredient:
    """The checkpoint that soups of these ingredients may be pulled to, downloaded and seen to fit.

    It is read as ingredients are: pickles and code of its own only where these were allowed for them.

    Args:
        name: a folder, or a Hub id, perhaps with its revision as in `org/a@rev`.

    Raises:
        ValueError: if there is no such checkpoint that may be read, it is an ingredient under another name, or a
            tensor of the ingredients' body is not there, has another shape, or is no number.
    """
    first, title = ingredients[0], f"start={name!r}"
    token = next((ingredient.token for ingredient in ingredients if ingredient.token is not None), None)
    try:
        places = find_places([name], token=token)
        if len(places) != 1:
            raise ValueError(f"it names {len(places)} checkpoints, and a start is a single one")
        options = Options(first.allow_pickle, first.trust_remote_code, token)
        (files,) = read_places(places, options)
        if isinstance(files, ValueError):
            raise files
    except ValueError as error:
        raise ValueError(f"{title}: {str(error).rstrip('.')}. {WAY_OUT}") from error
    start = _as_ingredient(files, first, token)
    if start.id in ingredients.ids:
        raise ValueError(f"{title} is the ingredient {start.id}: name it so.")
    if files.base is not None:
        raise ValueError(f"{title} is an adapter: name the model that it is merged into, {files.base.place.name}.")
    first.download()  # of a bank from the Hub nothing is here yet
    config, trust = first.config, first.trust_remote_code
    heads = class_axes(config, trust_remote_code=trust)
    if files.header is not None:  # of a pickle on the Hub it is known when it is loaded
        check_header(title, config, files.header, given=heads, trust_remote_code=trust, way_out=WAY_OUT)
    _refuse_broken(start, config)
    return start


def load_body(start: Ingredient, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a start that take part in an average, by their names in the ingredients' model.

    Args:
        config: of that model.
        dtype: of the tensors.

    Raises:
        ValueError: if it has changed, or does not fit.
    """
    import torch

    # a commit on the Hub stays what it is: what is here of it is not asked for again
    folder = start.folder if start.repo_id and start.is_here else start.download()
    heads = class_axes(config, trust_remote_code=start.trust_remote_code)
    with torch.random.fork_rng(devices=[]):  # its head is drawn at random: the user's random numbers stay the same
        model = load_model(
            folder,
            dtype=dtype,
            config=config,
            allow_pickle=start.allow_pickle,
            trust_remote_code=start.trust_remote_code,
            given=heads,
            way_out=WAY_OUT,
        )
    return {name: tensor for name, tensor in model.state_dict().items() if name not in heads}


def named_start(ingredients: Ingredients) -> str | None:
    """The model that the cards of all ingredients name as their base, or else all their configurations.

    None if they don't agree on one, or it is an ingredient itself.
    """
    for name_of in (lambda ingredient: describe_ingredient(ingredient).base_model, _configured_name):
        names = {name_of(ingredient) for ingredient in ingredients}
        if len(names) == 1 and (name := names.pop()):
            return None if name in ingredients.ids else name
    return None


def _as_ingredient(files: CheckpointFiles, first: Ingredient, token: str | bool | None) -> Ingredient:
    """A start as what soups are made of; its classes are those of the first ingredient, since its head has no part."""
    return replace(
        first,
        id=files.place.name,
        revision=files.revision,
        folder=files.folder,
        repo_id=files.place.repo_id,
        subfolder=files.place.subfolder,
        stamp=files.stamp,
        order=None,
        base=None,
        image_processor=None,
        processor_folder=None,
        token=token if files.place.repo_id else None,
        size=files.size,
        content="",
    )


def _refuse_broken(start: Ingredient, config: PretrainedConfig) -> None:
    """Download a start and refuse it if one of its weights is no number.

    Raises:
        ValueError: if there is such a weight.
    """
    import torch

    for name, tensor in load_body(start, config, torch.float32).items():
        if torch.isnan(tensor).any():
            raise ValueError(f"start={start.id!r}: {name} has NaN. {WAY_OUT}")


def _configured_name(ingredient: Ingredient) -> Any:
    """What a configuration says that its model was loaded from, as transformers 4 wrote it."""
    try:
        name = read_fields(ingredient.folder / CONFIG).get("_name_or_path")
    except (FileNotFoundError, BrokenFileError):
        return None
    return name if isinstance(name, str) else None
