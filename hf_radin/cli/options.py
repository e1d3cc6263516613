"""The options of the command line, and what they mean for the functions behind it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.cli.tables import say

if TYPE_CHECKING:
    from hf_radin.ingredients.ingredient import Ingredients


EVAL_TASK = "of a benchmark on the Hub that the accuracy on the held-out split is a result of (for .eval_results)"
HIDE = "leave the names of private ingredients out of the recipe and the card that are pushed"

# Shares of a split that recipes may be ranked on where time is short: few, so that the same command, started again,
# mostly takes the same one although no clock says the same twice.
PILOTS = (0.5, 0.2, 0.1, 0.05)

# So many images a pilot has at least: recipes that are ranked on a handful are hardly ranked.
LEAST_IMAGES = 500


class Parser(argparse.ArgumentParser):
    """Of options that are written out, those of commands too: shortened, `--metric` would be read as `--metrics`."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)


def soup_options() -> Parser:
    """The options of `hf-radin soup` and `examples/soup.py`."""
    parser = Parser(add_help=False)
    model_arguments(parser)
    data_arguments(parser)
    search_arguments(parser)
    return parser


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which images, and how they go by."""
    add = parser.add_argument
    add("--dataset", help="Hub id or folder; by default what the models' cards agree on")
    add("--dataset-config", help="configuration of the dataset")
    add("--dataset-revision", help="branch, tag or commit of the dataset")
    add("--split", help="split that chooses the soup; by default what the cards agree on, else validation")
    add("--image-column", help="needed if the dataset has several")
    add("--label-column", help="needed if it can't be told")
    add("--on-error", choices=("raise", "skip"), default="raise", help="what to do with an unreadable image")
    add("--drop-strangers", action="store_true", help="leave out models that don't share their start with the others")
    add("--batchnorm-split", metavar="SPLIT", help="whose images give BatchNorm its statistics anew (default: train)")
    add("--batchnorm-images", type=int, default=1024, metavar="N", help="how many of these to draw (default 1024)")
    batch_size = "images in a forward pass (default: auto: 64 on a CPU, on a GPU as many as pay)"
    add("--batch-size", default="auto", type=number, metavar="N", help=batch_size)
    at_once = "models that see each image while it is there (default: auto, which is as many as fit)"
    add("--models-in-memory", default="auto", type=number, metavar="N", help=at_once)
    kept = "prepared images kept on disk: off, a size as in 20GB, or auto: up to half of what is free (default)"
    add("--pixel-cache", default="auto", metavar="SIZE", help=kept)
    workers = "processes that decode images beside each that runs models (default: auto, which is none on a CPU)"
    add("--workers", default="auto", type=number, metavar="N", help=workers)
    add("--channels-last", action="store_true", help="a memory format that convolutions on GPUs like")
    add("--compile", dest="compiled", action="store_true", help="run the models through torch.compile")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights while running")
    half = "of the logits as they are kept (default: float32)"
    add("--logits-dtype", choices=("float32", "float16"), default="float32", help=half)
    share = (
        "share of the split, as in 0.1, that logits are computed of first; they say which others matter (default: all)"
    )
    add("--pilot", type=float, metavar="SHARE", help=share)
    tracking_arguments(parser)
    add("--cache-dir", type=Path, help="where logits are kept (default: hf_radin in HF_HOME)")


def tracking_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say who else hears how a run goes."""
    add = parser.add_argument
    trackers = ("trackio", "tensorboard", "wandb")
    add("--log-with", nargs="+", default=[], choices=trackers, help="trackers that hear how the run goes")
    add("--log-dir", type=Path, default=Path("logs"), help="for trackers that write files (default: logs)")


def start_tracking(args: argparse.Namespace) -> None:
    """Let the trackers that were asked for hear of this run."""
    from hf_radin.runtime.tracking import track

    if args.log_with:
        settings = {name: value for name, value in vars(args).items() if name not in ("run", "log_with", "log_dir")}
        track(args.log_with, args.log_dir, settings)


