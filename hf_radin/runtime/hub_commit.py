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
from hf_radin.runtime.hub_errors import (
    UNKNOWN,
    asking_the_hub,
    is_late,
    is_passing,
    patiently,
    status_of,
    without_password,
)
from hf_radin.runtime.text import printable

if TYPE_CHECKING:
    from huggingface_hub import (
        CommitInfo,
        CommitOperationAdd,
        CommitOperationDelete,
        DatasetInfo,
        HfApi,
        ModelInfo,
    )

logger = logging.getLogger(__name__)

# Models in other formats than ours, which would be loaded in place of the one that is pushed.
_OTHER_FORMATS = re.compile(
    r"(pytorch|adapter)_model.*|tf_model\.h5|flax_model\.msgpack|video_preprocessor_config\.json"
)

# Files of up to so many bytes are read once, so that what is compared is what is sent.
SMALL = 10_000_000

# How a soup is pushed that can not be pushed now.
PUSH_LATER = "Save the soup, and push it later with `hf-radin push FOLDER ID`."

# Files that a Hub may put into a repository as it makes it; a first push replaces them.
GIVEN = ("README.md",)

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


class HubFile(NamedTuple):
    """A file in a repository, as far as the Hub says.

    Args:
        size: bytes; None if it does not say.
        sha256: of a large file.
        blob: what its content is called in git.
    """

    size: int | None
    sha256: str | None
    blob: str | None

    @property
    def content(self) -> str | None:
        """What its content is called; None if the Hub does not say."""
        return self.sha256 or self.blob


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
        verify: load a pushed model once from what the Hub has, and compare its predictions.
    """

    private: bool | None = None
    token: str | bool | None = field(default=None, repr=False)
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    overwrite: bool = False
    repo_type: str = "model"
    verify: bool = True


@dataclass(frozen=True)
class Plan:
    """What a push does to a repository.

    Args:
        head: the commit that it builds on, empty if there is none; None if there is no repository yet.
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


