"""In a terminal, lines go above the bar: none is glued to it, whoever says it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

# Says a line in each way in which lines come while models run, from this package and from others.
TALKING = """
import logging, sys, time, warnings
import transformers, datasets
from hf_radin.cli.main import main
from shared.models import watched

def talk(images):
    logging.getLogger("hf_radin.logits.passes").info("said by hf_radin")
    logging.getLogger("transformers.models").warning("said by transformers")
    logging.getLogger("datasets.load").warning("said by datasets")
    logging.getLogger("anything").warning("said by anything")
    warnings.warn("said by warnings")
    time.sleep(0.02)

with watched(talk):
    sys.exit(main(sys.argv[1:]))
"""


def in_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command whose stderr is a terminal; its exit status, and all that the terminal was sent."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # of 40 lines, 160 columns
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).parents[1:3]))  # what tests share
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=side, env=environment) as run:
        os.close(side)
        sent = b""
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            sent += piece
    os.close(main)
    return run.returncode, sent.decode()


def screen(sent: str) -> list[str]:
    """The lines that a terminal shows at each end of a line: what a carriage return goes back over is overwritten."""
    shown, line, place = [], "", 0
    for piece in re.findall(r"\r|\n|\x1b\[A|\x1b\[\d*m|[^\r\n\x1b]+", sent):
        if piece == "\r":
            place = 0
        elif piece == "\n":
            shown.append(line.rstrip())
            line, place = "", 0
        elif not piece.startswith("\x1b"):
            line = line[:place] + piece + line[place + len(piece) :]
            place += len(piece)
    return [*shown, line.rstrip()]


@pytest.fixture(scope="module")
def talk(runs, digits, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("terminal")
    options = ["--models", f"{runs}/ft-[012]", "--dataset", str(digits), "--cache-dir", str(folder / "cache")]
    command = [sys.executable, "-c", TALKING, "soup", *options, "--budget", "1", "--output", str(folder / "soup")]
    status, sent = in_terminal(command)
    assert status == 0, sent
    assert "\rLogits: " in sent and "prediction/s" in sent  # the bar was there
    return screen(sent)


@pytest.mark.parametrize("speaker", ["hf_radin", "transformers", "datasets", "anything", "warnings"])
def test_a_line_stands_alone(talk, speaker):
    lines = [line for line in talk if f"said by {speaker}" in line]
    assert len(lines) >= (1 if speaker == "warnings" else 30)  # Python warns once of the same
    assert not [line for line in lines if "prediction" in line or "|" in line]
    assert all(line.endswith(f"said by {speaker}") for line in lines)


def test_no_part_of_the_bar_is_left(talk):
    assert not [line for line in talk if "Logits:" in line or "Measuring" in line]
