"""The model of a checkpoint: its configuration, image processor and task, and whether the weights fill it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.fields import TENSORS, check_config, check_processor, few_tensors, shared_fields
from hf_radin.checkpoints.files import (
    CONFIG,
    FLOATS,
    INTEGERS,
    PROCESSOR_FILES,
    Header,
    load_tensors,
    read_fields,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

# Arguments of timm's `create_model` that make it read files.
_TIMM_LOADS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}

# Fields for what a model returns beside its logits, with the defaults that are run and saved: attention maps are there
# to be looked at, and a configuration that asks for them can't be saved (transformers#30978, #38288).
OUTPUT_FIELDS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}

# The class of each model that was built, by its configuration's class and fields.
_CLASSES: dict[tuple[type, str], type[PreTrainedModel]] = {}

# What to do about an image processor that can't be used.
_ANOTHER_PROCESSOR = (
    "Save the one it was trained with beside it, or name one with image_processor=... (--image-processor ID)."
)

# Architectures that transformers lists as image classifiers, but that have no classes.
_NO_CLASSIFIERS = {"shieldgemma2": "it answers a prompt about a policy, yes or no, and has no classes of its own"}


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a checkpoint's configuration.

    Raises:
        ValueError: if there is none, transformers does not understand it, or its weights are quantised.
    """
    from transformers import AutoConfig

    try:
        fields = read_fields(folder / CONFIG)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {CONFIG}; a checkpoint as `save_pretrained` writes it has one.") from error
    check_config(folder / CONFIG, fields)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each configuration has its own checks
        raise ValueError(f"{folder}: {CONFIG} can't be used: {_first_line(error)}") from error
    loads = sorted(_TIMM_LOADS & set(getattr(config, "model_args", None) or ()))
    if config.model_type == "timm_wrapper" and (loads or ":" in str(config.architecture)):
        # timm would read these files, pickles among them, as soon as the model is built
        raise ValueError(
            f"{folder}: {CONFIG} makes timm load other files ({', '.join(loads) or config.architecture})."
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder}: its weights are quantised, which can't be averaged. Dequantise them first.")
    for name, default in OUTPUT_FIELDS.items():
        if getattr(config, name, default) != default:
            setattr(config, name, default)
    return config


def shared_config(configs: Sequence[PretrainedConfig]) -> PretrainedConfig:
    """The configuration of an average: the fields that all of these share, and the defaults of the class for others.

    The configurations describe the same function; where they differ, they describe their runs.
    """
    if len(configs) == 1:
        return configs[0]
    config = type(configs[0]).from_dict(shared_fields([config.to_dict() for config in configs]))
    config.name_or_path = configs[0].name_or_path  # where code of its own is
    return config


