"""What people see of an answer: text, tables and trees on a terminal, columns in a pipe."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from upq import wire
from upq.wire import Reply

#: States that a job keeps.
FINAL = ("done", "failed", "cancelled", "expired")
_JOB = ("id", "type", "queue", "state", "created_at", "ended_at", "params", "info")
#: Of a list, what its table shows; all there is where nothing is said here.
_COLUMNS: Mapping[str, Sequence[str]] = {
    "jobs": _JOB,
    "children": _JOB,
    "history": ("at", "state", "attempt", "node", "who", "reason", "message"),
    "attempts": (
        *("start", "attempt", "node", "started_at", "ended_at", "took_s", "state", "reason"),
        *("message", "output_bytes"),
    ),
    "tree": (
        *("depth", "id", "type", "queue", "state", "created_at", "started_at", "ended_at"),
        *("parent", "info"),
    ),
    "log": ("at", "job", "type", "state", "attempt", "node", "who", "reason", "message"),
    "queues": (
        *("queue", "type", "queued", "blocked", "running", "done", "failed", "cancelled"),
        *("expired", "concurrent", "oldest_queued_s", "reason"),
    ),
    "schedules": (
        *("name", "type", "expression", "timezone", "english"),
        *("last_at", "last_job", "last_state", "next"),
    ),
}
_COLORS = {"done": 32, "failed": 31, "running": 36, "blocked": 33, "cancelled": 35, "expired": 35}
#: A time as `when.iso` writes it.
_TIME = re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z")
#: Changes of state of a tree that a terminal shows.
_LOG_LINES = 100
#: Characters that a column keeps, however narrow the terminal.
_NARROW = 8


class Screen:
    """Standard output: aligned and in local time on a terminal, columns between TABs in a pipe."""

    def __init__(self, color: str) -> None:
        self.is_terminal = sys.stdout.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.has_color = color == "always" or (color == "auto" and self.is_terminal and not plain)

    def show(self, verb: str, reply: Reply) -> None:
        data = reply.data
        if not isinstance(data, dict) or reply.line.startswith("{"):
            print(reply.line)
        elif verb == "output":
            self._output(data)
        elif verb == "wait":
            self._end(data["job"])
            if (whole := data.get("whole")) and whole["expected"] > 1:
                print(f"the whole: {_summary(whole)}")
        elif verb == "why":
            print(visible(self.told(data["why"])))
        elif verb == "reload":
            lines = [change["text"] for change in data["changes"]] or ["nothing has changed"]
            lines += [f"warning: {text}" for text in data["warnings"]]
            print(*map(visible, lines), sep="\n")
        elif verb == "show":
            job = {key: value for key, value in data["job"].items() if value}
            if job.get("jobdata") == job.get("params"):
                job["jobdata"] = None
            if not self.is_terminal:
                alone = {"tree", "whole", "log"} if not data.get("tree") else set()
                shown = {key: value for key, value in data.items() if key not in alone}
                self._sections(job | shown | {"job": None})
                return
            why = self.told(data["why"]) if job["state"] not in FINAL else ""
            self._sections(job | {"why": why, "history": None})
            self._timeline(data)
            if data.get("tree"):
                self._tree(data)
        elif verb in ("cancel", "retry") and "n" in data:
            self._many(verb, data)
        elif self.is_terminal and not any(data.values()):
            print("none")
        elif verb == "jobs" and "next" in data:
            self._sections({"jobs": data["jobs"]})
            if data["next"] and self.is_terminal:
                print(f"more: before:{data['next']}")
        else:
            self._sections(data)

    def told(self, text: str) -> str:
        """What upq says in a sentence; on a terminal its times are local."""
        if self.is_terminal:
            text = _TIME.sub(lambda found: _local_time(found[0], "seconds"), text)
        return text

    def _output(self, data: Mapping[str, Any]) -> None:
        text = data["text"]
        sys.stdout.write(visible(text) if self.is_terminal else text)
        if data["truncated"]:
            print(f"\nupq-cli: left out of {data['size_bytes']} bytes", file=sys.stderr)

    def _timeline(self, data: Mapping[str, Any]) -> None:
        """One line a change of state: who asked for it, where an attempt ran and how it ended."""
        attempts = iter(data.get("attempts", ()))
        print("\ntimeline")
        at: Mapping[str, Any] | None = None
        for one in data["history"]:
            told = [f"by {one['who']}"] if one["who"] else []
            why = ": ".join(filter(None, (one["reason"], one["message"])))
            if one["state"] == "running":
                at = next(attempts, None)
                told.append(f"attempt {one['attempt']} on {one['node']}")
                if at and at["ended_at"] is None and at["output_bytes"]:
                    told.append(f"{at['output_bytes']} bytes of output so far")
            elif at is not None:
                cut = ", cut" if at["output_truncated"] else ""
                size = f"({at['output_bytes']} bytes of output{cut})" if at["output_bytes"] else ""
                took = f"after {at['took_s']:.3f} s" if at["took_s"] is not None else ""
                told = [*filter(None, (took, size)), *told]
                at = None
            time_ = _local_time(one["at"], "milliseconds")
            state = self._painted(f"{one['state']:<9}")
            text = ", ".join(told) + (f": {why}" if why and told else why)
            print(f"{time_}  {state}  {visible(wire.one_line(text))}".rstrip())

    def _tree(self, data: Mapping[str, Any]) -> None:
        """All below a job, each under the one it came from, and what has happened there."""
        whole = data["whole"]
        print(f"\nthe whole: {_summary(whole)}")
        rows = [
            {**one, "type": "  " * (one["depth"] - 1) + one["type"], "took_s": _took_s(one)}
            for one in data["tree"]
        ]
        self._table(("id", "type", "state", "started_at", "took_s", "info"), rows)
        if whole["left_out"]:
            print(f"... and {whole['left_out']} more{' at least' if whole['more'] else ''}")
        print("\nlog")
        if len(data["log"]) > _LOG_LINES or whole["log_cut"]:
            print("...")
        for one in data["log"][-_LOG_LINES:]:
            time_ = _local_time(one["at"], "milliseconds")
            text = ": ".join(filter(None, (one["reason"], one["message"])))
            state = self._painted(f"{one['state']:<9}")
            job = f"({one['type']}:{one['job']})"
            print(f"{time_}  {state}  {job}  {visible(wire.one_line(text))}".rstrip())

    def _many(self, verb: str, data: Mapping[str, Any]) -> None:
        """How many jobs were meant, and the ids of the first of them."""
        if not self.is_terminal:
            print(f"n\t{data['n']}\ndenied\t{data['denied']}", *data["ids"], sep="\n")
            return
        done = {"cancel": "cancelled or asked to end", "retry": "queued again"}[verb]
        shown = ", ".join(map(str, data["ids"])) + (" ..." if data["n"] > len(data["ids"]) else "")
        print(f"{data['n']} jobs {done}" + (f": {shown}" if shown else ""))
        if data["denied"]:
            print(f"{data['denied']} left alone: they are not yours")

    def _end(self, job: Mapping[str, Any]) -> None:
        why = job["message"] if job["state"] in FINAL else job["reason"]
        message = f": {why}" if why else ""
        print(f"job {job['id']} {self._painted(job['state'])}{visible(message)}")
        result = job["result"]
        if result is not None:
            print(visible(result) if isinstance(result, str) else _json(result))

    def _sections(self, data: Mapping[str, Any]) -> None:
        """What is simple as a block, then each object and each list of objects under its name."""
        nested = {key: value for key, value in data.items() if _is_section(key, value)}
        self._block("", {key: value for key, value in data.items() if key not in nested})
        for key, value in nested.items():
            if isinstance(value, dict) and not self.is_terminal:
                self._block(f"{key}.", value)
                continue
            if len(data) > 1:
                print(f"\n{key}" if self.is_terminal else "")
            if isinstance(value, dict):
                self._block("", value)
            else:
                self._table(_COLUMNS.get(key) or [*value[0]], value)

    def _block(self, prefix: str, fields: Mapping[str, Any]) -> None:
        cells = {
            f"{prefix}{self._title(key)}": self._cell(key, value) for key, value in fields.items()
        }
        width = max(map(len, cells), default=0)
        for key, cell in cells.items():
            if cell and self.is_terminal:
                print(f"{key:<{width}}  {self._painted(cell)}")
            elif cell:
                print(f"{key}\t{cell}")

    def _table(self, keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [[self._cell(*_field(key, row)) for key in keys] for row in rows]
        if not self.is_terminal:
            print(*("\t".join(row) for row in cells), sep="\n")
            return
        titles = [self._title(key).removesuffix("_at").upper() for key in keys]
        columns = [column for column in zip(titles, *cells, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        too_wide = sum(widths) + len("  ") * (len(widths) - 1) - terminal_width()
        # The last columns are the ones that can be cut best.
        for at in reversed(range(len(widths))):
            cut = max(0, min(too_wide, widths[at] - _NARROW))
            widths[at] -= cut
            too_wide -= cut
        for line in zip(*columns, strict=True):
            fitted = [_fit(cell, width) for cell, width in zip(line, widths, strict=True)]
            print("  ".join(self._painted(cell) for cell in fitted).rstrip())

    def _title(self, key: str) -> str:
        """A field's name; durations say their units themselves on a terminal."""
        return key.removesuffix("_s") if self.is_terminal else key

    def _cell(self, key: str, value: Any) -> str:
        """One value on one line."""
        if value is None or value in ("", [], {}):
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if key in ("params", "jobdata") and isinstance(value, dict):
            return wire.one_line(_words(value))
        if key == "progress" and isinstance(value, dict):
            return wire.one_line(told_progress(value))
        if self.is_terminal and key.endswith("_s") and isinstance(value, int | float):
            return _short(value)
        if key == "next" and isinstance(value, list):
            return ", ".join(self._cell("next_at", at) for at in value)
        if not isinstance(value, str):
            return _json(value)
        if self.is_terminal and (key == "at" or key.endswith("_at")):
            return _local_time(value, "milliseconds" if key == "at" else "seconds")
        return wire.one_line(self.told(value) if key == "reason" else value)

    def _painted(self, text: str) -> str:
        color = _COLORS.get(text.strip()) if self.has_color else None
        return f"\033[{color}m{text}\033[m" if color else text


