"""Command jobs of a real daemon: how trees of processes end, output without end, hostile values."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import Daemon, until
from tests.test_command import MIB, OUTPUT_MIB, is_running, pids_in
from upq import wire

#: After the end of a job nothing of it may run for longer.
SURVIVE_S = 2.0

#: All in one: fifty children, some that ignore TERM, some in sessions of their own, some that have
#: lost their parent, one whose environment is empty. Each tells its pid.
FOREST = """
pids=$0
sleeper='echo $$ >> "$0"; while :; do sleep 5; done'
for n in $(seq 50); do sleep 999 & echo $! >> $pids; done
sh -c "trap '' TERM; $sleeper" $pids &
setsid sh -c "$sleeper" $pids &
setsid sh -c "trap '' TERM; $sleeper" $pids &
(setsid sh -c "$sleeper" $pids &)
(setsid sh -c "trap '' TERM; $sleeper" $pids > /dev/null 2>&1 < /dev/null &)
setsid sh -c "(setsid sh -c '$sleeper' $pids &) ; $sleeper" $pids &
env -i setsid sh -c "trap '' TERM; $sleeper" $pids &
echo $$ >> $pids
wait
"""
TREES = 50 + 8 + 1

CONFIG = """
[job plain]
command = sh -c 'sleep 999 & echo $! >> $0; sleep 999 & echo $! >> $0; echo $$ >> $0; wait'
    {folder}/pids

[job forest]
command = sh {folder}/forest.sh

[job again]
command = sh {folder}/again.sh

[job flood]
params = script bytes:int
command = sh {folder}/flood.sh {script} {bytes}
result = json

[job holds]
command = sh -c 'sleep 999 & echo $! >> {folder}/pids; echo held'

[job reports]
command = sh -c 'echo progress: 40% of it >&3; while ! test -e {folder}/go; do sleep 0.02; done'
progress_fd = 3

[job codes]
params = code:int
command = sh -c 'exit "$1"' sh {code}
retries = 1
retry_delay = 0
abort_codes = 64,65

[job hostile]
params = x
command = {python} -I -S {folder}/show.py a{x}b --size={x} -- {x}
stdin = {x}
env = X={x}
result = json
concurrent = 4

[job bare]
params = x
command = {python} -I -S {folder}/show.py {x}
result = json
concurrent = 4
"""
SHOW = """
import json, os, sys
print(json.dumps([sys.argv[1:], sys.stdin.read(), os.environ.get("X")]))
"""
AGAIN = """
for pid in $(cat $0.pids 2> /dev/null); do
    state=$(sed 's/.*) //' /proc/$pid/stat 2> /dev/null | cut -c 1)
    case $state in [!ZX]) echo overlap >> $0.overlaps;; esac
