"""Giving a file of the catalogue another place, whenever it is killed. Not a job.

The new file is complete, verified and on disk before the catalogue names it, and the catalogue
names it before the old one is removed. Each run goes on with what it finds of an earlier one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import PurePosixPath

from upq_jobs import places
from upq_jobs.catalogue import CatalogueJob, differing, state_of

from upq import Abort, Retry


class MovingJob(CatalogueJob):
    """`find_place()` in `check()`; then `source()`, `take_over()` and `clear()`."""

    def find_place(self) -> bool:
        """Set `self.files`, the folder whose files may be touched, and `self.place` below it."""
        self.files = self.getcfg("path") or self.getcfg("files", "")
        if not os.path.isabs(self.files):
            return self.refuse(f"[job {self.jobname}] path has to be an absolute path")
        try:
            self.place = places.below(self.files, self.file.path)
        except places.Elsewhere as error:
            return self.refuse(str(error))
        return True

    def find_hashes(self) -> bool:
        fid = self.file.fid
        self.stored = self.catalogue.hashes(fid)
        if not self.stored:
            return self.refuse(f"No hashes of file ({fid}) in DB: hash fid:{fid} makes them")
        return True

    @contextlib.contextmanager
    def source(self) -> Iterator[tuple[int, BufferedReader]]:
        """Its folder and the file. Raises Retry when that has changed at the end."""
        with (
            places.opened(self.files, self.place.parent) as folder,
            places.open_file(self.place.name, folder) as file,
        ):
            before = os.fstat(file.fileno())
            yield folder, file
            named = os.stat(self.place.name, dir_fd=folder, follow_symlinks=False)
            same = state_of(before) == state_of(os.fstat(file.fileno()))
            if not (same and os.path.samestat(before, named)):
                raise Retry(f"{self.file.path} has changed meanwhile")

    def refuse_damaged(self, digests: dict[str, str]) -> None:
        if wrong := differing(self.stored, digests):
            name = f"({self.file.fid}) {self.file.path}"
            raise Abort(f"Hashes of file {name} do not match those in DB: {wrong}")

    def refuse_known(self, path: PurePosixPath) -> None:
        """Two files of the catalogue cannot have one place."""
        known = self.catalogue.find(str(path))
        if known is not None:
            raise Abort(f"{path} is in the catalogue already, fid: {known.fid}")

    def take_over(
        self,
        path: PurePosixPath,
        was: os.stat_result,
        is_now: os.stat_result,
        digests: dict[str, str] | None = None,
    ) -> None:
        """Have the catalogue name the new place, and remove the file from the old one."""
        if not self.catalogue.move(self.file, str(path), state_of(was), state_of(is_now), digests):
            raise Retry(f"{self.file.path} was moved by another job")
        self.clear()

    def clear(self) -> None:
        """Remove what this job, or another one that was killed, has left at the place before."""
        left = self.catalogue.leftover(self.file.fid)
        if left is None:
            return
        try:
            place = places.below(self.files, left.path)
        except places.Elsewhere as error:
            raise Abort(f"{error}, and cannot be removed") from error
        with (
            contextlib.suppress(FileNotFoundError),
            places.opened(self.files, place.parent) as folder,
        ):
            found = os.stat(place.name, dir_fd=folder, follow_symlinks=False)
            if state_of(found) == {"size": left.size, "mtime": left.mtime}:
                os.unlink(place.name, dir_fd=folder)
                os.fsync(folder)
            else:
                self.msg(f"{left.path} is another file by now and stays. ")
        self.catalogue.nothing_is_left(self.file.fid)
