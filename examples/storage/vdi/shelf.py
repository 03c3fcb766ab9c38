"""Disks that nobody needs soon: compressed in the archive, or in the trash."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from vdi.images import allocated, backing_of, info, refuse_children
from vdi.site import Failed, Refused, Site, flush, held, part_of, place, write_json

_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)


def blocks(file: IO[bytes], size: int, says: str) -> Iterator[bytes]:
    """The content of a file; its progress is printed at each percent."""
    done = percent = 0
    while block := file.read(_BLOCK):
        yield block
        done += len(block)
        if size and done * 100 // size > percent:
            percent = done * 100 // size
            print(f"progress: {percent}% {says}", flush=True)


@contextmanager
def zstd(*words: str | Path, **pipes: int) -> Iterator[subprocess.Popen[bytes]]:
    """The program, until it has ended. Raises Failed with what it has said."""
    with TemporaryFile() as said:
        with (
            suppress(BrokenPipeError),
            subprocess.Popen(["zstd", "-q", *words], stderr=said, **pipes) as program,
        ):
            yield program
        said.seek(0)
        told = said.read().decode(errors="replace").strip() or f"exit code {program.returncode}"
    if program.returncode:
        raise Failed(f"zstd: {told.splitlines()[-1]}")


def pack(image: Path, part: Path) -> str:
    """Compress a file; returns the hash of what it holds."""
    digest = hashlib.sha256()
    with open(image, "rb") as file, zstd("-T0", "-o", part, stdin=subprocess.PIPE) as program:
        assert program.stdin
        for block in blocks(file, image.stat().st_size, "packed"):
            digest.update(block)
            program.stdin.write(block)
    return digest.hexdigest()


def unpack(shelf: Path, size: int, write: Callable[[bytes], object]) -> str:
    """Hand out what a compressed file holds; returns its hash."""
    digest = hashlib.sha256()
    with zstd("-d", "-c", shelf, stdout=subprocess.PIPE) as program:
        assert program.stdout
        for block in blocks(program.stdout, size, "unpacked"):
            digest.update(block)
            write(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_of(shelf: Path) -> Path:
    """Size, hash and base of what is in the archive."""
    return shelf.with_name(f"{shelf.name}.json")


def archive_disk(site: Site, pool: str, disk: str) -> dict[str, Any]:
    """Compress a disk, move it to the archive, and make sure that it can be got back.

    It leaves its pool only when the whole of it is in the archive, on disk and read again.
    """
    image, shelf = site.pool(pool).disk(disk), site.archived(pool, disk)
    shelf.parent.mkdir(parents=True, exist_ok=True)
    with held(changes=[image]):
        if image.exists():
            info(image)  # nobody uses it
            refuse_children(site, image)
            if not shelf.exists():
                shelve(site, image, shelf)
            elif json.loads(note_of(shelf).read_text())["sha256"] != sha256(image):
                raise Refused(f"the archive has another {disk}")
            image.unlink()
            flush(image.parent)
        elif not shelf.exists():
            raise Refused(f"no image {disk}")
    return {"disk": disk, "bytes": allocated(shelf)}


def shelve(site: Site, image: Path, shelf: Path) -> None:
    size, below = image.stat().st_size, backing_of(image)
    backing = os.path.relpath(below, site.pools.resolve()) if below else ""
    with part_of(shelf) as part:
        digest = pack(image, part)
        if unpack(part, size, len) != digest:
            raise Failed(f"what was written of {image.name} cannot be read")
        write_json(note_of(shelf), {"size": size, "sha256": digest, "backing": backing})
        place(part, shelf)


def unarchive_disk(site: Site, pool: str, disk: str) -> dict[str, Any]:
    """Bring a disk back to its pool, byte for byte."""
    image, shelf = site.pool(pool).disk(disk), site.archived(pool, disk)
    with held(changes=[image]):
        if shelf.exists():
            note = json.loads(note_of(shelf).read_text())
            if not image.exists():
                with part_of(image) as part:
                    with open(part, "wb") as file:
                        digest = unpack(shelf, note["size"], Holes(file).write)
                        file.truncate(note["size"])
                    if digest != note["sha256"]:
                        raise Failed(f"{shelf.name} is damaged")
                    place(part, image)
            elif sha256(image) != note["sha256"]:
                raise Refused(f"{disk} is there already, and is something else")
            shelf.unlink()
            note_of(shelf).unlink()
        elif not image.exists():
            raise Refused(f"the archive has no {disk}")
    return {"disk": disk, "bytes": allocated(image)}


class Holes:
    """Writes a file, but for what is all zeros."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, block: bytes) -> None:
        if block == _ZEROS[: len(block)]:
            self._file.seek(len(block), os.SEEK_CUR)
        else:
            self._file.write(block)


def delete_disk(site: Site, pool: str, disk: str) -> dict[str, Any]:
    """Move a disk to the trash, if no other one is based on it and nobody uses it."""
    return discard(site, pool, site.pool(pool).disk(disk))


def delete_media(site: Site, pool: str, medium: str) -> dict[str, Any]:
    """The same for a medium."""
    return discard(site, pool, site.pool(pool).medium(medium))


def discard(site: Site, pool: str, image: Path) -> dict[str, Any]:
    store = site.pool(pool)
    with held(changes=[image]):
        if image.exists():
            info(image)
            refuse_children(site, image)
            os.utime(image)  # from now on it is kept for trash_s
            os.replace(image, store.trash(image))
            flush(store.folder / "trash")
            flush(image.parent)
        elif not store.trashed(image):
            raise Refused(f"no image {image.name}")
    return {"deleted": image.name}


def sweep(site: Site) -> dict[str, Any]:
    """Remove what has been in the trash for long enough, and what was never finished."""
    old_s, gone = time.time() - site.trash_s, []
    found = [*site.pools.glob("*/trash/*"), *site.pools.glob("*/*/.part.*")]
    for path in [*found, *site.archive.glob("*/.part.*")]:
        with suppress(FileNotFoundError):  # it is finished meanwhile
            if path.stat().st_mtime < old_s:
                path.unlink()
                gone.append(path.name)
    return {"removed": gone}
