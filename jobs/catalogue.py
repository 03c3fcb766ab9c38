"""The file catalogue: which files there are, what hashes they have, which mirrors carry them.

Not a job; jobs that work on files derive from `CatalogueJob`. The tables are in the database of
`self.db` and make themselves on first use. Times are microseconds since 1970 UTC, 0 for never.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError

from upq import Abort, UpqJob
from upq.when import now

BLOCK_BYTES = 1 << 20
ALGORITHMS = ("md5", "sha1", "sha256")
#: What a copy on a mirror is when its file has changed since.
OUTDATED = "outdated"

meta = MetaData()
# Only INTEGER is SQLite's own row id.
Big = BigInteger().with_variant(Integer(), "sqlite")


def table(name: str, *columns: Column[Any] | UniqueConstraint) -> Table:
    return Table(f"upq_{name}", meta, *columns, mysql_engine="InnoDB", mysql_charset="utf8mb4")


FILE = table(
    "file",
    Column("fid", Big, primary_key=True),
    Column("path", Text, nullable=False),
    # MariaDB indexes no path of 4096 bytes and takes A for a: what is unique is the path's hash.
    Column("path_sha256", String(64), nullable=False, unique=True),
    Column("size", BigInteger, nullable=False),
    Column("mtime", BigInteger, nullable=False),
    Column("added_at", BigInteger, nullable=False),
    Column("added_by", BigInteger, nullable=False),
    Column("lastcheck", BigInteger, nullable=False, default=0, index=True),
)
FILE_HASH = table(
    "file_hash",
    Column("fid", Big, ForeignKey(FILE.c.fid, ondelete="CASCADE"), primary_key=True),
    Column("algorithm", String(16), primary_key=True),
    Column("digest", String(128), nullable=False),
)
MIRROR = table(
    "mirror",
    Column("mid", Big, primary_key=True),
    Column("name", String(255), nullable=False, unique=True),
    # The web address that its files are found below; "" for none.
    Column("url", Text, nullable=False),
    # "active"; anything else keeps its files from being verified.
    Column("status", String(16), nullable=False, default="active"),
)
MIRROR_FILE = table(
    "mirror_file",
    Column("mfid", Big, primary_key=True),
    Column("mid", Big, ForeignKey(MIRROR.c.mid, ondelete="CASCADE"), nullable=False),
    Column("fid", Big, ForeignKey(FILE.c.fid, ondelete="CASCADE"), nullable=False),
    Column("path", Text, nullable=False),
    # "new", then what verify_remote_file found: "ok", "damaged" or "missing"; or OUTDATED.
    Column("status", String(16), nullable=False, default="new"),
    Column("lastcheck", BigInteger, nullable=False, default=0, index=True),
    UniqueConstraint("mid", "fid"),
)
# The place that a file had before it was moved, until nothing is left there.
LEFTOVER = table(
    "file_leftover",
    Column("fid", Big, ForeignKey(FILE.c.fid, ondelete="CASCADE"), primary_key=True),
    Column("path", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("mtime", BigInteger, nullable=False),
)


#: Seconds that another one may take to make the tables, which MySQL does not let us look at
#: meanwhile, and between two tries.
TABLES_S, TABLE_S = 3.0, 0.1


@lru_cache(maxsize=4)
def make_tables(engine: Engine) -> None:
    """Once per engine. Others may make them at the same moment, here or on another machine."""
    over_s = time.monotonic() + TABLES_S
    while True:
        with engine.connect() as connection:
            try:
                meta.create_all(connection)
                return connection.commit()
            except DBAPIError:  # somebody else was quicker with one of the tables
                if time.monotonic() > over_s:
                    raise
        time.sleep(TABLE_S)


def sha256_of(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()


def state_of(info: os.stat_result) -> dict[str, int]:
    return {"size": info.st_size, "mtime": info.st_mtime_ns // 1000}


class Catalogue:
    """Every method is one transaction; any thread may call it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        make_tables(engine)

    def file(self, fid: int) -> Row[Any] | None:
        with self.engine.connect() as connection:
            return connection.execute(select(FILE).where(FILE.c.fid == fid)).first()

    def find(self, path: str) -> Row[Any] | None:
        wanted = select(FILE).where(FILE.c.path_sha256 == sha256_of(path))
        with self.engine.connect() as connection:
            return connection.execute(wanted).first()

    def add(self, path: str, jobid: int) -> Row[Any]:
        """Register a file, or return the row that has its path already, whoever added it."""
        row = {"path": path, "path_sha256": sha256_of(path), "added_at": now(), "added_by": jobid}
        try:
            with self.engine.begin() as connection:
                connection.execute(insert(FILE).values(**row, **state_of(os.stat(path))))
        except IntegrityError:
            pass
        found = self.find(path)
        assert found is not None
        return found

    def renew(self, file: Row[Any]) -> bool:
        """Take over size and time from disk; if they changed, hashes and copies are of the past."""
        disk = state_of(os.stat(file.path))
        changed = or_(*(FILE.c[name] != value for name, value in disk.items()))
        with self.engine.begin() as connection:
            update_it = update(FILE).where(FILE.c.fid == file.fid, changed).values(**disk)
            if not connection.execute(update_it).rowcount:
                return False
            forget_content(connection, file.fid)
            return True

    def move(
        self,
        file: Row[Any],
        path: str,
        was: dict[str, int],
        state: dict[str, int],
        digests: dict[str, str] | None = None,
    ) -> bool:
        """The file is at another path from now on; what is at the old one, `was`, is left over.

        With `digests` it has another content. False when it is not where it was any more.
        """
        found = update(FILE).where(
            FILE.c.fid == file.fid, FILE.c.path_sha256 == sha256_of(file.path)
        )
        with self.engine.begin() as connection:
            there = {"path": path, "path_sha256": sha256_of(path), **state}
            if not connection.execute(found.values(there)).rowcount:
                return False
            left = {"fid": file.fid, "path": file.path, **was}
            connection.execute(insert(LEFTOVER).values(left))
            if digests:
                forget_content(connection, file.fid)
                connection.execute(insert(FILE_HASH), hash_rows(file.fid, digests))
            return True

    def leftover(self, fid: int) -> Row[Any] | None:
        with self.engine.connect() as connection:
            return connection.execute(select(LEFTOVER).where(LEFTOVER.c.fid == fid)).first()

    def nothing_is_left(self, fid: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(LEFTOVER).where(LEFTOVER.c.fid == fid))

    def hashes(self, fid: int) -> dict[str, str]:
        wanted = select(FILE_HASH.c["algorithm", "digest"]).where(
            FILE_HASH.c.fid == fid, FILE_HASH.c.algorithm.in_(ALGORITHMS)
        )
        with self.engine.connect() as connection:
            return {algorithm: digest for algorithm, digest in connection.execute(wanted)}

    def keep_hashes(self, fid: int, digests: dict[str, str]) -> dict[str, str]:
        """Store the digests, unless the file has some; return what is stored."""
        try:
            with self.engine.begin() as connection:
                connection.execute(insert(FILE_HASH), hash_rows(fid, digests))
        except IntegrityError:
            pass
        return self.hashes(fid)

    def checked(self, fid: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(FILE).where(FILE.c.fid == fid).values(lastcheck=now()))

    def add_mirror(self, name: str, url: str) -> int:
        """A web address that files are found below; returns its mid."""
        with self.engine.begin() as connection:
            added = connection.execute(insert(MIRROR).values(name=name, url=url))
            return int(added.inserted_primary_key[0])

    def add_mirror_file(self, mid: int, fid: int, path: str) -> int:
        """A copy of a file on a mirror; returns its mfid."""
        with self.engine.begin() as connection:
            added = connection.execute(insert(MIRROR_FILE).values(mid=mid, fid=fid, path=path))
            return int(added.inserted_primary_key[0])

    def mirror(self, name: str, url: str) -> Row[Any]:
        """The mirror of that name, whoever added it; a web address that is given is its own."""
        wanted = select(MIRROR).where(MIRROR.c.name == name)
        with self.engine.begin() as connection:
            if url:
                other = MIRROR.c.url != url
                connection.execute(update(MIRROR).where(MIRROR.c.name == name, other), {"url": url})
            found = connection.execute(wanted).first()
        if found is None:
            with contextlib.suppress(IntegrityError):
                self.add_mirror(name, url)
            with self.engine.connect() as connection:
                found = connection.execute(wanted).one()
        return found

    def mirrors_off(self) -> set[str]:
        """The names of mirrors that somebody has taken out of use."""
        with self.engine.connect() as connection:
            return set(connection.scalars(select(MIRROR.c.name).where(MIRROR.c.status != "active")))

    def copies(self, fid: int) -> list[Row[Any]]:
        """The copies of a file on active mirrors, with `name` and `url` of the mirror."""
        wanted = (
            select(MIRROR_FILE, MIRROR.c["name", "url"])
            .join(MIRROR, MIRROR.c.mid == MIRROR_FILE.c.mid)
            .where(MIRROR_FILE.c.fid == fid, MIRROR.c.status == "active")
            .order_by(MIRROR_FILE.c.mfid)
        )
        with self.engine.connect() as connection:
            return list(connection.execute(wanted))

    def keep_copy(self, mid: int, fid: int, path: str) -> int:
        """A copy has come to a mirror, the first or a better one; returns its mfid."""
        with contextlib.suppress(IntegrityError):
            return self.add_mirror_file(mid, fid, path)
        ours = (MIRROR_FILE.c.mid == mid, MIRROR_FILE.c.fid == fid)
        with self.engine.begin() as connection:
            fresh = update(MIRROR_FILE).where(*ours)
            connection.execute(fresh.values(path=path, status="new", lastcheck=0))
            return int(connection.execute(select(MIRROR_FILE.c.mfid).where(*ours)).scalar_one())

    def at_path(self, mid: int, path: str) -> int | None:
        """The fid of the file that has this path on a mirror."""
        wanted = select(MIRROR_FILE.c["fid", "path"]).where(MIRROR_FILE.c.mid == mid)
        with self.engine.connect() as connection:
            found = connection.execute(wanted.where(MIRROR_FILE.c.path == path))
            # MariaDB takes A for a.
            return next((fid for fid, its in found if its == path), None)

    def mirror_file(self, mfid: int) -> Row[Any] | None:
        """The copy with `url`, `name` and `mirror_status` of its mirror and `size` of the file."""
        wanted = (
            select(MIRROR_FILE, MIRROR.c["url", "name"], FILE.c.size)
            .add_columns(MIRROR.c.status.label("mirror_status"))
            .join(MIRROR, MIRROR.c.mid == MIRROR_FILE.c.mid)
            .join(FILE, FILE.c.fid == MIRROR_FILE.c.fid)
            .where(MIRROR_FILE.c.mfid == mfid)
        )
        with self.engine.connect() as connection:
            return connection.execute(wanted).first()

    def checked_mirror_file(self, mfid: int, status: str) -> None:
        found = update(MIRROR_FILE).where(MIRROR_FILE.c.mfid == mfid)
        with self.engine.begin() as connection:
            connection.execute(found.values(status=status, lastcheck=now()))

    def unchecked(self, before: int, limit: int) -> list[tuple[str, dict[str, int]]]:
        """Jobs, with their params, for what was last checked before that time; the oldest first."""
        local = select(FILE.c["lastcheck", "fid"]).where(FILE.c.lastcheck < before)
        remote = (
            select(MIRROR_FILE.c["lastcheck", "mfid"])
            .join(MIRROR, MIRROR.c.mid == MIRROR_FILE.c.mid)
            .where(
                MIRROR_FILE.c.lastcheck < before,
                MIRROR_FILE.c.status != OUTDATED,
                MIRROR.c.status == "active",
                MIRROR.c.url != "",
            )
        )
        kinds = (("verify_local_file", "fid", local), ("verify_remote_file", "mfid", remote))
        found = []
        with self.engine.connect() as connection:
            for job, key, rows in kinds:
                oldest = connection.execute(rows.order_by("lastcheck").limit(limit))
                found += [(lastcheck, number, job, key) for lastcheck, number in oldest]
        return [(job, {key: number}) for _, number, job, key in sorted(found)[:limit]]


