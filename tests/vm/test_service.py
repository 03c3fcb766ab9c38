"""upq under a real systemd: installed, watched, killed, stopped, the whole machine restarted."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.vm.machine import Machine


def pid(vm: Machine) -> int:
    return int(vm.run("systemctl show -P MainPID upq"))


def states(vm: Machine, ids: list[int]) -> dict[str, int]:
    """How many of these jobs are in each state; a job that is not there is lost."""
    found: dict[str, int] = {}
    shown = vm.run("upq-cli --json jobs limit:1000")
    jobs: dict[int, str] = {}
    answer: Any = json.loads(shown)
    for job in answer["jobs"] if isinstance(answer, dict) else answer:
        jobs[job["id"]] = job["state"]
    for id in ids:
        state = jobs.get(id, "lost")
        found[state] = found.get(state, 0) + 1
    return found


def submit(vm: Machine, lines: list[str]) -> list[int]:
    acks = vm.run("upq-cli -q -", "".join(f"{line}\n" for line in lines).encode())
    return [int(ack) for ack in acks.split()]


def wait_for_all(vm: Machine, ids: list[int], timeout_s: float) -> dict[str, int]:
    deadline_s = time.monotonic() + timeout_s * vm.slow
    while (found := states(vm, ids)) != {"done": len(ids)} and time.monotonic() < deadline_s:
        time.sleep(0.5 * vm.slow)
    return found


def test_it_runs_and_says_so(vm: Machine) -> None:
    vm.run("systemctl restart upq")
    assert vm.run("systemctl is-active upq upq.socket").split() == ["active", "active"]
    assert vm.run("systemctl is-enabled upq upq.socket").split() == ["enabled", "enabled"]
    assert vm.run("ps -o user= -p $(systemctl show -P MainPID upq)").strip() == "upq"
    assert 'Status: "running, /etc/upq/upq.cfg"' in vm.run("systemctl status upq")
    log = vm.run("journalctl -u upq -o cat")
    assert "ready in " in log
    assert "ERROR" not in log and "WARNING" not in log, log


def test_members_of_the_group_may_submit_and_nobody_else(vm: Machine) -> None:
    assert "ACK" in vm.run("runuser -u www-data -- upq-cli --wait test")
    assert "ACK" in vm.run("runuser -u alice -- upq-cli --wait closed")
    refused = vm.try_("runuser -u bob -- upq-cli --wait closed")
    assert (refused.returncode, "ERR denied" in refused.stdout) == (1, True), refused.stdout
    outside = vm.try_("runuser -u mallory -- upq-cli --wait test")
    assert outside.returncode == 2
    assert "ermission" in outside.stdout


def test_a_reload_takes_over_what_is_right_and_nothing_of_what_is_not(vm: Machine) -> None:
    before = pid(vm)
    vm.run("printf '[job fresh]\\ncommand = true\\n' >/etc/upq/upq.d/fresh.cfg")
    vm.run("systemctl reload upq")
    vm.wait("upq-cli --wait fresh")
    vm.run("printf '[job fresh]\\ncommand = true\\nretries = many\\n' >/etc/upq/upq.d/fresh.cfg")
    vm.run("systemctl reload upq")
    vm.wait("journalctl -u upq -o cat | grep 'fresh.cfg:3: retries:'")
    assert "done" in vm.run("upq-cli --wait fresh")
    assert vm.run("systemctl is-active upq") == "active"
    vm.run("rm /etc/upq/upq.d/fresh.cfg; systemctl reload upq")
    vm.wait("! upq-cli fresh")
    assert pid(vm) == before


def test_a_configuration_at_fault_is_not_tried_again(vm: Machine) -> None:
    vm.run("systemctl stop upq upq.socket; echo '[job x' >/etc/upq/upq.d/x.cfg")
    assert vm.try_("systemctl start upq").returncode != 0
    assert vm.run("systemctl show -P ExecMainStatus upq") == "78"
    time.sleep(3)
    assert vm.run("systemctl is-active upq || true") == "failed"
    assert "x.cfg:1: " in vm.run("journalctl -u upq -o cat")
    vm.run("rm /etc/upq/upq.d/x.cfg; systemctl reset-failed upq; systemctl start upq")


def test_a_client_that_comes_while_it_is_stopped_starts_it(vm: Machine) -> None:
    vm.run("systemctl stop upq.service")
    assert vm.run("systemctl is-active upq.service upq.socket || true").split() == [
        "inactive",
        "active",
    ]
    assert "done" in vm.run("upq-cli --wait quick n:1")
    assert vm.run("systemctl is-active upq.service") == "active"


def test_a_daemon_that_hangs_is_killed_and_started_again(vm: Machine) -> None:
    before = pid(vm)
    vm.run(f"kill -STOP {before}")
    vm.wait(f"test $(systemctl show -P MainPID upq) != {before} && systemctl is-active upq", 60)
    assert "atchdog timeout" in vm.run("journalctl -u upq -o cat")
    assert "done" in vm.run("upq-cli --wait quick n:1")


def test_a_kill_under_load_loses_nothing(vm: Machine) -> None:
    before = pid(vm)
    ids = submit(vm, [f"quick n:{n}" for n in range(300)])
    assert len(ids) == 300
    time.sleep(1)
    vm.run(f"kill -9 {before}")
    assert wait_for_all(vm, ids, 60) == {"done": 300}
    assert pid(vm) != before


def test_a_stop_lets_running_jobs_end_and_keeps_what_waits(vm: Machine) -> None:
    ids = submit(vm, ["napper s:6", "napper s:6", "napper s:1", "napper s:1"])
    vm.wait("upq-cli jobs state:running | grep -c ^ | grep -x 2")
    vm.run("systemctl stop upq")
    assert vm.run("systemctl show -P Result upq") == "success"
    assert "Good bye." in vm.run("journalctl -u upq -o cat")
    vm.run("systemctl start upq")
    assert wait_for_all(vm, ids, 30) == {"done": 4}
    # They ran once: the stop has waited.
    for id in ids:
        assert json.loads(vm.run(f"upq-cli --json show {id}"))["job"]["attempt"] == 1


def test_a_stop_interrupts_what_takes_longer_than_the_grace(vm: Machine) -> None:
    (id,) = submit(vm, ["napper s:55"])
    vm.wait("upq-cli jobs state:running | grep napper")
    began_s = time.monotonic()
    vm.run("systemctl stop upq")
    assert 19 < time.monotonic() - began_s < 40
    assert vm.try_("pgrep -x sleep").returncode == 1
    assert vm.run("systemctl show -P Result upq") == "success"
    vm.run("systemctl start upq")
    assert wait_for_all(vm, [id], 80) == {"done": 1}


def test_jobs_go_on_after_a_restart_of_the_machine(vm: Machine) -> None:
    ids = submit(vm, ["napper s:30"] * 2 + ["napper s:1"] * 10)
    vm.wait("upq-cli jobs state:running | grep napper")
    vm.reboot()
    assert vm.run("systemctl is-active upq") == "active"
    assert wait_for_all(vm, ids, 90) == {"done": 12}


def test_nothing_acknowledged_is_lost_when_the_power_fails(vm: Machine) -> None:
    ids = submit(vm, ["napper s:20"] * 2 + [f"quick n:{n}" for n in range(50)])
    vm.reboot("echo b >/proc/sysrq-trigger")
    assert wait_for_all(vm, ids, 60) == {"done": 52}
