"""Jobs as they are stored: rows read back, JSON and texts that every database takes, keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from upq.job import QUEUED, RUNNING, Job, encode
from upq.vault import NoKey, Vault

#: Characters of a progress text that are kept.
PROGRESS_CHARS = 1000
#: The reason of a job whose secrets were encrypted with a key that is missing.
LOCKED = "no key for its secrets"


_NO_KEYS = Vault()


def read_claimed(
    row: Sequence[Any], token: int, started_at: int | None = None, vault: Vault = _NO_KEYS
) -> Job:
    """A claimed job from a row of CLAIMED, as it is after the claim.

    One that cannot be decrypted has *** in its params, and in its options `locked` that says why.
    """
    (id, lane_id, type, queue, params_text, data_text, options_text, rank, run_at, attempt, starts,
     crashes, parent, root, submitter, created_at, cancel_asked) = row  # fmt: skip
    options = json.loads(options_text) if options_text else {}
    try:
        params = vault.decode(params_text)
        data = params if data_text is None else vault.decode(data_text)
    except NoKey as error:
        params = vault.decode(params_text, lenient=True)
        data = params if data_text is None else vault.decode(data_text, lenient=True)
        options["locked"] = str(error)
    return Job(id, lane_id, type, queue, RUNNING, "", params, data, options, rank, run_at,
               attempt + 1, starts + 1, crashes, token, bool(cancel_asked), parent, root,
               submitter, None, "", None, created_at, started_at, None)  # fmt: skip


def read_waiting(row: Sequence[Any], vault: Vault) -> Job:
    """A job that has not started, from a row of CLAIMED."""
    one = read_claimed(row, 0, vault=vault)
    return one._replace(state=QUEUED, attempt=one.attempt - 1, starts=one.starts - 1)


def crashes_of(one: Job) -> int:
    """Crashes after this one; a parent that only waited has not crashed anything."""
    return one.crashes + (0 if one.reason.startswith("waits for") else 1)


def progress_text(progress: dict[str, Any]) -> str:
    text = str(progress.get("text", ""))[:PROGRESS_CHARS]
    return encode({**progress, "text": text})


def clean(text: str) -> str:
    """The text as every database stores it: without NUL and halves of characters."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def canonical(params: dict[str, Any]) -> str:
    """Params as text that does not depend on their order."""
    return json.dumps(params, sort_keys=True)


def digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).hexdigest()


def child_key(parent: int, type: str, params: dict[str, Any], nth: int) -> str:
    """The name of a parent's n-th child of this type with these params: the same after a crash."""
    return digest("child", str(parent), type, canonical(params), str(nth))


def step_key(name: str, nth: int) -> str:
    """The name of the n-th step of this name in any job."""
    return digest("step", name, str(nth))
