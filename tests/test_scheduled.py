"""Schedules of real daemons: what they queue, what becomes of it, and what is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import unavailable
from tests.daemons import Daemon, until
from tests.test_reload import cli
from upq import when

SECONDLY = "[schedule tick]\nline = echo fid:7\ncron = * * * * * *\nmissed = all\n"
ECHO = {"echo": "def run(self):\n    return self.jobdata"}


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    made = Daemon(short_tmp, **ECHO)
    yield made
    made.kill9()


def ticks(daemon: Daemon, name: str = "tick") -> list[int]:
    """The seconds for which there are jobs of a schedule, in order."""
    jobs = daemon.ask("jobs limit:1000")["jobs"]
    mine = [job for job in jobs if job["submitter"] == f"schedule {name}"]
    return sorted(when.instant(job["run_at"]) // 1_000_000 for job in mine)


def blocked(daemon: Daemon, type: str) -> list[dict[str, Any]]:
    return list(daemon.ask(f"jobs type:{type} state:blocked")["jobs"])


def are_consecutive(seconds: list[int]) -> bool:
    return seconds == list(range(seconds[0], seconds[-1] + 1))


def test_its_jobs_run_on_time_and_tell_where_they_come_from(daemon: Daemon) -> None:
    daemon.configure("[job echo]\nparams = fid:int\n" + SECONDLY)
    with daemon:
        until(lambda: len(ticks(daemon)) >= 4)
        assert are_consecutive(ticks(daemon))
        job = daemon.ask("jobs limit:1 state:done")["jobs"][0]
        assert job["params"] == job["result"] == {"fid": 7}
        assert job["submitter"] == "schedule tick"
        history = daemon.ask(f"show {job['id']}")["history"]
        assert history[0]["who"] == "schedule tick"
        assert 0 <= when.instant(job["created_at"]) - when.instant(job["run_at"]) < 5_000_000


def test_what_is_listed(daemon: Daemon) -> None:
    daemon.configure(
        "[job echo]\nsecret = pin\n[job other]\ncommand = true\n"
        "schedule = 30 2 * * 1-5 Europe/Berlin\n"
        "[schedule tick]\nline = echo pin:sesame\nevery = 1s\n"
    )
    with daemon:
        until(lambda: ticks(daemon))
        other, tick = daemon.ask("schedules")["schedules"]
        assert (other["name"], other["type"]) == ("other", "other")
        assert (other["expression"], other["timezone"]) == ("30 2 * * 1-5", "Europe/Berlin")
        assert other["english"] == "At 02:30 on Monday through Friday"
        assert (other["last_at"], other["last_job"], other["last_state"]) == (None, None, None)
        runs = [when.instant(at) for at in other["next"]]
        assert len(runs) == 3 and runs == sorted(runs) and runs[0] > when.now()
        assert (tick["params"], tick["english"], tick["timezone"]) == (
            {"pin": "***"},
            "Every 1s",
            "",
        )
        assert daemon.job(tick["last_job"])["submitter"] == "schedule tick"
        assert tick["last_state"] in ("queued", "running", "done")
        line = cli(daemon, "schedules").stdout.splitlines()[0].split("\t")
        assert line[:5] == ["other", "other", "30 2 * * 1-5", "Europe/Berlin", other["english"]]
        assert line[8] == ", ".join(other["next"])


def test_a_daemon_that_was_killed_makes_up_for_what_it_missed(daemon: Daemon) -> None:
    daemon.configure("[job echo]\n" + SECONDLY)
    with daemon:
        until(lambda: len(ticks(daemon)) >= 2)
        daemon.kill9()
        time.sleep(3)
        daemon.start()
        first = len(ticks(daemon))
        until(lambda: len(ticks(daemon)) >= first + 2)
        assert are_consecutive(ticks(daemon))


def test_jobs_of_a_type_that_cannot_run_wait(daemon: Daemon) -> None:
    sections = "".join(
        f"[schedule {name}]\ntype = {name}\nevery = 1s\n" for name in ("off", "bad", "echo")
    )
    daemon.configure(f"[job echo]\n[job off]\ncommand = true\nenabled = no\n[job bad]\n{sections}")
    (daemon.folder / "jobs/bad.py").write_text("1 / 0\n")
    daemon.forgiven = ["is broken"]
    with daemon:
        until(lambda: daemon.ask("queues")["queues"])
        daemon.ask("pause echo")
        for name in ("off", "bad", "echo"):
            until(lambda name=name: len(ticks(daemon, name)) >= 2)  # type: ignore[misc]
            waiting = until(partial(blocked, daemon, name))
            assert len(waiting) >= 2 or name == "echo"
            assert waiting[0]["reason"]
        daemon.ask("resume echo")
        daemon.wait(waiting[0]["id"])


def test_a_job_that_is_late_for_its_schedule_expires(daemon: Daemon) -> None:
    daemon.configure("[job echo]\n[schedule tick]\nline = echo @expires:1s\nevery = 1s\n")
    with daemon:
        until(lambda: daemon.ask("queues")["queues"])
        daemon.ask("pause echo")
        late = until(lambda: daemon.ask("jobs type:echo state:expired")["jobs"])
        assert late[0]["submitter"] == "schedule tick"
    daemon.configure("[job echo]\n[schedule tick]\nline = echo @in:2s @expires:1s\nevery = 1s\n")
    assert ": line: @expires: that is before" in daemon.attempt("--check").stderr


def test_what_a_schedule_has_wrong_is_told_by_the_check(daemon: Daemon) -> None:
    daemon.add_job("lister", "queued = False")
    daemon.configure("[job lister]\nschedule = @daily\n")
    done = daemon.attempt("--check")
    assert done.returncode == 78
    assert "upq.cfg:" in done.stdout and "schedule lister: lister answers" in done.stdout
    daemon.configure("[job echo]\nschedule = 0 0 31 2 *\n")
    done = daemon.attempt("--check")
    assert done.returncode == 78
    assert ": schedule: '0 0 31 2 *' is no cron expression: Bad day-of-month" in done.stderr


def test_a_failure_is_told_as_for_any_job(daemon: Daemon) -> None:
    daemon.add_job("notify", "def run(self):\n    note('told', self.jobdata['job']['submitter'])")
    daemon.configure(
        "[job fails]\ncommand = false\nschedule = every 1s\nnotify_fail = syslog\n[job notify]\n"
    )
    with daemon:
        daemon.until_noted("told schedule fails")


@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
def test_two_daemons_and_a_dead_one_fire_each_second_once(
    kind: str, request: pytest.FixtureRequest, short_tmp: Path
) -> None:
    server = request.getfixturevalue(kind)
    if server is None:
        unavailable(kind)
    with server.database() as url:
        daemons = []
        for name in "a", "b":
            (short_tmp / name).mkdir()
            text = f"[node]\nname = {name}\n[job echo]\n{SECONDLY}"
            daemons.append(Daemon(short_tmp / name, text, url.replace("+pymysql", "").replace(
                "+psycopg", ""), **ECHO))  # fmt: skip
        one, other = daemons
        with one, other:
            until(lambda: len(ticks(one)) >= 3)
            other.kill9()
            seen = len(ticks(one))
            until(lambda: len(ticks(one)) >= seen + 3)
            other.start()
            seen = len(ticks(one))
            until(lambda: len(ticks(one)) >= seen + 3)
            one.kill9()
            seen = len(ticks(other))
            until(lambda: len(ticks(other)) >= seen + 3)
            assert are_consecutive(ticks(other))
