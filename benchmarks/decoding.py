"""The decoder of Pillow beside those of torchvision and, if it is installed, torchcodec.

    python benchmarks/decoding.py [--rounds 5]

Made-up pictures of three sizes are written as JPEG and PNG of many kinds. For each decoder it is said of how many of
them it gives Pillow's pixels, and what an image takes: decoding alone, and decoding and preparing it for a ViT, where
the processor of transformers takes the decoder's tensor: of torchvision and JPEG files as the package does it. One
thread, times of the processor. Then blocks of JPEG files are decoded by the package, with torchvision and without, and
files that are cut off or have a few other bytes, each in a process of its own, since a decoder may end it.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from transformers import ViTImageProcessor

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.images.decode import Jpegs, Source, open_image, torchvision_decoder
from hf_radin.images.decode import decode as decode_block
from hf_radin.images.split import DataSource, open_split

SIZES = {28: 28, 224: 224, 500: 224}  # of a picture, and of what is made of it
SAVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"JPEG, quality {quality}": ("JPEG", "RGB", {"quality": quality}) for quality in (30, 75, 95)},
    **{f"JPEG, subsampling {number}": ("JPEG", "RGB", {"subsampling": number}) for number in (0, 1, 2)},
    "JPEG, progressive": ("JPEG", "RGB", {"progressive": True}),
    **{f"JPEG, {mode}": ("JPEG", mode, {}) for mode in ("L", "CMYK")},
    "JPEG, on its side": (
        "JPEG",
        "RGB",
        {"exif": bytes.fromhex("45786966000049492a000800000001001201030001000000060000000000")},
    ),
    **{f"PNG, {mode}": ("PNG", mode, {}) for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")},
}
BROKEN = 150


def picture(size: int) -> Image.Image:
    """A picture with large and small shapes, a pixel wider than high."""
    generator, total = np.random.default_rng(0), np.zeros((size, size + 1, 3))
    for cells in (2, 5, 12, 30, 80):
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((size + 1, size), Image.Resampling.BICUBIC)) / cells
    return Image.fromarray(np.uint8(255 * (total - total.min()) / np.ptp(total)))


def written(size: int, name: str) -> bytes:
    kind, mode, options = SAVED[name]
    image, file = picture(size), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    (image if mode == "I;16" else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def by_pillow(content: bytes) -> torch.Tensor:
    image = open_image({"bytes": content, "path": None}).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def by_torchvision(content: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)


def decoders() -> dict[str, Callable[[bytes], torch.Tensor]]:
    """Those that are here, by name."""
    all_decoders: dict[str, Callable[[bytes], torch.Tensor]] = {"Pillow": by_pillow, "torchvision": by_torchvision}
    try:
        torchcodec = import_module("torchcodec.decoders")  # by name: it is no dependency, and may have no types here
    except ImportError:
        return all_decoders
    return {**all_decoders, "torchcodec": torchcodec.decode_image}


def same(pixels: torch.Tensor, others: torch.Tensor) -> bool:
    return pixels.dtype == others.dtype and torch.equal(pixels, others)


@lru_cache
def jpegs(processor: ViTImageProcessor) -> Jpegs:
    return Jpegs(partial(prepare_image, processor), torchvision_decoder())


def share_of_time(size: int, rounds: int) -> str:
    """How much of the time a block of JPEG files takes with the package's way, up to packing, if not all by Pillow."""
    image = {"image": {"bytes": written(size, "JPEG, quality 75"), "path": None}, "label": 0}
    dataset = Dataset.from_list([image] * 24).cast_column("image", datasets.Image())
    split = open_split(DataSource(DatasetDict({"test": dataset}), "test"))
    processor = ViTImageProcessor(size={"height": SIZES[size], "width": SIZES[size]})
    with_torchvision, without = (Source(split, partial(prepare_image, processor), int, "raise", 24) for _ in range(2))
    without.jpegs.is_same = False
    rows, ratios = list(split.rows.take(24)), []
    for _ in range(rounds + 1):
        marks = [time.process_time()]
        for source in (with_torchvision, without):
            decode_block(source, (0, 0), rows)
            marks.append(time.process_time())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    measured = ratios[1:]  # the first round finds the tables
    return f"{statistics.median(measured):.2f} ({min(measured):.2f} to {max(measured):.2f})"


