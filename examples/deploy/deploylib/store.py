"""The object store: bundles by their SHA-256, over HTTP (PUT, HEAD, GET).

nginx with `dav_methods PUT` is one. It writes beside the file and renames: an object is there as a
whole or not at all.
"""

from __future__ import annotations

import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.request import Request

from deploylib.bundle import sha256_of
from deploylib.settings import Settings, TaskError
from deploylib.steps import Report

TIMEOUT_S = 60


def bundle_upload(settings: Settings, report: Report, *, file: str, sha256: str) -> dict[str, Any]:
    """An object that is there already is not sent again."""
    path = Path(file)
    report(1, 2, "hash")
    if sha256_of(path) != sha256:
        raise TaskError(f"{file} has changed since it was built")
    url = address(settings, sha256)
    size_bytes = path.stat().st_size
    is_new = _size(url) != size_bytes
    report(2, 2, "upload")
    if is_new:
        with path.open("rb") as data:
            head = {"Content-Length": str(size_bytes), "Content-Type": "application/gzip"}
            _open(Request(url, data, head, method="PUT")).close()
    if _size(url) != size_bytes:
        raise TaskError(f"{url} is not what was sent")
    return {"url": url, "sha256": sha256, "sent": is_new}


def fetch(settings: Settings, sha256: str, target: Path) -> None:
    """Whole or not at all."""
    part = target.with_name(f"{target.name}.part")
    with _open(Request(address(settings, sha256))) as reply, part.open("wb") as out:
        shutil.copyfileobj(reply, out)
    if sha256_of(part) != sha256:
        raise TaskError(f"{address(settings, sha256)} is damaged")
    part.rename(target)


def address(settings: Settings, sha256: str) -> str:
    return f"{settings.store_url}/{sha256}.tar.gz"


def _size(url: str) -> int | None:
    try:
        with urllib.request.urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S) as reply:
            return int(reply.headers["Content-Length"])
    except urllib.error.HTTPError as error:
        error.close()
        return None
    except OSError as error:
        raise TaskError(f"{url}: {error}") from error


def _open(request: Request) -> http.client.HTTPResponse:
    try:
        reply: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return reply
    except OSError as error:
        raise TaskError(f"{request.full_url}: {error}") from error
