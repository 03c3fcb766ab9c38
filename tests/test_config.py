"""upq.cfg: what it may say, and what every fault in it is answered with."""

from __future__ import annotations

import ast
import os
import pwd
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.jobkit import SHARED
from upq import config, vault
from upq.declaration import declared
from upq.errors import ConfigError
from upq.protocol import VERBS
from upq.settings import OTHER_SECTIONS, SECTIONS, Access, Daemon, Logging, Paths, Settings

ROOT = Path(__file__).parent.parent
FIRST_UPQ = ROOT / "tests/configs/first_upq.cfg"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write a file into a fresh folder, which is also where the test stands."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "upq.cfg", mode: int = 0o640) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    return write_file


@pytest.fixture
def load(write: Callable[..., None]) -> Callable[..., Settings]:
    def load_text(text: str, env: Mapping[str, str] | None = None) -> Settings:
        write(text)
        return config.load("upq.cfg", env or {})

    return load_text


def faults(load: Callable[..., Settings], text: str = "", env: object = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, env)
    return caught.value.faults


# What works as it stands


def test_an_empty_file_is_a_configuration(load: Callable[..., Settings], tmp_path: Path) -> None:
    settings = load("")
    assert settings.db.url == f"sqlite:///{tmp_path}/var/upq.db"
    assert settings.paths.socket == f"{tmp_path}/var/upq.sock"
    assert settings.paths.jobs_dir == f"{tmp_path}/jobs"
    assert settings.node.name == os.uname().nodename
    assert settings.files == (settings.file,) == (f"{tmp_path}/upq.cfg",)
    assert (settings.jobs, settings.warnings) == ({}, ())


def test_the_shipped_file_names_every_shipped_job_and_no_other() -> None:
    settings = config.load(ROOT / "upq.cfg", {})
    assert settings.warnings == ()
    shipped = {path.stem for path in (ROOT / "jobs").glob("*.py")} - SHARED
    assert set(settings.jobs) == shipped | {"sha256"}
    assert settings.jobs["sha256"].command == ("sha256sum", "{path}")
    assert settings.logging.logfile == str(ROOT / "var/upq.log")


def test_the_example_of_the_first_upq_loads(
    load: Callable[..., Settings], write: Callable[..., None], tmp_path: Path
) -> None:
    for name in ("hash", "list_queue", "notify"):
        write("", f"jobs/{name}.py")
    settings = load(FIRST_UPQ.read_text())
    jobs = settings.jobs
    assert settings.db.url == "mysql+pymysql://user:password@hostname/dbname"
    assert settings.paths.socket == "/var/run/upq-incoming.sock"
    assert settings.paths.others["metadata"] == f"{tmp_path}/metadata"
    assert settings.logging.logfile == "/var/log/upq.log"
    assert jobs["new_file"].subjobs == (
        *("movefile", "hash", "createtorrent"),
        *("extract_metadata", "upload", "sf_sync"),
    )
    assert (jobs["new_file"].retries, jobs["new_file"].retry_delay_s) == (3, 0)
    assert (jobs["test"].retries, jobs["test"].retry_delay_s) == (2, 3600)
    assert jobs["test"].concurrent == 100
    assert jobs["test"].notify_fail == ("syslog",)
    assert jobs["test"].notify_success == ("syslog", "mail:test@example.org")
    assert (
        jobs["list_queue"].variables["format"] == "%(jobid)s %(jobname)s %(starttime)s %(status)s"
    )
    assert jobs["extract_metadata"].variables["maps-path"] == "maps"
    assert {job.name for job in jobs.values() if not job.missing} == {
        "hash",
        "list_queue",
        "notify",
    }
    assert len(jobs) == 16
    assert len(settings.warnings) == 13
    assert "upq.cfg:41: [job new_file] is disabled: no new_file.py in jobs_dir" in settings.warnings


# Sections


def test_every_section_is_read(load: Callable[..., Settings], tmp_path: Path) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    settings = load(
        f"""
[daemon]
detach_process = yes
pidfile = upq.pid
umask = 0o007
uid = {me}
gid = 0
grace = 5s
[logging]
loglevel = WARNING
logformat = %(asctime)s %(message)s
[paths]
socket = upq.sock
socket_chmod = 0660
state_dir = /srv/upq
uploads = ../uploads
[db]
url = postgres://upq@db.example.org/upq
debug = yes
durability = relaxed
keep_done = 1h
[listen]
tcp = [::1]:5555
max_queue = 1000
idle = 1m
[access]
read = *
admin = {me}, @root
[mail]
server = smtp.example.org
from = upq@example.org
tls = starttls
[node]
name = web-1.example
"""
    )
    assert settings.daemon == Daemon(True, f"{tmp_path}/upq.pid", 0o007, os.getuid(), 0, "", 5.0)
    assert settings.db.debug
    assert settings.logging == Logging("warning", "%(asctime)s %(message)s", "")
    assert settings.paths == Paths(
        f"{tmp_path}/upq.sock",
        0o660,
        f"{tmp_path}/jobs",
        "/srv/upq",
        {"uploads": f"{tmp_path.parent}/uploads"},
    )
    assert settings.db.url == "postgresql+psycopg://upq@db.example.org/upq"
    assert (settings.db.durability, settings.db.keep_done_s) == ("relaxed", 3600)
    assert settings.db.keep_failed_s == 90 * 86400
    assert settings.listen.tcp == ("::1", 5555)
    assert (settings.listen.max_queue, settings.listen.idle_s) == (1000, 60)
    assert settings.access == Access(("*",), ("*",), (me, "@root"))
    assert settings.mail.server == ("smtp.example.org", 25)
    assert (settings.mail.sender, settings.mail.tls) == ("upq@example.org", "starttls")
    assert settings.node.name == "web-1.example"
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("url", "full"),
    [
        ("mysql://u@h/d", "mysql+pymysql://u@h/d"),
        ("mariadb://u@h/d", "mysql+pymysql://u@h/d"),
        ("postgresql://u@h/d", "postgresql+psycopg://u@h/d"),
        ("sqlite:////srv/a.db", "sqlite:////srv/a.db"),
        ("sqlite:///a.db?timeout=5", "sqlite:///{folder}/a.db?timeout=5"),
    ],
)
def test_a_database_has_its_driver_and_an_absolute_path(
    load: Callable[..., Settings], tmp_path: Path, url: str, full: str
) -> None:
    assert load(f"[db]\nurl = {url}").db.url == full.format(folder=tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:hunter2@host/db",
        "mysql://user:hunter2@hunter2@host/db",
        "postgresql://user@/db?password=hunter2&x=1",
    ],
)
def test_a_password_is_in_no_text_about_the_settings(
    load: Callable[..., Settings], url: str
) -> None:
    settings = load(f"[db]\nurl = {url}\n[mail]\npassword = hunter2\n[job a]\npassword = hunter2")
    assert "hunter2" in settings.db.url
    assert "hunter2" not in f"{settings!r} {settings.warnings}"


