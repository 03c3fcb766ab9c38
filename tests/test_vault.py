"""Masks and keys: what is secret is found wherever it stands, and encrypted value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upq.secret import MASK, mask, open_end, scrub, secret_texts
from upq.vault import SEALED, NoKey, Vault, add_key, read_keys

PW = frozenset({"pw"})


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, ...]:
    for _ in range(2):
        add_key(str(tmp_path / "keys"))
    return read_keys(str(tmp_path / "keys"))


def vault(keys: tuple[str, ...], secret: frozenset[str] = PW) -> Vault:
    return Vault(keys, lambda: secret)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["pw", "a", SEALED, "b"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_what_is_stored_comes_back(value: Any) -> None:
    from cryptography.fernet import Fernet

    one = vault((Fernet.generate_key().decode(),))
    text = one.encode(value)
    assert one.decode(text) == value
    assert one.same(text, one.encode(value))


def test_only_what_is_secret_is_encrypted(keys: tuple[str, ...]) -> None:
    text = vault(keys).encode({"user": "me", "pw": "hunter2", "deep": [{"pw": 5}]})
    assert text.startswith(SEALED) and '"user":"me"' in text
    assert "hunter2" not in text
    stored = json.loads(text[1:])
    assert stored["pw"].keys() == stored["deep"][0]["pw"].keys() == {SEALED}
    assert vault(keys).encode({"user": "me"}) == '{"user":"me"}'


def test_a_value_that_repeats_a_secret_is_encrypted_too(keys: tuple[str, ...]) -> None:
    text = vault(keys).encode({"url": "http://hunter2@host", "hunter2": 1}, {"pw": "hunter2"})
    assert "hunter2" not in text
    assert vault(keys).decode(text) == {"url": "http://hunter2@host", "hunter2": 1}


def test_without_keys_nothing_changes() -> None:
    assert Vault((), lambda: PW).encode({"pw": "hunter2"}) == '{"pw":"hunter2"}'
    assert Vault().decode('{"pw":{"*":"x:y"}}') == {"pw": {"*": "x:y"}}


def test_all_keys_decrypt_and_the_first_encrypts(keys: tuple[str, ...]) -> None:
    new, old = keys
    before = vault((old,)).encode({"pw": "hunter2"})
    both = vault(keys)
    assert both.decode(before) == {"pw": "hunter2"}
    after = both.encode({"pw": "hunter2"})
    assert vault((new,)).decode(after) == {"pw": "hunter2"}
    assert both.same(before, after)
    with pytest.raises(NoKey, match=r"key [0-9a-f]{8} is not in \[db\] key_file"):
        vault((new,)).decode(before)
    assert vault((new,)).decode(before, lenient=True) == {"pw": MASK}


def test_secrets_are_found_in_texts_however_they_are_written() -> None:
    word = 'a"b\\c\nd'
    hidden = secret_texts([{"x": [{"pw": [word, 123456, True, None]}]}], PW)
    for text in (word, repr(word), json.dumps(word), "n=123456"):
        assert word not in scrub(text, hidden) and MASK in scrub(text, hidden)
    assert secret_texts([{"pw": "abc"}], PW) == [], "in every other text"
    masked = mask({"pw": 1, "t": f"x {word}", word: 0}, PW, hidden)
    assert masked == {"pw": MASK, "t": f"x {MASK}", MASK: 0}


@given(st.binary(max_size=6), st.lists(st.binary(min_size=1, max_size=5), max_size=3))
def test_the_open_end_is_the_longest_beginning(data: bytes, hidden: list[bytes]) -> None:
    ends = [n for one in hidden for n in range(1, len(one)) if data.endswith(one[:n])]
    assert open_end(data, hidden) == max([n for n in ends if n <= len(data)], default=0)