def hash_rows(fid: int, digests: dict[str, str]) -> list[dict[str, Any]]:
    return [{"fid": fid, "algorithm": name, "digest": d} for name, d in digests.items()]


def forget_content(connection: Connection, fid: int) -> None:
    """The file has another content: its hashes and its copies are of the past."""
    connection.execute(delete(FILE_HASH).where(FILE_HASH.c.fid == fid))
    copies = update(MIRROR_FILE).where(MIRROR_FILE.c.fid == fid)
    connection.execute(copies.values(status=OUTDATED))


class Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...


class Limited:
    """Ends after so many bytes, should its source never end."""

    def __init__(self, source: Readable, limit: int) -> None:
        self.source, self.limit = source, limit
        self.size = 0

    def read1(self, size: int, /) -> bytes:
        block = self.source.read1(min(size, self.limit - self.size))
        self.size += len(block)
        return block


class Hashes:
    """All that the catalogue keeps of a content, in one pass over it."""

    def __init__(self) -> None:
        self._each = {name: hashlib.new(name, usedforsecurity=False) for name in ALGORITHMS}

    def update(self, block: bytes) -> None:
        for each in self._each.values():
            each.update(block)

    @property
    def digests(self) -> dict[str, str]:
        return {name: each.hexdigest() for name, each in self._each.items()}


