"""The arrays of a bank on disk: logits block by block until all are there, then in one file beside a record."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import hf_radin
from hf_radin.images.cache import ACTIVATIONS
from hf_radin.images.digests import as_digests
from hf_radin.images.shards import Block
from hf_radin.ingredients.ingredient import GIVEN, Ingredient, IngredientRecord, Ingredients
from hf_radin.logits.manifest import BANK, COMPUTE_AGAIN, BankManifest, DataRecord, Latest, RunRecord
from hf_radin.recipes.given import GivenLogits
from hf_radin.runtime.files import (
    BrokenFileError,
    Checks,
    digest,
    refuse_files,
    remove_partials,
    take_away,
    write_to_cache,
)
from hf_radin.runtime.schema import (
    MADE_ANEW,
    known_arrays,
    known_record,
    read_arrays,
    read_sealed,
    write_arrays,
    write_sealed,
)
from hf_radin.weights.head import LinearLayer

logger = logging.getLogger(__name__)

DIGESTS = "digests.npy"

# What a bank of arrays says in the place of a dataset, and of an architecture.
ARRAYS = "arrays"

BATCH_SIZE_FILE = "batch_size.json"

# The head of a soup, beside its features.
LAYER = "layer.npz"


@dataclass(frozen=True)
class Spent:
    """Seconds that devices took, added up, and which devices; None if that is not known of all work."""

    seconds: float | None = 0.0
    devices: frozenset[str] = frozenset()

    @classmethod
    def on(cls, seconds: float | None, device: str | None) -> Spent:
        """The seconds of one device."""
        return cls(seconds, frozenset(filter(None, [device])))

    def __add__(self, other: Spent) -> Spent:
        seconds = None if self.seconds is None or other.seconds is None else self.seconds + other.seconds
        return Spent(seconds, self.devices | other.devices)


@dataclass(frozen=True)
class Pace:
    """The seconds that devices took for so many images, added up, and which devices."""

    seconds: float = 0.0
    images: int = 0
    device: str | None = None

    def after(self, seconds: float, images: int, device: str) -> Pace:
        """The pace with further images."""
        devices = sorted({*(self.device or device).split(" and "), device})
        return Pace(round(self.seconds + seconds, 3), self.images + images, " and ".join(devices))


@dataclass(frozen=True)
class SoupRecord:
    """What is known of a soup's logits, in the file beside them: it says that they are complete.

    Args:
        pace: what they took.
        sha256: of the file that they are in.
    """

    pace: Pace
    sha256: str


@dataclass(frozen=True)
class SoupFeatures:
    """What a soup gives its head for the images that it was shown, in sealed files, and the head that it has.

    Args:
        folder: of these files alone.
        subject: of which bank, and there of which soup, they are.
    """

    folder: Path
    subject: str

    def write_layer(self, layer: LinearLayer) -> None:
        """Write the head that the soup has."""
        bias = {} if layer.bias is None else {"bias": layer.bias}
        write_arrays(self.folder / LAYER, {"weight": layer.weight, **bias}, self._about(LAYER))

    def layer(self) -> LinearLayer | None:
        """The head that the soup has; None if it was not written."""
        arrays = known_arrays(self.folder / LAYER, self._about(LAYER))
        return None if arrays is None else LinearLayer(arrays["weight"], arrays.get("bias"))

    def write(self, block: Block, images: np.ndarray, features: np.ndarray) -> None:
        """Write the features of some images of a block.

        Args:
            images: their positions in the split, ascending `(images,)`.
            features: float32 `(images, features)`.
        """
        name = f"block-{block[0]:05d}-{block[1]:06d}-{digest(images.tolist())}.npz"
        arrays = {"images": images, "features": features}
        write_arrays(self.folder / name, arrays, self._about(name), forced=False)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions in the split of the images that have features, ascending, and these, `(images, features)`.

        They are read into memory: 50,000 images of 2,048 features take 0.4 GB.
        """
        parts = list(self._parts())
        if not parts:
            return np.zeros(0, int), np.zeros((0, 0), np.float32)
        images, first = np.unique(np.concatenate([images for images, _ in parts]), return_index=True)
        return images, np.concatenate([features for _, features in parts])[first]

    def shown(self, samples: int) -> np.ndarray:
        """Which images of a split of so many have features, bool `(samples,)`; none if the head is not known."""
        shown = np.zeros(samples, dtype=bool)
        if self.layer() is not None:
            for images, _ in self._parts():
                shown[images] = True
        return shown

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in sorted(self.folder.glob("block-*.npz")):
            arrays = known_arrays(path, self._about(path.name))
            if arrays is not None:
                yield arrays["images"], arrays["features"]

    def _about(self, name: str) -> str:
        return f"{self.subject} {name}"


