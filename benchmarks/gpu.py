"""What a GPU makes of forward passes, soups and recipes, with the checks that go with it: one command for one GPU.

    python benchmarks/gpu.py [--models 8] [--images 4096] [--output gpu.json]
    python benchmarks/gpu.py --tiny --device cpu

Models are random ViT-B/16 and ConvNeXt-T with a little noise, images are blurred noise: only time, memory and
rounding are measured. Each figure is a row of the table and of the JSON file, with what it has to be, and the command
ends with status 1 if one is not. It is made to take less than eight minutes. Without a GPU it says so and ends;
`--tiny --device cpu` runs the same code with tiny models on the CPU, where nothing is required of speed and memory.

Rows, for each architecture: images a second through our passes in bfloat16 and through bare ones, which show batches
that are ready in pinned memory to models that are all on the device, with the same batch size; the seconds of a soup
that is averaged and measured on all images; the peak of the device's memory against what the models and one batch
take; a batch that does not fit. Then the logits of a bank of the GPU against one of the CPU, what is chosen where
nothing is said, what compiling takes and saves, and recipes scored a second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("ACCELERATE_MIXED_PRECISION", None)

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_radin
from hf_radin.checkpoints.autotune import bytes_of, peak_of
from hf_radin.checkpoints.forward import Running
from hf_radin.images.split import DataSource
from hf_radin.logits.compute import make_bank
from hf_radin.logits.manifest import RunOptions
from hf_radin.runtime.processes import Processes
from hf_radin.search.measure import soup_answers

# What is required: of our images a second over bare ones, of the seconds of all, and of the difference between logits
# in parts of the largest of them.
RATE, SECONDS, ROUNDING, HALF_ROUNDING = 0.85, 480, 5e-3, 5e-2

# The peak of memory may be larger than what was planned by this: what libraries take for themselves.
WORKSPACE = 256 * 2**20

CLASSES = 100

# The architecture of which some parts are measured alone.
FIRST = "ViT-B/16"


@dataclass(frozen=True)
class Row:
    """A figure, what it has to be, and whether it is; None where nothing is required of it."""

    name: str
    value: float | str
    required: str = ""
    holds: bool | None = None


@dataclass(frozen=True)
class Sizes:
    """How large all of it is. `recipes` are scored on `scored` images; `compared` images are those of two devices."""

    side: int
    models: int
    images: int
    compared: int
    batch: int
    recipes: int
    scored: int


SMALL = Sizes(side=32, models=3, images=24, compared=8, batch=4, recipes=50, scored=200)


@dataclass(frozen=True)
class World:
    """Where it is measured.

    Args:
        folder: for models, images and caches.
        processes: with the device.
    """

    folder: Path
    sizes: Sizes
    processes: Processes
    is_tiny: bool

    @property
    def device(self) -> torch.device:
        """On which models run."""
        return self.processes.device

    def bank(self, models: str, split: str, **options: Any) -> hf_radin.LogitBank:
        """The bank of some models on a split."""
        run = RunOptions(cache_dir=self.folder / "cache", batch_size=self.sizes.batch, **options)
        ingredients = hf_radin.gather(f"{self.folder}/{models}")
        return make_bank(ingredients, DataSource(str(self.folder / "data"), split), run, self.processes)


def architectures(*, is_tiny: bool) -> dict[str, tuple[type[PreTrainedModel], PretrainedConfig]]:
    """The classes and configurations of the models, by their names."""
    names = {number: str(number) for number in range(CLASSES)}
    classes: dict[str, Any] = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    vit: dict[str, Any] = {}
    convnext: dict[str, Any] = {}
    if is_tiny:
        vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        vit |= {"image_size": SMALL.side, "patch_size": 8}
        convnext = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    return {
        FIRST: (ViTForImageClassification, ViTConfig(**vit, **classes)),
        "ConvNeXt-T": (ConvNextForImageClassification, ConvNextConfig(**convnext, **classes)),
    }


def folder_of(name: str) -> str:
    """Where the models of an architecture are."""
    return name.replace("/", "-").lower()


def write_models(world: World) -> None:
    """Write models of each architecture: a random one with noise."""
    torch.manual_seed(0)
    processor = ViTImageProcessor(size={"height": world.sizes.side, "width": world.sizes.side})
    for name, (model_class, config) in architectures(is_tiny=world.is_tiny).items():
        model = model_class(config).to(world.device)
        for number in range(world.sizes.models):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(2e-3 * torch.randn_like(parameter))
            folder = world.folder / folder_of(name) / f"ft-{number:02d}"
            model.save_pretrained(folder)
            processor.save_pretrained(folder)


def write_images(world: World) -> None:
    """Write blurred noise as the splits `validation`, of all images, and `compared`, of some more."""
    generator = np.random.default_rng(0)
    names = [str(number) for number in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    (world.folder / "data" / "data").mkdir(parents=True)
    for split, count in (("validation", world.sizes.images), ("compared", world.sizes.compared)):
        noise = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        images = [Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in noise]
        labels = generator.integers(0, CLASSES, count).tolist()
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(world.folder / "data" / "data" / f"{split}-00000-of-00001.parquet")


def synchronized(device: torch.device, run: Callable[[], object]) -> float:
    """The seconds of a call, with all that it has left the device to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def ready_inputs(bank: hf_radin.LogitBank, device: torch.device) -> torch.Tensor:
    """All prepared images of a bank in float32, in pinned memory if there is a GPU."""
    cpu = torch.device("cpu")
    blocks = [bank.images.read(block)["pixel_values"] for block in bank.images.blocks]
    whole = torch.cat([values[:].to(cpu, torch.float32) for values in blocks])
    return whole.pin_memory() if device.type == "cuda" else whole


