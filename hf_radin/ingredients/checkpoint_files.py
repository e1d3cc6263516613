"""Read the small files of checkpoints and the headers of their weights, but never the weights."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_radin.checkpoints import lora
from hf_radin.checkpoints.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    FLOATS,
    HEADER_LIMIT,
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
from hf_radin.ingredients.resolve import Place, is_of_run
from hf_radin.runtime.files import is_dir
from hf_radin.runtime.hub_commit import list_files
from hf_radin.runtime.hub_errors import asking_the_hub
from hf_radin.runtime.processes import progress_bar

# Checkpoints that are read in parallel: most of the time goes by waiting for the Hub.
THREADS = 8


@dataclass(frozen=True)
class Options:
    """How checkpoints are read.

    Args:
        allow_pickle, trust_remote_code: what the user allows.
        token: for the Hub.
        base_model: of adapters, in place of the one that they name.
        base_revisions: of base models on the Hub by their ids, in place of those that adapters name.
        header_limit: bytes of a header at most; a file on the Hub that claims more is refused before it is read.
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False
    token: str | bool | None = None
    base_model: str | None = None
    base_revisions: Mapping[str, str] = field(default_factory=dict)
    header_limit: int = HEADER_LIMIT


@dataclass(frozen=True)
class CheckpointFiles:
    """The small files of a checkpoint, and what is known of the large ones.

    Args:
        place: where it is.
        folder: with the small files.
        revision: commit sha on the Hub; `sha256:` and the hash of its files on disk.
        header: of the weights, by the names of tensors in the model; None for pickles on the Hub, which can't be read
            before they are downloaded.
        weights: a hash that is equal for equal weights; None if the Hub does not know it.
        size: bytes of the weights.
        stamp: sizes and times of a folder's files.
        base: the model that a LoRA adapter is merged into.
        wrapped: a tensor's name on disk that shows what wrapped the model when it was saved; empty if there is none.
    """

    place: Place
    folder: Path
    revision: str
    header: Header | None
    weights: str | None
    size: int
    stamp: str | None = None
    base: CheckpointFiles | None = None
    wrapped: str = ""

    @property
    def dtypes(self) -> str:
        """The float dtypes of the weights, as in `BF16+F32`; `?` if they are not known."""
        return "+".join(sorted({dtype for dtype, _ in (self.header or {}).values() if dtype in FLOATS})) or "?"


def read_places(places: list[Place], options: Options) -> list[CheckpointFiles | ValueError]:
    """The files of each place, or what is wrong with it; several places are read at a time."""
    checkpoints = _read_in_parallel(places, options, "Looking at checkpoints")
    base_places = {
        files.place: _base_place(files, options)
        for files in checkpoints
        if isinstance(files, CheckpointFiles) and _is_adapter(files)
    }
    if not base_places:
        return checkpoints
    distinct = list(dict.fromkeys(place for place in base_places.values() if isinstance(place, Place)))
    bases = dict(zip(distinct, _read_in_parallel(distinct, options, "Looking at base models"), strict=True))
    return [
        _with_base(files, base_places[files.place], bases)
        if isinstance(files, CheckpointFiles) and files.place in base_places
        else files
        for files in checkpoints
    ]


def _read_in_parallel(places: list[Place], options: Options, title: str) -> list[CheckpointFiles | ValueError]:
    def attempt(place: Place) -> CheckpointFiles | ValueError:
        try:
            return _read_folder(place, place.folder, options) if place.folder else _read_from_hub(place, options)
        except ValueError as error:
            folder = str(place.folder.resolve()) if place.folder else place.name
            text = str(error).replace(folder, place.name)  # the name that the user knows
            if place.folder and is_of_run(place.folder):
                text += " If a Trainer is still writing it, wait until it has, or leave it out."
            return ValueError(text)
        except (OSError, RuntimeError) as error:  # no permission, links in a circle
            return ValueError(f"{place.name} can't be read: {error}")
        finally:
            bar.update()

    pool = ThreadPoolExecutor(THREADS)
    try:
        with progress_bar(total=len(places), desc=title, unit="checkpoint") as bar:
            return list(pool.map(attempt, places))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt waits for no Hub


