"""A process that is stopped holds up nobody for ever, and what it did is said."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from hf_radin.runtime import liveness

HOLD = """
import sys, time
from pathlib import Path
from hf_radin.runtime import liveness
with liveness.lock(Path(sys.argv[1]), "logits of 5 models\\n\\x1b[2J"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "bank.lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def take(path) -> None:
    with liveness.lock(path, "the same"):
        pass


def test_whoever_waits_is_told_for_whom_and_not_for_ever(holder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(liveness, "SILENCE", 3.0)
    os.kill(holder.pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"^process {holder.pid} on .* holds .*bank\.lock .* for 3 s\.") as error:
        take(tmp_path / "bank.lock")
    assert 3 <= time.monotonic() - begun < 60
    message = str(error.value)
    assert f"`kill {holder.pid}`" in message and "run the same again" in message and len(message.splitlines()) == 1
    (warning,) = caplog.messages
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    assert re.search(rf"process {holder.pid} on \S+, {since} \(logits of 5 models\\n\\x1b\[2J\)\. Waiting", warning)


def test_a_holder_that_is_alive_is_waited_for(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "SILENCE", 4.0)
    ending = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(8); os.kill({holder.pid}, 9)"])
    begun = time.monotonic()
    take(tmp_path / "bank.lock")
    assert time.monotonic() - begun > 7
    assert ending.wait() == 0
    assert not (tmp_path / "bank.lock.json").exists()


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"process": "1"}'])
def test_a_holder_that_says_nothing_is_waited_for_no_longer(holder, tmp_path, caplog, monkeypatch, content):
    monkeypatch.setattr(liveness, "SILENCE", 1.0)
    os.kill(holder.pid, signal.SIGSTOP)
    (tmp_path / "bank.lock.json").unlink()
    if content is not None:
        (tmp_path / "bank.lock.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^a process that does not say who it is holds"):
        take(tmp_path / "bank.lock")
    assert len(caplog.messages) == 1


def test_the_record_of_a_holder_is_one_line_of_json(tmp_path):
    with liveness.lock(tmp_path / "bank.lock", "logits"):
        fields = json.loads((tmp_path / "bank.lock.json").read_text())
    assert (
        fields["process"] == os.getpid()
        and fields["work"] == "logits"
        and set(fields)
        == {
            "process",
            "host",
            "since",
            "work",
        }
    )
