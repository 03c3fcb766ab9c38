"""What a job type takes: typed parameters, and the command line they fill.

Both are declared in the ini file. A fault in a declaration is a ValueError (the configuration adds
file and line); a fault in what a client sent is BadParams.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PosixPath, PurePath, PurePosixPath
from typing import Any

from upq.errors import BadParams

#: The spellings of true and false, in lower case.
BOOLEANS = {
    **dict.fromkeys(("yes", "true", "on", "1"), True),
    **dict.fromkeys(("no", "false", "off", "0"), False),
}

#: Of a word that nobody knows, those that are compared: it may be a line of a MiB.
SUGGEST_CHARS = 100

_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
_PARAM = re.compile(
    rf"(?P<name>{_NAME})(?::(?P<type>[a-z]+)(?:\((?P<choices>[^)]*)\))?)?(?P<optional>\?)?"
    r"""(?:=(?P<default>"[^"]*"|\S*))?(?:\s+|$)"""
)
_BARE = re.compile(r'[^\s"]+')
_BRACE = re.compile(rf"\{{\{{|\}}\}}|\{{({_NAME})\}}|[{{}}]")
_SHELLS = {"sh", "bash", "dash", "ash", "ksh", "zsh"}
_SCRIPT_NEXT = re.compile(r"-[a-z]*c")


def suggest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean fid?)", or "" when nothing known looks like the word."""
    close = difflib.get_close_matches(word[:SUGGEST_CHARS], list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any) -> str:
    """A value as an error message quotes it: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is not text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,18}", str(value)):
        raise ValueError("is not a whole number")
    return int(value)


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("is not a number")
    return number


def _truth(value: Any) -> bool:
    """A name without a value (`force` on the line) is a yes."""
    truth = True if value == "" else BOOLEANS.get(str(value).lower())
    if truth is None:
        raise ValueError("is not yes or no")
    return truth


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("is not an absolute path")
    return value


def _json(value: Any) -> Any:
    """An object or a list, so that text is always text still to be read."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict | list):
        raise ValueError("is not a JSON object or list")
    return found


_TYPES: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "int": _whole,
    "float": _number,
    "bool": _truth,
    "path": _path,
    "json": _json,
    "any": lambda value: value,
}