def _read_folder(place: Place, given: Path, options: Options) -> CheckpointFiles:
    folder = given.resolve()
    names = {path.name for path in folder.iterdir()}
    try:
        _refuse_incomplete(place.name, names, options)
    except ValueError as error:
        patterns = [pattern for pattern in ("*", "*/checkpoint-*") if _holds_checkpoints(folder, pattern)]
        inner = [f"{given.as_posix()}/{pattern}" for pattern in patterns]
        raise ValueError(f"{error} Its folders look like checkpoints: {inner[0]}." if inner else str(error)) from error
    refuse_redirection(folder, place.name, choose_weights(names, allow_pickle=options.allow_pickle))
    header, wrapped = _unwrapped(place.name, read_header(folder, allow_pickle=options.allow_pickle))
    stamp = files_stamp(folder, allow_pickle=options.allow_pickle)
    hashes = file_hashes(folder, allow_pickle=options.allow_pickle)
    return CheckpointFiles(
        place=place,
        folder=folder,
        revision=content_hash(hashes),
        header=header,
        weights=weights_hash(hashes),
        size=sum(path.stat().st_size for path in weight_files(folder, allow_pickle=options.allow_pickle)),
        stamp=stamp,
        wrapped=wrapped,
    )


def _unwrapped(name: str, header: Header) -> tuple[Header, str]:
    """The header by the names of tensors in the model, and the first name on disk that differs from that.

    Args:
        name: of the checkpoint, for errors.
    """
    plain = plain_names(header, name)
    wrapped = next((on_disk for on_disk, plain_name in plain.items() if on_disk != plain_name), "")
    return {plain_name: header[on_disk] for on_disk, plain_name in plain.items()}, wrapped


def _holds_checkpoints(folder: Path, pattern: str) -> bool:
    """Whether a folder inside that matches a pattern has a checkpoint."""
    return any((inner / name).is_file() for inner in folder.glob(pattern) for name in (CONFIG, ADAPTER_CONFIG))


def _refuse_incomplete(name: str, files: set[str], options: Options) -> None:
    """Raise a ValueError for files without configuration or weights, and for two checkpoints in one folder."""
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


def _read_from_hub(place: Place, options: Options) -> CheckpointFiles:
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    repo_id = place.repo_id or ""
    revision = place.revision or "main"
    inside = f"{place.subfolder}/" if place.subfolder else ""
    small = [f"{glob.escape(inside)}{name}" for name in SMALL_FILES] + ["README.md"]
    if options.trust_remote_code:
        small.append(f"{glob.escape(inside)}*.py")
    missing = f"There is no folder {repo_id!r} here and no such model on the Hub"
    with asking_the_hub(repo_id, revision=revision, missing=missing):
        if is_offline_mode():
            snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=small, local_files_only=True))
            files = _read_folder(place, snapshot / place.subfolder, options)
            return replace(files, folder=snapshot / place.subfolder, revision=snapshot.name, stamp=None)
        # under the name that the user gave, so that the cache has it when there is no network
        snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=small, token=options.token))
        _, repo_files = list_files(HfApi(token=options.token), repo_id, "model", snapshot.name)
    listed = {path.removeprefix(inside): file for path, file in repo_files.items() if path.startswith(inside)}
    _refuse_incomplete_repo(place, set(repo_files), {name for name in listed if "/" not in name}, options)
    entry = choose_weights(set(listed), allow_pickle=options.allow_pickle) or ""
    refuse_redirection(snapshot / place.subfolder, place.name, entry)
    names = [entry]
    if entry.endswith(".index.json"):
        names = read_index(Path(_download(place, f"{inside}{entry}", snapshot.name, options)))
        if missing_names := [name for name in names if name not in listed]:
            raise ValueError(f"{place.name}: {entry} names {missing_names[0]!r}, which is not there.")
    header: Header | None = {}
    for name in names:
        shard = _read_hub_header(place, f"{inside}{name}", snapshot, listed[name].size or 0, options)
        header = None if shard is None or header is None else {**header, **shard}
    header, wrapped = (None, "") if header is None else _unwrapped(place.name, header)
    contents = {name: listed[name].sha256 or f"blob:{listed[name].blob}" for name in names}
    are_known = all(listed[name].content for name in names)  # else different weights would look the same
    return CheckpointFiles(
        place=place,
        folder=snapshot / place.subfolder,
        revision=snapshot.name,  # the folder of a snapshot is named after the commit
        header=header,
        weights=weights_hash(contents) if are_known else None,
        size=sum(listed[name].size or 0 for name in names),
        wrapped=wrapped,
    )