def check_saves(folder: Path, config: PretrainedConfig, processor: BaseImageProcessor) -> None:
    """Check that a soup of a checkpoint could be saved: some files that load can't be written (transformers#41250).

    Raises:
        ValueError: if it couldn't.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for part, name in ((config, CONFIG), (processor, PROCESSOR_FILES[0])):
            try:
                with quiet_transformers():
                    copy.deepcopy(part).save_pretrained(temporary)
            except Exception as error:  # each class has its own checks
                raise ValueError(
                    f"{folder}: {name} loads and can't be saved, and so no soup of it could be: {_first_line(error)} "
                    f"Correct {name}."
                ) from error


def is_multi_label(config: PretrainedConfig) -> bool:
    """Whether a classifier says of each class by itself whether an image has it."""
    return getattr(config, "problem_type", None) == "multi_label_classification"


def task_of(config: PretrainedConfig) -> str:
    """The task of a classifier in words, as a pipeline understands its `problem_type`.

    Without one, more than one class means a single label for each image (transformers#28433, #38219).
    """
    problem_type = getattr(config, "problem_type", None)
    if is_multi_label(config):
        return "multi-label classification"
    return "regression" if problem_type == "regression" or config.num_labels == 1 else "single-label classification"


def check_task(name: str, config: PretrainedConfig) -> None:
    """Refuse a model that chooses no classes for an image: neither one nor, multi-label, any number of them.

    Args:
        name: of the checkpoint, for the error.

    Raises:
        ValueError: for regression, which a single output is too, unless it is multi-label.
    """
    if (task := task_of(config)) == "regression":
        says = f"problem_type {config.problem_type!r}" if config.problem_type else f"{config.num_labels} output"
        raise ValueError(
            f"{name}: it is made for {task} (its {CONFIG} says {says}), and soups are made here of classifiers. If it "
            "is one, correct its problem_type: 'single_label_classification', or 'multi_label_classification' where "
            "the sigmoid of each output is the probability of a class, be there only one."
        )


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> BaseImageProcessor:
    """Read a checkpoint's image processor, with the backend that transformers chooses here.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoImageProcessor

    for path in [folder / name for name in PROCESSOR_FILES if (folder / name).exists()]:
        check_processor(path, read_fields(path, way_out=_ANOTHER_PROCESSOR))
    try:
        with quiet_transformers():
            return AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ValueError(
            f"{folder}: no usable image processor ({PROCESSOR_FILES[0]}); save the one it was trained with beside it, "
            f"or name one with image_processor=... (--image-processor ID). transformers says: {_first_line(error)}"
        ) from error


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a configuration describes, without memory for weights: its class, names and shapes.

    Raises:
        ValueError: if the configuration is not that of an image classifier.
    """
    return _build(config, "meta", trust_remote_code)


def model_class(config: PretrainedConfig, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class of the model that a configuration describes. Errors as of `empty_model`.

    To build a model for that takes as long as to fill it: of equal configurations it is done once, but for code that
    comes with a checkpoint, which may be another each time.
    """
    if trust_remote_code:
        return type(empty_model(config, trust_remote_code=True))
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    key = type(config), json.dumps(fields, sort_keys=True, default=str)
    if key not in _CLASSES:
        _CLASSES[key] = type(empty_model(config))
    return _CLASSES[key]


def random_model(
    config: PretrainedConfig, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that a configuration describes, with random weights on the CPU and in evaluation mode.

    It takes as much time and memory as a trained one; its logits mean nothing.

    Args:
        dtype: of the weights; by default that of the configuration.

    Raises:
        ValueError: as `empty_model` does.
    """
    import torch

    with torch.random.fork_rng(devices=[]):  # the user's random numbers stay the same
        return _build(config, "cpu", trust_remote_code, **({} if dtype is None else {"dtype": dtype})).eval()


def _build(config: PretrainedConfig, device: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForImageClassification

    try:
        if config.model_type in _NO_CLASSIFIERS:
            raise ValueError(_NO_CLASSIFIERS[config.model_type])
        with torch.device(device), quiet_transformers(), few_tensors():
            # LeViT notes in a configuration what it built from it, and the same one may describe other models
            described = copy.deepcopy(config)
            return AutoModelForImageClassification.from_config(
                described, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # each architecture has its own errors for a configuration that it can't build
        raise ValueError(
            f"{CONFIG} (model type {config.model_type!r}, architectures {config.architectures}) makes no image "
            f"classifier: {_first_line(error)}{_class_hint(config)}"
        ) from error


def _class_hint(config: PretrainedConfig) -> str:
    """A hint for an architecture that has several classes, if the configuration names none of them; else empty."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type, "")
    named = config.architectures if isinstance(config.architectures, list) else []
    if isinstance(classes, str) or set(named) & set(classes):
        return ""
    return f". Its `architectures` has to name one of {', '.join(classes)}."


def _first_line(error: Exception) -> str:
    """The first line of an error, with the second one if the first only announces it."""
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def class_axes(config: PretrainedConfig, *, trust_remote_code: bool = False) -> dict[str, int]:
    """The names of tensors that have an entry for each class, and the axis of these entries.

    These are the tensors that have another shape if there is one class more, whatever an architecture calls its heads.
    """
    enlarged_config = copy.deepcopy(config)
    enlarged_config.num_labels = config.num_labels + 1
    tensors = empty_model(config, trust_remote_code=trust_remote_code).state_dict()
    enlarged = empty_model(enlarged_config, trust_remote_code=trust_remote_code).state_dict()
    return {
        name: next(axis for axis, size in enumerate(tensor.shape) if size != enlarged[name].shape[axis])
        for name, tensor in tensors.items()
        if tensor.shape != enlarged[name].shape
    }


def check_header(
    where: Path | str,
    config: PretrainedConfig,
    header: Header,
    *,
    given: Collection[str] = (),
    trust_remote_code: bool = False,
    way_out: str = "",
) -> tuple[PreTrainedModel, list[str]]:
    """Check that weights fill the model of a configuration, by their names, shapes and dtypes.

    transformers itself loads tensors without memory, and so renames keys in its own way (transformers#41693).

    Args:
        where: the checkpoint, for the error.
        given: names of the model's tensors that come from elsewhere, such as an adapter's head.
        way_out: what to do about a tensor that is missing or has another shape, in place of the usual hint.

    Returns:
        The model, without memory for weights, and the names of tensors that it does not use.

    Raises:
        ValueError: if a tensor is missing, has another shape, or is of a dtype that can't be averaged.
    """
    import torch

    if len(header) > TENSORS:
        raise ValueError(f"{where}: it has {len(header):,} tensors, and no image classifier more than {TENSORS:,}.")
    for name, (dtype, shape) in header.items():
        if dtype not in FLOATS + INTEGERS:
            raise ValueError(
                f"{where}: {name} {shape} is kept in {dtype}; weights are averaged from {', '.join(FLOATS)}."
            )
    tensors = {
        name: torch.empty(shape, dtype=torch_dtype(dtype) if dtype in FLOATS else torch.int64, device="meta")
        for name, (dtype, shape) in header.items()
    }
    with torch.device("meta"):
        model, report = _fill(where, config, torch.float32, trust_remote_code, tensors, device_map="meta")
    _refuse_gaps(where, report, given, way_out or _saved_as(config))
    # Names on disk may differ from the model's but for their last part. transformers silently ignores tensors that the
    # model no longer has, such as the tables of indices of earlier versions (transformers#45437).
    last_parts = {name.rpartition(".")[2]: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    for name, (dtype, shape) in header.items():
        if dtype in INTEGERS and last_parts.get(name.rpartition(".")[2]) and name not in report["unexpected_keys"]:
            raise ValueError(
                f"{where}: {name} {shape} is kept in {dtype}; weights are averaged from {', '.join(FLOATS)}."
            )
    return model, sorted(report["unexpected_keys"])


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    config: PretrainedConfig | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    tensors: dict[str, torch.Tensor] | None = None,
    given: Collection[str] = (),
    way_out: str = "",
) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode on the CPU.

    Args:
        config: in place of the checkpoint's.
        tensors: in place of the checkpoint's, under the names that its files use.
        given: names of the model's tensors that come from elsewhere later.
        way_out: as in `check_header`.

    Raises:
        ValueError: if a weight is missing or has another shape: transformers would fill it with random numbers and
            only warn (transformers#28122).
    """
    config = config or load_config(folder, trust_remote_code=trust_remote_code)
    if tensors is None:  # transformers' choice of files differs between its versions
        tensors = load_tensors(folder, allow_pickle=allow_pickle)
    model, report = _fill(folder, config, dtype, trust_remote_code, tensors)
    _refuse_gaps(folder, report, given, way_out or _saved_as(config))
    return model.eval()


def _fill(
    where: Path | str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    tensors: dict[str, torch.Tensor],
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with its weights, and transformers' report of the tensors that did not fit."""
    filled_class = model_class(config, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers():
            # by default transformers takes the dtype from the file (transformers#42883); tensors that don't fit are in
            # the report, by name
            return filled_class.from_pretrained(
                pretrained_model_name_or_path=None,
                state_dict=tensors,
                **options,
                config=copy.deepcopy(config),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except Exception as error:  # whatever the loader raises, the user must hear which checkpoint it was
        raise ValueError(f"{where}: the weights can't be loaded: {_first_line(error)}") from error


def _refuse_gaps(where: Path | str, report: dict[str, Any], given: Collection[str], way_out: str) -> None:
    absent = [name for name in sorted(report["missing_keys"]) if name not in given]
    absent += [
        f"{name} (it has {tuple(has)} for {tuple(needs)})"
        for name, has, needs in sorted(report["mismatched_keys"])
        if name not in given
    ]
    if absent:
        raise ValueError(
            f"{where}: no weights for {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''}; "
            f"transformers would fill them with random numbers. {way_out}"
        )


def _saved_as(config: PretrainedConfig) -> str:
    """A hint about weights that are not those of an image classifier, by the architecture in the configuration."""
    architectures = config.architectures if isinstance(config.architectures, list) else []
    others = [name for name in architectures if not str(name).endswith("ForImageClassification")]
    if others:
        return f"It was saved as {others[0]}, which is no image classifier: fine-tune it as one first."
    return "Is this a fine-tuned image classifier?"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports while models load: what matters in them is raised as an error."""
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
