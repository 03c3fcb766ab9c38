"""The command line: a line to the daemon, its reply as text, table or JSON."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from upq import wire
from upq.client import Client, Submit, find_socket
from upq.errors import BadParams, NotFound, RequestError, TimedOut
from upq.screen import FINAL, Screen, terminal_width, told_progress, told_rest, visible
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


class _Call:
    """One call of the program: what is asked, and in which form the answer is printed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.wait = args.wait or args.wait_job
        self.screen = Screen(args.color)

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
                if now["state"] == "running":
                    told = told_progress(now["progress"])
                elif now["state"] in FINAL:
                    told = self.screen.told(told_rest(client.show(id)))
                else:
                    told = self.screen.told(now["why"])
                line = visible(wire.one_line(f"job {id} {now['state']}  {told or ''}".rstrip()))
                self._status_line(line)
                wait_s = 1.0
        finally:
            self._status_line("")

    def _status_line(self, text: str) -> None:
        print(f"\r\033[K{text[: terminal_width() - 1]}", end="", file=sys.stderr, flush=True)

    def _output(self, client: Client, line: str) -> int:
        """What a job prints, until it has ended; of each attempt all, one after the other."""
        words = wire.read_words(line)
        id = next((word.removeprefix("id:") for word in words[1:]), "")
        known, next_ = 0, 0
        while True:
            ended = client.verb("why", id=id)["state"] in FINAL
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
        sys.stdout.write(visible(text) if self.screen.is_terminal else text)
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
