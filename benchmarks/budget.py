"""What the budget of a search buys, on two zoos of fine-tunes of Fashion-MNIST, against the greedy soup.

    python benchmarks/budget.py --folder zoo

Zoo "alike" is 16 ResNets with BatchNorm and one learning rate, which differ in seed, augmentation and the 2 000 images
that they saw. Zoo "spread" is 32 ViTs with learning rates spread over a factor of 30. Both are made with
`examples/finetune_sweep.py`. Each seed of the search draws its candidates and samples anew. A pass is as many images
through one model as the validation split has. Heads are averaged: what refitting the one of the result adds, at the
same cost for each search, is in `sweeps.py`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from zoo import fashion

import hf_radin
from hf_radin.recipes.gaps import Gaps
from hf_radin.recipes.propose import FROM_START, best_subsets, monte_carlo, propose
from hf_radin.search.measure import measured_soup
from hf_radin.search.race import Budget, Entry, RaceOptions, race
from hf_radin.search.reporter import predict

ROOT = Path(__file__).parent.parent
VALIDATION = 10_000
TRAIN = 40_000

BUDGETS = (1, 1.5, 2, 3, 4, 6, 8)

# name: architecture, how many fine-tunes, lowest and highest learning rate, share of the images that each sees
ZOOS: dict[str, tuple[fashion.Architecture, int, float, float, float]] = {
    "alike": ("resnet", 16, 3e-3, 3e-3, 0.05),
    "spread": ("vit", 32, 1e-4, 3e-3, 0.25),
}


def make_zoo(folder: Path, name: str, seed: int) -> Path:
    """The fine-tunes `ft-*` of a zoo; what is there already is not made again."""
    architecture, count, low, high, fraction = ZOOS[name]
    data = fashion.make_data(folder / "fashion-mnist", train=TRAIN, validation=VALIDATION)
    start = (fashion.Run("start", None, 1, epochs=8, images=10_000),)
    fashion.make(folder / f"start-{architecture}", data, start, architecture, seed)
    command = [ROOT / "examples" / "finetune_sweep.py", "--model", folder / f"start-{architecture}" / "start"]
    command += ["--dataset", data, "--output", folder / name, "--count", count, "--learning_rates", low, high]
    command += ["--epochs", 2, "--fraction", fraction, "--seed", seed]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    return folder / name


@dataclass(frozen=True)
class Zoo:
    """Fine-tunes with their logits on both splits, and the greedy soup."""

    name: str
    bank: hf_radin.LogitBank
    test: hf_radin.LogitBank
    greedy: hf_radin.Soup

    @property
    def models(self) -> int:
        return len(self.bank.ingredients)

    def passes(self, soup: hf_radin.Soup) -> float:
        """All that a soup took: logits, measuring, and BatchNorm statistics estimated anew for each soup."""
        return soup.report.total_passes

    def on_test(self, recipe: hf_radin.Recipe) -> float:
        return float((predict(self.test, recipe) == self.test.labels).mean())


def open_zoo(folder: Path, name: str, seed: int) -> Zoo:
    return read_zoo(name, make_zoo(folder, name, seed), folder)


def read_zoo(name: str, models: Path, folder: Path, images: str = "fashion-mnist") -> Zoo:
    """The fine-tunes `ft-*` among the models, with what is in the folder: the images, and the cache."""
    ingredients = hf_radin.gather(f"{models}/ft-*")
    data, cache = str(folder / images), folder / "cache"
    bank = hf_radin.compute_logits(ingredients, data, cache_dir=cache)
    test = hf_radin.compute_logits(ingredients, data, split="test", cache_dir=cache)
    return Zoo(name, bank, test, hf_radin.greedy(bank, test_split=test))


def show(label: str, values: Sequence[float], unit: str = "", scale: float = 1) -> str:
    """Median with range."""
    middle, low, high = (scale * value for value in (statistics.median(values), min(values), max(values)))
    return f"{label}: {middle:.2f}{unit} ({low:.2f} to {high:.2f})"


def baselines(zoo: Zoo) -> None:
    rows = [("best single", hf_radin.best_single(zoo.bank, test_split=zoo.test), zoo.models)]
    rows += [("uniform", hf_radin.uniform(zoo.bank, test_split=zoo.test), 1)]
    rows += [("greedy", zoo.greedy, 2 * zoo.models - 1)]
    decided = len(zoo.bank.pruned().decided) / len(zoo.bank)
    print(f"\n## {zoo.name}: {zoo.models} models, {decided:.0%} of the images are decided\n")
    print("| | validation | test | passes |\n|---|---:|---:|---:|")
    for name, soup, passes in rows:
        accuracies = " | ".join(f"{100 * soup.accuracy('soup', split):.2f}" for split in ("validation", "test"))
        print(f"| {name} | {accuracies} | {passes} |")
    ensemble = " | ".join(f"{100 * zoo.greedy.accuracy('ensemble', split):.2f}" for split in ("validation", "test"))
    print(f"| ensemble of all | {ensemble} | {zoo.models} |")


def averaged(bank: hf_radin.LogitBank, **options: Any) -> hf_radin.Soup:
    """The soup of a search in which heads are averaged."""
    return hf_radin.radin(bank, head="average", **options)


def reached(zoo: Zoo, banks: Sequence[hf_radin.LogitBank], name: str) -> None:
    """Passes until the validation accuracy of the greedy soup is reached, with a bank for each seed."""
    goal, greedy = zoo.greedy.accuracy("soup", "validation"), zoo.passes(zoo.greedy)
    ratios, gains, missed, validation = [], [], 0, []
    for seed, bank in enumerate(banks):
        for budget in BUDGETS:
            soup = averaged(bank, budget=budget, seed=seed)
            if soup.accuracy("soup", "validation") >= goal:
                break
        else:
            missed += 1
        ratios.append(zoo.passes(soup) / greedy)
        validation.append(soup.accuracy("soup", "validation") - goal)
        gains.append(zoo.on_test(soup.recipe) - zoo.greedy.accuracy("soup", "test"))
    print(show(f"- {name}: passes over greedy's {greedy:.1f} until its validation accuracy is reached", ratios))
    if missed:
        print(f"  - {missed} of {len(banks)} did not with a budget of {BUDGETS[-1]}: their ratio is what they spent")
    print(show("  - validation accuracy less greedy's, points", validation, scale=100))
    half = 1.96 * np.std(gains, ddof=1) / len(gains) ** 0.5
    mean = 100 * np.mean(gains)
    print(f"  - test accuracy less greedy's, points: mean {mean:+.2f} +- {100 * half:.2f} (95% over seeds)")


def second_stage(zoo: Zoo, seeds: int) -> None:
    """The same eight candidates, raced and measured in full."""
    share, lost, same = [], [], 0
    best = zoo.bank.answers(zoo.bank.row(hf_radin.best_single(zoo.bank).recipe))
    for seed in range(seeds):
        candidates = propose(zoo.models, proposals="monte-carlo", seed=seed)
        rows = np.array([row for row, kind in enumerate(candidates.proposals) if kind == "monte-carlo"])
        scores = zoo.bank.score(candidates.weights[rows])
        entries = []
        for row in rows[np.argsort(-scores, kind="stable")[:8]]:
            recipe = zoo.bank.recipe(candidates.weights[row])
            entries.append(Entry(recipe, "monte-carlo", float(zoo.bank.score(candidates.weights[row])[0])))
        picks = []
        for full in (False, True):
            measured = race(zoo.bank, entries, RaceOptions(Budget(), full, seed), best=best).measurements
            whole = [entry.known for entry in measured if entry.images == len(zoo.bank)]
            picks.append((max(whole, default=0.0), sum(entry.images for entry in measured)))
        (raced, images), (measured_all, all_images) = picks
        single = float(best.hits.mean())  # which is returned where no soup is better
        share.append(images / all_images)
        lost.append(max(measured_all, single) - max(raced, single))
        same += lost[-1] <= 0.0005
    print(show("- eight candidates raced: images over those of measuring all in full", share))
    print(show(f"  - validation accuracy lost, points ({same} of {seeds} within 0.05)", lost, scale=100))


def kinds(zoo: Zoo, seeds: int, budget: float = 4) -> None:
    """What each kind of candidates gains over the paper's procedure, with the same budget."""
    names = ["monte-carlo", "dirichlet", "forward", "local", "line", *["subsets"] * (zoo.models <= 20), "auto"]
    runs = {
        "the paper's": {"proposals": "monte-carlo", "measure": "full"},
        **{kind: {"proposals": kind} for kind in names},
    }
    print(f"\nBudget {budget}; medians, and means with 95% over seeds:\n")
    print("| candidates | validation | test | test less the paper's, points |\n|---|---:|---:|---:|")
    test: dict[str, np.ndarray] = {}
    for name, options in runs.items():
        soups = [averaged(zoo.bank, budget=budget, seed=seed, **options) for seed in range(seeds)]
        test[name] = np.array([zoo.on_test(soup.recipe) for soup in soups])
        gain = 100 * (test[name] - test["the paper's"])
        validation = statistics.median(soup.accuracy("soup", "validation") for soup in soups)
        cells = f"{100 * validation:.2f} | {100 * np.median(test[name]):.2f}"
        print(f"| {name} | {cells} | {gain.mean():+.2f} +- {1.96 * gain.std(ddof=1) / seeds**0.5:.2f} |", flush=True)