def test_lines_are_read_as_configparser_does(load: Callable[..., Settings]) -> None:
    settings = load(
        "\ufeff[ job  a ]\r\n"
        "Name : x = y\r\n"
        "  # a comment\r\n"
        "more = one\r\n"
        "\ttwo\r\n"
        "\r\n"
        "  three ; four\r\n"
        "  ; a comment\r\n"
        "url = http://a:80/?a=b\r\n"
    )
    assert settings.jobs["a"].variables == {
        "name": "x = y",
        "more": "one\ntwo\nthree ; four",
        "url": "http://a:80/?a=b",
    }


# Includes and the environment


def test_includes_are_read_in_order_with_the_main_folder_as_base(
    load: Callable[..., Settings], write: Callable[..., None], tmp_path: Path
) -> None:
    write("[job c]\nenabled = no", "upq.d/20.cfg")
    write("[job b]\ncommand = true\ncwd = x", "upq.d/10.cfg")
    write("not read", "upq.d/10.cfg~")
    settings = load("[job a]\ncommand = true")
    assert list(settings.jobs) == ["a", "b", "c"]
    assert settings.jobs["b"].cwd == f"{tmp_path}/x"
    assert settings.jobs["b"].file == "upq.d/10.cfg"
    assert [os.path.relpath(file) for file in settings.files] == [
        "upq.cfg",
        "upq.d/10.cfg",
        "upq.d/20.cfg",
    ]


