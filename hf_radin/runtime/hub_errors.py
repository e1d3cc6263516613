"""The errors of the Hub, of its client and of the network, in one line that says what to do."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before each further attempt, if what failed may be over in a moment.
PAUSES = (1.0, 4.0, 16.0)

MALFORMED = "the token is malformed: it has letters, or a line end, that no token has. Log in anew, or pass another."

# Characters of an error that are shown.
LONG = 300


@contextmanager
def asking_the_hub(what: str, *, revision: str | None = None, missing: str = "") -> Iterator[None]:
    """Turn the Hub's and the network's errors into a ValueError of one line.

    Args:
        what: the subject of the message, as in `The dataset org/pets`.
        revision: that was asked for.
        missing: the beginning of the message if there is no such repository, in place of the usual one.

    Raises:
        ValueError: for each of these errors.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{what} is gated: ask for access on its page, then log in or pass a token.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        missing = missing or f"{what} is not on the Hub"
        raise ValueError(f"{missing} (or it is private: log in or pass a token).") from error
    except HFValidationError as error:
        raise ValueError(f"{what} is {'neither a folder here nor' if missing else 'not'} a Hub id: {error}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{what}: log in with `hf auth login`, or pass a token ({error}).") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        here = missing.partition(" and no ")[0] or what  # nobody knows what is on the Hub
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else _first_line(error)
        raise ValueError(f"{here}{', and' if missing else ':'} the Hub can't be asked: {why}.") from error
    except HfHubHTTPError as error:
        if missing and error.response is not None and error.response.status_code == 404:
            raise ValueError(f"{missing} (or it is private: log in or pass a token).") from error
        hint = " Log in with `hf auth login`, or pass a token." if _status(error) == 401 else ""
        raise ValueError(f"{what}: the Hub refuses: {_first_line(error)}{hint}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what}: the Hub's answer is invalid ({_first_line(error)}); is HF_ENDPOINT a Hub?"
        ) from error
    except UnicodeEncodeError as error:  # in a header or in a name
        raise ValueError(f"{what}: {error if error.encoding == 'utf-8' else MALFORMED}") from error
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):  # about a card's metadata; all others are ours
            raise
        raise ValueError(f"{what}: the Hub refuses: {_first_line(error)}") from error
    except Exception as error:
        if _is_of_xet(error):
            way_out = "Try again, or set HF_HUB_DISABLE_XET=1 to go without Xet."
            raise ValueError(f"{what}: Xet fails: {_first_line(error)}. {way_out}") from error
        if isinstance(error, RuntimeError) and error.__cause__:  # of the client, around what happened to a file
            raise ValueError(f"{what}: {_first_line(error)} {_first_line(error.__cause__)}") from error.__cause__
        if type(error).__module__.partition(".")[0].startswith("httpx"):  # of the client; the package's name changes
            if "header value" in str(error):  # and shows the token
                raise ValueError(f"{what}: {MALFORMED}") from None
            subject = f"{missing}, and" if missing else f"{what}:"
            raise ValueError(f"{subject} the Hub can't be reached: {_first_line(error)}") from error
        if isinstance(error, (TypeError, KeyError, AttributeError)) and _is_of_client(error):
            raise ValueError(f"{what}: the Hub's answer is invalid ({error!r}); is HF_ENDPOINT a Hub?") from error
        raise


# Status of a Hub that is busy, broken for a moment, or asked by two clients at once.
_PASSING = {408, 409, 412, 429, 500, 502, 503, 504}


def is_passing(error: ValueError) -> bool:
    """Whether an error that `asking_the_hub` raised may be over in a moment."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _status(cause) in _PASSING
    if cause and _is_of_xet(cause):  # which has been trying for minutes already
        return False
    return isinstance(cause, OSError) or type(cause).__module__.partition(".")[0].startswith("httpx")


# What the messages of hf_xet begin with.
_XET = re.compile(r"(Network|Server|Internal|I/O) error: |Rate limited: ")


def is_of_network(error: BaseException) -> bool:
    """Whether the network, the Hub, its client or a disk raised an error, so that the request itself may be right."""
    if isinstance(error, FileNotFoundError):  # datasets raises it for a dataset without files that it knows
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "huggingface_hub"))


def _is_of_xet(error: BaseException) -> bool:
    """Whether hf_xet raised an error: most of its errors are builtin ones, and a few are classes of its own."""
    builtin = type(error) in (OSError, RuntimeError) and _XET.match(str(error))
    return type(error) is ConnectionError or type(error).__module__ == "hf_xet" or bool(builtin)


def _is_of_client(error: Exception) -> bool:
    """Whether an error was raised in the Hub's client, which doesn't check what an answer looks like."""
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__")).startswith("huggingface_hub")


def _status(error: Any) -> int | None:
    return None if error.response is None else int(error.response.status_code)


def patiently(ask: Callable[[], T]) -> T:
    """Ask, and ask again after errors that pass (`is_passing`); for requests that may be made twice."""
    for pause in PAUSES:
        try:
            return ask()
        except ValueError as error:
            if not is_passing(error):
                raise
            logger.warning("%s. Trying again in %g s.", str(error).rstrip("."), pause)
            time.sleep(pause)
    return ask()


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line, since the Hub's reason may be below the first; without passwords in addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"//[^/@\s]+@", "//", text[:LONG] + ("..." if len(text) > LONG else ""))
