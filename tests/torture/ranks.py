"""Several processes of one run, forked from a process that has loaded everything, as a launcher starts them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from torture.attempts import Ended
from torture.children import PATIENCE, Child, command, start


def start_together(folder: Path, processes: int, *arguments: object) -> list[Child]:
    """Start a command in several processes that find each other by what `accelerate launch` sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(processes):
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        children.append(start(folder, command(*arguments), environment=environment))
    return children


def run_together(folder: Path, processes: int, *arguments: object, seconds: float = 2 * PATIENCE) -> Ended:
    """Run a command in several processes; what came of it is the main one's, or that of the first that failed."""
    ended = [child.wait(seconds) for child in start_together(folder, processes, *arguments)]
    return next((each for each in ended if each.status != 0), ended[0])
