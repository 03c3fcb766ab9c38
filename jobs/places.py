"""Files below a folder that is set: no link and no `..` leads anywhere else. Not a job.

Folders are opened one below the other and held open, so that nobody can exchange one for a link
between a look and a deed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from hashlib import sha256
from io import BufferedRandom, BufferedReader
from pathlib import PurePosixPath

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: What file systems without hard links say.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Elsewhere(ValueError):
    """Not below the folder."""


def below(folder: str, path: str) -> PurePosixPath:
    """The path as seen from the folder. Raises Elsewhere."""
    try:
        relative = PurePosixPath(path).relative_to(folder)
    except ValueError:
        raise Elsewhere(f"{path} is not below {folder}") from None
    if ".." in relative.parts or not relative.parts:
        raise Elsewhere(f"{path} is not below {folder}")
    return relative


@contextlib.contextmanager
def opened(folder: str, relative: PurePosixPath, make: bool = False) -> Iterator[int]:
    """The folder of that name below another one; with `make` what is missing of it is made.

    Raises OSError, for a link too.
    """
    fd = os.open(folder, FOLDER)
    try:
        for name in relative.parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=fd)
                    os.fsync(fd)
            inner = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def open_file(name: str, folder: int) -> BufferedReader:
    """Raises OSError, for all but a plain file too."""
    # Opening a pipe would wait for its other end.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = open(os.open(name, flags, dir_fd=folder), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", name)
    return file


class Draft:
    """A file in the making; it has its name once it is complete and on disk, and never before."""

    def __init__(self, file: BufferedRandom, name: str, folder: int) -> None:
        self.file = file
        self._name = name
        self._folder = folder

    def settle(self, like: os.stat_result) -> None:
        """Bring it to disk, with owner, mode and time of another file; what is read then comes from
        there.
        """
        self.file.flush()
        fd = self.file.fileno()
        with contextlib.suppress(PermissionError):
            os.fchown(fd, like.st_uid, like.st_gid)
        with contextlib.suppress(PermissionError):  # a file system without modes
            os.fchmod(fd, stat.S_IMODE(like.st_mode) & 0o777)
        os.utime(fd, ns=(like.st_atime_ns, like.st_mtime_ns))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.file.seek(0)

    def publish(self, name: str) -> None:
        """Give it its name. Raises FileExistsError when something has that already."""
        give_name(self._name, self._folder, name, self._folder)
        os.fsync(self._folder)


def give_name(old: str, old_folder: int, name: str, folder: int) -> None:
    """A further name for a file, or another one where file systems know no further ones."""
    try:
        os.link(old, name, src_dir_fd=old_folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if exists(name, folder):
            raise FileExistsError(errno.EEXIST, "exists already", name) from error
        os.rename(old, name, src_dir_fd=old_folder, dst_dir_fd=folder)


def exists(name: str, folder: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        return True
    return False


@contextlib.contextmanager
def draft(folder: int, path: str, jobid: int) -> Iterator[Draft]:
    """A new file in the folder, made from the file at `path`, readable for nobody else.

    It is gone at the end unless it was published. Each run has a name of its own: one that was
    given up may still be at it.
    """
    name = drafts_of(path, jobid) + secrets.token_hex(4)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=folder), "w+b") as file:
        try:
            yield Draft(file, name, folder)
        finally:
            remove(name, folder)


def drafts_of(path: str, jobid: int) -> str:
    """What the names of a job's drafts begin with."""
    return f".upq-{sha256(path.encode()).hexdigest()[:12]}-{jobid}-"


def sweep(folder: int, path: str, jobid: int) -> None:
    """Remove the drafts over which earlier runs of the job were killed."""
    for name in os.listdir(folder):
        if name.startswith(drafts_of(path, jobid)):
            remove(name, folder)


def remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
