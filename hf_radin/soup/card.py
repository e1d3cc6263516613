"""The model card: what the soup is made of and what was measured, nothing else."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.images.sample import ENOUGH
from hf_radin.ingredients.card_metadata import IngredientEntry
from hf_radin.logits.manifest import DataRecord
from hf_radin.recipes.recipe import Measurement, Result
from hf_radin.runtime.files import BrokenFileError, card_metadata, read_text
from hf_radin.runtime.hub_commit import hub_address
from hf_radin.runtime.text import between, code, escape, one_line, show_metric
from hf_radin.soup import pictures
from hf_radin.soup.card_sentences import (
    about_adapter,
    about_exactness,
    about_head,
    about_statistics,
    comparison_text,
    costs,
    how_to_measure,
    outcome,
    shared_images,
)
from hf_radin.soup.redact import without_paths
from hf_radin.soup.report import RECIPE, SearchReport

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

logger = logging.getLogger(__name__)

SETTINGS = ("budget", "measure", "ended", "hold_out", "proposals", "start", "candidates", "seed", "accept")
# What a user writes between these lines stays when the card is made anew.
MARKS = ("<!-- yours: what stands from here on is kept when the card is made anew -->", "<!-- end of yours -->")
# What the card says to load until a push writes the repository's name there.
PLACE = "path/or/id/of/this/model"
# Where a leaderboard looks for what the soup reached.
EVAL_RESULTS = ".eval_results/hf_radin.yaml"
# Rows of a table that may be long; recipe.json has all.
MOST = 10
HOW = {
    "radin": "chosen by [RADIN](https://arxiv.org/abs/2401.17790) among {} checkpoints",
    "greedy": "put together from {} checkpoints by [greedy selection](https://arxiv.org/abs/2203.05482)",
    "uniform": "made of {} checkpoints in equal parts",
    "best_single": "the best of {} checkpoints",
    "average": "put together from weights that were given",
}
TEMPLATE = Path(__file__).parent / "model_card_template.md"
# Marks an estimate from fewer images than all.
ABOUT = "\u2248"


@dataclass(frozen=True)
class Row:
    """A row of a table: what was measured, with a mark where it is an estimate from fewer images than all.

    Args:
        about: the mark, or nothing.
        chosen: whether it is the soup of the card.
    """

    entry: Measurement | Result
    about: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class CardData:
    """What the template of the card is filled with, beside the report itself.

    Args:
        report: without paths.
        drawn: names of the pictures that lie beside the card.
    """

    report: SearchReport
    drawn: Collection[str] = ()

    @property
    def data(self) -> DataRecord | None:
        """The split that chose; None if nothing was measured."""
        return self.report.data if self.report.results else None

    @property
    def dataset(self) -> str | None:
        """What the card calls the dataset."""
        return _dataset_name(self.data) if self.data else None

    @property
    def weights(self) -> dict[str, float]:
        """By id the weight of each ingredient."""
        return self.report.recipe.used

    @property
    def alone(self) -> dict[str, str]:
        """By id what each ingredient reaches by itself on the split that chose."""
        return {
            row.entry.recipe.ingredients[0]: row.about + show_metric(self.report.metric, row.entry.known)
            for row in self.singles
            if isinstance(row.entry, Measurement)
        }

    @property
    def singles(self) -> list[Row]:
        """The ingredients alone, the best first."""
        return self._rows(self.report.singles)

    @property
    def soups(self) -> list[Row]:
        """The soups that were measured, that of the card first, then the best first."""
        return sorted(self._rows(self.report.soups), key=lambda row: not row.chosen)

    @property
    def results(self) -> list[Row]:
        """What was measured on each split, the split that proves first.

        The best single model and a uniform soup would be there twice if they are the soup of the card.
        """
        report = self.report
        twice = "best single" if report.is_single else "uniform" if report.is_uniform else None
        results = [result for result in report.results if result.name != twice]
        results.sort(key=lambda result: result.split != report.held_out)
        if report.is_single:
            results = [replace(result, name="this model") if result.name == "soup" else result for result in results]
        return [Row(result, self._about_result(result)) for result in results]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics."""
        return sorted({name for result in self.report.results for name in result.metrics})

    @property
    def comparisons(self) -> list[str]:
        """The soup against the best single model, on the split that proves first."""
        order = sorted(self.report.against_best_single, key=lambda entry: entry.split != self.report.held_out)
        return [comparison_text(entry) for entry in order]

    @property
    def linked(self) -> list[str]:
        """The repositories of the ingredients, and of a start."""
        return [name for entry in self.report.parents if (name := _hub_id(entry.repo_id))]

    @property
    def hyperparameters(self) -> tuple[list[str], dict[str, str]]:
        """The names of those in which the ingredients differ, and what they share."""
        every = [entry.hyperparameters for entry in self.report.used]
        names = list(dict.fromkeys(name for values in every for name in values))
        shared = {
            name: every[0][name] for name in names if all(values.get(name) == every[0].get(name) for values in every)
        }
        return [name for name in names if name not in shared], shared

    @property
    def made(self) -> str:
        """How the soup was found."""
        return HOW[self.report.method].format(escape(self.report.given))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the search."""
        values = {name: getattr(self.report, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def reordered(self) -> int:
        """How many ingredients had their classes in another order."""
        return sum(list(entry.order or ()) != sorted(entry.order or ()) for entry in self.report.used)

    @property
    def reduced(self) -> int:
        """How many ingredients had further classes, which were left out."""
        return sum(entry.left_out > 0 for entry in self.report.used)

    @property
    def is_hidden(self) -> bool:
        """Whether names of ingredients were left out, so that nobody can cook the recipe."""
        return any(entry.revision == "hidden" for entry in (*self.report.ingredients, *self.report.parents))

    @property
    def has_predictions(self) -> bool:
        """Whether soups were predicted by those that were measured before."""
        return any(soup.predicted is not None for soup in self.report.soups)

    @property
    def has_heads(self) -> bool:
        """Whether heads were refitted."""
        return any(soup.teacher is not None for soup in self.report.soups)

    @property
    def is_partly_shown(self) -> bool:
        """Whether soups were shown fewer images than all."""
        soups = (soup for soup in self.report.soups if soup.measured is not None)
        return any(soup.images != self.report.images for soup in soups)

    @property
    def is_approximate(self) -> bool:
        """Whether there is an estimate from fewer images than all."""
        return any(row.about for row in (*self.results, *self.singles, *self.soups))

    def _rows(self, measurements: Sequence[Measurement]) -> list[Row]:
        """Rows of measurements, the best first."""
        rows = [Row(entry, self._about_measurement(entry), self.report.is_chosen(entry)) for entry in measurements]
        sign = 1 if self.report.less_is_better else -1
        return sorted(rows, key=lambda row: sign * row.entry.known if isinstance(row.entry, Measurement) else 0.0)

    def _about_measurement(self, measurement: Measurement) -> str:
        is_part = self._chose_by_part or 0 < measurement.images < self.report.images
        return ABOUT if is_part else ""

    def _about_result(self, result: Result) -> str:
        most = max(other.images for other in self.report.results if other.split == result.split)
        choosing = self.report.data is not None and result.split == self.report.data.split
        return ABOUT if (self._chose_by_part and choosing) or 0 < result.images < most else ""

    @property
    def _chose_by_part(self) -> bool:
        """Whether the logits that chose are of a pilot's images only."""
        return self.report.pilot is not None and not self.report.pilot.is_completed


