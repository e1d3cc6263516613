"""A full disk and a batch system's SIGTERM end a run in one line, and lose nothing that was finished."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_radin
from hf_radin.cli.main import LONGEST_ERROR

# Files can't grow beyond so many bytes: what a full disk does to a writer, for this process alone.
LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from hf_radin.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def command(runs: Path, digits: Path, folder: Path) -> list[str]:
    options = {"--models": f"{runs}/ft-*", "--dataset": digits, "--cache-dir": folder / "cache"}
    return ["soup", *(str(part) for pair in options.items() for part in pair), "--output", str(folder / "soup")]


@pytest.mark.parametrize(("limit", "place"), [(10_000, "cache/weights/"), (77_000, "soup")])
def test_a_full_disk_is_named_and_what_was_finished_stays(runs, digits, tmp_path, limit, place):
    averaged = [*command(runs, digits, tmp_path), "--head", "average"]  # features would be the largest file
    start = [sys.executable, "-W", "ignore", "-c", LIMITED, str(limit), *averaged]
    # coverage could not write what it measures, either
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    run = subprocess.run(start, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith(f"hf-radin: {tmp_path}/{place}") and "can't be written" in line and "is kept" in line
    assert not (tmp_path / "soup").exists()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # no half of a file is left
    ingredients = hf_radin.gather(f"{runs}/ft-*")
    bank = hf_radin.compute_logits(ingredients, digits, cache_dir=tmp_path / "cache")  # and goes on from there
    assert len(bank) == 600


def test_a_run_that_is_told_to_end_says_how_to_go_on(runs, digits, tmp_path):
    start = [sys.executable, "-W", "ignore", "-m", "hf_radin", *command(runs, digits, tmp_path)]
    run = subprocess.Popen(start, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "cache").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate()
    assert run.returncode == 143 and "Traceback" not in errors
    assert "hf-radin: terminated; run the same command again to continue." in errors
    again = subprocess.run(start, capture_output=True, text=True)
    assert again.returncode == 0 and (tmp_path / "soup" / "recipe.json").is_file()


# Raises a signal at the n-th call of any function of Python's, wherever that is: while modules are loaded, models run
# or files are written.
STOPPED = """
import os, signal, sys
import hf_radin.cli.main  # before it is counted
from hf_radin.__main__ import run
number, at = signal.Signals(int(sys.argv.pop(1))), int(sys.argv.pop(1))
calls = 0

def count(frame, event, argument):
    global calls
    calls += 1
    if calls == at:
        sys.setprofile(None)
        os.kill(os.getpid(), number)

sys.setprofile(count)
run(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "at"),
    [(signal.SIGINT, 500), (signal.SIGINT, 50_000), (signal.SIGTERM, 200_000), (signal.SIGINT, 400_000)],
)
def test_no_moment_is_one_for_a_traceback(two, tmp_path, number, at):
    start = [sys.executable, "-c", STOPPED, str(int(number)), str(at), "inspect", "--models", f"{two}/*"]
    run = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode in (128 + number, -number), run.stderr
    assert "Traceback" not in run.stderr and "ignored" not in run.stderr
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert run.stderr.strip() == f"hf-radin: {word}; run the same command again to continue."


# A compiled module that imports a module of Python's may abort the process if that ends with an error.
INTERRUPTED_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("it goes on")
except BaseException as error:
    print(repr(error))
"""


def test_no_import_hears_of_an_interrupt(two, tmp_path):
    (tmp_path / "transformers.py").write_text(INTERRUPTED_IMPORT)
    run = subprocess.run(
        [sys.executable, "-m", "hf_radin", "inspect", "--models", f"{two}/*"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "hf-radin: interrupted; run the same command again to continue.\n"


# Ends a command by an error that nobody foresaw, at the place where models are gathered.
FAULTY = """
import sys
from hf_radin.cli import commands
from hf_radin.cli.main import main

def fail(*arguments, **options):
    raise {error}

commands.inspect_models = fail
sys.exit(main(["inspect", "--models", "a"]))
"""


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        ("KeyError('x')", 1, "hf-radin: KeyError: 'x'. This is a fault of hf_radin or of a library: please report"),
        ("MemoryError()", 2, "hf-radin: there is not enough memory: none is left. Take fewer models at a time"),
        ("RuntimeError('CUDA out of memory. Tried')", 2, "hf-radin: there is not enough memory: CUDA out of memory."),
        (
            "RuntimeError('can\\'t start new thread')",
            2,
            "hf-radin: there is not enough memory: can't start new thread.",
        ),
        ("OSError('a:\\n\\n  b')", 2, "hf-radin: a: b"),
        ("ValueError('x' * 100_000)", 2, "hf-radin: xxx"),
        (
            "RuntimeError('[gloo] Connection closed by peer')",
            1,
            "hf-radin: another process of this run has ended; run",
        ),
    ],
)
@pytest.mark.parametrize("debugged", [False, True])
def test_any_error_is_one_line_and_a_fault_shows_its_place_on_demand(tmp_path, error, status, text, debugged):
    environment = {name: value for name, value in os.environ.items() if name != "HF_DEBUG"}
    environment |= {"HF_DEBUG": "1"} if debugged else {}
    start = [sys.executable, "-c", FAULTY.format(error=error)]
    run = subprocess.run(start, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == status
    *place, line = run.stderr.strip().splitlines()
    assert line.startswith(text) and len(line) < LONGEST_ERROR + 20
    assert bool(place) == (debugged and "This is a fault" in line)


# Ends a command in a method that Python calls by itself, from which no error comes out.
UNHEARD = """
import signal, sys
from hf_radin.cli import commands
from hf_radin.cli.main import main

class Late:
    def __del__(self):
        {what}

def release(*arguments, **options):
    Late()
    print("it goes on")
    raise OSError("the end")

commands.inspect_models = release
sys.exit(main(["inspect", "--models", "a"]))
"""


@pytest.mark.parametrize(
    ("what", "status", "printed", "line"),
    [
        (
            "signal.raise_signal(signal.SIGINT)",
            130,
            "",
            "hf-radin: interrupted; run the same command again to continue.",
        ),
        ("raise KeyError('odd')", 2, "it goes on\n", "hf-radin: the end"),
    ],
    ids=["an interrupt", "a library's fault"],
)
def test_an_interrupt_is_heard_where_python_raises_no_error(tmp_path, what, status, printed, line):
    start = [sys.executable, "-c", UNHEARD.format(what=what)]
    run = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (status, printed)
    assert run.stderr.splitlines()[-1] == line and ("KeyError: 'odd'" in run.stderr) == (status == 2)


def test_an_interrupt_that_a_shell_ignores_is_ignored(two):
    """As of a command in its background."""
    start = [sys.executable, "-c", STOPPED, str(int(signal.SIGINT)), "500", "inspect", "--models", f"{two}/*"]
    run = subprocess.run(["bash", "-c", f"trap '' INT; {shlex.join(start)}"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and "a soup can be made of these 2" in run.stdout
