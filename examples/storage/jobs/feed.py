"""What users are told of their tasks: a file of JSON lines for each; knows nothing of upq."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def news(data: dict[str, Any]) -> dict[str, Any]:
    """A line of a feed: of what a task that is done has left, or of what is told of its failure."""
    if "reason" not in data:
        return {"job": data["job"], "task": data["task"], "state": "done", "text": ""}
    told = {"job": data["id"], "task": data["type"], "state": data["state"]}
    return {**told, "text": data["message"]}


def user_of(data: dict[str, Any]) -> str:
    """ "" for a task that nobody has asked for. Raises ValueError for what is no part of a path."""
    name = str(data.get("params", data).get("user") or "")
    if name and not re.fullmatch(r"\w[\w.@-]{0,59}", name):
        raise ValueError(f"user {name!r}: letters, digits, . _ @ - and at most 60 of them")
    return name


def tell(folder: Path, user: str, line: dict[str, Any]) -> None:
    """Add a line to the user's feed, unless it is there: the job may run twice."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line) + "\n"
    with open(folder / f"{user}.jsonl", "a+") as feed:
        feed.seek(0)
        if text not in feed:
            feed.write(text)
            feed.flush()
            os.fsync(feed.fileno())
