"""What all attempts share, and none may change: checkpoints, images, and what an undisturbed run makes of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import shared.timeless

from hf_radin.runtime.files import PARTIAL
from torture.attempts import Ended
from torture.children import command, prepared, start, warm
from torture.moments import before_change

# Which of the digits: few, such that a run takes a second.
PARTS = {"train": slice(0, 64), "validation": slice(700, 860), "test": slice(1300, 1380)}
MODELS = 4

# A file of the user's beside a soup.
NOTES = "notes.txt"
SHARDS = (1, 2, 3, 5)

# Kinds of runs, with the options that set them apart. Undisturbed ones of all but the first begin with its cache;
# `wider` has a fifth model.
KINDS: dict[str, tuple[str, ...]] = {
    "radin": (),
    "full": ("--measure", "full", "--budget", "4"),
    "greedy": ("--method", "greedy"),
    "uniform": ("--method", "uniform", "--overwrite"),
    "wider": ("--method", "greedy"),
}


@dataclass(frozen=True)
class Pace:
    """How an undisturbed run goes.

    Args:
        changes: of files, where it changes some.
        seconds: that it takes.
    """

    changes: int
    seconds: float


@dataclass(frozen=True)
class World:
    """Four fine-tunes of a tiny ViT, and what came of them.

    Args:
        folder: where everything is.
        searching: how `soup` goes with an empty cache.
        overwriting: how `soup --method uniform --overwrite` goes where all logits are there; changes of the output.
    """

    folder: Path
    searching: Pace = Pace(0, 0.0)
    overwriting: Pace = Pace(0, 0.0)

    @property
    def runs(self) -> Path:
        """The folder of the checkpoints `ft-0` to `ft-3`."""
        return self.folder / "runs"

    @property
    def digits(self) -> Path:
        """The dataset."""
        return self.sharded(2)

    @property
    def cache(self) -> Path:
        """The cache of the undisturbed run."""
        return self.folder / "radin" / "cache"

    @property
    def soup(self) -> Path:
        """The soup that it saved."""
        return self.folder / "radin" / "soup"

    def sharded(self, files: int) -> Path:
        """The dataset with so many files a split."""
        return self.folder / f"digits-{files}"

    def files(self, kind: str) -> dict[str, bytes]:
        """What an undisturbed run of one of `KINDS` saved: bytes by name, without times."""
        return shared.timeless.contents(self.folder / kind / "soup")

    def options(self, folder: Path, kind: str = "radin") -> list[object]:
        """A run of one of `KINDS` with everything of its own in a folder: `cache` and `soup`."""
        models = [f"{self.runs}/ft-*", *([self.folder / "start"] if kind == "wider" else [])]
        places = ["--cache-dir", folder / "cache", "--output", folder / "soup"]
        return ["soup", "--models", *models, *self.data, *places, *KINDS[kind]]

    @property
    def data(self) -> list[object]:
        """The options that say which images."""
        return ["--dataset", self.digits, "--test-split", "test"]


def difference(folder: Path, files: dict[str, bytes]) -> str | None:
    """In which file a saved soup differs from another one, but for times; None if in none."""
    if not folder.is_dir():
        return f"there is no {folder.name}"
    return first_difference(soup_files(folder), files)


def soup_files(folder: Path) -> dict[str, bytes]:
    """The files of a saved soup without times, by name.

    What a killed run left half written is none of them, and the user's notes are not.
    """
    files = [path for path in folder.iterdir() if path.name[0] != "." and path.name != NOTES and path.is_file()]
    return {path.name: shared.timeless.without_times(path) for path in files}


def first_difference(files: dict[str, bytes], others: dict[str, bytes]) -> str | None:
    """The name of a file that is not in both with the same bytes, weights first; None if there is none."""
    order = ("model.safetensors", "config.json", "preprocessor_config.json", "recipe.json")
    names = [name for name in sorted({*files, *others}) if files.get(name) != others.get(name)]
    if not names:
        return None
    name = min(names, key=lambda name: order.index(name) if name in order else len(order))
    if name == "recipe.json" and name in files and name in others:
        fields, other_fields = json.loads(files[name]), json.loads(others[name])
        keys = [key for key in {**fields, **other_fields} if fields.get(key) != other_fields.get(key)]
        return f"{keys[0]!r} of {name}"
    return name


def make(folder: Path) -> World:
    """Make everything, in children: a process that trained models is not fit to be forked."""
    world = World(folder)
    for name in (*KINDS, "searching", "stopped"):
        (folder / name).mkdir()
    _check(start(folder / "radin", lambda: _train(world)).wait(300))
    for path in (folder, *folder.rglob("*")):  # children that run as nobody may read all, and the times stay
        path.chmod(0o755 if path.is_dir() else 0o644)
    warm(folder / "radin", [command(*world.options(folder / "radin"))])
    overwriting = Pace(0, 0.0)
    searching = _pace(folder / "searching", [folder / "searching"], world.options(folder / "searching"))
    for kind in list(KINDS)[1:]:
        copied(world.cache, folder / kind / "cache")
        if kind == "uniform":
            copied(world.soup, folder / kind / "soup")
        pace = _pace(folder / kind, output_places(folder / kind), world.options(folder / kind, kind))
        overwriting = pace if kind == "uniform" else overwriting
    _stop_before_joining(world, folder / "stopped")
    return World(folder, searching, overwriting)


def _stop_before_joining(world: World, folder: Path) -> None:
    """Leave a cache in which logits are still in blocks, as after a kill."""

    def hear(event: str, arguments: tuple) -> None:
        if event != "os.rename":
            return
        path = Path(arguments[1])
        if path.suffix == ".npy" and path.parent.name == "logits" and path.is_relative_to(folder):
            os._exit(0)

    start(folder, prepared(lambda: sys.addaudithook(hear), command(*world.options(folder)))).wait()


def output_places(folder: Path) -> list[Path]:
    """How the paths begin that an overwrite of the soup in this folder changes."""
    return [folder / "soup", folder / PARTIAL]


def _pace(folder: Path, places: Sequence[Path], options: list[object]) -> Pace:
    """How a command goes, with its changes in these places."""

    def work() -> int:
        count = before_change(0, places, int)
        status = command(*options)()
        (folder / "changes").write_text(str(count()))
        return status

    ended = _check(start(folder, work).wait())
    return Pace(int((folder / "changes").read_text()), ended.seconds)


def _check(ended: Ended) -> Ended:
    if ended.status:
        raise RuntimeError(f"What all attempts share can't be made: {ended.errors}")
    return ended


def _train(world: World) -> None:
    """Write the dataset, and train a model and its fine-tunes."""
    import torch
    from shared.training import NAMES, digit_images, image_dataset, save, train
    from transformers import ViTConfig, ViTForImageClassification

    for split, part in PARTS.items():
        dataset = image_dataset(*digit_images(part))
        for files in SHARDS:
            for shard in range(files):
                path = world.sharded(files) / "data" / f"{split}-{shard:05d}-of-{files:05d}.parquet"
                dataset.shard(files, shard, contiguous=True).to_parquet(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    classes = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, **classes))
    train(model, learning_rate=3e-3, epochs=8, seed=0)
    save(model, world.folder / "start")
    for number in range(MODELS):
        model = ViTForImageClassification.from_pretrained(world.folder / "start")
        train(model, learning_rate=2e-3, epochs=2, seed=number + 1)
        save(model, world.runs / f"ft-{number}")


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder with the times of its files, which are part of what is known of a checkpoint."""
    shutil.copytree(source, target, symlinks=True)
    return target
