"""Uploads by Xet: a storage beside the Hub, which takes chunks of files and puts the files together.

The chunks come in xorbs; then shards say which of them make a file (https://huggingface.co/docs/xet). The storage
knows no chunks that others have uploaded, and grants no uploads to other places: it answers 404, and clients do
without.
"""

import hashlib
import re
import struct
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .routes import API, REV, Routes
from .store import HubError, Repo
from .wire import Call, Reply, Server, json_reply

if TYPE_CHECKING:
    from .loopback import LoopbackHub

routes = Routes()

ENTRY = 48  # bytes of each entry of a shard
NO_MORE = b"\xff" * 32
VERIFIED, HAS_SHA256 = 1 << 31, 1 << 30


class Storage:
    """A server for Xet with tokens from the Hub, and with the Hub's log and faults."""

    def __init__(self, hub: "LoopbackHub") -> None:
        self.xorbs: dict[str, list[bytes]] = {}
        self.tokens: dict[str, tuple[Repo, str]] = {}  # of each the repository and the scope, read or write
        self._lock = threading.Lock()
        self._server = Server(lambda call: hub.faults.around(call, self.answer), hub.requests, hub.faults)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def token(self, repo: Repo, scope: str) -> str:
        token = f"xet-{len(self.tokens)}"
        self.tokens[token] = repo, scope
        return token

    def answer(self, call: Call) -> Reply:
        try:
            with self._lock:
                return self._answer(call)
        except HubError as error:
            return json_reply({"error": str(error)}, error.status)
        except (IndexError, RuntimeError, ValueError, struct.error) as error:
            return json_reply({"error": f"{type(error).__name__}: {error}"}, 400)

    def _answer(self, call: Call) -> Reply:
        token = (call.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.tokens:
            raise HubError(401, "No token of this storage")
        repo, scope = self.tokens[token]
        if call.method == "POST" and scope != "write":
            raise HubError(403, "The token may only read")
        if match := re.fullmatch(r"/v1/xorbs/default/([0-9a-f]{64})", call.path):
            is_new = match[1] not in self.xorbs
            self.xorbs[match[1]] = list(chunks_of(call.body))
            return json_reply({"was_inserted": is_new})
        if match := re.fullmatch(r"/v([12])/shards", call.path):
            files = [(sha256, self._put_together(terms)) for sha256, terms in files_of(call.body)]
            for sha256, data in files:
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise HubError(400, f"The chunks do not make the file {sha256}")
            repo.objects |= dict(files)
            return json_reply({"result": 1}) if match[1] == "1" else Reply(b'{"type": "result"}\n')
        raise HubError(404, f"This storage has no {call.method} {call.path}")

    def _put_together(self, terms: list[tuple[str, int, int, int]]) -> bytes:
        parts = []
        for xorb, size, first, end in terms:
            if xorb not in self.xorbs:
                raise HubError(400, f"There is no xorb {xorb}")
            parts.append(b"".join(self.xorbs[xorb][first:end]))
            if len(parts[-1]) != size:
                raise HubError(400, f"The chunks {first} to {end} of {xorb} are not {size} bytes")
        return b"".join(parts)


@routes.on("GET", rf"{API}/xet-(?P<scope>read|write)-token/{REV}")
def token(hub: "LoopbackHub", call: Call, repo: Repo, scope: str, rev: str) -> Reply:
    """A token for the storage, and its address."""
    if hub.xet is None:
        raise HubError(404, "This Hub has no Xet")
    if scope == "write":
        hub.require_write(call, None if call.flag("create_pr") else repo.namespace)
    hub.require_access(call, repo)
    return json_reply(
        {"accessToken": hub.xet.token(repo, scope), "exp": int(time.time()) + 3600, "casUrl": hub.xet.url}
    )


def chunks_of(xorb: bytes) -> Iterator[bytes]:
    """The chunks of a xorb. Each has a head of eight bytes: version, packed size, way of packing, size."""
    at = 0
    while at < len(xorb):
        version, scheme = xorb[at], xorb[at + 4]
        packed, size = (int.from_bytes(xorb[start : start + 3], "little") for start in (at + 1, at + 5))
        chunk = unpack(xorb[at + 8 : at + 8 + packed], scheme)
        if version != 0 or len(chunk) != size:
            raise ValueError(f"no chunk of version 0 and {size} bytes")
        yield chunk
        at += 8 + packed


def unpack(data: bytes, scheme: int) -> bytes:
    """A chunk, unpacked: it is as it was (0), by LZ4 (1), or by LZ4 with all first bytes of four in front (2)."""
    if scheme == 0:
        return data
    import lz4.frame

    data = lz4.frame.decompress(data)
    if scheme == 1:
        return data
    if scheme != 2:
        raise ValueError(f"no way of packing: {scheme}")
    chunk, start = bytearray(len(data)), 0
    for place in range(4):
        end = start + len(chunk[place::4])
        chunk[place::4] = data[start:end]
        start = end
    return bytes(chunk)


def files_of(shard: bytes) -> Iterator[tuple[str, list[tuple[str, int, int, int]]]]:
    """The sha256 of each file, and its terms: a xorb, the bytes, the first chunk and the one after the last."""
    version, _ = struct.unpack_from("<QQ", shard, 32)
    if version != 2:
        raise ValueError(f"a shard of version {version}")
    at = ENTRY
    while shard[at : at + 32] != NO_MORE:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        if not flags & HAS_SHA256:
            raise ValueError("a file without its sha256")
        at += ENTRY
        terms = [
            (name_at(shard, at + i * ENTRY), *struct.unpack_from("<III", shard, at + i * ENTRY + 36))
            for i in range(count)
        ]
        at += ENTRY * (2 * count if flags & VERIFIED else count)
        yield name_at(shard, at), terms
        at += ENTRY


def name_at(shard: bytes, at: int) -> str:
    """A hash as paths have it: four numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", shard, at))
