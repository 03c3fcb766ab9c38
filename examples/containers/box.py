#!/usr/bin/env python3
"""Small real containers with the verbs of vzctl: create, set, start, stop, destroy, exec, list.

As root it drives LXC. Without LXC, or without root, `unshare` of util-linux makes the same
namespaces. Either way a container has a root file system of its own, its own processes under an
init, its own host name, and an address on a network interface of its own. A verb that finds its
work done already is content: it may be asked again after a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
#: Where the containers live, each in a folder with its number.
BOXES = Path(os.environ.get("BOX_DIR") or HERE / "var/boxes")
#: Templates are archives here; the one called `busybox` is made out of this machine's busybox.
TEMPLATES = HERE / "templates"
#: The bridge of this machine that the containers are linked to; "" for none.
BRIDGE = os.environ.get("BOX_BRIDGE", "")

VERBS = ("create", "set", "start", "stop", "destroy", "exec")

#: How long a container may take to come up, and to shut down by itself.
START_S, STOP_S = 10.0, 5
#: What is told to the programs that make a container, so that nothing else gets into it.
CLEAN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

FOLDERS = "bin dev etc proc root run sys tmp usr var/log www"
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/shadow": "root:*:19000:0:99999:7:::\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/inittab": "::respawn:/bin/httpd -f -p 80 -h /www\n::shutdown:/bin/touch /root/shut_down\n",
    "www/index.html": "A container of upq's example.\n",
}

LXC_CONFIG = """\
lxc.rootfs.path = dir:{root}
lxc.uts.name = {hostname}
lxc.net.0.type = veth
lxc.net.0.veth.pair = {link}
lxc.net.0.name = eth0
lxc.net.0.flags = up
{address}
lxc.mount.auto = proc:mixed sys:ro
lxc.autodev = 1
lxc.tty.max = 0
lxc.cap.drop = sys_module mac_admin mac_override sys_time sys_rawio
lxc.signal.halt = SIGUSR2
"""

#: Runs in the new namespaces: $1 root, $2 host name, $3 address.
INNER = """\
set -e
cd "$1"
hostname "$2"
ip link set lo up
ip link add eth0 type veth peer name outside
ip link set eth0 up
ip link set outside up
[ -z "$3" ] || ip addr add "$3" dev eth0
mount --bind "$1" "$1"
cd "$1"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t tmpfs -o nosuid,noexec,mode=755,size=1m none dev
for one in null zero full random urandom; do
    : >dev/$one
    mount --bind /dev/$one dev/$one
done
mkdir -p .outside
pivot_root . .outside
exec chroot . /bin/sh -c '
    umount -l /.outside && rmdir /.outside && exec /sbin/init' </dev/null >/dev/null 2>&1
