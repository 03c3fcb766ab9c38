"""What a reload changes: two configurations compared, section by section, with secrets masked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upq.declaration import declared
from upq.secret import MASK, SECRET_NAME
from upq.settings import FIXED, SECTIONS, Settings

#: A password in a URL; all of a URL that tells people, since any part of it may be one.
_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]+(?=@)|(passw\w*=)[^&\s]*")
_TARGET = re.compile(r"(\w://)\S+")

Texts = Mapping[str, Mapping[str, str]]


def changes(old: Settings, new: Settings, code: Mapping[str, str] | None = None,
            new_code: Mapping[str, str] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Each difference: `what` (added, changed, removed), `section`, `setting`, `old`, `new`, and
    whether it needs a `restart`; all that as `text`. Files of jobs are told by their digests.
    """
    found = []
    for section in sorted({*old.texts, *new.texts}, key=_order):
        before, after = old.texts.get(section), new.texts.get(section)
        if section not in SECTIONS and (before is None or after is None):
            found.append(_change("removed" if after is None else "added", section))
            continue
        for key, was, is_ in _differing(before or {}, after or {}):
            texts = masked(section, key, was, old), masked(section, key, is_, new)
            restart = key in FIXED.get(section, ())
            found.append(_change("changed", section, key, *texts, restart=restart))
    for name, was, is_ in _differing(code or {}, new_code or {}):
        found.append(_change("added" if not was else "changed" if is_ else "removed", name))
    return found


def _order(section: str) -> tuple[bool, str]:
    return section not in SECTIONS, section


def _differing(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for key in sorted({*old, *new}):
        if old.get(key, "") != new.get(key, ""):
            yield key, old.get(key, ""), new.get(key, "")


def _change(
    what: str, section: str, key: str = "", old: str = "", new: str = "", *, restart: bool = False
) -> dict[str, Any]:
    head = section if section.endswith(".py") else f"[{section}]"
    text = f"{head} {what}"
    if key:
        later = " (needs a restart)" if restart else ""
        text = f"{head} {key}: {old or '(default)'} -> {new or '(default)'}{later}"
    return {
        "what": what, "section": section, "setting": key, "old": old, "new": new,
        "restart": restart, "text": text,
    }  # fmt: skip


def masked(section: str, key: str, text: str, settings: Settings) -> str:
    """The text of a setting as it may be shown; "" stays."""
    kind, _, name = section.partition(" ")
    each = declared(SECTIONS[section]).get(key) if section in SECTIONS else None
    if not text or (each is not None and not each.secret):
        return text
    if (each is not None and key != "url") or (kind == "job" and SECRET_NAME.search(key)):
        return MASK
    job = settings.jobs.get(name)
    if kind == "schedule" and name in settings.schedules:
        job = settings.jobs.get(settings.schedules[name].type)
    secret = job.secret if job else frozenset()
    if key in ("params", "line") and any(re.search(rf"\b{re.escape(s)}\b", text) for s in secret):
        return MASK
    if key == "env":
        return re.sub(r"=(\"[^\"]*\"|'[^']*'|\S+)", f"={MASK}", text)
    if key.startswith("notify"):
        return _TARGET.sub(rf"\1{MASK}", text)
    return _PASSWORD.sub(rf"\1\2{MASK}", text)


def code_of(jobs_dir: str) -> dict[str, str]:
    """The files of jobs with a digest of each."""
    found = {}
    for file in sorted(Path(jobs_dir).glob("*.py")):
        try:
            found[f"{Path(jobs_dir).name}/{file.name}"] = hashlib.sha256(
                file.read_bytes()
            ).hexdigest()
        except OSError:
            continue
    return found
