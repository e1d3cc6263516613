"""What answers which request: each answer is registered with the methods and the pattern of paths that it is for."""

import re
from collections.abc import Callable

from .wire import Reply

KIND = r"(?P<kind>models|datasets|spaces)"
API = rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?P<kind>datasets/|spaces/)?(?P<id>[^/]+/[^/]+?)"
REV = r"(?P<rev>[^/]+)"

ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., Reply]]] = []


def route(methods: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    def register(answer: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((methods.split(), re.compile(pattern), answer))
        return answer

    return register
