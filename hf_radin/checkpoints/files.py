"""The files of one checkpoint: which there are, their hashes, the headers of the weights, and the tensors."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hf_radin.runtime.files import SMALL, BrokenFileError, read_json
from hf_radin.runtime.schema import from_json, read_record
from hf_radin.runtime.text import one_line

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

# What to do about a broken file of a checkpoint.
SAVED_AGAIN = "Save the checkpoint again, or leave it out."

# Of a file of weights, as in transformers: most models are one file.
SHARD = "50GB"

_SIZE = re.compile(r"\d{1,9}(\.\d{1,9})?[KMGT]B", re.IGNORECASE)

# The longest header that is read; those of image classifiers have some kilobytes. safetensors itself reads 100 MB, of
# which Python makes objects of gigabytes.
HEADER_LIMIT = SMALL

# The largest number of a header, as safetensors counts.
_LARGEST = (1 << 64) - 1

# Bytes of a number, by the dtypes of safetensors.
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

# Weights are averaged from floats; integers are counters and tables of indices, which are not averaged. Anything else
# is a quantisation.
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "BOOL")

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}

# Dtypes that weights are written in: names of safetensors by those of torch.
DTYPES = {_TORCH_NAMES[dtype]: dtype for dtype in ("F32", "BF16", "F16", "F64")}

# What numpy reads floats as. It has no bfloat16: those are bits.
NUMPY_NAMES = {dtype: "uint16" if dtype == "BF16" else _TORCH_NAMES[dtype] for dtype in FLOATS}

# Dtype, as safetensors calls it, and shape of each tensor, by its name on disk.
Header = dict[str, tuple[str, tuple[int, ...]]]

# What torch.compile and FSDP put into the names of tensors, wherever the wrapped module is, and what
# DistributedDataParallel begins all names with (pytorch-image-models#2003, nanoGPT#325).
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."


def choose_weights(files: set[str], *, allow_pickle: bool = False) -> str | None:
    """The file that holds or indexes the weights, among the names of a checkpoint's files; None if there is none.

    Whatever loads, hashes, downloads or averages a checkpoint goes by this.
    """
    names = (WEIGHTS, WEIGHTS_INDEX, ADAPTER) + ((PICKLE, PICKLE_INDEX) if allow_pickle else ())
    return next((name for name in names if name in files), None)


def without_weights(files: set[str]) -> str:
    """The error for a checkpoint without weights that can be read."""
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")))
    others = sorted(name for name in files if name.endswith(".safetensors"))
    hint = ""
    if pickles:
        hint = f" It has {', '.join(pickles[:3])}: only safetensors are read, unless you pass allow_pickle=True."
    elif others:  # a variant, or the file of another tool
        hint = f" It has {', '.join(others[:3])}: rename what holds the weights to {WEIGHTS}."
    return f"no weights ({WEIGHTS}, {WEIGHTS_INDEX} or {ADAPTER}).{hint}"


def refuse_redirection(folder: Path, name: str, entry: str | None) -> None:
    """Refuse a configuration that sends some readers to weights of another name than the usual one.

    transformers follows `transformers_weights` since some release of its version 5 (transformers#38152), others read
    `model.safetensors`: nobody can tell which of the two was meant.

    Args:
        name: of the checkpoint, for the error.
        entry: the file that is read here (`choose_weights`).

    Raises:
        ValueError: if the configuration names another file.
    """
    try:
        fields = read_json(folder / CONFIG)
    except (FileNotFoundError, BrokenFileError):  # reported where it is loaded
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
        ValueError: if there are none, an index names a file that is not there, or one of them is no regular file.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    entry = choose_weights(present, allow_pickle=allow_pickle)
    if entry is None:
        raise ValueError(f"{folder}: {without_weights(present)}")
    names = read_index(folder / entry) if entry.endswith(".index.json") else [entry]
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(f"{folder}: {entry} names {missing[0]!r}, which is not in the folder.")
    for path in [folder / name for name in names]:
        if not path.is_file():  # a pipe would be waited for
            raise BrokenFileError(path, "it is no regular file", "Put the file with the weights there.")
    return [folder / name for name in names]


def read_fields(path: Path, *, way_out: str = SAVED_AGAIN) -> dict[str, Any]:
    """The fields of a small file of a checkpoint: configuration, image processor or adapter.

    Raises:
        FileNotFoundError: if there is no file.
        BrokenFileError: if it can't be read, or holds no fields.
    """
    fields = read_json(path, way_out=way_out)
    if not isinstance(fields, dict):
        raise BrokenFileError(path, f"it holds {type(fields).__name__} and no fields", way_out)
    return fields


@dataclass(frozen=True)
class ShardIndex:
    """What is read of an index of shards: the file of each tensor, by the tensor's name."""

    weight_map: dict[str, str]


def read_index(path: Path) -> list[str]:
    """The files that an index of shards names, in order of name.

    Raises:
        ValueError: if it is not an index, or names a file of another kind or in another folder.
    """
    shards = sorted({*read_record(ShardIndex, path, way_out=SAVED_AGAIN).weight_map.values()})
    kind = ".safetensors" if path.name == WEIGHTS_INDEX else ".bin"
    elsewhere = [name for name in shards if Path(name).name != name or not name.endswith(kind) or "\0" in name]
    if elsewhere or not shards:
        raise ValueError(f"{path}: not an index of shards: it names {elsewhere[0] if elsewhere else 'none'!r}.")
    return shards


def checkpoint_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """What the revision of a checkpoint is a hash of: configuration, processor, code and weights."""
    small = [folder / name for name in SMALL_FILES if (folder / name).is_file()]
    small += sorted(filter(Path.is_file, folder.glob("*.py")))  # code, which the user may allow to run
    return small + weight_files(folder, allow_pickle=allow_pickle)


def files_stamp(folder: Path, *, allow_pickle: bool = False) -> str:
    """A digest of names, sizes and times of a checkpoint's files: while it stays the same, so does the content."""
    stats = [(path.name, path.stat()) for path in checkpoint_files(folder, allow_pickle=allow_pickle)]
    stamps = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def file_hashes(folder: Path, *, allow_pickle: bool = False) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, by name."""
    hashes = {}
    for path in checkpoint_files(folder, allow_pickle=allow_pickle):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        hashes[path.name] = digest.hexdigest()
    return hashes


def content_hash(hashes: dict[str, str]) -> str:
    """`sha256:` and the digest of configuration, processor and weights: equal for equal checkpoints."""
    return f"sha256:{hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()}"


def weights_hash(hashes: dict[str, str]) -> str:
    """The hashes of the files that hold the weights: equal for equal weights, on disk or on the Hub."""
    return " ".join(sorted(value for name, value in hashes.items() if name.endswith((".safetensors", ".bin"))))


def shard_size(size: int | str) -> int | str:
    """The largest size of a file of weights, as in `5GB` or in bytes.

    Raises:
        ValueError: if it is not a size.
    """
    if isinstance(size, str) and size.isdecimal() and len(size) < 20:
        size = int(size)
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str) and _SIZE.fullmatch(size) and float(size[:-2]) > 0:
        return size
    raise ValueError(f"max_shard_size={size!r}: it is a size as in '5GB' (--max-shard-size), or a number of bytes.")


def read_header(folder: Path, *, allow_pickle: bool = False) -> Header:
    """The dtypes and shapes of a folder's weights, which are not read.

    Raises:
        ValueError: if a file is truncated or is not what its name says.
    """
    paths = weight_files(folder, allow_pickle=allow_pickle)
    if not any(path.suffix == ".safetensors" for path in paths):  # pickles have no header
        tensors = open_pickles(folder)
        return {name: (safetensors_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    header: Header = {}
    for path in paths:
        with _refusing_broken(path), path.open("rb") as file:
            layout = read_layout(file, path.stat().st_size)
        if repeated := sorted(layout.header.keys() & header.keys()):
            raise ValueError(f"{path}: {repeated[0]} stands in another file of {folder}, too; save it again.")
        header |= dict(sorted(layout.header.items()))
    return header


class Layout(NamedTuple):
    """What the beginning of a safetensors file says.

    Args:
        header: dtypes and shapes.
        starts: where in the file each tensor begins, by its name.
    """

    header: Header
    starts: dict[str, int]


class _Readable(Protocol):
    """A file, here or on the Hub."""

    def read(self, size: int, /) -> bytes: ...


def read_layout(file: _Readable, size: int, *, limit: int = HEADER_LIMIT) -> Layout:
    """Read the beginning of a safetensors file, and hold it to the rest of the file, which is not read.

    Args:
        file: open at its first byte.
        size: bytes of the whole file.
        limit: bytes of the longest header that is read.

    Raises:
        ValueError: if it is not such a file, or its tensors don't fill it one after the other.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes, and no header")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, limit):
        raise ValueError(f"its header says that it has {length} bytes")
    try:
        # UTF-8 without a mark: Python's own reader would also take UTF-16
        content = json.loads(
            file.read(length).decode(), object_pairs_hook=_unique_names, parse_int=_count, parse_constant=_no_number
        )
        fields = {name: _field(name, field) for name, field in _tensors_of(content).items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid: {one_line(error)[:200]}") from error
    fields = dict(sorted(fields.items(), key=lambda pair: (pair[1].data_offsets, pair[0])))
    end = 0
    for name, field in fields.items():
        first, last = field.data_offsets
        if field.dtype not in BYTES:
            raise ValueError(f"its header gives {name} the dtype {field.dtype} and the shape {field.shape}")
        if first != end or last - first != _bytes_of(name, field):
            raise ValueError(
                f"its header puts {name}, {field.shape} of {field.dtype}, at {first} to {last}, after {end}"
            )
        end = last
    data = 8 + length
    if end != size - data:
        raise ValueError(f"its tensors take {end} bytes, and it has {size - data}")
    header = {name: (field.dtype, field.shape) for name, field in fields.items()}
    return Layout(header, {name: data + field.data_offsets[0] for name, field in fields.items()})


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor; the offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _tensors_of(content: Any) -> dict[str, Any]:
    """What a header says of each tensor, without the notes beside them, which are text."""
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    notes = content.pop("__metadata__", None)
    if notes is not None and not (isinstance(notes, dict) and all(isinstance(text, str) for text in notes.values())):
        raise ValueError("its __metadata__ is no text by names")
    for text in (*content, *(notes or {}), *(notes or {}).values()):
        text.encode()  # a half of a surrogate pair is no text
    return content


def _field(name: str, content: Any) -> TensorEntry:
    """What a header says of one tensor, which is all that it may say."""
    match content:  # a plain one: headers of hundreds of tensors are read for each soup
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)], **others} if (
            not others and {*map(type, shape), type(first), type(last)} == {int}
        ):
            return TensorEntry(dtype, tuple(shape), (first, last))
    field = from_json(TensorEntry, content, place=name)
    if len(content) != len(fields_of(TensorEntry)):
        raise ValueError(f"it says more of {name} than {', '.join(entry.name for entry in fields_of(TensorEntry))}")
    return field


