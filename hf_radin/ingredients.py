"""Find the checkpoints that somebody means, and vet them before anything large is read."""

from __future__ import annotations

import glob
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin import checkpoint
from hf_radin.access import asking_the_hub
from hf_radin.processes import progress_bar

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

# Fields of a configuration, by their beginnings, that may differ among fine-tunes of one start.
_NOT_COMPARED = (
    "_",
    "architectures",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer",
    "label2id",
    "label_names",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


@dataclass(frozen=True)
class Ingredient:
    """One fine-tuned checkpoint.

    Args:
        id: what the user called it: `org/ft-1` or `runs/ft-1`.
        revision: commit sha on the Hub; `sha256:` and the hash of its files on disk.
        folder: where its files are, or will be once `download` ran.
        labels: class names in the order of the logits.
        architecture: class name of the model.
        repo_id: the model on the Hub; None for a folder.
        stamp: sizes and times of a folder's files when `revision` was computed.
        allow_pickle: whether `.bin` weights may be read.
        trust_remote_code: whether the checkpoint's own code may run.
    """

    id: str
    revision: str
    folder: Path
    labels: tuple[str, ...]
    architecture: str
    repo_id: str | None = None
    stamp: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    token: str | bool | None = None

    def __repr__(self) -> str:  # without the token
        return f"Ingredient({self.id!r}, {self.architecture}, {len(self.labels)} classes, {self.revision[:19]})"

    @property
    def config(self) -> PretrainedConfig:
        return checkpoint.load_config(self.folder, trust_remote_code=self.trust_remote_code)

    @property
    def processor(self) -> BaseImageProcessor:
        return checkpoint.load_processor(self.folder, trust_remote_code=self.trust_remote_code)

    def download(self) -> Path:
        """The folder with the weights in it, fetched from the Hub if need be.

        Raises:
            ValueError: if a folder is no longer the checkpoint that it was, or the Hub does not give it.
        """
        if self.repo_id is None:
            # a run that still trains may write here: what is computed must not bear another checkpoint's name
            if checkpoint.stamp(self.folder, allow_pickle=self.allow_pickle) != self.stamp:
                found = checkpoint.content_hash(self.folder, allow_pickle=self.allow_pickle)
                if found != self.revision:
                    raise ValueError(
                        f"{self.id} has changed: it was {self.revision[:19]} and is {found[:19]}. Gather again."
                    )
            return self.folder
        from huggingface_hub import snapshot_download

        patterns = ["model.safetensors", "model-*-of-*.safetensors", checkpoint.WEIGHTS_INDEX, "*.json"]
        if self.allow_pickle:
            patterns += ["pytorch_model.bin", "pytorch_model-*-of-*.bin", checkpoint.PICKLE_INDEX]
        if self.trust_remote_code:
            patterns.append("*.py")
        with asking_the_hub(self.id, revision=self.revision):
            return Path(
                snapshot_download(self.repo_id, revision=self.revision, allow_patterns=patterns, token=self.token)
            )


class Ingredients(tuple[Ingredient, ...]):
    """An immutable sequence of vetted ingredients: one architecture, one set of classes, one image processor."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Ingredients(found) if isinstance(index, slice) else found

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(ingredient.id for ingredient in self)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self[0].labels

    def select(self, ids: Iterable[str]) -> Ingredients:
        """Those with these ids, in this order.

        Raises:
            ValueError: for an id that is not there.
        """
        by_id = {ingredient.id: ingredient for ingredient in self}
        try:
            return Ingredients([by_id[name] for name in ids])
        except KeyError as error:
            raise ValueError(f"No ingredient {error}; there are {', '.join(by_id)}.") from None


def gather(
    models: str | Path | Sequence[str | Path],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Ingredients:
    """Find checkpoints and vet them from their small files; no weights are downloaded.

    Args:
        models: a pattern (`runs/ft-*`, `org/ft-*`), a Hub id (`org/a`, `org/a@rev`), a folder, or a list of these.
            What is on disk goes before what is on the Hub.
        revision: branch, tag or commit for the Hub ids that name none.
        allow_pickle: read `.bin` weights where there are no safetensors.
        trust_remote_code: run code that comes with a checkpoint.

    Raises:
        ValueError: if nothing matches, fewer than two checkpoints are left, one of them lacks its configuration,
            weights or processor, or they differ in architecture, classes, sizes or preprocessing. The odd one out
            and the difference are named.
    """
    named = [models] if isinstance(models, (str, Path)) else list(models)
    found = locate(
        named, revision=revision, token=token, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    if len(found) < 2:
        raise ValueError(
            f"A soup needs at least two different checkpoints; {', '.join(map(str, named)) or 'an empty list'} gives "
            f"{found[0].id if found else 'none'}."
        )
    return found


def locate(
    models: Sequence[str | Path],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Ingredients:
    """As `gather`, for any number of checkpoints: a recipe may have a single ingredient."""
    found: dict[str, Ingredient] = {}
    places = [place for name in models for place in _expand(str(name), token)]
    with progress_bar(total=len(places), desc="Looking at checkpoints", unit="checkpoint") as bar:
        for place in places:
            ingredient = (
                _from_folder(place, allow_pickle, trust_remote_code)
                if isinstance(place, Path)
                else _from_hub(place, revision, token, allow_pickle, trust_remote_code)
            )
            bar.update()
            twin = found.setdefault(f"{ingredient.repo_id}@{ingredient.revision}", ingredient)
            if twin is not ingredient:
                logger.warning("%s is the same checkpoint as %s: kept once.", ingredient.id, twin.id)
    ingredients = Ingredients(found.values())
    if ingredients:
        _vet(ingredients)
    return ingredients


def _expand(name: str, token: str | bool | None) -> list[Path | str]:
    """The folders or Hub ids that one name stands for."""
    if name and Path(name).is_dir():
        return [Path(name)]
    if name and Path(name).exists():
        raise ValueError(f"{name} is a file; a checkpoint is a folder with {checkpoint.CONFIG} and weights.")
    if not glob.has_magic(name):
        if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip("/"):
            raise ValueError(f"There is no folder {name!r}, and it is no Hub id either (these look like 'org/name').")
        return [name]
    folders = sorted(Path(path) for path in glob.glob(name) if Path(path).is_dir())
    if folders:
        return list(folders)
    author, slash, rest = name.partition("/")
    if not slash or glob.has_magic(author) or "/" in rest:
        raise ValueError(
            f"The pattern {name!r} matches no folder, and it is no pattern for the Hub either (these name the author: "
            "'org/ft-*')."
        )
    from huggingface_hub import HfApi

    with asking_the_hub(f"The pattern {name!r}", missing=f"The pattern {name!r} matches no folder here"):
        listed = [model.id for model in HfApi().list_models(author=author, token=token)]
    matches = sorted(model for model in listed if fnmatchcase(model, name))
    if not matches:
        raise ValueError(
            f"The pattern {name!r} matches no folder here and none of the {len(listed)} models of {author!r} on the "
            "Hub that you can see. If they are private, pass a token."
        )
    return list(matches)


def _from_folder(given: Path, allow_pickle: bool, trust_remote_code: bool) -> Ingredient:
    folder = given.resolve()
    config = checkpoint.load_config(folder, trust_remote_code=trust_remote_code)
    with checkpoint.open_tensors(folder, allow_pickle=allow_pickle):
        pass  # a truncated file is found now, not after the others were read
    return Ingredient(
        id=given.as_posix(),
        stamp=checkpoint.stamp(folder, allow_pickle=allow_pickle),
        revision=checkpoint.content_hash(folder, allow_pickle=allow_pickle),
        folder=folder,
        labels=_labels(given.as_posix(), config),
        architecture=_architecture(config),
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )


def _from_hub(
    name: str, revision: str | None, token: str | bool | None, allow_pickle: bool, trust_remote_code: bool
) -> Ingredient:
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    repo_id, _, wanted = name.partition("@")
    wanted = wanted or revision or "main"
    small = [checkpoint.CONFIG, *checkpoint.PROCESSOR_FILES, "README.md"]
    if trust_remote_code:
        small.append("*.py")
    missing = f"There is no folder {repo_id!r} here and no such model on the Hub"
    with asking_the_hub(repo_id, revision=wanted, missing=missing):
        if is_offline_mode():
            folder = Path(snapshot_download(repo_id, revision=wanted, allow_patterns=small, local_files_only=True))
            files = {path.name for path in folder.iterdir()}
        else:
            info = HfApi().model_info(repo_id, revision=wanted, token=token)
            files = {file.rfilename for file in info.siblings or []}
            # by the name that the user gave, so that the cache knows it when there is no network
            folder = Path(snapshot_download(repo_id, revision=wanted, allow_patterns=small, token=token))
    if checkpoint.choose_weights(files, allow_pickle=allow_pickle) is None:
        pickles = [file for file in files if file.endswith(".bin")]
        hint = f" It has {pickles[0]}: pass allow_pickle=True to read it." if pickles else ""
        raise ValueError(f"{name}: no weights ({checkpoint.WEIGHTS} or {checkpoint.WEIGHTS_INDEX}).{hint}")
    config = checkpoint.load_config(folder, trust_remote_code=trust_remote_code)
    return Ingredient(
        id=name,
        revision=folder.name,  # snapshots are kept under their commit
        folder=folder,
        labels=_labels(name, config),
        architecture=_architecture(config),
        repo_id=repo_id,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        token=token,
    )


def _labels(name: str, config: PretrainedConfig) -> tuple[str, ...]:
    id2label = config.id2label if isinstance(config.id2label, dict) else {}
    if sorted(id2label) != list(range(len(id2label))) or len(id2label) < 2:
        raise ValueError(
            f"{name}: id2label has the keys {sorted(id2label)[:5]}; a classifier numbers two or more classes from 0."
        )
    labels = tuple(str(id2label[index]) for index in range(len(id2label)))
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{name}: {count} classes of id2label are called {label!r}; names must tell classes apart.")
    return labels


def _architecture(config: PretrainedConfig) -> str:
    named = config.architectures
    return str(named[0]) if isinstance(named, list) and named else str(config.model_type)


def _vet(ingredients: Ingredients) -> None:
    """Refuse ingredients that can't be averaged, or that the same images can't be shown to.

    What most of them agree on is taken to be right, so that the error names the odd one out.
    """
    _agree("architecture", {one.id: one.architecture for one in ingredients})
    _agree("number of classes", {one.id: len(one.labels) for one in ingredients})
    for index in range(len(ingredients.labels)):
        _agree(f"name of class {index}", {one.id: one.labels[index] for one in ingredients})
    configs = {one.id: _compared(one.config) for one in ingredients}
    for field in sorted(set.intersection(*(set(fields) for fields in configs.values()))):
        _agree(f"configuration's {field}", {model: fields[field] for model, fields in configs.items()})
    shapes = {one.id: _shapes(one) for one in ingredients}
    for name in sorted(set().union(*shapes.values())):
        _agree(f"shape of {name}", {model: found.get(name, "absent") for model, found in shapes.items()})
    processors = {one.id: _flatten(one.processor.to_dict()) for one in ingredients}
    for field in sorted(set().union(*processors.values()) - {"image_processor_type", "processor_class"}):
        _agree(f"image processor's {field}", {model: found.get(field) for model, found in processors.items()})


def _agree(what: str, values: dict[str, Any]) -> None:
    """Raise a ValueError that names the first model whose value is not the common one."""
    common = Counter(map(repr, values.values())).most_common(1)[0][0]
    odd = next((model for model, value in values.items() if repr(value) != common), None)
    if odd is not None:
        other = next(model for model, value in values.items() if repr(value) == common)
        raise ValueError(
            f"{odd} differs from {other} in {what}: {values[odd]!r} against {common}. Leave it out, or gather "
            "checkpoints of one architecture, one set of classes and one image processor."
        )


def _compared(config: PretrainedConfig) -> dict[str, Any]:
    """What of a configuration decides about the model's outputs: neither names, nor bookkeeping, nor training."""
    fields = _flatten(config.to_dict())
    return {
        name: value
        for name, value in fields.items()
        if not any(part.startswith(_NOT_COMPARED) or "drop" in part for part in name.split("."))
    }


def _shapes(ingredient: Ingredient) -> dict[str, tuple[int, ...]]:
    """Shapes by module name, from the configuration alone: file names of tensors differ between versions."""
    model = checkpoint.empty_model(ingredient.folder, trust_remote_code=ingredient.trust_remote_code)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
