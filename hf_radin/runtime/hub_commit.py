"""One commit of some files to a repository: planned before it is made, refused where it would hurt, read back."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_radin.runtime.files import is_of_a_checkpoint
from hf_radin.runtime.hub_errors import asking_the_hub, is_passing, patiently

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

logger = logging.getLogger(__name__)

# Models in other formats than ours, which somebody may load in place of it.
_OTHERWISE = re.compile(r"(pytorch|adapter)_model.*|tf_model\.h5|flax_model\.msgpack|video_preprocessor_config\.json")

# Files up to so many bytes are read once: what is compared, sent and looked for is then the same.
SMALL = 10_000_000

Files = Mapping[str, "Path | bytes"]
# Of each file what its content is called by: where it is kept as a large one, and where it is not.
Hashes = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Plan:
    """What a push does to a repository.

    Args:
        head: the commit that it builds on; None if there is no repository yet.
        changed: names of the files that are new there or differ.
        removed: of those that made a model of what was there.
        replaced: names of the changed ones that something else lies under now.
    """

    head: str | None
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether all is there already."""
        return self.head is not None and not self.changed and not self.removed


def hashes_of(files: Files) -> Hashes:
    """Of each file what its content is called by."""
    return {name: _hashes(content) for name, content in files.items()}


def plan_commit(
    repo_id: str,
    files: Hashes,
    *,
    repo_type: str = "model",
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    replaces: Collection[str] = (),
) -> Plan:
    """What a push of these files would do. Nothing is changed.

    Args:
        replaces: names of files that an earlier soup left there, and that go with it.

    Raises:
        ValueError: if the repository holds something else, which neither `overwrite` nor a pull request allows.
    """
    repo_id = full_id(repo_id, token)
    there = _contents(repo_id, repo_type, token, revision)
    if there is None:
        if create_pr:
            raise ValueError(f"There is no repository {repo_id} to open a pull request in: push without (create_pr).")
        if revision not in (None, "main"):
            raise ValueError(f"There is no repository {repo_id} yet, and so no branch {revision!r}: push to it first.")
        return Plan(None, tuple(files), ())
    head, found = there
    changed = tuple(name for name, called in files.items() if found.get(name) not in called)
    others = [name for name in found if name not in files or name in changed]
    if ((changed and others) or _removed(files, found, replaces)) and not overwrite and not create_pr:
        raise ValueError(
            f"{repo_id} holds something else ({', '.join(sorted(others)[:3])}{', ...' if len(others) > 3 else ''}): "
            "name another repository, open a pull request (create_pr, --create-pr), or pass overwrite (--overwrite)."
        )
    return Plan(head, changed, _removed(files, found, replaces), tuple(name for name in changed if name in found))


