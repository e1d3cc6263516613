"""What each command does with its options: the one road from names of checkpoints to a soup."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import hf_radin
from hf_radin.adapters.adapter import AdapterError, check_adapters, check_pull
from hf_radin.cli.in_common import InCommon
from hf_radin.cli.tables import as_text, estimate_table, plan_table, say, say_adapter, show, soup_table, verdict_table
from hf_radin.images.cache import find_home
from hf_radin.images.digests import refuse_shared_splits
from hf_radin.images.sample import Pilot
from hf_radin.images.split import DataSource, count_rows, open_split
from hf_radin.ingredients.card_metadata import Origin, agreed_origin, describe_ingredient, is_path
from hf_radin.ingredients.gather import inspect as inspect_models
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.ingredients.labels import check_first_label, check_numbers, match_labels, split_classes
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import check_bank
from hf_radin.logits.compute import make_bank
from hf_radin.logits.cost import JobSize, estimate_job
from hf_radin.logits.manifest import DataRecord, RunOptions
from hf_radin.metrics.named import load_metrics
from hf_radin.metrics.objective import Objective
from hf_radin.recipes.propose import check_start, propose, split_kinds
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import check_file, check_output, is_dir, put_back, write_atomically, write_folder
from hf_radin.runtime.hub_commit import PushOptions, check_target, hashes_of, is_private, plan_commit
from hf_radin.runtime.processes import Processes
from hf_radin.search.distill import check_distillation, check_layers, source_of
from hf_radin.search.held_out import proving_bank
from hf_radin.search.race import Budget
from hf_radin.search.reporter import HINTS
from hf_radin.soup.card import check_task, renewed_card
from hf_radin.soup.cook import find_bank
from hf_radin.soup.push import CardOptions, check_license, files_to_push, push_folder, warn_of_names
from hf_radin.soup.redact import private_names
from hf_radin.soup.report import RECIPE, SearchReport
from hf_radin.soup.soup import Soup, push_soup
from hf_radin.weights.average_files import refuse_ingredients
from hf_radin.weights.batchnorm import refuse_statistics_of
from hf_radin.weights.start import find_start

logger = logging.getLogger(__name__)

# Shares of a split that recipes may be ranked on where time is short: few, so that the same command, started again,
# mostly takes the same share although no clock says the same twice.
PILOTS = (0.5, 0.2, 0.1, 0.05)

# Images that a pilot has at least: recipes that are ranked on a handful are hardly ranked.
LEAST_IMAGES = 500

# The share of a budget of time that teaching last layers may take, beside it.
TEACHING = 0.25

# Options that say where the checkpoints of a recipe are now, and what they may do (`options.add_moved_options`).
MOVED = ("models", "start", "image_processor", "base_model", "allow_pickle", "trust_remote_code")

# Why nothing can be said of a soup image by image, of a file.
NO_PILOT = (
    "--changes {}: after a pilot the logits of the split that chooses are known of some images only; name a "
    "--test-split, or compute the logits of all images."
)
# The exit status where a soup is worse than the best single model, and --strict was given.
WORSE = 3

METHODS: dict[str, Callable[..., Soup]] = {
    "radin": hf_radin.radin,
    "greedy": hf_radin.greedy,
    "uniform": hf_radin.uniform,
    "best_single": hf_radin.best_single,
}


def soup(args: argparse.Namespace, processes: Processes) -> int:
    """From names of checkpoints to a saved soup; the exit status."""
    check_search(args)
    start_tracking(args, processes)
    check_push(args, processes, push_options(args))
    ingredients = gather_models(args)
    search = search_options(args, ingredients)
    source = data_source(args, ingredients)
    check_data(args, ingredients, source, processes)
    warn_of_private_names(args, ingredients, source, processes)
    options = run_options(args)
    pilot = choose_pilot(args, ingredients, source, options, processes)
    bank = make_bank(ingredients, source, options, processes, pilot=pilot)
    HINTS.disabled = args.distill
    result = _distilled(bank, METHODS[args.method](bank, **search), args)
    status = save(result, args)
    write_changes(bank, result, args)
    return status


def _distilled(bank: LogitBank, result: Soup, args: argparse.Namespace) -> Soup:
    """The soup with distilled last layers, if these are asked for; if they can't be had it stays, and a line says why.

    The search has cost what it has cost: its result is not lost.
    """
    if not args.distill:
        return result
    try:
        options = {"test_split": args.test_split, "allow_overlap": args.allow_overlap, "split": args.distill_split}
        return hf_radin.distill(bank, result, **options, budget=teaching_budget(args.budget))
    except ValueError as error:
        logger.warning("Nothing is distilled: %s The soup is saved as it is.", error)
        return result


def teaching_budget(budget: str | None) -> str | None:
    """What teaching last layers may take after a search with this budget; None if there is no limit."""
    seconds = Budget.of(budget).seconds if budget is not None else float("inf")
    return None if seconds == float("inf") else str(Budget(seconds=TEACHING * seconds))


def logits(args: argparse.Namespace, processes: Processes) -> None:
    """From names of checkpoints to a bank of logits."""
    start_tracking(args, processes)
    if args.push_to and args.pilot is not None:
        raise ValueError(f"--push-to {args.push_to}: logits of a part of the split (--pilot) can't be published.")
    check_push(args, processes, PushOptions(private=args.private, repo_type="dataset"))
    ingredients = gather_models(args)
    source = data_source(args, ingredients)
    pilot = None if args.pilot is None else Pilot(args.pilot)
    bank = make_bank(ingredients, source, run_options(args), processes, pilot=pilot)
    say(f"The logits of {len(bank.ingredients)} checkpoints on {len(bank)} images are in {bank.folder}")
    if args.push_to:
        say(f"Pushed: {bank.push_to_hub(args.push_to, private=args.private).commit_url}")


def search(args: argparse.Namespace, processes: Processes) -> int:
    """From a bank of logits to a saved soup, or to a recipe where the checkpoints are elsewhere; the exit status."""
    check_search(args)
    start_tracking(args, processes)
    if Path(args.bank).is_dir():
        # a broken file is the main process's error, which ends the others too
        processes.decide(lambda: check_bank(Path(args.bank).resolve(), processes.checks))
        bank = LogitBank.open(args.bank, processes=processes)
    else:
        options = {"revision": args.revision, "cache_dir": args.cache_dir}
        bank = LogitBank.from_hub(args.bank, **options, processes=processes)
    away = [ingredient.id for ingredient in bank.ingredients if ingredient.is_away]
    why = "is known by its logits alone" if bank.given else "is a folder on another machine"
    if away and args.push_to:
        raise ValueError(f"--push-to {args.push_to}: no soup can be made here, {away[0]} {why}.")
    if away and args.save_adapter:
        raise ValueError(f"--save-adapter: no soup can be made here, {away[0]} {why}.")
    if away and args.changes:
        raise ValueError(f"--changes {args.changes}: no soup can run here, {away[0]} {why}.")
    if args.changes and bank.is_pilot and not args.test_split:
        raise ValueError(NO_PILOT.format(args.changes))
    check_push(args, processes, push_options(args))
    warn_of_private_names(args, bank.ingredients, bank.manifest.data, processes)
    HINTS.disabled = args.distill
    result = METHODS[args.method](bank, **search_options(args, bank.ingredients))
    if not result.away:
        result = _distilled(bank, result, args)
        status = save(result, args)
        write_changes(bank, result, args)
        return status
    recipe = result.report.text.encode()

    def write() -> None:  # as a folder: no model of another soup stays beside the recipe
        write_folder(args.output, lambda new: (new / RECIPE).write_bytes(recipe), overwrite=args.overwrite)

    processes.decide(write)
    show(soup_table(result))
    cook = f"cook it where it is, with `hf-radin average --recipe {RECIPE} --models ... --output soup`"
    way_out = "average the weights yourself" if bank.given else cook
    say(f"The recipe is in {args.output / RECIPE}. Its ingredient {result.away[0]} {why}: {way_out}.")
    return strict_status(result, args)


def inspect(args: argparse.Namespace, processes: Processes) -> None:
    """Say of each checkpoint whether it can go into a soup with the others."""
    verdicts = inspect_models(args.models, classes=args.classes, **model_options(args))
    show(verdict_table(verdicts))
    refused = sum(bool(verdict.problem) for verdict in verdicts)
    usable = sum(verdict.ingredient is not None for verdict in verdicts)
    if refused:
        raise ValueError(f"No soup can be made of these: {refused} of {len(verdicts)} must be mended or left out.")
    if usable < 2:
        raise ValueError(f"A soup needs at least two different checkpoints; here is {usable}.")
    ingredients = Ingredients([verdict.ingredient for verdict in verdicts if verdict.ingredient])
    show(as_text(processes.decide(lambda: InCommon.of(ingredients).lines)))
    say(
        f"As far as headers tell, a soup can be made of these {usable} ingredients; `hf-radin soup` asks the weights "
        "themselves whether they are finite and share a start."
    )


def estimate(args: argparse.Namespace, processes: Processes) -> None:
    """Say what a soup will cost."""
    ingredients = gather_models(args)
    size = JobSize(args.images, args.processes, args.budget, Pilot.of(args.pilot))
    source = data_source(args, ingredients)
    show(estimate_table(estimate_job(ingredients, source, run_options(args), size, processes)))


def distill(args: argparse.Namespace, processes: Processes) -> None:
    """Teach the last layers of a saved soup."""
    args.folder = args.folder.parent if args.folder.name == RECIPE else args.folder
    check_output(args.output, overwrite=args.overwrite)
    if args.output.resolve() == args.folder.resolve():
        raise ValueError(f"The output {args.output} is the folder of the soup, which would be lost. Choose another.")
    before, names = Soup.from_pretrained(args.folder), ("epochs", "rate", "seed", "split", "images", "budget")
    options = {name: getattr(args, name) for name in names}
    check_distillation(before.report, **options)  # before the logits
    check_layers(before, args.layers)
    if args.images:
        open_split(source_of(args.images, args.split))
    other_split = None if args.images else args.split
    moved = {name: value for name in MOVED if (value := getattr(args, name))}
    bank = find_bank(args.folder, dataset=args.dataset, cache_dir=args.cache_dir, other_split=other_split, **moved)
    options |= {"tail": args.layers, "labels": args.labels, "allow_overlap": args.allow_overlap}
    result = hf_radin.distill(bank, before, **options)
    if not result.report.is_distilled:
        show(soup_table(before))
        return say(
            f"Nothing is written to {args.output}: the distilled layers are not taken. The model to use is the soup "
            f"in {args.folder}, as it is."
        )
    result.save_pretrained(args.output, overwrite=args.overwrite, license=args.license)
    show(soup_table(result))
    say(f"The soup is in {args.output}: a checkpoint, {RECIPE} and a card.")


def card(args: argparse.Namespace, processes: Processes) -> None:
    """Make the card of a saved soup anew."""
    put_back(args.folder)
    report = SearchReport.read(args.folder / RECIPE, is_saved=True)
    if args.accept_changes:
        report = report.accepted(args.folder)
    else:
        report.check_files(args.folder)
    files = renewed_card(args.folder, report, license=args.license)
    if args.accept_changes:
        files[RECIPE] = report.text.encode()
    for name, content in files.items():
        write_atomically(args.folder / name, partial(Path.write_bytes, data=content))
    say(f"The card is in {args.folder / 'README.md'}.")


def push(args: argparse.Namespace, processes: Processes) -> None:
    """Upload a saved soup."""
    show(processes.decide(lambda: _pushed(args)))


def _pushed(args: argparse.Namespace) -> str:
    """The address of a push, or what it would do."""
    put_back(args.folder)
    options = PushOptions(
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
        overwrite=args.overwrite,
        verify=args.verify,
    )
    if args.dry_run:
        files = files_to_push(args.folder, args.repo_id, options, card_options(args))
        check_target(args.repo_id, options)
        opened = "\nA pull request would be opened, and nothing there changed." if args.create_pr else ""
        return plan_table(args.repo_id, files, plan_commit(args.repo_id, hashes_of(files), options)) + opened
    commit = push_folder(args.folder, args.repo_id, options, card_options(args))
    return as_text([str(commit.pr_url or commit.commit_url)])


def save(result: Soup, args: argparse.Namespace) -> int:
    """Save, print and push a soup; the exit status."""
    options, save_adapter = {"overwrite": args.overwrite, "license": args.license}, args.save_adapter
    try:
        result.save_pretrained(args.output, save_adapter=save_adapter, **options)
    except AdapterError as error:  # of what was chosen; the search has cost what it has cost
        logger.warning("No adapter is saved: %s The soup is saved as it is.", error)
        save_adapter = False
        result.save_pretrained(args.output, **options)
    show(soup_table(result))
    say(f"The soup is in {args.output}: a checkpoint, {RECIPE} and a card.")
    say_adapter(save_adapter, args.output, result.processes)
    status = strict_status(result, args)
    if args.push_to and not status:
        commit = push_soup(result, args.push_to, push_options(args), card_options(args), save_adapter)
        say(f"Pushed: {commit.commit_url}")
    return status


def strict_status(result: Soup, args: argparse.Namespace) -> int:
    """The exit status of a soup that was written: `WORSE` if `--strict` refuses it, as a line says, else 0."""
    verdict = result.report.verdict
    if not args.strict or verdict is None or not verdict.is_proven_worse:
        return 0
    logger.warning(
        "--strict: the soup is worse than the best single model beyond chance on %s, so that the exit status is %d. "
        "Nothing is lost: it is in %s%s.",
        verdict.split,
        WORSE,
        args.output,
        f", and was not pushed to {args.push_to}" if args.push_to else "",
    )
    return WORSE


def write_changes(bank: LogitBank, result: Soup, args: argparse.Namespace) -> None:
    """Write what the soup and the best single model predict differently, if that is asked for.

    Args:
        bank: that the soup was searched with.
    """
    if args.changes is None:
        return
    judging = proving_bank(bank, result.report)
    changes = hf_radin.soup_changes(judging, result)
    result.processes.decide(lambda: changes.to_parquet(args.changes))
    if result.report.is_single:
        return say(f"The best single model is returned, so that nothing changes: {args.changes} has no rows.")
    noun = "image" if changes.of_class is None else "decision"
    won, lost = (f"{count:,} {noun}{'' if count == 1 else 's'}" for count in (changes.won, changes.lost))
    say(
        f"On {judging.split} the soup gets {won} right that the best single model gets wrong, and {lost} wrong that "
        f"this gets right: {args.changes}"
    )


def check_changes(args: argparse.Namespace) -> None:
    """Refuse, before a model is looked at, a file of changes that can't be written.

    Raises:
        ValueError: if it has another ending or can't be written, or nothing will be known to write.
    """
    if args.changes is None:
        return
    if args.changes.suffix != ".parquet":
        raise ValueError(f"--changes {args.changes}: it is written as parquet; name a file that ends with .parquet.")
    check_file(args.changes, overwrite=args.overwrite)
    is_proved = args.test_split is not None or args.hold_out is not None
    if args.budget is not None and not Budget.of(args.budget).passes and not is_proved:
        raise ValueError(
            f"--budget {args.budget}: --changes takes a soup that was measured; give it passes, or a --test-split."
        )
    if getattr(args, "pilot", None) is not None and args.test_split is None:
        raise ValueError(NO_PILOT.format(args.changes))


def check_search(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is looked at.

    Raises:
        ValueError: for options that don't go together, an output that can't be written, or an unknown metric.
    """
    if args.budget is not None and args.method != "radin":
        raise ValueError(f"--budget {args.budget}: only radin has a budget; {args.method} measures what it has to.")
    if args.hold_out is not None and args.method != "radin":
        raise ValueError(f"--hold-out {args.hold_out}: only radin holds images out; name a --test-split.")
    defaults = {"measure": "race", "proposals": "auto", "start": None, "head": "auto", "head_split": None}
    for name, default in defaults.items():
        if args.method != "radin" and getattr(args, name) != default:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, name)}: {args.method} has no candidates; it is radin's.")
    if args.unmeasured and (args.budget is None or Budget.of(args.budget).passes):
        raise ValueError("--unmeasured: soups are measured with a budget above 0; it goes with --budget 0.")
    if args.strict and args.test_split is None and args.hold_out is None:
        raise ValueError("--strict: nothing proves the soup; name a --test-split, or hold out a share (--hold-out).")
    if args.head_split is not None and args.head == "average":
        raise ValueError(f"--head-split {args.head_split}: averaged heads (--head average) learn from no images.")
    if args.budget is not None and not Budget.of(args.budget).passes and args.distill:
        raise ValueError(f"--budget {args.budget}: --distill takes a soup that was measured; give it passes.")
    if getattr(args, "distill_split", None) is not None and not args.distill:
        raise ValueError(f"--distill-split {args.distill_split}: nothing is distilled without --distill.")
    if args.hold_out is not None and not 0 < args.hold_out < 1:
        raise ValueError(f"--hold-out {args.hold_out}: it is a share of the split, as in 0.2.")
    if args.hold_out is not None and args.test_split is not None:
        raise ValueError(
            f"--hold-out {args.hold_out}: the split {args.test_split} proves the soup already; give one of the two."
        )
    if (pilot := getattr(args, "pilot", None)) is not None:
        Pilot(pilot)
        if args.method != "radin" or args.hold_out is not None:
            other = args.method if args.hold_out is None else "--hold-out"
            raise ValueError(f"--pilot {pilot}: {other} takes the logits of all images; the two don't go together.")
        if args.head == "refit" or args.distill:
            other = "--distill" if args.distill else "--head refit"
            raise ValueError(f"--pilot {pilot}: {other} takes the logits of all images; give one of the two.")
    check_output(args.output, overwrite=args.overwrite)
    check_changes(args)
    objective = checked_objective(args)
    if getattr(args, "pilot", None) is not None and not objective.is_accuracy:
        raise ValueError(f"--pilot {args.pilot}: soups are chosen by accuracy after a pilot, not by {objective.text}.")


