"""The logit bank: what every ingredient says about every image of a split, on disk and memory-mapped."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.images.cache import Images, find_home
from hf_radin.images.digests import as_digests, with_copies
from hf_radin.images.sample import Pilot, drawn_places
from hf_radin.images.shards import Block
from hf_radin.ingredients.ingredient import (
    Ingredients,
    from_record,
    in_hub_cache,
    is_available,
    to_record,
    with_distinct_ids,
)
from hf_radin.logits.bank_files import DIGESTS, latest_of, logits_path, open_array, read_about, read_latest, read_told
from hf_radin.logits.share import COMMIT_MESSAGE, fetch_bank, named_repositories, public_files
from hf_radin.logits.sources import sampled_source_of, source_of
from hf_radin.recipes import ensemble, propose, pruning, scoring
from hf_radin.recipes.intervals import LEVEL
from hf_radin.recipes.metrics import Answers, load_metrics, only_score
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import digest
from hf_radin.runtime.hub_commit import commit_files, hidden_repositories, is_private
from hf_radin.runtime.processes import on_main_process, progress_bar
from hf_radin.weights.batchnorm import Statistics, StatisticsRecord

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

# Threads that prune logits: they are read faster than more could compare them, and each takes memory.
MOST_THREADS = 8


@dataclass(frozen=True, eq=False)
class LogitBank:
    """Logits of ingredients on one split, and where they came from. Made by `compute_logits`, read by `open`.

    Args:
        folder: holds `bank.json`, `labels.npy`, `ids.npy` and for each ingredient `logits/*.npy` and `logits/*.json`.
        ingredients: those whose logits this bank gives; the folder may hold more.
        about: the contents of `bank.json`.
        images: what the logits were computed from.
        request: the arguments of `compute_logits`, to do the same for another split.
        statistics: images that soups estimate BatchNorm statistics from, where the models have any.
        remarks: which checkpoints were left out or seem to be strangers: id (or nothing) and text.
        origin: of a bank from the Hub the repository and commit, as in `org/bank@sha`.
        part: positions in the split, ascending, of the images that this bank is about; None for all.
        partly: where some ingredients have no logits of some images; None where all have all.
    """

    folder: Path
    ingredients: Ingredients
    about: dict[str, Any]
    images: Images = field(repr=False)
    request: dict[str, Any] = field(default_factory=dict, repr=False)
    statistics: Statistics | None = None
    remarks: tuple[tuple[str, str], ...] = ()
    origin: str | None = None
    part: np.ndarray | None = None
    partly: Partly | None = None
    _pruned: dict[int, pruning.Pruned] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> LogitBank:
        """What was last computed into a folder, but for checkpoints that are no longer where and what they were.

        Raises:
            ValueError: if the folder is no bank.
        """
        bank = cls._read(Path(path).resolve())
        if bank.origin is not None:  # somebody else's checkpoints were never here
            return bank
        return replace(bank, ingredients=Ingredients([one for one in bank.ingredients if is_available(one)]))

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> LogitBank:
        """A bank that somebody pushed: recipes can be scored and searched without images and without a GPU.

        Weights are averaged, and soups measured, only where the checkpoints (and images) are on the Hub too.

        Args:
            cache_dir: where banks are kept; by default `hf_radin` in HF_HOME.

        Raises:
            ValueError: if there is no such bank.
        """
        home = find_home(cache_dir)
        folder = on_main_process(lambda: fetch_bank(repo_id, home, revision=revision, token=token))
        return cls._read(folder, token)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Upload the logits and labels, no images, as a dataset repository in one commit; `from_hub` reads it.

        With several processes the main one pushes and the others wait. Arguments as in `push_soup_to_hub`.

        Raises:
            ValueError: if the id is none, or the token may not write there.
        """
        if self.is_pilot:
            raise ValueError("A bank of a part of the split (pilot) can't be shared; compute it without.")
        local = [one.id for one in self.ingredients if one.repo_id is None]
        if local:
            logger.warning(
                "%d of %d checkpoints are not on the Hub (%s, ...): others can search recipes of them, and cook none.",
                len(local),
                len(self.ingredients),
                local[0],
            )

        def push() -> CommitInfo:
            scores = self.score(np.eye(len(self.ingredients)))
            latest = latest_of(self.folder, self.ingredients, self.remarks, self.statistics)
            records = [{**to_record(one), **asdict(read_told(self.folder, one))} for one in self.ingredients]
            seen = not is_private(repo_id, repo_type="dataset", private=private, token=token)
            if seen and (names := hidden_repositories(named_repositories(self.about, records, self.remarks))):
                logger.warning("The bank names what is private, and everybody can read it: %s.", ", ".join(names))
            return commit_files(
                repo_id,
                public_files(self.folder, self.about, latest, records, scores.tolist(), repo_id),
                repo_type="dataset",
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or COMMIT_MESSAGE,
                overwrite=True,  # logits of other checkpoints stay beside these
            )

        return on_main_process(push)

    @classmethod
    def _read(cls, folder: Path, token: str | bool | None = None) -> LogitBank:
        """What was last computed into a folder, whether its checkpoints are there or not."""
        about = read_about(folder)
        if "places" in (about.get("pilot") or {}):
            raise ValueError(f"{folder} has logits of images that a pilot chose; open the folder of the pilot.")
        try:
            latest = read_latest(folder)
            records = [json.loads((folder / "logits" / f"{key}.json").read_text()) for key in latest["keys"]]
            found = with_distinct_ids([from_record(one) for one in records if one["finite"]])
            ingredients = Ingredients([in_hub_cache(one, token) for one in found] if about.get("origin") else found)
            data, told = about["data"], latest["statistics"]
            remarks = tuple((str(name), str(text)) for name, text in latest["remarks"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder} is no whole logit bank ({error}); compute it again: what is there and whole is used."
            ) from error
        request = {name: data[name] for name in ("config_name", "revision", "image_column", "label_column")}
        request |= {
            name: about[name]
            for name in ("batch_size", "dtype", "logits_dtype", "on_error", "channels_last", "compiled")
        }
        request |= {"dataset": about["dataset"] or data["name"], "cache_dir": folder.parent.parent}
        request |= {"strangers": "keep", "token": token}
        pilot = Pilot(**about["pilot"]) if about.get("pilot") else None
        request |= {"pilot": pilot}
        statistics = None
        if told:
            request |= {f"batchnorm_{name}": told["about"][name] for name in ("split", "images")}
            record = StatisticsRecord.from_json(told["about"])
            source = cache(partial(sampled_source_of, folder, ingredients, request, record))
            statistics = Statistics(Images((folder / told["pixels"]).resolve(), told["size"], source), record)
        source = cache(partial(source_of, folder, ingredients, request))
        images = Images((folder / about["pixels"]).resolve(), about["block_size"], source)
        part = drawn_places(about["blocks"], pilot)
        return cls(folder, ingredients, about, images, request, statistics, remarks, about.get("origin"), part)

    def __repr__(self) -> str:
        data = self.about["data"]
        where = f"{data['name']}, split {data['split']!r}"
        return f"LogitBank({len(self.ingredients)} ingredients, {len(self)} images of {where}, in {self.folder})"

    def logits(self, ingredient: int | str) -> np.memmap:
        """One ingredient's logits by position or id: float32 or float16 `(samples, classes)`, memory-mapped."""
        one = self.ingredients.select([ingredient])[0] if isinstance(ingredient, str) else self.ingredients[ingredient]
        found: Any = open_array(logits_path(self.folder, one))
        return found if self.is_pilot else found[self._some]

    @property
    def labels(self) -> np.ndarray:
        """The true class of each sample, as an index into `classes`: `(samples,)`."""
        return np.load(self.folder / "labels.npy", mmap_mode="r")[self._some]

    @property
    def ids(self) -> np.ndarray:
        """The position of each sample in its split: `(samples,)`; skipped samples leave gaps."""
        return np.load(self.folder / "ids.npy", mmap_mode="r")[self._some]

    @property
    def digests(self) -> np.ndarray | None:
        """What tells the image of each sample from others: `(samples,)`; None in a bank of an earlier version."""
        path = self.folder / DIGESTS
        return as_digests(open_array(path))[self._some] if path.exists() else None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.about["classes"])

    @property
    def split(self) -> str:
        return str(self.about["data"]["split"])

    @property
    def blocks(self) -> dict[Block, slice]:
        """Where each block of images has its samples."""
        ends = np.cumsum([count for *_, count in self.about["blocks"]]).tolist()
        return {
            (shard, number): slice(end - count, end)
            for (shard, number, count), end in zip(self.about["blocks"], ends, strict=True)
        }

    def __len__(self) -> int:
        return self.samples if self.part is None else len(self.part)

    @property
    def samples(self) -> int:
        """How many images the split has, whatever part of it this bank is about."""
        return int(self.about["samples"])

    @property
    def places(self) -> np.ndarray:
        """Positions in the split of the images that this bank is about: `(samples,)`."""
        return np.arange(self.samples) if self.part is None else self.part

    @property
    def is_pilot(self) -> bool:
        """Whether logits were computed of a part of the split only."""
        return self.about.get("pilot") is not None

    @property
    def _some(self) -> slice | np.ndarray:
        return slice(None) if self.part is None else self.part

    def divided(self, share: float, seed: int) -> tuple[LogitBank, LogitBank]:
        """The bank without some of its images, and the bank of these, drawn at random.

        Copies of one image are never in both: they stay in the first.

        Raises:
            ValueError: if one of the two has no image.
        """
        number = float(share) if isinstance(share, (float, np.floating)) and 0 < share < 1 else 0.0
        count = round(number * len(self))
        if not 0 < count < len(self):
            raise ValueError(f"hold_out={share!r}: it is a share of the {len(self)} images, as in 0.2.")
        order = np.random.default_rng(seed).permutation(len(self))
        out, rest = order[:count], order[count:]
        if (digests := self.digests) is not None:
            out, rest = with_copies(out, rest, digests)
        if len(out) < count:
            logger.warning("%d of %d images have copies among the others: not held out.", count - len(out), count)
        if not len(out):
            raise ValueError(f"hold_out={share!r}: all of these {count} images have copies among the others.")
        out, rest = (np.sort(self.places[rows]) for rows in (out, rest))
        data = {**self.about["data"], "split": f"{self.split} (held out)"}
        return replace(self, part=rest), replace(self, part=out, about={**self.about, "data": data})

    def score(
        self,
        recipes: np.ndarray | Sequence[Sequence[float]] | Sequence[Recipe] | Recipe,
        metric: str = "accuracy",
        *,
        device: str = "cpu",
    ) -> np.ndarray:
        """Exact scores of the ensembles of some recipes, `(recipes,)`; no model runs.

        Args:
            recipes: `(recipes, models)` in the order of `ingredients`, rows on the simplex; or several `Recipe`, or
                one.
            metric: `accuracy`, `balanced_accuracy`, `f1` (the mean over classes), `mcc` or `top5_accuracy`, from the
                classes that can win (`pruned`). For `cross_entropy` (or `log_loss`) and `calibration_error` all
                logits are read; of these less is better. Any other is one of those that are reported
                (`metrics.NAMES`) or of the evaluate library, computed recipe by recipe.
            device: where logits are mixed: `cpu`, or one that torch knows. Predictions are the same.

        Raises:
            ValueError: for a metric that can't be loaded or gives several scores, or what is no recipe.
        """
        metric = scoring.ALIASES.get(metric, metric)
        other = None if metric in scoring.METRICS else load_metrics(metric)
        rows = ensemble.check_recipes(self._rows_of(recipes), len(self.ingredients))
        with progress_bar(total=len(rows) * len(self), desc="Scoring recipes", unit="prediction") as bar:
            if other:
                found = []
                for row in rows:
                    found.append(only_score(other[0], self.answers(row, with_logits=other[0].needs_logits)))
                    bar.update(len(self))
                return np.array(found)
            if metric in scoring.DENSE:
                return scoring.DENSE[metric](self._all_logits(), self.labels, rows, on_block=bar.update)
            labels, classes = np.asarray(self.labels), len(self.classes)
            options = {"device": device, "on_block": bar.update}
            try:
                pruned = self.pruned(5 if metric == "top5_accuracy" else 1)
            except pruning.TooMuchLeftError:
                parts = [
                    scoring.count_for(metric, part, labels[some], classes, rows, device=device)
                    for some, part in self._pruned_parts(5 if metric == "top5_accuracy" else 1)
                ]
                return scoring.made_of(metric, parts, len(self))
            return scoring.score(pruned, labels, classes, rows, metric, **options)

    def is_prunable(self) -> bool:
        """Whether what is left of the logits without the classes that can't win may be held in memory."""
        try:
            self.pruned()
        except pruning.TooMuchLeftError:
            return False
        return True

    def best_step(self, start: np.ndarray, end: np.ndarray) -> tuple[float, int]:
        """Where between two recipes `(models,)` most images are right, exactly: see `line.best_step`."""
        return propose.best_step(self.pruned(), np.asarray(self.labels), start, end)

    def predict(self, recipe: np.ndarray | Sequence[float]) -> np.ndarray:
        """Classes predicted by the ensemble of one recipe `(models,)`: `(samples,)`."""
        if self.partly:
            used = [self.ingredients.ids[one] for one in np.flatnonzero(recipe)]
            if len(used) == 1 and used[0] in self.partly.singles:
                return self.partly.singles[used[0]]
        try:
            return scoring.predict(self.pruned(), np.asarray(recipe))[0]
        except pruning.TooMuchLeftError:
            return ensemble.predict(self._all_logits(), np.asarray(recipe))

    def answers(self, recipe: np.ndarray, *, with_logits: bool = False) -> Answers:
        """What the ensemble of one recipe `(models,)` says of the images, with its logits if they are asked for.

        Raises:
            ValueError: if they are, and some are not known (see `knows`).
        """
        logits, used = None, np.flatnonzero(recipe)
        if with_logits:
            bank = replace(self, ingredients=self.ingredients.select([self.ingredients.ids[at] for at in used]))
            logits = ensemble.mix(bank._all_logits(), np.asarray(recipe)[used])
        return Answers(self.predict(recipe), np.asarray(self.labels), len(self.classes), logits)

    def knows(self, recipe: np.ndarray) -> bool:
        """Whether the logits of all images are here of all ingredients that a recipe `(models,)` uses."""
        used = {self.ingredients.ids[one] for one in np.flatnonzero(recipe)}
        return self.partly is None or used <= {*self.partly.whole} - {*self.partly.singles}

    def row(self, recipe: Recipe) -> np.ndarray:
        """A recipe as a row `(models,)` in the order of `ingredients`."""
        return np.array([recipe.used.get(name, 0.0) for name in self.ingredients.ids])

    def _rows_of(self, recipes: np.ndarray | Sequence[Sequence[float]] | Sequence[Recipe] | Recipe) -> np.ndarray:
        """Recipes as rows `(recipes, models)`."""
        several = [recipes] if isinstance(recipes, Recipe) else recipes
        rows = []
        for recipe in several:
            if isinstance(recipe, Recipe):
                self.ingredients.select(recipe.used)
            rows.append(self.row(recipe) if isinstance(recipe, Recipe) else recipe)
        return np.asarray(rows)

    def recipe(self, row: np.ndarray) -> Recipe:
        """The recipe of a row `(models,)`, of the ingredients that it uses."""
        used = np.flatnonzero(row)
        return Recipe(tuple(self.ingredients.ids[one] for one in used), tuple(row[used].tolist()))

    def _pruned_parts(self, top: int) -> Iterator[tuple[slice, pruning.Pruned]]:
        """Where too much is left to be kept: some samples after others, each pruned when it is their turn."""
        step = max(1, pruning.MOST // (4 * len(self.ingredients) * len(self.classes)))
        for start in range(0, len(self), step):
            some = slice(start, min(start + step, len(self)))
            yield some, pruning.prune([_rows(one, some) for one in self._all_logits()], top=top)

    def pruned(self, top: int = 1) -> pruning.Pruned:
        """Of each image the classes that can be among the best `top` under some recipe of these ingredients.

        Made at one reading of the logits, and kept in `pruned` of the folder: other ingredients get another file.
        """
        if self.partly:
            if top != 1:
                raise ValueError("Of these images not all logits are known: only the best class can be told.")
            return self.partly.pruned

        def make() -> pruning.Pruned:
            threads = min(MOST_THREADS, os.cpu_count() or 1)
            with progress_bar(total=self.samples, desc="Pruning logits", unit="image") as bar:
                return pruning.prune(self._stored(), top=top, threads=threads, on_block=bar.update)

        if top not in self._pruned:
            sources = [logits_path(self.folder, one) for one in self.ingredients]
            path = self.folder / "pruned" / f"{digest(self.ingredients.keys, top)}.npz"
            found = pruning.kept(path, sources, make, samples=len(self) if self.is_pilot else self.samples, top=top)
            self._pruned[top] = found if self.part is None or self.is_pilot else found.select(self.part)
        return self._pruned[top]

    def _all_logits(self) -> Sequence[ensemble.Stored | np.ndarray]:
        if not self.knows(np.ones(len(self.ingredients))):
            raise ValueError("Of these images not all logits are known, because of a pilot; this takes all.")
        return (
            self._stored()
            if self.part is None or self.is_pilot
            else [self.logits(at) for at in range(len(self.ingredients))]
        )

    def _stored(self) -> list[ensemble.Stored]:
        files = (logits_path(self.folder, one) for one in self.ingredients)
        return [ensemble.Stored.of(open_array(file)) for file in files]


def _rows(logits: ensemble.Stored | np.ndarray, some: slice) -> ensemble.Stored | np.ndarray:
    """Some samples, read only when they are looked at."""
    return logits.part(some) if isinstance(logits, ensemble.Stored) else logits[some]


@dataclass(frozen=True, eq=False)
class Partly:
    """What is known of a split where only some ingredients have logits of all images (see `telling`).

    Args:
        rest: positions of the images of which the others have none, ascending.
        whole: ids of the ingredients whose predictions are known of all images.
        pruned: the classes that can win; of the rest, what the leading ingredients agree on.
        clear: positions of a random sample of such images of which all have logits, `(clear,)`.
        right: whether what the leading agree on is right there, bool `(clear,)`.
        singles: of those in `whole` that have no logits there, the classes that they predict, `(samples,)` each.
    """

    rest: np.ndarray
    whole: tuple[str, ...]
    pruned: Pruned
    clear: np.ndarray
    right: np.ndarray
    singles: dict[str, np.ndarray] = field(default_factory=dict)

    def estimate(self, hits: np.ndarray) -> tuple[float, tuple[float, float]]:
        """The accuracy on all images, and between which 95% lie.

        Where there are no logits, what the leading get right is known, and by how much that is too good (or not good
        enough) the sample says.

        Args:
            hits: what is right `(samples,)`; of the rest, what the leading agree on.
        """
        drawn, share = len(self.clear), len(self.rest) / len(hits)
        gains = hits[self.clear].astype(int) - self.right
        value = min(1.0, max(0.0, float(hits.mean()) + share * float(gains.mean() if drawn else 0.0)))
        # a few that are equal are no certainty, as in `Strata.mean`
        uncertain = ((np.count_nonzero(gains) + 0.5) / (drawn + 1) - (gains.sum() / (drawn + 1)) ** 2) / max(1, drawn)
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(
            value * (1 - value) / len(hits) + share**2 * uncertain
        )
        return value, (max(0.0, value - half), min(1.0, value + half))
