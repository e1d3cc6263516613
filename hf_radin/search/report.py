"""What is checked before a search spends anything, and what is reported after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from hf_radin.images.digests import refuse_counted
from hf_radin.images.split import Split
from hf_radin.ingredients.card_metadata import describe_ingredient
from hf_radin.logits.bank import LogitBank
from hf_radin.logits.bank_files import Spent, spent
from hf_radin.recipes.intervals import accuracy_interval, difference_interval, mcnemar
from hf_radin.recipes.metrics import Answers, Metric, compute_metrics, load_metrics
from hf_radin.recipes.recipe import Measurement, Recipe, Result
from hf_radin.runtime.processes import on_main_process
from hf_radin.runtime.tracking import log
from hf_radin.search.held_out import Overlap, check_split, of_split, overlap_of, refuse_overlap
from hf_radin.search.measure import trial_of
from hf_radin.soup.recipe_file import versions
from hf_radin.soup.soup import Soup

logger = logging.getLogger(__name__)


class Report:
    """What is checked before a search spends anything, and reported after it."""

    def __init__(
        self,
        bank: LogitBank,
        test_split: str | LogitBank | None,
        metric: str,
        metrics: Sequence[str],
        *,
        hold_out: float | None = None,
        seed: int = 0,
        whole: bool = False,
        allow_overlap: bool = False,
    ):
        self.probed: dict[Recipe, Spent] = {}  # soups that the split that chose was shown once more for their logits
        self.metrics = self.check(
            bank, test_split, metric, metrics, hold_out=hold_out, whole=whole, allow_overlap=allow_overlap
        )
        if hold_out is None:
            self.bank, self.held_out = bank, _held_out(bank, test_split, allow_overlap)
        else:
            self.bank, self.held_out = bank.divided(hold_out, seed)
            if bank.statistics and bank.statistics.record.data == bank.about["data"]["key"]:
                raise ValueError(
                    f"hold_out={hold_out!r}: the split {bank.split!r} gives soups their BatchNorm statistics, images "
                    "held out too. Name another for these with batchnorm_split (--batchnorm-split), or a test_split."
                )
        self.overlap = None if self.held_out is None else _overlap(self.bank, self.held_out, allow_overlap)

    @staticmethod
    def check(
        bank: LogitBank,
        test_split: str | LogitBank | None,
        metric: str,
        metrics: Sequence[str],
        *,
        hold_out: float | None = None,
        whole: bool = False,
        allow_overlap: bool = False,
    ) -> tuple[Metric, ...]:
        """The metrics, if all can be chosen by and proved with that is named.

        Raises:
            ValueError: if it can't.
        """
        if whole and bank.is_pilot:
            raise ValueError(
                f"The logits in {bank.folder} are of a part of the split only; this takes all of them: compute them "
                "without pilot, or use radin."
            )
        if metric != "accuracy":
            raise ValueError(f"metric={metric!r}: soups are chosen by 'accuracy'.")
        if hold_out is not None and test_split is not None:
            raise ValueError(f"hold_out={hold_out!r}: the split {test_split!r} proves the soup already.")
        if hold_out is not None and bank.is_pilot:
            raise ValueError(
                f"hold_out={hold_out!r}: the images of a pilot say which others are looked at, and may be among "
                "those held out; name a test_split."
            )
        if isinstance(test_split, LogitBank):
            _check_held_out(bank, test_split)
            proving: LogitBank | Split | None = test_split
        elif test_split is not None:
            if str(test_split) == bank.split:
                raise ValueError(f"The split {test_split!r} chooses the soup; another one has to prove it.")
            if bank.statistics and str(test_split) == bank.statistics.record.split:
                raise ValueError(
                    f"The split {test_split!r} gives the soup its BatchNorm statistics; another one has to prove it."
                )
            proving = check_split(bank, str(test_split))
            if proving is not None and proving.key == bank.about["data"]["key"]:  # of a split without a name
                raise ValueError(f"The split {test_split!r} chooses the soup; another one has to prove it.")
        else:
            proving = None
        if proving is not None and not allow_overlap:
            refuse_overlap(bank, proving)
        return load_metrics(metrics)

    def soup(
        self, method: str, measured: list[Measurement], settings: dict[str, Any], chosen: Measurement | None = None
    ) -> Soup:
        bank = self.bank
        singles = [one for one in measured if one.proposal == "single"]
        # one that was shown a part is not chosen; with a budget of 0 the soup was shown nothing
        eligible = [one for one in measured if one.images == len(bank) or one.measured is None]
        chosen = chosen or choose(eligible)
        soups = [one for one in measured if one.proposal != "single"]
        best = best_known(singles, len(bank))
        rows = [("soup", chosen), ("best single", best)]
        rows += [("uniform", one) for one in soups if one.proposal == "uniform"]
        results, proofs, by_class = [], [], None
        for split in [bank] + ([self.held_out] if self.held_out else []):
            # on the split that chose, no model runs again for the report
            known = [(name, one) for name, one in rows if split is not bank or self._is_shown(one)]
            found = {}
            for name, measurement in known:  # one after the other: logits of all rows would be a lot
                answers = self._answers(split, measurement.recipe)
                results.append(self._result(name, split, answers))
                found[name] = answers.predictions
            if self._has_accuracy:  # of a baseline that was shown a part
                results += [
                    Result(name, split.split, {"accuracy": one.measured}, one.images, one.interval)
                    for name, one in rows
                    if name not in found and one.measured is not None
                ]
            if split.ingredients.ids == bank.ingredients.ids:
                results += self._ensemble(split)
            if "soup" in found and chosen.recipe != best.recipe:
                predictions = {name: found[name] for name in ("soup", "best single")}
                proofs.append(_compared(split, *predictions.values()))
                by_class = _by_class(split, predictions)
        log({f"{one.split}/{one.name} {key}": value for one in results for key, value in one.metrics.items()})
        if method != "best_single" and chosen.proposal == "single":
            logger.warning(
                "No soup that was looked at (%d) was better than the best single model, %s: it is returned.",
                len(soups),
                *chosen.recipe.used,
            )
        curve = [list(point) for point in settings.get("curve", ())]
        about = {
            "method": method,
            **settings,
            "curve": curve,
            "passes": _passes(bank, measured, settings.get("pilot"), len(self.probed)),
            "time": _time(bank, measured, settings.get("pilot"), [*self.probed.values()]),
            "against_best_single": proofs,
            "by_class": by_class,
            "measured": chosen.measured is not None,
            "bank": bank.origin,
            "dtype": bank.about["dtype"],
            "logits_dtype": bank.about["logits_dtype"],
            "mixed_precision": bank.about["mixed_precision"],
            "processor": bank.about["processor"],
            "data": {name: value for name, value in bank.about["data"].items() if name != "key"},
            "images": len(bank),
            "skipped": len(bank.about["skipped"]),
            "held_out": self.held_out.split if self.held_out else None,
            "overlap": self.overlap and asdict(self.overlap),
            "held_out_logits": len(self.held_out.ingredients) if self.held_out else 0,
            "remarks": [list(remark) for remark in bank.remarks],
            "batchnorm": bank.statistics and asdict(bank.statistics.record),
            "classes": list(bank.classes),
            "architecture": bank.ingredients[0].architecture,
            "image_processor": bank.ingredients[0].image_processor,
            "ingredients": [asdict(describe_ingredient(one)) for one in bank.ingredients],
            "versions": versions(),
        }
        return Soup(chosen.recipe, bank.ingredients, measured, results, about, statistics=bank.statistics)

    def _ensemble(self, split: LogitBank) -> list[Result]:
        """What the ensemble of all reaches; after a pilot its accuracy alone is known, by an estimate."""
        row = split.row(Recipe.uniform(split.ingredients.ids))
        if split.partly is None or not len(split.partly.rest):
            return [self._result("ensemble", split, self._of_logits(split, row))]
        _say_unknown([one.name for one in self.metrics if one.name != "accuracy"], "ensemble", split)
        if not self._has_accuracy:
            return []
        value, between = split.partly.estimate(split.predict(row) == split.labels)
        return [Result("ensemble", split.split, {"accuracy": value}, len(split) - len(split.partly.rest), between)]

    @property
    def _need_logits(self) -> bool:
        return any(one.needs_logits for one in self.metrics)

    @property
    def _has_accuracy(self) -> bool:
        return any(one.name == "accuracy" for one in self.metrics)

    def _is_shown(self, measurement: Measurement) -> bool:
        """Whether the predictions on the split that chose are known of all images, or will be with their logits."""
        if measurement.images == len(self.bank):
            return True
        return self._need_logits and measurement.measured is not None and len(measurement.recipe.used) > 1

    def _answers(self, split: LogitBank, recipe: Recipe) -> Answers:
        """What a recipe's soup says of a split, with its logits where a metric takes them.

        Of a single model these are known. A soup is run for them: on the split that proves its predictions come of
        that, on the one that chose it is a pass more.
        """
        if len(recipe.used) == 1:
            return self._of_logits(split, split.row(recipe))
        shown, logits = replace(split, ingredients=self.bank.ingredients), None  # a soup's need no logits
        if self._need_logits:
            logits, spent = trial_of(shown, recipe).logits()
            if split is self.bank:
                self.probed[recipe] = spent
        return Answers(predict(shown, recipe), np.asarray(split.labels), len(split.classes), logits)

    def _of_logits(self, split: LogitBank, row: np.ndarray) -> Answers:
        """What the ensemble of a recipe `(models,)` says of a split, with its logits where a metric takes them."""
        return split.answers(row, with_logits=self._need_logits and split.knows(row))

    def _result(self, name: str, split: LogitBank, answers: Answers) -> Result:
        """The scores, but for those that have no meaning or take logits that are not known."""
        unknown = [one.name for one in self.metrics if one.needs_logits and answers.logits is None]
        _say_unknown(unknown, name, split)
        scores = compute_metrics((one for one in self.metrics if one.name not in unknown), answers)
        for metric in (metric for metric, value in scores.items() if np.isnan(value)):
            logger.warning(
                "%s of the %s on %s has no meaning, and is left out: all images are of one class, or logits are no "
                "finite numbers.",
                metric,
                name,
                split.split,
            )
        metrics = {metric: value for metric, value in scores.items() if not np.isnan(value)}
        hits = answers.predictions == answers.labels
        return Result(name, split.split, metrics, len(hits), accuracy_interval(hits))


def _say_unknown(metrics: Sequence[str], name: str, split: LogitBank) -> None:
    """That after a pilot these metrics are left out: of the images on which models agree, many have no logits."""
    if metrics:
        logger.warning(
            "%s of the %s on %s: left out, because after a pilot its logits are known of some images only.",
            ", ".join(metrics),
            name,
            split.split,
        )


def _passes(
    bank: LogitBank, measured: Sequence[Measurement], pilot: dict[str, Any] | None, probed: int
) -> dict[str, float]:
    """Images that went through one model, over those of the split.

    For logits, for soups, for the logits of so many soups that are reported, and for the BatchNorm of soups.
    """
    share = len(bank) / bank.samples if bank.is_pilot else bank.samples / len(bank)  # more where some are held out
    found = {"logits": share * len(bank.ingredients), "soups": sum(one.passes for one in measured)}
    if probed:
        found["probabilities"] = float(probed)
    if bank.statistics:
        soups = sum(one.passes > 0 and len(one.recipe.used) > 1 for one in measured) + probed
        found["batchnorm"] = soups * bank.statistics.record.images / len(bank)
    if pilot and "passes" in pilot:
        found["logits"] = pilot["passes"]
    return found


def _time(
    bank: LogitBank, measured: Sequence[Measurement], pilot: dict[str, Any] | None, probed: Sequence[Spent]
) -> dict[str, Any]:
    """Seconds that devices took, those of several together, for what `_passes` counts; None if that is not known."""
    if pilot and "devices" in pilot:
        logits = Spent(pilot["seconds"], frozenset(pilot["devices"]))
    else:
        logits = spent(bank.folder, bank.ingredients)
    soups = Spent(0.0)
    for one in measured:
        if one.passes:
            soups += Spent(one.seconds, frozenset(filter(None, [one.device])))
    probabilities = sum(probed, Spent(0.0))
    known = {"logits": logits.seconds, "soups": soups.seconds}
    if probed:
        known["probabilities"] = probabilities.seconds
    rounded = {name: None if one is None else round(one, 3) for name, one in known.items()}
    return {**rounded, "devices": sorted(logits.devices | soups.devices | probabilities.devices)}


def best_known(singles: Iterable[Measurement], images: int) -> Measurement:
    """The best single model of those that were run on all images."""
    return choose(one for one in singles if one.images == images)


def choose(measured: Iterable[Measurement]) -> Measurement:
    """The best measured; of equals the better estimate, but a single model before any soup that is not better."""
    return max(measured, key=lambda one: (one.known, one.proposal == "single", one.estimate))


def predict(bank: LogitBank, recipe: Recipe, on_block: Callable[[int], object] = lambda samples: None) -> np.ndarray:
    """Classes that the averaged weights predict `(samples,)`; of a single model they are known."""
    if len(recipe.used) == 1:
        return bank.predict(bank.row(recipe))
    return trial_of(bank, recipe).look(np.ones(len(bank), dtype=bool), on_block=on_block)


def _compared(split: LogitBank, soup: np.ndarray, single: np.ndarray) -> dict[str, Any]:
    """How much better than the best single model the soup is on a split, and whether that may be chance."""
    labels = np.asarray(split.labels)
    hits, others = soup == labels, single == labels
    return {
        "split": split.split,
        "gain": float(hits.mean() - others.mean()),
        "interval": list(difference_interval(hits, others)),
        "p_value": mcnemar(hits, others),
    }


def _by_class(split: LogitBank, predictions: dict[str, np.ndarray]) -> dict[str, Any]:
    """How many images each class has on a split, and how many of these each model gets right."""
    labels, classes = np.asarray(split.labels), len(split.classes)
    right = {name: np.bincount(labels[one == labels], minlength=classes).tolist() for name, one in predictions.items()}
    return {"split": split.split, "images": np.bincount(labels, minlength=classes).tolist(), **right}


def _overlap(bank: LogitBank, held_out: LogitBank, allow: bool) -> Overlap:
    """What the split that proves shares with others.

    Raises:
        ValueError: if that is not allowed.
    """
    overlap = on_main_process(lambda: overlap_of(bank, held_out))
    names = held_out.split, bank.split
    if overlap.images is None:
        logger.warning(
            "Whether the splits %r and %r share images can't be told: a bank has no digests of its.", *names
        )
    if overlap.images:
        if not allow:
            refuse_counted(overlap.images, overlap.of, names)
        logger.warning("%d of %d images of the split %r are in %r too.", overlap.images, overlap.of, *names)
    if overlap.batchnorm:
        logger.warning(
            "%d of %d images of the split %r are among those that give BatchNorm its statistics.",
            overlap.batchnorm,
            overlap.of,
            held_out.split,
        )
    return overlap


def _held_out(bank: LogitBank, test_split: str | LogitBank | None, allow_overlap: bool) -> LogitBank | None:
    """The bank of the split that proves, refused if it is the split that chooses."""
    if test_split is None:
        return None
    wanted = bank
    if bank.partly and not isinstance(test_split, LogitBank):  # what proves takes the best single model, and soups
        wanted = replace(bank, ingredients=bank.ingredients.select(bank.partly.whole))
    if isinstance(test_split, LogitBank):
        held_out = test_split
    else:
        held_out = of_split(wanted, str(test_split), allow_overlap=allow_overlap)
    _check_held_out(wanted, held_out)
    return replace(held_out, ingredients=wanted.ingredients, statistics=bank.statistics)


def _check_held_out(bank: LogitBank, held_out: LogitBank) -> None:
    """Raises a ValueError if a bank can't prove what another one chose."""
    if held_out.is_pilot:
        raise ValueError(
            f"The held-out bank in {held_out.folder} is of a part of its split: compute it without pilot."
        )
    if bank.about["data"]["key"] == held_out.about["data"]["key"]:  # whatever the two are called
        raise ValueError(f"The split {bank.split!r} chooses the soup; another one has to prove it.")
    for name in ("classes", "processor", "dtype", "mixed_precision"):
        if bank.about[name] != held_out.about[name]:
            raise ValueError(
                f"The held-out bank in {held_out.folder} was computed with another {name} than that in {bank.folder}: "
                f"{held_out.about[name]} against {bank.about[name]}."
            )
    absent = [one.id for one in bank.ingredients if one.key not in held_out.ingredients.keys]
    if absent:
        raise ValueError(
            f"The held-out bank in {held_out.folder} has no logits of {absent[0]} as it is in {bank.folder}."
        )
    if bank.statistics and held_out.about["data"]["key"] == bank.statistics.record.data:
        raise ValueError(
            f"The split {held_out.split!r} gives the soup its BatchNorm statistics; another one has to prove it."
        )