"""


class Fault(Exception):
    """What is told to the user; the exit code is 1."""


class Box:
    """One container, whether it is there or not."""

    def __init__(self, cid: str) -> None:
        self.cid = cid
        self.folder = BOXES / cid
        self.root = self.folder / "rootfs"
        self.init = self.folder / "init"

    # What it is

    @property
    def exists(self) -> bool:
        return (self.folder / "facts.json").exists()

    @property
    def facts(self) -> dict[str, Any]:
        """Raises Fault when there is no such container."""
        try:
            return dict(json.loads((self.folder / "facts.json").read_text()))
        except FileNotFoundError:
            raise Fault(f"container {self.cid} does not exist") from None

    def keep(self, facts: dict[str, Any]) -> None:
        replace(self.folder / "facts.json", json.dumps(facts))

    @property
    def link(self) -> str:
        """The name of the outer end of its network cable."""
        return f"box{zlib.crc32(str(self.folder).encode()):08x}"

    @property
    def pid(self) -> int:
        """Its init; 0 while it does not run."""
        with contextlib.suppress(OSError, ValueError):
            pid, born = map(int, self.init.read_text().split())
            if started(pid) == born:
                return pid
        return 0

    # Its life

    def create(self, template: str) -> None:
        maker = os.environ.get("UPQ_JOB_ID", "")
        if self.exists:
            if maker and self.facts["maker"] == maker:
                return
            raise Fault(f"container {self.cid} exists already")
        BOXES.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{self.cid}.", dir=BOXES) as made:
            root = Path(made) / "box/rootfs"
            root.mkdir(parents=True)
            unpack(template, root)
            facts = {"maker": maker, "template": template, "hostname": f"ct{self.cid}"}
            replace(root.parent / "facts.json", json.dumps(facts))
            root.parent.rename(self.folder)

    def set(self, args: argparse.Namespace) -> None:
        facts = self.facts
        if self.pid:
            raise Fault(f"container {self.cid} is running: stop it first")
        if (self.root / "etc").is_symlink():
            raise Fault(f"container {self.cid}: its /etc leads elsewhere")
        if args.ipadd:
            facts["address"] = str(ipaddress.ip_interface(args.ipadd))
        if args.hostname:
            facts["hostname"] = host_name(args.hostname)
            replace(self.root / "etc/hostname", f"{args.hostname}\n")
        if args.nameserver:
            server = ipaddress.ip_address(args.nameserver)
            replace(self.root / "etc/resolv.conf", f"nameserver {server}\n")
        if args.userpasswd:
            given = sys.stdin.read() if args.userpasswd == "-" else args.userpasswd
            if given.strip():
                self.set_password(*given.rstrip("\n").partition(":")[::2])
        self.keep(facts)

    def set_password(self, user: str, password: str) -> None:
        """Makes the user if there is none."""
        if not re.fullmatch("[a-z_][a-z0-9_-]{0,31}", user):
            raise Fault(f"{user!r} is not the name of a user")
        hashed = run(["openssl", "passwd", "-6", "-stdin"], input=password).strip()
        passwd = (self.root / "etc/passwd").read_text()
        if not re.search(f"^{user}:", passwd, re.MULTILINE):
            uid = 1000 + passwd.count("\n")
            replace(
                self.root / "etc/passwd",
                f"{passwd}{user}:x:{uid}:{uid}::/home/{user}:/bin/sh\n",
            )
        shadow = (self.root / "etc/shadow").read_text().splitlines()
        others = [line for line in shadow if not line.startswith(f"{user}:")]
        lines = [*others, f"{user}:{hashed}:19000:0:99999:7:::", ""]
        replace(self.root / "etc/shadow", "\n".join(lines), mode=0o600)

    def start(self) -> None:
        facts = self.facts
        if self.pid:
            return
        pid = start_lxc(self, facts) if has_lxc() else start_unshare(self, facts)
        replace(self.init, f"{pid} {started(pid)}\n")

    def stop(self) -> None:
        """Have it shut down; what does not is killed."""
        pid = self.pid
        self.facts  # noqa: B018, it has to exist
        if not pid:
            return
        fd = os.pidfd_open(pid)
        try:
            # The signal by which busybox's init powers the machine off.
            for signum in (signal.SIGUSR2, signal.SIGKILL):
                signal.pidfd_send_signal(fd, signum)
                if until(lambda: started(pid) is None, STOP_S):
                    break
        finally:
            os.close(fd)
        until(lambda: not Path("/sys/class/net", self.link).exists(), STOP_S)
        self.init.unlink(missing_ok=True)

    def destroy(self) -> None:
        if self.pid:
            raise Fault(f"container {self.cid} is running: stop it first")
        if self.folder.exists():
            # Without its facts it does not exist any more, however far the rest comes.
            (self.folder / "facts.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def exec(self, command: list[str]) -> NoReturn:
        if not self.pid:
            raise Fault(f"container {self.cid} is not running")
        inside = ["--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"]
        user = [] if same_user(self.pid) else ["--user", "--preserve-credentials"]
        env = {"PATH": "/bin", "HOME": "/root"}
        os.execvpe("nsenter", ["nsenter", "-t", str(self.pid), *user, *inside, *command], env)

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        facts, pid = self.facts, self.pid
        return (
            self.cid,
            str(len(inmates(pid))) if pid else "-",
            "running" if pid else "stopped",
            facts.get("address", "-").partition("/")[0],
            facts["hostname"],
        )


# The two ways to start one


def has_lxc() -> bool:
    return os.geteuid() == 0 and shutil.which("lxc-start", path=CLEAN["PATH"]) is not None


def start_lxc(box: Box, facts: dict[str, Any]) -> int:
    lines = [f"lxc.net.0.ipv4.address = {facts['address']}"] if "address" in facts else []
    if BRIDGE:
        lines.append(f"lxc.net.0.link = {BRIDGE}")
    config = LXC_CONFIG.format(
        root=box.root, hostname=facts["hostname"], link=box.link, address="\n".join(lines)
    )
    replace(box.folder / "config", config)
    where = ["-P", str(BOXES), "-n", box.cid]
    run(["lxc-start", *where, "-l", "ERROR", "-o", str(box.folder / "log")])
    return int(run(["lxc-info", *where, "-p", "-H"]))


def start_unshare(box: Box, facts: dict[str, Any]) -> int:
    spaces = [
        "--user",
        "--map-root-user",
        "--mount",
        "--uts",
        "--ipc",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
    ]
    inner = ["sh", "-c", INNER, "sh", str(box.root), facts["hostname"], facts.get("address", "")]
    with open(box.folder / "log", "wb") as log:
        keeper = subprocess.Popen(
            ["unshare", *spaces, "--fork", "--kill-child", "--", *inner],
            env=CLEAN, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")

    def init() -> int:
        if keeper.poll() is not None:
            said = (box.folder / "log").read_text().strip()
            raise Fault(f"container {box.cid} does not start: {said[-300:]}")
        for pid in children.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text() == "init\n":
                return int(pid)
        return 0

    try:
        return until(init, START_S) or cannot(f"container {box.cid} does not come up")
    except BaseException:
        keeper.kill()
        raise


# The root file system


def unpack(template: str, root: Path) -> None:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", template):
        raise Fault(f"{template!r} is not the name of a template")
    archives = sorted(TEMPLATES.glob(f"{template}.tar*"))
    if archives:
        run(["tar", "-C", str(root), "--no-same-owner", "-xf", str(archives[0])])
    elif template == "busybox":
        make_busybox(root)
    else:
        raise Fault(f"no template {template} in {TEMPLATES}")


def make_busybox(root: Path) -> None:
    program = shutil.which("busybox") or cannot("needs busybox (Debian: busybox-static)")
    if run(["ldd", program], check=False):
        raise Fault(f"{program} is not static (Debian: busybox-static)")
    for name in FOLDERS.split():
        (root / name).mkdir(parents=True)
    shutil.copy(program, root / "bin/busybox")
    for name in run([program, "--list"]).split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    (root / "sbin").symlink_to("bin")
    (root / "etc/init.d").mkdir()
    for path, text in FILES.items():
        replace(root / path, text, mode=0o600 if path == "etc/shadow" else 0o644)


def replace(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file, whole or not at all; never through a link that a container has left there."""
    fd, name = tempfile.mkstemp(dir=path.parent)
    with open(fd, "w") as file:
        os.fchmod(fd, mode)
        file.write(text)
    os.replace(name, path)


