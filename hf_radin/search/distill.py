"""One model that keeps what the ensemble gains: the last layers of a soup, taught by all ingredients."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_radin.checkpoints.processor import prepare_image
from hf_radin.images.digests import refuse_shared
from hf_radin.images.split import OBJECT, DataSource, open_split
from hf_radin.ingredients.ingredient import refuse_given
from hf_radin.layers.distilled import distill_tail, find_cut
from hf_radin.layers.record import DISTILLED, SEEDS, HeadRecord
from hf_radin.layers.taught import CookedLayers, refit_head
from hf_radin.logits.bank import LogitBank
from hf_radin.metrics.named import load_metrics, score_or_nan
from hf_radin.recipes.recipe import Measurement, Recipe, Teacher
from hf_radin.runtime.text import show_metric
from hf_radin.search.held_out import bank_of_images, refuse_taught
from hf_radin.search.race import Budget
from hf_radin.search.reporter import (
    FinalLayers,
    Known,
    Reporter,
    ReportOptions,
    best_single,
    class_hits,
    compare,
    hindrance,
    with_start,
)
from hf_radin.soup.report import PassCounts, SearchReport
from hf_radin.soup.soup import Soup
from hf_radin.tail.choose import choose_cut
from hf_radin.tail.cut import Cut
from hf_radin.tail.teach import Course, TaughtTail, usual_epochs

logger = logging.getLogger(__name__)

# Images that are to be had at least: each half of them teaches layers that the other half judges.
LEAST_IMAGES = 200

# Up to so many images, more of them were better (docs/measured.md).
MANY = 3000

# The shape of an image of noise, to run a model where no others are at hand yet.
NOISE = (224, 224, 3)

# The share of the labels in what is taught, where they have a part.
SHARE = 0.5

# What a soup was before its last layers were distilled, in tables.
BEFORE = "not distilled"


def distill(
    bank: LogitBank,
    soup: Soup,
    *,
    tail: str = "block",
    labels: bool = True,
    split: str | None = None,
    images: Any = None,
    teacher: Recipe | None = None,
    epochs: int | None = None,
    rate: float = 1e-3,
    budget: float | str | None = None,
    test_split: str | LogitBank | None = None,
    allow_overlap: bool = False,
    seed: int = 0,
) -> Soup:
    """A soup whose last layers are taught by the ensemble of all ingredients, if that makes it better.

    Ensembles are often better than any soup, and their logits are in the bank. The soup is shown the split once more;
    what its last layers are given is cached, and they learn from that what the ensemble says (knowledge distillation,
    arXiv 1503.02531), and the labels. The accuracy that is reported on the split that chooses is that of layers which
    did not see the image: each half of the images judges those that the other half taught. All teach those that are
    returned. They are taken if they give labels a higher probability, or get more of them right, beyond chance, do not
    do the other worse beyond chance, and are above the best single model (if the soup was); else it is returned as it
    is.

    Args:
        bank: logits of all ingredients on the split that chose the soup.
        soup: of a search on this bank, or read from a folder (`Soup.from_pretrained`). If its head was refitted, that
            is what the distilled layers have to be better than; they begin from averaged ones.
        tail: which layers: `block` (the last block and the head), `stage` (as many as take a quarter of the model's
            multiplications) or the name of the first module, as in `vit.layers.10` (see `choose.choose_cut`).
        labels: whether the labels have a part, too: one half.
        split: another split of the same dataset whose images teach: one with more of them, say. All ingredients run
            over it, and all images of the split that chose the soup judge what was taught.
        images: another dataset whose images teach, of which no labels are needed: a Hub id, a folder or a `Dataset`;
            `split` is its split then, `train` by default. What teaches is the ensemble alone.
        teacher: the recipe whose ensemble teaches; by default all ingredients in equal parts.
        epochs: how often the layers are shown each image; by default 4 times, or as often as makes 400 steps of 32
            images.
        rate: of learning, at the start.
        budget: what teaching may take at most, judging it included: a time, as in `90s`, or a number of passes of the
            model, by multiplications. Epochs are left out, but for one.
        test_split: the bank of the split that proved the soup, which is opened by default.
        allow_overlap: as in `radin`.
        seed: of the halves, and of the order of images.

    Raises:
        ValueError: before the first pass, if there are too few images, the soup is not one of these ingredients, it
            was not measured on this split, or the model can't be cut in two there.
    """
    report, split_that_proved = soup.report, soup.report.held_out if soup.report.hold_out is None else None
    check_distillation(report, epochs=epochs, rate=rate, seed=seed, split=split, images=images, budget=budget)
    _check_images(bank, report, test_split)
    bank = with_start(bank.by_content.with_exactness if report.is_exact else bank.by_content, soup)
    cut = find_cut(bank, report.recipe, tail)  # before another split takes any pass
    source, labels = _source_that_teaches(bank, split, images, allow_overlap), labels and images is None
    options = _report_options(
        bank, report, test_split or split_that_proved, split if images is None else None, allow_overlap
    )
    reporter = Reporter.of(bank, options, takes_all=True)
    _check_accuracies(reporter, report)
    bank, hold_out = reporter.bank, None if report.hold_out is None else (report.hold_out, report.seed or 0)
    ensemble = Teacher(teacher or Recipe.uniform(bank.ingredients.ids), labels)
    recipe = report.recipe.in_order(bank.ingredients.ids)  # as the search had it: what is cached of it is found
    before = _soup_before(reporter, recipe, report.head, hold_out)
    if not labels and _is_no_better(reporter, ensemble, before):
        return soup
    teaching = bank if source is None else _teaching_bank(reporter, source, allow_overlap)
    course = Course(epochs or usual_epochs(len(teaching)), rate, share=SHARE if labels else 0.0, seed=seed)
    course = course if budget is None else _within(course, _teaching_budget(budget), cut, halves=teaching is bank)
    cooked = distill_tail(
        teaching,
        recipe,
        ensemble,
        course,
        tail=cut,
        judge=bank,
        hold_out=hold_out if teaching is bank else None,
        with_logits=reporter.need_logits,
    )
    if not len(before.losses):  # its layers are averaged
        before = replace(before, losses=cooked.averaged_losses)
    best = best_single(bank, report)
    teaching_passes = replace(course, epochs=_epochs(cooked)).passes(cut, halves=teaching is bank)
    shown = bank.samples + (len(teaching) * (1 + len(ensemble.used)) if source else 0)
    report = replace(report, passes=_with_tail(report.passes, (shown + teaching_passes * len(teaching)) / len(bank)))
    if not _is_taken(reporter, cooked, before, best):
        if teaching is bank:
            _suggest_more(len(bank))
        return _with_report(soup, report)
    layers = FinalLayers(cooked, recipe, ensemble, cooked.predictions, cooked.logits)
    return _proved(reporter, report, layers, best)


def _report_options(
    bank: LogitBank,
    report: SearchReport,
    test_split: str | LogitBank | None,
    head_split: str | None,
    allow_overlap: bool,
) -> ReportOptions:
    """What is reported of distilled layers: what was reported of the soup, but for metrics that have only a name.

    Raises:
        ValueError: if the soup was chosen by such a metric.
    """
    if not _is_known(report.metric, bank):
        raise ValueError(
            f"The soup was chosen by {report.metric!r}, which was a function: its report has the name only, so that "
            "nothing says whether distilled layers are better. Choose a soup by a metric that hf_radin has."
        )
    reported = dict.fromkeys(name for result in report.results for name in result.metrics)
    metrics = tuple(name for name in reported if _is_known(name, bank))
    if len(metrics) < len(reported):
        logger.warning("Not computed again, for only their names are known: %s.", ", ".join(reported.keys() - metrics))
    return ReportOptions(
        metric=report.metric,
        keep=report.keep,
        metrics=metrics,
        test_split=test_split,
        hold_out=report.hold_out,
        head_split=head_split,
        allow_overlap=allow_overlap,
        seed=report.seed or 0,
    )


def _is_known(name: str, bank: LogitBank) -> bool:
    """Whether a metric is known by its name, and is no function of the user's or value of a script."""
    try:
        load_metrics(name, bank.classes, of_label_sets=bank.is_multi_label)
    except ValueError:
        return False
    return True