@dataclass(frozen=True)
class LogitsRecord:
    """What is known of an ingredient's logits, in the file beside them: it says that they are complete.

    Args:
        ingredient: whose logits they are.
        finite: whether all are finite numbers.
        seconds: that devices took to compute them, added up; None if they were not timed.
        device: what they were computed on.
        sha256: of the file that they are in; None in a bank on the Hub that an earlier version published.
    """

    ingredient: IngredientRecord
    finite: bool
    seconds: float | None = None
    device: str | None = None
    sha256: str | None = None

    @classmethod
    def read(cls, folder: Path, bank: str, key: str) -> LogitsRecord:
        """The record of an ingredient's logits.

        Args:
            bank: the key of the bank's manifest.
            key: of the ingredient.

        Raises:
            ValueError: if the file is broken.
            OSError: if there is none: then its logits are not complete.
        """
        return read_sealed(cls, record_path(folder, key), f"{bank} {key}", way_out=COMPUTE_AGAIN)

    def write(self, folder: Path, bank: str, key: str) -> None:
        """Say that the logits of the ingredient with this key are complete."""
        write_sealed(record_path(folder, key), self, f"{bank} {key}")


@dataclass(frozen=True)
class BatchSize:
    """How many images are in a forward pass, decided once for a bank (`batch_size.json`)."""

    images: int

    @classmethod
    def read(cls, folder: Path) -> BatchSize | None:
        """What was decided for the bank that is computed in a folder; None if nothing was."""
        return known_record(cls, folder / BATCH_SIZE_FILE, folder.name)

    def write(self, folder: Path) -> None:
        """Let it stay at this."""
        write_sealed(folder / BATCH_SIZE_FILE, self, folder.name)


@dataclass(frozen=True)
class Joined:
    """What is known of logits when their parts were put together.

    Args:
        is_finite: whether all are finite numbers.
        seconds: that they took.
        sha256: of the file.
    """

    is_finite: bool
    seconds: float
    sha256: str


@dataclass(frozen=True)
class Target:
    """A model whose logits are computed.

    Args:
        name: to be named in an error.
        path: of the file that they go to.
        classes: how many there are.
        subject: of which bank, and there of what, the logits are; each part is sealed with it.
    """

    name: str
    path: Path
    classes: int
    subject: str

    @property
    def parts(self) -> Path:
        """The folder of the blocks that are finished before all are."""
        return self.path.with_suffix(".parts")

    def part(self, block: Block) -> Path:
        """Where one block's logits are."""
        return self.parts / f"block-{block[0]:05d}-{block[1]:06d}.npz"


def target_of(folder: Path, ingredient: Ingredient) -> Target:
    """An ingredient's logits in the folder of a bank."""
    path = logits_path(folder, ingredient.key)
    return Target(ingredient.id, path, len(ingredient.labels), f"{folder.name} {ingredient.key}")


def logits_path(folder: Path, key: str) -> Path:
    """Where the logits of the ingredient with this key are."""
    return folder / "logits" / f"{key}.npy"


def record_path(folder: Path, key: str) -> Path:
    """Where the record of these logits is."""
    return folder / "logits" / f"{key}.json"


def open_array(path: Path) -> np.memmap:
    """The array in a file, memory-mapped.

    Raises:
        ValueError: if there is none.
    """
    try:
        if not path.is_file():  # a pipe or a device may be read for ever
            raise BrokenFileError(path, "it is gone, or no regular file", COMPUTE_AGAIN)
        array: np.memmap = np.load(path, mmap_mode="r")
    except BrokenFileError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise BrokenFileError(path, error, COMPUTE_AGAIN) from error
    return array


