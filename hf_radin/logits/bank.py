"""The logit bank: what every ingredient says about every image of a split, on disk and memory-mapped."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_radin.checkpoints.files import as_dtype
from hf_radin.checkpoints.forward import Running
from hf_radin.images.cache import ACTIVATIONS, Images, find_home, parse_size
from hf_radin.images.digests import as_digests, with_copies
from hf_radin.images.sample import drawn_places
from hf_radin.images.shards import Block
from hf_radin.images.split import DataSource
from hf_radin.ingredients.ingredient import (
    Ingredients,
    in_hub_cache,
    is_available,
    refuse_given,
    with_distinct_ids,
)
from hf_radin.logits import publish
from hf_radin.logits.bank_files import (
    DIGESTS,
    FrontUsers,
    LogitsRecord,
    SoupFeatures,
    Spent,
    check_bank,
    logits_path,
    open_array,
    write_given,
)
from hf_radin.logits.manifest import (
    BankManifest,
    Latest,
    RunOptions,
    StatisticsPlace,
    is_in_full_precision,
    reopen_images,
    reopen_sample,
)
from hf_radin.logits.passes import Passes
from hf_radin.logits.preflight import differ_in_heads_alone, load_digests
from hf_radin.metrics.changes import Changes, margins_of
from hf_radin.metrics.intervals import LEVEL
from hf_radin.metrics.multi_label import decisions_of
from hf_radin.metrics.named import Answers, Metric, load_metrics, only_score
from hf_radin.metrics.objective import score_recipes
from hf_radin.recipes import ensemble, gaps, propose, pruning, scoring
from hf_radin.recipes.given import Evaluate, GivenLogits, GivenModels
from hf_radin.recipes.pruning import Pruned
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import digest, refuse_files
from hf_radin.runtime.hub_commit import PushOptions
from hf_radin.runtime.processes import Processes, is_first_of_machine, progress_bar
from hf_radin.runtime.schema import known_record, write_sealed
from hf_radin.sharing.activations import Activations
from hf_radin.sharing.digests import differing
from hf_radin.tail.front import Front, SharedFront, find_front, may_share
from hf_radin.weights.average import Residents, are_averaged_in_full, average_model
from hf_radin.weights.batchnorm import Statistics
from hf_radin.weights.head import LastLayers

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

UNKNOWN_LOGITS = "After a pilot the logits of these images are not all known; this takes all of them."

# What a configuration says of a model that changes nothing of what its front gives.
NOT_OF_THE_FRONT = frozenset(
    ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version")
)

# Threads that prune logits: they are read faster than more could compare them, and each takes memory.
MOST_THREADS = 8


@dataclass(frozen=True, eq=False)
class LogitBank:
    """Logits of ingredients on one split, and where they came from. Made by `compute_logits`, read by `open`.

    Args:
        folder: holds `bank.json`, `labels.npy`, `ids.npy` and for each ingredient `logits/*.npy` and `logits/*.json`.
        ingredients: those whose logits this bank gives; the folder may hold more.
        manifest: the contents of `bank.json`.
        images: what the logits were computed from.
        source: where these are, to open other splits.
        options: how the ingredients were run, to do the same on other splits.
        processes: that share the work on the bank.
        statistics: images that soups estimate BatchNorm statistics from, where the models have any.
        remarks: which checkpoints were left out or seem to have a different start: id (or nothing) and text.
        part: positions in the split, ascending, of the images that this bank is about; None for all.
        partial: where some ingredients have no logits of some images; None where all have all.
        seconds: that computing it took just now, in this process; a search's budget of time counts them.
        most_pruned: bytes of logits that may be held in memory.
        given: what stands for checkpoints and images where there are none; None where there are.
        exact: whether soups are their ensembles (`with_exactness`); None where that was not asked.
        residents: ingredients that stay in a GPU's memory, to be averaged there.
    """

    folder: Path
    ingredients: Ingredients
    manifest: BankManifest
    images: Images = field(repr=False)
    source: DataSource = field(repr=False)
    options: RunOptions = field(repr=False)
    processes: Processes = field(repr=False)
    statistics: Statistics | None = None
    remarks: tuple[tuple[str, str], ...] = ()
    part: np.ndarray | None = None
    partial: PartialLogits | None = None
    seconds: float = 0.0
    most_pruned: int = field(default=pruning.MOST, repr=False)
    given: GivenModels | None = field(default=None, repr=False)
    exact: bool | None = field(default=None, repr=False)
    residents: Residents = field(default_factory=Residents, repr=False)
    _pruned: dict[int, pruning.Pruned] = field(default_factory=dict, init=False, repr=False)
    _fronts: list[Front | None] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def open(cls, path: str | Path, *, processes: Processes | None = None) -> LogitBank:
        """What was last computed into a folder, but for checkpoints that are no longer where and what they were.

        All its files are read once, to see that they are what was written; by one process of each machine.

        Args:
            processes: that share the work on the bank; by default those that accelerate knows of.

        Raises:
            ValueError: if the folder is no bank, or a file of it is broken, or none of its checkpoints is left.
        """
        folder, processes = Path(path).resolve(), processes or Processes()
        if is_first_of_machine():
            check_bank(folder, processes.checks)
        bank = cls._read(folder, processes)
        if bank.manifest.origin is not None:  # somebody else's checkpoints were never here
            return bank
        available = [ingredient for ingredient in bank.ingredients if is_available(ingredient)]
        if not available:
            raise ValueError(f"None of the checkpoints of the bank {folder} is where and what it was. Put them back.")
        return replace(bank, ingredients=Ingredients(available))

    @classmethod
    def from_arrays(
        cls,
        logits: Mapping[str, np.ndarray],
        labels: Sequence[int] | Sequence[str] | np.ndarray,
        *,
        classes: Sequence[str] | None = None,
        evaluate: Evaluate | None = None,
        ids: Sequence[int] | np.ndarray | None = None,
        split: str = "validation",
        folder: str | Path | None = None,
    ) -> LogitBank:
        """A bank of logits that were computed elsewhere, of models that are no checkpoints of transformers.

        Recipes are scored and searched as those of checkpoints are (`radin`, `greedy`, `uniform`, `best_single`).
        `evaluate` averages the weights, so that soups are measured. It shows a soup all images at once, and a sample
        would cost as much as all of them. So `radin` measures each candidate in full: a budget of 8 is 8 calls, beside
        the one for the uniform soup. Which candidate is next is still predicted from the soups before it, with
        distances between the models' logits in the place of distances between their weights. Without `evaluate`
        nothing is measured: by default `radin` returns the best single model, and with `unmeasured=True` the
        candidate of the best estimate.

        There are no images and no checkpoints: heads are averaged, no layers are distilled, and neither the bank nor
        a soup is pushed or saved as a model. `soup.recipe` says which weights to average, and `soup.save_recipe`
        writes all that was measured. BatchNorm statistics of averaged weights are up to `evaluate`.

        Args:
            logits: of each model by its name, floats `(samples, classes)`, kept as float32.
            labels: of each image its class, ints `(samples,)`, or names of `classes`.
            classes: names in the order of the logits; by default `"0"`, `"1"`, ...
            evaluate: from a `Recipe` (`recipe.used` has a weight for each name) to the logits `(samples, classes)` of
                really averaged weights on the same images, in the same order. What it gave for a recipe is kept in
                the folder and not asked for again. With several processes the main one calls it.
            ids: a number for each image, `(samples,)`, as `compare` names it; by default its position. Those that
                are given tell images apart: the split that proves a soup has other ids than the one that chooses, and
                which images both have is not known if they are not given.
            split: what to call these images; the bank of a held-out split (`test_split` of a search) has another
                name, the same names of models, and an `evaluate` of its own.
            folder: where logits are kept, and what `evaluate` gave, for the next time that the same logits are given:
                use another folder if `evaluate` has changed and they have not. By default a temporary one, which
                lasts as long as the bank. Several processes must share its disk.

        Raises:
            ValueError: for fewer than two models, or names that are no strings; arrays of different shapes, of other
                than floats, or with values that are not finite; labels or ids of another number, or that are none;
                class names of another number, or one twice; several processes and no folder.
        """
        if evaluate is not None and not callable(evaluate):
            raise ValueError(f"evaluate={evaluate!r}: it is a function from a recipe to logits.")
        checked, processes = GivenLogits.of(logits, labels, classes=classes, ids=ids, split=split), Processes()
        if folder is None and processes.count > 1:
            raise ValueError(f"{processes.count} processes work on these logits: name a folder that all of them see.")
        given = GivenModels(evaluate)
        home = Path(tempfile.mkdtemp(prefix="hf_radin-") if folder is None else folder).resolve()
        if folder is None:
            weakref.finalize(given, shutil.rmtree, home, ignore_errors=True)
        return replace(cls._read(processes.decide(lambda: write_given(home, checked)), processes), given=given)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        processes: Processes | None = None,
    ) -> LogitBank:
        """A bank that somebody pushed: recipes can be scored and searched without images and without a GPU.

        Weights are averaged, and soups measured, only where the checkpoints (and images) are on the Hub too.

        Args:
            cache_dir: where banks are cached; by default `hf_radin` in HF_HOME.
            processes: as in `open`.

        Raises:
            ValueError: if there is no such bank.
        """
        processes, home = processes or Processes(), find_home(cache_dir)

        def fetch() -> Path:
            folder = publish.fetch_bank(repo_id, home, revision=revision, token=token)
            check_bank(folder, processes.checks)
            return folder

        return cls._read(processes.decide(fetch), processes, token)

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
        refuse_given(self.ingredients, "push_to_hub of a bank", "Keep its folder (folder=...), or pass on the arrays.")
        if self.is_pilot:
            raise ValueError("A bank of a part of the split (pilot) can't be published; compute it without.")
        if not self.manifest.data.is_labelled:
            raise ValueError("A bank without labels can't be published: nobody could choose a soup with it.")
        options = PushOptions(
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or publish.COMMIT_MESSAGE,
            overwrite=True,  # logits of other checkpoints stay beside these
            repo_type="dataset",
        )
        return self.processes.decide(lambda: publish.push_bank(self.published(), repo_id, options))

    def published(self) -> publish.PublishedBank:
        """What is pushed of this bank."""
        return publish.PublishedBank(
            folder=self.folder,
            manifest=self.manifest,
            latest=self.latest,
            records=self._records,
            scores=tuple(self.score(np.eye(len(self.ingredients))).tolist()),
        )

    @property
    def _records(self) -> dict[str, LogitsRecord]:
        """The records of the ingredients' logits, by key."""
        return {key: LogitsRecord.read(self.folder, self.manifest.key, key) for key in self.ingredients.keys}

    @property
    def spent(self) -> Spent:
        """What devices took to compute the ingredients' logits."""
        return sum((Spent.on(record.seconds, record.device) for record in self._records.values()), Spent())

    @property
    def latest(self) -> Latest:
        """What `latest.json` says if this bank was computed last."""
        place = None
        if self.statistics is not None:
            images = self.statistics.images
            pixels = os.path.relpath(images.folder, self.folder)
            place = StatisticsPlace(self.statistics.record, pixels, images.size)
        return Latest(self.ingredients.keys, self.remarks, place)

    @classmethod
    def _read(cls, folder: Path, processes: Processes, token: str | bool | None = None) -> LogitBank:
        """What was last computed into a folder, whether its checkpoints are there or not."""
        manifest = BankManifest.read(folder)
        latest = Latest.read(folder, manifest.key)
        records = [LogitsRecord.read(folder, manifest.key, key) for key in latest.keys]
        usable = with_distinct_ids([record.ingredient.load() for record in records if record.finite])
        ingredients = Ingredients(
            [in_hub_cache(ingredient, token) for ingredient in usable] if manifest.origin else usable
        )
        data, run, place = manifest.data, manifest.run, latest.statistics
        source = DataSource(
            dataset=manifest.dataset or data.name,
            split=data.split,
            config_name=data.config_name,
            revision=data.revision,
            image_column=data.image_column,
            label_column=data.label_column,
            token=token,
            labelled=data.is_labelled,
            classes=manifest.classes if manifest.multi_label else (),
        )
        options = RunOptions(
            batch_size=manifest.batch_size,
            channels_last=run.channels_last,
            torch_compile=run.torch_compile,
            mixed_precision=run.mixed_precision,
            dtype=run.dtype,
            logits_dtype=run.logits_dtype,
            on_error=run.on_error,
            strangers="keep",
            cache_dir=folder.parent.parent,
        )
        statistics = None
        if place is not None:
            record = place.record
            options = replace(options, batchnorm_split=record.split, batchnorm_images=record.images)
            sampled = cache(partial(reopen_sample, folder, ingredients, source, record))
            sample = Images((folder / place.pixels).resolve(), place.size, sampled, checks=processes.checks)
            statistics = Statistics(sample, record, processes)
        opened = cache(partial(reopen_images, folder, ingredients, source))
        return cls(
            folder=folder,
            ingredients=ingredients,
            manifest=manifest,
            images=Images((folder / manifest.pixels).resolve(), manifest.block_size, opened, checks=processes.checks),
            source=source,
            options=options,
            processes=processes,
            statistics=statistics,
            remarks=latest.remarks,
            part=drawn_places(manifest.blocks, manifest.pilot),
            given=GivenModels() if any(ingredient.is_given for ingredient in ingredients) else None,
        )

    def __repr__(self) -> str:
        data = self.manifest.data
        images = f"{len(self)} images of {data.name}, split {data.split!r}"
        return f"LogitBank({len(self.ingredients)} ingredients, {images}, in {self.folder})"

    def logits(self, ingredient: int | str) -> np.memmap:
        """One ingredient's logits by position or id: float32 or float16 `(samples, classes)`, memory-mapped."""
        chosen = (
            self.ingredients.select([ingredient])[0] if isinstance(ingredient, str) else self.ingredients[ingredient]
        )
        logits: Any = open_array(logits_path(self.folder, chosen.key))
        return logits if self.is_pilot else logits[self._rows]

    @property
    def labels(self) -> np.ndarray:
        """The true class of each sample, as an index into `classes`: `(samples,)`.

        Multi-label, which classes each sample has: bool `(samples, classes)`.

        Raises:
            ValueError: if none are known (`labelled=False`).
        """
        if not self.manifest.data.is_labelled:
            raise ValueError(
                f"The labels of the split {self.split!r} of {self.manifest.data.name} are not known: its images can "
                "teach, but neither choose a soup nor prove it."
            )
        return np.asarray(open_array(self.folder / "labels.npy")[self._rows])

    @property
    def ids(self) -> np.ndarray:
        """The position of each sample in its split: `(samples,)`; skipped samples leave gaps."""
        return np.asarray(open_array(self.folder / "ids.npy")[self._rows])

    @property
    def digests(self) -> np.ndarray | None:
        """What tells the image of each sample from others: `(samples,)`; None if it was not computed."""
        if DIGESTS not in self.manifest.arrays:
            return None
        return as_digests(open_array(self.folder / DIGESTS))[self._rows]

    @property
    def contents(self) -> np.ndarray:
        """What tells images from others, copies of one image alike: `(samples,)`; positions without digests."""
        digests = self.digests
        return self.ids if digests is None else digests

    @property
    def by_content(self) -> LogitBank:
        """The same bank with its ingredients in the order of their contents: see `Ingredients.by_content`."""
        return replace(self, ingredients=self.ingredients.by_content)

    @property
    def with_exactness(self) -> LogitBank:
        """The same bank, which says whether its soups are exact: the same function as their ensembles, up to rounding.

        They are, where the ingredients differ in their heads alone, as linear probes do, and no BatchNorm statistics
        are estimated anew. Rounding is that of float32: with mixed precision, or weights or logits of 16 bits, the
        soup's head is rounded to fewer bits than ensembles are mixed in, a few predictions may be others, and soups
        are measured. Where a checkpoint is not here, or they run different code of their own, nobody knows. No image
        is shown to a model.
        """
        if self.exact is not None:
            return self
        run = self.manifest.run
        is_asked = self.given is None and self.statistics is None and len(self.ingredients) > 1
        is_asked = is_asked and is_in_full_precision(run)
        exact = is_asked and self.processes.decide(lambda: self.ingredients.are_here)
        if exact:
            exact = differ_in_heads_alone(self.ingredients, self.home, as_dtype(run.dtype), self.processes)
        exact = exact and self.processes.decide(lambda: are_averaged_in_full(self.ingredients))
        return replace(self, exact=exact)

    def knows_soup(self, recipe: Recipe) -> bool:
        """Whether logits say what the soup of a recipe predicts: that of a single model, or an exact one."""
        return recipe.is_single or bool(self.exact and recipe.pull is None)

    def with_body_of(self, recipe: Recipe) -> Recipe:
        """The recipe whose soup gives the head of a recipe's soup what this is given: where soups are exact, and so
        have one body, the first ingredient; so its features are computed once for all soups."""
        return Recipe.uniform(self.ingredients.ids[:1]) if self.exact and recipe.pull is None else recipe

    @property
    def whole(self) -> LogitBank:
        """The bank of all images of the split, whatever part this one is about."""
        return replace(self, part=None)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.manifest.classes

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes: logits say of each by itself whether it is there."""
        return self.manifest.multi_label

    @property
    def split(self) -> str:
        """The name of the split."""
        return self.manifest.data.split

    @property
    def home(self) -> Path:
        """The cache that the bank is in."""
        return self.folder.parent.parent

    @property
    def blocks(self) -> dict[Block, slice]:
        """Where each block of images has its samples."""
        ends = np.cumsum([count for *_, count in self.manifest.blocks]).tolist()
        return {
            (shard, number): slice(end - count, end)
            for (shard, number, count), end in zip(self.manifest.blocks, ends, strict=True)
        }

    def __len__(self) -> int:
        return self.samples if self.part is None else len(self.part)

    @property
    def samples(self) -> int:
        """How many images the split has, whatever part of it this bank is about."""
        return self.manifest.samples

    @property
    def places(self) -> np.ndarray:
        """Positions in the split of the images that this bank is about: `(samples,)`."""
        return np.arange(self.samples) if self.part is None else self.part

    @property
    def is_pilot(self) -> bool:
        """Whether logits were computed of a part of the split only."""
        return self.manifest.pilot is not None or self.manifest.chosen

    @property
    def is_measurable(self) -> bool:
        """Whether weights can be averaged: of given models by whoever gave them, else by their checkpoints."""
        return self.given is None or self.given.evaluate is not None

    def check_measurable(self, what: str) -> None:
        """Refuse to measure soups where nothing averages the weights of given models.

        Args:
            what: would measure them, to be named in the error.

        Raises:
            ValueError: if nothing does.
        """
        if not self.is_measurable:
            raise ValueError(
                f"{what}: nothing measures soups on the split {self.split!r}, whose bank was made of logits alone. "
                "Give it what averages weights, LogitBank.from_arrays(..., evaluate=...), or go by estimates: "
                "radin(bank, budget=0, unmeasured=True)."
            )

    @property
    def _rows(self) -> slice | np.ndarray:
        return slice(None) if self.part is None else self.part

    def passes(self) -> Passes:
        """Passes like those of the logits: a soup is compared with its ingredients under the same conditions.

        Raises:
            ValueError: if this run was started with another mixed precision.
        """
        run, accelerator = self.manifest.run, self.processes.accelerator
        if not self.processes.has_precision(run.mixed_precision):
            raise ValueError(
                f"The logits in {self.folder} were computed with mixed precision {run.mixed_precision!r}, this run "
                f"has {accelerator.mixed_precision!r}; compare a soup with its ingredients under the same precision."
            )
        dtype, size = as_dtype(run.dtype), self.manifest.batch_size
        return Passes(
            self.processes,
            Running(accelerator, dtype, size, run.channels_last, run.torch_compile, run.mixed_precision),
            run.logits_dtype,
            pixel_cache=self.options.pixel_cache,
            workers=self.options.workers,
            write_every=self.options.write_every,
            log_every=self.options.log_every,
        )

    def front(self) -> Front | None:
        """What all ingredients share, as far as it pays to cache what that gives; looked for once.

        None where pixels are not cached, where soups estimate BatchNorm statistics anew, where models are compiled or
        run different code of their own, or where a checkpoint is not here. All processes call this at the same point.
        """
        if not self._fronts:
            may_be = self.given is None and self.statistics is None and not self.manifest.run.torch_compile
            is_asked = may_be and parse_size(self.options.pixel_cache) != 0
            is_asked = is_asked and self.processes.decide(
                lambda: self.ingredients.are_here and self.ingredients.have_one_code
            )
            self._fronts.append(self._find_front() if is_asked else None)
        return self._fronts[0]

    def _find_front(self) -> Front | None:
        """As `front`, but looked for: the cut by the main process, and once for these ingredients."""
        processes, ingredients, dtype = self.processes, self.ingredients.by_content, as_dtype(self.manifest.run.dtype)
        models = load_digests(ingredients, self.home, dtype, processes)
        if not may_share(models):
            return None
        example = processes.decide(self.images.example)
        path = self.folder / "fronts" / f"{digest(ingredients.keys)}.json"
        is_new = processes.decide(lambda: not path.exists())

        def find() -> SharedFront:
            subject = f"{self.manifest.key} {path.name}"
            shared = known_record(SharedFront, path, subject)
            if shared is None and example is not None:
                shared = find_front(models, lambda: ingredients[0].load_model(as_dtype("float32")), example)
                write_sealed(path, shared, subject)
            return shared or SharedFront(None)

        shared = processes.decide(find)
        if shared.cut is None or example is None or not shared.pays(processes.device.type, dtype):
            return None
        if processes.is_main and is_new and not self.exact:
            logger.info(
                "All ingredients are the same up to %s: soups on %r run from there on.", shared.cut.module, self.split
            )
        behind = differing(models) | {*shared.cut.tensors}
        tensors = {name: value for name, value in models[0].by_name.items() if name not in behind}
        config = ingredients[0].config.to_dict()
        fields = {name: value for name, value in config.items() if name not in NOT_OF_THE_FRONT}
        key = digest(self.manifest.key, shared.cut.module, tensors, fields)
        folder = self.images.folder / f"{ACTIVATIONS}{key}"
        processes.decide(lambda: refuse_files(folder))
        with suppress(OSError):  # on a full disk nothing is cached
            processes.on_each_disk(folder.parent, lambda: FrontUsers.note(folder, ingredients))
        return Front(shared.cut, models[0], Activations(folder, processes.checks), example)

    def divided(self, share: float, seed: int) -> tuple[LogitBank, LogitBank]:
        """The bank without a random part of its images, and the bank of these.

        Copies of one image are never in both: they stay in the first.

        Raises:
            ValueError: if one of the two has no image.
        """
        number = float(share) if isinstance(share, (float, np.floating)) and 0 < share < 1 else 0.0
        count = round(number * len(self))
        if not 0 < count < len(self):
            raise ValueError(f"hold_out={share!r}: it is a share of the {len(self)} images, as in 0.2.")
        order = np.random.default_rng(seed).permutation(len(self))
        held_out, remaining = order[:count], order[count:]
        if (digests := self.digests) is not None:
            held_out, remaining = with_copies(held_out, remaining, digests)
        if len(held_out) < count:
            copies = count - len(held_out)
            logger.warning("%d of %d images have copies among the others: not held out.", copies, count)
        if not len(held_out):
            raise ValueError(f"hold_out={share!r}: all of these {count} images have copies among the others.")
        held_out, remaining = (np.sort(self.places[rows]) for rows in (held_out, remaining))
        data = replace(self.manifest.data, split=f"{self.split} (held out)")
        proving = replace(self, part=held_out, manifest=replace(self.manifest, data=data))
        return replace(self, part=remaining), proving

    def score(
        self,
        recipes: np.ndarray | Sequence[Sequence[float]] | Sequence[Recipe] | Recipe,
        metric: Any = "accuracy",
        *,
        device: str = "cpu",
    ) -> np.ndarray:
        """Exact scores of the ensembles of some recipes, `(recipes,)`; no model runs.

        Args:
            recipes: `(recipes, models)` in the order of `ingredients`, rows on the simplex; or several `Recipe`, or
                one.
            metric: as in `radin`; by default the accuracy, multi-label the share of right decisions. Metrics of
                predicted classes, and `top5_accuracy`, are computed from the classes that can win (`pruned`). For
                `cross_entropy` (or `log_loss`) and `calibration_error` all logits are read; of these less is better.
                Others are computed recipe by recipe.
            device: where logits are mixed: `cpu`, or one that torch knows. Predictions are the same.

        Raises:
            ValueError: for a metric that can't be loaded or gives several scores, or what is no recipe.
        """
        name = metric.name if isinstance(metric, Metric) else metric
        name = scoring.ALIASES.get(name, name) if isinstance(name, str) else name
        is_fast = name in scoring.METRICS and not self.is_multi_label
        (reported,) = (None,) if is_fast else self.load_metrics(metric)
        rows = ensemble.check_recipes(self._rows_of(recipes), len(self.ingredients))
        with progress_bar(total=len(rows) * len(self), desc="Scoring recipes", unit="prediction") as bar:
            if reported and self.partial is None and self.is_prunable(top := 0 if reported.needs_logits else 1):
                labels, classes = np.asarray(self.labels), len(self.classes)
                return score_recipes(reported, self.pruned(top), labels, classes, rows, bar.update)
            if reported:
                return np.array([self._score_one(row, reported, bar) for row in rows])
            if name in scoring.DENSE:
                return scoring.DENSE[name](self._all_logits(), self.labels, rows, on_block=bar.update)
            labels, classes = np.asarray(self.labels), len(self.classes)
            top = 5 if name == "top5_accuracy" else 1
            try:
                pruned = self.pruned(top)
            except pruning.TooMuchLeftError:
                parts = [
                    scoring.count_for(name, part, labels[images], classes, rows, device=device)
                    for images, part in self._pruned_parts(top)
                ]
                return scoring.made_of(name, parts, len(self))
            return scoring.score(pruned, labels, classes, rows, name, device=device, on_block=bar.update)

    def load_metrics(self, metrics: Any) -> tuple[Metric, ...]:
        """The metrics of these names, for the classes of this bank: see `named.load_metrics`."""
        return load_metrics(metrics, self.classes, of_label_sets=self.is_multi_label)

    def _score_one(self, row: np.ndarray, metric: Metric, bar: Any) -> float:
        """A reported metric of one recipe `(models,)`."""
        score = only_score(metric, self.answers(row, with_logits=metric.needs_logits))
        bar.update(len(self))
        return score

    def is_prunable(self, top: int = 1) -> bool:
        """Whether what is left of the logits without the classes that can't win may be held in memory.

        Args:
            top: as in `pruned`.
        """
        try:
            self.pruned(top)
        except pruning.TooMuchLeftError:
            return False
        return True

    def best_step(self, start: np.ndarray, end: np.ndarray) -> tuple[float, int]:
        """Where between two recipes `(models,)` most is right, exactly: see `propose.best_step`."""
        labels = np.asarray(self.labels).ravel().astype(np.int64)  # multi-label, of pairs, as `pruned` has them
        return propose.best_step(self.pruned(), labels, start, end)

    def predict(self, recipe: np.ndarray | Sequence[float]) -> np.ndarray:
        """Classes predicted by the ensemble of one recipe `(models,)`: `(samples,)`.

        Multi-label, its decisions: int8 `(samples, classes)`, 1 for classes that are there, else 0.
        """
        used = self._used(recipe)
        if self.partial and len(used) == 1 and used[0] in self.partial.singles:
            return self.partial.singles[used[0]]
        if self.is_multi_label:
            return ensemble.decide(self._all_logits(), np.asarray(recipe))
        try:
            return scoring.predict(self.pruned(), ensemble.check_recipes(np.asarray(recipe), len(self.ingredients)))[0]
        except pruning.TooMuchLeftError:
            return ensemble.predict(self._all_logits(), np.asarray(recipe))

    def predictions_of(self, logits: np.ndarray) -> np.ndarray:
        """The class of the largest logit of each image `(samples,)`, or its decisions; -1 where a logit is not finite.

        Args:
            logits: `(samples, classes)`, of any images.
        """
        if self.is_multi_label:
            return decisions_of(logits)
        return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)

    def answers(self, recipe: np.ndarray, *, with_logits: bool = False) -> Answers:
        """What the ensemble of one recipe `(models,)` predicts, with its logits if they are wanted.

        Raises:
            ValueError: if they are wanted, and not known of all images (see `knows`).
        """
        logits = None
        if with_logits:
            bank = replace(self, ingredients=self.ingredients.select(self._used(recipe)))
            logits = ensemble.mix(bank._all_logits(), np.asarray(recipe)[np.flatnonzero(recipe)])
        return Answers(self.predict(recipe), np.asarray(self.labels), len(self.classes), logits)

    def compare(self, recipe_a: Recipe | np.ndarray, recipe_b: Recipe | np.ndarray) -> Changes:
        """The images for which the ensembles of two recipes predict different classes; multi-label, the pairs of an
        image and a class that they decide differently.

        Each recipe is a `Recipe`, or weights `(models,)` in the order of `ingredients`. Margins are NaN
        where the logits of a recipe are not known of all images (see `knows`).

        Raises:
            ValueError: for what is no recipe of these ingredients, or where no labels are known.
        """
        for recipe in (recipe_a, recipe_b):
            if not isinstance(recipe, Recipe) and np.ndim(recipe) != 1:
                is_array, kind = np.ndim(recipe) > 0, type(recipe).__name__
                raise ValueError(
                    f"compare takes two recipes, each a Recipe or {len(self.ingredients)} weights, and not "
                    f"{f'an array of the shape {np.shape(recipe)}' if is_array else f'a {kind}'}. A soup is compared "
                    "by soup_changes(bank, soup)."
                )
        pair = [recipe if isinstance(recipe, Recipe) else np.atleast_2d(recipe) for recipe in (recipe_a, recipe_b)]
        rows = [ensemble.check_recipes(self._rows_of(recipe), len(self.ingredients))[0] for recipe in pair]
        predictions = np.stack([self.predict(row) for row in rows], axis=-1)
        places = np.nonzero(predictions[..., 0] != predictions[..., 1])
        margins = [self.margins(row, places) for row in rows]
        return self.changes(places, predictions[places], np.stack(margins, axis=1))

    def changes(self, places: tuple[np.ndarray, ...], predictions: np.ndarray, margins: np.ndarray) -> Changes:
        """What differs between two models on images of this bank.

        Args:
            places: of the rows, the positions of the images among those that this bank is about; multi-label, also the
                numbers of the classes.
            predictions, margins: `(rows, 2)`, as in `Changes`.

        Raises:
            ValueError: if no labels are known.
        """
        images, of_class = places[0], places[1] if self.is_multi_label else None
        return Changes(self.ids[images], self.labels[places], predictions, margins, self.classes, of_class)

    def margins(self, recipe: np.ndarray, places: tuple[np.ndarray, ...]) -> np.ndarray:
        """By how much the class that the ensemble of a recipe `(models,)` predicts is ahead, as in `Changes`.

        Args:
            places: as for `changes`.

        Returns:
            float32 `(rows,)`; NaN if the logits are not known of all images (see `knows`).
        """
        rows = len(places[0])
        margins = np.full(rows, np.nan, np.float32)
        if not self.knows(recipe):
            return margins
        used = np.flatnonzero(recipe)
        logits = [self.logits(int(position)) for position in used]
        step = max(1, ensemble.MIXED_AT_ONCE // len(self.classes))
        for start in range(0, rows, step):
            block = slice(start, start + step)
            part = tuple(numbers[block] for numbers in places)
            if self.is_multi_label:  # of each pair its logit alone
                (mixed,) = ensemble.mix([array[part][None] for array in logits], np.asarray(recipe)[used])
                margins[block] = margins_of(mixed, mixed > 0)
            else:
                mixed = ensemble.mix([array[part] for array in logits], np.asarray(recipe)[used])
                margins[block] = margins_of(mixed, mixed.argmax(axis=1))
        return margins

    def mixed(self, recipe: np.ndarray, images: np.ndarray) -> np.ndarray:
        """The logits of the ensemble of one recipe `(models,)`, to be used again and again: mixed once.

        Args:
            images: their positions among those that this bank is about.

        Returns:
            float32 `(images, classes)`, memory-mapped from a file in the bank's folder that goes with it.

        Raises:
            ValueError: if they are not known of all images (see `knows`).
        """
        if not self.knows(recipe):
            raise ValueError(UNKNOWN_LOGITS)
        used = self.ingredients.select(self._used(recipe))
        rows = images if self.is_pilot else self.places[images]
        logits = [open_array(logits_path(self.folder, key)) for key in used.keys]
        step = max(1, ensemble.MIXED_AT_ONCE // len(self.classes))
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for chunk in (rows[start : start + step] for start in range(0, len(rows), step)):
                mixed = ensemble.mix([array[chunk] for array in logits], np.asarray(recipe)[np.flatnonzero(recipe)])
                file.write(mixed.astype(np.float32).tobytes())
            file.flush()
            return np.memmap(file, np.float32, "r", shape=(len(rows), len(self.classes)))

    def soup_model(self, recipe: Recipe, *, head: LastLayers | None = None) -> PreTrainedModel:
        """The model of a recipe's soup, in evaluation mode; on a GPU averaged there, as long as there is room.

        Args:
            head: that takes the place of the averaged one.
        """
        device = self.processes.device
        # on a CPU it takes longer to load models than to average their files; a head is rounded on the CPU
        is_there = device.type == "cuda" and head is None
        resident = partial(self.residents.soup, device=device) if is_there else None
        return average_model(self.ingredients, recipe, statistics=self.statistics, head=head, resident=resident)

    def soup_path(self, recipe: Recipe, last_layers: str | None = None) -> Path:
        """Where the predictions of a recipe's soup are cached; other files of it lie beside that one.

        Args:
            last_layers: the hash of those that take the place of the averaged ones.
        """
        parts = [[ingredient.key, recipe.used[ingredient.id]] for ingredient in self.ingredients.select(recipe.used)]
        estimated = [self.statistics.record.key] if self.statistics else []
        replaced = [["head", last_layers]] if last_layers else []
        start = self.ingredients.start_of(recipe)
        pulled = [["start", start.key, recipe.pull.share]] if start and recipe.pull else []
        return self.folder / "soups" / f"{digest(parts, *estimated, *replaced, *pulled)}.npz"

    def soup_features(self, recipe: Recipe) -> SoupFeatures:
        """Where the features of a recipe's soup are cached."""
        name = self.soup_path(recipe).stem
        return SoupFeatures(self.folder / "features" / name, f"{self.manifest.key} {name}")

    def knows(self, recipe: np.ndarray) -> bool:
        """Whether the logits of all images are here of all ingredients that a recipe `(models,)` uses."""
        if self.partial is None:
            return True
        return {*self._used(recipe)} <= {*self.partial.complete} - {*self.partial.singles}

    def _used(self, recipe: np.ndarray | Sequence[float]) -> list[str]:
        """The ids of the ingredients that a recipe `(models,)` uses."""
        return [self.ingredients.ids[position] for position in np.flatnonzero(recipe)]

    def row(self, recipe: Recipe) -> np.ndarray:
        """A recipe as a row `(models,)` in the order of `ingredients`."""
        return np.array([recipe.used.get(name, 0.0) for name in self.ingredients.ids])

    def recipe(self, row: np.ndarray) -> Recipe:
        """The recipe of a row `(models,)`, of the ingredients that it uses."""
        return Recipe(tuple(self._used(row)), tuple(row[np.flatnonzero(row)].tolist()))

    def _rows_of(self, recipes: np.ndarray | Sequence[Sequence[float]] | Sequence[Recipe] | Recipe) -> np.ndarray:
        """Recipes as rows `(recipes, models)`."""
        rows = []
        for recipe in [recipes] if isinstance(recipes, Recipe) else recipes:
            if isinstance(recipe, Recipe):
                self.ingredients.select(recipe.used)  # refuses others
            rows.append(self.row(recipe) if isinstance(recipe, Recipe) else recipe)
        return np.asarray(rows)

    def _pruned_parts(self, top: int) -> Iterator[tuple[slice, pruning.Pruned]]:
        """Where too much is left to be held in memory: parts of the samples, each pruned when it is its turn."""
        step = max(1, self.most_pruned // (4 * len(self.ingredients) * len(self.classes)))
        for start in range(0, len(self), step):
            samples = slice(start, min(start + step, len(self)))
            parts = [_part(logits, samples) for logits in self._all_logits()]
            yield samples, pruning.prune(parts, top=top, most=self.most_pruned)

    def pruned(self, top: int = 1) -> pruning.Pruned:
        """Of each image the classes that can be among the best `top` under some recipe of these ingredients.

        Multi-label, of each pair of an image and a class whether recipes decide it in two ways (`Pruned.pairs`).
        With a `top` of 0 all classes are kept: probabilities depend on all.

        Made at one reading of the logits, and cached in `pruned` of the folder, in a file for each set of ingredients.
        """
        if self.partial:
            if top != 1:
                raise ValueError("After a pilot only the best class of these images is known.")
            return self.partial.pruned

        def make() -> pruning.Pruned:
            threads = min(MOST_THREADS, os.cpu_count() or 1)
            with progress_bar(total=self.samples, desc="Pruning logits", unit="image") as bar:
                if self.is_multi_label:
                    return pruning.prune_pairs(self._stored(), on_block=bar.update, most=self.most_pruned)
                return pruning.prune(
                    self._stored(), top=top, threads=threads, on_block=bar.update, most=self.most_pruned
                )

        if top not in self._pruned:
            if not top:  # these are the logits themselves: cached as they are
                self._pruned[top] = pruning.keep_all(self._all_logits(), most=self.most_pruned)
                return self._pruned[top]
            path = self.folder / "pruned" / f"{digest(self.ingredients.keys, top)}.npz"
            hashes = [record.sha256 for record in self._records.values()]
            pairs = len(self.classes) if self.is_multi_label else 0
            pruned = pruning.load_or_make(path, digest(hashes, top), make, top=top, pairs=pairs)
            self._pruned[top] = pruned if self.part is None or self.is_pilot else pruned.select(self.part)
        return self._pruned[top]

    def logit_products(self) -> np.ndarray:
        """Inner products of all pairs of ingredients by their logits, `(models, models)`: see `gaps`."""
        at_once = max(1, ensemble.MIXED_AT_ONCE // (len(self.ingredients) * len(self.classes)))
        return gaps.logit_products([self.logits(place) for place in range(len(self.ingredients))], at_once=at_once)

    def _all_logits(self) -> Sequence[ensemble.Stored | np.ndarray]:
        """Of each ingredient the logits of all images `(samples, classes)`."""
        if not self.knows(np.ones(len(self.ingredients))):
            raise ValueError(UNKNOWN_LOGITS)
        if self.part is None or self.is_pilot:
            return self._stored()
        return [self.logits(position) for position in range(len(self.ingredients))]

    def _stored(self) -> list[ensemble.Stored]:
        files = (logits_path(self.folder, key) for key in self.ingredients.keys)
        return [ensemble.Stored.of(open_array(file)) for file in files]


def _part(logits: ensemble.Stored | np.ndarray, samples: slice) -> ensemble.Stored | np.ndarray:
    """The logits of a part of the samples, read only when they are looked at."""
    return logits.part(samples) if isinstance(logits, ensemble.Stored) else logits[samples]


@dataclass(frozen=True, eq=False)
class PartialLogits:
    """What is known of a split after a pilot, where only some ingredients have logits of all images (see `pilot`).

    Args:
        unseen: positions of the images of which the other ingredients have no logits, ascending.
        complete: ids of the ingredients whose predictions are known of all images.
        pruned: the classes that can win; of the unseen images, the class that the leading ingredients agree on.
        clear: positions of a random sample of images as clear as the unseen ones, of which all have logits,
            `(clear,)`.
        right: whether what the leading ingredients agree on is right there, bool `(clear,)`.
        singles: of those in `complete` that have no logits there, the classes that they predict, `(samples,)` each.
    """

    unseen: np.ndarray
    complete: tuple[str, ...]
    pruned: Pruned
    clear: np.ndarray
    right: np.ndarray
    singles: dict[str, np.ndarray] = field(default_factory=dict)

    def estimate(self, hits: np.ndarray) -> tuple[float, tuple[float, float]]:
        """The accuracy on all images, and its 95% interval.

        Of unseen images it is known what the leading ingredients get right, and the sample says by how much that is
        too good (or not good enough).

        Args:
            hits: what is right `(samples,)`; of unseen images, what the leading ingredients agree on.
        """
        drawn, share = len(self.clear), len(self.unseen) / len(hits)
        gains = hits[self.clear].astype(int) - self.right
        value = min(1.0, max(0.0, float(hits.mean()) + share * float(gains.mean() if drawn else 0.0)))
        # a few that are equal are no certainty, as in `Strata.mean`
        uncertain = ((np.count_nonzero(gains) + 0.5) / (drawn + 1) - (gains.sum() / (drawn + 1)) ** 2) / max(1, drawn)
        variance = value * (1 - value) / len(hits) + share**2 * uncertain
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(variance)
        return value, (max(0.0, value - half), min(1.0, value + half))
