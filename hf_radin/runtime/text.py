"""Numbers and names as text, for cards and terminals."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

# Metrics between 0 and 1, which are shown as percent. Correlations may be negative, and a loss has no upper end.
_SHARES = re.compile(
    r"((balanced_|label_|subset_|top_?\d+_)?accuracy|(worst_)?recall(_macro|_micro|_weighted)?"
    r"|(f1|precision)(_macro|_micro|_weighted)?|roc_auc|average_precision|calibration_error|(f1|precision|recall)\[.*\])"
)


def is_share(name: str) -> bool:
    """Whether a metric is between 0 and 1, and shown as percent."""
    return _SHARES.fullmatch(name) is not None


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def between(interval: Sequence[float] | None, name: str = "accuracy") -> str:
    """An interval of a metric, in percent if it is between 0 and 1; empty if there is none."""
    if interval is None:
        return ""
    low, high = interval
    return f"{100 * low:.2f}\u2013{percent(high)}" if is_share(name) else f"{low:.4f}\u2013{high:.4f}"


def show_metric(name: str, value: float) -> str:
    """The value of a metric: in percent if it is between 0 and 1, else as it is."""
    return percent(value) if is_share(name) else f"{value:.4f}"


def show_difference(name: str, value: float) -> str:
    """A difference of a metric: in points if it is shown in percent, else as it is."""
    return f"{scaled(name, value):.2f} points" if is_share(name) else f"{value:.4f}"


def signed(name: str, value: float) -> str:
    """A difference of a metric with its sign, without a unit."""
    return f"{100 * value:+.2f}" if is_share(name) else f"{value:+.4f}"


def scaled(name: str, value: float) -> float:
    """A metric as it is shown: times 100 if that is in percent."""
    return 100 * value if is_share(name) else value


def shown(name: str) -> str:
    """An ingredient's id without what it says of a machine: the last two parts of an absolute path."""
    path = PurePath(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def printable(text: Any) -> str:
    r"""Text from outside in one line of a terminal: what would move the cursor or forge a line is shown as `\n`."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def one_line(error: BaseException) -> str:
    """What a library says is wrong, in one line: how it lays out its text is nothing that happened."""
    return " ".join(str(error).split()) or type(error).__name__


def refuse_bytes(name: str) -> None:
    """Refuse the name of a file or folder that is no text, or that this locale has no bytes for.

    It could be written into no record and no card, or not be found.

    Raises:
        ValueError: if it has bytes that are not of the locale, which Python reads as halves of surrogate pairs, or
            letters that are not.
    """
    try:
        name.encode()
        os.fsencode(name)
    except UnicodeEncodeError as error:
        try:
            text = name if error.encoding != "utf-8" else os.fsencode(name).decode()
        except UnicodeError:
            raise ValueError(f"The name {printable(name)} is no UTF-8 text: rename what is called so.") from error
        raise ValueError(
            f"The name {printable(text)} can't be used in this locale, where names are {sys.getfilesystemencoding()}: "
            "set LC_ALL=C.UTF-8 and PYTHONUTF8=1."
        ) from error


def escape(text: Any) -> str:
    """Text from outside, escaped so that Markdown and HTML show it as it is."""
    entities = _printable(text).replace("&", "&amp;").replace("<", "&lt;")
    quoted = re.sub(r"([\\`*_\[\]|~$]|:(?=\S)|(?<=www)\.)", r"\\\1", entities)
    # at the beginning, these would make it a list, a heading or a quotation
    return re.sub(
        r"^(\s*)(>|[-+#]+(?=\s|$)|\d+[.)](?=\s|$))",
        lambda match: match[1] + re.sub(r"(\W)", r"\\\1", match[2]),
        quoted,
    )


def code(text: Any) -> str:
    """Text from outside, for use between backticks, where only the end of a table's cell can be escaped."""
    return _printable(text).replace("`", "'").replace("|", r"\|")


def _printable(text: Any) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def counted(number: int, noun: str) -> str:
    """A number of things, as in `1 pass` and `1,000 images`."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def clock(seconds: float) -> str:
    """A duration in hours, minutes, seconds or milliseconds."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if round(seconds / size, 1) >= 1:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.3g} ms"
