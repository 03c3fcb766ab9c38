"""How a setting is declared: a field with its kind, its default in the spelling of the ini file
and its meaning. What reads settings, and what tells of them, asks `declared`.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, NamedTuple, TypeVar

from upq.kinds import Kind

T = TypeVar("T")


class Setting(NamedTuple):
    """One declaration, as parser and reference see it."""

    name: str
    key: str
    kind: Kind[Any]
    #: In the spelling of the ini file.
    default: str
    meaning: str
    #: `<key>_file` may name a file that holds the value.
    secret: bool


def setting(kind: Kind[T], default: str, meaning: str, key: str = "", secret: bool = False) -> T:
    """Declare a setting. Its key is the field's name without the unit, unless one is given."""
    value = kind.read(default) if default else kind.empty
    declaration = Setting("", key, kind, default, meaning, secret)
    made: Any = field(
        default_factory=lambda: value, repr=not secret, metadata={"setting": declaration}
    )
    return made  # type: ignore[no-any-return]


def declared(section: Any) -> dict[str, Setting]:
    """The settings of a section's class by key."""
    found = {}
    for each in fields(section):
        if each.metadata:
            key = each.metadata["setting"].key or key_of(each.name)
            found[key] = each.metadata["setting"]._replace(name=each.name, key=key)
    return found


def key_of(name: str) -> str:
    return name.removesuffix("_s").removesuffix("_bytes")
