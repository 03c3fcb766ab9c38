"""Where everything is: pools of disks, the archive, what the web server may see; and locks."""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What an image is said to be by its name. Never by its content: who can write a raw disk can
#: make it look like a qcow2 whose backing file is any file of the host.
FORMATS = {"qcow2": "qcow2", "raw": "raw", "img": "raw", "iso": "raw", "vmdk": "vmdk", "vdi": "vdi"}

#: What the tasks need to know, when nothing else is said.
INI = Path(__file__).parents[1] / "vdi.ini"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Refused(Exception):
    """It must not be done, or cannot be; another try would end the same."""


class Failed(Exception):
    """A program has failed."""


def name_of(text: str) -> str:
    """A name of one file or folder. Raises Refused."""
    if not _NAME.fullmatch(text):
        raise Refused(f"{text!r} is no name: letters, digits, . _ - and at most 100 of them")
    return text


def format_of(image: Path) -> str:
    """Raises Refused for a name that does not tell."""
    try:
        return FORMATS[image.suffix.removeprefix(".")]
    except KeyError:
        raise Refused(f"{image.name} ends in none of {' '.join(FORMATS)}") from None


@dataclass(frozen=True)
class Pool:
    """One storage: a folder with `disks`, `media` and `trash`, all in one file system."""

    folder: Path

    def disk(self, name: str) -> Path:
        return self.folder / "disks" / name_of(name)

    def medium(self, name: str) -> Path:
        return self.folder / "media" / name_of(name)

    def image(self, name: str) -> Path:
        """A disk, or what `media/name` names."""
        kind, _, rest = name.rpartition("/")
        return self.medium(rest) if kind == "media" else self.disk(name)

    def trash(self, image: Path) -> Path:
        """Where it goes when it is deleted: each time to a place of its own."""
        return self.folder / "trash" / f"{image.parent.name}.{image.name}.{time.time_ns()}"

    def trashed(self, image: Path) -> list[Path]:
        """What has had this name and was deleted."""
        found = (self.folder / "trash").glob(f"{image.parent.name}.{image.name}.*")
        return [path for path in found if path.suffix[1:].isdigit()]


@dataclass(frozen=True)
class Site:
    """What `vdi.ini` says."""

    pools: Path
    archive: Path
    web: Path
    #: What the addresses of uploads and downloads begin with.
    address: str
    #: Seconds that such an address is good for.
    lasts_s: int
    #: The socket of the dispatcher, which is told of uploads.
    upq: Path
    #: Seconds that deleted images stay in the trash.
    trash_s: int

    @classmethod
    def read(cls, file: str | Path = INI) -> Site:
        ini = configparser.ConfigParser()
        with open(file) as lines:
            ini.read_file(lines)
        here, folders, web = Path(file).resolve().parent, ini["folders"], ini["web"]
        return cls(
            here / folders["pools"],
            here / folders["archive"],
            here / folders["web"],
            web["address"].rstrip("/"),
            int(web["lasts_s"]),
            here / web["upq"],
            int(folders["trash_s"]),
        )

    def pool(self, name: str) -> Pool:
        """Raises Refused when there is none: it may be a disk that is not mounted."""
        folder = self.pools / name_of(name)
        if not folder.is_dir():
            raise Refused(f"no pool {name}: {folder} is no folder")
        for part in ("disks", "media", "trash", ".locks"):
            (folder / part).mkdir(exist_ok=True)
        return Pool(folder)

    def disks(self) -> Iterator[Path]:
        """The disks of all pools."""
        return self.pools.glob("*/disks/[!.]*")

    def archived(self, pool: str, disk: str) -> Path:
        """Where the archive keeps a disk; beside it is a note about it."""
        return self.archive / name_of(pool) / f"{name_of(disk)}.zst"


@contextmanager
def held(*, changes: Iterable[Path] = (), reads: Iterable[Path] = ()) -> Iterator[None]:
    """Wait until nobody else changes any of these images, nor reads those that are to change.

    Programs started meanwhile keep the locks, should this one die before them.
    """
    changes = set(changes)
    with ExitStack() as stack:
        for image in sorted(changes.union(reads)):  # in one order, so that two never cross
            locks = image.parent.parent / ".locks"
            lock = stack.enter_context(open(locks / f"{image.parent.name}.{image.name}", "a"))
            os.set_inheritable(lock.fileno(), True)
            fcntl.flock(lock, fcntl.LOCK_EX if image in changes else fcntl.LOCK_SH)
        yield


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """Where it is made, until it is whole. What has failed is gone, and what was killed before."""
    part = path.with_name(f".part.{path.name}")
    part.unlink(missing_ok=True)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """A file or a folder is on disk after that."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def place(part: Path, path: Path) -> None:
    """Give what is whole its name; whatever has that name stays. Raises Refused then."""
    flush(part)
    try:
        os.link(part, path)
    except FileExistsError:
        raise Refused(f"{path.name} is there already") from None
    part.unlink()
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    with part_of(path) as part:
        part.write_text(json.dumps(value))
        flush(part)
        os.replace(part, path)
    flush(path.parent)
