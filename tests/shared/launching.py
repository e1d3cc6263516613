"""`accelerate launch`, as a user starts it."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.timeless import contents

EXAMPLE = Path(__file__).parents[2] / "examples" / "soup.py"
SMALL_BLOCKS = Path(__file__).with_name("small_blocks.py")


# Runs the example and leaves a file that says how many processes there were: else one could pass for two.
WITNESS = """
import pathlib, runpy, sys
from accelerate import Accelerator
state = Accelerator()
pathlib.Path(f"process-{state.process_index}-of-{state.num_processes}").touch()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(
    folder: Path, processes: int, *options: str, mixed_precision: str = "no", script: Path = EXAMPLE
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` on the CPU; its --cpu alone starts one process, whatever --num_processes says."""
    (folder / "witness.py").write_text(WITNESS)
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = ["-m", "accelerate.commands.launch", *several, "--num_processes", str(processes), "--num_machines", "1"]
    command += ["--mixed_precision", mixed_precision, "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    run = subprocess.run(
        [sys.executable, *command, "witness.py", str(script), *map(str, options), "--cache-dir", "cache"],
        cwd=folder,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONFAULTHANDLER": "1"},  # says where a process aborts
        capture_output=True,
        text=True,
    )
    witnesses = sorted(path.name for path in folder.glob("process-*"))
    assert witnesses == [f"process-{index}-of-{processes}" for index in range(processes)], run.stderr
    return run


def banks_of_processes(folder: Path, models: str, counts: Sequence[int]) -> list[dict[str, bytes]]:
    """What is in the caches of runs with so many processes each, of the split in `folder/data`."""
    caches = []
    for processes in counts:
        place = folder / f"{processes}"
        place.mkdir()
        run = launch(place, processes, models, folder / "data", script=SMALL_BLOCKS)
        assert run.returncode == 0, run.stderr
        caches.append(contents(place / "cache"))
    return caches


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