def _with_report(soup: Soup, report: SearchReport) -> Soup:
    """The same soup with another report."""
    same = copy.copy(soup)
    same.report = report
    return same


def _source_that_teaches(bank: LogitBank, split: str | None, images: Any, allow_overlap: bool) -> DataSource | None:
    """Where images are that teach and are none of a bank; None if its own do.

    Raises:
        ValueError: if there are none, or some of them are of the bank, and may not be.
    """
    if images is None:
        return bank.source.at(split) if split else None
    source = source_of(images, split, bank.source.token)
    opened = open_split(source)
    if not allow_overlap:
        refuse_taught(bank, opened, [bank.whole])
    if opened.name == OBJECT or opened.revision is not None:
        return source
    return replace(source, dataset=str(Path(images).resolve()))  # the recipe is cooked again from anywhere


def _teaching_bank(reporter: Reporter, source: DataSource, allow_overlap: bool) -> LogitBank:
    """The bank of the images that teach, which are none of those that choose and prove, unless they may be.

    Raises:
        ValueError: if they are.
    """
    bank, held_out = reporter.bank, reporter.held_out
    if held_out is not None and not allow_overlap and not source.labelled:
        refuse_taught(bank, open_split(source), [held_out])
    logger.info("%d checkpoints run over the split %r, which teaches.", len(bank.ingredients), source.split)
    teaching = bank_of_images(bank, source, allow_overlap=allow_overlap)
    if not allow_overlap:  # what came as a stream could not be read before
        for judge in (bank.whole, held_out):
            if judge is not None and judge.digests is not None and teaching.digests is not None:
                refuse_shared(judge.digests, teaching.digests, (judge.split, teaching.split))
    return replace(teaching, statistics=bank.statistics)


