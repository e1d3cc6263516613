"""Numbers and names as text, for cards and terminals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

# Metrics that are shares, shown as percent: between 0 and 1. Correlations may be negative, and a loss has no end.
SHARES = {
    *("accuracy", "balanced_accuracy", "top5_accuracy", "roc_auc", "average_precision", "calibration_error"),
    *(f"{name}{ending}" for name in ("f1", "precision", "recall") for ending in ("", "_macro", "_micro", "_weighted")),
}


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def between(interval: Sequence[float] | None) -> str:
    """An interval of accuracies, or nothing."""
    return "" if interval is None else f"{100 * interval[0]:.2f}\u2013{percent(interval[1])}"


def show_metric(name: str, value: float) -> str:
    """Shares as percent; a metric of unknown range as it is."""
    return percent(value) if name in SHARES else f"{value:.4f}"


def shown(name: str) -> str:
    """An ingredient's id; of an absolute path, which says more of a machine than of a model, the last two folders."""
    path = PurePath(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def escape(text: Any) -> str:
    """Text from outside, such that Markdown and HTML show it and do nothing else with it."""
    printable = "".join(letter if letter.isprintable() else " " for letter in str(text))
    quoted = re.sub(
        r"([\\`*_\[\]|~$]|:(?=\S)|(?<=www)\.)", r"\\\1", printable.replace("&", "&amp;").replace("<", "&lt;")
    )
    # what would begin a list, a heading or a quotation where it stands first
    return re.sub(
        r"^(\s*)(>|[-+#]+(?=\s|$)|\d+[.)](?=\s|$))",
        lambda found: found[1] + re.sub(r"(\W)", r"\\\1", found[2]),
        quoted,
    )


def code(text: Any) -> str:
    """Text from outside between backticks, where nothing can be escaped but what ends a cell of a table."""
    return (
        "".join(letter if letter.isprintable() else " " for letter in str(text)).replace("`", "'").replace("|", r"\|")
    )


def clock(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if round(seconds / size, 1) >= 1:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.3g} ms"