def plan_commit(
    repo_id: str,
    hashes: Hashes,
    options: PushOptions,
    *,
    replaces: Collection[str] = (),
    given: Collection[str] = (),
) -> Plan:
    """What a push of these files would do. Nothing is changed.

    Args:
        hashes: of the files, by name (`hashes_of`).
        replaces: names of files that an earlier soup may have left there, and that are removed with it.
        given: names of files that may be there, since the Hub put them there.

    Raises:
        ValueError: if the repository holds something else, which neither `overwrite` nor a pull request allows, or is
            not private and should be.
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
    _refuse_public(repo_id, contents.is_private, options)
    changed = tuple(name for name, content_hash in hashes.items() if contents.files.get(name) not in content_hash)
    removed = _files_to_remove(contents, hashes, replaces)
    if changed or removed:
        foreign = [name for name in contents.files if name not in given and (name not in hashes or name in changed)]
        _refuse_foreign_files(repo_id, foreign, options)
    return Plan(contents.head, changed, removed, tuple(name for name in changed if name in contents.files))


def commit_files(
    repo_id: str,
    files: Files,
    options: PushOptions,
    *,
    replaces: Collection[str] = (),
    small: int = SMALL,
    arrived: Path | None = None,
) -> CommitInfo:
    """Upload files under their names in one commit, make the repository if need be, and compare what arrived.

    The commit builds on the state that was looked at: if somebody else commits in between, it is refused. What fails
    in passing is tried again, after a look whether the commit did arrive after all.

    Args:
        files: their content, or where it is, by name.
        replaces: as in `plan_commit`.
        small: files of up to so many bytes are read once.
        arrived: a folder for the files as they are read back; by default each is removed when it was compared.

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
        upload = _Upload(repo_id, files, hashes_of(files), options, replaces, arrived)
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
        arrived: as in `commit_files`.
        base: the commit that the first attempt saw; no later attempt builds on another.
        given: names of files that the Hub may have put into the repository, if an attempt made it.
    """

    repo_id: str
    files: Files
    hashes: Hashes
    options: PushOptions
    replaces: Collection[str]
    arrived: Path | None = None
    base: str | None = None
    given: Collection[str] = ()

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
        plan = self._plan(options)
        if plan.is_done and plan.head:
            logger.info("%s holds just that already.", self.repo_id)
            return _commit_info(self.repo_id, options, plan.head)
        if plan.head is None:
            if self._make_repository(api):
                self.given = GIVEN
            # what somebody else put into it meanwhile is not overwritten unseen
            plan = self._plan(replace(options, overwrite=False))
        if plan.head is None:
            raise ValueError(f"{self.repo_id} can't be made: the Hub says that it is there, and does not show it.")
        if self.base is None:
            self.base = plan.head
        if plan.head != self.base:  # and it is not what is pushed
            raise ValueError(f"{self.repo_id} has changed while it was pushed to: look at it, and push again.")
        commit = self._send(api, plan)
        self._read_back(commit)
        return commit

    def _plan(self, options: PushOptions) -> Plan:
        return plan_commit(self.repo_id, self.hashes, options, replaces=self.replaces, given=self.given)

    def _make_repository(self, api: HfApi) -> bool:
        """Make the repository; False if somebody else has."""
        try:
            api.create_repo(self.repo_id, repo_type=self.options.repo_type, private=self.options.private)
        except OSError as error:
            if status_of(error) != 409:
                raise
            return False
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # whether it was made is looked at next
            logger.info("The Hub's answer is invalid (%r).", error)
        return True

    def _send(self, api: HfApi, plan: Plan) -> CommitInfo:
        """Upload and commit."""
        options = self.options
        try:
            # not `upload_folder`: with Xet it splits a large folder into several commits
            commit = api.create_commit(
                self.repo_id,
                self._operations(plan),
                commit_message=_message(options),
                # ids of 64 digits are longer than the client takes; the Hub knows them by their beginnings
                parent_commit=None if options.create_pr or not plan.head else plan.head[:40],
                repo_type=options.repo_type,
                revision=options.revision,
                create_pr=options.create_pr,
            )
            return _commit_info(self.repo_id, options, str(commit.oid), commit.pr_num)
        except (ValueError, LookupError, TypeError, AttributeError):  # of the answer, perhaps: the commit may be there
            arrived = None if options.create_pr else self._plan(options)
            if arrived is None or not arrived.is_done or not arrived.head:
                raise
            return _commit_info(self.repo_id, options, arrived.head)

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
            ValueError: if it is something else, or is not there.
        """
        for name, content_hash in self.hashes.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = self.arrived or Path(temporary)
                try:
                    path = patiently(partial(self._download, name, commit.oid, folder), passes=is_late)
                except ValueError as error:  # not to be tried again as a whole
                    raise ValueError(
                        f"{self.repo_id}: commit {commit.oid} was made, and {name} can't be read there: look at "
                        f"{commit.commit_url} ({error})"
                    ) from error
                if _hash(path) != content_hash:
                    raise ValueError(
                        f"{self.repo_id}: {name} at commit {commit.oid} is not what was pushed. Push again."
                    )

    def _download(self, name: str, commit: str, folder: Path) -> Path:
        """Where a file of a commit was downloaded to."""
        from huggingface_hub import hf_hub_download

        with asking_the_hub(self.repo_id, revision=commit):
            path = hf_hub_download(
                self.repo_id,
                name,
                repo_type=self.options.repo_type,
                revision=commit,
                token=self.options.token,
                local_dir=folder,
            )
        return Path(path)


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
        account = _who(api)
        if account.only_reads:
            settings = f"{_hub()}/settings/tokens"
            raise ValueError(f"{repo_id}: the token may only read. Make one that may write ({settings}).")
        if contents is not None:
            if not options.create_pr:
                _check_write(api, repo_id, options)
        elif options.create_pr:
            raise ValueError(f"There is no repository {repo_id} to open a pull request in.")
        elif account.namespaces is not None and (namespace := repo_id.partition("/")[0]) not in account.namespaces:
            raise ValueError(
                f"{repo_id} can't be made: {account.name} may not write under {namespace!r}, only under "
                f"{', '.join(account.namespaces)}."
            )
    if contents is not None and options.repo_type == "model" and "recipe.json" not in contents.files:
        _refuse_foreign_files(repo_id, contents.files, options)


