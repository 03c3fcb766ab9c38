"""What a command may use: real programs that meet their limits, and programs that show them."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import unavailable
from tests.test_command import shell, text
from upq.command import CommandJob, command_type
from upq.spawn import OOM_SCORE, Limits, start


def limited(script: str, *args: str, **limits: Any) -> CommandJob:
    return shell(script, *args, limits=Limits(**limits))


def python(code: str, **limits: Any) -> CommandJob:
    return command_type("cmd", (sys.executable, "-c", code), limits=Limits(**limits))("cmd", {})


def test_a_command_without_limits_goes_through_no_shim() -> None:
    assert Limits().facts() == Limits().io_words() == []
    done = shell("cat /proc/$PPID/cmdline")
    done.run()
    assert "shim" not in text(done)


def test_the_command_becomes_what_it_would_be_without_limits() -> None:
    """Same process, same signals, nothing open beside the usual three."""
    show = "ls /proc/$$/fd; grep SigIgn /proc/$$/status; ps -o pid=,sid= -p $$"
    plain, shimmed = shell(show), limited(show, nice=1)
    assert plain.run() is shimmed.run() is True
    *seen, pid, session = text(shimmed).split()
    assert seen == text(plain).split()[:-2]
    assert pid == session


def test_every_limit_is_in_force_in_the_command_and_its_children() -> None:
    done = limited(
        "sh -c 'ulimit -v; ulimit -t; ulimit -f; ulimit -n; nice; ionice'",
        nice=7, ionice="idle", memory_bytes=1 << 30, cpu_s=9, file_bytes=1 << 20, open_files=33,
    )  # fmt: skip
    assert done.run() is True, text(done)
    assert text(done).split() == [str(1 << 20), "9", "2048", "33", "7", "idle"]


def test_best_effort_has_levels() -> None:
    done = limited("ionice", ionice="best-effort:7")
    done.run()
    assert text(done) == "best-effort: prio 7\n"


def test_too_much_memory_fails_the_command_alone() -> None:
    done = python("x = bytearray(1 << 30)", memory_bytes=256 << 20)
    assert done.run() is False
    assert "MemoryError" in text(done)
    assert python("x = bytearray(1 << 20)", memory_bytes=256 << 20).run() is True


def test_too_much_computing_is_told_by_name() -> None:
    done = python("while True: pass", cpu_s=1)
    assert done.run() is False
    assert done.msgstr.endswith(" was killed by SIGXCPU (cpu_limit)")


def test_who_ignores_the_first_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    done = python(code, cpu_s=1)
    assert done.run() is False
    assert done.result == {"exit_code": -signal.SIGKILL}


def test_too_long_a_file_is_told_by_name(tmp_path: Path) -> None:
    done = limited("exec head -c 1000000 /dev/zero > $0", f"{tmp_path}/file", file_bytes=4096)
    assert done.run() is False
    assert done.msgstr == "sh was killed by SIGXFSZ (file_limit)"
    assert (tmp_path / "file").stat().st_size == 4096


def test_what_is_not_allowed_is_not_asked_for() -> None:
    """A limit above the daemon's own hard limit leaves that one in force."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = limited("ulimit -n", open_files=most * 2)
    assert done.run() is True
    assert int(text(done)) == most


def test_a_nicer_daemon_is_no_fault() -> None:
    own = os.nice(0)
    done = limited("nice", nice=max(own - 1, 0))
    done.run()
    assert int(text(done)) == own


@pytest.mark.parametrize("limits", [{"nice": 1}, {"ionice": "idle"}, {"memory_bytes": 1 << 26}])
def test_a_program_that_cannot_start_is_told_as_without_limits(
    limits: dict[str, Any], tmp_path: Path
) -> None:
    def started(*words: str, **facts: Any) -> str:
        done = command_type("cmd", words, limits=Limits(**limits), **facts)("cmd", {})
        assert done.run() is False
        assert done.result is None
        return done.msgstr

    (tmp_path / "plain").write_text("text")
    assert started("no-such") == "cannot start no-such: No such file or directory"
    assert started(f"{tmp_path}/plain") == f"cannot start {tmp_path}/plain: Permission denied"
    assert started("true", cwd="/no/such").endswith("No such file or directory: /no/such")


def test_a_limit_that_cannot_be_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "facts", lambda _: ["fd=99:3"])
    done = shell("true")
    assert done.run() is False
    assert done.msgstr == "cannot start sh: Bad file descriptor: fd"


def test_commands_go_before_the_daemon_when_memory_is_short() -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    # It is set when the command runs already.
    look = """
for n in $(seq 200); do
    read score < /proc/self/oom_score_adj
    [ $score = $0 ] || break
    sleep 0.02
done
echo $score
"""
    for limits in {}, {"nice": 1}:
        done = limited(look, str(own), **limits)
        done.run()
        assert int(text(done)) == min(own + OOM_SCORE, 1000)


def test_environment_folder_and_input_pass_through(tmp_path: Path) -> None:
    made = command_type(
        "cmd", ("sh", "-c", "pwd; cat; echo $A $PYTHONPATH"), cwd=str(tmp_path), stdin="in ",
        env={"A": "b", "PYTHONPATH": "/no/such"}, limits=Limits(nice=1),
    )  # fmt: skip
    done = made("cmd", {})
    assert done.run() is True
    assert text(done) == f"{tmp_path}\nin b /no/such\n"


def test_a_timeout_ends_a_limited_command() -> None:
    done = shell("sleep 999 & wait", limits=Limits(nice=1, ionice="idle"), timeout_s=0.3)
    assert done.run() is False
    assert done.msgstr == "timed out after 0.3 s"
    assert done.result == {"exit_code": -signal.SIGTERM}


#: Holds a lease on a file, so that whoever opens it has to wait; tells when somebody does.
HOLD = """
import fcntl, os, signal, sys
asked = lambda *_: print("asked", flush=True)
signal.signal(signal.SIGIO, asked)
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.alarm(20)
sys.stdin.read()
"""


def test_a_program_that_cannot_be_read_yet_holds_up_its_own_thread_only(tmp_path: Path) -> None:
    program = shutil.copy("/bin/true", tmp_path)
    pipe, started = subprocess.PIPE, threading.Event()

    def begin() -> None:
        start([program], Limits(), {}).wait()
        started.set()

    with subprocess.Popen([sys.executable, "-c", HOLD, program], stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout and holder.stdin
        if holder.stdout.readline() != b"held\n":
            unavailable("no leases on files of this folder")
        thread = threading.Thread(target=begin, daemon=True)
        thread.start()
        assert holder.stdout.readline() == b"asked\n"
        waits = not started.is_set() and holder.poll() is None
        holder.stdin.close()
        thread.join(30)
    assert waits and started.is_set()