def render(report: SearchReport, *, license: str | None = None, drawn: Collection[str] = ()) -> str:
    """The card as text.

    Args:
        license: what the user names; by default that of the ingredients used, if they all have the same one.
        drawn: names of the pictures that lie beside it.
    """
    from huggingface_hub import ModelCard

    report = without_paths(report)
    card = CardData(report, drawn)
    varying, shared = card.hyperparameters
    rendered = ModelCard.from_template(
        _metadata(report, license),
        template_path=str(TEMPLATE),
        report=report,
        card=card,
        varying=varying,
        shared=shared,
        ancestor=_agreed(report.used, "base_model"),
        ancestor_id=_ancestor(report.used),
        outcome=outcome(report),
        shared_images=shared_images(report),
        about_head=about_head(report),
        about_adapter=about_adapter(report),
        exactness=about_exactness(report),
        about_statistics=about_statistics(report),
        how_to_measure=how_to_measure([*report.recipe.used], place=PLACE, is_uniform=report.is_uniform),
        costs=costs(report) if card.data else [],
        md=escape,
        code=code,
        value=partial(show_metric, report.metric),
        show_metric=show_metric,
        between=partial(between, name=report.metric),
        count="{:,}".format,
        quoted=json.dumps,
        hub_id=_hub_id,
        hub_address=hub_address,
        marks=MARKS,
        place=PLACE,
        most=MOST,
        enough=ENOUGH,
    )
    text = re.sub(r"(?<=\|)  (?=\|)", " ", f"{str(rendered).rstrip()}\n")  # an empty cell has one space
    return re.sub(r"\n{3,}", "\n\n", text)


