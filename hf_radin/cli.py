"""The command line: `hf-radin soup`, `average`, `push`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin import __version__
from hf_radin.processes import is_main_process, leave

SOUP = "find the best soup of some checkpoints"
INSPECT = "say of each checkpoint whether it can go into a soup with the others; no weights are downloaded"

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_radin.ingredients import Ingredients
    from hf_radin.soup import Soup
    from hf_radin.vetting import Verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line on stderr and the exit status 2."""
    parser = argparse.ArgumentParser(prog="hf-radin", description="One better image classifier from many fine-tunes.")
    parser.add_argument("--version", action="version", version=f"hf_radin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    soup = commands.add_parser("soup", help=SOUP, description=SOUP, parents=[soup_options()])
    soup.set_defaults(run=_soup)
    inspect = commands.add_parser("inspect", help=INSPECT, description=INSPECT)
    model_arguments(inspect)
    inspect.set_defaults(run=_inspect)
    average = commands.add_parser("average", help="cook the soup of a recipe.json again")
    average.add_argument("--recipe", type=Path, required=True, help="a recipe.json")
    average.add_argument("--models", nargs="+", help="where the ingredients are now, if not where the recipe says")
    average.add_argument("--image-processor", metavar="ID", help="where it is now, if one was named for the soup")
    average.add_argument("--base-model", metavar="ID", help="where the base of LoRA adapters is now")
    average.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    average.add_argument("--dataset", help="of models with BatchNorm, where the images for its statistics are now")
    average.add_argument("--cache-dir", type=Path, help="where these are kept (default: hf_radin in HF_HOME)")
    average.add_argument("--overwrite", action="store_true", help="allow an output folder that is not empty")
    average.add_argument("--allow-pickle", action="store_true", help="read .bin weights")
    average.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    average.set_defaults(run=_average)
    push = commands.add_parser("push", help="upload a saved soup as it is, in one commit")
    push.add_argument("folder", type=Path, help="a folder that `hf-radin soup` wrote")
    push.add_argument("repo_id", help="where to, as in org/soup")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.set_defaults(run=_push)
    return guarded(lambda args: args.run(args), parser.parse_args(arguments))


def guarded(run: Any, args: argparse.Namespace) -> int:
    """Run a command with logging set up; what a user can mend is one line, not a traceback.

    A command that is told to end (a batch system's SIGTERM) ends as one that is interrupted from the keyboard.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_radin").setLevel(logging.INFO)
    try:
        run(args)
        leave()
    except (ValueError, OSError) as error:
        print(f"hf-radin: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-radin: stopped; run the same command again to go on from here.", file=sys.stderr)
        return 130
    except _Told:
        print("hf-radin: told to end; run the same command again to go on from here.", file=sys.stderr)
        return 143
    return 0


class _Told(BaseException):
    """SIGTERM came."""


def _stop(number: int, frame: Any) -> None:
    raise _Told


def soup_options() -> argparse.ArgumentParser:
    """The options of `hf-radin soup` and `examples/soup.py`."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    model_arguments(parser)
    add("--dataset", help="Hub id or folder; by default what the models' cards agree on")
    add("--dataset-config", help="configuration of the dataset")
    add("--dataset-revision", help="branch, tag or commit of the dataset")
    add("--split", help="split that chooses the soup; by default what the cards agree on, else validation")
    add("--test-split", help="split that takes no part in the choice, for the final figures")
    add("--image-column", help="needed if the dataset has several")
    add("--label-column", help="needed if it can't be told")
    add("--on-error", choices=("raise", "skip"), default="raise", help="what to do with an unreadable image")
    add("--drop-strangers", action="store_true", help="leave out models that don't share their start with the others")
    add("--batchnorm-split", metavar="SPLIT", help="whose images give BatchNorm its statistics anew (default: train)")
    add("--batchnorm-images", type=int, default=1024, metavar="N", help="how many of these to draw (default 1024)")
    add(
        "--method",
        choices=("radin", "greedy", "uniform", "best_single"),
        default="radin",
        help="how the soup is found; budget, proposals, candidates and seed are radin's, accept is greedy's",
    )
    add("--budget", type=int, default=8, help="how many soups to measure (radin; default 8)")
    add("--proposals", choices=("auto", "monte-carlo", "subsets"), default="auto", help="candidate recipes (radin)")
    add("--candidates", type=int, default=200, help="how many to draw by monte-carlo (default 200)")
    add("--accept", choices=(">=", ">"), default=">=", help="when greedy keeps an ingredient")
    add("--metrics", default="accuracy", help="what to report, separated by commas, as in accuracy,f1 (f1 is macro)")
    add("--seed", type=int, default=0, help="of the candidates drawn by monte-carlo (default 0)")
    batch_size = "images in a forward pass (default: auto: 64 on a CPU, on a GPU as many as pay)"
    add("--batch-size", default="auto", type=_number, metavar="N", help=batch_size)
    at_once = "models that see each image while it is there (default: auto, which is as many as fit)"
    add("--models-in-memory", default="auto", type=_number, metavar="N", help=at_once)
    kept = "prepared images kept on disk: off, a size as in 20GB, or auto: up to half of what is free (default)"
    add("--pixel-cache", default="auto", metavar="SIZE", help=kept)
    workers = "processes that decode images beside each that runs models (default: auto, which is none on a CPU)"
    add("--workers", default="auto", type=_number, metavar="N", help=workers)
    add("--channels-last", action="store_true", help="a memory format that convolutions on GPUs like")
    add("--compile", dest="compiled", action="store_true", help="run the models through torch.compile")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights while running")
    add("--cache-dir", type=Path, help="where logits are kept (default: hf_radin in HF_HOME)")
    add("--output", type=Path, default=Path("soup"), help="folder for the soup (default: soup)")
    add("--overwrite", action="store_true", help="allow an output folder that is not empty")
    add("--push-to", metavar="ID", help="repository on the Hub to push the soup to")
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--license", help="for the card, if the models don't agree on one")
    return parser


def _number(text: str) -> int | str:
    return text if text == "auto" else int(text)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which checkpoints."""
    add = parser.add_argument
    models = (
        "folders, runs, patterns, Hub ids (org/a@rev:subfolder), collections, or .txt and .yaml files that list them"
    )
    add("--models", nargs="+", required=True, metavar="M", help=models)
    add("--revision", help="branch, tag or commit of the models that name none")
    add("--image-processor", metavar="ID", help="Hub id or folder of the processor to use in place of the models' own")
    add("--base-model", metavar="ID", help="what LoRA adapters are merged into, if it is not where they say")
    add("--allow-pickle", action="store_true", help="read .bin weights")
    add("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")


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


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """A row for each checkpoint, and below them what is to be said of some."""
    rows = [("checkpoint", "architecture", "classes", "parameters", "dtype", "size", "verdict")]
    for one in verdicts:
        files, ingredient = one.files, one.ingredient
        rows.append(
            (
                one.id,
                ingredient.architecture if ingredient else "",
                str(len(ingredient.labels)) if ingredient else "",
                f"{one.parameters:,}" if one.parameters else "",
                files.dtypes if files else "",
                f"{files.size / 1e6:,.1f} MB" if files else "",
                "refused" if one.problem else "ok" if ingredient else "copy",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"- {text}" for one in verdicts for text in (*one.notes, one.problem) if text])


def _soup(args: argparse.Namespace) -> None:
    import hf_radin

    check(args)
    ingredients = hf_radin.gather(args.models, **model_options(args))
    search = search_options(args, ingredients)
    bank = hf_radin.compute_logits(ingredients, **data_options(args, ingredients))
    soup: Soup = getattr(hf_radin, args.method)(bank, **search)
    report(soup)
    soup.save_pretrained(args.output, overwrite=args.overwrite, license=args.license)
    say(f"The soup is in {args.output}: a checkpoint, recipe.json and a card.")
    if args.push_to:
        hf_radin.push_soup_to_hub(soup, args.push_to, private=args.private, license=args.license)


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is looked at."""
    from hf_radin.evaluate import load_metrics
    from hf_radin.files import check_output
    from hf_radin.hub import ready_repo
    from hf_radin.processes import on_main_process

    if args.budget < 1:
        raise ValueError(f"--budget {args.budget}: it is the number of soups to measure, at least 1.")
    check_output(args.output, overwrite=args.overwrite)
    load_metrics(_names(args.metrics))
    if args.push_to:
        on_main_process(lambda: ready_repo(args.push_to, private=args.private))


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `gather` takes of the options."""
    return {
        name: getattr(args, name)
        for name in ("revision", "image_processor", "base_model", "allow_pickle", "trust_remote_code")
    }


def data_options(args: argparse.Namespace, ingredients: Ingredients) -> dict[str, Any]:
    """What `compute_logits` takes of the options; what they leave open, the ingredients' cards say.

    Raises:
        ValueError: if the cards don't agree, or the dataset lacks a split that was asked for.
    """
    from hf_radin.batchnorm import refuse_statistics_of
    from hf_radin.data import check_first_label, match_labels, open_split
    from hf_radin.origin import Origin, agreed_origin

    said = Origin() if args.dataset else agreed_origin(ingredients)
    source = {
        "dataset": args.dataset or said.dataset,
        "config_name": args.dataset_config or said.config_name,
        "revision": args.dataset_revision,
        "image_column": args.image_column,
        "label_column": args.label_column,
    }
    split = args.split or said.split or "validation"
    if not args.dataset:
        say(f"The models' cards agree on the dataset {source['dataset']}, split {split}.")
    if args.test_split == split:
        raise ValueError(f"--test-split {split}: this split chooses the soup; another one has to prove it.")
    if args.test_split:
        test = open_split(split=args.test_split, **source)
        check_first_label(test, match_labels(test, ingredients.labels))
        refuse_statistics_of(args.test_split, ingredients[0], args.batchnorm_split)
    speed = ("batch_size", "models_in_memory", "pixel_cache", "workers", "channels_last", "compiled")
    names = (*speed, "dtype", "on_error", "cache_dir", "batchnorm_split", "batchnorm_images")
    running = {name: getattr(args, name) for name in names}
    return {**source, "split": split, "strangers": "drop" if args.drop_strangers else "warn", **running}


def search_options(args: argparse.Namespace, ingredients: Ingredients) -> dict[str, Any]:
    """What the method takes of the options.

    Raises:
        ValueError: if these ingredients have no such candidates, or the output is one of them.
    """
    from hf_radin.averaging import refuse_ingredients
    from hf_radin.propose import propose

    refuse_ingredients(args.output, ingredients)
    propose(len(ingredients), proposals=args.proposals, count=args.candidates, seed=args.seed)
    own = {"radin": ("budget", "proposals", "candidates", "seed"), "greedy": ("accept",)}.get(args.method, ())
    return {
        **{name: getattr(args, name) for name in own},
        "metrics": _names(args.metrics),
        "test_split": args.test_split,
    }


def _names(text: str) -> tuple[str, ...]:
    """What stands between the commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def report(soup: Soup) -> None:
    """Print the recipe and the table of results."""
    say(table(soup))


def say(text: str) -> None:
    """Print in the main process."""
    if is_main_process():
        print(text)


def table(soup: Soup) -> str:
    """What was found, as text."""
    from hf_radin.card import show_metric

    scores = {(one.name, one.split, name): value for one in soup.results for name, value in one.metrics.items()}
    columns = list(dict.fromkeys((split, name) for _, split, name in scores))
    titles = [f"{split} {name}" for split, name in columns]
    width = max([20, *map(len, titles)]) + 2
    lines = [f"{'':14}" + "".join(f"{title:>{width}}" for title in titles)]
    for row in dict.fromkeys(one.name for one in soup.results):
        cells = (show_metric(name, scores[row, split, name]) for split, name in columns)
        lines.append(f"{row:14}" + "".join(f"{cell:>{width}}" for cell in cells))
    weights = [f"{weight:8.4f}  {name}" for name, weight in soup.recipe.used.items()]
    passes = soup.about["passes"]
    over = f" over {soup.about['data']['split']}"
    spent = f"Spent: {passes['logits']} passes{over} for logits, {passes['soups']} for soups."
    return "\n".join([*lines, "", "Recipe:", *weights, "", spent])


def _average(args: argparse.Namespace) -> None:
    from hf_radin.averaging import average
    from hf_radin.cook import cook, cook_statistics
    from hf_radin.files import check_output

    check_output(args.output, overwrite=args.overwrite)
    if args.output.resolve() in (args.recipe.resolve(), args.recipe.resolve().parent):
        raise ValueError(f"The output {args.output} is the folder of the recipe, which would be lost. Choose another.")
    options = {name: getattr(args, name) for name in ("models", "allow_pickle", "trust_remote_code")}
    moved = {"image_processor": args.image_processor, "base_model": args.base_model}
    options |= {name: value for name, value in moved.items() if value is not None}
    ingredients, recipe = cook(args.recipe, **options)
    statistics = cook_statistics(args.recipe, ingredients, dataset=args.dataset, cache_dir=args.cache_dir)
    average(ingredients, recipe, output=args.output, overwrite=args.overwrite, statistics=statistics)
    say(f"The soup is in {args.output}.")


def _push(args: argparse.Namespace) -> None:
    from hf_radin.cook import RECIPE, read_recipe_file
    from hf_radin.hub import COMMIT_MESSAGE, push_folder

    read_recipe_file(args.folder / RECIPE)
    commit = push_folder(
        args.folder, args.repo_id, private=args.private, create_pr=args.create_pr, commit_message=COMMIT_MESSAGE
    )
    print(commit.pr_url or commit.commit_url)


if __name__ == "__main__":
    sys.exit(main())
