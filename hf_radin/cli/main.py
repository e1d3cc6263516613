"""The command line: `hf-radin soup`, `logits`, `search`, `inspect`, `estimate`, `average`, `card`, `push`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from hf_radin import __version__
from hf_radin.cli import options
from hf_radin.cli.options import Parser
from hf_radin.runtime.processes import MainStoppedError, Processes, is_main_process

SOUP = "find the best soup of some checkpoints"
LOGITS = "run each checkpoint once over a split and store its logits, to be searched later, here or elsewhere"
SEARCH = "find the best soup from logits that were computed before; with --budget 0 without images and without a GPU"
INSPECT = "say of each checkpoint whether it can go into a soup with the others; no weights are downloaded"
ESTIMATE = "say what a soup will cost in time, memory and disk, by a probe of this machine; no weights are downloaded"
AVERAGE = "cook the soup of a recipe.json again"
CARD = "make the card of a saved soup anew; what you wrote between its marked lines stays"
PUSH = "upload a saved soup as it is, in one commit"

# Seconds from an interrupt to the end of a process, whatever its threads wait for.
GRACE = 5
INTERRUPTED = "hf-radin: interrupted; run the same command again to continue."
TERMINATED = "hf-radin: terminated; run the same command again to continue."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line on stderr and the exit status 2."""
    args, unknown = command_parser().parse_known_args(arguments)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}; see `{args.parser.prog} --help`")
    return run_command(args)


def command_parser() -> argparse.ArgumentParser:
    """The commands and their options; `command` names the function in `cli.commands` that runs each."""
    parser = Parser(prog="hf-radin", description="One better image classifier from many fine-tunes.")
    parser.add_argument("--version", action="version", version=f"hf_radin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, *groups: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=name, parser=command)
        for add_group in groups:
            add_group(command)
        return command

    runs = (options.add_model_options, options.add_data_options, options.add_run_options)
    results = (options.add_search_options, options.add_soup_options)
    add("soup", SOUP, *runs, options.add_tracking_options, *results)
    logits = add("logits", LOGITS, *runs, options.add_tracking_options, options.add_visibility_option)
    logits.add_argument("--push-to", metavar="ID", help="dataset repository on the Hub to push the logits to")
    add("search", SEARCH, options.add_bank_options, options.add_tracking_options, *results)
    add("inspect", INSPECT, options.add_model_options)
    add("estimate", ESTIMATE, *runs, options.add_job_options)
    add("average", AVERAGE, options.add_average_options)
    add("card", CARD, options.add_renewal_options)
    add("push", PUSH, options.add_push_options)
    return parser


def run_command(args: argparse.Namespace) -> int:
    """Run the command that was read; what a user can mend is one line, not a traceback.

    A command that is told to end (a batch system's SIGTERM) ends like an interrupt from the keyboard.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
        sys.unraisablehook = _signal_again
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it otherwise
            signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):  # names that a terminal can't show are no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.captureWarnings(is_main_process())  # such that they, too, go above a bar (see `progress_bar`)
    # what all processes see is logged once; an error is logged by the process that has it
    logging.getLogger("hf_radin").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    status = _run(args, Processes())
    if hasattr(signal, "SIGALRM") and signal.alarm(0):  # told to end, and Python would wait for all threads
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(args: argparse.Namespace, processes: Processes) -> int:
    """The exit status of a command."""
    try:
        # loaded when the options were read: `--help` takes nothing of what runs the commands
        getattr(import_module("hf_radin.cli.commands"), args.command)(args, processes)
        processes.leave()
    except (ValueError, OSError) as error:
        if not isinstance(error, MainStoppedError):  # the main process prints it
            print(f"hf-radin: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main_process():  # the others are interrupted with it
            print(INTERRUPTED, file=sys.stderr)
        return 130
    except _Terminated:
        if is_main_process():  # the others are terminated with it
            print(TERMINATED, file=sys.stderr)
        return 143
    finally:
        processes.leave(together=False)  # whatever ended it; after the call above there is nothing left to do
    return 0


class _Terminated(BaseException):
    """SIGTERM came."""


# Seconds after which a signal that was lost is sent again.
AGAIN = 0.05


def _signal_again(unraisable: Any) -> None:
    """Where an object was just being deleted, Python drops what a signal raises, and the run would go on."""
    error = unraisable.exc_value
    if isinstance(error, (KeyboardInterrupt, _Terminated)):
        number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
        threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _terminate(number: int, frame: Any) -> None:
    _end_soon(143, TERMINATED)
    raise _Terminated


def _interrupt(number: int, frame: Any) -> None:
    _end_soon(130, INTERRUPTED)
    raise KeyboardInterrupt


def _end_soon(status: int, message: str) -> None:
    """End the process within GRACE seconds, whatever it waits for: threads that wait for a Hub don't hear of signals.

    What is written to disk may be cut off anywhere.
    """

    def end(number: int, frame: Any) -> None:
        os.write(2, f"{message}\n".encode() if is_main_process() else b"")
        os._exit(status)

    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGALRM, end)
        signal.alarm(GRACE)
