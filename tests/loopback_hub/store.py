"""What the loopback Hub stores: repositories as in git, and how the Hub describes them."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

USER = "tester"
NAMESPACES = (USER, "org")  # where USER may write, and see what is private

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npy", ".npz", ".arrow", ".parquet", ".zip")
LFS_SIZE = 1 << 20  # bytes


class HubError(Exception):
    """A refusal. The clients choose the class of their exception by the `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        line = " ".join(message.encode("ascii", "replace").decode().split())  # a header is one line of latin letters
        self.headers |= {"X-Error-Message": line, **({"X-Error-Code": code} if code else {})}


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        stored = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    date: datetime
    files: dict[str, Blob]


@dataclass
class PullRequest:
    """A pull request.

    Args:
        base: the branch that it is for.
        changes: dates and statuses of its changes.
        merged: the commit that merged it.
    """

    number: int
    base: str
    title: str
    text: str
    date: datetime
    changes: list[tuple[datetime, str]] = field(default_factory=list)
    merged: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"

    @property
    def status(self) -> str:
        return self.changes[-1][1] if self.changes else "open"


@dataclass
class Repo:
    id: str
    type: str
    private: bool = False
    gated: str | bool = False
    granted: bool = False  # whether USER may read a gated repository
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1: the commit
    announced: dict[str, int] = field(default_factory=dict)  # LFS uploads to come: sha256, size
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # of uploads to come, by sha256 and number
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def web_path(self) -> str:
        return f"/{self.id}" if self.type == "model" else f"/{self.type}s/{self.id}"

    def visible_to(self, user: str | None) -> bool:
        return not self.private or (user == USER and self.namespace in NAMESPACES)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request, or a full or abbreviated sha."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        commits = [commit for sha, commit in self.commits.items() if len(revision) >= 7 and sha.startswith(revision)]
        if len(commits) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits[0]

    def branch(self, revision: str) -> str:
        """The full name of a ref that can be committed to."""
        for name in (revision, f"refs/heads/{revision}"):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, f"Not a branch: {revision}", "RevisionNotFound")

    def log(self, revision: str) -> Iterator[Commit]:
        commit: Commit | None = self.resolve(revision)
        while commit:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def commit(
        self, ref: str, files: dict[str, Blob], title: str, text: str = "", parent: str | None = None
    ) -> Commit:
        tree = [f"{path} {blob.git_oid}" for path, blob in sorted(files.items())]
        seed = [self.type, self.id, str(len(self.commits)), str(parent), title, *tree]
        sha = hashlib.sha1("\n".join(seed).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, text, datetime.now(timezone.utc), files)
        self.objects |= {blob.sha256: blob.data for blob in files.values() if blob.lfs}
        self.refs[ref] = sha
        return self.commits[sha]


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE or b"\0" in sample)


def make_blobs(files: Mapping[str, bytes]) -> dict[str, Blob]:
    return {path: Blob(data, is_lfs(path, len(data), data[:512])) for path, data in files.items()}


def apply_operations(repo: Repo, files: Mapping[str, Blob], operations: list[dict[str, Any]]) -> dict[str, Blob]:
    """The files after a commit's operations. Raises a HubError, and changes nothing, if one is impossible."""
    files = dict(files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if not path.strip("/") or path.startswith("/") or ".." in path.split("/"):
            raise HubError(400, f"Invalid path in a commit: {path!r}")
        if kind == "file":
            content = value["content"].encode()
            files[path] = Blob(base64.b64decode(content) if value.get("encoding") == "base64" else content, False)
        elif kind == "lfsFile":
            data = repo.objects.get(value["oid"])
            if data is None or value.get("size", len(data)) != len(data):
                raise HubError(400, f"{path} points to an LFS object that was not uploaded: {value['oid']}")
            files[path] = Blob(data, True)
        elif kind in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if kind == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            files = {name: blob for name, blob in files.items() if name not in gone}
        else:
            raise HubError(400, f"Unknown operation in a commit: {kind}")
    return files


def timestamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # the one format that huggingface_hub parses


def tree_entries(files: Mapping[str, Blob]) -> dict[str, dict[str, Any]]:
    """All files and folders, by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in files.items():
        entries[path] = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path}
        if blob.lfs:
            entries[path]["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
        for folder in (path[: slash.start()] for slash in re.finditer("/", path)):
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
    return dict(sorted(entries.items()))


def flat_metadata(readme: str) -> dict[str, Any]:
    """The scalars and lists of scalars at the head of a card, without nested fields."""
    card: dict[str, Any] = {}
    key = ""
    head = readme[4:].split("\n---", 1)[0] if readme.startswith("---\n") else ""
    for line in head.splitlines():
        if match := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            key, value = match.groups()
            card[key] = value.strip("[]").split(", ") if value.startswith("[") else value.strip("'\"") or []
        elif (match := re.fullmatch(r"\s*- (?!.*:(?: |$))(.+)", line)) and isinstance(card.get(key), list):
            card[key].append(match[1].strip("'\""))
    return {key: value for key, value in card.items() if value}


def model_config(files: Mapping[str, Blob]) -> dict[str, Any]:
    try:
        config = json.loads(files["config.json"].data)
    except (KeyError, ValueError):
        return {}
    return {key: config[key] for key in ("architectures", "model_type") if key in config}


def describe(repo: Repo, commit: Commit) -> dict[str, Any]:
    """What functions such as model_info report. Task and tags come from the card and config.json, as on the Hub."""
    readme = commit.files.get("README.md", Blob(b"", False)).data.decode(errors="replace")
    card, config = flat_metadata(readme), model_config(commit.files)
    task = card.get("pipeline_tag")
    if not task and any(name.endswith("ForImageClassification") for name in config.get("architectures") or ()):
        task = "image-classification"
    library = card.get("library_name", "transformers" if config else None)
    bases = card.get("base_model", [])
    tags = [*card.get("tags", []), library, task, config.get("model_type")]
    tags += [f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases)]
    tags += [f"license:{card['license']}"] if "license" in card else []
    return {
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "createdAt": timestamp(next(iter(repo.commits.values())).date),
        "lastModified": timestamp(commit.date),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "library_name": library,
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(filter(None, tags))),
        "cardData": card,
        "config": config,
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
    }


def describe_collection(slug: str, items: list[tuple[str, str]]) -> dict[str, Any]:
    """What get_collection reports. Items are pairs of type and id, in order; the id of a collection is its slug."""
    namespace, _, name = slug.partition("/")
    entries = []
    for position, (kind, item) in enumerate(items):
        entry = {"_id": hashlib.sha1(f"{slug} {kind} {item}".encode()).hexdigest()[:24], "position": position}
        names = {"id": item.rpartition("-")[2], "slug": item} if kind == "collection" else {"id": item}
        entries.append({**entry, "type": kind, **names})
    return {
        "slug": slug,
        "title": name.rpartition("-")[0].replace("-", " ").capitalize() or name,  # the last part makes it unique
        "owner": {"name": namespace, "type": "user" if namespace == USER else "org"},
        "items": entries,
        "lastUpdated": timestamp(datetime.now(timezone.utc)),
        "position": 0,
        "private": False,
        "theme": "green",
        "upvotes": 0,
    }


def siblings_with_sizes(files: Mapping[str, Blob]) -> list[dict[str, Any]]:
    """The siblings as `files_metadata=True` shows them, with the same facts as the tree."""
    siblings = []
    for path, entry in tree_entries(files).items():
        if entry["type"] == "file":
            lfs = {"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
            siblings.append({"rfilename": path, "size": entry["size"], "blobId": entry["oid"], **lfs})
    return siblings
