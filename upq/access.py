"""Who is on the other end of a socket, and what it may do: the roles read, submit and admin.

The configuration names principals: a user (`alice` or `1000`), a group (`@web` or `@33`), or `*`.
"""

from __future__ import annotations

import functools
import grp
import os
import pwd
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from upq.errors import Denied

#: How long a changed group membership may go unnoticed.
CACHE_S = 60
EVERYONE = "*"

_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection, as the kernel vouches for it."""

    #: -1 over TCP, as are gid and pid.
    uid: int
    gid: int
    pid: int
    #: What is stored as a job's submitter: `alice`, `uid:1234` or `tcp:127.0.0.1`.
    name: str
    #: Every group id, the primary one included.
    groups: frozenset[int]

    @property
    def local(self) -> bool:
        """True on the UNIX socket; a TCP peer has no credentials."""
        return self.uid >= 0


def peer_of(sock: socket.socket) -> Peer:
    """The peer of a connected socket. OSError when a TCP peer has gone already."""
    if sock.family != socket.AF_UNIX:
        return Peer(-1, -1, -1, f"tcp:{sock.getpeername()[0]}", frozenset())
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(credentials)
    name, groups = _identity(uid, gid, int(time.monotonic() // CACHE_S))
    return Peer(uid, gid, pid, name, groups)


@functools.lru_cache(maxsize=1024)
def _identity(uid: int, gid: int, _period: int) -> tuple[str, frozenset[int]]:
    """Name and groups of a user; the period in the key is what makes the cache forget."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return f"uid:{uid}", frozenset((gid,))
    return user.pw_name, frozenset((gid, *os.getgrouplist(user.pw_name, user.pw_gid)))


class Principals:
    """A list of principals, looked up once; names that do not exist admit nobody."""

    def __init__(self, words: Iterable[str]) -> None:
        words = frozenset(words)
        self._everyone = EVERYONE in words
        self._users = frozenset(_user_id(word) for word in words if word[:1] != "@") - {None}
        self._groups = frozenset(_group_id(word[1:]) for word in words if word[:1] == "@") - {None}

    def admit(self, peer: Peer) -> bool:
        return self._everyone or peer.uid in self._users or not self._groups.isdisjoint(peer.groups)


class Access:
    """The roles of section [access]. Root and the daemon's own user are always admin.

    A peer without credentials (TCP) is only ever admitted by `*`, and is never admin.
    """

    def __init__(
        self,
        read: Iterable[str] = (EVERYONE,),
        submit: Iterable[str] = (EVERYONE,),
        admin: Iterable[str] = (),
    ) -> None:
        self._read = Principals(read)
        self._submit = Principals(submit)
        self._admin = Principals(admin)

    def is_admin(self, peer: Peer) -> bool:
        # Asked anew each time: the daemon changes its user after the configuration was read.
        return peer.local and (peer.uid in (0, os.geteuid()) or self._admin.admit(peer))

    def may_submit(self, peer: Peer, only: Principals | None = None) -> bool:
        """`only` is the type's own `submit =`; it takes the place of the role."""
        wanted = self._submit if only is None else only
        return wanted.admit(peer) or self.is_admin(peer)

    def may_read(self, peer: Peer, submitter: str = "") -> bool:
        """A job's submitter may read that job without the role."""
        return self._read.admit(peer) or self.may_manage(peer, submitter)

    def may_manage(self, peer: Peer, submitter: str) -> bool:
        """Whether the peer may cancel or retry a job of that submitter."""
        return peer.name == submitter or self.is_admin(peer)

    # The same as refusals: each raises Denied.

    def must_read(self, peer: Peer, submitter: str = "") -> None:
        if not self.may_read(peer, submitter):
            raise Denied(f"{peer.name} may not read ([access] read)")

    def must_manage(self, peer: Peer, submitter: str, verb: str) -> None:
        if not self.may_manage(peer, submitter):
            raise Denied(f"{peer.name} may not {verb} a job of {submitter or 'upq'}")

    def must_admin(self, peer: Peer, verb: str) -> None:
        if not self.is_admin(peer):
            raise Denied(f"{peer.name} may not {verb} ([access] admin)")


def unknown_principals(words: Iterable[str]) -> list[str]:
    """Those that name no user or group of this machine. Numeric ids need no name."""
    return [word for word in words if word != EVERYONE and _known_id(word) is None]


def _known_id(word: str) -> int | None:
    return _group_id(word[1:]) if word.startswith("@") else _user_id(word)


def _user_id(word: str) -> int | None:
    if word.isdecimal():
        return int(word)
    try:
        return pwd.getpwnam(word).pw_uid
    except (KeyError, ValueError):
        return None


def _group_id(word: str) -> int | None:
    if word.isdecimal():
        return int(word)
    try:
        return grp.getgrnam(word).gr_gid
    except (KeyError, ValueError):
        return None
