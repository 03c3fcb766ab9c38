"""What a job writes: head and tail are kept, secrets masked, and it is read piece by piece."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple

from upq.job import Output
from upq.secret import MASK, SHORT, open_end

#: Bytes of captured output kept of one attempt: half of it head, half of it tail.
OUTPUT_LIMIT_BYTES = 1 << 20
#: Characters of a write that are made bytes at a time.
WRITE_CHARS = 1 << 16


class Piece(NamedTuple):
    """A part of an output: text, the byte at which the next part begins, and all that there is."""

    text: str
    next: int
    size_bytes: int


def gap(left_out: int) -> bytes:
    return f"\n[... {left_out or 'some'} bytes left out ...]\n".encode()


def piece(head: bytes, tail: bytes, size: int, start: int) -> Piece:
    """An output from byte `start` on, of which head and tail were kept."""
    tail_start = size - len(tail)
    found = bytes(head[start:])
    if start < tail_start:
        left_out = tail_start - max(start, len(head))
        found += (gap(left_out) if left_out else b"") + tail
    else:
        found += tail[start - tail_start :]
    # Half a character is for the next time.
    for back in range(1, min(3, len(found)) + 1):
        if found[-back] >= 0xC0:
            if back < 2 + (found[-back] >= 0xE0) + (found[-back] >= 0xF0):
                found, size = found[:-back], size - back
            break
        if found[-back] < 0x80:
            break
    return Piece(found.decode("utf-8", "replace"), max(size, start), max(size, start))


def stored_piece(text: str, size: int, start: int) -> Piece:
    """The same of an output that was stored."""
    for found in re.finditer(r"\n\[\.\.\. ([0-9]+) bytes left out \.\.\.\]\n", text):
        head, tail = text[: found.start()].encode(), text[found.end() :].encode()
        if len(head) + int(found[1]) + len(tail) == size:
            return piece(head, tail, size, start)
    return piece(text.encode(), b"", len(text.encode()), start)


class Clipped(io.TextIOBase):
    """A text file that keeps the first and the last half of its limit and counts the rest.

    Any thread may write; memory stays below twice the limit whatever is written. What holds one
    of the `hidden` texts has *** in its place, also when it comes in several writes.
    """

    def __init__(self, limit_bytes: int = OUTPUT_LIMIT_BYTES, hidden: Sequence[str] = ()) -> None:
        self._hidden = [text.encode("utf-8", "replace") for text in hidden]
        # The end of what was written, which may be the beginning of a hidden text.
        self._pending = b""
        self._half = max(limit_bytes // 2, 1)
        self._head = bytearray()
        self._tail = bytearray()
        self._size = 0
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        for start in range(0, len(text), WRITE_CHARS):
            self.write_bytes(text[start : start + WRITE_CHARS].encode("utf-8", "replace"))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        with self._lock:
            if self._hidden:
                data = self._pending + data
                for text in self._hidden:
                    data = data.replace(text, MASK.encode())
                cut = len(data) - open_end(data, self._hidden)
                data, self._pending = data[:cut], data[cut:]
            rest = memoryview(data)  # so that no part of it is copied on the way
            self._size += len(data)
            room = self._half - len(self._head)
            if room > 0:
                self._head += rest[:room]
                rest = rest[room:]
            self._tail += rest[-2 * self._half :]
            if len(self._tail) > 2 * self._half:
                del self._tail[: -self._half]

    def kept(self) -> Output | None:
        """What was written, or None when nothing was."""
        with self._lock:
            end = self._pending if len(self._pending) <= SHORT else MASK.encode()
            size, half = self._size + len(end), self._half
            if not size:
                return None
            head, tail = bytes(self._head), bytes((self._tail + end)[-half:])
        left_out = size - len(head) - len(tail)
        if not left_out:
            whole = readable(head + tail)
            if len(whole) <= 2 * half:
                return Output(whole.decode(), size, False)
        text = readable(head)[:half] + gap(left_out) + readable(tail)[-half:]
        return Output(text.decode("utf-8", "ignore"), size, True)

    def since(self, start: int) -> Piece:
        """What was written from byte `start` on, as far as it is kept."""
        with self._lock:
            return piece(bytes(self._head), bytes(self._tail), self._size, start)


def readable(data: bytes) -> bytes:
    """As text that every database takes; what is binary may get longer by that."""
    return data.decode("utf-8", "replace").replace("\0", "\\0").encode()