def _within(course: Course, budget: Budget, cut: Cut, *, halves: bool) -> Course:
    """A course that keeps to a budget; of time, what it takes is measured when it begins."""
    epochs = int(min(course.epochs, budget.passes / replace(course, epochs=1).passes(cut, halves=halves)))
    if not epochs:
        logger.warning(
            "One epoch takes more passes than the budget of %s allows; it is the least, and is taken.", budget
        )
    return replace(course, epochs=max(1, epochs), seconds=budget.seconds)


def _teaching_budget(value: float | str) -> Budget:
    """What teaching may take at most.

    Raises:
        ValueError: if it is none, or nothing can be taught with it.
    """
    try:
        budget = Budget.of(value)
    except ValueError:  # says what a budget of soups is
        budget = Budget(passes=0)
    if not min(budget.passes, budget.seconds) > 0:
        raise ValueError(
            f"budget={value!r}: what teaching may take at most is a time, as in '90s', or a number of passes of the "
            "model, 1 at least; leave it out for no limit."
        )
    return budget


def check_layers(soup: Soup, tail: str) -> None:
    """Refuse layers that the model of a soup can't be cut at, which takes neither images nor logits.

    Args:
        tail: as in `distill`.

    Raises:
        CutError: if there is no such place.
    """

    def refuse() -> None:
        noise = np.random.default_rng(0).integers(0, 256, NOISE, dtype=np.uint8)
        example = prepare_image(soup.processor, Image.fromarray(noise))
        choose_cut(copy.deepcopy(soup.model).float(), example, tail)

    soup.processes.decide(refuse)


def source_of(images: Any, split: str | None, token: str | bool | None = None) -> DataSource:
    """Where the images of another dataset are that teach, which needs no labels. Arguments as in `distill`."""
    return DataSource(images, split or "train", token=token, labelled=False)


