"""Bad input ends in one line, in under 10 s and 1 GB, before the first image."""

from __future__ import annotations

import shutil
from random import Random

from torture.attempts import HELD, LATE, Attempt, Task, flaw
from torture.children import run
from torture.fuzz import fuzzed
from torture.world import World, copied

SECONDS = 10.0

CARD = b"""---
license: mit
base_model: org/start
datasets: [org/pets]
model-index:
- name: a
  results:
  - task: {type: image-classification}
    dataset: {name: pets, type: org/pets, config: default, split: validation}
    metrics: [{type: accuracy, value: 0.9}]
---
# A model

The following hyperparameters were used during training:
- learning_rate: 0.001
- seed: 3
"""
STATE = (
    b'{"best_model_checkpoint": "out/checkpoint-2", "trial_params": {"learning_rate": 0.001, "seed": 3}, "epoch": 2}'
)
ADAPTER = b"""{"peft_type": "LORA", "base_model_name_or_path": "start", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "rank_pattern": {}, "bias": "none"}"""
INDEX = b"""{"metadata": {"total_size": 4}, "weight_map": {"a": "model-00001-of-00002.safetensors",
"b": "model-00002-of-00002.safetensors"}}"""

# Files of a checkpoint, and what is in those that the undisturbed ones lack.
CHECKPOINT_FILES = {
    "config.json": b"",
    "preprocessor_config.json": b"",
    "model.safetensors": b"",
    "README.md": CARD,
    "trainer_state.json": STATE,
    "adapter_config.json": ADAPTER,
    "model.safetensors.index.json": INDEX,
}
KINDS = (
    *("config.json",) * 3,
    *("model.safetensors",) * 3,
    *CHECKPOINT_FILES,
    "list.txt",
    "list.yaml",
    "recipe",
    "labels",
)


def attempt(world: World, task: Task) -> Attempt:
    """Fuzz one file, and give it to a command that reads it."""
    kind = KINDS[task.number % len(KINDS)]
    if kind in CHECKPOINT_FILES:
        command, arguments = _checkpoint(world, task, kind)
    elif kind.startswith("list"):
        command, arguments = _list(world, task, kind)
    else:
        command, arguments = (_recipe if kind == "recipe" else _labels)(world, task)
    name = f"{kind}, fuzzed, for `{command}`"
    ended = run(task.folder, command, *arguments, seconds=SECONDS)
    if problem := flaw(ended):
        return Attempt(name, *problem)
    blocks = [] if kind == "labels" else list(task.folder.glob("cache/pixels/*/block-*"))
    if ended.status == 2 and blocks:
        return Attempt(name, LATE, ended.lines[-1])
    return Attempt(name, HELD)


def _checkpoint(world: World, task: Task, name: str) -> tuple[str, list[object]]:
    """A fuzzed file of a checkpoint, mostly to be inspected, beside a sound checkpoint."""
    random, folder = task.random, copied(world.runs / "ft-0", task.folder / "run" / "ft-0")
    path = folder / name
    if name == "model.safetensors":
        path.write_bytes(_fuzzed_header(path.read_bytes(), random))
    else:
        path.write_bytes(fuzzed(CHECKPOINT_FILES[name] or path.read_bytes(), random))
    if name == "adapter_config.json":
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    elif name == "model.safetensors.index.json":
        for shard in ("model-00001-of-00002", "model-00002-of-00002"):
            shutil.copy(folder / "model.safetensors", folder / f"{shard}.safetensors")
        (folder / "model.safetensors").unlink()
    elif name == "trainer_state.json":
        for number in (1, 2):
            copied(folder, folder / f"checkpoint-{number}")
    models: list[object] = ["--models", folder, world.runs / "ft-1"]
    if random.random() < 0.9:
        return "inspect", models
    return "logits", [*models, "--dataset", world.digits, "--cache-dir", task.folder / "cache"]


def _fuzzed_header(content: bytes, random: Random) -> bytes:
    """A file of weights with a fuzzed header, its length mostly right."""
    length = int.from_bytes(content[:8], "little")
    header = fuzzed(content[8 : 8 + length], random)
    stated = random.choice((0, 2**63, len(header) + 1, 2**31)) if random.random() < 0.1 else len(header)
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def _list(world: World, task: Task, name: str) -> tuple[str, list[object]]:
    """A fuzzed list of checkpoints."""
    models = [str(world.runs / f"ft-{number}") for number in range(3)]
    text = "\n".join(f"- {model}" if name.endswith("yaml") else model for model in ["# models", *models]).encode()
    (task.folder / name).write_bytes(fuzzed(text, task.random))
    return "inspect", ["--models", task.folder / name]


def _recipe(world: World, task: Task) -> tuple[str, list[object]]:
    """A fuzzed recipe, to be cooked or described."""
    soup = copied(world.soup, task.folder / "soup")
    name = "README.md" if task.random.random() < 0.2 else "recipe.json"
    (soup / name).write_bytes(fuzzed((soup / name).read_bytes(), task.random))
    if name == "README.md" or task.random.random() < 0.5:
        return "card", [soup]
    return "average", ["--recipe", soup / name, "--output", task.folder / "cooked"]


def _labels(world: World, task: Task) -> tuple[str, list[object]]:
    """A folder of images with a fuzzed table of their labels."""
    import numpy as np
    from PIL import Image
    from shared.training import NAMES

    folder = task.folder / "images" / "validation"
    folder.mkdir(parents=True)
    rows = ["file_name,label"]
    for number, name in enumerate(NAMES):
        Image.fromarray(np.full((8, 8), 25 * number, np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{name}")
    (folder / "metadata.csv").write_bytes(fuzzed("\n".join(rows).encode(), task.random))
    places = ["--dataset", folder.parent, "--cache-dir", task.folder / "cache"]
    return "logits", ["--models", f"{world.runs}/ft-[01]", *places]