def commit_files(
    repo_id: str,
    files: Files,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    overwrite: bool = False,
    replaces: Collection[str] = (),
) -> CommitInfo:
    """Make the repository if need be, upload files under their names in one commit, and compare what arrived.

    The commit builds on what was looked at: where somebody else was faster it is refused. What fails in passing is
    tried again, after a look whether it did not arrive after all.

    Raises:
        ValueError: if the id is none, the token may not write there, or the repository holds something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    refuse_offline(repo_id)
    repo_id = full_id(repo_id, token)
    api = HfApi(token=token)
    try:
        files = {
            name: one if isinstance(one, bytes) or one.stat().st_size > SMALL else one.read_bytes()
            for name, one in files.items()
        }
        hashes = hashes_of(files)
    except OSError as error:
        raise ValueError(f"{repo_id}: what is to be pushed can't be read: {error}.") from error
    where: dict[str, Any] = {"repo_type": repo_type, "revision": revision, "create_pr": create_pr}
    base: str | None = None

    def once() -> CommitInfo:
        nonlocal base
        wanted = plan_commit(repo_id, hashes, token=token, overwrite=overwrite, replaces=replaces, **where)
        if wanted.is_done and wanted.head:
            logger.info("%s holds just that already.", repo_id)
            return _known(repo_id, repo_type, wanted.head, commit_message)
        if wanted.head is None:
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            # what is in a new one is not built on unseen
            wanted = plan_commit(repo_id, hashes, token=token, replaces=replaces, **where)
        base = base or wanted.head
        if wanted.head != base:  # and is not what is pushed
            raise ValueError(f"{repo_id} has changed while it was pushed to: look at it, and push again.")
        # not `upload_folder`: with Xet it splits a large folder into several commits
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        for one in added:
            if one.upload_info.sha256.hex() != hashes[one.path_in_repo][0]:
                raise ValueError(f"{repo_id}: {one.path_in_repo} has changed meanwhile. Push again.")
        removed = [CommitOperationDelete(name) for name in wanted.removed]
        parent = None if create_pr else wanted.head
        commit = api.create_commit(
            repo_id, added + removed, commit_message=commit_message, parent_commit=parent, **where
        )
        _compare(repo_id, repo_type, token, commit, hashes)
        return commit

    def attempt() -> CommitInfo:
        try:
            with asking_the_hub(repo_id, revision=revision):
                return once()
        except ValueError as error:
            if create_pr and is_passing(error):  # it can't be told whether it was opened after all: not again
                raise ValueError(
                    f"{error} A pull request may be open: look at {repo_id} before you push again."
                ) from error
            raise

    return patiently(attempt)


def refuse_offline(repo_id: str) -> None:
    """Raises a ValueError where the Hub may not be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{repo_id} can't be pushed to: HF_HUB_OFFLINE is set. Save the soup, and push it later with "
            "`hf-radin push FOLDER ID`."
        )


def check_target(
    repo_id: str,
    *,
    repo_type: str = "model",
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
) -> None:
    """See that what will be computed can be pushed, before it is; nothing is made there yet.

    Raises:
        ValueError: if the id is none, the token may not write there, or the repository holds what no soup is.
    """
    from huggingface_hub import HfApi

    refuse_offline(repo_id)
    repo_id = full_id(repo_id, token)
    api = HfApi(token=token)
    there = patiently(lambda: _contents(repo_id, repo_type, token, revision))
    with asking_the_hub(repo_id, revision=revision):
        user = _who(api)
        if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"{repo_id}: the token may only read. Make one that may write (hf.co/settings/tokens).")
        if there is not None:
            if not create_pr:
                api.auth_check(repo_id, repo_type=repo_type, write=True)
        elif create_pr:
            raise ValueError(f"There is no repository {repo_id} to open a pull request in.")
        elif (namespace := repo_id.partition("/")[0]) not in _namespaces(user):
            raise ValueError(
                f"{repo_id} can't be made: {user.get('name')} may not write under {namespace!r}, only under "
                f"{', '.join(_namespaces(user))}."
            )
    found = there[1] if there and repo_type == "model" else {}
    if found and "recipe.json" not in found and not overwrite and not create_pr:
        raise ValueError(
            f"{repo_id} holds something else ({', '.join(sorted(found)[:3])}): name another repository, open a pull "
            "request (--create-pr), or pass overwrite (--overwrite)."
        )


def is_private(
    repo_id: str, *, repo_type: str = "model", private: bool | None = None, token: str | bool | None = None
) -> bool:
    """Whether what is pushed there is not for everybody; of a repository that is yet to be made, what is asked for.

    Raises:
        ValueError: if one that is asked to be private is there and is not.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def ask() -> bool:
        with asking_the_hub(repo_id):
            try:
                found = HfApi(token=token).repo_info(full_id(repo_id, token), repo_type=repo_type, expand=["private"])
            except RepositoryNotFoundError:
                return bool(private)
        if private and not found.private:
            raise ValueError(
                f"{repo_id} is there and everybody can read it: make it private in its settings, or name another."
            )
        return bool(found.private)

    return patiently(ask)


def is_repo_id(name: str) -> bool:
    """Whether a name is that of a repository with its namespace."""
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None


def hidden_repositories(repositories: Iterable[tuple[str, str]]) -> list[str]:
    """The ids of repositories that somebody who is not logged in does not find.

    Args:
        repositories: ids and types (`model`, `dataset`).

    Raises:
        ValueError: if the Hub can't be asked.
    """
    repositories = sorted({*repositories})
    return list(dict.fromkeys(name for name, kind in repositories if patiently(partial(_is_hidden, name, kind))))


def _is_hidden(name: str, repo_type: str) -> bool:
    """Whether nobody who is not logged in finds a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking_the_hub(name):
        try:
            HfApi(token=False).repo_info(name, repo_type=repo_type, expand=["private"])
        except RepositoryNotFoundError:
            return True
    return False