def write_index(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write the arrays that say of each sample of a bank what it is, by their names; returns the files' SHA-256."""
    hashes = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_to_cache(folder / name, partial(Path.write_bytes, data=buffer.getvalue()))
        hashes[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    return hashes


def write_given(home: Path, given: GivenLogits) -> Path:
    """Write a bank of logits that were computed elsewhere into a cache; returns its folder.

    Equal names are the same model on every split; its order among others depends on what it says.
    """
    hashes = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in given.arrays.items()}
    labels, ids = (hashlib.sha256(array.tobytes()).hexdigest() for array in (given.labels, given.ids))
    content, samples = digest(ARRAYS, hashes, labels, given.classes), len(given.labels)
    key = digest(content, ids, given.split, *["ids"] * given.has_ids)
    folder, index_arrays = home / "banks" / key, {"ids.npy": given.ids, "labels.npy": given.labels}
    if given.has_ids:  # which tell images apart, as digests of their files do
        index_arrays[DIGESTS] = as_digests(given.ids.astype(str))
    refuse_files(*folders_of(folder))
    index = write_index(folder, index_arrays)
    BankManifest(
        data=DataRecord(ARRAYS, given.split, key=content),
        classes=given.classes,
        run=RunRecord({}, "float32", "no", False, False, "float32", "raise"),
        batch_size=samples,
        samples=samples,
        skipped=(),
        rows=samples,
        block_size=samples,
        blocks=((0, 0, samples),),
        pixels="pixels",
        hf_radin=hf_radin.__version__,
        key=key,
        arrays=index,
    ).write(folder)
    keys = []
    for name, array in given.arrays.items():
        nowhere = folder / "checkpoints" / digest(name)
        ingredient = Ingredient(name, f"{GIVEN}{name}", nowhere, given.classes, ARRAYS, content=hashes[name])
        (sha256,) = write_index(folder, {f"logits/{ingredient.key}.npy": array}).values()
        record = LogitsRecord(IngredientRecord.of(ingredient), finite=True, sha256=sha256)
        record.write(folder, key, ingredient.key)
        keys.append(ingredient.key)
    Latest(tuple(keys), (), None).write(folder, key)
    return folder


@dataclass(frozen=True)
class FrontUsers:
    """Models that have a front in common, in the folder of what it gives: that goes with the last of them.

    Args:
        ingredients: one set of them; each set has a file of its own.
    """

    ingredients: tuple[IngredientRecord, ...]

    @classmethod
    def note(cls, folder: Path, ingredients: Ingredients) -> None:
        """Say that these use a folder."""
        users, path = cls(tuple(map(IngredientRecord.of, ingredients))), folder / f"of-{digest(ingredients.keys)}.json"
        if known_record(cls, path, f"{folder.name} {path.name}") != users:  # a checkpoint may have moved
            write_sealed(path, users, f"{folder.name} {path.name}")

    @classmethod
    def are_there(cls, folder: Path) -> bool:
        """Whether a model that uses a folder is where and what it was."""
        paths = folder.glob("of-*.json")
        sets = [known_record(cls, path, f"{folder.name} {path.name}") for path in paths]
        return any(record.is_there for users in sets if users for record in users.ingredients)


def clean_pixels(pixels: Path) -> None:
    """Remove what killed runs left half written beside prepared images, and what is of models that are gone."""
    for folder in pixels.glob(f"{ACTIVATIONS}*"):
        if not FrontUsers.are_there(folder):
            shutil.rmtree(folder, ignore_errors=True)
    remove_partials(pixels, *pixels.glob(f"{ACTIVATIONS}*"))


def folders_of(folder: Path) -> tuple[Path, ...]:
    """The folders that are in that of a bank, and the folder itself, whether they are there or not."""
    inside = (folder / name for name in ("logits", "soups", "features", "fronts", "pruned"))
    return (folder, *inside, *folder.glob("features/*"))


def check_bank(folder: Path, checks: Checks) -> None:
    """Read each file of a bank once, and see that it is what was written.

    Raises:
        ValueError: if there is no bank, or a file is not; it names the file.
    """
    manifest = BankManifest.read(folder)
    if manifest.chosen:
        raise ValueError(f"{folder} has logits of images that a pilot chose; open the folder of the pilot.")
    refuse_files(*folders_of(folder))
    try:
        keys = Latest.read(folder, manifest.key).keys
        records = {key: LogitsRecord.read(folder, manifest.key, key) for key in keys}
        files: dict[Path, str | None] = {folder / name: sha256 for name, sha256 in manifest.arrays.items()}
        files |= {logits_path(folder, key): record.sha256 for key, record in records.items()}
        if broken := checks.broken(files):
            raise not_as_written(broken, _way_out(folder, manifest, broken[0]))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is not a complete logit bank: {error.filename} is gone. {_way_out(folder, manifest, folder)}"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} is not a complete logit bank: {error}") from error


def not_as_written(broken: list[Path], way_out: str) -> BrokenFileError:
    """What is wrong with files that have another SHA-256 than their records say."""
    others = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
    problem = "it is not what was written, by its SHA-256" if broken[0].exists() else "it is gone"
    return BrokenFileError(broken[0], f"{problem}{others}", way_out)


def _way_out(folder: Path, manifest: BankManifest, broken: Path) -> str:
    """What to do about a broken array of a bank."""
    if manifest.origin is None:
        return COMPUTE_AGAIN
    return f"Remove {broken.resolve()} and the folder {folder}: then the bank is downloaded again."