def checked_objective(args: argparse.Namespace) -> Objective:
    """What to choose by, as far as that is known before a model is looked at.

    Raises:
        ValueError: for a metric that is none, neither of one class an image nor of several.
    """

    def load(of_label_sets: bool) -> Objective:
        load_metrics(split_names(args.metrics), of_label_sets=of_label_sets)
        return Objective.of(args.metric, args.keep, of_label_sets=of_label_sets)

    try:
        return load(False)
    except ValueError as error:
        try:
            return load(True)
        except ValueError:
            raise error from None


def start_tracking(args: argparse.Namespace, processes: Processes) -> None:
    """Start the trackers that were named."""
    if args.log_with:
        settings = {
            name: value
            for name, value in vars(args).items()
            if name not in ("command", "parser", "log_with", "log_dir")
        }
        processes.track(args.log_with, args.log_dir, settings)


def check_push(args: argparse.Namespace, processes: Processes, options: PushOptions) -> None:
    """Make sure, before anything is computed, that what is to be pushed may be.

    Raises:
        ValueError: if it may not.
    """
    if not args.push_to:
        return
    processes.decide(lambda: check_target(args.push_to, options))
    if args.private:
        processes.decide(lambda: is_private(args.push_to, options))
    if options.repo_type != "model":
        return
    if args.eval_task:
        check_task(args.eval_task)
        if args.test_split is None and args.hold_out is None:
            raise ValueError(
                f"--eval-task {args.eval_task} needs a split that takes no part in the choice (--test-split)."
            )
    if args.license:
        processes.decide(lambda: check_license(args.license))


