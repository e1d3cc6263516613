"""The same soup comes out for any order, batch, files, number of processes and seed of hashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from torture.attempts import DIFFERS, HELD, Attempt, Ended, Task, flaw
from torture.children import run
from torture.ranks import run_together
from torture.world import MODELS, SHARDS, World

KINDS = ("radin", "full", "greedy", "uniform")


def attempt(world: World, task: Task) -> Attempt:
    """Run a kind of search with some options changed of which the soup must not depend."""
    random, folder = task.random, task.folder
    kind = KINDS[task.number % len(KINDS)]
    models = random.sample(range(MODELS), MODELS)
    shards = random.choice(SHARDS)
    options = [*world.options(folder, kind), "--dataset", world.sharded(shards), "--models"]
    options += [world.runs / f"ft-{number}" for number in models]
    chosen = _draw_options(random, kind)
    processes = random.choice((1, 1, 1, 1, 2, 3))
    words = [f"models {models}", f"{shards} files", *map(str, chosen), f"{processes} processes"]
    if task.number % 25 == 24:
        seed = random.randrange(2**32)
        ended = _with_hash_seed(folder, [*options, *chosen], seed)
        words.append(f"hash seed {seed}")
    elif processes > 1:
        ended = run_together(folder, processes, *options, *chosen)
    else:
        ended = run(folder, *options, *chosen)
    name = f"{kind}: {', '.join(words)}"
    if problem := flaw(ended, allowed=(0,)):
        return Attempt(name, *problem)
    differing = _difference(folder / "soup", world.folder / kind / "soup")
    return Attempt(name, DIFFERS, differing) if differing else Attempt(name, HELD)


def _draw_options(random: Random, kind: str) -> list[object]:
    """Options that say how models run."""
    options: list[object] = []
    values_of = {"--batch-size": (1, 7, 64), "--models-in-memory": (1, 2, 3)}
    if kind != "radin":  # which shows soups other samples where images are not cached, and says so
        values_of["--pixel-cache"] = ("off", "20kB", "1GB")
    for name, values in values_of.items():
        if random.random() < 0.6:
            options += [name, random.choice(values)]
    return options


def _difference(folder: Path, expected: Path) -> str | None:
    """In what a soup differs from another one: its weights, its recipe or its figures; the order does not count.

    A refitted head may differ in its last digits: the features that it is fitted to are rounded otherwise in other
    batches.
    """
    ours, theirs = (_essence(path) for path in (folder, expected))
    names = [name for name in ours if ours[name] != theirs[name]]
    if names:
        return f"{names[0]}: {str(ours[names[0]])[:150]}, not {str(theirs[names[0]])[:150]}"
    heads = zip(_head(folder).values(), _head(expected).values(), strict=True)
    return None if all(np.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in heads) else "the refitted head"


def _essence(folder: Path) -> dict[str, Any]:
    recipe = json.loads((folder / "recipe.json").read_text())
    weights = zip(recipe["recipe"]["ingredients"], recipe["recipe"]["weights"], strict=True)
    measured = [
        (sorted(zip(map(_last, row["ingredients"]), row["weights"], strict=True)), row["measured"])
        for row in recipe["measurements"]
    ]
    return {
        "recipe": sorted((_last(name), weight) for name, weight in weights),
        "results": recipe["results"],
        "measurements": sorted(measured),
        "weights": {name: tensor.tobytes() for name, tensor in _tensors(folder).items() if name not in _head(folder)},
        "config": json.loads((folder / "config.json").read_text()),
    }


def _head(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a head that was refitted; none of an averaged one."""
    is_refitted = json.loads((folder / "recipe.json").read_text()).get("head") is not None
    return {name: tensor for name, tensor in _tensors(folder).items() if is_refitted and "classifier" in name}


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def _last(name: str) -> str:
    return Path(name).name


def _with_hash_seed(folder: Path, options: list[object], seed: int) -> Ended:
    """The command as a program of its own: a forked child has the seed of its parent."""
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    process = [sys.executable, "-W", "ignore", "-m", "hf_radin", *map(str, options)]
    ended = subprocess.run(process, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    return Ended(ended.returncode, ended.stdout, ended.stderr, 0.0, 0, True)
