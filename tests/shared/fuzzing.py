"""Files that somebody might have made: honest ones with a thing changed, by seed. Each is read, or refused in a line.

`cases(kind, seed, count)` gives `(name, bytes)` pairs without hypothesis; `files(kind)` is the same as a strategy. The
kinds are the keys of `KINDS`.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hf_radin.runtime.text import printable

# Numbers that a field may hold in place of its own, and what else JSON has.
NUMBERS = (-1, 0, 1, 2, 3.5, 1e-308, 1e308, 10**9, 2**31, 2**63, 2**64, 10**18, 10**400, True)
CONSTANTS = (float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "7", "a\nb", "\x1b[2J", "\r", "\u202e", "\ud800", "../../x", "/dev/zero", "\0", "é", "x" * 5000)
OTHERS = (None, [], {}, [[]], {"": None}, [1, "a", None], {"a": {"b": [1]}})
VALUES: tuple[Any, ...] = (*NUMBERS, *CONSTANTS, *TEXTS, *OTHERS)

CONFIG: dict[str, Any] = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "initializer_range": 0.02,
    "id2label": {str(number): f"class {number}" for number in range(10)},
    "label2id": {f"class {number}": number for number in range(10)},
    "problem_type": "single_label_classification",
    "transformers_version": "5.24.0",
}
STAGES: dict[str, Any] = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_labels": 3,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_channels": 3,
}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "start",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["classifier"],
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "revision": None,
    "bias": "none",
}
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
RECIPE: dict[str, Any] = {
    "format_version": 2,
    "recipe": {"ingredients": ["runs/a", "runs/b"], "weights": [0.5, 0.5]},
    "method": "radin",
    "measured": True,
    "passes": {"logits": 2, "soups": 1.5, "probabilities": 0.0, "batchnorm": 0.0},
    "data": {"name": "pets", "split": "validation", "config_name": None, "revision": None},
    "processor": {"size": {"height": 8, "width": 8}},
    "classes": ["cat", "dog"],
    "images": 600,
    "versions": {"hf_radin": "0.1.0"},
    "batchnorm": None,
    "ingredients": [
        {"id": "runs/a", "repo_id": None, "subfolder": None, "revision": "sha256:0", "hyperparameters": {"seed": "1"}},
        {"id": "runs/b", "repo_id": "org/b", "subfolder": "x", "revision": "1" * 40, "order": [1, 0]},
    ],
    "results": [
        {"name": "soup", "split": "validation", "metrics": {"accuracy": 0.9}, "images": 600, "interval": [0.8, 0.95]}
    ],
    "measurements": [
        {
            "ingredients": ["runs/a"],
            "weights": [1.0],
            "proposal": "single",
            "estimate": 0.8,
            "measured": 0.8,
            "images": 600,
            "passes": 0.0,
        }
    ],
}
CARD: dict[str, Any] = {
    "license": "mit",
    "datasets": ["org/pets"],
    "base_model": "org/start",
    "tags": ["image-classification"],
    "model-index": [
        {
            "name": "a",
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"name": "pets", "type": "org/pets", "config": "default", "split": "validation"},
                    "metrics": [{"type": "accuracy", "value": 0.9}],
                }
            ],
        }
    ],
}
STATE: dict[str, Any] = {
    "best_model_checkpoint": "out/checkpoint-2",
    "trial_params": {"learning_rate": 1e-3, "seed": 3},
    "log_history": [],
}
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 4},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
    "c": {"dtype": "BF16", "shape": [0], "data_offsets": [32, 32]},
}


def changed(content: Any, random: random.Random) -> Any:
    """A copy of JSON in which one place, drawn at random, is another value, is gone, stands twice or is new."""
    content = json.loads(json.dumps(content))
    place, name = random.choice(list(_places(content)))
    what = random.choice(("value", "value", "value", "gone", "new", "deeper"))
    if what == "gone":
        del place[name]
    elif what == "new" and isinstance(place, dict):
        place[random.choice(TEXTS)] = random.choice(VALUES)
    elif what == "deeper":
        place[name] = [place[name]] * random.choice((1, 2, 50))
    else:
        place[name] = random.choice(VALUES)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in JSON: the list or object, and the index or name in it."""
    for name in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, name
        if isinstance(content[name], (dict, list)):
            yield from _places(content[name])


def spoilt(content: bytes, random: random.Random) -> bytes:
    """Bytes with a part that is cut, doubled, turned, nested or of another encoding."""
    at = random.randrange(len(content) + 1)
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: content[:at],
        lambda: content[:at] + content,
        lambda: content[:at] + bytes([random.randrange(256)]) + content[at + 1 :],
        lambda: content[:at] + b"[" * 100_000 + content[at:],
        lambda: b'{"a":' * 20_000 + content,
        lambda: content.decode(errors="replace").encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: b"",
        lambda: content.replace(b'"', b"'"),
        lambda: content.replace(b"2", b"9" * 5000, 1),
        lambda: b"\xff" * 64,
    )
    return random.choice(kinds)()