def with_start(folder: Path, zoo: Zoo, seeds: int, budget: float = 4) -> None:
    """What mixing with the start gains over the paper's procedure, which has no such ingredient."""
    start = folder / f"start-{ZOOS[zoo.name][0]}" / "start"
    ingredients = hf_radin.gather([str(start), *zoo.bank.ingredients.ids])
    banks = [
        hf_radin.compute_logits(ingredients, str(folder / "fashion-mnist"), split=split, cache_dir=folder / "cache")
        for split in ("validation", "test")
    ]
    for kind in (*FROM_START, "auto,wise-ft"):
        validation, gains = [], []
        for seed in range(seeds):
            full = {"proposals": "monte-carlo", "measure": "full"}
            paper = averaged(zoo.bank, budget=budget, seed=seed, **full)
            soup = averaged(banks[0], budget=budget, seed=seed, proposals=kind, start=str(start))
            validation.append(soup.accuracy("soup", "validation"))
            on_test = float((predict(banks[1], soup.recipe) == banks[1].labels).mean())
            gains.append(100 * (on_test - zoo.on_test(paper.recipe)))
        half = 1.96 * np.std(gains, ddof=1) / seeds**0.5
        print(
            f"| {kind} | {100 * statistics.median(validation):.2f} | | {np.mean(gains):+.2f} +- {half:.2f} |",
            flush=True,
        )


