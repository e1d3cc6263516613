"""Time for scoring recipes from only the classes that can win, and from all classes mixed densely.

    python benchmarks/ensemble.py [--rounds 5] [--seed 0] [--folder DIR]
    python benchmarks/ensemble.py --images 4000 --classes 1000 --models 72 --parts synthetic

`synthetic` is a bank of ImageNet's size in float16, made to resemble fine-tunes of one start: images are noisy
prototypes of their class in a space of 128 features, and models differ in the features that they see and in their
heads. `real` is fine-tunes of a small ResNet on Fashion-MNIST, made by `zoo/fashion.py`, on the validation split.

The dense computation is a plain one in torch, on all cores: for each block of images, one matrix product in float32
for all recipes, then a check whether the label's logit is the largest. Reading and converting the logits is timed
apart and not counted. Both computations run in each round; the median of the rounds and its range are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import torch
from zoo import fashion

import hf_radin
from hf_radin.recipes import ensemble, scoring
from hf_radin.recipes.pruning import prune

CORES = len(os.sched_getaffinity(0))
FEATURES = 128

# How far an image is from its prototype, and how differently models see it: singles near 0.71, their ensemble 0.73.
SPREAD, VIEW, HEAD = 1.43, 0.28, 0.03

# A process that imports its libraries, then prunes and scores, and prints how high its memory rose.
MEMORY = """
import json, sys
from pathlib import Path
import numpy as np
from hf_radin.recipes import ensemble, scoring
from hf_radin.recipes.pruning import prune

def status(name):
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

folder, models, threads, recipes = Path(sys.argv[1]), *map(int, sys.argv[2:])
logits = [ensemble.Stored.of(np.load(folder / f"{model}.npy", mmap_mode="r")) for model in range(models)]
before = status("VmRSS")
pruned = prune(logits, threads=threads)
rows = np.random.default_rng(0).dirichlet(np.ones(models), size=recipes)
scoring.count_hits(pruned, np.load(folder / "labels.npy"), rows)
print(json.dumps([before, status("VmHWM"), status("RssAnon")]))
"""


def make_bank(folder: Path, images: int, classes: int, models: int, seed: int, block: int = 1000) -> None:
    """Write `labels.npy` and for each model `NUMBER.npy`, a block of images at a time."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / FEATURES**0.5

    prototypes = torch.nn.functional.normalize(noise(classes, FEATURES), dim=1)
    labels = torch.randint(classes, (images,), generator=generator)
    seen = prototypes[labels] + 2 * SPREAD * noise(images, FEATURES)
    for model in range(models):
        head = 10 * (prototypes + HEAD * noise(classes, FEATURES))
        out = np.lib.format.open_memmap(folder / f"{model}.npy", "w+", np.float16, (images, classes))
        for start in range(0, images, block):
            part = seen[start : start + block]
            out[start : start + block] = ((part + 2 * VIEW * noise(*part.shape)) @ head.T).half().numpy()
        del out
    np.save(folder / "labels.npy", labels.numpy())


