"""From data to a soup on scikit-learn's digits, without a network: a start, 16 fine-tunes, and their soup.

    python demo.py --output demo

All files stay in the output folder: `demo/soup` is an ordinary transformers checkpoint with its card.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from digits import make_dataset, make_fine_tunes, make_start

import hf_radin

BUDGET = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--count", type=int, default=16, help="how many fine-tunes")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and search")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # it would show one for every load and save
    transformers.utils.logging.set_verbosity_error()
    with stage("data and start"):
        data = make_dataset(args.output / "data", seed=args.seed)
        start = make_start(args.output / "start", data, seed=args.seed)
    with stage(f"{args.count} fine-tunes"):
        make_fine_tunes(start, data, args.output / "runs", count=args.count, seed=args.seed)
    with stage("logits of all on both splits"):
        ingredients = hf_radin.gather(str(args.output / "runs" / "ft-*"))
        cache = args.output / "cache"
        bank = hf_radin.compute_logits(ingredients, data, split="validation", cache_dir=cache)
        test = hf_radin.compute_logits(ingredients, data, split="test", cache_dir=cache)
    with stage("RADIN"):
        soup = hf_radin.radin(bank, budget=BUDGET, test_split=test, seed=args.seed)
    with stage("greedy"):
        greedy = hf_radin.greedy(bank, test_split=test)
    with stage("last layers distilled"):
        distilled = hf_radin.distill(bank, soup, test_split=test)
    print_table(soup, greedy, distilled)
    soup.save_pretrained(args.output / "soup", overwrite=True)
    classify = transformers.pipeline("image-classification", model=str(args.output / "soup"))
    print(f"\n{args.output / 'soup'} is an ordinary checkpoint with a card: pipeline loads it as", end=" ")
    print(f"{type(classify.model).__name__} of {classify.model.num_parameters():,} parameters.")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say how long a part of the demo took."""
    begun = time.perf_counter()
    yield
    print(f"{name:34}{time.perf_counter() - begun:6.1f} s", flush=True)


def print_table(soup: hf_radin.Soup, greedy: hf_radin.Soup, distilled: hf_radin.Soup) -> None:
    """Accuracies on both splits, and forward passes over the validation split that each method spends."""
    models = len(soup.ingredients)
    spent = {result.report.method: result.report.total_passes for result in (soup, greedy)}
    taught = "last layers distilled" if distilled.report.is_distilled else "distilled, not taken"
    rows = [
        ("best single model", soup, "best single", models, 1),
        ("uniform soup", soup, "uniform", 1, 1),
        ("greedy soup", greedy, "soup", spent["greedy"], 1),
        (f"RADIN, budget {BUDGET}", soup, "soup", spent["radin"], 1),
        (taught, distilled, "soup", distilled.report.total_passes, 1),
        (f"ensemble of all {models}", soup, "ensemble", models, models),
    ]
    print(f"\n{'':22}{'validation':>12}{'test':>10}{'passes spent':>15}{'models to run':>15}")
    for title, result, name, passes, run in rows:
        accuracy = [f"{100 * result.accuracy(name, split):.2f}%" for split in ("validation", "test")]
        print(f"{title:22}{accuracy[0]:>12}{accuracy[1]:>10}{passes:>15.3g}{run:>15}")
    images = {result.split: result.images for result in soup.results}
    print(f"validation ({images['validation']} images) chose, test ({images['test']}) did not take part.")
    shown = next(result.images for result in soup.results if (result.name, result.split) == ("uniform", "validation"))
    if shown < images["validation"]:
        print(f"The uniform soup's validation accuracy is an estimate from {shown} images.")


if __name__ == "__main__":
    main()