def estimate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-radin estimate`."""
    model_arguments(parser)
    data_arguments(parser)
    add = parser.add_argument
    images = "how many the split has (default: auto, which is what the dataset says)"
    add("--images", default="auto", type=number, metavar="N", help=images)
    processes = (
        "how many there will be, each as fast as this one is now (default: auto, which is as many as there are)"
    )
    add("--processes", default="auto", type=number, metavar="N", help=processes)
    add("--budget", type=float, default=8.0, help="passes over the split for soups (default 8)")
    parser.set_defaults(test_split=None)


def search_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how the soup is found, and where it goes."""
    add = parser.add_argument
    add("--test-split", help="split that takes no part in the choice, for the final figures")
    overlap = "let the split that proves share images with the one that chooses; recipe and card say how many"
    add("--allow-overlap", action="store_true", help=overlap)
    add(
        "--method",
        choices=("radin", "greedy", "uniform", "best_single"),
        default="radin",
        help="how the soup is found; only radin has a budget and candidates, and only greedy a rule to accept",
    )
    add(
        "--budget", help="passes over the split for soups, as in 8, or time, as in 15m; 0 to estimate only (default 8)"
    )
    measured = "show soups the telling images first and drop what is behind (race), or all of the split (full)"
    add("--measure", choices=("race", "full"), default="race", help=f"{measured} (radin; default race)")
    add("--hold-out", type=float, metavar="SHARE", help="in place of --test-split a share of the split, as in 0.2")
    kinds = "auto, monte-carlo, dirichlet, subsets, forward, local, line, wise-ft, model-stock"
    add("--proposals", default="auto", metavar="KINDS", help=f"kinds of candidates (radin): {kinds}; with commas")
    add("--start", metavar="ID", help="of the ingredients, the one that all others began from (wise-ft, model-stock)")
    add("--candidates", type=int, default=200, help="how many to draw of each kind that is drawn (default 200)")
    add("--accept", choices=(">=", ">"), default=">=", help="when greedy keeps an ingredient")
    reported = (
        "what to report, with commas between: accuracy, balanced_accuracy, f1, precision, recall (means over classes; "
        "also with _micro, _weighted), mcc, top5_accuracy, log_loss, roc_auc, average_precision, calibration_error, "
        "or one of the evaluate library"
    )
    add("--metrics", default="accuracy", help=reported)
    add("--seed", type=int, default=0, help="of all that is drawn: candidates, samples, a pilot (default 0)")
    add("--output", type=Path, default=Path("soup"), help="folder for the soup (default: soup)")
    overwrite = "allow an output folder that is not empty, and with --push-to a repository that holds something else"
    add("--overwrite", action="store_true", help=overwrite)
    add("--push-to", metavar="ID", help="repository on the Hub to push the soup to")
    add("--hide-private", action="store_true", help=HIDE)
    add("--eval-task", metavar="DATASET:TASK", help=EVAL_TASK)
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--license", help="for the card, if the models don't agree on one")


def number(text: str) -> int | str:
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


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is looked at."""
    from hf_radin.images.sample import Pilot
    from hf_radin.recipes.metrics import load_metrics
    from hf_radin.runtime.files import check_output
    from hf_radin.search.budget import Budget

    if args.budget is not None and args.method != "radin":
        raise ValueError(f"--budget {args.budget}: only radin has a budget; {args.method} measures what it has to.")
    if args.hold_out is not None and args.method != "radin":
        raise ValueError(f"--hold-out {args.hold_out}: only radin holds images out; name a --test-split.")
    for name, default in (("measure", "race"), ("proposals", "auto"), ("start", None)):
        if args.method != "radin" and getattr(args, name) != default:
            raise ValueError(f"--{name} {getattr(args, name)}: {args.method} has no candidates; it is radin's.")
    if args.budget is not None:
        Budget.of(args.budget)
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
    check_output(args.output, overwrite=args.overwrite)
    start_tracking(args)
    load_metrics(_names(args.metrics))


def ready_to_push(args: argparse.Namespace, *, repo_type: str = "model") -> None:
    """Make sure that what is asked to be pushed may be."""
    from hf_radin.runtime.hub_commit import PushOptions, check_target, is_private
    from hf_radin.runtime.processes import on_main_process
    from hf_radin.soup.card import check_task
    from hf_radin.soup.push import check_license

    if args.push_to:
        options = PushOptions(overwrite=getattr(args, "overwrite", False), repo_type=repo_type)
        on_main_process(lambda: check_target(args.push_to, options))
        if args.private:
            on_main_process(lambda: is_private(args.push_to, replace(options, private=True)))
        if task := getattr(args, "eval_task", None):
            check_task(task)
            if args.test_split is None and args.hold_out is None:
                raise ValueError(f"--eval-task {task} needs a split that takes no part in the choice (--test-split).")
        if license := getattr(args, "license", None):
            on_main_process(lambda: check_license(license))


def tell_private(args: argparse.Namespace, ingredients: Ingredients, dataset: str) -> None:
    """Warn, before anything is computed, of names that not everybody may see, if all will."""
    from hf_radin.ingredients.card_metadata import describe_ingredient
    from hf_radin.runtime.hub_commit import PushOptions, is_private
    from hf_radin.runtime.processes import on_main_process
    from hf_radin.soup.push import warn_of_names
    from hf_radin.soup.redact import private_names

    def tell() -> None:
        if is_private(args.push_to, PushOptions(private=args.private)):
            return
        data = {"name": str(dataset), "revision": None if Path(dataset).exists() else "some"}
        entries = [asdict(describe_ingredient(ingredient)) for ingredient in ingredients]
        if names := private_names({"ingredients": entries, "data": data}):
            warn_of_names(names)

    if args.push_to and not args.hide_private:
        on_main_process(tell)


def push_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `push_soup_to_hub` takes of the options."""
    return {name: getattr(args, name) for name in ("private", "license", "overwrite", "hide_private", "eval_task")}


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
    from hf_radin.images.cache import find_home
    from hf_radin.images.digests import refuse_shared_splits
    from hf_radin.images.sample import Pilot
    from hf_radin.images.split import DataSource, open_split
    from hf_radin.ingredients.card_metadata import Origin, agreed_origin, is_path
    from hf_radin.ingredients.labels import check_first_label, match_labels
    from hf_radin.runtime.files import is_dir
    from hf_radin.runtime.processes import on_main_process
    from hf_radin.weights.batchnorm import refuse_statistics_of

    named = {"config_name": args.dataset_config, "split": args.split}
    said = Origin() if args.dataset else agreed_origin(ingredients, **named)
    source = {
        "dataset": args.dataset or said.dataset,
        "config_name": args.dataset_config or said.config_name,
        "revision": args.dataset_revision,
        "image_column": args.image_column,
        "label_column": args.label_column,
    }
    split = args.split or said.split or "validation"
    if not args.dataset:
        is_both = not is_path(source["dataset"]) and is_dir(Path(source["dataset"]))
        here = " (the folder here)" if is_both else ""
        say(f"The models' cards agree on the dataset {source['dataset']}{here}, split {split}.")
    test_split = getattr(args, "test_split", None)
    if test_split == split:
        raise ValueError(f"--test-split {split}: this split chooses the soup; another one has to prove it.")
    if test_split:
        test = open_split(DataSource(**source, split=test_split))
        check_first_label(test, match_labels(test, ingredients.labels))
        refuse_statistics_of(test_split, ingredients[0], args.batchnorm_split)
        if test.is_here and not args.allow_overlap:
            chosen, home = open_split(DataSource(**source, split=split)), find_home(args.cache_dir)
            on_main_process(lambda: refuse_shared_splits(test, chosen, home))
    speed = ("batch_size", "models_in_memory", "pixel_cache", "workers", "channels_last", "compiled")
    names = (*speed, "dtype", "logits_dtype", "on_error", "cache_dir", "batchnorm_split", "batchnorm_images", "pilot")
    running = {name: getattr(args, name) for name in names}
    if args.pilot is not None:
        running["pilot"] = Pilot(args.pilot, getattr(args, "seed", 0))
    return {**source, "split": split, "strangers": "drop" if args.drop_strangers else "warn", **running}


def pilot_for(ingredients: Ingredients, data: dict[str, Any], seconds: float) -> float | None:
    """The share of a pilot with which all logits take half of the time or less; None if they do without, or no pilot
    takes less.

    Args:
        data: as `compute_logits` takes it.
    """
    from hf_radin.images.sample import Pilot
    from hf_radin.images.split import DataSource, count_rows, open_split
    from hf_radin.logits.cost import estimate
    from hf_radin.runtime.processes import on_main_process

    where = ("dataset", "split", "config_name", "revision", "image_column", "label_column")
    opened = open_split(DataSource(**{name: data[name] for name in where}))
    count = on_main_process(lambda: count_rows(opened))
    if count is None or count * PILOTS[0] < LEAST_IMAGES:
        return None
    needless = ("strangers", "batchnorm_split")
    job = estimate(ingredients, **{name: value for name, value in data.items() if name not in needless})
    models, whole = len(ingredients), Pilot.whole(len(ingredients))
    passes = on_main_process(lambda: seconds / 2 / job.logits_seconds * models)
    there = [one for one in PILOTS if one * count >= LEAST_IMAGES and Pilot(one).passes(models) < models]
    if passes >= models or not there:
        return None
    share = next((one for one in there if Pilot(one).passes(models) <= passes), there[-1])
    say(
        f"Logits of {share:.0%} of the split are computed, then of images on which {whole} of {models} disagree: "
        f"those of all would take {job.logits_seconds:,.0f} s of the {seconds:,.0f} (--pilot)."
    )
    return share


def cost_options(args: argparse.Namespace, ingredients: Ingredients) -> dict[str, Any]:
    """What `estimate` takes of the options: all that `compute_logits` does, but for what costs nothing.

    Raises:
        ValueError: as `data_options` does.
    """
    found = data_options(args, ingredients)
    for name in ("strangers", "batchnorm_split"):
        del found[name]
    return {**found, "images": args.images, "processes": args.processes, "budget": args.budget}


def search_options(args: argparse.Namespace, ingredients: Ingredients) -> dict[str, Any]:
    """What the method takes of the options.

    Raises:
        ValueError: if these ingredients have no such candidates, or the output is one of them.
    """
    from hf_radin.recipes.propose import check_start, propose, split_kinds
    from hf_radin.weights.average_files import refuse_ingredients

    refuse_ingredients(args.output, ingredients)
    propose(len(ingredients), proposals=args.proposals, count=args.candidates, seed=args.seed)
    check_start(split_kinds(args.proposals), args.start, ingredients.ids)
    radin = ("budget", "measure", "hold_out", "proposals", "candidates", "start", "seed")
    own = {"radin": radin, "greedy": ("accept",)}.get(args.method, ())
    return {
        **{name: getattr(args, name) for name in own if getattr(args, name) is not None},
        "metrics": _names(args.metrics),
        "test_split": args.test_split,
        "allow_overlap": args.allow_overlap,
    }


def _names(text: str) -> tuple[str, ...]:
    """What stands between the commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
