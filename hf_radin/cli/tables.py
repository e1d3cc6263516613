"""What the command line prints: tables for the eye."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hf_radin.ingredients.gather import Verdict
from hf_radin.logits.cost import Estimate
from hf_radin.runtime.hub_commit import Plan
from hf_radin.runtime.processes import Processes, is_main_process
from hf_radin.runtime.text import clock, counted, printable, show_difference, show_metric
from hf_radin.soup.card_sentences import about_adapter, about_exactness, comparison_text, spending, verdict_text
from hf_radin.soup.report import RECIPE, SearchReport
from hf_radin.soup.soup import Soup

# Letters of a line of a table of results, and of the title of a row.
LINE, ROW_TITLE = 120, 18

# Letters of a cell of a table of checkpoints.
CELL = 100

# A split and a metric.
Column = tuple[str, str]


def say(line: str) -> None:
    """Print a line in the main process, with what would move the cursor or forge a line escaped."""
    show(printable(line))


def show(table: str) -> None:
    """Print lines of `as_text` in the main process."""
    if is_main_process():
        print(table)


def as_text(lines: Iterable[str]) -> str:
    """Lines that may have names from outside in them, as a text of so many lines."""
    return "\n".join(map(printable, lines))


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """A row for each checkpoint, and below them the notes."""
    rows = [("checkpoint", "architecture", "classes", "parameters", "dtype", "size", "verdict")]
    for verdict in verdicts:
        files, ingredient = verdict.files, verdict.ingredient
        rows.append(
            (
                verdict.id,
                ingredient.architecture if ingredient else "",
                str(len(ingredient.labels)) if ingredient else "",
                f"{verdict.parameters:,}" if verdict.parameters else "",
                files.dtypes if files else "",
                f"{files.size / 1e6:,.1f} MB" if files else "",
                "refused" if verdict.problem else "ok" if ingredient else "copy",
            )
        )
    cells = [[_cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    notes = [text for verdict in verdicts for text in (*verdict.notes, verdict.problem) if text]
    return as_text(lines + [f"- {text}" for text in notes])


def _cell(text: str) -> str:
    """A name as it stands in a table: of a very long one, the end."""
    text = printable(text)
    return text if len(text) <= CELL else f"...{text[3 - CELL :]}"


def soup_table(soup: Soup) -> str:
    """What was found, as text."""
    report = soup.report
    scores = {
        (result.name, result.split, name): value for result in report.results for name, value in result.metrics.items()
    }
    columns = list(dict.fromkeys((split, name) for _, split, name in scores))
    rows = list(dict.fromkeys(result.name for result in report.results))
    count = len(report.ingredients)
    lines = [line for part in _fitting(columns) for line in _result_lines(part, rows, scores, count)]
    lines += [] if report.measured else ["", _estimated(report)]
    if report.estimate_error is not None:
        off = show_difference(report.metric, report.estimate_error)
        lines += ["", f"Estimates of soups were off by {off} in the median, by those that were measured."]
    notes = [f"The figure of {text}." for text in _partial_figures(report)]
    proofs = [f"Soup against best single: {comparison_text(entry)}." for entry in report.against_best_single]
    if report.keep:
        does_keep = any(report.is_chosen(entry) and entry.keeps for entry in report.measurements)
        proofs.append(f"Chosen to keep {', '.join(report.keep)}{'' if does_keep else ', which it does not'}.")
    proofs += [f"Verdict: {verdict_text(report)}"] if report.verdict else []
    weights = [f"{weight:8.4f}  {name}" for name, weight in soup.recipe.used.items()]
    if report.recipe.pull is not None:
        weights.append(f"All but its head has {report.recipe.pull}, and of these weights the rest.")
    if report.head is not None:
        teachers, labels = len(report.head.teacher.used), " and the labels" if report.head.labels else ""
        if report.head.tail is None:
            what = "Its head is refitted to"
        else:
            what = f"Its last layers, from {report.head.tail.module} on, are distilled from"
        weights.append(f"{what} the ensemble of {teachers}{labels} on {report.head.split}.")
    return as_text([*lines, *notes, "", *proofs, *[""] * bool(proofs), "Recipe:", *weights, "", *_spent(report)])


def _estimated(report: SearchReport) -> str:
    """What is known of a soup that was not measured."""
    entry = next(entry for entry in report.measurements if entry.recipe == report.recipe)
    how = "Estimated" if entry.predicted is None else "Predicted by soups that were measured before"
    part = f"a random {100 * report.pilot.share:.3g}% of " if report.pilot else ""
    split = report.data.split if report.data else ""
    return f"{how}, not measured: {show_metric(report.metric, entry.known)} on {part}{split}."


def _spent(report: SearchReport) -> list[str]:
    """What the search took, and what of it is estimated after a pilot."""
    lines = [about_exactness(report)] if report.is_exact else []
    lines.append(f"Spent in all: {spending(report)}.")
    if report.pilot and report.unseen:
        lines.append(
            f"{len(report.pilot.whole)} of {report.given} ingredients were run on all {report.images:,} images: "
            f"what the others and the ensemble get right of {report.unseen:,} of them is estimated."
        )
    return lines


def _fitting(columns: list[Column]) -> list[list[Column]]:
    """Splits and metrics as a line has room for: all, or those of one split after those of another."""
    most = max(1, (LINE - ROW_TITLE) // _width(columns))
    if len(columns) <= most:
        return [columns]
    parts = []
    for split in dict.fromkeys(split for split, _ in columns):
        of_split = [column for column in columns if column[0] == split]
        parts += [of_split[start : start + most] for start in range(0, len(of_split), most)]
    return parts


def _width(columns: list[Column]) -> int:
    """Letters of a column of a table of results."""
    return max([20, *(len(f"{split} {name}") for split, name in columns)]) + 2


def _result_lines(
    columns: list[Column], rows: list[str], scores: dict[tuple[str, str, str], float], ingredients: int
) -> list[str]:
    """A table of some splits and metrics."""
    width = _width(columns)
    lines = [f"{'':{ROW_TITLE}}" + "".join(f"{f'{split} {name}':>{width}}" for split, name in columns)]
    for row in rows:
        values = ((name, scores.get((row, split, name))) for split, name in columns)
        cells = ("not measured" if value is None else show_metric(name, value) for name, value in values)
        title = f"ensemble of {ingredients}" if row == "ensemble" else row
        lines.append(f"{title:{ROW_TITLE}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return lines


def plan_table(repo_id: str, files: Mapping[str, Path | bytes], plan: Plan) -> str:
    """What a push would do, file by file."""
    lines = [f"{repo_id} would be made." if plan.head is None else f"{repo_id} is at commit {plan.head}."]
    if plan.is_done:
        return f"{lines[0]} It holds just that already: nothing would be pushed."
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        same = "" if name in plan.changed else "  is there already"
        what = "  replaces what is there" if name in plan.replaced else same
        lines.append(f"  {name:40} {_bytes(size):>10}{what}")
    return as_text([*lines, *(f"  {name:40} {'':>10}  would be removed" for name in plan.removed)])


def _partial_figures(report: SearchReport) -> Iterator[str]:
    """Which figures are of fewer images than the others."""
    for result in report.results:
        most = max(other.images for other in report.results if other.split == result.split)
        if result.images < most:
            yield (f"{result.name} is what {result.images:,} of the {most:,} images of {result.split} say of all")


def estimate_table(job: Estimate) -> str:
    """Each cost with the arithmetic that gives it, and what does not fit."""
    probe, images, models = job.probe, f"{job.images:,} images", f"{job.ingredients} ingredients"
    decodes = (
        f"each with {counted(job.workers, 'worker')} that decode" if job.workers else "without workers that decode"
    )
    once, again = map(_decoded, job.decodings)
    work = f"{images} x {models}"
    if job.pilot is not None:
        work = f"{images} x about {job.logits:.3g} passes: {job.pilot.share:.3g} of {models}, all of {job.completed}"
    saves = job.together is not None and job.together < job.ingredients
    shared = "all but the heads runs once" if job.exact else f"at most {job.work:.3g} passes' work"
    once = f"{shared}, {once}" if saves else once
    anew = f", BatchNorm of each from {job.statistics:,}" if job.statistics else ""
    soups = f"{images} x {job.soups:g} passes, {again}{anew}"
    soups += f", at most {job.soup_work:.3g} passes' work" if job.tail < 1 else ""
    head = f"{images} x {job.head} pass, whether a refitted one is better"
    at_once = f"{job.at_once} of {_bytes(probe.model_bytes)} at once, in {counted(job.groups, 'group')}"
    share = job.cached_bytes / job.pixel_bytes
    parts = {
        f"an image, measured on {probe.device} in {probe.dtype}, {probe.batch_size} in a forward pass": [
            ("decode", f"{1 / probe.decode_seconds:,.0f} a second", clock(probe.decode_seconds)),
            ("one model", f"{1 / probe.forward_seconds:,.0f} a second", clock(probe.forward_seconds)),
        ],
        f"time of {counted(job.processes, 'process')}, {decodes}": [
            ("logits", f"{work}, {once}", clock(job.logits_seconds)),
            ("soups", "exact, without a pass" if job.exact else soups, clock(job.soups_seconds)),
            ("head", head if job.head else "averaged after a pilot", clock(job.head_seconds)),
            ("together", "", clock(job.logits_seconds + job.soups_seconds + job.head_seconds)),
        ],
        "memory and disk": [
            ("models", f"{at_once}; {probe.fit:,} fit", _bytes(job.at_once * probe.model_bytes)),
            ("weights", "to download", _bytes(job.download_bytes)),
            ("bank", f"{work} x {job.classes:,} classes x {job.logit_bytes} B", _bytes(job.bank_bytes)),
            ("pixels", f"{images} x {probe.image_bytes:,} B, {share:.0%} of it cached", _bytes(job.cached_bytes)),
            ("disk", f"{_bytes(job.free_disk)} free", _bytes(job.disk_bytes)),
        ],
    }
    rows = [row for part in parts.values() for row in part]
    first, second, third = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for title, part in parts.items():
        lines += [title, *(f"  {name:{first}}  {text:{second}}  {value:>{third}}" for name, text, value in part)]
    note = (
        "Arithmetic from a probe, whose rate varies. Downloading, loading and averaging weights are not in it, nor is "
        "reading images over a network."
    )
    if job.together is None:
        note += " What the models have in common runs once for all: not all are here, and nothing is assumed of that."
    elif saves:
        note += (
            " What models have in common, up to the first layer that differs, is taken to run once for those that see "
            "an image together; more of them may fit into memory, and what is alike behind that layer is not counted."
        )
    return as_text([*lines, *(f"- {text}" for text in _too_much(job)), note])


def _too_much(job: Estimate) -> Iterator[str]:
    """What does not fit, and what to do about it."""
    if job.disk_bytes > job.free_disk:
        lacks = _bytes(job.disk_bytes - job.free_disk)
        yield f"The disk lacks {lacks}: name another place (--cache-dir, HF_HOME), or make room."
    if not job.one_disk and job.download_bytes > job.free_hub:
        lacks = _bytes(job.download_bytes - job.free_hub)
        yield f"The disk that weights are downloaded to lacks {lacks}: name another place (HF_HOME), or make room."
    if job.at_once > job.probe.fit:
        yield f"{job.at_once} models at once are too many for the memory (--models-in-memory): {job.probe.fit} fit."


def _decoded(times: float) -> str:
    return "not decoded again" if not times else "decoded once" if times == 1 else f"decoded {times:.3g} times"


def _bytes(count: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def say_adapter(save_adapter: bool | int, output: Path, processes: Processes) -> None:
    """Say what the adapter of a soup is, if one was saved."""
    if save_adapter is not False:
        say(processes.decide(lambda: about_adapter(SearchReport.read(output / RECIPE))))
