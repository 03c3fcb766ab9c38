"""What stands behind the addresses: bytes come in and go out; all else is for jobs.

uvicorn --app-dir examples/storage vdi.web:app --port 8088
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from vdi.doors import DOWNLOAD, UPLOAD, incoming, redeem, ticket_name
from vdi.site import INI, Site

site = Site.read(os.environ.get("VDI_INI", INI))


async def give(request: Request) -> Response:
    secret, name = request.path_params["secret"], request.path_params["name"]
    if redeem(site, DOWNLOAD, secret, name) is None:
        raise HTTPException(404)
    item = site.web / "items" / ticket_name(secret)
    if not item.exists():
        raise HTTPException(404)
    return FileResponse(item, filename=name, media_type="application/octet-stream")


async def take(request: Request) -> Response:
    """Keep what is sent, and have a job look at it; a client that hears no 202 sends it again."""
    secret = request.path_params["secret"]
    ticket = redeem(site, UPLOAD, secret, request.path_params["name"])
    if ticket is None:
        raise HTTPException(404)
    came = incoming(site, ticket_name(secret))
    part = came.with_name(f".part.{came.name}")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HTTPException(409, "somebody is sending it") from None
        file.truncate(0)
        size = 0
        async for block in request.stream():
            size += len(block)
            if size > ticket["most"]:
                file.truncate(0)
                raise HTTPException(413, f"more than {ticket['most']} bytes")
            await run_in_threadpool(file.write, block)
        file.flush()
        await run_in_threadpool(os.fsync, file.fileno())
        os.replace(part, came)
    params = {"pool": ticket["pool"], "ticket": came.name, "user": ticket["user"]}
    return JSONResponse({"job": await submit(f"receive {json.dumps(params)}")}, 202)


async def submit(line: str) -> int:
    """Queue a job: one line to the dispatcher, one line back."""
    try:
        replies, lines = await asyncio.open_unix_connection(site.upq)
        lines.write(f"{line}\n".encode())
        reply = (await asyncio.wait_for(replies.readline(), 30)).decode()
        lines.close()
    except OSError:
        raise HTTPException(503, "try again") from None
    word, id, *_ = [*reply.split(), "", ""]
    if word != "ACK":
        raise HTTPException(503, reply)
    return int(id)


app = Starlette(
    routes=[
        Route("/upload/{secret}/{name}", take, methods=["PUT"]),
        Route("/download/{secret}/{name}", give),
    ]
)
