"""Which notifications an end calls for, as jobs of type `notify`; delivering is `jobs/notify.py`.

A target is a string: `mail:address[,address]`, `syslog` or `syslog:facility[.level]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from logging.handlers import SysLogHandler
from typing import Any, NamedTuple

from upq.errors import BadParams
from upq.job import DONE, EXPIRED, FAILED, Job, NewJob, Outcome
from upq.secret import mask, scrub, secret_texts

#: The job type that delivers, and that never notifies.
NOTIFY = "notify"
#: Bytes of captured output that a notification carries.
TAIL_BYTES = 4096
#: Characters of message, and of JSON of params and of result, that a notification carries.
TEXT_LIMIT = 1 << 16

ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+(@[A-Za-z0-9.-]+|@\[[A-Za-z0-9.:]+\])?")
SECRET_SETTING = re.compile(r"passw|secret|token|credential|(^|_)key$", re.IGNORECASE)


class Mail(NamedTuple):
    recipients: tuple[str, ...]


class Syslog(NamedTuple):
    facility: str = "daemon"
    #: "" leaves it to the end: err for a bad one, info for a good one.
    level: str = ""


def parse_target(text: str) -> Mail | Syslog:
    """Read one target. Raises BadParams, which names what is wrong with it."""
    kind, _, rest = text.partition(":")
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
    raise BadParams(f"{text}: neither mail:address[,address] nor syslog[:facility[.level]]")


def known(text: str, what: str, name: str, names: Iterable[str]) -> None:
    if name and name not in names:
        raise BadParams(f"{text}: no syslog {what} {name!r}, one of {', '.join(sorted(names))}")


def choose(
    state: str, success: Sequence[str], fail: Sequence[str], asked: Sequence[bool] = ()
) -> list[str]:
    """The targets of an attempt that ended in this state, each once.

    success, fail: the targets of the type. asked: what the job itself asked for: True for those of
    success, False for those of failure. A cancelled job tells nobody by itself: somebody asked.
    """
    wanted = [*asked]
    if state in (DONE, FAILED, EXPIRED):
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
    data = job.data if outcome.data is None else outcome.data
    hidden = [*secret_texts((job.params, data), secret), *secret_settings(jobcfg or {})]
    output = outcome.output.text if outcome.output else ""
    told = {
        "jobname": job.type,
        "jobid": job.id,
        "jobdata": fitting(mask(data, secret, hidden)),
        "jobcfg": mask(dict(jobcfg or {}), frozenset(filter(SECRET_SETTING.search, jobcfg or {}))),
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
    return [NewJob(NOTIFY, {"target": target, "job": told}) for target in dict.fromkeys(targets)]


def secret_settings(jobcfg: Mapping[str, str]) -> list[str]:
    """The values of a section that sound secret, the longest first."""
    names = {name for name in jobcfg if SECRET_SETTING.search(name)} - {"secret"}
    return secret_texts((dict(jobcfg),), frozenset(names))


def fitting(value: Any) -> Any:
    """The value, or a note in its place when it is too long for a notification."""
    size = len(json.dumps(value, default=str))
    return value if size <= TEXT_LIMIT else {"left_out": f"{size} characters"}


def tail(text: str) -> str:
    return text.encode("utf-8", "replace")[-TAIL_BYTES:].decode("utf-8", "ignore")