def _json(*contents: Any) -> Callable[[random.Random], bytes]:
    def draw(random: random.Random) -> bytes:
        content = random.choice(contents)
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            content = changed(content, random) if content else content
        return json.dumps(content).encode()

    return lambda random: draw(random) if random.random() < 0.8 else spoilt(json.dumps(contents[0]).encode(), random)


def _weights(random: random.Random) -> bytes:
    """A file of safetensors whose header, length or content was changed."""
    text = _json(HEADER)(random) if random.random() < 0.5 else json.dumps(HEADER).encode()
    if random.random() < 0.1:  # a name twice, which no dictionary has
        text = text.replace(
            *random.choice(((b'"c"', b'"a"'), (b'"pt"', b'"pt", "format": "np"'), (b"{", b'{"a": {}, ')))
        )
    if random.random() < 0.2:
        wrong = (b"-0", b"24.0", b"2.4e1", b"024", b"NaN", b"25", b"8", b"24 ", b'"24"', b"true")
        text = text.replace(b"24", random.choice(wrong), 1)
    text = b" " * random.choice((0, 0, 0, 3)) + text + b" " * random.choice((0, 0, 1, 7))
    length = random.choice((*[len(text)] * 12, len(text) + 1, 0, 2**63, 10**8))
    return struct.pack("<Q", length) + text + b"\0" * random.choice((*[32] * 12, 31, 33, 0))


def _card(random: random.Random) -> bytes:
    content = changed(CARD, random)
    text = yaml.safe_dump(json.loads(json.dumps(content)), allow_unicode=True).encode(errors="surrogatepass")
    laughs = "a: &a [x]\n"
    for first, second in pairwise("abcdefghijklmnop"):
        laughs += f"{second}: &{second} [{f'*{first},' * 9}]\n"
    extra = ("", "", "x: !!python/object/apply:os.system [exit]\n", laughs, "y: &y [*y, *y]\n", "z: 1:1:1:1\n")
    text += random.choice(extra).encode()
    front = b"---\n" + (text if random.random() < 0.7 else spoilt(text, random)) + b"\n---\n"
    return front + b"# Card\n### Training hyperparameters\n- learning_rate: 0.1\n"


def _list(random: random.Random) -> bytes:
    """A text file that lists checkpoints."""
    lines = [random.choice(("a", "b", "# note", "", "*", "[", "**", *TEXTS[:-1])) for _ in range(random.randrange(6))]
    text = "\n".join(lines).encode(errors="surrogatepass")
    return text if random.random() < 0.7 else spoilt(text, random)


def _yaml_list(random: random.Random) -> bytes:
    return _json({"models": ["a", "b"]}, ["a", "b"])(random)


def _labels(random: random.Random) -> bytes:
    """A `metadata.csv` of the images 0.png to 2.png."""
    labels = [random.choice(("cat", "dog", "1", "", "1.5", "true", *TEXTS)) for _ in range(3)]
    lines = ["file_name,label", *(f"{number}.png,{label}" for number, label in enumerate(labels))]
    text = "\n".join(lines).encode(errors="surrogatepass")
    return text if random.random() < 0.5 else spoilt(text, random)


# What is drawn for each kind of file.
KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "config": _json(CONFIG, STAGES),
    "weights": _weights,
    "index": _json(INDEX),
    "adapter": _json(ADAPTER),
    "processor": _json(PROCESSOR),
    "recipe": _json(RECIPE),
    "state": _json(STATE),
    "card": _card,
    "list": _list,
    "yaml list": _yaml_list,
    "labels": _labels,
}


def cases(kind: str, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `count` files of a kind: the same for the same seed."""
    for number in range(count):
        yield f"{kind} {seed}.{number}", KINDS[kind](random.Random(f"{kind} {seed}.{number}"))


def files(kind: str) -> st.SearchStrategy[bytes]:
    """The files of a kind, as a strategy."""
    return st.randoms(use_true_random=False).map(KINDS[kind])


# How tests draw them: the same in each run, and without a time-out, which would depend on the machine.
SETTINGS = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def outcome(read: Callable[[], object]) -> str:
    """What comes of reading a file: empty if it is read, else the error, which is a ValueError of one line.

    Raises:
        Exception: whatever else is raised.
    """
    try:
        read()
    except ValueError as error:
        assert printable(error)
        return str(error)
    return ""
