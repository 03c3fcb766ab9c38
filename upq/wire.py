"""What both ends of a connection know of a line: its length, its words and quotes, the replies.

Requests are read in `protocol`; this part is apart because every client imports it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from upq.errors import BadParams

#: Bytes a line of text may have, its line end not counted; also of a text reply to a submit.
LINE_LIMIT_BYTES = 64 << 10
#: Bytes a line that starts with `{` may have.
JSON_LIMIT_BYTES = 1 << 20


def is_json(start: bytes) -> bool:
    """Whether the line that starts so is JSON and wants a JSON reply."""
    return start.startswith(b"{")


def limit_bytes(start: bytes) -> int:
    """How long the line that starts so may be, its line end not counted."""
    return JSON_LIMIT_BYTES if is_json(start) else LINE_LIMIT_BYTES


# Words and quotes

#: Quotes are read where a word starts with one, or its value after the first colon does.
_WORD = re.compile(
    r"""
    ( (?: [^ \t:"'] [^ \t:]*+ )? : )?+
    (?: " ( [^"\\]*+ (?: \\. [^"\\]*+ )*+ ) " | ' ( [^']*+ ) ' | ( (?!["']) [^ \t]*+ ) )
    (?: [ \t]++ | $ )
    """,
    re.VERBOSE | re.DOTALL,
)
_PLAIN_WORD = re.compile(r"""(?! ["'{] | [^\s:]*: ["'] ) \S+""", re.VERBOSE)
_ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "r": "\r", "t": "\t"}
_ESCAPE = re.compile(r'\\([\\"nrt])')
_ESCAPE_TABLE = str.maketrans({char: "\\" + letter for letter, char in _ESCAPES.items()})


def next_word(text: str, start: int) -> tuple[str, int]:
    """The word at `start` without its quotes, and where the next one starts."""
    match = _WORD.match(text, start)
    if match is None:
        raise BadParams(f"a quote is not closed, or text follows it: {begun(text, start)}")
    key, double, single, bare = match.groups("")
    double = _ESCAPE.sub(lambda escape: _ESCAPES[escape[1]], double)
    return key + double + single + bare, match.end()


def read_words(line: str) -> list[str]:
    """The words of a line, as `next_word` reads them. Raises BadParams."""
    words, position = [], 0
    while position < len(line):
        word, position = next_word(line, position)
        words.append(word)
    return words


def begun(text: str, start: int) -> str:
    """How a word at fault begins, for an error message: without its value, which may be secret."""
    key, colon, _ = text[start : start + 40].partition(":")
    return f"{key}:..." if colon else key.split(" ")[0]


def join(words: Iterable[str]) -> str:
    """The line that is read as these words: a type or verb, then whole `key:value` words."""
    verb, *others = words
    return " ".join([verb, *map(_quote, others)])


def _quote(word: str) -> str:
    return word if _PLAIN_WORD.fullmatch(word) else f'"{word.translate(_ESCAPE_TABLE)}"'


# Replies


class Ack(NamedTuple):
    """The answer to a submit that is safe on disk."""

    #: 0 for a type that is answered and queues nothing.
    id: int
    message: str = ""
    #: An earlier submit with the same key had queued the job.
    duplicate: bool = False


class Batch(NamedTuple):
    """The answer to a submit_many for a batch, beside those to its members."""

    #: That of the follow-up.
    id: int
    #: An earlier request with the same key had made it, or closed it.
    duplicate: bool = False
    #: Whether members may still be added.
    open: bool = False
    #: How many jobs it has now.
    members: int = 0


class Reply(NamedTuple):
    """One reply, understood."""

    line: str
    #: One for a submit, more for a submit_many, none else.
    acks: tuple[Ack, ...] = ()
    #: What a verb answers.
    data: Any = None
    #: The code and text of a refusal; "" when all is well.
    code: str = ""
    message: str = ""
    #: Of a submit_many for a batch.
    batch: Batch | None = None


def ack(id: int, message: str = "", *, duplicate: bool = False, json: bool = False) -> bytes:
    if json:
        return encode({"ok": True, "id": id, "message": message, "duplicate": duplicate})
    message = "duplicate" if duplicate else message
    return _text_reply(f"ACK {id} {message}") if message else b"ACK %d\n" % id


def acks(submits: Iterable[Ack], batch: Batch | None = None) -> bytes:
    """The reply to a submit_many."""
    fields: dict[str, Any] = {"ok": True}
    if batch is not None:
        fields |= {"batch": batch.id, **batch._asdict()}
        del fields["id"]
    return encode({**fields, "jobs": [submit._asdict() for submit in submits]})


def err(code: str, text: str, *, json: bool = False) -> bytes:
    if json:
        return encode({"ok": False, "error": code, "message": text})
    return _text_reply(f"ERR {code} {text}")


def ok(data: Any, *, json: bool = False) -> bytes:
    return encode({"ok": True, "data": data}) if json else b"OK " + encode(data)


def encode(value: Any) -> bytes:
    """One line of JSON. Raises ValueError for NaN and infinities."""
    text = _UNSEEN.sub(lambda char: f"\\u{ord(char[0]):04x}", _ENCODER.encode(value))
    # A file's name in another encoding leaves halves of characters: \udc80 is JSON as well.
    return text.encode(errors="backslashreplace") + b"\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str) -> str:
    """The text with its line ends and control characters escaped."""
    return text if text.isprintable() else _UNSEEN.sub(lambda char: ascii(char[0])[1:-1], text)


def _text_reply(text: str) -> bytes:
    line = one_line(text).encode(errors="backslashreplace")
    if len(line) > LINE_LIMIT_BYTES:
        line = line[: LINE_LIMIT_BYTES - 3].decode(errors="ignore").encode() + b"..."
    return line + b"\n"


def read_reply(line: bytes) -> Reply:
    """Understand a reply line. Raises ValueError when it is none."""
    text = line.decode(errors="replace").rstrip("\r\n")
    try:
        return _read_json_reply(text) if text.startswith("{") else _read_text_reply(text)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"not a reply of upq: {text[:40]!r}") from None


def _read_text_reply(text: str) -> Reply:
    word, _, rest = text.partition(" ")
    first, _, message = rest.partition(" ")
    if word == "ACK":
        return Reply(text, (Ack(int(first), message, message == "duplicate"),))
    if word == "ERR":
        return Reply(text, code=first, message=message)
    if word == "OK":
        return Reply(text, data=json.loads(rest))
    raise ValueError(word)


def _read_json_reply(text: str) -> Reply:
    fields = json.loads(text)
    if not fields["ok"]:
        return Reply(text, code=fields["error"], message=fields["message"])
    if "data" in fields:
        return Reply(text, data=fields["data"])
    found = fields.get("jobs", [fields])
    acks = tuple(Ack(job["id"], job["message"], job["duplicate"]) for job in found)
    if "batch" not in fields:
        return Reply(text, acks)
    batch = Batch(fields["batch"], fields["duplicate"], fields["open"], fields["members"])
    return Reply(text, acks, batch=batch)
