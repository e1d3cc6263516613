"""Repositories are created, configured, moved and deleted."""

from typing import TYPE_CHECKING

from .routes import API, Routes
from .store import USER, HubError, Repo
from .wire import Call, Reply, json_reply

if TYPE_CHECKING:
    from .loopback import LoopbackHub

routes = Routes()


@routes.on("GET", rf"{API}/auth-check(?P<write>/write)?")
def auth_check(hub: "LoopbackHub", call: Call, repo: Repo, write: str | None) -> Reply:
    hub.require_access(call, repo)
    if write:
        hub.require_write(call, repo.namespace)
    return json_reply({})


@routes.on("PUT", rf"{API}/settings")
def settings(hub: "LoopbackHub", call: Call, repo: Repo) -> Reply:
    hub.require_write(call, repo.namespace)
    changes = call.json()
    repo.gated = changes.get("gated", repo.gated)
    repo.private = changes.get("visibility", "private" if repo.private else "public") == "private"
    return json_reply({})


@routes.on("POST", "/api/repos/create")
def create(hub: "LoopbackHub", call: Call) -> Reply:
    body = call.json()
    repo_type, repo_id = body.get("type") or "model", f"{body.get('organization') or USER}/{body['name']}"
    hub.require_write(call, repo_id.split("/")[0])
    exists = (repo_type, repo_id) in hub.repos
    if not exists:
        hub.add_repo(repo_id, {".gitattributes": b""}, repo_type, private=body.get("visibility") == "private")
    # with exist_ok, the client reads the url from the answer 409, too
    answer = {"name": repo_id, "url": hub.url + hub.repos[repo_type, repo_id].web_path}
    return json_reply({**answer, "error": f"{repo_id} exists"}, 409) if exists else json_reply(answer)


@routes.on("DELETE", "/api/repos/delete")
def delete(hub: "LoopbackHub", call: Call) -> Reply:
    body = call.json()
    repo_type, repo_id = body.get("type") or "model", f"{body.get('organization') or USER}/{body['name']}"
    hub.require_write(call, hub.visible(repo_type, repo_id, call.user).namespace)
    del hub.repos[repo_type, repo_id]
    return json_reply({})


@routes.on("POST", "/api/repos/move")
def move(hub: "LoopbackHub", call: Call) -> Reply:
    """The old name leads to the new one, until another repository takes it."""
    body = call.json()
    old, new = ((body["type"], body[which]) for which in ("fromRepo", "toRepo"))
    hub.require_write(call)
    repo = hub.visible(*old, call.user)
    for _, repo_id in (old, new):
        hub.require_write(call, repo_id.split("/")[0])
    if new in hub.repos:
        raise HubError(409, f"{new[1]} exists")
    repo.id = new[1]
    hub.repos[new] = hub.repos.pop(old)
    hub.moved[old] = repo
    for items in hub.collections.values():
        items[:] = [new if item == old else item for item in items]
    return json_reply({})
