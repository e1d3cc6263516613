"""The soup: a recipe, what was measured, and the model that it makes."""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin import card, checkpoint, hub
from hf_radin.averaging import average_model
from hf_radin.ingredients import Ingredients, locate
from hf_radin.processes import on_main_process
from hf_radin.recipe import Measurement, Recipe, Result

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
    """

    def __init__(
        self,
        recipe: Recipe,
        ingredients: Ingredients,
        measurements: list[Measurement],
        results: list[Result],
        about: dict[str, Any],
        folder: Path | None = None,
    ):
        self.recipe = recipe
        self.ingredients = ingredients
        self.measurements = measurements
        self.results = results
        self.about = about
        self._folder = folder

    def __repr__(self) -> str:
        parts = ", ".join(f"{weight:.3g} {name}" for name, weight in self.recipe.used.items())
        return f"Soup({self.about['method']}: {parts})"

    @cached_property
    def model(self) -> PreTrainedModel:
        """The averaged model, in evaluation mode on the CPU."""
        if self._folder is not None:
            import torch

            return checkpoint.load_model(self._folder, dtype=getattr(torch, self.about["saved_dtype"]))
        return average_model(self.ingredients, self.recipe)

    @cached_property
    def processor(self) -> BaseImageProcessor:
        """The ingredients' image processor."""
        if self._folder is not None:
            return checkpoint.load_processor(self._folder)
        return self.ingredients.select(self.recipe.used)[0].processor

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
            ValueError: if the folder is not empty.
        """
        on_main_process(lambda: self._write(Path(save_directory), overwrite, license))

    def _write(self, folder: Path, overwrite: bool, license: str | None) -> None:
        check_output(folder, overwrite=overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            self.write_into(Path(temporary), license=license)
            folder.mkdir(exist_ok=True)
            stale = {path.name for path in folder.glob("model*.safetensors*")}
            for path in Path(temporary).iterdir():
                path.replace(folder / path.name)
                stale.discard(path.name)
            for name in stale:  # shards of a checkpoint that was here before
                (folder / name).unlink()

    def write_into(self, folder: Path, *, license: str | None = None) -> None:
        """The files of `save_pretrained`, one after the other, into an empty folder."""
        fields = self.to_dict()
        with checkpoint.quiet_transformers():
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
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

            folder = Path(snapshot_download(str(pretrained), revision=revision, token=token))
        fields = read_recipe_file(folder / RECIPE)
        known = ("format", "recipe", "results", "measurements")
        return cls(
            recipe=Recipe.from_json(json.dumps(fields["recipe"])),
            ingredients=Ingredients(),
            measurements=[Measurement.from_dict(one) for one in fields["measurements"]],
            results=[Result(**one) for one in fields["results"]],
            about={name: value for name, value in fields.items() if name not in known},
            folder=folder,
        )


def read_recipe_file(path: Path) -> dict[str, Any]:
    """What is in a `recipe.json`.

    Raises:
        ValueError: if it is not there, or not one.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no soup: there is no {path.name}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a recipe: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{path} is not a recipe of format {FORMAT}, the one that this version reads.")
    return fields


def cook(
    path: Path, *, models: list[str] | None = None, token: str | bool | None = None
) -> tuple[Ingredients, Recipe]:
    """The ingredients and the recipe of a `recipe.json`, each ingredient at the very revision that it names.

    Args:
        models: where the checkpoints are now; by default where the recipe says.

    Raises:
        ValueError: if an ingredient is not there, or is not what it was.
    """
    fields = read_recipe_file(path)
    recipe = Recipe.from_json(json.dumps(fields["recipe"]))
    wanted = {one["id"]: one for one in fields["ingredients"] if one["id"] in recipe.used}
    places = models or [
        f"{one['repo_id']}@{one['revision']}" if one["repo_id"] else one["id"] for one in wanted.values()
    ]
    there = {one.revision: one for one in locate(places, token=token)}
    for name, one in wanted.items():
        if one["revision"] not in there:
            raise ValueError(
                f"{name} is not the checkpoint that the recipe was made with: none of {', '.join(places)} has the "
                f"revision {one['revision']}."
            )
    found = Ingredients([there[one["revision"]] for one in wanted.values()])
    return found, Recipe(found.ids, tuple(recipe.used[name] for name in wanted))


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that holds something already.

    Raises:
        ValueError: if it does and may not be overwritten, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {folder} is a file.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"The output folder {folder} is not empty. Choose another, or pass overwrite (--overwrite).")


def versions() -> dict[str, str]:
    """Versions of all that decides about the bits of a soup."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "safetensors", "numpy")
    import hf_radin

    return {
        "hf_radin": hf_radin.__version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }
