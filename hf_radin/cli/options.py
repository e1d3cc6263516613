"""The options of the command line, written out once and put together by command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from hf_radin.checkpoints.files import DTYPES, SHARD
from hf_radin.ingredients.resolve import OF_A_RUN
from hf_radin.runtime.text import printable

METRICS = (
    "accuracy, balanced_accuracy, f1, precision, recall (means over classes; also with _micro, _weighted), "
    "worst_recall, recall[CLASS], mcc, top5_accuracy, log_loss, brier_score, roc_auc, average_precision, "
    "calibration_error, or a metric of the evaluate library"
)
METHODS = ("radin", "greedy", "uniform", "best_single")
USUAL = "as many as greedy takes, one less than there are models, and 8 at most"
PROPOSALS = "auto, monte-carlo, dirichlet, subsets, forward, local, line, wise-ft, model-stock"


class Parser(argparse.ArgumentParser):
    """A parser that takes no shortened options, of commands too: `--proposal` would be read as `--proposals`."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the options, which a shell may have made of the names of files."""
        super().error(printable(message))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which checkpoints."""
    add = parser.add_argument
    models = (
        "folders, runs, patterns, Hub ids (org/a@rev:subfolder), collections, or .txt and .yaml files that list them"
    )
    add("--models", nargs="+", required=True, metavar="M", help=models)
    add_checkpoint_option(parser)
    add("--revision", help="branch, tag or commit of the models that name none")
    add("--image-processor", metavar="ID", help="Hub id or folder of the processor to use in place of the models' own")
    add("--base-model", metavar="ID", help="what LoRA adapters are merged into, if it is not where they say")
    add_trust_options(parser)


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """The option that says what is taken of runs."""
    text = (
        "of each run, a folder with checkpoint-* in it: the best by trainer_state.json, the last, the model at its "
        "top (root), or all (default: root, else best, else last)"
    )
    parser.add_argument("--checkpoint", choices=OF_A_RUN, help=text)


def add_classes_option(parser: argparse.ArgumentParser) -> None:
    """The option for models whose classes differ."""
    text = (
        "of models whose classes differ, those that all have (common) or those of the split; others are left out "
        "(default: all must have the same)"
    )
    parser.add_argument("--classes", choices=("common", "split"), help=text)


def add_trust_options(parser: argparse.ArgumentParser) -> None:
    """The options that allow what may run code."""
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin weights")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which images."""
    add = parser.add_argument
    add("--dataset", help="Hub id or folder; by default what the models' cards agree on")
    add("--dataset-config", help="configuration of the dataset")
    add("--dataset-revision", help="branch, tag or commit of the dataset")
    add("--split", help="split that chooses the soup; by default what the cards agree on, else validation")
    add("--image-column", help="needed if the dataset has several")
    add("--label-column", help="needed if it can't be told")
    add_pixel_option(parser)


def add_pixel_option(parser: argparse.ArgumentParser) -> None:
    """The option that allows large images."""
    text = "pixels that an image may have, as a guard against files that fill the memory (default: Pillow's limit)"
    parser.add_argument("--max-image-pixels", type=pixels, metavar="N", help=text)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how models run over images."""
    add = parser.add_argument
    add("--on-error", choices=("raise", "skip"), default="raise", help="what to do with an unreadable image")
    strangers = "what to do with models that seem to have a different start than the others (default: warn)"
    add("--strangers", choices=("warn", "drop", "keep"), default="warn", help=strangers)
    add("--batchnorm-split", metavar="SPLIT", help="whose images give BatchNorm its statistics anew (default: train)")
    add("--batchnorm-images", type=int, default=1024, metavar="N", help="how many of these to draw (default 1024)")
    batch_size = "images in a forward pass (default: auto: 64 on a CPU, on a GPU as many as pay)"
    add("--batch-size", default="auto", type=number, metavar="N", help=batch_size)
    at_once = "models that see each image while it is there (default: auto, which is as many as fit)"
    add("--models-in-memory", default="auto", type=number, metavar="N", help=at_once)
    pixels = "prepared images cached on disk: off, a size as in 20GB, or auto: up to half of what is free (default)"
    add("--pixel-cache", default="auto", metavar="SIZE", help=pixels)
    workers = "processes that decode beside each that runs models (default: auto, which is none on a CPU)"
    add("--workers", default="auto", type=number, metavar="N", help=workers)
    switched = "auto, on or off; on a GPU auto is"
    layout = f"a memory format that convolutions on GPUs like: {switched} for models that have them (default: auto)"
    add("--channels-last", nargs="?", type=switch, const=True, default="auto", metavar="WHEN", help=layout)
    compiling = f"run the models through torch.compile: {switched} where a probe says that it pays (default: auto)"
    add("--torch-compile", nargs="?", type=switch, const=True, default="auto", metavar="WHEN", help=compiling)
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="float32", help="of the weights while running (default: float32)")
    half = "of the logits on disk (default: float32)"
    add("--logits-dtype", choices=("float32", "float16"), default="float32", help=half)
    pilot = (
        "share of the split, as in 0.1, that logits are computed of first; they say which other images matter "
        "(default: all)"
    )
    add("--pilot", type=float, metavar="SHARE", help=pilot)
    add("--cache-dir", type=Path, help="where logits are cached (default: hf_radin in HF_HOME)")


def add_tracking_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which trackers follow a run."""
    add = parser.add_argument
    trackers = ("trackio", "tensorboard", "wandb")
    add("--log-with", nargs="+", default=[], choices=trackers, help="trackers that follow the run")
    add("--log-dir", type=Path, default=Path("logs"), help="for trackers that write files (default: logs)")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how large a job is."""
    add = parser.add_argument
    images = "how many the split has (default: auto, which is what the dataset says)"
    add("--images", default="auto", type=number, metavar="N", help=images)
    processes = (
        "how many there will be, each as fast as this one is now (default: auto, which is as many as there are)"
    )
    add("--processes", default="auto", type=number, metavar="N", help=processes)
    add("--budget", type=passes, help=f"passes over the split for soups (default: {USUAL})")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how the soup is found, and what is reported of it."""
    add = parser.add_argument
    add("--test-split", help="split that takes no part in the choice, for the final figures")
    overlap = "let the split that proves share images with the one that chooses; recipe and card say how many"
    add("--allow-overlap", action="store_true", help=overlap)
    method = "how the soup is found; only radin has a budget and candidates, and only greedy a rule to accept"
    add("--method", choices=METHODS, default="radin", help=method)
    budget = "passes over the split for soups, as in 8, or time, as in 15m; 0 to measure none"
    add("--budget", help=f"{budget} (default: {USUAL})")
    unmeasured = "with --budget 0, return the soup of the best estimate in place of the best single model"
    add("--unmeasured", action="store_true", help=unmeasured)
    measured = "show soups the telling images first and drop what is behind (race), or all of the split (full)"
    add("--measure", choices=("race", "full"), default="race", help=f"{measured} (radin; default race)")
    add("--hold-out", type=float, metavar="SHARE", help="in place of --test-split a share of the split, as in 0.2")
    kinds = f"kinds of candidates (radin): {PROPOSALS}; with commas"
    add("--proposals", default="auto", metavar="KINDS", help=kinds)
    start = "what all began from: one of the ingredients or, for wise-ft, also a folder or Hub id with another head"
    add("--start", metavar="ID", help=f"{start} (wise-ft, model-stock)")
    heads = "average heads or refit them (radin; default auto: of the best soup, or of each if drawn apart)"
    add("--head", choices=("auto", "average", "refit"), default="auto", help=heads)
    add("--head-split", metavar="SPLIT", help="whose images teach a refitted head (radin; default: those that choose)")
    add("--candidates", type=int, default=200, help="how many to draw of each kind that is drawn (default 200)")
    add("--accept", choices=(">=", ">"), default=">=", help="when greedy keeps an ingredient")
    add("--metric", help=f"what to choose by (default: accuracy; of multi-label checkpoints f1): {METRICS}")
    floors = "what else the soup must keep, as in 'accuracy >= best single - 0.002' or 'recall[melanoma] >= 0.9'"
    add("--keep", action="append", default=[], metavar="FLOOR", help=f"{floors}; may be given several times")
    add("--metrics", default="accuracy", help="what to report beside that, with commas between: any of these")
    add("--seed", type=int, default=0, help="of all that is drawn: candidates, samples, a pilot (default 0)")


def add_soup_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where a soup goes."""
    add = parser.add_argument
    add("--distill", action="store_true", help="then teach its last layers what the ensemble of all knows")
    add("--distill-split", metavar="SPLIT", help="whose images teach them (default: that which chooses)")
    changes = (
        "parquet file for the images (multi-label, pairs of image and class) on which the soup and the best single "
        "model differ (takes a pass more)"
    )
    add("--changes", type=Path, metavar="FILE", help=changes)
    add("--output", type=Path, default=Path("soup"), help="folder for the soup (default: soup)")
    add_adapter_option(parser)
    strict = (
        "exit with status 3 if the soup is worse than the best single model beyond chance on the split that proves"
    )
    add("--strict", action="store_true", help=f"{strict}; it is saved, and not pushed")
    overwrite = "allow an output folder that is not empty, and with --push-to a repository that holds something else"
    add("--overwrite", action="store_true", help=overwrite)
    add("--push-to", metavar="ID", help="repository on the Hub to push the soup to")
    add_card_options(parser)
    add_visibility_option(parser)
    add_verification_option(parser)


def add_distill_options(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-radin distill`."""
    add = parser.add_argument
    add("folder", type=Path, help="a folder that `hf-radin soup` wrote")
    add("--output", type=Path, required=True, help="folder for the soup with distilled last layers")
    tail = "block: the last block and the head; stage: a quarter of the model; or a module, as in vit.layers.10"
    add("--layers", default="block", metavar="L", help=f"{tail} (default: block)")
    add("--no-labels", dest="labels", action="store_false", help="teach only what the ensemble says")
    add("--split", help="whose images teach them (default: that which chose the soup; of --images, train)")
    images = "another dataset whose images teach them, without labels: a folder or a Hub id"
    add("--images", metavar="DATASET", help=images)
    epochs = "how often they are shown each image (default: 4, or as often as makes 400 steps of 32 images)"
    add("--epochs", type=int, metavar="N", help=epochs)
    add("--rate", type=float, default=1e-3, metavar="R", help="of learning, at the start (default: 0.001)")
    budget = "what teaching may take at most: a time, as in 5m, or passes by multiplications (default: no limit)"
    add("--budget", help=budget)
    add("--seed", type=int, default=0, help="of the halves and of the order of images (default: 0)")
    add_moved_options(parser)
    add("--dataset", help="where the images are now, if not where the recipe says")
    add("--cache-dir", type=Path, help="where logits and images are cached (default: hf_radin in HF_HOME)")
    add_pixel_option(parser)
    allowed = "allow images that chose or prove the soup among those that teach"
    add("--allow-overlap", action="store_true", help=allowed)
    add("--overwrite", action="store_true", help="allow an output folder that is not empty")
    add("--license", help="for the card (default: the one it has, or that the models agree on)")


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a pushed card and recipe say."""
    add = parser.add_argument
    private = "leave the names of private ingredients out of the recipe and the card that are pushed"
    add("--hide-private", action="store_true", help=private)
    task = "of a benchmark on the Hub that the accuracy on the held-out split is a result of (for .eval_results)"
    add("--eval-task", metavar="DATASET:TASK", help=task)
    add("--license", help="for the card (default: the one it has, or that the models agree on)")


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """The option that saves an adapter beside a soup."""
    adapter = "write a soup of LoRA adapters as one such adapter, too, in the folder `adapter`; with a rank, cut to it"
    parser.add_argument(
        "--save-adapter", nargs="?", type=rank, const=True, default=False, metavar="RANK", help=adapter
    )


def add_visibility_option(parser: argparse.ArgumentParser) -> None:
    """The option that makes a new repository private."""
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")


def add_verification_option(parser: argparse.ArgumentParser) -> None:
    """The option that leaves out what is done after a push."""
    without = "don't load the pushed model once from the Hub, to compare its predictions of three images"
    parser.add_argument("--no-verify", dest="verify", action="store_false", help=without)


def add_bank_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which bank is searched."""
    add = parser.add_argument
    add("bank", help="folder that `hf-radin logits` named, or dataset repository on the Hub")
    add("--revision", help="branch, tag or commit of a bank on the Hub")
    add_pixel_option(parser)
    add("--cache-dir", type=Path, help="where banks of the Hub are cached (default: hf_radin in HF_HOME)")


def add_average_options(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-radin average`."""
    add = parser.add_argument
    names = "what is averaged, as --models of other commands; of a recipe, where its ingredients are now"
    add("names", nargs="*", metavar="M", help=f"{names}, if not where it says")
    add("--models", nargs="+", default=(), metavar="M", help="the same, behind other options")
    weights = "of the models, in their order; divided by their sum (default: all the same)"
    add("--weights", nargs="+", type=float, metavar="W", help=weights)
    add("--last", type=int, metavar="K", help="take the last K checkpoints of one run, by their steps")
    add("--revision", help="branch, tag or commit of the models that name none")
    common = "of models whose classes differ, those that all have (default: all must have the same)"
    add("--classes", choices=("common",), help=common)
    add("--recipe", type=Path, help="a recipe.json to be cooked again, in place of models and weights")
    add_checkpoint_option(parser)
    add("--start", metavar="ID", help="where the start is now, if the soup is pulled to one")
    processor = "Hub id or folder of the processor to use in place of the models' own; where it is now, of a recipe"
    add("--image-processor", metavar="ID", help=processor)
    add("--base-model", metavar="ID", help="what LoRA adapters are merged into, if it is not where they say")
    add_trust_options(parser)
    add("--output", type=Path, required=True, help="folder to write the checkpoint to")
    add("--dataset", help="of models with BatchNorm, where the images for its statistics are now")
    add("--cache-dir", type=Path, help="where these are cached (default: hf_radin in HF_HOME)")
    add_pixel_option(parser)
    add("--dtype", choices=sorted(DTYPES), help="of the soup (default: as the ingredients)")
    add("--max-shard-size", default=SHARD, help="of a file of weights, as in 5GB (default: %(default)s)")
    add_adapter_option(parser)
    add("--overwrite", action="store_true", help="allow an output folder that is not empty")


def add_moved_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where the checkpoints of a recipe are now, and allow what may run their code."""
    add = parser.add_argument
    add("--models", nargs="+", default=(), help="where the ingredients are now, if not where the recipe says")
    add("--start", metavar="ID", help="where the start is now, if the soup is pulled to one")
    add("--image-processor", metavar="ID", help="where it is now, if a processor was named for the soup")
    add("--base-model", metavar="ID", help="where the base of LoRA adapters is now")
    add_trust_options(parser)


def add_renewal_options(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-radin card`."""
    add = parser.add_argument
    add("folder", type=Path, help="a folder that `hf-radin soup` wrote")
    add("--license", help="for the card (default: the one it has)")
    edited = "record the configuration and image processor as you edited them, where another one than saved is refused"
    add("--accept-changes", action="store_true", help=edited)


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-radin push`."""
    add = parser.add_argument
    add("folder", type=Path, help="a folder that `hf-radin soup` wrote")
    add("repo_id", help="where to, as in org/soup")
    add_visibility_option(parser)
    add_verification_option(parser)
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--revision", help="branch to commit to (default: main)")
    add("--commit-message", help="(default: what it is, in a line)")
    add("--overwrite", action="store_true", help="allow a repository that holds something else")
    add_card_options(parser)
    add("--dry-run", action="store_true", help="say what would be uploaded, and do nothing")


def passes(text: str) -> float:
    """A number of passes over the split."""
    try:
        return float(text)
    except ValueError as error:
        problem = f"{text!r} is no number of passes over the split; how long they take is what `estimate` says"
        raise argparse.ArgumentTypeError(problem) from error


def pixels(text: str) -> int:
    """A number of pixels, of one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pixels")
    return int(text)


def rank(text: str) -> int:
    """A rank, of one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no rank; name one above 0, or none for an exact adapter")
    return int(text)


def switch(text: str) -> bool | str:
    """`auto`, or whether something is on."""
    values: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
    if text not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, on or off")
    return values[text]


def number(text: str) -> int | str:
    """`auto`, or a whole number."""
    return text if text == "auto" else int(text)
