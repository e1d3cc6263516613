"""The commands of docs/scale.md are commands: accelerate and hf-radin understand them as they stand there."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from hf_radin.cli.main import command_parser

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
LAUNCHES = [words for words in map(shlex.split, re.findall(r"\| `(.*?)` \|", PAGE)) if "launch" in words]


def understood(words: list[str]):
    """What accelerate and hf-radin make of the words behind `accelerate launch`."""
    launch = launch_command_parser().parse_args(words)
    command, *options = launch.training_script_args
    assert (launch.module, launch.training_script, command) == (True, "hf_radin", "soup")
    return launch, command_parser().parse_args(["soup", *(["--models", "m"] if options == ["ARGS"] else options)])


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_a_launch_is_understood(words):
    launch, _ = understood(words[words.index("launch") + 1 :])
    assert launch.num_processes in (1, 2, 8) and launch.multi_gpu == (launch.num_processes > 1)


def test_the_batch_script_starts_a_launch_on_each_machine(tmp_path):
    """With stand-ins for Slurm, which run the task of the third machine and print what it would start."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", PAGE, flags=re.S)
    stand_ins = {
        "scontrol": 'printf "%s\\n" node-1 node-2',
        "srun": 'SLURM_PROCID=2 "$@"',
        "accelerate": 'printf "%s\\n" "$@"',
    }
    for name, does in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[1-4]"}
    printed = subprocess.check_output(["bash", "-c", script], env=environ, text=True, cwd=tmp_path)
    command, *words = printed.splitlines()
    launch, options = understood(words)
    assert command == "launch" and len(LAUNCHES) == 3
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (4, 32, 2)
    assert launch.main_process_ip == "node-1"
    assert options.models == ["org/ft-*"] and options.batch_size == 256