def test_a_fault_in_an_include_names_that_file(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    write("[job a]\n\n[job b]\nconcurrent = x", "upq.d/x.cfg")
    assert faults(load, "[job a]") == [
        "upq.d/x.cfg:1: [job a] stands in upq.cfg:1 already",
        "upq.d/x.cfg:4: concurrent: 'x' is not a whole number",
    ]


def test_the_environment_fills_in_and_overrides(load: Callable[..., Settings]) -> None:
    env = {
        "HOST": "db",
        "UPQ_LOGGING__LOGLEVEL": "debug",
        "UPQ_JOB_MY_JOB__CONCURRENT": "7",
        "UPQ_JOB_MY_JOB__OWN": "${HOST}",
        "UPQ_CONFIG": "/etc/upq/upq.cfg",
    }
    settings = load(
        "[db]\nurl = mysql://u@${HOST}/d\n"
        "[job my_job]\nconcurrent = 2\ntext = $HOST $${HOST} %(x)s",
        env,
    )
    assert settings.db.url == "mysql+pymysql://u@db/d"
    assert settings.logging.loglevel == "debug"
    assert settings.jobs["my_job"].concurrent == 7
    assert settings.jobs["my_job"].variables == {
        "concurrent": "7",
        "text": "$HOST ${HOST} %(x)s",
        "own": "${HOST}",
    }


def test_a_fault_in_the_environment_names_the_variable(load: Callable[..., Settings]) -> None:
    env = {
        "UPQ_DB__ULR": "x",
        "UPQ_DBS__URL": "x",
        "UPQ_LISTEN__IDLE": "long",
    }
    assert faults(load, "[mail]\nuser = ${NO_SUCH}", env) == [
        "upq.cfg:2: user: no environment variable NO_SUCH",
        "environment variable UPQ_DBS__URL: no section 'dbs' (did you mean db?)",
        "environment variable UPQ_DB__ULR: no setting 'ulr' in [db] (did you mean url?)",
        "environment variable UPQ_LISTEN__IDLE:"
        " idle: 'long' is not a duration such as 30s, 10m, 1h30m or 2d",
    ]


def test_a_secret_may_stand_in_a_file_of_its_own(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    write("hunter2\n", "secret")
    write("mysql://u:hunter2@h/d\n", "url")
    settings = load("[mail]\npassword_file = secret\n[db]\nurl_file = ${HERE}/url", {"HERE": "."})
    assert settings.mail.password == "hunter2"
    assert settings.db.url == "mysql+pymysql://u:hunter2@h/d"


def test_a_secret_file_that_does_not_serve_is_a_fault(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    write("x", "secret")
    assert faults(load, "[mail]\npassword = x\npassword_file = secret\n[db]\nurl_file = none") == [
        "upq.cfg:3: password_file: password is given, too",
        "upq.cfg:5: url_file: none: No such file or directory",
    ]


# Warnings


@pytest.mark.parametrize("unique", ["pw", "params", "n,pw for 1h"])
def test_a_secret_whose_digest_is_stored_is_a_warning(
    load: Callable[..., Settings], write: Callable[..., None], tmp_path: Path, unique: str
) -> None:
    job = f"[job a]\ncommand = true\nparams = n:int pw:str\nsecret = pw\nunique = {unique}\n"
    assert load(job).warnings == ()  # it stands there as it is, anyway
    vault.add_key(str(tmp_path / "keys"))
    assert load(f"{job}[db]\nkey_file = {tmp_path}/keys").warnings == (
        "upq.cfg:5: unique: a digest of pw is stored, by which a short one is guessed",
    )
    plain = job.replace(f"unique = {unique}", "unique = n")
    assert load(f"{plain}[db]\nkey_file = {tmp_path}/keys").warnings == ()


@pytest.mark.parametrize(
    "text",
    [
        "[mail]\npassword = x",
        "[db]\nurl = mysql://u:x@h/d",
        "[job a]\ncommand = true\napi_password = x",
        "[job a]\ncommand = true\nproxy = http://u:x@h/",
    ],
)
def test_a_password_that_others_can_read_is_a_warning(
    write: Callable[..., None], text: str
) -> None:
    write(text, mode=0o640)
    assert config.load("upq.cfg", {}).warnings == ()
    write(text, mode=0o644)
    (warning,) = config.load("upq.cfg", {}).warnings
    assert re.fullmatch(r"upq.cfg:\d: \w+: a password others can read .*640, not 644\)", warning)


def test_without_a_password_anybody_may_read_the_file(write: Callable[..., None]) -> None:
    write("[mail]\npassword = ${X}\nuser =\n[db]\nurl = mysql://u@h/d", mode=0o644)
    assert config.load("upq.cfg", {"X": "x"}).warnings == ()


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("[job a]\nnotify_fail = syslog\n[job notify]\nenabled = no", "2: nobody is told"),
        (
            "[job a]\nconcurent = 2",
            "2: concurent: taken as the job's own name; did you mean concurrent",
        ),
        ("[job a]\ntimoeut = 2", "2: timoeut: taken as the job's own name; did you mean timeout"),
        ("[paths]\njob_dir = x", "2: job_dir: taken as the job's own name; did you mean jobs_dir"),
        ("[access]\nadmin = nobody-here", "2: admin: nobody-here is not known on this machine"),
        ("[job a]\nsubmit = @no-such", "2: submit: @no-such is not known on this machine"),
        ("[job a]\nnotify_fail = syslog", "2: nobody is told: no job type notify is enabled"),
        ("[job a]\nsubjobs = b\n[job b]\nenabled = no", "2: subjobs: [job b] is not enabled"),
        ("[job a]\non_fail = b\n[job b]\nenabled = no", "2: on_fail: [job b] is not enabled"),
        ("[job a]\ncwd = /tmp", "2: cwd: means nothing without command"),
        ("[job a]\ncommand = x\nretry_codes = 75", "3: retry_codes: nothing is tried again"),
        ("[job a]", "1: [job a] is disabled: no a.py in jobs_dir"),
    ],
)
def test_what_is_likely_a_slip_is_a_warning(
    load: Callable[..., Settings], text: str, warning: str
) -> None:
    settings = load(text)
    assert [line for line in settings.warnings if line.startswith(f"upq.cfg:{warning}")]


def test_names_of_the_jobs_own_that_resemble_nothing_are_quiet(
    load: Callable[..., Settings],
) -> None:
    own = ("path", "format", "sort", "from", "rpcurl", "username", "maxrequests", "sizes", "ent")
    lines = "".join(f"{name} = x\n" for name in own)
    assert load(f"[paths]\nfiles = x\ntmp = y\n[job a]\ncommand = true\n{lines}").warnings == ()


def test_notifications_need_the_file_of_their_type_but_no_section(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    write("", "jobs/notify.py")
    assert load("[job a]\ncommand = true\nnotify_fail = syslog").warnings == ()


def test_a_disabled_type_needs_no_file(load: Callable[..., Settings]) -> None:
    assert load("[job a]\nenabled = no").warnings == ()


# Faults: text, where, and the words that must be in it (T25)

FAULTS = [
    # The file
    ("key = value\nother = value", 1, "stands before the first [section]"),
    ("[db\nurl = x", 1, "'[db' is not a [section]"),
    ("[]", 1, "'[]' is not a [section]"),
    ("[db]\nurl", 2, "'url' is neither [section] nor key = value"),
    ("[db]\n= x", 2, "'= x' is neither [section] nor key = value"),
    ("[db]\ndebug = no\0", 2, "has a control character"),
    ("[db]\n[mail]\n[db]", 3, "[db] stands in upq.cfg:1 already"),
    ("[job a]\n[job  a]", 2, "[job a] stands in upq.cfg:1 already"),
    ("[db]\ndebug = no\nDebug = no", 3, "debug stands in upq.cfg:2 already"),
    # Sections
    ("[pahts]", 1, "no section [pahts] (did you mean paths?)"),
    ("[jobs hash]", 1, "no section [jobs hash] (did you mean job?)"),
    ("[daemon x]", 1, "no section [daemon x] (did you mean daemon?)"),
    ("[DEFAULT]", 1, "no section [DEFAULT]"),
    ("[job]", 1, "[job] needs a type: [job hash]"),
    ("[job Hash]", 1, "job type 'Hash' is not a-z, then a-z, 0-9 and _"),
    ("[job ../a]", 1, "job type '../a' is not"),
    (f"[job {'a' * 65}]", 1, "is not a-z"),
    ("[job status]", 1, "status is a verb of the protocol and cannot be a job type"),
    ("[http]", 1, "[http]: not yet available in this version"),
    ("[pool]\nqueues = a", 1, "[pool] needs a name: [pool storage]"),
    ("[pool a b]\nqueues = a", 1, "pool 'a b' is not a name of letters, digits"),
    ("[pool a]", 1, "[pool a] has no queues"),
    ("[pool a]\nqueues =", 1, "[pool a] has no queues"),
    ("[pool a]\nqueues = a:2 b", 2, "queues: some have a weight and some have not"),
    ("[pool a]\nqueues = a:0", 2, "queues: 0 is not between 1 and 1000"),
    ("[pool a]\nqueues = a b a", 2, "queues: names the same queues twice"),
    ("[pool a]\nqueues = a {b}", 2, "queues: '{b}' is not a queue's name"),
    ("[pool a]\nqueues = a:2 b:1\nageing = 1m", 3, "ageing: is for queues in order"),
    ("[pool a]\nqueues = a\nageing = 10ms", 3, "ageing: has to be 1 s or more"),
    ("[pool a]\nqueues = a\nconcurent = 2", 3, "no setting 'concurent' in [pool a] (did you"),
    ("[tokens]\ndisk = 0", 2, "disk: 0 is not between 1 and"),
    ("[tokens]\nDisk-io = 1", 2, "disk-io: is not a name of a-z, 0-9 and _"),
    ("[tokens]\ndisk = 1\n[job a]\nneeds = disc:1", 4, "needs: no disc in [tokens] (did you"),
    (
        "[tokens]\ndisk = 1\n[job a]\nneeds = disk:2",
        4,
        "needs: disk:2 can never be met, [tokens] disk = 1",
    ),
    ("[job a]\nneeds = disk:0", 2, "needs: 0 is not between 1 and"),
    ("[tokens]\nd = 3\n[job a]\nneeds = d:1 d:2", 4, "needs: d stands there twice"),
    ("[job a]\nrate = 0/s", 2, "rate: a rate of 0 lets nothing start"),
    ("[job a]\nrate = 10/min burst 0", 2, "rate: a burst of 0 lets nothing start"),
    ("[job a]\nrate = 10/min per host", 2, "rate: per 'host' names no parameter"),
    ("[job a]\nrate = 10/min per {host", 2, "rate: '{host' has a lone brace"),
    ("[job a]\nrate = 10/min burst 2 per {host}", 2, "rate: a rate per key is even, it has no"),
    ("[job a]\nrate = 10/min per", 2, "rate: '10/min per' is not a rate such as"),
    ("[job a]\nparams = host\nrate = 1/s per {hots}", 3, "rate: no parameter 'hots' (did you"),
    ("[job a]\nparams = a\nrate = 1/s per {a}\nsecret = a", 3, "rate: a is secret, and"),
    ("[job a]\nrate = 1/s per {a}\nserial = {a}", 2, "rate: per is not possible together with"),
    (
        "[job a]\nwhen_busy = replace\nrate = 1/s per {a}",
        3,
        "rate: per is not possible together with when_busy = replace",
    ),
    ("[job a]\nrate = 10/week", 2, "rate: '10/week' is not a rate such as 100/s"),
    ("[job a]\nrate = 2000000/s", 2, "rate: '2000000/s' is more than a million a second"),
    ("[job a]\nwindow = 22:00", 2, "window: '22:00' is not a window such as 22:00-06:00"),
    ("[job a]\nwindow = 22:00-25:00", 2, "window: '22:00-25:00' is not between 00:00 and 24:00"),
    ("[job a]\nwindow = 6:00-06:00", 2, "window: '6:00-06:00' is never open; all day is"),
    ("[job a]\nwindow = mon-fry 6:00-7:00", 2, "window: 'mon-fry' is not a day such as mon"),
    ("[job a]\nwindow = 6:00-7:00 Europe/Berlim", 2, "window: no time zone 'Europe/Berlim'"),
    ("[job a]\nload_below = 0", 2, "load_below: '0' is not a load above 0"),
    ("[job a]\nmin_free = srv 20G", 2, "min_free: 'srv 20G' is not a folder and a size"),
    ("[job a]\nmin_free = /srv", 2, "min_free: '/srv' is not a folder and a size"),
    ("[job a]\nmin_free = / 900000T", 2, "min_free: / can never have 9e+05T free: it has"),
    ("[job a]\nqueue = a b", 2, "queue: 'a b' is not a queue's name: A-Z a-z 0-9"),
    ("[job a]\nqueue = a.{b", 2, "queue: 'a.{b' has a lone brace"),
    (f"[job a]\nqueue = {'a' * 256}", 2, "has more than 255 characters"),
    ("[job a]\nparams = fid\nqueue = a.{fed}", 3, "queue: no parameter 'fed' (did you mean fid?)"),
    ("[job a]\nparams = fid\nsecret = fid\nqueue = a.{fid}", 4, "queue: fid is secret, and"),
    (
        "[job a]\nsecret = pw\nsubjobs = b (c d)\n[job b]\non_done = e\n[job c]\n"
        "[job d]\n[job e]\nqueue = e.{pw}",
        9,
        "queue: pw is secret in [job a], which hands it on, and would be shown",
    ),
    (
        "[job a]\nsecret = pw\nsubjobs = (b c)\n[job b]\n[job c]\nrate = 1/s per {pw}",
        6,
        "rate: pw is secret in [job a], which hands it on, and would be shown",
    ),
    ("[autoscale a]\nmin = 1", 1, "[autoscale a]: not yet available in this version"),
    # Keys
    ("[db]\nulr = x", 2, "no setting 'ulr' in [db] (did you mean url?)"),
    ("[logging]\nlevel = x", 2, "no setting 'level' in [logging] (did you mean loglevel?)"),
    ("[mail]\nzzz = x", 2, "no setting 'zzz' in [mail]"),
    ("[listen]\ntls = yes", 2, "tls: not yet available in this version"),
    ("[node]\npools = x\n[pool y]\nqueues = a", 2, "pools: no [pool x]"),
    ("[job a]\nexecutor = fork", 2, "executor: 'fork' is none of thread, process"),
    ("[job a]\ncommand = b\nexecutor = thread", 3, "executor: a command is a process anyway"),
    ("[job a]\nmax_jobs_per_child = 0", 2, "max_jobs_per_child: 0 is not between 1 and"),
    ("[job a]\nschedule = 0 0 31 2 *", 2, "schedule: '0 0 31 2 *' is no cron expression: Bad day"),
    ("[job a]\nschedule = 5 4 * * * Europe/Berlni", 2, "(did you mean Europe/Berlin?)"),
    ("[job a]\nparams = b\nschedule = @daily", 3, "schedule: b: is missing"),
    ("[job a]\nschedule = @daily\n[schedule a]\ntype = a\ncron = @daily", 2, "[schedule a], too"),
    ("[schedule]", 1, "[schedule] needs a name"),
    ("[schedule ?]\nline = a\ncron = @daily\n[job a]", 1, "schedule '?' is not letters"),
    ("[schedule s]\ncron = @daily", 1, "[schedule s] needs type = <job type>, or a line"),
    ("[schedule s]\ntype = a\n[job a]", 1, "needs either cron = 0 3 * * * or every = 10m"),
    ("[schedule s]\ntype = a\ncron = @daily\nevery = 1m\n[job a]", 3, "needs either cron"),
    ("[schedule s]\ntype = a\nevery = 1ms\n[job a]", 3, "every: every 1ms: at least 1s"),
    ("[schedule s]\ntype = a\ncron = @reboot\n[job a]", 3, "'@reboot' is none of @hourly"),
    ("[schedule s]\ntype = a\ncron = @daily\ntimezone = Mars\n[job a]", 4, "no time zone 'Mars'"),
    ("[schedule s]\ntype = hahs\ncron = @daily\n[job hash]", 2, "(did you mean hash?)"),
    ("[schedule s]\nline = hahs a:b\ncron = @daily\n[job hash]", 2, "(did you mean hash?)"),
    ("[schedule s]\nline = status\ncron = @daily", 2, "line: 'status' submits no job"),
    ("[schedule s]\nline = a\nparams = b:c\ncron = @daily\n[job a]", 3, "line: has all"),
    ("[schedule s]\nline = a b:1 @key:2\ncron = @daily\n[job a]", 2, "line: @key: has no meaning"),
    (
        "[schedule s]\ntype = a\nparams = fid:x\ncron = @daily\n[job a]\nparams = fid:int",
        3,
        "params: fid: 'x' is not a whole number",
    ),
    ("[schedule s]\ntype = notify\ncron = @daily\n[job notify]", 2, "queued by upq itself"),
    (
        "[schedule s]\ntype = a\ncron = @daily\nmissed = never\n[job a]",
        4,
        "missed: 'never' is none",
    ),
    # Values
    ("[job a]\nenabled = maybe", 2, "enabled: 'maybe' is not yes or no"),
    (
        "[job a]\nenabled = yes\n  concurrent = 2",
        2,
        "(an indented line goes on with the one above)",
    ),
    ("[job a]\nconcurrent = 2 ; two", 2, "'2 ; two' is not a whole number (a comment needs a line"),
    (
        "[job a]\nconcurrent = 0",
        2,
        "concurrent: at least 1: every job goes through its queue; `upq-cli --wait`",
    ),
    ("[job a]\nconcurrent = 10001", 2, "concurrent: 10001 is not between 1 and 10000"),
    ("[job a]\nretries = -1", 2, "retries: -1 is not between 0 and 9999"),
    ("[job a]\ntimeout = 5 minutes", 2, "timeout: '5 minutes' is not a duration"),
    ("[job a]\nretry_backoff = 0.5", 2, "retry_backoff: '0.5' is not a number from 1 to 10"),
    ("[job a]\npriority = hihg", 2, "priority: 'hihg' is not high, default, low or a whole number"),
    ("[job a]\noutput_limit = 1X", 2, "output_limit: '1X' is not a size"),
    ("[job a]\nsuccess_codes = 0 256", 2, "success_codes: 256 is not between 0 and 255"),
    ("[job a]\nenv = L-A", 2, "env: 'L-A' is not NAME or NAME=value"),
    ("[job a]\nenv = UPQ_JOB_TOKEN=1", 2, "env: UPQ_JOB_TOKEN is set by upq itself"),
    ("[job a]\nenv = A='b", 2, "env: No closing quotation"),
    ("[job a]\nsubmit = a;b", 2, "submit: 'a;b' is not a user, @group or *"),
    (
        "[logging]\nloglevel = inof",
        2,
        "loglevel: 'inof' is none of debug, info, warning, error, critical (did you mean info?)",
    ),
    ("[logging]\nlogformat = hello", 2, "logformat: not a log format: Invalid format 'hello'"),
    ("[logging]\nlogformat = %(mesage)s", 2, "not found in record: 'mesage'"),
    ("[logging]\nlogformat = %(asctime)s", 2, "logformat: %(message)s is missing"),
    ("[logging]\nlogformat = %(message)s %", 2, "logformat: not a log format: "),
    ("[daemon]\numask = 9", 2, "umask: '9' is not an octal mode"),
    ("[daemon]\nuid = nobody-here", 2, "uid: no user 'nobody-here' on this machine"),
    ("[daemon]\ngid = nobody-here", 2, "gid: no group 'nobody-here' on this machine"),
    ("[listen]\nidle = 0", 2, "idle: has to be above 0"),
    ("[listen]\nmax_connections = 0", 2, "max_connections: 0 is not between 1 and"),
    ("[listen]\ntcp = 5555", 2, "tcp: '5555' is not host:port"),
    ("[listen]\ntcp = localhost:70000", 2, "tcp: 'localhost:70000' is not host:port"),
    (
        "[listen]\ntcp = 0.0.0.0:5555",
        2,
        "is not on this machine (127.0.0.1, ::1, localhost);"
        " other addresses need TLS and tokens: not yet available",
    ),
    ("[listen]\ntcp = example.org:5555", 2, "is not on this machine"),
    ("[mail]\nfrom = a@x\n Bcc: b@y", 2, "from: has to be one line"),
    ("[node]\nname = a b", 2, "name: 'a b' is not a name of letters"),
    (f"[paths]\nsocket = /{'x' * 107}", 2, "is longer than 107 bytes"),
    (f"[paths]\nstate_dir = /{'x' * 99}", 2, "is longer than 107 bytes"),
    ("[db]\nurl = upq.db", 2, "url: begins with none of sqlite:///, mysql://, postgresql://"),
    ("[db]\nurl = oracle://u:p@h/d", 2, "url: no database 'oracle'"),
    ("[db]\nurl = postgresql+psycopg2://h/d", 2, "(did you mean postgresql+psycopg?)"),
    ("[db]\nurl = sqlite://", 2, "url: SQLite needs a file"),
    ("[db]\nurl = sqlite:///:memory:", 2, "url: SQLite needs a file"),
    # Commands and parameters
    ("[job a]\ncommand = {x}", 2, "command: the program itself cannot be a {placeholder}"),
    (
        "[job a]\ncommand = sh -c 'echo {x}'",
        2,
        "command: a {placeholder} in a shell's script would run as code",
    ),
    ("[job a]\ncommand = awk '{print $1}' {f}", 2, "has a lone brace; write {{ or }}"),
    ("[job a]\ncommand = echo 'x", 2, "command: No closing quotation"),
    ("[job a]\nparams = fid:itn", 2, "params: fid: no type 'itn' (did you mean int?)"),
    (
        "[job a]\nparams = path:path\ncommand = cat {paht}",
        3,
        "command: no parameter 'paht' (did you mean path?)",
    ),
    ("[job a]\nparams = a\ncommand = x\nstdin = {b}", 4, "stdin: no parameter 'b'"),
    ("[job a]\nparams = a\ncommand = x\nenv = TOKEN={b}", 4, "env: no parameter 'b'"),
    ("[job a]\nparams = a\ncommand = x\ncwd = /srv/{b}", 4, "cwd: no parameter 'b'"),
    ("[job a]\nparams = a\ncommand = x\ncwd = {a}", 4, "cwd: begins with {a}, which has to be a"),
    ("[job a]\ncommand = x {a}\nstdin = a", 3, "stdin: write {a} for the value of the parameter"),
    ("[job a]\ncommand = x\nstdin = {", 3, "stdin: '{' has a lone brace"),
    ("[job a]\ncommand = x\nenv = A={", 3, "env: '{' has a lone brace"),
    ("[job a]\nparams = n:int=many", 2, "params: n: the default 'many' is not a whole number"),
    ("[job a]\ncommand = x\nretry_codes = 0", 3, "retry_codes: 0 is in success_codes, too"),
    (
        "[job a]\ncommand = x\nretry_codes = 7\nretries = 1\nabort_codes = 64,7",
        5,
        "abort_codes: 7 is in retry_codes, too",
    ),
    ("[job a]\ncommand = x\nabort_codes = 256", 3, "abort_codes: 256 is not between 0 and 255"),
    ("[job a]\ncommand = x\nnice = -5", 3, "nice: -5 is not between 0 and 19"),
    ("[job a]\ncommand = x\nionice = realtime", 3, "ionice: 'realtime' is not idle, best-effort"),
    ("[job a]\ncommand = x\nmemory_limit = 100K", 3, "memory_limit: '100K' can never be met"),
    ("[job a]\ncommand = x\nmemory_max = 10K", 3, "memory_max: '10K' can never be met"),
    ("[job a]\ncommand = x\ncpu_quota = 0.5%", 3, "cpu_quota: '0.5%' can never be met"),
    ("[job a]\ncommand = x\ncpu_quota = 50", 3, "cpu_quota: '50' is not a share of one processor"),
    ("[job a]\ncommand = x\ncpu_limit = 1ms", 3, "cpu_limit: '1ms' can never be met"),
    ("[job a]\ncommand = x\nopen_files = 3", 3, "open_files: 3 is not between 8 and"),
    ("[job a]\ncommand = x\nprogress_fd = 2", 3, "progress_fd: 2 is not between 3 and 9"),
    (
        "[job a]\ncommand = x\nprogress = stdout\nprogress_fd = 3",
        4,
        "progress_fd: progress = stdout is given, too",
    ),
    ("[job a]\nparams = pin\nsecret = pni", 3, "secret: no parameter 'pni' (did you mean pin?)"),
    # Notifications
    (
        "[job a]\nnotify_fail = webhook:ftp://x/hidden",
        2,
        "notify_fail: webhook:ftp://x/***: not http://host... or https://host...",
    ),
    ("[job a]\nnotify_fail = webhook:https://u:pw@x/", 2, "without user and password"),
    ("[job a]\nnotify_fail = webhook:https://x:99999", 2, "Port out of range"),
    (
        "[job a]\nnotify_success = webhook:http://169.254.169.254/hidden",
        2,
        "webhook:http://169.254.169.254/***: 169.254.169.254 is not public: [webhook] allow",
    ),
    ("[job a]\nnotify_fail = slak:/hidden/x", 2, "notify_fail: 'slak'... is no target"),
    ("[webhook]\nallow = 10.0.0.1/8", 2, "allow: 10.0.0.1/8 has host bits set"),
    ("[webhook]\nallow = localhost", 2, "networks are 10.0.0.0/8 or fd00::/8"),
    ("[access]\nnotify = male:*@x", 2, "notify: 'male:*@x' is no pattern of targets"),
    (
        "[job a]\nnotify_fail = retry:3\nnotify_every = 1h",
        3,
        "notify_every: nobody to tell, notify_fail is empty",
    ),
    ("[job a]\nalert_queue_age = 1h", 2, "alert_queue_age: nobody to tell"),
    ("[job a]\nnotify_fail = syslog\nnotify_after = 0", 3, "0 is not between 1 and"),
    (
        "[job notify]\nnotify_fail = syslog\nalert_no_success = 1h",
        3,
        "alert_no_success: a notification tells nobody of itself",
    ),
    ("[job a]\nnotify_fail = sylog", 2, "notify_fail: 'sylog' is no target (did you mean syslog?)"),
    ("[job a]\nnotify_fail = mail", 2, "no mail address"),
    ("[job a]\nnotify_fail = mail:a@", 2, "'a@' is not a mail address"),
    ("[job a]\nnotify_fail = syslog:deamon.err", 2, "no syslog facility 'deamon'"),
    (
        "[job a]\nnotify_fail = retry:x",
        2,
        "notify_fail: 'retry:x' is not retry:3 or retrywait:3|1h",
    ),
    ("[job a]\nnotify_fail = retrywait:3|soon", 2, "notify_fail: 'soon' is not a duration"),
    ("[job a]\nnotify_success = retry:3", 2, "notify_success: retry is for failures"),
    # Chains
    (
        "[job a]\nsubjobs = hsah\n[job hash]",
        2,
        "subjobs: no section [job hsah] (did you mean hash?)",
    ),
    ("[job a]\nsubjobs = a", 2, "subjobs: go round: a -> a"),
    (
        "[job c]\nsubjobs = a\n[job a]\nsubjobs = b\n[job b]\nsubjobs = a",
        4,
        "go round: a -> b -> a",
    ),
    ("[job a]\nsubjobs = b (c\n[job b]\n[job c]", 2, "subjobs: ( without )"),
    ("[job a]\nsubjobs = b)\n[job b]", 2, "subjobs: ) without ("),
    ("[job a]\nsubjobs = b ()\n[job b]", 2, "subjobs: () is empty"),
    ("[job a]\nsubjobs = (b (c))\n[job b]\n[job c]", 2, "( stands inside another group"),
    ("[job a]\nsubjobs = (b c b)\n[job b]\n[job c]", 2, "b stands twice in one group"),
    (
        "[job a]\nsubjobs = (b c) (b c)\n[job b]\n[job c]",
        2,
        "after (b c) comes the one job that joins it",
    ),
    (
        "[job a]\nsubjobs = b (c hsah)\n[job b]\n[job c]\n[job hash]",
        2,
        "subjobs: no section [job hsah] (did you mean hash?)",
    ),
    ("[job a]\nsubjobs = (b c)\n[job b]\n[job c]\nsubjobs = a", 2, "go round: a -> c -> a"),
    ("[job a]\non_fail = b", 2, "on_fail: no section [job b]"),
    ("[job a]\non_done = b", 2, "on_done: no section [job b]"),
    ("[job a]\non_done = (b a)\n[job b]", 2, "groups ( ) are for subjobs"),
    ("[job a]\non_fail = a", 2, "on_fail: go round: a -> a"),
    ("[job a]\nsubjobs = b\n[job b]\non_fail = a", 2, "subjobs: go round: a -> b -> a"),
    ("[job b]\non_fail = a\n[job a]\non_done = b", 2, "on_fail: go round: b -> a -> b"),
    ("[job a]\non_fail = notify\n[job notify]", 2, "on_fail: notify is queued by upq itself"),
    ("[job a]\ndelay = soon", 2, "delay: 'soon' is not a duration"),
    ("[job a]\ndelay = {minutes}x", 2, "delay: '1x' is not a duration"),
    ("[job a]\ndelay = {minutes}m}", 2, "lone brace"),
    ("[job a]\nparams = up\ndelay = {ups}", 3, "delay: no parameter 'ups' (did you mean up?)"),
    (
        "[job a]\nparams = up\nsecret = up\ndelay = {up}",
        4,
        "delay: up is secret, and the time of a start is shown",
    ),
]


def test_urls_of_services_need_the_extra_which_is_told_where_they_stand(
    load: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[job a]\nretries = 1\nnotify_fail = syslog slack://hidden/token\n[job notify]"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert faults(load, text) == [
        "upq.cfg:3: notify_fail: slack://***: needs the extra `notify`: pip install 'upq[notify]'"
    ]


def test_urls_of_services_are_read_by_the_library_only_when_they_are_checked(
    write: Callable[..., None],
) -> None:
    write("[job a]\nnotify_success = ntfy://host/topic discord://hidden\n[job notify]")
    assert config.load("upq.cfg", {}).jobs["a"].notify_success[1] == "discord://hidden"
    with pytest.raises(ConfigError) as caught:
        config.load("upq.cfg", {}, thorough=True)
    assert caught.value.faults == [
        "upq.cfg:2: notify_success: discord://***: the notification library (apprise) cannot read"
        " this URL"
    ]


def test_to_read_urls_of_services_does_not_load_the_library(write: Callable[..., None]) -> None:
    write("[job a]\nnotify_fail = ntfy://host/topic\n[job notify]")
    code = "import sys, upq.config as c; c.load('upq.cfg'); print('apprise' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert done.stdout == b"False\n"


def test_targets_may_stand_in_a_file(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    write("ntfy://host/topic\nsyslog\n", "targets")
    jobs = load("[job a]\nnotify_fail_file = targets\n[job notify]").jobs
    assert jobs["a"].notify_fail == ("ntfy://host/topic", "syslog")
    assert "ntfy" not in repr(jobs["a"])


def test_a_target_others_can_read_is_warned_of(write: Callable[..., None]) -> None:
    write("[job a]\nnotify_fail = slack://a/b/c\n[job notify]", mode=0o644)
    warned = [text for text in config.load("upq.cfg", {}).warnings if "others can read" in text]
    assert len(warned) == 1


@pytest.mark.parametrize(("text", "line", "words"), FAULTS, ids=lambda value: str(value)[:40])
def test_each_fault_is_told_once_with_file_and_line(
    load: Callable[..., Settings], text: str, line: int, words: str
) -> None:
    (fault,) = faults(load, text)
    assert fault.startswith(f"upq.cfg:{line}: ")
    assert words in fault


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_can_be_a_job_type(load: Callable[..., Settings], verb: str) -> None:
    assert "verb of the protocol" in faults(load, f"[job {verb}]")[0]


def test_all_faults_come_in_one_pass_in_the_order_of_the_file(
    load: Callable[..., Settings],
) -> None:
    lines = [
        "nonsense",
        "[job status]",
        "concurrent = 0",
        "[db]",
        "debug = perhaps",
        "debug = no",
        "[job a]",
        "subjobs = b a c",
        "[job c]",
        "subjobs = a",
        "enable",
        "[http]",
    ]
    found = [int(fault.split(":")[1]) for fault in faults(load, "\n".join(lines))]
    assert found == [1, 2, 3, 5, 6, 8, 8, 8, 11, 12]


def test_a_refused_url_is_not_repeated(load: Callable[..., Settings]) -> None:
    for url in ("user:hunter2@host/db", "oracle://user:hunter2@host/db"):
        assert "hunter2" not in faults(load, f"[db]\nurl = {url}")[0]


def test_a_file_that_cannot_be_read_is_one_fault(
    write: Callable[..., None], tmp_path: Path
) -> None:
    write("[db]\n\n\ndebug = no")
    (tmp_path / "latin.cfg").write_bytes(b"[mail]\nfrom = \xe4\n")
    (tmp_path / "folder.cfg").mkdir()
    (tmp_path / "loop.cfg").symlink_to("loop.cfg")
    for name, fault in {
        "none.cfg": "none.cfg:1: cannot be read: No such file or directory",
        "folder.cfg": "folder.cfg:1: cannot be read: Is a directory",
        "loop.cfg": "loop.cfg:1: cannot be read: Too many levels of symbolic links",
        "latin.cfg": "latin.cfg:2: is not UTF-8",
    }.items():
        with pytest.raises(ConfigError) as caught:
            config.load(name, {})
        assert caught.value.faults == [fault]
        assert caught.value.exit_status == 78


# The reference


def test_the_reference_page_is_what_the_declarations_say() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == config.reference(), "make it anew: python -m upq.config > docs/configuration.md"


def test_each_setting_is_described_on_one_line() -> None:
    lines = config.describe().splitlines()
    assert any(line.startswith("[listen] idle = 5m ") for line in lines)
    assert len(lines) == sum(
        len(declared(section)) for section in (*SECTIONS.values(), *OTHER_SECTIONS.values())
    )


# What it costs


@pytest.mark.alone
def test_fifty_job_types_load_in_twenty_milliseconds(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    section = (
        "[job j{0}]\nconcurrent = 2\ntimeout = 1h\nparams = path:path size:int=1\n"
        "command = resize {{path}} {{size}}\nnotify_fail = mail:a@x.org syslog\n"
    )
    write("".join(section.format(number) for number in range(50)) + "[job notify]\n")
    took = []
    for _ in range(10):
        start = time.process_time()
        config.load("upq.cfg", {})
        took.append(time.process_time() - start)
    assert min(took) < 0.020


def test_reading_the_configuration_imports_the_standard_library_only() -> None:
    code = (
        "import sys; import upq.config;"
        "print({n.partition('.')[0] for n in sys.modules} - sys.stdlib_module_names)"
    )
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert set(ast.literal_eval(done.stdout)) == {"__main__", "upq"}
