"""The pictures of a card: estimates and what was measured, what it cost, which classes gain. They need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_radin.recipes.recipe import Measurement
from hf_radin.runtime.text import is_share, scaled
from hf_radin.soup.report import SearchReport

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


def draw(report: SearchReport) -> dict[str, bytes]:
    """PNG files by name; none without matplotlib, or where there is nothing to see.

    The ground is white, so that they look the same on a dark page.
    """
    if report.data is None:  # before matplotlib is loaded, which takes longer than many an average
        return {}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    images = {}
    for name, fill in zip(NAMES, (_estimates, _passes, _classes), strict=True):
        figure = Figure(figsize=SIZE, dpi=DENSITY, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        if fill(axes, report):
            images[name] = _png(figure)
    return images


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _estimates(axes: Axes, report: SearchReport) -> bool:
    """Each measured soup: what its ensemble reaches against what it reaches itself."""
    soups = [soup for soup in report.soups if soup.measured is not None and not soup.exact]
    if len(soups) < 2:
        return False
    chosen = [soup for soup in soups if soup.recipe.is_same(report.recipe)]
    others = [soup for soup in soups if soup not in chosen]
    part = [soup for soup in others if soup.images < report.images]
    _points(axes, report.metric, [soup for soup in others if soup not in part], color=BLUE, label="soup")
    _points(axes, report.metric, part, facecolors="none", edgecolors=BLUE, label="soup, from a part of the images")
    _points(axes, report.metric, chosen, color=ORANGE, marker="D", label="this soup")
    low, high = axes.get_xlim()
    axes.axline((low, low), (high, high), color=GREY, linestyle="--", linewidth=1, label="as estimated")
    axes.set_xlim(low, high)
    metric, unit = report.metric, _unit(report)
    _name(axes, f"{metric} of the ensemble{unit}", f"{metric} of the soup{unit}", _split(report))
    axes.legend(fontsize=11, frameon=False)
    return True


def _points(axes: Axes, metric: str, soups: Sequence[Measurement], **style: Any) -> None:
    if soups:
        pairs = [(scaled(metric, soup.estimate), scaled(metric, soup.known)) for soup in soups]
        estimates, measured = zip(*pairs, strict=True)
        axes.scatter(estimates, measured, s=42, alpha=0.85, **style)


def _passes(axes: Axes, report: SearchReport) -> bool:
    """What the best so far reaches, after so many passes over the split."""
    if len(report.curve) < 3 or report.passes is None:
        return False
    spent = [report.passes.logits + passes for passes, _ in report.curve]
    best = [scaled(report.metric, value) for _, value in report.curve]
    axes.step(spent, best, where="post", color=BLUE, linewidth=2)
    axes.axhline(best[0], color=GREY, linestyle="--", linewidth=1)
    low, high = min(best), max(best)
    room = max(0.1 * (high - low), scaled(report.metric, 0.0005))
    axes.set_ylim(
        low - 2 * room, min(scaled(report.metric, 1.0), high + 2 * room) if _unit(report) else high + 2 * room
    )
    end: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 11}
    axes.annotate("best single model", (0.75, best[0]), (-4, -3), xycoords=("axes fraction", "data"), **end)
    if report.method == "radin" and not report.hold_out:
        greedy = 2 * report.given - 1  # it runs each model, and tries to add each but the best
        axes.axvline(greedy, color=ORANGE, linestyle=":", linewidth=2)
        text = f"greedy takes {greedy} passes"
        axes.annotate(text, (greedy, 1), (-4, -4), xycoords=("data", "axes fraction"), color=ORANGE, **end)
    _name(
        axes, "passes over the split, logits included", f"best {report.metric} so far{_unit(report)}", _split(report)
    )
    return True


def _classes(axes: Axes, report: SearchReport) -> bool:
    """How much more of each class the soup gets right than the best single model."""
    hits = report.by_class
    if hits is None:
        return False
    rows = [
        (100 * (soup - single) / images, _short(name))
        for name, images, soup, single in zip(
            report.classes or (), hits.images, hits.soup, hits.best_single, strict=True
        )
        if images
    ]
    if not any(gain for gain, _ in rows):
        return False
    largest = sorted(sorted(rows, key=lambda row: -abs(row[0]))[:CLASSES])
    gains = [gain for gain, _ in largest]
    axes.barh(range(len(largest)), gains, color=[BLUE if gain >= 0 else ORANGE for gain in gains])
    axes.set_yticks(range(len(largest)), [name for _, name in largest], fontsize=11 if len(largest) <= 12 else 8)
    axes.axvline(0, color=GREY, linewidth=1)
    part = "" if len(largest) == len(rows) else f", the {len(largest)} of {len(rows)} classes that change most"
    _name(axes, "soup less best single model, points", "", f"split {hits.split}{part}")
    return True


def _unit(report: SearchReport) -> str:
    """What an axis says after the name of the metric."""
    return ", %" if is_share(report.metric) else ""


def _split(report: SearchReport) -> str:
    return f"split {report.data.split}" if report.data else ""


def _name(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=13)
    axes.set_ylabel(y, fontsize=13)
    axes.set_title(_short(title, 60), fontsize=12, color=GREY)


def _short(name: str, most: int = 24) -> str:
    """A name as plain text: of one line, not too long, and without what matplotlib takes for a formula."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(name)).replace("$", r"\$")
    return plain if len(plain) <= most else f"{plain[: most - 1]}\u2026"