def show_bare(models: list[PreTrainedModel], pixels: torch.Tensor, running: Running) -> None:
    """The plain loop: each batch to the device once, through all models, logits back."""
    device = running.accelerator.device
    layout = torch.channels_last if running.channels_last else torch.contiguous_format
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for batch in pixels.split(running.batch_size):
            values = batch.to(device, non_blocking=True).contiguous(memory_format=layout)
            for model in models:
                model(pixel_values=values).logits.float().cpu()


def bare_rate(world: World, models: list[PreTrainedModel], running: Running, pixels: torch.Tensor) -> float:
    """Images a second through all models together, in the plain loop."""
    show_bare(models, pixels[: world.sizes.batch], running)
    return len(models) * len(pixels) / synchronized(world.device, lambda: show_bare(models, pixels, running))


def planned_bytes(world: World, models: list[PreTrainedModel], running: Running, pixels: torch.Tensor) -> int:
    """What so many models take, and one of them for a batch beside that."""
    batch = {"pixel_values": pixels[: world.sizes.batch]}
    return sum(map(bytes_of, models)) + peak_of(lambda: running.logits(models[:1], batch), world.device) + WORKSPACE


def soup_seconds(world: World, bank: hf_radin.LogitBank, count: int = 3) -> float:
    """The median of the seconds in which a soup is averaged and measured on all images."""
    took = []
    for row in np.random.default_rng(0).dirichlet(np.ones(len(bank.ingredients)), size=count):
        recipe = hf_radin.Recipe(bank.ingredients.ids, tuple(row.tolist()))
        took.append(synchronized(world.device, partial(soup_answers, bank, recipe)))
    return statistics.median(took)


def of_passes(world: World, name: str) -> Iterator[Row]:
    """Our passes against bare ones, soups, and the memory that passes take."""
    is_gpu, device = world.processes.is_on_gpu, world.device
    options = {"channels_last": True, "torch_compile": False}
    begun = time.perf_counter()
    world.bank(
        f"{folder_of(name)}/ft-0[01]", "validation", mixed_precision="no", **options
    )  # which decodes the images
    first = time.perf_counter() - begun
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    bank = world.bank(f"{folder_of(name)}/*", "validation", mixed_precision="bf16", **options)
    wall = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated(device) if is_gpu else 0
    running, pixels = bank.passes().running, ready_inputs(bank, device)
    models = [running.ready(ingredient.load_model(torch.float32)) for ingredient in bank.ingredients]
    bare = bare_rate(world, models, running, pixels)
    planned = planned_bytes(world, models, running, pixels)
    ours = len(models) * len(pixels) / max(bank.spent.seconds or 0.0, 1e-3)
    del models
    yield Row(f"{name}: bare passes, images a second", bare)
    yield Row(f"{name}: our passes, images a second", ours)
    fast = f"at least {RATE}" if is_gpu else ""
    yield Row(f"{name}: ours over bare", ours / bare, fast, ours / bare >= RATE if is_gpu else None)
    yield Row(f"{name}: the bank of two models in float32, nothing cached, seconds", first)
    yield Row(f"{name}: the bank of all models, images cached, seconds", wall)
    bound = f"at most {planned / 1e9:.2f}" if is_gpu else ""
    yield Row(f"{name}: peak memory, GB", peak / 1e9 if is_gpu else "-", bound, peak <= planned if is_gpu else None)
    yield Row(f"{name}: a soup, averaged and measured, seconds", soup_seconds(world, bank))
    yield from of_little_memory(world, name, running, bank, pixels)