# What the kernel knows


def started(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def inmates(init: int) -> list[int]:
    """The processes of a container."""
    space = namespace(init, "pid")
    return [pid for pid in pids() if namespace(pid, "pid") == space != ""]


def pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def namespace(pid: int, kind: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    return ""


def same_user(pid: int) -> bool:
    return namespace(pid, "user") == namespace(os.getpid(), "user")


# The rest


def host_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", name):
        raise Fault(f"{name!r} is not a host name")
    return name


def run(command: list[str], *, check: bool = True, input: str | None = None) -> str:
    """What a program prints. Raises Fault when it fails, unless `check` is False."""
    how: Any = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
    done = subprocess.run(command, env=CLEAN, capture_output=True, text=True, check=False, **how)
    if done.returncode and check:
        said = " ".join((done.stderr or done.stdout).split())
        raise Fault(f"{command[0]}: {said[-300:] or f'exit code {done.returncode}'}")
    return "" if done.returncode else done.stdout


def until(is_so: Callable[[], Any], timeout_s: float) -> Any:
    """Ask until the answer is true, or the time is over; the last answer."""
    over_s = time.monotonic() + timeout_s
    while not (found := is_so()) and time.monotonic() < over_s:
        time.sleep(0.01)
    return found


def cannot(why: str) -> NoReturn:
    raise Fault(why)


def table() -> str:
    boxes = [Box(path.name) for path in BOXES.glob("*") if path.name.isdigit()]
    rows = [box.row for box in sorted(boxes, key=lambda box: int(box.cid)) if box.exists]
    head = ("CTID", "NPROC", "STATUS", "IP_ADDR", "HOSTNAME")
    return "\n".join("{:>8} {:>6} {:8} {:15} {}".format(*row) for row in (head, *rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="box", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    of = {
        name: verbs.add_parser(name)
        for name in ["create", "set", "start", "stop", "destroy", "exec"]
    }
    for verb in of.values():
        verb.add_argument("cid", type=lambda text: str(int(text)))
    of["create"].add_argument("--ostemplate", required=True)
    for option in ("--ipadd", "--hostname", "--nameserver", "--userpasswd"):
        of["set"].add_argument(option)
    of["set"].add_argument("--save", action="store_true")
    of["exec"].add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("list").add_argument("-a", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.verb == "list":
            print(table())
            return 0
        box = Box(args.cid)
        if args.verb == "create":
            box.create(args.ostemplate)
        elif args.verb == "set":
            box.set(args)
        elif args.verb == "exec":
            box.exec(args.command)
        else:
            getattr(box, args.verb)()
    except (Fault, ValueError, OSError) as fault:
        print(f"box: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
