"""The command line: a line to the daemon, its reply as text, table or JSON."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from upq import wire
from upq.client import Client, Submit, find_socket
from upq.errors import BadParams, NotFound, RequestError, TimedOut
from upq.wire import Reply

#: Exit status.
ACCEPTED, REFUSED, UNUSABLE = 0, 1, 2
#: Seconds for a reply; the daemon itself gives up on its database after ten.
REPLY_TIMEOUT_S = 30.0

_USAGE = 'upq-cli [option ...] "<jobname>( param:value)*" | <verb> [argument ...] | -'
_EXAMPLES = """\
Sends one line to upq and prints the reply.

  upq-cli "verify_local_file fid:50"    submit a job, with or without the quotes
  upq-cli test "msg:two words"          of several arguments each is one word
  upq-cli --wait hash fid:50            follow the job to its end
  upq-cli jobs state:failed             ask; `upq-cli help` lists the verbs
  upq-cli - < lines                     many lines, one reply each
  upq-cli --then report - < lines       a job that follows when all of them are done
"""
_NOTES = """\
The daemon is found by the first of these that there is: -s, -c, $UPQ_CONFIG (a
file), $UPQ_SOCKET, ./upq.cfg, ~/.config/upq/upq.cfg, /etc/upq/upq.cfg.

