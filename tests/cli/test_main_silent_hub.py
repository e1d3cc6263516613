"""A Hub that accepts and never answers: each command ends by itself, and at once when it is told to."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub.loopback import LoopbackHub
from shared.pushed import folder, quick

from hf_radin.cli import main as command_line

__all__ = ["folder", "quick"]  # fixtures


class SilentHub:
    """Takes connections, and says nothing.

    Args:
        asked: set when the first request is there.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            self._connections.append(connection)
            self.asked.set()

    def close(self) -> None:
        for connection in (self._socket, *self._connections):
            connection.close()


@pytest.fixture
def silent() -> Iterator[SilentHub]:
    hub = SilentHub()
    yield hub
    hub.close()


def start(silent: SilentHub, home: Path, *command: str, **settings: str) -> subprocess.Popen[str]:
    """A command in a process of its own, which never sleeps between its attempts."""
    code = "import time; time.sleep = lambda seconds: None; from hf_radin.__main__ import run; run()"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ = {"HF_ENDPOINT": silent.url, "HF_HOME": str(home), "HF_TOKEN": LoopbackHub.token} | settings
    environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, command)],
        env=inherited | environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


COMMANDS = {
    "inspect": ["inspect", "--models", "org/ft-0", "org/ft-1"],
    "inspect a pattern": ["inspect", "--models", "org/ft-*"],
    "inspect a collection": ["inspect", "--models", "collections/org/fts-0123"],
    "soup": ["soup", "--models", "org/ft-0", "org/ft-1", "--dataset", "org/digits", "--output", "new"],
    "soup of the Hub's images": ["soup", "--models", "{runs}/ft-*", "--dataset", "org/digits", "--output", "new"],
    "logits": ["logits", "--models", "org/ft-0", "org/ft-1", "--dataset", "org/digits"],
    "push a bank": ["logits", "--models", "{runs}/ft-*", "--dataset", "{digits}", "--push-to", "org/bank"],
    "pull a bank": ["search", "org/bank", "--budget", "0", "--output", "new"],
    "push": ["push", "{folder}", "org/soup"],
    "push with a licence": ["push", "{folder}", "org/soup", "--license", "mit"],
    "push to an id of one part": ["push", "{folder}", "soup"],
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command_gives_up_in_one_line(silent, runs, digits, folder, tmp_path, kind):
    command = [part.format(runs=runs, digits=digits, folder=folder) for part in COMMANDS[kind]]
    run = start(silent, tmp_path, *command, HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 2 and silent.asked.is_set() and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("hf-radin: ") and LoopbackHub.token not in out + err
    assert "HF_HUB_DOWNLOAD_TIMEOUT allows" in out + err


def test_a_card_is_made_without_the_hub(silent, folder, tmp_path):
    run = start(silent, tmp_path, "card", str(folder), "--license", "mit")
    assert run.wait(timeout=120) == 0 and not silent.asked.is_set()


@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (15, 143, "terminated")])
@pytest.mark.parametrize("kind", ["inspect", "inspect a pattern", "push", "pull a bank"])
def test_a_command_that_waits_ends_when_it_is_told_to(silent, folder, tmp_path, kind, number, status, word):
    """At the first signal, though its threads wait for a minute."""
    run = start(silent, tmp_path, *(part.format(folder=folder) for part in COMMANDS[kind]))
    assert silent.asked.wait(timeout=100)
    run.send_signal(number)
    _, err = run.communicate(timeout=40)  # far more than it takes, and less than the minute
    assert run.returncode == status and "Traceback" not in err
    assert err.splitlines()[-1] == f"hf-radin: {word}; run the same command again to continue."
    assert command_line.GRACE < 40
