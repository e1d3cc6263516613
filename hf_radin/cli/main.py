"""The command line: `hf-radin soup`, `logits`, `search`, `inspect`, `estimate`, `average`, `card`, `push`."""

from __future__ import annotations

import argparse
import io
import logging
import math
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin import __version__
from hf_radin.checkpoints.files import DTYPES, SHARD
from hf_radin.cli.options import (
    EVAL_TASK,
    HIDE,
    Parser,
    check,
    cost_options,
    data_arguments,
    data_options,
    estimate_arguments,
    model_arguments,
    model_options,
    pilot_for,
    push_options,
    ready_to_push,
    search_arguments,
    search_options,
    soup_options,
    start_tracking,
    tell_private,
    tracking_arguments,
)
from hf_radin.cli.tables import estimate_table, plan_table, say, table, verdict_table
from hf_radin.runtime.processes import MainStoppedError, is_main_process, leave, on_main_process
from hf_radin.search.budget import Budget

SOUP = "find the best soup of some checkpoints"
LOGITS = "run each checkpoint once over a split and keep its logits, to be searched later, here or elsewhere"
SEARCH = "find the best soup from logits that were computed before; with --budget 0 without images and without a GPU"
INSPECT = "say of each checkpoint whether it can go into a soup with the others; no weights are downloaded"
ESTIMATE = "say what a soup will cost in time, memory and disk, by a probe of this machine; no weights are downloaded"

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_radin.soup.soup import Soup


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line on stderr and the exit status 2."""
    return guarded(lambda args: args.run(args), command_parser().parse_args(arguments))


def command_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = Parser(prog="hf-radin", description="One better image classifier from many fine-tunes.")
    parser.add_argument("--version", action="version", version=f"hf_radin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    soup = commands.add_parser("soup", help=SOUP, description=SOUP, parents=[soup_options()])
    soup.set_defaults(run=_soup)
    logits = commands.add_parser("logits", help=LOGITS, description=LOGITS)
    model_arguments(logits)
    data_arguments(logits)
    logits.add_argument("--push-to", metavar="ID", help="dataset repository on the Hub to push the logits to")
    logits.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    logits.set_defaults(run=_logits)
    search = commands.add_parser("search", help=SEARCH, description=SEARCH)
    search.add_argument("bank", help="folder that `hf-radin logits` named, or dataset repository on the Hub")
    search.add_argument("--revision", help="branch, tag or commit of a bank on the Hub")
    search.add_argument(
        "--cache-dir", type=Path, help="where banks of the Hub are kept (default: hf_radin in HF_HOME)"
    )
    tracking_arguments(search)
    search_arguments(search)
    search.set_defaults(run=_search)
    inspect = commands.add_parser("inspect", help=INSPECT, description=INSPECT)
    model_arguments(inspect)
    inspect.set_defaults(run=_inspect)
    estimate = commands.add_parser("estimate", help=ESTIMATE, description=ESTIMATE)
    estimate_arguments(estimate)
    estimate.set_defaults(run=_estimate)
    average = commands.add_parser("average", help="cook the soup of a recipe.json again")
    average.add_argument("--recipe", type=Path, required=True, help="a recipe.json")
    average.add_argument("--models", nargs="+", help="where the ingredients are now, if not where the recipe says")
    average.add_argument("--image-processor", metavar="ID", help="where it is now, if one was named for the soup")
    average.add_argument("--base-model", metavar="ID", help="where the base of LoRA adapters is now")
    average.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    average.add_argument("--dataset", help="of models with BatchNorm, where the images for its statistics are now")
    average.add_argument("--cache-dir", type=Path, help="where these are kept (default: hf_radin in HF_HOME)")
    average.add_argument("--dtype", choices=sorted(DTYPES), help="of the soup (default: as the ingredients)")
    average.add_argument(
        "--max-shard-size", default=SHARD, help="of a file of weights, as in 5GB (default: %(default)s)"
    )
    average.add_argument("--overwrite", action="store_true", help="allow an output folder that is not empty")
    average.add_argument("--allow-pickle", action="store_true", help="read .bin weights")
    average.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    average.set_defaults(run=_average)
    anew = "make the card of a saved soup anew; what you wrote between its marked lines stays"
    card = commands.add_parser("card", help=anew)
    card.add_argument("folder", type=Path, help="a folder that `hf-radin soup` wrote")
    card.add_argument("--license", help="for the card (default: the one it has)")
    card.set_defaults(run=_card)
    push = commands.add_parser("push", help="upload a saved soup as it is, in one commit")
    push.add_argument("folder", type=Path, help="a folder that `hf-radin soup` wrote")
    push.add_argument("repo_id", help="where to, as in org/soup")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--revision", help="branch to commit to (default: main)")
    push.add_argument("--commit-message", help="(default: what it is, in a line)")
    push.add_argument("--overwrite", action="store_true", help="allow a repository that holds something else")
    push.add_argument("--license", help="for the card (default: the one it has)")
    push.add_argument("--hide-private", action="store_true", help=HIDE)
    push.add_argument("--eval-task", metavar="DATASET:TASK", help=EVAL_TASK)
    push.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and do nothing")
    push.set_defaults(run=_push)
    return parser


def guarded(run: Any, args: argparse.Namespace) -> int:
    """Run a command with logging set up; what a user can mend is one line, not a traceback.

    A command that is told to end (a batch system's SIGTERM) ends as one that is interrupted from the keyboard.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):  # names that a terminal can't show are no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.captureWarnings(is_main_process())  # such that they, too, go above a bar (see `progress_bar`)
    # what all processes see, one says; an error is said by whom it befell
    logging.getLogger("hf_radin").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    try:
        run(args)
        leave()
    except (ValueError, OSError) as error:
        if not isinstance(error, MainStoppedError):  # the main process says it
            print(f"hf-radin: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main_process():  # the others are interrupted with it
            print("hf-radin: stopped; run the same command again to go on from here.", file=sys.stderr)
        return 130
    except _Told:
        if is_main_process():  # the others are told so when it ends, too
            print("hf-radin: told to end; run the same command again to go on from here.", file=sys.stderr)
        return 143
    finally:
        leave(together=False)  # whatever ended it; after the call above there is nothing left to do
    return 0


class _Told(BaseException):
    """SIGTERM came."""


def _stop(number: int, frame: Any) -> None:
    raise _Told


def _inspect(args: argparse.Namespace) -> None:
    import hf_radin

    verdicts = hf_radin.inspect(args.models, **model_options(args))
    say(verdict_table(verdicts))
    refused = sum(bool(one.problem) for one in verdicts)
    kept = sum(one.ingredient is not None for one in verdicts)
    if refused:
        raise ValueError(f"No soup can be made of these: {refused} of {len(verdicts)} must be mended or left out.")
    if kept < 2:
        raise ValueError(f"A soup needs at least two different checkpoints; here is {kept}.")
    say(
        f"As far as headers tell, a soup can be made of these {kept} ingredients; `hf-radin soup` asks the weights "
        "themselves whether they are finite and share a start."
    )


def _soup(args: argparse.Namespace) -> None:
    import hf_radin

    check(args)
    ready_to_push(args)
    ingredients = hf_radin.gather(args.models, **model_options(args))
    search, data = search_options(args, ingredients), data_options(args, ingredients)
    tell_private(args, ingredients, data["dataset"])
    begun = time.monotonic()
    seconds = Budget.of(search.get("budget", 0)).seconds
    if seconds < math.inf and args.pilot is None and args.hold_out is None:
        data["pilot"] = pilot_for(ingredients, data, seconds)
    bank = hf_radin.compute_logits(ingredients, **data)
    if seconds < math.inf:  # what is left of the time is for soups
        left = on_main_process(lambda: seconds - (time.monotonic() - begun))
        search["budget"] = f"{max(0.0, left):.0f}s"
    soup: Soup = getattr(hf_radin, args.method)(bank, **search)
    if seconds < math.inf:
        soup.about["budget"] = str(Budget.of(args.budget))
    say(table(soup))
    _save(soup, args)


def _logits(args: argparse.Namespace) -> None:
    import hf_radin

    start_tracking(args)
    if args.push_to and args.pilot is not None:
        raise ValueError(f"--push-to {args.push_to}: logits of a part of the split (--pilot) can't be shared.")
    ready_to_push(args, repo_type="dataset")
    ingredients = hf_radin.gather(args.models, **model_options(args))
    bank = hf_radin.compute_logits(ingredients, **data_options(args, ingredients))
    say(f"The logits of {len(bank.ingredients)} checkpoints on {len(bank)} images are in {bank.folder}")
    if args.push_to:
        say(f"Pushed: {bank.push_to_hub(args.push_to, private=args.private).commit_url}")


def _search(args: argparse.Namespace) -> None:
    import hf_radin
    from hf_radin.soup.recipe_file import RECIPE

    check(args)
    if Path(args.bank).is_dir():
        bank = hf_radin.LogitBank.open(args.bank)
    else:
        bank = hf_radin.LogitBank.from_hub(args.bank, revision=args.revision, cache_dir=args.cache_dir)
    away = [one.id for one in bank.ingredients if one.is_away]
    if away and args.push_to:
        raise ValueError(
            f"--push-to {args.push_to}: no soup can be made here, {away[0]} is a folder of somebody else's."
        )
    ready_to_push(args)
    tell_private(args, bank.ingredients, bank.about["data"]["name"])
    soup: Soup = getattr(hf_radin, args.method)(bank, **search_options(args, bank.ingredients))
    say(table(soup))
    if not soup.away:
        return _save(soup, args)
    soup.save_recipe(args.output / RECIPE)
    say(
        f"The recipe is in {args.output / RECIPE}. Its ingredient {soup.away[0]} is not here: cook it where it is, "
        f"with `hf-radin average --recipe {RECIPE} --models ... --output soup`."
    )


def _save(soup: Soup, args: argparse.Namespace) -> None:
    import hf_radin

    soup.save_pretrained(args.output, overwrite=args.overwrite, license=args.license)
    say(f"The soup is in {args.output}: a checkpoint, recipe.json and a card.")
    if args.push_to:
        say(f"Pushed: {hf_radin.push_soup_to_hub(soup, args.push_to, **push_options(args)).commit_url}")


def _estimate(args: argparse.Namespace) -> None:
    import hf_radin

    ingredients = hf_radin.gather(args.models, **model_options(args))
    say(estimate_table(hf_radin.estimate(ingredients, **cost_options(args, ingredients))))


def _average(args: argparse.Namespace) -> None:
    from hf_radin.soup.cook import cook_recipe
    from hf_radin.soup.recipe_file import RECIPE

    moved = ("models", "dataset", "image_processor", "base_model", "cache_dir")
    names = (*moved, "overwrite", "dtype", "max_shard_size", "allow_pickle", "trust_remote_code")
    cook_recipe(args.recipe, args.output, **{name: getattr(args, name) for name in names})
    say(f"The soup is in {args.output}: a checkpoint, {RECIPE} and a card.")


def _card(args: argparse.Namespace) -> None:
    from hf_radin.runtime.files import write_atomically
    from hf_radin.soup.card import anew
    from hf_radin.soup.recipe_file import RECIPE, read_recipe_file

    for name, content in anew(args.folder, read_recipe_file(args.folder / RECIPE), license=args.license).items():
        write_atomically(args.folder / name, partial(Path.write_bytes, data=content))
    say(f"The card is in {args.folder / 'README.md'}.")


def _push(args: argparse.Namespace) -> None:
    say(on_main_process(lambda: _pushed(args)))


def _pushed(args: argparse.Namespace) -> str:
    """What came of a push, or would."""
    from hf_radin.runtime.hub_commit import PushOptions, check_target, hashes_of, plan_commit
    from hf_radin.soup.push import prepared, push_folder
    from hf_radin.soup.recipe_file import RECIPE, read_recipe_file

    read_recipe_file(args.folder / RECIPE)
    names = ("private", "revision", "create_pr", "commit_message", "overwrite")
    options = PushOptions(**{name: getattr(args, name) for name in names})
    shown = {name: getattr(args, name) for name in ("hide_private", "license", "eval_task")}
    if args.dry_run:
        check_target(args.repo_id, options)
        files = prepared(args.folder, args.repo_id, options, **shown)
        opened = "\nA pull request would be opened, and nothing there changed." if args.create_pr else ""
        return plan_table(args.repo_id, files, plan_commit(args.repo_id, hashes_of(files), options)) + opened
    commit = push_folder(args.folder, args.repo_id, options, **shown)
    return str(commit.pr_url or commit.commit_url)
