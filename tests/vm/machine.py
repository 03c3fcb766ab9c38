"""A Debian of its own in QEMU, under a real systemd: built once, booted fresh, driven by ssh.

`python -m tests.vm.machine` builds the image and gives a shell in a fresh machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RELEASE = "bookworm"
#: What a fresh server has that upq is installed on.
PACKAGES = (
    "systemd,systemd-sysv,dbus,udev,kmod,libpam-systemd,linux-image-cloud-amd64,openssh-server,"
    "ca-certificates,iproute2,procps,sudo,python3-venv,git,make"
)
#: By the program, the package of Debian that has it.
NEEDS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "debootstrap": "debootstrap",
    "ssh": "openssh-client",
    "mkfs.ext4": "e2fsprogs",
}
DISK = "12G"
BOOT_S = 60
#: So much longer does all take where the processor has to be played.
SLOW = 10
#: Certificates of this machine, which the network that it is in may need.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


class Lacking(Exception):
    """No virtual machine can be had here; says what to do."""


def folder() -> Path:
    return Path(os.environ.get("UPQ_VM_DIR") or "/var/tmp/upq-vm").absolute()


def has_kvm() -> bool:
    """Whether the processor itself runs guests; KVM without that runs none but its own kernels."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and not {"svm", "vmx"}.isdisjoint(flags)


