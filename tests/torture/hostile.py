"""Hostile checkpoints, lists, images and caches: nothing of theirs runs, and they end in one line or do no harm."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torture.attempts import CONTROL, HELD, RAN, Attempt, Task, flaw
from torture.children import run
from torture.world import World, copied

SECONDS = 20.0

# A file that whatever is run would leave, and a line that whatever is printed unescaped would be.
MARKER, FORGED = "marker", "hf-radin: all is well"

Arguments = list[object]


class Payload:
    """Unpickled, it leaves the marker."""

    def __init__(self, folder: Path):
        self.marker = folder / MARKER

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.marker}",)


def attempt(world: World, task: Task) -> Attempt:
    """Make one of the cases and give it to a command; where there are too few, they come again."""
    name, make = CASES[task.number % len(CASES)]
    arguments = make(world, task.folder)
    ended = run(task.folder, *arguments, seconds=SECONDS)
    name = f"{name}, for `{arguments[0]}`"
    if (task.folder / MARKER).exists():
        return Attempt(name, RAN, "code of its own was run")
    if problem := flaw(ended):
        return Attempt(name, *problem)
    if any(line.startswith(FORGED) for line in (ended.output + ended.errors).split("\n")):
        return Attempt(name, CONTROL, "it forged a line")
    return Attempt(name, HELD)


def _checkpoint(world: World, folder: Path, name: str = "bad") -> Path:
    return copied(world.runs / "ft-0", folder / "models" / name)


def _inspect(world: World, *models: object, options: Arguments | tuple = ()) -> Arguments:
    return ["inspect", "--models", *models, world.runs / "ft-1", *options]


def _logits(world: World, *models: object, data: object = None) -> Arguments:
    models = models or (f"{world.runs}/ft-[01]",)
    return ["logits", "--models", *models, "--dataset", data or world.digits, "--cache-dir", "cache"]


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _with_file(name: str, content: Callable[[Path], bytes], *options: str) -> Callable[[World, Path], Arguments]:
    """A checkpoint with one more file, or another one; its weights are gone where it has others."""

    def make(world: World, folder: Path) -> Arguments:
        model = _checkpoint(world, folder)
        if name.endswith(".bin"):
            (model / "model.safetensors").unlink()
        (model / name).write_bytes(content(folder))
        return _inspect(world, model, options=options)

    return make


def _with_link(name: str, target: str) -> Callable[[World, Path], Arguments]:
    """A checkpoint one of whose files is a link, or a pipe."""

    def make(world: World, folder: Path) -> Arguments:
        path = _checkpoint(world, folder) / name
        path.unlink(missing_ok=True)
        os.mkfifo(path) if target == "pipe" else path.symlink_to(target)
        return _inspect(world, path.parent)

    return make


def _with_fields(name: str, command: str = "inspect", **fields: Any) -> Callable[[World, Path], Arguments]:
    """A checkpoint with other fields in one of its files of JSON."""

    def make(world: World, folder: Path) -> Arguments:
        model = _checkpoint(world, folder)
        _edit(model / name, **fields)
        return _inspect(world, model) if command == "inspect" else _logits(world, model, world.runs / "ft-1")

    return make


def _with_code(name: str, field: str) -> Callable[[World, Path], Arguments]:
    """A checkpoint that names a class of its own."""

    def make(world: World, folder: Path) -> Arguments:
        model = _checkpoint(world, folder)
        code = f"import os\nos.system('touch {folder / MARKER}')\nclass Mine: pass\n"
        (model / "mine.py").write_text(code)
        (model / "modeling_mine.py").write_text(code)
        _edit(model / name, auto_map={field: "mine.Mine"}, model_type="mine")
        return _logits(world, model, world.runs / "ft-1")

    return make


def _named(name: str | bytes) -> Callable[[World, Path], Arguments]:
    """A checkpoint in a folder of this name, which can't be used."""

    def make(world: World, folder: Path) -> Arguments:
        model = _checkpoint(world, folder, os.fsdecode(name))
        (model / "preprocessor_config.json").unlink()
        return _inspect(world, "models/*")

    return make


def _label(text: str) -> Callable[[World, Path], Arguments]:
    """Two checkpoints with a class of this name, of which the dataset has nothing."""

    def make(world: World, folder: Path) -> Arguments:
        models = [_checkpoint(world, folder, name) for name in ("bad", "worse")]
        for model in models:
            labels = json.loads((model / "config.json").read_text())["id2label"] | {"3": text}
            label2id = {name: int(index) for index, name in labels.items()}
            _edit(model / "config.json", id2label=labels, label2id=label2id)
        return _logits(world, *models)

    return make


def _listed(name: str, content: Callable[[Path], str]) -> Callable[[World, Path], Arguments]:
    """A list of checkpoints."""

    def make(world: World, folder: Path) -> Arguments:
        (folder / name).write_text(content(folder))
        return _inspect(world, folder / name)

    return make


def _pictured(name: str, content: Callable[[], bytes], label: str = "cat") -> Callable[[World, Path], Arguments]:
    """A dataset in which one image is this."""

    def make(world: World, folder: Path) -> Arguments:
        images = folder / "images" / "validation"
        for each in ("zero", label):
            (images / each).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / each / "a.png")
        (images / label / name).write_bytes(content())
        return _logits(world, data=folder / "images")

    return make