def card_files(report: SearchReport, *, license: str | None = None) -> dict[str, bytes]:
    """The card and its pictures, by name. Arguments as in `render`."""
    drawn = pictures.draw(report)
    return {"README.md": render(report, license=license, drawn=drawn).encode(), **drawn}


def report_files(report: SearchReport, place: Path, *, license: str | None = None) -> dict[str, bytes]:
    """`recipe.json`, the card and its pictures, by name. Arguments as in `render`.

    Args:
        place: the file or folder that the report came from or goes to.

    Raises:
        ValueError: if the report does not say enough for a card.
    """
    if report.results and report.passes is None:
        raise ValueError(f"{place} does not say enough for a card: it does not say 'passes'.")
    try:
        return {RECIPE: report.text.encode(), **card_files(report, license=license)}
    except Exception as error:  # a recipe that somebody edited may fail in any way
        raise ValueError(f"{place} does not say enough for a card ({error!r}).") from error


def renewed_card(folder: Path, report: SearchReport, *, license: str | None = None) -> dict[str, bytes]:
    """The card of a folder, and its pictures, made anew: its licence, and what stands in the marked lines, stay.

    Args:
        license: in place of that in the card.

    Raises:
        ValueError: if the card has one of the marked lines without the other, or the report says too little for a
            card.
    """
    path = folder / "README.md"
    try:
        old = read_text(path) if path.exists() else ""
    except (OSError, BrokenFileError) as error:
        raise ValueError(f"{path} can't be read, so that what you wrote would be lost: {error}") from error
    files = report_files(report, folder / RECIPE, license=license or _license_of(old))
    del files[RECIPE]
    return {**files, "README.md": with_notes(files["README.md"].decode(), old, path).encode()}


