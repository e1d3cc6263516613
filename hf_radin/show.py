"""What the command line prints: tables for the eye."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_radin.processes import is_main_process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_radin.soup import Soup
    from hf_radin.vetting import Verdict


def say(text: str) -> None:
    """Print in the main process."""
    if is_main_process():
        print(text)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """A row for each checkpoint, and below them what is to be said of some."""
    rows = [("checkpoint", "architecture", "classes", "parameters", "dtype", "size", "verdict")]
    for one in verdicts:
        files, ingredient = one.files, one.ingredient
        rows.append(
            (
                one.id,
                ingredient.architecture if ingredient else "",
                str(len(ingredient.labels)) if ingredient else "",
                f"{one.parameters:,}" if one.parameters else "",
                files.dtypes if files else "",
                f"{files.size / 1e6:,.1f} MB" if files else "",
                "refused" if one.problem else "ok" if ingredient else "copy",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"- {text}" for one in verdicts for text in (*one.notes, one.problem) if text])


def table(soup: Soup) -> str:
    """What was found, as text."""
    from hf_radin.card import show_metric

    scores = {(one.name, one.split, name): value for one in soup.results for name, value in one.metrics.items()}
    columns = list(dict.fromkeys((split, name) for _, split, name in scores))
    titles = [f"{split} {name}" for split, name in columns]
    width = max([20, *map(len, titles)]) + 2
    lines = [f"{'':14}" + "".join(f"{title:>{width}}" for title in titles)]
    for row in dict.fromkeys(one.name for one in soup.results):
        cells = (show_metric(name, scores[row, split, name]) for split, name in columns)
        lines.append(f"{row:14}" + "".join(f"{cell:>{width}}" for cell in cells))
    if not soup.about["measured"]:
        estimate = next(one.estimate for one in soup.measurements if one.recipe == soup.recipe)
        lines += [
            "",
            f"Estimated, not measured: {show_metric('accuracy', estimate)} on {soup.about['data']['split']}.",
        ]
    weights = [f"{weight:8.4f}  {name}" for name, weight in soup.recipe.used.items()]
    passes = soup.about["passes"]
    over = f" over {soup.about['data']['split']}"
    spent = f"Spent: {passes['logits']} passes{over} for logits, {passes['soups']} for soups."
    return "\n".join([*lines, "", "Recipe:", *weights, "", spent])
