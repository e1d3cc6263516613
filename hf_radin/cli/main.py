"""`hf-radin soup`, `logits`, `search`, `inspect`, `estimate`, `average`, `distill`, `card`, `push`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from hf_radin import __version__
from hf_radin.cli import options
from hf_radin.cli.options import Parser
from hf_radin.runtime.processes import MainStoppedError, Processes, is_main_process
from hf_radin.runtime.text import one_line, printable, refuse_bytes

SOUP = "find the best soup of some checkpoints"
LOGITS = "run each checkpoint once over a split and store its logits, to be searched later, here or elsewhere"
SEARCH = "find the best soup from logits that were computed before; with --budget 0 without images or a GPU"
INSPECT = "say of each checkpoint whether it can go into a soup with the others; no weights are downloaded"
ESTIMATE = "say what a soup will cost in time, memory and disk, by a probe of this machine; no weights are downloaded"
AVERAGE = "average checkpoints without any data, by given weights; or cook the soup of a recipe.json again"
DISTILL = "teach the last layers of a saved soup what the ensemble of its ingredients knows"
CARD = "make the card of a saved soup anew; what you wrote between its marked lines stays"
PUSH = "upload a saved soup as it is, in one commit"

# The modules of the commands that are not in `commands`.
HOMES = {"average": "averages"}

# Seconds from an interrupt to the end of a process, whatever its threads wait for.
GRACE = 5


# Letters of an error.
LONGEST_ERROR = 5000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 2 for what a user can mend, 3 for a soup that `--strict` refuses, 130 and 143 if it was
        interrupted or terminated, 1 for a fault of the program. All but 0 come with one line on stderr.
    """
    received: list[int] = []
    with _heard(received):
        try:
            return _run(arguments)
        except SystemExit:  # of argparse, which has said why
            raise
        except BaseException as error:
            return _end(error, received)


def command_parser() -> argparse.ArgumentParser:
    """The commands and their options; `command` names the function that runs each (see `HOMES`)."""
    parser = Parser(prog="hf-radin", description="One better image classifier from many fine-tunes.")
    parser.add_argument("--version", action="version", version=f"hf_radin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, *groups: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=name, parser=command)
        for add_group in groups:
            add_group(command)
        return command

    runs = (options.add_model_options, options.add_classes_option, options.add_data_options, options.add_run_options)
    results = (options.add_search_options, options.add_soup_options)
    add("soup", SOUP, *runs, options.add_tracking_options, *results)
    logits = add("logits", LOGITS, *runs, options.add_tracking_options, options.add_visibility_option)
    logits.add_argument("--push-to", metavar="ID", help="dataset repository on the Hub to push the logits to")
    add("search", SEARCH, options.add_bank_options, options.add_tracking_options, *results)
    inspect = add("inspect", INSPECT, options.add_model_options)
    inspect.add_argument("--classes", choices=("common",), help="of models whose classes differ, those that all have")
    add("estimate", ESTIMATE, *runs, options.add_job_options)
    add("average", AVERAGE, options.add_average_options)
    add("distill", DISTILL, options.add_distill_options)
    add("card", CARD, options.add_renewal_options)
    add("push", PUSH, options.add_push_options)
    return parser


def _run(arguments: Sequence[str] | None) -> int:
    """Read the options and run the command."""
    args, unknown = command_parser().parse_known_args(arguments)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}; see `{args.parser.prog} --help`")
    for value in vars(args).values():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, (str, Path)):
                refuse_bytes(str(name))
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(is_main_process())  # such that they, too, go above a bar (see `progress_bar`)
    # what all processes see is logged once; an error is logged by the process that has it
    logging.getLogger("hf_radin").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    if getattr(args, "max_image_pixels", None) is not None:
        import PIL.Image

        PIL.Image.MAX_IMAGE_PIXELS = args.max_image_pixels
    processes = Processes()
    try:
        # loaded when the options were read: `--help` takes nothing of what runs the commands
        home = HOMES.get(args.command, "commands")
        status = getattr(import_module(f"hf_radin.cli.{home}"), args.command)(args, processes)
        processes.leave()
    finally:
        processes.leave(together=False)  # whatever ended it; after the call above there is nothing left to do
    return int(status or 0)


