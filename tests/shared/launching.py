"""`accelerate launch`, as a user starts it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "soup.py"


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


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
