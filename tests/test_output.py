from __future__ import annotations

import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as some

from upq.output import Clipped, readable, stored_piece

MIB = 1 << 20


def test_output_below_its_limit_is_kept_whole() -> None:
    out = Clipped(100)
    assert out.write("x" * 60) == 60
    out.write("y" * 40)
    assert out.kept() == ("x" * 60 + "y" * 40, 100, False)


def test_output_over_its_limit_keeps_head_and_tail() -> None:
    out = Clipped(100)
    out.write("a" * 1000)
    out.write("b" * 1000)
    text, size, truncated = out.kept() or ("", 0, False)
    assert (size, truncated) == (2000, True)
    assert text == "a" * 50 + "\n[... 1900 bytes left out ...]\n" + "b" * 50


def test_no_output_is_none() -> None:
    assert Clipped().kept() is None


@given(some.lists(some.text(max_size=30), max_size=12), some.integers(2, 60))
def test_output_is_clipped_wherever_it_is_cut(parts: list[str], limit: int) -> None:
    out = Clipped(limit)
    whole = b""
    for part in parts:
        out.write(part)
        whole += part.encode()
    kept = out.kept()
    if not whole:
        assert kept is None
        return
    half = limit // 2
    assert kept is not None
    assert kept.size_bytes == len(whole)
    as_text = whole.decode().replace("\0", "\\0")
    assert kept.truncated == (len(as_text.encode()) > 2 * half)
    if not kept.truncated:
        assert kept.text == as_text
    else:
        head, tail = readable(whole[:half])[:half], readable(whole[half:][-half:])[-half:]
        left_out = max(len(whole) - 2 * half, 0) or "some"
        gap = f"\n[... {left_out} bytes left out ...]\n"
        assert kept.text == head.decode(errors="ignore") + gap + tail.decode(errors="ignore")


def test_binary_output_is_not_longer_as_text_than_its_limit_allows() -> None:
    for byte in b"\0", b"\xff":
        out = Clipped(1000)
        out.write_bytes(byte * 900)
        kept = out.kept()
        assert kept is not None
        assert (kept.size_bytes, kept.truncated) == (900, True)
        assert len(kept.text.encode()) < 1050
        assert "\0" not in kept.text


def test_output_that_is_no_text_is_kept_readable() -> None:
    out = Clipped()
    out.write_bytes(b"\xff\xfe caf\xc3\xa9\n")
    out.write("a\ud800b")
    kept = out.kept()
    assert kept is not None
    assert kept.text == "\ufffd\ufffd café\na?b"


@pytest.mark.parametrize("part", [b"x" * (64 << 10), b"x" * (32 * MIB), b"line of text\n" * 8])
def test_memory_stays_bounded_whatever_is_written(part: bytes) -> None:
    out = Clipped(MIB)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(64 * MIB // max(len(part), 4096)):
        out.write_bytes(part)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 4 * MIB


def test_threads_that_write_at_once_lose_nothing() -> None:
    out = Clipped(10 * MIB)
    threads = [
        threading.Thread(target=lambda c=c: [out.write(c * 100 + "\n") for _ in range(200)])  # type: ignore[misc]
        for c in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = out.kept()
    assert kept is not None
    lines = kept.text.splitlines()
    assert {line: lines.count(line) for line in set(lines)} == {c * 100: 200 for c in "abcd"}


# Output as it comes


def test_hidden_texts_are_masked_however_they_come() -> None:
    out = Clipped(1000, ["hunter2", "hunter"])
    for part in ("a hun", "ter2 b hunter c", " hunt", "ed hunter2"):
        out.write(part)
    kept = out.kept()
    assert kept and kept.text == "a *** b *** c hunted ***"
    out.write(" hunt")
    kept = out.kept()
    assert kept and kept.text.endswith(" ***"), "half a secret at the end is none to show"


@pytest.mark.parametrize("limit", [10, 64])
def test_pieces_make_the_whole(limit: int) -> None:
    out, text, at = Clipped(limit), "", 0
    for word in "one", "zwei é", "", "drei\n":
        out.write(word)
        piece = out.since(at)
        text, at = text + piece.text, piece.next
    assert text == "onezwei édrei\n"
    assert out.since(at).text == ""
    kept = out.kept()
    assert kept
    assert stored_piece(kept.text, kept.size_bytes, 0).text == kept.text
    assert stored_piece(kept.text, kept.size_bytes, at).text == ""
    assert stored_piece(kept.text, kept.size_bytes, at - 2).text == "i\n"


def test_half_a_character_waits_for_its_other_half() -> None:
    out = Clipped(100)
    out.write_bytes("aé".encode()[:2])
    assert out.since(0)[:2] == ("a", 1)
    out.write_bytes("é".encode()[1:])
    assert out.since(1)[:2] == ("é", 3)


def test_what_was_left_out_is_said_to_who_comes_late() -> None:
    out = Clipped(10)
    for n in range(10):
        out.write(f"{n}" * 10)
    assert out.since(0).text.startswith("00000\n[... ")
    assert out.since(97).text == "999"
    kept = out.kept()
    assert kept and stored_piece(kept.text, kept.size_bytes, 97).text == "999"
    late = stored_piece(kept.text, kept.size_bytes, 50).text
    assert late == "\n[... 45 bytes left out ...]\n99999"
