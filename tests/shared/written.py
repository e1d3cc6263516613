"""Weights averaged from files to files, without torch; run as a module, on a system that has no `preadv`.

python -m shared.written FOLDER ... OUTPUT
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

WEIGHTS = (0.123, 0.5, 0.377)
# What Windows lacks.
POSIX_CALLS = ("preadv", "pwrite", "posix_fadvise")


def write_average(
    folders: Sequence[Path],
    output: Path,
    kind: str,
    weights: Sequence[float] = WEIGHTS,
    *,
    max_shard_size: int | str = "1GB",
    allow_pickle: bool = False,
    **options,
) -> None:
    """Write an average into a new folder, all but `counter` in one dtype; `options` are those of `average`."""
    from hf_radin.weights.average_tensors import average, open_files, write

    output.mkdir()
    with ExitStack() as stack:
        files = [stack.enter_context(open_files(folder, allow_pickle=allow_pickle)) for folder in folders]
        header = {
            name: (kind if name != "counter" else tensor.dtype, tensor.shape) for name, tensor in files[0].items()
        }
        dtypes = {name: dtype for name, (dtype, _) in header.items()}
        write(output, header, partial(average, files, weights, dtypes, **options), max_shard_size=max_shard_size)


if __name__ == "__main__":
    for call in POSIX_CALLS:
        delattr(os, call)
    *sources, target = map(Path, sys.argv[1:])
    write_average(sources, target, "F32", chunk=100)
