"""What identifies an image, whatever its name and place: a digest of its file's bytes.

Splits that share images are found by it, and refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hf_radin.images.split import Split
from hf_radin.runtime.files import digest, read_small
from hf_radin.runtime.schema import known_arrays, write_arrays

REMEDY = (
    "The same images can't choose a soup and prove it, or judge last layers and teach them. Leave them out of one of "
    "the two splits, name another, or allow it with allow_overlap=True (--allow-overlap)."
)

# Bytes of the file of an image: more than Pillow's limit of pixels takes without compression.
LARGEST_FILE = 512 << 20

# The digest of an image in hexadecimal digits; empty if the image can't be read.
DTYPE = np.dtype("S32")


def with_bytes(image: Any, token: str | bool | None = None) -> Any:
    """An image with the bytes of its file, which is read if necessary; an image without a file is returned unchanged.

    Args:
        image: as datasets gives it undecoded, the bytes or the path of a file, or an image of the user's.
        token: for files on the Hub.

    Raises:
        OSError: if there is no such file, or it can't be fetched.
        BrokenFileError: if it can't be read, is no regular file or is too large.
    """
    if isinstance(image, (bytes, bytearray)):
        return {"bytes": bytes(image), "path": None}
    path = image if isinstance(image, str) else image.get("path") if isinstance(image, dict) else None
    content = image.get("bytes") if isinstance(image, dict) else None
    if content is not None or path is None:
        return {"bytes": content, "path": path} if isinstance(image, dict) else image
    return {"bytes": _read(path, token), "path": path}


def image_digest(image: Any) -> str:
    """The digest of an image as `with_bytes` gives it; without a file, of its pixels."""
    if isinstance(image, dict):
        content = image["bytes"]
    else:
        pixels = np.asarray(image)
        content = f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()
    return hashlib.blake2b(content, digest_size=DTYPE.itemsize // 2).hexdigest()


def split_digests(split: Split, home: Path) -> np.ndarray:
    """The digest of each image of a split `(rows,)`, in order: read once without decoding, and cached in `home`.

    An image that can't be read has an empty digest; it is an error only where it has to be decoded.
    """
    path = home / "digests" / f"{digest(split.key, split.image_column)}.npz"
    arrays = known_arrays(path, path.stem)
    if arrays is None:
        rows = split.rows.select_columns([split.image_column]) if split.rows.features else split.rows
        arrays = {"digests": as_digests([_digest_or_nothing(row[split.image_column], split.token) for row in rows])}
        write_arrays(path, arrays, path.stem)
    return arrays["digests"]


def as_digests(values: Any) -> np.ndarray:
    """An array of digests `(images,)`."""
    return np.asarray(values if len(values) else [], dtype=DTYPE)


def find_shared(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which images are among others, byte for byte, by the digests of both: bool `(images,)`."""
    return np.isin(digests, others[others != b""]) & (digests != b"")


def with_copies(held_out: np.ndarray, others: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two parts of the images, after held-out ones that have a copy among the others are moved to these.

    Args:
        held_out, others: positions of images.
        digests: of all images, `(images,)`.
    """
    copies = find_shared(digests[held_out], digests[others])
    return held_out[~copies], np.concatenate([others, held_out[copies]])


def count_shared(held_out: np.ndarray, chosen: np.ndarray) -> int:
    """How many of the held-out images are among those that chose, by the digests of both `(images,)`."""
    return int(find_shared(held_out, chosen).sum())


def refuse_shared(
    held_out: np.ndarray, chosen: np.ndarray, names: tuple[str, str], *, alike: str = "byte for byte"
) -> None:
    """Refuse two splits that share images.

    Args:
        held_out, chosen: digests of the images of both.
        names: of the two splits.
        alike: in what sense they are the same images.

    Raises:
        ValueError: if there is an image in both.
    """
    if shared := count_shared(held_out, chosen):
        refuse_counted(shared, len(held_out), names, alike=alike)


def refuse_counted(shared: int, images: int, names: tuple[str, str], *, alike: str = "byte for byte") -> NoReturn:
    """Raise the error for so many shared images, of so many in the held-out split."""
    raise ValueError(
        f"{shared} of the {images} images of the split {names[0]!r} are in the split {names[1]!r} too, {alike}. "
        f"{REMEDY}"
    )


def refuse_shared_splits(held_out: Split, chosen: Split, home: Path) -> None:
    """Refuse two splits that share images, which are read for it. Arguments and errors as of `refuse_shared`."""
    names = held_out.split, chosen.split
    refuse_shared(split_digests(held_out, home), split_digests(chosen, home), names)


def refuse_met(digests: Sequence[str], chosen: np.ndarray, names: tuple[str, str]) -> None:
    """Refuse a block of the held-out split, while it is streamed, if it shares images with the split that chose.

    Args:
        digests: of the images of the block.
        chosen: of the images that chose, ascending `(images,)`.
        names: of the held-out split and of the one that chooses.

    Raises:
        ValueError: if an image is in both.
    """
    block = np.asarray(digests if digests else [], dtype=chosen.dtype)
    places = np.searchsorted(chosen, block).clip(max=len(chosen) - 1)  # fast, even among a million images
    if shared := int((chosen[places] == block).sum()):
        raise ValueError(
            f"{shared} of {len(block)} images of the split {names[0]!r} that have just been read are in the split "
            f"{names[1]!r} too, byte for byte, and perhaps others. {REMEDY}"
        )


def _read(path: str, token: str | bool | None) -> bytes:
    if "://" not in path:
        return read_small(Path(path), limit=LARGEST_FILE, way_out="Take it out of the dataset.")
    from datasets import DownloadConfig
    from datasets.utils.file_utils import xopen  # what its own Image opens such paths with

    with xopen(path, "rb", download_config=DownloadConfig(token=token_for(path, token))) as file:
        content: bytes = file.read()
    return content


def token_for(address: str, token: str | bool | None) -> str | bool | None:
    """The token, for an address on the Hub; False for any other host, also if its name begins like the Hub's."""
    from huggingface_hub import constants

    return token if address.startswith(("hf://", f"{constants.ENDPOINT}/")) else False


def _digest_or_nothing(image: Any, token: str | bool | None) -> str:
    try:
        return image_digest(with_bytes(image, token))
    except (OSError, TypeError, ValueError):
        return ""
