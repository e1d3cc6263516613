"""HTTP for the loopback Hub: requests, replies, injected faults and an access log."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Request:
    """A line of the access log. The path includes the query; the bytes are those of the bodies."""

    method: str
    path: str
    status: int
    received: int
    served: int


@dataclass
class Call:
    """A request that is to be answered. The path is without the query, and still percent-encoded."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: str | None = None

    def json(self) -> Any:
        return json.loads(self.body)

    def option(self, name: str) -> str | None:
        return self.query.get(name, [None])[0]

    def flag(self, name: str) -> bool:
        return (self.option(name) or "").lower() in ("1", "true")


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    breaks_off_after: int | None = None  # the connection drops after so many bytes of the body; -1: before any answer


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


@dataclass
class Fault:
    """A fault of requests of this method whose path has this fragment.

    Args:
        status: of the answer in place of the real one; None drops the connection.
        times: how often it happens.
        headers: of the answer.
        answered: whether the request has its effect nevertheless, and only its answer is lost.
        delay: seconds before the real answer; then there is no other fault.
        halfway: the connection drops after half of the request's body; then there is no other fault.
    """

    method: str
    fragment: str
    status: int | None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    answered: bool = False
    delay: float = 0.0
    halfway: bool = False

    def reply(self) -> Reply:
        if self.status is None:
            return Reply(b"", 200, {}, breaks_off_after=-1)
        # clients read the url of an answer 409
        answer = {"error": f"an injected {self.status}", "url": "https://huggingface.co/org/soup"}
        return json_reply(answer, self.status, self.headers)


class Faults(list[Fault]):
    """The faults of requests to come."""

    def cuts(self, method: str, path: str) -> bool:
        """Whether this request is cut off in the middle of its body."""
        return self._next(method, path, halfway=True) is not None

    def around(self, call: Call, answer: Callable[[Call], Reply]) -> Reply:
        fault = self._next(call.method, call.path, halfway=False)
        if fault is None:
            return answer(call)
        if fault.delay:
            threading.Event().wait(fault.delay)  # tests let `time.sleep` return at once
            return answer(call)
        if fault.answered:
            answer(call)
        return fault.reply()

    def _next(self, method: str, path: str, *, halfway: bool) -> Fault | None:
        """The first fault of this request, which happens one time less from now on; None if there is none."""
        for fault in self:
            if fault.halfway == halfway and fault.method == method and fault.fragment in path:
                fault.times -= 1
                if not fault.times:
                    self.remove(fault)
                return fault
        return None


class Server(ThreadingHTTPServer):
    """Answers on a free port of 127.0.0.1 and logs every request."""

    def __init__(self, answer: Callable[[Call], Reply], log: list[Request], faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.log = log
        self.faults = faults
        self._connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        super().server_close()
        for connection in self._connections:  # clients keep them alive
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with Nagle's algorithm, the two writes of an answer could take 40 ms

    def _serve(self) -> None:
        if self.server.faults.cuts(self.command, self.path):
            half = self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.server.log.append(Request(self.command, self.path, 0, len(half), 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._read_body()
        target = urlsplit(self.path)
        reply = self.server.answer(Call(self.command, target.path, parse_qs(target.query), self.headers, body))
        served = b"" if self.command == "HEAD" else reply.body
        # before the answer: a client that has it must find its request in the log
        self.server.log.append(Request(self.command, self.path, reply.status, len(body), len(served)))
        try:
            if reply.breaks_off_after == -1:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(served[: reply.breaks_off_after])
            if reply.breaks_off_after is not None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
        except ConnectionError:  # the client has closed the connection
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: object) -> None:
        """Print nothing: the access log is a list."""
