"""Asking the Hub: whatever it answers, the user hears what was asked, what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def asking_the_hub(what: str, *, revision: str | None = None, missing: str = "") -> Iterator[None]:
    """Turn the Hub's and the network's errors into a ValueError of one line.

    Args:
        what: named in the message, as in `The dataset org/pets`.
        revision: that was asked for.
        missing: said in place of the usual where there is no such repository.
    """
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
        raise ValueError(f"{missing or what}, and the Hub can't be asked: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        if missing and error.response is not None and error.response.status_code == 404:
            raise ValueError(f"{missing} (or it is private: log in or pass a token).") from error
        raise ValueError(f"{what}: the Hub refuses: {_first_line(error)}") from error
    except RuntimeError as error:  # the client's, around what happened to a file
        if error.__cause__ is None:
            raise
        raise ValueError(f"{what}: {_first_line(error)} {_first_line(error.__cause__)}") from error.__cause__
    except Exception as error:
        if type(error).__module__.partition(".")[0].startswith("httpx"):  # the client's own; its name changes
            raise ValueError(f"{missing or what}, and the Hub can't be reached: {_first_line(error)}") from error
        raise


# What a Hub answers that is busy, broken for a moment, or was asked by two at once.
_PASSING = {408, 409, 412, 429, 500, 502, 503, 504}


def is_passing(error: ValueError) -> bool:
    """Whether what `asking_the_hub` told of may be over in a moment."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return cause.response is not None and cause.response.status_code in _PASSING
    return isinstance(cause, OSError) or type(cause).__module__.partition(".")[0].startswith("httpx")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
