"""Soup, best single model, uniform soup and greedy soup on the digits demo, with seeds for data, training and search.

    python benchmarks/demo_seeds.py --seeds 5

Each seed splits the data, trains the start and 16 fine-tunes, and searches anew; all methods of a seed are measured in
one run on the same 797 test images, which took no part in any choice.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import make_dataset, make_fine_tunes, make_start

import hf_radin

BUDGETS = (1, 8)

# What `head` is, and what a row says of it.
HEADS = {"average": ", averaged head", "auto": ""}


def measure(folder: Path, seed: int, count: int) -> dict[str, float]:
    """Test accuracy, in percent, of each method on one seed's zoo."""
    data = make_dataset(folder / "data", seed=seed)
    start = make_start(folder / "start", data, seed=seed)
    make_fine_tunes(start, data, folder / "runs", count=count, seed=seed)
    ingredients = hf_radin.gather(str(folder / "runs" / "ft-*"))
    bank = hf_radin.compute_logits(ingredients, data, split="validation", cache_dir=folder / "cache")
    test = hf_radin.compute_logits(ingredients, data, split="test", cache_dir=folder / "cache")
    soups = {
        f"RADIN, budget {budget}{name}": hf_radin.radin(bank, budget=budget, head=head, test_split=test, seed=seed)
        for budget in BUDGETS
        for head, name in HEADS.items()
    }
    last = soups[f"RADIN, budget {BUDGETS[-1]}"]
    accuracies = {name: last.accuracy(name, "test") for name in ("best single", "uniform", "ensemble")}
    accuracies["greedy"] = hf_radin.greedy(bank, test_split=test).accuracy("soup", "test")
    accuracies |= {name: soup.accuracy("soup", "test") for name, soup in soups.items()}
    return {name: 100 * value for name, value in accuracies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=16, help="fine-tunes of each seed")
    args = parser.parse_args()
    logging.getLogger("hf_radin").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), seed, args.count))
    print("| method | passes, at most | test accuracy, mean | minus best single, mean ± sd | each seed |")
    print("|---|---:|---:|---:|---|")
    models = args.count
    passes = {"best single": models, "uniform": 1, "ensemble": models, "greedy": 2 * models - 1}
    for budget in BUDGETS:  # the uniform soup is beside it, and so is a pass to refit the head
        passes |= {f"RADIN, budget {budget}, averaged head": models + budget + 1}
        passes |= {f"RADIN, budget {budget}": models + budget + 2}
    for name in rows[0]:
        values = [row[name] for row in rows]
        gains = [row[name] - row["best single"] for row in rows]
        spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
        each = ", ".join(f"{gain:+.2f}" for gain in gains)
        print(
            f"| {name} | {passes[name]} | {statistics.mean(values):.2f}% "
            f"| {statistics.mean(gains):+.2f} ± {spread:.2f} | {each} |"
        )


if __name__ == "__main__":
    main()
