"""What a report says in sentences and rows: the outcome of a search, what it cost, and how sure it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from hf_radin.images.split import OBJECT
from hf_radin.layers.record import HeadRecord, TailRecord
from hf_radin.recipes.recipe import Measurement, Result
from hf_radin.runtime.files import ADAPTER_FOLDER
from hf_radin.runtime.text import clock, counted, escape, is_share, percent, show_difference, show_metric, signed
from hf_radin.soup.report import Comparison, SearchReport, SoupVerdict, TimeSpent

# What a soup is, by the kind of its verdict.
VERDICTS = {
    "better": "better than the best single model beyond chance",
    "alike": "not distinguishable from the best single model",
    "worse": "worse than the best single model beyond chance",
}


def verdict_text(report: SearchReport) -> str:
    """What the soup is worth, in plain words; empty where nothing says it."""
    verdict = report.verdict
    if verdict is None:
        return ""
    return _verdict(report, verdict) + ("" if verdict.kind == "single" else _bias(report))


def outcome(report: SearchReport) -> str:
    """What the soup is worth and its figures, soup against best single model, on the split that proves most."""
    if report.data is None or not report.results:
        return _not_measured(report)
    split = report.held_out or report.data.split
    values = _values(report, split)
    if report.is_single:
        return _single(report, split, values)
    verdict = f"**{escape(_verdict(report, report.verdict))}** " if report.verdict else ""
    if not report.measured:
        return verdict + _estimated(report, split, values)
    if "soup" not in values or "best single" not in values:
        return verdict + _by_another_metric(report, split)
    name, comparison = (
        report.metric,
        next((entry for entry in report.against_best_single if entry.split == split), None),
    )
    gain = values["soup"] - values["best single"]
    better = "better" if (gain < 0) == report.less_is_better else "worse"
    difference = f"{show_difference(name, abs(gain))} {better} than" if gain else "as good as"
    doubt = _doubt(comparison, gain) if comparison else ""
    taught = "distilled last layers" if report.is_distilled else "refitted head"
    whose = (
        f"the soup's {escape(name)}"
        if report.is_average
        else f"the {escape(name)} of this checkpoint with its {taught}"
    )
    return (
        f"{verdict}On the split {escape(split)} {whose} is {show_metric(name, values['soup'])}, {difference} the best "
        f"single ingredient{doubt}.{_floors(report)}{_bias(report)}"
    )


def _not_measured(report: SearchReport) -> str:
    """What is said of a model that nobody measured."""
    kind = "a checkpoint" if report.is_single else "an average of checkpoints by weights"
    doubt = "" if report.is_single else " No accuracy is claimed: it may be worse than each of its ingredients."
    text = f"**Nothing was measured of this model.** It is {kind} that somebody gave; how good it is was not asked."
    return text + doubt


def about_statistics(report: SearchReport) -> str:
    """What averaged BatchNorm statistics mean, and what to do about them; empty if none are averaged."""
    if not report.averaged_statistics:
        return ""
    return (
        "Its BatchNorm statistics are the average of those of its ingredients. They are not the statistics of the "
        "averaged weights, which only images give, and its accuracy may collapse without these. `hf-radin soup "
        "--method uniform`, on a dataset, estimates them anew; from Python, `average(..., "
        "statistics=bank.statistics)` does."
    )


def how_to_measure(models: Sequence[str], *, place: str, is_uniform: bool) -> str:
    """The command that measures a soup of which nothing is known.

    Args:
        models: names of its ingredients.
        place: of the soup itself.
        is_uniform: whether they are in it in equal parts: then the search that makes it measures it.
    """
    method, names = ("uniform", models) if is_uniform else ("best_single", [place, *models])
    listed = " ".join(map(shlex.quote, names))
    return f"hf-radin soup --method {method} --models {listed} --dataset DATA --output measured"


def _floors(report: SearchReport) -> str:
    """Which floors the soup was to keep, and whether it does on the split that chose it."""
    if not report.keep:
        return ""
    does_keep = any(report.is_chosen(entry) and entry.keeps for entry in report.measurements)
    floors = ", ".join(map(escape, report.keep))
    return f" It was chosen to keep {floors}{'' if does_keep else ', **which it does not**'}."


def about_head(report: SearchReport) -> str:
    """How the head was refitted, or the last layers distilled, in sentences; empty if they are averaged."""
    head = report.head
    if head is None:
        return ""
    if head.tail is not None:
        return _about_tail(report, head, head.tail)
    labels = f"with their labels, which count for {head.labels:.0%}" if head.labels else "without their labels"
    judged = "What it gets right of these images is said by heads that did not see the image."
    if report.data is not None and head.split != report.data.split:
        judged = f"Candidates were compared by heads that images of {escape(report.data.split)} taught."
    return (
        f"Its head was refitted to the ensemble of {len(head.teacher.used)} checkpoints, on "
        f"{head.images:,} images of the split {escape(head.split)} and {labels}. {judged}"
    )


def _about_tail(report: SearchReport, head: HeadRecord, tail: TailRecord) -> str:
    """How last layers were distilled, in sentences."""
    labels = f"and of their labels, which count for {head.labels:.0%}" if head.labels else "and not of their labels"
    epochs = f"epoch{'s' if tail.epochs > 1 else ''} at a rate of {tail.rate:g} from the seed {head.seed} on"
    images = f"the split {escape(head.split)}"
    if head.source is not None:
        images += f" of {'a Dataset object' if head.source.name == OBJECT else escape(head.source.name)}"
    judged = "What they get right of these images is said by layers that the other half of the images taught."
    if head.source is not None or (report.data is not None and head.split != report.data.split):
        judged = ""
    return (
        f"Its last layers, from {escape(tail.module)} on, were distilled: {tail.parameters:,} parameters learned what "
        f"the ensemble of {len(head.teacher.used)} checkpoints says of {head.images:,} images of {images}, "
        f"{labels}, in {tail.epochs} {epochs}. {judged}"
    ).rstrip()


def about_adapter(report: SearchReport) -> str:
    """The adapter beside a soup in sentences, with what was lost where it was cut; empty if there is none."""
    made = report.adapter
    if made is None:
        return ""
    whole = made.modules_to_save
    names = ", ".join(whole[:3]) + (f" and {len(whole) - 3} more" if whole[3:] else "")
    saved = f" {names} {'is' if len(whole) == 1 else 'are'} saved whole." if whole else ""
    exact = "The two are equal to rounding."
    if made.limit is not None:
        exact = (
            f"It was cut to rank {made.limit}, which lost {100 * made.lost:.2g}% of what the adapters add to the base "
            "(Frobenius norm): it is not quite this model, and was not measured."
        )
    full = ""
    if made.full:
        full = f" In {counted(made.full, 'layer')} ranks add up beyond that of the matrix, with which nothing is lost."
    return (
        f"The folder {ADAPTER_FOLDER} holds the soup as a LoRA adapter of {made.base}: factors up to rank {made.rank} "
        f"in {counted(made.layers, 'layer')}, {made.parameters:,} parameters in all.{saved} {exact}{full}"
    )


def about_exactness(report: SearchReport) -> str:
    """Why soups took no pass, in sentences; empty if they did, or were not measured."""
    if not report.is_exact:
        return ""
    why = "Exact: the checkpoints differ in their heads alone, so that a soup"
    same = "is the same function as the ensemble of its ingredients, up to rounding."
    if report.head is None:
        return f"{why} {same} What logits say of this is what the soup does, and no image was shown to it."
    taught = "with distilled last layers" if report.is_distilled else "with a refitted head"
    return (
        f"{why} with an averaged head {same} What logits say of this is what such soups do, and no image was shown to "
        f"them. This one, {taught}, is another function than the ensemble: it was run."
    )


def shared_images(report: SearchReport) -> str:
    """Which images the split that proves has in common with others, in sentences; empty if it has none."""
    overlap = report.overlap
    if overlap is None or report.data is None:
        return ""
    proving, choosing = escape(report.held_out), escape(report.data.split)
    sentences = []
    if overlap.images is None:
        sentences.append(f"Whether {proving} and {choosing} have images in common can't be told.")
    elif overlap.images:
        part = "" if report.method == "uniform" else ", and so had a part in the choice that they are to prove"
        count = f"{overlap.images:,} of the {overlap.of:,} images"
        sentences.append(f"**{count} of {proving} are in {choosing} too**, byte for byte{part}.")
    if overlap.batchnorm and report.is_average:
        count = f"{overlap.batchnorm:,} of the {overlap.of:,} images"
        sentences.append(f"{count} of {proving} gave BatchNorm its statistics too, without their labels.")
    return " ".join(sentences)


def comparison_text(comparison: Comparison) -> str:
    """How the soup compares to the best single model on a split, as far as the number of images tells."""
    name = comparison.metric
    gain, low, high = (signed(name, value) for value in (comparison.gain, *comparison.interval))
    p = f"{comparison.p_value:.2f}" if comparison.p_value >= 0.01 else f"{comparison.p_value:.1g}"
    of = "points" if name == "accuracy" else f"points of {name}" if is_share(name) else f"of {name}"
    less = ", of which less is better," if comparison.is_loss else ""
    interval = f"95% by the bootstrap: {low} to {high}"
    return f"{gain} {of}{less} on {comparison.split} ({interval}; p = {p} by {_test(comparison)})"


def _test(comparison: Comparison) -> str:
    """Which test a comparison's p-value is of."""
    return "the exact McNemar test" if comparison.metric == "accuracy" else "the paired permutation test"


