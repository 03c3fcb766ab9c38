"""Peers and roles, over real sockets and, as root, with real other users."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from upq.access import Access, Peer, Principals, peer_of, unknown_principals

#: A user that every machine has, with a group of its own name, and that owns nothing here.
OTHER = "games"
USER = pwd.getpwnam(OTHER)
NAMELESS_UID = 54321
STAY = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def peer(name: str = OTHER, uid: int = USER.pw_uid, gid: int = USER.pw_gid) -> Peer:
    return Peer(uid, gid, 1, name, frozenset((gid,)))


TCP = Peer(-1, -1, -1, "tcp:127.0.0.1", frozenset())
ROOT = peer("root", 0, 0)


@pytest.fixture
def door() -> Iterator[socket.socket]:
    """A UNIX socket that any user can reach."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        Path(folder).chmod(0o711)
        path = Path(folder) / "sock"
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        listener.settimeout(10)
        yield listener


def peer_as(door: socket.socket, user: int, group: int, extra: list[int]) -> Peer:
    """Who the daemon sees when a process of that user connects."""
    argv = ["/usr/bin/python3", "-I", "-S", "-c", STAY, door.getsockname()]
    with subprocess.Popen(argv, user=user, group=group, extra_groups=extra, cwd="/"):
        connection, _ = door.accept()
        with connection:
            return peer_of(connection)


# Who is it.


def test_the_kernel_vouches_for_a_unix_peer() -> None:
    here, there = socket.socketpair()
    with here, there:
        me = peer_of(here)
    assert (me.uid, me.gid, me.pid) == (os.geteuid(), os.getegid(), os.getpid())
    assert me.name == pwd.getpwuid(os.geteuid()).pw_name
    assert os.getegid() in me.groups
    assert me.local


def test_a_tcp_peer_is_only_an_address() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
        server.accept()[0] as connection,
    ):
        assert peer_of(connection) == TCP
    assert not TCP.local


@needs_root
def test_another_user_has_its_name_and_its_groups(door: socket.socket) -> None:
    found = peer_as(door, USER.pw_uid, USER.pw_gid, [])
    assert (found.uid, found.name) == (USER.pw_uid, OTHER)
    assert found.groups == set(os.getgrouplist(OTHER, USER.pw_gid))


@needs_root
def test_the_group_a_peer_runs_with_counts_too(door: socket.socket) -> None:
    adm = grp.getgrnam("adm").gr_gid
    found = peer_as(door, USER.pw_uid, adm, [])
    assert {USER.pw_gid, adm} <= found.groups


@needs_root
def test_a_user_without_a_name_goes_by_its_number(door: socket.socket) -> None:
    found = peer_as(door, NAMELESS_UID, NAMELESS_UID, [])
    assert found.name == f"uid:{NAMELESS_UID}"
    assert found.groups == {NAMELESS_UID}
    assert Access(submit=[str(NAMELESS_UID)]).may_submit(found)
    assert not Access(submit=[OTHER]).may_submit(found)


@needs_root
def test_supplementary_groups_that_only_the_process_claims_do_not_count(
    door: socket.socket,
) -> None:
    adm = grp.getgrnam("adm").gr_gid
    found = peer_as(door, NAMELESS_UID, NAMELESS_UID, [adm])
    assert adm not in found.groups


# Principals.


@pytest.mark.parametrize("word", ["*", OTHER, f"@{OTHER}", str(USER.pw_uid), f"@{USER.pw_gid}"])
def test_principals_admit(word: str) -> None:
    assert Principals([word]).admit(peer())
    assert Principals(["root", word, "nosuch"]).admit(peer())


@pytest.mark.parametrize("word", ["root", "@root", "0", "@0", "4711", "@4711", "nosuch", "", "@"])
def test_principals_refuse(word: str) -> None:
    assert not Principals([word]).admit(peer())


def test_an_empty_list_admits_nobody() -> None:
    assert not Principals([]).admit(peer())


def test_names_mean_ids_so_that_a_name_like_a_number_is_nobody_else() -> None:
    assert not Principals(["1000"]).admit(peer(name="1000"))


@pytest.mark.parametrize("words", [["*"], ["-1"], ["tcp:127.0.0.1"], ["@games"], ["root"]])
def test_only_everyone_admits_tcp(words: list[str]) -> None:
    assert Principals(words).admit(TCP) is (words == ["*"])


def test_unknown_names_are_reported_and_numbers_are_not() -> None:
    words = ["*", "root", "@root", "4711", "@4711", "nosuch", "@nosuch", "", "@", "a\0b"]
    assert unknown_principals(words) == ["nosuch", "@nosuch", "", "@", "a\0b"]


# Roles.


def test_by_default_whoever_can_connect_reads_and_submits_but_is_no_admin() -> None:
    for someone in (peer(), TCP):
        assert Access().may_read(someone)
        assert Access().may_submit(someone)
        assert not Access().is_admin(someone)


def test_root_and_the_daemons_own_user_are_admin() -> None:
    me = peer("me", uid=os.geteuid())
    for someone in (ROOT, me):
        closed = Access(read=[], submit=[], admin=[])
        assert closed.is_admin(someone)
        assert closed.may_read(someone)
        assert closed.may_submit(someone, Principals([]))
        assert closed.may_manage(someone, "alice")


def test_each_role_lets_in_whom_it_names() -> None:
    access = Access(read=["@games"], submit=["bin"], admin=["daemon"])
    assert access.may_read(peer())
    assert not access.may_submit(peer())
    assert not access.is_admin(peer())
    bin_ = peer("bin", pwd.getpwnam("bin").pw_uid, 65534)
    assert access.may_submit(bin_)
    assert not access.may_read(bin_)
    daemon = peer("daemon", pwd.getpwnam("daemon").pw_uid, 65534)
    assert access.is_admin(daemon)
    assert access.may_read(daemon)
    assert access.may_submit(daemon)


def test_a_types_own_list_takes_the_place_of_the_role() -> None:
    access = Access(submit=["bin"])
    assert access.may_submit(peer(), Principals([OTHER]))
    assert not access.may_submit(peer("bin", pwd.getpwnam("bin").pw_uid), Principals([OTHER]))
    assert not Access().may_submit(TCP, Principals([OTHER]))


def test_submitters_manage_and_read_their_own_jobs_only() -> None:
    access = Access(read=[])
    assert access.may_manage(peer(), OTHER)
    assert access.may_read(peer(), OTHER)
    assert not access.may_manage(peer(), "alice")
    assert not access.may_read(peer(), "alice")
    assert not access.may_read(peer())


def test_tcp_is_never_admin() -> None:
    assert not Access(admin=["*"]).is_admin(TCP)
    assert Access(admin=["*"]).is_admin(peer())
