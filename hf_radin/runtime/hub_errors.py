"""The errors of the Hub, of its client and of the network, in one line that says what to do."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hf_radin.runtime.text import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before each further attempt, if what failed may be over in a moment.
PAUSES = (1.0, 4.0, 16.0)

MALFORMED = "the token is malformed: it has letters, or a line end, that no token has. Log in anew, or pass another."

# Characters of an error that are shown, and of the reason that a Hub itself gives.
LONG, REASON = 300, 2000

# Seconds that a request waits for a Hub that neither takes nor sends anything, unless HF_HUB_DOWNLOAD_TIMEOUT says how
# many. A Hub may think about a large commit for a while.
TIMEOUT = 60.0


# What the client raises where an answer is not what it takes it to be.
_OF_ANSWERS = (TypeError, LookupError, AttributeError, AssertionError, NameError)


# What comes of writing to a cache that is read-only, somebody else's, or below a file.
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT}


@contextmanager
def asking_the_hub(what: str, *, revision: str | None = None, missing: str = "") -> Iterator[None]:
    """Turn the Hub's and the network's errors into a ValueError of one line. Requests don't wait for ever (`TIMEOUT`).

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

    absent = f"{missing or f'{what} is not on the Hub'} (or it is private: log in or pass a token)."
    _bound_requests()
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{what} is gated: ask for access on its page, then log in or pass a token.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(absent) from error
    except HFValidationError as error:
        raise ValueError(f"{what} is {'neither a folder here nor' if missing else 'not'} a Hub id: {error}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{what}: log in with `hf auth login`, or pass a token ({error}).") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        here = f"{missing.partition(' and no ')[0]}, and" if missing else f"{what}:"  # who knows what is on the Hub
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else _why(error.__cause__ or error)
        raise ValueError(f"{here} the Hub can't be asked: {why}.") from error
    except HfHubHTTPError as error:
        if missing and _status(error) == 404:
            raise ValueError(absent) from error
        hint = " Log in with `hf auth login`, or pass a token." if _status(error) == 401 else ""
        raise ValueError(f"{what}: the Hub refuses: {_reason(error)}{hint}") from error
    except json.JSONDecodeError as error:
        reason = _first_line(error)
        raise ValueError(f"{what}: the Hub's answer is invalid ({reason}); is HF_ENDPOINT a Hub?") from error
    except UnicodeEncodeError as error:  # in a header or in a name
        raise ValueError(f"{what}: {error if error.encoding == 'utf-8' else MALFORMED}") from error
    except ValueError as error:
        if not _is_of_client(error):
            raise
        refusal = "the Hub refuses: " if str(error).startswith("Invalid metadata") else ""  # of a card
        raise ValueError(f"{what}: {refusal}{_first_line(error)}") from error
    except Exception as error:
        if problem := _of_disk(error) or _of_xet(error):
            raise ValueError(f"{what}: {problem}") from error
        if isinstance(error, RuntimeError) and error.__cause__:  # of the client, around what happened to a file
            raise ValueError(f"{what}: {_first_line(error)} {_first_line(error.__cause__)}") from error.__cause__
        if type(error).__module__.partition(".")[0].startswith("httpx"):  # of the client; the package's name changes
            if "header value" in str(error):  # and shows the token
                raise ValueError(f"{what}: {MALFORMED}") from None
            subject = f"{missing}, and" if missing else f"{what}:"
            raise ValueError(f"{subject} the Hub can't be reached: {_why(error)}") from error
        if isinstance(error, _OF_ANSWERS) and _is_of_client(error):
            raise ValueError(f"{what}: the Hub's answer is invalid ({error!r}); is HF_ENDPOINT a Hub?") from error
        raise


# Status of a Hub that does not know a request: what it would have answered is not known.
UNKNOWN = {404, 405, 501}

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


def is_late(error: ValueError) -> bool:
    """Whether an error that `asking_the_hub` raised of what was written a moment ago may be over in a moment.

    A Hub of several machines may say of a new commit for a while that it is not there.
    """
    return is_passing(error) or status_of(error.__cause__) == 404


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


def _of_disk(error: Exception) -> str:
    """What to do about a cache that can't be written to; empty if an error is of something else."""
    if not isinstance(error, OSError) or not error.filename or error.errno not in _UNWRITABLE:
        return ""
    return f"{error.filename} can't be written to ({error.strerror}); name another place with HF_HOME or HF_HUB_CACHE."