def check_data(args: argparse.Namespace, ingredients: Ingredients, source: DataSource, processes: Processes) -> None:
    """Refuse a test split that can't prove a soup, before anything is computed.

    Raises:
        ValueError: if it chooses the soup, has other labels, gives BatchNorm its statistics, or shares images.
    """
    if args.test_split == source.split:
        raise ValueError(f"--test-split {source.split}: this split chooses the soup; another one has to prove it.")
    for option in ("head_split", "distill_split"):
        check_teaching(f"--{option.replace('_', '-')}", getattr(args, option), args, source, processes)
    if not args.test_split:
        return
    proving = open_split(source.at(args.test_split))
    check_numbers(proving, ingredients)
    check_first_label(proving, match_labels(proving, ingredients.labels, multi_label=ingredients.multi_label))
    refuse_statistics_of(args.test_split, ingredients[0], args.batchnorm_split)
    if proving.is_here and not args.allow_overlap:  # and so is the other, in the same dataset
        choosing, home = open_split(source), find_home(args.cache_dir)
        processes.decide(lambda: refuse_shared_splits(proving, choosing, home))


def check_teaching(
    option: str, name: str | None, args: argparse.Namespace, source: DataSource, processes: Processes
) -> None:
    """Refuse a split that can't teach a head or last layers, before anything is computed.

    Args:
        option: that names it.
        name: of the split; None if none is named.

    Raises:
        ValueError: if there is none, it chooses or proves the soup, or shares images with one that does.
    """
    if not name:
        return
    teaching, home = open_split(source.at(name)), find_home(args.cache_dir)
    if name in (source.split, args.test_split):
        does = "proves the soup" if name == args.test_split else "chooses the soup, and teaches if none is named"
        raise ValueError(f"{option} {name}: this split {does}; name another one, or none.")
    for other in (source.split, args.test_split):
        judging = other and open_split(source.at(other))
        if judging and judging.is_here and not args.allow_overlap:
            processes.decide(partial(refuse_shared_splits, judging, teaching, home))