def _check_write(api: HfApi, repo_id: str, options: PushOptions) -> None:
    """Ask whether the token may write there; of a Hub that can't be asked it is not known."""
    try:
        api.auth_check(repo_id, repo_type=options.repo_type, write=True)
    except OSError as error:
        if status_of(error) not in UNKNOWN:
            raise


def _refuse_public(repo_id: str, is_private: bool | None, options: PushOptions) -> None:
    """Raises a ValueError if a private repository was asked for, and this one is not, or nobody knows."""
    if not options.private or is_private:
        return
    if is_private is None:
        raise ValueError(
            f"{repo_id}: the Hub does not say whether it is private, so nothing is pushed there. Name another, or "
            "push without private (--private)."
        )
    raise ValueError(
        f"{repo_id} is there and everybody can read it, so nothing is pushed there: make it private in its settings, "
        "if this Hub knows private repositories, or name another."
    )


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
        _refuse_public(repo_id, _bool(info.private), options)
        return _bool(info.private) is True

    return patiently(ask)


def is_repo_id(name: str) -> bool:
    """Whether a name is that of a repository with its namespace."""
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None


def hidden_repositories(repositories: Iterable[tuple[str, str]], token: str | bool | None = None) -> list[str]:
    """The ids of repositories that nobody finds without logging in.

    Args:
        repositories: ids and types (`model`, `dataset`).
        token: of somebody who may see more of them.

    Raises:
        ValueError: if the Hub can't be asked.
    """
    hidden = [
        repo_id
        for repo_id, repo_type in sorted({*repositories})
        if patiently(partial(_is_hidden, repo_id, repo_type, token))
    ]
    return list(dict.fromkeys(hidden))


def _is_hidden(repo_id: str, repo_type: str, token: str | bool | None) -> bool:
    """Whether nobody finds a repository without logging in.

    Where a Hub shows nothing at all without a login, it is asked with the token whether a repository is private.
    """
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError

    with asking_the_hub(repo_id):
        try:
            return _look(repo_id, repo_type, False) is True  # a proxy may log in for everybody
        except (DisabledRepoError, GatedRepoError):  # as everybody is told
            return False
        except OSError as error:
            if status_of(error) not in (401, 403, 404):
                raise
        try:
            is_private = _look(repo_id, repo_type, token)
        except OSError as error:
            if status_of(error) not in (401, 403, 404):
                raise
            return True  # it is not there, or not for this user
    if is_private is None:
        logger.warning("The Hub does not say whether %s is private: it is taken to be.", repo_id)
    return is_private is not False


def _look(repo_id: str, repo_type: str, token: str | bool | None) -> bool | None:
    """Whether a repository is private; None if the Hub does not say."""
    from huggingface_hub import HfApi

    return _bool(HfApi(token=token).repo_info(repo_id, repo_type=repo_type, expand=["private"]).private)


def _bool(value: Any) -> bool | None:
    """What a Hub says, if it is true or false."""
    return value if isinstance(value, bool) else None


def full_id(repo_id: str, token: str | bool | None) -> str:
    """An id with its namespace, by default that of the user."""
    from huggingface_hub import HfApi

    def ask() -> str:
        with asking_the_hub(repo_id):
            return f"{_who(HfApi(token=token)).name}/{repo_id}"

    return repo_id if "/" in repo_id else patiently(ask)


@dataclass(frozen=True)
class _Account:
    """Whose token it is.

    Args:
        namespaces: where it may make repositories; None if the Hub does not say.
        only_reads: whether the token is known to be for reading alone.
    """

    name: str
    namespaces: tuple[str, ...] | None
    only_reads: bool


