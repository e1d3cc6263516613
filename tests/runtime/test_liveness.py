"""A process that is stopped holds up nobody for ever, and what it did is said."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock
from shared.launching import free_port

from hf_radin.runtime import liveness
from hf_radin.runtime.files import write_json
from hf_radin.runtime.schema import to_json

HOLD = """
import sys, time
from pathlib import Path
from hf_radin.runtime import liveness
with liveness.lock(Path(sys.argv[1]), "logits of 5 models\\n\\x1b[2J"):
    print("held", flush=True)
    time.sleep(600)
"""

WATCH = """
import os, signal, sys, time
from torch.distributed import TCPStore
from hf_radin.runtime.liveness import Watch
index, port = map(int, sys.argv[1:3])
store = TCPStore("127.0.0.1", port, is_master=index == 0, wait_for_workers=False)
store.add("met", 1)
while store.add("met", 0) < 3:  # on a busy machine it takes its time to start
    time.sleep(0.1)
watch = Watch(index, 3)
print("watches", flush=True)
if "stops" in sys.argv:  # within the second until the first sign of life
    store.wait([f"hf_radin/alive/0/place/{index}"])
    os.kill(os.getpid(), signal.SIGSTOP)
if "leaves" in sys.argv:
    time.sleep(3)
    watch.end()
    print("left", flush=True)
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
    assert (fields["process"], fields["work"]) == (os.getpid(), "logits")
    assert set(fields) == {"process", "host", "since", "work"}


@pytest.fixture
def watching():
    """Start process `index` of three that watch each other, each of which counts as stopped after eight seconds."""
    processes, port = [], free_port()
    environment = {**os.environ, "HF_RADIN_SILENCE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def start(index, *words):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", WATCH, str(index), str(port), *words]
        processes.append(subprocess.Popen(command, env=environment, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("index", [0, 2], ids=["which has the store", "which has not"])
def test_a_process_of_several_that_is_stopped_ends_the_others_and_one_of_them_says_so(watching, index):
    processes = [watching(rank) for rank in range(3)]
    assert {process.stdout.readline() for process in processes} == {"watches\n"}
    time.sleep(5)  # until each has heard of the others
    os.kill(processes[index].pid, signal.SIGSTOP)
    others = [process for process in processes if process is not processes[index]]
    errors = [process.communicate(timeout=60)[1] for process in others]
    assert [process.returncode for process in others] == [1, 1]
    first, *further = [line for text in errors for line in text.splitlines() if line.startswith("hf-radin: ")]
    lost = rf"process {index} of 3 \({processes[index].pid} on \S+\) has given no sign of life for 8 s"
    assert re.match(f"hf-radin: {lost}", first)
    assert not further
    assert processes[index].wait(60)  # it was woken, and ended


def test_a_process_that_is_stopped_before_its_first_sign_of_life_is_missed_too(watching):
    others, stopping = [watching(0), watching(1)], watching(2, "stops")
    errors = [process.communicate(timeout=60)[1] for process in others]
    assert [process.returncode for process in others] == [1, 1]
    assert f"process 2 of 3 ({stopping.pid} on " in errors[0]
    assert stopping.wait(60)  # it was woken, and ended


def test_whoever_leaves_is_not_missed(watching):
    others, leaving = [watching(0), watching(1)], watching(2, "leaves")
    assert [leaving.stdout.readline() for _ in range(2)] == ["watches\n", "left\n"]
    os.kill(leaving.pid, signal.SIGSTOP)
    time.sleep(20)
    assert [process.poll() for process in others] == [None, None]


def test_a_cache_of_another_user_is_named_with_the_way_out(tmp_path):
    (tmp_path / "bank.lock").touch()
    (tmp_path / "bank.lock").chmod(0o444)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o055)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        if os.geteuid() == 0:  # who may write everywhere
            os.setuid(4001)
        try:
            with liveness.lock(tmp_path / "bank.lock", "logits"):
                pass
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    message = (
        f"ValueError: {tmp_path}/bank.lock can't be written: Permission denied. Name a place of yours (--cache-dir)."
    )
    assert os.read(reader, 1000).decode() == message


def test_who_holds_a_lock_after_another_is_told_too(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(liveness, "SILENCE", 1.0)
    place = tmp_path / "bank.lock.json"
    first, second = (liveness.Holder(number, "elsewhere", "then", f"work {number}") for number in (1, 2))
    write_json(place, to_json(first))
    with FileLock(tmp_path / "bank.lock"):
        later = threading.Timer(0.5, write_json, (place, to_json(second)))
        later.start()
        with pytest.raises(ValueError, match=r"^process 2 on elsewhere"):
            take(tmp_path / "bank.lock")
    assert [text.partition(": ")[2] for text in caplog.messages] == [
        f"{first}. Waiting for it.",
        f"{second}. Waiting for it.",
    ]
