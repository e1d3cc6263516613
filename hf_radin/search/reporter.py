"""What is checked before a search spends anything, and the report that is made of its measurements."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_radin.images.split import Split
from hf_radin.ingredients.card_metadata import describe_ingredient, describe_start
from hf_radin.ingredients.ingredient import Ingredients
from hf_radin.layers.taught import CookedLayers, refit_head
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import Spent
from hf_radin.metrics.bootstrap import Difference, metric_interval
from hf_radin.metrics.changes import Changes, margins_of
from hf_radin.metrics.intervals import is_above_zero
from hf_radin.metrics.named import Answers, Metric, by_name, compute_metrics, only_score, score_or_nan
from hf_radin.metrics.objective import ACCURACY, Objective
from hf_radin.recipes.recipe import Measurement, Recipe, Result, Teacher
from hf_radin.runtime.text import show_difference, show_metric
from hf_radin.search.held_out import (
    bank_of_split,
    check_head_split,
    check_held_out,
    check_test_split,
    count_overlap,
    open_held_out,
    refuse_overlap,
)
from hf_radin.search.measure import MeasuredSoup, measured_soup, refitted_soup, soup_answers
from hf_radin.soup.report import (
    ClassHits,
    Comparison,
    Overlap,
    PassCounts,
    PilotReport,
    SearchReport,
    SearchSettings,
    TimeSpent,
    versions,
)
from hf_radin.soup.soup import Soup
from hf_radin.weights.refit import FOLDS, logits_of
from hf_radin.weights.start import find_start

logger = logging.getLogger(__name__)

# Says what else could be had: not to who asked for that already.
HINTS = logging.getLogger(f"{__name__}.hints")

# The probability of a difference by chance, above which it counts as none.
CHANCE = 0.05


@dataclass(frozen=True)
class ReportOptions:
    """What is reported of a soup, and which images prove it. The names are those of `radin`, which explains them."""

    metric: Any = None
    metrics: Any = ("accuracy",)
    test_split: str | LogitBank | None = None
    hold_out: float | None = None
    head_split: str | None = None
    allow_overlap: bool = False
    seed: int = 0
    keep: str | Sequence[str] = ()


@dataclass(frozen=True)
class Metrics:
    """What a soup is chosen by, and all that is reported of it, the former first."""

    objective: Objective
    reported: tuple[Metric, ...]


def check_report(bank: LogitBank, options: ReportOptions, *, takes_all: bool = False) -> Metrics:
    """The metrics, if a soup can be chosen by the options and proved with them.

    Args:
        takes_all: whether the search takes the logits of all images.

    Raises:
        ValueError: if it can't.
    """
    test_split, hold_out = options.test_split, options.hold_out
    if takes_all and bank.is_pilot:
        raise ValueError(
            f"The logits in {bank.folder} are of a part of the split only; this takes all of them: compute them "
            "without pilot, or use radin."
        )
    objective = Objective.of(options.metric, options.keep, bank.classes, of_label_sets=bank.is_multi_label)
    if bank.is_pilot and not objective.is_accuracy:
        raise ValueError(
            f"The logits in {bank.folder} are of a part of the split only, and what is known of the others is which "
            f"class is the best: soups are chosen by accuracy then, and not by {objective.text}. Compute the logits "
            "without pilot."
        )
    if hold_out is not None and test_split is not None:
        raise ValueError(f"hold_out={hold_out!r}: the split {test_split!r} proves the soup already.")
    if hold_out is not None and bank.is_pilot:
        raise ValueError(
            f"hold_out={hold_out!r}: the images of a pilot say which others are looked at, and may be among those "
            "held out; name a test_split."
        )
    if isinstance(test_split, LogitBank):
        check_held_out(bank, test_split)
        proving: LogitBank | Split | None = test_split
    else:
        proving = None if test_split is None else check_test_split(bank, str(test_split))
    if proving is not None and not options.allow_overlap:
        refuse_overlap(bank, proving)
    if options.head_split is not None:
        check_head_split(bank, options.head_split, proving, allow_overlap=options.allow_overlap)
    _check_classes(bank, objective)
    reported = by_name((*objective.metrics, *bank.load_metrics(options.metrics)))
    _check_scores(bank, objective, reported)
    return Metrics(objective, reported)


def _check_scores(bank: LogitBank, objective: Objective, reported: Sequence[Metric]) -> None:
    """Compute what chooses, and each function of the user, of one model: before anything is spent, and not after.

    Raises:
        ValueError: if it is undefined, or gives another thing than one score.
    """
    if bank.is_pilot:  # by accuracy; of others than the leading models the logits are not known
        return
    tried = [metric for metric in reported if metric in objective.metrics or metric.function is not None]
    row = bank.row(Recipe.uniform(bank.ingredients.ids[:1]))
    answers = bank.answers(row, with_logits=any(metric.needs_logits for metric in tried))
    for metric in tried:
        score = only_score if metric == objective.metric else score_or_nan
        score(metric, answers)


def _check_classes(bank: LogitBank, objective: Objective) -> None:
    """Say what becomes of classes without an image, where what chooses does not count all images alike.

    Raises:
        ValueError: if a metric is of such a class.
    """
    labels = np.asarray(bank.labels)  # of several classes an image `(samples, classes)`
    counts = labels.sum(axis=0) if labels.ndim > 1 else np.bincount(labels, minlength=len(bank.classes))
    missing = counts == 0
    for metric in objective.metrics:
        if metric.of_class is not None and missing[metric.of_class]:
            raise ValueError(
                f"The split {bank.split!r} has no image of {bank.classes[metric.of_class]!r}, and nothing is known of "
                f"{metric.name}: name a split that has some, or choose by something else."
            )
    is_mean = all(metric.of_images is not None for metric in objective.metrics)
    if missing.any() and not is_mean:
        names = [bank.classes[label] for label in np.flatnonzero(missing)]
        logger.warning(
            "The split %r has no image of %s: %s says nothing of %s, but for what is predicted so by mistake.",
            bank.split,
            ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else ""),
            objective.name,
            "it" if len(names) == 1 else "them",
        )


@dataclass(eq=False)
class Reporter:
    """Makes the report of a search.

    Args:
        bank: of the images that choose, its ingredients by content.
        held_out: of the images that prove; None without any.
        objective: what soups are chosen by.
        metrics: that are reported.
        overlap: images that the two share.
        hold_out: the share of the images that was held out, if any.
        head_split: whose images teach a head that is refitted; by default those that choose.
        ids: of the ingredients in the user's order, for reading.
        probed: soups that the split that chose was shown once more for their logits, and what that took.
        refits: the images that a head was refitted to, of what soup and by whom it was taught, for each that was.
    """

    bank: LogitBank
    held_out: LogitBank | None
    objective: Objective
    metrics: tuple[Metric, ...]
    overlap: Overlap | None
    hold_out: float | None = None
    head_split: str | None = None
    ids: tuple[str, ...] = ()
    probed: dict[Recipe, Spent] = field(default_factory=dict)
    refits: list[tuple[LogitBank, Recipe, Teacher]] = field(default_factory=list)

    @classmethod
    def of(
        cls, bank: LogitBank, options: ReportOptions, *, takes_all: bool = False, ids: tuple[str, ...] = ()
    ) -> Reporter:
        """Check the options, and open the split that proves.

        Args:
            takes_all: whether the search takes the logits of all images.
            ids: of the ingredients in the user's order; by default that of the bank.

        Raises:
            ValueError: as `check_report` does.
        """
        ids, bank = ids or bank.ingredients.ids, bank.by_content
        metrics = check_report(bank, options, takes_all=takes_all)
        held_out = None
        if options.hold_out is not None:
            bank, held_out = bank.divided(options.hold_out, options.seed)
            if bank.statistics and bank.statistics.record.data == bank.manifest.data.key:
                raise ValueError(
                    f"hold_out={options.hold_out!r}: the split {bank.split!r} gives soups their BatchNorm statistics, "
                    "images held out too. Name another for these with batchnorm_split (--batchnorm-split), or a "
                    "test_split."
                )
            if options.head_split is not None:
                check_head_split(bank, options.head_split, held_out, allow_overlap=options.allow_overlap)
        elif options.test_split is not None:
            held_out = open_held_out(bank, options.test_split, allow_overlap=options.allow_overlap)
        overlap = None if held_out is None else count_overlap(bank, held_out, allow=options.allow_overlap)
        objective = with_fixed_floors(metrics.objective, bank)
        return cls(bank, held_out, objective, metrics.reported, overlap, options.hold_out, options.head_split, ids)

    def soup(
        self,
        method: str,
        measurements: Sequence[Measurement],
        settings: SearchSettings,
        chosen: Measurement | None = None,
        *,
        refits: bool = False,
    ) -> Soup:
        """The soup of a search, with its report.

        Args:
            measurements: of all candidates, singles included.
            chosen: the soup to return; by default the best that was measured on all images.
            refits: whether a soup with an averaged head has it refitted if that is better (see `_is_better`).
        """
        bank, seed = self.bank, settings.seed or 0
        # a soup that was shown a part is not chosen; with a budget of 0 the soup was shown nothing
        eligible = [entry for entry in measurements if entry.images == len(bank) or entry.measured is None]
        chosen = chosen or choose(eligible, self.objective)
        soups = [entry for entry in measurements if entry.proposal != "single"]
        best = best_known((entry for entry in measurements if entry.proposal == "single"), len(bank), self.objective)
        is_tried = chosen.teacher is not None or (refits and self._can_refit(chosen))
        head = self._refit(chosen, best, seed, of=len(measurements)) if is_tried else None
        is_single = chosen.proposal == "single"
        if head is not None and chosen.teacher is None:
            chosen = self._with_head(chosen, head)
            measurements = [*measurements, chosen]
        rows = [("soup", chosen), ("best single", best)]
        rows += [("uniform", entry) for entry in soups if entry.proposal == "uniform" and entry.teacher is None]
        is_compared = chosen.recipe != best.recipe or head is not None
        proof = self._proof(rows, head, is_compared=is_compared)
        bank.processes.log(
            {f"{row.split}/{row.name} {key}": value for row in proof.results for key, value in row.metrics.items()}
        )
        is_said = not soups and settings.budget == "0"  # that none was measured
        if method != "best_single" and is_single and not is_said:
            logger.warning(
                "None of %d soups was better than the best single model, %s, which is returned%s.",
                len(soups),
                *chosen.recipe.used,
                "" if head is None else ", with a refitted head",
            )
        if chosen.keeps is False:
            logger.warning(
                "Nothing that was measured keeps %s on %r, nor does what is returned.",
                " and ".join(floor.text for floor in self.objective.floors),
                bank.split,
            )
        if bank.given is None and not bank.exact:  # where soups are exact, that ensemble is one of them
            _say_what_could_be_had(proof)
        report = self._report(method, measurements, settings, chosen, proof, head)
        self.warn_if_worse(report)
        return Soup(
            report,
            self._named_ingredients,
            processes=bank.processes,
            statistics=bank.statistics,
            head=head.cooked.head if head else None,
            unseen=self.taught_answers(bank, head) if head else None,
        )

    def warn_if_worse(self, report: SearchReport) -> None:
        """Where a soup is worse than the best single model beyond chance, say so, and how that model is saved."""
        if report.verdict is None or not report.verdict.is_proven_worse:
            return
        (single,) = best_single(self.bank, report).recipe.ingredients
        options = [] if report.metric == "accuracy" else ["--metric", report.metric]
        options += [option for floor in report.keep for option in ("--keep", floor)]
        words = ["hf-radin", "search", str(self.bank.folder), "--method", "best_single", *options]
        command = shlex.join([*words, "--output", "best-single"])
        logger.warning(
            "On %r, which proves it, the soup is worse than the best single model beyond chance. Take that model "
            "instead: %s",
            report.verdict.split,
            # `best_single` takes the logits of all images, held out too, and what it writes is a checkpoint
            single if report.pilot or report.hold_out or self.bank.given else f"{command} (or hf_radin.best_single)",
        )

    def _refit(self, chosen: Measurement, best: Measurement, seed: int, *, of: int) -> FinalLayers | None:
        """The refitted head of the soup; None if the averaged head is to stay.

        Without a teacher of its own, a soup has its head refitted to the ensemble of all and the labels, if that is
        better. Images that choose teach it, or those of another split, if that is no worse beyond chance.

        Args:
            best: the best single model.
            of: how many candidates the soup was the best of.
        """
        recipe = chosen.recipe
        teacher = chosen.teacher or Teacher(Recipe.uniform(self.bank.ingredients.ids), labels=True)
        cooked = self._cook(self.bank, recipe, teacher, seed)
        if chosen.teacher is None and not self._is_better(cooked, chosen, best, of=of):
            return None
        head = FinalLayers(cooked, recipe, teacher, cooked.predictions, cooked.logits)
        if self.head_split is None:
            return head
        other = self._cook(bank_of_split(self.bank, self.head_split), recipe, teacher, seed)
        logits = logits_of(other.head.layer, cooked.features, np.arange(len(self.bank)))
        taught_elsewhere = FinalLayers(other, recipe, teacher, self.bank.predictions_of(logits), logits)
        return taught_elsewhere if self._is_no_worse(taught_elsewhere, head, best) else head

    def _cook(self, bank: LogitBank, recipe: Recipe, teacher: Teacher, seed: int) -> CookedLayers:
        """The head of a soup, refitted to the images of a bank."""
        self.refits.append((bank, recipe, teacher))
        hold_out = None if self.hold_out is None or bank is not self.bank else (self.hold_out, seed)
        return refit_head(bank, recipe, teacher, hold_out=hold_out, seed=seed, with_logits=self.need_logits)

    def _is_better(self, cooked: CookedLayers, averaged: Measurement, best: Measurement, *, of: int) -> bool:
        """Whether heads that did not see the image are better than the averaged head of a soup, as a line says.

        They must be better than the best single model. They must give labels a higher probability, which says most,
        or be better by the metric, beyond chance, and not do the other worse beyond chance. The averaged head's soup
        is the best of many, which flatters it, so that the chance is divided by their number.
        """
        metric, taught = self.objective.metric, self.as_answers(cooked.predictions, cooked.logits)
        known = Known(self.choosing_answers(averaged.recipe), cooked.averaged_losses)
        reason = hindrance(self.bank, Known(taught, cooked.losses), known, best, self.objective, of=of)
        logger.info(
            "With its head refitted to the ensemble of all and the labels, on images that heads did not see: %s "
            "%s (averaged head: %s), log loss %.4f (at its best temperature: %.4f). The %s.",
            metric.name,
            show_metric(metric.name, score_or_nan(metric, taught)),
            show_metric(metric.name, averaged.known),
            cooked.losses.mean(),
            cooked.averaged_losses.mean(),
            f"averaged head stays: {reason}" if reason else "refitted head is taken",
        )
        return not reason

    def as_answers(self, predictions: np.ndarray, logits: np.ndarray | None) -> Answers:
        """What last layers say of the images that choose, of layers that did not see the image."""
        return Answers(predictions, np.asarray(self.bank.labels), len(self.bank.classes), logits)

    def choosing_answers(self, recipe: Recipe) -> Answers:
        """What a recipe's soup says of the images that choose, with its logits where soups are chosen by them."""
        if not self.objective.needs_logits:
            return self.as_answers(predict(self.bank, recipe), None)
        if self.bank.knows_soup(recipe):
            return self.bank.answers(self.bank.row(recipe), with_logits=True)
        return soup_answers(self.bank, recipe, with_logits=True)[0]

    def _is_no_worse(self, head: FinalLayers, other: FinalLayers, best: Measurement) -> bool:
        """Whether a head that another split taught is better than the best single model, and not behind those which
        images that choose taught, by more than chance; else a warning says so."""
        objective, metric = self.objective, self.objective.metric
        answers, others = (self.as_answers(layers.predictions, layers.logits) for layers in (head, other))
        value, known = (score_or_nan(metric, given) for given in (answers, others))
        difference = Difference.of(metric, answers, others)
        chance = 1.0 if difference is None else difference.p_value
        is_above = metric.rank(value) > metric.rank(best.known) and not objective.broken(answers)
        if is_above and (metric.rank(value) >= metric.rank(known) or chance >= CHANCE):
            logger.info(
                "The head that the split %r teaches is taken: its %s on %r is %s, and that of heads that parts of "
                "this teach is %s on the other parts.",
                self.head_split,
                metric.name,
                self.bank.split,
                show_metric(metric.name, value),
                show_metric(metric.name, known),
            )
            return True
        logger.warning(
            "The head that the split %r teaches has on %r the %s %s, heads that parts of this teach have on the "
            "other parts %s, and the best single model has %s: all of %r teaches the head.",
            self.head_split,
            self.bank.split,
            metric.name,
            *(show_metric(metric.name, figure) for figure in (value, known, best.known)),
            self.bank.split,
        )
        return False

    def _can_refit(self, chosen: Measurement) -> bool:
        """Whether a soup that has an averaged head may have another one; else a line says why not.

        All its logits must be finite numbers, else its features may be none, which can't teach. And a head forgets the
        classes that it is not shown: of each there must be some images.
        """
        bank = self.bank
        if (least := fewest_of_a_class(bank)) < FOLDS:
            logger.info(
                "The averaged head stays: the split %r has %d different images %s, and a head is refitted with %d of "
                "each or more.",
                bank.split,
                least,
                "with one class, or without it" if bank.is_multi_label else "of one class",
                FOLDS,
            )
            return False
        return bool((predict(bank, chosen.recipe) >= 0).all())

    def _with_head(self, chosen: Measurement, head: FinalLayers) -> Measurement:
        """What is known of a soup when its head is refitted."""
        proposal = "alone" if chosen.proposal == "single" else chosen.proposal
        return replace(self.with_layers(chosen.recipe, head), proposal=proposal)

    def with_layers(self, recipe: Recipe, layers: FinalLayers) -> Measurement:
        """What is known of a soup whose last layers were taught, which takes none of the budget's passes."""
        bank, metric = self.bank, self.objective.metric
        answers = self.as_answers(layers.predictions, layers.logits)
        estimate = bank.processes.decide(lambda: bank.score(layers.teacher.ensemble, metric))
        return Measurement(
            recipe,
            "",
            float(estimate[0]),
            score_or_nan(metric, answers),
            len(bank),
            interval=metric_interval(metric, answers),
            teacher=layers.teacher,
            keeps=not self.objective.broken(answers) if self.objective.floors else None,
        )

    @property
    def _named_ingredients(self) -> Ingredients:
        """Those of the bank in the user's order."""
        ingredients = self.bank.ingredients
        return ingredients.select([name for name in self.ids if name in ingredients.ids])

    def _in_named_order(self, measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
        """Measurements as a user reads them: the singles in the user's order, and so the ingredients of recipes."""
        named = [
            replace(
                entry,
                recipe=entry.recipe.in_order(self.ids),
                teacher=entry.teacher and entry.teacher.in_order(self.ids),
            )
            for entry in measurements
        ]
        singles = [entry for entry in named if entry.proposal == "single"]
        singles.sort(key=lambda entry: self.ids.index(entry.recipe.ingredients[0]))
        return (*singles, *(entry for entry in named if entry.proposal != "single"))

    def _report(
        self,
        method: str,
        measurements: Sequence[Measurement],
        settings: SearchSettings,
        chosen: Measurement,
        proof: _Proof,
        head: FinalLayers | None,
    ) -> SearchReport:
        """All that `recipe.json` says."""
        bank, held_out, manifest = self.bank, self.held_out, self.bank.manifest
        pilot = settings.pilot
        if pilot is None and manifest.pilot is not None:
            pilot = PilotReport(manifest.pilot.share, manifest.pilot.seed)
        if pilot is not None:
            pilot = replace(pilot, whole=tuple(name for name in self.ids if name in pilot.whole))
        return SearchReport(
            recipe=chosen.recipe.in_order(self.ids),
            pulled_to=describe_start(bank.ingredients, chosen.recipe),
            method=method,
            **{**vars(settings), "pilot": pilot},
            passes=self._passes(measurements, pilot),
            time=self._time(measurements, pilot),
            metric=self.objective.name,
            less_is_better=self.objective.metric.is_loss,
            keep=tuple(floor.text for floor in self.objective.floors),
            against_best_single=tuple(proof.comparisons),
            by_class=proof.by_class,
            measured=chosen.measured is not None,
            bank=manifest.origin,
            dtype=manifest.run.dtype,
            logits_dtype=manifest.run.logits_dtype,
            mixed_precision=manifest.run.mixed_precision,
            processor=manifest.run.processor,
            image_processor=bank.ingredients[0].image_processor,
            data=replace(manifest.data, key=""),
            images=len(bank),
            skipped=len(manifest.skipped),
            held_out=held_out.split if held_out else None,
            held_out_logits=len(held_out.ingredients) if held_out else 0,
            overlap=self.overlap,
            remarks=bank.remarks,
            batchnorm=bank.statistics.record if bank.statistics else None,
            head=head.cooked.record if head else None,
            classes=bank.classes,
            multi_label=bank.is_multi_label or None,
            architecture=bank.ingredients[0].architecture,
            ingredients=tuple(map(describe_ingredient, self._named_ingredients)),
            versions=versions(),
            results=tuple(proof.results),
            measurements=self._in_named_order(measurements),
        )

    def _proof(
        self, rows: Sequence[tuple[str, Measurement]], head: FinalLayers | None, *, is_compared: bool
    ) -> _Proof:
        """What the rows reach on each split, and the soup against the best single model.

        Args:
            rows: names and measurements.
            head: of the soup, if it was refitted.
            is_compared: whether the soup is another model than the best single one.
        """
        proof = _Proof()
        for split in [self.bank] + ([self.held_out] if self.held_out else []):
            known: dict[str, Answers] = {}
            for name, measurement in rows:  # one after the other: logits of all rows would be a lot
                # on the split that chose, no model runs again for the report
                if split is not self.bank or self._is_shown(measurement):
                    if head is not None and name == "soup":
                        answers = self.taught_answers(split, head)
                    else:
                        answers = self.answers(split, measurement.recipe)
                    proof.results.append(self.result(name, split, answers))
                    is_pair = name in ("soup", "best single")  # of others, logits are not held
                    known[name] = answers if is_pair else replace(answers, logits=None)
            proof.results += [  # of a baseline that was shown a part
                Result(name, split.split, {self.objective.name: entry.measured}, entry.images, entry.interval)
                for name, entry in rows
                if name not in known and entry.measured is not None
            ]
            if split.ingredients.ids == self.bank.ingredients.ids:
                proof.results += self._ensemble(split)
            metric = self.objective.metric
            if "soup" in known and split.partial is None and split.ingredients.ids == self.bank.ingredients.ids:
                ensemble = self._ensemble_answers(split, split.row(Recipe.uniform(split.ingredients.ids)))
                proof.lead = compare(split, ensemble, known["soup"], metric)
            if "soup" in known and is_compared:
                pair = known["soup"], known["best single"]
                if comparison := compare(split, *pair, metric):
                    proof.comparisons.append(comparison)
                proof.by_class = class_hits(split, *(answers.predictions for answers in pair))
        return proof

    def _ensemble(self, split: LogitBank) -> list[Result]:
        """What the ensemble of all reaches; after a pilot only an estimate of its accuracy is known."""
        row = split.row(Recipe.uniform(split.ingredients.ids))
        partial = split.partial
        if partial is None or not len(partial.unseen):
            return [self.result("ensemble", split, self._ensemble_answers(split, row))]
        _warn_unknown([metric.name for metric in self.metrics if metric.name != "accuracy"], "ensemble", split)
        value, interval = partial.estimate(split.predict(row) == split.labels)
        return [Result("ensemble", split.split, {"accuracy": value}, len(split) - len(partial.unseen), interval)]

    @property
    def need_logits(self) -> bool:
        return self.objective.needs_logits or any(metric.needs_logits for metric in self.metrics)

    def _is_shown(self, measurement: Measurement) -> bool:
        """Whether the predictions on the split that chose are known of all images, or will be with their logits."""
        if measurement.images == len(self.bank):
            return True
        return self.need_logits and measurement.measured is not None and not measurement.recipe.is_single

    def answers(self, split: LogitBank, recipe: Recipe) -> Answers:
        """What a recipe's soup predicts on a split, with its logits where a metric takes them.

        Of a single model these are known, and so they are of an exact soup. Another soup is run for them: on the split
        that proves its predictions come of that, on the split that chose it is a pass more.
        """
        if split.knows_soup(recipe):
            return self._ensemble_answers(split, split.row(recipe))
        shown, logits = replace(split, ingredients=self.bank.ingredients), None  # a soup's need no logits
        if split is self.bank and self.objective.needs_logits:  # they are known from the search
            return soup_answers(shown, recipe, with_logits=True)[0]
        if self.need_logits:
            logits, spent = measured_soup(shown, recipe).logits()
            if split is self.bank and split.given is None:  # of given models they are known from the search
                self.probed[recipe] = spent
        return Answers(predict(shown, recipe), np.asarray(split.labels), len(split.classes), logits)

    def taught_answers(self, split: LogitBank, head: FinalLayers) -> Answers:
        """What a soup whose last layers were taught predicts on a split, with its logits where a metric takes them.

        On the split that chose, of layers that did not see the image.
        """
        labels, classes = np.asarray(split.labels), len(split.classes)
        if split is self.bank:
            return Answers(head.predictions, labels, classes, head.logits if self.need_logits else None)
        soup = refitted_soup(replace(split, ingredients=self.bank.ingredients), head.soup, head.cooked.head)
        logits = soup.logits()[0] if self.need_logits else None
        return Answers(soup.look(np.ones(len(split), dtype=bool)), labels, classes, logits)

    def _ensemble_answers(self, split: LogitBank, row: np.ndarray) -> Answers:
        """What the ensemble of a recipe `(models,)` predicts on a split, with its logits where a metric takes them."""
        return split.answers(row, with_logits=self.need_logits and split.knows(row))

    def result(self, name: str, split: LogitBank, answers: Answers) -> Result:
        """The scores, but for those that have no meaning or take logits that are not known."""
        unknown = [metric.name for metric in self.metrics if metric.needs_logits and answers.logits is None]
        _warn_unknown(unknown, name, split)
        scores = compute_metrics((metric for metric in self.metrics if metric.name not in unknown), answers)
        reasons = {metric.name: metric.why_undefined for metric in self.metrics}
        for metric in (metric for metric, value in scores.items() if np.isnan(value)):
            logger.warning(
                "%s of the %s on %s is undefined, and is left out: %s.",
                metric,
                name,
                split.split,
                reasons.get(metric, "the script gives no number"),
            )
        metrics = {metric: value for metric, value in scores.items() if not np.isnan(value)}
        chosen_by = self.objective.metric
        interval = metric_interval(chosen_by, answers) if chosen_by.name in metrics else None
        return Result(name, split.split, metrics, len(answers.labels), interval)

    def _passes(self, measurements: Sequence[Measurement], pilot: PilotReport | None) -> PassCounts:
        """What the search took in passes over the split."""
        bank, probed = self.bank, len(self.probed)
        share = len(bank) / bank.samples if bank.is_pilot else bank.samples / len(bank)  # more where some are held out
        logits = share * len(bank.ingredients) if pilot is None or pilot.passes is None else pilot.passes
        batchnorm = 0.0
        if bank.statistics:
            soups = sum(entry.passes > 0 and not entry.recipe.is_single for entry in measurements) + probed
            soups += sum(not recipe.is_single for _, recipe, _ in self.refits)  # averaged once more
            batchnorm = soups * bank.statistics.record.images / len(bank)
        soup_passes = sum(entry.passes for entry in measurements)
        heads = 0.0
        for teaching, _, teacher in self.refits:
            teachers = 0 if teaching is bank else len(teacher.used)  # whose logits are known of the images that choose
            heads += (1 + teachers) * teaching.samples / len(bank)  # those held out go by, too
        return PassCounts(logits, soup_passes, probabilities=float(probed), batchnorm=batchnorm, head=heads)

    def _time(self, measurements: Sequence[Measurement], pilot: PilotReport | None) -> TimeSpent:
        """Seconds that devices took for what `_passes` counts."""
        if pilot is not None and pilot.is_completed:
            logits = Spent(pilot.seconds, frozenset(pilot.devices))
        else:
            logits = self.bank.spent
        soups = sum((Spent.on(entry.seconds, entry.device) for entry in measurements if entry.passes), Spent())
        probabilities = sum(self.probed.values(), Spent())
        return TimeSpent(
            logits=_rounded(logits.seconds),
            soups=_rounded(soups.seconds),
            probabilities=_rounded(probabilities.seconds) if self.probed else None,
            devices=tuple(sorted(logits.devices | soups.devices | probabilities.devices)),
        )


@dataclass(frozen=True, eq=False)
class Known:
    """What a soup says of the images that choose.

    Args:
        answers: its predictions, with logits where soups are chosen by them.
        losses: minus the logarithm of the probability that an image is given for its label, in nats: `(images,)`.
    """

    answers: Answers
    losses: np.ndarray


def hindrance(
    bank: LogitBank,
    taught: Known,
    before: Known,
    best: Measurement | None,
    objective: Objective = ACCURACY,
    *,
    of: int = 1,
) -> str:
    """Why last layers that were taught are not to take the place of those before; empty if they are.

    They must be better than the best single model. They must give labels a higher probability, which says most, or be
    better by the metric, beyond chance, and not do the other worse beyond chance.

    Args:
        taught: of layers that did not see the image.
        best: the best single model; None if that makes no difference.
        objective: what soups are chosen by.
        of: of how many soups that with the layers before was the best, which flatters it: the chance that it is better
            is divided by their number.
    """
    metric = objective.metric
    _, different = np.unique(bank.contents, return_index=True)  # copies of an image say nothing new
    answers, others = (known.answers.take(np.sort(different)) for known in (taught, before))
    rank, known = (metric.rank(score_or_nan(metric, given.answers)) for given in (taught, before))
    gains = (before.losses - taught.losses)[different]
    difference = Difference.of(metric, answers, others)
    chance = 1.0 if difference is None else difference.p_value
    is_likelier, is_unlikelier = is_above_zero(gains), is_above_zero(-gains)
    if broken := objective.broken(taught.answers):
        return f"it would break {broken[0].text}"
    if best is not None and not rank > metric.rank(best.known):
        return (
            f"of the best single model the {metric.name} is {show_metric(metric.name, best.known)}, which is not worse"
        )
    if is_unlikelier:
        return "its log loss is worse by more than chance"
    if rank < known and chance < CHANCE / of:
        return f"its {metric.name} is worse by more than chance"
    return "" if is_likelier or (rank > known and chance < CHANCE) else "the difference may be chance"


@dataclass(frozen=True, eq=False)
class FinalLayers:
    """The last layers of a soup that were taught, and what is known of them.

    Args:
        soup: the recipe of all else.
        teacher: of these layers.
        predictions: on the images that choose, of layers that did not see the image, as in `Answers`.
        logits: of the same layers, `(images, classes)`; None if they were not wanted.
    """

    cooked: CookedLayers
    soup: Recipe
    teacher: Teacher
    predictions: np.ndarray
    logits: np.ndarray | None


@dataclass(eq=False)
class _Proof:
    """What was reached on each split.

    Args:
        lead: of the ensemble of all before the soup, on the split that proves most; None if it is not known.
    """

    results: list[Result] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    by_class: ClassHits | None = None
    lead: Comparison | None = None


def _say_what_could_be_had(proof: _Proof) -> None:
    """Where the ensemble of all is ahead of the soup beyond chance, say that the soup could learn that."""
    lead = proof.lead
    if lead is not None and lead.advantage > 0 and lead.is_significant:
        HINTS.info(
            "The ensemble of all is ahead of the soup on %r by %s, which is no chance (p = %.2g). The soup's last "
            "layers may learn that: hf-radin distill, or hf_radin.distill(bank, soup).",
            lead.split,
            show_difference(lead.metric, lead.advantage),
            lead.p_value,
        )


def best_known(singles: Iterable[Measurement], images: int, objective: Objective = ACCURACY) -> Measurement:
    """The best single model of those that were run on all images."""
    return choose((entry for entry in singles if entry.images == images), objective)


def single_measurements(bank: LogitBank, objective: Objective = ACCURACY) -> list[Measurement]:
    """Each ingredient alone: its logits are known, so nothing is left to measure.

    Raises:
        ValueError: if the metric is undefined for one, or gives several scores.
    """
    return [_single_measurement(bank, name, objective) for name in bank.ingredients.ids]


def with_fixed_floors(objective: Objective, bank: LogitBank) -> Objective:
    """The same objective, where floors that are relative to the best single model of a bank are numbers."""
    if not any(floor.is_relative for floor in objective.floors):
        return objective
    best = best_known(single_measurements(bank, objective), len(bank), objective)
    return objective.measured_by(bank.answers(bank.row(best.recipe), with_logits=objective.needs_logits))


def _single_measurement(bank: LogitBank, name: str, objective: Objective) -> Measurement:
    """What is known of an ingredient."""
    recipe, images = Recipe.uniform([name]), len(bank)
    answers = bank.answers(bank.row(recipe), with_logits=objective.needs_logits)
    if bank.partial and len(bank.partial.unseen) and name not in bank.partial.complete:
        value, interval = bank.partial.estimate(answers.hits)
        return Measurement(recipe, "single", value, value, images - len(bank.partial.unseen), interval=interval)
    value, keeps = only_score(objective.metric, answers), not objective.broken(answers) if objective.floors else None
    interval_of = metric_interval(objective.metric, answers)
    return Measurement(recipe, "single", value, value, images, interval=interval_of, keeps=keeps)


def best_single(bank: LogitBank, report: SearchReport) -> Measurement:
    """The best single model of a report: of equals the first by content, as for the search."""
    ids = bank.by_content.ingredients.ids
    places = {name: place for place, name in enumerate(ids)}
    singles = sorted(report.singles, key=lambda entry: places.get(entry.recipe.ingredients[0], len(ids)))
    return best_known(singles, report.images, ranking(report))


def ranking(report: SearchReport) -> Objective:
    """What ranks the measurements of a report, whatever computed them."""
    return Objective(Metric(report.metric, False, lambda answers: {}, is_loss=report.less_is_better))


def with_start(bank: LogitBank, soup: Soup) -> LogitBank:
    """A bank whose ingredients have the start that a soup is pulled to, if it is."""
    pull, ingredients = soup.recipe.pull, bank.ingredients
    if pull is None or ingredients.start is not None:
        return bank
    start = soup.ingredients.start or bank.processes.decide(lambda: find_start(pull.start, ingredients))
    return replace(bank, ingredients=Ingredients(ingredients, start=start))


def soup_changes(bank: LogitBank, soup: Soup) -> Changes:
    """The images of a bank for which a soup, b, predicts another class than the best single model, a; multi-label, the
    pairs of an image and a class that they decide differently.

    What was measured of the soup is not measured again; its logits, for margins, take a pass over the bank's images
    and are cached beside it. If its last layers were taught, and these images chose it, what counts is what the report
    counts: what layers say that did not see the image, whose margins are known if a metric took logits (else NaN).

    Args:
        bank: of the soup's ingredients, on the split that chose it, that proves it (as `compute_logits` finds it
            again), or another one.
        soup: of a search, or read from a folder.

    Raises:
        ValueError: if nothing was measured of the soup, the bank is of a pilot, lacks an ingredient, has other
            classes or no labels, or its images taught the last layers of the soup.
    """
    if not soup.report.is_measured:
        raise ValueError("The soup was not searched for, so that no best single model is known to compare it with.")
    if bank.is_pilot:
        raise ValueError(
            f"The logits of the split {bank.split!r} are of a part of it (pilot), and a soup changes others: name the "
            "bank of a split that proves it, or search without a pilot."
        )
    bank = with_start(bank.by_content, soup)
    best = best_single(bank, soup.report).recipe
    bank.ingredients.select(best.used)  # refuses others
    if soup.report.classes and bank.classes != soup.report.classes:
        raise ValueError(
            f"The bank of the split {bank.split!r} has the classes {list(bank.classes)[:10]}, and the soup "
            f"{list(soup.report.classes)[:10]}: name a bank with the soup's classes, in the same order."
        )
    single = bank.row(best)
    answers = _soup_answers(bank, soup)
    pair = np.stack([bank.predict(single), answers.predictions], axis=-1)
    places = np.nonzero(pair[..., 0] != pair[..., 1])
    predictions = pair[places]
    margins = np.full(predictions.shape, np.nan, np.float32)
    margins[:, 0] = bank.margins(single, places)
    if answers.logits is not None:
        margins[:, 1] = margins_of(answers.logits[places], predictions[:, 1])
    return bank.changes(places, predictions, margins)


def _soup_answers(bank: LogitBank, soup: Soup) -> Answers:
    """What a soup predicts of a bank's images, as its report counts it, with its logits where they can be known."""
    report, labels = soup.report, np.asarray(bank.labels)
    ingredients = soup.ingredients.by_content if soup.ingredients else bank.ingredients
    shown, recipe = replace(bank, ingredients=ingredients), report.recipe.in_order(ingredients.ids)
    head = report.head
    if head is None and recipe.is_single:
        return Answers(bank.predict(bank.row(recipe)), labels, len(bank.classes))
    if (
        head is None
        and report.is_exact
        and {*(used := ingredients.select(recipe.used)).keys} <= {*bank.ingredients.keys}
    ):
        shown = replace(bank, ingredients=used)
        return shown.answers(shown.row(recipe), with_logits=True)
    if head is None:
        measured = measured_soup(shown, recipe)
    elif report.data is not None and bank.split == report.data.split:
        if soup.unseen is None or not np.array_equal(soup.unseen.labels, labels):
            raise ValueError(
                f"What counts for images of the split {bank.split!r}, which chose the soup, is what last layers say "
                "that did not see them, and that is known right after the search, of the images that chose: name "
                "these, or the bank of a split that proves the soup."
            )
        return soup.unseen
    elif (head.data, head.split) == (bank.manifest.data.key, bank.split):
        raise ValueError(f"The split {bank.split!r} taught the last layers of the soup: name another one.")
    elif soup.head is not None:
        measured = refitted_soup(shown, recipe, soup.head)
    else:
        measured = MeasuredSoup(shown, recipe, lambda: copy.deepcopy(soup.model), last_layers=head.sha256)
    logits, _ = measured.logits()
    return Answers(measured.look(np.ones(len(bank), dtype=bool)), labels, len(bank.classes), logits)


def fewest_of_a_class(bank: LogitBank) -> int:
    """How many different images there are of the class that has the fewest; multi-label, with it or without it."""
    _, different = np.unique(bank.contents, return_index=True)
    labels = np.asarray(bank.labels)[different]
    if bank.is_multi_label:
        return int(np.minimum(labels.sum(axis=0), (~labels).sum(axis=0)).min())
    return int(np.bincount(labels, minlength=len(bank.classes)).min())


def choose(measurements: Iterable[Measurement], objective: Objective = ACCURACY) -> Measurement:
    """The best measured; of equals the better estimate, but a single model before any soup that is not better.

    A soup with an averaged head goes before any with a refitted one that is not better, what was refitted without
    labels before what was refitted with them, and what is pulled to no start before what is.
    """

    def key(entry: Measurement) -> tuple[float | bool, ...]:
        teacher = entry.teacher
        simplest = entry.proposal == "single", not teacher, not (teacher and teacher.labels), not entry.recipe.pull
        return objective.rank(entry), *simplest, objective.metric.rank(entry.estimate)

    return max(measurements, key=key)


def predict(bank: LogitBank, recipe: Recipe, on_block: Callable[[int], object] = lambda samples: None) -> np.ndarray:
    """Classes that the averaged weights predict `(samples,)`; of a single model, or an exact soup, they are known."""
    if bank.knows_soup(recipe):
        return bank.predict(bank.row(recipe))
    return measured_soup(bank, recipe).look(np.ones(len(bank), dtype=bool), on_block=on_block)


def compare(split: LogitBank, soup: Answers, single: Answers, metric: Metric) -> Comparison | None:
    """How much better than the best single model the soup is on a split; None if the metric is undefined there."""
    difference = Difference.of(metric, soup, single)
    if difference is None:
        return None
    return Comparison(
        split.split, difference.gain, difference.interval, difference.p_value, metric.name, metric.is_loss
    )


def class_hits(split: LogitBank, soup: np.ndarray, single: np.ndarray) -> ClassHits:
    """Class by class, what two models get right on a split; of both, predictions `(samples,)`, or decisions."""
    labels, classes = np.asarray(split.labels), len(split.classes)
    if split.is_multi_label:
        right = (tuple((labels == decisions).sum(axis=0).tolist()) for decisions in (soup, single))
        return ClassHits(split.split, (len(labels),) * classes, *right)

    def count(images: np.ndarray) -> tuple[int, ...]:
        return tuple(np.bincount(images, minlength=classes).tolist())

    return ClassHits(split.split, count(labels), count(labels[soup == labels]), count(labels[single == labels]))


def _warn_unknown(metrics: Sequence[str], name: str, split: LogitBank) -> None:
    """Say that these metrics are left out.

    After a pilot many of the images on which models agree have no logits.
    """
    if metrics:
        reason = "after a pilot its logits are known of some images only"
        logger.warning("%s of the %s on %s: left out, because %s.", ", ".join(metrics), name, split.split, reason)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
