"""What computing and caching logits costs, against the bare models and against plain loops.

    python benchmarks/logits.py [--rounds 5] [--seed 0]
    python benchmarks/logits.py --parts overhead peers processes decoded growth batches memory

Images are Fashion-MNIST's. Models are one random checkpoint with a little noise: only time, memory and counts are
measured, which don't depend on what a model learnt. All runs are on the CPU, with one thread a process unless stated
otherwise. Each ratio is of two runs in one round, one after the other. The median of the rounds and its range are
printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor
from zoo.untrained import LABELS, Case, make_models, make_split

import hf_radin
from hf_radin.checkpoints.processor import prepare_image
from hf_radin.images import decode as decoding

CASES = {
    "224": Case("ViT-Ti/16, 224 px", 224, 16, 192, 12, 128),
    "28": Case("a tiny ViT, 28 px", 28, 7, 32, 2, 8192),
}


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def ours(models: Path, data: Path, **options: Any) -> hf_radin.LogitBank:
    """All of it, with nothing in the cache: try each checkpoint, decode, run, put together."""
    ingredients = hf_radin.gather(f"{models}/*")
    with tempfile.TemporaryDirectory() as cache:
        return hf_radin.compute_logits(ingredients, str(data), cache_dir=cache, **options)


def run_all(model: ViTForImageClassification, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [model(pixel_values=batch).logits for batch in batches]


def bare(models: Path, data: Path) -> float:
    """Decode and prepare each image once, then run each model on ready tensors: seconds, without loading them."""
    rows = datasets.load_dataset(str(data), split="validation", streaming=True)
    processor = ViTImageProcessor.from_pretrained(next(models.iterdir()))
    ready: list[torch.Tensor] = []

    def decode() -> None:
        ready.extend(prepare_image(processor, row["image"])["pixel_values"] for row in rows)

    took = seconds(decode)
    batches = torch.stack(ready).split(64)
    for folder in sorted(models.iterdir()):
        model = ViTForImageClassification.from_pretrained(folder)
        with torch.inference_mode():
            took += seconds(partial(run_all, model, batches))
    return took


def pipelines(models: Path, data: Path) -> None:
    """What the documentation of transformers shows: a pipeline a model, over the decoded images."""
    from transformers import pipeline
    from transformers.pipelines.pt_utils import KeyDataset

    rows = datasets.load_dataset(str(data), split="validation")
    for folder in sorted(models.iterdir()):
        classify = pipeline("image-classification", model=str(folder), device="cpu", batch_size=64)
        for _ in classify(KeyDataset(rows, "image"), top_k=len(LABELS), function_to_apply="none"):
            pass


def evaluators(models: Path, data: Path) -> None:
    """The evaluate library's evaluator, a model at a time; its metrics come from the Hub, and this one needs none."""
    import evaluate

    class Accuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            number = datasets.Value("int64")
            return evaluate.MetricInfo("", "", datasets.Features({"predictions": number, "references": number}))

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}

    rows = datasets.load_dataset(str(data), split="validation")
    metric = Accuracy(keep_in_memory=True)
    for folder in sorted(models.iterdir()):
        evaluate.evaluator("image-classification").compute(
            str(folder), rows, metric=metric, label_mapping={name: index for index, name in enumerate(LABELS)}
        )


def show(title: str, ratios: list[float], note: str = "") -> None:
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"- {title}: {middle:.2f} ({low:.2f} to {high:.2f}){note}", flush=True)


def overhead(folder: Path, rounds: int, seed: int) -> None:
    print("\n## Our wall time over one decoding and eight bare passes\n")
    for key, case in CASES.items():
        models, data = folder / f"models-{key}", make_split(folder / f"data-{key}", case.images)
        make_models(models, case, 8, seed)
        pairs = [(seconds(partial(ours, models, data)), bare(models, data)) for _ in range(rounds)]
        mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        note = f"; medians {mine:.1f} s and {theirs:.1f} s, {case.images} images"
        show(case.name, [our_time / bare_time for our_time, bare_time in pairs], note)


def peers(folder: Path, rounds: int, seed: int) -> None:
    print("\n## How many times faster than the loop one would write (28 px)\n")
    case = CASES["28"]
    models, data = folder / "models-peers", make_split(folder / "data-peers", 2048)
    make_models(models, case, 8, seed)
    for name, loop in (("pipeline", pipelines), ("evaluator", evaluators)):
        pairs = [(seconds(partial(loop, models, data)), seconds(partial(ours, models, data))) for _ in range(rounds)]
        theirs, mine = (statistics.median(times) for times in zip(*pairs, strict=True))
        show(
            name,
            [loop_time / our_time for loop_time, our_time in pairs],
            f"; medians {theirs:.1f} s against {mine:.1f} s",
        )


