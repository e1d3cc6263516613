"""The clock that budgets of time are measured by."""

import time
from dataclasses import dataclass

import pytest


@dataclass
class Clock:
    """How many seconds later than it is the clock says it is."""

    ahead: float = 0.0

    def advance(self, seconds: float) -> None:
        self.ahead += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """A clock that can be put forward: a test of minutes can't wait for them."""
    shown, now = Clock(), time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + shown.ahead)
    return shown