def _summary(whole: Mapping[str, Any]) -> str:
    """How a job and all below it are, for people: `running, 40%: 2 done, 1 running, 2 to come`."""
    counts = [f"{n} {state}" for state, n in whole["counts"].items()]
    if to_come := whole["expected"] - whole["total"]:
        counts.append(f"{to_come} to come")
    if whole["more"]:
        counts.append("and more")
    return f"{whole['state']}, {whole['progress']:.0%}: {', '.join(counts)}"


def told_rest(shown: Mapping[str, Any]) -> str:
    """What a whole waits for whose first job has ended, and how it is."""
    open_ = [one for one in shown["tree"] if one["state"] not in FINAL]
    # What runs, or will; the rest comes after it.
    first = next((one for one in open_ if one["state"] != "blocked"), None)
    told = ""
    if first:
        more = f" and {len(open_) - 1} more" if len(open_) > 1 else ""
        why = first["reason"] or told_progress(first["progress"])
        why = f"{first['state']}{f', {why}' if why else ''}"
        told = f"waits for {first['type']} {first['id']} ({why}){more}; "
    return f"{told}the whole: {_summary(shown['whole'])}"


def told_progress(progress: Mapping[str, Any] | None) -> str:
    """How far a job is, for people: `40% (4 of 10) text`."""
    if not progress:
        return ""
    done, total, text = (progress.get(name) for name in ("done", "total", "text"))
    if not isinstance(done, int | float):
        return str(text or "")
    count = f"{done:g}" if not total else f"{done / total:.0%} ({done:g} of {total:g})"
    return f"{count} {text or ''}".rstrip()


