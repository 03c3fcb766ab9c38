"""`upq.cfg` to frozen settings; every fault is found in one pass and told with file and line.

Each setting is declared once, as a field with its kind, its default in the spelling of the ini file
and its meaning. Parser, checks, `describe()` and the reference page (`python -m upq.config`) come
from there. Nothing is created or opened for the daemon here.
"""

# ruff: noqa: RUF009 - `setting` makes a dataclass field

from __future__ import annotations

import graphlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from upq import webhook as webhooks
from upq import when
from upq.access import unknown_principals
from upq.errors import ConfigError
from upq.ini import Ini, Item, Place
from upq.kinds import (
    ALLOWED,
    COMMAND,
    CONCURRENT,
    DATABASE,
    DURATION,
    ENVIRONMENT,
    EXIT_CODES,
    FACTOR,
    GROUP,
    LOG_FORMAT,
    LOOPBACK,
    MAIL_SERVER,
    MODE,
    NAME_SET,
    NAMES,
    NETWORKS,
    NODE_NAME,
    NOT_YET,
    PARAMS,
    PATH,
    PATTERNS,
    PRINCIPALS,
    PRIORITY,
    SIZE,
    TARGETS,
    TEXT,
    TIME_LIMIT,
    USER,
    YES_NO,
    Address,
    Kind,
    number,
    one_of,
)
from upq.notify import NOTIFY, Service, parse_target, service_fault, shown_target
from upq.notify import Webhook as Hook
from upq.params import Param, ParamSpec, placeholders, shown, suggest
from upq.protocol import VERBS

T = TypeVar("T")


# The declarations


class Setting(NamedTuple):
    """One declaration, as parser and reference see it."""

    name: str
    key: str
    kind: Kind[Any]
    #: In the spelling of the ini file.
    default: str
    meaning: str
    #: `<key>_file` may name a file that holds the value.
    secret: bool


def setting(kind: Kind[T], default: str, meaning: str, key: str = "", secret: bool = False) -> T:
    """Declare a setting. Its key is the field's name without the unit, unless one is given."""
    value = kind.read(default) if default else kind.empty
    declaration = Setting("", key, kind, default, meaning, secret)
    made: Any = field(
        default_factory=lambda: value, repr=not secret, metadata={"setting": declaration}
    )
    return made  # type: ignore[no-any-return]


def declared(section: Any) -> dict[str, Setting]:
    """The settings of a section's class by key."""
    found = {}
    for each in fields(section):
        if each.metadata:
            key = each.metadata["setting"].key or _key(each.name)
            found[key] = each.metadata["setting"]._replace(name=each.name, key=key)
    return found


def _key(name: str) -> str:
    return name.removesuffix("_s").removesuffix("_bytes")


@dataclass(frozen=True, slots=True)
class Daemon:
    """The process."""

    detach_process: bool = setting(YES_NO, "no", "Go to the background.")
    pidfile: str = setting(PATH, "", "Holds the process id while the daemon runs; empty: none.")
    umask: int = setting(MODE, "027", "Mode bits that new files do not get.")
    uid: int | None = setting(USER, "", "Run as this user; empty: the one that starts it.")
    gid: int | None = setting(GROUP, "", "Run as this group; empty: the one that starts it.")
    chroot_directory: str = setting(PATH, "", "Lock the daemon into this folder; empty: no.")
    grace_s: float = setting(DURATION, "20s", "Running jobs have this long to end at a stop.")


@dataclass(frozen=True, slots=True)
class Logging:
    """The log; each line carries the id of the job it is about."""

    loglevel: str = setting(
        one_of("debug", "info", "warning", "error", "critical"), "info", "The least to be logged."
    )
    logformat: str = setting(
        LOG_FORMAT, "", "`json`, or a format of Python's logging, `%(message)s`; empty: upq's own."
    )
    logfile: str = setting(PATH, "", "Empty: standard error, which is the journal under systemd.")


@dataclass(frozen=True, slots=True)
class Paths:
    """Files and folders, made when missing. Other names are for jobs, which get them absolute."""

    socket: str = setting(PATH, "", "The UNIX socket; empty: `upq.sock` in `state_dir`.")
    socket_chmod: int = setting(MODE, "660", "Who may connect to the socket.")
    jobs_dir: str = setting(PATH, "jobs", "`[job name]` is the class `Name` in `name.py` here.")
    state_dir: str = setting(PATH, "var", "What upq keeps: locks and the SQLite file.")
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Db:
    """The database. SQLite serves one daemon, MariaDB/MySQL and PostgreSQL any number."""

    url: str = setting(
        DATABASE,
        "",
        "`sqlite:///FILE`, `mysql://USER:PASSWORD@HOST/NAME` or `postgresql://...`;"
        " empty: `upq.db` in `state_dir`.",
        secret=True,
    )
    debug: bool = setting(
        YES_NO, "no", "Log every statement of SQL, whatever `loglevel` says; not the values in it."
    )
    durability: str = setting(
        one_of("full", "relaxed"),
        "full",
        "`full`: an ACK is on disk, and a server that does not promise that is refused;"
        " `relaxed`: it may be lost when the machine dies.",
    )
    keep_done_s: float = setting(DURATION, "14d", "How long jobs that are done stay visible.")
    keep_failed_s: float = setting(
        DURATION, "90d", "The same for jobs that failed, were cancelled or expired."
    )


@dataclass(frozen=True, slots=True)
class Listen:
    """The doors and their limits."""

    tcp: Address | None = setting(
        LOOPBACK, "", "Also listen on TCP, on an address of this machine only; empty: no TCP."
    )
    max_connections: int = setting(number(1), "256", "Connections at a time, on each door.")
    max_per_peer: int = setting(number(1), "64", "Of these, from one user or address.")
    max_queue: int = setting(
        number(0), "0", "`ERR busy` when this many jobs are not finished; 0: no limit."
    )
    idle_s: float = setting(TIME_LIMIT, "5m", "Close a connection on which nothing is asked.")
    line_s: float = setting(TIME_LIMIT, "10s", "Time a started line has to come to its end.")
    write_s: float = setting(TIME_LIMIT, "10s", "Time a client has to take a reply.")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what: `*` everyone, `alice` and `@staff` only on the UNIX socket."""

    read: tuple[str, ...] = setting(PRINCIPALS, "*", "Ask about jobs; one's own need no right.")
    submit: tuple[str, ...] = setting(PRINCIPALS, "*", "Queue jobs, cancel and retry one's own.")
    admin: tuple[str, ...] = setting(
        PRINCIPALS, "", "All else; root and the daemon's own user always may."
    )
    notify: tuple[str, ...] = setting(
        PATTERNS,
        "",
        "Targets that a submit may name with `@notify:`: `mail:*@example.org syslog`. `*` stands"
        " for any text without `/ @ ? # ,`, after a last `/` for anything; empty: none.",
    )


@dataclass(frozen=True, slots=True)
class Mail:
    """The mail server for notifications."""

    server: Address = setting(MAIL_SERVER, "localhost:25", "SMTP server.")
    sender: str = setting(
        TEXT, "", "Sender; empty: `from` of `[job notify]`, or upq at this host.", key="from"
    )
    tls: str = setting(one_of("none", "starttls", "tls"), "none", "How to encrypt.")
    user: str = setting(TEXT, "", "Log in as this user; empty: no login.")
    password: str = setting(TEXT, "", "The password of `user`.", secret=True)
    timeout_s: float = setting(TIME_LIMIT, "10s", "For each step of a delivery.")


@dataclass(frozen=True, slots=True)
class Webhook:
    """How `webhook:https://...` targets are told: a POST of JSON."""

    secret: str = setting(
        TEXT, "", "Key of the header `X-Upq-Signature`; empty: no such header.", secret=True
    )
    allow: tuple[webhooks.Network, ...] = setting(
        NETWORKS,
        "",
        "Networks of one's own that may be told: `10.0.0.0/8 127.0.0.1`; empty: none.",
    )
    timeout_s: float = setting(TIME_LIMIT, "10s", "For a delivery as a whole.")


@dataclass(frozen=True, slots=True)
class Node:
    """This daemon among others on the same database."""

    name: str = setting(NODE_NAME, "", "Unlike all other nodes' names; empty: the host name.")


@dataclass(frozen=True, slots=True)
class JobSettings:
    """A job type: a class in `jobs_dir`, or a `command`. The whole section, other names too, is
    `self.jobcfg` of the job. `<type>` is a-z, 0-9 and _; verbs such as `status` are taken.
    """

    name: str
    file: str = ""
    line: int = 0
    enabled: bool = setting(YES_NO, "yes", "No: its jobs are refused, and those queued wait.")
    concurrent: int = setting(CONCURRENT, "1", "Jobs of this type at a time, each in its thread.")
    notify_fail: tuple[str, ...] = setting(
        TARGETS,
        "",
        "Whom to tell when a job has failed: `syslog`, `syslog:daemon.err`, `mail:a@x.org,b@x.org`,"
        " `webhook:https://...`, any URL of apprise (extra `notify`), several at will, with blanks"
        " between. `retry:3` and `retrywait:3|1h` mean `retries` and `retry_delay`.",
        secret=True,
    )
    notify_success: tuple[str, ...] = setting(
        TARGETS, "", "Whom to tell when a job is done.", secret=True
    )
    notify_after: int = setting(
        number(1), "1", "Tell `notify_fail` only from so many failures in a row on."
    )
    notify_every_s: float = setting(
        DURATION,
        "0",
        "While jobs go on failing, tell at most so often, with a digest; 0: each. With this or"
        " `notify_after` it is also told when the type works again.",
    )
    alert_queue_age_s: float = setting(
        DURATION,
        "0",
        "Tell `notify_fail` when a job that could start waits for longer, and when that is over;"
        " 0: no.",
    )
    alert_no_success_s: float = setting(
        DURATION, "0", "The same when no job was done for so long, or ever; 0: no."
    )
    subjobs: tuple[str, ...] = setting(
        NAMES, "", "Job types that follow one after another on success, with the same parameters."
    )
    timeout_s: float = setting(DURATION, "0", "A command that runs longer fails; 0: no limit.")
    retries: int = setting(number(0, 9999), "0", "Further attempts after a failure.")
    retry_delay_s: float = setting(DURATION, "10s", "Wait before the first further attempt.")
    retry_backoff: float = setting(FACTOR, "2", "Each wait is so many times the one before.")
    retry_max_s: float = setting(DURATION, "1h", "The longest wait, unless retry_delay is longer.")
    secret: frozenset[str] = setting(NAME_SET, "", "Parameters that are never shown.")
    params: ParamSpec | None = setting(
        PARAMS,
        "",
        "Checked before the ACK: `fid:int path:path? level:choice(a,b)=a`. Types: `str` `int`"
        " `float` `bool` `path` (absolute) `choice(...)` `json` `any`; `?` optional, `=` default."
        " Empty: anything goes; for a command, the text of each {placeholder}.",
    )
    command: tuple[str, ...] | None = setting(
        COMMAND,
        "",
        "Run this program instead of a class: `sha256sum {path}`. Never a shell; each {placeholder}"
        " stays one argument and cannot be an option unless `--` stands before it; a word whose"
        " parameter is not given is left out.",
    )
    success_codes: tuple[int, ...] = setting(EXIT_CODES, "0", "Exit codes of a command done well.")
    env: dict[str, str] = setting(ENVIRONMENT, "", "Environment of the command.")
    cwd: str = setting(PATH, "", "Folder the command runs in; empty: the daemon's.")
    priority: int = setting(PRIORITY, "default", "high (10), default (0), low (-10) or a number.")
    submit: tuple[str, ...] | None = setting(
        ALLOWED, "", "Who may submit it on the UNIX socket; empty: as in `[access]`."
    )
    output_limit_bytes: int = setting(SIZE, "1M", "Output kept of an attempt, head and tail.")
    #: Every key of the section as text: `self.jobcfg` of its jobs.
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    #: Neither a file in jobs_dir nor a command: the type cannot run.
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration."""

    #: Absolute, as are `files`: the file and what it includes.
    file: str
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    daemon: Daemon = Daemon()
    logging: Logging = Logging()
    paths: Paths = Paths()
    db: Db = Db()
    listen: Listen = Listen()
    access: Access = Access()
    mail: Mail = Mail()
    webhook: Webhook = Webhook()
    node: Node = Node()
    jobs: dict[str, JobSettings] = field(default_factory=dict)


SECTIONS: dict[str, Any] = {
    "daemon": Daemon,
    "logging": Logging,
    "paths": Paths,
    "db": Db,
    "listen": Listen,
    "access": Access,
    "mail": Mail,
    "webhook": Webhook,
    "node": Node,
}

#: What later versions bring: refused clearly rather than ignored. "" holds sections.
LATER = {
    "": ("http", "pool", "schedule", "autoscale", "tokens"),
    "daemon": ("max_abandoned",),
    "listen": ("tls", "tokens"),
    "node": ("pools",),
    "job": (
        *("on_fail", "queue", "rate", "unique", "schedule", "executor"),
        *("nice", "memory_limit", "keep", "serial"),
    ),
}

#: Bytes that the kernel allows the path of a UNIX socket.
SOCKET_LIMIT_BYTES = 107


# The checks

S = TypeVar("S")


def _fill(cls: type[S], section: str, ini: Ini, /, **more: Any) -> S:
    """An object of a section's class from its items; what cannot be read keeps its default."""
    values = more
    items = dict(ini.sections[section].items)
    for key, each in declared(cls).items():
        item = items.pop(key, None)
        pointer = items.pop(f"{key}_file", None) if each.secret else None
        if pointer and item:
            ini.fault(pointer.place, f"{key}_file: {key} is given, too")
        elif pointer:
            item = _from_file(pointer, key, ini)
        try:
            text = item.text if item and item.text else each.default
            value = each.kind.read(text) if text else each.kind.empty
            values[each.name] = _absolute(ini.folder, value) if each.kind is PATH else value
        except ValueError as error:
            assert item  # a default can be read: its declaration did
            ini.fault(item.place, f"{key}: {error}{_slip(item.text)}")
    for key, item in items.items():
        _judge_other(key, item.place, section, list(declared(cls)), ini)
    return cls(**values)


def _absolute(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, path)) if path else ""


def _slip(text: str) -> str:
    if "\n" in text:
        return " (an indented line goes on with the one above)"
    return " (a comment needs a line of its own)" if re.search(r"\s[#;]", text) else ""


def _from_file(pointer: Item, key: str, ini: Ini) -> Item | None:
    try:
        return Item(Path(ini.folder, pointer.text).read_text("utf-8").strip(), pointer.place)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        ini.fault(pointer.place, f"{key}_file: {pointer.text}: {why}")
        return None


def _judge_other(key: str, place: Place, section: str, known: list[str], ini: Ini) -> None:
    """Say what is wrong with a name that is not declared, if anything is."""
    kind = section.partition(" ")[0]
    if key in LATER.get(kind, ()):
        ini.fault(place, f"{key}: {NOT_YET}")
    elif kind not in ("job", "paths"):
        ini.fault(place, f"no setting {shown(key)} in [{section}]{suggest(key, known)}")
    elif near := [name for name in known if _one_slip(key, name)]:
        ini.warn(place, f"{key}: taken as the job's own name; did you mean {near[0]}?")


def _one_slip(word: str, other: str) -> bool:
    """Whether one letter more, less, other or swapped with its neighbour makes the other word."""
    differ = (at for at, pair in enumerate(zip(word, other, strict=False)) if pair[0] != pair[1])
    start = next(differ, min(len(word), len(other)))
    a, b = word[start:], other[start:]
    swapped = a[:2] == b[:2][::-1] and a[2:] == b[2:]
    return len(other) > 3 and (swapped or a[1:] == b[1:] or a[1:] == b or a == b[1:])


def _job(name: str, modules: set[str], ini: Ini) -> JobSettings:
    section = ini.sections[f"job {name}"]
    if name in VERBS:
        ini.fault(section.place, f"{name} is a verb of the protocol and cannot be a job type")
    elif not re.fullmatch("[a-z][a-z0-9_]{0,63}", name):
        ini.fault(section.place, f"job type {shown(name)} is not a-z, then a-z, 0-9 and _")
    job = _fill(
        JobSettings,
        section.name,
        ini,
        name=name,
        file=section.place.file,
        line=section.place.line,
        variables={key: item.text for key, item in section.items.items()},
        missing="command" not in section.items and name not in modules,
    )
    if job.missing and job.enabled:
        ini.warn(section.place, f"[job {name}] is disabled: no {name}.py in jobs_dir")
    _check_telling(job, ini)
    return _with_params(_with_retries(job, ini), ini)


def _check_telling(job: JobSettings, ini: Ini) -> None:
    """Settings that say when `notify_fail` is told, with nobody to tell."""
    keys = ("notify_after", "notify_every", "alert_queue_age", "alert_no_success")
    for key in filter(job.variables.get, keys):
        place = ini.place(f"job {job.name}", key)
        if job.name == NOTIFY:
            ini.fault(place, f"{key}: a notification tells nobody of itself")
        elif all(target.startswith("retry") for target in job.notify_fail):
            ini.fault(place, f"{key}: nobody to tell, notify_fail is empty")


def _check_urls(
    jobs: Mapping[str, JobSettings], webhook: Webhook, ini: Ini, thorough: bool
) -> None:
    """Whether targets that are URLs can be told, as far as that can be seen from here."""
    for job in jobs.values():
        for key in ("notify_fail", "notify_success"):
            place = ini.place(f"job {job.name}", key, f"{key}_file")
            for target in (one for one in getattr(job, key) if not one.startswith("retry")):
                parsed, fault = parse_target(target), ""
                if isinstance(parsed, Service):
                    fault = service_fault(parsed.url, try_it=thorough)
                elif isinstance(parsed, Hook):
                    fault = webhooks.forbidden_literal(parsed.url, webhook.allow)
                    fault = fault and f"{shown_target(target)}: {fault}"
                if fault:
                    ini.fault(place, f"{key}: {fault}")


def _with_retries(job: JobSettings, ini: Ini) -> JobSettings:
    """`retry:3` and `retrywait:3|1h` mean retries after one and the same wait."""
    section = f"job {job.name}"
    if any(target.startswith("retry") for target in job.notify_success):
        ini.fault(ini.place(section, "notify_success"), "notify_success: retry is for failures")
    asked: dict[str, Any] = {}
    for kind, _, rest in (target.partition(":") for target in job.notify_fail):
        if kind.startswith("retry"):
            count, _, wait = rest.partition("|")
            wait_s = when.duration(wait or "0")
            asked = {"retries": int(count), "retry_delay_s": wait_s, "retry_backoff": 1.0}
    asked = {name: value for name, value in asked.items() if _key(name) not in job.variables}
    told = tuple(target for target in job.notify_fail if not target.startswith("retry"))
    return replace(job, notify_fail=told, **asked)


def _with_params(job: JobSettings, ini: Ini) -> JobSettings:
    """Without `params` a command takes its placeholders; no other name may be used anywhere."""
    wanted = placeholders(job.variables["command"]) if job.command else []
    if job.command and not job.variables.get("params"):
        job = replace(job, params=ParamSpec(tuple(map(Param, wanted))))
    if job.params:
        names = job.params.names
        used = [("command", name) for name in wanted] + [("secret", name) for name in job.secret]
        for key, name in used:
            if name not in names:
                place = ini.place(f"job {job.name}", key)
                ini.fault(place, f"{key}: no parameter {shown(name)}{suggest(name, names)}")
    return job


def _check_subjobs(jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    graph = {}
    for job in jobs.values():
        graph[job.name] = dict.fromkeys(job.subjobs)
        for name in job.subjobs:
            place = ini.place(f"job {job.name}", "subjobs")
            if name not in jobs:
                ini.fault(place, f"subjobs: no section [job {name}]{suggest(name, jobs)}")
            elif job.enabled and not jobs[name].enabled:
                ini.warn(place, f"subjobs: [job {name}] is not enabled")
    while circle := _circle(graph):
        place = ini.place(f"job {circle[0]}", "subjobs")
        ini.fault(place, f"subjobs: go round: {' -> '.join(circle)}")
        del graph[circle[0]][circle[1]]


def _circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def _warn_of_silence(jobs: Mapping[str, JobSettings], modules: set[str], ini: Ini) -> None:
    """Notifications are jobs of a type of their own, which needs no section."""
    if jobs[NOTIFY].enabled if NOTIFY in jobs else NOTIFY in modules:
        return
    for job in jobs.values():
        if job.enabled and (job.notify_fail or job.notify_success):
            place = ini.place(f"job {job.name}", "notify_fail", "notify_success")
            ini.warn(place, f"nobody is told: no job type {NOTIFY} is enabled")


def _warn_of_strangers(access: Access, jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    lists = [("access", key, getattr(access, key)) for key in declared(Access)]
    lists += [(f"job {job.name}", "submit", job.submit or ()) for job in jobs.values()]
    for section, key, names in lists:
        for name in unknown_principals(names):
            ini.warn(ini.place(section, key), f"{key}: {name} is not known on this machine")


def _job_types(ini: Ini) -> Iterator[str]:
    """The types that have a section; of all other sections, say which are unknown."""
    for name, section in ini.sections.items():
        kind, _, job_type = name.partition(" ")
        if kind == "job" and job_type:
            yield job_type
        elif kind == "job":
            ini.fault(section.place, "[job] needs a type: [job hash]")
        elif kind in LATER[""]:
            ini.fault(section.place, f"[{name}]: {NOT_YET}")
        elif name not in SECTIONS:
            ini.fault(section.place, f"no section [{name}]{suggest(kind, (*SECTIONS, 'job'))}")


def _with_socket(paths: Paths, ini: Ini) -> Paths:
    """Paths whole: the socket in its place, and the jobs' own names."""
    path = paths.socket or f"{paths.state_dir}/upq.sock"
    if len(os.fsencode(path)) > SOCKET_LIMIT_BYTES:
        place = ini.place("paths", "socket", "state_dir")
        ini.fault(place, f"socket: {path} is longer than {SOCKET_LIMIT_BYTES} bytes")
    others = {
        key: _absolute(ini.folder, item.text)
        for key, item in ini.sections["paths"].items.items()
        if key not in declared(Paths)
    }
    return replace(paths, socket=path, others=others)


def _with_file(db: Db, state_dir: str, ini: Ini) -> Db:
    """The URL of SQLite with an absolute path."""
    scheme, slashes, file = (db.url or f"sqlite:///{state_dir}/upq.db").partition(":///")
    if scheme != "sqlite":
        return db
    file, mark, query = file.partition("?")
    return replace(db, url=f"{scheme}{slashes}{_absolute(ini.folder, file)}{mark}{query}")


def load(
    path: str | os.PathLike[str],
    env: Mapping[str, str] = os.environ,
    *,
    thorough: bool = False,
) -> Settings:
    """The settings of a file, with `upq.d/*.cfg` beside it. Raises ConfigError with every fault.

    thorough: have the notification library look at its URLs, which takes a moment.
    """
    ini = Ini(os.fspath(path), env, SECTIONS)
    parts: dict[str, Any] = {name: _fill(cls, name, ini) for name, cls in SECTIONS.items()}
    paths = parts["paths"] = _with_socket(parts["paths"], ini)
    parts["db"] = _with_file(parts["db"], paths.state_dir, ini)
    modules = {module.stem for module in Path(paths.jobs_dir).glob("*.py")}
    jobs = {name: _job(name, modules, ini) for name in _job_types(ini)}
    _check_subjobs(jobs, ini)
    _check_urls(jobs, parts["webhook"], ini, thorough)
    _warn_of_silence(jobs, modules, ini)
    _warn_of_strangers(parts["access"], jobs, ini)
    if ini.faults:
        raise ConfigError(ini.faults)
    file, *included = map(os.path.abspath, ini.files)
    return Settings(file, (file, *included), ini.warnings, jobs=jobs, **parts)


# The reference


INTRODUCTION = """\
# The configuration

<!-- made by `python -m upq.config`; change the declarations in upq/config.py instead -->

`upq.cfg` is an ini file: `[section]`, `key = value`, comments on lines of their own that begin
with `#` or `;`, an indented line goes on with the value above. `upq.py --check` tells every fault
with file and line; `upq.py --settings` prints all settings, one a line.

* An empty value means the default.
* Relative paths start at the folder of the file. `upq.d/*.cfg` beside it is read, too.
* `${NAME}` in a value is the environment's NAME; write `$${NAME}` for the text itself.
  A variable `UPQ_DB__URL` or `UPQ_JOB_HASH__CONCURRENT` wins over the file.
* `password_file`, `url_file`, `secret_file` of `[webhook]`, `notify_fail_file` and
  `notify_success_file` name a file that holds the secret.
* Durations: `30s`, `10m`, `1h30m`, `2d`, `1w`; a plain number is seconds. Sizes: `512K`, `20M`.
"""


def reference() -> str:
    """The reference page, docs/configuration.md."""
    lines = [INTRODUCTION]
    for name, section in (*SECTIONS.items(), ("job <type>", JobSettings)):
        about = " ".join((section.__doc__ or "").split())
        lines += [f"## `[{name}]`\n", f"{about}\n", "| key | type | default | unit | meaning |"]
        lines.append("|---|---|---|---|---|")
        for key, each in declared(section).items():
            default = f"`{each.default}`" if each.default else ""
            cells = (f"`{key}`", each.kind.name, default, each.kind.unit, each.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    later = [f"`[{name}]`" for name in LATER[""]]
    later += [f"`{key}` in `[{kind}]`" for kind, keys in LATER.items() if kind for key in keys]
    return "\n".join([*lines, f"Reserved, {NOT_YET}: {', '.join(later)}.", ""])


def describe() -> str:
    """Every setting on one line, as `upq --settings` prints them."""
    return "\n".join(
        f"[{name}] {key} = {each.default}  ({each.kind.name}) {each.meaning}"
        for name, section in (*SECTIONS.items(), ("job", JobSettings))
        for key, each in declared(section).items()
    )


if __name__ == "__main__":
    print(reference(), end="")
