"""`python -m hf_radin` and the console script: the command line."""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command, and end the process.

    While the command is loaded and when it is done, an interrupt ends the process without a word. One that was
    interrupted is not held up by threads that wait for a Hub.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it otherwise
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost connection are traces of its stack
    status = import_module("hf_radin.cli.main").main(arguments)
    if status > 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
