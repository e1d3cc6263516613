"""The pictures of a card: estimates and what was measured, what it cost, which classes gain. They need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("estimates.png", "passes.png", "classes.png")

# Inches, and dots in each: 960 dots are as many as a phone shows, and letters of 13 points stay legible there.
SIZE, DENSITY = (6.4, 4.4), 150
# Told apart by who sees no red or no green, and by their lightness alone.
BLUE, ORANGE, GREY = "#0b5394", "#d95f02", "#6b6b6b"
# Of more classes, those that change most.
CLASSES = 24


def draw(fields: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by name, from the contents of `recipe.json`; none without matplotlib, or where nothing is to be seen.

    The ground is white, so that they look the same on a dark page.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    found = {}
    for name, fill in zip(NAMES, (_estimates, _passes, _classes), strict=True):
        figure = Figure(figsize=SIZE, dpi=DENSITY, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        if fill(axes, fields):
            found[name] = _png(figure)
    return found


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _estimates(axes: Axes, fields: dict[str, Any]) -> bool:
    """Each measured soup: the ensemble's accuracy against its own."""
    soups = [one for one in fields["measurements"] if one["proposal"] != "single" and one["measured"] is not None]
    if len(soups) < 2:
        return False
    recipe = dict(zip(fields["recipe"]["ingredients"], fields["recipe"]["weights"], strict=True))
    others = [one for one in soups if dict(zip(one["ingredients"], one["weights"], strict=True)) != recipe]
    chosen = [one for one in soups if one not in others]
    part = [one for one in others if one["images"] < fields["images"]]
    _points(axes, [one for one in others if one not in part], color=BLUE, label="soup")
    _points(axes, part, facecolors="none", edgecolors=BLUE, label="soup, from a part of the images")
    _points(axes, chosen, color=ORANGE, marker="D", label="this soup")
    low, high = axes.get_xlim()
    axes.axline((low, low), (high, high), color=GREY, linestyle="--", linewidth=1, label="as estimated")
    axes.set_xlim(low, high)
    _name(axes, "accuracy of the ensemble, %", "accuracy of the soup, %", f"split {fields['data']['split']}")
    axes.legend(fontsize=11, frameon=False)
    return True


def _points(axes: Axes, soups: Sequence[dict[str, Any]], **style: Any) -> None:
    if soups:
        estimates, measured = ([100 * one[name] for one in soups] for name in ("estimate", "measured"))
        axes.scatter(estimates, measured, s=42, alpha=0.85, **style)


def _passes(axes: Axes, fields: dict[str, Any]) -> bool:
    """What was known of the best after so many passes over the split."""
    curve = fields.get("curve") or []
    if len(curve) < 3:
        return False
    spent = [fields["passes"]["logits"] + passes for passes, _ in curve]
    best = [100 * accuracy for _, accuracy in curve]
    axes.step(spent, best, where="post", color=BLUE, linewidth=2)
    axes.axhline(best[0], color=GREY, linestyle="--", linewidth=1)
    low, high = min(best), max(best)
    room = max(0.1 * (high - low), 0.05)
    axes.set_ylim(low - 2 * room, min(100.0, high + 2 * room))
    end: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 11}
    axes.annotate("best single model", (0.75, best[0]), (-4, -3), xycoords=("axes fraction", "data"), **end)
    if fields["method"] == "radin" and not fields.get(
        "hold_out"
    ):  # it runs each model, and tries to add each but the best
        greedy = 2 * (fields.get("pilot") or {}).get("given", len(fields["ingredients"])) - 1
        axes.axvline(greedy, color=ORANGE, linestyle=":", linewidth=2)
        text = f"greedy takes {greedy} passes"
        axes.annotate(text, (greedy, 1), (-4, -4), xycoords=("data", "axes fraction"), color=ORANGE, **end)
    _name(axes, "passes over the split, logits included", "best so far, %", f"split {fields['data']['split']}")
    return True


def _classes(axes: Axes, fields: dict[str, Any]) -> bool:
    """How much more of each class the soup gets right than the best single model."""
    told = fields.get("by_class")
    if not told:
        return False
    rows = [
        (100 * (soup - single) / images, _short(name))
        for name, images, soup, single in zip(
            fields["classes"], told["images"], told["soup"], told["best single"], strict=True
        )
        if images
    ]
    if not any(gain for gain, _ in rows):
        return False
    shown = sorted(sorted(rows, key=lambda row: -abs(row[0]))[:CLASSES])
    gains = [gain for gain, _ in shown]
    axes.barh(range(len(shown)), gains, color=[BLUE if gain >= 0 else ORANGE for gain in gains])
    axes.set_yticks(range(len(shown)), [name for _, name in shown], fontsize=11 if len(shown) <= 12 else 8)
    axes.axvline(0, color=GREY, linewidth=1)
    some = "" if len(shown) == len(rows) else f", the {len(shown)} of {len(rows)} classes that change most"
    _name(axes, "soup less best single model, points", "", f"split {told['split']}{some}")
    return True


def _name(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=13)
    axes.set_ylabel(y, fontsize=13)
    axes.set_title(_short(title, 60), fontsize=12, color=GREY)


def _short(name: str, most: int = 24) -> str:
    """A name as plain text: of one line, not too long, and without what matplotlib takes for a formula."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(name)).replace("$", r"\$")
    return plain if len(plain) <= most else f"{plain[: most - 1]}\u2026"