def discard_broken(folder: Path, ingredients: Ingredients, checks: Checks) -> None:
    """Name and remove the files of a bank that are not what was written, so that they are made anew, and only they.

    Killed runs, full disks and power cuts leave whole files; this is for everything else that happens to files.
    """
    folders = (folder / "logits", folder / "soups", *folder.glob("features/*"), *folder.glob("*/*.parts"))
    remove_partials(folder, *folders)
    _discard_broken_index(folder, checks)
    hashes: dict[str, str | None] = {}
    problems: dict[str, Exception] = {}
    for key in ingredients.keys:
        try:
            hashes[key] = LogitsRecord.read(folder, folder.name, key).sha256
        except FileNotFoundError:
            pass
        except ValueError as error:
            problems[key] = error
    broken = checks.broken({logits_path(folder, key): sha256 for key, sha256 in hashes.items()})
    for ingredient in ingredients:
        key, path = ingredient.key, logits_path(folder, ingredient.key)
        if key in hashes and path not in broken:
            shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)  # a killed run left them
            continue
        if path in broken:
            problems[key] = not_as_written([path], MADE_ANEW)
        if key in problems:
            logger.warning("The logits of %s are broken and are computed again: %s", ingredient.id, problems[key])
        take_away(record_path(folder, key))
        take_away(path)  # without a record too: another machine may have one, but for its own file


def _discard_broken_index(folder: Path, checks: Checks) -> None:
    """Remove what says of each sample of a bank what it is, if it is broken; logits that are whole stay."""
    try:
        manifest = read_sealed(BankManifest, folder / BANK, BANK, way_out=MADE_ANEW)
        if manifest.key != folder.name:
            raise BrokenFileError(folder / BANK, f"it is of the bank {manifest.key}", MADE_ANEW)
        broken = checks.broken({folder / name: sha256 for name, sha256 in manifest.arrays.items()})
        if not broken:
            return
        logger.warning("%s", not_as_written(broken, MADE_ANEW))
    except FileNotFoundError:
        pass
    except BrokenFileError as error:
        logger.warning("%s", error)
    for name in (BANK, "ids.npy", "labels.npy", DIGESTS):
        take_away(folder / name)


def write_part(target: Target, block: Block, logits: np.ndarray, seconds: float) -> None:
    """Write one block's logits, and the seconds that they took.

    Forcing each to the disk would take longer than tiny models do: their seal tells whether they are whole.
    """
    path = target.part(block)
    arrays = {"logits": logits, "seconds": np.array(seconds)}
    write_arrays(path, arrays, f"{target.subject} {path.name}", forced=False)


def remove_broken_parts(targets: Iterable[Target]) -> None:
    """Remove the blocks that can't be read, as a power cut may leave them: they are computed anew."""
    for target in targets:
        if not target.parts.is_dir():
            take_away(target.parts)
        broken = sum(_discard_if_broken(target, path) for path in target.parts.glob("block-*.npz"))
        if broken:
            logger.warning("%s: %d blocks of its logits were broken and are computed again.", target.name, broken)


def join_parts(target: Target, blocks: list[Block], samples: int, dtype: str) -> Joined:
    """Put one model's blocks into one file, in order, which is hashed as it is written."""
    is_finite, seconds, sha256 = True, 0.0, hashlib.sha256()
    stored = np.dtype(dtype).newbyteorder("<")

    def write(path: Path) -> None:
        nonlocal is_finite, seconds
        rows = 0
        with path.open("wb") as file:  # not through a memory map: a full disk must be an error, not a crash
            shape = (samples, target.classes)
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": stored.str, "fortran_order": False, "shape": shape})
            file.write(header.getvalue())
            sha256.update(header.getvalue())
            for block in blocks:
                logits, part_seconds = _read_part(target, target.part(block))
                content = np.ascontiguousarray(logits, dtype=stored).tobytes()
                file.write(content)
                sha256.update(content)
                is_finite = is_finite and bool(np.isfinite(logits).all())
                rows, seconds = rows + len(logits), seconds + part_seconds
        if rows != samples:
            raise ValueError(f"{target.name}: {rows} rows of logits for {samples} images; remove {target.parts}.")

    write_to_cache(target.path, write)
    return Joined(is_finite, seconds, sha256.hexdigest())


def _discard_if_broken(target: Target, path: Path) -> bool:
    """Whether a block can't be read; it is removed then."""
    try:
        _read_part(target, path)
    except BrokenFileError:
        return True
    except FileNotFoundError:  # a link to nothing
        take_away(path)
    return False


def _read_part(target: Target, path: Path) -> tuple[np.ndarray, float]:
    """One block's logits `(samples, classes)`, and the seconds that they took.

    Raises:
        BrokenFileError: if the file is broken; it is removed.
    """
    try:
        arrays = read_arrays(path, f"{target.subject} {path.name}", way_out="It is removed; run the same again.")
    except BrokenFileError:
        take_away(path)
        raise
    return arrays["logits"], float(arrays["seconds"])
