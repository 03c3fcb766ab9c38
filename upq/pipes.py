"""Reading what a program writes, without ever waiting for the end of its pipes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

Sink = Callable[[bytes], object]

#: What a pipe holds.
_READ_BYTES = 1 << 16
#: A longer line is no report.
_REPORT_BYTES = 4096
_REPORT_CHARS = 200
_REPORT = re.compile(
    r"progress:[ \t]*([0-9]{1,15}(?:\.[0-9]{1,9})?)[ \t]*(?:(%)|/[ \t]*([0-9]{1,15}))?"
    r"(?:[ \t]+(.*))?"
)
#: What a line of JSON begins with; looked at first, because there may be a million lines.
_JSON_BEGINS = frozenset(b'{["-0123456789tfn')


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


class Watch:
    """Copies pipes into their sinks while waiting for other descriptors."""

    def __init__(self, pipes: Mapping[int, Sink], *others: int) -> None:
        #: Those that have become readable; a pipe when it has come to its end.
        self.ready: set[int] = set()
        self._pipes = pipes
        self._poll = select.poll()
        for fd in (*pipes, *others):
            self._poll.register(fd, select.POLLIN)

    @property
    def drained(self) -> bool:
        return self._pipes.keys() <= self.ready

    def until(self, done: Callable[[], bool], wait_s: float, tick_s: float = 3600.0) -> bool:
        """Copy until `done()`, asked at each event and tick; False when the time is over."""
        deadline = time.monotonic() + wait_s
        while not done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            self._step(min(left_s, tick_s))
        return True

    def _step(self, wait_s: float) -> None:
        for fd, _ in self._poll.poll(math.ceil(wait_s * 1000)):
            data = os.read(fd, _READ_BYTES) if fd in self._pipes else b""
            if data:
                self._pipes[fd](data)
            else:
                self._poll.unregister(fd)
                self.ready.add(fd)


class Reports:
    """Finds `progress: 40% text` lines in a stream, and hands the newest on.

    Also `progress: 3/12 text`, and `progress: 40` of nobody knows how many.
    """

    def __init__(self, report: Callable[[float, float | None, str], None]) -> None:
        self._report = report
        self._rest = b""
        # Within a line that is too long.
        self._skips = False

    def __call__(self, data: bytes) -> None:
        lines, newline, rest = data.rpartition(b"\n")
        if newline:
            if self._skips:
                lines = lines.partition(b"\n")[2]
            self._judge(b"\n" + self._rest + lines)
            self._rest, self._skips = b"", False
        if not self._skips:
            self._rest += rest
        if len(self._rest) > _REPORT_BYTES:
            self._rest, self._skips = b"", True

    def end(self) -> None:
        """The stream has ended, maybe without an end of its last line."""
        self(b"\n")

    def _judge(self, lines: bytes) -> None:
        """Look from the end, so that a flood of reports costs one."""
        end = len(lines)
        while (start := lines.rfind(b"\nprogress:", 0, end)) >= 0:
            stop = lines.find(b"\n", start + 1)
            line = lines[start + 1 : stop if stop >= 0 else None]
            match = _REPORT.fullmatch(line.decode("utf-8", "replace").rstrip())
            if match and len(line) <= _REPORT_BYTES:
                total = 100.0 if match[2] else float(match[3]) if match[3] else None
                self._report(float(match[1]), total, (match[4] or "")[:_REPORT_CHARS])
                return
            end = start


class Tail:
    """The last bytes of a stream; memory stays below twice the limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept = bytearray()
        self._is_cut = False

    def __call__(self, data: bytes) -> None:
        self._kept += data
        if len(self._kept) > 2 * self._limit:
            del self._kept[: -self._limit]
            self._is_cut = True

    def last_json(self) -> tuple[Any] | None:
        """The last line that is JSON, in a tuple, for it may be null; None when there is none."""
        end = len(self._kept)
        while end >= 0:
            start = self._kept.rfind(b"\n", 0, end) + 1
            if (
                start < end
                and self._kept[start] in _JSON_BEGINS
                and not (self._is_cut and not start)
            ):
                with contextlib.suppress(ValueError, RecursionError):
                    line = self._kept[start:end].decode()
                    return (json.loads(line, parse_constant=_refuse),)
            end = start - 1
        return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