def _who(api: HfApi) -> _Account:
    """The Hub's account of the user. Raises a ValueError if the answer is not one."""
    user = api.whoami()
    name = _fields(user).get("name")
    if not isinstance(name, str):
        raise ValueError(f"The Hub does not say whose token it is ({printable(user)[:100]}); is HF_ENDPOINT a Hub?")
    organisations, access = _fields(user).get("orgs"), _fields(_fields(_fields(user).get("auth")).get("accessToken"))
    namespaces = None
    if isinstance(organisations, list):
        writing = (_fields(org).get("name") for org in organisations if _fields(org).get("roleInOrg") != "read")
        namespaces = (name, *(org for org in writing if isinstance(org, str)))
    return _Account(name, namespaces, access.get("role") == "read")


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a part of an answer; none if it is no object."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class _Contents:
    """What a repository holds.

    Args:
        head: its last commit; empty if it has none.
        files: by name, what their content is called (`ContentHash` has which).
        is_private: None if the Hub does not say.
    """

    head: str
    files: Mapping[str, str | None]
    is_private: bool | None


def _read_contents(repo_id: str, options: PushOptions) -> _Contents | None:
    """What a repository holds at a revision; None if there is no such repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking_the_hub(repo_id, revision=options.revision):
        try:
            info, files = list_files(HfApi(token=options.token), repo_id, options.repo_type, options.revision)
        except RepositoryNotFoundError:
            return None
    contents = {name: file.content for name, file in files.items() if name != ".gitattributes"}
    if contents and not isinstance(info.sha, str):
        raise ValueError(f"{repo_id}: the Hub does not say at which commit it is; is HF_ENDPOINT a Hub?")
    return _Contents(info.sha if isinstance(info.sha, str) else "", contents, _bool(info.private))


def list_files(
    api: HfApi, repo_id: str, repo_type: str, revision: str | None
) -> tuple[ModelInfo | DatasetInfo, dict[str, HubFile]]:
    """What the Hub says of a repository, and of its files by name. Errors are those of the client."""
    info: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True)
    files = [(file.rfilename, _hub_file(file)) for file in info.siblings or ()]
    if info.siblings is None or any(file.content is None or file.size is None for _, file in files):
        # not every Hub says so much of files here
        entries = api.list_repo_tree(repo_id, recursive=True, revision=info.sha or revision, repo_type=repo_type)
        files = [(entry.path, _hub_file(entry)) for entry in entries if hasattr(entry, "blob_id")]
    if not all(isinstance(name, str) for name, _ in files):
        raise ValueError(f"{repo_id}: the Hub lists a file that has no name; is HF_ENDPOINT a Hub?")
    return info, dict(files)


def _hub_file(file: Any) -> HubFile:
    size = file.size if isinstance(file.size, int) else None
    return HubFile(size, file.lfs.sha256 if file.lfs else None, file.blob_id)


def hub_address(repo_id: str, repo_type: str = "model") -> str:
    """The page of a repository on the Hub that is asked."""
    return f"{_hub()}/{repo_id if repo_type == 'model' else f'{repo_type}s/{repo_id}'}"


def _hub() -> str:
    """The address of the Hub (HF_ENDPOINT), as it may be shown."""
    from huggingface_hub import constants

    return without_password(constants.ENDPOINT)


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


def _message(options: PushOptions) -> str:
    return options.commit_message or "Upload with hf_radin"


def _commit_info(repo_id: str, options: PushOptions, commit: str, pull_request: int | None = None) -> CommitInfo:
    """A commit, with its address on the Hub that is asked: others give that of the Hub that they mirror, or none."""
    from huggingface_hub import CommitInfo

    page = hub_address(repo_id, options.repo_type)
    return CommitInfo(
        f"{page}/commit/{commit}",
        _message(options),
        "",
        commit,
        _endpoint=_hub(),
        pr_url=None if pull_request is None else f"{page}/discussions/{pull_request}",
    )
