"""Uploads of large files by git LFS: a batch announces them, then come the bytes, in one piece or in parts."""

import hashlib
from typing import TYPE_CHECKING, Any

from .routes import API, WEB, Routes
from .store import HubError, Repo
from .wire import Call, Reply, json_reply

if TYPE_CHECKING:
    from .loopback import LoopbackHub

routes = Routes()

OID = r"(?P<oid>[0-9a-f]{64})"
# Clients send no token here: the URL from the batch is the permission, for the announced object alone. So these routes
# are not those of a repository, which want a token if it is private.
STORAGE = rf"/storage/(?P<type>[^/]+)/(?P<place>[^/]+/[^/]+)/lfs/{OID}"


@routes.on("POST", rf"{WEB}\.git/info/lfs/objects/batch")
def batch(hub: "LoopbackHub", call: Call, repo: Repo) -> Reply:
    hub.require_write(call)
    request = call.json()
    transfers = request.get("transfers", ())
    if hub.xet and "xet" in transfers:
        return json_reply({"transfer": "xet", "objects": request["objects"]})
    transfer = "multipart" if hub.part_size and "multipart" in transfers else "basic"
    answers = []
    for announced in request["objects"]:
        oid, size = announced["oid"], announced["size"]
        if oid in repo.objects:
            answers.append(announced)
            continue
        repo.announced[oid] = size
        storage = f"{hub.url}/storage/{repo.type}/{repo.id}/lfs/{oid}"
        upload: dict[str, Any] = {"href": storage}
        if transfer == "multipart" and size > hub.part_size:
            parts = {f"{number:05}": f"{storage}/{number}" for number in range(1, -(-size // hub.part_size) + 1)}
            upload = {"href": f"{storage}/complete", "header": {"chunk_size": str(hub.part_size), **parts}}
        verify = {"href": f"{hub.url}/api/{repo.type}s/{repo.id}/lfs/{oid}/verify"}
        answers.append({**announced, "actions": {"upload": upload, "verify": verify}})
    return json_reply({"transfer": transfer, "objects": answers})


@routes.on("PUT", STORAGE)
def put(hub: "LoopbackHub", call: Call, type: str, place: str, oid: str) -> Reply:
    store_object(hub.repos[type, place], oid, call.body)
    return Reply()


@routes.on("PUT", rf"{STORAGE}/(?P<number>\d+)")
def put_part(hub: "LoopbackHub", call: Call, type: str, place: str, oid: str, number: str) -> Reply:
    repo = hub.repos[type, place]
    if oid not in repo.announced:
        raise HubError(400, f"No object was announced as {oid}")
    repo.parts.setdefault(oid, {})[int(number)] = call.body
    return Reply(headers={"ETag": etag(call.body)})


@routes.on("POST", rf"{STORAGE}/complete")
def complete(hub: "LoopbackHub", call: Call, type: str, place: str, oid: str) -> Reply:
    repo = hub.repos[type, place]
    if oid not in repo.parts:
        raise HubError(404, f"No upload of {oid} has begun, or it is complete")
    parts = repo.parts[oid]
    received = [{"partNumber": number, "etag": etag(part)} for number, part in sorted(parts.items())]
    if call.json() != {"oid": oid, "parts": received}:
        raise HubError(400, f"The parts received of {oid} are not those of the completion, or in another order")
    store_object(repo, oid, b"".join(parts[number] for number in sorted(parts)))
    del repo.parts[oid]
    return json_reply({})


@routes.on("POST", rf"{API}/lfs/{OID}/verify")
def verify(hub: "LoopbackHub", call: Call, repo: Repo, oid: str) -> Reply:
    if oid not in repo.objects or call.json() != {"oid": oid, "size": len(repo.objects[oid])}:
        raise HubError(404, f"LFS object {oid} was not received whole")
    return json_reply({})


def store_object(repo: Repo, oid: str, data: bytes) -> None:
    """Raises a HubError if it is not the object that was announced."""
    if repo.announced.get(oid) != len(data) or hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, f"The {len(data)} bytes received are not the object announced as {oid}")
    repo.objects[oid] = data


def etag(part: bytes) -> str:
    return f'"{hashlib.md5(part, usedforsecurity=False).hexdigest()}"'
