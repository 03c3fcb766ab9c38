"""The service unit and its companions before systemd's own tools, and the wheel, really built."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import unavailable
from upq.cgroup import CPU, MEMORY, PIDS
from upq.daemon import DAMAGED
from upq.errors import ConfigError

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
#: Highest exposure, in tenths, that the unit may have.
EXPOSURE = 18


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of systemd or Python; both outputs in stdout."""
    if shutil.which(command[0]) is None:
        unavailable(f"no program {command[0]} (Debian: apt-get install systemd)")
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A folder with both units, which name a program that exists on any machine."""
    shutil.copy(PACKAGING / "upq.socket", tmp_path)
    text = (PACKAGING / "upq.service").read_text()
    assert "ExecStart=/usr/bin/upq " in text
    (tmp_path / "upq.service").write_text(text.replace("/usr/bin/upq", sys.executable))
    return tmp_path


def verify(units: Path) -> list[str]:
    """What systemd says about our units, and not about others that this machine may have."""
    result = run("systemd-analyze", "verify", units / "upq.service", units / "upq.socket")
    return [line for line in result.stdout.splitlines() if "upq" in line]


def settings(unit: str) -> dict[str, list[str]]:
    """The values of each setting of a unit file; systemd allows a setting twice."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", (PACKAGING / unit).read_text(), re.M):
        found.setdefault(name, []).append(value)
    return found


def test_systemd_finds_no_fault_in_the_units(units: Path) -> None:
    assert verify(units) == []


def test_verify_sees_a_mistyped_setting(units: Path) -> None:
    with (units / "upq.service").open("a") as unit:
        unit.write("[Service]\nWatchdogSecs=30\n")
    assert any("WatchdogSecs" in line for line in verify(units))


def test_the_service_is_well_shut_in(units: Path) -> None:
    analysis = run(
        *("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}"),
        units / "upq.service",
    )
    assert analysis.returncode == 0, analysis.stdout
    exposure = re.search(r"exposure level for upq.service: ([\d.]+)", analysis.stdout)
    assert exposure and float(exposure[1]) * 10 <= EXPOSURE


def test_security_would_notice_an_open_door(units: Path) -> None:
    with (units / "upq.service").open("a") as unit:
        unit.write("[Service]\nCapabilityBoundingSet=~\nProtectSystem=no\n")
    analysis = run(
        *("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}"),
        units / "upq.service",
    )
    assert analysis.returncode != 0


def test_clients_keep_their_names_inside_the_sandbox() -> None:
    # In a user namespace SO_PEERCRED reports every other user as nobody.
    assert "PrivateUsers" not in settings("upq.service")


def test_the_unit_gives_the_daemon_time_to_drain() -> None:
    unit = settings("upq.service")
    assert int(unit["TimeoutStopSec"][0]) >= 20 + 5 + 2  # grace, TERM to KILL, flush
    assert unit["KillMode"] == ["mixed"]
    assert unit["RestartPreventExitStatus"] == [f"{DAMAGED} {ConfigError.exit_status}"]


def test_the_unit_hands_over_what_limits_of_jobs_need() -> None:
    unit = settings("upq.service")
    assert set(unit["Delegate"][0].split()) == {CPU, MEMORY, PIDS}
    # ProtectControlGroups leaves nothing to write to, not even that.
    assert unit["ReadWritePaths"] == ["-/sys/fs/cgroup/system.slice/%n"]


def test_unit_socket_and_configuration_name_the_same_paths() -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(PACKAGING / "upq.cfg")
    service, socket = settings("upq.service"), settings("upq.socket")
    assert [config["paths"]["socket"]] == socket["ListenStream"]
    assert int(config["paths"]["socket_chmod"], 8) == int(socket["SocketMode"][0], 8)
    assert config["paths"]["state_dir"] == f"/var/lib/{service['StateDirectory'][0]}"
    assert config["paths"]["socket"].startswith(f"/run/{service['RuntimeDirectory'][0]}/")
    assert not config.getboolean("daemon", "detach_process")
    assert service["ExecStart"] == ["/usr/bin/upq --foreground -c /etc/upq/upq.cfg"]


def test_sysusers_makes_the_account_and_tmpfiles_its_folders(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    made = run("systemd-sysusers", f"--root={tmp_path}", PACKAGING / "upq.sysusers")
    assert made.returncode == 0, made.stdout
    account = (tmp_path / "etc/passwd").read_text().split(":")
    assert (account[0], account[5]) == ("upq", "/var/lib/upq")
    if os.geteuid() != 0:
        pytest.skip("only root can give folders away")
    made = run("systemd-tmpfiles", f"--root={tmp_path}", "--create", PACKAGING / "upq.tmpfiles")
    assert made.returncode == 0, made.stdout
    for folder in "run/upq", "var/lib/upq", "var/log/upq":
        status = (tmp_path / folder).stat()
        assert (status.st_mode & 0o777, status.st_uid) == (0o750, int(account[2]))


def test_the_wheel_has_the_package_and_the_jobs_as_data_only(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("upq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
        scripts = archive.read(entry_points).decode()
    version = wheel.name.split("-")[1]
    jobs = f"upq-{version}.data/data/share/upq/jobs/"
    assert {name.split("/")[0] for name in names} == {
        *("upq", f"upq-{version}.dist-info", f"upq-{version}.data")
    }
    assert {name.removeprefix(jobs) for name in names if name.startswith(jobs)} == {
        str(path.relative_to(ROOT / "jobs"))
        for path in (ROOT / "jobs").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "upq = upq.launch:main" in scripts
    assert "upq-cli = upq.cli:main" in scripts
