"""One commit of some files to a repository: planned first, refused where it would do harm, read back afterwards."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_radin.runtime.files import is_of_a_checkpoint
from hf_radin.runtime.hub_errors import asking_the_hub, is_passing, patiently

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

logger = logging.getLogger(__name__)

# Models in other formats than ours, which would be loaded in place of the one that is pushed.
_OTHER_FORMATS = re.compile(
    r"(pytorch|adapter)_model.*|tf_model\.h5|flax_model\.msgpack|video_preprocessor_config\.json"
)

# Files of up to so many bytes are read once, so that what is compared is what is sent.
SMALL = 10_000_000

# How a soup is pushed that can not be pushed now.
PUSH_LATER = "Save the soup, and push it later with `hf-radin push FOLDER ID`."

Files = Mapping[str, "Path | bytes"]


class ContentHash(NamedTuple):
    """What the Hub calls the content of a file.

    Args:
        sha256: if it is stored as a large file.
        blob: if it is stored in git.
    """

    sha256: str
    blob: str


Hashes = Mapping[str, ContentHash]


@dataclass(frozen=True)
class PushOptions:
    """How something is pushed to a repository.

    Args:
        private: visibility of a new repository, by default what the organisation or user chose; True is refused for
            one that everybody can read.
        token: for the Hub, by default that of the login.
        revision: branch to commit to.
        create_pr: open a pull request instead of committing.
        commit_message: first line of the commit's message.
        overwrite: allow a repository that holds something else.
        repo_type: `model` or `dataset`.
    """

    private: bool | None = None
    token: str | bool | None = field(default=None, repr=False)
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    overwrite: bool = False
    repo_type: str = "model"


@dataclass(frozen=True)
class Plan:
    """What a push does to a repository.

    Args:
        head: the commit that it builds on; None if there is no repository yet.
        changed: names of the files that are new there or differ.
        removed: names of files there that belong to another model, and that the push deletes.
        replaced: names of the changed files that exist there with other content.
    """

    head: str | None
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether the repository holds all of it already."""
        return self.head is not None and not self.changed and not self.removed


def hashes_of(files: Files) -> Hashes:
    """What the Hub calls the content of each file."""
    return {name: _hash(content) for name, content in files.items()}


def plan_commit(repo_id: str, hashes: Hashes, options: PushOptions, *, replaces: Collection[str] = ()) -> Plan:
    """What a push of these files would do. Nothing is changed.

    Args:
        hashes: of the files, by name (`hashes_of`).
        replaces: names of files that an earlier soup may have left there, and that are removed with it.

    Raises:
        ValueError: if the repository holds something else, which neither `overwrite` nor a pull request allows.
    """
    repo_id = full_id(repo_id, options.token)
    contents = _read_contents(repo_id, options)
    if contents is None:
        if options.create_pr:
            raise ValueError(f"There is no repository {repo_id} to open a pull request in: push without (create_pr).")
        if options.revision not in (None, "main"):
            raise ValueError(
                f"There is no repository {repo_id} yet, and so no branch {options.revision!r}: push to it first."
            )
        return Plan(None, tuple(hashes), ())
    changed = tuple(name for name, content_hash in hashes.items() if contents.files.get(name) not in content_hash)
    removed = _files_to_remove(contents, hashes, replaces)
    if changed or removed:
        foreign = [name for name in contents.files if name not in hashes or name in changed]
        _refuse_foreign_files(repo_id, foreign, options)
    return Plan(contents.head, changed, removed, tuple(name for name in changed if name in contents.files))


def commit_files(
    repo_id: str, files: Files, options: PushOptions, *, replaces: Collection[str] = (), small: int = SMALL
) -> CommitInfo:
    """Upload files under their names in one commit, make the repository if need be, and compare what arrived.

    The commit builds on the state that was looked at: if somebody else commits in between, it is refused. What fails
    in passing is tried again, after a look whether the commit did arrive after all.

    Args:
        files: their content, or where it is, by name.
        replaces: as in `plan_commit`.
        small: files of up to so many bytes are read once.

    Raises:
        ValueError: if the id is not valid, the token may not write there, or the repository holds something else.
    """
    refuse_offline(repo_id)
    repo_id = full_id(repo_id, options.token)
    try:
        files = {
            name: content if isinstance(content, bytes) or content.stat().st_size > small else content.read_bytes()
            for name, content in files.items()
        }
        upload = _Upload(repo_id, files, hashes_of(files), options, replaces)
    except OSError as error:
        raise ValueError(f"{repo_id}: what is to be pushed can't be read: {error}.") from error
    return patiently(upload.attempt)


