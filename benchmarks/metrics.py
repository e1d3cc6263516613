"""What choosing by macro-F1 gains over choosing by accuracy where classes are rare, on zoos that each seed draws anew.

    python benchmarks/metrics.py --folder zoos --seeds 10

A zoo is eight fine-tunes of a small ViT on a Fashion-MNIST with a long tail, some of which are taught the rare classes
more often (`zoo/long_tail.py`). The test split has as many images of each class, and took no part in any choice. Heads
are averaged, so that it is the searches that are compared. Zoos are kept in the folder as long-tail-SEED, and making
them again is free.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from budget import BUDGETS, averaged
from scipy.stats import t as student
from sweeps import quieten, show
from zoo import long_tail

import hf_radin
from hf_radin.metrics.named import Answers, compute_metrics, load_metrics
from hf_radin.search.reporter import predict

CHOSEN_BY = ("accuracy", "f1")

# Metrics for which the passes are counted until greedy by the same metric is reached.
REACHED = ("accuracy", "f1", "balanced_accuracy", "log_loss")

FLOOR = "accuracy >= best single - 0.002"


@dataclass(frozen=True)
class Zoo:
    """Fine-tunes with their logits on both splits."""

    bank: hf_radin.LogitBank
    test: hf_radin.LogitBank

    @property
    def models(self) -> int:
        return len(self.bank.ingredients)


def open_zoo(folder: Path, seed: int, count: int) -> Zoo:
    """The zoo of a seed, made where it is missing."""
    place = long_tail.long_tail_zoo(folder / f"long-tail-{seed}", seed=seed, count=count)
    ingredients = hf_radin.gather([str(place / f"ft-{index:02d}") for index in range(count)])
    data, cache = str(place / "fashion-mnist"), place / "cache"
    banks = (
        hf_radin.compute_logits(ingredients, data, split=split, cache_dir=cache) for split in ("validation", "test")
    )
    return Zoo(*banks)


@dataclass(frozen=True)
class Row:
    """What a method reaches on one zoo: scores in percent, and all passes that it took, logits included.

    Args:
        validation: accuracy on the split that chooses.
        validation_f1: macro-F1 there.
        f1, accuracy: on the test split, where classes are equal.
        as_frequent: accuracy on the test split with each class weighted by its share of the split that chooses.
    """

    validation: float
    validation_f1: float
    f1: float
    accuracy: float
    as_frequent: float
    passes: float


def row_of(zoo: Zoo, known: Answers, proven: Answers, passes: float) -> Row:
    """The row of answers on the split that chooses and on the one that proves."""
    metrics = load_metrics(("accuracy", "f1"))
    before, after = (compute_metrics(metrics, answers) for answers in (known, proven))
    shares = np.bincount(zoo.bank.labels, minlength=proven.classes) / len(zoo.bank)
    weights = shares[proven.labels] / np.bincount(proven.labels, minlength=proven.classes)[proven.labels]
    return Row(
        validation=100 * before["accuracy"],
        validation_f1=100 * before["f1"],
        f1=100 * after["f1"],
        accuracy=100 * after["accuracy"],
        as_frequent=100 * float(proven.hits @ weights),
        passes=passes,
    )


def of_soup(zoo: Zoo, soup: hf_radin.Soup) -> Row:
    banks = (zoo.bank, zoo.test)
    known, proven = (Answers(predict(bank, soup.recipe), np.asarray(bank.labels), len(bank.classes)) for bank in banks)
    return row_of(zoo, known, proven, soup.report.total_passes)


# --- the methods: name, and what it makes of a zoo with a seed of the search ---


def best_single(metric: str, zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, hf_radin.best_single(zoo.bank, metric=metric))


def greedy(metric: str, zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, hf_radin.greedy(zoo.bank, metric=metric))


def radin(metric: str, zoo: Zoo, seed: int, keep: Sequence[str] = ()) -> Row:
    return of_soup(zoo, averaged(zoo.bank, metric=metric, keep=keep, seed=seed))


def uniform(zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, hf_radin.uniform(zoo.bank))


def ensemble(zoo: Zoo, seed: int) -> Row:
    """Not one model but all: as many passes for each new image."""
    row = np.full(zoo.models, 1 / zoo.models)
    return row_of(zoo, zoo.bank.answers(row), zoo.test.answers(row), zoo.models)


SEARCHES = {"best single": best_single, "greedy": greedy, "RADIN": radin}

METHODS: dict[str, Callable[[Zoo, int], Row]] = {
    **{f"{name} by {metric}": partial(search, metric) for name, search in SEARCHES.items() for metric in CHOSEN_BY},
    f"RADIN by f1, {FLOOR}": partial(radin, "f1", keep=(FLOOR,)),
    "uniform": uniform,
    "ensemble of all": ensemble,
}


def with_interval(values: Sequence[float]) -> str:
    """Mean with the half width of its 95% interval over seeds, by Student's t."""
    if len(values) < 2:
        return f"{statistics.mean(values):+.2f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ± {half:.2f}"


