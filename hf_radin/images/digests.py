"""What tells an image from all others, whatever it is called and wherever it lies: a digest of its file's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hf_radin.images.split import Split
from hf_radin.runtime.files import digest, write_atomically

WAY_OUT = (
    "Images that chose a soup can't prove it. Leave them out of one of the two splits, name another, or allow it with "
    "allow_overlap=True (--allow-overlap): recipe and card then say it."
)

# Of an image's file in hexadecimal digits; nothing where it can't be read.
DTYPE = np.dtype("S32")


def with_bytes(image: Any) -> Any:
    """An image with the bytes of its file, which is read if need be; an image without a file is as it was.

    Args:
        image: as datasets gives it undecoded, the bytes or the path of a file, or an image or array of a user's own.

    Raises:
        OSError: if the file can't be read.
    """
    if isinstance(image, (bytes, bytearray)):
        return {"bytes": bytes(image), "path": None}
    path = image if isinstance(image, str) else image.get("path") if isinstance(image, dict) else None
    content = image.get("bytes") if isinstance(image, dict) else None
    if content is not None or path is None:
        return {"bytes": content, "path": path} if isinstance(image, dict) else image
    return {"bytes": _read(path), "path": path}


def image_digest(image: Any) -> str:
    """Of what `with_bytes` gave; where there is no file, of the pixels."""
    if isinstance(image, dict):
        content = image["bytes"]
    else:
        pixels = np.asarray(image)
        content = f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()
    return hashlib.blake2b(content, digest_size=DTYPE.itemsize // 2).hexdigest()


def split_digests(split: Split, home: Path) -> np.ndarray:
    """Of each image of a split `(rows,)`, in order: read once without decoding any, and kept in `digests` of `home`.

    What can't be read is a matter of those who have to decode it, and has none.
    """
    path = home / "digests" / f"{digest(split.key, split.image_column)}.npy"
    try:
        return as_digests(np.load(path))
    except Exception:  # it is not there, or broken
        rows = split.rows.select_columns([split.image_column]) if split.rows.features else split.rows
        digests = as_digests([_digest_or_nothing(row[split.image_column]) for row in rows])
        write_atomically(path, partial(np.save, arr=digests))
        return digests


def as_digests(values: Any) -> np.ndarray:
    """An array of digests.

    Raises:
        ValueError: if these are none.
    """
    digests = np.asarray(values if len(values) else [], dtype=DTYPE)
    if digests.ndim != 1:
        raise ValueError(f"Digests are {digests.shape}, not (images,).")
    return digests


def stand_in(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which images are among others, byte for byte: bool `(images,)`."""
    return np.isin(digests, others[others != b""]) & (digests != b"")


def with_copies(out: np.ndarray, rest: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two parts of some images, where those of the first that have a copy in the second go there.

    Args:
        out, rest: positions of images.
        digests: of all of them, `(images,)`.
    """
    copies = stand_in(digests[out], digests[rest])
    return out[~copies], np.concatenate([rest, out[copies]])


def count_shared(held_out: np.ndarray, chosen: np.ndarray) -> int:
    """How many of the held-out images are among those that chose; of both digests `(images,)`."""
    return int(stand_in(held_out, chosen).sum())


def refuse_shared(held_out: np.ndarray, chosen: np.ndarray, names: tuple[str, str]) -> None:
    """Raises a ValueError if splits share images.

    Args:
        names: of the two splits.
    """
    if shared := count_shared(held_out, chosen):
        refuse_counted(shared, len(held_out), names)


def refuse_counted(shared: int, images: int, names: tuple[str, str]) -> NoReturn:
    raise ValueError(
        f"{shared} of the {images} images of the split {names[0]!r} are in the split {names[1]!r} too, byte for byte. "
        f"{WAY_OUT}"
    )


def refuse_shared_splits(held_out: Split, chosen: Split, home: Path) -> None:
    """Raises a ValueError if splits share images, where both are here and can be read before anything is computed."""
    if held_out.is_here and chosen.is_here:
        names = held_out.split, chosen.split
        refuse_shared(split_digests(held_out, home), split_digests(chosen, home), names)


def refuse_met(digests: Sequence[str], chosen: np.ndarray, names: tuple[str, str]) -> None:
    """Refuse images of the split that proves a soup as they go by, at the first that chose it.

    Args:
        digests: of the images that have just gone by.
        chosen: of the images that chose, ascending `(images,)`.
        names: of the split that proves and of the one that chooses.

    Raises:
        ValueError: if an image is in both.
    """
    met = np.asarray(digests if digests else [], dtype=chosen.dtype)
    places = np.searchsorted(chosen, met).clip(max=len(chosen) - 1)  # of a million images, a block takes no time
    if shared := int((chosen[places] == met).sum()):
        raise ValueError(
            f"{shared} of {len(met)} images of the split {names[0]!r} that have just gone by are in the split "
            f"{names[1]!r} too, byte for byte, and perhaps others. {WAY_OUT}"
        )


def _read(path: str) -> bytes:
    if "://" not in path:
        return Path(path).read_bytes()
    from datasets.utils.file_utils import xopen  # what its own Image opens such paths with

    with xopen(path, "rb") as file:
        content: bytes = file.read()
    return content


def _digest_or_nothing(image: Any) -> str:
    try:
        return image_digest(with_bytes(image))
    except (OSError, TypeError):
        return ""
