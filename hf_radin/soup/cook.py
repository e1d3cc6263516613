"""Cook a soup: average its ingredients into a checkpoint with a recipe and a card, now or again from `recipe.json`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.adapters.adapter import check_soup, rank_limit, write_adapter
from hf_radin.checkpoints.fields import shared_fields
from hf_radin.checkpoints.files import (
    CONFIG,
    DTYPES,
    FLOATS,
    PROCESSOR_FILES,
    SHARD,
    as_dtype,
    read_fields,
    shard_size,
)
from hf_radin.checkpoints.processor import check_processor, describe_processor
from hf_radin.images.cache import find_home
from hf_radin.images.split import OBJECT, DataSource, open_split
from hf_radin.ingredients.card_metadata import IngredientEntry, describe_ingredient, describe_start
from hf_radin.ingredients.gather import locate
from hf_radin.ingredients.ingredient import Ingredient, Ingredients, refuse_given
from hf_radin.ingredients.labels import Alignment
from hf_radin.layers.distilled import distill_tail
from hf_radin.layers.record import HeadRecord
from hf_radin.layers.taught import refit_head
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.compute import extend_bank
from hf_radin.logits.manifest import DataRecord, RunOptions
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.runtime.files import check_output, digest, write_folder
from hf_radin.runtime.processes import Processes
from hf_radin.soup.card import license_beside, report_files
from hf_radin.soup.card_sentences import about_statistics
from hf_radin.soup.report import RECIPE, SearchReport, versions
from hf_radin.tail.teach import Course
from hf_radin.weights import average_tensors
from hf_radin.weights.average import (
    average_model,
    averages_statistics,
    by_content,
    save_checkpoint,
    saved_dtype,
    write_average,
)
from hf_radin.weights.average_files import are_alike, header_of, refuse_ingredients, widest, write_weights
from hf_radin.weights.batchnorm import IMAGES, Statistics, prepare_statistics
from hf_radin.weights.head import LastLayers
from hf_radin.weights.start import find_start

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Fields of a configuration that a soup does not take over: what a model returns beside its logits
# (`OUTPUT_FIELDS` of `checkpoints.model`), and the older name of its dtype.
UNSAVED = ("output_attentions", "output_hidden_states", "return_dict", "torch_dtype")


def average(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = SHARD,
    statistics: Statistics | None = None,
    head: LastLayers | None = None,
    report: SearchReport | None = None,
    license: str | None = None,
    save_adapter: bool | int = False,
) -> dict[str, torch.Tensor] | None:
    """The weighted average of checkpoints, `sum_k p_k w_k`.

    Sums are taken in float64, of 16-bit weights in float32, and rounded once. Where files name their tensors alike,
    a written average takes one pass over them, and memory for a few chunks; elsewhere the loaded models are averaged,
    two of them in memory. Where the recipe has a pull, all but the head is `(1 - share) sum_k p_k w_k + share start`.

    Args:
        ingredients: must hold all that the recipe uses, and the start if it is pulled to one
            (`Ingredients(ingredients, start=find_start(name, ingredients))`); of a weight of zero nothing is read.
        output: a folder to write the soup to, as an ordinary checkpoint with `recipe.json` and a card, under the names
            that the first ingredient's files use; none by default. With several processes the main one writes.
        overwrite: allow an output folder that holds something.
        dtype: of the result; by default that of the ingredients, float32 if they differ.
        max_shard_size: of a file of weights, as in `5GB`; as in transformers.
        statistics: images to estimate BatchNorm statistics from (`LogitBank.statistics`); without them the statistics
            of the ingredients are averaged like all else.
        head: that takes the place of the averaged one; what is written says in `report.head` how it was made.
        report: of a search that found this recipe, to be written beside the weights; by default nothing was measured
            of it.
        license: for the card beside them; by default that of the ingredients, if they agree.
        save_adapter: of LoRA adapters, whether to write their average as an adapter of the same base, too, into the
            folder `adapter` inside the output; a number is the rank to cut it to.

    Returns:
        The tensors of the averaged model's `state_dict()`; None if they were written.

    Raises:
        ValueError: if the recipe names an ingredient that is not there, or one of them can't be loaded; if the output
            folder is not empty, or an ingredient's; if the disk is too small, or `max_shard_size` is no size; if
            there is a head and no report of it; if the average can't be an adapter that is to be saved.
    """
    refuse_given(ingredients, "average", "Average the weights yourself, by the recipe.")
    refuse_no_adapter(ingredients, recipe, save_adapter)
    max_shard_size = shard_size(max_shard_size)
    if dtype is not None:
        as_dtype(dtype)
    if output is None:
        return average_model(ingredients, recipe, dtype=dtype, statistics=statistics, head=head).state_dict()
    folder = Path(output)
    check_output(folder, overwrite=overwrite)
    refuse_ingredients(folder, ingredients.checkpoints)
    if head is not None and (report is None or report.head is None):
        raise ValueError("A soup with a refitted head is written with a report that says how it was made: report=...")
    options: dict[str, Any] = {"dtype": dtype, "statistics": statistics, "head": head}

    def fill(new: Path) -> None:
        saved = str(as_dtype(dtype)).removeprefix("torch.") if dtype else saved_dtype(ingredients, recipe)
        written = (report or _unmeasured(ingredients, recipe, statistics)).cooked(saved)
        if not written.is_measured and statistics is None and averages_statistics(ingredients, recipe):
            written = with_averaged_statistics(written)
        contents = report_files(written, folder / RECIPE, license=license)  # refused before anything is averaged
        if save_adapter:
            model, processor = average_model(ingredients, recipe, **options), ingredients.select(recipe.used).processor
            save_checkpoint(model, processor, new, max_shard_size=max_shard_size)
            made = write_adapter(model, processor, ingredients, recipe, new, limit=rank_limit(save_adapter))
            written = replace(written, adapter=made)
            contents = report_files(written, folder / RECIPE, license=license)
        else:
            write_average(ingredients, recipe, new, max_shard_size=max_shard_size, **options)
        write_report(new, written, contents)

    Processes().decide(lambda: write_folder(folder, fill, overwrite=overwrite))
    return None


def refuse_no_adapter(ingredients: Ingredients, recipe: Recipe, save_adapter: bool | int) -> None:
    """Raises a ValueError if an average is to be saved as an adapter and can't be one; see `check_soup`."""
    if save_adapter is not False:
        rank_limit(save_adapter)
        check_soup(ingredients, recipe)


