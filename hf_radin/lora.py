"""LoRA adapters: a base model and what was trained beside it, merged into ordinary weights by peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoint import ADAPTER_CONFIG, CONFIG, Header
from hf_radin.modeling import check_header, class_axes, empty_model, load_config, load_model, quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# How peft begins the names of an adapter's tensors.
PREFIX = "base_model.model."


def read_base(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision.

    Raises:
        ValueError: if the adapter is no LoRA adapter, or peft is not installed.
    """
    try:
        fields = json.loads((folder / ADAPTER_CONFIG).read_text(), parse_constant=_refuse)
        kind, base = fields["peft_type"], fields["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} can't be used: {error!r}") from error
    if kind != "LORA":
        raise ValueError(f"{folder}: an adapter of the kind {kind!r}; those that can be merged here are 'LORA'.")
    if fields.get("megatron_config"):  # peft would import whatever module the adapter names
        raise ValueError(f"{folder}: an adapter for Megatron layers, which no image classifier here has.")
    revision = fields.get("revision")
    if not isinstance(base, str) or not base or "\0" in base or not isinstance(revision, (str, type(None))):
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path).")
    if find_spec("peft") is None:  # before anything is downloaded for it
        raise ValueError(f"{folder} is a LoRA adapter: install hf_radin[peft] to merge it.")
    return base, revision


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number to scale weights by")


def load_adapter_config(
    folder: Path, base: Path, header: Header, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of the merged model: the base's, with the classes of the head that the adapter brings.

    An adapter's folder does not name classes unless a `config.json` was put there; a head of its own that has as many
    classes as the base has theirs, and any other placeholders.
    """
    config = load_config(folder if (folder / CONFIG).is_file() else base, trust_remote_code=trust_remote_code)
    for name, axis in class_axes(config, trust_remote_code=trust_remote_code).items():
        _, shape = header.get(PREFIX + name, ("", ()))
        if len(shape) > axis:
            if shape[axis] != config.num_labels:
                config.num_labels = shape[axis]  # renames the classes LABEL_0, LABEL_1, ...
            break
    return config


def check_adapter(
    where: str,
    folder: Path,
    config: PretrainedConfig,
    header: Header,
    base_header: Header,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """As `check_header`, for a base and an adapter: together they fill the model, and the adapter fits the base.

    Returns:
        The merged model, without memory for weights.

    Raises:
        ValueError: if they don't.
    """
    merged, _ = check_header(where, config, base_header, given=_brought(header), trust_remote_code=trust_remote_code)
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = empty_model(config, trust_remote_code=trust_remote_code)
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            options = LoraConfig.from_pretrained(str(folder))
            options.init_lora_weights = False  # what they began with, some from the base's own numbers, is of no use
            adapted = get_peft_model(model, options)
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:  # layers that are not there, options of another version
        raise ValueError(f"{where}: the adapter does not fit its base model: {error}") from error
    odd = sorted(
        name
        for name in expected.keys() | header.keys()
        if name not in expected or name not in header or tuple(expected[name].shape) != header[name][1]
    )
    if odd:
        needs = tuple(expected[odd[0]].shape) if odd[0] in expected else "nothing"
        has = header[odd[0]][1] if odd[0] in header else "nothing"
        raise ValueError(
            f"{where}: the adapter does not fit its base model: {odd[0]} has {has} for {needs}"
            f"{f', and {len(odd) - 1} more' if len(odd) > 1 else ''}. Was it trained on another base, or with another "
            "version of transformers?"
        )
    return merged


def load_merged(
    folder: Path,
    base: Path,
    *,
    dtype: torch.dtype,
    config: PretrainedConfig,
    header: Header,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base with the adapter merged into it, in evaluation mode on the CPU: an ordinary model."""
    from peft import PeftModel

    options: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    model = load_model(base, dtype=dtype, config=config, given=_brought(header), **options)
    with warnings.catch_warnings(), quiet_transformers(), _blaming(folder):
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, str(folder)).to(dtype).merge_and_unload()
    plain = empty_model(config, trust_remote_code=trust_remote_code)
    trained = {name: one.requires_grad for name, one in plain.named_parameters()}
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(trained[name])  # peft has frozen the base
    return merged.eval()


@contextmanager
def _blaming(folder: Path) -> Iterator[None]:
    """Whatever peft raises is about the adapter."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{folder}: the adapter can't be merged: {' '.join(str(error).split())}") from error


def _brought(header: Header) -> set[str]:
    """The model's own tensors that an adapter has whole, as modules_to_save: the head, most often."""
    return {name.removeprefix(PREFIX) for name in header if ".lora_" not in name}
