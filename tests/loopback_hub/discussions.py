"""Pull requests once they are open: listed, looked at, closed, reopened and merged.

Discussions about nothing in particular it has none: all numbers are those of pull requests.
"""

import hashlib
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .routes import API, Routes
from .store import USER, Blob, HubError, PullRequest, Repo, timestamp
from .wire import Call, Reply, json_reply

if TYPE_CHECKING:
    from .loopback import LoopbackHub

routes = Routes()

ONE = rf"{API}/discussions/(?P<number>\d+)"


@routes.on("GET", rf"{API}/discussions")
def list_all(hub: "LoopbackHub", call: Call, repo: Repo) -> Reply:
    """Newest first. What is merged counts as closed."""
    status, author = call.option("status") or "all", call.option("author") or USER
    found = [
        describe(repo, one)
        for one in reversed(repo.pull_requests.values())
        if status in ("all", "open" if one.status == "open" else "closed")
        and author == USER
        and call.option("type") != "discussion"
    ]
    start = int(call.option("p") or 0) * hub.page_size
    shown = found[start : start + hub.page_size]
    return json_reply({"discussions": shown, "count": len(found), "start": start})


@routes.on("GET", ONE)
def details(hub: "LoopbackHub", call: Call, repo: Repo, number: str) -> Reply:
    one = find(repo, number)
    changes = {"base": one.base, **({"mergeCommitId": one.merged} if one.merged else {})}
    conflicts = merge_into_base(repo, one)[1] if one.status == "open" else []
    return json_reply(
        {**describe(repo, one), "events": events(repo, one), "changes": changes, "filesWithConflicts": conflicts}
    )


@routes.on("POST", rf"{ONE}/status")
def change_status(hub: "LoopbackHub", call: Call, repo: Repo, number: str) -> Reply:
    """Open to whoever opened the pull request, and that is everybody with the token."""
    hub.require_write(call)
    one, status = find(repo, number), call.json()["status"]
    if one.status not in {"open", "closed"} - {status}:
        raise HubError(409, f"The pull request {number} is {one.status}")
    one.changes.append((datetime.now(timezone.utc), status))
    return json_reply({"newStatus": events(repo, one)[-1]})


@routes.on("POST", rf"{ONE}/merge")
def merge(hub: "LoopbackHub", call: Call, repo: Repo, number: str) -> Reply:
    """One commit on the base, as the Hub makes of a pull request however many it has."""
    hub.require_write(call, repo.namespace)
    one = find(repo, number)
    files, conflicts = merge_into_base(repo, one)
    if one.status != "open" or conflicts:
        raise HubError(409, f"The pull request {number} is {one.status}, and conflicts in {conflicts}")
    parent = repo.resolve(one.base).sha
    one.merged = repo.commit(one.base, files, f"{one.title} (#{number})", one.text, parent).sha
    one.changes.append((datetime.now(timezone.utc), "merged"))
    return json_reply({})


def find(repo: Repo, number: str) -> PullRequest:
    if int(number) not in repo.pull_requests:
        raise HubError(404, f"{repo.id} has no discussion {number}")
    return repo.pull_requests[int(number)]


def describe(repo: Repo, one: PullRequest) -> dict[str, Any]:
    return {
        "num": one.number,
        "title": one.title,
        "status": one.status,
        "author": {"name": USER},
        "createdAt": timestamp(one.date),
        "repo": {"name": repo.id, "type": repo.type},
        "isPullRequest": True,
    }


def events(repo: Repo, one: PullRequest) -> list[dict[str, Any]]:
    """The text it was opened with, its commits, and what became of it."""
    kept = {commit.sha for commit in repo.log(one.base)}
    text = {"edited": False, "hidden": False, "latest": {"raw": one.text}}
    facts: list[tuple[datetime, str, dict[str, Any]]] = [(one.date, "comment", text)]
    facts += [(c.date, "commit", {"subject": c.title, "oid": c.sha}) for c in repo.log(one.ref) if c.sha not in kept]
    facts += [(date, "status-change", {"status": status}) for date, status in one.changes]
    return [
        {
            "id": hashlib.sha1(f"{repo.id} {one.number} {position}".encode()).hexdigest()[:24],
            "type": kind,
            "createdAt": timestamp(date),
            "author": {"name": USER},
            "data": data,
        }
        for position, (date, kind, data) in enumerate(sorted(facts, key=lambda fact: fact[0]))
    ]


def merge_into_base(repo: Repo, one: PullRequest) -> tuple[dict[str, Blob], list[str]]:
    """The files of the base with what the pull request changes, and the names of those that both have changed."""
    ours, theirs = repo.resolve(one.base).files, repo.resolve(one.ref).files
    kept = {commit.sha for commit in repo.log(one.base)}
    fork = next(commit for commit in repo.log(one.ref) if commit.sha in kept).files
    changed = {path for path in fork | theirs if fork.get(path) != theirs.get(path)}
    conflicts = [path for path in changed if ours.get(path) not in (fork.get(path), theirs.get(path))]
    files = {path: blob for path, blob in ours.items() if path not in changed}
    return files | {path: theirs[path] for path in changed if path in theirs}, sorted(conflicts)
