"""archive_file fid:50: compress a file; the archive takes its place in the catalogue."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from upq_jobs import places
from upq_jobs.catalogue import Hashes, Limited, differing
from upq_jobs.moving import MovingJob

from upq import Abort, Retry

try:
    from compression import zstd
except ImportError:  # before Python 3.14
    try:
        from backports import zstd
    except ImportError:
        zstd = None


class Format(NamedTuple):
    suffix: str
    levels: range
    level: int
    #: Both of an open file; the first with a level.
    writer: Callable[[Any, int], Any]
    reader: Callable[[Any], Any]


FORMATS = {
    # Without name and time: the same content makes the same archive.
    "gzip": Format(
        ".gz",
        range(1, 10),
        6,
        lambda file, level: gzip.GzipFile("", "wb", level, file, mtime=0),
        lambda file: gzip.GzipFile(fileobj=file),
    ),
    "bzip2": Format(
        ".bz2",
        range(1, 10),
        9,
        lambda file, level: bz2.BZ2File(file, "wb", compresslevel=level),
        bz2.BZ2File,
    ),
    "xz": Format(
        ".xz",
        range(10),
        6,
        lambda file, level: lzma.LZMAFile(file, "wb", preset=level),  # noqa: SIM115
        lzma.LZMAFile,
    ),
    "zstd": Format(
        ".zst",
        range(1, 23),
        3,
        lambda file, level: zstd.ZstdFile(file, "wb", options=zstd_options(level)),
        lambda file: zstd.ZstdFile(file),  # noqa: PLW0108, there may be no zstd
    ),
}
SUFFIXES = tuple(form.suffix for form in FORMATS.values())
#: What a reader says of data that its writer has not written.
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))


def zstd_options(level: int) -> dict[Any, int]:
    """With a checksum, as the program zstd writes it."""
    known = zstd.CompressionParameter
    return {known.compression_level: level, known.checksum_flag: 1}


class Archive_file(MovingJob):
    def check(self) -> bool:
        return self.find_file() and self.find_place() and self.find_settings()

    def find_settings(self) -> bool:
        name = self.getcfg("format", "gzip")
        if name not in FORMATS:
            return self.refuse(f"[job {self.jobname}] format is one of {', '.join(FORMATS)}")
        if name == "zstd" and zstd is None:
            return self.refuse(
                f"[job {self.jobname}] format zstd needs the extra `zstd`: pip install 'upq[zstd]'"
            )
        self.form = FORMATS[name]
        level = str(self.getcfg("level") or self.form.level)
        if level not in map(str, self.form.levels):
            first, last = self.form.levels[0], self.form.levels[-1]
            return self.refuse(f"[job {self.jobname}] level of {name} is {first} to {last}")
        self.level = int(level)
        original = self.getcfg("original", "remove")
        if original not in ("remove", "keep"):
            return self.refuse(f"[job {self.jobname}] original is remove or keep")
        self.keeps = original == "keep"
        return True

    def run(self) -> bool:
        self.clear()
        path = self.file.path
        if path.endswith(SUFFIXES):
            self.msg(f"{path} is compressed")
        elif not self.find_hashes():
            return False
        else:
            path = str(self.archive())
            self.hand_on(path)
        self.result = {"file": path, "size": os.stat(path).st_size}
        return True

    def hand_on(self, path: str) -> None:
        self.jobdata["file"] = path
        if self.keeps:
            self.jobdata.pop("fid", None)
            if known := self.catalogue.find(path):
                self.jobdata["fid"] = known.fid

    def archive(self) -> PurePosixPath:
        target = PurePosixPath(self.file.path + self.form.suffix)
        if not self.keeps:
            self.refuse_known(target)
        with self.source() as (folder, source):
            before = os.fstat(source.fileno())
            places.sweep(folder, self.file.path, self.jobid)
            if self.has_archive(target, folder):
                self.refuse_damaged(self.digests(source, before.st_size))
            else:
                self.compress(source, folder, target.name)
            with places.open_file(target.name, folder) as made:
                is_now = os.fstat(made.fileno())
                digests = self.digests(made, is_now.st_size)
        self.msg(f"{target} {is_now.st_size} bytes, from {before.st_size}")
        if not self.keeps:
            self.take_over(target, before, is_now, digests)
        return target

    def has_archive(self, target: PurePosixPath, folder: int) -> bool:
        """Whether an earlier run has made it. Raises Abort when it is another file."""
        if not places.exists(target.name, folder):
            return False
        with places.open_file(target.name, folder) as made:
            if not self.holds_it(made):
                raise Abort(f"{target} exists already, and holds something else")
            os.fsync(made.fileno())
        os.fsync(folder)
        return True

    def holds_it(self, archive: Any) -> bool:
        """Whether what comes out again is what the catalogue knows."""
        try:
            body = Limited(self.form.reader(archive), self.file.size + 1)
            return not differing(self.stored, self.digests(body, self.file.size))
        except DAMAGED:
            return False

    def compress(self, source: BufferedReader, folder: int, name: str) -> None:
        hashes = Hashes()
        with places.draft(folder, self.file.path, self.jobid) as draft:
            with self.form.writer(draft.file, self.level) as packed:
                for block in self.blocks(source, self.file.size):
                    hashes.update(block)
                    packed.write(block)
            self.refuse_damaged(hashes.digests)
            draft.settle(os.fstat(source.fileno()))
            if not self.holds_it(draft.file):
                raise Retry(f"{self.files} gives back other data than was written")
            draft.publish(name)
