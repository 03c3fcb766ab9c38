"""The kinds of values in `upq.cfg`: what each is called, and how its text is read.

Readers raise ValueError with a sentence about the text.
"""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from upq import log, webhook, when, workflow
from upq.errors import BadParams
from upq.gates import Free, Load, Window
from upq.job import PRIORITIES
from upq.notify import parse_target, split_targets
from upq.params import (
    BOOLEANS,
    ParamSpec,
    filled,
    names_in,
    queue_name,
    queue_template,
    refuse_lone_braces,
    shown,
    split_command,
    suggest,
)
from upq.rates import Rate

T = TypeVar("T")

NOT_YET = "not yet available in this version"

_TARGETS = ("mail", "syslog", "webhook", "retry", "retrywait")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """How the text of a setting is read, and what an empty default stands for."""

    name: str
    read: Callable[[str], T]
    empty: T
    unit: str = ""


class Unique(NamedTuple):
    """Which parameters make a job unique, and for how long."""

    #: None for all of them.
    names: tuple[str, ...] | None = None
    #: Until it starts, and not until it has ended.
    until_start: bool = False
    #: At the least so long after the submit.
    for_s: float = 0.0


class Address(NamedTuple):
    host: str
    port: int


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has to be one line")
    return text


def _yes_no(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError(f"{shown(text)} is not yes or no")
    return BOOLEANS[text.lower()]


def number(low: int, high: int = 10**9, too_low: str = "") -> Kind[int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError(f"{shown(text)} is not a whole number")
        if not low <= int(text) <= high:
            low_text = too_low if int(text) < low else ""
            raise ValueError(low_text or f"{text} is not between {low} and {high}")
        return int(text)

    return Kind("whole number", read, low)


def one_of(*words: str) -> Kind[str]:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"{shown(text)} is none of {', '.join(words)}{suggest(text, words)}")
        return text.lower()

    return Kind(" | ".join(words), read, words[0])


def _above_zero(text: str) -> float:
    if not (seconds := when.duration(text)):
        raise ValueError("has to be above 0")
    return seconds


def _mode(text: str) -> int:
    if not re.fullmatch(r"(0o?)?[0-7]{1,3}", text):
        raise ValueError(f"{shown(text)} is not an octal mode such as 660")
    return int(text, 8)


def _factor(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not 1 <= float(text) <= 10:
        raise ValueError(f"{shown(text)} is not a number from 1 to 10")
    return float(text)


def _log_format(text: str) -> str:
    if fault := log.check_format(text):
        raise ValueError(fault)
    return text


def _account(what: str, look_up: Callable[[str], int]) -> Kind[int | None]:
    def read(text: str) -> int:
        try:
            return int(text) if text.isdecimal() else look_up(text)
        except KeyError:
            raise ValueError(f"no {what} {shown(text)} on this machine") from None

    return Kind(f"{what} name or number", read, None)


def _priority(text: str) -> int:
    if text not in PRIORITIES and not re.fullmatch(r"[+-]?[0-9]{1,6}", text):
        raise ValueError(f"{shown(text)} is not {', '.join(PRIORITIES)} or a whole number")
    return PRIORITIES[text] if text in PRIORITIES else int(text)


def _address(text: str, port: int | None = None) -> Address:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:]+)\]|([^\s:/\[\]]+))(?::([0-9]{1,5}))?", text)
    if not match or not (match[3] or port) or int(match[3] or 0) > 65535:
        raise ValueError(f"{shown(text)} is not host:port")
    return Address(match[1] or match[2], int(match[3] or port or 0))


def _loopback(text: str) -> Address:
    address = _address(text)
    try:
        here = address.host == "localhost" or ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        here = False
    if not here:
        raise ValueError(
            f"{shown(text)} is not on this machine (127.0.0.1, ::1, localhost);"
            f" other addresses need TLS and tokens: {NOT_YET}"
        )
    return address


def _list(text: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[\s,]+", text)))


def _principals(text: str) -> tuple[str, ...]:
    for name in _list(text):
        if not re.fullmatch(r"\*|@?[A-Za-z0-9_][A-Za-z0-9_.-]*\$?", name):
            raise ValueError(f"{shown(name)} is not a user, @group or *")
    return _list(text)


def _target_patterns(text: str) -> tuple[str, ...]:
    for word in split_targets(text):
        if word != "*" and not re.match(
            r"(mail|syslog|webhook)\b|[A-Za-z][A-Za-z0-9+.-]*://", word
        ):
            raise ValueError(f"{shown(word)} is no pattern of targets{suggest(word, _TARGETS[:3])}")
    return tuple(split_targets(text))


def _networks(text: str) -> tuple[webhook.Network, ...]:
    try:
        return webhook.networks(text)
    except ValueError as error:
        raise ValueError(f"{error}; networks are 10.0.0.0/8 or fd00::/8") from None


def _exit_codes(text: str) -> tuple[int, ...]:
    return tuple(number(0, 255).read(code) for code in _list(text))


def _environment(text: str) -> dict[str, str | None]:
    """NAME alone is None: passed on."""
    pairs = [word.partition("=") for word in shlex.split(text)]
    for name, equals, value in pairs:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{shown(name + equals + value)} is not NAME or NAME=value")
        if name.startswith("UPQ_JOB_"):
            raise ValueError(f"{name} is set by upq itself")
        refuse_lone_braces(value)
    return {name: value if equals else None for name, equals, value in pairs}


def _template(text: str) -> str:
    refuse_lone_braces(text)
    return text


def _io_class(text: str) -> str:
    if not re.fullmatch(r"idle|best-effort(:[0-7])?", text):
        raise ValueError(
            f"{shown(text)} is not idle, best-effort or best-effort:0 to best-effort:7"
        )
    return text


def none_or(low: int, high: int) -> Kind[int]:
    """A number; 0 for none."""

    def read(text: str) -> int:
        return number(low, high).read(text) if text != "0" else 0

    return Kind("whole number", read, 0)


def at_least(low: str) -> Kind[int]:
    """A size that is not below this one; 0 for no limit."""

    def read(text: str) -> int:
        if 0 < (bytes_ := when.size(text)) < when.size(low):
            raise ValueError(f"{shown(text)} can never be met: less than {low}")
        return bytes_

    return Kind("size", read, 0, "bytes")


def _cpu_time(text: str) -> float:
    if 0 < (seconds := when.duration(text)) < 1:
        raise ValueError(f"{shown(text)} can never be met: less than 1s")
    return seconds


def _processors(text: str) -> float:
    """`50%` of one processor, `200%` for two; 0 for no limit."""
    if text == "0":
        return 0.0
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?%", text):
        raise ValueError(f"{shown(text)} is not a share of one processor: 50%, or 200% for two")
    if float(text[:-1]) < 1:
        raise ValueError(f"{shown(text)} can never be met: less than 1%")
    return float(text[:-1]) / 100


def _node_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError(f"{shown(text)} is not a name of letters, digits, '.', '_' and '-'")
    return text


_DRIVERS = {
    "sqlite": "sqlite",
    **dict.fromkeys(("mysql", "mariadb", "mysql+pymysql", "mariadb+pymysql"), "mysql+pymysql"),
    **dict.fromkeys(("postgresql", "postgres", "postgresql+psycopg"), "postgresql+psycopg"),
}


def _database(text: str) -> str:
    """The URL with its full driver name. What is refused is not repeated: it may be a password."""
    scheme, colon, rest = text.partition("://")
    if not colon:
        raise ValueError("begins with none of sqlite:///, mysql://, postgresql://")
    if scheme not in _DRIVERS:
        raise ValueError(f"no database {shown(scheme)}{suggest(scheme, _DRIVERS)}")
    if scheme == "sqlite" and (len(rest) < 2 or rest[0] != "/" or rest.startswith("/:memory:")):
        raise ValueError("SQLite needs a file: sqlite:///var/upq.db")
    return f"{_DRIVERS[scheme]}://{rest}"


def _targets(text: str) -> tuple[str, ...]:
    """Targets as `notify.parse_target` reads them, and `retry:3` or `retrywait:3|1h` as they are.

    The older spellings `mail a@x b@y` and `syslog daemon.err` become `mail:a@x,b@y` and so on.
    """
    found: list[str] = []
    for word in split_targets(text):
        kind = word.partition(":")[0]
        last = found[-1] if found else ""
        if kind in _TARGETS or "://" in word:
            found.append(word)
        elif last.startswith("mail") and ("@" in word or last == "mail"):
            found[-1] = f"{last}{',' if ':' in last else ':'}{word}".replace(":,", ":")
        elif last == "syslog":
            found[-1] = f"syslog:{word}"
        else:
            # What stands behind a slash may be a secret.
            text = shown(word) if "/" not in word else f"{shown(kind)}..."
            raise ValueError(f"{text} is no target{suggest(kind, _TARGETS)}")
    for target in found:
        _check_target(target)
    return tuple(found)


def _check_target(target: str) -> None:
    if not target.startswith("retry"):
        try:
            parse_target(target)
        except BadParams as error:
            raise ValueError(str(error)) from None
    elif match := re.fullmatch(r"retry:[0-9]{1,4}|retrywait:[0-9]{1,4}\|(.+)", target):
        when.duration(match[1] or "0")
    else:
        raise ValueError(f"{shown(target)} is not retry:3 or retrywait:3|1h")


class Pattern(NamedTuple):
    """Queues by their names, `*` for any characters, and their share where they go by shares."""

    text: str
    weight: int = 0

    def matches(self, queue: str) -> bool:
        return re.fullmatch(re.escape(self.text).replace(r"\*", ".*"), queue) is not None


def _patterns(text: str) -> tuple[Pattern, ...]:
    found = []
    for word in _list(text):
        name, colon, weight = word.partition(":")
        queue_name(name.replace("*", "x"))
        found.append(Pattern(name, number(1, 1000).read(weight) if colon else 0))
    if len({pattern.text for pattern in found}) < len(found):
        raise ValueError("names the same queues twice")
    if len({pattern.weight > 0 for pattern in found}) > 1:
        raise ValueError("some have a weight and some have not: a:6 b:3")
    return tuple(found)


def _delay(text: str) -> str:
    refuse_lone_braces(_one_line(text))
    when.duration(filled(text, dict.fromkeys(names_in(text), "1")) or "")
    return text


def _amounts(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in _list(text):
        name, colon, n = word.partition(":")
        if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
            raise ValueError(f"{shown(word)} is not a token such as disk_io:1")
        if name in found:
            raise ValueError(f"{name} stands there twice")
        found[name] = number(1).read(n) if colon else 1
    return found


def _rate(text: str) -> Rate:
    rate = Rate.parse(_one_line(text))
    refuse_lone_braces(rate.per)
    if rate.per and not names_in(rate.per):
        raise ValueError(f"per {shown(rate.per)} names no parameter: 10/min per {{host}}")
    return rate


def _load(text: str) -> Load:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not float(text):
        raise ValueError(f"{shown(text)} is not a load above 0, such as 4 or 1.5")
    return Load(float(text))


def _unique(text: str) -> Unique:
    """`params`, `fid,path`, each with `while queued`, `while unfinished` or `for 1h` after it."""
    match = re.fullmatch(r"(.*?)(?:(?:^|\s+)(while|for)(?:\s+(.*))?)?", _one_line(text))
    names, mode, rest = match.groups() if match else (text, None, None)
    named = _list(names)
    for name in named:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            raise ValueError(f"{shown(name)} is no parameter")
    if not named or ("params" in named and len(named) > 1):
        raise ValueError("names parameters, or `params` for all: fid,path while queued")
    chosen = None if named == ("params",) else tuple(sorted(set(named)))
    if mode == "for":
        return Unique(chosen, for_s=_above_zero(rest or ""))
    if mode == "while" and rest not in ("queued", "unfinished"):
        raise ValueError(f"while {rest or ''}: is neither while queued nor while unfinished")
    return Unique(chosen, until_start=rest == "queued")


TEXT = Kind("text", _one_line, "")
YES_NO = Kind("yes or no", _yes_no, False)
PATH = Kind("path", _one_line, "")
MODE = Kind("octal mode", _mode, 0)
DURATION = Kind("duration", when.duration, 0.0, "s")
KEPT: Kind[float | None] = Kind("duration", when.duration, None, "s")
CRON = Kind("cron expression", _one_line, "")
TIMES: Kind[when.Times | None] = Kind("cron expression", when.Times.read, None)
TIME_LIMIT = Kind("duration", _above_zero, 0.0, "s")
SIZE = Kind("size", when.size, 0, "bytes")
FACTOR = Kind("number", _factor, 1.0)
LOG_FORMAT = Kind("log format", _log_format, "")
USER = _account("user", lambda name: pwd.getpwnam(name).pw_uid)
GROUP = _account("group", lambda name: grp.getgrnam(name).gr_gid)
DATABASE = Kind("URL", _database, "")
LOOPBACK: Kind[Address | None] = Kind("host:port", _loopback, None)
MAIL_SERVER = Kind("host:port", lambda text: _address(text, 25), Address("localhost", 25))
PRINCIPALS: Kind[tuple[str, ...]] = Kind("users and @groups", _principals, ())
ALLOWED: Kind[tuple[str, ...] | None] = Kind("users and @groups", _principals, None)
NODE_NAME = Kind("name", _node_name, os.uname().nodename)
PRIORITY = Kind("name or whole number", _priority, 0)
TARGETS: Kind[tuple[str, ...]] = Kind("targets", _targets, ())
TARGET_PATTERNS: Kind[tuple[str, ...]] = Kind("patterns of targets", _target_patterns, ())
NETWORKS: Kind[tuple[webhook.Network, ...]] = Kind("networks", _networks, ())
NAMES: Kind[tuple[str, ...]] = Kind("names", _list, ())
NAME_SET: Kind[frozenset[str]] = Kind("names", lambda text: frozenset(_list(text)), frozenset())
PARAMS: Kind[ParamSpec | None] = Kind("parameters", ParamSpec.parse, None)
UNIQUE: Kind[Unique | None] = Kind("parameters", _unique, None)
CHAIN: Kind[tuple[str | tuple[str, ...], ...]] = Kind("chain", workflow.parse, ())
DELAY = Kind("duration", _delay, "")
KEY = Kind("text with {parameters}", lambda text: _template(_one_line(text)), "")
COMMAND: Kind[tuple[str, ...] | None] = Kind("command line", split_command, None)
EXIT_CODES: Kind[tuple[int, ...]] = Kind("whole numbers", _exit_codes, ())
QUEUE = Kind("queue", queue_template, "")
PATTERNS: Kind[tuple[Pattern, ...]] = Kind("queues", _patterns, ())
NAMES_HERE: Kind[tuple[str, ...] | None] = Kind("names", _list, None)
RATE: Kind[Rate | None] = Kind("rate", _rate, None)
AMOUNTS: Kind[dict[str, int]] = Kind("token:number ...", _amounts, {})
WINDOW: Kind[Window | None] = Kind("times", Window.parse, None)
LOAD: Kind[Load | None] = Kind("number", _load, None)
MIN_FREE: Kind[tuple[Free, ...]] = Kind(
    "folder size, ...", lambda text: tuple(map(Free.parse, text.split(","))), ()
)
ENVIRONMENT: Kind[dict[str, str | None]] = Kind("NAME, NAME=value", _environment, {})
TEMPLATE = Kind("text", _template, "")
FOLDER = Kind("path", lambda text: _template(_one_line(text)), "")
IO_CLASS = Kind("idle | best-effort:0-7", _io_class, "")
DESCRIPTOR = none_or(3, 9)
OPEN_FILES = none_or(8, 10**6)
CPU_TIME = Kind("duration", _cpu_time, 0.0, "s")
PROCESSORS = Kind("percent", _processors, 0.0)
CONCURRENT = number(
    1, 10000, "at least 1: every job goes through its queue; `upq-cli --wait` waits for its end"
)