def check_distillation(
    report: SearchReport,
    *,
    epochs: int | None = None,
    rate: float = 1e-3,
    seed: int = 0,
    split: str | None = None,
    images: Any = None,
    budget: float | str | None = None,
) -> None:
    """Refuse options, and a soup whose last layers can't be distilled, as far as its report tells. See `distill`.

    Raises:
        ValueError: if they can't.
    """
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, Integral) or epochs < 1):
        raise ValueError(f"epochs={epochs!r}: it is a whole number of 1 at least.")
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate < 1:
        raise ValueError(f"rate={rate!r}: the rate of learning is above 0 and below 1.")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < SEEDS:
        raise ValueError(f"seed={seed!r}: it is a whole number, 0 at least and below 2**63.")
    if budget is not None:
        _teaching_budget(budget)
    if not report.is_measured or not report.measured or report.data is None:
        raise ValueError("The soup was not measured, so that nothing can be better: search with a budget above 0.")
    if report.is_distilled:
        raise ValueError("The last layers of the soup are distilled already: distil the soup that it was before.")
    if split is not None and not isinstance(split, str):
        raise ValueError(f"split={split!r}: it is the name of a split.")
    if images is not None:
        return
    if split == report.data.split:
        raise ValueError(
            f"The split {split!r} chose the soup, and teaches if no other one is named: leave --split out."
        )
    if split is not None and split == report.held_out:
        raise ValueError(f"The split {split!r} proves the soup; another one has to teach (--split).")


def _check_images(bank: LogitBank, report: SearchReport, test_split: str | LogitBank | None) -> None:
    """Refuse a soup that a bank can't teach.

    Raises:
        ValueError: if it is not of these ingredients, was chosen by another split or proved by another one than that
            which is to prove it now; if there are too few images, or logits alone.
    """
    refuse_given(bank.ingredients, "distill", "Take the soup as it is.")
    bank.ingredients.select(report.recipe.used)
    chose = report.data.split if report.data else None
    if chose != bank.split:
        raise ValueError(f"The split {chose!r} chose the soup, and the bank is of {bank.split!r}.")
    proves = test_split.split if isinstance(test_split, LogitBank) else test_split
    if proves is not None and proves != report.held_out:
        raise ValueError(
            f"test_split={proves!r}: the soup was proved by {report.held_out or 'no split'}, and what it was before "
            "is shown beside what it becomes: leave test_split out, or search with it."
        )
    different = len(np.unique(bank.contents))
    if different < LEAST_IMAGES:
        raise ValueError(
            f"The split {bank.split!r} has {different} different images; to teach last layers, and to judge them by "
            f"images that they did not see, takes {LEAST_IMAGES} at least."
        )


def _check_accuracies(reporter: Reporter, report: SearchReport) -> None:
    """Refuse images that are others than those of which a report tells, by what a single model gets right of them.

    Raises:
        ValueError: if they are.
    """
    known = [entry for entry in report.singles if entry.images == report.images and entry.measured is not None]
    metric = reporter.objective.metric
    figures = [(reporter.bank, entry.recipe, entry.images, entry.known) for entry in known]
    if reporter.held_out is not None and known:
        best = best_single(reporter.bank, report)
        figures += [
            (reporter.held_out, best.recipe, result.images, result.metrics[metric.name])
            for result in report.results
            if (result.name, result.split) == ("best single", reporter.held_out.split)
            and metric.name in result.metrics
        ]
    for bank, recipe, images, value in figures:
        here = float(bank.score(recipe, metric)[0])
        tolerance = 0.5 / images if metric.name == "accuracy" else 1e-4 * max(1.0, abs(value))
        if len(bank) != images or abs(here - value) > tolerance:
            raise ValueError(
                f"The split {bank.split!r} has other images than the report of the soup tells of: the {metric.name} "
                f"of {recipe.ingredients[0]} is {here:.4f} on {len(bank)} images, and {value:.4f} on {images} there. "
                "Name the same images (--dataset), or search anew."
            )


def _soup_before(
    reporter: Reporter, recipe: Recipe, head: HeadRecord | None, hold_out: tuple[float, int] | None
) -> Known:
    """What the soup says of the images before: if its head was refitted, by heads that did not see the image; without
    losses if all its layers are averaged."""
    if head is None:
        return Known(reporter.choosing_answers(recipe), np.zeros(0))
    teacher, with_logits = Teacher(head.teacher, labels=head.labels > 0), reporter.objective.needs_logits
    cooked = refit_head(reporter.bank, recipe, teacher, hold_out=hold_out, seed=head.seed, with_logits=with_logits)
    return Known(reporter.as_answers(cooked.predictions, cooked.logits), cooked.losses)


