"""What answers which request: each module lists its answers with the methods and the pattern of paths they are for."""

import re
from collections.abc import Callable

from .wire import Reply

KIND = r"(?P<kind>models|datasets|spaces)"
API = rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?P<kind>datasets/|spaces/)?(?P<id>[^/]+/[^/]+?)"
REV = r"(?P<rev>[^/]+)"


class Routes(list[tuple[list[str], re.Pattern[str], Callable[..., Reply]]]):
    """The answers of a module, asked in turn."""

    def on(self, methods: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
        """The function below answers such requests; it is given the groups of the pattern by name."""

        def add(answer: Callable[..., Reply]) -> Callable[..., Reply]:
            self.append((methods.split(), re.compile(pattern), answer))
            return answer

        return add