@dataclass
class _Upload:
    """Files on their way to a repository, in one attempt or several.

    Args:
        repo_id: with its namespace.
        files: their content, or where it is, by name.
        hashes: of the files.
        replaces: as in `plan_commit`.
        base: the commit that the first attempt saw; no later attempt builds on another.
    """

    repo_id: str
    files: Files
    hashes: Hashes
    options: PushOptions
    replaces: Collection[str]
    base: str | None = None

    def attempt(self) -> CommitInfo:
        """Commit the files, unless the repository holds just them.

        Raises:
            ValueError: of which `is_passing` tells whether another attempt may help.
        """
        try:
            with asking_the_hub(self.repo_id, revision=self.options.revision):
                return self._commit()
        except ValueError as error:
            if self.options.create_pr and is_passing(error):  # not again: nobody can tell whether it was opened
                raise ValueError(
                    f"{error} A pull request may be open: look at {self.repo_id} before you push again."
                ) from error
            raise

    def _commit(self) -> CommitInfo:
        from huggingface_hub import HfApi

        api, options = HfApi(token=self.options.token), self.options
        message = options.commit_message or "Upload with hf_radin"
        plan = plan_commit(self.repo_id, self.hashes, options, replaces=self.replaces)
        if plan.is_done and plan.head:
            logger.info("%s holds just that already.", self.repo_id)
            return _existing_commit(self.repo_id, options.repo_type, plan.head, message)
        if plan.head is None:
            api.create_repo(self.repo_id, repo_type=options.repo_type, private=options.private, exist_ok=True)
            # what somebody else put into it meanwhile is not overwritten unseen
            unseen = replace(options, overwrite=False)
            plan = plan_commit(self.repo_id, self.hashes, unseen, replaces=self.replaces)
        self.base = self.base or plan.head
        if plan.head != self.base:  # and it is not what is pushed
            raise ValueError(f"{self.repo_id} has changed while it was pushed to: look at it, and push again.")
        # not `upload_folder`: with Xet it splits a large folder into several commits
        commit = api.create_commit(
            self.repo_id,
            self._operations(plan),
            commit_message=message,
            parent_commit=None if options.create_pr else plan.head,
            repo_type=options.repo_type,
            revision=options.revision,
            create_pr=options.create_pr,
        )
        self._read_back(commit)
        return commit

    def _operations(self, plan: Plan) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What the commit does.

        Raises:
            ValueError: if a file is no longer what was compared.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [CommitOperationAdd(name, content) for name, content in self.files.items()]
        for addition in additions:
            if addition.upload_info.sha256.hex() != self.hashes[addition.path_in_repo].sha256:
                raise ValueError(f"{self.repo_id}: {addition.path_in_repo} has changed meanwhile. Push again.")
        return [*additions, *(CommitOperationDelete(name) for name in plan.removed)]

    def _read_back(self, commit: CommitInfo) -> None:
        """Download what was pushed, as anybody would.

        Raises:
            ValueError: if it is something else.
        """
        from huggingface_hub import hf_hub_download

        for name, content_hash in self.hashes.items():
            with tempfile.TemporaryDirectory() as folder, asking_the_hub(self.repo_id, revision=commit.oid):
                path = hf_hub_download(
                    self.repo_id,
                    name,
                    repo_type=self.options.repo_type,
                    revision=commit.oid,
                    token=self.options.token,
                    local_dir=folder,
                )
                if _hash(Path(path)) != content_hash:
                    raise ValueError(
                        f"{self.repo_id}: {name} at commit {commit.oid} is not what was pushed. Push again."
                    )


def refuse_offline(repo_id: str, later: str = PUSH_LATER) -> None:
    """Raises a ValueError, which says how to push later, where the Hub may not be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo_id} can't be pushed to: HF_HUB_OFFLINE is set. {later}")


def check_target(repo_id: str, options: PushOptions) -> None:
    """Check, before anything is computed, that the result can be pushed. Nothing is made there yet.

    Raises:
        ValueError: if the id is not valid, the token may not write there, or the repository holds what is no soup.
    """
    from huggingface_hub import HfApi

    refuse_offline(repo_id)
    repo_id = full_id(repo_id, options.token)
    api = HfApi(token=options.token)
    contents = patiently(lambda: _read_contents(repo_id, options))
    with asking_the_hub(repo_id, revision=options.revision):
        user = _who(api)
        if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"{repo_id}: the token may only read. Make one that may write (hf.co/settings/tokens).")
        if contents is not None:
            if not options.create_pr:
                api.auth_check(repo_id, repo_type=options.repo_type, write=True)
        elif options.create_pr:
            raise ValueError(f"There is no repository {repo_id} to open a pull request in.")
        elif (namespace := repo_id.partition("/")[0]) not in _namespaces(user):
            raise ValueError(
                f"{repo_id} can't be made: {user.get('name')} may not write under {namespace!r}, only under "
                f"{', '.join(_namespaces(user))}."
            )
    if contents is not None and options.repo_type == "model" and "recipe.json" not in contents.files:
        _refuse_foreign_files(repo_id, contents.files, options)


def _refuse_foreign_files(repo_id: str, names: Collection[str], options: PushOptions) -> None:
    """Raises a ValueError if there are files of somebody or something else, and the options don't allow for them."""
    if names and not options.overwrite and not options.create_pr:
        raise ValueError(
            f"{repo_id} holds something else ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}): "
            "name another repository, open a pull request (create_pr, --create-pr), or pass overwrite (--overwrite)."
        )


