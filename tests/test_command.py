"""Command jobs, with real programs: what they are given, how they end, what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from tests.jobkit import FakeDesk
from upq import params, trees
from upq.command import STDOUT, CommandJob, Pipes, command_type
from upq.errors import Abort, BadParams
from upq.spawn import Limits
from upq.trees import Lifeline, Tree, end_orphans

#: 1024 for the whole of test T16.
OUTPUT_MIB = int(os.environ.get("UPQ_TEST_OUTPUT_MIB", "256"))
MIB = 1 << 20


def job(line: str, data: dict[str, Any] | None = None, **facts: Any) -> CommandJob:
    made = command_type("cmd", params.split_command(line), **facts)
    return made("cmd", data or {}, jobid=17)


def shell(script: str, *args: str, **facts: Any) -> CommandJob:
    """A job that runs a script of ours; it sees the args as $0, $1, ..."""
    return command_type("cmd", ("sh", "-c", script, *args), **facts)("cmd", {}, jobid=17)


def text(done: CommandJob) -> str:
    output = done.captured()
    return output.text if output else ""


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pids_in(file: Path, count: int) -> list[int]:
    """The pids that a command has written to a file, one a line."""
    wait_for(lambda: file.exists() and file.read_text().count("\n") >= count)
    return [int(line) for line in file.read_text().split()]


def time_counts_after(monkeypatch: pytest.MonkeyPatch, begun: Callable[[], object]) -> None:
    """Have the timeouts of commands count only from when `begun` returns."""
    follow = CommandJob._follow

    def wait(running: CommandJob, pid: int, pipes: Pipes) -> None:
        begun()
        follow(running, pid, pipes)

    monkeypatch.setattr(CommandJob, "_follow", wait)


def in_thread(running: CommandJob) -> threading.Thread:
    thread = threading.Thread(target=running.run)
    thread.start()
    return thread


@pytest.fixture
def token() -> Iterator[int]:
    """A claim's token; whatever carries it is gone after the test."""
    number = random.getrandbits(63)
    yield number
    end_orphans({number}, grace_s=0)


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


# How a command ends.


def test_exit_code_zero_is_success() -> None:
    done = job("true")
    assert done.run() is True
    assert (done.result, done.msgstr, done.ended_by) == ({"exit_code": 0}, "", None)


def test_another_exit_code_fails_and_the_message_ends_with_the_last_line() -> None:
    done = shell("echo first; echo no such file >&2; echo; exit 3")
    assert done.run() is False
    assert done.result == {"exit_code": 3}
    assert done.msgstr == "sh exited with 3: no such file"


def test_exit_code_one_without_output_has_a_message_too() -> None:
    done = job("false")
    assert done.run() is False
    assert done.msgstr == "false exited with 1"


def test_success_codes_replace_zero() -> None:
    assert shell("exit 24", success_codes=(0, 24)).run() is True
    assert job("true", success_codes=(24,)).run() is False


def test_a_signal_is_named() -> None:
    done = shell("kill -SEGV $$")
    assert done.run() is False
    assert done.msgstr == "sh was killed by SIGSEGV"
    assert done.result == {"exit_code": -signal.SIGSEGV}


def test_the_message_is_one_short_printable_line() -> None:
    done = shell(r"printf 'a\nb\033[31mc\n'; exit 1")
    done.run()
    assert done.msgstr == r"sh exited with 1: b\x1b[31mc"
    done = shell("printf '%0500d' 0; exit 1")
    done.run()
    assert done.msgstr == "sh exited with 1: " + 200 * "0"


def test_a_missing_program_is_named() -> None:
    done = job("no-such-program --at-all")
    assert done.run() is False
    assert done.msgstr == "cannot start no-such-program: No such file or directory"


def test_a_program_that_may_not_be_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("text")
    done = job(f"{tmp_path}/plain")
    assert done.run() is False
    assert done.msgstr == f"cannot start {tmp_path}/plain: Permission denied"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    done = job("true", cwd=f"{tmp_path}/gone")
    assert done.run() is False
    assert done.msgstr == f"cannot start true: No such file or directory: {tmp_path}/gone"


