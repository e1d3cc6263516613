"""What a search found, and how: the contents of `recipe.json`, enough to cook the soup again bit for bit."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import hf_radin
from hf_radin.adapters.adapter import AdapterRecord
from hf_radin.checkpoints.files import ADAPTER, ADAPTER_CONFIG, CONFIG, PROCESSOR_FILES, WEIGHTS, WEIGHTS_INDEX
from hf_radin.ingredients.card_metadata import IngredientEntry
from hf_radin.layers.record import DISTILLED, HeadRecord, check_head
from hf_radin.logits.manifest import DataRecord
from hf_radin.recipes.recipe import Measurement, Recipe, Result
from hf_radin.runtime.files import ADAPTER_FOLDER, is_file_name, read_json, sha256_of_each
from hf_radin.runtime.schema import IF_ANY, from_json, to_json
from hf_radin.runtime.text import printable
from hf_radin.weights.batchnorm import StatisticsRecord

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"

# The files of a model beside its weights, which somebody may want to edit.
SETTINGS_FILES = (CONFIG, "generation_config.json", *PROCESSOR_FILES)

# Files that make another model of a folder, if they were put there.
_DECISIVE = (*SETTINGS_FILES, WEIGHTS, WEIGHTS_INDEX, ADAPTER, ADAPTER_CONFIG)

# What to do about an adapter that is not what was saved.
_AGAIN = "Put back what was saved, or save the soup again."

# Digits of a hash that an error shows.
_SHORT = 12

# Version 1 called it `format`, and a few fields otherwise. Version 3 is for what readers of version 2 would leave out,
# and so cook another soup: a refitted head, a pull to a start, classes of a checkpoint that the soup does not have.
FORMAT_VERSIONS = (1, 2, 3)

# What the file of every saved soup says, though a recipe that somebody wrote to be cooked may do without.
ALWAYS = ("method", "results", "measurements", "versions")


@dataclass(frozen=True)
class PilotReport:
    """What a pilot was, and what it saved.

    Args:
        share, seed: of the random sample whose logits were computed first.
        given: how many ingredients there were; None if the pilot was never completed.
        leading: how many of them said which images tell recipes apart.
        drawn: how many images the sample has.
        whole: ids of the ingredients that were run on all images.
        shown: on how many images the others were run.
        margin: by which the leading ingredients agree at least about the other images; None where there are none.
        passes: over the split, for all these logits.
        seconds: that devices took for them, added up; None if they were not timed.
        devices: which these were.
    """

    share: float
    seed: int = 0
    given: int | None = None
    leading: int | None = None
    drawn: int | None = None
    whole: tuple[str, ...] = ()
    shown: int | None = None
    margin: float | None = None
    passes: float | None = None
    seconds: float | None = None
    devices: tuple[str, ...] = ()

    @property
    def is_completed(self) -> bool:
        """Whether all images have logits where they matter."""
        return self.given is not None


@dataclass(frozen=True)
class PassCounts:
    """Images that went through one model, over those of the split.

    Args:
        logits: for the logits of the ingredients.
        soups: to measure soups.
        probabilities: to run soups once more for metrics of probabilities.
        batchnorm: images for BatchNorm statistics of soups.
        head: to refit the head of the soup once more, to all images.
        tail: to distil last layers: those that show the soup the split once more, and teaching, as many as it takes
            multiplications.
    """

    logits: float
    soups: float
    probabilities: float = 0.0
    batchnorm: float = 0.0
    head: float = 0.0
    tail: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.logits + self.soups + self.probabilities + self.batchnorm + self.head + self.tail


@dataclass(frozen=True)
class TimeSpent:
    """Seconds that devices took, added up, for what `PassCounts` counts; None if they were not timed."""

    logits: float | None = None
    soups: float | None = None
    probabilities: float | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """How much better than the best single model the soup is on a split, and whether that may be chance.

    Args:
        gain: the soup's metric less that of the other.
        interval: of the gain, 95% by the bootstrap.
        p_value: of the exact McNemar test for accuracies, else of the paired permutation test.
        metric: its name.
        is_loss: whether less of it is better.
    """

    split: str
    gain: float
    interval: tuple[float, float]
    p_value: float
    metric: str = "accuracy"
    is_loss: bool = False

    @property
    def advantage(self) -> float:
        """The gain, such that more is better."""
        return -self.gain if self.is_loss else self.gain

    @property
    def is_significant(self) -> bool:
        """Whether both the interval and the test say that the difference is more than chance."""
        low, high = self.interval
        return not low <= 0 <= high and self.p_value < 0.05

    @property
    def kind(self) -> str:
        """`better` or `worse` if the difference is more than chance, else `alike`."""
        if not self.is_significant:
            return "alike"
        return "better" if self.advantage > 0 else "worse"


@dataclass(frozen=True)
class SoupVerdict:
    """What a search's soup is worth against the best single model.

    Args:
        split: whose images say so.
        kind: `better` or `worse` beyond chance, `alike` if the images don't tell them apart, or `single` if the best
            single model itself is returned.
        is_proof: whether this split is held out: it took no part in the choice.
    """

    split: str
    kind: str
    is_proof: bool

    @property
    def is_proven_worse(self) -> bool:
        """Whether the soup is worse beyond chance on the split that proves."""
        return self.is_proof and self.kind == "worse"


@dataclass(frozen=True)
class ClassHits:
    """Images of each class on a split, and how many of them two models get right: `(classes,)` each.

    Multi-label, each class is decided on all images.
    """

    split: str
    images: tuple[int, ...]
    soup: tuple[int, ...]
    best_single: tuple[int, ...]


@dataclass(frozen=True)
class Overlap:
    """How many images of the split that proves a soup are elsewhere too, byte for byte; None if that is not known.

    Args:
        of: how many it has.
        images: in the split that chose the soup.
        batchnorm: among those that BatchNorm statistics are estimated from; None also without BatchNorm.
    """

    of: int
    images: int | None
    batchnorm: int | None = None


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a soup was searched for.

    Args:
        budget, measure, proposals, candidates, seed, hold_out, start, accept: as in `radin` and `greedy`.
        heads: whether heads were to be averaged or refitted: `head` of `radin`.
        ended: what ended the search: `candidates`, `budget` or `interrupt`.
        scored: how many recipes were scored by their ensembles.
        pilot: the part of the split whose logits were computed first.
        curve: passes for soups, and the accuracy of the best so far.
    """

    budget: str | None = None
    measure: str | None = None
    proposals: str | None = None
    candidates: int | None = None
    seed: int | None = None
    hold_out: float | None = None
    ended: str | None = None
    start: str | None = None
    heads: str | None = None
    accept: str | None = None
    scored: int | None = None
    pilot: PilotReport | None = None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class SearchReport(SearchSettings):
    """The contents of `recipe.json`: what a soup is made of, how it was found, and what was measured.

    Args:
        recipe: the ingredients used and their weights, and how far their soup is pulled to a start, if it is.
        pulled_to: that start.
        metric: what soups were chosen by; of some less is better.
        keep: the floors that they had to keep.
        method: `radin`, `greedy`, `uniform`, `best_single`, or `average` if nothing was searched.
        passes, time: what it cost.
        against_best_single: the soup against the best single model, on each split.
        by_class: the same class by class, on the last of these splits.
        measured: whether the soup was measured on the split that chose it.
        bank: the repository and commit that the logits came from; None if they were computed here.
        dtype, mixed_precision, logits_dtype: see `RunRecord`.
        processor: the image processor, as `describe_processor` describes it.
        image_processor: the processor that the user named in place of the checkpoints' own, and its revision.
        data: the split that chose; None if nothing was measured.
        images, skipped: how many images it has, and how many were left out.
        held_out: name of the split that proves; None without one.
        held_out_logits: how many ingredients were run on it.
        overlap: images that it shares with other splits.
        remarks: ids and what was said of checkpoints.
        batchnorm: where BatchNorm statistics are from.
        averaged_statistics: True where those of the ingredients were averaged like all else; else it is not said.
        head: how the head was refitted; None where it is averaged like all else.
        classes: class names in the order of the logits.
        multi_label: True where an image may have any number of them; else it is not said.
        architecture: class name of the model.
        ingredients: all checkpoints that were to choose from.
        versions: of all packages that decide about bits.
        saved_dtype: of the weights; None where they were not averaged.
        measured_dtype: of the weights that were measured, where these are others.
        results: what soup, best single, uniform soup and ensemble reach on each split.
        measurements: of each measured candidate, singles included.
        adapter: the same soup as a LoRA adapter, in a folder beside it; None where none was saved.
        files: the SHA-256 of each file of the saved model, by name; empty where none was saved, and in what earlier
            versions wrote.
    """

    recipe: Recipe
    pulled_to: IngredientEntry | None = field(default=None, metadata=IF_ANY)
    metric: str = "accuracy"
    less_is_better: bool = False
    keep: tuple[str, ...] = ()
    method: str = "average"
    passes: PassCounts | None = None
    time: TimeSpent | None = None
    against_best_single: tuple[Comparison, ...] = ()
    by_class: ClassHits | None = None
    measured: bool = True
    bank: str | None = None
    dtype: str | None = None
    logits_dtype: str | None = None
    mixed_precision: str | None = None
    processor: dict[str, Any]
    image_processor: str | None = None
    data: DataRecord | None = None
    images: int = 0
    skipped: int = 0
    held_out: str | None = None
    held_out_logits: int | None = None
    overlap: Overlap | None = None
    remarks: tuple[tuple[str, str], ...] = ()
    batchnorm: StatisticsRecord | None = None
    averaged_statistics: bool | None = field(default=None, metadata=IF_ANY)
    head: HeadRecord | None = None
    classes: tuple[str, ...] | None = None
    multi_label: bool | None = field(default=None, metadata=IF_ANY)
    architecture: str | None = None
    ingredients: tuple[IngredientEntry, ...]
    versions: dict[str, str] = field(default_factory=dict)
    saved_dtype: str | None = None
    measured_dtype: str | None = None
    results: tuple[Result, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    adapter: AdapterRecord | None = field(default=None, metadata=IF_ANY)
    files: dict[str, str] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """The report as JSON."""
        contents = to_json(self)
        if contents["data"]:
            del contents["data"]["key"]  # a reader finds the images by their name
        contents["measurements"] = [measurement.to_dict() for measurement in self.measurements]
        is_new = self.head or self.recipe.pull or any(entry.left_out for entry in self.ingredients)
        return {"format_version": 3 if is_new else 2, **contents}

    @classmethod
    def from_fields(cls, contents: Mapping[str, Any], *, is_saved: bool = False) -> SearchReport:
        """The report that JSON holds, of this or an earlier version.

        Args:
            is_saved: whether it is that of a saved soup, which says more than cooking takes.

        Raises:
            ValueError: if it is none, or of a later version.
        """
        missing = [name for name in ALWAYS if contents.get(name) is None]
        if is_saved and missing:
            raise ValueError(f"it does not say {missing[0]!r}")
        contents = _upgraded(contents)
        measurements = contents.pop("measurements", None) or ()
        report = from_json(cls, contents)
        try:
            report = replace(report, measurements=tuple(map(Measurement.from_dict, measurements)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"its 'measurements' are broken ({error})") from error
        _check_entries(report.ingredients)
        _check_start(report)
        _check_names(report.files)
        _check_names(report.adapter.files if report.adapter else {})
        if report.data is None and report.results:
            raise ValueError("its 'data' is None")
        _check_statistics(report.batchnorm)
        check_head(report.head)
        return report

    @classmethod
    def read(cls, path: Path, *, is_saved: bool = False) -> SearchReport:
        """The report in a `recipe.json`. Arguments as in `from_fields`.

        Raises:
            ValueError: if it is not there, or not one.
        """
        try:
            contents = read_json(path, way_out="Put back what was saved: the soup can't be told from other models.")
        except FileNotFoundError as error:
            is_named = path.name == RECIPE
            problem = f"{path.parent} holds no soup: there is no {path.name}" if is_named else f"There is no {path}"
            raise ValueError(f"{problem}.") from error
        version = contents.get("format_version", contents.get("format")) if isinstance(contents, dict) else None
        if version not in FORMAT_VERSIONS:
            readable = ", ".join(map(str, FORMAT_VERSIONS))
            raise ValueError(f"{path} is not a recipe of a format that this version reads ({readable}).")
        try:
            return cls.from_fields(contents, is_saved=is_saved)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a complete recipe: {str(error).rstrip('.')}.") from error

    def recorded(self, folder: Path) -> SearchReport:
        """The report of the model whose files a folder holds, and nothing else yet."""
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        return replace(self, files=_hashes(paths))

    def check_files(self, folder: Path, *, way_out: str = "") -> None:
        """See that the model in a folder is the one that was saved with this report.

        All its files are read once.

        Args:
            way_out: in place of the usual sentence that says what to do.

        Raises:
            ValueError: if a file has other content or is gone, or if there is one that makes another model of it.
        """
        names = self._names(folder)
        if not self.files:
            if names:
                logger.warning(
                    "%s records no hashes of the model beside it, which is taken as it is.", folder / RECIPE
                )
            return
        hashes = _hashes(folder / name for name in names)
        for name in sorted({*hashes, *self.files}):
            if problem := _difference(hashes.get(name), self.files.get(name)):
                is_edited = name in SETTINGS_FILES and name in hashes
                raise ValueError(f"{folder / printable(name)} {problem}. {way_out or _way_out(folder, is_edited)}")
        if self.adapter:
            self._check_adapter(folder, way_out)

    def _check_adapter(self, folder: Path, way_out: str) -> None:
        """See that the adapter beside a soup is the one that was saved with it. Errors as of `check_files`."""
        recorded = self.adapter.files if self.adapter else {}
        paths = [folder / ADAPTER_FOLDER / name for name in recorded]
        hashes = _hashes(path for path in paths if path.is_file())
        for path in paths:
            if problem := _difference(hashes.get(path.name), recorded[path.name]):
                raise ValueError(f"{folder / ADAPTER_FOLDER / printable(path.name)} {problem}. {way_out or _AGAIN}")

    def accepted(self, folder: Path) -> SearchReport:
        """The report of a model whose configuration or image processor somebody edited.

        Raises:
            ValueError: as `check_files` does, for all other files.
        """
        hashes = _hashes(folder / name for name in self._names(folder))
        edited = {name: hashes[name] for name in SETTINGS_FILES if name in hashes}
        report = replace(self, files=dict(sorted({**self.files, **edited}.items()))) if self.files else self
        report.check_files(folder)
        return report

    def _names(self, folder: Path) -> set[str]:
        """The files that are there of those that are recorded, or that make another model of the folder."""
        return {name for name in (*self.files, *_DECISIVE) if (folder / name).is_file()}

    @property
    def text(self) -> str:
        """The contents of the file."""
        return json.dumps(self.to_fields(), indent=2) + "\n"

    @property
    def used(self) -> list[IngredientEntry]:
        """The ingredients of the recipe, in the order in which they are listed."""
        return [entry for entry in self.ingredients if entry.id in self.recipe.used]

    @property
    def parents(self) -> list[IngredientEntry]:
        """All whose weights are in the model: the ingredients of the recipe, and the start that it is pulled to."""
        return [*self.used, *([self.pulled_to] if self.pulled_to else [])]

    @property
    def needed(self) -> list[IngredientEntry]:
        """The ingredients that the model is made of: those of the recipe, and those that taught its head."""
        taught = self.head.teacher.used if self.head else {}
        return [entry for entry in self.ingredients if entry.id in self.recipe.used or entry.id in taught]

    @property
    def has_refitted_head(self) -> bool:
        """Whether its head was refitted."""
        return self.head is not None and self.head.kind != DISTILLED

    @property
    def is_distilled(self) -> bool:
        """Whether its last layers were distilled."""
        return self.head is not None and self.head.kind == DISTILLED

    @property
    def is_single(self) -> bool:
        """Whether the model is one of the checkpoints, and no average."""
        return not self.is_average and self.head is None

    @property
    def is_average(self) -> bool:
        """Whether it is made of several checkpoints, and is not one of them, whatever its head."""
        return len(self.recipe.ingredients) > 1 or self.recipe.pull is not None

    @property
    def is_uniform(self) -> bool:
        """Whether all ingredients are in the soup, in equal parts, and so their heads."""
        is_equal = len(self.recipe.ingredients) == len(self.ingredients) and len({*self.recipe.weights}) == 1
        return is_equal and self.head is None and self.recipe.pull is None

    def is_chosen(self, entry: Measurement) -> bool:
        """Whether a candidate is the soup."""
        head = self.head and (self.head.teacher.used, self.head.labels > 0, self.head.kind == DISTILLED)
        taught = entry.teacher and (entry.teacher.used, entry.teacher.labels, entry.proposal == DISTILLED)
        return entry.recipe.is_same(self.recipe) and taught == head

    @property
    def given(self) -> int:
        """How many checkpoints there were, those that a pilot left out included."""
        return len(self.ingredients) if self.pilot is None or self.pilot.given is None else self.pilot.given

    @property
    def unseen(self) -> int:
        """Images of the split that chose of which most ingredients have no logits, after a pilot."""
        return 0 if self.pilot is None or self.pilot.shown is None else self.images - self.pilot.shown

    @property
    def total_passes(self) -> float:
        """What the search took in passes over the split."""
        return self.passes.total if self.passes else 0.0

    @property
    def singles(self) -> list[Measurement]:
        """The measurements of single models."""
        return [measurement for measurement in self.measurements if measurement.proposal == "single"]

    @property
    def soups(self) -> list[Measurement]:
        """The measurements of soups."""
        return [measurement for measurement in self.measurements if measurement.proposal != "single"]

    @property
    def is_exact(self) -> bool:
        """Whether soups are their ensembles, as their ingredients differ in their heads alone: no pass was needed."""
        return any(entry.exact for entry in self.measurements)

    @property
    def is_measured(self) -> bool:
        """Whether it says how good its very recipe is, or seems; a recipe whose weights were changed does not."""
        if not (self.data and self.results and self.versions and self.method != "average"):
            return False
        return any(measurement.recipe.is_same(self.recipe) for measurement in self.measurements)

    @property
    def verdict(self) -> SoupVerdict | None:
        """What the soup is worth by the split that proves, or else by the one that chose.

        None if that was not measured, or nothing was sought that could be better.
        """
        if self.data is None or (self.is_single and self.method in ("best_single", "average")):
            return None
        split, is_proof = self.held_out or self.data.split, self.held_out is not None
        if self.is_single:
            return SoupVerdict(split, "single", is_proof)
        for comparison in self.against_best_single:
            if comparison.split == split:
                return SoupVerdict(split, comparison.kind, is_proof)
        return None

    @property
    def estimate_error(self) -> float | None:
        """By how much estimates missed what averaged weights were measured to reach, in the median of all soups that
        were measured: a difference of accuracies. None if none was.
        """
        soups = [entry for entry in self.soups if entry.measured is not None and entry.teacher is None]
        soups = [entry for entry in soups if not entry.exact]
        return median(abs(entry.known - entry.estimate) for entry in soups) if soups else None

    def with_head(self, made: HeadRecord) -> SearchReport:
        """The report of a soup whose last layers were taught again as it says, with what came of it this time.

        Of a head that is another in its last bits the figures stay. Training makes differences larger: nothing that
        was measured of other distilled layers is said of these.
        """
        if self.head is None:
            return self
        head = replace(self.head, penalty=made.penalty, labels=made.labels, sha256=made.sha256)
        is_other = self.is_distilled and made.sha256 != self.head.sha256
        return replace(self, head=head, measurements=() if is_other else self.measurements)

    def cooked(self, saved_dtype: str) -> SearchReport:
        """The report of weights that were averaged anew from this recipe, without an adapter.

        What was measured before is said to have been of other weights, if the dtype is another; of a recipe that was
        not measured, nothing is said.
        """
        if not self.is_measured:
            return SearchReport(
                recipe=self.recipe,
                pulled_to=self.pulled_to,
                measured=False,
                processor=self.processor,
                classes=self.classes,
                multi_label=self.multi_label,
                architecture=self.architecture,
                image_processor=self.image_processor,
                batchnorm=self.batchnorm,
                averaged_statistics=self.averaged_statistics,
                head=self.head,
                data=self.data,
                ingredients=tuple(self.needed),
                versions=versions(),
                saved_dtype=saved_dtype,
            )
        measured = self.measured_dtype or self.saved_dtype
        changed = None if measured == saved_dtype else measured
        return replace(self, saved_dtype=saved_dtype, measured_dtype=changed, adapter=None)


def versions() -> dict[str, str]:
    """Versions of all packages that decide about the bits of a soup."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "safetensors", "numpy")
    return {
        "hf_radin": hf_radin.__version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of files, by name.

    Raises:
        ValueError: if one can't be read.
    """
    paths = list(paths)
    hashes = {}
    for path, value in zip(paths, sha256_of_each(paths), strict=True):
        if value is None:
            raise ValueError(f"{path} can't be read: look at its permissions and at the disk.")
        hashes[path.name] = value
    return hashes


def _difference(present: str | None, recorded: str | None) -> str:
    """How the hash of a file differs from what is recorded of it, in words; nothing if it does not."""
    if present == recorded:
        return ""
    if present is None:
        return f"is gone, and {RECIPE} records it"
    if recorded is None:
        return f"makes another model of the folder, and {RECIPE} does not record it"
    return f"is not what was saved (SHA-256 {present[:_SHORT]}..., {RECIPE} says {recorded[:_SHORT]}...)"


def _way_out(folder: Path, is_edited: bool) -> str:
    """What to do about a file that is not what was saved; some may be edited."""
    again = f"cook the soup again with `hf-radin average --recipe {folder / RECIPE} --output ...`"
    if not is_edited:
        return f"Put back what was saved, or {again}."
    return f"If you edited it, say so with `hf-radin card {folder} --accept-changes`; else {again}."


def _upgraded(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a file of any version as this version writes them."""
    contents = {name: value for name, value in contents.items() if name not in ("format", "format_version")}
    by_class = contents.get("by_class")
    if isinstance(by_class, Mapping) and "best single" in by_class:
        contents["by_class"] = {**by_class, "best_single": by_class["best single"]}
    if not contents.get("passes"):
        contents["passes"] = None
    if isinstance(entries := contents.get("ingredients"), list):
        contents["ingredients"] = [_upgraded_entry(entry) for entry in entries]
    # of version 1, some were written as None where others now have none
    for name in ("curve", "against_best_single", "remarks", "results", "measurements", "versions"):
        if contents.get(name, ...) is None:
            del contents[name]
    return contents


def _upgraded_entry(entry: Any) -> Any:
    """What a file of any version says of an ingredient, as this version writes it."""
    if not isinstance(entry, Mapping):
        return entry
    entry = {name: value for name, value in entry.items() if (name, value) != ("hyperparameters", None)}
    base_model = entry.get("base_model")
    if (
        "base_model_repo_id" not in entry
        and isinstance(base_model, str)
        and "/" in base_model
        and entry.get("repo_id")
    ):
        entry["base_model_repo_id"] = base_model  # what a card on the Hub names with its namespace is there
    return entry


def _check_entries(entries: Sequence[IngredientEntry]) -> None:
    """Refuse a list of ingredients that names one twice, or a folder outside of its repository.

    Raises:
        ValueError: if it does.
    """
    ids = [entry.id for entry in entries]
    if len({*ids}) < len(ids):
        raise ValueError(f"it lists {max(ids, key=ids.count)!r} twice")
    for entry in entries:
        subfolder = Path(entry.subfolder or "")
        if ".." in subfolder.parts or subfolder.is_absolute():
            raise ValueError(f"its ingredient {entry.id!r} lies in {entry.subfolder!r}, outside of its repository")


def _check_start(report: SearchReport) -> None:
    """Refuse a recipe that is pulled to a start which it does not describe.

    Raises:
        ValueError: for such a recipe, or a start that lies outside of its repository.
    """
    named, described = report.recipe.pull and report.recipe.pull.start, report.pulled_to and report.pulled_to.id
    if named != described:
        raise ValueError(f"it is pulled to {named!r}, and its 'pulled_to' is {described!r}")
    if report.pulled_to:
        _check_entries([report.pulled_to])


def _check_names(files: Mapping[str, str]) -> None:
    """Refuse names of files that lead out of the folder.

    Raises:
        ValueError: for such a name.
    """
    for name in files:
        if not is_file_name(name):
            raise ValueError(f"its 'files' name {name!r}, which is outside of the folder")


def _check_statistics(record: StatisticsRecord | None) -> None:
    """Refuse BatchNorm statistics that no images can give.

    Raises:
        ValueError: for fewer than two images, a seed below zero, or another way to treat images that can't be read.
    """
    if record is None:
        return
    if record.images < 2 or record.seed < 0 or record.on_error not in ("raise", "skip"):
        values = f"images={record.images}, seed={record.seed}, on_error={record.on_error!r}"
        raise ValueError(f"its 'batchnorm' says {values}")
