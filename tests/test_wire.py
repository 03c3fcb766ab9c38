from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upq import wire
from upq.wire import Ack, Reply

messages = st.text(st.characters(exclude_categories=["Cs"]))


def test_replies_to_lines_of_text() -> None:
    assert wire.ack(17) == b"ACK 17\n"
    assert wire.ack(17, "gr\u00fcn") == "ACK 17 gr\u00fcn\n".encode()
    assert wire.ack(17, "ok", duplicate=True) == b"ACK 17 duplicate\n"
    assert wire.err("busy", "come later") == b"ERR busy come later\n"
    assert wire.ok({"a": "\u00fc"}) == 'OK {"a":"\u00fc"}\n'.encode()


def test_replies_to_json() -> None:
    assert json.loads(wire.ack(17, "ok", json=True)) == {
        "ok": True,
        "id": 17,
        "message": "ok",
        "duplicate": False,
    }
    assert json.loads(wire.err("busy", "a\nb", json=True)) == {
        "ok": False,
        "error": "busy",
        "message": "a\nb",
    }
    assert json.loads(wire.ok([1], json=True)) == {"ok": True, "data": [1]}
    assert json.loads(wire.acks([Ack(1), Ack(2, "again", True)])) == {
        "ok": True,
        "jobs": [
            {"id": 1, "message": "", "duplicate": False},
            {"id": 2, "message": "again", "duplicate": True},
        ],
    }


def test_control_characters_and_line_ends_are_escaped() -> None:
    message = "a\nb\r\tc\x1b[31m\x9b\u2028\udc80"
    assert wire.ack(1, message) == rb"ACK 1 a\nb\r\tc\x1b[31m\x9b\u2028\udc80" + b"\n"
    line = wire.ok(message)
    assert line.decode("ascii").endswith("\n")
    assert json.loads(line[3:]) == message


def test_a_long_message_is_cut_at_the_limit_of_a_line() -> None:
    line = wire.err("refused", "\u00fc" * wire.LINE_LIMIT_BYTES)
    assert wire.LINE_LIMIT_BYTES - 2 <= len(line) <= wire.LINE_LIMIT_BYTES + 1
    assert line.decode().endswith("\u00fc...\n")


def test_what_is_no_json_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        wire.ok(float("nan"))


def test_replies_are_understood_again() -> None:
    def read(line: bytes) -> Reply:
        return wire.read_reply(line)._replace(line="")

    assert read(wire.ack(17, "ok")) == Reply("", (Ack(17, "ok"),))
    assert read(wire.ack(17)) == Reply("", (Ack(17),))
    assert read(wire.ack(17, duplicate=True)).acks[0].duplicate
    assert read(wire.ack(17, "ok", json=True)) == Reply("", (Ack(17, "ok"),))
    assert read(wire.acks([Ack(1), Ack(2)])) == Reply("", (Ack(1), Ack(2)))
    assert read(wire.ok({"a": 1})) == read(wire.ok({"a": 1}, json=True)) == Reply("", data={"a": 1})
    refusal = Reply("", code="busy", message="come later")
    assert read(wire.err("busy", "come later")) == refusal
    assert read(wire.err("busy", "come later", json=True)) == refusal
    assert wire.read_reply(b"ACK 17 x\r\n").line == "ACK 17 x"


@pytest.mark.parametrize(
    "line",
    [b"", b"HTTP/1.1 400 Bad Request", b"ACK", b"ACK x", b"OK", b"OK {", b"{", b"[]", b"{}"],
)
def test_what_is_no_reply_is_told(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a reply"):
        wire.read_reply(line)


@given(messages)
def test_any_message_is_one_line_and_survives_json(message: str) -> None:
    for json_ in False, True:
        line = wire.ack(1, message, json=json_)
        assert line.endswith(b"\n")
        assert len(line.decode().splitlines()) == 1
    assert wire.read_reply(line).acks[0].message == message


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["test", "fid:50"], "test fid:50"),
        (["test", "msg:two words"], 'test "msg:two words"'),
        (["test", "msg:'x'", "it's"], "test \"msg:'x'\" it's"),
        (["test", "", 'a"b c'], r'test "" "a\"b c"'),
        (["test", "a\nb"], r'test "a\nb"'),
        (["hash", '{"fid": 50}'], r'hash "{\"fid\": 50}"'),
    ],
)
def test_words_are_quoted_where_they_need_it(words: list[str], line: str) -> None:
    assert wire.join(words) == line


def test_a_line_of_json_may_be_longer() -> None:
    assert wire.limit_bytes(b"test") == 64 << 10
    assert wire.limit_bytes(b'{"submit') == 1 << 20
