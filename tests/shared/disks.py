"""A disk that is nearly full, which no test can fill for real."""

import shutil

import pytest


@pytest.fixture
def free_bytes(monkeypatch):
    """Call it with a number: every disk then says that so many bytes are free."""

    def leave(count: int) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=count))

    return leave
