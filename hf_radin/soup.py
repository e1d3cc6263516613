"""The soup: a recipe, what was measured, and the model that it makes."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin import adapter, card, checkpoint, hub, modeling, origin
from hf_radin.access import asking_the_hub
from hf_radin.averaging import average_model, refuse_ingredients, save_checkpoint
from hf_radin.batchnorm import Statistics, collect_statistics
from hf_radin.data import OBJECT, open_split
from hf_radin.files import write_folder
from hf_radin.ingredients import Ingredients
from hf_radin.prepared import find_home
from hf_radin.processes import on_main_process
from hf_radin.recipe import Measurement, Recipe, Result
from hf_radin.vetting import locate

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"
FORMAT = 1


class Soup:
    """What a search returns and `from_pretrained` reads.

    Args:
        recipe: the ingredients used and their weights.
        ingredients: those that were to choose from; empty for a soup that was read from a folder.
        measurements: one for each measured candidate, singles included.
        results: what soup, best single, uniform soup and ensemble reach on each split.
        about: how the soup was found: method, budget, data, versions; all of it JSON.
        folder: where the soup's own checkpoint lies, if it was read from one.
        statistics: images that its BatchNorm statistics are estimated from, if it has any.
    """

    def __init__(
        self,
        recipe: Recipe,
        ingredients: Ingredients,
        measurements: list[Measurement],
        results: list[Result],
        about: dict[str, Any],
        folder: Path | None = None,
        statistics: Statistics | None = None,
    ):
        self.recipe = recipe
        self.ingredients = ingredients
        self.measurements = measurements
        self.results = results
        self.about = about
        self._folder = folder
        self._statistics = statistics

    def __repr__(self) -> str:
        parts = ", ".join(f"{weight:.3g} {name}" for name, weight in self.recipe.used.items())
        return f"Soup({self.about['method']}: {parts})"

    @cached_property
    def model(self) -> PreTrainedModel:
        """The averaged model, in evaluation mode on the CPU."""
        if self._folder is not None:
            return modeling.load_model(self._folder, dtype=checkpoint.as_dtype(self.about["saved_dtype"]))
        return average_model(self.ingredients, self.recipe, statistics=self._statistics)

    @cached_property
    def processor(self) -> BaseImageProcessor:
        """The ingredients' image processor."""
        if self._folder is not None:
            return modeling.load_processor(self._folder)
        found = self.ingredients.select(self.recipe.used)[0].processor
        then, now = ({**one, "transformers": None} for one in (self.about["processor"], adapter.describe(found)))
        if json.dumps(now, sort_keys=True, default=str) != json.dumps(then, sort_keys=True, default=str):
            raise ValueError("The image processor has changed since the logits were computed. Gather again.")
        return found

    def accuracy(self, name: str, split: str) -> float:
        """Accuracy of one row of the results, in [0, 1]."""
        return next(one.metrics["accuracy"] for one in self.results if (one.name, one.split) == (name, split))

    def to_dict(self) -> dict[str, Any]:
        """All that `recipe.json` holds: enough to cook the soup again bit for bit."""
        return {
            "format": FORMAT,
            "recipe": json.loads(self.recipe.to_json()),
            **self.about,
            "saved_dtype": str(self.model.dtype).removeprefix("torch."),
            "results": [asdict(one) for one in self.results],
            "measurements": [one.to_dict() for one in self.measurements],
        }

    def save_pretrained(
        self, save_directory: str | Path, *, overwrite: bool = False, license: str | None = None
    ) -> None:
        """Write an ordinary checkpoint, with `recipe.json` and the model card as `README.md`.

        It appears under its name when it is whole. With several processes the main one writes and the others wait.

        Args:
            overwrite: allow a folder that holds something; files of other names in it stay.
            license: for the card; by default that of the ingredients, if they agree.

        Raises:
            ValueError: if the folder is not empty, or an ingredient's.
        """
        folder = Path(save_directory)
        refuse_ingredients(folder, self.ingredients)
        on_main_process(
            lambda: write_folder(folder, lambda new: self.write_into(new, license=license), overwrite=overwrite)
        )

    def write_into(self, folder: Path, *, license: str | None = None) -> None:
        """The files of `save_pretrained`, one after the other, into an empty folder."""
        fields = self.to_dict()
        save_checkpoint(self.model, self.processor, folder)
        (folder / RECIPE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card.render(fields, license=license), encoding="utf-8")

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload the soup in one commit; options as in `push_soup_to_hub`."""
        return hub.push_soup_to_hub(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Soup:
        """Read a saved or pushed soup: its recipe, measurements and model.

        Raises:
            ValueError: if there is no soup.
        """
        folder = Path(pretrained)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            missing = f"There is no folder {str(pretrained)!r} here and no such model on the Hub"
            with asking_the_hub(str(pretrained), revision=revision, missing=missing):
                folder = Path(snapshot_download(str(pretrained), revision=revision, token=token))
        fields = read_recipe_file(folder / RECIPE)
        known = ("format", "recipe", "results", "measurements")
        lost = [name for name in ("method", "data", "passes", "saved_dtype", "versions") if not fields.get(name)]
        if lost:
            raise ValueError(f"{folder / RECIPE} is not a whole recipe: it does not say {lost[0]!r}.")
        try:
            return cls(
                recipe=Recipe.from_json(json.dumps(fields["recipe"])),
                ingredients=Ingredients(),
                measurements=[Measurement.from_dict(one) for one in fields["measurements"]],
                results=[Result(**one) for one in fields["results"]],
                about={name: value for name, value in fields.items() if name not in known},
                folder=folder,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / RECIPE} is not a whole recipe ({error!r}).") from error


def read_recipe_file(path: Path) -> dict[str, Any]:
    """What is in a `recipe.json`.

    Raises:
        ValueError: if it is not there, or not one.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no soup: there is no {path.name}.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a recipe: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{path} is not a recipe of format {FORMAT}, the one that this version reads.")
    listed = fields.get("ingredients")
    if not isinstance(fields.get("recipe"), dict) or not isinstance(listed, list) or not all(map(_is_listed, listed)):
        raise ValueError(f"{path} is not a whole recipe: it must list weights, and ingredients with their revisions.")
    return fields