def eval_results(report: SearchReport, task: str) -> bytes:
    """What `.eval_results/*.yaml` holds for a leaderboard: the soup's accuracy on the held-out split.

    Args:
        task: the benchmark's dataset and its task, as in `org/bench:default`: nobody can guess these.

    Raises:
        ValueError: if it names no task, or the soup was not measured on a held-out split.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    dataset, name = check_task(task)
    proven = [
        result.metrics["accuracy"]
        for result in report.results
        if (result.name, result.split) == ("soup", report.held_out) and "accuracy" in result.metrics
    ]
    if not proven:
        raise ValueError(f"{task} needs an accuracy on a split that took no part in the choice: name a test_split.")
    if report.overlap and report.overlap.images:
        raise ValueError(
            f"{task} needs an accuracy on images that took no part in the choice, and {report.overlap.images} of "
            f"those of the split {report.held_out!r} did: leave them out."
        )
    entry = EvalResultEntry(dataset_id=dataset, task_id=name, value=proven[0], notes=f"split {report.held_out}")
    return str(yaml_dump(eval_result_entries_to_yaml([entry]))).encode()


def check_task(task: str) -> tuple[str, str]:
    """The dataset and the task of a benchmark. Raises a ValueError if it names none."""
    dataset, _, name = task.partition(":")
    if "/" not in (_hub_id(dataset) or "") or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"{task!r} names no task of a benchmark: it is its dataset and the task, as in 'org/bench:default'."
        )
    return dataset, name


def licensed(card: bytes, license: str, path: Path) -> bytes:
    """A card with this licence in its head; all else stays.

    Args:
        path: of the card, to be named in an error.

    Raises:
        ValueError: if the head can't be read.
    """
    from huggingface_hub import ModelCard

    try:
        parsed = ModelCard(card.decode())
    except Exception as error:  # somebody's own YAML
        raise ValueError(
            f"{path} has no head that can be read, so that no licence can be set: {one_line(error)}"
        ) from error
    parsed.data.license = license
    return str(parsed).encode()


def naming(card: bytes, repo_id: str) -> bytes:
    """A card that says to load the model from this repository; what the user wrote stays."""
    generated, mark, written = card.partition(MARKS[0].encode())
    place = rb'(?<=^classify = pipeline\("image-classification", model=")[^"\n]*'
    generated = re.sub(place, lambda _: repo_id.encode(), generated, count=1, flags=re.MULTILINE)
    place = rb'(?<=^soup = ")[^"\n]*'  # of which an adapter is loaded
    generated = re.sub(place, lambda _: repo_id.encode(), generated, count=1, flags=re.MULTILINE)
    return generated + mark + written


def with_notes(text: str, old: str, path: Path) -> str:
    """A card with what stands between the marked lines of an old card. Arguments and errors as of `renewed_card`."""
    first, last = MARKS
    if (first in old) != (last in old) or old.find(first) > old.find(last):
        raise ValueError(f"{path} has lost one of its marked lines, {first!r} and {last!r}: put it back.")
    if first not in old:
        if old:
            raise ValueError(
                f"{path} has no lines {first!r} and {last!r}: put them around what shall stay, or take the file away."
            )
        return text
    notes = old.partition(first)[2].partition(last)[0]
    before, _, after = text.partition(first)
    return f"{before}{first}{notes}{last}{after.partition(last)[2]}"


def license_beside(recipe: Path) -> str | None:
    """The licence of the card that lies beside a `recipe.json`; None if there is none, or it names none."""
    card = recipe.parent / "README.md"
    try:
        return _license_of(read_text(card))
    except (FileNotFoundError, BrokenFileError):
        return None


def _license_of(text: str) -> str | None:
    """The licence in a card's metadata; None if there is none, or it can't be read."""
    try:
        license = card_metadata(text).get("license")
    except ValueError:  # somebody's own YAML
        return None
    return license if isinstance(license, str) else None


def _metadata(report: SearchReport, license: str | None) -> ModelCardData:
    """The head of the card."""
    from huggingface_hub import ModelCardData

    data = report.data if report.results else None
    soup_results = [result for result in report.results if result.name == "soup"]
    parents = [name for entry in report.used if (name := _hub_id(entry.repo_id))]
    start = report.pulled_to and _hub_id(report.pulled_to.repo_id)
    ancestors = [name for name in (start, _ancestor(report.used)) if name]
    relation = "merge" if report.is_average and parents else "finetune" if ancestors and not parents else None
    if parents and not report.is_average and report.head:
        relation = "finetune"
    return ModelCardData(
        base_model=list(dict.fromkeys([*parents, *ancestors])) or None,
        base_model_relation=relation,
        datasets=[data.name] if data and data.revision else None,
        library_name="transformers",
        license=license or _agreed_license(report.parents),
        metrics=sorted({_metric_type(name) for result in soup_results for name in result.metrics}) or None,
        model_name=_model_name(report) if soup_results else None,
        pipeline_tag="image-classification",
        tags=(["model-soup", "merge"] if report.is_average else [])
        + (["distillation", "arxiv:1503.02531"] if report.is_distilled else [])
        + ["hf-radin", "arxiv:2401.17790"],
        eval_results=_eval_results(data, soup_results) if data else None,
    )


def _model_name(report: SearchReport) -> str:
    """What the head of the card calls the model whose results it lists."""
    if report.is_average:
        return "Model soup"
    taught = "distilled last layers" if report.is_distilled else "a refitted head"
    return f"Best single model with {taught}" if report.head else "Best single model"


def _metric_type(name: str) -> str:
    """What the Hub files a metric under: that of one class under all of its kind, a function under its letters."""
    return re.sub(r"\W+", "_", name.partition("[")[0]).strip("_") or "function"


def _eval_results(data: DataRecord, results: Sequence[Result]) -> list[EvalResult] | None:
    """What the head of the card says of the soup's own results; None if there are none."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-classification",
            # no id on the Hub begins so; readers take what has no such beginning for one
            dataset_type=data.name if data.revision else f"./{_dataset_name(data)}",
            dataset_name=_dataset_name(data),
            dataset_config=data.config_name,
            dataset_split=result.split,
            metric_type=_metric_type(name),
            metric_name=None if name == _metric_type(name) else name,
            metric_value=value,
        )
        for result in results
        for name, value in result.metrics.items()
    ] or None


def _dataset_name(data: DataRecord) -> str:
    """What the card calls a dataset."""
    return data.name if data.revision else Path(data.name).name


def _ancestor(entries: Sequence[IngredientEntry]) -> str | None:
    """The base model that all ingredients name, if it is known to be one on the Hub."""
    return _hub_id(_agreed(entries, "base_model_repo_id"))


def _agreed(entries: Sequence[IngredientEntry], name: str) -> str | None:
    """What all ingredients say alike."""
    values = {getattr(entry, name) for entry in entries}
    return values.pop() if len(values) == 1 else None


def _hub_id(name: Any) -> str | None:
    """What may be an id on the Hub, and so stand in links and metadata."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name, re.ASCII) else None


def _agreed_license(entries: Sequence[IngredientEntry]) -> str | None:
    """The licence of all ingredients; if they don't agree, a warning says so."""
    licenses = {entry.id: entry.license for entry in entries}
    if len(set(licenses.values())) == 1:
        return next(iter(licenses.values()))
    logger.warning(
        "The card names no licence, since the ingredients don't agree: %s. Pass license=... if you know it.",
        ", ".join(f"{name}: {value or 'none'}" for name, value in licenses.items()),
    )
    return None
