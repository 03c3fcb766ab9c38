"""upload fid:50: bring a file to all mirrors, or with mirror:eu to one; the next finds `mfid`."""

from __future__ import annotations

import contextlib
import ftplib
import hashlib
import os
from collections.abc import Iterator
from io import BufferedReader

from upq_jobs import ftp, places
from upq_jobs.catalogue import CatalogueJob, Hashes, Limited, differing

from upq import Abort, Retry


class Upload(CatalogueJob):
    def check(self) -> bool:
        if not self.find_file():
            return False
        folder = self.getcfg("path") or self.getcfg("files", "")
        if not os.path.isabs(folder):
            return self.refuse(f"[job {self.jobname}] path has to be an absolute path")
        try:
            self.remote = places.below(folder, self.file.path)
        except places.Elsewhere as error:
            return self.refuse(f"{error}: only files there are uploaded")
        if not str(self.remote).isprintable():
            return self.refuse(f"{str(self.remote)!r} has characters in it that FTP has no way for")
        self.folder = folder
        return self.find_mirrors()

    def find_mirrors(self) -> bool:
        """Set `self.mirrors` to those that the file has to be brought to."""
        try:
            mirrors = ftp.mirrors(self.getcfg)
        except ValueError as error:
            return self.refuse(f"[job {self.jobname}] {error}")
        wanted = str(self.jobdata.get("mirror") or "")
        if wanted and wanted not in mirrors:
            return self.refuse(f"no mirror {wanted!r} in [job {self.jobname}]")
        off = self.catalogue.mirrors_off()
        self.mirrors = [m for m in mirrors.values() if wanted in ("", m.name) and m.name not in off]
        if not self.mirrors:
            return self.refuse(f"Mirror {wanted} is off." if wanted else "All mirrors are off.")
        return True

    def run(self) -> bool:
        self.jobdata.pop("mfid", None)
        self.stored = self.catalogue.hashes(self.file.fid)
        if not self.stored:
            fid = self.file.fid
            return self.refuse(f"No hashes of file ({fid}) in DB: hash fid:{fid} makes them")
        if len(self.mirrors) > 1:
            fid = self.file.fid
            self.result = self.each({"fid": fid, "mirror": m.name} for m in self.mirrors)
            self.msg(f"{self.remote} is on {', '.join(m.name for m in self.mirrors)}")
        else:
            self.bring_to(self.mirrors[0])
        return True

    def bring_to(self, mirror: ftp.Mirror) -> None:
        fid, path = self.file.fid, self.remote
        mid = self.catalogue.mirror(mirror.name, mirror.web).mid
        copies = [copy for copy in self.catalogue.copies(fid) if copy.mid == mid]
        if copies and copies[0].status in ("new", "ok") and copies[0].path == str(path):
            mfid = copies[0].mfid
            self.msg(f"{mirror.name} has {path} already")
        else:
            self.refuse_another(mirror, mid)
            self.send(mirror)
            mfid = self.catalogue.keep_copy(mid, fid, str(path))
            self.msg(f"{mirror.name} has {path}, {self.file.size} bytes")
        self.jobdata["mfid"] = mfid
        self.result = {"mfid": mfid, "fid": fid, "mirror": mirror.name, "remote": str(path)}

    def refuse_another(self, mirror: ftp.Mirror, mid: int) -> None:
        other = self.catalogue.at_path(mid, str(self.remote))
        if other not in (None, self.file.fid):
            raise Abort(f"{mirror.name} has file ({other}) as {self.remote}")

    def send(self, mirror: ftp.Mirror) -> None:
        """All of it under another name, which is then its own: nobody ever sees a half."""
        # Another content, or another job, has another part: what goes on is always our own.
        content = hashlib.sha256(repr(sorted(self.stored.items())).encode()).hexdigest()[:8]
        part = f".upq-{self.jobid}-{content}.part"
        with self.source() as source, ftp.session(mirror, self.cancel_event) as line:
            line.enter(self.remote.parent)
            try:
                self.fill(line, part, source)
                self.verify(line, part, mirror)
                line.replace(part, self.remote.name)
            except (Abort, ftplib.error_perm):
                if not (self.interrupted or self.ended_by == "timeout"):
                    drop(line, part)
                raise

    @contextlib.contextmanager
    def source(self) -> Iterator[BufferedReader]:
        with (
            places.opened(self.folder, self.remote.parent) as folder,
            places.open_file(self.remote.name, folder) as source,
        ):
            yield source

    def fill(self, line: ftp.Line, part: str, source: BufferedReader) -> None:
        """Send what is missing of the part. Raises Abort when that is not what was hashed."""
        start = self.there_is(line, part, source)
        sender = Sender(self, source, start)
        try:
            line.store(part, sender, start)
        except ftplib.Error:
            if not start or sender.sent:
                raise
            # A server that goes on with nothing.
            sender = Sender(self, source, 0)
            line.store(part, sender)
        if wrong := differing(self.stored, sender.hashes.digests):
            fid = self.file.fid
            raise Abort(
                f"Hashes of file ({fid}) {self.file.path} do not match those in DB: {wrong}"
            )

    def there_is(self, line: ftp.Line, part: str, source: BufferedReader) -> int:
        """Bytes of the part that are there; 0 when its end is not what it should be."""
        size = line.size_of(part)
        if not size or size > self.file.size:
            return 0
        start = max(size - ftp.SEAM_BYTES, 0)
        source.seek(start)
        try:
            with line.reading(part, start) as theirs:
                same = theirs.read(size - start + 1) == source.read(size - start)
        except ftplib.error_perm:
            return 0
        return size if same else 0

    def verify(self, line: ftp.Line, part: str, mirror: ftp.Mirror) -> None:
        size = None if mirror.reads_back else line.size_of(part)
        if size is None:
            with line.reading(part) as theirs:
                body = Limited(theirs, self.file.size + 1)
                wrong = differing(self.stored, self.digests(body, self.file.size))
        else:
            wrong = "" if size == self.file.size else f"it has {size} bytes"
        if wrong:
            drop(line, part)
            raise Retry(f"{mirror.name}: not what was sent: {wrong}")


class Sender:
    """Reads the source for ftplib from a byte on, and hashes all of it."""

    def __init__(self, job: Upload, source: BufferedReader, start: int) -> None:
        self.hashes = Hashes()
        self.sent = False
        size = job.file.size
        source.seek(0)
        for block in job.blocks(Limited(source, start), size):
            self.hashes.update(block)
        rest = Limited(Small(source), size - start + 1)
        self._blocks = job.blocks(rest, size, start)

    def read(self, _: int, /) -> bytes:
        self.sent = True
        block = next(self._blocks, b"")
        self.hashes.update(block)
        return block


class Small:
    """A source in blocks that a slow line sends in time."""

    def __init__(self, source: BufferedReader) -> None:
        self._source = source

    def read1(self, size: int, /) -> bytes:
        return self._source.read1(min(size, ftp.BLOCK_BYTES))


def drop(line: ftp.Line, part: str) -> None:
    """Remove it, if the server can hear of it yet."""
    with contextlib.suppress(*ftplib.all_errors):
        line.delete(part)
