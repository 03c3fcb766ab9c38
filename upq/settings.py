"""What `upq.cfg` may say, section by section, and what all of it is when it is read: `Settings`.

Each setting is declared once; parser, checks, `describe()` and the reference page of `config` come
from there. What the section of a job type may say is in `jobsettings`.
"""

# ruff: noqa: RUF009 - `setting` makes a dataclass field

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from upq import webhook as webhooks
from upq import when
from upq.declaration import setting
from upq.jobsettings import JobSettings
from upq.kinds import (
    CONCURRENT,
    CRON,
    DATABASE,
    DURATION,
    GROUP,
    LOG_FORMAT,
    LOOPBACK,
    MAIL_SERVER,
    MODE,
    NAMES_HERE,
    NETWORKS,
    NODE_NAME,
    PATH,
    PATTERNS,
    PRINCIPALS,
    TARGET_PATTERNS,
    TEXT,
    TIME_LIMIT,
    USER,
    YES_NO,
    Address,
    Pattern,
    number,
    one_of,
)
from upq.protocol import SUBMIT, Request


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

#: What takes effect at a start only.
FIXED = {
    "daemon": ("detach_process", "pidfile", "umask", "uid", "gid", "chroot_directory"),
    "paths": ("socket", "socket_chmod", "state_dir"),
    "db": ("url", "durability"),
    "listen": ("tcp", "max_connections", "max_per_peer", "idle", "line", "write"),
    "node": ("name",),
}
