"""Hubs that others wrote: the loopback Hub with some of its answers altered."""

import json
from collections.abc import Callable
from typing import Any

from loopback_hub.loopback import LoopbackHub
from loopback_hub.wire import Call, Reply, json_reply

Alteration = Callable[[Call, Reply], Reply]


def alter(hub: LoopbackHub, method: str, fragment: str, change: Alteration) -> None:
    """Change the answers to requests of a method whose path has a fragment; alterations add up."""

    def altered(call: Call, reply: Reply) -> Reply:
        return change(call, reply) if call.method == method and fragment in call.path else reply

    hub.alterations.append(altered)


def alter_json(hub: LoopbackHub, method: str, fragment: str, change: Callable[[Any], Any]) -> None:
    """Change what stands in answers that are JSON and no refusals."""

    def changed(call: Call, reply: Reply) -> Reply:
        if reply.status != 200 or reply.headers.get("Content-Type") != "application/json":
            return reply
        return json_reply(change(json.loads(reply.body)), headers=reply.headers)

    alter(hub, method, fragment, changed)


def refusal(status: int, body: Any = None, **headers: str) -> Alteration:
    """An alteration: the request is refused."""
    return lambda call, reply: json_reply(body or {}, status, {key.replace("_", "-"): v for key, v in headers.items()})


def without(*names: str) -> Callable[[Any], Any]:
    """A change of JSON: fields are missing, and those of the files that it lists too."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return {name: change(entry) for name, entry in value.items() if name not in names}

    return change