# What a command is given.


@pytest.mark.parametrize(
    "value",
    [
        "; rm -rf {canary}",
        "$(touch {canary})",
        "`touch {canary}`",
        "| touch {canary}",
        "&& touch {canary} &",
        "two\nlines\ntouch {canary}",
        "> {canary}",
        "*",
        "~",
        "%s%n",
        "$HOME",
        "a 'quoted' \"word\"",
        "{{path}}",
        "",
    ],
)
def test_hostile_values_stay_one_argument(tmp_path: Path, value: str) -> None:
    canary = tmp_path / "canary"
    value = value.replace("{canary}", str(canary))
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    done = job(f"{sys.executable} -c '{code}' {{path}} end", {"path": value})
    assert done.run() is True
    assert json.loads(text(done)) == [value, "end"]
    assert not canary.exists()


@pytest.mark.parametrize("value", ["-rf", "--help", "a\0b"])
def test_a_value_that_is_an_option_or_holds_nul_is_refused_before_it_is_queued(value: str) -> None:
    refused = job("cat {path}", {"path": value})
    with pytest.raises(BadParams, match="path"):
        refused.check()
    with pytest.raises(BadParams, match="path"):
        refused.run()


def test_good_values_pass_the_check() -> None:
    assert job("cat {path}", {"path": "/etc/passwd"}).check() is True


def test_only_allowed_variables_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPQ_DB_PASSWORD", "secret")
    monkeypatch.setenv("LC_TIME", "C")
    running = job("env", env={"LEVEL": "5", "TZ": "UTC"})
    running.token, running.jobqueue = 4711, "disks.low"
    running.run()
    seen = dict(line.split("=", 1) for line in text(running).splitlines())
    assert seen.keys() <= {
        *("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LEVEL"),
        *("UPQ_JOB_ID", "UPQ_JOB_TYPE", "UPQ_JOB_QUEUE", "UPQ_JOB_TOKEN"),
        *(name for name in os.environ if name.startswith("LC_")),
    }
    assert (seen["LEVEL"], seen["TZ"], seen["LC_TIME"]) == ("5", "UTC", "C")
    own = ("UPQ_JOB_ID", "UPQ_JOB_TYPE", "UPQ_JOB_QUEUE", "UPQ_JOB_TOKEN")
    assert [seen[name] for name in own] == ["17", "cmd", "disks.low", "4711"]


