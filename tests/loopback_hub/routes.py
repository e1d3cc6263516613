"""Routes: each module registers its answers for methods and for a pattern of paths."""

import re
from collections.abc import Callable

from .wire import Reply

KIND = r"(?P<kind>models|datasets|spaces)"
API = rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?P<kind>datasets/|spaces/)?(?P<id>[^/]+/[^/]+?)"
REV = r"(?P<rev>[^/]+)"


class Routes(list[tuple[list[str], re.Pattern[str], Callable[..., Reply]]]):
    """The answers of a module; the first that matches answers."""

    def on(self, methods: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
        """A decorator: the function answers such requests, and takes the groups of the pattern by name."""

        def add(answer: Callable[..., Reply]) -> Callable[..., Reply]:
            self.append((methods.split(), re.compile(pattern), answer))
            return answer

        return add