def spending(report: SearchReport) -> str:
    """What a search took, in passes over the split."""
    if report.passes is None or report.data is None:
        return ""
    passes = report.passes
    text = f"{passes.logits:.3g} passes over {report.data.split} for logits{_of_one_body(report)}, "
    text += f"{passes.soups:.3g} for soups"
    if (report.budget or "0") != "0":
        left = "which is not touched: soups are exact" if report.is_exact else "baselines beside it"
        text += f" (a budget of {report.budget}, {left})"
    if passes.probabilities:
        text += f", {passes.probabilities:.3g} to run soups once more for metrics of probabilities"
    if passes.batchnorm:
        text += f", and as many images as {passes.batchnorm:.3g} passes for their BatchNorm statistics"
    if passes.head:
        is_taken = "" if report.has_refitted_head else ", which is not taken"
        text += f", {passes.head:.3g} to refit the head of the soup{is_taken}"
    if passes.tail:
        is_taken = "" if report.is_distilled else ", which are not taken"
        text += f", {passes.tail:.3g} to distil its last layers, by multiplications{is_taken}"
    return text


def _of_one_body(report: SearchReport) -> str:
    """How passes for logits are counted where they took less than so many of one model; else nothing."""
    return " (counted as if each ran alone; they share one body)" if report.is_exact else ""


