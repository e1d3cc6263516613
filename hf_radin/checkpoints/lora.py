"""LoRA adapters, which peft merges into the weights of their base model: the result is an ordinary model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.checkpoints.earlier_names import earlier_names, renamed_fields
from hf_radin.checkpoints.fields import check_adapter_config
from hf_radin.checkpoints.files import ADAPTER, ADAPTER_CONFIG, CONFIG, SAVED_AGAIN, Header, read_fields, read_header
from hf_radin.checkpoints.model import (
    check_header,
    class_axes,
    empty_model,
    load_config,
    load_model,
    quiet_transformers,
)
from hf_radin.runtime.files import BrokenFileError
from hf_radin.runtime.schema import read_record
from hf_radin.runtime.text import one_line

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PretrainedConfig, PreTrainedModel

# The prefix that peft gives to the names of an adapter's tensors.
PREFIX = "base_model.model."

# Values of `init_lora_weights` for adapters that began beside an unchanged base.
_UNCHANGED_BASE = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}

# Values for adapters that began as a part of the base, which peft subtracts from the base at each load (peft#1626).
# That part is computed from the base alone, but for "pissa_niter_4" at random.
_PART_OF_BASE = re.compile(r"pissa|pissa_niter_\d{1,3}|(?i:olora)")

# Fields of a configuration that make something else of an adapter than two matrices for each layer.
NOT_PLAIN = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config", "arrow_config"),
    *("monteclora_config", "layer_replication", "trainable_token_indices", "target_parameters"),
)

# What peft calls the adapter of a model that has one; it saves others into folders of their names.
USUAL_ADAPTER = "default"

# What peft puts into the names of tensors that an adapter replaces.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.|$)")


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter's configuration says of its base, and of how it began beside it."""

    peft_type: str
    base_model_name_or_path: str | None
    revision: str | None = None
    init_lora_weights: Any = None
    megatron_config: Any = None


