"""What it costs to find images that two splits share, before anything is computed.

    python benchmarks/overlap.py [--images 10000] [--rounds 5]

Images are Fashion-MNIST's, as PNG files: in parquet, or a file each in a folder for each class. Two splits are listed,
read and digested, then compared again from their cached digests. For comparison, each image of one split is decoded
once, which computing logits needs in any case. On a CPU, one thread; medians and ranges of the rounds.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import numpy as np
from PIL import Image
from zoo.fashion import SOURCE, read_idx

from hf_radin.images.digests import refuse_shared_splits
from hf_radin.images.split import DataSource, Split, open_split

datasets.disable_progress_bars()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, source: Path, images: int) -> dict[str, Path]:
    """The same two splits as parquet and as files."""
    pixels = read_idx(source / "train-images-idx3-ubyte.gz")
    labels = read_idx(source / "train-labels-idx1-ubyte.gz")
    label = datasets.ClassLabel(names=[str(number) for number in range(10)])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    for start, split in ((0, "validation"), (images, "test")):
        part = slice(start, start + images)
        files = [png(image) for image in pixels[part]]
        rows = {"image": [{"bytes": file, "path": None} for file in files], "label": labels[part].tolist()}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / "parquet" / f"{split}.parquet")
        for number, (file, name) in enumerate(zip(files, rows["label"], strict=True)):
            place = folder / "files" / split / str(name)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:05d}.png").write_bytes(file)
    return {name: folder / name for name in ("parquet", "files")}


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def decode(split: Split) -> None:
    image = datasets.Image()
    for row in split.rows:
        image.decode_example(row[split.image_column])


def main(source: Path, images: int, rounds: int) -> None:
    steps = ("open both", "read and compare both", "again", "decode one")
    print(f"| {images:,} and {images:,} images, seconds | {' | '.join(steps)} |\n|---|{'---:|' * len(steps)}")
    with tempfile.TemporaryDirectory() as place:
        for name, folder in write(Path(place), source, images).items():
            taken: dict[str, list[float]] = {step: [] for step in steps}
            for number in range(rounds):
                home = Path(place) / f"cache-{name}-{number}"
                (folder / "round.txt").write_text(str(number), "utf-8")  # the listing differs, so no cached one fits
                splits: list[Split] = []

                def open_both(folder: Path = folder, splits: list[Split] = splits) -> None:
                    splits += [open_split(DataSource(folder, split)) for split in ("test", "validation")]

                def compare(home: Path = home, splits: list[Split] = splits) -> None:
                    refuse_shared_splits(splits[0], splits[1], home)

                taken["open both"].append(seconds(open_both))
                taken["read and compare both"].append(seconds(compare))
                taken["again"].append(seconds(compare))
                taken["decode one"].append(seconds(partial(decode, splits[0])))
            cells = (
                f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                for values in taken.values()
            )
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Time the search for images that two splits share."
    )
    parser.add_argument("--images", type=int, default=10_000, help="in each split")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder with Fashion-MNIST's .gz files")
    args = parser.parse_args()
    main(args.source, args.images, args.rounds)
