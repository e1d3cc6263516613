"""A soup without data: checkpoints are averaged by weights that somebody gives, and nothing is measured."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from hf_radin.averaging.agreement import Agreement, Checkpoint, Classifier, open_agreeing
from hf_radin.checkpoints.files import (
    DTYPES,
    checkpoint_files,
    content_hash,
    files_stamp,
    shard_size,
    weights_hash,
)
from hf_radin.ingredients.gather import gather
from hf_radin.ingredients.ingredient import Ingredient, Ingredients
from hf_radin.ingredients.resolve import Place, all_checkpoints, find_places, warn_of_trainings
from hf_radin.recipes.recipe import SIMPLEX_TOLERANCE, Recipe
from hf_radin.runtime.files import check_output, digest, sha256_of, write_folder
from hf_radin.runtime.processes import launched_processes
from hf_radin.soup.card import report_files
from hf_radin.soup.cook import (
    AS_STORED,
    Writing,
    average,
    unmeasured_report,
    with_averaged_statistics,
    write_report,
    write_settings,
)
from hf_radin.soup.report import RECIPE
from hf_radin.weights.average_files import differ_in_statistics, header_of, refuse_ingredients, widest, write_weights
from hf_radin.weights.average_tensors import FileHashes

logger = logging.getLogger(__name__)

# The name of a checkpoint of a Trainer's run.
_STEP = re.compile(r"checkpoint-(\d+)")


def average_unmeasured(
    models: Sequence[str],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    last: int | None = None,
    revision: str | None = None,
    checkpoint: str | None = None,
    writing: Writing = AS_STORED,
    **options: Any,
) -> Recipe:
    """Average checkpoints into a folder: weights, configuration, image processor, recipe, and a card without figures.

    Where folders on this disk agree in all but their numbers, their files are averaged, and hashed at the same time;
    no model is made, and torch is not imported. All others are gathered first. The weights that are written are the
    same either way, but for the order in which they are added up, and so for their last bits.

    Args:
        models: as `gather` takes them.
        weights: one for each model, in the order of the names that they stand for; by default all have the same.
        last: take the last so many checkpoints of a run, by their steps.
        revision: for the Hub ids that name none.
        checkpoint: what is taken of each run (see `find_places`).
        writing: how it is written.
        options: as `gather` takes them.

    Returns:
        The recipe.

    Raises:
        ValueError: if the weights are none, or don't fit the models; if these can't be averaged, as `gather` says; if
            the output can't be writing.
    """
    shard_size(writing.max_shard_size)
    shares = None if weights is None else normalised(weights)
    check_output(output, overwrite=writing.overwrite)
    places = (
        find_places([*models], revision=revision, checkpoint=checkpoint)
        if last is None
        else last_checkpoints(models, last, revision=revision)
    )
    recipe = _recipe([place.name for place in places], shares)
    takes_models = any(options.values()) or writing.save_adapter is not False
    if not takes_models and launched_processes() == 1:
        with open_agreeing(places) as agreement:
            if agreement is not None:
                _write_agreeing(agreement, recipe, output, writing)
                return recipe
    ingredients = gather(places, revision=revision, **options)
    recipe = _recipe(ingredients.ids, shares)
    average(ingredients, recipe, output=output, **asdict(writing))
    return recipe


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that add up to 1: these, divided by their sum. A line says so, if it was another one.

    Raises:
        ValueError: if a weight is below 0, or no number, or all are 0.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"--weights {weight}: a weight is a number of at least 0; give each model one.")
    largest = max(weights, default=0.0)
    if not largest:
        raise ValueError(f"--weights {_listed(weights)}: no weight is above 0; at least one model must have one.")
    scaled = [weight / largest for weight in weights]  # whose sum is a number, whatever they are
    total = math.fsum(scaled)
    shares = tuple(weight / total for weight in scaled)
    if not abs(largest * total - 1) <= SIMPLEX_TOLERANCE:
        logger.warning(
            "The weights add up to %.6g, not to 1, and are divided by that: %s.", largest * total, _listed(shares)
        )
        return shares
    return tuple(weights)


def last_checkpoints(models: Sequence[str], count: int, *, revision: str | None = None) -> list[Place]:
    """The last checkpoints of one run, in the order of their steps.

    Args:
        models: the run's folder, or what names its checkpoints.
        count: of checkpoints.
        revision: for Hub ids that name none.

    Raises:
        ValueError: if there are fewer, or what is named are not the checkpoints of one run.
    """
    if count < 2:
        raise ValueError(f"--last {count}: an average takes at least two checkpoints.")
    places = reversed(all_checkpoints(models, revision=revision))
    once = {(_run_of(place), _step_of(place)): place for place in places}  # by whatever paths they are named
    steps = {place: step for (_, step), place in once.items()}
    runs = sorted({_run_of(place) for place in steps})
    if unnumbered := [place.name for place, step in steps.items() if step < 0]:
        raise ValueError(
            f"--last {count}: {unnumbered[0]} is no checkpoint of a run, whose name ends with its step "
            "(checkpoint-500). Name the run, or its checkpoints; on the Hub these, as in org/run:checkpoint-*."
        )
    if len(runs) > 1:
        raise ValueError(
            f"--last {count}: these are checkpoints of {len(runs)} runs, {runs[0]} and {runs[1]}, whose steps can't "
            "be compared. Name one run."
        )
    if len(steps) < count:
        raise ValueError(f"--last {count}: {runs[0]} has {len(steps)} checkpoints.")
    chosen = sorted(steps, key=lambda place: steps[place])[-count:]
    warn_of_trainings([place.folder for place in chosen if place.folder and not place.of_run])  # of which it was done
    return chosen


def _path_of(place: Place) -> PurePosixPath:
    return PurePosixPath(place.folder.resolve().as_posix() if place.folder else f"{place.repo_id}/{place.subfolder}")


def _step_of(place: Place) -> int:
    """The step of a run's checkpoint; -1 of what is none."""
    step = _STEP.fullmatch(_path_of(place).name)
    return int(step[1]) if step else -1