@dataclass(frozen=True, eq=False)
class Factors:
    """What an adapter adds to the weight of a layer: the product `up @ down`, in float64, scale included.

    Args:
        down: `(rank, inputs)`; of a convolution, inputs times the positions of its kernel.
        up: `(outputs, rank)`.
        is_transposed: whether the layer stores its weight the other way round, `(inputs, outputs)`.
    """

    down: torch.Tensor
    up: torch.Tensor
    is_transposed: bool = False

    @property
    def rank(self) -> int:
        """How many products of a column and a row are added up."""
        return len(self.down)

    def of_shape(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The product in the shape of the layer's weight."""
        product = self.up @ self.down
        return (product.T if self.is_transposed else product).reshape(shape)


def read_base(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision.

    Raises:
        ValueError: if the adapter is no LoRA adapter or can't be loaded as it was trained, or peft is not installed.
    """
    try:
        adapter = read_record(AdapterBase, folder / ADAPTER_CONFIG, way_out=SAVED_AGAIN)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {ADAPTER_CONFIG}.") from error
    if adapter.peft_type != "LORA":
        raise ValueError(
            f"{folder}: an adapter of the kind {adapter.peft_type!r}; those that can be merged here are 'LORA'."
        )
    if adapter.megatron_config:  # peft would import whatever module the adapter names
        raise ValueError(f"{folder}: an adapter for Megatron layers, which no image classifier here has.")
    beginning = str(adapter.init_lora_weights)
    if beginning.lower() not in _UNCHANGED_BASE and not _PART_OF_BASE.fullmatch(beginning):
        raise ValueError(
            f"{folder}: an adapter that began as {beginning!r} (init_lora_weights): peft then changes the base by "
            "more than the adapter has, so that it can't be loaded as it was trained. Merge it where it was trained "
            "(merge_and_unload) and save the whole model, or, if it has no modules_to_save, which are lost by it, "
            "convert it to plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    base = adapter.base_model_name_or_path
    if not base or not base.isprintable():
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path).")
    if find_spec("peft") is None:  # before anything is downloaded for it
        raise ValueError(f"{folder} is a LoRA adapter: install hf_radin[peft] to merge it.")
    return base, adapter.revision


def load_adapter_config(
    folder: Path, base: Path, header: Header, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of the merged model: that of the base, with the classes of the adapter's head if it has one.

    An adapter's folder does not name classes unless somebody put a `config.json` there. A head with as many classes as
    the base has the names of the base's classes, any other one has placeholders.
    """
    config = load_config(folder if (folder / CONFIG).is_file() else base, trust_remote_code=trust_remote_code)
    for name, axis in class_axes(config, trust_remote_code=trust_remote_code).items():
        _, shape = header.get(PREFIX + name, ("", ()))
        if len(shape) > axis:
            if shape[axis] != config.num_labels:
                config.num_labels = shape[axis]  # which names the classes LABEL_0, LABEL_1, ...
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
    """Check that a base and an adapter fill the model together, and that the adapter fits the base (`check_header`).

    Returns:
        The merged model, without memory for weights, and notes on how the adapter is read: sentences whose subject is
        the adapter.

    Raises:
        ValueError: if they don't.
    """
    from peft import get_peft_model_state_dict

    model = empty_model(config, trust_remote_code=trust_remote_code)
    with _blaming(where, "does not fit its base model"):
        fitted = _fit(folder, model, header)
    given = {name.removeprefix(PREFIX) for name in _whole_tensors(fitted.names.values())}
    merged, _ = check_header(where, config, base_header, given=given, trust_remote_code=trust_remote_code)
    named = {fitted.names[name]: shape for name, (_, shape) in header.items()}
    beginning, fitted.options.init_lora_weights = fitted.options.init_lora_weights, False  # tensors without memory
    # it may name layers that don't exist, or options of another version
    with _blaming(where, "does not fit its base model"):
        expected = get_peft_model_state_dict(_inject(model, fitted.options), save_embedding_layers=False)
    misfits = sorted(
        name
        for name in expected.keys() | named.keys()
        if name not in expected or name not in named or tuple(expected[name].shape) != named[name]
    )
    if misfits:
        needs = tuple(expected[misfits[0]].shape) if misfits[0] in expected else "nothing"
        has = named.get(misfits[0], "nothing")
        raise ValueError(
            f"{where}: the adapter does not fit its base model: {misfits[0]} has {has} for {needs}"
            f"{f', and {len(misfits) - 1} more' if len(misfits) > 1 else ''}. Was it trained on another base, or with "
            "another version of transformers?"
        )
    notes = []
    if fitted.is_renamed:
        notes.append(
            f"names layers as earlier versions of transformers did; they are {_layer_names(model, named)} here."
        )
    if "niter" in str(beginning):
        notes.append(
            f"began as {beginning}: what was taken out of its base was drawn at random, and peft draws it anew at "
            "each load. Here the exact decomposition takes its place, so that the model is not quite the one that was "
            "trained. To get that one, merge the adapter where it was trained (merge_and_unload)."
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

    They are merged in float32, or in float64 if one of the two is stored so, and rounded to `dtype` afterwards: the
    model is the same for all dtypes, but for the rounding.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    plain = empty_model(config, trust_remote_code=trust_remote_code)
    with _blaming(folder, "can't be merged"):
        fitted = _fit(folder, plain, header)
    dtypes = {stored for stored, _ in (*header.values(), *read_header(base, allow_pickle=allow_pickle).values())}
    is_part_of_base = _begin_again(fitted.options)
    # peft has no PiSSA in float64
    exact = torch.float64 if "F64" in dtypes and not is_part_of_base else torch.float32
    model = load_model(
        base,
        dtype=exact,
        config=config,
        given={name.removeprefix(PREFIX) for name in _whole_tensors(fitted.names.values())},
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    tensors = {fitted.names[name]: tensor for name, tensor in load_file(folder / ADAPTER).items()}
    # peft draws random numbers, which are overwritten
    with _blaming(folder, "can't be merged"), torch.random.fork_rng(devices=[]):
        adapted = _inject(model, fitted.options)
        set_peft_model_state_dict(adapted, tensors)
        merged = adapted.merge_and_unload().to(dtype)
    trained = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(trained[name])  # peft has frozen the base
    return merged.eval()


def check_plain(
    where: str, folder: Path, config: PretrainedConfig, header: Header, *, trust_remote_code: bool = False
) -> None:
    """Check that an adapter adds a product of two matrices to the weight of each of its layers.

    Sums of such adapters are such an adapter, of a higher rank.

    Raises:
        ValueError: if it is another kind: DoRA, say, or for an embedding.
    """
    model = empty_model(config, trust_remote_code=trust_remote_code)
    with _blaming(where, "can't be read"):
        fitted = _fit(folder, model, header)
    fitted.options.init_lora_weights = False  # tensors without memory
    _plain_layers(where, model, fitted.options)


def load_factors(
    folder: Path,
    base: Path,
    *,
    config: PretrainedConfig,
    header: Header,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Factors]:
    """What an adapter adds to the weights of its base, by the names of layers.

    Of one that began as a part of the base, that part is taken away again: its rank is twice what it says.

    Raises:
        ValueError: as `check_plain` does.
    """
    import torch
    from safetensors.torch import load_file

    model = empty_model(config, trust_remote_code=trust_remote_code)
    with _blaming(folder, "can't be read"):
        fitted = _fit(folder, model, header)
    is_part_of_base = _begin_again(fitted.options)
    if is_part_of_base:
        model = load_model(
            base,
            dtype=torch.float32,
            config=config,
            given={name.removeprefix(PREFIX) for name in _whole_tensors(fitted.names.values())},
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
    tensors = {fitted.names[name]: tensor.double() for name, tensor in load_file(folder / ADAPTER).items()}
    with torch.random.fork_rng(devices=[]):  # peft draws random numbers
        layers = _plain_layers(str(folder), model, fitted.options)
    factors = {}
    for name, layer in layers.items():
        down, up = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].flatten(1) for part in "AB")
        if is_part_of_base:
            before = [
                module[USUAL_ADAPTER].weight.detach().double().flatten(1) for module in (layer.lora_A, layer.lora_B)
            ]
            down, up = torch.cat([down, before[0]]), torch.cat([up, -before[1]], dim=1)
        is_transposed = bool(getattr(layer, "fan_in_fan_out", False))
        factors[name] = Factors(down, layer.scaling[USUAL_ADAPTER] * up, is_transposed)
    return factors


def adapter_tensors(
    options: LoraConfig, config: PretrainedConfig, *, trust_remote_code: bool = False
) -> dict[str, str]:
    """The names of the tensors that peft saves of an adapter, and what the model calls them; of factors, its layer.

    Args:
        config: of the model with the adapter.
    """
    from peft import get_peft_model_state_dict

    options = replace(options, init_lora_weights=False)  # tensors without memory
    adapted = _inject(empty_model(config, trust_remote_code=trust_remote_code), options)
    names = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: _layer(name) if ".lora_" in name else _WRAPPED.sub("", name.removeprefix(PREFIX)) for name in names}


def _begin_again(options: LoraConfig) -> bool:
    """Have an adapter begin as it did in training, where that changes its base, and else anyhow: whether it does."""
    beginning = str(options.init_lora_weights)
    is_part_of_base = bool(_PART_OF_BASE.fullmatch(beginning))
    if not is_part_of_base:
        options.init_lora_weights = False
    elif "niter" in beginning:  # the exact decomposition is nearer to the one in training than another random one
        options.init_lora_weights = "pissa"
    return is_part_of_base


def _plain_layers(where: str, model: PreTrainedModel, options: LoraConfig) -> dict[str, LoraLayer]:
    """The layers of a model that gets an adapter, by name.

    Raises:
        ValueError: as `check_plain` does.
    """
    from peft.tuners.lora import Conv2d, Linear, LoraLayer

    with _blaming(where, "can't be read"):
        adapted = _inject(model, options)
    layers = {
        name.removeprefix(PREFIX): module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)
    }
    problem = next((f"it has {name}" for name in NOT_PLAIN if getattr(options, name, None)), "")
    for name, layer in layers.items():
        if problem:
            break
        if variant := next(iter(layer.lora_variant.values()), None):
            problem = f"{name} has a variant of LoRA ({type(variant).__name__})"
        elif type(layer) not in (Linear, Conv2d) or getattr(layer.get_base_layer(), "groups", 1) > 1:
            problem = f"{name} is a layer of another kind ({type(layer.get_base_layer()).__name__})"
    if problem or not layers:
        raise ValueError(
            f"{where}: {problem or 'it adapts no layer'}, and only plain LoRA of linear layers and convolutions adds "
            "up to an adapter. It is merged as any other without save_adapter (--save-adapter)."
        )
    return layers


@dataclass(frozen=True)
class _Fitted:
    """An adapter in the names of the model that it is for.

    Args:
        options: its configuration.
        names: of its tensors as peft calls them here, by their names in its file.
    """

    options: LoraConfig
    names: dict[str, str]

    @property
    def is_renamed(self) -> bool:
        """Whether the adapter uses earlier names."""
        return any(name != now for name, now in self.names.items())


def _fit(folder: Path, model: PreTrainedModel, header: Header) -> _Fitted:
    """An adapter in the names of a model, whose layers may have had other names when the adapter was trained.

    Raises:
        ValueError: if it names layers that the model neither has nor had.
    """
    from peft import LoraConfig

    fields = read_fields(folder / ADAPTER_CONFIG)  # which peft would read in the encoding of the locale
    check_adapter_config(folder / ADAPTER_CONFIG, fields, max((max(shape, default=0) for _, shape in header.values())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = LoraConfig.from_peft_type(**LoraConfig.check_kwargs(**fields))
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
            f"{transformers.__version__}, nor one that was called so; its layers are {_layer_names(model)}. Merge it "
            "into its base with the versions of transformers and peft that it was trained with (merge_and_unload), "
            "and save the whole model."
        )
    for name, value in renamed_fields(options, earlier).items():
        setattr(options, name, value)
    return _Fitted(options, names)


def _layer(name: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    name = name.removeprefix(PREFIX)
    module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
    return _WRAPPED.sub("", module)  # names of trained biases have such parts, too


def _layer_names(model: PreTrainedModel, names: Iterable[str] | None = None) -> str:
    """The last parts of the names of a model's linear and convolutional layers, in a list for a message.

    Args:
        names: of an adapter's tensors, if only their layers are meant.
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
    """Turn whatever peft raises into a ValueError about the adapter."""
    try:
        yield
    except BrokenFileError:  # which names the file
        raise
    except Exception as error:
        raise ValueError(f"{where}: the adapter {what}: {one_line(error)}") from error


def _whole_tensors(names: Iterable[str]) -> set[str]:
    """The tensors of an adapter that replace those of the model (modules_to_save): most often the head."""
    return {name for name in names if ".lora_" not in name}
