"""`hf-radin average`: apart from the other commands, since loading what they need can take longer than an average."""

from __future__ import annotations

import argparse

from hf_radin.averaging.unmeasured import average_unmeasured
from hf_radin.cli.tables import say, say_adapter
from hf_radin.runtime.processes import Processes
from hf_radin.soup.card_sentences import how_to_measure
from hf_radin.soup.cook import Writing, cook_recipe
from hf_radin.soup.report import RECIPE

# Options that allow what may run a checkpoint's code.
TRUST = ("allow_pickle", "trust_remote_code")


def average(args: argparse.Namespace, processes: Processes) -> None:
    """Average checkpoints by given weights, or cook the soup of a `recipe.json` again."""
    args.models = [*args.names, *args.models]
    check_average(args)
    if args.recipe is None:
        return average_named(args, processes)
    names = ("models", "checkpoint", "start", "dataset", "image_processor", "base_model", "cache_dir", *TRUST)
    cook_recipe(args.recipe, args.output, writing_of(args), **{name: getattr(args, name) for name in names})
    say(f"The soup is in {args.output}: a checkpoint, {RECIPE} and a card.")
    say_adapter(args.save_adapter, args.output, processes)


def writing_of(args: argparse.Namespace) -> Writing:
    """How the average is written."""
    return Writing(args.overwrite, args.dtype, args.max_shard_size, args.save_adapter)


def check_average(args: argparse.Namespace) -> None:
    """Refuse options of which one cooks a recipe, and the other averages what is named.

    Raises:
        ValueError: for such options, or where there is neither a recipe nor a name.
    """
    if args.recipe is None and not args.models:
        raise ValueError("Nothing is named to be averaged: name checkpoints, or a recipe.json with --recipe.")
    if args.checkpoint and not args.models:
        raise ValueError(
            f"--checkpoint {args.checkpoint}: the recipe says which checkpoints it is of; it goes with --models."
        )
    if args.checkpoint and args.last:
        raise ValueError(
            f"--checkpoint {args.checkpoint} and --last {args.last} both say what is taken of a run: leave one out."
        )
    of_recipe, of_names = ("start", "dataset", "cache_dir"), ("weights", "last", "revision", "classes")
    for name in of_recipe if args.recipe is None else of_names:
        if (value := getattr(args, name)) is not None:
            option, shown = name.replace("_", "-"), " ".join(map(str, value)) if isinstance(value, list) else value
            why = "the recipe says all that" if args.recipe else "it belongs to a recipe (--recipe)"
            raise ValueError(f"--{option} {shown}: {why}; leave it out.")


def average_named(args: argparse.Namespace, processes: Processes) -> None:
    """Average the checkpoints that are named, by the weights that are given."""
    names = ("revision", "checkpoint", "classes", "image_processor", "base_model", *TRUST)
    options = {name: getattr(args, name) for name in names}
    recipe = average_unmeasured(
        args.models, args.output, weights=args.weights, last=args.last, writing=writing_of(args), **options
    )
    say(f"Averaged: {', '.join(f'{weight:.4g} {name}' for name, weight in recipe.used.items())}.")
    say(f"The soup is in {args.output}: a checkpoint, {RECIPE} and a card. Nothing was measured of it.")
    say_adapter(args.save_adapter, args.output, processes)
    if not recipe.is_single:
        is_uniform = len({*recipe.weights}) == 1
        command = how_to_measure([*recipe.used], place=str(args.output), is_uniform=is_uniform)
        say(f"It may be worse than each of its ingredients. With a dataset this measures it: {command}")