def costs(report: SearchReport) -> list[tuple[str, str, str]]:
    """What a search took: for what, how many passes, and how long that was, as far as it is known."""
    passes, time = report.passes, report.time or TimeSpent()
    if passes is None:
        return []
    row = f"logits of {report.given} checkpoints{_of_one_body(report)}"
    rows = [(row, f"{passes.logits:.3g}", _clock(time.logits))]
    if passes.soups:
        rows.append(("measuring soups", f"{passes.soups:.3g}", _clock(time.soups)))
    if passes.probabilities:
        row = "running soups once more, for metrics of probabilities"
        rows.append((row, f"{passes.probabilities:.3g}", _clock(time.probabilities)))
    if passes.head:
        is_taken = "" if report.has_refitted_head else ", which was not taken"
        rows.append((f"refitting the head of the soup{is_taken}", f"{passes.head:.3g}", ""))
    if passes.tail:
        is_taken = "" if report.is_distilled else ", which were not taken"
        rows.append(
            (f"distilling the last layers of the soup, by multiplications{is_taken}", f"{passes.tail:.3g}", "")
        )
    if passes.batchnorm:
        rows.append(("images for their BatchNorm statistics, as passes", f"{passes.batchnorm:.3g}", ""))
    if report.held_out:
        logits = len(report.ingredients) if report.held_out_logits is None else report.held_out_logits
        if report.hold_out is not None:  # its logits are known, as those of the same split
            logits = 0
        row = f"the figures on {report.held_out}, in passes over it"
        rows.append((row, str(logits + _proved_soups(report)), ""))
    return rows


def _values(report: SearchReport, split: str) -> dict[str, float]:
    """By the name of the model, what soups were chosen by, on a split."""
    results = [result for result in report.results if result.split == split and report.metric in result.metrics]
    return {result.name: result.metrics[report.metric] for result in results}


def _verdict(report: SearchReport, verdict: SoupVerdict) -> str:
    """What the soup is worth, in a sentence."""
    if verdict.kind == "single":
        return _why_single(report)
    taught = "distilled last layers" if report.is_distilled else "refitted head"
    the_metric = "the accuracy" if report.metric == "accuracy" else report.metric
    subject = "This soup" if report.is_average else f"This checkpoint with its {taught}"
    return f"{subject} is {VERDICTS[verdict.kind]}, by {the_metric} on the split {verdict.split}."


def _doubt(comparison: Comparison, gain: float) -> str:
    """How sure the difference is, in brackets."""
    low, high = (signed(comparison.metric, value) for value in comparison.interval)
    excludes_zero = not comparison.interval[0] <= 0 <= comparison.interval[1]
    reason = f" (p = {comparison.p_value:.2f} by {_test(comparison)})" if excludes_zero else ""
    maybe = f", which may be chance{reason}" if gain and not comparison.is_significant else ""
    return f" (95%: {low} to {high}{' points' if is_share(comparison.metric) else ''}{maybe})"


