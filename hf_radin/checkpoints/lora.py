"""LoRA adapters: a base model and what was trained beside it, merged into ordinary weights by peft."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hf_radin.checkpoints.earlier_names import earlier_names, renamed
from hf_radin.checkpoints.files import ADAPTER, ADAPTER_CONFIG, CONFIG, Header, read_header
from hf_radin.checkpoints.model import (
    check_header,
    class_axes,
    empty_model,
    load_config,
    load_model,
    quiet_transformers,
)

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

# How peft begins the names of an adapter's tensors.
PREFIX = "base_model.model."

# What `init_lora_weights` says of adapters that began beside the base as it is.
_BESIDE = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}

# And of those for which peft takes a part out of the base, and again whenever they are loaded (peft#1626). All that
# this takes is the base; for a "pissa_niter_4" also chance.
_OUT_OF_BASE = re.compile(r"pissa|pissa_niter_\d{1,3}|(?i:olora)")


def read_base(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision.

    Raises:
        ValueError: if the adapter is no LoRA adapter, or one that can't be loaded as it was trained, or peft is not
            installed.
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
    beginning = str(fields.get("init_lora_weights"))
    if beginning.lower() not in _BESIDE and not _OUT_OF_BASE.fullmatch(beginning):
        raise ValueError(
            f"{folder}: an adapter that began as {beginning!r} (init_lora_weights): peft then changes the base by "
            "more than the adapter has, so that it can't be loaded as it was trained. Merge it where it was trained "
            "(merge_and_unload) and save the whole model, or, if it has no modules_to_save, which are lost by it, "
            "convert it to plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
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
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """As `check_header`, for a base and an adapter: together they fill the model, and the adapter fits the base.

    Returns:
        The merged model, without memory for weights, and what should be known of how the adapter is read, in
        sentences that begin with its name.

    Raises:
        ValueError: if they don't.
    """
    from peft import get_peft_model_state_dict

    model = empty_model(config, trust_remote_code=trust_remote_code)
    with _blaming(where, "does not fit its base model"):
        fitted = _fit(folder, model, header)
    given = {name.removeprefix(PREFIX) for name in _whole(fitted.names.values())}
    merged, _ = check_header(where, config, base_header, given=given, trust_remote_code=trust_remote_code)
    named = {fitted.names[name]: shape for name, (_, shape) in header.items()}
    beginning, fitted.options.init_lora_weights = fitted.options.init_lora_weights, False  # there are no numbers here
    with _blaming(where, "does not fit its base model"):  # layers that are not there, options of another version
        expected = get_peft_model_state_dict(_inject(model, fitted.options), save_embedding_layers=False)
    odd = sorted(
        name
        for name in expected.keys() | named.keys()
        if name not in expected or name not in named or tuple(expected[name].shape) != named[name]
    )
    if odd:
        needs = tuple(expected[odd[0]].shape) if odd[0] in expected else "nothing"
        has = named.get(odd[0], "nothing")
        raise ValueError(
            f"{where}: the adapter does not fit its base model: {odd[0]} has {has} for {needs}"
            f"{f', and {len(odd) - 1} more' if len(odd) > 1 else ''}. Was it trained on another base, or with another "
            "version of transformers?"
        )
    notes = []
    if fitted.is_renamed:
        notes.append(f"names layers as earlier versions of transformers did; they are {_ends(model, named)} here.")
    if "niter" in str(beginning):
        notes.append(
            f"began as {beginning}: what was taken out of its base was drawn at random, and peft draws it anew at "
            "each load. The exact decomposition stands in for it here, so that the model is not quite the one that "
            "was trained. Merged where it was trained (merge_and_unload) it would be."
        )
    return merged, tuple(notes)


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
    """The base with the adapter merged into it, in evaluation mode on the CPU: an ordinary model.

    It is merged in float32, or float64 where one of the two is kept so, and then rounded to `dtype`: one model,
    however precisely it is wanted.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    plain = empty_model(config, trust_remote_code=trust_remote_code)
    with _blaming(folder, "can't be merged"):
        fitted = _fit(folder, plain, header)
    kinds = {kind for kind, _ in (*header.values(), *read_header(base, allow_pickle=allow_pickle).values())}
    beginning = str(fitted.options.init_lora_weights)
    is_out_of_base = bool(_OUT_OF_BASE.fullmatch(beginning))
    if not is_out_of_base:
        fitted.options.init_lora_weights = False
    elif "niter" in beginning:  # the exact one is nearer to the draw in training than another draw is
        fitted.options.init_lora_weights = "pissa"
    exact = torch.float64 if "F64" in kinds and not is_out_of_base else torch.float32  # peft has no PiSSA of float64
    model = load_model(
        base,
        dtype=exact,
        config=config,
        given={name.removeprefix(PREFIX) for name in _whole(fitted.names.values())},
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    tensors = {fitted.names[name]: tensor for name, tensor in load_file(folder / ADAPTER).items()}
    with (
        _blaming(folder, "can't be merged"),
        torch.random.fork_rng(devices=[]),
    ):  # numbers that are drawn are overwritten
        adapted = _inject(model, fitted.options)
        set_peft_model_state_dict(adapted, tensors)
        merged = adapted.merge_and_unload().to(dtype)
    trained = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(trained[name])  # peft has frozen the base
    return merged.eval()


@dataclass(frozen=True)
class _Fitted:
    """An adapter in the names of the model that it is for.

    Args:
        options: its configuration.
        names: of its tensors as peft calls them here, by what they are called in its file.
    """

    options: LoraConfig
    names: dict[str, str]

    @property
    def is_renamed(self) -> bool:
        return any(name != now for name, now in self.names.items())


def _fit(folder: Path, model: PreTrainedModel, header: Header) -> _Fitted:
    """An adapter in the names of a model, which may have been others when it was trained.

    Raises:
        ValueError: if it names layers that the model neither has nor had.
    """
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = LoraConfig.from_pretrained(str(folder))
    layers = {name: _layer(name) for name in header}
    modules = {name for name, _ in model.named_modules()}
    if modules.issuperset(layers.values()):
        return _Fitted(options, {name: name for name in header})
    earlier = earlier_names(model)
    now = {_layer(PREFIX + name): _layer(PREFIX + new) for name, new in earlier.items() if name.endswith(".weight")}
    names = {
        name: f"{PREFIX}{earlier[whole]}"
        if (whole := name.removeprefix(PREFIX)) in earlier
        else f"{PREFIX}{now[layer]}{name.removeprefix(PREFIX + layer)}"
        for name, layer in layers.items()
        if name.removeprefix(PREFIX) in earlier or layer in now
    }
    if lost := sorted(header.keys() - names.keys()):
        import transformers

        raise ValueError(
            f"it has {lost[0]}, and {type(model).__name__} has no such layer in transformers "
            f"{transformers.__version__}, nor one that was called so; its layers are {_ends(model)}. Merge it into "
            "its base with the versions of transformers and peft that it was trained with (merge_and_unload), and "
            "save the whole model."
        )
    for name, value in renamed(options, earlier).items():
        setattr(options, name, value)
    return _Fitted(options, names)


def _layer(name: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    name = name.removeprefix(PREFIX)
    module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
    return re.sub(r"\.(base_layer|modules_to_save|original_module)$", "", module)  # of biases that were trained, too


def _ends(model: PreTrainedModel, names: Iterable[str] | None = None) -> str:
    """What the linear and convolutional layers of a model are called, at the end of their names.

    Args:
        names: of an adapter's tensors; only their layers.
    """
    import torch

    wanted = None if names is None else {_layer(name) for name in names if ".lora_" in name}
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    ends = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if (isinstance(module, kinds) if wanted is None else name in wanted)
    }
    return ", ".join(sorted(ends))


def _inject(model: PreTrainedModel, options: LoraConfig) -> PeftModel:
    from peft import get_peft_model

    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        return get_peft_model(model, options)


@contextmanager
def _blaming(where: str | Path, what: str) -> Iterator[None]:
    """Whatever peft raises is about the adapter."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: the adapter {what}: {' '.join(str(error).split())}") from error


def _whole(names: Iterable[str]) -> set[str]:
    """Of an adapter's tensors the model's own that it has whole, as modules_to_save: the head, most often."""
    return {name for name in names if ".lora_" not in name}
