"""What of the outside world no test can have for real: a disk that is nearly full, and a machine without a network."""

import shutil
from collections.abc import Callable

import huggingface_hub.constants
import pytest


@pytest.fixture
def free_bytes(monkeypatch) -> Callable[[int], None]:
    """Call it with a number: every disk then says that so many bytes are free."""

    def leave(count: int) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=count))

    return leave


@pytest.fixture
def go_offline(monkeypatch) -> Callable[[], None]:
    """Call it: from then on HF_HUB_OFFLINE is set, which huggingface_hub reads when it is imported."""
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