def predictions(zoo: Zoo, seeds: int, pool: int = 60, count: int = 40) -> None:
    """How well soups are ranked: by their estimates, by what measured soups say of the others, and by a spread.

    V(p) is the spread of a soup's ingredients in weight space, from the products of all pairs; in estimate + k V(p), k
    is fitted on measured soups. Each seed draws its soups from one pool; the uniform soup is measured first.
    """
    bank, models = zoo.bank, zoo.models
    states = [load_file(ingredient.folder / "model.safetensors") for ingredient in bank.ingredients]
    names = [name for name, tensor in states[0].items() if tensor.is_floating_point() and "running" not in name]
    flat = np.stack([np.concatenate([state[name].numpy().ravel() for name in names]) for state in states])
    flat = (flat - flat.mean(axis=0)).astype(np.float64)
    gram = flat @ flat.T
    rows = np.concatenate([np.full((1, models), 1 / models), monte_carlo(models, count=pool, seed=100).weights])
    scores, labels = bank.score(rows), np.asarray(bank.labels)
    trials = [measured_soup(bank, bank.recipe(row), bank.pruned()) for row in rows]
    everything = np.ones(len(bank), dtype=bool)
    measured = np.array([(trial.look(everything) == labels).mean() for trial in trials])
    spreads = rows @ np.diag(gram) - np.einsum("ri,ij,rj->r", rows, gram, rows)
    products = gram / (gram.trace() / models)

    def predicted(known: np.ndarray) -> np.ndarray:
        gaps = Gaps.none(products, bank.pruned())
        for row in known:
            gaps = gaps.learn(rows[row], trials[row].values)
        return gaps.score(labels, rows)

    def by_spread(known: np.ndarray) -> np.ndarray:
        centred, gap = spreads[known] - spreads[known].mean(), measured[known] - scores[known]
        return scores + min(0.0, float(centred @ (gap - gap.mean()) / max(centred @ centred, 1e-12))) * spreads

    ranks: dict[str, list[float]] = {}
    for seed in range(seeds):
        indices = np.append(0, 1 + np.random.default_rng(seed).permutation(pool)[: count - 1])
        indices[1:] = indices[1:][np.argsort(-scores[indices[1:]], kind="stable")]
        left = indices[4:]
        estimates = {"estimate": scores, "estimate and spread, fitted on four measured soups": by_spread(indices[:4])}
        estimates |= {f"prediction after {known} measured": predicted(indices[:known]) for known in (1, 4)}
        for name, values in estimates.items():
            ranks.setdefault(name, []).append(spearman(values[left], measured[left]))
            best = max(measured[left[np.argsort(-values[left], kind="stable")[:4]]])
            ranks.setdefault(f"{name}: its best four, best of them less the best of all, points", []).append(
                100 * (best - max(measured[left]))
            )
    print(f"- rank correlation with the measured accuracy of {count - 4} soups:")
    for name, figures in ranks.items():
        print(show(f"  - {name}", figures))


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (first, second)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def exhaustive(zoo: Zoo) -> None:
    """All subsets of up to twenty models."""
    few = replace(zoo.bank, ingredients=zoo.bank.ingredients[: min(20, zoo.models)])
    few.pruned()
    begun = time.perf_counter()
    best_subsets(len(few.ingredients), few.score)
    print(f"- all subsets of {len(few.ingredients)} models scored: {time.perf_counter() - begun:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="where zoos are made, and found again")
    parser.add_argument("--zoos", nargs="+", choices=ZOOS, default=list(ZOOS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--pilots", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--seed", type=int, default=0, help="of the zoos")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        for name in args.zoos:
            zoo = open_zoo(folder, name, args.seed)
            baselines(zoo)
            print()
            reached(zoo, [zoo.bank] * args.seeds, "logits of all images")
            for share in args.pilots:
                pilots = [
                    hf_radin.compute_logits(
                        zoo.bank.ingredients,
                        str(folder / "fashion-mnist"),
                        pilot=hf_radin.Pilot(share, seed),
                        cache_dir=folder / "cache",
                    )
                    for seed in range(args.seeds)
                ]
                reached(zoo, pilots, f"pilot {share}")
            second_stage(zoo, args.seeds)
            predictions(zoo, args.seeds)
            exhaustive(zoo)
            kinds(zoo, args.seeds)
            with_start(folder, zoo, args.seeds)


if __name__ == "__main__":
    main()
