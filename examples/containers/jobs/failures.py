"""What becomes of a failure: a record in the file of its queue, and a mail."""

from __future__ import annotations

import json
import os
import smtplib
import time
from email.message import EmailMessage
from email.utils import localtime
from pathlib import Path
from typing import Any


def record(folder: Path, failure: dict[str, Any]) -> Path:
    """Add one line of JSON to `<queue>.fail` in the folder, and see it on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(failure['queue']).name}.fail"
    line = json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **failure}) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
    try:
        os.write(fd, line.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    return path


def mail(server: str, sender: str, to: str, failure: dict[str, Any], number: int) -> None:
    """Tell people of it. Raises OSError. A mail sent again has the same Message-ID."""
    host, _, port = server.partition(":")
    letter = EmailMessage()
    letter["Subject"] = " ".join(f"{failure['queue']}: {failure['message']}".split())[:200]
    letter["From"] = sender
    letter["To"] = to
    letter["Date"] = localtime()
    letter["Message-ID"] = f"<containers.{failure['id']}.{number}@{host}>"
    letter["Auto-Submitted"] = "auto-generated"
    facts = [f"{name + ':':<9} {failure[name]}" for name in ("queue", "type", "id", "request")]
    output = ["", "The end of its output:", failure["output"]] if failure["output"] else []
    letter.set_content("\n".join([failure["message"], "", *facts, *output]) + "\n")
    with smtplib.SMTP(host, int(port or 25), timeout=10) as smtp:
        smtp.send_message(letter)
