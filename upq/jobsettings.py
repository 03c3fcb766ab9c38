"""What `[job <type>]` of `upq.cfg` may say, and what a job type is when it is read.

Each setting is declared once, as in `settings`.
"""

# ruff: noqa: RUF009 - `setting` makes a dataclass field

from __future__ import annotations

from dataclasses import dataclass, field

from upq import when
from upq.declaration import setting
from upq.gates import Free, Gate, Load, Window
from upq.job import WHEN_BUSY
from upq.kinds import (
    ALLOWED,
    AMOUNTS,
    CHAIN,
    COMMAND,
    CONCURRENT,
    CPU_TIME,
    DELAY,
    DESCRIPTOR,
    DURATION,
    ENVIRONMENT,
    EXIT_CODES,
    FACTOR,
    FOLDER,
    IO_CLASS,
    KEPT,
    KEY,
    LOAD,
    MIN_FREE,
    NAME_SET,
    NAMES,
    OPEN_FILES,
    PARAMS,
    PRIORITY,
    PROCESSORS,
    QUEUE,
    RATE,
    SIZE,
    TARGETS,
    TEMPLATE,
    TIMES,
    UNIQUE,
    WINDOW,
    YES_NO,
    Unique,
    at_least,
    number,
    one_of,
)
from upq.params import ParamSpec
from upq.rates import Rate


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

    @property
    def seen(self) -> dict[str, str]:
        """By key, its texts with {placeholders} that others see when they are filled in."""
        per = self.rate.per if self.rate else ""
        return {"queue": self.queue, "serial": self.serial, "delay": self.delay, "rate": per}


#: Settings of a `[job ...]` that say how its command runs.
COMMAND_ONLY = {
    "stdin", "success_codes", "retry_codes", "abort_codes", "result", "progress", "progress_fd",
    "env", "cwd", "nice", "ionice", "memory_limit", "cpu_limit", "file_limit", "open_files",
    "memory_max", "cpu_quota", "tasks_max",
}  # fmt: skip
