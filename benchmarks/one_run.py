"""What a soup of one run's ten checkpoints gains, where the learning rate stays as it is and where it decays.

    python benchmarks/one_run.py --folder zoos --seeds 5

A run is ten epochs of a small ViT with a pre-trained body, saved after each (`zoo/one_run.py`). What is chosen is
chosen by the validation split, and the figures are those of test images that took no part. Runs are kept in the folder
as SCHEDULE-SEED, and making them again is free.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from sweeps import Row, print_table, quieten
from zoo.one_run import Schedule, one_run

import hf_radin
from hf_radin.search.reporter import predict

SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")

# By how much the weight of a checkpoint falls with each that comes after it.
DECAYS = (0.8, 0.5)


@dataclass(frozen=True)
class Run:
    """The checkpoints of a run in the order of training, with logits on both splits.

    Args:
        average, average_on_test: of two models, the last checkpoint and the exponential average.
    """

    bank: hf_radin.LogitBank
    test: hf_radin.LogitBank
    average: hf_radin.LogitBank
    average_on_test: hf_radin.LogitBank

    @property
    def checkpoints(self) -> int:
        return len(self.bank.ingredients)


def open_run(folder: Path, schedule: Schedule, seed: int) -> Run:
    """The run of a seed, made where it is missing."""
    place = folder / f"{schedule}-{seed}"
    *checkpoints, average = map(str, one_run(place, schedule, seed=seed))
    data, cache = str(place / "fashion-mnist"), place / "cache"
    banks = (
        hf_radin.compute_logits(hf_radin.gather(models), data, split=split, cache_dir=cache)
        for models in (checkpoints, [checkpoints[-1], average])  # a single model is no set of ingredients
        for split in ("validation", "test")
    )
    return Run(*banks)


def of_soup(run: Run, soup: hf_radin.Soup) -> Row:
    validation, test = (100 * soup.accuracy("soup", split) for split in ("validation", "test"))
    return Row(validation, test, soup.report.total_passes)


def of_recipe(run: Run, weights: np.ndarray) -> Row:
    """An average that nobody chose: no checkpoint was run, and no split has to be there."""
    recipe = run.bank.recipe(weights / weights.sum())
    validation, test = (100 * float((predict(bank, recipe) == bank.labels).mean()) for bank in (run.bank, run.test))
    return Row(validation, test, passes=0)


# --- the methods: name, and what it makes of a run with a seed of the search ---


def last(run: Run, seed: int) -> Row:
    return of_recipe(run, np.eye(run.checkpoints)[-1])


def best_single(run: Run, seed: int) -> Row:
    return of_soup(run, hf_radin.best_single(run.bank, test_split=run.test))


def last_checkpoints(count: int, run: Run, seed: int) -> Row:
    return of_recipe(run, (np.arange(run.checkpoints) >= run.checkpoints - count).astype(float))


def decayed(decay: float, run: Run, seed: int) -> Row:
    return of_recipe(run, decay ** np.arange(run.checkpoints)[::-1])


def of_each_step(run: Run, seed: int) -> Row:
    """The exponential average that was kept while the run was trained."""
    banks = (run.average, run.average_on_test)
    validation, test = (100 * float((bank.predict(np.array([0.0, 1.0])) == bank.labels).mean()) for bank in banks)
    return Row(validation, test, passes=0)


def greedy(run: Run, seed: int) -> Row:
    return of_soup(run, hf_radin.greedy(run.bank, test_split=run.test))


def radin(run: Run, seed: int) -> Row:
    return of_soup(run, hf_radin.radin(run.bank, test_split=run.test, seed=seed))


def radin_with_averages(run: Run, seed: int) -> Row:
    """The default search, into which exponential averages and those of the last checkpoints enter."""
    ages = np.arange(run.checkpoints)[::-1]
    rows = [decay**ages for decay in DECAYS] + [(ages < count).astype(float) for count in (3, 5)]
    recipes = [run.bank.recipe(row / row.sum()) for row in rows]
    return of_soup(run, hf_radin.radin(run.bank, recipes=recipes, test_split=run.test, seed=seed))


def ensemble(run: Run, seed: int) -> Row:
    """Not one model but all: as many passes for each new image."""
    row = np.full(run.checkpoints, 1 / run.checkpoints)
    validation, test = (100 * float((bank.predict(row) == bank.labels).mean()) for bank in (run.bank, run.test))
    return Row(validation, test, run.checkpoints)


METHODS: dict[str, Callable[[Run, int], Row]] = {
    "last": last,
    "best single": best_single,
    "uniform": partial(last_checkpoints, 10),
    **{f"uniform of the last {count}": partial(last_checkpoints, count) for count in (3, 5)},
    **{f"checkpoints, each {decay} of the next": partial(decayed, decay) for decay in DECAYS},
    "exponential average of each step": of_each_step,
    "greedy": greedy,
    "RADIN, defaults": radin,
    "RADIN, with these averages": radin_with_averages,
    "ensemble of all": ensemble,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, help="where runs are made, and found again")
    parser.add_argument("--seeds", type=int, default=5, help="how many runs of each schedule, from 0")
    args = parser.parse_args()
    quieten()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        for schedule in SCHEDULES:
            runs = [open_run(folder, schedule, seed) for seed in range(args.seeds)]
            print(f"\n## {schedule} learning rate: {runs[0].checkpoints} checkpoints, {args.seeds} seeds\n")
            print_table(
                {name: [method(run, seed) for seed, run in enumerate(runs)] for name, method in METHODS.items()}
            )


if __name__ == "__main__":
    main()