def _png(width: int, height: int) -> bytes:
    """A small file that says it is a large image, with all of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate = zlib.compressobj(9)
    row = bytes(width // 8 + 2)
    data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _metadata(rows: str) -> Callable[[World, Path], Arguments]:
    """A dataset whose table names its images."""

    def make(world: World, folder: Path) -> Arguments:
        images = folder / "images" / "validation"
        images.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / "a.png")
        (images / "metadata.csv").write_text(rows)
        return _logits(world, data=folder / "images")

    return make


def _pickled_cache(pattern: str) -> Callable[[World, Path], Arguments]:
    """A cache in which an array is a pickle."""

    def make(world: World, folder: Path) -> Arguments:
        copied(world.cache, folder / "cache")
        path = sorted((folder / "cache").glob(pattern))[0]
        with path.open("wb") as file:
            content = np.array([Payload(folder)], dtype=object)
            np.savez(file, content) if path.suffix == ".npz" else np.save(file, content)
        return world.options(folder)

    return make


def _script(world: World, folder: Path) -> Arguments:
    """A metric's script in the working directory."""
    (folder / "mine").mkdir()
    (folder / "mine" / "mine.py").write_text(f"import os\nos.system('touch {folder / MARKER}')\n")
    return [*world.options(folder), "--metrics", "accuracy,mine"]


def _loader(world: World, folder: Path) -> Arguments:
    """A dataset with a loading script."""
    data = copied(world.digits, folder / "digits")
    (data / "digits.py").write_text(f"import os\nos.system('touch {folder / MARKER}')\n")
    return _logits(world, data=data)


def _circle(world: World, folder: Path) -> Arguments:
    """A folder of checkpoints that holds itself."""
    _checkpoint(world, folder)
    (folder / "models" / "again").symlink_to(folder / "models")
    return _inspect(world, "models/**", "models/*")


def _cooked(**fields: Any) -> Callable[[World, Path], Arguments]:
    """A recipe with other ingredients or weights."""

    def make(world: World, folder: Path) -> Arguments:
        recipe = json.loads((world.soup / "recipe.json").read_text())
        (folder / "recipe.json").write_text(json.dumps(recipe | {"recipe": recipe["recipe"] | fields}))
        return ["average", "--recipe", "recipe.json", "--output", "cooked"]

    return make


def _pushed_link(world: World, folder: Path) -> Arguments:
    """A soup whose weights are a link to a file of the system."""
    soup = copied(world.soup, folder / "soup")
    (soup / "model.safetensors").unlink()
    (soup / "model.safetensors").symlink_to("/etc/passwd")
    return ["card", soup]


def _index(weight_map: object) -> Callable[[World, Path], Arguments]:
    """A checkpoint in shards, by an index of them."""

    def make(world: World, folder: Path) -> Arguments:
        model = _checkpoint(world, folder)
        (model / "model.safetensors").rename(folder / "models" / "outside.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return _inspect(world, model)

    return make


def _pickle(folder: Path) -> bytes:
    return pickle.dumps(Payload(folder))


def _header(text: bytes, length: int | None = None) -> Callable[[Path], bytes]:
    return lambda folder: (len(text) if length is None else length).to_bytes(8, "little") + text


LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)
YAML = "!!python/object/apply:os.system ['touch {}']"
CARD = "---\nlicense: {}\n---\n# A model\n"