def warn_of_private_names(
    args: argparse.Namespace, ingredients: Ingredients, data: DataSource | DataRecord, processes: Processes
) -> None:
    """Warn, before anything is computed, of names that not everybody may see, if everybody will."""

    def warn() -> None:
        if is_private(args.push_to, push_options(args)):
            return
        entries = tuple(map(describe_ingredient, ingredients))
        name = str(data.dataset if isinstance(data, DataSource) else data.name)
        record = DataRecord(name, "", revision=None if Path(name).exists() else "unknown")
        recipe = Recipe.uniform(ingredients.ids)
        report = SearchReport(recipe=recipe, data=record, processor={}, ingredients=entries, start=args.start)
        if names := private_names(report):
            warn_of_names(names)

    if args.push_to and not args.hide_private:
        processes.decide(warn)


def choose_pilot(
    args: argparse.Namespace,
    ingredients: Ingredients,
    source: DataSource,
    options: RunOptions,
    processes: Processes,
) -> Pilot | None:
    """The pilot that the user named, or with which all logits take half of a budget of time or less."""
    if args.pilot is not None:
        return Pilot(args.pilot, args.seed)
    seconds = Budget.of(args.budget).seconds if args.budget is not None else float("inf")
    by_accuracy = Objective.of(args.metric, args.keep).is_accuracy  # which is all that a pilot knows
    takes_all = args.hold_out is not None or args.head == "refit" or args.distill
    takes_all = takes_all or ingredients.multi_label or not by_accuracy
    if seconds == float("inf") or takes_all or (args.changes and not args.test_split):
        return None
    share = pilot_share(ingredients, source, options, seconds, processes)
    return None if share is None else Pilot(share)


