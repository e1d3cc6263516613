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


def compared(one: dict[str, Any]) -> str:
    """How the soup stands to the best single model on a split, as far as the number of images tells."""
    gain, low, high = (f"{100 * value:+.2f}" for value in (one["gain"], *one["interval"]))
    p = f"{one['p_value']:.2f}" if one["p_value"] >= 0.01 else f"{one['p_value']:.1g}"
    return (
        f"{gain} points on {one['split']} (95% by the bootstrap: {low} to {high}; p = {p} by the exact McNemar test)"
    )


def likely(one: dict[str, Any]) -> bool:
    """Whether both tests say that the difference is no chance: the interval, and McNemar's."""
    low, high = one["interval"]
    return not low <= 0 <= high and one["p_value"] < 0.05


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


def spending(about: dict[str, Any]) -> str:
    """What a search took, in passes over the split."""
    passes, split = about["passes"], about["data"]["split"]
    text = f"{passes['logits']:.3g} passes over {split} for logits, {passes['soups']:.3g} for soups"
    if about.get("budget", "0") != "0":
        text += f" (a budget of {about['budget']}, baselines beside it)"
    if "probabilities" in passes:
        text += f", {passes['probabilities']:.3g} to run soups once more for metrics of probabilities"
    if "batchnorm" in passes:
        text += f", and as many images as {passes['batchnorm']:.3g} passes for their BatchNorm statistics"
    return text


def images_left(about: dict[str, Any]) -> int:
    """Of how many images of the split that chose most ingredients have no logits, after a pilot."""
    shown = (about.get("pilot") or {}).get("shown")
    return 0 if shown is None else int(about["images"] - shown)