def build() -> Path:
    """The folder with kernel, disk and key; made when it is not there. Raises Lacking."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = sorted({package for program, package in NEEDS.items() if not shutil.which(program)})
    if missing:
        raise Lacking(f"this machine lacks programs: apt-get install {' '.join(missing)}")
    place = folder()
    if (place / "base.img").exists():
        return place
    if os.geteuid() != 0:
        raise Lacking(f"only root can make the image in {place} (once): sudo make vm")
    place.mkdir(parents=True, exist_ok=True)
    root = place / "root"
    shutil.rmtree(root, ignore_errors=True)
    print(f"building Debian {RELEASE} in {place}, which takes some minutes", flush=True)
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, root]
    with (place / "build.log").open("wb") as log:
        if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
            raise Lacking(f"debootstrap failed: {place / 'build.log'}")
    _furnish(place, root)
    for kind in "vmlinuz", "initrd.img":
        (found,) = (root / "boot").glob(f"{kind}-*")
        shutil.copy(found, place / kind)
    fresh = place / "base.new"
    with fresh.open("wb") as file:
        file.truncate(int(DISK[:-1]) << 30)
    subprocess.run(["mkfs.ext4", "-q", "-d", root, fresh], check=True)
    shutil.rmtree(root)
    fresh.rename(place / "base.img")
    return place


def _furnish(place: Path, root: Path) -> None:
    """What debootstrap leaves open: a name, a network, a way in."""
    for name in "key", "key.pub":
        (place / name).unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / "key"], check=True)
    files = {
        "etc/hostname": "upq-vm\n",
        "etc/hosts": "127.0.0.1 localhost upq-vm\n",
        "etc/fstab": "/dev/vda / ext4 noatime 0 1\n",
        "etc/resolv.conf": "nameserver 10.0.2.3\n",
        "etc/machine-id": "",
        "etc/systemd/network/80-dhcp.network": "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n",
        "root/.ssh/authorized_keys": (place / "key.pub").read_text(),
    }
    if CERTIFICATES.exists():
        files["etc/ssl/certs/ca-certificates.crt"] = CERTIFICATES.read_text()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(text)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "systemd-networkd.service").symlink_to("/lib/systemd/system/systemd-networkd.service")
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()


class Failed(AssertionError):
    """A command in the machine did not end well."""


class Machine:
    """One machine, fresh from the image. `run` in it is a root's shell."""

    def __init__(self, place: Path, run_dir: Path) -> None:
        self._place, self._dir = place, run_dir
        self.slow = 1 if has_kvm() else SLOW
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        disk = run_dir / "disk.qcow2"
        subprocess.run(
            [
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                place / "base.img",
                disk,
            ],
            check=True,
        )
        self.console = run_dir / "console.log"
        self._log = (run_dir / "qemu.log").open("wb")
        self._qemu = subprocess.Popen(
            [
                *(
                    "qemu-system-x86_64",
                    "-nodefaults",
                    "-display",
                    "none",
                    "-smp",
                    "2",
                    "-m",
                    "4096",
                ),
                *(
                    ("-enable-kvm", "-cpu", "host")
                    if has_kvm()
                    else ("-accel", "tcg,thread=multi", "-cpu", "max")
                ),
                *("-kernel", place / "vmlinuz", "-initrd", place / "initrd.img"),
                *("-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=no"),
                *("-serial", f"file:{self.console}"),
                *("-drive", f"file={disk},if=virtio,cache=unsafe"),
                *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self._port}-:22"),
                *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _ssh(self) -> list[str]:
        options = [
            *("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"),
            *("ConnectTimeout=5", "BatchMode=yes", "ControlMaster=auto", "ControlPersist=yes"),
            f"ControlPath={self._dir}/ssh",
        ]
        words = [word for option in options for word in ("-o", option)]
        return [
            "ssh",
            "-i",
            str(self._place / "key"),
            "-p",
            str(self._port),
            *words,
            "root@127.0.0.1",
        ]

    def try_(
        self, script: str, stdin: bytes = b"", timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a script; both outputs in stdout."""
        done = subprocess.run(
            [*self._ssh(), f"exec 2>&1; {script}"],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s * self.slow,
            check=False,
        )
        text = done.stdout.decode("utf-8", "replace")
        return subprocess.CompletedProcess(script, done.returncode, text)

    def run(self, script: str, stdin: bytes = b"", timeout_s: float = 300) -> str:
        """What a script that ends well has written. Raises Failed."""
        done = self.try_(script, stdin, timeout_s)
        if done.returncode:
            raise Failed(f"{script}\nexit {done.returncode}: {done.stdout}")
        return done.stdout.rstrip("\n")

    def wait(self, script: str, timeout_s: float = 30) -> str:
        """Until a script ends well; what it has written then. Raises Failed."""
        deadline_s = time.monotonic() + timeout_s * self.slow
        while (done := self.try_(script)).returncode:
            if time.monotonic() > deadline_s:
                raise Failed(f"not within {timeout_s:g} s: {script}\n{done.stdout}")
            time.sleep(0.2)
        return done.stdout.rstrip("\n")

    def wait_until_up(self) -> float:
        """Seconds until systemd has started all that starts at boot."""
        began_s = time.monotonic()
        while self.try_("systemctl is-system-running --wait").stdout.strip() not in (
            "running",
            "degraded",
        ):
            if self._qemu.poll() is not None:
                raise Failed(f"QEMU has ended: {(self._dir / 'qemu.log').read_text()}")
            if time.monotonic() - began_s > BOOT_S * self.slow:
                raise Failed(f"no way in: {self.console.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        return time.monotonic() - began_s

    def reboot(self, how: str = "systemctl reboot") -> None:
        """Also without a word to anybody: `echo b >/proc/sysrq-trigger`."""
        before = self.run("cat /proc/sys/kernel/random/boot_id")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.try_(f"({how}) >/dev/null 2>&1 &", timeout_s=5)
        deadline_s = time.monotonic() + BOOT_S * self.slow
        while True:
            self._hang_up()
            with contextlib.suppress(subprocess.TimeoutExpired):
                now = self.try_("cat /proc/sys/kernel/random/boot_id", timeout_s=10)
                if now.returncode == 0 and now.stdout.strip() != before:
                    break
            if time.monotonic() > deadline_s:
                raise Failed("it does not come back")
            time.sleep(0.3)
        self.wait_until_up()

    def put_source(self, to: str = "/root/upq") -> None:
        """The tree as it is here, without what git ignores."""
        listed = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        there = b"\0".join(
            name for name in listed.split(b"\0") if (ROOT / os.fsdecode(name)).exists()
        )
        packed = subprocess.run(
            ["tar", "-C", ROOT, "--null", "-T", "-", "-cz"],
            input=there,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        self.run(f"rm -rf {to}; mkdir -p {to}; tar -C {to} -xz --no-same-owner", packed)

    def shell(self) -> None:
        subprocess.run(["ssh", "-t", *self._ssh()[1:]], check=False)

    def _hang_up(self) -> None:
        subprocess.run(
            [*self._ssh()[:-1], "-O", "exit", "root@127.0.0.1"], capture_output=True, check=False
        )

    def close(self) -> None:
        self._hang_up()
        self._qemu.kill()
        self._qemu.wait()
        self._log.close()


@contextlib.contextmanager
def machine(run_dir: Path) -> Iterator[Machine]:
    """A fresh machine that is up. Raises Lacking where there can be none."""
    place = build()
    if not has_kvm():
        print(f"*** no KVM on this processor: QEMU plays one, {SLOW} times slower", flush=True)
    one = Machine(place, run_dir)
    try:
        one.wait_until_up()
        yield one
    finally:
        one.close()


def main() -> None:
    run_dir = folder() / f"run-{os.getpid()}"
    try:
        build()
        run_dir.mkdir()
        with machine(run_dir) as one:
            one.put_source()
            one.shell()
    except Lacking as error:
        sys.exit(f"*** no virtual machine: {error}")
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