def pilot_share(
    ingredients: Ingredients, source: DataSource, options: RunOptions, seconds: float, processes: Processes
) -> float | None:
    """The share of a pilot with which all logits take half of the time or less; None if they do without, or no pilot
    takes less.
    """
    split = open_split(source)
    count = processes.decide(lambda: count_rows(split))
    if count is None or count * PILOTS[0] < LEAST_IMAGES:
        return None
    job = estimate_job(ingredients, source, options, JobSize(), processes)
    models, leaders = len(ingredients), Pilot.whole(len(ingredients))
    passes = processes.decide(lambda: seconds / 2 / job.logits_seconds * models)
    shares = [share for share in PILOTS if share * count >= LEAST_IMAGES and Pilot(share).passes(models) < models]
    if passes >= models or not shares:
        return None
    share = next((share for share in shares if Pilot(share).passes(models) <= passes), shares[-1])
    say(
        f"Logits of {share:.0%} of the split are computed, then of images on which {leaders} of {models} disagree: "
        f"those of all would take {job.logits_seconds:,.0f} s of the {seconds:,.0f} (--pilot)."
    )
    return share


def gather_models(args: argparse.Namespace) -> Ingredients:
    """The ingredients, with the classes that the user asked for.

    Raises:
        ValueError: if they can't be gathered, or the classes of a split are asked for and nobody named the dataset.
    """
    classes = args.classes
    if classes == "split":
        if not args.dataset:
            raise ValueError(
                "--classes split: name the dataset with --dataset; its classes are needed before the models' cards "
                "are looked at."
            )
        classes = split_classes(open_split(data_source(args, Ingredients())))
    return hf_radin.gather(args.models, classes=classes, **model_options(args))


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `gather` takes of the options."""
    names = ("revision", "checkpoint", "image_processor", "base_model", "allow_pickle", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def data_source(args: argparse.Namespace, ingredients: Ingredients) -> DataSource:
    """Which images; what the options leave open, the ingredients' cards say.

    Raises:
        ValueError: if the cards don't agree.
    """
    origin = Origin()
    if not args.dataset:
        origin = agreed_origin(ingredients, config_name=args.dataset_config, split=args.split)
    source = DataSource(
        dataset=args.dataset or origin.dataset,
        split=args.split or origin.split or "validation",
        config_name=args.dataset_config or origin.config_name,
        revision=args.dataset_revision,
        image_column=args.image_column,
        label_column=args.label_column,
        classes=ingredients.labels if ingredients.multi_label else (),
    )
    if not args.dataset:
        is_folder = not is_path(source.dataset) and is_dir(Path(source.dataset))
        folder = " (the folder here)" if is_folder else ""
        say(f"The models' cards agree on the dataset {source.dataset}{folder}, split {source.split}.")
    return source


def run_options(args: argparse.Namespace) -> RunOptions:
    """How the models run."""
    return RunOptions(**{field.name: getattr(args, field.name) for field in fields(RunOptions) if field.name in args})


def search_options(args: argparse.Namespace, ingredients: Ingredients) -> dict[str, Any]:
    """What the method takes of the options.

    Raises:
        ValueError: if these ingredients have no such candidates, or the output is one of them.
    """
    refuse_ingredients(args.output, ingredients)
    base = check_adapters(ingredients) if args.save_adapter else None
    refuse_for_multi_label(args, ingredients)
    labels, is_multi_label = ingredients[0].labels, ingredients.multi_label
    Objective.of(args.metric, args.keep, labels, of_label_sets=is_multi_label)  # which may name classes
    load_metrics(split_names(args.metrics), labels, of_label_sets=is_multi_label)
    propose(len(ingredients), proposals=args.proposals, count=args.candidates, seed=args.seed)
    passes = Budget.of(args.budget).passes if args.budget is not None else float("inf")
    check_start(split_kinds(args.proposals), args.start, ingredients.ids, passes=passes)
    if args.start is not None and args.start not in ingredients.ids:
        start = find_start(args.start, ingredients)
        refuse_ingredients(args.output, [start])
        if base is not None:
            check_pull(start, base)
    radin = (
        "budget",
        "unmeasured",
        "measure",
        "hold_out",
        "proposals",
        "candidates",
        "start",
        "head",
        "head_split",
        "seed",
    )
    names = {"radin": radin, "greedy": ("accept",)}.get(args.method, ())
    return {
        **{name: getattr(args, name) for name in names if getattr(args, name) is not None},
        "metric": args.metric,
        "keep": tuple(args.keep),
        "metrics": split_names(args.metrics),
        "test_split": args.test_split,
        "allow_overlap": args.allow_overlap,
    }


def refuse_for_multi_label(args: argparse.Namespace, ingredients: Ingredients) -> None:
    """Refuse what multi-label checkpoints can't be asked, before anything is computed.

    Raises:
        ValueError: for such an option.
    """
    if not ingredients.multi_label:
        return
    if args.eval_task:
        raise ValueError(
            f"--eval-task {args.eval_task}: a leaderboard takes an accuracy, which multi-label checkpoints don't have."
        )


def push_options(args: argparse.Namespace) -> PushOptions:
    """How a soup is pushed."""
    return PushOptions(private=args.private, overwrite=args.overwrite, verify=args.verify)


def card_options(args: argparse.Namespace) -> CardOptions:
    """What a pushed card says."""
    return CardOptions(args.license, args.hide_private, args.eval_task)


def split_names(text: str) -> tuple[str, ...]:
    """The names between commas, but for those in the name of a class, as in `recall[tench, Tinca tinca]`."""
    return tuple(name.strip() for name in re.split(r",(?![^\[]*\])", text) if name.strip())
