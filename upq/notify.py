"""Which notifications an end calls for, as jobs of type `notify`; delivering is `jobs/notify.py`.

A target is a string: `mail:address[,address]`, `syslog`, `syslog:facility[.level]`,
`webhook:https://...`, or any URL of the notification library (apprise, the extra `notify`).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from logging.handlers import SysLogHandler
from typing import Any, NamedTuple

from upq import webhook
from upq.errors import BadParams
from upq.job import DONE, EXPIRED, FAILED, Job, NewJob, Outcome
from upq.secret import MASK, SECRET_NAME, mask, scrub, secret_texts

#: The job type that delivers, and that never notifies.
NOTIFY = "notify"
#: Holds the whole URL of a target that is shown shortened; a secret param of every notify job.
TARGET_URL = "target_url"
#: Bytes of captured output that a notification carries.
TAIL_BYTES = 4096
#: Characters of message, and of JSON of params and of result, that a notification carries.
TEXT_LIMIT = 1 << 16

ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+(@[A-Za-z0-9.-]+|@\[[A-Za-z0-9.:]+\])?")


class Mail(NamedTuple):
    recipients: tuple[str, ...]


class Syslog(NamedTuple):
    facility: str = "daemon"
    #: "" leaves it to the end: err for a bad one, info for a good one.
    level: str = ""


class Webhook(NamedTuple):
    url: str


class Service(NamedTuple):
    """Whatever the notification library makes of the URL."""

    url: str


Target = Mail | Syslog | Webhook | Service


def split_targets(text: str) -> list[str]:
    """The words of a list of targets. Blanks and commas divide, but a URL ends only at a blank."""
    words: list[str] = []
    for word in text.split():
        before, url = _URL_WORD.fullmatch(word).groups()  # type: ignore[union-attr]
        words += [*before.split(","), (url or "").rstrip(",")]
    return [word for word in words if word]


_URL_WORD = re.compile(r"(.*?)(?:(?<![^,])((?:webhook:)?[A-Za-z][A-Za-z0-9+.-]*://.*))?")


def shown_target(target: str) -> str:
    """A target as anyone may see it: of a URL only what cannot be a secret."""
    kind, colon, rest = target.partition("://")
    if not colon:
        return target
    if not kind.startswith("webhook:"):
        return f"{kind}://{MASK}"
    host = re.split("[/?]", rest, maxsplit=1)[0].rpartition("@")[2]
    return target if rest in (host, f"{host}/") else f"{kind}://{host}/{MASK}"


def parse_target(text: str) -> Target:
    """Read one target. Raises BadParams, which names what is wrong with it."""
    kind, _, rest = text.partition(":")
    if kind == "webhook":
        if why := webhook.fault(rest):
            raise BadParams(f"{shown_target(text)}: {why}")
        return Webhook(rest)
    if rest.startswith("//") and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://\S+", text):
        return Service(text)
    if kind == "mail":
        recipients = tuple(filter(None, rest.split(",")))
        for address in recipients:
            if not ADDRESS.fullmatch(address):
                raise BadParams(f"{text}: {address!r} is not a mail address")
        if not recipients:
            raise BadParams(f"{text}: no mail address, as in mail:me@example.org")
        return Mail(recipients)
    if kind == "syslog":
        facility, _, level = rest.partition(".")
        known(text, "facility", facility, SysLogHandler.facility_names)
        known(text, "level", level, SysLogHandler.priority_names)
        return Syslog(facility or "daemon", level)
    raise BadParams(
        f"{shown_target(text)}: neither mail:address[,address] nor syslog[:facility[.level]]"
        " nor webhook:https://... nor a URL of the notification library"
    )


def known(text: str, what: str, name: str, names: Iterable[str]) -> None:
    if name and name not in names:
        raise BadParams(f"{text}: no syslog {what} {name!r}, one of {', '.join(sorted(names))}")


def library() -> Any:
    """The notification library. What it logs has whole URLs in it: it stays out of our log.

    Raises ImportError.
    """
    module = importlib.import_module("apprise")
    own = logging.getLogger("apprise")
    own.propagate = False
    own.setLevel(logging.WARNING)
    if not own.handlers:
        own.addHandler(logging.NullHandler())  # else Python writes warnings to standard error
    return module


def service_fault(url: str, *, try_it: bool = True) -> str:
    """Why the notification library cannot tell this URL; "" when it can.

    Without `try_it` only whether the library is there, which does not load it.
    """
    if importlib.util.find_spec("apprise") is None:
        return f"{shown_target(url)}: needs the extra `notify`: pip install 'upq[notify]'"
    if try_it and library().Apprise.instantiate(url, suppress_exceptions=True) is None:
        return f"{shown_target(url)}: the notification library (apprise) cannot read this URL"
    return ""


def is_allowed(target: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern admits a target; of a mail each address needs one.

    `*` stands for any text without `/ @ ? # , \\`, but for anything by itself and after a last `/`.
    """
    parsed = parse_target(target)
    names = [f"mail:{a}" for a in parsed.recipients] if isinstance(parsed, Mail) else [target]
    known = [re.compile(_PATTERN_STAR.sub(_star, re.escape(one))) for one in patterns]
    return all(any(one.fullmatch(name) for one in known) for name in names)


_PATTERN_STAR = re.compile(r"\\\*")


def _star(found: re.Match[str]) -> str:
    text, (start, end) = found.string, found.span()
    whole = end == len(text) and (start == 0 or text[start - 1] == "/")
    return ".*" if whole else r"[^/@?#,\\]*"


def choose(
    state: str,
    success: Sequence[str],
    fail: Sequence[str],
    asked: Sequence[bool] = (),
    *,
    in_groups: bool = False,
) -> list[str]:
    """The targets of an attempt that ended in this state, each once.

    success, fail: the targets of the type. asked: what the job itself asked for: True for those of
    success, False for those of failure. A cancelled job tells nobody by itself: somebody asked.
    in_groups: failures are told by `health`.
    """
    wanted = [*asked]
    if state == DONE or (state in (FAILED, EXPIRED) and not in_groups):
        wanted.append(state == DONE)
    return list(dict.fromkeys(t for good in wanted for t in (success if good else fail)))


def follow(
    job: Job,
    outcome: Outcome,
    targets: Sequence[str],
    secret: frozenset[str] = frozenset(),
    *,
    ended_at: int | None = None,
    jobcfg: Mapping[str, str] | None = None,
) -> list[NewJob]:
    """One `notify` job per target, so that one dead server holds up only its own.

    secret: names of params that are masked. jobcfg: the type's section, for notify jobs of one's
    own; settings that sound secret are masked. A notify job calls for nothing.
    """
    if job.type == NOTIFY or not targets:
        return []
    return address(describe(job, outcome, secret, ended_at=ended_at, jobcfg=jobcfg), targets)


def address(told: Mapping[str, Any], targets: Iterable[str]) -> list[NewJob]:
    """The `notify` jobs that tell it, one per target."""
    found = []
    for target in dict.fromkeys(targets):
        shown = shown_target(target)
        url = {} if shown == target else {TARGET_URL: target}
        found.append(NewJob(NOTIFY, {"target": shown, **url, "job": told}))
    return found


def describe(
    job: Job,
    outcome: Outcome,
    secret: frozenset[str] = frozenset(),
    *,
    ended_at: int | None = None,
    jobcfg: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a notification says of a job, secrets masked."""
    data = job.data if outcome.data is None else outcome.data
    hidden = [*secret_texts((job.params, data), secret), *secret_settings(jobcfg or {})]
    output = outcome.output.text if outcome.output else ""
    return {
        "jobname": job.type,
        "jobid": job.id,
        "params": fitting(mask(job.params, secret, hidden)),
        "jobdata": fitting(mask(data, secret, hidden)),
        "jobcfg": mask(dict(jobcfg or {}), hidden_settings(jobcfg or {})),
        "msgstr": scrub(outcome.message, hidden)[:TEXT_LIMIT],
        "result": fitting(mask(outcome.result, secret, hidden)),
        "retries": job.attempt - 1,
        "state": outcome.state,
        "queue": job.queue,
        "submitter": job.submitter,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": ended_at,
        "output": tail(scrub(output, hidden)),
    }


def hidden_settings(jobcfg: Mapping[str, str]) -> frozenset[str]:
    """The names of a section's settings that are not told."""
    return frozenset(
        name for name, text in jobcfg.items()
        if SECRET_NAME.search(name) or (name.startswith("notify_") and "://" in text)
    )  # fmt: skip


def secret_settings(jobcfg: Mapping[str, str]) -> list[str]:
    """The values of a section that sound secret, the longest first."""
    return secret_texts((dict(jobcfg),), hidden_settings(jobcfg) - {"secret"})


def fitting(value: Any) -> Any:
    """The value, or a note in its place when it is too long for a notification."""
    size = len(json.dumps(value, default=str))
    return value if size <= TEXT_LIMIT else {"left_out": f"{size} characters"}


def tail(text: str) -> str:
    return text.encode("utf-8", "replace")[-TAIL_BYTES:].decode("utf-8", "ignore")