def _of_xet(error: Exception) -> str:
    """What to do where hf_xet fails; empty if an error is of something else."""
    way_out = "Try again, or set HF_HUB_DISABLE_XET=1 to go without Xet."
    return f"Xet fails: {_first_line(error)}. {way_out}" if _is_of_xet(error) else ""


def _is_of_client(error: Exception) -> bool:
    """Whether an error was raised in the Hub's client, which doesn't check what an answer looks like, or below it."""
    traceback, last = error.__traceback__, ""
    while traceback:
        package = str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0]
        last = package if package in ("huggingface_hub", "hf_radin") else last
        traceback = traceback.tb_next
    return last == "huggingface_hub"


def _status(error: Any) -> int | None:
    return None if error.response is None else int(error.response.status_code)


def status_of(error: BaseException | None) -> int | None:
    """The status of the Hub's answer that an error is about; None if it is about something else."""
    from huggingface_hub.errors import HfHubHTTPError

    return _status(error) if isinstance(error, HfHubHTTPError) else None


def patiently(ask: Callable[[], T], *, passes: Callable[[ValueError], bool] = is_passing) -> T:
    """Ask, and ask again after errors that pass; for requests that may be made twice."""
    for pause in PAUSES:
        try:
            return ask()
        except ValueError as error:
            if not passes(error):
                raise
            logger.warning("%s. Trying again in %g s.", str(error).rstrip("."), pause)
            time.sleep(pause)
    return ask()


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line, since the Hub's reason may be below the first; without secrets."""
    return _one_line(str(error), error, LONG) or type(error).__name__


def _why(error: BaseException) -> str:
    """Why the Hub could not be asked."""
    if type(error).__name__.endswith("Timeout"):
        return f"it takes longer than HF_HUB_DOWNLOAD_TIMEOUT allows, by default {TIMEOUT:g} s ({_first_line(error)})"
    return _first_line(error).rstrip(".") if status_of(error) is None else _reason(error).rstrip(".")


def _reason(error: Any) -> str:
    """Why a Hub refuses: its own words first, the status and the address last."""
    reasons = [_one_line(text, error, REASON).rstrip(".") for text in _reasons(error.response)]
    reasons = list(dict.fromkeys(filter(None, reasons)))
    address = without_password(str(error.response.request.url).partition("?")[0])
    return f"{'; '.join(reasons)} ({_status(error)}, {address})." if reasons else _first_line(error)


def _one_line(text: str, error: BaseException, limit: int) -> str:
    """A text of an error for a terminal; a server may repeat the token that it refuses."""
    for cause in (error, error.__cause__):
        token = _authorization(cause).removeprefix("Bearer ")
        text = text.replace(token, "...") if token else text
    text = printable(" ".join(text.split()))
    return without_password(text[:limit] + ("..." if len(text) > limit else ""))


def _authorization(error: Any) -> str:
    request = getattr(getattr(error, "response", None), "request", None)
    return "" if request is None else str(request.headers.get("Authorization") or "")


def without_password(text: str) -> str:
    """A text without the names and passwords that addresses in it may have."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def _reasons(response: Any) -> Iterator[str]:
    """What an answer gives as reasons, in its header and in its body, as the Hub and as other servers write it."""
    yield response.headers.get("X-Error-Message") or ""
    try:
        body = response.json()
    except Exception:  # it is no JSON, or was never read
        if "text/plain" in response.headers.get("Content-Type", ""):
            yield response.text
        return
    for name in ("error", "error_description", "detail", "message", "errors"):
        yield from _messages(body.get(name) if isinstance(body, dict) else None)


def _messages(value: Any) -> Iterator[str]:
    """The texts of a reason: one, several, or several with where each belongs (`{"loc": ["body"], "msg": "..."}`)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        place = ".".join(map(str, value["loc"])) + ": " if isinstance(value.get("loc"), list) else ""
        for text in (value.get("message"), value.get("msg")):
            if isinstance(text, str):
                yield place + text
    elif isinstance(value, list):
        for entry in value:
            yield from _messages(entry)


def _bound_requests() -> None:
    """Let no request of this process wait for ever: the client gives a time-out to downloads alone."""
    from huggingface_hub import get_session

    client = get_session()  # one for all requests, made anew when a connection fails
    hooks = client.event_hooks
    if _add_timeout not in hooks["request"]:
        client.event_hooks = {**hooks, "request": [*hooks["request"], _add_timeout]}


def _add_timeout(request: Any) -> None:
    """Give a request the time-outs that it lacks."""
    from huggingface_hub import constants

    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT if "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ else TIMEOUT
    given = {step: value for step, value in request.extensions.get("timeout", {}).items() if value is not None}
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds) | given