def _bytes_of(name: str, field: TensorEntry) -> int:
    """The bytes of a tensor.

    Raises:
        ValueError: if they can't be counted: the product of a million large numbers would take minutes.
    """
    size = BYTES[field.dtype]
    for length in field.shape:
        size *= length
        if size > _LARGEST:
            raise ValueError(f"its header gives {name} a shape of more numbers than can be")
    return size


def _count(digits: str) -> int:
    """A number of a header, as safetensors counts: not below 0, nor written as -0."""
    if digits.startswith("-") or int(digits) > _LARGEST:
        raise ValueError(f"{digits[:30]} is no count")
    return int(digits)


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is in it twice")
    return fields


def plain_names(names: Iterable[str], where: Path | str) -> dict[str, str]:
    """The name of each tensor in the model, by its name on disk: without what wrapped the model when it was saved.

    Args:
        where: the checkpoint, for the error.

    Raises:
        ValueError: if two tensors have the same name in the model.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while plain and all(name.startswith(_PARALLEL) for name in plain.values()):
        plain = {on_disk: name.removeprefix(_PARALLEL) for on_disk, name in plain.items()}
    owners: dict[str, str] = {}
    for on_disk, name in plain.items():
        if owners.setdefault(name, on_disk) != on_disk:
            raise ValueError(f"{where}: {owners[name]} and {on_disk} are both {name} in the model; save it again.")
    return plain


@contextmanager
def _refusing_broken(path: Path) -> Iterator[None]:
    """Turn what readers raise of a broken file into a ValueError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, ValueError, OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: not a whole file of weights ({one_line(error)}).") from error


