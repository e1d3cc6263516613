"""The soup: a recipe, what was measured, and the model that it makes."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.adapters.adapter import check_soup, rank_limit, write_adapter
from hf_radin.checkpoints.files import as_dtype
from hf_radin.checkpoints.model import load_model, load_processor
from hf_radin.checkpoints.processor import check_processor
from hf_radin.ingredients.ingredient import Ingredients, refuse_given
from hf_radin.metrics.named import Answers
from hf_radin.recipes.recipe import Measurement, Recipe, Result
from hf_radin.runtime.files import ADAPTER_FOLDER, put_back, write_atomically, write_folder
from hf_radin.runtime.hub_commit import PushOptions
from hf_radin.runtime.hub_errors import asking_the_hub
from hf_radin.runtime.processes import Processes
from hf_radin.soup.card import card_files
from hf_radin.soup.push import CardOptions, push_folder
from hf_radin.soup.report import RECIPE, SearchReport
from hf_radin.weights.average import average_model, save_checkpoint, saved_dtype, write_average
from hf_radin.weights.average_files import refuse_ingredients
from hf_radin.weights.batchnorm import Statistics
from hf_radin.weights.head import LastLayers

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

# What to do with a soup whose ingredients are no checkpoints.
_RECIPE_ALONE = "Average the weights yourself, by soup.recipe; soup.save_recipe writes it, with all that was measured."


class Soup:
    """What a search returns and `from_pretrained` reads.

    Args:
        report: what was found, and how.
        ingredients: all that were to choose from; empty for a soup that was read from a folder.
        processes: of the run; the main one writes and pushes.
        folder: where the soup's own checkpoint lies, if it was read from one.
        statistics: images that its BatchNorm statistics are estimated from, if it has any.
        head: that was refitted, where it takes the place of the averaged one.
        unseen: what layers like these which did not see the image say of the images that chose; None where all layers
            are averaged, or where it is not known any more.
    """

    def __init__(
        self,
        report: SearchReport,
        ingredients: Ingredients,
        *,
        processes: Processes | None = None,
        folder: Path | None = None,
        statistics: Statistics | None = None,
        head: LastLayers | None = None,
        unseen: Answers | None = None,
    ):
        self.report = report
        self.ingredients = ingredients
        self.processes = processes or Processes()
        self._folder = folder
        self._statistics = statistics
        self.head = head
        self.unseen = unseen

    def __repr__(self) -> str:
        parts = ", ".join(f"{weight:.3g} {name}" for name, weight in self.recipe.used.items())
        pull = f", with {self.recipe.pull}" if self.recipe.pull else ""
        return f"Soup({self.report.method}: {parts}{pull})"

    @property
    def recipe(self) -> Recipe:
        """The ingredients used and their weights."""
        return self.report.recipe

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """One for each measured candidate, singles included."""
        return self.report.measurements

    @property
    def results(self) -> tuple[Result, ...]:
        """What soup, best single, uniform soup and ensemble reach on each split."""
        return self.report.results

    @cached_property
    def model(self) -> PreTrainedModel:
        """The averaged model, in evaluation mode on the CPU."""
        if self._folder is not None:
            return load_model(self._folder, dtype=as_dtype(self.report.saved_dtype or "float32"))
        refuse_given(self.ingredients, "soup.model")
        return average_model(self.ingredients, self.recipe, statistics=self._statistics, head=self.head)

    @cached_property
    def processor(self) -> BaseImageProcessor:
        """The ingredients' image processor."""
        if self._folder is not None:
            return load_processor(self._folder)
        refuse_given(self.ingredients, "soup.processor")
        processor = self.ingredients.select(self.recipe.used).processor
        check_processor(processor, self.report.processor)
        return processor

    @property
    def away(self) -> list[str]:
        """Ingredients in use that are folders of somebody else's machine: no model can be made of them here."""
        if not self.ingredients:
            return []
        used, start = self.ingredients.select(self.recipe.used), self.ingredients.start_of(self.recipe)
        return [checkpoint.id for checkpoint in (*used, start) if checkpoint and checkpoint.is_away]

    def accuracy(self, name: str, split: str) -> float:
        """Accuracy of one row of the results, in [0, 1].

        Raises:
            ValueError: if the results have none of this name and split.
        """
        accuracies = {
            (result.name, result.split): result.metrics["accuracy"]
            for result in self.results
            if "accuracy" in result.metrics
        }
        if (name, split) not in accuracies:
            raise ValueError(f"There is no accuracy of {name!r} on {split!r}; there is {sorted(accuracies)}.")
        return accuracies[name, split]

    def to_dict(self) -> dict[str, Any]:
        """All that `recipe.json` holds but for the hashes of files: enough to cook the soup again bit for bit."""
        return self._saved_report().to_fields()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        license: str | None = None,
        save_adapter: bool | int = False,
    ) -> None:
        """Write an ordinary checkpoint, with `recipe.json` and the model card as `README.md`.

        It appears under its name when it is whole. With several processes the main one writes and the others wait.

        Args:
            overwrite: allow a folder that holds something; files of other names in it stay.
            license: for the card; by default that of the ingredients, if they agree.
            save_adapter: of a soup of LoRA adapters, whether to write it as an adapter of the same base, too, into the
                folder `adapter` inside this one; a number is the rank to cut it to.

        Raises:
            ValueError: if the folder is not empty, or an ingredient's; if logits are all that is known of the
                ingredients (`save_recipe` writes the recipe); or if the soup can't be an adapter.
        """
        refuse_given(self.ingredients, "save_pretrained", _RECIPE_ALONE)
        self.check_adapter(save_adapter)
        folder, fill = Path(save_directory), partial(self.write_into, license=license, save_adapter=save_adapter)
        refuse_ingredients(folder, self.ingredients.checkpoints)
        self.processes.decide(lambda: write_folder(folder, fill, overwrite=overwrite))

    def check_adapter(self, save_adapter: bool | int) -> None:
        """Raises a ValueError if an adapter is to be saved that the soup can't be; see `check_soup`."""
        if save_adapter is False:
            return
        rank_limit(save_adapter)
        if self._folder is not None:
            raise ValueError(
                f"The soup in {self._folder} is read as it was saved. `hf-radin average --recipe {self._folder} "
                "--save-adapter --output ...` makes it again, as an adapter too."
            )
        check_soup(self.ingredients, self.recipe)

    def save_recipe(self, path: str | Path) -> None:
        """Write the `recipe.json` alone, which takes no checkpoint; `hf-radin average` cooks it where they are."""
        text = replace(self.report, files={}, adapter=None).text  # no model lies beside it
        self.processes.decide(lambda: write_atomically(Path(path), lambda new: new.write_text(text, encoding="utf-8")))

    def write_into(self, folder: Path, *, license: str | None = None, save_adapter: bool | int = False) -> None:
        """Write the files of `save_pretrained`, one after the other, into an empty folder."""
        if self.away:
            raise ValueError(
                f"No model can be made here: {self.away[0]} is a folder on another machine. Save the recipe alone "
                "(save_recipe), and cook it where its ingredients are, with `hf-radin average`."
            )
        report, processor = self._saved_report(), self.processor
        if self._folder or self._statistics or "model" in vars(self) or save_adapter:
            save_checkpoint(self.model, processor, folder)
        else:  # without a model in memory
            write_average(self.ingredients, self.recipe, folder, head=self.head)
        report = report.recorded(folder)
        if self._folder and report.adapter:
            shutil.copytree(self._folder / ADAPTER_FOLDER, folder / ADAPTER_FOLDER)
        if save_adapter:
            made = write_adapter(
                self.model, processor, self.ingredients, self.recipe, folder, limit=rank_limit(save_adapter)
            )
            report = replace(report, adapter=made)
        for name, content in {RECIPE: report.text.encode(), **card_files(report, license=license)}.items():
            (folder / name).write_bytes(content)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload the soup in one commit; options as in `push_soup_to_hub`."""
        return push_soup_to_hub(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Soup:
        """Read a saved or pushed soup: its recipe, measurements and model, whose files are read once to check them.

        Raises:
            ValueError: if there is no soup, or its model is not the one that was saved with it.
        """
        folder, way_out = Path(pretrained), ""
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            missing = f"There is no folder {str(pretrained)!r} here and no such model on the Hub"
            with asking_the_hub(str(pretrained), revision=revision, missing=missing):
                folder = Path(snapshot_download(str(pretrained), revision=revision, token=token))
            way_out = (
                f"Remove {folder.parents[1]} to have it downloaded again. If it was changed on the Hub, transformers "
                f"loads what is there, and `hf-radin average --recipe {folder / RECIPE} --output ...` cooks the soup."
            )
        else:
            put_back(folder)
        report = SearchReport.read(folder / RECIPE, is_saved=True)
        needed = ("saved_dtype", "versions", *(("data", "passes") if report.results else ()))
        missing_fields = [name for name in needed if not getattr(report, name)]
        if missing_fields:
            raise ValueError(f"{folder / RECIPE} is not a complete recipe: it does not say {missing_fields[0]!r}.")
        report.check_files(folder, way_out=way_out)
        return cls(report, Ingredients(), folder=folder)

    def _saved_report(self) -> SearchReport:
        """The report of a saved soup, which says the dtype of its weights."""
        if self._folder is not None or any(ingredient.is_given for ingredient in self.ingredients):
            return self.report  # of the latter no weights are known
        return replace(self.report, saved_dtype=saved_dtype(self.ingredients, self.recipe), adapter=None)


def push_soup_to_hub(
    soup: Soup,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    hide_private: bool = False,
    eval_task: str | None = None,
    verify: bool = True,
    save_adapter: bool | int = False,
) -> CommitInfo:
    """Create the repository if need be and upload the whole soup, card included, in one commit.

    What arrived is read back and compared. With several processes the main one pushes and the others wait.

    Args:
        private: visibility of a new repository, by default what the organisation or user chose; True is refused for
            one that everybody can read.
        revision: branch to commit to.
        create_pr: open a pull request instead of committing.
        license: for the card; by default that of the ingredients, if they agree.
        overwrite: allow a repository that holds something else; what made a model of it is removed.
        hide_private: leave the names of private ingredients and datasets out of the recipe and the card; a warning
            lists them where they would be published.
        eval_task: of a benchmark, as in `org/bench:default`, that the accuracy on the held-out split is a result of:
            written to `.eval_results`.
        verify: load the pushed model once from what the Hub has, and compare its predictions of three images.
        save_adapter: push it as a LoRA adapter, too, in the folder `adapter`; see `Soup.save_pretrained`.

    Raises:
        ValueError: if the id is none, the token may not write there, the repository holds something else, or the
            pushed model is loaded or predicts otherwise.
    """
    options = PushOptions(private, token, revision, create_pr, commit_message, overwrite, verify=verify)
    return push_soup(soup, repo_id, options, CardOptions(license, hide_private, eval_task), save_adapter)


def push_soup(
    soup: Soup, repo_id: str, options: PushOptions, shown: CardOptions, save_adapter: bool | int = False
) -> CommitInfo:
    """See `push_soup_to_hub`."""
    refuse_given(soup.ingredients, "push_to_hub", _RECIPE_ALONE)
    soup.check_adapter(save_adapter)

    def push() -> CommitInfo:
        with tempfile.TemporaryDirectory() as temporary:
            soup.write_into(Path(temporary), license=shown.license, save_adapter=save_adapter)
            return push_folder(Path(temporary), repo_id, options, shown)

    return soup.processes.decide(push)