def dense(logits: list[ensemble.Stored], labels: np.ndarray, recipes: np.ndarray) -> tuple[np.ndarray, float]:
    """Hits `(recipes,)`, and the seconds that mixing and comparing took; ties are hits."""
    rows = torch.from_numpy(recipes).float()
    samples, classes = logits[0].shape
    step = max(1, min(samples, 256_000 // classes))
    hits, spent = torch.zeros(len(rows), dtype=torch.int64), 0.0
    mixed = torch.empty(len(rows), step * classes)
    for start in range(0, samples, step):
        block = torch.stack([torch.from_numpy(np.asarray(array[start : start + step])) for array in logits]).float()
        target = torch.from_numpy(labels[start : start + step])
        begun = time.perf_counter()
        out = mixed[:, : block[0].numel()]
        torch.mm(rows, block.view(len(logits), -1), out=out)
        scores = out.view(len(rows), -1, classes)  # (recipes, samples, classes)
        label_scores = scores.gather(2, target[None, :, None].expand(len(rows), -1, 1))[..., 0]
        hits += (label_scores >= scores.amax(dim=2)).sum(dim=1)
        spent += time.perf_counter() - begun
    return hits.numpy(), spent


Result = TypeVar("Result")


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    begun = time.perf_counter()
    return run(), time.perf_counter() - begun


def spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def compare(logits: list[ensemble.Stored], labels: np.ndarray, rounds: int, seed: int, few: int, many: int) -> None:
    """Print the table of one bank; `few` recipes are scored densely and `many` from what is pruned."""
    models = len(logits)
    generator = np.random.default_rng(seed)
    recipes = generator.dirichlet(np.ones(models), size=many)
    columns: dict[str, list[float]] = {}
    for _ in range(rounds):
        pruned, pruning_took = timed(partial(prune, logits, threads=CORES))
        (hits, mixing), whole = timed(partial(dense, logits, labels, recipes[:few]))
        pruned_hits, took = timed(partial(scoring.count_hits, pruned, labels, recipes))
        _, single = timed(partial(scoring.count_hits, pruned, labels, recipes[:1]))
        if np.abs(pruned_hits[:few] - hits).max() > max(5, 1e-3 * len(labels)):  # ties are hits there; float32 rounds
            raise AssertionError(f"hits differ: {pruned_hits[:few]} against {hits}")
        for name, value in {
            "dense": few / mixing,
            "pruned": many / took,
            "ratio": many / took * mixing / few,
            "pruning": pruning_took,
            "in dense recipes": pruning_took / (mixing / few),
            "reading": pruning_took / (40 * mixing / few + whole - mixing),
            "one": 1e3 * single,
        }.items():
            columns.setdefault(name, []).append(value)
    checked = np.concatenate([np.eye(models)[:1], recipes[:1], np.full((1, models), 1 / models)])
    expected = ensemble.count_hits(logits, labels, checked)
    if (scoring.count_hits(pruned, labels, checked) != expected).any():
        raise AssertionError("the dense reference in float64 has other hits")
    accuracy = scoring.count_hits(pruned, labels, np.concatenate([np.eye(models), checked[2:]])) / len(labels)
    size = sum(array.nbytes for array in (pruned.logits, pruned.classes)) / 1e6
    print(f"Singles {accuracy[:-1].mean():.3f}, their ensemble {accuracy[-1]:.3f}.")
    print(
        f"{len(pruned.decided) / len(labels):.0%} of the images are decided; {len(pruned.classes) / len(labels):.1f} "
        f"classes an image are left, in {size:.1f} MB.\n"
    )
    print("| | median (range) |\n|---|---:|")
    print(f"| recipes a second, dense ({few} at a time, {CORES} cores) | {spread(columns['dense'], '.1f')} |")
    print(f"| recipes a second, pruned ({many} at a time) | {spread(columns['pruned'], '.0f')} |")
    print(f"| ratio | **{spread(columns['ratio'], '.0f')}** |")
    print(f"| pruning, seconds | {spread(columns['pruning'], '.2f')} |")
    print(f"| pruning, in recipes scored densely | {spread(columns['in dense recipes'], '.0f')} |")
    print(f"| the same, over 40 recipes and reading the bank for them | {spread(columns['reading'], '.2f')} |")
    print(f"| one recipe alone, pruned, milliseconds | {spread(columns['one'], '.1f')} |")


def synthetic(folder: Path, args: argparse.Namespace) -> None:
    place = folder / f"bank-{args.images}-{args.classes}-{args.models}-{args.seed}"
    if not (place / "labels.npy").exists():
        place.mkdir(parents=True, exist_ok=True)
        make_bank(place, args.images, args.classes, args.models, args.seed)
    logits = [ensemble.Stored.of(np.load(place / f"{model}.npy", mmap_mode="r")) for model in range(args.models)]
    size = args.images * args.classes * args.models * 2 / 1e9
    print(f"\n## {args.images} x {args.classes} x {args.models} in float16, {size:.1f} GB, synthetic\n")
    compare(logits, np.load(place / "labels.npy"), args.rounds, args.seed, 40, 2000)
    command = [sys.executable, "-c", MEMORY, str(place), str(args.models), str(CORES), "2000"]
    before, peak, anonymous = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"| memory of a process that prunes and scores 2000: its peak, of that before, MB | {peak / 1e6:.0f}, "
        f"{before / 1e6:.0f} |\n| its own memory (RssAnon) when it is done, MB | {anonymous / 1e6:.0f} |"
    )


def real(folder: Path, args: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes what a model learns
    data = fashion.make_data(folder / "data", seed=args.seed)
    zoo = fashion.resnet_zoo(folder / "resnets", data, seed=args.seed)
    bank = hf_radin.compute_logits(hf_radin.gather(f"{zoo}/ft-*"), data, cache_dir=folder / "cache")
    torch.set_num_threads(threads)
    logits = [ensemble.Stored.of(bank.logits(index)) for index in range(len(bank.ingredients))]
    print(f"\n## {len(bank)} x {len(bank.classes)} x {len(logits)} in float32: ResNets on Fashion-MNIST\n")
    compare(logits, np.asarray(bank.labels), args.rounds, args.seed, 2000, 2000)


PARTS = {part.__name__: part for part in (synthetic, real)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=26_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--models", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep banks and zoos here (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.parts:
            PARTS[name](args.folder or Path(temporary), args)


if __name__ == "__main__":
    main()
