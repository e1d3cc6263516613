"""What it saves to compute nothing twice: of models that share layers, in a whole command, and in one that runs again.

    python benchmarks/shared.py [--rounds 5] [--seed 0]
    python benchmarks/shared.py --parts probes last2 nothing command again [--images 1024]

- `probes`: the logits of 16 linear probes of one ViT-Ti/16, over one decoding and one bare pass of one of them
- `last2`: of 16 fine-tunes of the last 2 of 12 layers, over 16 models that differ in every tensor
- `nothing`: of 8 ordinary fine-tunes, over the same without hashing tensors and looking for what is shared
- `command`: `hf-radin soup` with 10 trained ViTs of 28 px and 10,000 images, nothing cached, over a plain script of a
  greedy soup that prepares the images once; both are new processes, and their imports count
- `again`: the same command a second time; and of nine models, after eight of them

Images are Fashion-MNIST's. Models of the first three parts are random: only time is measured. All runs are on the CPU,
with one thread. Each ratio is of two runs in one round, one after the other. The median of the rounds and its range
are printed.
"""

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from logits import CASES, bare, ours, show
from zoo.fashion import Run, make, make_data
from zoo.untrained import make_models, make_split

from hf_radin.ingredients import kinship
from hf_radin.sharing.digests import TensorDigests

MODELS, COMMAND_MODELS, COMMAND_IMAGES = 16, 10, 10_000
VIT = CASES["224"]

# A greedy soup as one would write it with transformers and datasets.
PLAIN = """
import sys
from pathlib import Path
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

folders, data, output = sorted(map(Path, sys.argv[3:])), sys.argv[1], sys.argv[2]
rows = load_dataset(data, split="validation")
processor = AutoImageProcessor.from_pretrained(folders[0])
pixels = torch.cat([
    processor([image.convert("RGB") for image in rows[start : start + 64]["image"]], return_tensors="pt").pixel_values
    for start in range(0, len(rows), 64)
])
labels = torch.tensor(rows["label"])
models = {folder: AutoModelForImageClassification.from_pretrained(folder).eval() for folder in folders}
soup_model = AutoModelForImageClassification.from_pretrained(folders[0]).eval()

def accuracy(model):
    with torch.inference_mode():
        answers = torch.cat([model(pixel_values=batch).logits.argmax(1) for batch in pixels.split(64)])
    return (answers == labels).double().mean().item()

def average(parts):
    states = [models[folder].state_dict() for folder in parts]
    soup_model.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return soup_model

singles = {folder: accuracy(model) for folder, model in models.items()}
order = sorted(folders, key=lambda folder: -singles[folder])
soup, best = order[:1], singles[order[0]]
for folder in order[1:]:
    measured = accuracy(average([*soup, folder]))
    if measured >= best:
        soup, best = [*soup, folder], measured
average(soup).save_pretrained(output)
processor.save_pretrained(output)
print(f"soup {best:.2%}")
"""


def is_of_head(name: str) -> bool:
    return name.startswith("classifier.")


def is_of_last_two(name: str) -> bool:
    """Whether a parameter of a ViT is of its last two layers, or comes after them."""
    layer = re.search(r"layers?\.(\d+)\.", name)
    return (
        is_of_head(name) or name.startswith("vit.layernorm") or (layer is not None and int(layer[1]) >= VIT.layers - 2)
    )


def probes(folder: Path, rounds: int, seed: int, images: int) -> None:
    print(f"\n## {MODELS} linear probes of one body over one bare pass ({VIT.name}, {images} images)\n")
    models, data = folder / "probes", make_split(folder / "data-probes", images)
    make_models(models, VIT, MODELS, seed, differs=is_of_head)
    alone = folder / "probe"
    shutil.copytree(models / "ft-00", alone / "ft-00")
    compare("all probes over one pass", partial(ours, models, data), lambda: bare(alone, data), rounds)


def last2(folder: Path, rounds: int, seed: int, images: int) -> None:
    print(f"\n## {MODELS} fine-tunes of the last two layers over as many that share none ({images} images)\n")
    data = make_split(folder / "data-last2", images)
    make_models(folder / "last2", VIT, MODELS, seed, differs=is_of_last_two)
    make_models(folder / "apart", VIT, MODELS, seed)
    shared, apart = (partial(ours, folder / name, data) for name in ("last2", "apart"))
    compare("shared over apart", shared, apart, rounds)


