"""Control groups: entered, ended whole, removed; real ones, where this machine lets us make some.

That limits hold needs a group that was handed over with its controllers: tests/vm looks at those.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upq import config
from upq.cgroup import OWN, Group, GroupLimits, Groups, own_folder
from upq.command import CommandJob, command_type
from upq.jobtypes import JobTypes

ROOT = Path(__file__).parent.parent
#: Leaves its session, its parent and its environment: without a group nobody finds it again. Its
#: number is printed once it is away.
ESCAPE = "echo $(setsid env -i sh -c 'echo $$; exec sleep 999 >/dev/null 2>&1' &);"
LIMITS = GroupLimits(tasks=50)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A group of our own, empty and without controllers."""
    own = own_folder()
    if own is None:
        pytest.skip("no control groups of version 2")
    made = own / f"upq-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield made
    assert Group(made).remove(5), "something does not go"


@pytest.fixture
def groups(folder: Path) -> Groups:
    """Groups as the daemon has them. No controller is there, so that the limits set nothing."""
    return Groups(folder, {"pids"})


def shell(script: str, **facts: object) -> CommandJob:
    return command_type("cmd", ("sh", "-c", script), group_limits=LIMITS, **facts)(
        "cmd", {}, jobid=17
    )


def output(job: CommandJob) -> str:
    captured = job.captured()
    return captured.text if captured else ""


def is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_command_with_such_a_limit_runs_in_a_group_of_its_own(
    folder: Path, groups: Groups
) -> None:
    job = shell("cat /proc/self/cgroup", groups=groups)
    assert job.run() is True
    assert f"/{folder.name}/job-17-0" in output(job)
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_a_command_without_such_a_limit_has_no_group(folder: Path, groups: Groups) -> None:
    job = command_type("cmd", ("cat", "/proc/self/cgroup"), groups=groups)("cmd", {}, jobid=17)
    assert job.run() is True
    assert folder.name not in output(job)


def test_where_no_group_was_handed_over_it_runs_without() -> None:
    assert shell("true", groups=Groups(None, why="none here")).run() is True
    assert shell("true").run() is True


def test_what_it_leaves_behind_ends_with_it(groups: Groups) -> None:
    job = shell(ESCAPE, groups=groups)
    began_s = time.monotonic()
    assert job.run() is True
    assert time.monotonic() - began_s < 2.5
    assert not is_there(int(output(job)))


def test_at_its_timeout_nothing_escapes(folder: Path, groups: Groups) -> None:
    job = shell(f"{ESCAPE} sleep 999", groups=groups, timeout_s=3, grace_s=2)
    assert job.run() is False
    assert job.ended_by == "timeout"
    assert not is_there(int(output(job)))
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_what_ignores_term_is_killed(groups: Groups) -> None:
    job = shell("trap '' TERM; setsid env -i sleep 999 & wait", groups=groups,
                timeout_s=0.3, grace_s=0.3)  # fmt: skip
    began_s = time.monotonic()
    assert job.run() is False
    assert time.monotonic() - began_s < 3


def test_200_jobs_leave_no_group(folder: Path, groups: Groups) -> None:
    for n in range(200):
        with groups.hold(str(n), LIMITS) as group:
            assert group is not None
            assert group.is_empty
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_what_a_dead_daemon_has_left_is_swept(folder: Path, groups: Groups) -> None:
    left = Group(folder / "job-3-1f")
    (left.folder / "of its own").mkdir(parents=True)
    with subprocess.Popen(["sleep", "999"]) as process:
        (left.folder / "of its own" / "cgroup.procs").write_text(str(process.pid))
        assert left.pids() == [process.pid]
        assert not left.is_empty
        groups.sweep()
        assert process.wait(5) == -9
    assert not left.folder.exists()


def test_a_group_that_cannot_be_made_fails_the_attempt(folder: Path, groups: Groups) -> None:
    (folder / "job-17-0").mkdir()
    job = shell("true", groups=groups)
    assert job.run() is False
    assert job.msgstr == f"cannot start sh: File exists: {folder}/job-17-0"


def test_a_daemon_takes_over_a_group_that_it_is_alone_in(folder: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from upq.cgroup import *;"
        "Path(sys.argv[1], 'cgroup.procs').write_text('0');"
        "taken = Groups.take(); print(json.dumps([str(own_folder()), taken.why]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    place, why = json.loads(done.stdout)
    assert place == str(folder / OWN)
    assert why in ("", f"{folder} was handed over without cpu, memory, pids")


def test_a_daemon_leaves_a_group_with_others_in_it_alone(folder: Path) -> None:
    with subprocess.Popen(["sleep", "999"]) as other:
        (folder / "cgroup.procs").write_text(str(other.pid))
        code = (
            "import sys; from pathlib import Path; from upq.cgroup import *;"
            "Path(sys.argv[1], 'cgroup.procs').write_text('0'); print(Groups.take().why)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, folder],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        other.kill()
    assert done.stdout.strip() == (
        f"upq has no control group of its own: {folder}: 1 other processes are in it"
    )
    assert not (folder / OWN).exists()


def test_what_each_limit_writes() -> None:
    limits = GroupLimits(memory_bytes=1 << 20, cpus=1.5, tasks=9)
    assert dict(limits.files({"memory", "cpu", "pids"})) == {
        "memory.max": "1048576",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.max": "150000 100000",
        "pids.max": "9",
    }
    assert dict(limits.files({"pids"})) == {"pids.max": "9"}
    assert dict(GroupLimits().files({"memory", "cpu", "pids"})) == {}


@pytest.mark.parametrize(
    ("memory", "pids", "hit"),
    [
        ("low 0\nhigh 0\nmax 9\noom 0\noom_kill 0\n", "max 0\n", ""),
        ("low 0\nhigh 0\nmax 9\noom 1\noom_kill 3\noom_group_kill 1\n", "max 0\n", "memory_max"),
        ("oom_kill 0\n", "max 4\n", "tasks_max"),
        ("", "", ""),
    ],
)
def test_which_limit_was_hit_is_read_from_the_events(
    memory: str, pids: str, hit: str, tmp_path: Path
) -> None:
    (tmp_path / "memory.events").write_text(memory)
    (tmp_path / "pids.events").write_text(pids)
    assert Group(tmp_path).hit() == hit


def test_limits_that_do_not_hold_are_told_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "upq.cfg"
    file.write_text(
        "[job big]\ncommand = true\nmemory_max = 1G\ntasks_max = 10\n[job small]\ncommand = true\n"
    )
    settings = config.load(file)
    none = JobTypes(settings, None, Groups(None, why="nobody has handed one over"))
    assert none.loose() == [
        "[job big] memory_max, tasks_max cannot be held: nobody has handed one over"
    ]
    some = JobTypes(settings, None, Groups(tmp_path, {"memory"}, "pids is not handed over"))
    assert some.loose() == ["[job big] tasks_max cannot be held: pids is not handed over"]
    assert JobTypes(settings, None, Groups(tmp_path, {"memory", "pids"})).loose() == []
