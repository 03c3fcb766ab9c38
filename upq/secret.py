"""Values of secret params: masked by name wherever they stand, and in every text with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

#: Stands where a secret stood.
MASK = "***"
#: The name of a setting that says that its value is a secret.
SECRET_NAME = re.compile(r"passw|secret|token|credential|(^|_)key$", re.IGNORECASE)
#: Characters up to which a secret is left alone in a text: it would be in every other word.
SHORT = 3


def mask(value: Any, secret: frozenset[str], hidden: Sequence[str] = ()) -> Any:
    """The same value with *** for whatever a secret name holds, however deep, and for what texts
    hold of `hidden`.
    """
    if isinstance(value, str):
        return scrub(value, hidden) if hidden else value
    if not secret and not hidden:
        return value
    if isinstance(value, Mapping):
        return {
            scrub(k, hidden): MASK if k in secret else mask(v, secret, hidden)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask(v, secret, hidden) for v in value]
    return value


def secret_texts(datas: Iterable[Any], secret: frozenset[str]) -> list[str]:
    """What secret names hold, however deep, the longest first; as text, and as Python and JSON
    write that text. Nothing so short that it is in every text.
    """
    found: set[str] = set()
    if secret:
        for data in datas:
            for text in _held(data, secret):
                if len(text) > SHORT:
                    found |= {text, repr(text)[1:-1], json.dumps(text)[1:-1]}
    return sorted(found, key=len, reverse=True)


def _held(value: Any, secret: frozenset[str], inside: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _held(each, secret, inside or name in secret)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _held(each, secret, inside)
    elif inside and value is not None and not isinstance(value, bool):
        yield str(value)


def scrub(text: str, hidden: Iterable[str]) -> str:
    for secret_text in hidden:
        text = text.replace(secret_text, MASK)
    return text


def open_end(data: bytes, hidden: Iterable[bytes]) -> int:
    """How many bytes at the end may be the beginning of a secret that is not whole yet."""
    longest = 0
    for each in hidden:
        for n in range(min(len(each) - 1, len(data)), longest, -1):
            if data.endswith(each[:n]):
                longest = n
                break
    return longest