TIMED = """
import json, sys, tempfile, time
import datasets, torch, transformers, hf_radin
from accelerate import Accelerator
accelerator = Accelerator()
models, data, cache, out = sys.argv[1:]
ingredients = hf_radin.gather(models + "/*")
accelerator.wait_for_everyone()
begun = time.perf_counter()
hf_radin.compute_logits(ingredients, data, cache_dir=cache)
if accelerator.is_main_process:
    open(out, "w", encoding="utf-8").write(json.dumps(time.perf_counter() - begun))
"""


def launched(folder: Path, models: Path, data: Path, processes: int) -> float:
    """Seconds of the computation in so many processes of one thread each, imports not counted."""
    (folder / "timed.py").write_text(TIMED, "utf-8")
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [*several, "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", str(folder / "timed.py")]
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *command, models, data, cache, folder / "seconds"],
            check=True,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.DEVNULL,
        )
    return float(json.loads((folder / "seconds").read_text("utf-8")))


def processes(folder: Path, rounds: int, seed: int) -> None:
    print("\n## One process over two, one thread each\n")
    for (key, case), images in zip(CASES.items(), (256, 50_000), strict=True):  # enough to outlast the start
        models, data = folder / f"models-processes-{key}", make_split(folder / f"data-processes-{key}", images)
        make_models(models, case, 8, seed)
        pairs = [[launched(folder, models, data, count) for count in (1, 2)] for _ in range(rounds)]
        single, double = (statistics.median(times) for times in zip(*pairs, strict=True))
        show(
            case.name,
            [first / second for first, second in pairs],
            f"; medians {single:.1f} s and {double:.1f} s, {images} images",
        )


def decoded(folder: Path, rounds: int, seed: int) -> None:
    print("\n## Images decoded for N ingredients and eight measured soups\n")
    case, images = CASES["28"], 1000
    data = make_split(folder / "data-decoded", images)
    opened, open_image = [0], decoding.open_image

    def count(image: Any, mode: str | None = None) -> Image.Image:
        opened[0] += 1
        return open_image(image, mode)

    decoding.open_image = count
    for number in (2, 8, 24):  # one ingredient is no soup
        make_models(folder / f"models-decoded-{number}", case, number, seed)
        opened[0] = 0
        ingredients = hf_radin.gather(f"{folder}/models-decoded-{number}/*")
        with tempfile.TemporaryDirectory() as cache:
            bank = hf_radin.compute_logits(ingredients, str(data), cache_dir=cache)
            hf_radin.radin(bank, budget=8, proposals="monte-carlo", head="average")
        print(f"- {number} ingredients, {images} images: {opened[0]} decoded", flush=True)
    decoding.open_image = open_image


GROWING = """
import json, resource, sys, tempfile, time
import torch, transformers, hf_radin
from PIL import Image
models, data, at_once = sys.argv[1:]
ingredients = hf_radin.gather(models + "/*")
with tempfile.TemporaryDirectory() as warm:  # imports are not what grows
    hf_radin.compute_logits(ingredients[:2], data, cache_dir=warm)
with tempfile.TemporaryDirectory() as cache:
    begun = time.perf_counter()
    hf_radin.compute_logits(ingredients, data, cache_dir=cache, models_in_memory=int(at_once))
    took = time.perf_counter() - begun
print(json.dumps([took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def grown(models: Path, data: Path, at_once: int) -> tuple[float, float]:
    """Seconds and peak MB of one process."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GROWING, models, data, str(at_once)],
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    took, peak = json.loads(run.stdout)
    return took, peak