@contextmanager
def little_memory(device: torch.device, images: int, needed: int) -> Iterator[None]:
    """A device that has no room for so many images at a time.

    Args:
        needed: bytes that they take on a GPU; a CPU refuses them as a GPU does.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 0.6 * needed) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return

    def refuse(module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, torch.nn.Conv2d) and len(inputs[0]) >= images:
            raise RuntimeError("CUDA out of memory. This is a CPU that plays a GPU.")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def of_little_memory(
    world: World, name: str, running: Running, bank: hf_radin.LogitBank, pixels: torch.Tensor
) -> Iterator[Row]:
    """A batch that does not fit: it is halved, and the logits are those of smaller batches."""
    device, images = world.device, min(4 * world.sizes.batch, len(pixels))
    model = running.ready(bank.ingredients[0].load_model(torch.float32))
    batch, large = {"pixel_values": pixels[:images]}, replace(running, batch_size=images)
    (expected,) = running.logits([model], batch)
    needed = peak_of(lambda: large.logits([model], batch), device)
    shown: list[int] = []
    handle = model.register_forward_hook(lambda module, inputs, output: shown.append(len(output.logits)))
    with little_memory(device, images, needed):
        (logits,) = large.logits([model], batch)
    handle.remove()
    is_halved = 0 < max(shown, default=0) < images
    text = f"fewer than {images}"
    yield Row(f"{name}: images at a time after a batch that did not fit", max(shown, default=0), text, is_halved)
    yield of_rounding(f"{name}: logits of these against those of usual batches", logits, expected, HALF_ROUNDING)


def of_rounding(name: str, logits: np.ndarray, expected: np.ndarray, most: float) -> Row:
    """The largest difference between logits, in parts of the largest logit."""
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return Row(name, difference, f"at most {most}", difference <= most)


# Computes the bank of two models on a CPU, and writes the logits of both.
ON_CPU = """
import sys
import numpy as np
import hf_radin
models, data, cache, out = sys.argv[1:]
bank = hf_radin.compute_logits(hf_radin.gather([f"{models}/ft-00", f"{models}/ft-01"]), data, split="compared",
    cache_dir=cache, channels_last=False, torch_compile=False)
