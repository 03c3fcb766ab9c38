"""A line to a request. Quotes and replies are in `wire`; what a request means is the front desk's.

`parse` raises nothing but RequestError: it is answered with one line, the connection stays open.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from upq import when, wire
from upq.errors import BadParams, BadText, RequestError, TooLong, UnknownCommand
from upq.job import DONE, ENDED, PRIORITIES, STATES
from upq.params import suggest

#: Levels of objects and lists in JSON.
JSON_DEPTH = 32
#: How far a priority may be from 0.
PRIORITY_LIMIT = 1_000_000

#: What Request.kind says.
SUBMIT = "submit"
SUBMIT_MANY = "submit_many"
VERB = "verb"


class Options(NamedTuple):
    """The `@option:value` words of a submit; None where not given."""

    #: Seconds from now before which the job does not start.
    in_s: float | None = None
    #: The same as a time, from `@at:`. Never together with in_s.
    run_at: int | None = None
    priority: int | None = None
    key: str | None = None
    queue: str | None = None
    node: str | None = None
    timeout_s: float | None = None
    retries: int | None = None
    #: Seconds from now after which the job no longer starts.
    expires_s: float | None = None
    #: Ids of jobs that have to be done before.
    after: tuple[int, ...] | None = None
    #: Who is told of a success and of a failure of this job, too, as in upq.cfg.
    notify_success: str | None = None
    notify_fail: str | None = None
    #: The same for both.
    notify: str | None = None


NO_OPTIONS = Options()


class Batch(NamedTuple):
    """What a SUBMIT_MANY says of the batch that its jobs are members of."""

    #: The submit of the job that follows a new batch.
    then: Request | None = None
    #: The batch that is there: the id of its follow-up.
    id: int = 0
    #: Whether it follows when all are DONE, or when all have ENDED, however.
    when: str = DONE
    #: Makes it safe to ask again, where the members have no keys of their own.
    key: str = ""
    #: Whether more members will come.
    open: bool = False


class Request(NamedTuple):
    """One line, understood."""

    #: SUBMIT, SUBMIT_MANY or VERB.
    kind: str
    #: The verb, or the job type of a submit.
    verb: str
    #: The parameters of a submit, or the arguments of a verb by name, converted.
    params: dict[str, Any]
    options: Options = NO_OPTIONS
    #: The submits of a SUBMIT_MANY.
    many: tuple[Request, ...] = ()
    #: The batch of a SUBMIT_MANY, if it is for one.
    batch: Batch | None = None
    #: It came as JSON and is answered in JSON.
    json: bool = False
    #: The whole line.
    line: str = ""

    @property
    def args(self) -> str:
        """The line after its first word."""
        return _cut(self.line)[1]


class Verb(NamedTuple):
    #: Its arguments in the order in which they may stand without their names: `<id>` is needed,
    #: `[limit:20]` is not, dots take the rest of the line.
    usage: str
    meaning: str


#: The control verbs; none of them can be a job type.
VERBS: Mapping[str, Verb] = {
    "help": Verb("", "this list"),
    "ping": Verb("", "is anyone there?"),
    "version": Verb("", "the version of the daemon"),
    "status": Verb("", "how the daemon is, with counts and counters"),
    "queues": Verb("", "all queues with their counts"),
    "jobs": Verb(
        "[state:failed] [type:hash] [queue:hash] [limit:20] [before:17] [submitter:alice]",
        "list jobs, the newest first; `before` goes on after a job of the list",
    ),
    "show": Verb("<id>", "all about a job and what is below it, with history and attempts"),
    "output": Verb(
        "<id> [from:0] [start:1]",
        "what a job prints, or its last attempt has printed; from this byte on",
    ),
    "cancel": Verb(
        "[id] [type:hash] [state:queued] [queue:hash] [since:1d] [limit:100]",
        "end a job and what is below it before their time, or all of a kind",
    ),
    "retry": Verb(
        "[id] [type:hash] [state:failed] [queue:hash] [since:1d] [limit:100]",
        "queue a failed or cancelled job and what is below it again, or all of a kind",
    ),
    "wait": Verb(
        "<id> [timeout:30s] [whole:yes]",
        "answer when the job has ended; or it and all that is below it",
    ),
    "check": Verb("<line...>", "would this line be accepted? Nothing is queued"),
    "why": Verb("<id>", "what a job that is not running waits for, in one sentence"),
    "nodes": Verb("", "the daemons that share the database"),
    "schedules": Verb("", "what is queued at which times, with the last and the next runs"),
    "pause": Verb("<queue>", "start no more jobs of a queue"),
    "resume": Verb("[queue:hash]", "undo pause; without a queue, undo drain"),
    "reload": Verb("", "read the configuration again"),
    "drain": Verb("", "start no more jobs; submits are still accepted"),
    "watch": Verb("[id:17] [type:hash] [queue:hash] [since:0]", "stream events"),
    "claim": Verb("<queue> [n:1] [ttl:60s]", "take jobs for an outside consumer"),
    "beat": Verb("<id> <token> [progress...]", "keep a claimed job"),
    "finish": Verb("<id> <token> [result...]", "end a claimed job well, with a JSON result"),
    "fail": Verb("<id> <token> <message...>", "end a claimed job badly"),
    "release": Verb("<id> <token>", "give a claimed job back"),
}


def parse(line: bytes) -> Request | None:
    """Understand a line, given without its LF; None for an empty one, which ends the talk.

    Raises BadText, TooLong, BadParams, or UnknownCommand for a verb in JSON.
    """
    line = line.removesuffix(b"\r")
    if len(line) > wire.limit_bytes(line):
        raise TooLong(f"a line may have {wire.limit_bytes(line)} bytes")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadText(f"not UTF-8 at byte {error.start}") from None
    if not text.isprintable() and (bad := _CONTROL.search(text)):
        raise BadText(f"control character {ord(bad[0]):#04x} at character {bad.start()}")
    if text.startswith("{"):
        return _parse_json(text)
    if _is_plain(text):
        verb, *words = text.split() or ("",)
        if verb and verb not in VERBS:
            params = {}
            for word in words:
                key, _, value = word.partition(":")
                params[key] = value
            return Request(SUBMIT, verb, params, NO_OPTIONS, (), None, False, text)
    verb, rest = _cut(text)
    if not verb:
        return None
    if verb in VERBS:
        return Request(VERB, verb, _read_arguments(verb, rest), line=text)
    params, options = _read_submit(rest)
    return Request(SUBMIT, verb, params, options, line=text)


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def _is_plain(text: str) -> bool:
    """No quotes, options or JSON; ASCII, because str.split() splits at more than blanks."""
    return text.isascii() and not ('"' in text or "'" in text or "@" in text or "{" in text)


def _cut(text: str) -> tuple[str, str]:
    """The first word, and the rest."""
    verb, *rest = re.split("[ \t]+", text.strip(" \t"), maxsplit=1)
    return verb, "".join(rest)


def _read_submit(text: str) -> tuple[dict[str, Any], Options]:
    params: dict[str, Any] = {}
    options: dict[str, str] = {}
    position = 0
    while position < len(text):
        if text[position] == "{" and not params:
            params, position = _load(text, position)
            continue
        word, position = wire.next_word(text, position)
        key, _, value = word.partition(":")
        if word.startswith("@"):
            options[key[1:]] = value
        elif word.startswith("{") and not params:
            params = _load_all(word)
        else:
            params[key] = value
    return params, _read_options(options)


def _read_arguments(verb: str, text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    position = 0
    while position < len(text):
        argument = next((free for free in _ARGUMENTS[verb] if free.name not in given), None)
        if argument and argument.takes_rest:
            given[argument.name] = _read_rest(argument.name, text[position:])
            break
        word, position = wire.next_word(text, position)
        name, colon, value = word.partition(":")
        if colon:
            given[name] = value
        elif argument:
            given[argument.name] = word
        else:
            raise _misused(verb)
    return _convert_arguments(verb, given)


def _read_rest(name: str, text: str) -> Any:
    if text[0] in "\"'":
        word, end = wire.next_word(text, 0)
        text = word if end == len(text) else text
    return _load_all(text) if name == "result" else text


# JSON


def _parse_json(text: str) -> Request:
    fields = _load_all(text)
    if "verb" in fields:
        verb = fields.pop("verb")
        if not isinstance(verb, str) or verb not in VERBS:
            raise UnknownCommand(f"no verb {_quoted(verb)}{suggest(str(verb), VERBS)}")
        return Request(VERB, verb, _convert_arguments(verb, fields), json=True, line=text)
    if not fields.keys().isdisjoint(("submit_many", "then", "batch")):
        return _json_many(fields, text)
    return _json_submit(fields, text)


def _json_many(fields: dict[str, Any], text: str) -> Request:
    submits = fields.pop("submit_many", [])
    if not isinstance(submits, list):
        raise BadParams("submit_many takes a list of submits")
    batch = None
    if "then" in fields:
        known: Mapping[str, Callable[[Any], Any]]
        known = {"then": partial(_part, "then"), "when": _when, "open": _yes}
        batch = Batch(**_fields("a new batch", known, fields))
    elif "batch" in fields:
        known = {"batch": _number, "key": _text, "close": _yes}
        given = _fields("an addition to a batch", known, fields)
        batch = Batch(None, given["batch"], key=given.get("key", ""),
                      open=not given.get("close", False))  # fmt: skip
    else:
        _fields("submit_many without then or batch", {}, fields)
    if not submits and (batch is None or (batch.open and batch.then is None)):
        raise BadParams("submit_many takes a list of submits; it is empty")
    many = tuple(_part(f"job {n} of {len(submits)}", submit) for n, submit in enumerate(submits, 1))
    return Request(SUBMIT_MANY, SUBMIT_MANY, {}, NO_OPTIONS, many, batch, True, text)


def _fields(
    what: str, known: Mapping[str, Callable[[Any], Any]], given: dict[str, Any]
) -> dict[str, Any]:
    for name in given:
        if name not in known:
            beside = ["submit_many", *known]
            close = suggest(name, beside)
            raise BadParams(f"{what} takes {', '.join(beside)}; not {_quoted(name)}{close}")
    return {name: _convert(name, known[name], value) for name, value in given.items()}


def _part(which: str, value: Any) -> Request:
    """One submit of several. Raises RequestError that says which."""
    try:
        return _submit_of(value)
    except RequestError as error:
        raise type(error)(f"{which}: {error}") from None


def _submit_of(value: Any) -> Request:
    """A submit in a list: an object, or the line that it would be."""
    if not isinstance(value, str):
        return _json_submit(value)
    request = None if value.startswith("{") else parse(value.encode())
    if request is None or request.kind != SUBMIT:
        raise BadParams(f"a line that submits a job belongs here, not {value[:40]}")
    return request


_OF_SUBMIT = ("submit", "params", "options")
_A_SUBMIT = 'a submit is {"submit": type, "params": {...}, "options": {...}}'


def _json_submit(fields: Any, text: str = "") -> Request:
    if not isinstance(fields, dict) or "submit" not in fields:
        raise BadParams(f'{_A_SUBMIT}; a verb is {{"verb": name}}')
    for name in fields:
        if name not in _OF_SUBMIT:
            raise BadParams(f"{_A_SUBMIT}; not {_quoted(name)}{suggest(name, _OF_SUBMIT)}")
    verb = _convert("submit", _text, fields["submit"])
    params, options = fields.get("params", {}), fields.get("options", {})
    for name, given in ("params", params), ("options", options):
        if not isinstance(given, dict):
            raise BadParams(f"{name}: a JSON object is needed, not {_quoted(given)}")
    return Request(SUBMIT, verb, params, _read_options(options), (), None, True, text)


def _quoted(value: Any) -> str:
    """A value as an error message shows it: no more than its beginning."""
    return json.dumps(value)[:40]


def _load_all(text: str) -> Any:
    value, end = _load(text)
    if end < len(text):
        raise BadParams(f"text after the JSON: {wire.begun(text, end)}")
    return value


def _load(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at `start`, and where the next word starts."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise BadParams(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise BadParams(f"JSON nested deeper than {JSON_DEPTH}") from None
    except ValueError as error:
        raise BadParams(f"not JSON: {error}") from None
    # Only escapes can smuggle in what the line as a whole may not hold.
    if "\\" in text or text.count("{") + text.count("[") > JSON_DEPTH:
        _vet(value)
    blank = _BLANK.match(text, end)
    if blank is None:
        raise BadParams(f"text after the JSON: {wire.begun(text, end)}")
    return value, blank.end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a number")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
_BLANK = re.compile(r"[ \t]++|$")
#: Control characters but white space, and halves of a character, which are not UTF-8.
_SMUGGLED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def _vet(value: Any) -> None:
    """Refuse what is nested too deep, and strings that a line of text could not hold."""
    parts = [value]
    for _ in range(JSON_DEPTH + 1):
        if any(isinstance(part, str) and _SMUGGLED.search(part) for part in parts):
            raise BadText("the JSON holds a control character or half a character")
        nested = [part for part in parts if isinstance(part, dict | list)]
        if not nested:
            return
        parts = [part for item in nested for part in item]
        parts += [part for item in nested if isinstance(item, dict) for part in item.values()]
    raise BadParams(f"JSON nested deeper than {JSON_DEPTH}")


# Options and arguments: each has a function that converts it or raises ValueError


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text is needed")
    return value


def _number(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,19}", value):
        value = int(value)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a number is needed")
    return value


def _duration(value: Any) -> float:
    if type(value) in (int, float):
        value = f"{value:f}"
    return when.duration(_text(value))


def _instant(value: Any) -> int:
    at = when.instant(_text(value))
    if at >= when.TOO_LATE_AT:
        raise ValueError(f"{value!r} is later than the year 8999")
    return at


def _priority(value: Any) -> int:
    if isinstance(value, str):
        value = PRIORITIES.get(value, value)
    if isinstance(value, str) and re.fullmatch("[+-]?[0-9]{1,9}", value):
        value = int(value)
    if type(value) is not int or abs(value) > PRIORITY_LIMIT:
        raise ValueError(f"high, default, low or a number up to {PRIORITY_LIMIT} is needed")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = value.split(",")
    return tuple(dict.fromkeys(map(_number, value if isinstance(value, list) else [value])))


def _targets(value: Any) -> str:
    return " ".join(map(_text, value)) if isinstance(value, list) and value else _text(value)


def _state(value: Any) -> str:
    if value not in STATES:
        raise ValueError(f"one of {', '.join(STATES)} is needed")
    return str(value)


def _yes(value: Any) -> bool:
    if type(value) is not bool and value not in ("yes", "no"):
        raise ValueError("yes or no is needed")
    return value is True or value == "yes"


def _when(value: Any) -> str:
    if value not in (DONE, ENDED):
        raise ValueError(f"{DONE} or {ENDED} is needed")
    return str(value)


def _anything(value: Any) -> Any:
    return value


#: Option to the field of Options that it fills, and how.
_OPTIONS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "in": ("in_s", _duration),
    "at": ("run_at", _instant),
    "priority": ("priority", _priority),
    "key": ("key", _text),
    "queue": ("queue", _text),
    "node": ("node", _text),
    "timeout": ("timeout_s", _duration),
    "retries": ("retries", _number),
    "expires": ("expires_s", _duration),
    "after": ("after", _ids),
    "notify": ("notify", _targets),
    "notify_fail": ("notify_fail", _targets),
    "notify_success": ("notify_success", _targets),
}


def _read_options(given: Mapping[str, Any]) -> Options:
    if not given:
        return NO_OPTIONS
    fields = {}
    for name, value in given.items():
        if name not in _OPTIONS:
            close = suggest(name, _OPTIONS)
            raise BadParams(f"no option @{name[:40]}{close}; there are @{' @'.join(_OPTIONS)}")
        field, convert = _OPTIONS[name]
        fields[field] = _convert(f"@{name}", convert, value)
    if "in_s" in fields and "run_at" in fields:
        raise BadParams("@in and @at exclude each other")
    return Options(**fields)


class _Argument(NamedTuple):
    name: str
    is_needed: bool
    takes_rest: bool


_ARGUMENTS = {
    verb: [
        _Argument(name, bracket == "<", bool(dots))
        for bracket, name, dots in re.findall(r"([<\[])(\w+)(\.*)", known.usage)
    ]
    for verb, known in VERBS.items()
}
_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "before": _number,
    "from": _number,
    "id": _number,
    "limit": _number,
    "line": _text,
    "message": _text,
    "n": _number,
    "progress": _anything,
    "queue": _text,
    "result": _anything,
    "since": _number,
    "start": _number,
    "state": _state,
    "submitter": _text,
    "timeout": _duration,
    "token": _number,
    "ttl": _duration,
    "type": _text,
    "whole": _yes,
}


#: Where a verb means something else by a name.
_OF_VERB: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "cancel": {"since": _duration},
    "retry": {"since": _duration},
}


def _convert_arguments(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    known = _ARGUMENTS[verb]
    needed = {argument.name for argument in known if argument.is_needed}
    names = [argument.name for argument in known]
    for name in given:
        if name not in names:
            raise BadParams(f"{_misused(verb)}; not {_quoted(name)}{suggest(name, names)}")
    if not needed <= given.keys():
        raise _misused(verb)
    own = _OF_VERB.get(verb, {})
    return {
        name: _convert(name, own.get(name) or _CONVERTERS[name], value)
        for name, value in given.items()
    }


def _misused(verb: str) -> BadParams:
    return BadParams(f"usage: {verb} {VERBS[verb].usage}".rstrip())


def _convert(name: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except (ValueError, OverflowError) as error:
        raise BadParams(f"{name}: {error}") from None