def _run_of(place: Place) -> str:
    revision = f"@{place.revision}" if place.revision else ""
    return f"{_path_of(place).parent}{revision}"


def _recipe(names: Sequence[str], shares: Sequence[float] | None) -> Recipe:
    """The recipe of these models, with these weights or in equal parts.

    Raises:
        ValueError: if there are more or fewer weights than models.
    """
    if shares is None:
        return Recipe.uniform(list(names))
    if len(shares) != len(names):
        listed = f"{', '.join(names[:5])}{', ...' if names[5:] else ''}"
        raise ValueError(
            f"--weights: {len(shares)} are given, and the names stand for {len(names)} different models: {listed}. "
            "Give one weight for each, in this order."
        )
    return Recipe(tuple(names), tuple(shares))


def _write_agreeing(agreement: Agreement, recipe: Recipe, output: Path, writing: Writing) -> None:
    """Write the average of checkpoints that agree, whose files are hashed meanwhile."""
    refuse_ingredients(output, (_ingredient(entry, agreement.classifier, {}) for entry in agreement.checkpoints))
    added = agreement.in_order_of_content(recipe)
    files, folders = [checkpoint.tensors for checkpoint in added], [checkpoint.folder for checkpoint in added]
    kind = DTYPES[writing.dtype] if writing.dtype else widest(files)
    header = header_of(files, kind)
    saved = next(name for name, spelling in DTYPES.items() if spelling == kind)

    def fill(new: Path) -> None:
        hashes = FileHashes(files, header)
        ordered = recipe.in_order([checkpoint.name for checkpoint in added])
        write_weights(new, files, ordered, header, writing.max_shard_size, hashes)
        known = hashes.result()
        sums = {folder: _all_hashes(folder, known) for folder in folders}
        used = [entry for entry in agreement.checkpoints if entry.name in recipe.used]
        ingredients = Ingredients(_ingredient(entry, agreement.classifier, sums[entry.folder]) for entry in used)
        processor = {**agreement.processor, "transformers": version("transformers")}
        report = unmeasured_report(ingredients, recipe, processor).cooked(saved)
        if differ_in_statistics(files):
            report = with_averaged_statistics(report)
        write_settings(new, agreement.config, saved, folders[0])
        write_report(new, report, report_files(report, output / RECIPE))

    write_folder(output, fill, overwrite=writing.overwrite)


def _all_hashes(folder: Path, weights: Mapping[Path, str]) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, by name.

    Args:
        weights: those that are known.
    """
    return {path.name: weights.get(path) or sha256_of(path) for path in checkpoint_files(folder)}


def _ingredient(checkpoint: Checkpoint, classifier: Classifier, hashes: dict[str, str]) -> Ingredient:
    """A checkpoint that agrees with others as an ingredient.

    Args:
        hashes: of its files, by name; none where they are not known yet.

    Raises:
        ValueError: if it has changed since it was opened.
    """
    if hashes and files_stamp(checkpoint.folder) != checkpoint.stamp:
        raise ValueError(
            f"{checkpoint.name} has changed while it was read: if its training still runs, wait, or leave it out. "
            "Nothing was writing."
        )
    return Ingredient(
        id=checkpoint.name,
        revision=content_hash(hashes),
        folder=checkpoint.folder,
        labels=classifier.labels,
        architecture=classifier.architecture,
        stamp=checkpoint.stamp,
        multi_label=classifier.multi_label,
        size=checkpoint.size,
        content=f"{checkpoint.sample}{digest(weights_hash(hashes))}",  # in whose order weights are added up
    )


def _listed(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:.6g}" for weight in weights)