def _refuse_incomplete_repo(place: Place, paths: set[str], files: set[str], options: Options) -> None:
    """Like `_refuse_incomplete`, with a hint if the repository has its checkpoints in folders.

    Args:
        paths: all in the repository.
        files: names of those that lie where the checkpoint should be.
    """
    try:
        _refuse_incomplete(place.name, files, options)
    except ValueError as error:
        folders = sorted({path.rpartition("/")[0] for path in paths if path.endswith(f"/{CONFIG}")})
        if not folders or CONFIG in files:
            raise
        hint = f"There are checkpoints in {', '.join(folders[:3])}: name one as {place.repo_id}:{folders[0]}."
        raise ValueError(f"{error} {hint}") from error


def _read_hub_header(place: Place, path: str, snapshot: Path, size: int, options: Options) -> Header | None:
    """The header of a file of weights on the Hub; None for a pickle.

    Only the header's bytes are read: `get_safetensors_metadata` takes 100 kB of each file, and a ViT's header has 25.

    Args:
        path: in the repository.
        size: bytes of the file.
    """
    from huggingface_hub import hf_hub_url

    if not path.endswith(".safetensors"):
        return None
    file = _HubFile(hf_hub_url(place.repo_id or "", path, revision=snapshot.name), options.token)
    with asking_the_hub(place.name, revision=snapshot.name):
        try:
            return read_layout(file, size, limit=options.header_limit).header
        except ValueError as error:
            raise ValueError(f"{place.name}: {path} is not a whole file of weights ({error}).") from error


@dataclass
class _HubFile:
    """The beginning of a file on the Hub. Of a server that sends all of it, no more is taken than was asked for.

    Args:
        url: of the file.
        token: for the Hub.
        place: the byte that is read next.
    """

    url: str
    token: str | bool | None = field(repr=False)
    place: int = 0

    def read(self, size: int) -> bytes:
        """The next bytes."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        start, end = self.place, self.place + size
        if not size:
            return b""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with http_stream_backoff(
            "GET",
            self.url,
            headers=build_hf_headers(token=self.token) | headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            hf_raise_for_status(response)
            skipped = 0 if response.status_code == 206 else start
            content = b""
            for part in response.iter_bytes():
                content += part
                if len(content) >= skipped + size:
                    break
        self.place = end
        return content[skipped : skipped + size]


def _download(place: Place, path: str, revision: str, options: Options) -> str:
    from huggingface_hub import hf_hub_download

    with asking_the_hub(place.name, revision=revision):
        return hf_hub_download(place.repo_id or "", path, revision=revision, token=options.token)


def _is_adapter(files: CheckpointFiles) -> bool:
    return (files.folder / ADAPTER_CONFIG).is_file()


def _base_place(adapter: CheckpointFiles, options: Options) -> Place | ValueError:
    """Where the base model of an adapter is: in a folder, relative to here or to the adapter, or on the Hub."""
    try:
        name, revision = lora.read_base(adapter.folder)
    except ValueError as error:
        return error
    folders = [Path(name), adapter.folder / name] if adapter.place.folder else []
    if options.base_model is not None:
        name, revision, folders = options.base_model, None, [Path(options.base_model)]
    if folder := next(filter(is_dir, folders), None):
        return Place(folder.as_posix(), folder)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip("/"):
        return ValueError(
            f"{adapter.place.name}: its base model {name!r} is not here; say where it is with base_model=... "
            "(--base-model)."
        )
    return Place(name, repo_id=name, revision=options.base_revisions.get(name, revision))


def _with_base(
    adapter: CheckpointFiles, place: Place | ValueError, bases: dict[Place, CheckpointFiles | ValueError]
) -> CheckpointFiles | ValueError:
    """An adapter's files with those of its base model, or what is wrong with that.

    Args:
        place: of the base model.
        bases: the files of base models.
    """
    if isinstance(place, ValueError):
        return place
    base = bases[place]
    if isinstance(base, ValueError):
        return ValueError(
            f"{adapter.place.name}: its base model {place.name!r} can't be used: {base} If it is elsewhere, say where "
            "with base_model=... (--base-model)."
        )
    if _is_adapter(base):
        return ValueError(f"{adapter.place.name}: its base model {place.name} is an adapter itself.")
    return replace(adapter, base=base)