np.save(out, np.stack([bank.logits(index) for index in range(2)]))
"""


def of_devices(world: World, name: str) -> Iterator[Row]:
    """Logits of the device against those of a CPU, in float32 and in bfloat16, and what is chosen by itself."""
    models, out = world.folder / folder_of(name), world.folder / f"{folder_of(name)}.npy"
    command = [sys.executable, "-W", "ignore", "-c", ON_CPU, models, world.folder / "data", world.folder / "cpu", out]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    subprocess.run([str(part) for part in command], check=True, env=environment)
    expected, pair = np.load(out), f"{folder_of(name)}/ft-0[01]"
    for precision, called, most in (("no", "float32", ROUNDING), ("bf16", "bfloat16", HALF_ROUNDING)):
        bank = world.bank(pair, "compared", mixed_precision=precision, channels_last=True, torch_compile=False)
        logits = np.stack([bank.logits(index) for index in range(2)])
        yield of_rounding(f"{name}: logits in {called} against a CPU's in float32", logits, expected, most)
    run = world.bank(pair, "compared").manifest.run
    chosen = f"mixed precision {run.mixed_precision}, channels_last {run.channels_last}, compiled {run.torch_compile}"
    yield Row(f"{name}: chosen by itself", chosen)


def of_compiling(world: World, name: str) -> Iterator[Row]:
    """What compiling takes and saves, and that it is done once for all models. Of the first architecture."""
    if name != FIRST:
        return
    bank = world.bank(f"{folder_of(name)}/ft-0[01]", "compared")
    plain = replace(bank.passes().running, compiled=False, mixed_precision="bf16")
    compiled, pixels = replace(plain, compiled=True), ready_inputs(bank, world.device)
    batch = {"pixel_values": pixels.repeat(world.sizes.batch, 1, 1, 1)[: world.sizes.batch]}
    first, second = (plain.ready(ingredient.load_model(torch.float32)) for ingredient in bank.ingredients)
    expected = plain.logits([first, second], batch)
    usual = synchronized(world.device, lambda: plain.logits([first], batch))
    first, second = compiled.ready(first), compiled.ready(second)
    compiling = synchronized(world.device, lambda: compiled.logits([first], batch))
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = compiled.logits([first, second], batch)
        fast = synchronized(world.device, lambda: compiled.logits([first], batch))
    yield Row(f"{name}: compiling, once for all models, seconds", compiling)
    yield Row(f"{name}: a batch, compiled over plain", fast / usual)
    yield of_rounding(f"{name}: compiled against plain", np.stack(answers), np.stack(expected), HALF_ROUNDING)


def of_scoring(world: World, name: str) -> Iterator[Row]:
    """Recipes scored on the device: how many predictions a second, the same as on a CPU. Of no architecture: once."""
    if name != FIRST:
        return
    generator, models = np.random.default_rng(0), world.sizes.models
    labels = generator.integers(0, CLASSES, world.sizes.scored)
    common = generator.normal(size=(world.sizes.scored, CLASSES)).astype(np.float32)
    common[np.arange(len(labels)), labels] += 2
    logits = {
        f"model-{number}": common + 0.5 * generator.normal(size=common.shape).astype(np.float32)
        for number in range(models)
    }
    bank = hf_radin.LogitBank.from_arrays(logits, labels)
    recipes = generator.dirichlet(np.ones(models), size=world.sizes.recipes)
    few = recipes[:50]
    are_equal = bank.score(few, device=str(world.device)).tolist() == bank.score(few).tolist()  # prunes, too
    took = synchronized(world.device, lambda: bank.score(recipes, device=str(world.device)))
    yield Row("scores of the device are those of a CPU", str(are_equal), "True", are_equal)
    yield Row("recipes scored, predictions a second", len(recipes) * len(labels) / took)


PARTS: dict[str, Callable[[World, str], Iterator[Row]]] = {
    "passes": of_passes,
    "devices": of_devices,
    "compiling": of_compiling,
    "scoring": of_scoring,
}


def measure(world: World, parts: Sequence[str]) -> Iterator[Row]:
    """All rows of some parts."""
    begun = time.perf_counter()
    write_models(world)
    write_images(world)
    yield Row("models and images written, seconds", time.perf_counter() - begun)
    for name in architectures(is_tiny=world.is_tiny):
        for part in parts:
            yield from PARTS[part](world, name)
    took = time.perf_counter() - begun
    yield Row("all of it, seconds", took, f"at most {SECONDS}", took <= SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few images, to try the code")
    parser.add_argument("--models", type=int, default=8, help="of each architecture")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here, and nothing is measured; --tiny --device cpu tries the code.")
        return 0
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    sizes = SMALL if args.tiny else Sizes(224, args.models, args.images, 64, 256, 10_000, 20_000)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), sizes, Processes(), args.tiny)
        device = world.processes.device_name
        print(f"{device}, torch {torch.__version__}\n\n| | | required | |\n|---|---:|---|---|", flush=True)
        for row in measure(world, args.parts):
            value = row.value if isinstance(row.value, str) else f"{row.value:,.4g}"
            verdict = {None: "", True: "holds", False: "FAILS"}[row.holds]
            print(f"| {row.name} | {value} | {row.required} | {verdict} |", flush=True)
            rows.append(row)
    if args.output:
        content = {"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        args.output.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
