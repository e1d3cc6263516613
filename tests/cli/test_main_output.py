"""What can be saved is saved, and the exit status is that of the work, whatever becomes of what is printed."""

import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from shared.launching import EXAMPLE


def shell(folder: Path, command: list[object], ending: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does, with what follows it there; the last line of stdout is its exit status."""
    line = f"{shlex.join(map(str, [sys.executable, *command]))} {ending}; echo ${{PIPESTATUS[0]}} > status"
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)


# What follows a command, its exit status, and what is on stderr if that is not closed itself.
LOST = "hf-radin: what was printed is lost, and nothing else: No space left on device.\n"
ENDINGS = [
    ("| true", 0, ""),
    ("2>&1 | true", 0, ""),
    ("> /dev/full", 2, LOST),
    ("2> /dev/full | cat", 0, ""),
    ("> /dev/full 2>&1", 2, ""),
    (">&-", 0, ""),
    (">&- 2>&- <&-", 0, ""),
]


@pytest.mark.parametrize(("ending", "status", "errors"), ENDINGS)
@pytest.mark.parametrize("command", [["--help"], ["inspect", "--models", "ft-0", "ft-1"]], ids=["help", "inspect"])
def test_a_stream_that_takes_nothing_gives_no_traceback(two, command, ending, status, errors):
    run = shell(two, ["-m", "hf_radin", *command], ending)
    assert (two / "status").read_text() == f"{status}\n"
    assert run.stderr == errors


@pytest.mark.parametrize(
    ("program", "ending", "status"),
    [
        (["-m", "hf_radin", "soup"], "2>&1 | true", 0),
        (["-u", "-m", "hf_radin", "soup"], "> /dev/full 2>&1", 2),
        ([EXAMPLE], "2>&1 | true", 0),
        ([EXAMPLE], ">&- 2>&-", 0),
    ],
)
def test_a_soup_is_saved_though_nobody_reads(two, digits, cache, tmp_path, program, ending, status):
    options = {"--dataset": digits, "--cache-dir": cache, "--method": "uniform", "--output": "soup"}
    models = ["--models", two / "ft-0", two / "ft-1"]
    shell(tmp_path, [*program, *models, *(part for pair in options.items() for part in pair)], ending)
    assert (tmp_path / "status").read_text() == f"{status}\n"
    assert load_file(tmp_path / "soup" / "model.safetensors") and (tmp_path / "soup" / "README.md").is_file()


def test_a_closed_terminal_ends_no_work(two, digits, tmp_path):
    main, side = pty.openpty()
    os.close(main)  # whoever writes there is told of an input or output error
    models = [str(two / name) for name in ("ft-0", "ft-1")]
    start = [sys.executable, "-m", "hf_radin", "logits", "--models", *models, "--dataset", str(digits)]
    run = subprocess.run([*start, "--cache-dir", str(tmp_path)], stdout=side, stderr=subprocess.PIPE, text=True)
    os.close(side)
    assert run.returncode == 2 and "lost, and nothing else: Input/output error" in run.stderr.splitlines()[-1]
    assert list(tmp_path.glob("banks/*/bank.json"))


def test_a_broken_installation_shows_what_is_broken():
    code = "import sys; sys.modules['hf_radin.cli.main'] = None; from hf_radin.__main__ import run; run()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "ModuleNotFoundError: import of hf_radin.cli.main halted" in run.stderr
