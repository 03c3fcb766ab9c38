"""move_file_to_archive fid:50: move a file to another disk; the catalogue knows its new place."""

from __future__ import annotations

import contextlib
import os
from io import BufferedReader
from pathlib import PurePosixPath

from upq_jobs import places
from upq_jobs.catalogue import Hashes, Limited, differing
from upq_jobs.moving import MovingJob

from upq import Abort, Retry


class Move_file_to_archive(MovingJob):
    def check(self) -> bool:
        if not self.find_file():
            return False
        self.archive = self.getcfg("archive", "")
        if not os.path.isabs(self.archive):
            return self.refuse(f"[job {self.jobname}] archive has to be an absolute path")
        self.is_there = self.is_archived(self.file.path)
        if not self.is_there:
            return self.find_place()
        self.files = self.getcfg("path") or self.getcfg("files", "")
        if self.is_archived(self.files):
            return self.refuse(f"[job {self.jobname}] {self.files} is in the archive itself")
        return True

    def is_archived(self, path: str) -> bool:
        with contextlib.suppress(places.Elsewhere):
            places.below(self.archive, path)
            return True
        return path == self.archive

    def run(self) -> bool:
        self.clear()
        path = self.file.path
        if self.is_there:
            self.msg(f"{path} is in the archive")
        elif not self.find_hashes():
            return False
        else:
            path = str(self.move())
            self.msg(f"{self.file.path} is now {path}")
        self.jobdata["file"] = path
        self.result = {"fid": self.file.fid, "file": path}
        return True

    def move(self) -> PurePosixPath:
        target = PurePosixPath(self.archive) / self.place
        self.refuse_known(target)
        with (
            self.source() as (here, source),
            places.opened(self.archive, self.place.parent, make=True) as there,
        ):
            before = os.fstat(source.fileno())
            places.sweep(there, self.file.path, self.jobid)
            if self.has_copy(there):
                self.refuse_damaged(self.digests(source, before.st_size))
            elif not self.is_linked(source, here, there):
                self.copy(source, there)
        self.take_over(target, before, before)
        return target

    def has_copy(self, there: int) -> bool:
        """Whether an earlier run has brought it there. Raises Abort when it is another file."""
        if not places.exists(self.place.name, there):
            return False
        with places.open_file(self.place.name, there) as file:
            body = Limited(file, self.file.size + 1)
            if differing(self.stored, self.digests(body, self.file.size)):
                raise Abort(f"{self.archive}/{self.place} exists already, and is another file")
            os.fsync(file.fileno())
        os.fsync(there)
        return True

    def is_linked(self, source: BufferedReader, here: int, there: int) -> bool:
        """Where the archive is on the same disk, a second name is all it takes."""
        if os.fstat(there).st_dev != os.fstat(here).st_dev:
            return False
        self.refuse_damaged(self.digests(source, self.file.size))
        name = self.place.name
        try:
            os.link(name, name, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)
        except OSError:
            return False
        os.fsync(source.fileno())
        os.fsync(there)
        return True

    def copy(self, source: BufferedReader, there: int) -> None:
        hashes = Hashes()
        source.seek(0)
        with places.draft(there, self.file.path, self.jobid) as draft:
            for block in self.blocks(source, self.file.size):
                hashes.update(block)
                draft.file.write(block)
            self.refuse_damaged(hashes.digests)
            draft.settle(os.fstat(source.fileno()))
            if differing(self.stored, self.digests(draft.file, self.file.size)):
                raise Retry(f"{self.archive} gives back other data than was written")
            draft.publish(self.place.name)
