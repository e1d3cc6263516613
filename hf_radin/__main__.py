"""`python -m hf_radin` and the console script: the command line."""

import signal
import sys
from importlib import import_module
from typing import NoReturn


def run() -> NoReturn:
    """Run a command. While it is loaded and when it is done, an interrupt ends the process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(import_module("hf_radin.cli.main").main())


if __name__ == "__main__":
    run()
