"""What soups are made of: checkpoints, each with its place, its version and the names of its classes."""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints import lora
from hf_radin.checkpoints import model as modeling
from hf_radin.checkpoints.files import (
    CONFIG,
    PROCESSOR_FILES,
    choose_weights,
    content_hash,
    file_hashes,
    files_stamp,
    read_header,
    read_index,
    weight_files,
    without_weights,
)
from hf_radin.recipes.recipe import Recipe
from hf_radin.runtime.files import digest, sha256_of_each
from hf_radin.runtime.hub_errors import asking_the_hub

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

Version = tuple[str | None, str, str | None]

# What the revision of an ingredient begins with that is no checkpoint: its logits are all that is known of it.
GIVEN = "logits:"


@dataclass(frozen=True)
class Ingredient:
    """One fine-tuned checkpoint.

    Args:
        id: what the user called it: `org/ft-1` or `runs/ft-1`.
        revision: commit sha on the Hub; `sha256:` and the hash of its files on disk.
        folder: where its files are, or will be after `download`.
        labels: class names, in the order of its logits here. The checkpoint may have further classes.
        architecture: class name of the model.
        repo_id: the model on the Hub; None for a folder.
        subfolder: inside the repository.
        stamp: sizes and times of a folder's files when `revision` was computed.
        order: for each of `labels` the number of the class in the checkpoint; None if all are the same.
        left_out: how many classes of the checkpoint are not among `labels`.
        multi_label: whether it says of each class by itself whether an image has it.
        base: the model that a LoRA adapter is merged into.
        image_processor: the one that the user named in place of the checkpoint's own, with its revision.
        processor_folder: where that is.
        allow_pickle: whether `.bin` weights may be read.
        trust_remote_code: whether the checkpoint's own code may run.
        token: for the Hub.
        size: bytes of its weights when it was vetted; 0 for an ingredient of a bank, which does not record it.
        content: a hash of all that decides about its weights, whatever its name and place: equal contents make equal
            models. Empty if the Hub does not know it.
    """

    id: str
    revision: str
    folder: Path
    labels: tuple[str, ...]
    architecture: str
    repo_id: str | None = None
    subfolder: str = ""
    stamp: str | None = None
    order: tuple[int, ...] | None = None
    left_out: int = 0
    multi_label: bool = False
    base: Ingredient | None = None
    image_processor: str | None = None
    processor_folder: Path | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    token: str | bool | None = None
    size: int = field(default=0, compare=False)
    content: str = field(default="", compare=False)

    def __repr__(self) -> str:  # without the token
        return f"Ingredient({self.id!r}, {self.architecture}, {len(self.labels)} classes, {self.revision[:19]})"

    @property
    def key(self) -> str:
        """A short name of this very version: equal keys mean equal weights."""
        parts = [self.repo_id, self.subfolder, self.revision, self.base.key if self.base else None]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    @property
    def version(self) -> Version:
        """What makes two ingredients the same, wherever they are: their files, and those of an adapter's base."""
        return self.subfolder or None, self.revision, self.base.revision if self.base else None

    @property
    def config(self) -> PretrainedConfig:
        """The checkpoint's configuration, with `labels` for its classes."""
        folder = self.folder
        if self.base and not (folder / CONFIG).is_file():
            folder = self.base.folder
        config = modeling.load_config(folder, trust_remote_code=self.trust_remote_code)
        config.num_labels = len(self.labels)  # of some architectures a field of its own
        config.id2label = dict(enumerate(self.labels))
        # made anew: some scripts write the numbers as text
        config.label2id = {name: index for index, name in config.id2label.items()}
        if hasattr(config, "label_names"):  # timm's own, which are saved in place of these
            config.label_names = list(self.labels)
        return config

    @property
    def processor(self) -> BaseImageProcessor:
        """The image processor: the one that the user named, or the checkpoint's, or its base model's."""
        folder = self.processor_folder or self.folder
        if self.base and not any((folder / name).is_file() for name in PROCESSOR_FILES):
            folder = self.base.folder
        return modeling.load_processor(folder, trust_remote_code=self.trust_remote_code)

    @property
    def code(self) -> str:
        """A hash of the code that comes with it, which its model may run; empty if that is not trusted."""
        if not self.trust_remote_code:
            return ""
        folders = [checkpoint.folder for checkpoint in (self, self.base) if checkpoint]
        paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
        return digest([path.name for path in paths], sha256_of_each(paths))

    @property
    def is_given(self) -> bool:
        """Whether it is a model from elsewhere, of which logits were given and no checkpoint."""
        return self.revision.startswith(GIVEN)

    @property
    def is_here(self) -> bool:
        """Whether its weights are on this machine."""
        try:
            return bool(weight_files(self.folder, allow_pickle=self.allow_pickle))
        except ValueError:
            return False

    @property
    def is_away(self) -> bool:
        """Whether it is a folder that this machine does not have, as in a bank that was made on another one."""
        return self.repo_id is None and not self.folder.is_dir()

    def download(self) -> Path:
        """Download the weights from the Hub if they are not here.

        Returns:
            The folder with the weights.

        Raises:
            ValueError: if a folder's checkpoint has changed, the Hub does not give it, or there is none.
        """
        refuse_given([self], "A model in memory or on disk")
        if self.base is not None:
            self.base.download()
        if self.repo_id is None:
            if self.is_away:
                raise ValueError(
                    f"{self.id} is not here: there is no folder {self.folder}. Without it recipes can be searched "
                    "with budget=0, unmeasured=True (--budget 0 --unmeasured), and be cooked where it is: "
                    "`hf-radin average --recipe recipe.json`."
                )
            # a run that still trains may write here, and results must not be filed under another checkpoint
            if files_stamp(self.folder, allow_pickle=self.allow_pickle) != self.stamp:
                revision = content_hash(file_hashes(self.folder, allow_pickle=self.allow_pickle))
                if revision != self.revision:
                    raise ValueError(
                        f"{self.id} has changed: it was {self.revision[:19]} and is {revision[:19]}. Gather again."
                    )
            return self.folder
        folder = self._fetch(["*.json", *(["*.py"] if self.trust_remote_code else [])])
        if not self._has_weights(folder):
            self._fetch(self._weight_names(folder))
        return folder

    def load_model(self, dtype: torch.dtype, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """Its model on the CPU, the weights in `dtype`, with the classes `labels` in this order.

        Args:
            config: in place of the ingredient's own; it must make the same function.

        Raises:
            ValueError: if a weight is missing or has the wrong shape, or the checkpoint has not these classes.
        """
        folder = self.download()
        config = self.config if config is None else config
        options = {"dtype": dtype, **self._reading(config)}
        if self.base is None:
            model = modeling.load_model(folder, **options)
        else:
            model = lora.load_merged(folder, self.base.folder, header=read_header(folder), **options)
        if self.order is None:
            return model
        return _select_classes(model, config, self.order, trust_remote_code=self.trust_remote_code)

    def load_factors(self) -> dict[str, lora.Factors]:
        """What it adds to the weights of its base, by the names of layers; empty if it is no adapter.

        Raises:
            ValueError: if it is no plain LoRA (see `checkpoints.lora.check_plain`).
        """
        if self.base is None:
            return {}
        folder = self.download()
        return lora.load_factors(folder, self.base.folder, header=read_header(folder), **self._reading(self.config))

    def check_plain(self) -> None:
        """Raises a ValueError if it is an adapter and no plain LoRA (see `checkpoints.lora.check_plain`)."""
        if self.base is not None:
            header, trust = read_header(self.folder), self.trust_remote_code
            lora.check_plain(self.id, self.folder, self._stored_config(self.config), header, trust_remote_code=trust)

    def _reading(self, config: PretrainedConfig) -> dict[str, Any]:
        """How its weights are read; the configuration is of its model with the classes `labels`."""
        return {
            "config": self._stored_config(config),
            "allow_pickle": self.allow_pickle,
            "trust_remote_code": self.trust_remote_code,
        }

    def _stored_config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration for the weights as they are stored, of that for the classes `labels`."""
        return config if self.order is None else self._with_all_classes(config)

    def _with_all_classes(self, config: PretrainedConfig) -> PretrainedConfig:
        """A configuration with as many classes as the checkpoint has.

        Raises:
            ValueError: if `order` does not name classes of the checkpoint.
        """
        trust = self.trust_remote_code
        if self.base is None:
            stored = modeling.load_config(self.folder, trust_remote_code=trust)
        else:
            header = read_header(self.folder)
            stored = lora.load_adapter_config(self.folder, self.base.folder, header, trust_remote_code=trust)
        count = len(self.labels) + self.left_out
        if stored.num_labels != count or not is_selection(self.order, len(self.labels), self.left_out):
            raise ValueError(
                f"{self.id} has {stored.num_labels} classes, and its order {str(self.order)[:100]} is of "
                f"{len(self.labels)} of {count}: gather it again, or take the recipe as it was written."
            )
        config = copy.deepcopy(config)
        config.num_labels = count
        return config

    def _has_weights(self, folder: Path) -> bool:
        """Whether its folder in the cache has the files that hold its weights on the Hub."""
        from huggingface_hub import is_offline_mode

        try:
            files = weight_files(folder, allow_pickle=self.allow_pickle)
        except ValueError:
            return False
        # a pickle may lie here while the Hub also has safetensors, which take precedence
        return is_offline_mode() or all(path.suffix == ".safetensors" for path in files)

    def _fetch(self, names: list[str]) -> Path:
        """Download files of the checkpoint by names or patterns; returns its folder in the cache."""
        from huggingface_hub import snapshot_download

        inside = f"{glob.escape(self.subfolder)}/" if self.subfolder else ""
        with asking_the_hub(self.id, revision=self.revision):
            snapshot = snapshot_download(
                self.repo_id or "",
                revision=self.revision,
                allow_patterns=[f"{inside}{name}" for name in names],
                token=self.token,
            )
        return Path(snapshot) / self.subfolder

    def _weight_names(self, folder: Path) -> list[str]:
        """Names of the files on the Hub that hold its weights, by the rule that also holds for folders.

        Args:
            folder: with its small files, among them the index of shards.
        """
        from huggingface_hub import HfApi

        inside = f"{self.subfolder}/" if self.subfolder else ""
        with asking_the_hub(self.id, revision=self.revision):
            listed = HfApi(token=self.token).list_repo_files(self.repo_id or "", revision=self.revision)
        files = {path.removeprefix(inside) for path in listed if path.startswith(inside)}
        entry = choose_weights(files, allow_pickle=self.allow_pickle)
        if entry is None:
            raise ValueError(f"{self.id}: {without_weights(files)}")
        names = read_index(folder / entry) if entry.endswith(".index.json") else [entry]
        return [glob.escape(name) for name in names]


class Ingredients(tuple[Ingredient, ...]):
    """An immutable sequence of vetted ingredients: one architecture, one set of classes, one image processor.

    Args:
        start: what recipes may pull the body of a soup to (see `find_start`), which is no ingredient: it has no head
            for these classes, and so no logits. All that is selected from these ingredients has it, too.
    """

    start: Ingredient | None

    def __new__(cls, ingredients: Iterable[Ingredient] = (), *, start: Ingredient | None = None) -> Ingredients:
        made = super().__new__(cls, ingredients)
        made.start = start
        return made

    def __getitem__(self, index: Any) -> Any:
        selection = super().__getitem__(index)
        return Ingredients(selection, start=self.start) if isinstance(index, slice) else selection

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(ingredient.id for ingredient in self)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(ingredient.key for ingredient in self)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self[0].labels

    @property
    def multi_label(self) -> bool:
        """Whether all say of each class by itself whether an image has it; else an image has one class."""
        return any(ingredient.multi_label for ingredient in self)

    @property
    def by_content(self) -> Ingredients:
        """The same ingredients in the order of their contents, so that nothing depends on how a user names them."""
        ordered = sorted(self, key=lambda ingredient: (ingredient.content, ingredient.key))
        return Ingredients(ordered, start=self.start)

    @property
    def processor(self) -> BaseImageProcessor:
        """The image processor of all: the others make the same pixels."""
        return self.by_content[0].processor

    @property
    def are_here(self) -> bool:
        """Whether the weights of all are on this machine, and so are those that adapters are merged into."""
        return all(checkpoint.is_here for entry in self for checkpoint in (entry, entry.base) if checkpoint)

    @property
    def have_one_code(self) -> bool:
        """Whether all run the same code, so that equal weights make equal models."""
        return len({ingredient.code for ingredient in self}) == 1

    def select(self, ids: Iterable[str]) -> Ingredients:
        """The ingredients with these ids, in this order.

        Raises:
            ValueError: if no ingredient has an id.
        """
        by_id = {ingredient.id: ingredient for ingredient in self}
        try:
            return Ingredients([by_id[name] for name in ids], start=self.start)
        except KeyError as error:
            raise ValueError(f"No ingredient {error}; there are {', '.join(by_id)}.") from None

    @property
    def checkpoints(self) -> tuple[Ingredient, ...]:
        """All that weights of a soup may come from: the ingredients, and their start if there is one."""
        return (*self, self.start) if self.start else tuple(self)

    def start_of(self, recipe: Recipe) -> Ingredient | None:
        """The start that a recipe pulls the body of its soup to; None if it pulls it nowhere.

        Raises:
            ValueError: if these ingredients have no such start.
        """
        if recipe.pull is None:
            return None
        if self.start is None or self.start.id != recipe.pull.start:
            raise ValueError(
                f"The recipe pulls its soup to the start {recipe.pull.start!r}, and these ingredients have "
                f"{self.start.id if self.start else 'none'}: name it with start=... (--start ID)."
            )
        return self.start


@dataclass(frozen=True)
class IngredientRecord:
    """What a bank says of an ingredient: all of `Ingredient` but what only a user may allow, and the token."""

    id: str
    revision: str
    folder: str
    labels: tuple[str, ...]
    architecture: str
    repo_id: str | None = None
    subfolder: str = ""
    stamp: str | None = None
    order: tuple[int, ...] | None = None
    left_out: int = 0
    multi_label: bool = False
    base: IngredientRecord | None = None
    image_processor: str | None = None
    processor_folder: str | None = None
    content: str = ""

    @classmethod
    def of(cls, ingredient: Ingredient) -> IngredientRecord:
        """The record of an ingredient."""
        values = {field.name: getattr(ingredient, field.name) for field in fields(cls)}
        values["folder"] = str(ingredient.folder)
        values["processor_folder"] = ingredient.processor_folder and str(ingredient.processor_folder)
        values["base"] = ingredient.base and cls.of(ingredient.base)
        return cls(**values)

    @property
    def is_there(self) -> bool:
        """Whether its files are where they were; those of a folder of a user's untouched, by their sizes and times."""
        folder = Path(self.folder)
        if self.repo_id is not None:  # commits stay as they are
            return folder.is_dir()
        try:
            return any(files_stamp(folder, allow_pickle=allowed) == self.stamp for allowed in (False, True))
        except (ValueError, OSError):
            return False

    def load(self) -> Ingredient:
        """The ingredient. A bank never allows pickles or remote code: only the user does."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["folder"] = Path(self.folder)
        values["processor_folder"] = self.processor_folder and Path(self.processor_folder)
        values["base"] = self.base and self.base.load()
        return Ingredient(**values)


def is_available(ingredient: Ingredient) -> bool:
    """Whether the checkpoint of a bank's ingredient can still be used: the Hub keeps commits, but folders change."""
    if ingredient.repo_id is not None or ingredient.is_given:
        return True
    try:
        ingredient.download()
    except (ValueError, OSError) as error:
        logger.warning("%s is left out of the bank: %s", ingredient.id, error)
        return False
    return True


def refuse_given(ingredients: Iterable[Ingredient], what: str, way_out: str = "") -> None:
    """Refuse what takes checkpoints where one of the ingredients is none.

    Args:
        what: takes them, to be named in the error.
        way_out: in place of the usual sentence that says what to do.

    Raises:
        ValueError: if logits are all that is known of one.
    """
    for ingredient in ingredients:
        if ingredient.is_given:
            raise ValueError(
                f"{what} takes checkpoints of transformers, and of {ingredient.id!r} logits are all that is known "
                f"(LogitBank.from_arrays). {way_out or 'Average the weights yourself, by soup.recipe.'}"
            )


def in_hub_cache(ingredient: Ingredient, token: str | bool | None) -> Ingredient:
    """An ingredient of a bank from the Hub, with the folder that its files have, or will have, in the user's cache."""
    if ingredient.repo_id is None:
        return ingredient
    folder = _snapshots(ingredient.repo_id) / ingredient.revision / ingredient.subfolder
    base = ingredient.base and in_hub_cache(ingredient.base, token)
    return replace(ingredient, folder=folder, base=base, token=token)


def with_distinct_ids(ingredients: list[Ingredient]) -> list[Ingredient]:
    """The same ingredients; the revision is added to ids that several have."""
    counts = Counter(ingredient.id for ingredient in ingredients)

    def distinct(ingredient: Ingredient) -> Ingredient:
        if counts[ingredient.id] == 1:
            return ingredient
        return replace(ingredient, id=f"{ingredient.id}@{ingredient.revision[:19]}")

    return [distinct(ingredient) for ingredient in ingredients]


def is_cached(repo_id: str) -> bool:
    """Whether a model of this name was once downloaded from the Hub to this machine; what is no id never was."""
    try:
        snapshots = _snapshots(repo_id)
    except ValueError:  # people write all kinds of names into cards
        return False
    return snapshots.is_dir() and any(snapshots.iterdir())


def _snapshots(repo_id: str) -> Path:
    """The folder where huggingface_hub keeps the versions of a model."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots"


def is_selection(order: Sequence[int] | None, classes: int, left_out: int) -> bool:
    """Whether an order names so many classes of a checkpoint, each once, and leaves out so many."""
    if order is None:
        return left_out == 0
    return len(order) == len(set(order)) == classes and min(order) >= 0 and max(order) < classes + left_out


def _select_classes(
    model: PreTrainedModel, config: PretrainedConfig, order: Sequence[int], *, trust_remote_code: bool
) -> PreTrainedModel:
    """A model with some of its classes, or all, in another order: in the weights of its heads and so in its logits.

    Args:
        config: of the model with these classes.
        order: for each of them its number in the model that there is.
    """
    import torch

    axes = modeling.class_axes(config, trust_remote_code=trust_remote_code)
    tensors = {
        name: tensor.index_select(axes[name], torch.tensor(order)) if name in axes else tensor
        for name, tensor in model.state_dict().items()
    }
    if len(order) < model.config.num_labels:
        model = modeling.random_model(copy.deepcopy(config), dtype=model.dtype, trust_remote_code=trust_remote_code)
    model.load_state_dict(tensors)
    return model
