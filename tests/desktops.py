"""Machines of the storage example, for its tests: a copy of it with a daemon, and a libvirtd."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import unavailable
from tests.daemons import PATIENCE_S, ROOT, Daemon, until
from tests.servers import free_port

EXAMPLE = ROOT / "examples/storage"
MB = 1 << 20
DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>16</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
#: Ends a libvirtd and its domains once its standard input ends: the test has closed it, or died.
UNDERTAKER = """
cat
for domain in $(virsh -q -c "$1" list --name); do virsh -q -c "$1" destroy "$domain"; done
kill "$2"
rm -rf "$3"
"""


def img(*words: object) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, words)], check=True, capture_output=True, text=True
    )
    return done.stdout


def info(image: Path) -> dict[str, Any]:
    return dict(json.loads(img("info", "-U", "--output=json", image)))


class Site(Daemon):
    """A machine of the platform: a copy of the example, its daemon, and its pool `fast`."""

    SOCKET, LOG = "var/upq.sock", "var/upq.log"

    def __init__(self, folder: Path, url: str = "", **env: str) -> None:
        for program, package in {"qemu-img": "qemu-utils", "zstd": "zstd"}.items():
            if shutil.which(program) is None:
                unavailable(f"no program {program} (Debian: apt-get install {package})")
        ignored = shutil.ignore_patterns("var", "__pycache__")
        shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=ignored)
        super().__init__(folder)
        shutil.copy(EXAMPLE / "upq.cfg", self.config)
        if url:
            env["UPQ_DB__URL"] = url
        self.env = env
        self.pool("fast")
        self.web: subprocess.Popen[bytes] | None = None

    def configure(self, config: str) -> None:
        """Its own is what is tested."""

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if self.web:
            self.web.kill()
            self.web.wait()
        super().__exit__(error, *rest)

    def pool(self, name: str) -> Path:
        """A storage is mounted."""
        folder = self.folder / "var/pools" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def disk(self, name: str, pool: str = "fast") -> Path:
        return self.folder / "var/pools" / pool / "disks" / name

    def do(self, line: str) -> dict[str, Any]:
        """The result of a task that succeeds."""
        job = self.run(line)
        assert job["state"] == "done", f"{line}: {job['message']}"
        return dict(job["result"])

    def refused(self, line: str) -> str:
        """Why a task failed, at its first attempt."""
        job = self.run(line)
        assert (job["state"], job["attempt"]) == ("failed", 1), job
        return str(job["message"])

    def made(self, name: str, data: bytes, size: str = "64M") -> Path:
        """A disk with content."""
        self.do(f"create_disk pool:fast disk:{name} size:{size}")
        return self.fill(name, data)

    def fill(self, name: str, data: bytes) -> Path:
        raw, disk = self.folder / "raw", self.disk(name)
        raw.write_bytes(data)
        img("convert", "-n", "-f", "raw", "-O", "qcow2", raw, disk)
        raw.unlink()
        return disk

    def feed(self, user: str) -> list[dict[str, Any]]:
        file = self.folder / f"var/feeds/{user}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def serve(self) -> None:
        """Start vdi.web."""
        port = free_port()
        ini = self.folder / "vdi.ini"
        ini.write_text(ini.read_text().replace(":8088", f":{port}"))
        self.web = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "vdi.web:app", "--port", str(port)],
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        until(answers)

    @contextlib.contextmanager
    def busy(self, *disks: str) -> Iterator[list[int]]:
        """Jobs that run for as long as the block: they wait for disks that the test holds."""
        with contextlib.ExitStack() as stack:
            ids = []
            for name in disks:
                self.do(f"create_disk pool:fast disk:{name} size:1M")
                lock = stack.enter_context(
                    open(self.folder / f"var/pools/fast/.locks/disks.{name}", "a")
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
                ids.append(self.submit(f"resize pool:fast disk:{name} size:2M"))
            for id in ids:
                self.until_state(id, "running")
            yield ids


def content(image: Path) -> bytes:
    """What a guest finds at the beginning of a disk."""
    raw = image.parent.parent / "content"
    img("convert", "-O", "raw", image, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def put(url: str, data: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the answer, also when it comes before all of the data was sent."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("PUT", parts.path, data)
        with connection.getresponse() as answer:
            return answer.status, json.load(answer) if answer.status < 300 else {}


def get(url: str, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""


class Hypervisor:
    """A libvirtd of our own, in no need of the system's."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"qemu+unix:///session?socket={folder}/libvirt/libvirt-sock"
        words = ["/usr/sbin/libvirtd"]
        if os.geteuid() == 0:
            account = pwd.getpwnam("nobody")
            os.chown(folder, account.pw_uid, account.pw_gid)
            words = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}",
                     "--clear-groups", *words]  # fmt: skip
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder),
            "XDG_CONFIG_HOME": f"{folder}/config", "XDG_CACHE_HOME": f"{folder}/cache",
        }  # fmt: skip
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(words, env=self.env, cwd=folder, stdout=log, stderr=log)
        self.undertaker = subprocess.Popen(
            ["sh", "-c", UNDERTAKER, "undertaker", self.uri, str(self.process.pid), str(folder)],
            env=self.env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        until((folder / "libvirt/libvirt-sock").exists)

    def virsh(self, *words: str) -> str:
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *words],
            env=self.env, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip()

    def define(self, site: Site, name: str) -> Path:
        """A desktop with a disk of the pool."""
        site.do(f"create_disk pool:fast disk:{name}.qcow2 size:4M")
        disk = site.disk(f"{name}.qcow2")
        disk.chmod(0o666)
        for folder in disk.parents[:4]:
            folder.chmod(0o755)
        xml = site.folder / "domain.xml"
        xml.write_text(DOMAIN.format(name=name, disk=disk))
        self.virsh("define", str(xml))
        return disk

    def state(self, domain: str) -> str:
        return self.virsh("domstate", domain)

    def close(self) -> None:
        assert self.undertaker.stdin
        self.undertaker.stdin.close()
        self.undertaker.wait(PATIENCE_S)
        self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def held_up(site: Site, name: str, script: str) -> Iterator[None]:
    """Start the machine with a program that takes its time; the real one is `$program`."""
    bin_ = site.folder / "bin"
    bin_.mkdir()
    (bin_ / name).write_text(f"#!/bin/sh\nprogram={shutil.which(name)}\n{script}\n")
    (bin_ / name).chmod(0o755)
    site.env["PATH"] = f"{bin_}:{os.environ['PATH']}"
    with site:
        yield
    del site.env["PATH"]


def sleepers(site: Site) -> list[Path]:
    """The sleeping programs in its folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            sleeps = (process / "cmdline").read_bytes().startswith(b"sleep\0")
            if sleeps and (process / "cwd").readlink() == site.folder:
                found.append(process)
    return found
