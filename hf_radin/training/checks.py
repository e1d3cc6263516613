"""What is checked before a training begins whose checkpoints shall make a soup."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.lora import USUAL_ADAPTER, read_base
from hf_radin.checkpoints.model import check_task, is_multi_label, load_model
from hf_radin.images.digests import refuse_shared_splits
from hf_radin.images.split import DataSource, Split, open_split
from hf_radin.ingredients.labels import check_first_label, match_labels, read_labels
from hf_radin.runtime.processes import Processes
from hf_radin.search.radin import check_options
from hf_radin.training.options import SoupOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainerState, TrainingArguments

# What a soup is made with after a training that this can't follow.
AFTERWARDS = "make the soup afterwards: hf-radin soup --models {} --checkpoint all"

# How models are spread over processes where no process has all weights.
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


@dataclass(frozen=True)
class Training:
    """What a Trainer tells its callbacks of a training.

    Args:
        args, state: of the Trainer.
        model: that is trained, without what wraps it for several processes.
        processor: the Trainer's `processing_class`.
    """

    args: TrainingArguments
    state: TrainerState
    model: Any
    processor: Any = None


def check_training(training: Training, options: SoupOptions, processes: Processes) -> None:
    """Refuse, before the first step, what would end in no soup.

    Raises:
        ValueError: if too few checkpoints are saved, they are no image classifiers with image processors, the options
            can't be used, or the evaluation set has no images or other labels.
    """
    _check_saves(training, processes)
    config = _check_model(training, options)
    if options.has_processor:
        processes.decide(options.check_processor)
    elif not _is_image_processor(training.processor):
        raise ValueError(
            "SoupCallback: checkpoints need their image processor, and the Trainer has "
            f"{type(training.processor).__name__ if training.processor else 'none'}: pass it to the Trainer as "
            "processing_class, or name one with SoupCallback(..., image_processor=...)."
        )
    labels, multi_label = read_labels("The model", config), is_multi_label(config)
    check_options(labels, is_multi_label=multi_label, **options.search)
    _check_data(options, labels, processes, multi_label=multi_label)


def is_adapted(model: Any) -> bool:
    """Whether peft has given a model an adapter."""
    return hasattr(model, "get_base_model")


def saved_config(model: Any) -> PretrainedConfig:
    """The configuration that an adapted model would be saved with; peft saves none."""
    config = copy.deepcopy(model.get_base_model().config)
    config.architectures = [type(model.get_base_model()).__name__]
    return config


def check_resumed(model: Any, checkpoint: Path, *, trust_remote_code: bool) -> None:
    """Refuse a resumed training whose model has not the weights of the checkpoint that it was resumed from.

    Where names on disk differ from those in the model, as those of a ViT do, the Trainer of transformers 5.24 warns of
    missing keys and leaves the weights as they were. Adapters are not compared.

    Raises:
        ValueError: if a tensor differs.
    """
    if is_adapted(model) or not checkpoint.is_dir():
        return
    saved = load_model(checkpoint, dtype=model.dtype, trust_remote_code=trust_remote_code).state_dict()
    weights = model.state_dict()
    differing = [name for name in saved.keys() & weights.keys() if not saved[name].equal(weights[name].cpu())]
    if differing:
        raise ValueError(
            f"The training was resumed from {checkpoint}, and {len(differing)} of {len(weights)} tensors of the model "
            f"are not those saved there, {min(differing)} among them: the Trainer did not load them. Give it the "
            f"model of the checkpoint (from_pretrained({str(checkpoint)!r})), and resume with that."
        )


def _check_saves(training: Training, processes: Processes) -> None:
    """Refuse a training that saves fewer than two whole checkpoints."""
    args, state = training.args, training.state
    if state.is_hyper_param_search:
        raise ValueError(
            "SoupCallback: each trial of a hyperparameter search has a folder of its own: "
            + AFTERWARDS.format(f"'{args.output_dir}/run-*'")
            + "."
        )
    kind = processes.accelerator.distributed_type.value
    if kind in SHARDED:
        raise ValueError(
            f"SoupCallback: with {kind} no process has all weights; save whole ones, and "
            + AFTERWARDS.format(args.output_dir)
            + "."
        )
    if args.save_strategy == "no":
        raise ValueError(
            "SoupCallback: save_strategy='no' saves no checkpoints to make a soup of: save 'epoch' or 'steps'."
        )
    saves, what = 2, ""
    if args.save_strategy == "steps":
        saves, what = math.ceil(state.max_steps / max(1, state.save_steps or 1)), f"save_steps={state.save_steps}"
    elif args.save_strategy == "epoch":  # of these the state has those that `max_steps` makes, too
        saves, what = state.num_train_epochs, f"num_train_epochs={state.num_train_epochs}"
    if saves < 2:
        raise ValueError(
            f"SoupCallback: {what} of {state.max_steps} steps save {saves} checkpoint, and a soup needs two at least: "
            "save more often (save_strategy='steps', save_steps)."
        )


def _check_model(training: Training, options: SoupOptions) -> PretrainedConfig:
    """The configuration of the model, which is an image classifier of transformers."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    model = training.model
    if is_adapted(model):
        model = model.get_base_model()
        if options.decay is not None:
            raise ValueError(
                f"SoupCallback(decay={options.decay}): averages of an adapter's factors make no average of the "
                "models: leave decay out."
            )
        _check_adapter(training.model)
    values = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    known = {name for names in values for name in ([names] if isinstance(names, str) else names)}
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or (name not in known and not options.trusts_code):
        raise ValueError(
            f"SoupCallback: the Trainer trains a {name}, and soups are made of transformers' image classifiers "
            "(AutoModelForImageClassification)."
        )
    config = copy.copy(model.config)
    if isinstance(config.id2label, dict):  # transformers' own script numbers classes with text until they are saved
        config.id2label = {
            int(number) if str(number).isdecimal() else number: label for number, label in config.id2label.items()
        }
    check_task("The model", config)
    return config


