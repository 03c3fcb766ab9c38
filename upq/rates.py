"""How often: `100/s`, `10/min burst 3`. Arithmetic only: who asks keeps `at`.

The rule is GCRA: `at` is when the next start would be due if all came evenly, and starts may be
`burst - 1` ahead of it. So in any stretch of time there are no more than the rate allows for it,
and `burst`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_PER_US = {"s": 1_000_000, "min": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_RATE = re.compile(r"([0-9]{1,9})\s*/\s*(s|min|h|d)(?:\s+burst\s+([0-9]{1,9}))?")
#: What comes in this time may come at once, where no burst is given.
BURST_US = 200_000


class Rate(NamedTuple):
    """So many starts in each stretch of time."""

    starts: int
    per_us: int
    #: How many may start at once after a rest.
    burst: int
    text: str
    #: What it holds for each of: text with {parameters}; "" for the type as a whole.
    per: str = ""

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Raises ValueError."""
        text, *per = re.split(r"\s+per\s+", text, maxsplit=1)
        match = _RATE.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a rate such as 100/s, 10/min, 5/h or 1/d burst 3")
        count, per_us = int(match[1]), _PER_US[match[2]]
        burst = int(match[3]) if match[3] else max(1, -(-count * BURST_US // per_us))
        if not count:
            raise ValueError("a rate of 0 lets nothing start; `enabled = no` says that")
        if not burst:
            raise ValueError("a burst of 0 lets nothing start")
        if count > per_us:
            raise ValueError(f"{text!r} is more than a million a second")
        rate = cls(count, per_us, burst, f"{match[1]}/{match[2]}")
        if not per:
            return rate
        if match[3]:
            raise ValueError("a rate per key is even, it has no burst")
        return rate._replace(burst=1, per=per[0])

    @property
    def every_us(self) -> int:
        """From one start to the next, when they are even."""
        return -(-self.per_us // self.starts)

    def allowed(self, at: int, now: int) -> int:
        """How many may start now."""
        behind = (now - max(at, now)) * self.starts + (self.burst - 1) * self.per_us
        return max(behind // self.per_us + 1, 0)

    def after(self, at: int, now: int, n: int) -> int:
        """`at` after n more starts."""
        return max(at, now) - (-n * self.per_us // self.starts)

    def free_at(self, at: int) -> int:
        """When it is worth to look again: one may start, or a quarter of a burst at once."""
        k = max(self.burst // 4, 1)
        return at - ((self.burst - k) * self.per_us // self.starts)