def growth(folder: Path, rounds: int, seed: int) -> None:
    print("\n## Growth: seconds and peak memory\n")
    case, images = CASES["28"], 2000
    data = make_split(folder / "data-growth", images)
    print("| models | images | in memory | seconds | peak MB |\n|---:|---:|---:|---:|---:|")

    def row(models: int, factor: int) -> tuple[float, float]:
        place = folder / f"models-growth-{models}"
        if not place.exists():
            make_models(place, case, models, seed)
        split = data if factor == 1 else make_split(folder / f"data-growth-{factor}", images * factor)
        costs = [grown(place, split, 4) for _ in range(rounds)]
        took, peak = (statistics.median(values) for values in zip(*costs, strict=True))
        print(f"| {models} | {images * factor} | 4 | {took:.2f} | {peak:.0f} |", flush=True)
        return took, peak

    numbers, factors = (2, 4, 8, 16), (1, 2, 4, 8)
    by_models = [row(number, 1) for number in numbers]
    by_images = [row(4, factor) for factor in factors]
    for what, sizes, costs in (("model", numbers, by_models), (f"{images} images", factors, by_images)):
        for unit, values in zip(("s", "MB"), zip(*costs, strict=True), strict=True):
            slope, start = np.polyfit(sizes, values, 1)
            print(f"- slope: {slope:.3f} {unit} a {what}, from {start:.2f} {unit}")


def batches(folder: Path, rounds: int, seed: int) -> None:
    print("\n## Images a second through one model, by the number of images in a forward pass\n")
    sizes = (4, 16, 64, 256)
    print("| model |" + "".join(f" {size} |" for size in sizes) + "\n|---|" + "---:|" * len(sizes))
    for key, case in CASES.items():
        make_models(folder / f"models-batches-{key}", case, 1, seed)
        model = ViTForImageClassification.from_pretrained(folder / f"models-batches-{key}" / "ft-00")
        images = torch.randn(256, 3, case.side, case.side)

        def run(size: int, model: ViTForImageClassification = model, images: torch.Tensor = images) -> None:
            with torch.inference_mode():
                for batch in images.split(size):
                    model(pixel_values=batch)

        rates: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(rounds):
            for size in sizes:
                rates[size].append(len(images) / seconds(partial(run, size)))
        cells = (
            f" {statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f}) |"
            for values in rates.values()
        )
        print(f"| {case.name} |" + "".join(cells), flush=True)


# Written, opened and scored by a process that may take so many bytes more than it has when all is imported.
LIMITED = """
import json, os, resource, sys, time
from functools import partial
from pathlib import Path
import numpy as np
import torch, transformers, datasets, hf_radin
from hf_radin.logits import bank, passes
from hf_radin.checkpoints import autotune
from hf_radin.search import radin
models, data, cache, limit = sys.argv[1:]

def status(name):
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

ingredients = hf_radin.gather(models + "/*")
most = status("VmData") + int(limit)
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
before, took = status("VmRSS"), []
for step in ("compute", "open", "score"):
    begun = time.perf_counter()
    if step == "compute":
        computed = hf_radin.compute_logits(
            ingredients, data, cache_dir=cache, logits_dtype="float16", pixel_cache="off"
        )
    elif step == "open":
        opened = hf_radin.LogitBank.open(computed.folder)
    else:
        opened.score(np.random.default_rng(0).dirichlet(np.ones(len(ingredients)), size=8))
    took.append(time.perf_counter() - begun)
size = sum(path.stat().st_size for path in opened.folder.glob("logits/*.npy"))
weights = sum(path.stat().st_size for path in Path(models).glob("*/model.safetensors"))
print(json.dumps([size, weights, status("VmHWM") - before, *took]))
"""
MEMORY = Case("a ViT of one layer, 4 px", 4, 4, 8, 1, 50_000)


def memory(folder: Path, rounds: int, seed: int) -> None:
    print("\n## A bank larger than the memory that it may take (once)\n")
    limit, classes, models = 2_000_000_000, 1000, 72
    make_models(folder / "models-memory", MEMORY, models, seed, classes)
    data = make_split(folder / "data-memory", MEMORY.images, MEMORY.side, classes)
    arguments = [folder / "models-memory", data, folder / "cache-memory", limit]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    size, weights, peak, compute, opening, scoring = json.loads(run.stdout)
    print(
        f"- {models} models x {MEMORY.images} images x {classes} classes in float16: {size / 1e9:.1f} GB of logits, "
        f"by a process limited to {limit / 1e9:.1f} GB more than its imports (models: {weights / 1e6:.0f} MB)\n"
        f"- peak resident memory beyond the imports: {peak / 1e6:.0f} MB\n"
        f"- computed in {compute:.0f} s, opened in {opening:.1f} s, 8 recipes scored in {scoring:.0f} s"
    )


PARTS = {part.__name__: part for part in (overhead, peers, processes, decoded, growth, batches, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            PARTS[name](Path(folder), args.rounds, args.seed)


if __name__ == "__main__":
    main()
