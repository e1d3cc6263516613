"""Cosines between the weights of models that share a start and of models that don't, and the alarms of the rule.

    python benchmarks/kinship.py --seeds 1

Each seed trains, on Fashion-MNIST, 15 small ViTs and 15 small ResNets of four families: six fine-tunes of one start
with learning rates a factor of 25 apart, three of a second start, three of the first start's body with new heads, and
three from scratch. The rule is applied to mixtures of these; their names tell which start they have. The last table
shows what a different start costs: the test accuracy of soups of two models, beside that of their ensemble.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from zoo import fashion

import hf_radin
from hf_radin.checkpoints import model as modeling
from hf_radin.ingredients.kinship import KIN, Weights, relate, sample

# Families that share a start are kin. For each mixture: its families, and which of them are strangers to most.
MIXTURES = {
    "one start": (["start-a"], []),
    "one start, some with heads of their own": (["start-a", "heads"], []),
    "two starts": (["start-a", "start-b"], ["start-b"]),
    "one start and three from scratch": (["start-a", "scratch"], ["scratch"]),
    "all": (["start-a", "heads", "start-b", "scratch"], ["start-b", "scratch"]),
}
PAIRS = (
    ("start-a-1", "start-a-3"),
    ("start-a-0", "start-a-5"),
    ("heads-0", "heads-1"),
    ("start-a-1", "start-b-1"),
    ("scratch-0", "scratch-1"),
    ("scratch-0", "start-a-1"),
)


def family(name: str) -> str:
    return name.rpartition("-")[0]


def read_samples(zoo: Path) -> dict[str, Weights]:
    """A sample of the weights of each checkpoint, by its name."""
    samples = {}
    for ingredient in hf_radin.gather(f"{zoo}/*-[0-9]"):
        model = ingredient.load_model(torch.float32)
        samples[ingredient.folder.name] = sample(model, modeling.class_axes(model.config))
    return samples


def relation(a: str, b: str) -> str:
    """What two checkpoints have to do with each other."""
    families = {family(a), family(b)}
    if families <= {"start-a"} or families <= {"start-b"}:
        return "one start, head included"
    return "one start, heads of their own" if families <= {"start-a", "heads"} else "no start in common"


def cosines(samples: dict[str, Weights]) -> Iterator[tuple[str, float]]:
    for a, b in itertools.combinations(samples, 2):
        entries_a, entries_b = (samples[name].entries.astype(np.float64) for name in (a, b))
        yield relation(a, b), float(entries_a @ entries_b / np.linalg.norm(entries_a) / np.linalg.norm(entries_b))


def alarms(samples: dict[str, Weights], families: list[str], strangers: list[str]) -> tuple[int, int, int, int]:
    """Of a mixture: kin that are called strangers, kin, strangers that are found, strangers."""
    mixture = {name: weights for name, weights in samples.items() if family(name) in families}
    called = {relationship.id for relationship in relate(mixture) if not relationship.is_kin}
    true = {name for name in mixture if family(name) in strangers}
    return len(called - true), len(mixture) - len(true), len(called & true), len(true)


def soup_and_ensemble(zoo: Path, data: Path, cache: Path, pair: tuple[str, str]) -> tuple[float, float]:
    """Test accuracy, in percent, of the uniform soup of two and of their ensemble."""
    ingredients = hf_radin.gather([zoo / name for name in pair])
    bank = hf_radin.compute_logits(ingredients, data, split="test", strangers="keep", cache_dir=cache)
    soup = hf_radin.uniform(bank)
    return 100 * soup.accuracy("soup", "test"), 100 * soup.accuracy("ensemble", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep data and zoos here (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the number of threads changes what a model learns
    logging.getLogger("hf_radin").setLevel(logging.ERROR)  # copies and heads are what this is about
    for architecture in ("vit", "resnet"):
        by_relation: dict[str, list[float]] = {}
        counts = {name: np.zeros(4, int) for name in MIXTURES}
        soups: dict[tuple[str, str], list[tuple[float, float]]] = {pair: [] for pair in PAIRS}
        with tempfile.TemporaryDirectory() as temporary:
            for seed in range(args.seeds):
                folder = (args.folder or Path(temporary)) / str(seed)
                data = fashion.make_data(folder / "data", seed=seed)
                zoo = fashion.kinship_zoo(folder / architecture, data, architecture, seed=seed)
                samples = read_samples(zoo)
                for name, value in cosines(samples):
                    by_relation.setdefault(name, []).append(value)
                for name, (families, strangers) in MIXTURES.items():
                    counts[name] += alarms(samples, families, strangers)
                for pair in PAIRS:
                    soups[pair].append(soup_and_ensemble(zoo, data, folder / "cache", pair))
        print(f"\n{architecture}, {args.seeds} seed(s): cosines between the weights of two (kin: above {KIN})\n")
        print("| | pairs | least | median | largest |\n|---|---:|---:|---:|---:|")
        for name, values in by_relation.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"| {name} | {len(values)} | {low:.3f} | {middle:.3f} | {high:.3f} |")
        print("\n| mixture | false alarms | different starts found |\n|---|---:|---:|")
        for name, (false, kin, hits, strangers) in counts.items():
            print(f"| {name} | {false} of {kin} | {hits} of {strangers} |")
        print("\n| soup of two | | soup, test | ensemble, test |\n|---|---|---:|---:|")
        for pair, accuracies in soups.items():
            soup, ensemble = map(statistics.mean, zip(*accuracies, strict=True))
            print(f"| {' + '.join(pair)} | {relation(*pair)} | {soup:.2f}% | {ensemble:.2f}% |")


if __name__ == "__main__":
    main()