def test_no_descriptor_of_the_daemon_reaches_the_command(tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as secret:
        os.set_inheritable(secret.fileno(), True)
        done = job("ls /proc/self/fd")
        done.run()
    # The fourth is the folder being listed.
    assert text(done).split() == ["0", "1", "2", "3"]


def test_standard_input_is_empty_and_the_folder_is_the_configured_one(tmp_path: Path) -> None:
    done = shell("cat; pwd", cwd=str(tmp_path))
    assert done.run() is True
    assert text(done) == f"{tmp_path}\n"


def test_env_adds_what_it_names_and_what_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPQ_DB_PASSWORD", "secret")
    monkeypatch.setenv("EDITOR", "vi")
    env = {"EDITOR": None, "NO_SUCH": None, "TOKEN": "a {token} b", "LEFT_OUT": "{more}"}
    value = "$(id) `id` {x}\n; LD_PRELOAD=/x"
    done = job("env -0", {"token": value}, env=env)
    assert done.run() is True
    seen = dict(line.split("=", 1) for line in text(done).split("\\0")[:-1])
    assert (seen["EDITOR"], seen["TOKEN"]) == ("vi", f"a {value} b")
    assert not {"NO_SUCH", "LEFT_OUT", "UPQ_DB_PASSWORD", "LD_PRELOAD"} & seen.keys()


@pytest.mark.parametrize("name", ["stdin", "env", "cwd"])
def test_a_nul_is_refused_wherever_it_would_go(name: str) -> None:
    fact: Any = {"A": "{a}"} if name == "env" else "{a}"
    refused = job("true", {"a": "/\0"}, **{name: fact})
    with pytest.raises(BadParams, match="a: holds a NUL"):
        refused.check()
    with pytest.raises(BadParams, match="a: holds a NUL"):
        refused.run()


def test_standard_input_is_what_is_filled_in() -> None:
    long = "äöü\n" * 300_000  # more than any pipe holds
    done = job("sha256sum", {"text": long}, stdin="<{text}>")
    assert done.run() is True
    assert text(done).split()[0] == hashlib.sha256(f"<{long}>".encode()).hexdigest()


def test_standard_input_is_empty_when_its_parameter_is_not_given() -> None:
    done = job("cat", {}, stdin="{text}")
    assert (done.run(), text(done)) == (True, "")


def test_the_folder_may_be_a_parameter(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    done = job("pwd", {"name": "one"}, cwd=f"{tmp_path}/{{name}}")
    assert (done.run(), text(done)) == (True, f"{tmp_path}/one\n")
    with pytest.raises(BadParams, match="name"):
        job("pwd", {"name": ".."}, cwd=f"{tmp_path}/{{name}}").check()


def test_our_own_descriptors_are_closed_after_a_run() -> None:
    job("true").run()
    before = set(os.listdir("/proc/self/fd"))  # what other tests have left open may be closed
    job("true").run()
    job("no-such-program").run()
    job("cat", {"a": "x"}, stdin="{a}", limits=Limits(nice=1), progress_on=3).run()
    job("no-such-program", limits=Limits(nice=1), progress_on=3).run()
    job("true", json_result=True, progress_on=STDOUT).run()
    assert set(os.listdir("/proc/self/fd")) <= before


# Exit codes and what they mean, progress, the result.


@pytest.mark.parametrize(
    ("code", "facts", "final"),
    [
        (1, {}, False),
        (64, {"abort_codes": (64, 65)}, True),
        (1, {"abort_codes": (64, 65)}, False),
        (75, {"retry_codes": (75,)}, False),
        (1, {"retry_codes": (75,)}, True),
    ],
)
def test_exit_codes_say_whether_another_attempt_is_made(
    code: int, facts: dict[str, Any], final: bool
) -> None:
    done = shell(f"echo why; exit {code}", **facts)
    if final:
        with pytest.raises(Abort, match=r"^$"):
            done.run()
    else:
        assert done.run() is False
    assert (done.result, done.msgstr) == ({"exit_code": code}, f"sh exited with {code}: why")


def test_a_signal_and_a_timeout_are_tried_again_whatever_the_codes() -> None:
    assert shell("kill -9 $$", retry_codes=(75,)).run() is False
    assert shell("sleep 99", retry_codes=(75,), timeout_s=0.1).run() is False


def reporting(script: str, on: int, **facts: Any) -> tuple[CommandJob, list[dict[str, Any]]]:
    desk: Any = FakeDesk(create_engine("sqlite://"))
    made = command_type("cmd", ("sh", "-c", script), progress_on=on, **facts)
    running = made("cmd", {}, jobid=17, desk=desk)
    return running, desk.progressed


def test_lines_on_a_chosen_descriptor_are_progress(tmp_path: Path, token: int) -> None:
    wait = f"until [ -e '{tmp_path}/seen' ]; do sleep 0.02; done"
    script = f"echo out; echo progress: 40% half of it >&3; {wait}; echo progress: 3/4 >&3"
    done, progressed = reporting(script, 3)
    done.token = token
    thread = in_thread(done)
    wait_for(lambda: progressed)
    (tmp_path / "seen").touch()
    thread.join(10)
    assert done.result == {"exit_code": 0}
    assert progressed[0] == {"done": 40.0, "total": 100.0, "text": "half of it"}
    assert done.last_progress == {"done": 3.0, "total": 4.0, "text": ""}
    assert text(done) == "out\n"


def test_lines_in_standard_output_are_progress_and_output() -> None:
    script = "echo progress: 1% no >&2; echo progress: 7; echo xprogress: 8%; printf progress:9%%"
    done, _ = reporting(script, STDOUT)
    assert done.run() is True
    assert done.last_progress == {"done": 9.0, "total": 100.0, "text": ""}
    for line in "progress: 1% no", "progress: 7", "xprogress: 8%", "progress:9%":
        assert line in text(done)


def test_a_flood_of_reports_is_stored_now_and_then() -> None:
    done, progressed = reporting("seq -f 'progress: %.0f/100000 text' 100000", STDOUT)
    assert done.run() is True
    assert done.last_progress == {"done": 100_000, "total": 100_000, "text": "text"}
    assert len(progressed) < 20


def test_the_last_line_of_json_is_the_result() -> None:
    script = """echo '{"a": 1}'; echo '{"n": [1, null], "t": "ä"}'; echo bye; echo '{"b"' >&2"""
    done = shell(script, json_result=True)
    assert done.run() is True
    assert done.result == {"n": [1, None], "t": "ä"}
    assert "bye\n" in text(done) and '{"b"' in text(done)
    done = shell("echo null", json_result=True)
    assert (done.run(), done.result) == (True, None)


def test_without_json_the_result_is_the_exit_code_and_the_message_says_so() -> None:
    done = shell("echo NaN", json_result=True)
    assert done.run() is True
    assert (done.result, done.msgstr) == ({"exit_code": 0}, "no line of JSON in its output")
    done = shell("echo '{}'; exit 1", json_result=True)
    assert (done.run(), done.result) == (False, {"exit_code": 1})


# Output.


def test_output_and_errors_come_in_the_order_they_were_written() -> None:
    done = shell("echo one; echo two >&2; echo three")
    done.run()
    assert text(done) == "one\ntwo\nthree\n"


@pytest.mark.parametrize("facts", [{}, {"json_result": True, "progress_on": STDOUT}], ids=str)
@pytest.mark.parametrize(
    "script",
    [
        "head -c $0 /dev/zero; head -c $0 /dev/zero >&2; echo the end >&2",
        "yes | head -c $0; yes | head -c $0 >&2; echo the end >&2",
    ],
    ids=["one binary line", "many lines"],
)
def test_huge_output_is_drained_within_bounds(script: str, facts: dict[str, Any]) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    before_kib = peak_kib()
    started_s = time.monotonic()
    done = shell(script, str(OUTPUT_MIB // 2 * MIB), **facts)
    assert done.run() is True
    assert time.monotonic() - started_s < 60
    assert peak_kib() - before_kib < 32 * 1024
    output = done.captured()
    assert output is not None
    assert output.truncated
    assert output.size_bytes == OUTPUT_MIB * MIB + len("the end\n")
    assert output.text.endswith("the end\n")
    assert len(output.text) < MIB + 100


def test_output_that_is_not_text_is_kept_as_far_as_it_can_be() -> None:
    done = job(r"printf 'a\377\376\n'")
    assert done.run() is True
    assert text(done) == "a\ufffd\ufffd\n"


def test_a_grandchild_that_holds_the_output_is_not_waited_for(token: int) -> None:
    done = shell("sleep 999 & echo $!; exit 4")
    done.token = token
    started_s = time.monotonic()
    assert done.run() is False
    assert 2 <= time.monotonic() - started_s < 10
    assert done.result == {"exit_code": 4}
    assert is_running(int(text(done))), "what a command left behind on purpose is left alone"


def test_a_command_that_closes_its_output_is_still_waited_for() -> None:
    done = shell("exec >&- 2>&-; sleep 0.3; exit 5")
    assert done.run() is False
    assert done.result == {"exit_code": 5}


# Timeout and cancel.


def test_timeout_ends_the_whole_group(
    tmp_path: Path, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    time_counts_after(monkeypatch, lambda: pids_in(pids, 51))
    script = "for n in $(seq 50); do sleep 999 & echo $! >> $0; done; echo $$ >> $0; wait"
    done = shell(script, str(pids), timeout_s=1, grace_s=60)
    done.token = token
    started_s = time.monotonic()
    assert done.run() is False
    assert 1 <= time.monotonic() - started_s < 60, "TERM is enough, no grace is waited for"
    assert (done.ended_by, done.msgstr) == ("timeout", "timed out after 1 s")
    assert not any(map(is_running, pids_in(pids, 51)))


@pytest.mark.parametrize(
    "script",
    [
        "trap '' TERM; echo $$ >> $0; while :; do sleep 0.1; done",
        "sh -c 'trap \"\" TERM; echo $$ >> $0; while :; do sleep 0.1; done' $0 & wait",
    ],
    ids=["leader", "child"],
)
def test_what_ignores_term_is_killed_after_the_grace(
    tmp_path: Path, token: int, script: str
) -> None:
    pids = tmp_path / "pids"
    done = shell(f"echo $$ >> $0; {script}", str(pids), grace_s=1)
    done.token = token
    thread = in_thread(done)
    found = pids_in(pids, 2)
    started_s = time.monotonic()
    done.cancel()
    thread.join(10)
    assert 1 <= time.monotonic() - started_s < 5
    assert not any(map(is_running, found))


def test_what_left_the_group_is_ended_too(
    tmp_path: Path, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    time_counts_after(monkeypatch, lambda: pids_in(pids, 2))
    script = "setsid sh -c 'echo $$ >> $0; exec sleep 999' $0 & echo $$ >> $0; wait"
    done = shell(script, str(pids), timeout_s=1)
    done.token = token
    assert done.run() is False
    assert not any(map(is_running, pids_in(pids, 2)))


def test_what_is_written_on_term_is_kept() -> None:
    done = shell("trap 'echo bye; exit 0' TERM; echo on; while :; do sleep 0.1; done")
    thread = in_thread(done)
    wait_for(lambda: text(done))
    done.cancel()
    thread.join(10)
    assert text(done).endswith("bye\n")
    assert (done.ended_by, done.msgstr) == ("cancel", "cancelled")


def test_cancel_wakes_a_silent_command(token: int) -> None:
    done = job("sleep 999", grace_s=60)
    done.token = token
    thread = in_thread(done)
    wait_for(lambda: done._wake is not None)
    done.cancel()
    thread.join(10)
    assert done.ended_by == "cancel"
    assert done.result == {"exit_code": -signal.SIGTERM}


def test_cancel_before_the_run_starts_nothing(tmp_path: Path) -> None:
    done = job(f"touch {tmp_path}/canary")
    done.cancel()
    assert done.run() is False
    assert done.ended_by == "cancel"
    assert not (tmp_path / "canary").exists()


def test_cancel_after_the_end_changes_nothing() -> None:
    done = job("true")
    assert done.run() is True
    done.cancel()
    assert (done.ended_by, done.result) == (None, {"exit_code": 0})


def test_cancels_at_any_moment_of_short_commands_never_hang_or_leak() -> None:
    job("true").run()
    before = set(os.listdir("/proc/self/fd"))  # what other tests have left open may be closed
    for delay_ms in range(8):
        done = job("true")
        timer = threading.Timer(delay_ms / 2000, done.cancel)
        timer.start()
        succeeded = done.run()
        timer.join()
        assert succeeded is (done.ended_by is None)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_an_exception_that_breaks_in_kills_the_command(
    tmp_path: Path, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"

    def break_in(*_: object) -> None:
        pids_in(pids, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(CommandJob, "_follow", break_in)
    done = shell("echo $$ >> $0; exec sleep 999", str(pids))
    done.token = token
    with pytest.raises(KeyboardInterrupt):
        done.run()
    assert not any(map(is_running, pids_in(pids, 1)))


def test_what_cannot_be_ended_is_given_up_and_said(
    tmp_path: Path, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    done = shell("echo $$ >> $0; exec sleep 999", str(pids), timeout_s=0.5, grace_s=0.1)
    done.token = token
    with monkeypatch.context() as out_of_reach:
        out_of_reach.setattr(trees, "signal_groups", lambda *_: None)
        assert done.run() is False
    assert done.msgstr == "timed out after 0.5 s; sh could not be ended"
    assert is_running(*pids_in(pids, 1))


# What a dead daemon leaves behind.

DAEMON = """
import sys
from upq.command import command_type
from upq.trees import Lifeline
job = command_type("cmd", tuple(sys.argv[3:]), lifeline=Lifeline(0.5) if sys.argv[1] else None)
running = job("cmd", {})
running.token = int(sys.argv[2])
running.run()
"""


def daemon(lifeline: bool, token: int, *words: str) -> subprocess.Popen[bytes]:
    """Another process that runs one command job."""
    argv = [sys.executable, "-c", DAEMON, "yes" if lifeline else "", str(token), *words]
    return subprocess.Popen(argv, cwd=Path(__file__).parent.parent)


def test_orphans_of_a_killed_daemon_are_ended_by_their_token(tmp_path: Path, token: int) -> None:
    pids = tmp_path / "pids"
    script = (
        "echo $$ >> $0; trap '' TERM;"
        " setsid sh -c 'echo $$ >> $0; exec sleep 999' $0 & while :; do sleep 0.1; done"
    )
    other = subprocess.Popen(
        ["sleep", "999"], env={"UPQ_JOB_TOKEN": f"{token}0"}, start_new_session=True
    )
    with daemon(False, token, "sh", "-c", script, str(pids)) as process:
        found = pids_in(pids, 2)
        process.kill()
    assert all(map(is_running, found))
    assert end_orphans({token, token + 1}, grace_s=0.5) == 2
    assert not any(map(is_running, found))
    assert is_running(other.pid), "only that very token counts"
    other.kill()
    other.wait()


def test_looking_for_no_token_ends_nothing(token: int) -> None:
    with subprocess.Popen(
        ["sleep", "999"], env={"UPQ_JOB_TOKEN": str(token)}, start_new_session=True
    ) as other:
        assert end_orphans(set()) == 0
        assert end_orphans({token + 1}) == 0
        assert is_running(other.pid)
        # A process that has only just become another program has no environment yet.
        wait_for(lambda: Tree({token}).groups() == {other.pid})
        other.kill()


def test_our_own_group_is_spared(token: int) -> None:
    code = f"from upq.trees import end_orphans; print(end_orphans({{{token}}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"UPQ_JOB_TOKEN": str(token)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=False,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout) == (0, b"0\n")


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"])
def test_commands_die_with_the_daemon(tmp_path: Path, token: int, trap: str) -> None:
    pids = tmp_path / "pids"
    script = f"{trap} sleep 999 & echo $! >> $0; echo $$ >> $0; wait; sleep 999"
    with daemon(True, token, "sh", "-c", script, str(pids)) as process:
        found = pids_in(pids, 2)
        process.kill()
    wait_for(lambda: not any(map(is_running, found)))


def test_a_lifeline_whose_helper_was_killed_gets_another(token: int) -> None:
    lifeline = Lifeline(grace_s=0.5)
    with lifeline.guard(token):
        sleeper = subprocess.Popen(
            ["sleep", "999"], env={"UPQ_JOB_TOKEN": str(token)}, start_new_session=True
        )
        assert lifeline._helper is not None
        lifeline._helper.kill()
        lifeline._helper.wait()
        assert job("true", lifeline=lifeline).run() is True
        lifeline.close()
    assert sleeper.wait() == -signal.SIGTERM
    lifeline.close()


def test_a_lifeline_lets_go_of_commands_that_have_ended(token: int) -> None:
    lifeline = Lifeline(grace_s=0)
    done = shell("sleep 999 >&- 2>&- & echo $!", lifeline=lifeline)
    done.token = token
    assert done.run() is True
    lifeline.close()
    assert is_running(int(text(done)))


def test_without_a_helper_commands_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    lifeline = Lifeline()
    assert job("true", lifeline=lifeline).run() is True
    assert job("true", lifeline=lifeline).run() is True
    assert len(caplog.records) == 1