def _is_section(key: str, value: Any) -> bool:
    if key in ("params", "jobdata", "result", "progress") or not value:
        return False
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))


def _field(key: str, row: Mapping[str, Any]) -> tuple[str, Any]:
    """A field with its name; `info` is the one that is worth knowing of a job now."""
    if key == "info":
        is_over = row.get("state") in FINAL and row.get("message")
        names = ("message",) if is_over else ("reason", "progress", "message")
        key = next((name for name in names if row.get(name)), "message")
    return key, row.get(key)


def _took_s(job: Mapping[str, Any]) -> float | None:
    """Seconds of a job that has ended, from its last start on."""
    from upq import when  # noqa: PLC0415, only terminals need it

    if not job["started_at"] or not job["ended_at"]:
        return None
    took = when.instant(job["ended_at"]) - when.instant(job["started_at"])
    return took / 1e6 if took >= 0 else None  # the clock was put back


def _short(seconds: float) -> str:
    from upq import when  # noqa: PLC0415, only terminals need it

    return when.format_duration(seconds)


def _words(params: Mapping[str, Any]) -> str:
    """The parameters as a line would give them."""
    texts = {
        key: value if isinstance(value, str) else _json(value) for key, value in params.items()
    }
    return wire.join(["", *(f"{key}:{text}" for key, text in texts.items())]).strip()


def _json(value: Any) -> str:
    return wire.encode(value).decode().rstrip("\n")


def visible(text: str) -> str:
    """Without what could command a terminal; lines and TABs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda char: ascii(char[0])[1:-1], text)


def _local_time(text: str, timespec: str) -> str:
    from datetime import datetime  # noqa: PLC0415, only terminals need it

    try:
        local = datetime.fromisoformat(text).astimezone().replace(tzinfo=None)
    except ValueError:
        return wire.one_line(text)
    return local.isoformat(" ", timespec)


def _fit(cell: str, width: int) -> str:
    return f"{cell:<{width}}" if len(cell) <= width else cell[: width - 1] + "…"


def terminal_width() -> int:
    try:
        columns = os.environ.get("COLUMNS") or os.get_terminal_size(sys.stdout.fileno()).columns
        return int(columns) or 80  # a terminal that was never told its size says 0
    except (OSError, ValueError):
        return 80
