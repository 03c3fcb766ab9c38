"""Reports of progress and results found in streams that come in any pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upq.pipes import Reports, Tail


def reports(*pieces: bytes) -> list[tuple[float, float | None, str]]:
    found: list[Any] = []
    reading = Reports(lambda *report: found.append(report))
    for piece in pieces:
        reading(piece)
    reading.end()
    return found


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (b"progress: 40% text", (40.0, 100.0, "text")),
        (b"progress:40.5 %", (40.5, 100.0, "")),
        (b"progress: 3/12 of them", (3.0, 12.0, "of them")),
        (b"progress: 3 / 12", (3.0, 12.0, "")),
        (b"progress: 7", (7.0, None, "")),
        (b"progress: 7 done\r", (7.0, None, "done")),
        (b"progress: 1% \xff", (1.0, 100.0, "\ufffd")),
        (b"progress: 1% " + b"x" * 1000, (1.0, 100.0, "x" * 200)),
    ],
)
def test_a_report_is_read(line: bytes, report: Any) -> None:
    assert reports(line + b"\n") == [report]
    assert reports(*(bytes([byte]) for byte in line)) == [report]


@pytest.mark.parametrize(
    "line",
    [
        b"progress: much",
        b"progress: 40%text",
        b"Progress: 40%",
        b" progress: 40%",
        b"progress: -1%",
        b"progress: 1e9",
        b"progress: " + b"9" * 99,
        b"progress: 1% " + b"x" * 5000,
        b"x" * 5000 + b"progress: 1%",
        b"",
    ],
)
def test_what_is_none_is_left_alone(line: bytes) -> None:
    assert reports(line + b"\n") == []
    assert reports(line[:2000], line[2000:], b"\nprogress: 5%\n") == [(5.0, 100.0, "")]


def test_the_rest_of_a_line_that_is_too_long_is_no_line() -> None:
    assert reports(b"x" * 5000, b"progress: 1%\n") == []
    assert reports(b"x" * 5000, b"progress: 1%", b"\nprogress: 2%\n") == [(2.0, 100.0, "")]


def test_of_what_came_together_the_newest_counts() -> None:
    assert reports(b"progress: 1%\nprogress: 2%\nprogress: x\nend\n") == [(2.0, 100.0, "")]


@given(st.lists(st.binary(max_size=40)))
def test_pieces_make_no_difference_to_the_last(pieces: list[bytes]) -> None:
    pieces = [piece.replace(b"a", b"\n").replace(b"b", b"progress: 1%\n") for piece in pieces]
    assert reports(*pieces)[-1:] == reports(b"".join(pieces))[-1:]


def kept(*pieces: bytes, limit: int = 100) -> Any:
    tail = Tail(limit)
    for piece in pieces:
        tail(piece)
    return tail.last_json()


def test_the_last_line_that_is_json_is_found() -> None:
    assert kept(b'{"a":1}\n[2', b", 3]\nthe end\n") == ([2, 3],)
    assert kept(b"null") == (None,)
    assert kept(b"NaN\n{\n\xff\ntrue.\n") is None
    assert kept(b"[" * 100_000, limit=1 << 20) is None


def test_only_the_tail_is_kept_and_half_a_line_is_no_line() -> None:
    assert kept(b"[1]\n", *[b"x" * 30] * 10) is None
    assert kept(b"1" * 300, b"\n[2]\nx") == ([2],)
    assert kept(b"1" * 300) is None