def torch_dtype(dtype: str) -> torch.dtype:
    """A dtype of weights or counters, by its name in safetensors."""
    import torch

    named: torch.dtype = getattr(torch, _TORCH_NAMES[dtype])
    return named


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The name of a torch dtype in safetensors; torch's own name if no weights or counters are in it."""
    names = {f"torch.{torch_name}": name for name, torch_name in _TORCH_NAMES.items()}
    return names.get(str(dtype), str(dtype))


def load_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in memory maps, by their names in the model (`plain_names`).

    Raises:
        ValueError: if a file is truncated or is not what its name says.
    """
    from safetensors.torch import load_file

    paths = weight_files(folder, allow_pickle=allow_pickle)
    if any(path.suffix == ".safetensors" for path in paths):
        tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            with _refusing_broken(path):
                tensors |= load_file(path)
    else:
        tensors = open_pickles(folder)
    return {name: tensors[on_disk] for on_disk, name in plain_names(tensors, folder).items()}


def open_pickles(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's pickles, by their names on disk, in memory maps where the format has them.

    Raises:
        ValueError: if a file is truncated or is not what its name says.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder, allow_pickle=True):
        try:
            # before torch 1.6 they were no zip files, and only those can be mapped (transformers#28331)
            is_zip = zipfile.is_zipfile(path)
            pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:  # a broken pickle may fail in any way
            line = next(iter(str(error).splitlines()), "")
            raise ValueError(f"{path}: not a whole file of weights ({type(error).__name__}: {line}).") from error
        if not isinstance(pickled, dict) or not all(_is_weight(name, tensor) for name, tensor in pickled.items()):
            raise ValueError(f"{path}: not a state dict: it holds more than tensors by name.")
        tensors |= pickled
    return tensors


def _is_weight(name: Any, tensor: Any) -> bool:
    """Whether an entry of a pickle is a named tensor as weights are: dense, with its numbers in the file."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype, from itself or its name.

    Raises:
        ValueError: if weights are not written in it.
    """
    known = {name: torch_dtype(spelling) for name, spelling in DTYPES.items()}
    given = known.get(dtype) if isinstance(dtype, str) else dtype
    if given not in known.values():
        raise ValueError(f"dtype={dtype!r}: it is {', '.join(known)}.")
    return given