CASES: list[tuple[str, Callable[[World, Path], Arguments]]] = [
    *((f"a pickle as {name}", _with_file(name, _pickle)) for name in ("pytorch_model.bin", "model.safetensors")),
    *((f"a pickle as {name}", _with_file(name, _pickle)) for name in ("training_args.bin", "optimizer.pt", "a.pkl")),
    ("a pickle that may be read", _with_file("pytorch_model.bin", _pickle, "--allow-pickle")),
    ("a class of its own, config", _with_code("config.json", "AutoConfig")),
    ("a class of its own, model", _with_code("config.json", "AutoModelForImageClassification")),
    ("a class of its own, processor", _with_code("preprocessor_config.json", "AutoImageProcessor")),
    ("a script of a metric", _script),
    ("a script of a dataset", _loader),
    *((f"a pickle in {name}", _pickled_cache(f"banks/*/{name}")) for name in ("labels.npy", "ids.npy", "digests.npy")),
    *((f"a pickle in {name}", _pickled_cache(f"banks/*/{name}")) for name in ("logits/*.npy", "soups/*.npz")),
    *((f"a pickle in {name}", _pickled_cache(name)) for name in ("banks/*/pruned/*.npz", "weights/*.npz")),
    ("a shard outside", _index({"a": "../outside.safetensors"})),
    ("a shard of the system", _index({"a": "/etc/passwd"})),
    ("a shard of no name", _index({"a": "\0"})),
    ("a shard that is the index", _index({"a": "model.safetensors.index.json"})),
    ("shards of no map", _index([["a"]])),
    ("no weights but those elsewhere", _with_fields("config.json", transformers_weights="../outside.safetensors")),
    *(
        (f"{name}, which is {target}", _with_link(name, target))
        for name in ("config.json", "model.safetensors", "README.md", "preprocessor_config.json", "trainer_state.json")
        for target in ("pipe", "/dev/zero")
    ),
    ("weights that link to themselves", _with_link("model.safetensors", "model.safetensors")),
    ("a header of 2^63 bytes", _with_file("model.safetensors", _header(b"{}", 2**63))),
    ("a header of brackets", _with_file("model.safetensors", _header(b'{"a":' + b"[" * 100_000))),
    ("a header with huge shapes", _with_file("model.safetensors", _header(
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,0]}}'))),
    ("a header of 300 000 names", _with_file("model.safetensors", _header(b"{" + b",".join(
        b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(300_000)) + b"}"))),
    ("a config of 100 MB", _with_file("config.json", lambda folder: b" " * 100_000_000 + b"{}")),
    ("a config of brackets", _with_file("config.json", lambda folder: b"[" * 100_000)),
    ("a billion classes", _with_fields("config.json", id2label=None, label2id=None, num_labels=10**9)),
    ("a billion classes, run", _with_fields("config.json", "logits", id2label=None, label2id=None, num_labels=10**9)),
    ("three million layers", _with_fields("config.json", num_hidden_layers=3_000_000)),
    ("a hidden size of a billion", _with_fields("config.json", hidden_size=10**9)),
    ("images of a billion pixels", _with_fields("config.json", image_size=10**9)),
    ("patches of no size", _with_fields("config.json", patch_size=0)),
    ("images scaled to 100 000 pixels", _with_fields(
        "preprocessor_config.json", "logits", size={"height": 100_000, "width": 100_000})),
    ("no such filter", _with_fields("preprocessor_config.json", "logits", resample=999)),
    ("means of a million channels", _with_fields("preprocessor_config.json", "logits", image_mean=[0.5] * 1_000_000)),
    ("names like a line of ours", _named(f"bad\n{FORGED}")),
    ("names that clear the screen", _named("bad\x1b[2J")),
    ("names that turn", _named("bad\u202egnp")),
    ("names that are no text", _named(b"bad\xff")),
    ("names like an option", _named("--output")),
    ("a class like a line of ours", _label(f"cat\n{FORGED}")),
    ("a class that clears the screen", _label("cat\x1b[2J")),
    ("a list of itself", _listed("list.txt", lambda folder: "list.txt\n")),
    ("a list of brackets", _listed("list.yaml", lambda folder: "[" * 100_000)),
    ("a list that laughs", _listed("list.yaml", lambda folder: LAUGHS)),
    ("a list that calls", _listed("list.yaml", lambda folder: YAML.format(folder / MARKER))),
    ("a list that holds itself", _listed("list.yaml", lambda folder: "&a [*a]")),
    ("a list of a million", _listed("list.txt", lambda folder: "gone\n" * 1_000_000)),
    ("a list that clears the screen", _listed("list.txt", lambda folder: "gone\x1b[2J\n")),
    ("a list of devices", _listed("list.txt", lambda folder: "/dev/zero\n/dev/stdin\n")),
    ("a card that calls", _with_file("README.md", lambda folder: CARD.format(YAML.format(folder / MARKER)).encode())),
    ("a card that laughs", _with_file("README.md", lambda folder: b"---\n" + LAUGHS.encode() + b"---\n")),
    ("a folder that holds itself", _circle),
    ("a PNG of 13 000 x 13 000", _pictured("b.png", lambda: _png(13_000, 13_000))),
    ("a PNG of 60 000 x 60 000", _pictured("b.png", lambda: _png(60_000, 60_000))),
    ("a PNG that is cut", _pictured("b.png", lambda: _png(8, 8)[:40])),
    ("a PNG of no pixels", _pictured("b.png", lambda: _png(0, 0))),
    ("an image that is a pickle", _pictured("b.png", lambda: pickle.dumps([1]))),
    ("an empty image", _pictured("b.jpg", lambda: b"")),
    ("a class folder like a line of ours", _pictured("b.png", lambda: b"", f"cat\n{FORGED}")),
    ("an image outside", _metadata("file_name,label\n../../../../../../etc/passwd,zero\n")),
    ("an image that is a device", _metadata("file_name,label\n/dev/zero,zero\n")),
    ("an image of a class that clears the screen", _metadata("file_name,label\na.png,ze\x1b[2Jro\n")),
    ("a recipe of a device", _cooked(ingredients=["/dev/zero"], weights=[1.0])),
    ("a recipe of no numbers", _cooked(weights=[float("nan")] * 3)),
    ("a recipe of huge numbers", _cooked(weights=[1e308, 1e308, -1e308])),
    ("a recipe of a million", _cooked(ingredients=["gone"] * 1_000_000, weights=[1e-6] * 1_000_000)),
    ("a recipe that clears the screen", _cooked(ingredients=["gone\x1b[2J"], weights=[1.0])),
    ("a soup with weights of the system", _pushed_link),
]  # fmt: skip
