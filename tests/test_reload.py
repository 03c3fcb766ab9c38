"""What a reload takes over, what it tells of it, and what it leaves alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import ROOT, Daemon, until
from upq import config
from upq.difference import changes, code_of

HOLD = "def run(self):\n    note('start', self.jobid)\n    gate('go')\n    return 'old'"
BASE = "[job echo]\n[job hold]\nconcurrent = 2\n"


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    made = Daemon(short_tmp, BASE, echo="def run(self):\n    return 'old'", hold=HOLD)
    with made:
        yield made


def cli(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "upq-cli.py"), "-s", str(daemon.folder / "s"), *words],
        capture_output=True, text=True, check=False, timeout=30, cwd="/",
    )  # fmt: skip


def texts(daemon: Daemon, config: str) -> list[str]:
    """What a reload of this configuration tells."""
    daemon.configure(config)
    return [change["text"] for change in daemon.ask("reload")["changes"]]


def test_it_tells_what_has_changed(daemon: Daemon) -> None:
    assert texts(daemon, BASE) == []
    assert texts(
        daemon,
        "[db]\nkeep_done = 1d\n[job echo]\nretries = 3\n[job newcomer]\ncommand = true\n"
        "[schedule nightly]\nline = echo\ncron = 0 3 * * *\n",
    ) == [
        "[db] keep_done: (default) -> 1d",
        "[job echo] retries: (default) -> 3",
        "[job hold] removed",
        "[job newcomer] added",
        "[schedule nightly] added",
    ]
    daemon.add_job("echo", "def run(self):\n    return 'new'")
    (daemon.folder / "jobs/more.py").write_text("x = 1\n")
    assert texts(daemon, BASE.replace("echo]", "echo]\nretries = 4")) == [
        "[db] keep_done: 1d -> (default)",
        "[job echo] retries: 3 -> 4",
        "[job hold] added",
        "[job newcomer] removed",
        "[schedule nightly] removed",
        "jobs/echo.py changed",
        "jobs/more.py added",
    ]
    assert daemon.run("echo")["result"] == "new"
    assert "reload: [job echo] retries: 3 -> 4" in daemon.log


def test_it_tells_what_needs_a_restart_each_time(daemon: Daemon) -> None:
    daemon.config.write_text(
        daemon.config.read_text().replace("[paths]\nsocket = s", "[paths]\nsocket = elsewhere")
        + "[listen]\nmax_queue = 5\nidle = 1m\n"
    )
    told = daemon.ask("reload")
    assert [change["text"] for change in told["changes"]] == [
        "[listen] idle: (default) -> 1m (needs a restart)",
        "[listen] max_queue: (default) -> 5",
        "[paths] socket: s -> elsewhere (needs a restart)",
    ]
    assert told["warnings"] == ["[listen] idle needs a restart", "[paths] socket needs a restart"]
    again = daemon.ask("reload")
    assert (again["changes"], again["warnings"]) == ([], told["warnings"])


def test_a_broken_file_changes_nothing_and_every_fault_is_told(daemon: Daemon) -> None:
    daemon.forgiven = ["not reloaded"]
    held = daemon.submit("hold")
    daemon.until_noted(f"start {held}")
    daemon.configure(
        "[job echo]\nretries = many\n[job newcomer]\ncommand = true\n"
        "[schedule a]\nline = ehco\ncron = 0 0 31 2 *\n"
    )
    file, lines = str(daemon.config), daemon.config.read_text().splitlines()
    faults = [
        f"{file}:{lines.index('retries = many') + 1}: retries: 'many' is not a whole number",
        f"{file}:{lines.index('line = ehco') + 1}: line: no section [job ehco]",
        f"{file}:{lines.index('cron = 0 0 31 2 *') + 1}: cron: '0 0 31 2 *' is no cron expression",
    ]
    shown = cli(daemon, "reload")
    assert shown.returncode == 1
    first, *told = shown.stderr.splitlines()
    assert first == "ERR refused the old configuration stays:"
    assert len(told) == 3
    for fault, line in zip(faults, told, strict=True):
        assert line.startswith(fault)
        assert f"not reloaded, the old configuration stays: {fault}" in daemon.log
    before = daemon.log.count("not reloaded")
    daemon.signal(signal.SIGHUP)
    until(lambda: daemon.log.count("not reloaded") == before + 3)
    assert daemon.say("newcomer").startswith("ERR unknown_command")
    assert daemon.ask("schedules") == {"schedules": []}
    daemon.open_gate()
    assert daemon.wait(held)["state"] == daemon.run("hold")["state"] == "done"


def test_concurrency_goes_up_and_down_around_running_jobs(daemon: Daemon) -> None:
    ids = [daemon.submit("hold") for _ in range(6)]

    def running() -> int:
        return sum(daemon.job(id)["state"] == "running" for id in ids)

    until(lambda: running() == 2)
    assert texts(daemon, BASE.replace("= 2", "= 4")) == ["[job hold] concurrent: 2 -> 4"]
    until(lambda: running() == 4)
    daemon.add_job("hold", HOLD.replace("old", "new"))
    assert texts(daemon, BASE.replace("= 2", "= 1")) == [
        "[job hold] concurrent: 4 -> 1",
        "jobs/hold.py changed",
    ]
    assert running() == 4, "what runs is left alone"
    daemon.open_gate()
    results = [daemon.wait(id)["result"] for id in ids]
    assert sorted(results) == ["new"] * 2 + ["old"] * 4
    (queue,) = [q for q in daemon.ask("queues")["queues"] if q["queue"] == "hold"]
    assert queue["concurrent"] == 1


def test_a_class_that_breaks_is_told_by_the_reload(daemon: Daemon) -> None:
    daemon.forgiven = ["is broken"]
    (daemon.folder / "jobs/echo.py").write_text("1 / 0\n")
    told = daemon.ask("reload")
    assert [change["text"] for change in told["changes"]] == ["jobs/echo.py changed"]
    (warning,) = told["warnings"]
    assert warning.startswith("[job echo] is broken: ") and "ZeroDivisionError" in warning


def test_people_read_it(daemon: Daemon) -> None:
    assert cli(daemon, "reload").stdout == "nothing has changed\n"
    daemon.configure(BASE + "[job gone]\n[paths]\nsocket_chmod = 600\n")
    shown = cli(daemon, "reload")
    *lines, warning, restart = shown.stdout.splitlines()
    assert lines == [
        "[paths] socket_chmod: (default) -> 600 (needs a restart)",
        "[job gone] added",
    ]
    assert warning.startswith("warning: ") and "[job gone] is disabled" in warning
    assert restart == "warning: [paths] socket_chmod needs a restart"


# The difference


def difference(tmp_path: Path, old: str, new: str) -> list[str]:
    loaded = []
    for text in (old, new):
        (tmp_path / "upq.cfg").write_text(text)
        (tmp_path / "upq.cfg").chmod(0o600)
        loaded.append(config.load(tmp_path / "upq.cfg", {"PASSWORD": "sesame"}))
    return [change["text"] for change in changes(*loaded)]


@pytest.mark.parametrize(
    ("section", "old", "new", "told"),
    [
        ("mail", "password = sesame", "password = simsim", "password: *** -> ***"),
        ("mail", "", "password = ${PASSWORD}", "password: (default) -> ***"),
        ("mail", "", "password_file = secret", "password: (default) -> ***"),
        ("db", "", "url = mysql://upq:sesame@db/upq",
         "url: (default) -> mysql://upq:***@db/upq (needs a restart)"),
        ("job a", "", "api_key = sesame", "api_key: (default) -> ***"),
        ("job a", "", "mirror = https://me:sesame@x.org/",
         "mirror: (default) -> https://me:***@x.org/"),
        ("job a", "command = true", "command = true\nenv = A=sesame B='a sesame'",
         "env: (default) -> A=*** B=***"),
        ("job a", "secret = pin", "secret = pin\nparams = pin=sesame", "params: (default) -> ***"),
        ("job a", "concurrent = 1", "concurrent = 2", "concurrent: 1 -> 2"),
    ],
)  # fmt: skip
def test_secrets_are_masked(tmp_path: Path, section: str, old: str, new: str, told: str) -> None:
    (tmp_path / "secret").write_text("sesame")
    found = difference(tmp_path, f"[{section}]\n{old}\n", f"[{section}]\n{new}\n")
    assert found == [f"[{section}] {told}"]


def test_a_secret_of_a_schedule_is_masked(tmp_path: Path) -> None:
    text = "[job a]\nsecret = pin\n[schedule s]\ntype = a\nparams = pin:{}\ncron = @daily\n"
    found = difference(tmp_path, text.format("sesame"), text.format("simsim"))
    assert found == ["[schedule s] params: *** -> ***"]


def test_a_password_that_changes_in_its_file_is_told(tmp_path: Path) -> None:
    text = "[mail]\npassword_file = secret\n"
    (tmp_path / "upq.cfg").write_text(text)
    loaded = []
    for password in "sesame", "simsim":
        (tmp_path / "secret").write_text(password)
        loaded.append(config.load(tmp_path / "upq.cfg", {}))
    assert [change["text"] for change in changes(*loaded)] == ["[mail] password: *** -> ***"]


def test_code_is_compared_by_what_is_in_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    before = code_of(str(tmp_path))
    (tmp_path / "a.py").touch()
    assert code_of(str(tmp_path)) == before
    (tmp_path / "a.py").write_text("b")
    assert code_of(str(tmp_path)) != before