def _unmeasured(ingredients: Ingredients, recipe: Recipe, statistics: Statistics | None) -> SearchReport:
    """The report of an average that nobody measured."""
    used = ingredients.select(recipe.used)
    return replace(
        unmeasured_report(used, recipe, describe_processor(used.processor)),
        pulled_to=describe_start(ingredients, recipe),
        batchnorm=statistics.record if statistics else None,
    )


def unmeasured_report(used: Ingredients, recipe: Recipe, processor: Mapping[str, Any]) -> SearchReport:
    """The report of an average that nobody measured, with no pull to a start.

    Args:
        used: the ingredients that the recipe uses, in its order.
        processor: their image processor, as `describe_processor` describes it.
    """
    return SearchReport(
        recipe=recipe.in_order(used.ids),
        measured=False,
        processor=dict(processor),
        classes=used.labels,
        multi_label=used.multi_label or None,
        architecture=used[0].architecture,
        image_processor=used[0].image_processor,
        ingredients=tuple(map(describe_ingredient, used)),
        versions=versions(),
    )


@dataclass(frozen=True)
class Writing:
    """How a soup is written that is cooked again. The names are those of `average`, which explains them."""

    overwrite: bool = False
    dtype: str | None = None
    max_shard_size: int | str = SHARD
    save_adapter: bool | int = False


# As the ingredients are stored, into an empty folder.
AS_STORED = Writing()


def with_averaged_statistics(report: SearchReport) -> SearchReport:
    """The report of a soup whose BatchNorm statistics are averaged; a warning says what that means."""
    report = replace(report, averaged_statistics=True)
    logger.warning("%s", about_statistics(report))
    return report