class CatalogueJob(UpqJob):
    """A job that works on files of the catalogue."""

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue(self.db)

    def refuse(self, why: str) -> bool:
        self.msg(why)
        return False

    def find_number(self, name: str) -> bool:
        """Set `self.number` to the param of that name, or to the word given without a colon."""
        text = str(self.jobdata.get(name, next(iter(self.args), "")))
        if not text:
            return self.refuse(f"{name} is missing")
        if not re.fullmatch("[0-9]{1,18}", text):
            return self.refuse(f"{name} has to be a number, not {text!r}")
        self.number = int(text)
        return True

    def find_file(self) -> bool:
        """Set `self.file` to the catalogue's row of `fid`; False when there is no such file."""
        if not self.find_number("fid"):
            return False
        found = self.catalogue.file(self.number)
        if found is None:
            return self.refuse(f"File with fid {self.number} is not in the catalogue.")
        self.file = found
        return self.is_readable(found.path)

    def is_readable(self, path: str) -> bool:
        try:
            path.encode()
            if not os.path.isabs(path):
                return self.refuse(f"{path} is not an absolute path")
            # Opening a pipe would wait for its other end.
            if not stat.S_ISREG(os.stat(path).st_mode):
                return self.refuse(f"{path} is not a file")
            with open(path, "rb"):
                return True
        except (OSError, ValueError) as error:
            return self.refuse(f"File is not readable: {error}")

    def blocks(self, source: Readable, total: int | None, done: int = 0) -> Iterator[bytes]:
        """What the source holds, with progress. Raises Abort once the job is cancelled."""
        while block := source.read1(BLOCK_BYTES):
            if self.cancelled:
                raise Abort("cancelled")
            yield block
            done += len(block)
            self.progress(done, total)

    def digests(self, source: Readable, total: int | None) -> dict[str, str]:
        """The hashes of what the source holds, in one pass."""
        hashes = Hashes()
        for block in self.blocks(source, total):
            hashes.update(block)
        return hashes.digests

    def digests_of(self, path: str) -> dict[str, str]:
        with open(path, "rb") as file:
            return self.digests(file, os.fstat(file.fileno()).st_size)

    def each(self, all_params: Iterable[dict[str, Any]]) -> list[Any]:
        """Have a job of this type do each, side by side; their results, once all have ended.

        Raises Abort with what those say that are not done.
        """
        jobs = [self.enqueue_newjob(self.jobname, params) for params in all_params]
        for number, job in enumerate(jobs, 1):
            job.finished.wait()
            self.progress(number, len(jobs))
        if bad := [f"{job.jobid} {job.state}: {job.msgstr}" for job in jobs if job.state != "done"]:
            raise Abort("; ".join(bad))
        return [job.result for job in jobs]


def differing(stored: dict[str, str], found: dict[str, str]) -> str:
    """The names of stored hashes that were not found so."""
    return ", ".join(name for name in ALGORITHMS if name in stored and stored[name] != found[name])
