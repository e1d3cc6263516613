"""The time that checking the files of a bank takes, beside that of the search that reads them.

    python benchmarks/hashes.py [--rounds 3] [--folder DIR]

Each round takes a bank of 50,000 images, 1,000 classes and 72 models in float16 (7.2 GB, made by `ensemble.py`), and
prunes it, which is what a search does first: with its SHA-256s checked before and without, from the disk (the files
are dropped from the page cache first) and from memory. Medians of the rounds and their range are printed.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from ensemble import CORES, make_bank, spread

from hf_radin.recipes.ensemble import Stored
from hf_radin.recipes.pruning import prune
from hf_radin.runtime.files import sha256_of_each


def drop(files: list[Path]) -> None:
    """Let the page cache forget files."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(files: list[Path], *, checked: bool) -> tuple[float, float]:
    """What checking took, and what pruning after it."""
    begun = time.perf_counter()
    if checked and None in sha256_of_each(files):
        raise AssertionError("a file can't be read")
    between = time.perf_counter()
    prune([Stored.of(np.load(path, mmap_mode="r")) for path in files], threads=CORES)
    return between - begun, time.perf_counter() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--models", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the bank here (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.folder or Path(temporary)) / f"bank-{args.images}-{args.classes}-{args.models}-0"
        if not (place / "labels.npy").exists():
            place.mkdir(parents=True, exist_ok=True)
            make_bank(place, args.images, args.classes, args.models, seed=0)
        files = [place / f"{model}.npy" for model in range(args.models)]
        size = sum(path.stat().st_size for path in files) / 1e9
        print(f"{args.models} files, {size:.1f} GB, {CORES} cores\n")
        print("| | checking, GB/s | checking, seconds | reading and pruning | the whole, with checks : without |")
        print("|---|---:|---:|---:|---:|")
        for name, is_cold in (("from the disk", True), ("from memory", False)):
            rows = []
            for _ in range(args.rounds):
                times = []
                for checked in (False, True):
                    if is_cold:
                        drop(files)
                    times.append(seconds(files, checked=checked))
                (_, bare), (checking, pruning) = times
                rows.append((size / checking, checking, bare, (checking + pruning) / bare))
            columns = [list(column) for column in zip(*rows, strict=True)]
            cells = (spread(values, form) for values, form in zip(columns, (".2f", ".1f", ".1f", ".2f"), strict=True))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