@dataclass(frozen=True, slots=True)
class Param:
    """One declared parameter."""

    name: str
    type: str = "str"
    #: The values a `choice` may have.
    choices: tuple[str, ...] = ()
    required: bool = True
    #: Filled in when the parameter is not given; None for none.
    default: Any = None

    def convert(self, value: Any) -> Any:
        """The value as the job gets it. Raises ValueError that says what it is not."""
        if self.type == "choice":
            if value not in self.choices:
                raise ValueError(f"is not one of {', '.join(self.choices)}")
            return value
        return _TYPES[self.type](value)

    def __str__(self) -> str:
        """As a declaration spells it."""
        kind = f":{self.type}" if self.type != "str" else ""
        if self.choices:
            kind += f"({','.join(self.choices)})"
        if self.default is None:
            return f"{self.name}{kind}{'' if self.required else '?'}"
        text = self.default if isinstance(self.default, str) else json.dumps(self.default)
        return f"{self.name}{kind}={text if _BARE.fullmatch(text) else chr(34) + text + chr(34)}"


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """The parameters of a job type: `fid:int path:path? level:choice(a,b)=a`."""

    params: tuple[Param, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ParamSpec:
        """Read a declaration: `name`, `name:type`, each followed by `?` (optional) or `=default`.

        Raises ValueError that names the parameter at fault.
        """
        params: dict[str, Param] = {}
        text, end = text.strip(), 0
        while end < len(text):
            match = _PARAM.match(text, end)
            if not match:
                raise ValueError(f"{shown(text[end:])} is not name:type, name:type? or name=value")
            param, end = _declared(match), match.end()
            if param.name in params:
                raise ValueError(f"{param.name} is declared twice")
            params[param.name] = param
        return cls(tuple(params.values()))

    @classmethod
    def of(cls, job: type, taken: Collection[str] = ()) -> ParamSpec | None:
        """What the annotations of a job class declare, those of its bases first; None for none.

        `fid: int` is required, `mode: Literal["fast", "full"] = "fast"` has a default, and what may
        be None (`Path | None`) is optional. Names that begin with `_` and ClassVars are the class's
        own, `taken` are every job's. Raises ValueError that names the parameter at fault.
        """
        params: dict[str, Param] = {}
        for base in reversed(job.__mro__[:-1]):
            if not base.__module__.startswith("upq."):
                for name, hint in _annotations(base).items():
                    if not name.startswith("_") and typing.get_origin(hint) is not typing.ClassVar:
                        if name in taken:
                            raise ValueError(
                                f"{name}: every job has an attribute of that name; choose another"
                            )
                        params[name] = _annotated(name, hint, job)
        return cls(tuple(params.values())) if params else None

    def __str__(self) -> str:
        return " ".join(map(str, self.params))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(param.name for param in self.params)

    def check(self, params: Mapping[str, Any], secret: Collection[str] = ()) -> dict[str, Any]:
        """What the job gets: values converted, defaults filled in; checking twice changes nothing.

        Raises BadParams with every fault; values of `secret` names are not repeated in it.
        """
        names = self.names
        faults = [
            f"unknown parameter {shown(name)}{suggest(name, names)}"
            for name in [name for name in params if name not in names][:3]
        ]
        checked: dict[str, Any] = {}
        for param in self.params:
            if param.name in params:
                value = params[param.name]
                try:
                    checked[param.name] = param.convert(value)
                except ValueError as error:
                    what = "the value" if param.name in secret else shown(value)
                    faults.append(f"{param.name}: {what} {error}")
            elif param.required:
                faults.append(f"{param.name}: is missing")
            elif param.default is not None:
                checked[param.name] = param.default
        if faults:
            raise BadParams("; ".join(faults))
        return checked


def _declared(match: re.Match[str]) -> Param:
    name, kind = match["name"], match["type"] or "str"
    choices = tuple(word.strip() for word in (match["choices"] or "").split(",") if word.strip())
    if kind != "choice" and kind not in _TYPES:
        raise ValueError(f"{name}: no type {shown(kind)}{suggest(kind, [*_TYPES, 'choice'])}")
    if (kind == "choice") != bool(choices):
        raise ValueError(f"{name}: choice(a,b) takes its values in brackets, other types none")
    text = match["default"]
    param = Param(name, kind, choices, required=match["optional"] is None and text is None)
    if text is None:
        return param
    try:
        return replace(param, default=param.convert(text.strip('"')))
    except ValueError as error:
        raise ValueError(f"{name}: the default {shown(text)} {error}") from None


#: What a class's annotations mean.
_HINTS: dict[Any, str] = {
    **{
        str: "str",
        int: "int",
        float: "float",
        bool: "bool",
        Any: "any",
        dict: "json",
        list: "json",
    },
    **dict.fromkeys((Path, PurePath, PosixPath, PurePosixPath), "path"),
}


def _annotations(base: type) -> dict[str, Any]:
    try:
        return inspect.get_annotations(base, eval_str=True)
    except Exception as error:  # it is the job's code, as the rest of its module
        raise ValueError(f"annotations of {base.__name__}: {error}") from None


def _annotated(name: str, hint: Any, job: type) -> Param:
    """One annotation as a parameter; its default is the attribute of the class."""
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [each for each in typing.get_args(hint) if each is not types.NoneType]
        optional = len(rest) < len(typing.get_args(hint))
        hint = rest[0] if len(rest) == 1 else hint
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) is typing.Literal:
        kind, choices = "choice", typing.get_args(hint)
    else:
        kind = _HINTS.get(typing.get_origin(hint) or hint, "")
    if not kind or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(
            f"{name}: {shown(hint)} is none of str, int, float, bool, Path, dict, list, Any and"
            " Literal of texts, each maybe `| None`; ClassVar for what is no parameter"
        )
    default = getattr(job, name, None)
    has_default = default is not None or hasattr(job, name)
    param = Param(name, kind, choices, required=not optional and not has_default)
    if default is None:
        return param
    try:
        value = str(default) if isinstance(default, PurePath) else default
        return replace(param, default=param.convert(value))
    except ValueError as error:
        raise ValueError(f"{name}: the default {shown(default)} {error}") from None


def _names(word: str) -> list[str]:
    return [brace[1] for brace in _BRACE.finditer(word) if brace[1]]


