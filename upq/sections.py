"""A section of `upq.cfg` becomes an object of its class; what cannot be read keeps its default, and
is a fault.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

from upq.declaration import declared
from upq.ini import Ini, Item, Place
from upq.kinds import NOT_YET, PATH
from upq.params import shown, suggest
from upq.settings import LATER

T = TypeVar("T")


def fill(cls: type[T], section: str, ini: Ini, /, **more: Any) -> T:
    """An object of a section's class from its items; what cannot be read keeps its default."""
    values = more
    items = dict(ini.sections[section].items)
    known = declared(cls)
    for key, each in known.items():
        item = items.pop(key, None)
        pointer = items.pop(f"{key}_file", None) if each.secret else None
        if pointer and item:
            ini.fault(pointer.place, f"{key}_file: {key} is given, too")
        elif pointer:
            try:
                item = from_file(pointer, ini.folder)
            except ValueError as error:
                ini.fault(pointer.place, f"{key}_file: {error}")
        try:
            text = item.text if item and item.text else each.default
            value = each.kind.read(text) if text else each.kind.empty
            values[each.name] = absolute(ini.folder, value) if each.kind is PATH else value
        except ValueError as error:
            assert item  # a default can be read: its declaration did
            ini.fault(item.place, f"{key}: {error}{_slip(item.text)}")
    for key, item in items.items():
        _judge_other(key, item.place, section, list(known), ini)
    return cls(**values)


def absolute(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, path)) if path else ""


def _slip(text: str) -> str:
    if "\n" in text:
        return " (an indented line goes on with the one above)"
    return " (a comment needs a line of its own)" if re.search(r"\s[#;]", text) else ""


def from_file(pointer: Item, folder: str) -> Item:
    """What the file holds that an item names. Raises ValueError that says why it cannot be had."""
    try:
        return Item(Path(folder, pointer.text).read_text("utf-8").strip(), pointer.place)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ValueError(f"{pointer.text}: {why}") from None


def _judge_other(key: str, place: Place, section: str, known: list[str], ini: Ini) -> None:
    """Say what is wrong with a name that is not declared, if anything is."""
    kind = section.partition(" ")[0]
    if key in LATER.get(kind, ()):
        ini.fault(place, f"{key}: {NOT_YET}")
    elif kind not in ("job", "paths"):
        ini.fault(place, f"no setting {shown(key)} in [{section}]{suggest(key, known)}")
    elif near := [name for name in known if _one_slip(key, name)]:
        ini.warn(place, f"{key}: taken as the job's own name; did you mean {near[0]}?")


def _one_slip(word: str, other: str) -> bool:
    """Whether one letter more, less, other or swapped with its neighbour makes the other word."""
    differ = (at for at, pair in enumerate(zip(word, other, strict=False)) if pair[0] != pair[1])
    start = next(differ, min(len(word), len(other)))
    a, b = word[start:], other[start:]
    swapped = a[:2] == b[:2][::-1] and a[2:] == b[2:]
    return len(other) > 3 and (swapped or a[1:] == b[1:] or a[1:] == b or a == b[1:])
