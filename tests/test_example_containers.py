"""The example of containers: real ones, from their creation to their end.

As root they are LXC's, and as another user those of `unshare`. What cannot be had here is vzctl: a
recorder stands in for it where it is about the lines for OpenVZ. The numbers are those of what
openvz-rq can do, of which the example has to be able to do each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from email.message import EmailMessage
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from tests.conftest import unavailable
from tests.daemons import PATIENCE_S, ROOT, Daemon, for_user, until
from tests.servers import free_port, short_folder
from tests.test_docs import commands, fits
from tests.test_notify import Postbox
from upq.client import Client

EXAMPLE = ROOT / "examples/containers"
STAGES = ["create", "setup", "start", "stop", "destroy"]
QUEUES = {stage: f"{'creat' if stage == 'create' else stage}q" for stage in STAGES}
REQUEST = "cid:501 ipadd:198.18.5.1/24 hname:web1 nserver:198.18.5.254 usr:ann pwd:s3cret-pw"

RECORDER = """\
#!/bin/sh
# Stands in for vzctl: writes down what it was told, and ends as the file `exit` says.
here=${0%/*}
echo "$*" >>"$here/told"
while [ -e "$here/hold" ]; do sleep 0.02; done
exit "$(cat "$here/exit" 2>/dev/null || echo 0)"
"""


class Host(Daemon):
    """A machine with containers: a copy of the example, its daemon, and its box."""

    SOCKET, LOG = "var/upq.sock", "var/log/upq.log"

    def __init__(self, folder: Path, way: str = "best") -> None:
        shutil.copytree(
            EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("var", "__pycache__")
        )
        self.folder = folder
        self.url = ""
        self.process = None
        self.python = sys.executable
        self.env = {"UPQ_LOGGING__LOGLEVEL": "debug"}
        self.how: dict[str, Any] = {}
        self.forgiven: list[str] = []
        self._heard = b""
        self._notify = None
        self._log_end = 0
        folder.chmod(0o755)
        if os.geteuid() == 0 and (way == "unshare" or lxc_fault()):
            for_user(self, "nobody")
        self.server: Controller | None = None
        self.postbox = Postbox()
        self.set("error", mail_server=f"127.0.0.1:{free_port()}")

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Nothing is left of the containers, whatever has happened."""
        self.kill9()
        if self.server is not None:
            self.server.stop()
        for cid in self.boxes():
            self.box("stop", cid)
            self.box("destroy", cid)
        until(lambda: not self.traces())
        if error is None:
            self.has_behaved()

    def set(self, job: str, **settings: str) -> None:
        """As one would edit the section of a job."""
        for name, text in settings.items():
            self.env[f"UPQ_JOB_{job.upper()}__{name.upper()}"] = text

    # Containers

    def box(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"]}
        return subprocess.run(
            [str(self.folder / "box.py"), *args], input=stdin, capture_output=True, text=True,
            env=env, timeout=PATIENCE_S, check=False, cwd="/", **self.how,
        )  # fmt: skip

    def inside(self, cid: int, command: str) -> str:
        done = self.box("exec", str(cid), "/bin/sh", "-c", command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def listed(self) -> dict[str, dict[str, str]]:
        """What `box list -a` shows, by the number of the container."""
        head, *rows = [line.split() for line in self.box("list", "-a").stdout.splitlines()]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}

    def boxes(self) -> list[str]:
        return [path.name for path in (self.folder / "var/boxes").glob("*") if path.name.isdigit()]

    def traces(self) -> list[str]:
        """Processes with a mount of this folder, this machine's own mounts and interfaces too."""
        mounts = [
            f"{path}: {line}"
            for path in Path("/proc").glob("[0-9]*/mountinfo")
            for line in lines(path)
            if f"{self.folder}/" in line
        ]
        boxes = [f"{self.folder}/var/boxes/{cid}" for cid in range(501, 511)]
        links = {f"box{zlib.crc32(box.encode()):08x}" for box in boxes}
        return mounts + sorted(links.intersection(os.listdir("/sys/class/net")))

    # Jobs

    def chain(self, id: int) -> list[dict[str, Any]]:
        """A request and what has followed it, as far as it has come, but for failures."""
        found = [self.ask(f"show {id}")]
        while children := [c for c in found[-1]["children"] if c["type"] in STAGES]:
            (child,) = children
            found.append(self.ask(f"show {child['id']}"))
        return [one["job"] for one in found]

    def until_at(self, id: int, stage: str, *states: str) -> dict[str, Any]:
        """The job of that stage, once it is in one of these states."""

        def there() -> dict[str, Any] | None:
            last = self.chain(id)[-1]
            return last if last["type"] == stage and last["state"] in states else None

        found = until(there)
        assert found is not None
        return found

    def whole(self, line: str) -> list[dict[str, Any]]:
        """Submit a request, and see the end of its container."""
        id = self.submit(line)
        self.until_at(id, "destroy", "done")
        return self.chain(id)

    # Mail

    def serve_mail(self) -> None:
        host, port = self.env["UPQ_JOB_ERROR__MAIL_SERVER"].split(":")
        self.server = Controller(self.postbox, hostname=host, port=int(port))
        self.server.start()


def lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


Make = Callable[..., Host]


@cache
def lxc_fault() -> str:
    """Why root can start no container of LXC here; "" when it can."""
    if not shutil.which("lxc-start"):
        unavailable("no program lxc-start (Debian: apt-get install lxc)")
    folder = short_folder()
    folder.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "BOX_DIR": str(folder / "boxes")}
    fault = ""
    try:
        for verb in ("create 1 --ostemplate busybox", "start 1", "stop 1", "destroy 1"):
            command = [sys.executable, str(EXAMPLE / "box.py"), *verb.split()]
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            fault = fault or done.stderr.strip() * (done.returncode != 0)
    finally:
        shutil.rmtree(folder)
    return fault


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a machine with containers, which is not started: as root with LXC, else `unshare`."""
    folder = short_folder()
    busybox = shutil.which("busybox") or unavailable("no program busybox (apt-get: busybox-static)")
    if subprocess.run(["ldd", busybox], capture_output=True, check=False).returncode == 0:
        unavailable("busybox is not static (Debian: apt-get install busybox-static)")
    yield lambda way="best": Host(folder, way)
    shutil.rmtree(folder)


@pytest.fixture
def host(make: Make) -> Iterator[Host]:
    with make() as host:
        yield host


@pytest.fixture(params=["lxc", "unshare"])
def each(request: pytest.FixtureRequest, make: Make) -> Iterator[Host]:
    """A machine for each way to make a container."""
    if request.param == "lxc":
        if os.geteuid() != 0:
            unavailable("only root can start containers of LXC")
        if fault := lxc_fault():
            pytest.skip(f"LXC starts no container on this machine: {fault}")
    with make(request.param) as host:
        yield host


# The web page --------------------------------------------------------------------------------


@pytest.mark.alone
def test_ovz_01_a_page_hands_over_a_nested_request_in_one_call(make: Make) -> None:
    """From PHP, from Python and as a line: the id of a job that is on disk, within 50 ms."""
    if not shutil.which("php"):
        unavailable("no program php (Debian: apt-get install php-cli)")
    os_ = {"cid": 501, "net": {"ipadd": "198.18.5.1/24"}, "login": {"usr": "ann", "pwd": "s3cret"}}
    page = (
        "require $argv[1];"
        "foreach (range(1, 20) as $n) { $began = hrtime(true);"
        " $reply = launch(json_decode($argv[2], true));"
        " echo json_encode([$reply, (hrtime(true) - $began) / 1e6]), PHP_EOL; }"
    )
    with make() as host:
        for queue in ("container", *QUEUES.values()):
            host.ask(f"pause {queue}")
        done = subprocess.run(
            ["php", "-r", page, "--", host.folder / "web/launch.php", json.dumps(os_)],
            env={**os.environ, "UPQ_SOCKET": str(host.folder / "var/upq.sock")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        took_ms = {"php": [took for _, took in replies]}
        ids = [reply["id"] for reply, _ in replies]

        took_ms["python"] = []
        for _ in range(20):
            began_s = time.perf_counter()
            with Client(host.folder / "var/upq.sock") as upq:
                ids.append(upq.submit("container", os_).id)
            took_ms["python"].append((time.perf_counter() - began_s) * 1e3)

        took_ms["line"] = []
        for _ in range(20):
            began_s = time.perf_counter()
            ids.append(host.submit(f"container {json.dumps(os_)}"))
            took_ms["line"].append((time.perf_counter() - began_s) * 1e3)

        assert len(set(ids)) == 60
        shown = host.job(ids[0])["params"]
        assert shown["net"] == os_["net"]
        assert shown["login"] == {"usr": "ann", "pwd": "***"}
        for how, times in took_ms.items():
            print(f"{how}: {statistics.median(times):.1f} ms, at most {max(times):.1f} ms")
            assert statistics.median(times) < 50


def test_a_request_that_cannot_be_met_is_refused_before_it_is_queued(host: Host) -> None:
    for wrong, why in {
        "cid:7": "cid: '7' is not a number from 101 on",
        "hname:web1": "cid: '' is not a number from 101 on",
        "cid:501 ipadd:10.2.0.999": "ipadd: '10.2.0.999' does not appear to be",
        "cid:501 nserver:dns": "nserver: 'dns' does not appear to be",
        "cid:501 hname:-web": "hname: '-web' is not the name of a host",
        "cid:501 uptime:soon": "uptime: 'soon' is not a time",
        '{"cid": 501, "net": {"cid": 502}}': "cid: is given twice",
    }.items():
        assert host.say(f"container {wrong}").startswith(f"ERR refused {why}")
    none = host.say("lease owner:ann instances:0")
    assert none.startswith("ERR refused instances: 0 is less than 1")
    assert host.ask("jobs")["jobs"] == []


# The five stages -----------------------------------------------------------------------------


def sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"": []}
    for line in text.splitlines():
        if header := re.match(r"\[(.+)\]", line):
            found[header[1]] = []
        else:
            found[list(found)[-1]].append(line)
    return found


def test_ovz_02_each_stage_is_a_command_and_no_code() -> None:
    known = sections((EXAMPLE / "upq.cfg").read_text())
    for stage in STAGES:
        (command,) = [one for one in known[f"job {stage}"] if one.startswith("command = ")]
        assert command.startswith("command = ./box.py ")
        assert not (EXAMPLE / f"jobs/{stage}.py").exists()


def test_ovz_03_05_08_09_16_a_container_from_its_creation_to_its_end(each: Host) -> None:
    # The container stays up until this has looked at it.
    each.ask(f"pause {QUEUES['stop']}")
    id = each.submit(f"container {REQUEST} uptime:0")
    stop = each.until_at(id, "stop", "queued", "blocked")

    # 05: it is set up as the request says, inside too.
    assert each.inside(501, "hostname") == "web1\n"
    assert "inet 198.18.5.1/24" in each.inside(501, "ip addr show eth0")
    assert each.inside(501, "cat /etc/resolv.conf") == "nameserver 198.18.5.254\n"
    until(lambda: each.box("exec", "501", "wget", "-qO-", "http://198.18.5.1/").returncode == 0)
    hashed = re.search(r"^ann:(\$6\$(\S+?)\$\S+?):", each.inside(501, "cat /etc/shadow"), re.M)
    assert hashed
    again = subprocess.run(
        ["openssl", "passwd", "-6", "-salt", hashed[2], "-stdin"],
        input="s3cret-pw", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert again.stdout.strip() == hashed[1]
    assert "s3cret-pw" not in json.dumps([each.ask(f"show {job['id']}") for job in each.chain(id)])
    assert "s3cret-pw" not in each.log

    # It is a machine of its own: an init, and a root, network and processes that are not ours.
    assert each.inside(501, "cat /proc/1/comm") == "init\n"
    seen = {int(n) for n in each.inside(501, "echo /proc/[0-9]*").replace("/proc/", "").split()}
    assert max(seen) < 1000 and not each.inside(501, f"ls -d {each.folder} || true")

    # 16: another terminal sees how far it is.
    shown = each.listed()["501"]
    assert int(shown.pop("NPROC")) >= 2
    assert shown == {
        "CTID": "501", "STATUS": "running", "IP_ADDR": "198.18.5.1", "HOSTNAME": "web1",
    }  # fmt: skip
    stages = [(job["type"], job["state"]) for job in each.chain(id)]
    assert stages == [
        *((name, "done") for name in ("container", "create", "setup", "start")),
        ("stop", "blocked"),
    ]
    tree = each.ask(f"show {id}")["tree"]
    assert [(one["type"], one["state"]) for one in tree] == stages[1:]
    assert "paused" in each.why(stop["id"])

    # 08: another container is none of the chain's business.
    other = each.submit("keep cid:502")
    each.until_at(other, "start", "done")

    each.ask(f"resume {QUEUES['stop']}")
    each.until_at(id, "destroy", "done")
    chain = each.chain(id)

    # 03: one stage after the other, each in its own queue.
    assert [job["type"] for job in chain] == ["container", *STAGES]
    assert [job["queue"] for job in chain[1:]] == list(QUEUES.values())
    assert {job["state"] for job in chain} == {"done"}
    for before, after in itertools.pairwise(chain):
        assert before["ended_at"] <= after["started_at"]

    # 08: what is stopped is what is destroyed.
    assert [job["params"]["cid"] for job in chain] == ["501", *[501] * 5]
    assert each.listed()["502"]["STATUS"] == "running"

    # 09: nothing of it is left.
    each.run("stop cid:502 uptime:0")
    each.run("destroy cid:502")
    assert each.listed() == {}
    assert each.boxes() == []


def test_ovz_04_the_next_stage_is_queued_only_after_the_command_has_done_its_work(
    host: Host,
) -> None:
    id = host.submit("container cid:501 ostemplate:no-such")
    create = host.until_at(id, "create", "failed")
    assert create["message"].startswith("box.py exited with 1: box: no template no-such")
    assert host.ask("jobs type:setup")["jobs"] == []
    assert host.listed() == {}


def test_ovz_06_the_wait_holds_no_place(make: Make) -> None:
    """With one place to start in and one to stop in, three containers are up at a time."""
    host = make()
    host.set("start", concurrent="1")
    host.set("stop", concurrent="1")
    with host:
        for cid in (501, 502):
            id = host.submit(f"container cid:{cid} uptime:1h")
            assert host.until_at(id, "stop", "queued")["run_at"]
        *_, start, stop, _ = host.whole("container cid:503 uptime:1s")
        assert parsed(stop["started_at"]) - parsed(start["started_at"]) >= 1
        up = {cid: box["STATUS"] for cid, box in host.listed().items()}
        assert up == {"501": "running", "502": "running"}


def test_ovz_07_how_long_it_is_up_is_easy_to_change(make: Make) -> None:
    """In the section for all, in a request for one; and it may stay up."""
    host = make()
    host.set("stop", params="cid:int uptime=2h")
    with host:
        for more, uptime_s in (("", 7200), ("uptime:120", 120)):
            id = host.submit(f"container cid:501 {more}")
            host.until_at(id, "stop", "queued", "blocked")
            *_, start, stop = host.chain(id)
            wait_s = parsed(stop["run_at"]) - parsed(start["ended_at"])
            assert wait_s == pytest.approx(uptime_s, abs=1)
            host.ask(f"cancel {stop['id']}")
            host.run("stop cid:501 uptime:0")
            host.run("destroy cid:501")

        kept = host.submit("keep cid:502")
        host.until_at(kept, "start", "done")
        assert [job["type"] for job in host.chain(kept)] == ["keep", *STAGES[:3]]
        assert host.listed()["502"]["STATUS"] == "running"


def test_ovz_10_eight_of_a_stage_are_at_work_at_a_time(make: Make) -> None:
    host = make()
    vzctl = openvz(host)
    (vzctl / "hold").touch()
    with host:
        for cid in range(501, 510):
            host.submit(f"container cid:{cid}")
        until(lambda: len(host.ask("jobs type:create state:running")["jobs"]) == 8)
        until(lambda: len(host.ask("jobs type:create state:queued")["jobs"]) == 1)
        (vzctl / "hold").unlink()
        until(lambda: len(host.ask("jobs type:start state:done")["jobs"]) == 9)


# The page ------------------------------------------------------------------------------------


def test_what_the_page_tells_to_do_can_be_done(host: Host) -> None:
    page = (EXAMPLE / "README.md").read_text()
    here = host.folder / "here"
    (here / "examples").mkdir(parents=True)
    (here / "examples/containers").symlink_to(host.folder)
    (here / "upq-cli").symlink_to(ROOT / "upq-cli")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "UPQ_CONFIG": "examples/containers/upq.cfg"}
    (block,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)

    def comes_true(command: str, shown: str) -> bool:
        done = subprocess.run(
            command, shell=True, cwd=here, env=env, capture_output=True, text=True, check=False
        )
        return not done.returncode and (not shown or fits(shown, done.stdout))

    for command, shown in commands(block):
        if not command.startswith(("export ", "./upq.py ")):
            until(lambda command=command, shown=shown: comes_true(command, shown))
    for line in re.findall(r"`((?:container|keep|stop|destroy|lease) [^`]*)`", page):
        assert host.ask(f"check {line}"), line
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        told = block.replace("/run/upq/upq.sock", str(host.folder / "var/upq.sock"))
        subprocess.run([sys.executable, "-c", told], cwd=ROOT, check=True)


def test_the_work_logic_needs_no_upq() -> None:
    code = (
        "import sys; sys.modules['upq'] = None; import failures, stages;"
        "print(stages.several({'cid': 501, 'net': {'ipadd': '10.2.0.255/16'}}, 2)[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLE / "jobs", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "{'cid': 502, 'ipadd': '10.2.1.0/16'}\n"


# OpenVZ --------------------------------------------------------------------------------------


def openvz(host: Host) -> Path:
    """Put the lines for OpenVZ in place of the others, and the recorder on the path."""
    text = (EXAMPLE / "upq.cfg").read_text()
    for section in re.split(r"\n(?=\[)", text):
        changed = section
        for key in re.findall(r"^#vzctl (\w+) =", section, re.MULTILINE):
            changed = re.sub(rf"^{key} = .*\n(?:[ ]+.*\n)*", "", changed, flags=re.MULTILINE)
        text = text.replace(section, re.sub("^#vzctl ", "", changed, flags=re.MULTILINE))
    host.config.write_text(text)
    folder = host.folder / "bin"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "vzctl").write_text(RECORDER)
    (folder / "vzctl").chmod(0o755)
    host.env["PATH"] = f"{folder}:{os.environ['PATH']}"
    return folder


def test_ovz_03_05_the_lines_for_openvz_say_to_vzctl_what_is_to_be_done(make: Make) -> None:
    host = make()
    vzctl = openvz(host)
    with host:
        host.whole(f"container {REQUEST} ostemplate:centos-6-x86_64 uptime:0")
        assert (vzctl / "told").read_text().splitlines() == [
            "create 501 --ostemplate=centos-6-x86_64",
            "set 501 --ipadd=198.18.5.1/24 --hostname=web1 --nameserver=198.18.5.254"
            " --userpasswd=ann:s3cret-pw --save",
            "start 501 --wait",
            "stop 501",
            "destroy 501",
        ]


def test_ovz_04_when_vzctl_fails_setup_is_never_queued(make: Make) -> None:
    host = make()
    vzctl = openvz(host)
    (vzctl / "exit").write_text("1")
    with host:
        id = host.submit("container cid:501")
        create = host.until_at(id, "create", "failed")
        assert create["message"] == "vzctl exited with 1"
        assert [job["type"] for job in host.chain(id)] == ["container", "create"]
        assert (vzctl / "told").read_text() == "create 501 --ostemplate=busybox\n"


# Failures ------------------------------------------------------------------------------------


def test_ovz_11_12_13_a_failure_goes_to_the_error_queue_a_file_and_a_mail(host: Host) -> None:
    host.serve_mail()
    wrong = host.submit("container cid:501 ostemplate:no-such pwd:s3cret-pw")
    host.until_at(wrong, "create", "failed")
    host.wait(host.submit("setup cid:502 hname:web2"))
    host.wait(host.submit("setup cid:503"))
    until(lambda: len(host.postbox.mails) == 3)
    until(lambda: host.ask("status")["jobs"]["running"] == 0)

    # 12: the error queue has been told the queue, the request and the error.
    errors = host.ask("jobs type:error")["jobs"]
    assert [job["queue"] for job in errors] == ["errorq"] * 3
    assert [job["state"] for job in errors] == ["done"] * 3
    told = errors[-1]["params"]
    assert (told["queue"], told["type"]) == ("creatq", "create")
    assert told["params"] == {"cid": 501, "ostemplate": "no-such", "pwd": "***"}
    assert told["message"].startswith("box.py exited with 1: box: no template no-such")

    # 11: one record for each, in the file of its queue, beside the log.
    folder = host.folder / "var/log"
    assert sorted(path.name for path in folder.glob("*.fail")) == ["creatq.fail", "setupq.fail"]
    (record,) = map(json.loads, lines(folder / "creatq.fail"))
    assert record["type"] == "create"
    assert record["message"] == told["message"]
    assert "no template no-such" in record["output"]
    assert json.loads(record["request"])["cid"] == 501
    records = [json.loads(line) for line in lines(folder / "setupq.fail")]
    assert sorted(json.loads(one["request"])["cid"] for one in records) == [502, 503]
    assert "s3cret-pw" not in "".join(path.read_text() for path in folder.iterdir())

    # 13: one mail for each.
    mails = [host.postbox.message(n) for n in range(3)]
    (mail,) = [one for one in mails if "creatq" in str(one["Subject"])]
    assert mail["Subject"].startswith("creatq: box.py exited with 1: box: no template no-such")
    assert mail["To"] == "root@localhost"
    assert "s3cret-pw" not in str(mail)
    assert "no-such" in body(mail)


def test_ovz_13_a_mail_waits_for_its_server_and_the_record_is_not_made_twice(make: Make) -> None:
    host = make()
    host.set("error", retry_delay="0.2", retry_backoff="1")
    with host:
        host.wait(host.submit("stop cid:501 uptime:0"))
        (error,) = until(lambda: host.ask("jobs type:error")["jobs"])
        until(lambda: host.job(error["id"])["attempt"] >= 3)
        host.serve_mail()
        assert host.wait(error["id"])["message"] == "told root@localhost"
        assert len(host.postbox.mails) == 1
        assert len(lines(host.folder / "var/log/stopq.fail")) == 1


def test_ovz_11_the_folder_of_the_records_can_be_chosen(make: Make) -> None:
    host = make()
    host.env["UPQ_PATHS__FAILURES"] = str(host.folder / "var/elsewhere")
    with host:
        host.serve_mail()
        host.wait(host.submit("start cid:501"))
        until(lambda: lines(host.folder / "var/elsewhere/startq.fail"))


def template(host: Host, name: str) -> None:
    """A template of that name, whose containers greet with it."""
    assert host.box("create", "999", "--ostemplate=busybox").returncode == 0
    root = host.folder / "var/boxes/999/rootfs"
    (root / "etc/motd").write_text(name)
    (host.folder / "templates").mkdir(exist_ok=True)
    with tarfile.open(host.folder / f"templates/{name}.tar", "w") as archive:
        archive.add(root, arcname=".")
    host.box("destroy", "999")


# What is edited where ------------------------------------------------------------------------


def test_ovz_14_the_template_is_said_in_one_place_or_in_the_request(make: Make) -> None:
    host = make()
    for name in ("plain", "special"):
        template(host, name)
    host.set("create", params="cid:int ostemplate=plain")
    with host:
        for cid, more, name in ((501, "", "plain"), (502, "ostemplate:special", "special")):
            host.until_at(host.submit(f"keep cid:{cid} {more}"), "start", "done")
            assert host.inside(cid, "cat /etc/motd") == name
            assert host.inside(cid, "hostname") == f"ct{cid}\n"


def test_ovz_15_a_daemon_and_one_submit_bring_a_container_up(host: Host) -> None:
    """The fixture has run `upq -c upq.cfg`; this is the other command, as a user types it."""
    done = subprocess.run(
        [sys.executable, ROOT / "upq-cli", "container", "cid:501", "uptime:0"],
        env={**os.environ, "UPQ_CONFIG": str(host.config)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    id = int(done.stdout.split()[1])
    assert done.stdout == f"ACK {id}\n"
    host.until_at(id, "destroy", "done")


# For a user ----------------------------------------------------------------------------------

OWNED = "lease owner:ann cid:501 uptime:1"


def progress(host: Host, id: int) -> str:
    return str((host.job(id)["progress"] or {}).get("text", ""))


def test_ovz_17_a_user_reads_what_is_happening(make: Make) -> None:
    """And whose it is, and which jobs do it."""
    host = make()
    vzctl = openvz(host)
    texts = {
        "create": "Creating VM", "setup": "Setting up VM", "start": "Booting VM",
        "stop": "Running, please login", "destroy": "Removing VM",
    }  # fmt: skip
    with host:
        for stage in STAGES:
            host.ask(f"pause {QUEUES[stage]}")
        id = host.submit(f"{OWNED} ipadd:198.18.5.1/24")
        for stage, text in texts.items():
            until(lambda text=text: progress(host, id) == text)
            host.ask(f"resume {QUEUES[stage]}")
        lease = host.wait(id)
        assert lease["state"] == "done"
        assert lease["result"]["owner"] == lease["params"]["owner"] == "ann"
        children = {child["type"]: child["id"] for child in host.ask(f"show {id}")["children"]}
        assert lease["result"]["jobs"] == {stage: [children[stage]] for stage in STAGES}
        assert len((vzctl / "told").read_text().splitlines()) == 5


def test_ovz_17_a_request_may_be_for_several_containers(host: Host) -> None:
    id = host.submit("lease owner:ann instances:4 last:start ipadd:198.18.5.1/24 hname:webminal")
    assert host.wait(id)["state"] == "done"
    shown = {cid: (one["STATUS"], one["IP_ADDR"], one["HOSTNAME"])
             for cid, one in host.listed().items()}  # fmt: skip
    assert shown == {
        str(500 + n): ("running", f"198.18.5.{n}", f"webminal{n}") for n in range(1, 5)
    }


@pytest.mark.parametrize(("last", "state"), [("create", "stopped"), ("start", "running")])
def test_ovz_17_a_request_may_stop_at_a_stage(host: Host, last: str, state: str) -> None:
    id = host.submit(f"{OWNED} last:{last}")
    assert host.wait(id)["state"] == "done"
    ran = sorted(child["type"] for child in host.ask(f"show {id}")["children"])
    assert ran == sorted(STAGES[: STAGES.index(last) + 1])
    assert host.listed()["501"]["STATUS"] == state


def test_ovz_17_a_user_has_one_request_at_a_time(host: Host) -> None:
    host.ask(f"pause {QUEUES['create']}")
    id = host.submit(f"{OWNED} last:create")
    assert host.say(f"{OWNED} last:create") == f"ACK {id} duplicate"
    other = host.submit("lease owner:bob cid:502 last:create")
    host.ask(f"resume {QUEUES['create']}")
    assert host.wait(id)["state"] == host.wait(other)["state"] == "done"
    assert host.submit("lease owner:ann cid:503 last:create") > other


def test_a_request_that_has_failed_goes_on_where_it_failed(host: Host) -> None:
    host.serve_mail()
    id = host.submit(f"{OWNED} instances:2 last:setup ostemplate:late")
    lease = host.wait(id)
    assert lease["state"] == "failed"
    assert re.search(r"create \d+ .*failed", lease["message"])
    until(lambda: len(host.postbox.mails) == 2)

    template(host, "late")
    host.ask(f"retry {id}")
    assert host.wait(id)["state"] == "done"
    assert sorted(host.listed()) == ["501", "502"]
    assert len(host.ask(f"show {id}")["children"]) == 4


def test_ovz_17_a_stage_that_takes_too_long_is_ended(make: Make) -> None:
    """After 600 s for the first, and 15,000 s for the others; here both wait for less."""
    known = sections((EXAMPLE / "upq.cfg").read_text())
    for stage in STAGES:
        limit = "600" if stage == "create" else "15000"
        assert f"timeout = {limit}" in known[f"job {stage}"]
    host = make()
    vzctl = openvz(host)
    (vzctl / "hold").touch()
    for stage in ("create", "start"):
        host.set(stage, timeout="0.3")
    with host:
        for line in ("create cid:501", "start cid:501"):
            job = host.run(line)
            assert (job["state"], job["message"]) == ("failed", "timed out after 0.3 s")


def test_ovz_17_what_has_ended_is_kept_for_600_seconds(make: Make) -> None:
    known = sections((EXAMPLE / "upq.cfg").read_text())
    for name in ("lease", *STAGES):
        assert "keep = 600" in known[f"job {name}"]
    host = make()
    openvz(host)
    host.set("start", keep="1")
    with host:
        kept, gone = host.submit("stop cid:501 uptime:0"), host.submit("start cid:501")
        assert host.wait(gone)["state"] == host.wait(kept)["state"] == "done"
        until(lambda: host.say(f"show {gone}").startswith("ERR not_found"))
        assert host.job(kept)["state"] == "done"


# Crashes, and what is left -------------------------------------------------------------------


def test_a_container_survives_the_daemon_and_meets_its_end_with_the_next(each: Host) -> None:
    each.ask(f"pause {QUEUES['stop']}")
    id = each.submit("container cid:501 uptime:0")
    each.until_at(id, "stop", "blocked")
    init = each.inside(501, "readlink /proc/1/ns/pid")
    each.kill9()
    assert each.inside(501, "readlink /proc/1/ns/pid") == init
    each.start()
    assert each.inside(501, "readlink /proc/1/ns/pid") == init
    each.ask(f"resume {QUEUES['stop']}")
    each.until_at(id, "destroy", "done")
    assert [job["attempt"] for job in each.chain(id)] == [1] * 6
    assert each.listed() == {}


def test_a_stage_that_runs_again_finds_its_work_done(each: Host) -> None:
    """As after a crash between the end of the command and that of the job."""
    twice = ("create", "501", "--ostemplate=busybox")
    maker = {"UPQ_JOB_ID": "17"}
    for _ in range(2):
        done = subprocess.run(
            [str(each.folder / "box.py"), *twice], env={**os.environ, **maker},
            capture_output=True, text=True, check=False, **each.how,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    again = each.box(*twice)
    assert (again.returncode, again.stderr) == (1, "box: container 501 exists already\n")
    for verb in ("start", "start", "stop", "stop", "start", "stop", "destroy", "destroy"):
        done = each.box(verb, "501")
        assert done.returncode == 0, f"{verb}: {done.stderr}"


def test_nothing_is_left_of_a_container_that_was_left_running(each: Host) -> None:
    each.until_at(each.submit("keep cid:501 ipadd:198.18.5.1/24"), "start", "done")
    assert each.traces()
    each.kill9()
    assert each.box("destroy", "501").stderr == "box: container 501 is running: stop it first\n"
    assert each.box("stop", "501").returncode == 0
    until(lambda: not each.traces())
    assert each.box("destroy", "501").returncode == 0
    assert each.boxes() == []


def test_a_container_is_reached_over_a_bridge(make: Make) -> None:
    """The page it serves, from this machine."""
    if os.geteuid() != 0:
        unavailable("only root can link containers of LXC to a bridge")
    if fault := lxc_fault():
        pytest.skip(f"LXC starts no container on this machine: {fault}")
    bridge = f"br{os.getpid()}"
    host = make()
    host.set("start", env=f"BOX_BRIDGE={bridge}")
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    try:
        network = f"198.19.{os.getpid() % 250}"
        subprocess.run(["ip", "addr", "add", f"{network}.254/24", "dev", bridge], check=True)
        subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
        with host:
            kept = host.submit(f"keep cid:501 ipadd:{network}.1/24")
            host.until_at(kept, "start", "done")

            def page() -> bytes:
                with contextlib.suppress(OSError):
                    return fetched(f"{network}.1")
                return b""

            assert b"A container of upq's example." in until(page)
    finally:
        subprocess.run(["ip", "link", "del", bridge], check=True)


def fetched(address: str) -> bytes:
    with socket.create_connection((address, 80), timeout=5) as web:
        web.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: web.recv(4096), b""))


def parsed(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def body(mail: EmailMessage) -> str:
    return str(mail.get_content())