def _is_no_better(reporter: Reporter, teacher: Teacher, soup: Known) -> bool:
    """Whether an ensemble is no better than a soup, which a line says."""
    bank, metric = reporter.bank, reporter.objective.metric
    ensemble, known = float(bank.score(teacher.ensemble, metric)[0]), score_or_nan(metric, soup.answers)
    if metric.rank(ensemble) > metric.rank(known):
        return False
    logger.warning(
        "There is nothing to learn: on %r the ensemble's %s is %s, and the soup's %s. It is returned as it is.",
        bank.split,
        metric.name,
        show_metric(metric.name, ensemble),
        show_metric(metric.name, known),
    )
    return True


def _suggest_more(images: int) -> None:
    """Say where more images may be had, if there are few."""
    if images < MANY:
        logger.info(
            "%d images are few to teach last layers. A split with more of them may do better, as split='train' "
            "(--split train, of hf-radin soup --distill-split train), or a dataset without labels (--images).",
            images,
        )


def _is_taken(reporter: Reporter, cooked: CookedLayers[TaughtTail], before: Known, best: Measurement) -> bool:
    """Whether distilled layers take the place of those before, which a line says."""
    objective, metric = reporter.objective, reporter.objective.metric
    taught = Known(reporter.as_answers(cooked.predictions, cooked.logits), cooked.losses)
    value, known = (score_or_nan(metric, given.answers) for given in (taught, before))
    is_better = metric.rank(known) >= metric.rank(best.known)  # as of a search
    reason = hindrance(reporter.bank, taught, before, best if is_better else None, objective)
    logger.info(
        "With its last layers distilled, on images that these did not see: %s %s (before: %s), log loss "
        "%.4f (before: %.4f). The %s.",
        metric.name,
        show_metric(metric.name, value),
        show_metric(metric.name, known),
        cooked.losses.mean(),
        before.losses.mean(),
        f"soup stays as it is: {reason}" if reason else "distilled layers are taken",
    )
    return not reason


def _epochs(cooked: CookedLayers[TaughtTail]) -> int:
    """How often the layers were shown each image, which a budget of time may have made less of."""
    return cooked.record.tail.epochs if cooked.record.tail else 0


def _with_tail(passes: PassCounts | None, tail: float) -> PassCounts | None:
    """What a soup took, with the passes of teaching its last layers: the splits shown once more, images held out too,
    and the multiplications of the layers that learn."""
    return None if passes is None else replace(passes, tail=passes.tail + tail)


def _proved(reporter: Reporter, report: SearchReport, layers: FinalLayers, best: Measurement) -> Soup:
    """The soup whose layers were distilled; its report says what it reaches on each split, before and after."""
    bank, metric, results, comparisons, by_class = reporter.bank, reporter.objective.metric, [], [], None
    unseen = reporter.taught_answers(bank, layers)
    for split in [bank] + ([reporter.held_out] if reporter.held_out else []):
        answers = unseen if split is bank else reporter.taught_answers(split, layers)
        single = reporter.answers(split, best.recipe)
        results.append(reporter.result("soup", split, answers))
        if comparison := compare(split, answers, single, metric):
            comparisons.append(comparison)
        by_class = class_hits(split, answers.predictions, single.predictions)
    earlier = [replace(result, name=BEFORE) if result.name == "soup" else result for result in report.results]
    measurement = replace(reporter.with_layers(report.recipe, layers), proposal=DISTILLED)
    proved = replace(
        report,
        head=layers.cooked.record,
        results=(*results, *earlier),
        against_best_single=tuple(comparisons),
        by_class=by_class,
        measurements=(*report.measurements, measurement),
    )
    reporter.warn_if_worse(proved)
    return Soup(
        proved,
        bank.ingredients,
        processes=bank.processes,
        statistics=bank.statistics,
        head=layers.cooked.head,
        unseen=unseen,
    )
