"""`memory_max`, `cpu_quota`, `tasks_max`: held by control groups that systemd hands over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.machine import Machine
from tests.vm.test_service import pid, submit, wait_for_all

GROUP = "/sys/fs/cgroup/system.slice/upq.service"
JOBS = """
[job glutton]
params = mib:int
command = python3 -c 'import sys; print(len(b"x" * (int(sys.argv[1]) << 20)))' {mib}
memory_max = 64M

[job brood]
# The eater is a child: the shell would live on, were it not for the whole group.
command = sh -c 'python3 -c "print(len(bytearray(200 << 20)))"; echo survived'
memory_max = 64M

[job little]
command = true
memory_max = 1M

[job busy]
command = python3 -c '
    import json, time
    wall, own = time.monotonic(), time.process_time()
    while time.monotonic() < wall + 8: pass
    print(json.dumps((time.process_time() - own) / (time.monotonic() - wall)))'
result = json
cpu_quota = 25%

[job forker]
command = sh -c 'for n in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait'
tasks_max = 5

[job escaper]
command = sh -c 'setsid env -i sh -c "exec sleep 998" >/dev/null 2>&1 & sleep 997'
tasks_max = 20
timeout = 3

[job tiny]
params = n:int
command = true
tasks_max = 20
concurrent = 2
"""


@pytest.fixture(scope="module", autouse=True)
def types(vm: Machine) -> Iterator[None]:
    vm.run("cat >/etc/upq/upq.d/limits.cfg; systemctl restart upq", JOBS.encode())
    yield
    vm.run("rm /etc/upq/upq.d/limits.cfg; systemctl restart upq")


def groups(vm: Machine) -> list[str]:
    return vm.run(f"cd {GROUP}; ls -d job-* 2>/dev/null || true").split()


def outcome(vm: Machine, line: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(vm.try_(f"upq-cli --wait --json {line} 2>/dev/null").stdout)
    job: dict[str, Any] = answer["job"]
    return job


def test_the_group_is_taken_over(vm: Machine) -> None:
    assert vm.run(f"cat {GROUP}/daemon/cgroup.procs").split()[0] == str(pid(vm))
    assert set(vm.run(f"cat {GROUP}/cgroup.subtree_control").split()) == {"cpu", "memory", "pids"}
    assert "cannot be held" not in vm.run("journalctl -u upq -o cat")
    # The rest of the tree stays closed to the daemon and its jobs.
    found = vm.try_(f"nsenter -m -t {pid(vm)} touch /sys/fs/cgroup/system.slice/cgroup.procs")
    assert "Read-only" in found.stdout


def test_memory_is_held_and_the_daemon_lives(vm: Machine) -> None:
    before = pid(vm)
    assert outcome(vm, "glutton mib:10")["state"] == "done"
    job = outcome(vm, "glutton mib:500")
    assert (job["state"], job["message"]) == (
        "failed",
        "python3 was killed by SIGKILL (memory_max)",
    )
    job = outcome(vm, "brood")
    assert (job["state"], job["message"]) == ("failed", "sh was killed by SIGKILL (memory_max)")
    assert outcome(vm, "little")["state"] == "done"
    assert pid(vm) == before
    assert groups(vm) == []


def test_processors_are_held(vm: Machine) -> None:
    job = outcome(vm, "busy")
    assert job["state"] == "done"
    assert 0.2 < job["result"] < 0.3


def test_tasks_are_held(vm: Machine) -> None:
    job = outcome(vm, "forker")
    assert job["state"] == "failed"
    assert " (tasks_max)" in job["message"]


def test_nothing_escapes_a_timeout(vm: Machine) -> None:
    assert outcome(vm, "escaper")["message"] == "timed out after 3 s"
    assert vm.try_("pgrep -x sleep").returncode == 1
    assert groups(vm) == []


def test_200_jobs_leave_no_group(vm: Machine) -> None:
    ids = submit(vm, [f"tiny n:{n}" for n in range(200)])
    assert wait_for_all(vm, ids, 60) == {"done": 200}
    assert groups(vm) == []


def test_a_killed_daemon_leaves_no_group_and_loses_no_job(vm: Machine) -> None:
    ids = submit(vm, [f"tiny n:{n}" for n in range(40)])
    submit(vm, ["escaper"])
    vm.wait(f"pgrep -f 'sleep 998' && ls -d {GROUP}/job-*")
    vm.run(f"kill -9 {pid(vm)}")
    assert wait_for_all(vm, ids, 60) == {"done": 40}
    vm.wait("upq-cli jobs type:escaper state:running | grep -q . && exit 1 || exit 0", 40)
    vm.wait(f"! ls -d {GROUP}/job-*")
    assert vm.try_("pgrep -f 'sleep 998'").returncode == 1


def test_where_nothing_is_handed_over_the_log_says_so(vm: Machine) -> None:
    drop_in = "/etc/systemd/system/upq.service.d/none.conf"
    vm.run(f"mkdir -p {drop_in.rpartition('/')[0]}")
    vm.run(f"printf '[Service]\\nDelegate=no\\n' >{drop_in}")
    try:
        vm.run("systemctl daemon-reload; systemctl restart upq")
        log = vm.run("journalctl -u upq -o cat")
        assert "[job glutton] memory_max cannot be held: upq has no control group of its own" in log
        assert outcome(vm, "glutton mib:100")["state"] == "done"
        assert "cannot be held" in vm.run("upq-cli reload")
    finally:
        vm.run(f"rm {drop_in}; systemctl daemon-reload; systemctl restart upq")
