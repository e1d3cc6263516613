"""One checkpoint's files: which they are, their hashes, what the weights' headers say, and the tensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SMALL_FILES = (CONFIG, ADAPTER_CONFIG, *PROCESSOR_FILES)

# Dtypes that weights are written in, by torch's names, as safetensors spells them.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}

# Of a file of weights, as in transformers: most models are one file.
SHARD = "50GB"

_SIZE = re.compile(r"\d{1,9}(\.\d{1,9})?[KMGT]B", re.IGNORECASE)

# The longest header that safetensors itself reads.
HEADER_LIMIT = 100_000_000

# Bytes of a number, by the dtypes of safetensors.
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

# Of each tensor by its name on disk: the dtype as safetensors spells it, and the shape.
Header = dict[str, tuple[str, tuple[int, ...]]]

# What weights are averaged from, and what counters and tables of indices are kept in, which are not averaged. Anything
# else is some quantisation.
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "BOOL")


# What torch.compile and FSDP put into the names of tensors, wherever the wrapped module stands, and what
# DistributedDataParallel begins all names with (pytorch-image-models#2003, nanoGPT#325).
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."


def choose_weights(files: set[str], *, allow_pickle: bool = False) -> str | None:
    """The file that holds, or indexes, the weights among a checkpoint's files; None if there is none to be used.

    All that loads, hashes, downloads or averages a checkpoint goes by this.
    """
    names = (WEIGHTS, WEIGHTS_INDEX, ADAPTER) + ((PICKLE, PICKLE_INDEX) if allow_pickle else ())
    return next((name for name in names if name in files), None)


def without_weights(files: set[str]) -> str:
    """What to say of a checkpoint in which there is nothing to be read."""
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")))
    others = sorted(name for name in files if name.endswith(".safetensors"))
    hint = ""
    if pickles:
        hint = f" It has {', '.join(pickles[:3])}: only safetensors are read, unless you pass allow_pickle=True."
    elif others:  # a variant, or the file of another tool
        hint = f" It has {', '.join(others[:3])}: rename what holds the weights to {WEIGHTS}."
    return f"no weights ({WEIGHTS}, {WEIGHTS_INDEX} or {ADAPTER}).{hint}"


def refuse_redirection(folder: Path, name: str, entry: str | None) -> None:
    """Refuse a configuration that sends some readers to other weights than those of the usual name.

    transformers follows `transformers_weights` since some release of its version 5 (transformers#38152), others read
    `model.safetensors`: which of the two was meant can't be told.

    Args:
        name: of the checkpoint, for the error.
        entry: the file that is read here (`choose_weights`).

    Raises:
        ValueError: if it does.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # what is wrong with it is said where it is loaded
        return
    target = fields.get("transformers_weights") if isinstance(fields, dict) else None
    if target is not None and target != entry:
        raise ValueError(
            f"{name}: {CONFIG} names {str(target)[:100]!r} as its weights (transformers_weights), which not all "
            f"versions of transformers follow. Rename that file to {WEIGHTS} and take the field out of {CONFIG}."
        )


def weight_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The files that hold a checkpoint's tensors, in order of name.

    Raises:
        ValueError: if there are none, or an index names a file that is not there.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    entry = choose_weights(present, allow_pickle=allow_pickle)
    if entry is None:
        raise ValueError(f"{folder}: {without_weights(present)}")
    if not entry.endswith(".index.json"):
        return [folder / entry]
    shards = read_index(folder / entry)
    missing = [name for name in shards if name not in present]
    if missing:
        raise ValueError(f"{folder}: {entry} names {missing[0]!r}, which is not in the folder.")
    return [folder / name for name in shards]


def read_index(path: Path) -> list[str]:
    """The files that an index of shards names: safetensors, if that is what it is an index of.

    Raises:
        ValueError: if it is none, or names a file elsewhere.
    """
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        kind = ".safetensors" if path.name == WEIGHTS_INDEX else ".bin"
        elsewhere = [name for name in shards if Path(name).name != name or not name.endswith(kind)]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of shards ({error!r}).") from error
    if elsewhere or not shards:
        raise ValueError(f"{path}: not an index of shards: it names {elsewhere[0] if elsewhere else 'none'!r}.")
    return shards


def _files(folder: Path, allow_pickle: bool) -> list[Path]:
    """What makes a checkpoint: configuration, processor and weights."""
    small = [folder / name for name in SMALL_FILES if (folder / name).is_file()]
    small += sorted(folder.glob("*.py"))  # code of its own, which may be allowed to run
    return small + weight_files(folder, allow_pickle=allow_pickle)


def files_stamp(folder: Path, *, allow_pickle: bool = False) -> str:
    """Names, sizes and times of a checkpoint's files: while it stays the same, so does the content."""
    files = [(path.name, path.stat()) for path in _files(folder, allow_pickle)]
    return hashlib.sha256(
        repr([(name, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in files]).encode()
    ).hexdigest()


def file_hashes(folder: Path, *, allow_pickle: bool = False) -> dict[str, str]:
    """SHA-256 of each file that makes a checkpoint, by name."""
    hashes = {}
    for path in _files(folder, allow_pickle):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        hashes[path.name] = digest.hexdigest()
    return hashes


def content_hash(hashes: dict[str, str]) -> str:
    """`sha256:` and the digest of configuration, processor and weights: what makes two folders the same checkpoint."""
    return f"sha256:{hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()}"


def weights_hash(hashes: dict[str, str]) -> str:
    """What makes two checkpoints the same weights, on disk or on the Hub: the hashes of the files that hold them."""
    return " ".join(sorted(value for name, value in hashes.items() if name.endswith((".safetensors", ".bin"))))


def shard_size(size: int | str) -> int | str:
    """The largest size of a file of weights, as in `5GB` or in bytes.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(size, str) and size.isdecimal() and len(size) < 20:
        size = int(size)
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str) and _SIZE.fullmatch(size) and float(size[:-2]) > 0:
        return size
    raise ValueError(f"max_shard_size={size!r}: it is a size as in '5GB' (--max-shard-size), or a number of bytes.")


def read_header(folder: Path, *, allow_pickle: bool = False) -> Header:
    """What the weights of a folder are, without reading them.

    Raises:
        ValueError: if a file is truncated or not what its name says.
    """
    from safetensors import safe_open

    header: Header = {}
    files = weight_files(folder, allow_pickle=allow_pickle)
    for path in files:
        if path.suffix == ".safetensors":
            with whole(path), safe_open(path, framework="pt") as file:
                names = file.keys()  # the file itself can't be iterated over
                for name in names:
                    if name in header:
                        raise ValueError(f"{path}: {name} stands in another file of {folder}, too; save it again.")
                    part = file.get_slice(name)
                    header[name] = (str(part.get_dtype()), tuple(part.get_shape()))
    if not any(path.suffix == ".safetensors" for path in files):  # pickles know no other way
        header = {name: (spelled(one.dtype), tuple(one.shape)) for name, one in open_pickles(folder).items()}
    return header


def parse_header(text: bytes, size: int) -> Header:
    """What the beginning of a safetensors file says. Arguments and errors as in `parse_offsets`."""
    return {name: (dtype, shape) for name, (dtype, shape, _) in parse_offsets(text, size).items()}


def parse_offsets(text: bytes, size: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """What the beginning of a safetensors file says, and where behind it each tensor begins, held to what follows.

    Args:
        text: the header, without the eight bytes that give its length.
        size: bytes of data behind it.

    Raises:
        ValueError: if it is none, or its tensors don't fill these bytes one after the other.
    """
    try:
        fields = json.loads(text, object_pairs_hook=_once)
        fields.pop("__metadata__", None)
        parts = sorted((*field["data_offsets"], name) for name, field in fields.items())
        header = {name: (str(field["dtype"]), tuple(field["shape"])) for name, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is none: {' '.join(str(error).split())[:100]}") from error
    end = 0
    for first, last, name in parts:
        dtype, shape = header[name]
        if dtype not in BYTES or not all(type(one) is int and one >= 0 for one in (first, last, *shape)):
            raise ValueError(f"its header gives {name} the dtype {dtype} and the shape {shape}")
        if first != end or last - first != math.prod(shape) * BYTES[dtype]:
            raise ValueError(f"its header puts {name}, {shape} of {dtype}, at {first} to {last}, after {end}")
        end = last
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, and it has {size}")
    return {name: (*header[name], first) for first, _, name in parts}


def plain_names(names: Iterable[str], where: Path | str) -> dict[str, str]:
    """Each name of a tensor on disk, and the name that it has without what wrapped the model when it was saved.

    Args:
        where: the checkpoint, for the error.

    Raises:
        ValueError: if two tensors have one name then.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while plain and all(name.startswith(_PARALLEL) for name in plain.values()):
        plain = {on_disk: name.removeprefix(_PARALLEL) for on_disk, name in plain.items()}
    owners: dict[str, str] = {}
    for on_disk, name in plain.items():
        if owners.setdefault(name, on_disk) != on_disk:
            raise ValueError(f"{where}: {owners[name]} and {on_disk} are both {name} in the model; save it again.")
    return plain


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Turn what readers raise of a broken file into a ValueError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: not a whole file of weights ({error}).") from error


_SPELLING = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.bool": "BOOL",
}


def torch_dtype(spelling: str) -> torch.dtype:
    """A dtype of weights or counters that safetensors spells so."""
    import torch

    found: torch.dtype = getattr(torch, next(name for name, kind in _SPELLING.items() if kind == spelling)[6:])
    return found


def spelled(dtype: torch.dtype) -> str:
    """A torch dtype as safetensors spells it."""
    return _SPELLING.get(str(dtype), str(dtype))


def load_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in memory maps, by the names that they have without wrappers (`plain_names`).

    Raises:
        ValueError: if a file is truncated or not what its name says.
    """
    from safetensors.torch import load_file

    files = weight_files(folder, allow_pickle=allow_pickle)
    if any(path.suffix == ".safetensors" for path in files):
        tensors: dict[str, torch.Tensor] = {}
        for path in files:
            with whole(path):
                tensors |= load_file(path)
    else:
        tensors = open_pickles(folder)
    return {name: tensors[on_disk] for on_disk, name in plain_names(tensors, folder).items()}


def open_pickles(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's pickles, by their names on disk, in memory maps where the format has them.

    Raises:
        ValueError: if a file is truncated or not what its name says.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    for path in weight_files(folder, allow_pickle=True):
        try:
            # before torch 1.6 they were no zip files, which can't be mapped (transformers#28331)
            mapped = zipfile.is_zipfile(path)
            pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # a broken pickle may fail in any way
            said = next(iter(str(error).splitlines()), "")
            raise ValueError(f"{path}: not a whole file of weights ({type(error).__name__}: {said}).") from error
        if not isinstance(pickled, dict) or not all(_is_plain(*item) for item in pickled.items()):
            raise ValueError(f"{path}: not a state dict: it holds more than tensors by name.")
        found |= pickled
    return found


def _is_plain(name: Any, tensor: Any) -> bool:
    """Whether an entry of a pickle is a tensor as weights are: dense, with its numbers in the file, and named."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype, from itself or its name.

    Raises:
        ValueError: if weights are not kept in it.
    """
    import torch

    known = {name: getattr(torch, name) for name in DTYPES}
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found not in known.values():
        raise ValueError(f"dtype={dtype!r}: it is {', '.join(known)}.")
    return found