def _check_adapter(model: Any) -> None:
    """Refuse an adapter of which no soup can be made.

    Raises:
        ValueError: if peft saves it elsewhere than in the checkpoint's folder, or it can't be merged into its base.
    """
    if (names := [*model.peft_config]) != [USUAL_ADAPTER]:
        raise ValueError(
            f"SoupCallback: the model has the adapters {', '.join(names)}, and soups are made of one that is called "
            f"{USUAL_ADAPTER!r}."
        )
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config[USUAL_ADAPTER].save_pretrained(folder)
        try:
            read_base(Path(folder))
        except ValueError as error:
            raise ValueError(str(error).replace(folder, "SoupCallback: the model")) from error


def _is_image_processor(processor: Any) -> bool:
    from transformers.image_processing_utils import BaseImageProcessor

    return isinstance(getattr(processor, "image_processor", processor), BaseImageProcessor)


def _check_data(options: SoupOptions, labels: tuple[str, ...], processes: Processes, *, multi_label: bool) -> None:
    """Refuse an evaluation set, or a split that proves or teaches, without images or with other labels."""
    source = replace(options.source, classes=labels if multi_label else ())
    split = _checked(source, labels, multi_label=multi_label)
    for name in options.other_splits:
        if name == split.split or not isinstance(options.dataset, (str, Path, Mapping)):
            raise ValueError(
                f"SoupCallback: the split {split.split!r} chooses the soup, and {name!r} has to be another one: give "
                "all splits as a dictionary (a DatasetDict), the one that chooses as split=..."
            )
        other = _checked(source.at(name), labels, multi_label=multi_label)
        if other.is_here and split.is_here and not options.allows_overlap:
            processes.decide(partial(refuse_shared_splits, other, split, options.home))


def _checked(source: DataSource, labels: tuple[str, ...], *, multi_label: bool) -> Split:
    """A split whose labels the model knows."""
    try:
        split = open_split(source)
        to_class: Callable[[Any], int] = match_labels(split, labels, multi_label=multi_label)
        if split.is_here:
            check_first_label(split, to_class)
    except ValueError as error:
        raise ValueError(
            f"SoupCallback(dataset=...): {str(error).rstrip('.')}. It takes the evaluation set with its images, as it "
            "was before they were turned into tensors; a transform (with_transform, set_transform) may stay."
        ) from error
    return split
