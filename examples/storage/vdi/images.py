"""Disks: each task is one run of qemu-img, and may be run again after a crash in its middle."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from vdi.site import Failed, Refused, Site, flush, format_of, held, name_of, part_of, place

_PROGRESS = re.compile(r"\((\d+(?:\.\d+)?)/100%\)")
_SIZE = re.compile(r"(\d+)([KMGT]?)")


def qemu(task: str, *words: object, says: str = "") -> str:
    """Run qemu-img. With `says` its progress is printed, as lines with that text.

    Raises Failed, also when an image is in use: qemu locks those that it has open.
    """
    argv = ["qemu-img", task, *(["-p"] if says else []), *map(str, words)]
    # Locks are the only descriptors that a program gets.
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, close_fds=False
    ) as process:
        assert process.stdout and process.stderr
        lines = []
        for line in process.stdout:
            lines.append(line)
            if says and (found := _PROGRESS.search(line)):
                print(f"progress: {found[1]}% {says}", flush=True)
        fault = " ".join(process.stderr.read().split())
    if process.returncode:
        raise Failed(fault or "".join(lines).strip() or f"qemu-img {task}: {process.returncode}")
    return "".join(lines)


def info(image: Path) -> dict[str, Any]:
    """What qemu knows of an image that is not in use. Raises Refused when there is none."""
    if not image.is_file():
        raise Refused(f"no image {image.name}")
    return dict(json.loads(qemu("info", "--output=json", "-f", format_of(image), image)))


def size_of(text: str) -> int:
    """The bytes that 20G is. Raises Refused."""
    found = _SIZE.fullmatch(text)
    if not found or not int(found[1]):
        raise Refused(f"{text!r} is no size: 20G, 512M")
    return int(found[1]) << 10 * "_KMGT".index(found[2] or "_")


def backing_of(image: Path) -> Path | None:
    """The image that this one is based on, from its header: thousands are looked at."""
    with open(image, "rb") as file:
        header = file.read(20)
        if len(header) < 20 or header[:4] != b"QFI\xfb":
            return None
        start, length = struct.unpack(">QI", header[8:])
        file.seek(start)
        text = file.read(length).decode() if start else ""
    return (image.parent / text).resolve() if text else None


def children(site: Site, image: Path) -> list[Path]:
    """What is based on an image: disks of all pools, and what the archive has of some."""
    found = []
    for disk in site.disks():
        with suppress(FileNotFoundError):  # deleted meanwhile
            if disk.suffix == ".qcow2" and backing_of(disk) == image.resolve():
                found.append(disk)
    for note in site.archive.glob("*/[!.]*.json"):
        backing = json.loads(note.read_text())["backing"]
        if backing and (site.pools / backing).resolve() == image.resolve():
            found.append(note.with_suffix(""))
    return sorted(found)


def refuse_children(site: Site, image: Path, but: Path | None = None) -> None:
    """Raise Refused when other images are based on this one."""
    if found := [child.name for child in children(site, image) if child != but]:
        raise Refused(f"{image.name} is what {' '.join(found)} is based on")


def create_disk(site: Site, pool: str, disk: str, size: str = "", base: str = "") -> dict[str, Any]:
    """An empty disk, or one that begins as another one is. One that is there as asked is done."""
    store = site.pool(pool)
    image = store.disk(disk)
    if image.suffix != ".qcow2" or not (size or base):
        raise Refused("a new disk ends in .qcow2, and has a size or a base")
    words: list[object] = []
    below = store.image(base) if base else None
    with held(changes=[image], reads=[below] if below else []):
        wanted = size_of(size) if size else 0
        if below:
            wanted = wanted or info(below)["virtual-size"]
            words = ["-b", os.path.relpath(below, image.parent), "-F", format_of(below)]
        if not image.exists():
            with part_of(image) as part:
                qemu("create", "-q", "-f", "qcow2", *words, part, wanted)
                place(part, image)
        there = info(image)
        if there["virtual-size"] != wanted or backing_of(image) != (below and below.resolve()):
            raise Refused(f"{disk} is there already, with another size or base")
    return {"disk": disk, "size": wanted}


def resize(site: Site, pool: str, disk: str, size: str) -> dict[str, Any]:
    """Make a disk larger. A smaller one would lose its end."""
    image = site.pool(pool).disk(disk)
    wanted = size_of(size)
    with held(changes=[image]):
        now = info(image)["virtual-size"]
        if wanted < now:
            raise Refused(f"{disk} has {now} bytes and would lose some")
        if wanted > now:
            qemu("resize", "-q", "-f", format_of(image), image, wanted)
    return {"disk": disk, "size": wanted}


def create_snapshot(site: Site, pool: str, disk: str, name: str) -> dict[str, Any]:
    """A snapshot inside the image. One that is there is done."""
    image = site.pool(pool).disk(disk)
    with held(changes=[image]):
        if name_of(name) not in [one["name"] for one in info(image).get("snapshots", [])]:
            qemu("snapshot", "-c", name, image)
    return {"disk": disk, "snapshot": name}


def convert(site: Site, pool: str, disk: str, to: str) -> dict[str, Any]:
    """A copy that stands for itself, in the format that its name says."""
    store = site.pool(pool)
    image, target = store.disk(disk), store.disk(to)
    kinds = ["-f", format_of(image), "-O", format_of(target)]
    with held(changes=[target], reads=[image]):
        info(image)
        if not target.exists():
            with part_of(target) as part:
                qemu("convert", *kinds, image, part, says=f"to {to}")
                place(part, target)
        elif not same(image, target):
            raise Refused(f"{to} is there already, and is something else")
    return {"disk": to, "bytes": allocated(target)}


def same(one: Path, other: Path) -> bool:
    """Whether a guest would find the same on both."""
    try:
        qemu("compare", "-f", format_of(one), "-F", format_of(other), one, other)
    except Failed as error:
        if "mismatch" in str(error) or "differ" in str(error):
            return False
        raise
    return True


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def refuse_snapshots(image: Path) -> None:
    """Snapshots of a disk read from its base what they do not hold themselves."""
    if names := [one["name"] for one in info(image).get("snapshots", [])]:
        raise Refused(f"{image.name} has snapshots that need its base as it is: {' '.join(names)}")


def commit(site: Site, pool: str, disk: str) -> dict[str, Any]:
    """Write what a disk has of its own into its base. The base must have no other child."""
    image = site.pool(pool).disk(disk)
    if not image.is_file():
        raise Refused(f"no image {disk}")
    below = backing_of(image)
    if below is None:
        raise Refused(f"{disk} has no base")
    with held(changes=[image, below]):
        refuse_children(site, below, but=image)
        if backing_of(image) != below:
            raise Failed(f"{disk} was rebased meanwhile")
        refuse_snapshots(image)
        info(below)
        qemu("commit", "-f", format_of(image), image, says=f"to {below.name}")
    return {"disk": disk, "base": below.name}


def rebase(site: Site, pool: str, disk: str, base: str = "") -> dict[str, Any]:
    """Base a disk on another image, or on none; what a guest finds on it stays the same."""
    store = site.pool(pool)
    image, below = store.disk(disk), store.image(base) if base else None
    with held(changes=[image], reads=[below] if below else []):
        refuse_snapshots(image)
        above, words = below, []
        while above:
            if above.resolve() == image.resolve():
                raise Refused(f"{base} is based on {disk} itself")
            above = backing_of(above)
        if below:
            words = ["-F", format_of(below)]
        name = os.path.relpath(below, image.parent) if below else ""
        qemu("rebase", "-f", format_of(image), *words, "-b", name, image, says=f"on {base or '-'}")
    return {"disk": disk, "base": base}


def sparsify(site: Site, pool: str, disk: str) -> dict[str, Any]:
    """Give back the room of what a guest has overwritten with zeros, or discarded."""
    image = site.pool(pool).disk(disk)
    with held(changes=[image]):
        if info(image).get("snapshots"):
            raise Refused(f"{disk} has snapshots, which a copy of it would not have")
        before, below, words = allocated(image), backing_of(image), []
        if below:
            words = ["-B", os.path.relpath(below, image.parent), "-F", format_of(below)]
        kind = format_of(image)
        with part_of(image) as part:
            qemu("convert", "-S", "4k", "-f", kind, "-O", kind, *words, image, part, says="copied")
            if not same(image, part):
                raise Failed(f"the copy of {disk} is not the same")
            flush(part)
            os.replace(part, image)
        flush(image.parent)
    return {"disk": disk, "before": before, "after": allocated(image)}
