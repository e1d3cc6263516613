"""Time and memory for averaging files: hf_radin, mergekit, a plain loop over state dicts, and the disk alone.

    pip install mergekit==0.1.5 --target DIR   # with its own dependencies; hf_radin does not need it
    python benchmarks/average.py --mergekit DIR
    python benchmarks/average.py --by-name

Sixteen checkpoints of the size of a ViT-B in float32 and eight of a ViT-L in bfloat16, with random weights. Each
program is a separate process that writes the same uniform soup. hf_radin is `hf-radin average --recipe`, on the
machine that made the recipe: files with the names, sizes and times in the recipe are not hashed again. The programs
take turns, and medians and ranges are of the ratios within a round. Memory is the largest private memory (RssAnon) of
a process, sampled a thousand times a second. Pages of mapped files don't count.

With `--by-name`, eight checkpoints of the size of a ViT-B are averaged by `hf-radin average MODELS`, which looks at
them, hashes them and writes a recipe and a card, and by the plain loop, which also imports transformers. Time is that
of whole processes from start to exit, and that of all their threads on processors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import hf_radin
from hf_radin.ingredients.card_metadata import describe_ingredient
from hf_radin.logits.manifest import DataRecord
from hf_radin.recipes.recipe import Measurement
from hf_radin.soup.report import SearchReport, versions

SIZES = {
    "ViT-B, float32": (16, torch.float32, {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "ViT-L, bfloat16": (8, torch.bfloat16, {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}),
}

# As in the code of Model Soups: state dicts one after the other, added up on the CPU.
LOOP = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
folders, output = sys.argv[1:-1], sys.argv[-1]
soup = None
for folder in folders:
    state = load_file(Path(folder) / "model.safetensors")
    if soup is None:
        soup = {name: tensor.clone() * (1 / len(folders)) for name, tensor in state.items()}
    else:
        soup = {name: tensor.clone() * (1 / len(folders)) + soup[name] for name, tensor in state.items()}
Path(output).mkdir()
save_file(soup, Path(output) / "model.safetensors", {"format": "pt"})
"""


# The same as somebody would write it who saves the configuration, too.
LOOP_OF_TRANSFORMERS = "import torch, transformers" + LOOP


def make(folder: Path, count: int, dtype: torch.dtype, size: dict[str, int]) -> list[Path]:
    config = ViTConfig(**size, intermediate_size=4 * size["hidden_size"], num_labels=1000)
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(folder / f"ft-{seed}")
        ViTForImageClassification(config).to(dtype).save_pretrained(made[-1])
        ViTImageProcessor().save_pretrained(made[-1])
    return made


@dataclass(frozen=True)
class Cost:
    seconds: float
    private: int
    processor: float = 0.0


def run(command: Sequence[str], environment: dict[str, str]) -> Cost:
    """A process from its start to its end, and the most private memory that it had."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            most = max(most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.001)
    if process.wait():
        raise RuntimeError(f"{' '.join(command[:4])} ended with {process.returncode}")
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, most, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def read_and_write(folders: Sequence[Path], output: Path) -> Cost:
    """What the disk takes: all bytes of the input read once, and as many as the output has written, and flushed."""
    begun = time.perf_counter()
    subprocess.run(
        ["cat", *(folder / "model.safetensors" for folder in folders)], stdout=subprocess.DEVNULL, check=True
    )
    output.mkdir()
    with (folders[0] / "model.safetensors").open("rb") as source, (output / "model.safetensors").open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 22)
        target.flush()
        os.fsync(target.fileno())
    return Cost(time.perf_counter() - begun, 0)


def write_recipe(folders: Sequence[Path], path: Path) -> None:
    """Write a recipe of the folders' uniform soup, as a search does."""
    ingredients = hf_radin.gather([str(folder) for folder in folders])
    recipe = hf_radin.Recipe.uniform(ingredients.ids)
    report = SearchReport(
        recipe=recipe,
        method="uniform",
        processor={},
        classes=ingredients.labels,
        data=DataRecord("none", "none"),
        ingredients=tuple(map(describe_ingredient, ingredients)),
        measurements=(Measurement(recipe, "uniform", 0.0, None, 0),),
        versions=versions(),
    )
    path.write_text(report.text, encoding="utf-8")


def in_process(folders: Sequence[Path], output: Path) -> Cost:
    """Our averaging alone, without the start of an interpreter and without looking for ingredients."""
    ingredients = hf_radin.gather([str(folder) for folder in folders])
    begun = time.perf_counter()
    hf_radin.average(ingredients, hf_radin.Recipe.uniform(ingredients.ids), output=output)
    return Cost(time.perf_counter() - begun, 0)


def largest_error(folders: Sequence[Path], output: Path) -> float:
    """The largest difference from the average in float64, relative to the largest number of its tensor."""
    made = load_file(output / "model.safetensors")
    states = [load_file(folder / "model.safetensors") for folder in folders]
    worst = 0.0
    for name, tensor in made.items():
        exact = sum(state[name].double() for state in states) / len(states)
        worst = max(worst, float((tensor.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)))
    return worst


def cold(folders: Sequence[Path]) -> None:
    """Ask the system to forget these files."""
    os.sync()
    for folder in folders:
        with (folder / "model.safetensors").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--mergekit", type=Path, help="the folder with mergekit; without it that side is left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made")
    parser.add_argument("--by-name", action="store_true", help="compare averages of what is named, without a recipe")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        if args.by_name:
            return compare_by_name(Path(temporary), args.rounds)
        for title, (count, dtype, size) in SIZES.items():
            place = Path(temporary) / title.split(",")[0]
            folders = make(place, count, dtype, size)
            compare(title, folders, place, args.mergekit, args.rounds)
            shutil.rmtree(place)
        errors(Path(temporary), args.mergekit)