def cook_recipe(
    path: Path,
    output: Path,
    writing: Writing = AS_STORED,
    *,
    models: Sequence[str] = (),
    dataset: str | Path | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> None:
    """Cook the soup of a `recipe.json` into a folder, bit for bit: from files where these are all that it takes.

    Args:
        path: the file, or the soup's folder.
        writing: how it is written.
        models: where the checkpoints are now; by default where the recipe says.
        dataset: where the images are now that BatchNorm statistics or a refitted head come from; by default where
            the recipe says.
        options: as `find_ingredients` takes them.

    Raises:
        ValueError: if an ingredient is not there or not what it was, or the output is one of them, or the recipe's
            own folder; if the soup can't be an adapter that is to be saved.
    """
    check_output(output, overwrite=writing.overwrite)
    if output.resolve() in (path.resolve(), path.resolve().parent):
        raise ValueError(f"The output {output} is the folder of the recipe, which would be lost. Choose another.")
    size = shard_size(writing.max_shard_size)
    path = recipe_path(path)
    by_files: dict[str, Any] = {"overwrite": writing.overwrite, "dtype": writing.dtype, "max_shard_size": size}
    takes_models = models or any(options.values()) or writing.save_adapter is not False
    if not takes_models and cook_files(path, output, **by_files):
        return
    ingredients, recipe = find_ingredients(
        path, models=models, **{key: value for key, value in options.items() if value}
    )
    refuse_no_adapter(ingredients, recipe, writing.save_adapter)  # before images are looked at
    images: dict[str, Any] = {"dataset": dataset, "cache_dir": cache_dir}
    statistics, head = find_statistics(path, ingredients, **images), None
    report, license = SearchReport.read(path), license_beside(path)
    if cooked := find_last_layers(path, ingredients, recipe, statistics, **images):
        head, record = cooked
        report = report.with_head(record)
    made: dict[str, Any] = {"statistics": statistics, "head": head, "report": report, "license": license}
    average(ingredients, recipe, output=output, **asdict(writing), **made)


def recipe_path(path: Path) -> Path:
    """The `recipe.json` in a soup's folder, or the file itself."""
    return path / RECIPE if path.is_dir() else path


def find_ingredients(
    path: Path, *, models: Sequence[str] = (), start: str | None = None, everything: bool = False, **options: Any
) -> tuple[Ingredients, Recipe]:
    """The ingredients and the recipe of a `recipe.json`, each ingredient at the very revision that it names.

    Those that only taught its last layers are among them, with a weight of zero.

    Args:
        path: the file, or the soup's folder.
        everything: whether those that the soup was chosen from are, too.
        models: where the checkpoints are now; by default where the recipe says.
        start: where the start is now that the soup is pulled to; by default where the recipe says.
        options: as `gather` takes them.

    Raises:
        ValueError: if an ingredient or the start is not there, or is not what it was.
    """
    path = recipe_path(path)
    report = SearchReport.read(path)
    recipe = report.recipe
    entries = [*report.ingredients] if everything else _entries(report, path)
    refuse_given((_ingredient(entry, report) for entry in entries), f"Cooking {path}", "Average the weights yourself.")
    absent = [entry.id for entry in entries if not entry.repo_id and not Path(entry.id).is_dir()]
    if absent and not models:
        raise ValueError(
            f"There is no folder {absent[0]!r} here, where {path} has an ingredient; say where the checkpoints are "
            "now with models=... (--models)."
        )
    places = list(models) or [_place(entry) for entry in entries]
    pinned = {entry.base.id: entry.base.revision for entry in entries if entry.base and entry.base.repo_id}
    options = {"image_processor": report.image_processor, "base_revisions": pinned, **options}
    if not models:
        options["checkpoint"] = "root"  # a run in a recipe is the model at its top, whatever is the best now
    if report.classes:  # whatever lies beside its ingredients now, the soup has these
        options["recorded"] = {
            entry.version: Alignment(report.classes, entry.order, entry.left_out) for entry in entries
        }
    located = {ingredient.version: ingredient for ingredient in locate(places, **options)}
    for entry in entries:
        if entry.version not in located:
            base = f" on the base {entry.base.id} of the revision {entry.base.revision}" if entry.base else ""
            raise ValueError(
                f"{entry.id} is not the checkpoint that the recipe was made with: none of {', '.join(places)} has the "
                f"revision {entry.revision}{base}."
            )
    ingredients = Ingredients([located[entry.version] for entry in entries])
    ingredients = _added_up_as_then(ingredients, entries)
    check_processor(ingredients.processor, report.processor)
    weights, pull = tuple(recipe.used.get(entry.id, 0.0) for entry in entries), recipe.pull
    if pull and report.pulled_to:
        ingredients = _with_start(ingredients, report.pulled_to, start, path)
    elif start:
        raise ValueError(f"start={start!r}: the soup of {path} is pulled to no start.")
    return ingredients, Recipe(ingredients.ids, weights, pull)


def _with_start(ingredients: Ingredients, entry: IngredientEntry, place: str | None, path: Path) -> Ingredients:
    """Ingredients with the start of a recipe, by the name that it has there.

    Args:
        place: where it is now; by default where the recipe says.
        path: of the recipe, for errors.

    Raises:
        ValueError: if it is not there, or not what it was.
    """
    if place is None and not entry.repo_id and not Path(entry.id).is_dir():
        raise ValueError(
            f"There is no folder {entry.id!r} here, to which the soup of {path} is pulled; say where it is now with "
            "start=... (--start)."
        )
    start = find_start(place or _place(entry), ingredients)
    if start.revision != entry.revision:
        raise ValueError(
            f"{start.id} is not the start that the recipe was made with: it has the revision {start.revision}, and "
            f"{path} says {entry.revision}."
        )
    return Ingredients(ingredients, start=replace(start, id=entry.id))


def find_statistics(
    path: Path, ingredients: Ingredients, *, dataset: str | Path | None = None, cache_dir: str | Path | None = None
) -> Statistics | None:
    """The images that the soup of a `recipe.json` has its BatchNorm statistics from; None if it has none.

    Args:
        dataset: where the images are now; by default where the recipe says.

    Raises:
        ValueError: if the images are not there.
    """
    path = recipe_path(path)
    report = SearchReport.read(path)
    record = report.batchnorm
    if record is None:
        return None
    source = _source(path, report.data, record.split, dataset, "BatchNorm statistics")
    split = open_split(replace(source, labelled=False))
    if split.key != record.data:
        logger.warning(
            "It can't be told whether the images of %s are those that the soup had its BatchNorm statistics from.",
            split.name,
        )
    return prepare_statistics(
        split,
        record.images,
        find_home(cache_dir),
        processor=ingredients.processor,
        on_error=record.on_error,
        processes=Processes(),
        seed=record.seed,
    )


def find_last_layers(
    path: Path,
    ingredients: Ingredients,
    recipe: Recipe,
    statistics: Statistics | None = None,
    *,
    dataset: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[LastLayers, HeadRecord] | None:
    """The last layers of the soup of a `recipe.json`, taught again as they were; None if they are averaged.

    The checkpoints that taught it run on the images once more, as far as their logits are not cached.

    Args:
        ingredients, recipe: as `find_ingredients` gives them.
        statistics: of BatchNorm, as `find_statistics` gives them.
        dataset: where the images are now; by default where the recipe says.

    Raises:
        ValueError: if the images are not there or not the same, or this run has another mixed precision.
    """
    path = recipe_path(path)
    report, processes = SearchReport.read(path), Processes()
    record, sampled = report.head, report.batchnorm
    if record is None:
        return None
    run, what = record.run, "the logits that its last layers were taught"
    data, place = record.source or report.data, None if record.source and sampled else dataset
    source = _source(path, data, record.split, place, what)
    if not processes.has_precision(run.mixed_precision):
        raise ValueError(
            f"{path}: its last layers were taught with mixed precision {run.mixed_precision!r}, and this run has "
            f"{processes.precision!r}. Cook it as it was: accelerate launch --mixed_precision {run.mixed_precision} "
            "-m hf_radin."
        )
    options = RunOptions(
        batch_size=record.batch_size,
        channels_last=run.channels_last,
        torch_compile=run.torch_compile,
        mixed_precision=run.mixed_precision,
        dtype=run.dtype,
        logits_dtype=run.logits_dtype,
        on_error=run.on_error,
        strangers="keep",
        batchnorm_split=(record.split if record.source else sampled.split) if sampled else None,
        batchnorm_images=sampled.images if sampled else IMAGES,
        cache_dir=cache_dir,
    )
    bank, hold_out = extend_bank(ingredients, source, options, processes).by_content, None
    if record.source:  # whose images are not those that the soup has its statistics from
        bank = replace(bank, statistics=statistics)
    if record.hold_out is not None:
        hold_out = record.hold_out, record.hold_out_seed
        bank, _ = bank.divided(*hold_out)
    if (len(bank), digest(bank.ids.tolist())) != (record.images, record.places):
        raise ValueError(
            f"{path}: {record.images} images of the split {record.split!r} taught its last layers, and those of "
            f"{bank.manifest.data.name} are others ({len(bank)}); say where they are now (--dataset)."
        )
    weights = tuple(record.teacher.used.get(entry.id, 0.0) for entry in _entries(report, path))
    teacher = Teacher(Recipe(ingredients.ids, weights), labels=record.labels > 0)
    layers, taught = _taught_again(bank, recipe, teacher, record, hold_out)
    if taught.sha256 != record.sha256:
        logger.warning(
            "The last layers of %s were taught again and are not the same to the last bit%s: what the recipe says of "
            "them or of weights, the images, the versions of the libraries, the machine or its threads are others. "
            "Its figures are those of the layers before%s.",
            path,
            "" if record.tail else f" (penalty {taught.penalty:.3g}, then {record.penalty:.3g})",
            ", and are left out" if record.tail else "",
        )
    return layers, taught


def find_bank(
    path: Path,
    *,
    models: Sequence[str] = (),
    dataset: str | Path | None = None,
    cache_dir: str | Path | None = None,
    other_split: str | None = None,
    **options: Any,
) -> LogitBank:
    """The logits that the soup of a `recipe.json` was chosen by; those that are not cached are computed again.

    Its ingredients have the ids that the recipe gives them, wherever they are.

    Args:
        path: the file, or the soup's folder.
        models: where all checkpoints that the soup was chosen from are now; by default where the recipe says.
        dataset: where the images are now; by default where the recipe says.
        other_split: of the same dataset, which is needed later and has to be there, too.
        options: as `find_ingredients` takes them.

    Raises:
        ValueError: if an ingredient or the images are not there, nothing was measured of the soup, or this run has
            another mixed precision.
    """
    path = recipe_path(path)
    report, processes = SearchReport.read(path), Processes()
    if report.data is None or not report.is_measured:
        raise ValueError(f"{path}: nothing was measured of this soup, so that no images are known that chose it.")
    if report.pilot is not None:
        raise ValueError(f"{path}: after a pilot the logits of some images are known only; search without one.")
    if not processes.has_precision(precision := report.mixed_precision or "no"):
        raise ValueError(
            f"{path}: its ingredients ran with mixed precision {precision!r}, and this run has "
            f"{processes.precision!r}: accelerate launch --mixed_precision {precision} -m hf_radin."
        )
    ingredients, _ = find_ingredients(path, models=models, everything=True, **options)
    pairs = zip(ingredients, report.ingredients, strict=True)
    named = [replace(ingredient, id=entry.id) for ingredient, entry in pairs]
    statistics = report.batchnorm
    run = RunOptions(
        mixed_precision=precision,
        dtype=report.dtype or "auto",
        logits_dtype=report.logits_dtype or "float32",
        on_error="skip" if report.skipped else "raise",
        strangers="keep",
        batchnorm_split=statistics.split if statistics else None,
        batchnorm_images=statistics.images if statistics else IMAGES,
        cache_dir=cache_dir,
    )
    source = _source(path, report.data, report.data.split, dataset, "the logits that it was chosen by")
    if other_split is not None:
        open_split(source.at(other_split))  # refused before anything is computed
    return extend_bank(Ingredients(named, start=ingredients.start), source, run, processes)


def _taught_again(
    bank: LogitBank, recipe: Recipe, teacher: Teacher, record: HeadRecord, hold_out: tuple[float, int] | None
) -> tuple[LastLayers, HeadRecord]:
    """The last layers that a bank teaches as a record says, and what came of it."""
    if record.tail is None:
        head = refit_head(bank, recipe, teacher, hold_out=hold_out, seed=record.seed)
        return head.head, head.record
    tail = record.tail
    course = Course(tail.epochs, tail.rate, tail.batch_size, record.labels, record.seed)
    cooked = distill_tail(bank, recipe, teacher, course, tail=tail.module, hold_out=hold_out)
    return cooked.head, cooked.record


def _source(path: Path, data: DataRecord | None, split: str, dataset: str | Path | None, what: str) -> DataSource:
    """Where the images of a recipe are.

    Args:
        data: where it says that they are.
        split: of them.
        dataset: where they are now; by default where the recipe says.
        what: came from them, in words.

    Raises:
        ValueError: if the recipe does not say where, and nobody does.
    """
    if dataset is None and (data is None or data.name == OBJECT):
        raise ValueError(
            f"{path}: {what} came from a dataset that it does not name; say where its images are (--dataset)."
        )
    return DataSource(
        dataset=dataset or (data.name if data else None),
        split=split,
        config_name=data.config_name if data else None,
        revision=data.revision if data and dataset is None else None,
        image_column=data.image_column if data else None,
        label_column=data.label_column if data else None,
        labelled=data is None or data.is_labelled,
    )


def cook_files(
    path: Path,
    output: Path,
    *,
    overwrite: bool = False,
    dtype: str | None = None,
    max_shard_size: int | str = SHARD,
) -> bool:
    """Cook the soup of a `recipe.json` from files alone, where these are all that it takes.

    Its ingredients were vetted and run when the recipe was made, and are at the very revisions that it names; what is
    written has their tensors, each of them, with the recipe and a card.

    Returns:
        whether it was cooked: adapters, classes in other orders, BatchNorm statistics, refitted heads, a start and
        tensors under different names take models, for which see `find_ingredients` and `average`.

    Raises:
        ValueError: if an ingredient is not there or not what it was, or the output is one of them.
    """
    path = recipe_path(path)
    report = SearchReport.read(path)
    plain = _plain_ingredients(report)
    if plain is None:
        return False
    used, recipe = by_content(plain, report.recipe)
    with ThreadPoolExecutor(average_tensors.THREADS) as pool:
        folders = list(pool.map(Ingredient.download, used))
    refuse_ingredients(output, (_ingredient(entry, report) for entry in report.ingredients if not entry.repo_id))
    with ExitStack() as stack:
        files = [stack.enter_context(average_tensors.open_files(folder)) for folder in folders]
        config = soup_config(folders, report.classes or (), report.architecture)
        if config is None or not any(tensor.dtype in FLOATS for tensor in files[0].values()):
            return False
        if not are_alike(used, files):
            return False
        kind = DTYPES[dtype] if dtype else widest(files)
        header = header_of(files, kind)
        saved = next(name for name, spelling in DTYPES.items() if spelling == kind)
        written = report.cooked(saved)
        contents = report_files(written, path, license=license_beside(path))

        def fill(new: Path) -> None:
            write_weights(new, files, recipe, header, max_shard_size)
            write_settings(new, config, saved, folders[0])
            write_report(new, written, contents)

        write_folder(output, fill, overwrite=overwrite)
    return True


def write_settings(folder: Path, config: Mapping[str, Any], dtype: str, ingredient: Path) -> None:
    """Write the configuration and the image processor of averaged files.

    Args:
        config: as `soup_config` gives it.
        dtype: of the weights, as torch names it.
        ingredient: the folder with the image processor.
    """
    text = json.dumps({**config, "dtype": dtype}, indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    for name in PROCESSOR_FILES:
        if (ingredient / name).is_file():
            shutil.copyfile(ingredient / name, folder / name)


def write_report(folder: Path, report: SearchReport, contents: Mapping[str, bytes]) -> None:
    """Write recipe and card beside a model that has been written, and record its files in the recipe."""
    recorded = {**contents, RECIPE: report.recorded(folder).text.encode()}
    for name, content in recorded.items():
        (folder / name).write_bytes(content)


def _plain_ingredients(report: SearchReport) -> Ingredients | None:
    """The ingredients of a recipe that may be cooked from files; None if it takes models, or was made by hand."""
    entries = {entry.id: entry for entry in report.used}
    if not {*report.recipe.used} <= {*entries} or any(entry.base or entry.order for entry in entries.values()):
        return None
    if report.batchnorm or report.head or report.image_processor or report.recipe.pull:
        return None
    if not (report.measurements and report.classes and report.versions):  # made by hand
        return None
    listed = [entries[name] for name in report.recipe.used]
    used = _added_up_as_then(Ingredients([_ingredient(entry, report) for entry in listed]), listed)
    return None if any(ingredient.is_away for ingredient in used) else used


def soup_config(folders: Sequence[Path], classes: Sequence[str], architecture: str | None) -> Mapping[str, Any] | None:
    """The configuration that checkpoints share; None if their classes are not those of the recipe, in its order.

    Args:
        classes: of the recipe.
        architecture: class name of the model, if no configuration says it.
    """
    configs = [read_fields(folder / CONFIG) for folder in folders]
    config = {name: value for name, value in shared_fields(configs).items() if name not in UNSAVED}
    names = config.get("id2label")
    if not isinstance(names, dict) or [names.get(str(at)) for at in range(len(names))] != [*classes]:
        return None
    numbers = {name: int(number) for number, name in names.items()}
    if config.get("label2id") != numbers:  # some scripts write texts into it
        config["label2id"] = numbers
    config.setdefault("architectures", [architecture] if architecture else None)
    return config


def _ingredient(entry: IngredientEntry, report: SearchReport) -> Ingredient:
    """The ingredient that a recipe lists."""
    return Ingredient(
        id=entry.id,
        revision=entry.revision,
        folder=Path(entry.id),
        labels=report.classes or (),
        architecture="",
        repo_id=entry.repo_id,
        stamp=entry.stamp,
        subfolder=entry.subfolder or "",
    )


def _entries(report: SearchReport, path: Path) -> list[IngredientEntry]:
    """The ingredients of a recipe, in its order, and then those that only taught its head.

    Raises:
        ValueError: if the recipe uses an ingredient that it does not list.
    """
    entries = {entry.id: entry for entry in report.ingredients}
    names = dict.fromkeys([*report.recipe.used, *(report.head.teacher.used if report.head else ())])
    unlisted = [name for name in names if name not in entries]
    if unlisted:
        raise ValueError(f"{path} gives {unlisted[0]!r} a weight, but does not say which checkpoint that is.")
    return [entries[name] for name in names]


def _added_up_as_then(ingredients: Ingredients, entries: Sequence[IngredientEntry]) -> Ingredients:
    """Ingredients with the contents that a recipe names, in whose order it was cooked; an earlier one in its own."""
    pairs = zip(ingredients, entries, strict=True)
    return Ingredients(
        [
            replace(ingredient, content=entry.content or f"{place:020}")
            for place, (ingredient, entry) in enumerate(pairs)
        ]
    )


def _place(entry: IngredientEntry) -> str:
    """What finds an ingredient of a recipe again."""
    subfolder = f":{entry.subfolder}" if entry.subfolder else ""
    return f"{entry.repo_id}@{entry.revision}{subfolder}" if entry.repo_id else entry.id
