"""The entry of a site in nginx, made anew as a whole; and taken back when it does not work."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deploylib.plan import HOST
from deploylib.settings import Settings, TaskError, valid_app
from deploylib.steps import Report, run, write_whole

ENTRY = """\
# Made by proxy_update; {app}, release {release}.
server {{
    listen {listen};
    server_name {hosts};
    add_header X-Release {release} always;
    location / {{
        proxy_pass http://{address}:{port};
        proxy_set_header Host $host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
    }}
}}
"""
STEPS = ["try", "write", "check", "reload", "see"]
PATIENCE_S = 10.0
SERVER_ERROR = 500


def proxy_update(
    settings: Settings, report: Report, *, app: str, release: str, hosts: str, address: str,
    port: str,
) -> dict[str, Any]:  # fmt: skip
    """Visitors see this release from now on, or, when that fails, what they saw before."""
    names = hosts.split()
    for name in (*names, address):
        if not HOST.fullmatch(name):
            raise TaskError(f"{name!r} is no name of a host")
    file = settings.proxy_sites / f"{valid_app(app)}.conf"
    report(1, len(STEPS), "try")
    status, _ = _look(f"{address}:{int(port)}", names[0])
    if status >= SERVER_ERROR:
        raise TaskError(f"{names[0]}: the page of release {release} is an error {status}")
    report(2, len(STEPS), "write")
    settings.proxy_sites.mkdir(parents=True, exist_ok=True)
    before = file.read_text() if file.exists() else None
    write_whole(file, ENTRY.format(
        app=app, release=int(release), listen=settings.proxy_listen, hosts=" ".join(names),
        address=address, port=int(port),
    ))  # fmt: skip
    try:
        report(3, len(STEPS), "check")
        run([*settings.nginx, "-t"])
        report(4, len(STEPS), "reload")
        run([*settings.nginx, "-s", "reload"])
        report(5, len(STEPS), "see")
        _until_seen(settings, names[0], release)
    except TaskError:
        _put_back(settings, file, before)
        raise
    return {"url": f"http://{names[0]}/", "status": status, "steps": STEPS}


def _put_back(settings: Settings, file: Path, before: str | None) -> None:
    if before is None:
        file.unlink()
    else:
        write_whole(file, before)
    run([*settings.nginx, "-s", "reload"])


def _until_seen(settings: Settings, host: str, release: str) -> None:
    """nginx says nothing when it has taken over what a reload has told it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while _look(settings.proxy_listen, host)[1] != release:
        if time.monotonic() > deadline_s:
            raise TaskError(f"{host}: release {release} is not to be seen")
        time.sleep(0.02)


def _look(where: str, host: str) -> tuple[int, str]:
    """The status of a site's first page, and the release that nginx says it is of."""
    page = urllib.request.Request(f"http://{where}/", headers={"Host": host})
    try:
        with urllib.request.urlopen(page, timeout=PATIENCE_S) as reply:
            return reply.status, reply.headers.get("X-Release", "")
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, error.headers.get("X-Release", "")
    except OSError as error:
        raise TaskError(f"{host}: {error}") from error