done
test -e $0.pids && { echo second > $0.second; exit 0; }
trap '' TERM
setsid sh -c 'trap "" TERM; echo $$ >> $0; while :; do sleep 0.1; done' $0.pids &
(setsid sh -c 'echo $$ >> $0; sleep 999' $0.pids &)
echo $$ >> $0.pids
while :; do sleep 0.1; done
"""
FLOOD = """
case $1 in
zeros) head -c $2 /dev/zero; head -c $2 /dev/zero >&2;;
lines) yes | head -c $2; yes | head -c $2 >&2;;
binary) head -c $2 /dev/urandom;;
esac
echo; echo '{"script": "'$1'"}'
"""


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    """Started, with the jobs above."""
    for name, script in {
        "forest.sh": FOREST.replace("pids=$0", f"pids={short_tmp}/pids"),
        "again.sh": AGAIN,
        "flood.sh": FLOOD,
        "show.py": SHOW,
    }.items():
        (short_tmp / name).write_text(script)
    config = CONFIG.replace("{folder}", str(short_tmp)).replace("{python}", sys.executable)
    with Daemon(short_tmp, config) as daemon:
        yield daemon
    for file in short_tmp.glob("*pids"):
        for pid in map(int, file.read_text().split()):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if is_running(pid)]


# The end of a tree.


@pytest.mark.parametrize(("name", "count"), [("plain", 3), ("forest", TREES)])
@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_nothing_of_a_tree_survives(daemon: Daemon, name: str, count: int, how: str) -> None:
    id = daemon.submit(name + (" @timeout:8s" if how == "timeout" else ""))
    pids = pids_in(daemon.folder / "pids", count)
    assert len(alive(pids)) == count
    if how == "cancel":
        daemon.ask(f"cancel {id}")
    job = daemon.wait(id)
    assert job["state"] == {"timeout": "failed", "cancel": "cancelled"}[how]
    time.sleep(SURVIVE_S if alive(pids) else 0)
    assert alive(pids) == []


def test_a_stop_of_the_daemon_ends_the_tree(daemon: Daemon) -> None:
    daemon.config.write_text(daemon.config.read_text() + "\n[daemon]\ngrace = 0\n")
    daemon.restart()
    daemon.submit("forest")
    pids = pids_in(daemon.folder / "pids", TREES)
    assert daemon.end() == 0
    time.sleep(SURVIVE_S if alive(pids) else 0)
    # Of a process without an environment nobody knows once its parent has gone: it was seen before.
    assert alive(pids) == []


def test_after_a_kill_the_old_tree_is_gone_before_the_job_runs_again(daemon: Daemon) -> None:
    id = daemon.submit("again")
    pids = pids_in(daemon.folder / "again.sh.pids", 3)
    daemon.restart()
    assert daemon.wait(id)["state"] == "done"
    assert (daemon.folder / "again.sh.second").exists()
    assert not (daemon.folder / "again.sh.overlaps").exists()
    assert alive(pids) == []


def test_the_same_when_nobody_was_left_to_end_it_at_once(daemon: Daemon) -> None:
    """The whole service was killed, its lifeline too, but not what had left its group."""
    id = daemon.submit("again")
    pids = pids_in(daemon.folder / "again.sh.pids", 3)
    assert daemon.process
    children = subprocess.run(
        ["pgrep", "-P", str(daemon.process.pid), "-f", "stand_by"], capture_output=True, check=True
    )
    os.kill(int(children.stdout), signal.SIGKILL)
    daemon.kill9()
    assert len(alive(pids)) == 3
    daemon.start()
    assert daemon.wait(id)["state"] == "done"
    assert not (daemon.folder / "again.sh.overlaps").exists()
    assert alive(pids) == []


def test_a_grandchild_that_holds_the_output_holds_nobody_up(daemon: Daemon) -> None:
    began_s = time.monotonic()
    job = daemon.run("holds")
    assert job["state"] == "done"
    assert time.monotonic() - began_s < 20
    assert daemon.ask(f"output {job['id']}")["text"] == "held\n"


# What it writes.


def peak_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("script", ["zeros", "lines"])
def test_a_flood_of_output_leaves_daemon_and_result_as_they_should_be(
    daemon: Daemon, script: str
) -> None:
    assert daemon.process
    pid = daemon.process.pid
    daemon.run("flood script:none bytes:1")
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before_kib, size = peak_kib(pid), OUTPUT_MIB // 2 * MIB
    job = daemon.run(f"flood script:{script} bytes:{size}")
    assert (job["state"], job["result"]) == ("done", {"script": script})
    assert peak_kib(pid) - before_kib < 32 * 1024
    output = daemon.ask(f"output {job['id']}")
    assert output["truncated"] is True
    assert output["size_bytes"] == 2 * size + len('\n{"script": ""}\n') + len(script)
    assert MIB // 2 < len(output["text"]) < 1.1 * MIB


def test_progress_on_a_descriptor_is_shown_while_it_runs(daemon: Daemon) -> None:
    id = daemon.submit("reports")
    until(lambda: daemon.job(id)["progress"])
    assert daemon.job(id)["progress"] == {"done": 40.0, "total": 100.0, "text": "of it"}
    daemon.open_gate()
    assert daemon.wait(id)["state"] == "done"


def test_exit_codes_are_outcomes(daemon: Daemon) -> None:
    for code, attempts in {64: 1, 1: 2}.items():
        job = daemon.run(f"codes code:{code}")
        assert (job["state"], job["attempt"]) == ("failed", attempts)
        assert (job["message"], job["result"]) == (f"sh exited with {code}", {"exit_code": code})
    assert daemon.history(job["id"])[2].startswith("queued retry 1 of 1")


# Hostile values (T28).

SHAPES = (
    "; {}", "x; {} #", "| {}", "x | {}", "& {} &", "&& {}", "|| {}", "$({})", "`{}`", "x\n{}\n",
    "x\r\n{}\r\n", '"; {}; "', "'; {}; '", "-{}", "--rf={}", "-rf", "--help", "-", "--", "*", "?*",
    "[a-z]*", "~", "~root/{}", "%s%n%x", "%(id)s", "$HOME", "${{IFS}}{}", "$'\\x3b'{}",
    "LD_PRELOAD={}", "PATH={}", "BASH_ENV={}", "() {{ :; }}; {}", "> {}", "< {}", ">> {} <<EOF",
    "\\\n{}", "\t{}", "x {} x", "{};", "({})", "{{ {}; }}", "x' {} 'x", "<({})", "eval {}",
    "{{x}}", "{{{{x}}}}", "{{0}} {{__class__}}", "!!", "#{}", "\u202e{}", "\x1b[31m{}", "x\0{}",
)  # fmt: skip
ACTIONS = (
    "touch {canary}",
    "/bin/touch {canary}",
    "sh -c 'touch {canary}'",
    "exec>{canary}",
    "id >{canary}",
)
PAYLOADS = list(dict.fromkeys(s.format(a) for s, a in itertools.product(SHAPES, ACTIONS)))


def has_control(text: str) -> bool:
    """What no line may hold, and JSON neither."""
    return any(ord(c) < 32 and c not in "\t\n\r" for c in text)


def test_hostile_values_stay_values(daemon: Daemon) -> None:
    assert len(PAYLOADS) >= 200
    canary = daemon.folder / "canary"
    before = {path.name for path in daemon.folder.iterdir()}
    payloads = [payload.replace("{canary}", str(canary)) for payload in PAYLOADS]
    ids: dict[int, tuple[str, Callable[[str], Any]]] = {}
    refused = 0
    with daemon.talk() as talk:
        for payload, name in itertools.product(payloads, ("hostile", "bare")):
            line = json.dumps({"submit": name, "params": {"x": payload}})
            as_text = name == "bare" and not has_control(payload)
            for way in [line, wire.join([name, f"x:{payload}"])][: 1 + as_text]:
                reply = talk.say(way)
                if has_control(payload) or (name == "bare" and payload.startswith("-")):
                    code = wire.read_reply(reply.encode()).code
                    assert code in ("refused", "bad_text"), (payload, reply)
                    refused += 1
                    continue
                assert reply.startswith(("ACK ", '{"ok":true')), (way, reply)
                (ack,) = wire.read_reply(reply.encode()).acks
                ids[ack.id] = (payload, hostile if name == "hostile" else bare)
    assert len(ids) >= 400 and refused > 20
    for id, (payload, expected) in ids.items():
        job = daemon.wait(id)
        assert (job["state"], job["result"]) == ("done", expected(payload)), payload
    assert not canary.exists()
    assert {path.name for path in daemon.folder.iterdir()} == before


def hostile(payload: str) -> Any:
    return [[f"a{payload}b", f"--size={payload}", "--", payload], payload, payload]


def bare(payload: str) -> Any:
    return [[payload], "", None]
