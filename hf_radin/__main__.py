"""`python -m hf_radin` and the console script: the command line."""

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from hf_radin.cli.streams import lost_output, make_streams_last


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command, and end the process.

    While the command is loaded and when it is done, an interrupt ends the process without a word. One that was
    interrupted is not held up by threads that wait for a Hub. One whose output is lost, for another reason than that
    its reader wanted no more of it, says so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it otherwise
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost connection are traces of its stack
    make_streams_last()
    status: Any
    statuses: list[int] = []
    atexit.register(_leave, statuses)  # before all that libraries register: it is called last
    try:
        status = import_module("hf_radin.cli.main").main(arguments)
    except SystemExit as end:  # of argparse, which has said why
        status = end.code
    if reason := lost_output():
        print(f"hf-radin: what was printed is lost, and nothing else: {reason}.", file=sys.stderr)
        status = status or 2
    statuses.append(status if isinstance(status, int) else 0 if status is None else 1)
    if statuses[0] > 128:
        _leave(statuses)
    sys.exit(status)


def _leave(statuses: Sequence[int]) -> None:
    """End the process with the first of these, without taking the interpreter apart.

    Threads of libraries may still ask for it, and abort where it is gone: pyarrow's, where not all rows of a file were
    read (https://github.com/huggingface/datasets/issues/7566), or gloo's.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if statuses:
        os._exit(statuses[0])


if __name__ == "__main__":
    run()