def _is_listed(ingredient: Any) -> bool:
    """Whether an entry of the list of ingredients says enough to find one again."""
    return (
        isinstance(ingredient, dict)
        and all(isinstance(ingredient.get(name), str) for name in ("id", "revision"))
        and isinstance(ingredient.get("repo_id"), (str, type(None)))
    )


def cook(path: Path, *, models: list[str] | None = None, **options: Any) -> tuple[Ingredients, Recipe]:
    """The ingredients and the recipe of a `recipe.json`, each ingredient at the very revision that it names.

    Args:
        path: the file, or the soup's folder.
        models: where the checkpoints are now; by default where the recipe says.
        options: as `gather` takes them.

    Raises:
        ValueError: if an ingredient is not there, or is not what it was.
    """
    path = path / RECIPE if path.is_dir() else path
    fields = read_recipe_file(path)
    recipe = Recipe.from_json(json.dumps(fields["recipe"]))
    listed = {one["id"]: one for one in fields["ingredients"]}
    # in the order of the recipe: that in which numbers are added decides about their last bits
    wanted = {name: listed[name] for name in recipe.used if name in listed}
    lost = [name for name in recipe.used if name not in wanted]
    if lost:
        raise ValueError(f"{path} gives {lost[0]!r} a weight, but does not say which checkpoint that is.")
    gone = [one["id"] for one in wanted.values() if not one["repo_id"] and not Path(one["id"]).is_dir()]
    if gone and not models:
        raise ValueError(
            f"There is no folder {gone[0]!r} here, where {path} has an ingredient; say where the checkpoints are now "
            "with models=... (--models)."
        )
    places = models or [_place(one) for one in wanted.values()]
    bases = [one["base"] for one in wanted.values() if one.get("base")]
    pinned = {base["id"]: base["revision"] for base in bases if base["repo_id"]}
    options = {"image_processor": fields.get("image_processor"), "base_revisions": pinned, **options}
    there = {_version(origin.describe(one)): one for one in locate(places, **options)}
    for name, one in wanted.items():
        if _version(one) not in there:
            raise ValueError(
                f"{name} is not the checkpoint that the recipe was made with: none of {', '.join(places)} has the "
                f"revision {one['revision']}{_on_base(one)}."
            )
    found = Ingredients([there[_version(one)] for one in wanted.values()])
    if fields.get("classes"):  # whichever ingredient came first then, the soup has its classes in this order
        found = Ingredients(
            [
                replace(one, labels=tuple(fields["classes"]), order=said.get("order") and tuple(said["order"]))
                for one, said in zip(found, wanted.values(), strict=True)
            ]
        )
    return found, Recipe(found.ids, tuple(recipe.used[name] for name in wanted))


def cook_statistics(
    path: Path, ingredients: Ingredients, *, dataset: str | Path | None = None, cache_dir: str | Path | None = None
) -> Statistics | None:
    """The images that the soup of a `recipe.json` has its BatchNorm statistics from; None if it has none.

    Args:
        dataset: where the images are now; by default where the recipe says.

    Raises:
        ValueError: if the images are not there.
    """
    path = path / RECIPE if path.is_dir() else path
    fields = read_recipe_file(path)
    about = fields.get("batchnorm")
    if not about:
        return None
    from accelerate import Accelerator

    data = fields["data"]
    if dataset is None and data["name"] == OBJECT:
        raise ValueError(
            f"{path}: BatchNorm statistics came from a Dataset object; say where its images are (--dataset)."
        )
    source = {name: data[name] for name in ("config_name", "image_column", "label_column")}
    revision = data["revision"] if dataset is None else None
    split = open_split(dataset or data["name"], split=about["split"], revision=revision, **source)
    if split.key != about["data"]:
        logger.warning(
            "It can't be told whether the images of %s are those that the soup had its BatchNorm statistics from.",
            split.name,
        )
    return collect_statistics(
        split,
        about["images"],
        find_home(cache_dir),
        processor=ingredients[0].processor,
        on_error=about["on_error"],
        accelerator=Accelerator(),
        seed=about["seed"],
    )


def _place(one: dict[str, Any]) -> str:
    """What finds an ingredient of a recipe again."""
    inside = f":{one['subfolder']}" if one.get("subfolder") else ""
    return f"{one['repo_id']}@{one['revision']}{inside}" if one["repo_id"] else str(one["id"])


def _version(one: dict[str, Any]) -> tuple[str | None, ...]:
    """What makes two ingredients the same: their files, and those of the base that an adapter is merged into."""
    return one.get("subfolder") or None, one["revision"], (one.get("base") or {}).get("revision")


def _on_base(one: dict[str, Any]) -> str:
    base = one.get("base")
    return f" on the base {base['id']} of the revision {base['revision']}" if base else ""


def versions() -> dict[str, str]:
    """Versions of all that decides about the bits of a soup."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "safetensors", "numpy")
    import hf_radin

    return {
        "hf_radin": hf_radin.__version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }
