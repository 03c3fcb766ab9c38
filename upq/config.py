"""`upq.cfg` to frozen settings; every fault is found in one pass and told with file and line.

Each setting is declared once, as a field with its kind, its default in the spelling of the ini file
and its meaning. Parser, checks, `describe()` and the reference page (`python -m upq.config`) come
from there. Nothing is created or opened for the daemon here.
"""

# ruff: noqa: RUF009 - `setting` makes a dataclass field

from __future__ import annotations

import graphlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from upq import webhook as webhooks
from upq import when, workflow
from upq.access import unknown_principals
from upq.errors import ConfigError, RequestError
from upq.gates import Free, Gate, Load, Window
from upq.ini import Ini, Item, Place, Section
from upq.job import REPLACE, WHEN_BUSY
from upq.kinds import (
    ALLOWED,
    AMOUNTS,
    CHAIN,
    COMMAND,
    CONCURRENT,
    CPU_TIME,
    CRON,
    DATABASE,
    DELAY,
    DESCRIPTOR,
    DURATION,
    ENVIRONMENT,
    EXIT_CODES,
    FACTOR,
    FOLDER,
    GROUP,
    IO_CLASS,
    KEPT,
    KEY,
    LOAD,
    LOG_FORMAT,
    LOOPBACK,
    MAIL_SERVER,
    MIN_FREE,
    MODE,
    NAME_SET,
    NAMES,
    NAMES_HERE,
    NETWORKS,
    NODE_NAME,
    NOT_YET,
    OPEN_FILES,
    PARAMS,
    PATH,
    PATTERNS,
    PRINCIPALS,
    PRIORITY,
    PROCESSORS,
    QUEUE,
    RATE,
    SIZE,
    TARGET_PATTERNS,
    TARGETS,
    TEMPLATE,
    TEXT,
    TIME_LIMIT,
    TIMES,
    UNIQUE,
    USER,
    WINDOW,
    YES_NO,
    Address,
    Kind,
    Pattern,
    Unique,
    at_least,
    number,
    one_of,
)
from upq.notify import NOTIFY, Service, parse_target, service_fault, shown_target
from upq.notify import Webhook as Hook
from upq.params import Param, ParamSpec, names_in, shown, suggest
from upq.protocol import SUBMIT, VERBS, Request, parse
from upq.rates import Rate
from upq.vault import read_keys

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
    max_abandoned: int = setting(
        number(0),
        "10",
        "Restart once more threads than this hang in jobs that could not be stopped.",
    )


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
    key_file: str = setting(
        PATH,
        "",
        "Encrypt the values of `secret` parameters with the first key of this file, which"
        " `upq --new-key FILE` makes and adds to; empty: they are stored as they are.",
    )
    keep_done_s: float = setting(DURATION, "14d", "How long jobs that are done stay visible.")
    keep_failed_s: float = setting(
        DURATION, "90d", "The same for jobs that failed, were cancelled or expired."
    )
    #: What `key_file` holds; a reload takes over other keys.
    keys: tuple[str, ...] = field(default=(), repr=False, compare=False)


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
        TARGET_PATTERNS,
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
    pools: tuple[str, ...] | None = setting(
        NAMES_HERE,
        "",
        "The pools whose jobs run here, those of the others wait for other nodes; empty: all.",
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Things of which there are only so many for all job types of the database: `disk_io = 2`.
    A job type says with `needs` how many of which each of its jobs holds while it runs.
    """


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Places that several queues share. A queue belongs to the first pool of this node that names
    it; jobs of all other queues run in the places of their type.
    """

    name: str
    queues: tuple[Pattern, ...] = setting(
        PATTERNS,
        "",
        "Drained in this order, a queue only while those before it have nothing: `a.high a.low`; or"
        " by weights, `a:6 b:3`. `*` stands for any characters; queues of one pattern are one.",
    )
    concurrent: int = setting(
        CONCURRENT, "1", "Jobs at a time. `concurrent` of a job type, if written, counts there too."
    )
    ageing_s: float = setting(
        DURATION,
        "0",
        "A job that has waited so long goes one level higher, and above the first level 10 steps of"
        " priority, and so on each time; 0: never. Not with weights.",
    )

    @property
    def by_weight(self) -> bool:
        return any(pattern.weight for pattern in self.queues)

    def level(self, queue: str) -> int | None:
        """The first pattern that names a queue."""
        found = (n for n, pattern in enumerate(self.queues) if pattern.matches(queue))
        return next(found, None)


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
    subjobs: tuple[str | tuple[str, ...], ...] = setting(
        CHAIN,
        "",
        "Job types that follow one after another on success, with the same parameters and what a"
        " result adds: `a b (c d) e` runs c and d side by side, and e when both are done.",
    )
    on_done: tuple[str, ...] = setting(
        NAMES, "", "Job types that also follow on success, each for itself."
    )
    on_fail: tuple[str, ...] = setting(
        NAMES,
        "",
        "Job types that are queued when a job has failed for good or has expired. They get its"
        " `type`, `id`, `root`, `queue`, `state`, `reason`, `params`, `message` and `output`.",
    )
    delay: str = setting(
        DELAY,
        "",
        "Its jobs start so long after they were queued, or after what they wait for is done: `20s`,"
        " `{uptime}`. Meanwhile they hold no place; `@in` and `@at` of a submit win.",
    )
    executor: str = setting(
        one_of("thread", "process"),
        "thread",
        "Where the class runs: in a `thread` of the daemon, or in a child `process` that may crash"
        " or hang and harms nothing else. A command is a process of its own anyway.",
    )
    max_jobs_per_child: int = setting(
        number(1), "1000", "Jobs that a child process runs before a new one takes its place."
    )
    on_change: str = setting(
        one_of("fail", "continue"),
        "fail",
        "When a job is done that ran before and has not asked again for a child which that run has"
        " left unfinished: it has failed (`fail`), or there is a warning in its message and in the"
        " log (`continue`).",
    )
    timeout_s: float = setting(
        DURATION, "0", "A job that runs longer is ended, and has failed; 0: no limit."
    )
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
        " stays one argument and cannot be an option unless `--` stands before it or it is an int,"
        " float or choice; a word whose parameter is not given is left out.",
    )
    stdin: str = setting(
        TEMPLATE, "", "What the command reads, `{text}` for example; empty: nothing."
    )
    success_codes: tuple[int, ...] = setting(EXIT_CODES, "0", "Exit codes of a command done well.")
    retry_codes: tuple[int, ...] = setting(
        EXIT_CODES, "", "Only these exit codes are tried again; empty: all but `abort_codes`."
    )
    abort_codes: tuple[int, ...] = setting(
        EXIT_CODES, "", "Exit codes after which `retries` that are left are not made."
    )
    result: str = setting(
        one_of("exit_code", "json"),
        "exit_code",
        "A command's result: its exit code, or the last line of JSON in its standard output.",
    )
    progress: str = setting(
        one_of("none", "stdout"),
        "none",
        "Lines such as `progress: 40% text` in a command's standard output are its progress.",
    )
    progress_fd: int = setting(
        DESCRIPTOR, "0", "The same on a descriptor of its own, 3 to 9; 0: none."
    )
    env: dict[str, str | None] = setting(
        ENVIRONMENT,
        "",
        "All that a command sees beside PATH, HOME, LANG, LC_*, TZ, TMPDIR: `NAME` is the daemon's,"
        " `NAME=value` and `NAME={param}` are its own.",
    )
    cwd: str = setting(
        FOLDER, "", "Folder the command runs in, `/srv/{name}` or `{path}`; empty: the daemon's."
    )
    nice: int = setting(number(0, 19), "0", "Niceness of a command, at least.")
    ionice: str = setting(IO_CLASS, "", "A command's turn at the disk, by `ionice`; empty: normal.")
    memory_limit_bytes: int = setting(
        at_least("16M"), "0", "Address space of each process of a command; 0: no limit."
    )
    cpu_limit_s: float = setting(
        CPU_TIME, "0", "Computing time of each process of a command; 0: no limit."
    )
    file_limit_bytes: int = setting(
        SIZE, "0", "How far a command may write into a file; 0: no limit."
    )
    open_files: int = setting(
        OPEN_FILES, "0", "Files that a process of a command may have open; 0: the daemon's limit."
    )
    memory_max_bytes: int = setting(
        at_least("1M"),
        "0",
        "Memory of a command and all that it has started together, in a control group; with more"
        " all of it is killed; 0: no limit.",
    )
    cpu_quota: float = setting(
        PROCESSORS, "0", "What they use of one processor, held to that: `50%`, `200%`; 0: no limit."
    )
    tasks_max: int = setting(
        number(0, 10**6), "0", "Processes and threads that they may be; 0: no limit."
    )
    priority: int = setting(PRIORITY, "default", "high (10), default (0), low (-10) or a number.")
    queue: str = setting(
        QUEUE,
        "",
        "The queue of its jobs, each {placeholder} a parameter: `storage.{pool}.high`; empty: one"
        " with the name of the type.",
    )
    rate: Rate | None = setting(
        RATE,
        "",
        "So many starts, on all nodes together: `100/s` `10/min` `5/h` `1/d`. After a rest some may"
        " start at once: `10/min burst 3`; without it what comes in 0.2 s, at least one."
        " `10/min per {host}`: so many of each host, evenly spaced and in the order of their"
        " submits; those that wait hold no place.",
    )
    needs: dict[str, int] = setting(
        AMOUNTS, "", "What each job holds of `[tokens]` while it runs: `disk_io:1 license:2`."
    )
    window: Window | None = setting(
        WINDOW,
        "",
        "Start jobs at these times only: `22:00-06:00`, `mon-fri 22:00-06:00, sat sun 00:00-24:00"
        " Europe/Berlin`; without a zone it is the time of this machine.",
    )
    load_below: Load | None = setting(
        LOAD, "", "Start jobs only while the load of the last minute is below."
    )
    min_free: tuple[Free, ...] = setting(
        MIN_FREE, "", "Start jobs only while so much is free on disk: `/srv 20G, /var 1G`."
    )
    unique: Unique | None = setting(
        UNIQUE,
        "",
        "Of jobs with the same values of these parameters (`fid,path`, or `params` for all) one is"
        " queued; a repeated submit is answered with its id. The values are free again when it has"
        " ended, after `while queued` when it starts, after `for 1h` not before that time.",
    )
    serial: str = setting(
        KEY,
        "",
        "`vm:{id}`: jobs with the same text run one at a time, in the order of their submits; those"
        " that wait hold no place. Jobs of other types take turns with them if their text is the"
        " same.",
    )
    expires_s: float = setting(
        DURATION,
        "0",
        "A job that has not started so long after its submit, or after its `@in` or `@at`, never"
        " starts; 0: no limit.",
    )
    max_queue: int = setting(
        number(0), "0", "`ERR busy` when so many jobs of this type wait; 0: no limit."
    )
    when_busy: str = setting(
        one_of(*WHEN_BUSY),
        "queue",
        "While jobs of this type (with `serial`: of the same text) are unfinished a submit waits,"
        " is refused with `ERR busy`, or replaces those that have not started.",
    )
    submit: tuple[str, ...] | None = setting(
        ALLOWED, "", "Who may submit it on the UNIX socket; empty: as in `[access]`."
    )
    output_limit_bytes: int = setting(SIZE, "1M", "Output kept of an attempt, head and tail.")
    schedule: when.Times | None = setting(
        TIMES,
        "",
        "Queue a job without parameters at these times: `0 3 * * *`, `@daily Europe/Berlin`,"
        " `every 10m`; for more there is `[schedule <name>]`.",
    )
    keep_s: float | None = setting(
        KEPT, "", "How long ended jobs of this type stay visible; empty: as `[db]` says."
    )
    keep_done_s: float | None = setting(KEPT, "", "The same for those that are done.")
    keep_failed_s: float | None = setting(
        KEPT, "", "The same for those that failed, were cancelled or expired."
    )
    #: Every key of the section as text: `self.jobcfg` of its jobs.
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    #: Neither a file in jobs_dir nor a command: the type cannot run.
    missing: bool = False

    @property
    def gates(self) -> tuple[Gate, ...]:
        """All that have to be open for its jobs to start."""
        return tuple(filter(None, (self.window, self.load_below, *self.min_free)))


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """Jobs that are queued by the clock, once for each time however many daemons watch. A job's
    submitter is `schedule <name>`. See [schedules](schedules.md).
    """

    name: str
    #: Where it stands: file and line.
    place: str = ""
    type: str = setting(TEXT, "", "The type of the jobs.")
    params: str = setting(
        TEXT, "", "Parameters and options of the jobs, as in a submit: `fid:50 @priority:low`."
    )
    line: str = setting(
        TEXT, "", "A whole submit in place of `type` and `params`: `verify_local_file fid:50`."
    )
    cron: str = setting(
        CRON,
        "",
        "Minute, hour, day of month, month, day of week: `0 3 * * 1-5`; with six fields seconds"
        " stand first. Also `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`.",
    )
    every_s: float = setting(
        DURATION, "0", "An interval in place of `cron`, counted from 1970 UTC; at least 1s."
    )
    timezone: str = setting(
        TEXT, "", "Time zone of `cron`: `Europe/Berlin`; empty: at its end, or the machine's own."
    )
    missed: str = setting(
        one_of("skip", "once", "all"),
        "once",
        "What to do for times at which no daemon was there, more than a minute ago: nothing, one"
        " job for all of them, or one for each.",
    )
    max_late_s: float = setting(
        DURATION, "0", "Times longer ago than this are passed over for good; 0: never."
    )
    #: What is submitted, and when.
    request: Request = Request(SUBMIT, "", {})
    times: when.Times | None = None


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
    #: In the order of the file.
    pools: dict[str, PoolSettings] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    #: Sections and `schedule =` of job types, by name.
    schedules: dict[str, ScheduleSettings] = field(default_factory=dict)
    #: What is written in the sections, by section and key.
    texts: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)

    @property
    def pools_here(self) -> dict[str, PoolSettings]:
        """Those that this node serves."""
        here = self.node.pools
        return {name: one for name, one in self.pools.items() if here is None or name in here}


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

#: The sections that carry a name, and the one that holds names only.
OTHER_SECTIONS: dict[str, Any] = {
    "pool <name>": PoolSettings,
    "tokens": Tokens,
    "job <type>": JobSettings,
    "schedule <name>": ScheduleSettings,
}

#: Sections of which there are several, with what their name is.
NAMED = {
    "job": "type: [job hash]",
    "pool": "name: [pool storage]",
    "schedule": "name: [schedule nightly]",
}

#: What later versions bring: refused clearly rather than ignored. "" holds sections.
LATER = {"": ("http", "autoscale"), "listen": ("tls", "tokens")}

#: Settings of a `[job ...]` that say how its command runs.
COMMAND_ONLY = {
    "stdin", "success_codes", "retry_codes", "abort_codes", "result", "progress", "progress_fd",
    "env", "cwd", "nice", "ionice", "memory_limit", "cpu_limit", "file_limit", "open_files",
    "memory_max", "cpu_quota", "tasks_max",
}  # fmt: skip

#: What takes effect at a start only.
FIXED = {
    "daemon": ("detach_process", "pidfile", "umask", "uid", "gid", "chroot_directory"),
    "paths": ("socket", "socket_chmod", "state_dir"),
    "db": ("url", "durability"),
    "listen": ("tcp", "max_connections", "max_per_peer", "idle", "line", "write"),
    "node": ("name",),
}

#: Settings of jobs' own that name a file with a secret in it.
OWN_SECRET_FILE = re.compile(r"(passw|secret|token|credential)[^_]*_file$")

#: Bytes that the kernel allows the path of a UNIX socket.
SOCKET_LIMIT_BYTES = 107


# The checks

S = TypeVar("S")


def _fill(cls: type[S], section: str, ini: Ini, /, **more: Any) -> S:
    """An object of a section's class from its items; what cannot be read keeps its default."""
    values = more
    items = dict(ini.sections[section].items)
    known = declared(cls)
    for key, each in known.items():
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
        _judge_other(key, item.place, section, list(known), ini)
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
    _read_own_secrets(section, ini)
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
    if job.command and "executor" in job.variables:
        ini.fault(ini.place(section.name, "executor"), "executor: a command is a process anyway")
    _check_telling(job, ini)
    return _with_params(_with_retries(job, ini), ini)


def _read_own_secrets(section: Section, ini: Ini) -> None:
    """`eu_password` from the file that `eu_password_file` names, where a job has such settings.

    What such a name means is up to the job: a file that cannot be read is no fault.
    """
    for key in filter(OWN_SECRET_FILE.search, list(section.items)):
        name, pointer = key.removesuffix("_file"), section.items[key]
        if name in section.items or name in declared(JobSettings):
            continue
        try:
            text = Path(ini.folder, pointer.text).read_text("utf-8").strip()
            section.items[name] = Item(text, pointer.place)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            ini.warn(pointer.place, f"{key}: {pointer.text}: {why}")


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
    used = [(key, name) for key, text in _templates(job) for name in names_in(text)]
    if job.command and not job.variables.get("params"):
        paths = names_in(job.cwd) if job.cwd.startswith("{") else []
        names_ = dict.fromkeys(name for _, name in used)
        found = [Param(name, "path" if name in paths[:1] else "str") for name in names_]
        job = replace(job, params=ParamSpec(tuple(found)))
    if job.params:
        names = job.params.names
        used += [("queue", name) for name in names_in(job.queue)]
        used += [("serial", name) for name in names_in(job.serial)]
        used += [("delay", name) for name in names_in(job.delay)]
        used += [("rate", name) for name in names_in(job.rate.per if job.rate else "")]
        used += [("unique", name) for name in (job.unique and job.unique.names) or ()]
        for key, name in used + [("secret", name) for name in job.secret]:
            if name not in names:
                place = ini.place(f"job {job.name}", key)
                ini.fault(place, f"{key}: no parameter {shown(name)}{suggest(name, names)}")
    for name in sorted(job.secret & set(names_in(job.queue))):
        place = ini.place(f"job {job.name}", "queue")
        ini.fault(place, f"queue: {name} is secret, and a queue's name is shown to all")
    for key, text, shown_ in (
        ("serial", job.serial, "the text of a turn"), ("delay", job.delay, "the time of a start"),
    ):  # fmt: skip
        for name in sorted(job.secret & set(names_in(text))):
            place = ini.place(f"job {job.name}", key)
            ini.fault(place, f"{key}: {name} is secret, and {shown_} is shown")
    if job.rate and job.rate.per:
        _check_pace(job, job.rate.per, ini)
    for name in sorted(job.secret.intersection(names_in(" ".join(job.command or ())))):
        place = ini.place(f"job {job.name}", "command")
        ini.warn(place, f"command: everyone on this machine can see {{{name}}} in `ps`")
    if job.unique and "db" in ini.sections and "key_file" in ini.sections["db"].items:
        names_of_key = job.secret if job.unique.names is None else job.unique.names
        for name in sorted(job.secret.intersection(names_of_key)):
            place = ini.place(f"job {job.name}", "unique")
            ini.warn(
                place, f"unique: a digest of {name} is stored, by which a short one is guessed"
            )
    return _with_command(job, ini)


def _check_pace(job: JobSettings, per: str, ini: Ini) -> None:
    """What `rate ... per` may name, and what may stand beside it."""
    place = ini.place(f"job {job.name}", "rate")
    for name in names_in(per):
        if name in job.secret:
            ini.fault(place, f"rate: {name} is secret, and what a rate is per is shown")
    if job.serial:
        ini.fault(place, "rate: per is not possible together with serial")
    if job.when_busy == REPLACE:
        ini.fault(place, "rate: per is not possible together with when_busy = replace")


def _templates(job: JobSettings) -> Iterator[tuple[str, str]]:
    """The texts of a command with {placeholders}, each with its key."""
    if job.command:
        yield from (("command", word) for word in job.command)
        yield "stdin", job.stdin
        yield from (("env", text) for text in job.env.values() if text)
        yield "cwd", job.cwd


def _with_command(job: JobSettings, ini: Ini) -> JobSettings:
    """What settings of a command say together has to make sense; its folder is absolute."""

    def fault(key: str, text: str) -> None:
        ini.fault(ini.place(f"job {job.name}", key), f"{key}: {text}")

    if not job.command:
        for key in COMMAND_ONLY & job.variables.keys():
            ini.warn(ini.place(f"job {job.name}", key), f"{key}: means nothing without command")
        return job
    codes = {key: getattr(job, key) for key in ("success_codes", "retry_codes", "abort_codes")}
    for (first, some), (key, others) in itertools.combinations(codes.items(), 2):
        if twice := sorted(set(some) & set(others)):
            fault(key, f"{twice[0]} is in {first}, too")
    if job.retry_codes and not job.retries:
        place = ini.place(f"job {job.name}", "retry_codes")
        ini.warn(place, "retry_codes: nothing is tried again, retries is 0")
    if job.progress_fd and job.progress == "stdout":
        fault("progress_fd", "progress = stdout is given, too")
    if job.ionice and not shutil.which("ionice"):
        fault("ionice", "there is no program ionice (util-linux) on this machine")
    types = {param.name: param.type for param in job.params.params} if job.params else {}
    if job.stdin in types:
        fault("stdin", f"write {{{job.stdin}}} for the value of the parameter")
    first = names_in(job.cwd)[0] if job.cwd.startswith("{") and names_in(job.cwd) else ""
    if types.get(first, "path") != "path":
        fault("cwd", f"begins with {{{first}}}, which has to be a path: params = {first}:path")
    return replace(job, cwd=job.cwd if first else _absolute(ini.folder, job.cwd))


def _pool(name: str, ini: Ini) -> PoolSettings:
    section = ini.sections[f"pool {name}"]
    if not re.fullmatch("[A-Za-z0-9_.-]{1,64}", name):
        ini.fault(section.place, f"pool {shown(name)} is not a name of letters, digits, _ . and -")
    pool = _fill(PoolSettings, section.name, ini, name=name)
    queues = section.items.get("queues")
    if queues is None or not queues.text.strip():
        ini.fault(section.place, f"[pool {name}] has no queues")
    if pool.by_weight and pool.ageing_s:
        place = ini.place(section.name, "ageing")
        ini.fault(place, "ageing: is for queues in order; with weights none of them waits for ever")
    if 0 < pool.ageing_s < 1:
        ini.fault(ini.place(section.name, "ageing"), "ageing: has to be 1 s or more")
    return pool


def _tokens(ini: Ini) -> dict[str, int]:
    found = {}
    for name, item in ini.sections["tokens"].items.items():
        try:
            if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
                raise ValueError("is not a name of a-z, 0-9 and _")
            found[name] = number(1).read(item.text)
        except ValueError as error:
            ini.fault(item.place, f"{name}: {error}")
    return found


def _check_limits(
    jobs: Mapping[str, JobSettings], tokens: Mapping[str, int], node: Node,
    pools: Mapping[str, PoolSettings], ini: Ini,
) -> None:  # fmt: skip
    """What can never be met, and names that stand for nothing."""
    for job in jobs.values():
        section = f"job {job.name}"
        place = ini.place(section, "needs")
        for name, n in job.needs.items():
            if name not in tokens:
                ini.fault(place, f"needs: no {name} in [tokens]{suggest(name, tokens)}")
            elif n > tokens[name]:
                has = f"[tokens] {name} = {tokens[name]}"
                ini.fault(place, f"needs: {name}:{n} can never be met, {has}")
        for one in job.min_free:
            if fault := one.fault():
                ini.fault(ini.place(section, "min_free"), f"min_free: {fault}")
    for name in node.pools or ():
        if name not in pools:
            ini.fault(ini.place("node", "pools"), f"pools: no [pool {name}]{suggest(name, pools)}")


def _check_followers(jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    """Types that follow others have to be there, and none may come to follow itself."""
    #: Of each type those that follow, each with the setting that says so.
    graph: dict[str, dict[str, str]] = {}
    for job in jobs.values():
        graph[job.name] = {}
        following = ("on_fail", job.on_fail), ("on_done", job.on_done)
        for key, names in (*following, ("subjobs", workflow.names(job.subjobs))):
            graph[job.name] |= dict.fromkeys(names, key)
            place = ini.place(f"job {job.name}", key)
            if any(set(name) & set("()") for name in names):
                ini.fault(place, f"{key}: each follows for itself; groups ( ) are for subjobs")
                continue
            for name in names:
                if name not in jobs:
                    ini.fault(place, f"{key}: no section [job {name}]{suggest(name, jobs)}")
                elif name == NOTIFY:
                    ini.fault(place, f"{key}: notify is queued by upq itself")
                elif job.enabled and not jobs[name].enabled:
                    ini.warn(place, f"{key}: [job {name}] is not enabled")
    while circle := _circle(graph):
        key = graph[circle[0]].pop(circle[1])
        place = ini.place(f"job {circle[0]}", key)
        ini.fault(place, f"{key}: go round: {' -> '.join(circle)}")


def _check_handed_on(jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    """What is secret in a job is so in those that get its parameters: none may show it."""
    for job in jobs.values():
        for other in map(jobs.get, _heirs(job, jobs) if job.secret else ()):
            if other is None:
                continue
            per = other.rate.per if other.rate else ""
            for key, text in (
                ("queue", other.queue), ("serial", other.serial), ("delay", other.delay),
                ("rate", per),
            ):  # fmt: skip
                for name in sorted((job.secret - other.secret) & set(names_in(text))):
                    place = ini.place(f"job {other.name}", key)
                    ini.fault(place, f"{key}: {name} is secret in [job {job.name}], which hands it"
                              " on, and would be shown")  # fmt: skip


def _heirs(job: JobSettings, jobs: Mapping[str, JobSettings]) -> set[str]:
    """The types that get the parameters of a job, by its subjobs and by `on_done`."""
    found: set[str] = set()
    # Steps bring no subjobs of their own.
    steps, left = set(workflow.names(job.subjobs)), [*job.on_done]
    for name in steps & jobs.keys():
        left += jobs[name].on_done
    while left:
        if (name := left.pop()) not in found and name in jobs:
            found.add(name)
            left += [*workflow.names(jobs[name].subjobs), *jobs[name].on_done]
    return found | steps


def _circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def _schedules(
    names: Iterable[str], jobs: Mapping[str, JobSettings], ini: Ini
) -> dict[str, ScheduleSettings]:
    """Sections, and `schedule =` of job types, which have the name of the type."""
    made = {name: _schedule(name, jobs, ini) for name in names}
    for job in jobs.values():
        if job.schedule is None:
            continue
        place = ini.place(f"job {job.name}", "schedule")
        if job.name in made:
            ini.fault(place, f"schedule: there is [schedule {job.name}], too")
            continue
        made[job.name] = ScheduleSettings(
            job.name,
            str(place),
            job.name,
            request=Request(SUBMIT, job.name, {}),
            times=job.schedule,
        )
        _check_scheduled(made[job.name], jobs, place, "schedule", ini)
    return made


def _schedule(name: str, jobs: Mapping[str, JobSettings], ini: Ini) -> ScheduleSettings:
    section = ini.sections[f"schedule {name}"]
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        ini.fault(section.place, f"schedule {shown(name)} is not letters, digits, '_', '.' and '-'")
    made = _fill(ScheduleSettings, section.name, ini, name=name, place=str(section.place))
    keys = [key for key in ("line", "type", "params") if getattr(made, key)]
    place = ini.place(section.name, *keys[-1:])
    if keys in ([], ["params"]):
        ini.fault(section.place, f"[{section.name}] needs type = <job type>, or a line")
    elif keys[0] == "line" and len(keys) > 1:
        ini.fault(place, f"line: has all that a submit has; {keys[1]} is given, too")
    elif request := _request(made, place, keys[-1], ini):
        made = replace(made, type=request.verb, request=request)
        _check_scheduled(made, jobs, place, keys[-1], ini)
    return _with_times(made, ini)


def _request(made: ScheduleSettings, place: Place, key: str, ini: Ini) -> Request | None:
    """What a schedule submits, or None and a fault."""
    try:
        request = parse((made.line or f"{made.type} {made.params}").encode())
    except RequestError as error:
        ini.fault(place, f"{key}: {error}")
        return None
    if request is None or request.kind != SUBMIT or (made.type and request.verb != made.type):
        ini.fault(place, f"{key}: {shown(made.line or made.type)} submits no job")
        return None
    for option in ("run_at", "key", "after"):
        if getattr(request.options, option) is not None:
            spelt = "@at" if option == "run_at" else f"@{option}"
            ini.fault(place, f"{key}: {spelt}: has no meaning for a job that comes again")
    options = request.options
    if options.expires_s and options.in_s and options.in_s >= options.expires_s:
        ini.fault(place, f"{key}: @expires: that is before the job may start (@in)")
    return request


def _check_scheduled(
    made: ScheduleSettings, jobs: Mapping[str, JobSettings], place: Place, key: str, ini: Ini
) -> None:
    """Fault a type that there is not and parameters that it does not take."""
    job = jobs.get(made.type)
    if job is None:
        ini.fault(place, f"{key}: no section [job {made.type}]{suggest(made.type, jobs)}")
        return
    if made.type == NOTIFY:
        ini.fault(place, f"{key}: notify is queued by upq itself")
    if not job.enabled or job.missing:
        ini.warn(place, f"{key}: [job {made.type}] is disabled: its jobs will wait")
    try:
        if job.params is not None:
            job.params.check(made.request.params, job.secret)
    except RequestError as error:
        ini.fault(place, f"{key}: {error}")


def _with_times(made: ScheduleSettings, ini: Ini) -> ScheduleSettings:
    section = f"schedule {made.name}"
    place = ini.place(section, "cron", "every")
    written = ini.sections[section].items
    if bool(made.cron) == ("every" in written):
        ini.fault(place, f"[{section}] needs either cron = 0 3 * * * or every = 10m")
        return made
    text = made.cron or f"every {written['every'].text}"
    try:
        return replace(made, times=when.Times.read(text, made.timezone))
    except ValueError as error:
        in_zone = made.timezone and "time zone" in str(error)
        key = "timezone" if in_zone else "cron" if made.cron else "every"
        ini.fault(ini.place(section, key), f"{key}: {error}")
        return made


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


def _named(kind: str, ini: Ini) -> Iterator[str]:
    """The names of all sections of a kind."""
    for name in ini.sections:
        this, _, rest = name.partition(" ")
        if this == kind and rest:
            yield rest


def _check_sections(ini: Ini) -> None:
    """Say of which sections nothing is known."""
    for name, section in ini.sections.items():
        kind, _, rest = name.partition(" ")
        if kind in NAMED:
            if not rest:
                ini.fault(section.place, f"[{kind}] needs a {NAMED[kind]}")
        elif kind in LATER[""]:
            ini.fault(section.place, f"[{name}]: {NOT_YET}")
        elif name not in SECTIONS and name != "tokens":
            ini.fault(section.place, f"no section [{name}]{suggest(kind, (*SECTIONS, *NAMED))}")


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


def _with_keys(db: Db, ini: Ini) -> Db:
    if not db.key_file:
        return db
    try:
        return replace(db, keys=read_keys(db.key_file))
    except ValueError as error:
        ini.fault(ini.place("db", "key_file"), f"key_file: {error}")
        return db


def load(
    path: str | os.PathLike[str],
    env: Mapping[str, str] = os.environ,
    *,
    thorough: bool = False,
) -> Settings:
    """The settings of a file, with `upq.d/*.cfg` beside it. Raises ConfigError with every fault.

    thorough: have the notification library look at its URLs, which takes a moment.
    """
    ini = Ini(os.fspath(path), env, (*SECTIONS, "tokens"))
    parts: dict[str, Any] = {name: _fill(cls, name, ini) for name, cls in SECTIONS.items()}
    paths = parts["paths"] = _with_socket(parts["paths"], ini)
    parts["db"] = _with_keys(_with_file(parts["db"], paths.state_dir, ini), ini)
    modules = {module.stem for module in Path(paths.jobs_dir).glob("*.py")}
    _check_sections(ini)
    jobs = {name: _job(name, modules, ini) for name in _named("job", ini)}
    pools = {name: _pool(name, ini) for name in _named("pool", ini)}
    tokens = _tokens(ini)
    _check_limits(jobs, tokens, parts["node"], pools, ini)
    schedules = _schedules(_named("schedule", ini), jobs, ini)
    _check_followers(jobs, ini)
    _check_handed_on(jobs, ini)
    _check_urls(jobs, parts["webhook"], ini, thorough)
    _warn_of_silence(jobs, modules, ini)
    _warn_of_strangers(parts["access"], jobs, ini)
    if ini.faults:
        raise ConfigError(ini.faults)
    file, *included = map(os.path.abspath, ini.files)
    texts = {
        section.name: {key: item.text for key, item in section.items.items() if item.text}
        for section in ini.sections.values()
    }
    for name, cls in SECTIONS.items():
        for key, each in declared(cls).items():
            # What a file holds, which the section only names.
            if each.secret and texts[name].pop(f"{key}_file", ""):
                texts[name][key] = getattr(parts[name], each.name)
    return Settings(
        file,
        (file, *included),
        ini.warnings,
        jobs=jobs,
        pools=pools,
        tokens=tokens,
        schedules=schedules,
        texts=texts,
        **parts,
    )


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
  `notify_success_file` name a file that holds the secret. So do settings of a job's own: with
  `eu_password_file` it finds what the file holds as `eu_password`.
* Durations: `30s`, `10m`, `1h30m`, `2d`, `1w`; a plain number is seconds. Sizes: `512K`, `20M`.
"""


def reference() -> str:
    """The reference page, docs/configuration.md."""
    lines = [INTRODUCTION]
    for name, section in (*SECTIONS.items(), *OTHER_SECTIONS.items()):
        about = " ".join((section.__doc__ or "").split())
        lines += [f"## `[{name}]`\n", f"{about}\n"]
        if not declared(section):
            continue
        lines += ["| key | type | default | unit | meaning |"]
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
        f"[{name.partition(' ')[0]}] {key} = {each.default}  ({each.kind.name}) {each.meaning}"
        for name, section in (*SECTIONS.items(), *OTHER_SECTIONS.items())
        for key, each in declared(section).items()
    )


if __name__ == "__main__":
    print(reference(), end="")
