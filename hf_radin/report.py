"""What is checked before a search spends anything, and what is reported after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from hf_radin import compare, origin
from hf_radin.bank import LogitBank
from hf_radin.data import Split
from hf_radin.evaluate import trial_of
from hf_radin.evaluate_metrics import compute_metrics, load_metrics
from hf_radin.held_out import check_split, of_split, refuse_overlap
from hf_radin.kept import Spent, spent
from hf_radin.overlap import Overlap, overlap_of, refuse_counted
from hf_radin.processes import log, on_main_process
from hf_radin.recipe import Measurement, Recipe, Result
from hf_radin.soup import Soup, versions

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
        self.metrics = self.check(
            bank, test_split, metric, metrics, hold_out=hold_out, whole=whole, allow_overlap=allow_overlap
        )
        if hold_out is None:
            self.bank, self.held_out = bank, _held_out(bank, test_split, allow_overlap)
        else:
            self.bank, self.held_out = bank.divided(hold_out, seed)
            if bank.statistics and bank.statistics.about["data"] == bank.about["data"]["key"]:
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
    ) -> dict[str, Any]:
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
            if bank.statistics and str(test_split) == bank.statistics.about["split"]:
                raise ValueError(
                    f"The split {test_split!r} gives the soup its BatchNorm statistics; another one has to prove it."
                )
            proving = check_split(bank, str(test_split))
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
            known = [(name, one) for name, one in rows if split is not bank or one.images == len(bank)]
            found = {name: self._predict(split, one.recipe) for name, one in known}
            results += [self._result(name, split, one, split.labels) for name, one in found.items()]
            if "accuracy" in self.metrics:  # of a baseline that was shown a part
                results += [
                    Result(name, split.split, {"accuracy": one.measured}, one.images, one.interval)
                    for name, one in rows
                    if name not in found and one.measured is not None
                ]
            if split.ingredients.ids == bank.ingredients.ids:
                ensemble = split.predict(split.row(Recipe.uniform(bank.ingredients.ids)))
                if split.partly is None or not len(split.partly.rest):
                    results.append(self._result("ensemble", split, ensemble, split.labels))
                elif "accuracy" in self.metrics:
                    value, between = split.partly.estimate(ensemble == split.labels)
                    shown = len(split) - len(split.partly.rest)
                    results.append(Result("ensemble", split.split, {"accuracy": value}, shown, between))
            if "soup" in found and chosen.recipe != best.recipe:
                proofs.append(_compared(split, found["soup"], found["best single"]))
                by_class = _by_class(split, {name: found[name] for name in ("soup", "best single")})
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
            "passes": _passes(bank, measured, settings.get("pilot")),
            "time": _time(bank, measured, settings.get("pilot")),
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
            "batchnorm": bank.statistics and bank.statistics.about,
            "classes": list(bank.classes),
            "architecture": bank.ingredients[0].architecture,
            "image_processor": bank.ingredients[0].image_processor,
            "ingredients": [origin.describe(one) for one in bank.ingredients],
            "versions": versions(),
        }
        return Soup(chosen.recipe, bank.ingredients, measured, results, about, statistics=bank.statistics)

    def _predict(self, split: LogitBank, recipe: Recipe) -> np.ndarray:
        """As `predict`, where a soup's ingredients need no logits."""
        return predict(split if len(recipe.used) == 1 else replace(split, ingredients=self.bank.ingredients), recipe)

    def _result(self, name: str, split: LogitBank, predictions: np.ndarray, labels: np.ndarray) -> Result:
        metrics = compute_metrics(self.metrics, predictions, labels)
        return Result(name, split.split, metrics, len(labels), compare.interval(predictions == labels))


def _passes(bank: LogitBank, measured: Sequence[Measurement], pilot: dict[str, Any] | None) -> dict[str, float]:
    """Images that went through one model, over those of the split: for logits, for soups, for their BatchNorm."""
    share = len(bank) / bank.samples if bank.is_pilot else bank.samples / len(bank)  # more where some are held out
    found = {"logits": share * len(bank.ingredients), "soups": sum(one.passes for one in measured)}
    if bank.statistics:
        soups = sum(one.passes > 0 and len(one.recipe.used) > 1 for one in measured)
        found["batchnorm"] = soups * bank.statistics.about["images"] / len(bank)
    if pilot and "passes" in pilot:
        found["logits"] = pilot["passes"]
    return found


def _time(bank: LogitBank, measured: Sequence[Measurement], pilot: dict[str, Any] | None) -> dict[str, Any]:
    """Seconds that devices took, those of several together: for logits and for soups; None if that is not known."""
    if pilot and "devices" in pilot:
        logits = Spent(pilot["seconds"], frozenset(pilot["devices"]))
    else:
        logits = spent(bank.folder, bank.ingredients)
    soups = Spent(0.0)
    for one in measured:
        if one.passes:
            soups += Spent(one.seconds, frozenset(filter(None, [one.device])))
    known = {"logits": logits.seconds, "soups": soups.seconds}
    rounded = {name: None if one is None else round(one, 3) for name, one in known.items()}
    return {**rounded, "devices": sorted(logits.devices | soups.devices)}


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
        "interval": list(compare.difference(hits, others)),
        "p_value": compare.mcnemar(hits, others),
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
    if bank.statistics and held_out.about["data"]["key"] == bank.statistics.about["data"]:
        raise ValueError(
            f"The split {held_out.split!r} gives the soup its BatchNorm statistics; another one has to prove it."
        )