def compare_by_name(place: Path, rounds: int) -> None:
    """Print what averages of eight checkpoints take that are named on the command line."""
    _, dtype, size = SIZES["ViT-B, float32"]
    names = [str(folder) for folder in make(place, 8, dtype, size)]
    commands = {
        "hf-radin average": [sys.executable, "-m", "hf_radin", "average", *names, "--output", str(place / "out")],
        "plain loop": [sys.executable, "-c", LOOP_OF_TRANSFORMERS, *names, str(place / "out")],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            cost = run(command, {})
            shutil.rmtree(place / "out")
            costs[name] += [cost] if number else []  # the first round warms the caches
    print("| | seconds | on processors | private MB |\n|---|---:|---:|---:|")
    for name, taken in costs.items():
        seconds, processor, private = (
            statistics.median(getattr(cost, field) for cost in taken) for field in ("seconds", "processor", "private")
        )
        print(f"| {name} | {seconds:.2f} | {processor:.2f} | {private / 1000:.0f} |")
    pairs = list(zip(*costs.values(), strict=True))
    print(f"- hf-radin over the plain loop: time {ratio([(a.seconds, b.seconds) for a, b in pairs])}", end="")
    print(f", on processors {ratio([(a.processor, b.processor) for a, b in pairs])}")


def sides(folders: Sequence[Path], place: Path, mergekit: Path | None) -> dict[str, Callable[[Path], Cost]]:
    names = [str(folder) for folder in folders]
    write_recipe(folders, place / "recipe.json")
    cook = [sys.executable, "-m", "hf_radin", "average", "--recipe", str(place / "recipe.json")]
    runs: dict[str, Callable[[Path], Cost]] = {
        "hf_radin": lambda output: run([*cook, "--output", str(output)], {}),
        "plain loop": lambda output: run([sys.executable, "-c", LOOP, *names, str(output)], {}),
        "averaging alone": lambda output: in_process(folders, output),
        "read and write": lambda output: read_and_write(folders, output),
    }
    if mergekit:
        models = [{"model": str(folder / "model.safetensors"), "parameters": {"weight": 1.0}} for folder in folders]
        config = place / "linear.yml"
        config.write_text(
            json.dumps({"merge_method": "linear", "models": models, "parameters": {"normalize": True}}), "utf-8"
        )
        command = "from mergekit.scripts.merge_raw_pytorch import main; main()"
        runs["mergekit-pytorch"] = lambda output: run(
            [sys.executable, "-c", command, str(config), str(output)], {"PYTHONPATH": str(mergekit)}
        )
    return runs


def compare(title: str, folders: Sequence[Path], place: Path, mergekit: Path | None, rounds: int) -> None:
    costs: dict[str, list[Cost]] = {}
    runs = sides(folders, place, mergekit)
    for side in runs.values():  # once, to warm the caches
        side(place / "out")
        shutil.rmtree(place / "out")
    for _ in range(rounds):
        for name, side in runs.items():
            costs.setdefault(name, []).append(side(place / "out"))
            shutil.rmtree(place / "out")
    print(f"\n{title}, {len(folders)} checkpoints, caches warm:\n")
    print("| | seconds | private MB |\n|---|---:|---:|")
    for name, taken in costs.items():
        memory = f"{statistics.median(cost.private for cost in taken) / 1000:.0f}" if taken[0].private else ""
        print(f"| {name} | {statistics.median(cost.seconds for cost in taken):.2f} | {memory} |")
    for ours, baseline in [("hf_radin", name) for name in costs if name not in ("hf_radin", "averaging alone")] + [
        ("averaging alone", "read and write")
    ]:
        pairs = list(zip(costs[ours], costs[baseline], strict=True))
        print(f"- {ours} over {baseline}: time {ratio([(a.seconds, b.seconds) for a, b in pairs])}", end="")
        print(f", memory {ratio([(a.private, b.private) for a, b in pairs])}" if pairs[0][1].private else "")
    cold_times = []
    for _ in range(rounds):
        cold(folders)
        averaging = in_process(folders, place / "out").seconds
        shutil.rmtree(place / "out")
        cold(folders)
        cold_times.append((averaging, read_and_write(folders, place / "out").seconds))
        shutil.rmtree(place / "out")
    print(f"- files dropped from the cache: averaging alone over read and write: time {ratio(cold_times)}", flush=True)


def ratio(pairs: Sequence[tuple[float, float]]) -> str:
    ratios = [ours / baseline for ours, baseline in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def errors(folder: Path, mergekit: Path | None) -> None:
    """How far the results are from an average in float64."""
    print("\nLargest error, relative to the largest number of the tensor:\n")
    print("| dtype | hf_radin | plain loop |" + (" mergekit-pytorch |" if mergekit else ""))
    print("|---|---:|---:|" + "---:|" * bool(mergekit))
    size = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        place = folder / str(dtype)
        folders = make(place, 8, dtype, size)
        cells = []
        for name, side in sides(folders, place, mergekit).items():
            if name not in ("averaging alone", "read and write"):
                side(place / "out")
                cells.append(f"{largest_error(folders, place / 'out'):.1e}")
                shutil.rmtree(place / "out")
        print(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