exit status:
  0  accepted; with --wait and `wait`: done
  1  refused, failed, or not done in time; of many lines, any of them; nothing to send
  2  wrong usage or no connection
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # argparse takes what follows a leading -- for options when they may be mixed with words.
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_intermixed_args(given[:end])
    words = args.words + given[end + 1 :]
    if not words:  # as the first upq-cli did
        parser.print_usage(sys.stderr)
        return REFUSED
    line = words[0] if len(words) == 1 else wire.join(words or [""])
    if not line.strip() or "\n" in line:
        parser.error("one line is needed; - reads many")
    if args.then is not None and line != "-":
        parser.error("--then needs the lines of a batch: -")
    if args.when is not None and args.then is None:
        parser.error("--when needs --then")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _Call(args).run(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left, as `head` does; Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upq-cli",
        usage=_USAGE,
        description=_EXAMPLES,
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("-c", "--config", metavar="FILE", help="the configuration that names the socket")
    add("-s", "--socket", metavar="ADDRESS", help="path of the socket, or host:port")
    add("--wait", action="store_true", help="follow the job and all below it to the end")
    add("--wait-job", action="store_true", help="follow the job itself, whatever follows it")
    add("--follow", action="store_true", help="with `output`: go on until the job has ended")
    add("--timeout", metavar="TIME", type=_timeout, help="with these: no longer than 30s, 10m")
    add("--then", metavar="LINE", help="with `-`: the lines are a batch, and this job follows it")
    add("--when", choices=("done", "ended"), help="... when all are done, or ended")
    add("--json", action="store_true", help="print one JSON document; for many lines, one each")
    add("-q", "--quiet", action="store_true", help="print ids only")
    add("-v", "--verbose", action="store_true", help="tell what is sent where")
    add("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    return parser


def _duration(text: str) -> float:
    from upq import when  # noqa: PLC0415, few calls need it

    return when.duration(text)


def _timeout(text: str) -> float:
    try:
        return _duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _short(seconds: float) -> str:
    from upq import when  # noqa: PLC0415, only terminals need it

    return when.format_duration(seconds)


class _Call:
    """One call of the program: what is asked, and in which form the answer is printed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.wait = args.wait or args.wait_job
        self.screen = _Screen(args.color)

    def run(self, line: str) -> int:
        try:
            address = self.args.socket or find_socket(self.args.config)
        except OSError as error:
            return self._fail("no_connection", f"{error.filename}: {error.strerror}", UNUSABLE)
        except ValueError as error:
            return self._fail("no_connection", f"{error}", UNUSABLE)
        try:
            with Client(address, REPLY_TIMEOUT_S) as client:
                self._tell(f"Connected to '{address}'.")
                if self.args.then is not None:
                    return self._batch(client)
                return self._many(client) if line == "-" else self._one(client, line)
        except RequestError as error:
            return self._fail(error.code, f"{error}", REFUSED)
        except BrokenPipeError:
            raise
        except OSError as error:
            fault = f"{address}: {error.strerror or error}"
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                fault += "; is upq running?"
            return self._fail("no_connection", fault, UNUSABLE)

    def _one(self, client: Client, line: str) -> int:
        verb = line.split(maxsplit=1)[0]
        if verb in ("wait", "cancel", "retry") or line.startswith("{"):
            # Many jobs take as long as they take.
            client.timeout_s = None
        self._tell(f"Sent: '{line}'")
        if verb == "output" and self.args.follow:
            return self._output(client, line)
        if verb == "wait" and self._watches and (asked := _waited(line)):
            return self._follow(client, [asked.id], asked.timeout_s, whole=asked.whole)
        reply = client.request(line)
        queued = self._queued(reply)
        if reply.code:
            # The faults of a configuration, one a line.
            text = reply.message.replace("\\n", "\n") if verb == "reload" else reply.message
            self._fail(reply.code, text, REFUSED)
        elif self.args.quiet:
            _print_ids(reply)
        elif not self.args.json:
            self.screen.show(verb, reply)
        elif not queued:
            _print_json(_document(reply))
        return max(_status(reply), self._follow(client, queued))

    def _many(self, client: Client) -> int:
        status, queued = ACCEPTED, []
        for reply in client.pipeline(_chunks()):
            if self.args.json:
                _print_json(_document(reply))
            elif self.args.quiet:
                _print_ids(reply)
            else:
                print(reply.line, flush=True)
            status = max(status, _status(reply))
            queued += self._queued(reply)
        return max(status, self._follow(client, queued))

    def _batch(self, client: Client) -> int:
        """The lines of standard input as members of one batch, cancelled if one is refused."""
        batch = client.batch(self.args.then, self.args.when or "done")
        try:
            with batch:
                for chunk in _chunks():
                    for line in chunk.decode(errors="surrogateescape").split("\n")[:-1]:
                        batch.put(_member(line.removesuffix("\r")))
        except RequestError as error:
            after = f" (after {batch.members} members; batch {batch.id} is cancelled)"
            return self._fail(error.code, f"{error}{after if batch.id else ''}", REFUSED)
        if self.args.json:
            _print_json({"ok": True, "id": batch.id, "members": batch.members})
        else:
            text = f"ACK {batch.id} follows {batch.members} jobs"
            print(batch.id if self.args.quiet else text, flush=True)
        return self._follow(client, [batch.id] if self.args.wait else [])

    def _queued(self, reply: Reply) -> list[int]:
        """The jobs to be followed; an id of 0 was answered at once. One follows a whole batch."""
        if reply.batch is not None and not reply.batch.open:
            return [reply.batch.id] if self.args.wait else []
        return [ack.id for ack in reply.acks if ack.id and self.args.wait]

    @property
    def _watches(self) -> bool:
        """Whether somebody sees, at a terminal, what a job does meanwhile."""
        return sys.stderr.isatty() and not self.args.json and not self.args.quiet

    def _follow(
        self,
        client: Client,
        ids: Iterable[int],
        timeout_s: float | None = None,
        *,
        whole: bool | None = None,
    ) -> int:
        status, whole = ACCEPTED, not self.args.wait_job if whole is None else whole
        for id in ids:
            limit_s = self.args.timeout if timeout_s is None else timeout_s
            if self._watches:
                job = self._watch(client, id, limit_s, whole)
            else:
                job = client.wait(id, limit_s, whole=whole)
            more = {name: job.pop(name) for name in ("whole",) if name in job}
            reply = Reply("", data={"job": job, **more})
            if self.args.json:
                _print_json(reply.data)
            elif not self.args.quiet:
                self.screen.show("wait", reply)
            status = max(status, _status(reply))
        return status

    def _watch(self, client: Client, id: int, timeout_s: float | None, whole: bool) -> Any:
        """The job at its end, or at that of the whole; until then one line tells how it is.

        Raises TimedOut.
        """
        over_s = None if timeout_s is None else time.monotonic() + timeout_s
        wait_s = 0.2
        try:
            while True:
                left_s = wait_s if over_s is None else min(over_s - time.monotonic(), wait_s)
                try:
                    return client.wait(id, max(left_s, 0), whole=whole)
                except TimedOut:
                    if over_s is not None and time.monotonic() >= over_s:
                        raise
                now = client.verb("why", id=id)
                is_running = now["state"] == "running"
                told = _progress(now["progress"]) if is_running else self.screen.told(now["why"])
                if now["state"] in _FINAL:
                    told = self.screen.told(_rest(client.show(id)))
                line = _visible(wire.one_line(f"job {id} {now['state']}  {told or ''}".rstrip()))
                self._status_line(line)
                wait_s = 1.0
        finally:
            self._status_line("")

    def _status_line(self, text: str) -> None:
        print(f"\r\033[K{text[: _terminal_width() - 1]}", end="", file=sys.stderr, flush=True)

    def _output(self, client: Client, line: str) -> int:
        """What a job prints, until it has ended; of each attempt all, one after the other."""
        words = wire.read_words(line)
        id = next((word.removeprefix("id:") for word in words[1:]), "")
        known, next_ = 0, 0
        while True:
            ended = client.verb("why", id=id)["state"] in _FINAL
            more = {"start": known, "from": next_} if known else {}
            try:
                part = client.verb("output", id=id, **more)
                if known and not part["running"]:
                    # The rest of an attempt that has ended; another one may have begun.
                    self._print_part(part)
                    part = client.verb("output", id=id)
                    for start in range(known + 1, part["attempt"]):
                        with suppress(NotFound):
                            self._print_part(client.verb("output", id=id, start=start))
                    if part["attempt"] == known:
                        part = {**part, "text": ""}
                self._print_part(part)
                known, next_ = part["attempt"], part["next"]
            except NotFound:
                if ended and not known:
                    raise
            if ended:
                return ACCEPTED
            time.sleep(0.5)

    def _print_part(self, part: Mapping[str, Any]) -> None:
        text = part["text"]
        sys.stdout.write(_visible(text) if self.screen.is_terminal else text)
        sys.stdout.flush()

    def _fail(self, code: str, message: str, status: int) -> int:
        if self.args.json:
            _print_json({"ok": False, "error": code, "message": message})
        else:
            start = f"ERR {code}" if status == REFUSED else "upq-cli:"
            print(start, message, file=sys.stderr)
        return status

    def _tell(self, text: str) -> None:
        if self.args.verbose:
            print(text, file=sys.stderr)


def _chunks() -> Iterator[bytes]:
    """Whole lines of standard input as they come, without empty ones, which would end the talk."""
    rest = b""
    while data := os.read(sys.stdin.fileno(), 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield b"".join(line + b"\n" for line in lines if line.strip())
    if rest.strip():
        yield rest + b"\n"


def _member(line: str) -> Submit:
    """A line as one of a submit_many. Raises BadParams."""
    if not line.startswith("{"):
        return line
    import json  # noqa: PLC0415, `wire` reads what the daemon says

    try:
        member: Submit = json.loads(line)
    except ValueError as error:
        raise BadParams(f"not JSON: {error}") from None
    return member


def _status(reply: Reply) -> int:
    """The exit status that a reply means. A job with no more than the whole is that of `wait`."""
    data = reply.data
    is_end = isinstance(data, dict) and data.keys() - {"whole"} == {"job"}
    ended = data.get("whole", data["job"]) if is_end else {"state": "done"}
    return REFUSED if reply.code or ended["state"] != "done" else ACCEPTED


def _document(reply: Reply) -> Any:
    if reply.code:
        return {"ok": False, "error": reply.code, "message": reply.message}
    acks = [ack._asdict() for ack in reply.acks]
    if reply.batch is not None:
        fields = reply.batch._asdict()
        return {"ok": True, "batch": fields.pop("id"), **fields, "jobs": acks}
    if len(acks) == 1:
        return {"ok": True, **acks[0]}
    return {"ok": True, "jobs": acks} if acks else reply.data


def _print_json(document: Any) -> None:
    print(wire.encode(document).decode(), end="", flush=True)


def _print_ids(reply: Reply) -> None:
    if reply.code:
        print(reply.line, file=sys.stderr)
    acked = [reply.batch.id] if reply.batch else [ack.id for ack in reply.acks]
    for id in acked or _ids(reply.data):
        print(id, flush=True)


def _ids(data: Any) -> list[Any]:
    if isinstance(data, list):
        return [id for item in data for id in _ids(item)]
    if not isinstance(data, dict):
        return []
    if named := [data[key] for key in ("id", "queue", "name") if key in data]:
        return named[:1]
    if isinstance(data.get("ids"), list):
        return list(data["ids"])
    return _ids(data["job"] if "job" in data else [*data.values()])


class _Wait(NamedTuple):
    """What a `wait` asks for."""

    id: int
    timeout_s: float | None
    whole: bool


def _waited(line: str) -> _Wait | None:
    """The arguments of a `wait`; None when the daemon had better say what is wrong."""
    words = [word.removeprefix("id:") for word in wire.read_words(line)[1:]]
    times = [word.removeprefix("timeout:") for word in words if word.startswith("timeout:")]
    wholes = [word for word in words if word in ("whole:yes", "whole:no")]
    ids = [word for word in words if word.isascii() and word.isdecimal()]
    try:
        limit_s = _duration(times[0]) if times else None
    except ValueError:
        return None
    if not ids or len(ids) + len(times) + len(wholes) != len(words):
        return None
    return _Wait(int(ids[0]), limit_s, wholes == ["whole:yes"])


def _summary(whole: Mapping[str, Any]) -> str:
    """How a job and all below it are, for people: `running, 40%: 2 done, 1 running, 2 to come`."""
    counts = [f"{n} {state}" for state, n in whole["counts"].items()]
    if to_come := whole["expected"] - whole["total"]:
        counts.append(f"{to_come} to come")
    if whole["more"]:
        counts.append("and more")
    return f"{whole['state']}, {whole['progress']:.0%}: {', '.join(counts)}"


def _rest(shown: Mapping[str, Any]) -> str:
    """What a whole waits for whose first job has ended, and how it is."""
    open_ = [one for one in shown["tree"] if one["state"] not in _FINAL]
    # What runs, or will; the rest comes after it.
    first = next((one for one in open_ if one["state"] != "blocked"), None)
    told = ""
    if first:
        more = f" and {len(open_) - 1} more" if len(open_) > 1 else ""
        why = first["reason"] or _progress(first["progress"])
        why = f"{first['state']}{f', {why}' if why else ''}"
        told = f"waits for {first['type']} {first['id']} ({why}){more}; "
    return f"{told}the whole: {_summary(shown['whole'])}"


def _progress(progress: Mapping[str, Any] | None) -> str:
    """How far a job is, for people: `40% (4 of 10) text`."""
    if not progress:
        return ""
    done, total, text = (progress.get(name) for name in ("done", "total", "text"))
    if not isinstance(done, int | float):
        return str(text or "")
    count = f"{done:g}" if not total else f"{done / total:.0%} ({done:g} of {total:g})"
    return f"{count} {text or ''}".rstrip()


# What people see

_FINAL = ("done", "failed", "cancelled", "expired")
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


class _Screen:
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
            print(_visible(self.told(data["why"])))
        elif verb == "reload":
            lines = [change["text"] for change in data["changes"]] or ["nothing has changed"]
            lines += [f"warning: {text}" for text in data["warnings"]]
            print(*map(_visible, lines), sep="\n")
        elif verb == "show":
            job = {key: value for key, value in data["job"].items() if value}
            if job.get("jobdata") == job.get("params"):
                job["jobdata"] = None
            if not self.is_terminal:
                alone = {"tree", "whole", "log"} if not data.get("tree") else set()
                shown = {key: value for key, value in data.items() if key not in alone}
                self._sections(job | shown | {"job": None})
                return
            why = self.told(data["why"]) if job["state"] not in _FINAL else ""
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
        sys.stdout.write(_visible(text) if self.is_terminal else text)
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
            print(f"{time_}  {state}  {_visible(wire.one_line(text))}".rstrip())

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
            print(f"{time_}  {state}  {job}  {_visible(wire.one_line(text))}".rstrip())

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
        why = job["message"] if job["state"] in _FINAL else job["reason"]
        message = f": {why}" if why else ""
        print(f"job {job['id']} {self._painted(job['state'])}{_visible(message)}")
        result = job["result"]
        if result is not None:
            print(_visible(result) if isinstance(result, str) else _json(result))

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
        too_wide = sum(widths) + len("  ") * (len(widths) - 1) - _terminal_width()
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
            return wire.one_line(_progress(value))
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


def _is_section(key: str, value: Any) -> bool:
    if key in ("params", "jobdata", "result", "progress") or not value:
        return False
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))


def _field(key: str, row: Mapping[str, Any]) -> tuple[str, Any]:
    """A field with its name; `info` is the one that is worth knowing of a job now."""
    if key == "info":
        is_over = row.get("state") in _FINAL and row.get("message")
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


def _words(params: Mapping[str, Any]) -> str:
    """The parameters as a line would give them."""
    texts = {
        key: value if isinstance(value, str) else _json(value) for key, value in params.items()
    }
    return wire.join(["", *(f"{key}:{text}" for key, text in texts.items())]).strip()


def _json(value: Any) -> str:
    return wire.encode(value).decode().rstrip("\n")


def _visible(text: str) -> str:
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


def _terminal_width() -> int:
    try:
        columns = os.environ.get("COLUMNS") or os.get_terminal_size(sys.stdout.fileno()).columns
        return int(columns) or 80  # a terminal that was never told its size says 0
    except (OSError, ValueError):
        return 80