def full_id(repo_id: str, token: str | bool | None) -> str:
    """An id with its namespace, which by default is that of whoever asks."""
    from huggingface_hub import HfApi

    def ask() -> str:
        with asking_the_hub(repo_id):
            return f"{_who(HfApi(token=token))['name']}/{repo_id}"

    return repo_id if "/" in repo_id else patiently(ask)


def _who(api: HfApi) -> dict[str, Any]:
    """Who asks. Raises a ValueError if the answer says nothing of it."""
    user = api.whoami()
    if not isinstance(user, dict) or "name" not in user:
        raise ValueError(f"The Hub does not say who asks ({str(user)[:100]}); is HF_ENDPOINT a Hub?")
    return user


def _namespaces(user: Mapping[str, Any]) -> list[str]:
    """Where somebody may make repositories."""
    orgs = [one["name"] for one in user.get("orgs", ()) if one.get("roleInOrg", "write") != "read"]
    return [str(user.get("name")), *orgs]


def _contents(
    repo_id: str, repo_type: str, token: str | bool | None, revision: str | None
) -> tuple[str, dict[str, str]] | None:
    """The last commit, and of each file there what its content is called by; None if there is no such repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking_the_hub(repo_id, revision=revision):
        try:
            info = HfApi(token=token).repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True)
        except RepositoryNotFoundError:
            return None
        files = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings or ()}
    return str(info.sha), {name: str(called) for name, called in files.items() if name != ".gitattributes"}


def _hashes(content: Path | bytes) -> tuple[str, str]:
    """What content is called by: where it is kept as a large file, and where it is not."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for part in [content] if isinstance(content, bytes) else _blocks(content):
        sha256.update(part)
        git.update(part)
    return sha256.hexdigest(), git.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            yield part


def _removed(files: Hashes, found: Mapping[str, str], replaces: Collection[str]) -> tuple[str, ...]:
    """What of a checkpoint that was there would change the one that is pushed; of logits, nothing."""
    if "config.json" not in files:
        return ()
    gone = [name for name in found if name not in files]
    stale = replaces if "recipe.json" in found else ()
    return tuple(name for name in gone if is_of_a_checkpoint(name) or _OTHERWISE.fullmatch(name) or name in stale)


def _known(repo_id: str, repo_type: str, head: str, message: str) -> CommitInfo:
    """A commit that is there already."""
    from huggingface_hub import CommitInfo, constants

    place = repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"
    return CommitInfo(f"{constants.ENDPOINT}/{place}/commit/{head}", message, "", head)


def _compare(repo_id: str, repo_type: str, token: str | bool | None, commit: CommitInfo, files: Hashes) -> None:
    """Read back what was pushed, as anybody would.

    Raises:
        ValueError: if it is something else.
    """
    from huggingface_hub import hf_hub_download

    where: dict[str, Any] = {"repo_type": repo_type, "revision": commit.oid, "token": token}
    for name, called in files.items():
        with tempfile.TemporaryDirectory() as temporary, asking_the_hub(repo_id, revision=commit.oid):
            path = hf_hub_download(repo_id, name, **where, local_dir=temporary)
            if _hashes(Path(path)) != called:
                raise ValueError(f"{repo_id}: {name} at commit {commit.oid} is not what was pushed. Push again.")