def nothing(folder: Path, rounds: int, seed: int, images: int) -> None:
    print(f"\n## Looking for what ordinary fine-tunes share, over not looking ({images} images)\n")
    models, data = folder / "ordinary", make_split(folder / "data-nothing", images)
    make_models(models, VIT, 8, seed)

    def without_looking() -> None:
        with patch.object(kinship, "TensorDigests") as digests:
            digests.of = lambda model: TensorDigests({})
            ours(models, data)

    compare("with looking over without", partial(ours, models, data), without_looking, rounds)


def compare(title: str, run: Callable[[], object], other: Callable[[], object], rounds: int) -> None:
    """Print the ratio of two runs' seconds; a run that returns a number has measured them itself."""

    def took(timed: Callable[[], object]) -> float:
        begun = time.perf_counter()
        result = timed()
        return result if isinstance(result, float) else time.perf_counter() - begun

    pairs = [(took(run), took(other)) for _ in range(rounds)]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    show(title, [mine / others for mine, others in pairs], f"; medians {first:.1f} s and {second:.1f} s")


def trained(folder: Path, seed: int, models: int) -> tuple[list[Path], Path]:
    """Fine-tunes of one start at ten rates, and the images that choose."""
    data = make_data(folder / "data-command", train=20_000, validation=COMMAND_IMAGES, test=100)
    rates = (0.25, 0.5, 1, 1.5, 2) * 2
    names = [f"ft-{number}" for number in range(COMMAND_MODELS)]
    runs = [Run(name, "start", rate, epochs=1, images=5_000) for name, rate in zip(names, rates, strict=True)]
    place = make(folder / "trained", data, (Run("start", None, 1, epochs=4, images=10_000), *runs), "vit", seed)
    return [place / name for name in names[:models]], data


def launched(*command: str | Path) -> tuple[float, float, str]:
    """Seconds of a new process, those of the processor, and what it says."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, encoding="utf-8", env=environment, check=True
    )
    took, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    computing = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, computing, run.stdout + run.stderr


def soup_command(models: list[Path], data: Path, home: Path) -> list[str | Path]:
    """`hf-radin soup`, with its cache and its soup in a folder."""
    places: list[str | Path] = ["--dataset", data, "--cache-dir", home / "cache", "--output", home / "soup"]
    return ["-m", "hf_radin", "soup", "--models", *models, *places, "--overwrite"]


def command(folder: Path, rounds: int, seed: int, images: int) -> None:
    print(f"\n## The whole command over a plain greedy soup ({COMMAND_MODELS} models, {COMMAND_IMAGES:,} images)\n")
    models, data = trained(folder, seed, COMMAND_MODELS)
    (folder / "plain.py").write_text(PLAIN, "utf-8")
    ours_with: dict[str, list[str]] = {
        "hf-radin soup": [],
        "hf-radin soup --budget 1 --head average": ["--budget", "1", "--head", "average"],
    }
    launched(folder / "plain.py", data, folder / "plain", *models)  # datasets has its own cache, for both
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("plain", *ours_with)}
    figures: dict[str, str] = {}
    for _ in range(rounds):
        for name in times:
            with tempfile.TemporaryDirectory() as home:
                arguments = [*soup_command(models, data, Path(home)), *ours_with.get(name, [])]
                if name == "plain":
                    arguments = [folder / "plain.py", data, Path(home) / "soup", *models]
                took, computing, output = launched(*arguments)
                times[name].append((took, computing))
                figures[name] = next(line.split()[1] for line in output.splitlines() if line.startswith("soup "))
    for name in ours_with:
        for kind, place in (("", 0), (", seconds of the processor", 1)):
            pairs = [(mine[place], plain[place]) for mine, plain in zip(times[name], times["plain"], strict=True)]
            mine, plain = (statistics.median(seconds_of) for seconds_of in zip(*pairs, strict=True))
            note = f"; medians {mine:.1f} s and {plain:.1f} s; accuracy {figures[name]} and {figures['plain']}"
            show(f"{name}{kind}", [pair[0] / pair[1] for pair in pairs], note)


def again(folder: Path, rounds: int, seed: int, images: int) -> None:
    print(f"\n## What runs again ({COMMAND_IMAGES:,} images): seconds, and how many models' logits are computed\n")
    models, data = trained(folder, seed, 9)
    with tempfile.TemporaryDirectory() as home:
        for title, count in (("eight models, nothing cached", 8), ("the same again", 8), ("nine models", 9)):
            took, _, output = launched(*soup_command(models[:count], data, Path(home)))
            computed = re.search(r"(\d+) to compute", output)
            print(f"- {title}: {took:.1f} s, {computed[1] if computed else '?'} computed", flush=True)


PARTS = {part.__name__: part for part in (probes, last2, nothing, command, again)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=1024, help="of the first three parts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            PARTS[name](Path(folder), args.rounds, args.seed, args.images)


if __name__ == "__main__":
    main()
