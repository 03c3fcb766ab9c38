"""download url:https://...: fetch a file into `path`; the jobs after it find `file` (and `fid`)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from email.utils import formatdate
from http.client import HTTPResponse
from io import FileIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from upq_jobs import web
from upq_jobs.catalogue import CatalogueJob

from upq import Abort, Retry
from upq.when import duration, size


class Download(CatalogueJob):
    def check(self) -> bool:
        url = str(self.jobdata.get("url") or "")
        if not url:
            return self.refuse("url has to be set!")
        if fault := web.fault(url):
            return self.refuse(fault)
        name = os.path.basename(unquote(urlsplit(url).path))
        if not name.isprintable() or name.startswith(".") or not 0 < len(os.fsencode(name)) < 200:
            return self.refuse(f"{url} does not end in a file name")
        folder = self.getcfg("path") or self.getcfg("files", "")
        if not os.path.isabs(folder):
            return self.refuse(f"[job {self.jobname}] path has to be an absolute path")
        try:
            self.http_timeout_s = duration(self.getcfg("http_timeout", "30s"))
            self.max_bytes = size(self.getcfg("max_size", "10G"))
        except ValueError as error:
            return self.refuse(f"[job {self.jobname}] {error}")
        self.url, self.target = web.plain(url), Path(folder, name)
        return True

    def run(self) -> bool:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.part() as part:
            if self.receive(part):
                self.msg(f"{self.target} {part.tell()} bytes")
                os.fsync(part.fileno())
                os.replace(part.name, self.target)
            else:
                self.msg(f"{self.target} not modified")
                os.unlink(part.name)
        self.hand_on()
        return True

    def hand_on(self) -> None:
        """Tell the next job what there is: new_file would refuse a known path without its fid."""
        self.jobdata["file"] = str(self.target)
        self.jobdata.pop("fid", None)
        if known := self.catalogue.find(self.jobdata["file"]):
            self.jobdata["fid"] = known.fid

    @contextlib.contextmanager
    def part(self) -> Iterator[FileIO]:
        """What is there of this address, open for more; it stays when another try makes sense.

        While it is incomplete its mtime is the server's Last-Modified: that is how the next try,
        after a kill too, asks for the rest of the very same version.
        """
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        name = self.target.with_name(f".{self.target.name}.{key}.part")
        with name.open("ab", buffering=0) as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.path.samestat(os.fstat(part.fileno()), name.stat())
            except OSError:
                ours = False
            if not ours:
                raise Retry(f"{self.url}: another job is fetching it")
            try:
                yield part
            except BaseException as error:
                if not (isinstance(error, Retry) and part.tell()):
                    name.unlink()
                raise

    def receive(self, part: FileIO) -> bool:
        """Fetch what is missing; False when the file on disk is still the server's."""
        headers = self.conditions(part)
        expected = (304, 416) if "Range" in headers else (304,)
        with web.fetch(
            self.url, headers, timeout_s=self.http_timeout_s, expected=expected
        ) as answer:
            if answer.code == 304:
                return False
            if answer.code != 200 and not goes_on(part, answer):
                if "Range" not in headers:
                    raise Abort(f"{self.url}: unexpected answer {answer.code}")
                empty(part)
                return self.receive(part)
            if answer.code == 200:
                empty(part)
            self.save(answer, part)
            return True

    def conditions(self, part: FileIO) -> dict[str, str]:
        info = os.fstat(part.fileno())
        if info.st_size and info.st_mtime:
            date = formatdate(info.st_mtime, usegmt=True)
            return {"Range": f"bytes={info.st_size}-", "If-Range": date}
        if self.target.exists():
            return {"If-Modified-Since": formatdate(self.target.stat().st_mtime, usegmt=True)}
        return {}

    def save(self, answer: HTTPResponse, part: FileIO) -> None:
        modified = web.seconds(answer.headers.get("Last-Modified"))
        if part.tell():
            modified = os.fstat(part.fileno()).st_mtime
        total = None if answer.length is None else part.tell() + answer.length
        self.refuse_huge(total or 0)
        for block in self.blocks(answer, total, part.tell()):
            while block:
                block = block[part.write(block) :]
            os.utime(part.name, (modified, modified))
            self.refuse_huge(part.tell())
        if part.tell() < (total or 0):
            raise Retry(f"{self.url}: cut off after {part.tell()} of {total} bytes")
        if not modified:
            os.utime(part.name)

    def refuse_huge(self, size_bytes: int) -> None:
        if size_bytes > self.max_bytes:
            raise Abort(
                f"{self.url}: more than {self.max_bytes} bytes ([job {self.jobname}] max_size)"
            )


def goes_on(part: FileIO, answer: HTTPResponse) -> bool:
    """Whether the answer is what comes after the part, of the same version."""
    dated = web.seconds(answer.headers.get("Last-Modified"))
    return (
        answer.code == 206
        and answer.headers.get("Content-Range", "").startswith(f"bytes {part.tell()}-")
        and dated in (0, os.fstat(part.fileno()).st_mtime)
    )


def empty(part: FileIO) -> None:
    part.seek(0)
    part.truncate()
