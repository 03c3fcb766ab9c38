"""The example of a virtual-desktop platform: real images, addresses and domains.

Images are made with qemu-img, addresses are served by uvicorn on the loopback, and domains run in a
libvirtd of the test's own, emulated and without a system in them. The numbers are those of what
the queues of IsardVDI can do, of which the example has to be able to do each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.daemons import ROOT, until
from tests.desktops import (
    EXAMPLE,
    MB,
    Hypervisor,
    Site,
    content,
    get,
    held_up,
    img,
    info,
    put,
    sleepers,
)
from tests.servers import Postgres, free_port, short_folder
from tests.test_docs import commands, fits


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """One machine for all tests that do not need it for themselves."""
    folder = short_folder()
    with Site(folder) as site:
        site.serve()
        yield site
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hypervisor(site: Site) -> Iterator[Hypervisor]:
    """Where the domain tasks of `site` go."""
    for program in ("virsh", "/usr/sbin/libvirtd", "qemu-system-x86_64"):
        if shutil.which(program) is None:
            unavailable(f"no program {program} (Debian: libvirt-clients libvirt-daemon "
                        "libvirt-daemon-driver-qemu qemu-system-x86)")  # fmt: skip
    made = Hypervisor(short_folder())
    site.end()
    site.env["LIBVIRT_DEFAULT_URI"] = made.uri
    site.start()
    yield made
    made.close()


def pools(*names: str) -> str:
    """A pool of upq for each of these storages."""
    levels = ("high", "default", "low")
    return "".join(
        f"[pool {n}]\nqueues = {' '.join(f'storage.{n}.{level}' for level in levels)}\n"
        for n in names
    )


@pytest.fixture
def network(postgres: Postgres) -> Iterator[list[Site]]:
    """Two machines on one database, both with the same storages; not started yet."""
    folders = [short_folder(), short_folder()]
    with postgres.database() as url, contextlib.ExitStack() as stack:
        sites = []
        for name, folder in zip("ab", folders, strict=True):
            site = Site(folder, url, UPQ_NODE__NAME=name)
            stack.push(site.__exit__)
            (folder / "upq.d").mkdir()
            sites.append(site)
        shutil.rmtree(folders[1] / "var/pools")
        (folders[1] / "var/pools").symlink_to(folders[0] / "var/pools")
        yield sites
    for folder in folders:
        shutil.rmtree(folder)


# The lines of the feature list.


def test_isa_01_producers_of_two_kinds_come_over_tcp(short_tmp: Path) -> None:
    port = free_port()
    with Site(short_tmp, UPQ_LISTEN__TCP=f"127.0.0.1:{port}") as site:
        ids = []
        for line in ("create_disk pool:fast disk:a.qcow2 size:1M", "sweep"):
            with socket.create_connection(("127.0.0.1", port)) as producer:
                producer.sendall(f"{line}\n".encode())
                word, id, *_ = producer.makefile().readline().split()
                assert word == "ACK"
                ids.append(int(id))
        assert [site.wait(id)["state"] for id in ids] == ["done", "done"]
        assert [site.job(id)["queue"] for id in ids] == ["storage.fast.high", "core"]


def test_isa_02_a_user_is_told_of_the_own_tasks_and_of_no_others(site: Site) -> None:
    ann = site.submit("create_disk pool:fast disk:ann.qcow2 size:1M user:ann")
    bob = site.submit("create_disk pool:fast disk:bob.qcow2 size:1M user:bob")
    nobody = site.submit("create_disk pool:fast disk:nobody.qcow2 size:1M")
    for id in (ann, bob, nobody):
        site.wait(id)
    until(lambda: site.feed("ann") and site.feed("bob"))
    done = {"task": "create_disk", "state": "done", "text": ""}
    assert site.feed("ann") == [{"job": ann, **done}]
    assert site.feed("bob") == [{"job": bob, **done}]
    site.wait(site.submit("create_disk pool:fast disk:j.qcow2 size:1M user:jürgen"))
    assert until(lambda: site.feed("jürgen"))
    site.submit("create_disk pool:fast disk:x.qcow2 size:1M user:../ann")
    (lost,) = until(lambda: site.ask("jobs type:feedback state:failed")["jobs"])
    assert lost["message"].startswith("nobody is told: user '../ann': ")
    told = [job for job in site.ask("jobs type:feedback")["jobs"]]
    assert {job["queue"] for job in told} == {"core"}


def test_isa_03_two_uploads_have_two_addresses_and_each_takes_its_bytes(site: Site) -> None:
    iso = bytes(0x8001) + b"CD001" + bytes(MB)
    first = site.run("upload pool:fast medium:first.iso user:cid")
    second = site.run("upload pool:fast medium:second.iso user:cid")
    assert first["queue"] == "storage.fast.high"
    urls = [job["result"]["url"] for job in (first, second)]
    assert urls[0] != urls[1]
    for name, url in zip(("first.iso", "second.iso"), urls, strict=True):
        status, answer = put(url, iso)
        assert status == 202
        received = site.wait(answer["job"])
        assert (received["state"], received["queue"]) == ("done", "storage.fast.high")
        assert (site.pool("fast") / "media" / name).read_bytes() == iso
        assert put(url, iso)[0] == 404  # it is used up
    until(lambda: [line["task"] for line in site.feed("cid")].count("receive") == 2)


def test_isa_03_an_upload_that_is_not_what_its_name_says_is_refused(site: Site) -> None:
    secret = site.folder / "secret"
    secret.write_text("of the host")
    evil = site.folder / "evil.qcow2"
    img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", evil, "1M")
    vmdk = f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\
"monolithicFlat"\nRW 1 FLAT "{secret}" 0\n'
    for name, data, why in (
        ("evil.qcow2", evil.read_bytes(), "must not be based on another file"),
        ("evil.vmdk", vmdk.encode(), "must not be based on another file"),
        ("text.qcow2", b"no image", "no qcow2 image"),
        ("text.iso", b"no image", "no image of a CD"),
    ):
        url = site.do(f"upload pool:fast medium:{name}")["url"]
        job = site.wait(put(url, data)[1]["job"])
        assert (job["state"], why in job["message"]) == ("failed", True), job["message"]
        assert not (site.pool("fast") / "media" / name).exists()
    (site.pool("fast") / "media/there.iso").touch()
    assert "is there already" in site.refused("upload pool:fast medium:there.iso")


def test_isa_03_an_address_cannot_be_guessed_bent_or_used_late(site: Site) -> None:
    url = site.do("upload pool:fast disk:late.qcow2 most:1K")["url"]
    assert put(url, bytes(1025))[0] == 413
    assert put(url.replace("late", "other"), b"x")[0] == 404
    other = "y" if url[-20] == "x" else "x"
    assert put(url[:-20] + other + url[-19:], b"x")[0] == 404
    assert get(url)[0] == 405
    tickets = site.folder / "var/web/tickets"
    for file in tickets.iterdir():
        ticket = json.loads(file.read_text())
        if ticket["name"] == "late.qcow2":
            file.write_text(json.dumps({**ticket, "expires": 1}))
    assert put(url, b"x")[0] == 404
    site.do("sweep")
    assert "late.qcow2" not in "".join(file.read_text() for file in tickets.iterdir())


def test_isa_04_snapshot_resize_download_and_back_from_the_archive(site: Site) -> None:
    data = b"desktop" * 1000
    disk = site.made("tool.qcow2", data)
    for line, queue in (
        ("create_snapshot pool:fast disk:tool.qcow2 name:monday", "storage.fast.default"),
        ("resize pool:fast disk:tool.qcow2 size:128M", "storage.fast.default"),
    ):
        job = site.run(line)
        assert (job["state"], job["queue"]) == ("done", queue), job["message"]
    assert [one["name"] for one in info(disk)["snapshots"]] == ["monday"]
    assert info(disk)["virtual-size"] == 128 * MB
    assert "would lose" in site.refused("resize pool:fast disk:tool.qcow2 size:1M")

    job = site.run("download pool:fast disk:tool.qcow2")
    assert (job["state"], job["queue"]) == ("done", "storage.fast.default")
    status, copy = get(job["result"]["url"])
    (site.folder / "copy.qcow2").write_bytes(copy)
    img("compare", site.folder / "copy.qcow2", disk)
    assert (status, len(copy)) == (200, job["result"]["bytes"])
    assert get(job["result"]["url"], Range="bytes=0-3") == (206, b"QFI\xfb")

    before = disk.read_bytes()
    site.do("archive_disk pool:fast disk:tool.qcow2")
    assert not disk.exists()
    job = site.run("unarchive_disk pool:fast disk:tool.qcow2")
    assert (job["state"], job["queue"]) == ("done", "storage.fast.default")
    assert disk.read_bytes() == before
    assert not list((site.folder / "var/archive/fast").iterdir())


def test_isa_05_seven_tasks_share_the_low_queue(site: Site) -> None:
    data = os.urandom(MB)
    base = site.made("base.qcow2", data)
    (site.pool("fast") / "media/old.iso").write_bytes(b"old")
    site.do("create_disk pool:fast disk:child.qcow2 base:base.qcow2")
    child = site.fill("child.qcow2", b"child" + data[5:])
    results = {}
    for line in (
        "convert pool:fast disk:child.qcow2 to:flat.vmdk",
        "commit pool:fast disk:child.qcow2",
        "rebase pool:fast disk:child.qcow2",
        "sparsify pool:fast disk:child.qcow2",
        "archive_disk pool:fast disk:base.qcow2",
        "delete_disk pool:fast disk:flat.vmdk",
        "delete_media pool:fast medium:old.iso",
    ):
        job = site.run(line)
        assert (job["state"], job["queue"]) == ("done", "storage.fast.low"), job["message"]
        results[job["type"]] = job["result"]
        if job["type"] == "convert":
            assert job["progress"]["text"] == "to flat.vmdk"
            img("compare", child, site.disk("flat.vmdk"))
            assert info(site.disk("flat.vmdk"))["format"] == "vmdk"
        if job["type"] == "commit":
            assert content(base).startswith(b"child" + data[5:])
        if job["type"] == "rebase":
            assert "backing-filename" not in info(child)
    assert content(child).startswith(b"child" + data[5:])
    assert results["archive_disk"]["bytes"] > 0 and not base.exists()
    assert not site.disk("flat.vmdk").exists()
    trash = site.pool("fast") / "trash"
    assert len(list(trash.glob("disks.flat.vmdk.*"))) == 1
    assert [path.read_bytes() for path in trash.glob("media.old.iso.*")] == [b"old"]


def test_isa_05_snapshots_keep_the_base_that_they_need(site: Site) -> None:
    site.made("below.qcow2", b"below")
    site.do("create_disk pool:fast disk:kept.qcow2 base:below.qcow2")
    site.do("create_snapshot pool:fast disk:kept.qcow2 name:monday")
    needed = "has snapshots that need its base as it is: monday"
    assert needed in site.refused("commit pool:fast disk:kept.qcow2")
    assert needed in site.refused("rebase pool:fast disk:kept.qcow2")


def test_isa_05_sparsify_gives_back_what_a_guest_has_zeroed(site: Site) -> None:
    disk = site.made("sparse.qcow2", os.urandom(8 * MB))
    raw = site.folder / "zeros"
    raw.write_bytes(bytes(7 * MB) + os.urandom(MB))
    img("convert", "-n", "-S", "0", "-f", "raw", "-O", "qcow2", raw, disk)
    result = site.do("sparsify pool:fast disk:sparse.qcow2")
    assert result["before"] - result["after"] > 5 * MB
    assert content(disk)[: 8 * MB] == raw.read_bytes()


def test_isa_05_what_others_need_is_not_deleted_archived_or_written_to(site: Site) -> None:
    site.made("parent.qcow2", b"parent")
    for name in ("one.qcow2", "two.qcow2"):
        site.do(f"create_disk pool:fast disk:{name} base:parent.qcow2")
    needed = "parent.qcow2 is what one.qcow2 two.qcow2 is based on"
    assert needed in site.refused("delete_disk pool:fast disk:parent.qcow2")
    assert needed in site.refused("archive_disk pool:fast disk:parent.qcow2")
    assert "is based on" in site.refused("commit pool:fast disk:one.qcow2")
    assert "itself" in site.refused("rebase pool:fast disk:parent.qcow2 base:one.qcow2")
    site.do("archive_disk pool:fast disk:one.qcow2")
    site.do("delete_disk pool:fast disk:two.qcow2")
    archived = "is what one.qcow2.zst is based on"
    assert archived in site.refused("delete_disk pool:fast disk:parent.qcow2")
    site.do("unarchive_disk pool:fast disk:one.qcow2")
    site.do("delete_disk pool:fast disk:one.qcow2")
    site.do("delete_disk pool:fast disk:parent.qcow2")


def test_isa_05_names_lead_nowhere_and_a_pool_has_to_be_there(site: Site) -> None:
    assert "is no name" in site.refused("delete_disk pool:fast disk:../media/first.iso")
    assert "is no name" in site.refused("delete_media pool:fast medium:/etc/passwd")
    assert "no pool away" in site.refused("create_disk pool:away disk:a.qcow2 size:1M")


def test_isa_06_a_node_takes_jobs_of_its_own_pools_only(network: list[Site]) -> None:
    a, b = network
    for site, served in ((a, "p1 p2"), (b, "p2")):
        (site.folder / "upq.d/pools.cfg").write_text(pools("p1", "p2"))
        site.env["UPQ_NODE__POOLS"] = served
    a.pool("p1"), a.pool("p2")
    b.start()
    here = b.submit("create_disk pool:p2 disk:here.qcow2 size:1M")
    there = b.submit("create_disk pool:p1 disk:there.qcow2 size:1M")
    assert b.wait(here)["state"] == "done"
    assert b.job(there)["state"] == "blocked"
    a.start()
    assert a.wait(there)["state"] == "done"
    nodes = {id: {e["node"] for e in a.ask(f"show {id}")["history"] if e["state"] == "running"}
             for id in (here, there)}  # fmt: skip
    assert nodes == {here: {"b"}, there: {"a"}}


def test_isa_07_and_09_queues_that_no_task_goes_to_are_legal_and_listed(short_tmp: Path) -> None:
    names = [f"hypervisor.fast.{level}" for level in ("high", "default", "low")]
    with Site(short_tmp, UPQ_POOL_HYPERVISOR__QUEUES=" ".join(names)) as site:
        listed = {one["queue"]: one for one in site.ask("queues")["queues"]}
        for name in names:
            one = listed[name]
            assert (one["pool"], one["type"], one["queued"]) == ("hypervisor", "", 0)
        site.do(f"sweep @queue:{names[0]}")


def test_isa_08_a_domain_is_checked_by_a_paused_start_and_started(
    site: Site, hypervisor: Hypervisor
) -> None:
    disk = hypervisor.define(site, "d8")
    job = site.run("check_domain pool:fast domain:d8")
    assert (job["state"], job["queue"]) == ("done", "hypervisor.fast.default"), job["message"]
    assert job["result"]["state"] == "paused"
    assert hypervisor.state("d8") == "shut off"
    assert site.do("start_domain pool:fast domain:d8")["state"] == "running"
    assert site.do("start_domain pool:fast domain:d8")["state"] == "running"
    assert hypervisor.state("d8") == "running"
    # A disk that a domain has open stays.
    assert "lock" in site.run("delete_disk pool:fast disk:d8.qcow2 @retries:0")["message"]
    assert disk.exists()
    disk.rename(disk.with_name("gone"))
    hypervisor.virsh("destroy", "d8")
    assert "No such file" in site.run("check_domain pool:fast domain:d8")["message"]


def test_isa_10_and_11_a_domain_is_stopped_from_both_queues_of_its_hypervisor(
    site: Site, hypervisor: Hypervisor
) -> None:
    hypervisor.define(site, "d10")
    for level in ("high", "default"):
        site.do("start_domain pool:fast domain:d10")
        job = site.run(f"stop_domain hypervisor:h1 domain:d10 level:{level} grace_s:0.1")
        assert (job["state"], job["queue"]) == ("done", f"hypervisor.h1.{level}"), job["message"]
        assert hypervisor.state("d10") == "shut off"


def test_isa_10_a_task_for_one_hypervisor_waits_while_that_one_is_away(
    network: list[Site],
) -> None:
    storage, h1 = network
    page = (EXAMPLE / "README.md").read_text()
    (told,) = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    for site in network:
        one = re.sub(r"\[pool hypervisor\]\n(.+\n)+", "", site.config.read_text())
        site.config.write_text(one)
    (h1.folder / "upq.d/h1.cfg").write_text(told)
    del h1.env["UPQ_NODE__NAME"]
    (storage.folder / "upq.d/h1.cfg").write_text(told[told.index("[pool h1]") :])
    storage.env["UPQ_NODE__POOLS"] = "core storage"
    virsh = h1.folder / "bin/virsh"
    virsh.parent.mkdir()
    virsh.write_text("#!/bin/sh\necho shut off\n")
    virsh.chmod(0o755)
    h1.env["PATH"] = f"{virsh.parent}:{os.environ['PATH']}"
    storage.start()
    stop = storage.submit("stop_domain hypervisor:h1 domain:d1")
    storage.do("create_disk pool:fast disk:meanwhile.qcow2 size:1M")
    assert storage.job(stop)["state"] == "blocked"
    h1.start()
    job = storage.wait(stop)
    assert (job["state"], job["result"]["state"]) == ("done", "shut off"), job["message"]
    history = storage.ask(f"show {stop}")["history"]
    assert [e["node"] for e in history if e["state"] == "running"] == ["h1"]


def test_isa_11_and_12_one_name_is_a_snapshot_of_a_disk_or_of_a_domain_by_its_queue(
    site: Site, hypervisor: Hypervisor
) -> None:
    disk = hypervisor.define(site, "d12")
    site.do("create_snapshot pool:fast disk:d12.qcow2 name:by-qemu-img")
    site.do("start_domain pool:fast domain:d12")
    job = site.run("create_snapshot domain:d12 name:by-virsh @queue:hypervisor.h1.low")
    assert (job["state"], job["queue"]) == ("done", "hypervisor.h1.low"), job["message"]
    assert hypervisor.virsh("snapshot-list", "--name", "d12") == "by-virsh"
    assert [one["name"] for one in info(disk)["snapshots"]] == ["by-qemu-img", "by-virsh"]
    hypervisor.virsh("suspend", "d12")
    job = site.run("revert_snapshot hypervisor:h1 domain:d12 name:by-virsh")
    assert (job["state"], job["queue"]) == ("done", "hypervisor.h1.default"), job["message"]
    assert job["result"]["state"] == "running"
    # In the wrong queue there is no such thing.
    assert "missing" in site.refused("create_snapshot pool:fast domain:d12 name:x")


def test_isa_13_high_goes_before_default_before_low(short_tmp: Path) -> None:
    with Site(short_tmp, UPQ_POOL_STORAGE__CONCURRENT="1") as site:
        site.made("x.qcow2", b"x")
        with site.busy("held.qcow2"):
            low = site.submit("convert pool:fast disk:x.qcow2 to:y.qcow2")
            default = site.submit("create_snapshot pool:fast disk:x.qcow2 name:s")
            high = site.submit("upload pool:fast medium:z.iso")
        ended = [site.wait(id) for id in (high, default, low)]
        assert [job["state"] for job in ended] == ["done"] * 3
        starts = [job["started_at"] for job in ended]
        assert starts == sorted(starts)


def test_isa_14_a_pool_comes_into_being_without_a_section(site: Site) -> None:
    site.pool("newpool")
    job = site.run("delete_disk pool:newpool disk:none.qcow2")
    assert (job["queue"], job["message"].endswith("no image none.qcow2")) == (
        "storage.newpool.low", True,
    )  # fmt: skip
    site.do("create_disk pool:newpool disk:some.qcow2 size:1M")
    listed = {one["queue"]: one["pool"] for one in site.ask("queues")["queues"]}
    assert listed["storage.newpool.low"] == listed["storage.newpool.high"] == "storage"


def test_isa_15_feedback_follows_success_and_failure(site: Site) -> None:
    good = site.submit("create_disk pool:fast disk:told.qcow2 size:1M user:dora")
    site.wait(good)
    bad = site.submit("resize pool:fast disk:none.qcow2 size:1M user:dora")
    site.wait(bad)
    until(lambda: len(site.feed("dora")) == 2)
    lines = sorted(site.feed("dora"), key=lambda line: line["job"])
    assert [(line["job"], line["task"], line["state"]) for line in lines] == [
        (good, "create_disk", "done"), (bad, "resize", "failed"),
    ]  # fmt: skip
    assert lines[1]["text"].endswith("no image none.qcow2")
    parents = {job["parent"] for job in site.ask("jobs type:feedback")["jobs"]}
    assert {good, bad} <= parents


def test_isa_16_with_ageing_low_is_not_starved(short_tmp: Path) -> None:
    env = {"UPQ_POOL_STORAGE__CONCURRENT": "1", "UPQ_POOL_STORAGE__AGEING": "1"}
    with Site(short_tmp, **env) as site:
        site.made("x.qcow2", b"x")
        with site.busy("held.qcow2"):
            low = site.submit("convert pool:fast disk:x.qcow2 to:y.qcow2")
            until(lambda: waited_s(site, "convert") >= 2)
            high = site.submit("upload pool:fast medium:z.iso")
        assert site.wait(low)["started_at"] < site.wait(high)["started_at"]


def waited_s(site: Site, type: str) -> int:
    """How long the oldest job of this type has been waiting."""
    return max(q["oldest_queued_s"] or 0 for q in site.ask("queues")["queues"] if q["type"] == type)


# Crashes.


def test_kill_9_in_the_middle_of_a_convert_leaves_the_disk_whole_and_the_copy_comes(
    short_tmp: Path,
) -> None:
    site = Site(short_tmp)
    slow = 'convert) shift; exec "$program" convert -r 2M "$@"'
    with held_up(site, "qemu-img", f'case $1 in {slow};; *) exec "$program" "$@";; esac'):
        disk = site.made("big.qcow2", os.urandom(24 * MB))
        id = site.submit("convert pool:fast disk:big.qcow2 to:copy.qcow2")
        part, target = site.disk(".part.copy.qcow2"), site.disk("copy.qcow2")
        until(lambda: part.exists() and part.stat().st_size > MB)
        site.kill9()
        assert not target.exists()
    with site:
        assert site.wait(id)["state"] == "done"
        assert len([line for line in site.history(id) if line.startswith("running")]) == 2
        img("check", "-q", disk)
        img("compare", disk, target)
        assert not part.exists()


def test_kill_9_in_the_middle_of_archiving_loses_nothing(short_tmp: Path) -> None:
    site = Site(short_tmp)
    slowly = "{ head -c 12000000; sleep 100; cat; }"
    with held_up(site, "zstd", f'{slowly} | "$program" "$@"'):
        disk = site.made("big.qcow2", os.urandom(24 * MB))
        before = disk.read_bytes()
        id = site.submit("archive_disk pool:fast disk:big.qcow2")
        archive = site.folder / "var/archive/fast"
        part, shelf = archive / ".part.big.qcow2.zst", archive / "big.qcow2.zst"
        until(part.exists)
        site.kill9()
        assert disk.read_bytes() == before and not shelf.exists()
    with site:
        assert site.wait(id)["state"] == "done"
        assert len([line for line in site.history(id) if line.startswith("running")]) == 2
        assert not disk.exists() and not part.exists()
        site.do("unarchive_disk pool:fast disk:big.qcow2")
        assert disk.read_bytes() == before


def test_an_archive_that_is_full_says_so_and_keeps_nothing_of_it(short_tmp: Path) -> None:
    site = Site(short_tmp)
    # It takes a few bytes, and then no more.
    few = 'for part; do :; done; head -c 9 >"$part"; exec "$program" -q -f -o /dev/full'
    with held_up(site, "zstd", f'case $* in *-T0*) {few};; *) exec "$program" "$@";; esac'):
        disk = site.made("big.qcow2", os.urandom(2 * MB))
        before = disk.read_bytes()
        job = site.run("archive_disk pool:fast disk:big.qcow2 @retries:0")
        assert "No space left on device" in job["message"]
        assert list((site.folder / "var/archive/fast").iterdir()) == []
        assert disk.read_bytes() == before


def test_a_task_that_is_cancelled_ends_with_all_it_has_started(short_tmp: Path) -> None:
    site = Site(short_tmp)
    with held_up(site, "zstd", "exec sleep 100"):
        disk = site.made("kept.qcow2", b"kept")
        before = disk.read_bytes()
        id = site.submit("archive_disk pool:fast disk:kept.qcow2 user:eve")
        until(lambda: sleepers(site))
        site.ask(f"cancel {id}")
        assert site.wait(id)["state"] == "cancelled"
        assert sleepers(site) == []
        assert disk.read_bytes() == before
        assert site.feed("eve") == []


def test_the_trash_is_emptied_when_it_is_old(site: Site) -> None:
    site.do("create_disk pool:fast disk:young.qcow2 size:1M")
    site.do("create_disk pool:fast disk:old.qcow2 size:1M")
    site.do("delete_disk pool:fast disk:young.qcow2")
    site.do("delete_disk pool:fast disk:old.qcow2")
    assert site.do("delete_disk pool:fast disk:old.qcow2")["deleted"] == "old.qcow2"
    trash = site.pool("fast") / "trash"
    (old,) = trash.glob("disks.old.qcow2.*")
    os.utime(old, (1, 1))
    site.do("sweep")
    assert not old.exists() and len(list(trash.glob("disks.young.qcow2.*"))) == 1


def test_archiving_goes_on_where_a_crash_has_left_a_disk_in_both_places(site: Site) -> None:
    disk = site.made("twice.qcow2", b"twice")
    before = disk.read_bytes()
    site.do("archive_disk pool:fast disk:twice.qcow2")
    disk.write_bytes(before)
    site.do("archive_disk pool:fast disk:twice.qcow2")
    assert not disk.exists()
    site.made("twice.qcow2", b"another one")
    assert "has another" in site.refused("archive_disk pool:fast disk:twice.qcow2")
    assert "is something else" in site.refused("unarchive_disk pool:fast disk:twice.qcow2")
    disk.write_bytes(before)
    site.do("unarchive_disk pool:fast disk:twice.qcow2")
    assert disk.read_bytes() == before
    assert "the archive has no" in site.refused("unarchive_disk pool:fast disk:none.qcow2")


# The page, and the tasks by themselves.


def test_what_the_page_tells_to_do_can_be_done(short_tmp: Path) -> None:
    page = (EXAMPLE / "README.md").read_text()
    (block,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    here = short_tmp / "here"
    (here / "examples").mkdir(parents=True)
    (here / "examples/storage").symlink_to(short_tmp)
    (here / "upq-cli").symlink_to(ROOT / "upq-cli")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "UPQ_CONFIG": "examples/storage/upq.cfg"}

    def prints(command: str) -> str:
        return subprocess.run(
            command, shell=True, cwd=here, env=env, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ).stdout  # fmt: skip

    with Site(short_tmp) as site:
        for command, shown in commands(block):
            if not command.startswith(("export ", "./upq.py ")):
                printed = prints(command)
                assert fits(shown, printed), f"{command}: {printed}"
        known = set(site.ask("help")["types"])
        told = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*?\|", page, re.MULTILINE))))
        assert told == known - {"sweep"}


def test_the_tasks_run_without_upq(short_tmp: Path) -> None:
    shutil.copytree(EXAMPLE, short_tmp, dirs_exist_ok=True)
    (short_tmp / "var/pools/fast").mkdir(parents=True)

    def task(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["python3", "-X", "importtime", "-m", "vdi", *words],
            cwd=short_tmp, env={"PATH": os.environ["PATH"]}, check=False, capture_output=True,
            text=True,
        )  # fmt: skip

    done = task("create_disk", "pool=fast", "disk=a.qcow2", "size=1M")
    assert json.loads(done.stdout)["size"] == MB
    assert "upq" not in done.stderr
    assert task("delete_disk", "pool=fast", "disk=b.qcow2").returncode == 65
    assert task("delete_disk", "pool=fast").returncode == task("fly").returncode == 64
