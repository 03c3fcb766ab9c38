"""Addresses that nobody can guess, for one upload or one download each, for a while.

A ticket says what an address is good for. Its name is the hash of the secret in the address, so
that lists of files and of jobs show no address.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from vdi.images import backing_of, info, qemu, size_of
from vdi.shelf import sha256
from vdi.site import Refused, Site, format_of, held, name_of, part_of, place, write_json

#: The kinds of vmdk that are one file; others name files with their content.
_ALONE = ("monolithicSparse", "streamOptimized")

UPLOAD, DOWNLOAD = "upload", "download"
#: Seconds for what was sent at the last moment to be taken in.
_LATE_S = 86400


def ticket_name(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()[:32]


def ticket_file(site: Site, ticket: str) -> Path:
    return site.web / "tickets" / f"{name_of(ticket)}.json"


def issue(site: Site, kind: str, secret: str, **what: Any) -> dict[str, Any]:
    """Make an address; nothing happens before somebody uses it."""
    for folder in ("tickets", "incoming", "items"):
        (site.web / folder).mkdir(parents=True, exist_ok=True)
    expires = int(time.time()) + site.lasts_s
    ticket = {"kind": kind, "expires": expires, "used": False, **what}
    write_json(ticket_file(site, ticket_name(secret)), ticket)
    url = f"{site.address}/{kind}/{secret}/{what['name']}"
    return {"url": url, "expires": expires}


def redeem(site: Site, kind: str, secret: str, name: str) -> dict[str, Any] | None:
    """The ticket of an address, if it is good, today, for that."""
    try:
        ticket = dict(json.loads(ticket_file(site, ticket_name(secret)).read_text()))
    except FileNotFoundError:
        return None
    good = ticket["kind"] == kind and ticket["name"] == name and not ticket["used"]
    return ticket if good and ticket["expires"] > time.time() else None


def upload(
    site: Site, pool: str, *, medium: str = "", disk: str = "", most: str = "10G", user: str = ""
) -> dict[str, Any]:
    """An address that takes the content of a new medium or disk."""
    store, name = site.pool(pool), medium or disk
    target = store.medium(name) if medium else store.disk(name)
    format_of(target)
    if target.exists():
        raise Refused(f"{name} is there already")
    what = {"pool": pool, "name": name, "media": bool(medium), "most": size_of(most)}
    return issue(site, UPLOAD, secrets.token_urlsafe(32), **what, user=user)


def incoming(site: Site, ticket: str) -> Path:
    return site.web / "incoming" / name_of(ticket)


def receive(site: Site, pool: str, ticket: str) -> dict[str, Any]:
    """Take what has come over an address into the pool, if it is what its name says."""
    store, came, file = site.pool(pool), incoming(site, ticket), ticket_file(site, ticket)
    if not file.exists():
        raise Refused("no such upload")
    what = json.loads(file.read_text())
    target = store.medium(what["name"]) if what["media"] else store.disk(what["name"])
    with held(changes=[target]):
        if came.exists():
            try:
                take_in(came, target)
            except Refused:
                came.unlink()
                raise
            write_json(file, {**what, "used": True})
            came.unlink()
        elif not what["used"]:
            raise Refused("nothing has come")
        size = info(target)["virtual-size"]
    return {"medium" if what["media"] else "disk": target.name, "size": size}


def take_in(came: Path, target: Path) -> None:
    """Copy it: the pool may be another file system than the web's."""
    if target.exists() and sha256(target) == sha256(came):
        return  # an earlier run did it
    with part_of(target) as part:
        shutil.copyfile(came, part)
        inspect(part)
        place(part, target)


def inspect(image: Path) -> None:
    """Raise Refused for what is no image of its format, or leads to files of the host."""
    try:
        found = info(image)
    except Exception as error:
        raise Refused(f"no {format_of(image)} image: {error}") from None
    data = found.get("format-specific", {}).get("data", {})
    alone = data.get("create-type", _ALONE[0]) in _ALONE and not data.get("data-file")
    if found.get("backing-filename") or backing_of(image) or not alone:
        raise Refused("an image that is uploaded must not be based on another file")
    if image.suffix == ".iso":
        with open(image, "rb") as file:
            file.seek(0x8001)
            if file.read(5) != b"CD001":
                raise Refused("no image of a CD")


def download(site: Site, pool: str, disk: str = "", medium: str = "") -> dict[str, Any]:
    """An address that gives a copy: of a disk all that a guest would see, in one small file."""
    store, name = site.pool(pool), medium or disk
    image = store.medium(name) if medium else store.disk(name)
    secret = secrets.token_urlsafe(32)
    given = issue(site, DOWNLOAD, secret, name=name)
    item = site.web / "items" / ticket_name(secret)
    with held(reads=[image]):
        info(image)
        kind = format_of(image)
        with part_of(item) as part:
            if kind == "qcow2":
                qemu("convert", "-c", "-f", kind, "-O", kind, image, part, says="copied")
            else:
                shutil.copyfile(image, part)
            place(part, item)
    return {**given, "bytes": item.stat().st_size}


def sweep(site: Site) -> dict[str, Any]:
    """Remove the addresses that are over, with what belongs to them."""
    over, now_s = 0, time.time()
    for file in site.web.glob("tickets/[!.]*.json"):
        ticket = json.loads(file.read_text())
        late = 0 if ticket["kind"] == DOWNLOAD else _LATE_S
        if ticket["expires"] + late < now_s:
            for name in (file.stem, f".part.{file.stem}"):
                (site.web / "items" / name).unlink(missing_ok=True)
                (site.web / "incoming" / name).unlink(missing_ok=True)
            file.unlink()
            over += 1
    return {"expired": over}