class Lines(logging.Formatter):
    """What is logged, with control characters escaped: a name from outside can't pass for a line of ours.

    A record of this package is one line. Others may have several, which are indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name.partition(".")[0] == "hf_radin":
            return printable(text)
        return "\n  ".join(map(printable, text.splitlines()))


class _Terminated(BaseException):
    """SIGTERM came."""


# What torch, oneDNN and Python say where memory is out.
_NO_MEMORY = ("out of memory", "can't allocate memory", "could not create a primitive", "can't start new thread")

# What gloo and NCCL say where another process was met and is gone.
_CLOSED = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|TCPStore")

# What the signals that end a command are raised as, and what is said then.
_SIGNALS = {signal.SIGINT: (KeyboardInterrupt, "interrupted"), signal.SIGTERM: (_Terminated, "terminated")}


@contextmanager
def _heard(received: list[int]) -> Iterator[None]:
    """Raise the first signal to end, of the keyboard or of a batch system, wherever the command is.

    A second one ends the process at once, and so do `GRACE` seconds: threads that wait for a Hub hear of no signal.
    While a module is imported, the first one does, too. What is written appears whole or not at all, so that nothing
    is lost.

    Args:
        received: the signal is added to it: libraries turn an interrupt into errors of their own.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if hasattr(signal, "SIGALRM"):  # not on Windows
            signal.signal(signal.SIGALRM, lambda *_: os._exit(_end(KeyboardInterrupt(), received)))
            signal.alarm(GRACE)
        if _is_importing(frame):
            os._exit(_end(KeyboardInterrupt(), received))
        raise _SIGNALS[signal.Signals(number)][0]

    def end_ignored(ignored: Any) -> None:
        """End where Python can raise no error: in a callback of its own, it would print it and go on."""
        if not received:
            return ignores(ignored)
        os._exit(_end(KeyboardInterrupt(), received))

    ignores, sys.unraisablehook = sys.unraisablehook, end_ignored
    is_main_thread = threading.current_thread() is threading.main_thread()
    heard = [number for number in _SIGNALS if is_main_thread and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        sys.unraisablehook = ignores


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: of a compiled one, an error that it does not know of may be the end."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end(error: BaseException, received: Sequence[int]) -> int:
    """Say in one line what ended a command; the exit status."""
    if received or isinstance(error, KeyboardInterrupt):
        number = signal.Signals(received[0]) if received else signal.SIGINT
        if is_main_process():  # the others end with it
            _say_error(f"{_SIGNALS[number][1]}; run the same command again to continue.")
        return 128 + number
    text = str(error) if _is_ours(error) else one_line(error)
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        _say_error(
            f"there is not enough memory: {text if str(error) else 'none is left'}. Take fewer models at a time "
            "(--models-in-memory) or smaller batches (--batch-size); run the same command again to continue."
        )
        return 2
    if isinstance(error, (ValueError, OSError)):
        if not isinstance(error, MainStoppedError):  # the main process prints it
            _say_error(text)
        return 2
    if isinstance(error, RuntimeError) and _CLOSED.search(text):
        _say_error("another process of this run has ended; run the same command again to continue.")
        return 1
    if os.environ.get("HF_DEBUG"):
        traceback.print_exception(error)
    _say_error(
        f"{type(error).__name__}: {text}. This is a fault of hf_radin or of a library: please report it with what "
        "HF_DEBUG=1 shows."
    )
    return 1


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised an error: a line end in it is of a name from outside, and is shown."""
    place, module = error.__traceback__, ""
    while place:
        module, place = str(place.tb_frame.f_globals.get("__name__")), place.tb_next
    return module.partition(".")[0] == "hf_radin"


def _say_error(text: str) -> None:
    """Say an error in one line; of a very long one, as of a name that is a file, the beginning and the end."""
    text = printable(text)
    if len(text) > LONGEST_ERROR:
        text = f"{text[: LONGEST_ERROR // 2]} ... {text[-LONGEST_ERROR // 2 :]}"
    print(f"hf-radin: {text}", file=sys.stderr)
