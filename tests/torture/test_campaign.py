"""A short form of `make torture`: some attempts at each promise, in a process of its own that may be forked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torture.campaign import PROMISES

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def printed() -> str:
    """What the short campaign printed: its failures, and the table."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-W", "ignore", "-m", "torture", "--short", "--jobs", "1"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr
    return run.stdout


@pytest.mark.parametrize("promise", PROMISES, ids=[promise.name for promise in PROMISES])
def test_a_promise_holds(printed, promise):
    failures = [line for line in printed.splitlines() if re.match(rf"{re.escape(promise.name)} \d+: ", line)]
    assert not failures
    row = re.search(rf"^{re.escape(promise.text)} +(\d+) +(\d+) ", printed, re.MULTILINE)
    assert row is not None and row[1] == row[2] == str(promise.few)