def _as_text(value: Any) -> str:
    """How a command sees a value: text as it is, anything else as JSON writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def split_command(text: str) -> tuple[str, ...]:
    """The words of a command, split as a shell would, each {placeholder} still in its word.

    Raises ValueError for a lone brace, and where a client's value would choose the program or
    become a shell's code.
    """
    words = tuple(shlex.split(text))
    if not words:
        raise ValueError("is empty")
    for word in words:
        refuse_lone_braces(word)
    if _names(words[0]):
        raise ValueError("the program itself cannot be a {placeholder}")
    for at, word in enumerate(words):
        in_shell = _SCRIPT_NEXT.fullmatch(word) and _SHELLS & {PurePath(w).name for w in words[:at]}
        if in_shell and _names("".join(words[at + 1 : at + 2])):
            raise ValueError(
                "a {placeholder} in a shell's script would run as code;"
                """ write it after the script: sh -c 'rm "$1"' sh {path}"""
            )
    return words


_QUEUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@/+-]*")
#: Characters of a queue's name, which are bytes too.
QUEUE_LIMIT = 255


def queue_name(text: str) -> str:
    """The text, when a queue may have it for a name. Raises ValueError that says what it is not."""
    if not _QUEUE.fullmatch(text):
        raise ValueError(f"{shown(text)} is not a queue's name: A-Z a-z 0-9 _ . @ / + -")
    if len(text) > QUEUE_LIMIT:
        raise ValueError(f"{shown(text)} has more than {QUEUE_LIMIT} characters")
    return text


def queue_template(text: str) -> str:
    """A queue's name that may hold {placeholders}. Raises ValueError."""
    if any(brace[0] in ("{", "}", "{{", "}}") for brace in _BRACE.finditer(text)):
        raise ValueError(f"{shown(text)} has a lone brace")
    queue_name(_BRACE.sub("x", text))
    return text


def queue_of(template: str, params: Mapping[str, Any]) -> str:
    """The queue that a template names for these params. Raises BadParams."""
    names = _names(template)
    for name in names:
        if params.get(name) in (None, ""):
            raise BadParams(f"{name}: is missing, the queue is {template}")
    try:
        return queue_name(_BRACE.sub(lambda brace: _as_text(params[brace[1]]), template))
    except ValueError as error:
        raise BadParams(f"{', '.join(names)}: {error}") from None


def fill_key(
    template: str, params: Mapping[str, Any], setting: str = "serial", said: str = ""
) -> str:
    """The key of these parameters. Raises BadParams when it asks for one that is not given."""
    for name in _names(template):
        if params.get(name) is None:
            raise BadParams(f"{name}: is missing, {setting} = {said or template} asks for it")
    return _BRACE.sub(
        lambda brace: _as_text(params[brace[1]]) if brace[1] else brace[0][0], template
    )


def refuse_lone_braces(text: str) -> None:
    if any(brace[0] in "{}" for brace in _BRACE.finditer(text)):
        raise ValueError(f"{shown(text)} has a lone brace; write {{{{ or }}}} for a literal one")


def names_in(template: str) -> list[str]:
    """The names of its {placeholders}, each once, in order."""
    return list(dict.fromkeys(_names(template)))


def filled(template: str, params: Mapping[str, Any]) -> str | None:
    """The template with its values; None when one of them is not given. Raises BadParams."""
    names = _names(template)
    if any(params.get(name) is None for name in names):
        return None
    text = _BRACE.sub(
        lambda brace: _as_text(params[brace[1]]) if brace[1] else brace[0][0], template
    )
    if "\0" in text:
        raise BadParams(f"{names[0]}: holds a NUL character")
    return text


def folder(template: str, params: Mapping[str, Any]) -> str | None:
    """A path with its values. Raises BadParams for one that would lead elsewhere: but for a
    placeholder at the very beginning, whose type is `path`, a value is the name of one thing.
    """
    for name in _names(template)[template.startswith("{") :]:
        value = params.get(name)
        if value is not None and (_as_text(value) in ("", ".", "..") or "/" in _as_text(value)):
            raise BadParams(f"{name}: the value is not the name of a folder")
    return filled(template, params)


def argv(
    template: Iterable[str], params: Mapping[str, Any], free: Collection[str] = ()
) -> list[str]:
    """The arguments of a command: each word of the template stays one argument, whatever is in it.

    A word whose placeholder has no value is left out. Raises BadParams for a value with a NUL, and
    for one that would pass for an option: it begins with "-", its name is not a `free` one, no text
    stands before it in its word and no `--` word before that.
    """
    words = []
    options_over = False
    for word in template:
        text = filled(word, params)
        if text is None:
            continue
        names = _names(word)
        opens_with_value = names and word.startswith("{" + names[0] + "}")
        may_be_option = opens_with_value and not options_over and names[0] not in free
        if may_be_option and text.startswith("-"):
            raise BadParams(f"{names[0]}: a value that begins with '-' is not accepted")
        options_over = options_over or word == "--"
        words.append(text)
    return words
