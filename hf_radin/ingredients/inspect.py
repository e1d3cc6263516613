"""Look at checkpoints: of each what is small, its configuration and the headers of its weights; never the weights."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_radin.checkpoints import lora
from hf_radin.checkpoints.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    FLOATS,
    SMALL_FILES,
    Header,
    choose_weights,
    content_hash,
    file_hashes,
    files_stamp,
    plain_names,
    read_header,
    read_index,
    read_layout,
    refuse_redirection,
    weight_files,
    weights_hash,
    without_weights,
)
from hf_radin.ingredients.resolve import Place
from hf_radin.runtime.files import is_dir
from hf_radin.runtime.hub_errors import asking_the_hub
from hf_radin.runtime.processes import progress_bar

# Checkpoints looked at in parallel: on the Hub it is waiting for answers that takes the time.
AT_A_TIME = 8


@dataclass(frozen=True)
class Options:
    """What the user allows, who they are, and where and at which revisions the base models of adapters are wanted."""

    allow_pickle: bool = False
    trust_remote_code: bool = False
    token: str | bool | None = None
    base_model: str | None = None
    base_revisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """The small files of one checkpoint, and what is known of the large ones.

    Args:
        folder: holds the small files.
        header: None for pickles on the Hub, which tell nothing before they are there.
        weights: equal for equal weights; None if the Hub does not say.
        size: bytes of the weights.
        wrapped: the name of a tensor on disk that says what wrapped the model when it was saved; empty if none does.
        base: what a LoRA adapter is merged into.
    """

    place: Place
    folder: Path
    revision: str
    header: Header | None
    weights: str | None
    size: int
    stamp: str | None = None
    base: Files | None = None
    wrapped: str = ""

    @property
    def dtypes(self) -> str:
        """The floats that the weights are kept in."""
        found = {dtype for dtype, _ in (self.header or {}).values() if dtype in FLOATS}
        return "+".join(sorted(found)) or "?"


def look_at(places: list[Place], options: Options) -> list[Files | ValueError]:
    """The files of each place, or what is wrong with it; several places at a time."""
    found = _each(partial(_look, options=options), places, "Looking at checkpoints")
    adapters = [one for one in found if isinstance(one, Files) and _is_adapter(one)]
    if not adapters:
        return found
    named = {one.place: _base_of(one, options) for one in adapters}
    wanted = list(dict.fromkeys(place for place in named.values() if isinstance(place, Place)))
    bases = dict(zip(wanted, _each(partial(_look, options=options), wanted, "Looking at base models"), strict=True))
    return [_on_base(one, named, bases) if isinstance(one, Files) and one.place in named else one for one in found]


def _each(look: Callable[[Place], Files], places: list[Place], title: str) -> list[Files | ValueError]:
    def attempt(place: Place) -> Files | ValueError:
        try:
            return look(place)
        except ValueError as error:
            where = str(place.folder.resolve()) if place.folder else place.name
            return ValueError(str(error).replace(where, place.name))  # by the name that the user knows
        except (OSError, RuntimeError) as error:  # no permission, links in a circle
            return ValueError(f"{place.name} can't be read: {error}")
        finally:
            bar.update()

    with (
        progress_bar(total=len(places), desc=title, unit="checkpoint") as bar,
        ThreadPoolExecutor(AT_A_TIME) as pool,
    ):
        return list(pool.map(attempt, places))


def _look(place: Place, options: Options) -> Files:
    return _in_folder(place, place.folder, options) if place.folder else _on_hub(place, options)


def _in_folder(place: Place, given: Path, options: Options) -> Files:
    folder = given.resolve()
    names = {path.name for path in folder.iterdir()}
    try:
        _refuse_incomplete(place.name, names, options)
    except ValueError as error:
        inner = [f"{given.as_posix()}/{part}" for part in ("*", "*/checkpoint-*") if _holds_checkpoints(folder, part)]
        raise ValueError(f"{error} Its folders look like checkpoints: {inner[0]}." if inner else str(error)) from error
    refuse_redirection(folder, place.name, choose_weights(names, allow_pickle=options.allow_pickle))
    header, wrapped = _plain(place.name, read_header(folder, allow_pickle=options.allow_pickle))
    stamp = files_stamp(folder, allow_pickle=options.allow_pickle)
    hashes = file_hashes(folder, allow_pickle=options.allow_pickle)
    return Files(
        place=place,
        folder=folder,
        revision=content_hash(hashes),
        header=header,
        weights=weights_hash(hashes),
        size=sum(path.stat().st_size for path in weight_files(folder, allow_pickle=options.allow_pickle)),
        stamp=stamp,
        wrapped=wrapped,
    )


def _plain(name: str, header: Header) -> tuple[Header, str]:
    """A header by the names that tensors have in the model, and a name on disk that is another; empty if none is."""
    plain = plain_names(header, name)
    wrapped = next((on_disk for on_disk, plain_name in plain.items() if on_disk != plain_name), "")
    return {plain_name: header[on_disk] for on_disk, plain_name in plain.items()}, wrapped


def _holds_checkpoints(folder: Path, part: str) -> bool:
    names = (CONFIG, ADAPTER_CONFIG)
    return any((inner / name).is_file() for inner in folder.glob(part) for name in names)


def _refuse_incomplete(name: str, files: set[str], options: Options) -> None:
    """Refuse what lacks its configuration or its weights, or is two checkpoints in one."""
    if not files & {CONFIG, ADAPTER_CONFIG}:
        raise ValueError(f"{name}: no {CONFIG}; a checkpoint as `save_pretrained` writes it has one.")
    entry = choose_weights(files, allow_pickle=options.allow_pickle)
    if entry is None:
        raise ValueError(f"{name}: {without_weights(files)}")
    if (entry == ADAPTER) != (ADAPTER_CONFIG in files):
        raise ValueError(
            f"{name}: {ADAPTER_CONFIG} is {'missing' if entry == ADAPTER else 'there'} beside "
            f"{entry}: a checkpoint is either whole weights or an adapter."
        )


def _on_hub(place: Place, options: Options) -> Files:
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    repo_id = place.repo_id or ""
    wanted = place.revision or "main"
    inside = f"{place.subfolder}/" if place.subfolder else ""
    small = [f"{glob.escape(inside)}{name}" for name in SMALL_FILES] + ["README.md"]
    if options.trust_remote_code:
        small.append(f"{glob.escape(inside)}*.py")
    missing = f"There is no folder {repo_id!r} here and no such model on the Hub"
    with asking_the_hub(repo_id, revision=wanted, missing=missing):
        if is_offline_mode():
            snapshot = Path(snapshot_download(repo_id, revision=wanted, allow_patterns=small, local_files_only=True))
            found = _in_folder(place, snapshot / place.subfolder, options)
            return replace(found, folder=snapshot / place.subfolder, revision=snapshot.name, stamp=None)
        # by the name that the user gave, so that the cache knows it when there is no network
        snapshot = Path(snapshot_download(repo_id, revision=wanted, allow_patterns=small, token=options.token))
        info = HfApi(token=options.token).model_info(repo_id, revision=snapshot.name, files_metadata=True)
    listed = {one.rfilename: one for one in info.siblings or []}
    mine = {path.removeprefix(inside): one for path, one in listed.items() if path.startswith(inside)}
    _refuse_nothing(place, set(listed), {name for name in mine if "/" not in name}, options)
    entry = choose_weights(set(mine), allow_pickle=options.allow_pickle) or ""
    refuse_redirection(snapshot / place.subfolder, place.name, entry)
    names = [entry]
    if entry.endswith(".index.json"):
        names = read_index(Path(_download(place, f"{inside}{entry}", snapshot.name, options)))
        if lost := [name for name in names if name not in mine]:
            raise ValueError(f"{place.name}: {entry} names {lost[0]!r}, which is not there.")
    header: Header | None = {}
    for name in names:
        part = _header(place, f"{inside}{name}", snapshot, mine[name].size or 0, options)
        header = None if part is None or header is None else {**header, **part}
    header, wrapped = (None, "") if header is None else _plain(place.name, header)
    hashes = {name: mine[name].lfs.sha256 if mine[name].lfs else f"blob:{mine[name].blob_id}" for name in names}
    return Files(
        place=place,
        folder=snapshot / place.subfolder,
        revision=snapshot.name,  # snapshots are kept under their commit
        header=header,
        weights=weights_hash(hashes),
        size=sum(mine[name].size or 0 for name in names),
        wrapped=wrapped,
    )


def _refuse_nothing(place: Place, listed: set[str], files: set[str], options: Options) -> None:
    """As `_refuse_incomplete`, with a hint where a repository has its checkpoints in folders."""
    try:
        _refuse_incomplete(place.name, files, options)
    except ValueError as error:
        folders = sorted({path.rpartition("/")[0] for path in listed if path.endswith(f"/{CONFIG}")})
        if not folders or CONFIG in files:
            raise
        hint = f"There are checkpoints in {', '.join(folders[:3])}: name one as {place.repo_id}:{folders[0]}."
        raise ValueError(f"{error} {hint}") from error


def _header(place: Place, path: str, snapshot: Path, size: int, options: Options) -> Header | None:
    """What one file of weights on the Hub says at its beginning; None for a pickle.

    Just these bytes are read: `get_safetensors_metadata` takes 100 kB of each file, and a ViT's header has 25.
    """
    from huggingface_hub import HfFileSystem

    if not path.endswith(".safetensors"):
        return None
    with asking_the_hub(place.name, revision=snapshot.name):
        files = HfFileSystem(token=options.token)
        with files.open(f"{place.repo_id}/{path}", revision=snapshot.name, cache_type="none") as file:
            try:
                return read_layout(file, size).header
            except ValueError as error:
                raise ValueError(f"{place.name}: {path} is not a whole file of weights ({error}).") from error


def _download(place: Place, path: str, revision: str, options: Options) -> str:
    from huggingface_hub import hf_hub_download

    with asking_the_hub(place.name, revision=revision):
        return hf_hub_download(place.repo_id or "", path, revision=revision, token=options.token)


def _is_adapter(files: Files) -> bool:
    return (files.folder / ADAPTER_CONFIG).is_file()


def _base_of(adapter: Files, options: Options) -> Place | ValueError:
    """Where the base model of an adapter is: a folder, seen from here or from the adapter, or on the Hub."""
    try:
        name, revision = lora.read_base(adapter.folder)
    except ValueError as error:
        return error
    near = [Path(name), adapter.folder / name] if adapter.place.folder else []
    if options.base_model is not None:
        name, revision, near = options.base_model, None, [Path(options.base_model)]
    folder = next((one for one in near if is_dir(one)), None)
    if folder:
        return Place(folder.as_posix(), folder)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip("/"):
        return ValueError(
            f"{adapter.place.name}: its base model {name!r} is not here; say where it is with base_model=... "
            "(--base-model)."
        )
    return Place(name, repo_id=name, revision=options.base_revisions.get(name, revision))


def _on_base(
    adapter: Files, named: dict[Place, Place | ValueError], bases: dict[Place, Files | ValueError]
) -> Files | ValueError:
    place = named[adapter.place]
    if isinstance(place, ValueError):
        return place
    base: Any = bases[place]
    if isinstance(base, ValueError):
        return ValueError(
            f"{adapter.place.name}: its base model {place.name!r} can't be used: {base} If it is elsewhere, say where "
            "with base_model=... (--base-model)."
        )
    if _is_adapter(base):
        return ValueError(f"{adapter.place.name}: its base model {place.name} is an adapter itself.")
    return replace(adapter, base=base)