def prepare(
    name: str, decode: Callable[[bytes], torch.Tensor], processor: ViTImageProcessor, content: bytes
) -> object:
    """A model's inputs of a file: of Pillow, and of JPEG files with torchvision, as the package makes them."""
    image, by_package = {"bytes": content, "path": None}, partial(prepare_image, processor)
    if name == "Pillow":
        return by_package(open_image(image))
    if name == "torchvision" and content.startswith(b"\xff\xd8"):
        return by_package(jpegs(processor).pixels(image))
    return processor(images=decode(content), return_tensors="pt")


def microseconds(run: Callable[[], object], rounds: int) -> str:
    """The median of rounds, and their range."""
    run()
    costs = []
    for _ in range(rounds):
        count, begun = 0, time.process_time()
        while time.process_time() - begun < 0.05:
            run()
            count += 1
        costs.append((time.process_time() - begun) / count * 1e6)
    return f"{statistics.median(costs):,.0f} ({min(costs):,.0f} to {max(costs):,.0f})"


def outcome(decode: Callable[[bytes], torch.Tensor], content: bytes) -> str:
    """What becomes of a broken file, beside what Pillow makes of it, in a process of its own."""

    def pixels(run: Callable[[bytes], torch.Tensor]) -> torch.Tensor | None:
        try:
            return run(content)
        except Exception:  # each decoder has its own errors
            return None

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        expected, answer = pixels(by_pillow), pixels(decode)
        if expected is None or answer is None:
            text = "as Pillow" if expected is answer else "raises alone" if answer is None else "reads alone"
        else:
            text = "as Pillow" if same(expected, answer) else "other pixels"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return f"ends the process (signal {os.WTERMSIG(status)})" if os.WIFSIGNALED(status) else file.read()


def broken(name: str) -> list[bytes]:
    """Files that are cut off, or have up to three other bytes."""
    generator, whole = np.random.default_rng(0), written(64, name)
    files = []
    for number in range(BROKEN):
        content = bytearray(whole)
        if number % 3 == 0:
            content = content[: generator.integers(4, len(content))]
        else:
            for place in generator.integers(2, len(content), 1 + number % 3):
                content[place] = generator.integers(256)
        files.append(bytes(content))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    every = decoders()
    for name, decode in every.items():
        other = [
            f"{saved} at {size} px"
            for size in SIZES
            for saved in SAVED
            if not same(decode(written(size, saved)), by_pillow(written(size, saved)))
        ]
        print(
            f"- {name} gives other pixels of {len(other)} of {len(SIZES) * len(SAVED)}: {', '.join(other) or 'none'}"
        )
    print("\n| microseconds | " + " | ".join(f"{name} | and prepared" for name in every))
    print("|---|" + "---:|" * 2 * len(every))
    for saved in ("JPEG, quality 75", "PNG, RGB"):
        for size, target in SIZES.items():
            processor, content = ViTImageProcessor(size={"height": target, "width": target}), written(size, saved)
            cells = [
                microseconds(run, args.rounds)
                for name, decode in every.items()
                for run in (partial(decode, content), partial(prepare, name, decode, processor, content))
            ]
            print(f"| {saved}, {size} px | {' | '.join(cells)} |", flush=True)
    for size in SIZES:
        print(f"- A block of JPEG files of {size} px, of Pillow's time: {share_of_time(size, 6 * args.rounds)}")
    for name, decode in every.items():
        for saved in ("JPEG, quality 75", "JPEG, progressive", "PNG, RGB"):
            counts = Counter(outcome(decode, content) for content in broken(saved))
            text = ", ".join(f"{count} {what}" for what, count in counts.most_common())
            print(f"- {name}, {BROKEN} broken files, {saved}: {text}", flush=True)


if __name__ == "__main__":
    main()
