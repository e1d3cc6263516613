"""What a search may spend: passes over the split, or time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}
_DURATION = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?) ?(s|m|min|h)")


@dataclass(frozen=True)
class Budget:
    """A number of passes over the split, or of seconds.

    Args:
        passes: images that soups are shown, over the images of the split; 0 is to estimate only.
        seconds: from the beginning of the search.
    """

    passes: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, value: float | str) -> Budget:
        """From a number, or a duration as in `90s`, `15m` or `1.5h`.

        Raises:
            ValueError: for anything else, and for less than the one pass that the best soup is measured on.
        """
        text = str(value).strip()
        duration = _DURATION.fullmatch(text)
        if duration:
            return cls(seconds=float(duration[1]) * _UNITS[duration[2]])
        try:
            passes = math.nan if isinstance(value, bool) else float(text)
        except ValueError:
            passes = math.nan
        if not (passes == 0 or 1 <= passes < math.inf):
            raise ValueError(
                f"budget={value!r}: it is a number of passes over the split, at least the 1 that the best soup is "
                "measured on, or a duration as in '15m'; with 0, soups are estimated only."
            )
        return cls(passes=abs(passes))  # of -0.0 the sign is nothing

    def __str__(self) -> str:
        number = self.seconds if self.passes == math.inf else self.passes
        text = repr(float(number)).removesuffix(".0")
        return f"{text}s" if self.passes == math.inf else text