def _bias(report: SearchReport) -> str:
    """Why the figure may be too good."""
    if report.method == "uniform" and not report.is_distilled:
        flattered = "" if report.held_out else "; that split chose the best single model, which flatters the latter"
        return f" Nothing was chosen: all checkpoints are in it, in equal parts{flattered}."
    if report.held_out and report.overlap and report.overlap.images:
        shared, images = report.overlap.images, report.overlap.of
        return f" {shared:,} of its {images:,} images chose it too, which flatters it."
    return "" if report.held_out else " That split chose it too, which flatters it."


def _single(report: SearchReport, split: str, values: Mapping[str, float]) -> str:
    """Why it is one of the checkpoints, and how good that is."""
    name, reached = report.metric, ""
    if "soup" in values:
        reached = f" On the split {escape(split)} its {escape(name)} is {show_metric(name, values['soup'])}."
    if report.verdict is None:
        return (
            f"The best of {len(report.ingredients)} checkpoints on the split that chose it.{reached}{_floors(report)}"
        )
    return f"{_why_single(report)}{reached}{_floors(report)}"


def _why_single(report: SearchReport) -> str:
    """Why a search returned the best single model, in a sentence."""
    if not report.soups:
        return "No soup was measured, so this is the best single model on the split that chooses."
    all_measured = all(measurement.measured is not None for measurement in report.soups)
    floors = f" and kept {', '.join(report.keep)}" if report.keep else ""
    better = "that was measured was" if all_measured else "was estimated to be"
    return (
        f"No soup {better} better than the best single model{floors} on the split that chooses "
        f"({len(report.soups)} of them), "
        "so this is that model."
    )


def _by_another_metric(report: SearchReport, split: str) -> str:
    """What is known where accuracy was not reported."""
    results: dict[str, Result] = {result.name: result for result in report.results if result.split == split}
    soup, single = (results[name].metrics if name in results else {} for name in ("soup", "best single"))
    name = next((name for name in soup if name in single), None)
    if name is None:
        chosen = "" if report.method == "uniform" else f"The soup was chosen by its {escape(report.metric)}."
        text = f"None of the requested metrics is defined on the split {escape(split)}. "
        return f"{text}{chosen}{_bias(report)}".strip()
    chosen = "" if report.method == "uniform" else f" It was chosen by its {escape(report.metric)}."
    return (
        f"On the split {escape(split)} the soup's {escape(name)} is {show_metric(name, soup[name])}, and that of the "
        f"best single ingredient {show_metric(name, single[name])}.{chosen}{_bias(report)}"
    )


def _estimated(report: SearchReport, split: str, values: Mapping[str, float]) -> str:
    """What is known of a soup that was not measured on the split that chose it."""
    name, rank = report.metric, -1 if report.less_is_better else 1
    soup = next(measurement for measurement in report.measurements if measurement.measured is None)
    best = max((measurement.known for measurement in report.singles), key=lambda value: rank * value)
    part = f"a random {percent(report.pilot.share)} of " if report.pilot else ""
    choosing = report.data.split if report.data else ""
    proof = ""
    if "soup" in values:  # on the held-out split
        proof = (
            f"On the split {escape(split)}, which did not choose it, the soup's {escape(name)} is "
            f"{show_metric(name, values['soup'])}, and that of the best single ingredient "
            f"{show_metric(name, values['best single'])}. "
        )
    return (
        f"{proof}**Estimated, not measured** is how good it is on {part}the split {escape(choosing)}, which chose it: "
        f"the ensemble of its ingredients, whose {escape(name)} estimates that of the soup, has "
        f"{show_metric(name, soup.estimate)} there, and the best single ingredient {show_metric(name, best)}."
        f"{_estimate_errors(report, soup)}"
    )


def _estimate_errors(report: SearchReport, soup: Measurement) -> str:
    """How far estimates are to be trusted, by soups that were measured before, if there are any."""
    if report.estimate_error is None:
        return " Such estimates are usually too good."
    name, known = report.metric, sum(entry.measured is not None for entry in report.soups)
    were = f"{counted(known, 'soup')} that {'was' if known == 1 else 'were'} measured before"
    off = f" Of {were}, such estimates were off by {show_difference(name, report.estimate_error)} in the median"
    if soup.predicted is None:
        return f"{off}."
    return f"{off}; corrected by these, that of this soup is {show_metric(name, soup.predicted)}."


def _clock(seconds: float | None) -> str:
    """A time, or nothing if it is not known."""
    return clock(seconds) if seconds else ""


def _proved_soups(report: SearchReport) -> int:
    """How many soups were run on the split that proves."""
    if report.is_exact:  # the figures of soups with averaged heads are those of ensembles
        return int(report.head is not None)
    names = {"uniform"} if report.is_single else {"soup"} if report.is_uniform else {"uniform", "soup"}
    return sum(result.split == report.held_out and result.name in names for result in report.results)
