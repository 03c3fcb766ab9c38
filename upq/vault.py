"""Secrets at rest: values of secret params are encrypted in the database, each by itself.

The key file has one key a line: the first encrypts, all decrypt. A text of JSON with encrypted
values in it begins with `*`; each of them stands as `{"*": "<name of the key>:<token>"}`. Texts
that do not begin so, those of before there were keys too, are JSON as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from upq.errors import Unavailable
from upq.job import encode
from upq.secret import MASK, mask, secret_texts

#: The first character of a stored text that has encrypted values, and the name of each.
SEALED = "*"
HINT = "the package cryptography is missing: pip install 'upq[secrets]'"


class NoKey(Unavailable):
    """What is stored was encrypted with a key that is not in the key file."""


class Vault:
    """Encrypts and decrypts with the keys of a file. Any thread may ask.

    keys: as `read_keys` returns them; with none nothing is encrypted.
    secret: names of params whose values are encrypted, asked anew each time.
    """

    def __init__(
        self,
        keys: Sequence[str] = (),
        secret: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._secret = secret
        self.use(keys)

    def use(self, keys: Sequence[str]) -> None:
        """Take over what the file has now."""
        self._keys = {name_of(key): _fernet(key) for key in keys}
        self._first = name_of(keys[0]) if keys else ""

    def encode(self, value: Any, *datas: Any) -> str:
        """The text to be stored. `datas` are what else is known of the job: where a value repeats
        a secret of theirs, it is encrypted as well.
        """
        secret = self._secret() if self._first else frozenset()
        if not secret:
            return encode(value)
        hidden = secret_texts((value, *datas), secret)
        if not hidden and mask(value, secret) == value:
            return encode(value)
        return SEALED + encode(self._sealed(value, secret, hidden))

    def decode(self, text: str, *, lenient: bool = False) -> Any:
        """What was stored. Raises NoKey; `lenient` has *** for what cannot be read."""
        if not text.startswith(SEALED):
            return json.loads(text)
        return self._opened(json.loads(text[1:]), lenient)

    def merged(self, text: str, members: Mapping[str, str]) -> str:
        """The stored text of an object with more members, each a stored text.

        What is encrypted stays as it is: its key may be missing.
        """
        if not any(each.startswith(SEALED) for each in (text, *members.values())):
            return self.encode(
                {**json.loads(text), **{n: json.loads(t) for n, t in members.items()}}
            )
        more = {name: self._closed(each) for name, each in members.items()}
        return SEALED + encode({**self._closed(text), **more})

    def same(self, text: str, other: str) -> bool:
        """Whether two stored texts mean the same. Raises NoKey."""
        return text == other or bool(self.decode(text) == self.decode(other))

    def _sealed(self, value: Any, secret: frozenset[str], hidden: list[str]) -> Any:
        if isinstance(value, str):
            return self._seal(value) if any(text in value for text in hidden) else value
        if isinstance(value, list | tuple):
            return [self._sealed(each, secret, hidden) for each in value]
        if not isinstance(value, dict):
            return value
        # A name that is, or repeats, a secret takes the whole object along.
        if SEALED in value or any(text in str(name) for name in value for text in hidden):
            return self._seal(value)
        return {
            name: self._seal(each) if name in secret else self._sealed(each, secret, hidden)
            for name, each in value.items()
        }

    def _closed(self, text: str) -> Any:
        """What was stored, with what is encrypted as it is."""
        if text.startswith(SEALED):
            return json.loads(text[1:])
        value = json.loads(text)
        return self._sealed(value, self._secret(), []) if self._first else value

    def _seal(self, value: Any) -> dict[str, str]:
        name = self._first
        return {SEALED: f"{name}:{self._keys[name].encrypt(encode(value).encode()).decode()}"}

    def _opened(self, value: Any, lenient: bool) -> Any:
        if isinstance(value, list):
            return [self._opened(each, lenient) for each in value]
        if not isinstance(value, dict):
            return value
        if value.keys() != {SEALED}:
            return {name: self._opened(each, lenient) for name, each in value.items()}
        name, _, token = value[SEALED].partition(":")
        key = self._keys.get(name)
        if key is not None:
            return json.loads(key.decrypt(token.encode()))
        if lenient:
            return MASK
        raise NoKey(f"its secrets cannot be read: key {name} is not in [db] key_file")


def name_of(key: str) -> str:
    """What a key is called where it must not be shown."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _fernet(key: str) -> Any:
    try:
        from cryptography.fernet import Fernet  # noqa: PLC0415, an extra
    except ImportError:
        raise ValueError(HINT) from None
    return Fernet(key)


def read_keys(path: str) -> tuple[str, ...]:
    """The keys of a file, the one that encrypts first. Raises ValueError, which repeats no key."""
    try:
        mode = os.stat(path).st_mode
        lines = Path(path).read_text("ascii").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no file of keys") from None
    if mode & 0o027:
        raise ValueError(f"{path}: others can read or write it (chmod o=,g-w)")
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                _fernet(line.strip())
            except ValueError as error:
                why = error if str(error) == HINT else "is no key"
                raise ValueError(f"{path}:{number}: {why}") from None
            keys.append(line.strip())
    if not keys:
        raise ValueError(f"{path}: has no key (upq --new-key {path})")
    return tuple(keys)


def add_key(path: str) -> int:
    """Put a new key in front of those of a file, which is made when it is missing.

    Returns how many it has now. Raises ValueError; the file is whole at any instant.
    """
    try:
        from cryptography.fernet import Fernet  # noqa: PLC0415, an extra
    except ImportError:
        raise ValueError(HINT) from None
    file = Path(path)
    try:
        keys = read_keys(path) if file.exists() else ()
        old = file.stat() if keys else None
        part = file.with_name(f"{file.name}.part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as out:
            if old is not None:
                os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, old.st_mode & 0o777)
            out.writelines(f"{key}\n" for key in (Fernet.generate_key().decode(), *keys))
            out.flush()
            os.fsync(fd)
        os.replace(part, file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return len(keys) + 1