def is_private(repo_id: str, options: PushOptions) -> bool:
    """Whether what is pushed there is hidden from some; for a repository that is yet to be made, what is asked for.

    Raises:
        ValueError: if a private one is asked for, and the one that exists is public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def ask() -> bool:
        with asking_the_hub(repo_id):
            try:
                info = HfApi(token=options.token).repo_info(
                    full_id(repo_id, options.token), repo_type=options.repo_type, expand=["private"]
                )
            except RepositoryNotFoundError:
                return bool(options.private)
        if options.private and not info.private:
            raise ValueError(
                f"{repo_id} is there and everybody can read it: make it private in its settings, or name another."
            )
        return bool(info.private)

    return patiently(ask)


def is_repo_id(name: str) -> bool:
    """Whether a name is that of a repository with its namespace."""
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None


def hidden_repositories(repositories: Iterable[tuple[str, str]]) -> list[str]:
    """The ids of repositories that nobody finds without logging in.

    Args:
        repositories: ids and types (`model`, `dataset`).

    Raises:
        ValueError: if the Hub can't be asked.
    """
    hidden = [
        repo_id for repo_id, repo_type in sorted({*repositories}) if patiently(partial(_is_hidden, repo_id, repo_type))
    ]
    return list(dict.fromkeys(hidden))


def _is_hidden(repo_id: str, repo_type: str) -> bool:
    """Whether nobody finds a repository without logging in."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking_the_hub(repo_id):
        try:
            HfApi(token=False).repo_info(repo_id, repo_type=repo_type, expand=["private"])
        except RepositoryNotFoundError:
            return True
    return False


def full_id(repo_id: str, token: str | bool | None) -> str:
    """An id with its namespace, by default that of the user."""
    from huggingface_hub import HfApi

    def ask() -> str:
        with asking_the_hub(repo_id):
            return f"{_who(HfApi(token=token))['name']}/{repo_id}"

    return repo_id if "/" in repo_id else patiently(ask)


def _who(api: HfApi) -> dict[str, Any]:
    """The Hub's account of the user. Raises a ValueError if the answer is not one."""
    user = api.whoami()
    if not isinstance(user, dict) or "name" not in user:
        raise ValueError(f"The Hub does not say whose token it is ({str(user)[:100]}); is HF_ENDPOINT a Hub?")
    return user


def _namespaces(user: Mapping[str, Any]) -> list[str]:
    """Where a user may make repositories."""
    organisations = [org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg", "write") != "read"]
    return [str(user.get("name")), *organisations]


@dataclass(frozen=True)
class _Contents:
    """What a repository holds.

    Args:
        head: its last commit.
        files: by name, what their content is called (`ContentHash` has which).
    """

    head: str
    files: Mapping[str, str]


def _read_contents(repo_id: str, options: PushOptions) -> _Contents | None:
    """What a repository holds at a revision; None if there is no such repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking_the_hub(repo_id, revision=options.revision):
        try:
            info = HfApi(token=options.token).repo_info(
                repo_id, repo_type=options.repo_type, revision=options.revision, files_metadata=True
            )
        except RepositoryNotFoundError:
            return None
        files = {
            file.rfilename: str(file.lfs.sha256 if file.lfs else file.blob_id)
            for file in info.siblings or ()
            if file.rfilename != ".gitattributes"
        }
    return _Contents(str(info.sha), files)


def _hash(content: Path | bytes) -> ContentHash:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for block in [content] if isinstance(content, bytes) else _blocks(content):
        sha256.update(block)
        blob.update(block)
    return ContentHash(sha256.hexdigest(), blob.hexdigest())


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _files_to_remove(contents: _Contents, hashes: Hashes, replaces: Collection[str]) -> tuple[str, ...]:
    """The files of another checkpoint that would change the model that is pushed; none where logits are pushed."""
    if "config.json" not in hashes:
        return ()
    outdated = replaces if "recipe.json" in contents.files else ()
    return tuple(
        name
        for name in contents.files
        if name not in hashes and (is_of_a_checkpoint(name) or _OTHER_FORMATS.fullmatch(name) or name in outdated)
    )


def _existing_commit(repo_id: str, repo_type: str, head: str, message: str) -> CommitInfo:
    from huggingface_hub import CommitInfo, constants

    place = repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"
    return CommitInfo(f"{constants.ENDPOINT}/{place}/commit/{head}", message, "", head)
