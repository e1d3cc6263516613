"""One checkpoint's files: configuration, processor, tensors, hash; and the model that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

CONFIG = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def choose_weights(files: set[str], *, allow_pickle: bool = False) -> str | None:
    """The file that holds, or indexes, the weights among a checkpoint's files; None if there is none to be used."""
    names = (WEIGHTS, WEIGHTS_INDEX) + ((PICKLE, PICKLE_INDEX) if allow_pickle else ())
    return next((name for name in names if name in files), None)


def weight_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The files that hold a checkpoint's tensors, in order of name.

    Raises:
        ValueError: if there are none, or an index names a file that is not there.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    entry = choose_weights(present, allow_pickle=allow_pickle)
    if entry is None:
        found = ", ".join(
            sorted(name for name in present if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")))
        )
        hint = f" It has {found}: only safetensors are read, unless you pass allow_pickle=True." if found else ""
        raise ValueError(f"{folder}: no weights ({WEIGHTS} or {WEIGHTS_INDEX}).{hint}")
    if not entry.endswith(".index.json"):
        return [folder / entry]
    try:
        shards = sorted(set(json.loads((folder / entry).read_text())["weight_map"].values()))
        missing = [name for name in shards if Path(name).name != name or name not in present]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / entry}: not an index of shards ({error!r}).") from error
    if missing:
        raise ValueError(f"{folder}: {entry} names {missing[0]!r}, which is not in the folder.")
    return [folder / name for name in shards]


def _files(folder: Path, allow_pickle: bool) -> list[Path]:
    """What makes a checkpoint: configuration, processor and weights."""
    small = [folder / name for name in (CONFIG, *PROCESSOR_FILES) if (folder / name).is_file()]
    return small + weight_files(folder, allow_pickle=allow_pickle)


def stamp(folder: Path, *, allow_pickle: bool = False) -> str:
    """Names, sizes and times of a checkpoint's files: while it stays the same, so does the content."""
    files = [(path.name, path.stat()) for path in _files(folder, allow_pickle)]
    return hashlib.sha256(
        repr([(name, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in files]).encode()
    ).hexdigest()


def content_hash(folder: Path, *, allow_pickle: bool = False) -> str:
    """`sha256:` and the digest of configuration, processor and weights: what makes two folders the same checkpoint."""
    digest = hashlib.sha256()
    for path in _files(folder, allow_pickle):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def open_tensors(folder: Path, *, allow_pickle: bool = False) -> Iterator[dict[str, Callable[[], torch.Tensor]]]:
    """For each tensor, by its name on disk, a function that reads it: nothing is read before it is called.

    Raises:
        ValueError: if a file is truncated or not what its name says.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    readers: dict[str, Callable[[], torch.Tensor]] = {}
    with ExitStack() as stack:
        for path in weight_files(folder, allow_pickle=allow_pickle):
            try:
                if path.suffix == ".safetensors":
                    file = stack.enter_context(safe_open(path, framework="pt"))
                    names = file.keys()  # the file itself can't be iterated over
                    readers.update({name: partial(file.get_tensor, name) for name in names})
                else:
                    pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    readers.update({name: partial(pickled.__getitem__, name) for name in pickled})
            except (SafetensorError, OSError, RuntimeError, UnpicklingError) as error:
                raise ValueError(f"{path}: not a whole file of weights ({error}).") from error
        yield readers


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype, from itself or its name.

    Raises:
        ValueError: if weights are not kept in it.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found not in known.values():
        raise ValueError(f"dtype={dtype!r}: it is {', '.join(known)}.")
    return found


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a checkpoint's configuration.

    Raises:
        ValueError: if there is none, or it is none that transformers understands.
    """
    from transformers import AutoConfig

    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no {CONFIG}; a checkpoint as `save_pretrained` writes it has one.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration checks itself, each in its own way
        raise ValueError(f"{folder}: {CONFIG} can't be used: {error}") from error


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> BaseImageProcessor:
    """Read a checkpoint's image processor, in the backend that transformers chooses here.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoImageProcessor

    try:
        with quiet_transformers():
            return AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ValueError(
            f"{folder}: no usable image processor ({PROCESSOR_FILES[0]}); save the one it was trained with beside it. "
            f"transformers says: {error}"
        ) from error


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a checkpoint's configuration describes, without memory for weights: its class, names and shapes.

    Raises:
        ValueError: if the configuration is none of an image classifier.
    """
    import torch
    from transformers import AutoModelForImageClassification

    config = load_config(folder, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"), quiet_transformers():
            return AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture fails in its own way on a configuration that it can't build
        raise ValueError(
            f"{folder}: {CONFIG} (model type {config.model_type!r}, architectures {config.architectures}) makes no "
            f"image classifier: {error}"
        ) from error


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    tensors: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode on the CPU.

    `tensors`, under the names that the checkpoint's files use, take the place of the checkpoint's own.

    Raises:
        ValueError: if a weight is missing or has another shape: transformers would fill it with random numbers and
            only warn (transformers#28122).
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model_class = type(empty_model(folder, trust_remote_code=trust_remote_code))
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "use_safetensors": not allow_pickle or None}
    if tensors is not None:
        source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
    try:
        with quiet_transformers():
            # transformers takes the dtype from the file unless told (transformers#42883); what does not fit is in the
            # report, where it has a name
            model, report = model_class.from_pretrained(
                **source,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except (
        Exception
    ) as error:  # whatever a bad file makes the loader raise, the user must hear which checkpoint it was
        raise ValueError(f"{folder}: the weights can't be loaded: {error}") from error
    absent = sorted(report["missing_keys"])
    absent += [f"{name} (it has {tuple(has)} for {tuple(needs)})" for name, has, needs in report["mismatched_keys"]]
    if absent:
        raise ValueError(
            f"{folder}: no weights for {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''}; "
            "transformers would fill them with random numbers. Is this a fine-tuned image classifier?"
        )
    return model.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report for each of many loads: what matters of it is raised as an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