def print_scores(table: dict[str, list[Row]]) -> None:
    """One line for each method: its rows are those of the seeds, in the same order for all."""
    print("| | validation accuracy | validation F1 | test F1 | test accuracy | with validation's classes | passes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, rows in table.items():
        columns = (
            [row.validation for row in rows],
            [row.validation_f1 for row in rows],
            [row.f1 for row in rows],
            [row.accuracy for row in rows],
            [row.as_frequent for row in rows],
        )
        cells = [*map(show, columns), f"{statistics.mean(row.passes for row in rows):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def print_gains(table: dict[str, list[Row]]) -> None:
    """What each search gains on the test split where it chooses by F1, less where it chooses by accuracy."""
    print("\n| by f1 less by accuracy | test F1 | test accuracy | with validation's classes | F1, each seed |")
    print("|---|---:|---:|---:|---|")
    for name in SEARCHES:
        pairs = list(zip(table[f"{name} by f1"], table[f"{name} by accuracy"], strict=True))
        gains = [first.f1 - second.f1 for first, second in pairs]
        cells = [
            with_interval(gains),
            with_interval([first.accuracy - second.accuracy for first, second in pairs]),
            with_interval([first.as_frequent - second.as_frequent for first, second in pairs]),
            ", ".join(f"{gain:+.2f}" for gain in gains),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def print_floor(table: dict[str, list[Row]]) -> None:
    """What the floor costs in F1 and keeps of accuracy, against the best single model by F1."""
    print("\n| less best single by f1 | validation accuracy | test F1 | test accuracy | with validation's classes |")
    print("|---|---:|---:|---:|---:|")
    single = table["best single by f1"]
    for name in ("RADIN by accuracy", "RADIN by f1", f"RADIN by f1, {FLOOR}"):
        pairs = list(zip(table[name], single, strict=True))
        cells = [
            with_interval([row.validation - alone.validation for row, alone in pairs]),
            with_interval([row.f1 - alone.f1 for row, alone in pairs]),
            with_interval([row.accuracy - alone.accuracy for row, alone in pairs]),
            with_interval([row.as_frequent - alone.as_frequent for row, alone in pairs]),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


# --- passes ---


@dataclass(frozen=True)
class Reached:
    """What a search took until it was as good as greedy by the same metric on the split that chooses.

    Args:
        ratio: its passes over greedy's, logits included.
        of_soups: the same without logits.
        is_soup: whether greedy's result is one; else it is the best single model, which the search has from the start.
        is_reached: whether it was as good; else passes are those that it spent with the largest budget.
        lead: by how much it is better than greedy there, in hundredths.
    """

    ratio: float
    of_soups: float
    is_soup: bool
    is_reached: bool
    lead: float


def reached(zoo: Zoo, seed: int, name: str) -> Reached:
    (metric,) = load_metrics(name)
    rival = hf_radin.greedy(zoo.bank, metric=name)
    for budget in BUDGETS:
        soup = averaged(zoo.bank, metric=name, budget=budget, seed=seed)
        lead = metric.rank(on_validation(soup, name)) - metric.rank(on_validation(rival, name))
        if lead >= 0:
            break
    ours, theirs = soup.report.total_passes, rival.report.total_passes
    of_soups = (ours - zoo.models) / (theirs - zoo.models)
    return Reached(ours / theirs, of_soups, not rival.recipe.is_single, lead >= 0, 100 * lead)


def on_validation(soup: hf_radin.Soup, name: str) -> float:
    """A metric of a soup on the split that chose it."""
    (result,) = (row for row in soup.results if (row.name, row.split) == ("soup", "validation"))
    return result.metrics[name]


def print_reached(zoos: Sequence[Zoo]) -> None:
    print(
        "\n| | passes over greedy's | without logits | greedy's is a soup | not reached | better by, in hundredths |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name in REACHED:
        rows = [reached(zoo, seed, name) for seed, zoo in enumerate(zoos)]
        cells = [
            with_range([row.ratio for row in rows]),
            with_range([row.of_soups for row in rows]),
            f"{sum(row.is_soup for row in rows)} of {len(rows)}",
            f"{sum(not row.is_reached for row in rows)} of {len(rows)}",
            with_range([row.lead for row in rows], "+"),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def with_range(values: Sequence[float], sign: str = "") -> str:
    """Median with range."""
    middle, low, high = (f"{value:{sign}.2f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, help="where zoos are made, and found again")
    parser.add_argument("--seeds", type=int, default=10, help="how many zoos, from 0")
    parser.add_argument("--count", type=int, default=8, help="fine-tunes of each zoo")
    args = parser.parse_args()
    quieten()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        zoos = [open_zoo(folder, seed, args.count) for seed in range(args.seeds)]
        print(f"\n## {args.count} models, {args.seeds} seeds\n")
        table = {name: [method(zoo, seed) for seed, zoo in enumerate(zoos)] for name, method in METHODS.items()}
        print_scores(table)
        print_gains(table)
        print_floor(table)
        print_reached(zoos)


if __name__ == "__main__":
    main()
