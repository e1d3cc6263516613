"""Pull requests: listed, shown, closed, reopened and merged.

There are no other discussions: all numbers are those of pull requests.
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

PULL_REQUEST = rf"{API}/discussions/(?P<number>\d+)"


@routes.on("GET", rf"{API}/discussions")
def list_all(hub: "LoopbackHub", call: Call, repo: Repo) -> Reply:
    """The newest first. A merged pull request counts as closed."""
    status, author = call.option("status") or "all", call.option("author") or USER
    discussions = [
        describe(repo, pull_request)
        for pull_request in reversed(repo.pull_requests.values())
        if status in ("all", "open" if pull_request.status == "open" else "closed")
        and author == USER
        and call.option("type") != "discussion"
    ]
    start = int(call.option("p") or 0) * hub.page_size
    page = discussions[start : start + hub.page_size]
    return json_reply({"discussions": page, "count": len(discussions), "start": start})


@routes.on("GET", PULL_REQUEST)
def details(hub: "LoopbackHub", call: Call, repo: Repo, number: str) -> Reply:
    pull_request = find(repo, number)
    changes = {"base": pull_request.base}
    if pull_request.merged:
        changes["mergeCommitId"] = pull_request.merged
    facts = {
        "events": events(repo, pull_request),
        "changes": changes,
        "filesWithConflicts": merge_into_base(repo, pull_request)[1] if pull_request.status == "open" else [],
    }
    return json_reply(describe(repo, pull_request) | facts)


@routes.on("POST", rf"{PULL_REQUEST}/status")
def change_status(hub: "LoopbackHub", call: Call, repo: Repo, number: str) -> Reply:
    """For whoever opened the pull request, which is everybody with the token."""
    hub.require_write(call)
    pull_request, status = find(repo, number), call.json()["status"]
    if pull_request.status not in {"open", "closed"} - {status}:
        raise HubError(409, f"The pull request {number} is {pull_request.status}")
    pull_request.changes.append((datetime.now(timezone.utc), status))
    return json_reply({"newStatus": events(repo, pull_request)[-1]})


@routes.on("POST", rf"{PULL_REQUEST}/merge")
def merge(hub: "LoopbackHub", call: Call, repo: Repo, number: str) -> Reply:
    """One commit on the base, however many the pull request has, as on the Hub."""
    hub.require_write(call, repo.namespace)
    pull_request = find(repo, number)
    files, conflicts = merge_into_base(repo, pull_request)
    if pull_request.status != "open" or conflicts:
        raise HubError(409, f"The pull request {number} is {pull_request.status}, and conflicts in {conflicts}")
    base, title = pull_request.base, f"{pull_request.title} (#{number})"
    pull_request.merged = repo.commit(base, files, title, pull_request.text, repo.resolve(base).sha).sha
    pull_request.changes.append((datetime.now(timezone.utc), "merged"))
    return json_reply({})


def find(repo: Repo, number: str) -> PullRequest:
    if int(number) not in repo.pull_requests:
        raise HubError(404, f"{repo.id} has no discussion {number}")
    return repo.pull_requests[int(number)]


def describe(repo: Repo, pull_request: PullRequest) -> dict[str, Any]:
    return {
        "num": pull_request.number,
        "title": pull_request.title,
        "status": pull_request.status,
        "author": {"name": USER},
        "createdAt": timestamp(pull_request.date),
        "repo": {"name": repo.id, "type": repo.type},
        "isPullRequest": True,
    }


def events(repo: Repo, pull_request: PullRequest) -> list[dict[str, Any]]:
    """The text that it was opened with, its commits, and the changes of its status."""
    base = {commit.sha for commit in repo.log(pull_request.base)}
    commits = [commit for commit in repo.log(pull_request.ref) if commit.sha not in base]
    text = {"edited": False, "hidden": False, "latest": {"raw": pull_request.text}}
    facts: list[tuple[datetime, str, dict[str, Any]]] = [(pull_request.date, "comment", text)]
    facts += [(commit.date, "commit", {"subject": commit.title, "oid": commit.sha}) for commit in commits]
    facts += [(date, "status-change", {"status": status}) for date, status in pull_request.changes]
    return [
        {
            "id": hashlib.sha1(f"{repo.id} {pull_request.number} {position}".encode()).hexdigest()[:24],
            "type": kind,
            "createdAt": timestamp(date),
            "author": {"name": USER},
            "data": data,
        }
        for position, (date, kind, data) in enumerate(sorted(facts, key=lambda fact: fact[0]))
    ]


def merge_into_base(repo: Repo, pull_request: PullRequest) -> tuple[dict[str, Blob], list[str]]:
    """The files of the base with the changes of the pull request, and the names of files that both have changed."""
    ours, theirs = repo.resolve(pull_request.base).files, repo.resolve(pull_request.ref).files
    base = {commit.sha for commit in repo.log(pull_request.base)}
    fork = next(commit for commit in repo.log(pull_request.ref) if commit.sha in base).files
    changed = {path for path in fork | theirs if fork.get(path) != theirs.get(path)}
    conflicts = [path for path in changed if ours.get(path) not in (fork.get(path), theirs.get(path))]
    files = {path: blob for path, blob in ours.items() if path not in changed}
    return files | {path: theirs[path] for path in changed if path in theirs}, sorted(conflicts)
